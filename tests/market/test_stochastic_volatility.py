"""Heston, Bates and SVJJ against closed forms.

Monte Carlo means lie within 4 standard errors (false alarm 6e-5 each) plus, where a scheme is biased, a stated budget.
"""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, assert_mc
from reference.volatility_paths import assert_gradient, drive, simulate, smooth_value
from scipy import special, stats

from qpo_sim.errors import InputError
from qpo_sim.market import presets, transforms
from qpo_sim.market.square_root import QuadraticExponential, quadratic_exponential
from qpo_sim.market.volatility import heston as heston_module
from qpo_sim.market.volatility.heston import FellerWarning, heston
from qpo_sim.simulate import Plan, market_paths

CALM = dict(kappa=4.0, theta=0.5, vol_of_vol=1.5, rho=-0.4, v0=0.4)
WILD = dict(kappa=1.5768, theta=0.0398, vol_of_vol=0.5751, rho=-0.5711, v0=0.0175)


def wild(**options):
    with pytest.warns(FellerWarning):
        return heston(**{**WILD, **options})


def assert_call(log_price, expected, *, strike=100.0, forward=100.0, discount=1.0, bias=0.0):
    """The price of a call, with the price itself (whose mean is exact) as control variate."""
    price = np.exp(log_price) * forward
    assert_mc(price, forward)
    payoff = discount * np.maximum(price - strike, 0.0)
    slope = np.cov(payoff, price)[0, 1] / price.var()
    sample = payoff - slope * (price - forward)
    error = sample.std() / np.sqrt(sample.size)
    assert abs(sample.mean() - expected) < 4.0 * error + bias, (sample.mean(), expected, error)


# ----------------------------------------------------------------------------- Heston: published prices


@pytest.mark.parametrize(("years", "n_paths"), [(1, 1 << 19), (10, 1 << 17)])
def test_published_heston_prices(cases, years, n_paths):
    case = cases("models")["A18"]
    p = case["inputs"]
    model = wild(**{name: p[name] for name in ("v0", "kappa", "theta", "vol_of_vol", "rho")})
    log_price, _ = simulate(model, n_paths, 32 * years, years)
    # The budget is the case's, for steps of 1/32 year.
    assert_call(log_price[0], case["expected"][f"T={years}"], bias=0.02)


def of_broadie_kaya(p):
    numbers = {"v0": p["v0"], "kappa": p["kappa"], "theta": p["theta"], "vol_of_vol": p["eps"], "rho": p["rho"]}
    if "lam" in p:
        std = p["jump_log_sd"]
        mean = np.log1p(p["mean_simple_jump"]) - 0.5 * std**2
        numbers |= {"jump_intensity": p["lam"], "jump_mean": mean, "jump_std": std}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FellerWarning)
        return heston(**numbers)


@pytest.mark.parametrize(("name", "steps_per_year"), [("heston1", 64), ("heston2", 32), ("bates", 32)])
def test_published_broadie_kaya_prices(cases, name, steps_per_year):
    case = cases("models")["A20"]
    p = case["inputs"][name]
    log_price, _ = simulate(of_broadie_kaya(p), 1 << 18, steps_per_year * p["T"], p["T"])
    growth = np.exp(p["r"] * p["T"])
    assert_call(log_price[0], case["expected"][name], forward=100.0 * growth, discount=1.0 / growth, bias=0.01)


SVJJ = dict(intensity=1.5, jump_mean=-0.05, jump_std=0.1, variance_jump_mean=0.15, jump_leverage=-0.4)
OF_CALM = {name: CALM[name] for name in ("v0", "kappa", "theta", "vol_of_vol", "rho")}


def svjj(**options):
    jumps = {("jump_intensity" if name == "intensity" else name): value for name, value in SVJJ.items()}
    return heston(**{**CALM, **jumps, **options})


@pytest.mark.parametrize(("scheme", "bias"), [("qe", 0.02), ("euler", 0.1)])
def test_price_under_simultaneous_jumps(scheme, bias):
    log_price, _ = simulate(svjj(scheme=scheme), 1 << 18, 32, 1.0)
    for strike in (70.0, 100.0, 140.0):
        characteristic = partial(transforms.svjj, years=1.0, **OF_CALM, **SVJJ)
        expected = transforms.lewis_call(characteristic, strike, forward=100.0)
        assert_call(log_price[0], expected, strike=strike, bias=bias)


def test_euler_price():
    log_price, _ = simulate(heston(**CALM, scheme="euler"), 1 << 18, 128, 1.0)
    expected = transforms.lewis_call(partial(transforms.heston, years=1.0, **OF_CALM), 100.0, forward=100.0)
    assert_call(log_price[0], expected, bias=0.04)


# ----------------------------------------------------------------------------- Heston: one step, exactly


def all_scores(n=1 << 20):
    """Normal scores of equally likely cells: means over them are integrals."""
    return special.ndtri((np.arange(n) + 0.5) / n)


def one_step(v, kappa, theta, vol_of_vol, rho, dt):
    scheme = QuadraticExponential.of(*(jnp.asarray(x, F64) for x in (kappa, theta, vol_of_vol, rho)), dt)
    pair = quadratic_exponential(scheme, jnp.asarray(v, F64), jnp.asarray(all_scores()))
    return scheme, np.asarray(pair.first), np.asarray(pair.second)


# psi is 0.02, 0.25 and 1.3 (quadratic branch), then 2.0 and 2.6 (exponential branch).
STARTS = [0.5, 0.04, 0.005, 0.002, 0.0]


@pytest.mark.parametrize("v", STARTS)
def test_next_variance_has_the_moments_of_the_square_root_process(v):
    kappa, theta, sigma, dt = 1.5768, 0.0398, 0.5751, 1.0 / 32.0
    _, after, _ = one_step(v, kappa, theta, sigma, -0.5, dt)
    # The exact law is a scaled noncentral chi-square (Cox, Ingersoll & Ross 1985).
    decay = np.exp(-kappa * dt)
    scale = sigma**2 * (1.0 - decay) / (4.0 * kappa)
    law = stats.ncx2(4.0 * kappa * theta / sigma**2, v * decay / scale, scale=scale)
    mean, variance = law.stats() if v > 0.0 else stats.chi2(4.0 * kappa * theta / sigma**2, scale=scale).stats()
    np.testing.assert_allclose(after.mean(), mean, rtol=1e-5)
    np.testing.assert_allclose(after.var(), variance, rtol=3e-4)
    assert after.min() >= 0.0


def test_both_branches_are_covered():
    zeros = [np.mean(one_step(v, 1.5768, 0.0398, 0.5751, -0.5, 1.0 / 32.0)[1] == 0.0) for v in STARTS]
    assert zeros[:3] == [0.0] * 3 and 0.3 < zeros[3] < zeros[4] < 0.5


@pytest.mark.parametrize("v", STARTS)
@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.7])
def test_mean_price_of_a_step_is_exact(v, rho):
    kappa, theta, sigma, dt = 1.5768, 0.0398, 0.5751, 1.0 / 32.0
    scheme, after, excess = one_step(v, kappa, theta, sigma, rho, dt)
    mean = v + (theta - v) * -np.expm1(-kappa * dt)
    log_mean = np.log(np.mean(np.exp(float(scheme.tilt) * after))) - float(scheme.tilt) * mean
    np.testing.assert_allclose(excess, log_mean, rtol=2e-4, atol=1e-9)
    state, score = (jnp.full(after.shape, v),), (jnp.asarray(all_scores()),)
    vector = QuadraticExponential(*(x[None] for x in scheme))
    step = vector.step(state, score, is_martingale=True)
    given_variance = np.exp(np.asarray(step.shift[0]) + 0.5 * (1.0 - rho**2) * np.asarray(step.integral[0]))
    np.testing.assert_allclose(given_variance.mean(), 1.0, rtol=0.0, atol=2e-6)


def test_a_mean_that_does_not_exist_is_not_a_number():
    scheme = QuadraticExponential.of(*(jnp.asarray(x, F64) for x in (3.0, 1.0, 5.0, 0.99)), 1.0)
    both = quadratic_exponential(scheme, jnp.asarray([1.0, 60.0], F64), jnp.asarray(0.3, F64))
    np.testing.assert_array_equal(np.isnan(both.second), [False, True])


# ----------------------------------------------------------------------------- Heston: several assets

DRIVERS = np.array([[1.0, 0.5], [0.5, 1.0]])
CROSS = np.array([[-0.4, -0.3], [0.1, -0.6]])
PAIR = CALM | dict(rho=[-0.4, -0.6], driver_correlation=DRIVERS)


@pytest.mark.parametrize("scheme", ["qe", "euler"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(cross_leverage=CROSS),
        dict(jump_intensity=[5.0, 0.0], jump_mean=0.1, jump_std=0.2),
        dict(jump_intensity=1.5, jump_mean=-0.1, jump_std=0.1, variance_jump_mean=0.3, jump_leverage=0.5),
    ],
    ids=["heston", "cross leverage", "bates", "svjj"],
)
def test_prices_are_martingales(scheme, options):
    # The step is long: the property does not depend on it.
    log_price, _ = simulate(heston(**PAIR, **options, scheme=scheme), 1 << 18, 16, 1.0)
    for row in log_price:
        assert_mc(np.exp(row), 1.0)


def test_prices_are_martingales_where_the_variance_reaches_zero():
    for scheme in ("qe", "euler"):
        log_price, _ = simulate(wild(scheme=scheme), 1 << 18, 8, 1.0)
        assert_mc(np.exp(log_price[0]), 1.0)


@pytest.mark.parametrize("scheme", ["qe", "euler"])
def test_uncompensated_log_price_has_the_mean_of_its_jumps(scheme):
    model = heston(**CALM, jump_intensity=2.0, jump_mean=-0.1, jump_std=0.05, scheme=scheme, martingale=False)
    log_price, _ = simulate(model, 1 << 18, 16, 1.0)
    assert_mc(log_price[0], -0.2)


def correlation_error(value, n):
    return 4.0 * (1.0 - value**2) / np.sqrt(n) + 1e-3


@pytest.mark.parametrize("cross", [None, CROSS])
@pytest.mark.parametrize("scheme", ["qe", "euler"])
def test_correlations_of_variances_and_prices(scheme, cross):
    # Over one short step, from variances far from zero, the drivers can be read off prices and variances.
    n = 1 << 18
    model = heston(**PAIR, cross_leverage=cross, scheme=scheme, dtype=F64)
    log_price, (after,) = simulate(model, n, 1, 1e-4, watch=lambda state, local, eps, move: (state,))
    found = np.corrcoef(np.vstack([log_price, [row[0] for row in after]]))
    implied = np.array(PAIR["rho"])[:, None] * DRIVERS
    wanted = implied if cross is None else cross
    assert abs(found[2, 3] - 0.5) < correlation_error(0.5, n)
    for i in range(2):
        for j in range(2):
            assert abs(found[i, 2 + j] - wanted[i, j]) < correlation_error(wanted[i, j], n), (i, j)
    # The variance of a price is all of v, however it is split.
    np.testing.assert_allclose(log_price.var(axis=1), 0.4e-4, rtol=0.02)


@pytest.mark.parametrize(("cross", "value"), [(None, 0.8), (CROSS, 0.5)])
def test_shock_correlation_gives_the_wanted_price_correlation(cross, value):
    model = heston(**PAIR, cross_leverage=cross, dtype=F64)
    wanted = np.array([[1.0, value], [value, 1.0]])
    factor = np.linalg.cholesky(model.shock_correlation(wanted))
    n = 1 << 18
    _, (shift, scale, eps) = simulate(
        model, n, 1, 1e-4, watch=lambda state, local, eps, move: (local.shift, local.factor, eps)
    )
    shift, scale, eps = (np.array([row[0] for row in rows]) for rows in (shift, scale, eps))
    found = np.corrcoef(shift + scale * (factor @ eps))[0, 1]
    assert abs(found - value) < correlation_error(value, n)
    with pytest.raises(InputError, match="cannot be reached"):
        model.shock_correlation(np.array([[1.0, -0.95], [-0.95, 1.0]]))


def test_matrices_of_rows_and_tuples_of_rows_agree():
    few, many = heston(**CALM, n_assets=2), heston(**CALM, n_assets=33)
    of_few, _ = simulate(few, 64, 20, 1.0)
    of_many, _ = simulate(many, 64, 20, 1.0)
    # Draws of the first assets do not depend on how many there are.
    np.testing.assert_allclose(of_many[:2], of_few, atol=2e-5)


def own_part(state, local, eps, move):
    return jnp.stack([jnp.stack(list(rows)) for rows in local if rows is not None])


def test_a_path_is_the_same_in_any_company():
    model = svjj(driver_correlation=DRIVERS)
    run = jax.jit(partial(drive, n_steps=20, years=1.0, watch=own_part))
    (_, whole), (_, alone) = run(model, jnp.arange(64, dtype=jnp.uint32)), run(model, jnp.asarray([17], jnp.uint32))
    np.testing.assert_allclose(alone[..., 0], whole[..., 17], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_assets", [1, pytest.param(30, marks=pytest.mark.slow), 33])
@pytest.mark.slow
def test_ten_thousand_steps_stay_finite(n_assets):
    model = heston_module.example(n_assets, jnp.float32)
    log_price, _ = simulate(model, 32, 10_000, 10_000 / 365.0)
    assert np.all(np.isfinite(log_price))


@pytest.mark.parametrize("scheme", ["qe", "euler"])
@pytest.mark.slow
def test_ten_thousand_steps_at_zero_variance_stay_finite(scheme):
    log_price, _ = simulate(wild(v0=0.0, vol_of_vol=2.0, scheme=scheme), 256, 10_000, 10_000 / 365.0)
    assert np.all(np.isfinite(log_price))


def test_short_steps_keep_the_law_in_single_precision():
    # One-minute steps: rounding must not move the variance, nor the mean of the price.
    log_price, after = simulate(heston(**CALM), 1 << 13, 5_000, 5_000 / 525_600, watch=lambda s, *_: s[0])
    assert_mc(np.exp(log_price[0]), 1.0)
    assert_mc(after[-1], 0.5 - 0.1 * np.exp(-4.0 * 5_000 / 525_600))
    assert_mc(log_price[0] ** 2, (0.5 * 5_000 - 0.1 * 5_000) / 525_600, n_sigma=5.0)


@pytest.mark.slow
def test_law_in_a_market_does_not_depend_on_the_sub_steps():
    """Prices of a composed market: mean one, and the variance of the closed form, however the day is cut."""
    model = svjj(n_assets=2)
    market = replace(
        presets.gbm(("A", "B"), [1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]]),
        volatility=jnp.ones((1, 2), jnp.float32),
        drift=jnp.zeros((1, 2), jnp.float32),
        volatility_model=model,
    )
    # The second derivative of the log of the characteristic function at 0 is minus the variance.
    law, h = partial(transforms.svjj, years=30.0 / 365.0, **OF_CALM, **SVJJ), 1e-2
    variance = -np.real(np.log(law(np.array(h))) + np.log(law(np.array(-h)))) / h**2
    for sub_steps in (1, 3):
        plan = Plan(30 * sub_steps, step_hours=24.0 / sub_steps)
        log_price = np.asarray(market_paths(market, 1 << 16, plan).log_price[-1], np.float64)
        for row in log_price:
            assert_mc(np.exp(row), 1.0)
            assert_mc((row - row.mean()) ** 2, variance)


def test_sub_steps_raise_the_factor_that_the_market_divides():
    model = svjj()
    whole = model.prepare(sub_steps=1, step_hours=6.0)
    part = model.prepare(sub_steps=4, step_hours=6.0)
    np.testing.assert_allclose(part.residual, 2.0 * whole.residual, rtol=1e-6)
    np.testing.assert_allclose(part.within, 4.0 * whole.within, rtol=1e-6)
    np.testing.assert_array_equal(part.scheme.slope, whole.scheme.slope)


def test_long_run_variance():
    model = svjj()
    expected = 0.5 + 1.5 * 0.15 / 4.0
    np.testing.assert_allclose(model.stationary_variance(), [expected], rtol=1e-6)
    _, after = simulate(model, 1 << 16, 256, 4.0, watch=lambda state, *_: state[0])
    # Four times the relaxation time of 1/4 year leaves e^-16 of the start.
    assert_mc(after[-1], expected)


# ----------------------------------------------------------------------------- Heston: gradients


@pytest.mark.slow
def test_euler_gradient_is_that_of_the_simulation():
    jumps = dict(jump_intensity=1.5, jump_mean=-0.1, jump_std=0.1, variance_jump_mean=0.3, jump_leverage=0.5)
    model = heston(**PAIR, cross_leverage=CROSS, **jumps, scheme="euler", dtype=F64)
    names = ("v0", "kappa", "theta", "vol_of_vol", "rho", "cross_loading")
    of_jumps = model.jumps._asdict()
    intensity = of_jumps.pop("intensity")

    def value(leaves):
        jumps = model.jumps._replace(**{"intensity": intensity, **leaves["jumps"]})
        return smooth_value(replace(model, **{name: leaves[name] for name in names}, jumps=jumps))

    leaves = {name: getattr(model, name) for name in names}
    # Narrow: the truncated variance has a kink at zero, which the quotient of a path that passes it smears.
    assert_gradient(value, {**leaves, "jumps": of_jumps}, width=1e-6)
    none = jax.jit(jax.grad(lambda x: value({**leaves, "jumps": {**of_jumps, "intensity": x}})))(intensity)
    np.testing.assert_array_equal(none, 0.0)


def test_euler_gradient_estimates_that_of_the_price():
    model = heston(**CALM, scheme="euler", dtype=F64)
    names = ("v0", "kappa", "theta", "vol_of_vol", "rho")

    def of_batch(leaves, first):
        path = first + jnp.arange(512, dtype=jnp.uint32)
        log_price, _ = drive(replace(model, **leaves), path, 64, 0.5)
        return jnp.mean(jnp.maximum(jnp.exp(log_price) - 1.0, 0.0))

    leaves = {name: getattr(model, name) for name in names}
    gradient = jax.jit(jax.grad(of_batch))
    batches = [gradient(leaves, jnp.uint32(512 * k)) for k in range(128)]

    def price(**numbers):
        return transforms.lewis_call(partial(transforms.heston, years=0.5, **{**OF_CALM, **numbers}), 1.0, forward=1.0)

    for name in names:
        exact = (price(**{name: CALM[name] + 1e-4}) - price(**{name: CALM[name] - 1e-4})) / 2e-4
        got = np.array([float(batch[name][0]) for batch in batches])
        error = got.std() / np.sqrt(got.size)
        # The bias of the scheme at 128 steps a year is a percent or two of each derivative.
        assert abs(got.mean() - exact) < 4.0 * error + 0.03 * abs(exact), (name, got.mean(), exact, error)


@pytest.mark.slow
def test_quadratic_exponential_has_a_finite_gradient_that_misses_the_switch():
    """Each path is differentiable except where psi passes the switch; a difference quotient sees what happens there."""
    model = wild(dtype=F64)
    assert "not continuous" in heston_module.Heston.__doc__
    names = ("v0", "kappa", "theta", "vol_of_vol", "rho")
    leaves = {name: getattr(model, name) for name in names}

    def value(leaves):
        return smooth_value(replace(model, **leaves), n_steps=8, years=1.0)

    gradient = jax.jit(jax.grad(value))(leaves)
    assert all(np.all(np.isfinite(slope)) for slope in gradient.values())
    at_zero = jax.jit(jax.grad(value))({**leaves, "v0": jnp.zeros(1, F64)})
    assert all(np.all(np.isfinite(slope)) for slope in at_zero.values())
    sigma, width = leaves["vol_of_vol"], 1e-2
    ends = [jax.jit(value)({**leaves, "vol_of_vol": sigma + sign * width}) for sign in (1.0, -1.0)]
    quotient = float(ends[0] - ends[1]) / (2.0 * width)
    assert abs(quotient - float(gradient["vol_of_vol"][0])) > 1e-4


# ----------------------------------------------------------------------------- Heston: refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(rho=1.0), "rho"),
        (dict(rho=[0.1, -1.2]), r"rho\[1\] is -1.2"),
        (dict(rho=0.99999999), "rho"),
        (dict(kappa=0.0), "kappa"),
        (dict(theta=-0.1), "theta"),
        (dict(vol_of_vol=-1.0), "vol_of_vol"),
        (dict(v0=-0.01), "v0"),
        (dict(kappa=np.nan), "kappa"),
        (dict(kappa=[1.0, 2.0], theta=[1.0, 2.0, 3.0]), "2 values for 3 assets"),
        (dict(scheme="exact"), "scheme"),
        (dict(jump_intensity=-1.0), "jump_intensity"),
        (dict(jump_intensity=1.0, jump_std=-0.1), "jump_std"),
        (dict(jump_intensity=1.0, variance_jump_mean=-0.1), "variance_jump_mean"),
        (dict(jump_intensity=1.0, variance_jump_mean=2.0, jump_leverage=0.5), "mean of the price"),
        (dict(driver_correlation=np.eye(3), n_assets=2), "driver_correlation"),
        (dict(driver_correlation=[[1.0, 1.1], [1.1, 1.0]]), "positive definite"),
        (dict(driver_correlation=[[1.0, 0.3], [0.2, 1.0]]), "symmetric"),
        (dict(rho=[-0.4, -0.6], cross_leverage=[[-0.4, 0.0], [0.0, -0.5]]), "must equal rho"),
        (dict(rho=[-0.4, -0.6], cross_leverage=[[-0.4, 0.95], [0.0, -0.6]]), "left to its shock"),
    ],
)
def test_heston_refuses(changed, message):
    with pytest.raises(InputError, match=message):
        heston(**{**CALM, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(scheme="euler", kappa=20.0), "kappa"),
        (dict(jump_intensity=30.0), "jump_intensity"),
        (dict(jump_intensity=3.0, variance_jump_mean=0.1), "jump_intensity"),
        (dict(rho=0.95, vol_of_vol=8.0, theta=9.0), "rho"),
    ],
)
def test_steps_that_are_too_long_are_refused(changed, message):
    model = heston(**{**CALM, **changed})
    model.prepare(sub_steps=1, step_hours=24.0)
    with pytest.raises(InputError, match=message):
        model.prepare(sub_steps=1, step_hours=8760.0 / 12.0 if "rho" not in changed else 8760.0 / 4.0)


def test_another_number_of_assets_is_refused():
    model = heston(**CALM)
    prepared = model.prepare(sub_steps=1, step_hours=24.0)
    with pytest.raises(InputError, match="2"):
        model.init(prepared, jnp.ones(4, jnp.float32), 2, 10, None)


def test_feller_warning_names_the_ratio():
    with pytest.warns(FellerWarning, match="for asset 1, below 1"):
        heston(kappa=[4.0, 1.0], theta=0.04, vol_of_vol=0.5)
