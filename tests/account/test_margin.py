"""Margin accounts on paths: against fixed accounts, closed forms, parity, and their own bookkeeping."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, assert_mc, tiered
from scipy import stats

from qpo_sim import venue
from qpo_sim.account.protocol import Moment
from qpo_sim.book import build_book
from qpo_sim.execution.liquidation import partial_close_share
from qpo_sim.instrument.first_passage import Options
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import gbm
from qpo_sim.market import model as market_model
from qpo_sim.market.jump.merton import merton
from qpo_sim.market.line import Scale
from qpo_sim.market.side import basis, borrow_rate, depth, funding, gas, implied_volatility, oracle, peg
from qpo_sim.policy.orders import Order
from qpo_sim.simulate import Plan, simulate_paths
from qpo_sim.types import Context
from qpo_sim.venue import TieredMargin

ASSETS, CAPITAL, PRICES = ("BTC", "ETH"), 4e6, {"BTC": 60_000.0, "ETH": 3_000.0}
VOL, RHO = [0.9, 1.2], [[1.0, 0.6], [0.6, 1.0]]
TIERS = [[0.0, 0.01], [250_000.0, 0.02], [2_000_000.0, 0.05]]
SIDES = (funding, basis, depth, gas, peg, borrow_rate, implied_volatility, oracle)


def market_of(kind="gbm", dtype=F64, scale=1.0, step_hours=24.0):
    plain = gbm(
        ASSETS, scale * np.array(VOL), RHO, drift="user", per_year=[0.1, -0.2], step_hours=step_hours, dtype=dtype
    )
    if kind == "gbm":
        return plain
    jumps = merton(
        2, intensity=20.0, mean=-0.02, sd=0.08, systemic=dict(intensity=10.0, mean=-0.1, sd=0.05), dtype=dtype
    )
    sides = tuple(module.example(2, dtype) for module in SIDES) if kind == "all" else ()
    return dataclasses.replace(plain, jumps=(jumps,), side=sides)


def book_of(*accounts, dtype=F64, **options):
    described = [{"kind": "margin", "name": f"x{k}", **account} for k, account in enumerate(accounts)]
    return build_book(ASSETS, capital=CAPITAL, accounts=described, prices=PRICES, dtype=dtype, **options)


def assert_conserved(outcome, tolerance):
    change = np.asarray(outcome.equity[-1], np.float64) - 1.0
    total = sum(np.asarray(row, np.float64) for row in outcome.accounts.values())
    np.testing.assert_allclose(total, change, atol=tolerance)
    np.testing.assert_allclose(np.asarray(outcome.components, np.float64).sum(axis=0), change, atol=tolerance)
    assert bool(jnp.all(outcome.is_finite))


# ----------------------------------------------------------------------------- against accounts with fixed positions


def _both():
    rule = TieredMargin(
        tiers={"default": TIERS},
        name="toy",
        funding_rate=0.0004,
        liquidation_fee_rate=0.006,
        liquidation_slippage=0.002,
    )
    fixed = [
        dict(name="long", venue=rule, mode="isolated", margin=0.1, positions={"BTC": 0.5}, entry={"BTC": 61_000.0}),
        dict(name="cross", venue=rule, margin=0.2, positions={"BTC": 0.7, "ETH": -0.4}),
    ]
    free = [
        dict(venue=rule, balance={"USD": 0.1}, positions=[dict(asset="BTC", notional=0.5, entry=61_000.0)]),
        dict(
            venue=rule,
            balance={"USD": 0.2},
            positions=[dict(asset="BTC", notional=0.7), dict(asset="ETH", notional=-0.4)],
        ),
    ]
    old = build_book(ASSETS, capital=CAPITAL, perpetuals=fixed, prices=PRICES, dtype=F64)
    return old, book_of(*({"funding": "venue", **account} for account in free))


@pytest.mark.parametrize("kind", ["gbm", "merton"])
def test_equals_the_fixed_account_on_every_path_at_step_ends(kind):
    plan = Plan(20, monitoring="step")
    old, new = (simulate_paths(market_of(kind), book, 4096, plan, seed=3) for book in _both())
    np.testing.assert_array_equal(new.is_liquidated, old.is_liquidated)
    np.testing.assert_allclose(new.account_equity, old.account_equity, atol=1e-13)
    np.testing.assert_allclose(new.max_drawdown, old.max_drawdown, atol=1e-13)
    share = np.asarray(new.is_liquidated).mean(axis=1)
    assert np.all((share > 0.05) & (share < 0.95))


@pytest.mark.parametrize("kind", ["gbm", "merton"])
def test_equals_the_fixed_account_in_law_between_step_ends(kind):
    # Paired over the same market paths: 4.5 standard errors, false alarm 7e-6 each.
    n = 1 << 15
    old, new = (simulate_paths(market_of(kind), book, n, Plan(20), seed=4) for book in _both())
    for j in range(2):
        assert_mc(np.asarray(new.hit_probability[-1, j] - old.hit_probability[-1, j]), 0.0, 4.5)
        assert_mc(np.asarray(new.is_liquidated[j], float) - np.asarray(old.hit_probability[-1, j]), 0.0, 4.5)
        difference = np.asarray(new.account_equity[j] - old.account_equity[j])
        assert_mc(difference, 0.0, 4.5)
        centre = np.mean(old.account_equity[j])
        squares = [(np.asarray(x.account_equity[j]) - centre) ** 2 for x in (new, old)]
        assert_mc(squares[0] - squares[1], 0.0, 4.5)


# ----------------------------------------------------------------------------- conservation

VENUES = ("binance", "okx", "hyperliquid", "deribit_perpetual", "bybit", "dydx")


def _random_account(seed):
    rng = np.random.default_rng(seed)
    has_options = seed % 4 == 3
    rule = ("deribit", "deribit_portfolio")[seed // 4 % 2] if has_options else VENUES[seed % len(VENUES)]
    balance = {name: float(rng.uniform(0.05, 0.3)) for name in ("USD", "BTC", "ETH")}
    one_asset = rule in ("okx", "bybit")
    asset = lambda: "BTC" if one_asset else str(rng.choice(ASSETS))  # noqa: E731
    positions = [
        dict(kind="linear", asset=asset(), notional=float(rng.uniform(-2, 2))),
        dict(kind="inverse", asset=asset(), notional=float(rng.uniform(-1, 1))),
        dict(kind="future", asset=asset(), notional=float(rng.uniform(-1, 1)), days=3.0, carry_per_year=0.1),
    ]
    if rule != "deribit_portfolio":
        positions.append(dict(kind="quanto", asset="BTC", settlement="ETH", notional=float(rng.uniform(-1, 1))))
    if has_options:
        for k in range(2):
            positions.append(
                dict(
                    kind="option",
                    asset=asset(),
                    notional=float(rng.uniform(-0.5, 0.5)),
                    type=("call", "put")[k],
                    moneyness=float(rng.uniform(0.8, 1.2)),
                    days=(3.0, 40.0)[int(rng.integers(2))],
                    settlement=("USD", "coin")[int(rng.integers(2))],
                )
            )
    return dict(
        venue=rule,
        balance=balance,
        positions=positions,
        procedure=("full", "partial", "takeover", None)[int(rng.integers(4))] if rule != "deribit_perpetual" else None,
        trigger=("index", "mark", "last", "oracle", None)[int(rng.integers(5))],
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(k, marks=pytest.mark.slow) for k in range(3, 16))])
def test_bookings_conserve(seed):
    # Every kind of contract, currency and procedure; jumps and all side processes.
    rng, book = np.random.default_rng(seed), None
    for attempt in range(20):
        try:
            book = book_of(_random_account(seed + 16 * attempt))
            break
        except Exception as error:
            assert "leverage" in str(error) or "liquidated at once" in str(error), error
    assert book is not None
    kind = "all" if seed % 2 else ("gbm", "merton")[int(rng.integers(2))]
    for monitoring in ("bridge", "step"):
        outcome = simulate_paths(market_of(kind, scale=2.0), book, 512, Plan(6, monitoring=monitoring), seed=seed)
        assert_conserved(outcome, 1e-10)
        assert seed > 3 or bool(jnp.any(outcome.is_liquidated))


def test_bookings_conserve_in_single_precision():
    # Bookings add up some ten rounded moves of up to one capital per step: 3e-6 is 50 units of the last place.
    book = book_of(
        dict(
            venue="hyperliquid",
            balance={"USD": 0.1, "BTC": 0.2},
            positions=[
                dict(asset="BTC", notional=0.6),
                dict(kind="inverse", asset="BTC", notional=-0.2),
                dict(asset="ETH", notional=0.5),
            ],
        ),
        dtype=jnp.float32,
    )
    outcome = simulate_paths(market_of("all", jnp.float32), book, 4096, Plan(12), seed=1)
    assert outcome.equity.dtype == jnp.float32 and 0.05 < float(outcome.is_liquidated.mean()) < 0.95
    assert_conserved(outcome, 3e-6)


def test_single_precision_agrees_with_double():
    account = dict(
        venue="deribit_perpetual",
        balance={"BTC": 0.2},
        positions=[dict(kind="inverse", asset="BTC", notional=0.6), dict(asset="ETH", notional=-0.1)],
    )
    rows = []
    for dtype in (F64, jnp.float32):
        outcome = simulate_paths(market_of("gbm", dtype), book_of(account, dtype=dtype), 8192, Plan(10), seed=2)
        rows.append([np.asarray(x, np.float64) for x in (outcome.hit_probability[-1, 0], outcome.equity[-1])])
    assert rows[0][0].mean() > 0.02
    assert abs(rows[0][0].mean() - rows[1][0].mean()) < 1e-4
    assert np.quantile(np.abs(rows[0][1] - rows[1][1]), 0.99) < 1e-5


@pytest.mark.parametrize("procedure", ["full", "partial", "takeover"])
def test_compensator_has_the_mean_of_the_first_liquidation(procedure):
    book = book_of(
        dict(
            venue="hyperliquid",
            balance={"USD": 0.1},
            positions=[dict(asset="BTC", notional=0.6), dict(asset="ETH", notional=0.3)],
            procedure=procedure,
        )
    )
    outcome = simulate_paths(market_of(), book, 1 << 14, Plan(20), seed=5)
    liquidated = np.asarray(outcome.is_liquidated[0], float)
    assert 0.1 < liquidated.mean() < 0.9
    assert_mc(liquidated - np.asarray(outcome.hit_probability[-1, 0]), 0.0, 4.5)
    left = np.asarray(outcome.account_equity[0])[liquidated > 0.5]
    if procedure == "takeover":
        np.testing.assert_array_equal(left, 0.0)
    assert left.min() >= 0.0


# ----------------------------------------------------------------------------- what must hold whatever the path


def test_more_balance_never_liquidates_a_path_more():
    def liquidated(balance):
        book = book_of(
            dict(
                venue="binance",
                balance={"USD": balance},
                positions=[dict(asset="BTC", notional=0.8), dict(asset="ETH", notional=-0.3)],
            )
        )
        plan = Plan(20, monitoring="step", attribution=False)
        return np.asarray(simulate_paths(market_of("all"), book, 2048, plan, seed=6).is_liquidated[0])

    rows = [liquidated(balance) for balance in (0.1, 0.15, 0.25, 0.4)]
    for less, more in zip(rows, rows[1:], strict=False):
        assert np.all(more <= less) and more.sum() < less.sum()


def test_accounts_that_owe_nothing_are_never_liquidated():
    book = book_of(
        dict(venue="binance", balance={"USD": 0.1}, positions=[]),
        dict(venue="binance", balance={"USD": 0.0}, positions=[]),
        dict(venue="binance", balance={"BTC": 0.2}, positions=[dict(asset="BTC", notional=0.0)]),
        # An inverse short of the whole margin is worth its USD whatever the price.
        dict(
            venue="binance", balance={"BTC": 0.2}, positions=[dict(kind="inverse", asset="BTC", notional=-0.2)],
            funding="venue", n_points=1,
        ),
    )  # fmt: skip
    outcome = simulate_paths(market_of("merton", scale=3.0), book, 2048, Plan(20), seed=7)
    np.testing.assert_array_equal(outcome.hit_probability, 0.0)
    assert not np.any(outcome.is_liquidated)


@pytest.mark.slow
def test_two_halves_of_a_position_are_the_position():
    whole = dict(venue="binance", balance={"USD": 0.1}, positions=[dict(asset="BTC", notional=0.4)])
    halves = {**whole, "positions": [dict(asset="BTC", notional=0.2)] * 2}
    rule = tiered(0.01, liquidation_fee_rate=0.01)
    a, b = (
        simulate_paths(market_of("all"), book_of({**x, "venue": rule}), 4096, Plan(15), seed=8) for x in (whole, halves)
    )
    np.testing.assert_array_equal(a.is_liquidated, b.is_liquidated)
    np.testing.assert_allclose(a.account_equity, b.account_equity, atol=1e-12)
    np.testing.assert_allclose(a.hit_probability, b.hit_probability, atol=1e-10)


# ----------------------------------------------------------------------------- options


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gbm", "all"])
def test_put_call_parity_on_every_path(kind):
    # Long call, short put, K of cash at zero rates against the forward; dates before and after the expiry.
    strike, days, carry = 0.95, 6.0, 0.15

    def book(settlement):
        legs = [
            dict(
                kind="option", asset="BTC", notional=side * 0.2, type=name, moneyness=strike, days=days,
                carry_per_year=carry, settlement=settlement, volatility=0.8,
            )
            for name, side in (("call", 1.0), ("put", -1.0))
        ]  # fmt: skip
        return book_of(dict(venue="deribit", balance={"USD": 0.6, "BTC": 0.3}, positions=legs, n_points=1))

    future = book_of(
        dict(
            venue="binance",
            balance={"USD": 0.6, "BTC": 0.3},
            positions=[dict(kind="future", asset="BTC", notional=0.2, days=days, carry_per_year=carry)],
        )
    )
    plan = Plan(8, monitoring="step")
    market = market_of(kind, scale=0.3)
    forward = np.asarray(simulate_paths(market, future, 512, plan, seed=9).equity)
    linear = np.asarray(simulate_paths(market, book("USD"), 512, plan, seed=9).equity)
    # At the end the fee of delivery is all that differs: at most 0.015 % of the price on 0.2 coins, per leg that pays.
    np.testing.assert_allclose(linear[:5], forward[:5], atol=1e-12)
    assert np.all((forward[5:] - linear[5:] >= -1e-12) & (forward[5:] - linear[5:] < 2e-4))
    # In coin the premium of the pair is paid in coins, whose price the account bears.
    coin = np.asarray(simulate_paths(market, book("coin"), 512, plan, seed=9).equity)
    price = np.asarray(
        simulate_paths(market, build_book(ASSETS, spot={"BTC": 1.0}, dtype=F64), 512, plan, seed=9).equity
    )
    first = 0.2 * (np.exp(carry * days / 365.0) - strike) / np.exp(carry * days / 365.0)
    left = np.maximum(days - np.arange(1, 9), 0.0)[:, None] / 365.0
    value = 0.2 * (price - strike * np.exp(-carry * left))
    expected = 1.0 + 0.3 * (price - 1.0) + value - first * price
    np.testing.assert_allclose(coin[:5], expected[:5], atol=1e-12)


@pytest.mark.parametrize("settlement", ["USD", "coin"])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_expiry_pays_the_intrinsic_value(settlement, side):
    rule = dataclasses.replace(venue.load("deribit"), delivery_fee_rate={}, taker_fee_rate={})
    leg = dict(
        kind="option", asset="BTC", notional=side * 0.2, type="put", moneyness=1.1, days=4.0, settlement=settlement,
        volatility=0.7,
    )  # fmt: skip
    book = book_of(dict(venue=rule, balance={"USD": 0.9}, positions=[leg]))
    account = book.holdings[0]
    first = Scene((jnp.ones(1),) * 2, jnp.zeros(1), {})
    premium = float(account.contracts[0].mark(first)[0])
    market = market_of("gbm", scale=0.5)
    equity = np.asarray(simulate_paths(market, book, 512, Plan(7), seed=10).equity)
    price = np.asarray(
        simulate_paths(market, build_book(ASSETS, spot={"BTC": 1.0}, dtype=F64), 512, Plan(7), seed=10).equity
    )
    payoff = np.maximum(1.1 - price[3], 0.0)
    if settlement == "USD":
        expected = np.broadcast_to(1.0 + side * 0.2 * (payoff - premium), (4, 512))
    else:
        # Premium and payoff are coins and stay in the account as such.
        expected = 1.0 + side * 0.2 * price[3:] * (payoff / price[3] - premium)
    np.testing.assert_allclose(equity[3:], expected, atol=1e-12)


# ----------------------------------------------------------------------------- liquidation prices against laws of touch


@cache
def _survival(volatility, drift, distance, days, per_day, intensity, mean, sd, bridge=True):
    """Probability that a log-price with normal jumps stays above its start less `distance`, by convolution on a grid.

    Per step the exact killed (or, at step ends, free) density of the diffusion, then the jumps of the step. `per_day`
    steps a day; trapezoidal in space with steps of an eighth of a step's standard deviation.
    """
    dt = 1.0 / (365.0 * per_day)
    sigma, nu = volatility * np.sqrt(dt), (drift - 0.5 * volatility**2) * dt
    h = min(sigma / 4.0, 0.005)
    y = np.arange(1, int(1.6 / h)) * h
    kernel = stats.norm.pdf(y[None, :] - y[:, None] - nu, scale=sigma) * h
    if bridge:
        kernel *= -np.expm1(-2.0 * y[:, None] * y[None, :] / sigma**2)
    if intensity:
        rate, jumps = intensity * dt, 0.0
        for n in range(1, 6):
            size = stats.norm.pdf(y[None, :] - y[:, None] - n * mean, scale=np.sqrt(n) * sd) * h
            jumps = jumps + stats.poisson.pmf(n, rate) * size
        kernel = kernel @ (np.exp(-rate) * np.eye(y.size) + jumps)
    alive, k = np.ones(y.size), round(days * per_day)
    # Whoever leaves the top of the grid does not come back.
    kernel = np.hstack([kernel, np.maximum(0.0, 1.0 - _row(y, nu, sigma))[:, None]])
    for _ in range(k):
        alive = kernel @ np.append(alive, 1.0)
    return float(np.interp(distance, y, alive))


def _row(y, nu, sigma):
    return stats.norm.cdf((y[-1] - y - nu) / sigma)


def _touch(volatility, drift, distance, years):
    sd, nu = volatility * np.sqrt(years), drift - 0.5 * volatility**2
    b = -distance
    return stats.norm.cdf((b - nu * years) / sd) + np.exp(2 * nu * b / volatility**2) * stats.norm.cdf(
        (b + nu * years) / sd
    )


def _one_position(balance, rate=0.01):
    return book_of(
        dict(venue=tiered(rate), balance={"USD": balance}, positions=[dict(asset="BTC", notional=1.0)], n_points=1)
    ), -np.log((1.0 - balance) / (1.0 - rate))


def test_touch_probability_of_a_diffusion():
    # The bridge is exact at any step: 4.5 standard errors. By convolution the same to 1e-4.
    book, distance = _one_position(0.2)
    exact = _touch(0.9, 0.1, distance, 30 / 365)
    assert 1.0 - _survival(0.9, 0.1, distance, 30, 4, 0.0, 0.0, 0.0) == pytest.approx(exact, abs=1e-4)
    for steps in (3, 30):
        plan = Plan(steps, step_hours=720.0 / steps, attribution=False)
        f = simulate_paths(market_of(step_hours=720.0 / steps), book, 1 << 15, plan, seed=11).hit_probability[-1, 0]
        assert_mc(f, exact, 4.5)


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 0.08), (-0.05, 0.05)])
def test_touch_probability_of_a_jump_diffusion(mean, sd):
    # 4.5 standard errors around the law of the daily scheme (jumps at the end of the day), which is itself within 2 %
    # of the continuous law.
    book, distance = _one_position(0.2)
    jumps = merton(2, intensity=12.0, mean=mean, sd=sd, dtype=F64)
    market = dataclasses.replace(gbm(ASSETS, [0.6, 0.6], RHO, drift="user", per_year=0.0, dtype=F64), jumps=(jumps,))
    plan = Plan(30, attribution=False)
    f = simulate_paths(market, book, 1 << 15, plan, seed=12).hit_probability[-1, 0]
    daily, fine = (1.0 - _survival(0.6, 0.0, distance, 30, k, 12.0, mean, sd) for k in (1, 8))
    assert_mc(f, daily, 4.5)
    assert daily == pytest.approx(fine, rel=0.02)


def test_daily_monitoring_misses_liquidations():
    """Share of the 30-day liquidation probability that looking once a day misses (volatility 90 %, no drift).

    8.7 % of it at a margin of 10 %, 11.3 % at 20 %, 14.4 % at 30 %: closed form against convolution.
    """
    missed = []
    for balance in (0.1, 0.2, 0.3):
        book, distance = _one_position(balance)
        daily = 1.0 - _survival(0.9, 0.0, distance, 30, 1, 0.0, 0.0, 0.0, bridge=False)
        missed.append(1.0 - daily / _touch(0.9, 0.0, distance, 30 / 365))
        market = gbm(ASSETS, VOL, RHO, drift="user", per_year=0.0, dtype=F64)
        plan = Plan(30, monitoring="step", attribution=False)
        hits = np.asarray(simulate_paths(market, book, 1 << 14, plan, seed=13).is_liquidated[0], float)
        assert_mc(hits, daily, 4.5)
    np.testing.assert_allclose(missed, [0.087, 0.113, 0.144], atol=5e-4)


# ----------------------------------------------------------------------------- one step by hand


def _scene(btc, eth, years=0.0, side=None):
    rows = tuple(jnp.atleast_1d(jnp.asarray(x, F64)) for x in (btc, eth))
    return Scene(rows, jnp.full(1, years), side or {})


def _state(account, n=1):
    first = Scene((jnp.ones(n),) * 2, jnp.zeros(1), {})
    return account.first(first, jnp.ones(n))


@pytest.mark.parametrize(
    ("rule", "price", "kept"),
    [
        # 20 % of a position above 100 000 USD is closed and what is left is safe.
        (TieredMargin(tiers={"default": [[0.0, 0.05]]}, name="t", liquidation=dict(process="partial", partial="share")),
         0.845, 0.8),
        # Below two thirds of the maintenance margin the fund takes it over.
        (TieredMargin(tiers={"default": [[0.0, 0.05]]}, name="t",
                      liquidation=dict(process="partial", partial="share", backstop=2.0 / 3.0)), 0.82, 0.0),
        # Until equity covers one and a half times the margin.
        (TieredMargin(tiers={"default": [[0.0, 0.05]]}, name="t", liquidation_fee_rate=0.002,
                      liquidation=dict(process="partial", partial="compliant", target=1.5)), 0.842, None),
        # Two tiers of size down: from the third to the top of the first.
        (TieredMargin(tiers={"default": [[0.0, 0.01, 0.02], [10.0, 0.03, 0.04], [20.0, 0.05, 0.06]]}, convention="size",
                      name="t", liquidation=dict(process="partial", partial="tiers")), 0.842, 0.6),
    ],
)  # fmt: skip
def test_what_a_liquidation_leaves(rule, price, kept):
    # One unit is 66.7 coins: 0.25 units are 16.7 coins, in the second tier of sizes; 0.4 units 26.7, in the third.
    units = 0.25 if kept == 0.6 else 0.4
    if kept == 0.6:
        units = 25.0 * PRICES["BTC"] / CAPITAL
        kept = 10.0 / 25.0
    book = book_of(dict(venue=rule, balance={"USD": 0.2 * units}, positions=[dict(asset="BTC", notional=units)]))
    account, scene = book.holdings[0], _scene(price, 1.0)
    state = account._liquidated(_state(account), scene, jnp.ones(1), ())
    equity, cost = units * (0.2 + price - 1.0), units * price * rule.liquidation_fee_rate
    maintenance = units * price * 0.05
    if kept is None:
        kept = 1.0 - float(partial_close_share(equity, maintenance, cost, target=1.5))
        left = equity - (1.0 - kept) * cost
        assert left == pytest.approx(1.5 * maintenance * kept)
    assert float(state.quantity[0][0]) == pytest.approx(kept * units, rel=1e-5)
    booked = state.status.booking
    assert float(account.equity(state, scene)[0]) == pytest.approx(
        equity + float((booked.fees + booked.liquidation)[0]), abs=1e-15
    )
    assert float(state.is_open[0]) == (0.0 if kept == 0.0 else 1.0)


def test_slippage_grows_as_the_book_empties():
    rule = tiered(0.05, liquidation_slippage=0.01)
    account = book_of(dict(venue=rule, balance={"USD": 0.1}, positions=[dict(asset="BTC", notional=0.4)])).holdings[0]
    lost = []
    for deep in (1.0, 0.2):
        scene = _scene(0.78, 1.0, side={"depth": (jnp.full(1, deep), jnp.ones(1))})
        state = account._liquidated(_state(account), scene, jnp.ones(1), ())
        lost.append(float(state.status.booking.liquidation[0]))
        assert float(state.status.bad_debt[0]) == pytest.approx(max(0.4 * 0.78 * 0.01 / deep - 0.012, 0.0), abs=1e-15)
    # 0.012 of equity is left: normal slippage takes 0.00312 of it, a fifth of the depth all, and the fund the rest.
    assert lost == pytest.approx([-0.00312, -0.012])


def test_an_account_below_its_margin_at_the_start_of_a_step_is_closed_at_its_prices():
    account = book_of(dict(venue=tiered(0.05), balance={"USD": 0.1}, positions=[dict(asset="BTC", notional=0.4)]))
    market = market_of()
    context = Context(market_model.prepare(market), account, None, jnp.zeros(1, jnp.uint32), 1, 1, 24.0)
    holding = account.holdings[0]
    before, after = _scene(0.78, 1.0), _scene(0.9, 1.0)
    moment = Moment(before, after, Scale((), jnp.ones(1)), None)
    state = holding.step(
        context, jnp.int32(0), _state(holding), moment, jnp.full(1, 0.99), Options(True, True, True, False)
    )
    assert float(state.status.equity[0]) == pytest.approx(0.1 - 0.4 * 0.22)


# ----------------------------------------------------------------------------- what policies see and order


def _mixed():
    positions = [
        dict(asset="BTC", notional=0.3),
        dict(kind="inverse", asset="ETH", notional=-0.2),
        dict(kind="option", asset="BTC", notional=-0.2, type="call", moneyness=1.05, days=20, settlement="coin"),
        dict(kind="option", asset="ETH", notional=0.2, type="put", moneyness=0.9, days=9),
    ]
    return book_of(dict(venue="deribit", balance={"USD": 0.3, "ETH": 0.2}, positions=positions)).holdings[0]


@pytest.mark.slow
def test_greeks_of_the_view_against_finite_differences():
    account = _mixed()
    scene, state = _scene(1.1, 0.9, 0.01), _state(account)
    view = account.view(state, scene)
    for k, asset in enumerate(account.assets):
        ends = []
        for h in (1e-6, -1e-6):
            rows = list(scene.prices)
            rows[asset] = rows[asset] * (1.0 + h)
            ends.append(account.equity(state, scene._replace(prices=tuple(rows))))
        np.testing.assert_allclose(view.delta[k], (ends[0] - ends[1]) / 2e-6, rtol=1e-7)
    for k, contract in enumerate(account.contracts):
        order = Order(trade=((k, jnp.full(1, 1e-3)),))
        free = dataclasses.replace(account, costs=account.costs._replace(taker_fee=0.0 * account.costs.taker_fee))
        bought = free.view(free.fill(state, scene, order)[0], scene)
        j = account.assets.index(contract.asset)
        np.testing.assert_allclose((bought.delta[j] - view.delta[j]) / 1e-3, view.unit_delta[k], rtol=1e-8)
        if contract.expiry_years is not None:
            sigma = contract.implied_volatility(scene)
            ends = [contract.mark_at(scene, sigma + h) for h in (1e-6, -1e-6)]
            np.testing.assert_allclose(view.unit_vega[k], (ends[0] - ends[1]) / 2e-6, rtol=1e-7)
        else:
            np.testing.assert_array_equal(view.unit_vega[k], 0.0)
    assert float(view.ratio[0]) == pytest.approx(float((view.requirement / view.collateral)[0]))


def test_orders_conserve():
    account = _mixed()
    scene, state = _scene(1.1, 0.9, 0.01), _state(account)
    state = state._replace(status=state.status._replace(equity=account.equity(state, scene)))
    orders = [
        Order(keep=jnp.full(1, 0.4)),
        Order(trade=((0, jnp.full(1, -0.1)), (2, jnp.full(1, 0.05)), (3, jnp.full(1, -0.1)))),
        Order(transfer=jnp.full(1, 0.07)),
        Order(keep=jnp.full(1, 0.0), transfer=jnp.full(1, -0.05)),
        # More than there is: what exceeds the requirement comes out.
        Order(transfer=jnp.full(1, -9.0)),
    ]
    for order in orders:
        after, moved = account.fill(state, scene, order)
        cost = state.status.booking.trading - after.status.booking.trading
        np.testing.assert_allclose(after.status.equity, state.status.equity + moved - cost, atol=1e-15)
        np.testing.assert_allclose(after.status.equity, account.equity(after, scene), atol=1e-15)
        assert float(cost[0]) >= 0.0
    assert float(cost[0]) == 0.0 and -0.9 < float(moved[0]) < 0.0
    assert float(account.distance(after, scene)[0]) == pytest.approx(0.0, abs=1e-12)
    closed = state._replace(is_open=jnp.zeros(1))
    after, moved = account.fill(closed, scene, orders[0])
    assert float(moved[0]) == 0.0 and jax.tree.all(
        jax.tree.map(lambda a, b: bool(jnp.all(a == b)), after.quantity, closed.quantity)
    )
