"""Policies in a book: where the money goes, plain loops on the same prices, and that they see no later price."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, lending, tiered

from qpo_sim import random
from qpo_sim.account.margin import margin as margin_account
from qpo_sim.book import build_book
from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.errors import InputError
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import gbm
from qpo_sim.market.model import prepare
from qpo_sim.policy import kill_switch
from qpo_sim.policy.hedge import hedge
from qpo_sim.policy.orders import DeskView, Order, Orders, muted
from qpo_sim.simulate import Plan, market_paths, record_market, simulate_paths, simulate_prepared
from qpo_sim.types import Requirements

ASSETS = ("A", "B")
VOL = np.array([1.2, 0.9])
N = 256
COSTS = dict(fee=0.001, slippage=0.0005, gas_usd=5.0)
PERP = dict(liquidation_fee_rate=0.01, liquidation_slippage=0.004, taker_fee_rate=0.0006)


def _market(drift=0.0, volatility=VOL, dtype=F64):
    return gbm(ASSETS, volatility, np.array([[1.0, 0.5], [0.5, 1.0]]), per_year=drift, dtype=dtype)


def _perpetual(margin=0.2, **positions):
    return dict(name="perp", venue=tiered(0.01, **PERP), margin=margin, positions=positions or {"A": 0.6, "B": -0.2})


LOAN = dict(name="loan", venue=lending(ltv={"default": 0.8}), collateral={"A": 0.4}, debt={"USD": 0.28})
POOL = dict(kind="pool", name="lp", type="constant_product", coins=["A", "USD"], value=0.05, fee=0.003, gas_usd=20.0)
STAKE = dict(kind="staked", name="stake", asset="B", token="stB", value=0.05, reward_per_year=0.05, gas_usd=5.0)


def _book(policies=(), *, costs=COSTS, dtype=F64, **parts):
    parts = parts or dict(spot={"A": 0.2, "B": 0.15}, perpetuals=[_perpetual()], loans=[LOAN], accounts=[POOL, STAKE])
    return build_book(
        ASSETS, capital=1e6, policies=list(policies), trading_costs=costs if policies else None, dtype=dtype, **parts
    )


def _run(book, n_steps=10, *, market=None, n=N, seed=5, **plan):
    return simulate_paths(market or _market(), book, n, Plan(n_steps, 24.0, **plan), seed=seed)


def _prices(n_steps=10, *, market=None, n=N, seed=5):
    record = market_paths(market or _market(), n, Plan(n_steps, 24.0), seed=seed)
    return np.exp(np.asarray(record.log_price))


POLICIES = {
    "rebalance": dict(kind="rebalance", weights={"A": 0.4, "B": 0.3}, rule="edge", half_width={"A": 0.02, "B": 0.03}),
    "constant_leverage": dict(kind="constant_leverage", account="perp", leverage=3.5, band=0.05),
    "ladder": dict(kind="ladder", account="loan", ratios=[0.87, 0.9], keep=[0.7, 0.4]),
    "top_up": dict(kind="top_up", account="perp", trigger=0.07, target=0.04),
    "hedge": dict(kind="hedge", account="perp", position=0, asset="A", band=0.01),
    "kill_switch": dict(kind="kill_switch", drawdown=0.04, cooldown=2, recovery=0.01),
    "volatility_target": dict(
        kind="volatility_target", volatility_per_year=0.5, start_volatility_per_year=0.9, half_life_hours=120.0
    ),
    "delayed": dict(kind="delayed", steps=2, policy=dict(kind="hedge", account="perp", position=1, asset="B")),
}


@pytest.mark.parametrize("name", POLICIES)
def test_sum_of_accounts_and_components_is_the_change_of_equity(name):
    outcome = _run(_book([POLICIES[name]]))
    gain = np.asarray(outcome.equity[-1]) - 1.0
    np.testing.assert_allclose(sum(np.asarray(outcome.accounts[a]) for a in ACCOUNTS), gain, atol=1e-12)
    np.testing.assert_allclose(np.asarray(outcome.components).sum(axis=0), gain, atol=1e-12)
    assert bool(np.all(outcome.is_finite))
    # Every one of these policies trades, and trading costs; a transfer does not.
    trading = np.asarray(outcome.accounts["trading"])
    assert np.all(trading <= 1e-15) and (name in ("top_up", "ladder") or trading.min() < 0.0)


@pytest.mark.slow
def test_policies_that_never_act_change_nothing():
    idle = [
        dict(kind="rebalance", weights={"A": 0.5}, rule="band", half_width=2.0),
        dict(kind="constant_leverage", account="perp", leverage=4.0, band=1e6),
        dict(kind="ladder", account="perp", ratios=[0.99], keep=[0.5]),
        dict(kind="top_up", account="loan", trigger=0.999, target=0.9),
        dict(kind="hedge", account="perp", position=0, asset="A", band=1e6),
        dict(kind="kill_switch", drawdown=0.999),
        dict(kind="delayed", policy=dict(kind="kill_switch", drawdown=0.999)),
    ]
    parts = dict(
        spot={"A": 0.2, "B": 0.1},
        perpetuals=[_perpetual(0.3, A=0.3)],
        loans=[dict(LOAN, debt={"USD": 0.1})],
    )
    without, among = _run(_book(**parts), 5), _run(_book(idle, **parts), 5)
    quiet = ~np.any(np.asarray(without.is_liquidated) | np.asarray(among.is_liquidated), axis=0)
    assert quiet.mean() > 0.95
    np.testing.assert_allclose(np.asarray(among.equity)[:, quiet], np.asarray(without.equity)[:, quiet], atol=1e-13)


# --------------------------------------------------------------------- outright holdings


def _weights(delay):
    # Late orders overshoot: near enough for the cash to last.
    return (0.26, 0.21) if delay else (0.4, 0.3)


def _rebalanced(prices, rule, half_width, every, delay=0):
    """Equity by step of spot traded towards weights by a loop in NumPy, with costs."""
    target, start = np.array(_weights(delay))[:, None], np.array([0.2, 0.15])[:, None]
    units, cash = start * np.ones_like(prices[0]), np.full(prices.shape[2], 0.65)
    pending, out = [np.zeros_like(prices[0])] * delay, []
    for k, p in enumerate(prices, start=1):
        value = units * p
        total = value.sum(axis=0) + cash
        off = value / total - target
        trade = -total * off
        if rule == "band":
            trade = trade * np.any(np.abs(off) > half_width, axis=0)
        if rule == "edge":
            trade = total * (np.clip(off, -half_width, half_width) - off)
        if every and k % every:
            trade = 0.0 * trade
        pending.append(trade)
        trade = pending.pop(0)
        cost = np.abs(trade) * (COSTS["fee"] + COSTS["slippage"]) + COSTS["gas_usd"] / 1e6 * (trade != 0.0)
        units, cash = units + trade / p, cash - trade.sum(axis=0) - cost.sum(axis=0)
        out.append((units * p).sum(axis=0) + cash)
    return np.array(out)


@pytest.mark.parametrize(
    ("rule", "every", "delay"),
    [("calendar", 3, 0), ("band", 0, 0), ("edge", 0, 0), ("edge", 2, 0), ("calendar", 3, 2), ("edge", 0, 2)],
)
def test_rebalancing_against_a_loop_on_the_same_prices(rule, every, delay):
    described = dict(
        kind="rebalance",
        weights=dict(zip(ASSETS, _weights(delay), strict=True)),
        rule=rule,
        half_width=0.03,
        every_hours=24.0 * every,
    )
    if delay:
        described = dict(kind="delayed", steps=delay, policy=described)
    outcome = _run(_book([described], spot={"A": 0.2, "B": 0.15}))
    np.testing.assert_allclose(outcome.equity, _rebalanced(_prices(), rule, 0.03, every, delay), rtol=1e-12)


def test_volatility_target_against_a_loop_on_the_same_prices():
    prices, half_life, band = _prices(), 96.0, 0.05
    units, cash = np.array([[0.4], [0.3]]) * np.ones_like(prices[0]), np.full(N, 0.3)
    variance, before, expected = np.full(N, 0.8**2), np.ones_like(prices[0]), []
    decay = 2.0 ** (-24.0 / half_life)
    for p in prices:
        held = units * before
        earned = (units * p).sum(axis=0) / held.sum(axis=0) - 1.0
        variance = decay * variance + (1.0 - decay) * earned**2 * 365.0
        gross = (units * p).sum(axis=0)
        total = gross + cash
        wanted = np.minimum(0.6 / np.sqrt(variance), 0.9)
        factor = wanted * total / gross
        factor = np.where(np.abs(1.0 / factor - 1.0) > band, factor, 1.0)
        trade = (factor - 1.0) * units * p
        cost = np.abs(trade) * 0.0015 + 5e-6 * (trade != 0.0)
        units, cash = units + trade / p, cash - (trade + cost).sum(axis=0)
        before = p
        expected.append((units * p).sum(axis=0) + cash)
    described = dict(
        kind="volatility_target", volatility_per_year=0.6, start_volatility_per_year=0.8, half_life_hours=half_life,
        band=band, greatest=0.9,
    )  # fmt: skip
    outcome = _run(_book([described], spot={"A": 0.4, "B": 0.3}))
    np.testing.assert_allclose(outcome.equity, expected, rtol=1e-12)


# --------------------------------------------------------------------- margin accounts


def test_constant_leverage_against_a_loop_and_within_its_band():
    prices, leverage, band, fee = _prices()[:, 0], 2.0, 0.08, 0.0006
    quantity, balance, expected = np.full(N, 0.5), np.full(N, 0.2 - 0.5), []
    for p in prices:
        equity, gross = balance + quantity * p, quantity * p
        factor = leverage * equity / gross
        keep = np.where(np.abs(1.0 / factor - 1.0) > band, factor, 1.0)
        bought = (keep - 1.0) * quantity
        balance = balance - bought * p - fee * np.abs(bought) * p
        quantity = quantity + bought
        equity = balance + quantity * p
        # The fee of the trade itself is not known to the policy.
        assert np.all(np.abs(quantity * p / equity / leverage - 1.0) < band + 2.0 * fee)
        expected.append(0.8 + equity)
    described = dict(kind="constant_leverage", account="perp", leverage=leverage, band=band)
    outcome = _run(_book([described], perpetuals=[_perpetual(0.2, A=0.5)]))
    alive = ~np.asarray(outcome.is_liquidated)[0]
    assert alive.mean() > 0.97
    np.testing.assert_allclose(np.asarray(outcome.equity)[:, alive], np.array(expected)[:, alive], rtol=1e-12)


def test_top_up_reaches_its_target_while_the_cash_lasts():
    prices, rate, trigger, target, quantity = _prices()[:, 0], 0.01, 0.05, 0.03, 0.9
    balance, cash, expected, ran_out = np.full(N, 0.3 - quantity), np.full(N, 0.05), [], 0
    for p in prices:
        equity, needed = balance + quantity * p, rate * quantity * p
        ratio = needed / np.maximum(equity, 1e-12)
        moved = np.where(ratio > trigger, np.minimum(needed / target - equity, cash), 0.0)
        balance, cash = balance + moved, cash - moved
        lasts = (ratio > trigger) & (cash > 0.0)
        np.testing.assert_allclose(needed[lasts] / (balance + quantity * p)[lasts], target, rtol=1e-12)
        ran_out += np.count_nonzero(cash == 0.0)
        expected.append(balance + quantity * p)
        assert np.all(cash >= 0.0)
    assert ran_out > 0
    described = dict(kind="top_up", account="perp", trigger=trigger, target=target)
    outcome = _run(_book([described], spot={"B": 0.65}, perpetuals=[_perpetual(0.3, A=quantity)]), record_paths=True)
    alive = ~np.asarray(outcome.is_liquidated)[0]
    assert alive.mean() > 0.6
    account = np.asarray(outcome.record.account_equity)[:, 0]
    np.testing.assert_allclose(account[:, alive], np.array(expected)[:, alive], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "described",
    [
        dict(kind="ladder", account="perp", ratios=[0.04, 0.08], keep=[0.6, 0.3]),
        dict(kind="top_up", account="perp", trigger=0.05, target=0.03),
        dict(kind="kill_switch", margin_ratio=0.06),
    ],
)
def test_acting_on_the_margin_ratio_lowers_the_probability_of_liquidation(described):
    """Common random numbers: the mean difference is 4 standard errors below zero."""
    parts = dict(perpetuals=[_perpetual(0.2, A=0.8)])
    idle = dict(kind="top_up", account="perp", trigger=0.999, target=0.9)
    runs = [_run(_book([one], **parts), 15, n=1024) for one in (idle, described)]
    idle, acting = (np.asarray(run.hit_probability)[-1, 0] for run in runs)
    gain = acting - idle
    assert gain.mean() < -4.0 * gain.std() / np.sqrt(gain.size)


@pytest.mark.parametrize(
    "described",
    [
        dict(kind="ladder", account="loan", ratios=[0.88, 0.94], keep=[0.6, 0.3]),
        dict(kind="top_up", account="loan", trigger=0.9, target=0.75),
        dict(kind="kill_switch", health_factor=1.1),
    ],
)
def test_acting_on_the_health_of_a_loan_lowers_the_probability_of_liquidation(described):
    """Common random numbers: the mean difference is 4 standard errors below zero."""
    idle = dict(kind="top_up", account="loan", trigger=0.999, target=0.9)
    runs = [_run(_book([one], loans=[LOAN]), 15, n=1024) for one in (idle, described)]
    idle, acting = (np.asarray(run.hit_probability)[-1, 0] for run in runs)
    gain = acting - idle
    assert gain.mean() < -4.0 * gain.std() / np.sqrt(gain.size)


# --------------------------------------------------------------------- hedges


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Bound:
    """Requires a fixed sum of every account."""

    constant: jax.Array

    def requirements(self, held):
        zero = 0.0 * held[0].price
        return Requirements((zero,) * len(held), self.constant + zero)


class _NoMargin:
    """A rule that takes every contract and requires next to nothing."""

    name = "none"

    def __init__(self, taker_fee_rate=0.0):
        self.taker_fee_rate = taker_fee_rate

    def bind(self, positions, *, dtype, **known):
        return _Bound(jnp.asarray(1e-6, dtype))


def _option_account(settlement="USD", kind="linear"):
    days = dict(days=60.0, volatility=1.2, settlement=settlement)
    return dict(
        kind="margin",
        name="options",
        venue=_NoMargin(),
        balance={"A": 0.3} if settlement == "coin" else {"USD": 0.5},
        positions=[
            dict(kind="option", asset="A", type="call", moneyness=1.05, notional=0.5, **days),
            dict(kind="option", asset="A", type="put", moneyness=0.9, notional=-0.4, **days),
            dict(kind=kind, asset="A", notional=0.01),
        ],
    )


@pytest.mark.parametrize(("settlement", "kind"), [("USD", "linear"), ("coin", "inverse")])
@pytest.mark.parametrize(("greek", "position"), [("delta", 2), ("vega", 1)])
def test_hedge_brings_the_greek_to_its_target(settlement, kind, greek, position):
    described = {key: value for key, value in _option_account(settlement, kind).items() if key != "kind"}
    known = dict(assets=ASSETS, capital=1e6, prices={}, venue_of=None, dtype=F64)
    account = margin_account(**described, **known)
    one = jnp.ones(3)
    state = account.first(Scene((one, one), jnp.zeros(1), {}), one)
    scene = Scene((one * jnp.array([0.8, 1.0, 1.3]), one), jnp.full(1, 10.0 / 365.0), {})
    policy = hedge(
        account="options", position=position, asset="A", greek=greek, target=0.07, accounts=["options"], assets=ASSETS,
        spot=["A"], account_assets=[account.assets], account_options=[[0, 0, -1]], n_positions=[3], dtype=F64,
    )  # fmt: skip

    def view(state):
        seen = account.view(state, scene)
        return DeskView(one, one, (0.1 * scene.prices[0],), scene.prices, (seen,), {}, ())

    def exposure(state):
        seen = view(state)
        if greek == "delta":
            return seen.spot[0] + seen.accounts[0].delta[0]
        rows = zip(seen.accounts[0].quantity, seen.accounts[0].unit_vega, strict=True)
        return sum(units * vega for units, vega in rows)

    _, orders = policy.step(None, jnp.int32(3), (), view(state))
    ((_, order),) = orders.accounts
    after, moved = account.fill(state, scene, order)
    assert np.all(np.abs(np.asarray(exposure(state)) - 0.07) > 1e-3)
    np.testing.assert_allclose(exposure(after), 0.07, atol=1e-13)
    np.testing.assert_allclose(moved, 0.0)
    np.testing.assert_allclose(account.equity(after, scene), account.equity(state, scene), rtol=1e-13)


def test_delta_hedge_of_a_call_lowers_the_variance_of_equity():
    account = dict(_option_account(), venue=_NoMargin(0.0003))
    account["positions"] = [account["positions"][0], account["positions"][2]]
    never = dict(kind="hedge", account="options", position=1, asset="A", band=1e6)
    equity = [
        np.asarray(_run(_book([one], accounts=[account]), 20).equity[-1]) for one in (never, dict(never, band=0.005))
    ]
    # What is left of the variance by rebalancing once a day is below a tenth.
    assert equity[1].var() < 0.1 * equity[0].var()


# --------------------------------------------------------------------- kill switch


def _switched(prices, described):
    """Equity by step of spot and a perpetual under the kill switch, and its states, by a loop in NumPy."""
    switch = kill_switch.thresholds(**described)
    start = np.array([0.5, 0.2])[:, None] * np.ones_like(prices[0])
    # A perpetual of 0.3 in the second asset has the P&L of spot bought with borrowed money.
    units, cash = start + np.array([0.0, 0.3])[:, None], np.zeros(prices.shape[2])
    state, out, on, fired = kill_switch.init(np.ones(prices.shape[2])), [], [], []
    share = np.zeros_like(units)
    for p in prices:
        equity = (units * p).sum(axis=0) + cash
        state, decision = kill_switch.step(switch, state, equity)
        fires, resumes = np.asarray(decision.fires) > 0.0, np.asarray(decision.resumes) > 0.0
        share = np.where(fires, units * p / equity, share)
        held = np.where(fires, 0.0, units * p)
        held = np.where(resumes, share * equity, held)
        units, cash = held / p, equity - held.sum(axis=0)
        out.append(equity)
        on.append(np.asarray(state.on) > 0.0)
        fired.append((fires, np.asarray(decision.drawdown)))
    return np.array(out), np.array(on), fired


@pytest.mark.parametrize("cooldown", [3, None, np.inf])
def test_kill_switch_follows_its_state_machine_on_the_equity_of_the_book(cooldown):
    thresholds = dict(drawdown=0.06, recovery=0.0, cooldown=np.inf if cooldown is None else cooldown)
    rule = tiered(0.001, funding_rate=0.0)
    parts = dict(
        spot={"A": 0.5, "B": 0.2},
        perpetuals=[dict(name="perp", venue=rule, margin=0.3, positions={"B": 0.3})],
    )
    described = dict(kind="kill_switch", drawdown=0.06, cooldown=cooldown)
    outcome = _run(_book([described], costs={}, **parts), 16)
    # The same numbers with the cash of the loop: margin 0.3 pays for the perpetual's 0.3.
    expected, on, fired = _switched(_prices(16), thresholds)
    np.testing.assert_allclose(outcome.equity, expected, rtol=1e-12)
    times = sum(np.count_nonzero(fires) for fires, _ in fired)
    assert times > N / 4
    for fires, drawdown in fired:
        assert np.all(drawdown[fires] >= 0.06)
    resumed = np.count_nonzero(on[1:] & ~on[:-1])
    assert resumed > 0 if cooldown == 3 else resumed == 0


def test_kill_switch_keeps_pools_and_stakes_closed():
    described = dict(kind="kill_switch", drawdown=0.03, cooldown=1)
    outcome = _run(_book([described], spot={"A": 0.1}, accounts=[dict(POOL, value=0.5), STAKE]), 12)
    later = _run(_book([dict(described, cooldown=None)], spot={"A": 0.1}, accounts=[dict(POOL, value=0.5), STAKE]), 12)
    equity = np.asarray(later.equity)
    still = np.diff(equity, axis=0) == 0.0
    assert np.mean(still[-1]) > 0.3
    # Once closed for good nothing moves any more.
    assert np.all(np.diff(still.astype(int), axis=0) >= 0)
    assert not np.array_equal(np.asarray(outcome.equity), equity)


def test_kill_switch_tells_the_margin_ratio_from_the_health_factor():
    """A loan at a health factor of 1.2 fires neither at a margin ratio of 0.5 nor at a health factor of 1.1."""
    parts = dict(perpetuals=[_perpetual(0.3, A=0.3)], loans=[dict(LOAN, debt={"USD": 0.27})])
    market = _market(volatility=VOL * 1e-6)
    calm, fires = (
        _run(_book([dict(kind="kill_switch", margin_ratio=0.5, health_factor=health)], **parts), 3, market=market)
        for health in (1.1, 1.3)
    )
    assert np.all(np.asarray(calm.accounts["trading"]) == 0.0)
    assert np.all(np.asarray(fires.accounts["trading"]) < -1e-4)


def test_orders_are_muted_whole():
    acts = jnp.array([0.0, 1.0])
    order = Order(keep=jnp.zeros(2), trade=((1, jnp.full(2, 3.0)),), transfer=jnp.full(2, -2.0))
    orders = muted(Orders((jnp.full(2, 0.5),), ((4, order), (5, Order()))), acts)
    np.testing.assert_array_equal(orders.spot[0], [0.0, 0.5])
    ((four, order), (five, empty)) = orders.accounts
    assert (four, five, empty) == (4, 5, Order())
    np.testing.assert_array_equal(order.keep, [1.0, 0.0])
    np.testing.assert_array_equal(order.trade[0][1], [0.0, 3.0])
    np.testing.assert_array_equal(order.transfer, [0.0, -2.0])


# --------------------------------------------------------------------- what could be known


@pytest.mark.parametrize("delay", [0, 1])
def test_what_happens_until_a_step_does_not_depend_on_later_prices(delay):
    described = list(POLICIES.values())[:7]
    if delay:
        described = [dict(kind="delayed", steps=delay, policy=one) for one in described]
    market, plan, keys, path = _market(), Plan(8), random.stream_keys(5), jnp.arange(N, dtype=jnp.uint32)
    prepared = prepare(market)
    book = _book(described)
    record = jax.jit(lambda: record_market(market, prepared, keys, path, plan))()
    run = jax.jit(lambda record: simulate_prepared(market, prepared, book, keys, path, plan, record))
    other = record._replace(log_price=record.log_price.at[5:].add(jnp.array([-0.4, 0.3])[None, :, None]))
    one, two = np.asarray(run(record).equity), np.asarray(run(other).equity)
    np.testing.assert_array_equal(one[:5], two[:5])
    assert np.all(np.any(one[5:] != two[5:], axis=0))


# --------------------------------------------------------------------- refusals

SPOT = dict(spot={"A": 0.3})


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (dict(kind="rebalanced"), "did you mean 'rebalance'"),
        (dict(kind="rebalance", weights={"A": 0.5}, rule="weekly"), "rule is 'weekly'"),
        (dict(kind="rebalance", weights={"B": 0.5}), "weights names B"),
        (dict(kind="rebalance", weights={"A": 0.5}, half_width={"B": 0.1}), "half_width names B"),
        (dict(kind="rebalance", weights={"A": 1.5}), "must lie in \\[0, 1\\]"),
        (dict(kind="rebalance", weights={"A": 0.5}, every_hours=-1.0), "every_hours is -1"),
        (dict(kind="constant_leverage", account="perp", leverage=2.0), "no account 'perp'"),
        (dict(kind="kill_switch"), "nothing fires it"),
        (dict(kind="kill_switch", drawdown=1.5), "drawdown is 1.5"),
        (dict(kind="kill_switch", drawdown=0.1, cooldown=2.5), "cooldown is 2.5"),
        (dict(kind="kill_switch", health_factor=0.9), "health_factor is 0.9"),
        (dict(kind="kill_switch", margin_ratio=1.2), "margin_ratio is 1.2"),
        (dict(kind="volatility_target", volatility_per_year=0.0, start_volatility_per_year=1.0), "must be positive"),
        (
            dict(kind="volatility_target", volatility_per_year=0.5, start_volatility_per_year=1.0, greatest=2.0),
            "cannot exceed 1",
        ),
        (dict(kind="delayed", steps=0, policy=dict(kind="kill_switch", drawdown=0.1)), "steps is 0"),
        (dict(kind="delayed", policy="rebalance"), "describe one policy"),
        (dict(kind="delayed", policy=dict(kind="kill_switch", drawdon=0.1)), "no option 'drawdon'"),
        (dict(kind="delayed", policy=dict(kind="kill_swich")), "did you mean 'kill_switch'"),
    ],
)
def test_refuses(described, words):
    with pytest.raises(InputError, match=words):
        _book([described], **SPOT)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (dict(kind="ladder", account="perp", ratios=[0.5, 0.4], keep=[0.5, 0.2]), "must increase"),
        (dict(kind="ladder", account="perp", ratios=[0.4, 0.5], keep=[0.2, 0.5]), "must decrease"),
        (dict(kind="top_up", account="perp", trigger=0.3, target=0.4), "0 < target < trigger < 1"),
        (dict(kind="constant_leverage", account="perp", leverage=0.0), "leverage is 0"),
        (dict(kind="hedge", account="perp", position=2, asset="A"), "position is 2"),
        (dict(kind="hedge", account="perp", position=0, asset="C"), "no asset 'C'"),
        (dict(kind="hedge", account="perp", position=0, asset="A", greek="gamma"), "greek is 'gamma'"),
        (dict(kind="hedge", account="perp", position=0, asset="A", greek="vega"), "has no vega"),
    ],
)
def test_refuses_for_an_account(described, words):
    with pytest.raises(InputError, match=words):
        _book([described], perpetuals=[_perpetual()])


def test_other_policies_rest_while_the_kill_switch_is_off():
    rebalance = dict(kind="rebalance", weights={"A": 0.5, "B": 0.3}, rule="edge", half_width=0.02)
    switch = dict(kind="kill_switch", drawdown=0.03)
    outcome = _run(_book([rebalance, switch], spot={"A": 0.5, "B": 0.3}), 12)
    still = np.diff(np.asarray(outcome.equity), axis=0) == 0.0
    assert still[-1].mean() > 0.5 and np.all(np.diff(still.astype(int), axis=0) >= 0)
