"""Rough Bergomi against exact covariances and means.

Monte Carlo means lie within 4 standard errors (false alarm 6e-5 each) plus, where a scheme is biased, a stated budget.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, assert_mc
from reference.volatility_paths import assert_gradient, simulate, smooth_value

from qpo_sim.errors import InputError
from qpo_sim.market.volatility.rough_bergomi import driver_covariance, example, kernel_weights, rough_bergomi

ROUGH = dict(xi=0.235**2, eta=1.9, hurst=0.07, rho=-0.9)


def test_driver_covariances_are_the_published_ones(cases):
    case = cases("models")["A34"]
    p, expected = case["inputs"], case["expected"]
    hurst = p["H"]
    assert abs(driver_covariance(hurst, 0.4, 1.0) - expected["Cov(W~_0.4,W~_1)"]) < 1e-8
    assert abs(driver_covariance(hurst, 0.5, 0.1) - expected["Cov(W~_0.1,W~_0.5)"]) < 1e-8
    times = np.array([0.01, 0.1, 1.0])
    moments = np.exp(p["eta"] ** 2 * driver_covariance(hurst, times, times))
    np.testing.assert_allclose(moments, [expected[f"E[v_t^2]/xi^2 t={t}"] for t in times], rtol=1e-12)


def discrete_covariance(hurst, n_steps, i, j):
    """Covariance of the hybrid scheme's driver at steps i and j of n_steps over one year."""
    h = np.array([hurst])
    weights = {t: np.asarray(kernel_weights(jnp.asarray(h), jnp.asarray(t), n_steps))[0] for t in (i, j)}
    near = np.zeros((2, n_steps))
    near[0, i - 1] = near[1, j - 1] = 1.0 / (hurst + 0.5)
    total = (weights[i] + near[0]) @ (weights[j] + near[1])
    own = (0.5 - hurst) ** 2 / (hurst + 0.5) ** 2 / (2.0 * hurst) if i == j else 0.0
    return 2.0 * hurst * n_steps ** (-2.0 * hurst) * (total + own)


def test_the_scheme_has_the_covariances_of_the_driver():
    for hurst in (0.02, 0.07, 0.2, 0.45):
        for i, j in ((1, 1), (10, 50), (40, 100), (100, 100)):
            exact = driver_covariance(hurst, i / 100.0, j / 100.0)
            assert abs(discrete_covariance(hurst, 100, i, j) / exact - 1.0) < (1e-3 if i == j else 5e-3)


@pytest.mark.slow
def test_log_variances_have_the_covariances_of_the_driver(cases):
    case = cases("models")["A34"]
    p, expected = case["inputs"], case["expected"]
    n_paths, n_steps = 1 << 16, 100
    model = rough_bergomi(xi=p["xi"], eta=p["eta"], hurst=p["H"], rho=p["rho"])

    def watch(state, local, eps, move):
        # The variance is read off the factor, the price's driver off the return.
        variance = local.factor[0] ** 2 * (n_steps / (1.0 - p["rho"] ** 2))
        root = jnp.sqrt(variance / n_steps)
        return jnp.log(variance), (move[0] + 0.5 * root * root) / root

    _, (log_variance, price_driver) = simulate(model, n_paths, n_steps + 1, 1.01, watch=watch)
    driver = (log_variance - np.log(p["xi"])) / p["eta"]
    driver = (
        driver
        + 0.5
        * p["eta"]
        * np.array([0.0] + [discrete_covariance(p["H"], n_steps, i, i) for i in range(1, n_steps + 1)])[:, None]
    )
    price = np.cumsum(price_driver, axis=0) / np.sqrt(n_steps)
    pairs = [
        (driver[40], driver[100], expected["Cov(W~_0.4,W~_1)"], discrete_covariance(p["H"], n_steps, 40, 100)),
        (driver[10], driver[50], expected["Cov(W~_0.1,W~_0.5)"], discrete_covariance(p["H"], n_steps, 10, 50)),
        (driver[100], price[99], expected["Cov(W~_1,Z_1)"], expected["Cov(W~_1,Z_1)"]),
        (driver[100], driver[100], 1.0, discrete_covariance(p["H"], n_steps, 100, 100)),
        (driver[1], driver[1], 0.01**0.14, 0.01**0.14),
    ]
    for x, y, exact, of_scheme in pairs:
        product = (x - x.mean()) * (y - y.mean())
        error = product.std() / np.sqrt(n_paths)
        assert abs(product.mean() - of_scheme) < 4.0 * error
        assert abs(product.mean() - exact) < 4.0 * error + 1e-3
    # Compensated by the variance it has: no bias at all, to the tolerance of single precision.
    assert abs(driver.mean(axis=1)).max() < 4.5 / np.sqrt(n_paths)


def test_forward_variance_and_prices_are_martingales():
    curve = 0.1 + 0.05 * np.arange(20)[:, None] * np.array([1.0, 0.5])
    correlation = [[1.0, 0.7], [0.7, 1.0]]
    model = rough_bergomi(xi=curve, eta=[1.0, 0.7], hurst=[0.1, 0.3], rho=[-0.7, 0.3], driver_correlation=correlation)

    def watch(state, local, eps, move):
        return tuple(f * f for f in local.factor)

    log_price, squares = simulate(model, 1 << 17, 24, 0.5, watch=watch)
    for i, rho in enumerate((-0.7, 0.3)):
        assert_mc(np.exp(log_price[i]), 1.0)
        for t in (0, 1, 5, 19, 23):
            expected = curve[min(t, 19), i] * (1.0 - rho**2) * 0.5 / 24.0
            np.testing.assert_allclose(squares[i][0], squares[i][0][0], rtol=1e-5)
            if t:
                assert_mc(squares[i][t], expected)
            else:
                np.testing.assert_allclose(squares[i][0], expected, rtol=1e-5)


def test_drivers_of_assets_with_different_roughness():
    hurst, n_steps, n_paths = (0.1, 0.35), 30, 1 << 16
    correlation = np.array([[1.0, 0.6], [0.6, 1.0]])
    model = rough_bergomi(xi=1.0, eta=1.0, hurst=hurst, driver_correlation=correlation, dtype=F64)
    _, (first, second) = simulate(model, n_paths, n_steps + 1, 31.0 / 30.0, watch=lambda s, local, e, m: local.factor)
    # Cov of the two drivers at t, 0.6 times the integral of both kernels.
    for t in (1, 30):
        x, y = (2.0 * np.log(rows[t]) for rows in (first, second))
        expected = 0.6 * 2.0 * np.sqrt(hurst[0] * hurst[1]) / sum(hurst) * (t / n_steps) ** sum(hurst)
        product = (x - x.mean()) * (y - y.mean())
        assert abs(product.mean() - expected) < 4.0 * product.std() / np.sqrt(n_paths) + 1e-3 * expected


@pytest.mark.slow
def test_rough_gradient_is_that_of_the_simulation():
    correlation = [[1.0, 0.7], [0.7, 1.0]]
    model = rough_bergomi(xi=[0.5, 0.3], eta=1.2, hurst=[0.1, 0.3], rho=-0.4, driver_correlation=correlation, dtype=F64)
    leaves = {name: getattr(model, name) for name in ("xi", "eta", "hurst", "rho")}
    assert_gradient(lambda leaves: smooth_value(replace(model, **leaves), n_steps=12), leaves)


@pytest.mark.slow
def test_rough_matrices_of_rows_and_tuples_of_rows_agree():
    options = dict(xi=0.5, eta=1.2, hurst=0.1, rho=-0.4)
    of_few, _ = simulate(rough_bergomi(**options, n_assets=2), 64, 20, 1.0)
    of_many, _ = simulate(rough_bergomi(**options, n_assets=33), 64, 20, 1.0)
    np.testing.assert_allclose(of_many[:2], of_few, atol=2e-5)


@pytest.mark.parametrize(("n_assets", "n_steps"), [(1, 10_000), (3, 1_000)])
@pytest.mark.slow
def test_rough_paths_stay_finite(n_assets, n_steps):
    log_price, _ = simulate(example(n_assets, jnp.float32), 8, n_steps, n_steps / 365.0)
    assert np.all(np.isfinite(log_price))


def test_rough_uncompensated_log_price_has_mean_zero():
    log_price, _ = simulate(rough_bergomi(**{**ROUGH, "eta": 1.0}, martingale=False), 1 << 16, 20, 1.0)
    assert_mc(log_price[0], 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(hurst=0.0), "hurst"),
        (dict(hurst=0.5), "hurst"),
        (dict(hurst=[0.1, 0.7]), r"hurst\[1\] is 0.6999"),
        (dict(rho=-1.0), "rho"),
        (dict(eta=0.0), "eta"),
        (dict(xi=-0.1), "xi"),
        (dict(xi=[[0.1, np.nan]]), "xi"),
        (dict(xi=[[0.1, 0.2]], eta=[1.0, 1.0, 1.0]), "eta"),
        (dict(xi=np.ones((2, 2, 2))), "xi"),
        (dict(driver_correlation=[[1.0, 1.1], [1.1, 1.0]]), "positive definite"),
    ],
)
def test_rough_bergomi_refuses(changed, message):
    with pytest.raises(InputError, match=message):
        rough_bergomi(**{**ROUGH, **changed})
