"""Options, their Greeks and barriers against closed forms, finite differences, quadrature and simulation.

Statistics within 4.5 standard errors: false alarm 7e-6 each.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal, stats

from qpo_sim.instrument import barrier, greeks, option
from qpo_sim.market.side import implied_volatility

F32, F64 = jnp.float32, jnp.float64
CALL_PUT = [True, False]


def within(case, got, expected):
    tolerance = case["tolerance"]
    np.testing.assert_allclose(got, expected, rtol=tolerance["rel"], atol=tolerance["abs"])


def contract(case) -> dict:
    p = case["inputs"]
    return {"forward": p["F"], "strike": p["K"], "years": p["T_years"], "volatility": p["sigma"]}


def draws(n=400, seed=0):
    rng = np.random.default_rng(seed)
    forward = np.exp(rng.uniform(-2, 2, n))
    years, volatility = rng.uniform(0.01, 2.0, n), rng.uniform(0.2, 1.5, n)
    strike = forward * np.exp(rng.uniform(-3, 3, n) * volatility * np.sqrt(years))
    return forward, strike, years, volatility


def test_opt_01_greeks(cases):
    case = cases("domain")["opt-01"]
    p, found = case["inputs"], greeks.greeks(**contract(case), is_call=True, discount=case["inputs"]["df"])
    assert p["type"] == "C"
    got = found._asdict()
    got["price"] = got.pop("value")
    for name, expected in case["expected"].items():
        within(case, got[name], expected)


def test_opt_03_coin_greeks(cases):
    case = cases("domain")["opt-03"]
    expected, terms = case["expected"], contract(case)
    found = greeks.coin_greeks(**terms, is_call=True)
    within(case, option.coin_value(**terms, is_call=True), expected["price_coin"])
    within(case, found.price, expected["price_coin"])
    within(case, greeks.greeks(**terms, is_call=True).delta, expected["delta_usd"])
    within(case, found.delta, expected["delta_premium_adjusted"])
    within(case, found.first, expected["dc_dF"])
    within(case, found.second, expected["d2c_dF2"])
    within(case, found.vega, expected["vega_coin"])
    within(case, found.theta, expected["theta_coin_per_day"])


def test_opt_05_payoff_and_fee(cases):
    case = cases("domain")["opt-05"]
    p, expected = case["inputs"], case["expected"]
    within(case, option.payoff(p["delivery"], p["K"], is_call=True, multiplier=p["multiplier"]), expected["payoff"])
    profit = option.profit(1.0, p["premium"], p["delivery"], p["K"], is_call=True, multiplier=p["multiplier"])
    within(case, profit, expected["pnl"])
    fee = p["fee"]
    paid = option.fee(1.0, fee["option_price"], underlying=1.0, rate=fee["rate_coin"], cap=fee["cap"])
    within(case, paid, expected["fee_coin"])


def test_opt_11_parity(cases):
    case = cases("domain")["opt-11"]
    terms, expected = contract(case), case["expected"]
    call, put = (option.coin_value(**terms, is_call=c) for c in CALL_PUT)
    within(case, call - put, expected["c_minus_p"])
    within(case, 1.0 - terms["strike"] / terms["forward"], expected["parity"])
    within(case, option.parity_gap(call, put, terms["forward"], terms["strike"], is_coin_settled=True), 0.0)


# Valuation.


@pytest.mark.parametrize("discount", [1.0, 0.93])
def test_parity_everywhere(discount):
    forward, strike, years, volatility = draws()
    call, put = (option.value(forward, strike, years, volatility, is_call=c, discount=discount) for c in CALL_PUT)
    gap = option.parity_gap(call, put, forward, strike, discount=discount)
    assert np.abs(gap / np.maximum(forward, strike)).max() < 1e-15
    coin = option.parity_gap(call / forward, put / forward, forward, strike, discount=discount, is_coin_settled=True)
    np.testing.assert_allclose(coin, 0.0, atol=1e-13)


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_value_is_the_mean_payoff(is_call):
    """Quadrature of the payoff under the lognormal law."""
    forward, strike, years, volatility = draws(n=50, seed=1)
    z = np.linspace(-12, 12, 400_001)
    total = volatility * np.sqrt(years)
    for f, k, v, got in zip(
        forward, strike, total, option.value(forward, strike, years, volatility, is_call=is_call), strict=True
    ):
        paid = option.payoff(f * np.exp(v * z - 0.5 * v * v), k, is_call=is_call)
        np.testing.assert_allclose(got, np.trapezoid(paid * stats.norm.pdf(z), z), rtol=1e-7, atol=1e-9)


def test_an_array_of_calls_and_puts():
    is_call = np.array([True, False])
    both = option.value(1.0, 1.2, 0.3, 0.7, is_call=is_call)
    np.testing.assert_allclose(both, [option.value(1.0, 1.2, 0.3, 0.7, is_call=c) for c in CALL_PUT], rtol=1e-15)


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_bounds_and_monotonicity(is_call):
    forward, strike, years, volatility = draws(seed=2)
    value = option.value(forward, strike, years, volatility, is_call=is_call)
    assert np.all(value >= option.payoff(forward, strike, is_call=is_call))
    assert np.all(value <= (forward if is_call else strike))
    assert np.all(option.value(forward, strike, years, volatility + 0.05, is_call=is_call) >= value)
    assert np.all(option.value(forward, strike, years + 0.05, volatility, is_call=is_call) >= value)


def test_a_coin_settled_call_is_worth_less_than_a_coin_and_a_put_has_no_bound():
    price = np.geomspace(1e-6, 1e6, 200)
    assert np.all(option.coin_value(price, 1.0, 0.5, 0.8, is_call=True) <= 1.0)
    assert np.all(option.coin_payoff(price, 1.0, is_call=True) < 1.0)
    assert option.coin_payoff(price, 1.0, is_call=False).max() > 9e5
    # Written against a coin: covered. Profit in coins of a written call never falls below premium - 1.
    profit = option.profit(-1.0, 0.03, price, 1.0, is_call=True, is_coin_settled=True)
    assert profit.min() > 0.03 - 1.0


@pytest.mark.parametrize("is_call", CALL_PUT)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_expiry_and_no_volatility(dtype, is_call):
    """Intrinsic value, and finite derivatives everywhere."""

    def value(f, k, t, s):
        return option.value(f, k, t, s, is_call=is_call)

    gradient = jax.jit(jax.vmap(jax.value_and_grad(value, argnums=(0, 1, 2, 3))))
    corners = [(1.0,), (0.2, 0.999, 1.0, 1.001, 6.0), (0.0, 1e-12, 1e-3), (0.0, 1e-9, 0.6)]
    f, k, t, s = (jnp.asarray(x, dtype) for x in zip(*itertools.product(*corners), strict=True))
    got, slopes = gradient(f, k, t, s)
    still = (t == 0.0) | (s == 0.0)
    intrinsic = option.payoff(f, k, is_call=is_call)
    np.testing.assert_allclose(got[still], intrinsic[still], atol=max(1e-15, float(jnp.finfo(dtype).eps)))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in slopes)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in greeks.greeks(f, k, t, s, is_call=is_call))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in greeks.coin_greeks(f, k, t, s, is_call=is_call))
    away = still & (k != 1.0)
    in_the_money = (f > k) if is_call else (f < k)
    expected = jnp.where(in_the_money, 1.0 if is_call else -1.0, 0.0)
    np.testing.assert_allclose(slopes[0][away], expected[away])
    np.testing.assert_allclose(slopes[0][still & (k == 1.0)], 0.5 if is_call else -0.5)


def test_vega_at_the_money_without_volatility_is_its_limit():
    slope = jax.grad(lambda s: option.value(2.0, 2.0, 0.25, s, is_call=True))(0.0)
    np.testing.assert_allclose(slope, 2.0 * 0.5 / np.sqrt(2 * np.pi), rtol=1e-12)
    np.testing.assert_allclose(greeks.greeks(2.0, 2.0, 0.25, 0.0, is_call=True).vega, slope, rtol=1e-12)


def test_single_precision():
    terms = draws(n=4000, seed=3)
    single = [jnp.asarray(x, F32) for x in terms]
    # Compared at the rounded inputs: what is measured is the arithmetic.
    double = [np.asarray(x, np.float64) for x in single]
    for is_call in CALL_PUT:
        got = option.value(*single, is_call=is_call)
        assert got.dtype == F32
        error = np.abs(np.asarray(got, np.float64) - option.value(*double, is_call=is_call))
        assert (error / np.maximum(double[0], double[1])).max() < 5e-7


# Greeks.


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_greeks_are_the_derivatives(is_call):
    rate = 0.08

    def value(f, k, t, s):
        return option.value(f, k, t, s, is_call=is_call, discount=jnp.exp(-rate * t))

    def coin(*terms):
        return value(*terms) / terms[0]

    def each(function):
        return jax.jit(jax.vmap(function))(*terms)

    terms = [jnp.asarray(x) for x in draws(seed=4)]
    discount = jnp.exp(-rate * terms[2])
    found = greeks.greeks(*terms, is_call=is_call, discount=discount)
    in_coin = greeks.coin_greeks(*terms, is_call=is_call, discount=discount)
    delta, vega, first = jax.grad(value), jax.grad(value, argnums=3), jax.grad(coin)
    for got, function in (
        (found.delta, delta),
        (found.gamma, jax.grad(delta)),
        (found.vega, vega),
        (found.theta, lambda *x: -jax.grad(value, argnums=2)(*x)),
        (found.vanna, jax.grad(delta, argnums=3)),
        (found.volga, jax.grad(vega, argnums=3)),
        (in_coin.first, first),
        (in_coin.second, jax.grad(first)),
        (in_coin.vega, jax.grad(coin, argnums=3)),
        (in_coin.theta, lambda *x: -jax.grad(coin, argnums=2)(*x) / 365.0),
        (in_coin.delta, lambda *x: x[0] * first(*x)),
    ):
        expected = each(function)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_greeks_against_finite_differences(is_call):
    f, k, t, s = 100.0, 115.0, 0.3, 0.7
    found = greeks.greeks(f, k, t, s, is_call=is_call)

    def value(f=f, t=t, s=s):
        return option.value(f, k, t, s, is_call=is_call)

    h = 1e-3
    np.testing.assert_allclose(found.delta, (value(f=f + h) - value(f=f - h)) / (2 * h), rtol=1e-7)
    np.testing.assert_allclose(found.gamma, (value(f=f + h) - 2 * value() + value(f=f - h)) / h**2, rtol=1e-5)
    np.testing.assert_allclose(found.vega, (value(s=s + h) - value(s=s - h)) / (2 * h), rtol=1e-5)
    np.testing.assert_allclose(found.theta, -(value(t=t + h) - value(t=t - h)) / (2 * h), rtol=1e-4)


def test_premium_adjusted_hedge_keeps_coins_still():
    """A long inverse call and a short inverse perpetual of its premium-adjusted delta: coins move in second order."""
    f, k, t, s = 100.0, 110.0, 0.1, 0.6
    delta = greeks.coin_greeks(f, k, t, s, is_call=True).delta
    moved = f * (1.0 + 1e-4)
    coins = option.coin_value(moved, k, t, s, is_call=True) - option.coin_value(f, k, t, s, is_call=True)
    hedge = -delta * f * (1.0 / f - 1.0 / moved)
    assert abs(coins + hedge) < 1e-3 * abs(coins)


# Fees.


def test_fee_and_its_cap():
    deribit = {"rate": 0.0003, "cap": 0.125}
    price = np.array([0.0, 0.001, 0.0024, 0.01, 0.5])
    got = option.fee(-2.0, price, underlying=1.0, **deribit)
    np.testing.assert_allclose(got, 2 * np.array([0.0, 0.000125, 0.0003, 0.0003, 0.0003]))
    # Linear, in USD: 0.05 % of the index.
    assert option.fee(3.0, 500.0, underlying=60_000.0, rate=0.0005, cap=0.125) == pytest.approx(90.0)
    # Delivery: nothing on what expires worthless.
    assert option.fee(1.0, 0.0, underlying=1.0, rate=0.00015, cap=0.125) == 0.0


# Implied volatility.


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_implied_volatility_inverts_the_value(is_call):
    forward, strike, years, volatility = draws(seed=5)
    price = option.value(forward, strike, years, volatility, is_call=is_call, discount=0.95)
    got = option.implied_volatility(price, forward, strike, years, is_call=is_call, discount=0.95)
    # A price in the money has rounding of its own size, which the volatility feels through vega.
    vega = greeks.greeks(forward, strike, years, volatility, is_call=is_call).vega
    np.testing.assert_array_less(np.abs(got - volatility), 1e-12 + 2e-15 * np.maximum(forward, strike) / vega)


def test_implied_volatility_far_out_of_the_money_and_of_long_options():
    for strike, years, volatility in ((5.0, 0.05, 0.5), (1e-3, 0.1, 1.0), (1.0, 30.0, 2.0), (1.0, 1e-6, 0.5)):
        is_call = strike >= 1.0
        price = option.value(1.0, strike, years, volatility, is_call=is_call)
        got = option.implied_volatility(price, 1.0, strike, years, is_call=is_call)
        np.testing.assert_allclose(got, volatility, rtol=1e-9)


def test_implied_volatility_of_prices_that_have_none():
    got = option.implied_volatility(np.array([-0.01, 1.0, 1.5]), 1.0, 1.2, 0.5, is_call=True)
    assert np.isnan(got).all()
    assert np.isnan(option.implied_volatility(0.1, 1.0, 1.2, 0.0, is_call=True))
    assert option.implied_volatility(0.0, 1.0, 1.2, 0.5, is_call=True) == 0.0
    assert option.implied_volatility(0.2, 1.2, 1.0, 0.5, is_call=True) < 1e-3
    assert np.isnan(option.implied_volatility(0.19, 1.2, 1.0, 0.5, is_call=True))


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_implied_volatility_gradient_is_the_implicit_one(is_call):
    f, k, t, s = 1.0, 1.1, 0.4, 0.8
    found = greeks.greeks(f, k, t, s, is_call=is_call)

    def implied(price, forward):
        return option.implied_volatility(price, forward, k, t, is_call=is_call)

    slopes = jax.grad(implied, argnums=(0, 1))(found.value, f)
    np.testing.assert_allclose(slopes, (1.0 / found.vega, -found.delta / found.vega), rtol=1e-9)


def test_implied_volatility_in_single_precision():
    forward, strike, years, volatility = draws(seed=6)
    price = option.value(forward, strike, years, volatility, is_call=strike >= forward)
    got = option.implied_volatility(
        *(jnp.asarray(x, F32) for x in (price, forward, strike, years)), is_call=strike >= forward
    )
    assert got.dtype == F32
    vega = greeks.greeks(forward, strike, years, volatility, is_call=True).vega
    near = vega > 0.02 * forward
    assert near.sum() > 300
    np.testing.assert_allclose(np.asarray(got)[near], volatility[near], rtol=1e-4)


# Smiles.


def test_raw_svi_is_ssvi_in_other_letters():
    theta, rho, phi = 0.03, -0.2, 4.0
    smile = option.RawSvi(0.5 * theta * (1 - rho**2), 0.5 * theta * phi, rho, -rho / phi, np.sqrt(1 - rho**2) / phi)
    k = np.linspace(-1, 1, 41)
    np.testing.assert_allclose(
        smile.total_variance(k), implied_volatility.total_variance(k, theta, rho, phi), rtol=1e-12
    )
    assert smile.butterfly(k).min() > 0.0 and smile.steepest_wing() < 2.0
    np.testing.assert_allclose(
        smile.least_variance(), smile.total_variance(np.linspace(-1, 1, 100_001)).min(), rtol=1e-8
    )


def test_butterfly_condition_is_the_density():
    """Axel Vogt's smile has a negative density though its wings are flat enough (Gatheral & Jacquier 2014, ex. 3.1)."""
    smile = option.RawSvi(-0.0410, 0.1331, 0.3060, 0.3586, 0.4153)
    k = np.linspace(-1.5, 1.5, 301)
    g = np.asarray(smile.butterfly(k))
    assert smile.steepest_wing() < 2.0 and smile.least_variance() > 0.0 and g.min() < 0.0

    def call(strike):
        volatility = jnp.sqrt(smile.total_variance(jnp.log(strike)))
        return option.value(1.0, strike, 1.0, volatility, is_call=True)

    strike = jnp.exp(jnp.asarray(k))
    density = jax.vmap(jax.grad(jax.grad(call)))(strike)
    w = smile.total_variance(k)
    d2 = -k / np.sqrt(w) - 0.5 * np.sqrt(w)
    np.testing.assert_allclose(density, g * stats.norm.pdf(d2) / (strike * np.sqrt(w)), rtol=1e-7, atol=1e-10)


def test_carried_smile():
    keeps = option.carried_log_moneyness(1.1, 1.2, 1.0, stickiness=1.0)
    np.testing.assert_allclose(keeps, np.log(1.1), rtol=1e-14)
    np.testing.assert_allclose(option.carried_log_moneyness(1.32, 1.2, 1.0, stickiness=0.0), np.log(1.1), rtol=1e-13)


# Barriers.

KINDS = list(itertools.product([True, False], repeat=3))


def propagated(start, level, volatility, step_years, n_steps, payoff=None):
    """Mean payoff of paths that are above `level` at every date (1 each by default), by propagation of the density.

    Log-prices relative to the level, on a grid that starts at it.
    """
    s = volatility * np.sqrt(step_years)
    h = s / 16.0
    x = h * np.arange(int((np.log(start / level) + 7 * s * np.sqrt(n_steps)) / h))
    weight = np.where(x == 0.0, 0.5 * h, h)
    half = int(9 * s / h)
    kernel = stats.norm.pdf(h * np.arange(-half, half + 1), -0.5 * s * s, s)
    density = stats.norm.pdf(x, np.log(start / level) - 0.5 * s * s, s)
    for _ in range(n_steps - 1):
        density = signal.fftconvolve(density * weight, kernel)[half : half + x.size]
    paid = np.ones_like(x) if payoff is None else payoff(level * np.exp(x))
    return float(np.sum(density * weight * paid))


def test_perp_15_touch_probability(cases):
    case = cases("domain")["perp-15"]
    p, expected = case["inputs"], case["expected"]
    terms = (p["S0"], np.array(p["barriers"]), p["T_years"], p["sigma"])
    got = barrier.touch_probability(*terms, drift=p["mu"])
    np.testing.assert_allclose(got, expected["continuous"], rtol=1e-11)
    for name, n in p["monitoring"].items():
        got = barrier.touch_probability(*terms, drift=p["mu"], step_years=p["T_years"] / n)
        np.testing.assert_allclose(got, expected[f"bgk_{name}"], rtol=1e-10)
        # The approximation's own error at these dates.
        np.testing.assert_allclose(got, expected[name], atol={"hourly": 1e-4, "daily": 2e-3}[name])


@pytest.mark.parametrize("name", ["hourly", "daily"])
def test_perp_15_exact_dates(cases, name):
    case = cases("domain")["perp-15"]
    p = case["inputs"]
    n = p["monitoring"][name]
    for level, expected in list(zip(p["barriers"], case["expected"][name], strict=True))[:3]:
        touched = 1.0 - propagated(p["S0"], level, p["sigma"], p["T_years"] / n, n)
        within(case, touched, expected)


@pytest.mark.parametrize("drift", [-0.8, 0.0, 0.5, 3.0])
def test_touch_probability_by_simulation(drift):
    """Bridge survival over a few exact steps has the continuous probability as its mean."""
    n_paths, n_steps, years, volatility = 40_000, 4, 0.25, 0.8
    z = np.random.default_rng(7).standard_normal((n_steps, n_paths))
    dt = years / n_steps
    move = (drift - 0.5 * volatility**2) * dt + volatility * np.sqrt(dt) * z
    price = np.exp(np.vstack([np.zeros(n_paths), np.cumsum(move, axis=0)]))
    for level, is_up in ((0.8, False), (1.3, True)):
        alive = np.ones(n_paths)
        for before, after in itertools.pairwise(price):
            alive = alive * np.asarray(barrier.step_survival(before, after, level, volatility**2 * dt, is_up=is_up))
        error = np.std(alive) / np.sqrt(n_paths)
        expected = 1.0 - barrier.touch_probability(1.0, level, years, volatility, drift=drift)
        assert abs(alive.mean() - expected) < 4.5 * error


@pytest.mark.parametrize("dtype", [F32, F64])
def test_touch_probability_limits(dtype):
    def touch(level, years, volatility, drift):
        terms = [jnp.asarray(x, dtype) for x in (1.0, level, years, volatility)]
        return barrier.touch_probability(*terms, drift=jnp.asarray(drift, dtype))

    assert touch(1.0, 0.1, 0.5, 0.0) == 1.0
    assert touch(0.8, 0.0, 0.5, 0.0) == 0.0
    # Without volatility the price goes to exp(mu T).
    for level, drift, expected in (
        (0.8, -0.3, 1.0),
        (0.7, -0.3, 0.0),
        (1.2, 0.3, 1.0),
        (1.4, 0.3, 0.0),
        (1.2, -0.3, 0.0),
    ):
        np.testing.assert_allclose(touch(level, 1.0, 0.0, drift), expected, atol=1e-6)
    corners = itertools.product((0.3, 0.99, 1.01, 4.0), (0.0, 1e-6, 1.0), (0.0, 1e-3, 0.6), (-5.0, 0.0, 5.0))
    rows = [jnp.asarray(x, dtype) for x in zip(*corners, strict=True)]
    probability, slopes = jax.jit(jax.vmap(jax.value_and_grad(touch, argnums=(0, 1, 2, 3))))(*rows)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in slopes)
    assert bool(jnp.all((probability > -1e-6) & (probability < 1.0 + 1e-5)))


def test_touch_probability_gradient():
    terms = [1.0, 0.85, 0.2, 0.7, 0.3]

    def touch(price, level, years, volatility, drift):
        return barrier.touch_probability(price, level, years, volatility, drift=drift)

    slopes = jax.grad(touch, argnums=tuple(range(5)))(*terms)
    for i, slope in enumerate(slopes):
        up, down = (list(terms) for _ in range(2))
        up[i], down[i] = terms[i] + 1e-6, terms[i] - 1e-6
        np.testing.assert_allclose(slope, (touch(*up) - touch(*down)) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize(("is_call", "is_up", "is_in"), KINDS)
@pytest.mark.parametrize("strike", [0.8, 1.0, 1.25])
def test_barrier_options_by_simulation(is_call, is_up, is_in, strike):
    """One exact step of a bridge: its survival times the payoff has the closed form as its mean."""
    n_paths, years, volatility = 200_000, 0.25, 0.7
    level = 1.2 if is_up else 0.85
    z = np.random.default_rng(8).standard_normal(n_paths)
    end = np.exp(volatility * np.sqrt(years) * z - 0.5 * volatility**2 * years)
    alive = barrier.step_survival(1.0, end, level, volatility**2 * years, is_up=is_up)
    paid = np.asarray(option.payoff(end, strike, is_call=is_call) * ((1.0 - alive) if is_in else alive))
    got = barrier.value(1.0, strike, level, years, volatility, is_call=is_call, is_up=is_up, is_in=is_in)
    assert abs(paid.mean() - got) < 4.5 * paid.std() / np.sqrt(n_paths) + 1e-15


def test_knock_in_and_knock_out_add_up_and_are_bounded():
    forward, strike, years, volatility = draws(seed=9)
    rng = np.random.default_rng(10)
    for is_call, is_up in itertools.product(CALL_PUT, [True, False]):
        level = forward * np.exp(rng.uniform(0.01, 1.0, forward.size) * (1 if is_up else -1))
        terms = (forward, strike, level, years, volatility)
        parts = [barrier.value(*terms, is_call=is_call, is_up=is_up, is_in=i, discount=0.9) for i in (True, False)]
        plain = option.value(forward, strike, years, volatility, is_call=is_call, discount=0.9)
        np.testing.assert_allclose(sum(parts), plain, rtol=1e-13)
        assert min(p.min() for p in parts) > -1e-13
        # Fewer dates, fewer touches.
        dates = barrier.value(*terms, is_call=is_call, is_up=is_up, is_in=False, discount=0.9, step_years=1 / 365)
        assert np.all(dates >= parts[1] - 1e-13)


def test_a_touched_barrier():
    for level, is_up in ((1.0, True), (0.9, True), (1.0, False), (1.1, False)):
        terms = {"is_call": True, "is_up": is_up}
        assert barrier.value(1.0, 0.9, level, 0.5, 0.6, is_in=False, **terms) == 0.0
        np.testing.assert_allclose(
            barrier.value(1.0, 0.9, level, 0.5, 0.6, is_in=True, **terms),
            option.value(1.0, 0.9, 0.5, 0.6, is_call=True),
        )


def test_barrier_option_at_discrete_dates():
    """The shift against the exact price at daily dates, by propagation of the density."""
    n, dt, level, strike, volatility = 30, 1 / 365, 0.92, 1.0, 0.6
    exact = propagated(1.0, level, volatility, dt, n, lambda s: np.maximum(s - strike, 0.0))
    terms = {"is_call": True, "is_up": False, "is_in": False}
    shifted = barrier.value(1.0, strike, level, n * dt, volatility, step_years=dt, **terms)
    continuous = barrier.value(1.0, strike, level, n * dt, volatility, **terms)
    assert abs(shifted - exact) < 0.002 * exact < 0.03 * exact < abs(continuous - exact)


@pytest.mark.parametrize(("is_call", "is_up", "is_in"), KINDS)
def test_barrier_option_gradients(is_call, is_up, is_in):
    def value(f, k, h, t, s):
        return barrier.value(f, k, h, t, s, is_call=is_call, is_up=is_up, is_in=is_in)

    terms = [1.0, 1.05, 1.2 if is_up else 0.8, 0.3, 0.6]
    slopes = jax.grad(value, argnums=tuple(range(5)))(*terms)
    for i, slope in enumerate(slopes):
        up, down = (list(terms) for _ in range(2))
        up[i], down[i] = terms[i] + 1e-6, terms[i] - 1e-6
        np.testing.assert_allclose(slope, (value(*up) - value(*down)) / 2e-6, rtol=1e-5, atol=1e-8)
    for t, s in ((0.0, 0.6), (0.3, 0.0), (1e-9, 1e-6)):
        still = [jnp.asarray(x, F32) for x in (1.0, 1.05, terms[2], t, s)]
        assert all(bool(jnp.isfinite(x)) for x in jax.grad(value, argnums=tuple(range(5)))(*still))
        np.testing.assert_allclose(
            value(*still), 0.0 if is_in else option.payoff(1.0, 1.05, is_call=is_call), atol=1e-6
        )
