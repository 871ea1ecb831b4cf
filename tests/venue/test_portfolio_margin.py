"""Portfolio margin: worked and published examples, algebra of the scan, and what the builder refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpo_sim import venue
from qpo_sim.errors import InputError
from qpo_sim.instrument import option
from qpo_sim.venue import portfolio_margin as pm
from qpo_sim.venue.portfolio_margin import PortfolioMargin, Position

BTC = {"price_range": {"BTC": 0.16}, "volatility_up": {"BTC": 0.5}, "volatility_down": {"BTC": 0.25}}
RULE = PortfolioMargin(**BTC)
MOVES = (-0.66, -0.33, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
EXTENDED = dataclasses.replace(RULE, extended_moves=MOVES)


def written(quantity, forward, strike, days, volatility, *, is_call, is_coin_settled=True):
    revalue = option.revaluation(
        forward, strike, days / 365.0, volatility, is_call=is_call, is_coin_settled=is_coin_settled
    )
    return Position(quantity, revalue)


def random_portfolio(rng, forward=100.0, n=4):
    return [
        written(
            rng.normal(), forward, forward * rng.uniform(0.6, 1.6), rng.uniform(1, 120), rng.uniform(0.3, 1.2),
            is_call=bool(rng.integers(2)),
        )
        for _ in range(n)
    ] + [Position(rng.normal() * forward, pm.inverse_future(forward), is_option=False)]  # fmt: skip


def test_opt_07_scan(cases):
    case = cases("domain")["opt-07"]
    p, expected, tolerance = case["inputs"], case["expected"], case["tolerance"]
    rule = PortfolioMargin(
        price_range={"BTC": p["price_range"]},
        volatility_up={"BTC": p["vol_up"]},
        volatility_down={"BTC": p["vol_down"]},
        n_points=p["buckets"],
        least_volatility_up=p["min_vol_up"],
        short_power=p["short_power"],
        long_power=p["long_power"],
    )

    def within(got, name):
        np.testing.assert_allclose(got, expected[name], rtol=tolerance["rel"], atol=tolerance["abs"])

    scan, forward = rule.scan("BTC"), p["F"]
    within(scan.price_move[:9], "shocks")
    volatility = [pm.shocked_volatility(scan, o["iv"], o["days"]) for o in p["options"]]
    within([v[0] for v in volatility], "vol_up")
    within([v[-1] for v in volatility], "vol_down")
    positions = [written(o["qty"], forward, o["K"], o["days"], o["iv"], is_call=o["type"] == "C") for o in p["options"]]
    positions.append(Position(p["perp_usd"], pm.inverse_future(forward), is_option=False))
    profit = pm.scenario_profit(scan, positions)
    for rows, name in zip(pm.matrix(scan, profit), ("pnl_up", "pnl_same", "pnl_down"), strict=True):
        within(rows, name)
    worst = pm.worst(profit)
    within(-worst.loss, "worst")
    assert [int(i) for i in pm.worst_place(scan, worst.index)] == expected["worst_index"]
    assert float(rule.requirement(worst.loss).initial) == pytest.approx(-expected["worst"])


def test_published_example_of_futures():
    """Response of private/pme/simulate in Deribit's API documentation: long perpetual, short future, 17 June 2024."""
    rule = venue.load("deribit_portfolio")
    scan = rule.scan("BTC")
    coins, marks, index = (0.314538364, -0.001187534), (65910.57, 67371.75), 65666.19
    positions = [
        Position(q * mark, pm.inverse_future(mark), is_option=False) for q, mark in zip(coins, marks, strict=True)
    ]
    perpetual = pm.scenario_profit(scan, positions[:1])
    standard = [
        -0.05991206933333334, -0.04289159509090909, -0.027351162086956524, -0.013105765166666668, 0.0,
        0.012097629384615385, 0.023299138074074074, 0.033700538999999995, 0.043384601931034494,
    ]  # fmt: skip
    np.testing.assert_allclose(pm.matrix(scan, perpetual), [standard] * 3, rtol=1e-12, atol=1e-15)
    # Futures move by the range at most.
    np.testing.assert_allclose(perpetual[27:29], standard[0], rtol=1e-12)
    np.testing.assert_allclose(perpetual[29:], standard[-1], rtol=1e-12)

    profit = pm.scenario_profit(scan, positions, dampener=rule.value("extended_dampener_usd", "BTC") / index)
    np.testing.assert_array_equal(profit[27:], 0.0)
    assert float(pm.worst(profit).loss) == pytest.approx(0.05968587238095239, rel=1e-12)
    roll = pm.roll_shock(
        coins,
        (0.0, 11 / 365),
        move_per_year=rule.value("roll_move_per_year", "BTC"),
        least_move=rule.value("least_roll_move", "BTC"),
    )
    assert float(roll) == pytest.approx(0.00315725898, rel=1e-9)
    got = rule.requirement(pm.worst(profit).loss, roll)
    # The response adds the worst case rounded to nine digits.
    assert float(got.initial) == pytest.approx(0.06284313098, rel=0.0, abs=1e-9)
    assert float(got.maintenance) == pytest.approx(0.050274504784, rel=0.0, abs=1e-9)


# Volatility shocks.


def test_shock_sizes():
    scale = pm.maturity_scale(np.array([7.5, 30.0, 120.0]), short_power=0.3, long_power=0.13)
    np.testing.assert_allclose(scale, [4**0.3, 1.0, 4**-0.13], rtol=1e-14)
    days = np.array([29.999999, 30.000001])
    np.testing.assert_allclose(pm.maturity_scale(days, short_power=0.3, long_power=0.13), 1.0, atol=1e-7)
    assert np.isfinite(pm.maturity_scale(0.0, short_power=0.3, long_power=0.13))
    slope = jax.grad(lambda n: pm.maturity_scale(n, short_power=0.3, long_power=0.13))
    assert np.isfinite(slope(0.0)) and slope(20.0) == pytest.approx(-0.3 * 1.5**0.3 / 20.0)


def test_shocked_volatility_has_its_floors():
    scan = RULE.scan("BTC")
    calm = pm.shocked_volatility(scan, 0.2, 30.0)
    np.testing.assert_allclose(calm, [0.5] * 9 + [0.2] * 9 + [0.15] * 9)
    # A day before expiry the fall, 0.25 x 30^0.3 = 0.69, leaves a part; minutes before, nothing.
    assert pm.shocked_volatility(scan, 1.0, 1.0)[-1] == pytest.approx(1 - 0.25 * 30**0.3)
    assert pm.shocked_volatility(scan, 1.0, 0.05)[-1] == 0.0
    paths = pm.shocked_volatility(scan, jnp.array([0.2, 0.8]), 30.0)
    assert paths.shape == (27, 2)
    np.testing.assert_allclose(paths[0], [0.5, 1.2])


# Algebra of the scan.


def test_opposite_positions_cancel():
    rng = np.random.default_rng(0)
    positions = random_portfolio(rng)
    closed = positions + [p._replace(quantity=-p.quantity) for p in positions]
    np.testing.assert_allclose(pm.scenario_profit(EXTENDED.scan("BTC"), closed), 0.0, atol=1e-12)


def test_call_less_put_is_an_inverse_future_of_the_strike():
    forward, strike = 100.0, 120.0
    scan = RULE.scan("BTC")
    terms = (forward, strike, 20.0, 0.7)
    spread = [written(1.0, *terms, is_call=True), written(-1.0, *terms, is_call=False)]
    future = [Position(strike, pm.inverse_future(forward), is_option=False)]
    np.testing.assert_allclose(pm.scenario_profit(scan, spread), pm.scenario_profit(scan, future), atol=1e-14)


def test_margin_is_sub_additive_and_homogeneous():
    """Without a dampener, which forgives each portfolio once."""
    rng, scan = np.random.default_rng(1), EXTENDED.scan("BTC")
    for _ in range(15):
        one, other = random_portfolio(rng), random_portfolio(rng)
        losses = [float(pm.worst(pm.scenario_profit(scan, p)).loss) for p in (one, other, one + other)]
        assert losses[2] <= losses[0] + losses[1] + 1e-12
        double = [p._replace(quantity=2.0 * p.quantity) for p in one]
        assert float(pm.worst(pm.scenario_profit(scan, double)).loss) == pytest.approx(2 * losses[0], rel=1e-12)


def test_bought_options_lose_their_premium_at_most():
    rng, scan = np.random.default_rng(2), EXTENDED.scan("BTC")
    for _ in range(15):
        strike, days, volatility = 100 * rng.uniform(0.5, 2), rng.uniform(0.1, 200), rng.uniform(0.2, 1.5)
        for is_call in (True, False):
            position = written(1.0, 100.0, strike, days, volatility, is_call=is_call)
            premium = option.coin_value(100.0, strike, days / 365, volatility, is_call=is_call)
            assert 0.0 <= pm.worst(pm.scenario_profit(scan, [position])).loss <= premium + 1e-14


def test_a_wider_range_needs_more():
    rng = np.random.default_rng(3)
    for _ in range(5):
        positions = random_portfolio(rng)
        losses = []
        # Twice the range with twice the points holds all points of the range itself.
        for reach, n_points in ((0.08, 9), (0.16, 17), (0.32, 33)):
            rule = dataclasses.replace(RULE, price_range={"BTC": reach}, n_points=n_points)
            losses.append(float(pm.worst(pm.scenario_profit(rule.scan("BTC"), positions)).loss))
        assert losses == sorted(losses)


def test_extended_table():
    """A written far put: harmless in the matrix, not in the table; its share and dampener by hand."""
    forward, strike, days, volatility = 100.0, 40.0, 10.0, 0.6
    position = [written(-1.0, forward, strike, days, volatility, is_call=False)]
    up = pm.shocked_volatility(EXTENDED.scan("BTC"), volatility, days)[0]
    now, then = (
        option.coin_value(f, strike, days / 365, v, is_call=False) for f, v in ((100.0, volatility), (34.0, up))
    )
    full = pm.scenario_profit(EXTENDED.scan("BTC"), position)
    assert float(full[27]) == pytest.approx(float(now - then), rel=1e-12) and int(pm.worst(full).index) == 27
    assert [int(i) for i in pm.worst_place(EXTENDED.scan("BTC"), pm.worst(full).index)] == [3, 0]
    assert -float(full[27]) > 1e3 * float(pm.worst(full[:27]).loss)

    half = dataclasses.replace(EXTENDED, extended_factor=0.5).scan("BTC")
    damped = pm.scenario_profit(half, position, dampener=0.01)
    np.testing.assert_allclose(damped[:27], full[:27])
    most = 0.01 * (np.abs(np.array(MOVES)) / 0.16 - 1.0)
    expected = np.sign(full[27:]) * np.maximum(0.5 * np.abs(full[27:]) - most, 0.0)
    np.testing.assert_allclose(damped[27:], expected, rtol=1e-12, atol=1e-15)


def test_linear_futures_and_options_in_usd():
    scan = RULE.scan("BTC")
    future = pm.scenario_profit(scan, [Position(-2.0, pm.linear_future(100.0), is_option=False)])
    np.testing.assert_allclose(pm.matrix(scan, future)[1], -200.0 * np.linspace(-0.16, 0.16, 9), atol=1e-12)
    call = pm.scenario_profit(scan, [written(1.0, 100.0, 110.0, 30.0, 0.6, is_call=True, is_coin_settled=False)])
    expected = option.value(116.0, 110.0, 30 / 365, 0.9, is_call=True) - option.value(
        100.0, 110.0, 30 / 365, 0.6, is_call=True
    )
    np.testing.assert_allclose(pm.matrix(scan, call)[0, -1], expected, rtol=1e-12)


# Paths, precision, gradient.


def path_positions(price, quantity):
    return [
        written(quantity, price, 1.2, 21.0, 0.62, is_call=True),
        written(-1.0, price, 0.8, 21.0, 0.7, is_call=False),
        Position(0.2, pm.inverse_future(price), is_option=False),
    ]


@jax.jit
def path_profit(scan, price, quantity):
    return pm.scenario_profit(scan, path_positions(price, quantity), dampener=0.01 / price)


def test_each_path_by_itself():
    scan, price = EXTENDED.scan("BTC"), np.array([0.7, 1.0, 1.3])
    together = path_profit(scan, jnp.asarray(price), -1.0)
    assert together.shape == (35, 3)
    for i, p in enumerate(price):
        np.testing.assert_allclose(together[:, i], path_profit(scan, p, -1.0), rtol=1e-13, atol=1e-15)
    # Quantities by path at one price.
    by_quantity = path_profit(scan, 1.0, jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(by_quantity[:, 0], together[:, 1], rtol=1e-13, atol=1e-15)
    required = RULE.requirement(pm.worst(together).loss, jnp.array([0.0, 0.1, 0.2]))
    np.testing.assert_allclose(required.maintenance, 0.8 * (pm.worst(together).loss + np.array([0.0, 0.1, 0.2])))


def test_single_precision_under_jit():
    scan = EXTENDED.scan("BTC")
    price = np.linspace(0.5, 2.0, 301, dtype=np.float32)
    single = path_profit(jax.tree.map(lambda x: np.asarray(x, np.float32), scan), jnp.asarray(price), -1.0)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, path_profit(scan, price.astype(np.float64), -1.0), atol=3e-6)


@pytest.mark.slow
def test_worst_scenario_and_its_gradient():
    """The worst of the scan, its derivative by finite differences and through the whole scan."""
    scan, price = EXTENDED.scan("BTC"), np.linspace(0.6, 1.8, 13)

    def short_way(price, quantity):
        return pm.worst_scenario(scan, path_positions(price, quantity), dampener=0.01 / price).loss

    def long_way(price, quantity):
        return pm.worst(path_profit(scan, price, quantity)).loss

    both = [
        jax.jit(jax.vmap(jax.value_and_grad(way, argnums=(0, 1)), (0, None)))(price, -1.0)
        for way in (short_way, long_way)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), *both)
    found = jax.jit(lambda p: pm.worst_scenario(scan, path_positions(p, -1.0), dampener=0.01 / p))(price)
    np.testing.assert_allclose(found.loss, both[0][0], rtol=1e-13)
    np.testing.assert_array_equal(found.index, jnp.argmin(path_profit(scan, price, -1.0), axis=0))
    assert len(np.unique(found.index)) > 1
    h = 1e-6
    value = jax.jit(short_way)
    differences = (
        (value(price + h, -1.0) - value(price - h, -1.0)) / (2 * h),
        (value(price, -1.0 + h) - value(price, -1.0 - h)) / (2 * h),
    )
    # A difference over 2e-6 holds rounding of some 1e-10.
    np.testing.assert_allclose(both[0][1], differences, rtol=1e-6, atol=1e-9)


# Contingencies.


def test_contingencies_of_the_older_page():
    """10 calls bought and 20 puts written of one strike: 0.1; futures of 100 coins long and short: 1."""
    got = pm.written_option_contingency([10.0, -20.0, -3.0, 5.0], ["X", "X", "Y", "Z"], rate=0.01)
    assert float(got) == pytest.approx(0.01 * (10 + 3))
    assert float(pm.offsetting_contingency([100.0, -100.0], rate=0.01)) == pytest.approx(1.0)
    assert float(pm.offsetting_contingency([100.0, 20.0, -30.0], rate=0.01)) == pytest.approx(0.3)
    assert float(pm.offsetting_contingency([100.0], rate=0.01)) == 0.0


def test_contingencies_keep_the_precision_of_paths():
    rows = [jnp.ones(3, jnp.float32), -2.0 * jnp.ones(3, jnp.float32)]
    for got in (
        pm.written_option_contingency(rows, [1.0, 2.0], rate=0.01),
        pm.offsetting_contingency(rows, rate=0.01),
        pm.roll_shock(rows, [0.0, 1.0], move_per_year=0.075, least_move=0.01),
    ):
        assert got.dtype == jnp.float32 and got.shape == (3,)
    np.testing.assert_allclose(got, 0.01 + 2 * 0.075, rtol=1e-6)


# The border.


def test_shipped_venue():
    rule = venue.load("deribit_portfolio")
    assert isinstance(rule, PortfolioMargin)
    scan = rule.scan("BTC")
    np.testing.assert_allclose(scan.price_move[27:], MOVES)
    assert scan.n_matrix == 27 and rule.scan("ETH").price_range == 0.18
    assert rule.scan("SOL").volatility_up.max() == 0.5
    assert rule.fee_rate("taker", is_coin_settled=False) == 0.0005


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_points": 8}, "n_points is 8; it must be odd"),
        ({"price_range": {"BTC": 1.0}}, r"price_range.BTC is 1.0; it must lie in \(0, 1\)"),
        ({"volatility_up": {"BTC": 0.0}}, "volatility_up.BTC is 0.0; it must be above 0"),
        ({"roll_move_per_year": {"BTC": -0.1}}, "roll_move_per_year.BTC is -0.1; it must not be negative"),
        ({"short_power": -0.3}, "short_power is -0.3"),
        ({"extended_moves": [-1.0]}, "extended_moves has -1.0"),
        ({"extended_factor": 1.5}, "extended_factor is 1.5"),
        ({"maintenance_factor": 1.2}, "maintenance_factor is 1.2"),
        ({"fee_cap": 2.0}, "fee_cap is 2.0"),
        ({"taker_fee_rate": {"usd": 0.1}}, "taker_fee_rate has a row 'usd'"),
    ],
)
def test_what_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        venue.from_config(
            {"kind": "portfolio_margin", "source": "a test", "as_of": "2024-06", **BTC, **values}, name="mine"
        )


def test_an_underlying_without_a_row():
    with pytest.raises(InputError, match="price_range has no row for SOL and none for default; it lists BTC"):
        RULE.scan("SOL")
