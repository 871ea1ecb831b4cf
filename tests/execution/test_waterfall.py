"""What a liquidation closes, who gets what, and who bears what is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qpo_sim import venue
from qpo_sim.errors import InputError
from qpo_sim.execution.liquidation import (
    close_out,
    close_share,
    is_below_maintenance,
    liquidate,
    margin_ratio,
    partial_close_share,
    takeover,
    tier_close_share,
    tier_of,
    tiered_close_share,
)
from qpo_sim.execution.waterfall import (
    RULES,
    adl_rank,
    effective_leverage,
    layers,
    pro_rata_shares,
    queue_closed_haircuts,
    queue_shares,
    waterfall,
)
from qpo_sim.venue.tiered_margin import (
    LiquidationProcess,
    TierSchedule,
    active_tier,
    maintenance_margin,
    one_rate,
    tier_schedule,
)

TIERS = tier_schedule([[0.0, 0.01], [100.0, 0.02], [300.0, 0.05], [1000.0, 0.2]])
NOTIONALS = st.floats(1.0, 3000.0)


@settings(max_examples=200, deadline=None)
@given(NOTIONALS, st.floats(-0.2, 1.3), st.sampled_from([0.0, 0.002, 0.015, 0.03]), st.sampled_from([1.0, 1.5]),
       st.sampled_from([0.0, 3.0]))  # fmt: skip
def test_the_tiered_share_is_the_smallest_that_makes_the_rest_compliant(notional, ratio, cost, target, other):
    equity = ratio * target * (float(maintenance_margin(TIERS, notional)) + other)
    share = float(tiered_close_share(TIERS, notional, equity, cost_rate=cost, target=target, other_maintenance=other))

    def excess(share):
        required = target * (maintenance_margin(TIERS, (1.0 - share) * notional) + other)
        return equity - share * notional * cost - required

    grid = np.linspace(0.0, 1.0, 4001)
    enough = excess(grid) >= -1e-12 * notional
    assert 0.0 <= share <= 1.0
    if share < 1.0:
        assert excess(share) >= -1e-9 * notional
        # Nothing is closed in vain.
        assert share <= grid[enough][0] + 1e-9
    else:
        assert not np.any(enough[grid < 1.0 - 1e-3])


@settings(max_examples=60, deadline=None)
@given(st.floats(0.1, 1.2), st.floats(0.0, 0.03), st.floats(1.0, 2.0))
def test_both_shares_agree_within_the_first_tier(ratio, cost, target):
    notional = 80.0
    maintenance = float(maintenance_margin(TIERS, notional))
    equity = ratio * maintenance
    # Tiers above do not matter for a smaller position.
    exact = tiered_close_share(one_rate(0.01), notional, equity, cost_rate=cost, target=target)
    assert float(exact) == pytest.approx(
        float(partial_close_share(equity, maintenance, cost * notional, target=target)), abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(NOTIONALS, st.floats(0.3, 1.0), st.floats(0.0, 0.005))
def test_the_share_of_an_account_is_never_too_small(notional, ratio, cost):
    maintenance = float(maintenance_margin(TIERS, notional))
    equity = ratio * maintenance
    share = float(partial_close_share(equity, maintenance, cost * notional))
    assert share >= float(tiered_close_share(TIERS, notional, equity, cost_rate=cost)) - 1e-9
    left = equity - share * cost * notional
    assert share == 1.0 or left >= float(maintenance_margin(TIERS, (1.0 - share) * notional)) - 1e-9 * notional


def test_a_share_that_cannot_help_is_the_whole():
    # Closing costs 3 % where maintenance is 1 %: it never helps, unless nothing is missing.
    assert float(partial_close_share(0.5, 1.0, 3.0)) == 1.0
    assert float(partial_close_share(1.0, 1.0, 3.0)) == 0.0
    assert float(tiered_close_share(one_rate(0.01), 100.0, 0.5, cost_rate=0.03)) == 1.0
    assert float(tiered_close_share(one_rate(0.01), 100.0, 1.5, cost_rate=0.03)) == 0.0
    assert float(tiered_close_share(one_rate(0.01), 100.0, 0.5, cost_rate=0.01)) == 1.0
    assert float(tiered_close_share(TIERS, 100.0, -5.0)) == 1.0
    assert float(tiered_close_share(TIERS, 0.0, -5.0)) == 0.0


@pytest.mark.slow
def test_shares_have_finite_gradients_and_match_differences():
    schedule = TierSchedule(*map(jnp.asarray, TIERS))

    def total(equity):
        return jnp.sum(tiered_close_share(schedule, jnp.full_like(equity, 800.0), equity, cost_rate=0.002))

    equity = jnp.array([-3.0, 0.0, 5.0, 20.0, 100.0])
    gradient = jax.grad(total)(equity)
    h = 1e-6
    differences = [(total(equity.at[i].add(h)) - total(equity.at[i].add(-h))) / (2.0 * h) for i in range(5)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)
    assert np.any(gradient < 0.0)
    for f in (
        lambda e: partial_close_share(e, 0.0 * e, 0.0 * e).sum(),
        lambda e: margin_ratio(e, 0.0 * e).sum(),
        lambda e: tiered_close_share(schedule, 0.0 * e, e).sum(),
    ):
        assert np.all(np.isfinite(jax.grad(f)(equity)))


@pytest.mark.parametrize(
    ("size", "kept"), [(50.0, 0.0), (150.0, 0.0), (350.0, 100.0), (900.0, 100.0), (1000.0, 100.0), (1500.0, 300.0)]
)
def test_positions_from_the_third_tier_on_fall_by_two(size, kept):
    schedule = tier_schedule([[0.0, 0.01], [100.0, 0.02], [300.0, 0.05], [1000.0, 0.2]], flat=True)
    rich = dict(equity=0.5 * size, value=size)
    share = float(tier_close_share(schedule, size, tiers_down=2, **rich))
    assert (1.0 - share) * size == pytest.approx(kept, rel=2e-6)
    if kept > 0.0:
        assert float(tier_of(schedule, size)) - float(tier_of(schedule, (1.0 - share) * size)) == pytest.approx(2.0)
        assert float(active_tier(schedule, (1.0 - share) * size)[0]) < float(active_tier(schedule, size)[0])
    # Equity that would not do in the first tier either: all of it.
    assert (
        float(tier_close_share(schedule, size, tiers_down=2, equity=0.0105 * size, value=size, fee_rate=0.001)) == 1.0
    )


EQUITIES = st.floats(-100.0, 200.0)
COSTS = st.sampled_from([0.0, 0.005, 0.03])


@settings(max_examples=100, deadline=None)
@given(EQUITIES, NOTIONALS, st.floats(0.0, 1.0), COSTS, COSTS)
def test_closing_conserves_money(equity, notional, share, fee_rate, slippage_rate):
    closed = close_out(equity, notional, share=share, fee_rate=fee_rate, slippage_rate=slippage_rate)
    taken = takeover(equity, notional, slippage_rate=slippage_rate)
    for outcome in (closed, taken):
        assert float(outcome.equity + outcome.fee + outcome.slippage - outcome.shortfall) == pytest.approx(
            equity, abs=1e-9 * (notional + abs(equity))
        )
        assert min(map(float, outcome)) >= 0.0
        assert float(outcome.shortfall) == 0.0 or float(outcome.equity) == float(outcome.fee) == 0.0
    assert float(closed.fee) <= fee_rate * share * notional + 1e-12
    # What the ledger pays to a user whose account is closed whole.
    whole = close_out(equity, notional, share=1.0, fee_rate=fee_rate, slippage_rate=slippage_rate)
    assert float(whole.equity) == pytest.approx(
        max(equity - (fee_rate + slippage_rate) * notional, 0.0), abs=1e-9 * notional
    )
    assert float(taken.equity) == 0.0


def test_processes_decide_on_path_arrays():
    equity = jnp.array([900.0, 700.0, 600.0, -50.0])
    maintenance = jnp.full(4, 1000.0)
    notional = jnp.array([80_000.0, 150_000.0, 150_000.0, 150_000.0])
    account = dict(equity=equity, maintenance=maintenance, notional=notional, cost=0.0 * notional)
    hyperliquid = venue.load("hyperliquid").process
    share = close_share(hyperliquid, **account)
    np.testing.assert_allclose(share, [1.0, 0.2, 1.0, 1.0])
    outcome = liquidate(
        hyperliquid, equity=equity, maintenance=maintenance, notional=notional, share=share, fee_rate=0.0,
        slippage_rate=0.001,
    )  # fmt: skip
    # Below two thirds of the maintenance margin the vault takes everything.
    np.testing.assert_allclose(outcome.equity, [820.0, 670.0, 0.0, 0.0])
    np.testing.assert_allclose(outcome.fee, [0.0, 0.0, 450.0, 0.0])
    np.testing.assert_allclose(outcome.shortfall, [0.0, 0.0, 0.0, 200.0])
    np.testing.assert_allclose(close_share(LiquidationProcess(), **account), 1.0)
    np.testing.assert_allclose(
        close_share(LiquidationProcess(process="partial"), **account), [0.1, 0.3, 0.4, 1.0], rtol=1e-12
    )
    np.testing.assert_allclose(
        close_share(LiquidationProcess(process="partial"), **account, compliant_share=0.5 + 0.0 * equity),
        [0.5, 0.5, 0.5, 1.0],  # nothing is left to be compliant with
    )
    bybit = venue.load("bybit").process
    taken = liquidate(
        bybit, equity=equity, maintenance=maintenance, notional=notional, share=close_share(bybit, **account),
        fee_rate=0.0, slippage_rate=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(taken.equity, 0.0)
    np.testing.assert_allclose(taken.fee - taken.shortfall, equity)
    okx = venue.load("okx").process
    np.testing.assert_allclose(close_share(okx, **account, tier_share=0.25 + 0.0 * equity), [0.25, 0.25, 0.25, 1.0])
    with pytest.raises(InputError, match="tiers by size"):
        close_share(okx, **account)


def test_the_test_of_an_account():
    assert bool(is_below_maintenance(1.0, 1.0)) and not bool(is_below_maintenance(1.001, 1.0))
    assert bool(is_below_maintenance(1.05, 1.0, fee=0.1))
    assert float(margin_ratio(2.2, 1.0, fee=0.1)) == pytest.approx(2.0)
    assert float(margin_ratio(1.0, 0.0)) == np.inf


def test_ranks_by_hand():
    # Return 50 % at leverage 10/1.5, and a loser of 20 % at leverage 5/0.8.
    rank = adl_rank(jnp.array([50.0, -20.0, 0.0]), jnp.full(3, 100.0), jnp.array([1000.0, 500.0, 500.0]))
    np.testing.assert_allclose(rank, [0.5 * 1000.0 / 150.0, -0.2 / (500.0 / 80.0), 0.0], rtol=1e-12)
    assert float(effective_leverage(50.0, 100.0, 1000.0)) == pytest.approx(1000.0 / 150.0)
    assert float(effective_leverage(-120.0, 100.0, 1000.0)) == np.inf
    assert np.isfinite(float(jax.grad(lambda p: adl_rank(p, 100.0, 1000.0))(-150.0)))


@settings(max_examples=60, deadline=None)
@given(st.floats(1.0, 1e3), st.floats(0.01, 3.0), st.floats(1.0, 50.0))
def test_more_profit_or_leverage_ranks_higher(margin, gain, leverage):
    base = adl_rank(gain * margin, margin, leverage * margin)
    assert float(adl_rank(gain * margin, margin, 1.1 * leverage * margin)) > float(base)
    assert float(adl_rank(1.1 * gain * margin, margin, leverage * margin)) > float(base)
    assert float(base) > 0.0 >= float(adl_rank(-gain * margin, margin, leverage * margin))


def loop_queue(needed, available, rank):
    """The queue, one account after the other."""
    given_up = np.zeros_like(available)
    for i in sorted(range(len(rank)), key=lambda i: (-rank[i], i)):
        given_up[i] = min(max(needed, 0.0), max(available[i], 0.0))
        needed -= given_up[i]
    return given_up


ACCOUNTS = st.lists(
    st.tuples(st.one_of(st.floats(-50.0, 0.0), st.floats(0.01, 100.0)), st.floats(-2.0, 20.0)), min_size=1, max_size=8
)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0, 400.0), ACCOUNTS)
def test_queue_and_pro_rata_cover_what_they_can(needed, accounts):
    available, rank = (np.array(column) for column in zip(*accounts, strict=True))
    queue, share = queue_shares(needed, available, rank), pro_rata_shares(needed, available)
    total = np.sum(np.maximum(available, 0.0))
    for taken in (queue, share):
        assert float(np.sum(taken)) == pytest.approx(min(needed, total), abs=1e-9)
        assert np.all(taken >= 0.0) and np.all(taken <= np.maximum(available, 0.0) + 1e-12)
    np.testing.assert_allclose(queue, loop_queue(needed, available, rank), atol=1e-9)
    winners = available > 0.0
    assume(np.any(winners))
    ratios = np.asarray(share)[winners] / available[winners]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9, atol=1e-15)


def test_queues_on_paths_are_queues_of_each_path():
    rng = np.random.default_rng(3)
    available, rank, needed = rng.normal(20.0, 30.0, (6, 40)), rng.normal(size=(6, 40)), rng.uniform(0.0, 150.0, 40)
    got = queue_shares(needed, available, rank)
    for j in range(40):
        np.testing.assert_allclose(got[:, j], loop_queue(needed[j], available[:, j], rank[:, j]), atol=1e-9)


def test_a_queue_of_quantities_takes_the_deficit():
    closed, haircut = queue_closed_haircuts(30.0, 10.0, np.array([4.0, 20.0, 3.0]), np.array([1.0, 0.0, 2.0]))
    np.testing.assert_allclose(closed, [4.0, 3.0, 3.0])
    np.testing.assert_allclose(haircut, 3.0 * closed)
    assert float(np.sum(haircut)) == pytest.approx(30.0)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.0, 500.0),
    st.floats(-10.0, 50.0),
    st.floats(0.0, 80.0),
    ACCOUNTS,
    st.sampled_from(RULES),
)
def test_the_waterfall_creates_and_destroys_nothing(loss, margin, fund, accounts, rule):
    profit, rank = (np.array(column) for column in zip(*accounts, strict=True))
    equity = np.maximum(profit + 20.0, -5.0)
    result = waterfall(loss, margin=margin, fund=fund, profit=profit, equity=equity, rank=rank, rule=rule)
    scale = 1e-9 * (1.0 + loss)
    assert float(sum(result.layers)) == pytest.approx(loss, abs=scale)
    assert float(np.sum(result.haircuts)) == pytest.approx(float(result.layers.deleveraging), abs=scale)
    assert float(np.sum(result.socialised) + result.uncovered) == pytest.approx(
        float(result.layers.socialised), abs=scale
    )
    assert float(fund - result.fund) == pytest.approx(float(result.layers.fund), abs=scale)
    assert min(map(float, result.layers)) >= 0.0 and float(result.fund) >= 0.0
    # Later layers open only when the earlier ones are empty, and nobody ends below zero by it.
    if float(result.layers.fund) > scale:
        assert float(result.layers.margin) == pytest.approx(max(margin, 0.0))
    if float(result.layers.deleveraging) > scale:
        assert float(result.fund) == pytest.approx(0.0, abs=scale)
    assert np.all(equity - result.haircuts - result.socialised >= np.minimum(equity, 0.0) - scale)


def test_layers_by_hand():
    found = layers(jnp.array([5.0, 30.0, 100.0]), margin=10.0, fund=25.0, deleveraging=40.0)
    np.testing.assert_allclose(found.margin, [5.0, 10.0, 10.0])
    np.testing.assert_allclose(found.fund, [0.0, 20.0, 25.0])
    np.testing.assert_allclose(found.deleveraging, [0.0, 0.0, 40.0])
    np.testing.assert_allclose(found.socialised, [0.0, 0.0, 25.0])
    np.testing.assert_allclose(pro_rata_shares(30.0, np.array([60.0, -5.0, 40.0])), [18.0, 0.0, 12.0])


def test_unknown_rules_are_refused():
    given_values = dict(margin=0.0, fund=0.0, profit=np.ones(2), equity=np.ones(2))
    with pytest.raises(InputError, match="rule is 'lottery'"):
        waterfall(1.0, **given_values, rule="lottery")
    with pytest.raises(InputError, match="rank is missing"):
        waterfall(1.0, **given_values, rule="queue")
