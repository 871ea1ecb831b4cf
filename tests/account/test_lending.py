"""Loans that can change along a path: against the fixed loan, closed cases, and the books of every party."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, lending

from qpo_sim import random
from qpo_sim.account.lending import lending as loan_account
from qpo_sim.book import build_book
from qpo_sim.errors import InputError
from qpo_sim.execution import gas
from qpo_sim.instrument.contract import USD
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import compose, gbm, model
from qpo_sim.market.side.borrow_rate import kinked_rate
from qpo_sim.market.statistics import Statistics
from qpo_sim.policy.orders import Order
from qpo_sim.simulate import Plan, context_of, finish, outcome_of, run_line, simulate_paths, stage_line
from qpo_sim.venue import load
from qpo_sim.venue.compound import Compound
from qpo_sim.venue.liquity import Liquity
from qpo_sim.venue.morpho import Morpho
from qpo_sim.venue.vault import Vault

ASSETS = ("ETH", "BTC", "STABLE")
CAPITAL = 1e6
ONE_ASSET = ("ETH",)
RULES = {
    "health_factor": lending(
        liquidation_threshold={"ETH": 0.83, "BTC": 0.78},
        liquidation_bonus={"ETH": 0.05, "BTC": 0.06},
        ltv={"ETH": 0.8, "BTC": 0.73},
        liquidation_protocol_fee={"default": 0.1},
        borrow_rate_per_year=0.2,
    ),
    "compound": Compound("USD", {"default": dict(borrow=0.8, liquidate=0.85, liquidation_factor=0.93)}, 0.5),
    "morpho": Morpho({"default": 0.86}, close_share=0.7, borrow_rate_per_year=0.05),
    "vault": Vault({"default": 1.45}, tip=300.0, chip=0.001, hole_usd=3e5, dust_usd=1e4, borrow_rate_per_year=0.04),
    "liquity_v1": Liquity(1, {"default": 1.1}, gas_deposit_usd=200.0, pool_usd=1e5, system_ratio=1.4),
    "liquity_v2": Liquity(2, {"default": 1.1}, gas_deposit_usd=100.0, gas_cap_usd=5400.0, pool_usd=1e5),
}


def jumpy_market(*, side=(), dtype=F64, jumps=True, drift=-1.0):
    """Falling coins that jump together, and a third one that moves little."""
    returns = np.random.default_rng(1).normal(size=(50, len(ASSETS)))
    return compose.compose_market(
        Statistics(ASSETS, 24.0, returns, np.eye(3)),
        volatility_per_year=[0.8, 0.7, 0.1],
        correlation=0.5,
        jumps=[dict(kind="merton", intensity=12.0, mean=-0.15, sd=0.1)] if jumps else (),
        side=side,
        drift="user",
        per_year={"ETH": drift, "BTC": drift, "STABLE": 0.0},
        dtype=dtype,
    )


@partial(jax.jit, static_argnames="plan")
def _run(market, book, keys, path, plan):
    context = context_of(market, model.prepare(market), book, keys, path, plan)
    line = stage_line(market, book, plan)
    states = run_line(line, context)
    accounts = dict(zip([stage.name for stage in line], states, strict=True))["settle"].desk.accounts
    return outcome_of(*finish(line, states, context, plan)), accounts[0]


def run(market, account, n_paths, plan, seed=0, **book):
    """Outcome, and the state of the account at the end."""
    book = build_book(market.assets, capital=CAPITAL, accounts=[account], dtype=market.drift.dtype, **book)
    return _run(market, book, random.stream_keys(seed), jnp.arange(n_paths, dtype=jnp.uint32), plan)


def described(venue, **changes):
    return dict(kind="lending", name="loan", venue=venue, collateral={"ETH": 0.6}, debt={"USD": 0.4}) | changes


def built(venue, *, dtype=F64, assets=ASSETS, prices=None, **changes):
    options = {k: v for k, v in described(venue, **changes).items() if k != "kind"}
    return loan_account(**options, assets=assets, capital=CAPITAL, prices=prices or {}, venue_of=load, dtype=dtype)


# ----------------------------------------------------------------------------- against the loan of fixed positions


def test_on_step_ends_it_is_the_fixed_loan_path_by_path():
    market = gbm(ONE_ASSET, [0.9], mean_per_year=-0.5, drift="historical", dtype=F64)
    rule, plan = lending(borrow_rate_per_year=0.1), Plan(20, monitoring="step")
    fixed = build_book(
        ONE_ASSET,
        capital=CAPITAL,
        loans=[dict(name="loan", venue=rule, collateral={"ETH": 0.6}, debt={"USD": 0.45})],
        dtype=F64,
    )
    expected = simulate_paths(market, fixed, 2000, plan, seed=3)
    outcome, state = run(market, described(rule, debt={"USD": 0.45}), 2000, plan, seed=3)
    np.testing.assert_array_equal(outcome.is_liquidated, expected.is_liquidated)
    assert 0.1 < float(jnp.mean(outcome.is_liquidated)) < 0.9
    # The fixed loan's holder owes what the collateral does not cover.
    owned = jnp.maximum(expected.account_equity, 0.0)
    np.testing.assert_allclose(outcome.account_equity, owned, atol=1e-12)
    np.testing.assert_allclose(state.shortfall, -jnp.minimum(expected.account_equity[0], 0.0), atol=1e-12)


@pytest.mark.parametrize("debt", [{"USD": 0.42}, {"USD": 0.2, "BTC": 0.22}])
def test_between_step_ends_it_agrees_with_the_fixed_loan(debt):
    """Liquidations, mean and deviation of equity on other paths; six figures at 4.5 standard errors: 4e-5 of alarm."""
    market = gbm(("ETH", "BTC"), [0.8, 0.7], [[1.0, 0.6], [0.6, 1.0]], dtype=jnp.float32)
    rule, plan, n = lending(borrow_rate_per_year=0.1), Plan(10), 20_000
    loan = dict(name="loan", venue=rule, collateral={"ETH": 0.6}, debt=debt)
    one = simulate_paths(market, build_book(market.assets, capital=CAPITAL, loans=[loan]), n, plan, seed=1)
    book = build_book(market.assets, capital=CAPITAL, accounts=[dict(kind="lending", **loan)])
    other = simulate_paths(market, book, n, plan, seed=2)

    def figures(outcome):
        equity = np.asarray(outcome.account_equity[0], np.float64)
        rows = [
            np.asarray(outcome.is_liquidated[0], np.float64),
            np.asarray(outcome.hit_probability[-1, 0], np.float64),
            equity,
            (equity - equity.mean()) ** 2,
        ]
        return [(row.mean(), row.std(ddof=1) / np.sqrt(n)) for row in rows]

    hits = figures(one)[0][0]
    assert 0.02 < hits < 0.6
    for (a, error_a), (b, error_b) in zip(figures(one), figures(other), strict=True):
        assert abs(a - b) < 4.5 * np.hypot(error_a, error_b), (a, b, error_a, error_b)


@pytest.mark.parametrize("n_points", [1, 4])
def test_probability_is_the_frequency_of_liquidations(n_points):
    """Compensator and count on the same paths, with jumps; 4.5 standard errors of their difference: 7e-6 of alarm."""
    market, n = jumpy_market(dtype=jnp.float32), 20_000
    account = described(RULES["health_factor"], collateral={"ETH": 0.4, "BTC": 0.2}, debt={"USD": 0.2, "STABLE": 0.2})
    book = build_book(ASSETS, capital=CAPITAL, accounts=[account | dict(n_points=n_points)])
    outcome = simulate_paths(market, book, n, Plan(8), seed=4)
    gap = np.asarray(outcome.hit_probability[-1, 0], np.float64) - np.asarray(outcome.is_liquidated[0])
    assert 0.05 < np.mean(outcome.is_liquidated) < 0.9
    assert abs(gap.mean()) < 4.5 * gap.std(ddof=1) / np.sqrt(n)


# ----------------------------------------------------------------------------- the books


SIDES = [
    dict(kind="oracle", drivers=["ETH", "BTC"], threshold=0.03, latency_hours=6.0, outage_per_day=0.2),
    dict(kind="gas", level=20.0),
    dict(kind="borrow_rate", drivers=["ETH"], utilisation=0.93),
]


# Compiling takes most of the time: every rule with every trigger runs among the slow tests.
QUICK = ("health_factor-index", "compound-oracle")


@pytest.mark.parametrize(
    ("name", "trigger"),
    [
        pytest.param(name, trigger, marks=() if f"{name}-{trigger}" in QUICK else pytest.mark.slow)
        for name in RULES
        for trigger in ("index", "oracle")
    ],
)
def test_nothing_is_created_or_destroyed(name, trigger):
    """Every rule on random loans, with jumps, oracle, gas and rates: equity moves by what is booked."""
    rule, rng = RULES[name], np.random.default_rng(len(name))
    market, liquidated = jumpy_market(side=SIDES), 0.0
    plan = Plan(12, monitoring="step" if trigger == "oracle" else "bridge")
    for _ in range(2):
        collateral, debt = {"ETH": 0.6}, {"USD": rng.uniform(0.3, 0.4)}
        if name == "health_factor":
            collateral = {"ETH": 0.4, "BTC": rng.uniform(0.15, 0.3)}
            debt = {"USD": rng.uniform(0.2, 0.22), "STABLE": rng.uniform(0.19, 0.21)}
        account = described(
            rule,
            collateral=collateral,
            debt=debt,
            trigger=trigger,
            max_liquidations_per_step=2,
            supply_rate={"ETH": 0.02},
        )
        outcome, state = run(market, account, 512, plan, prices={"ETH": 2000.0})
        booked = sum(outcome.accounts.values())
        np.testing.assert_allclose(outcome.equity[-1] - 1.0, booked, atol=1e-10)
        np.testing.assert_allclose(jnp.sum(outcome.components, axis=0), booked, atol=1e-10)
        for amount in (*state.collateral, *state.debt, state.cash, state.shortfall):
            assert float(jnp.min(amount)) >= -1e-15
        liquidated += float(jnp.mean(outcome.is_liquidated))
    assert liquidated > 0.02


def test_policies_move_value_and_create_none():
    market = jumpy_market(side=[dict(kind="depth")], drift=-2.0)
    policies = [
        dict(kind="ladder", account="loan", ratios=[0.9], keep=[0.7]),
        dict(kind="top_up", account="loan", trigger=0.8, target=0.7),
    ]
    account = described(RULES["health_factor"], taker_slippage=0.003, debt={"USD": 0.2, "STABLE": 0.2})
    outcome, state = run(market, account, 512, Plan(20), policies=policies)
    np.testing.assert_allclose(outcome.equity[-1] - 1.0, sum(outcome.accounts.values()), atol=1e-10)
    assert float(jnp.max(state.status.booking.trading)) == 0.0 > float(jnp.min(state.status.booking.trading))
    bare, _ = run(market, account, 512, Plan(20))
    assert float(jnp.mean(outcome.is_liquidated)) < float(jnp.mean(bare.is_liquidated))


def test_a_fill_repays_from_collateral_and_then_from_cash():
    account = built(lending(), debt={"USD": 0.2, "BTC": 0.2}, taker_slippage=0.01)
    one = jnp.ones(3)
    scene = Scene((one * 0.9, one * 1.1, one), 0.0 * one[:1], {})
    state = account.init(_no_context(), Scene((one,) * 3, 0.0 * one[:1], {}), None)
    state = account._settled(state, scene)
    assert float(state.status.equity[0]) == pytest.approx(0.6 * 0.9 - 0.42)
    after, moved = account.fill(
        state, scene, Order(keep=jnp.array([0.5, 1.0, 1.7]), transfer=jnp.array([0.1, 9.0, -1.0]))
    )
    np.testing.assert_allclose(moved, [0.1, 0.42, 0.0], rtol=1e-12)
    np.testing.assert_allclose(after.collateral[0], [0.6 - 0.21 / 0.99 / 0.9, 0.6, 0.6], rtol=1e-12)
    np.testing.assert_allclose(after.debt[0], [0.2 * 0.11 / 0.42, 0.0, 0.2], atol=1e-15)
    cost = after.status.booking.trading
    np.testing.assert_allclose(cost, [-0.21 * (1.0 / 0.99 - 1.0), 0.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(after.status.equity - state.status.equity, moved + cost, atol=1e-15)
    # The last way out: collateral that does not suffice is sold whole.
    low = Scene((one * 0.5, one, one), 0.0 * one[:1], {})
    gone, _ = account.fill(account._settled(state, low), low, Order(keep=0.0 * one))
    np.testing.assert_allclose(gone.collateral[0], 0.0)
    np.testing.assert_allclose(sum(gone.debt), 0.4 - 0.3 * 0.99, rtol=1e-12)
    np.testing.assert_allclose(gone.shortfall, gone.status.bad_debt, rtol=1e-12)


def _no_context():
    class Context:
        class market:  # noqa: N801
            side = ()

    return Context()


def test_view_shows_health_and_exposure():
    account = built(RULES["health_factor"], collateral={"ETH": 0.4, "BTC": 0.2}, debt={"USD": 0.2, "BTC": 0.1})
    one = jnp.ones(1)
    scene = Scene((one * 0.9, one * 1.2, one), 0.0 * one, {})
    state = account.init(_no_context(), Scene((one,) * 3, 0.0 * one, {}), None)
    view = account.view(account._settled(state, scene), scene)
    weighted = 0.83 * 0.36 + 0.78 * 0.24
    assert float(view.collateral[0]) == pytest.approx(weighted, rel=1e-12)
    assert float(view.requirement[0]) == float(view.gross[0]) == pytest.approx(0.32, rel=1e-12)
    assert float(view.ratio[0]) == pytest.approx(0.32 / weighted, rel=1e-12)
    np.testing.assert_allclose([float(d[0]) for d in view.delta], [0.36, 0.24 - 0.12], rtol=1e-12)
    assert account.components(ASSETS) == ("ETH collateral", "BTC collateral", "BTC debt")


# ----------------------------------------------------------------------------- laws


def test_more_collateral_never_brings_a_liquidation():
    market, plan, before = jumpy_market(), Plan(12, monitoring="step"), None
    for collateral in (0.5, 0.51, 0.55, 0.6, 0.8):
        account = described(RULES["health_factor"], collateral={"ETH": collateral}, debt={"USD": 0.25, "STABLE": 0.14})
        now = np.asarray(run(market, account, 1024, plan)[0].is_liquidated[0])
        assert before is None or not np.any(now & ~before)
        before = now
    assert now.any()


def test_nobody_comes_for_less_than_the_gas_and_lenders_lose():
    market, plan = jumpy_market(drift=-4.0), Plan(40, monitoring="step")
    account = described(RULES["health_factor"])
    cheap, served = run(market, account, 1024, plan)
    # A half of the debt brings at most 200 000 x 5 %.
    outcome, left = run(market, account | dict(liquidation_gas_usd=3e5), 1024, plan)
    assert float(jnp.mean(cheap.is_liquidated)) > 0.5 and not np.any(outcome.is_liquidated)
    assert float(jnp.max(outcome.hit_probability)) == 0.0
    assert np.all(np.asarray(left.debt[0]) > 0.4)
    assert float(jnp.mean(left.status.bad_debt)) > 2.0 * float(jnp.mean(served.status.bad_debt))
    np.testing.assert_allclose(left.status.bad_debt, left.shortfall, atol=1e-14)
    assert np.all((np.asarray(left.shortfall) == 0.0) | (np.asarray(left.status.equity) == 0.0))


def test_gas_follows_the_market():
    account = built(lending(), prices={"ETH": 2000.0}, liquidation_gas_usd=7.0)
    one = jnp.ones(2)
    scene = Scene((one * 1.5, one, one), 0.0 * one[:1], {"gas": jnp.array([10.0, 200.0])})
    np.testing.assert_allclose(
        account.gas(scene) * CAPITAL, gas.cost(475_000, np.array([10.0, 200.0]), 3000.0), rtol=1e-12
    )
    np.testing.assert_allclose(account.gas(scene._replace(side={})) * CAPITAL, 7.0, rtol=1e-12)
    without = built(lending(), liquidation_gas_usd=7.0)
    np.testing.assert_allclose(without.gas(scene) * CAPITAL, 7.0, rtol=1e-12)


def test_a_stale_oracle_keeps_liquidators_away():
    frozen = [dict(kind="oracle", drivers=["ETH"], threshold=0.99, heartbeat_hours=1e6)]
    account = described(RULES["health_factor"], trigger="oracle")
    seen, state = run(jumpy_market(side=frozen, drift=-4.0), account, 512, Plan(40))
    assert not np.any(seen.is_liquidated) and float(jnp.max(state.status.bad_debt)) > 0.01
    # Without an oracle in the market the index is looked at, between the step ends too.
    index, _ = run(jumpy_market(drift=-4.0), account, 512, Plan(40))
    plain, _ = run(jumpy_market(drift=-4.0), account | dict(trigger="index"), 512, Plan(40))
    np.testing.assert_array_equal(index.is_liquidated, plain.is_liquidated)


def test_a_false_report_hands_collateral_out_below_the_market():
    rule = RULES["health_factor"]
    account, one = built(rule, debt={"USD": 0.45}), jnp.ones(1)
    scene = Scene((one,) * 3, 0.0 * one, {})
    state = account.init(_no_context(), scene, None)
    seen = Scene((0.9 * one, one, one), 0.0 * one, {})
    called = account._called(state, scene, seen, one)
    # Health 0.83 x 0.6 x 0.9 / 0.45 = 0.996: half of the debt goes, at the reported price plus bonus.
    amount = 0.225 * 1.05 / 0.9
    assert float(called.state.collateral[0][0]) == pytest.approx(0.6 - amount, rel=1e-12)
    assert float(called.state.debt[0][0]) == pytest.approx(0.225, rel=1e-12)
    after = account._settled(called.state, scene)
    assert float(after.status.equity[0]) == pytest.approx(0.15 + 0.225 - amount, rel=1e-12)
    fee = 0.1 * 0.225 * 0.05 / 0.9
    assert float(after.status.booking.fees[0]) == pytest.approx(-fee, rel=1e-12)
    assert float(after.status.booking.liquidation[0]) == pytest.approx(0.225 - amount + fee, rel=1e-12)


@pytest.mark.parametrize("interest", ["market", "venue"])
def test_interest_accrues_at_the_rate_in_force(interest):
    side = [dict(kind="borrow_rate", drivers=["BTC", "ETH"], utilisation=[[0.5, 0.95]], deviation=0.0)]
    market, rule = jumpy_market(side=side, jumps=False), lending(borrow_rate_per_year=0.2)
    account = described(rule, debt={"USD": 0.05, "BTC": 0.05}, interest=interest, supply_rate={"ETH": 0.03})
    _, state = run(market, account, 256, Plan(30))
    curve = dict(base=0.0, slope1=0.065, slope2=0.35, optimal=0.92)
    rates = [0.2, 0.2] if interest == "venue" else [float(kinked_rate(u, **curve)) for u in (0.95, 0.5)]
    years = 30.0 / 365.0
    for amount, rate in zip(state.debt, rates, strict=True):
        np.testing.assert_allclose(amount, 0.05 * np.exp(rate * years), rtol=1e-9)
    np.testing.assert_allclose(state.collateral[0], 0.6 * np.exp(0.03 * years), rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["health_factor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("compound", "liquity_v2"))]
)
def test_single_precision_is_the_same_account(name):
    plan, out = Plan(12, monitoring="step"), []
    for dtype in (jnp.float32, F64):
        outcome, state = run(jumpy_market(dtype=dtype), described(RULES[name]), 2048, plan)
        out.append([np.asarray(x, np.float64) for x in (outcome.account_equity[0], state.status.bad_debt)])
    for single, double in zip(*out, strict=True):
        off = np.abs(single - double)
        # A health within rounding of 1 may fall on the other side, in at most a few of 24 576 path-steps.
        assert np.quantile(off, 0.998) < 3e-5


def test_gradient_of_equity_is_that_of_the_path():
    market, plan = jumpy_market(jumps=False), Plan(4, monitoring="step")
    book = build_book(ASSETS, capital=CAPITAL, accounts=[described(lending(), debt={"USD": 0.3})], dtype=F64)

    def mean(amount):
        (account,) = book.holdings
        changed = jax.tree.map(lambda x: x, account)
        object.__setattr__(changed, "collateral", amount)
        moved = jax.tree.map(lambda x: x, book)
        object.__setattr__(moved, "holdings", (changed,))
        return jnp.mean(simulate_paths(market, moved, 64, plan).account_equity)

    slope = jax.grad(mean)(jnp.array([0.6]))
    h = 1e-6
    np.testing.assert_allclose(
        slope[0], (mean(jnp.array([0.6 + h])) - mean(jnp.array([0.6 - h]))) / (2.0 * h), rtol=1e-6
    )


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(collateral={}), "collateral is empty"),
        (dict(debt={}), "debt is empty"),
        (dict(collateral={"ETC": 0.6}), "did you mean 'ETH'"),
        (dict(debt={"EUR": 0.1}), "debt names 'EUR'"),
        (dict(collateral={"ETH": -0.6}), "collateral.ETH is -0.6"),
        (dict(debt={"USD": 0.49}), "lends at most 0.48"),
        (dict(collateral={"STABLE": 0.6}), "does not accept STABLE"),
        (dict(emode="eth"), "no e-mode 'eth'"),
        (dict(venue=RULES["compound"], emode="eth"), "has no e-modes"),
        (dict(venue=RULES["vault"], debt={"USD": 0.42}), "liquidated at once"),
        (dict(venue=load("binance")), "needs a lending rule"),
        (dict(trigger="mark"), "trigger is 'mark'"),
        (dict(interest="none"), "interest is 'none'"),
        (dict(n_points=0), "n_points is 0"),
        (dict(max_liquidations_per_step=99), "max_liquidations_per_step is 99"),
        (dict(liquidation_gas_usd=-1.0), "liquidation_gas_usd is -1"),
        (dict(taker_slippage=2.0), "taker_slippage is 2"),
        (dict(supply_rate={"BTC": 0.1}), "supply_rate names 'BTC'"),
    ],
)
def test_refused(change, words):
    with pytest.raises(InputError, match=words):
        built(**{"venue": RULES["health_factor"]} | change)


def test_a_venues_own_coin_is_usd_and_a_deposit_is_the_holders():
    rule = Liquity(1, {"default": 1.1}, gas_deposit_usd=200.0)
    account = built(rule, debt={"LUSD": 0.4})
    assert account.debt_assets == (USD,)
    assert account.start_value() == pytest.approx(0.6 - 0.4 + 200.0 / CAPITAL)
