"""Characteristic functions against published prices, and against references that do not use them."""

from functools import partial

import numpy as np
import pytest
from scipy import integrate, stats

from qpo_sim.market import transforms


def _call(characteristic, strike, *, spot, rate, years):
    return transforms.lewis_call(
        partial(characteristic, years=years),
        strike,
        forward=spot * np.exp(rate * years),
        discount=np.exp(-rate * years),
    )


def test_published_merton_prices(cases):
    case = cases("models")["A13"]
    p = case["inputs"]
    model = partial(
        transforms.merton,
        volatility=p["sigma"],
        intensity=p["lam"],
        jump_mean=p["jump_log_mean"],
        jump_std=p["jump_log_sd"],
    )
    for spot, expected in case["expected"]["values"].items():
        call = _call(model, p["K"], spot=float(spot), rate=p["r"], years=p["T"])
        put = call - float(spot) + p["K"] * np.exp(-p["r"] * p["T"])
        np.testing.assert_allclose([call, put], [expected["call"], expected["put"]], rtol=0.0, atol=1e-9)
        assert abs(call - case["expected"]["published_call"][spot]) < case["tolerance"]["closed_form_abs"]


def test_published_kou_prices(cases):
    case = cases("models")["A16"]
    for name in ("set1", "set2"):
        p = case["inputs"][name]
        model = partial(
            transforms.kou,
            volatility=p["sigma"],
            intensity=p["lam"],
            up_probability=p["p_up"],
            up_rate=p["eta1"],
            down_rate=p["eta2"],
        )
        expected = case["expected"][name]
        rows = expected.items() if isinstance(expected, dict) else [(p["S0"], expected)]
        for spot, price in rows:
            assert abs(_call(model, p["K"], spot=float(spot), rate=p["r"], years=p["T"]) - price) < 1e-9


def test_published_heston_prices(cases):
    case = cases("models")["A18"]
    p = case["inputs"]
    model = partial(transforms.heston, **{name: p[name] for name in ("v0", "kappa", "theta", "vol_of_vol", "rho")})
    for years in p["T"]:
        price = _call(model, p["K"], spot=p["S0"], rate=p["r"], years=years)
        assert abs(price - case["expected"][f"T={years}"]) < 1e-9


def test_published_broadie_kaya_prices(cases):
    case = cases("models")["A20"]
    for name in ("heston1", "heston2", "bates"):
        p = case["inputs"][name]
        of_variance = {"v0": p["v0"], "kappa": p["kappa"], "theta": p["theta"], "vol_of_vol": p["eps"], "rho": p["rho"]}
        model = partial(transforms.heston, **of_variance)
        if name == "bates":
            std = p["jump_log_sd"]
            mean = np.log1p(p["mean_simple_jump"]) - 0.5 * std**2
            model = partial(transforms.bates, intensity=p["lam"], jump_mean=mean, jump_std=std, **of_variance)
        price = _call(model, p["K"], spot=p["S0"], rate=p["r"], years=p["T"])
        assert abs(price - case["expected"][name]) < 1e-9


def test_normal_inverse_gaussian_law_and_price(cases):
    case = cases("models")["A32"]
    p, expected = case["inputs"], case["expected"]
    law = partial(
        transforms.normal_inverse_gaussian, alpha=p["alpha"], beta=p["beta"], delta=p["delta_per_year"], years=p["T"]
    )
    levels, quantiles = np.array([[float(level), x] for level, x in expected["log_quantiles"].items()]).T
    np.testing.assert_allclose(transforms.distribution(law, quantiles - p["mu"] * p["T"]), levels, rtol=0.0, atol=1e-9)
    growth = np.exp(0.03 * p["T"])
    price = transforms.lewis_call(law, 100.0, forward=100.0 * growth, discount=1.0 / growth)
    assert abs(price - expected["call_atm_r3"]) < 1e-9


def test_variance_gamma_price_is_a_mixture_of_lognormal_prices():
    sigma, nu, theta, years = 0.3, 0.2, -0.1, 0.25
    drift = years * np.log(1.0 - theta * nu - 0.5 * sigma**2 * nu) / nu

    def mixture(strike):
        def given_clock(clock):
            deviation, mean = sigma * np.sqrt(clock), drift + theta * clock
            d = (np.log(100.0 / strike) + mean) / deviation
            forward = 100.0 * np.exp(mean + 0.5 * deviation**2)
            price = forward * stats.norm.cdf(d + deviation) - strike * stats.norm.cdf(d)
            return price * stats.gamma.pdf(clock, years / nu, scale=nu)

        return integrate.quad(given_clock, 0.0, 8.0, epsabs=1e-12, limit=500)[0]

    law = partial(transforms.variance_gamma, years=years, sigma=sigma, nu=nu, theta=theta)
    strikes = np.array([80.0, 100.0, 120.0])
    np.testing.assert_allclose(
        transforms.lewis_call(law, strikes, forward=100.0), [mixture(k) for k in strikes], rtol=0.0, atol=1e-8
    )


def test_distribution_of_merton_is_a_poisson_mixture():
    p = dict(volatility=0.4, intensity=2.0, jump_mean=-0.1, jump_std=0.2)
    years, x, n = 0.5, np.array([-0.6, -0.1, 0.0, 0.3]), np.arange(40)[:, None]
    drift = -0.5 * p["volatility"] ** 2 - p["intensity"] * np.expm1(p["jump_mean"] + 0.5 * p["jump_std"] ** 2)
    deviation = np.sqrt(p["volatility"] ** 2 * years + n * p["jump_std"] ** 2)
    given_count = stats.norm.cdf((x - drift * years - n * p["jump_mean"]) / deviation)
    expected = (stats.poisson.pmf(n, p["intensity"] * years) * given_count).sum(axis=0)
    np.testing.assert_allclose(
        transforms.distribution(partial(transforms.merton, years=years, **p), x), expected, rtol=0.0, atol=1e-9
    )


SVJJ = dict(
    v0=0.04,
    kappa=2.0,
    theta=0.05,
    vol_of_vol=0.4,
    rho=-0.6,
    intensity=1.2,
    jump_mean=-0.05,
    jump_std=0.1,
    variance_jump_mean=0.1,
    jump_leverage=-0.4,
)


@pytest.mark.parametrize("u", [0.5 - 0.5j, 3.0, 40.0 - 0.5j, 200.0 - 0.5j])
def test_simultaneous_jumps_solve_their_differential_equations(u):
    p = SVJJ
    growth = np.exp(p["jump_mean"] + 0.5 * p["jump_std"] ** 2) / (1.0 - p["jump_leverage"] * p["variance_jump_mean"])

    def slope(s, y):
        d = y[0]
        jump = np.exp(1j * u * p["jump_mean"] - 0.5 * p["jump_std"] ** 2 * u * u)
        jump = jump / (1.0 - p["variance_jump_mean"] * (1j * u * p["jump_leverage"] + d))
        riccati = -0.5 * (u * u + 1j * u) - (p["kappa"] - 1j * p["rho"] * p["vol_of_vol"] * u) * d
        riccati = riccati + 0.5 * p["vol_of_vol"] ** 2 * d * d
        return [riccati, p["kappa"] * p["theta"] * d + p["intensity"] * (jump - 1.0 - 1j * u * (growth - 1.0))]

    for years in (0.1, 1.0, 5.0):
        solved = integrate.solve_ivp(slope, (0.0, years), [0j, 0j], method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
        expected = np.exp(solved[1] + solved[0] * p["v0"])
        np.testing.assert_allclose(transforms.svjj(np.asarray(u), years=years, **p), expected, rtol=1e-7, atol=1e-12)


def test_simultaneous_jumps_without_variance_jumps_are_bates():
    p = {name: value for name, value in SVJJ.items() if name not in ("variance_jump_mean", "jump_leverage")}
    u = np.array([1.0, 10.0 - 0.5j])
    np.testing.assert_allclose(
        transforms.svjj(u, years=1.0, variance_jump_mean=1e-13, jump_leverage=0.0, **p),
        transforms.bates(u, years=1.0, **p),
        rtol=1e-10,
    )


@pytest.mark.parametrize(
    "law",
    [
        partial(transforms.black_scholes, volatility=0.7),
        partial(transforms.heston, v0=0.04, kappa=2.0, theta=0.05, vol_of_vol=0.4, rho=0.6),
        partial(transforms.svjj, **SVJJ),
        partial(transforms.merton, volatility=0.4, intensity=2.0, jump_mean=-0.1, jump_std=0.2),
        partial(transforms.kou, volatility=0.4, intensity=2.0, up_probability=0.4, up_rate=8.0, down_rate=5.0),
        partial(transforms.variance_gamma, sigma=0.3, nu=0.2, theta=-0.1),
        partial(transforms.normal_inverse_gaussian, alpha=8.0, beta=-1.5, delta=0.9),
    ],
    ids=lambda law: law.func.__name__,
)
def test_every_law_has_mass_and_mean_one(law):
    np.testing.assert_allclose(law(np.array([0.0, -1j]), years=0.7), 1.0, rtol=1e-12)
