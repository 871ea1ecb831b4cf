"""Comparisons of forecasts: against arch, hand-computed variances, size and power."""

import numpy as np
import pytest
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.validation import comparison as cp


def _noise(generator, n, rho=0.0):
    e = generator.normal(size=n)
    for t in range(1, n):
        e[t] += rho * e[t - 1]
    return e


def test_diebold_mariano_of_one_step_is_the_t_test():
    """With one step and no lags the corrected statistic is that of the paired t-test."""
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=60), generator.normal(size=60) + 0.2
    done, t_test = cp.diebold_mariano(first, second), stats.ttest_rel(first, second)
    assert done.statistic == pytest.approx(t_test.statistic)
    assert done.p_value == pytest.approx(t_test.pvalue)
    assert done.p_first_worse == pytest.approx(stats.ttest_rel(first, second, alternative="greater").pvalue)


def test_diebold_mariano_variance_by_hand():
    d = np.array([1.0, 1.4, 2.0, 0.5, -0.5, -1.0, -0.8, 1.1])
    c = d - d.mean()
    gamma = [c @ c / 8, c[1:] @ c[:-1] / 8, c[2:] @ c[:-2] / 8]
    bartlett = cp.diebold_mariano(d, np.zeros(8), horizon=3, kernel="bartlett", is_corrected=False)
    long_run = gamma[0] + 2 * (2 / 3 * gamma[1] + 1 / 3 * gamma[2])
    assert bartlett.statistic == pytest.approx(d.mean() / np.sqrt(long_run / 8))
    assert bartlett.p_value == pytest.approx(2 * stats.norm.sf(abs(bartlett.statistic)))
    flat = cp.diebold_mariano(d, np.zeros(8), horizon=2)
    factor = np.sqrt((8 + 1 - 4 + 2 / 8) / 8)
    assert flat.statistic == pytest.approx(factor * d.mean() / np.sqrt((gamma[0] + 2 * gamma[1]) / 8))


def test_diebold_mariano_against_statsmodels():
    """The Bartlett variance is the Newey-West variance of a regression on a constant."""
    api = pytest.importorskip("statsmodels.api")
    d = _noise(np.random.default_rng(2), 300, 0.4) + 0.1
    fit = api.OLS(d, np.ones(300)).fit(cov_type="HAC", cov_kwds={"maxlags": 5})
    done = cp.diebold_mariano(d, np.zeros(300), n_lags=5, kernel="bartlett", is_corrected=False)
    assert done.statistic == pytest.approx(fit.tvalues[0], rel=1e-9)


def test_swapping_the_forecasts_turns_the_sign():
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(2, 80))
    one, other = cp.diebold_mariano(first, second, horizon=2), cp.diebold_mariano(second, first, horizon=2)
    assert one.statistic == pytest.approx(-other.statistic) and one.p_value == pytest.approx(other.p_value)
    moved = cp.diebold_mariano(7 * first + 3, 7 * second + 3, horizon=2)
    assert moved.statistic == pytest.approx(one.statistic)
    assert cp.diebold_mariano(first, first).p_value == 1.0


def test_diebold_mariano_p_values_are_uniform(assert_uniform):
    assert_uniform(lambda g: cp.diebold_mariano(*g.normal(size=(2, 60))).p_value)


def test_diebold_mariano_size_with_overlap_and_power(rejections, assert_size):
    def p_of(generator, gain=0.0):
        e = generator.normal(size=302)
        return cp.diebold_mariano(e[2:] + e[1:-1] + e[:-2] + gain, np.zeros(300), horizon=3).p_value

    # Variances over few lags are a little small in finite samples.
    assert_size(rejections(p_of), high=0.07)
    assert rejections(lambda generator: p_of(generator, 0.8), n=100) > 0.9


def test_bootstrap_blocks():
    index = cp.stationary_bootstrap(np.random.default_rng(4), 50, 4000, mean_block=5.0)
    assert index.shape == (4000, 50) and index.min() == 0 and index.max() == 49
    follows = (index[:, 1:] == (index[:, :-1] + 1) % 50).mean()
    # A new block starts with probability 1/5 and then follows by chance once in 50; 5 standard errors.
    want = 0.8 + 0.2 / 50
    assert abs(follows - want) < 5.0 * np.sqrt(want * (1 - want) / (4000 * 49))
    frequency = np.bincount(index.ravel(), minlength=50) / index.size
    np.testing.assert_allclose(frequency, 1 / 50, atol=5.0 * np.sqrt(9 * 0.02 / index.size))
    assert (np.diff(cp.stationary_bootstrap(np.random.default_rng(4), 50, 9, mean_block=50.0)) == 1).mean() > 0.9


def test_bootstrap_variance_is_its_closed_form():
    """The variance that the superior-ability test studentises by is that of the resampled mean; 5 standard errors."""
    d = _noise(np.random.default_rng(5), 200, 0.5)
    n, keep, lags = 200, 1.0 - 1.0 / 8.0, np.arange(1, 200)
    weight = 2.0 * ((1 - lags / n) * keep**lags + lags / n * keep ** (n - lags))
    gamma = cp._autocovariances(d, n - 1)
    closed = (gamma[0] + weight @ gamma[1:]) / n
    means = cp._resampled_means(d[:, None], 8.0, 8000, 3)[:, 0]
    assert abs(means.var() / closed - 1.0) < 5.0 * np.sqrt(2.0 / 8000)
    assert gamma[17] == pytest.approx((d[17:] - d.mean()) @ (d[:-17] - d.mean()) / n)
    np.testing.assert_allclose(gamma[:10], cp._autocovariances(d, 9))


@pytest.fixture(scope="module")
def scores():
    generator = np.random.default_rng(6)
    common = generator.normal(size=(400, 1))
    return common + generator.normal(size=(400, 5)) + np.array([0.0, 0.02, 0.1, 0.15, 0.4])


@pytest.mark.parametrize(("method", "name"), [("max", "max"), ("range", "R")])
def test_confidence_set_against_arch(method, name, scores):
    """Two bootstraps of 4 000 draws each: p-values differ by no more than 5 standard errors, 0.056."""
    bootstrap = pytest.importorskip("arch.bootstrap")
    reference = bootstrap.MCS(scores, size=0.1, reps=4000, block_size=7, method=name, bootstrap="stationary", seed=1)
    reference.compute()
    want = reference.pvalues["Pvalue"].sort_index().to_numpy()
    done = cp.model_confidence_set(scores, method=method, mean_block=7.0, n_draws=4000, seed=2)
    np.testing.assert_allclose(done.p_value, want, atol=5.0 * np.sqrt(0.5 / 4000))
    assert sorted(np.flatnonzero(done.is_included)) == sorted(reference.included)


@pytest.mark.parametrize("method", ["max", "range"])
def test_confidence_set_keeps_the_best_and_drops_the_worst(method, scores):
    done = cp.model_confidence_set(scores, method=method, seed=2)
    assert done.is_included[0] and not done.is_included[4] and done.elimination[0] == 4
    assert done.p_value[done.elimination[-1]] == 1.0
    assert (np.diff(done.p_value[done.elimination]) >= 0.0).all()
    shuffled = cp.model_confidence_set(scores[:, ::-1], method=method, seed=2)
    np.testing.assert_allclose(shuffled.p_value[::-1], done.p_value)


@pytest.mark.parametrize("method", ["max", "range"])
def test_confidence_set_drops_a_best_model_as_seldom_as_stated(method, rejections, assert_size):
    """All three models are equal: the smallest p-value is that of the first step."""

    def p_of(generator):
        return cp.model_confidence_set(
            generator.normal(size=(150, 3)),
            method=method,
            mean_block=1.0,
            n_draws=199,
            seed=int(generator.integers(2**31)),
        ).p_value.min()

    assert_size(rejections(p_of, size=0.1), size=0.1, low=0.08)


def test_models_with_equal_scores_stay():
    same = np.repeat(np.random.default_rng(7).normal(size=(50, 1)), 3, axis=1)
    assert cp.model_confidence_set(same, seed=1).is_included.all()


def test_superior_ability_against_arch(scores):
    bootstrap = pytest.importorskip("arch.bootstrap")
    for benchmark in (0, 2, 4):
        rivals = np.delete(scores, benchmark, axis=1)
        reference = bootstrap.SPA(scores[:, benchmark], rivals, reps=4000, block_size=7, bootstrap="stationary", seed=1)
        reference.compute()
        done = cp.superior_predictive_ability(scores[:, benchmark], rivals, mean_block=7.0, n_draws=4000, seed=2)
        got = [done.p_lower, done.p_value, done.p_upper]
        want = reference.pvalues[["lower", "consistent", "upper"]].to_numpy()
        np.testing.assert_allclose(got, want, atol=5.0 * np.sqrt(0.5 / 4000))
        assert done.p_lower <= done.p_value <= done.p_upper


def test_superior_ability_size_and_power(rejections, assert_size):
    def p_of(generator, gain=0.0):
        scores = generator.normal(size=(150, 4))
        scores[:, 1] -= gain
        return cp.superior_predictive_ability(
            scores[:, 0], scores[:, 1:], mean_block=1.0, n_draws=199, seed=int(generator.integers(2**31))
        ).p_value

    assert_size(rejections(p_of), low=0.04, high=0.07)
    assert rejections(lambda generator: p_of(generator, 0.5), n=100) > 0.9


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: cp.diebold_mariano(np.zeros(5), np.zeros(6)), "lengths differ"),
        (lambda: cp.diebold_mariano(np.arange(5.0), np.zeros(5), horizon=5), "horizon is 5"),
        (lambda: cp.diebold_mariano(np.tile([1.0, -1.0], 9), np.zeros(18), horizon=2), "take kernel='bartlett'"),
        (lambda: cp.model_confidence_set(np.zeros((9, 2)), mean_block=10.0, seed=1), "mean_block is 10"),
        (lambda: cp.model_confidence_set(np.zeros((9, 2)), size=0.0, seed=1), "confidence level"),
        (lambda: cp.superior_predictive_ability(np.zeros(9), np.zeros((9, 2)), seed=1), "at least 16"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
