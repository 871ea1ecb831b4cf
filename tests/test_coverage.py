"""The 95 % intervals of VaR99, CVaR99 and the liquidation probability cover the truth."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "interval_coverage.py"


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("interval_coverage", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_lognormal_truth(cases, experiment):
    for level, row in cases("models")["C05"]["expected"].items():
        years = 30.0 / 365.0
        drift, spread = (0.1 - 0.5 * 0.8**2) * years, np.array([0.8 * np.sqrt(years)])
        var, cvar = experiment.lognormal_mixture_tail(1.0, drift, spread, np.ones(1), level=float(level))
        assert var == pytest.approx(row["VaR_simple"], rel=1e-9)
        assert cvar == pytest.approx(row["ES_simple"], rel=1e-9)


@pytest.mark.parametrize("exposure", [1.0, -0.5])
def test_student_t_truth_without_a_cut_is_the_t_law(experiment, exposure):
    # A t variable of 3 degrees of freedom has variance 3. The long loses in its lower tail, the short in its upper,
    # whose CVaR without a cut would be infinite. A cut at 1e-7 moves the tail probability of 1e-2 by at most 1e-5.
    scale, weight = experiment.student_t_deviations(3.0, 1e-7)
    var, cvar = experiment.lognormal_mixture_tail(exposure, 0.01, 0.05 * scale, weight, level=0.99)
    law = stats.t(3, loc=0.01, scale=0.05 / np.sqrt(3.0))
    quantile = law.ppf(0.01 if exposure > 0.0 else 0.99)
    assert var == pytest.approx(exposure * (1.0 - np.exp(quantile)), rel=1e-5)
    if exposure > 0.0:
        mean, _ = integrate.quad(lambda x: (1.0 - np.exp(x)) * law.pdf(x), -np.inf, quantile, epsabs=1e-12)
        assert cvar == pytest.approx(mean / 0.01, rel=1e-5)


def test_hitting_truth(experiment):
    # Without drift twice the normal tail; with drift a fine walk from another generator, its barrier shifted for the
    # discrete look (Broadie, Glasserman & Kou 1997). Five standard errors.
    assert experiment.hitting_probability(-0.3, 0.0, 0.8, 0.1) == pytest.approx(
        2.0 * stats.norm.cdf(-0.3 / (0.8 * np.sqrt(0.1))), rel=1e-12
    )
    n, steps = 20_000, 400
    rng = np.random.default_rng(5)
    path, low = np.zeros(n), np.zeros(n)
    for _ in range(steps):
        path += -2.0 * 0.1 / steps + 0.8 * np.sqrt(0.1 / steps) * rng.standard_normal(n)
        low = np.minimum(low, path)
    shifted = -0.3 + 0.5826 * 0.8 * np.sqrt(0.1 / steps)
    truth = experiment.hitting_probability(-0.3, -2.0, 0.8, 0.1)
    assert np.mean(low < shifted) == pytest.approx(truth, abs=5.0 * np.sqrt(truth * (1.0 - truth) / n))


def _check(rows, *, low=0.93, high=0.97, exempt=()):
    for row in rows:
        if (row.case, row.measure) not in exempt:
            assert low <= row.share <= high, row
            assert row.error_ratio == pytest.approx(1.0, abs=0.15), row


# A short whose losses hang on rare jumps: 2 of its 24 576 paths carry much of the variance of CVaR. Runs without such
# a path read CVaR too low with too small an error, so the normal interval covers 92.4 % (4000 runs). What is checked is
# that it gets no worse, and that it is this side that is missed.
JUMPS = ("student-t short", "CVaR99")


def _check_jumps(rows):
    row = next(row for row in rows if (row.case, row.measure) == JUMPS)
    assert 0.90 <= row.share <= 0.97, row
    assert row.missed_low > row.missed_high, row


@pytest.mark.slow
def test_intervals_cover_over_400_runs(experiment):
    # The share over 400 runs has a standard deviation of 1.1 %: even exact intervals leave 93..97 % on 6 % of all
    # seeds, so here the band is four standard deviations (false alarm 6e-5 a row); that of 4000 runs holds 93..97 %.
    rows = [row for case in experiment.cases() for row in experiment.coverage(case, n_runs=400, seed=0)]
    assert len(rows) == 8
    _check(rows, low=0.95 - 4.0 * 0.0109, high=0.95 + 4.0 * 0.0109, exempt=(JUMPS,))
    _check_jumps(rows)


@pytest.mark.slow
def test_intervals_cover_over_4000_runs(experiment):
    # Standard deviation 0.34 %: an exact interval fails once in 10^8. Biases are those of finite samples: below 0.1
    # standard deviations, where 4000 runs know them to 0.016.
    rows = [row for case in experiment.cases() for row in experiment.coverage(case, n_runs=4000, seed=1)]
    _check(rows, exempt=(JUMPS,))
    _check_jumps(rows)
    assert all(abs(row.bias) < 0.1 for row in rows), rows


def test_a_wrong_error_is_seen(experiment):
    # The same runs with errors of three quarters cover 86 %.
    case = next(case for case in experiment.cases() if case.name == "gbm perpetual")
    name, (estimator, truth) = next(iter(case.estimators.items()))

    def too_small(partial):
        estimate = estimator(partial)
        return estimate._replace(std_error=0.75 * estimate.std_error)

    (row,) = experiment.coverage(case._replace(estimators={name: (too_small, truth)}), n_runs=200, n_paths=8192, seed=1)
    assert row.share < 0.93 and row.error_ratio < 0.85
