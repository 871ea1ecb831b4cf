"""Scores: consistent for what they score, equal to closed forms, and indifferent to what they should not see."""

import numpy as np
import pytest
from scipy import integrate, stats

from qpo_sim.errors import InputError
from qpo_sim.validation import scores as sc

LEVEL = 0.95


def _expected(score, law):
    """Expected score of a constant forecast under `law`, by quantiles at cell midpoints (no sampling error)."""
    n = 200_001
    return float(np.mean(score(law.ppf((np.arange(n) + 0.5) / n))))


@pytest.mark.parametrize("law", [stats.norm(0.1, 1.0), stats.t(5), stats.expon()])
def test_quantile_score_is_lowest_at_value_at_risk(law):
    truth = law.ppf(LEVEL)
    grid = truth + np.linspace(-0.5, 0.5, 41)
    value = [_expected(lambda x, v=v: sc.quantile_score(x, np.full(x.size, v), level=LEVEL), law) for v in grid]
    assert grid[np.argmin(value)] == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("law", [stats.norm(0.1, 1.0), stats.t(5), stats.expon()])
def test_joint_score_is_lowest_at_value_at_risk_and_expected_shortfall(law):
    var = law.ppf(LEVEL)
    n = 200_001
    loss = law.ppf((np.arange(n) + 0.5) / n)
    es = var + np.maximum(loss - var, 0.0).mean() / (1.0 - LEVEL)

    def value(v, e):
        return float(np.mean(sc.joint_score(loss, np.full(n, v), np.full(n, e), level=LEVEL)))

    best = value(var, es)
    steps = [(dv, de) for dv in (-0.2, -0.02, 0.0, 0.02, 0.2) for de in (-0.2, -0.02, 0.0, 0.02, 0.2) if dv or de]
    for dv, de in steps:
        if es + de >= var + dv:
            assert value(var + dv, es + de) > best
    # Stationary at the truth, with a positive curvature in both.
    assert value(var, es + 1e-4) + value(var, es - 1e-4) - 2 * best > 0.0
    assert abs(value(var, es + 1e-4) - value(var, es - 1e-4)) < 1e-8


def test_joint_score_by_hand_and_in_another_unit():
    loss, var, es = np.array([1.0, 5.0]), np.array([2.0, 2.0]), np.array([4.0, 4.0])
    want = [0.5 + np.log(4.0) - 1.0, 3.0 / (0.1 * 4.0) + 0.5 + np.log(4.0) - 1.0]
    np.testing.assert_allclose(sc.joint_score(loss, var, es, level=0.9), want)
    other = sc.joint_score(loss, var, 1.1 * es, level=0.9) - sc.joint_score(loss, var, es, level=0.9)
    scaled = sc.joint_score(9 * loss, 9 * var, 9.9 * es, level=0.9) - sc.joint_score(
        9 * loss, 9 * var, 9 * es, level=0.9
    )
    np.testing.assert_allclose(scaled, other)


def test_crps_of_draws_by_definition():
    generator = np.random.default_rng(1)
    sample, y = generator.normal(size=(3, 20)), generator.normal(size=3)
    near = np.abs(sample - y[:, None]).mean(axis=1)
    pairs = np.abs(sample[:, :, None] - sample[:, None, :]).sum(axis=(1, 2))
    np.testing.assert_allclose(sc.crps(y, sample, is_fair=False), near - pairs / 800.0)
    np.testing.assert_allclose(sc.crps(y, sample), near - pairs / (2 * 20 * 19))


def test_crps_of_draws_integrates_their_distribution_function():
    sample, y = np.array([[0.3, -1.0, 2.0, 0.7]]), np.array([0.1])
    grid = np.linspace(-3, 4, 700_001)
    square = ((sample[0][:, None] <= grid).mean(axis=0) - (y[0] <= grid)) ** 2
    assert sc.crps(y, sample, is_fair=False)[0] == pytest.approx(integrate.trapezoid(square, grid), abs=1e-4)


def test_fair_crps_of_a_normal_forecast():
    """Closed form of Gneiting & Raftery (2007); 5 standard errors of 4 000 days (6e-7)."""
    generator = np.random.default_rng(2)
    y = 0.7
    drawn = sc.crps(np.full(4000, y), generator.normal(size=(4000, 8)))
    exact = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / np.sqrt(np.pi)
    assert abs(drawn.mean() - exact) < 5 * drawn.std() / 4000**0.5


def test_log_score_is_the_density_of_the_kernels():
    sample = np.random.default_rng(3).normal(size=(1, 50))
    lower, upper = np.quantile(sample[0], [0.25, 0.75])
    width = 0.9 * min(sample[0].std(ddof=1), (upper - lower) / 1.349) * 50**-0.2
    want = -np.log(stats.norm.pdf(0.4, sample[0], width).mean())
    assert sc.log_score(np.array([0.4]), sample)[0] == pytest.approx(want)
    assert np.isfinite(sc.log_score(np.array([60.0]), sample))[0]


def test_energy_score_of_one_asset_is_crps():
    generator = np.random.default_rng(4)
    sample, y = generator.normal(size=(5, 30, 1)), generator.normal(size=(5, 1))
    np.testing.assert_allclose(sc.energy_score(y, sample), sc.crps(y[:, 0], sample[:, :, 0]))


def test_energy_score_does_not_see_rotations():
    generator = np.random.default_rng(5)
    sample, y = generator.normal(size=(5, 30, 3)), generator.normal(size=(5, 3))
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    np.testing.assert_allclose(sc.energy_score(y @ turn, sample @ turn), sc.energy_score(y, sample))


def test_variogram_score_by_hand_and_its_blindness():
    sample, y = np.array([[[0.0, 1.0], [0.0, 4.0]]]), np.array([[1.0, 10.0]])
    assert sc.variogram_score(y, sample)[0] == pytest.approx((3.0 - 1.5) ** 2)
    np.testing.assert_allclose(sc.variogram_score(y + 7.0, sample - 2.0), sc.variogram_score(y, sample))


@pytest.mark.parametrize("name", ["energy", "variogram"])
def test_multivariate_scores_prefer_the_right_correlation(name):
    """Paired differences over 3 000 days are 5 standard errors below zero."""
    generator = np.random.default_rng(6)
    score = {"energy": sc.energy_score, "variogram": sc.variogram_score}[name]
    root = np.linalg.cholesky(np.array([[1.0, 0.9], [0.9, 1.0]]))
    y = generator.normal(size=(3000, 2)) @ root.T
    draws = generator.normal(size=(3000, 40, 2))
    difference = score(y, draws @ root.T) - score(y, draws)
    assert difference.mean() < -5.0 * difference.std() / 3000**0.5


def test_crps_prefers_the_right_scale():
    generator = np.random.default_rng(7)
    y, draws = generator.normal(size=3000), generator.normal(size=(3000, 60))
    for factor in (0.6, 1.7):
        difference = sc.crps(y, draws) - sc.crps(y, factor * draws)
        assert difference.mean() < -5.0 * difference.std() / 3000**0.5


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sc.joint_score(np.zeros(2), np.ones(2), np.full(2, 0.5), level=0.9), "at least VaR"),
        (lambda: sc.joint_score(np.zeros(2), -np.ones(2), np.zeros(2), level=0.9), "above 0"),
        (lambda: sc.crps(np.zeros(2), np.zeros((2, 1))), "at least 2"),
        (lambda: sc.crps(np.zeros(2), np.zeros(2)), "must have 2 axes"),
        (lambda: sc.log_score(np.zeros(1), np.zeros((1, 5))), "equal draws"),
        (lambda: sc.variogram_score(np.zeros((2, 1)), np.zeros((2, 5, 1))), "at least 2"),
        (lambda: sc.energy_score(np.zeros((2, 3)), np.zeros((2, 5, 2))), "must be the same"),
        (lambda: sc.quantile_score(np.zeros(2), np.zeros(3), level=0.9), "lengths differ"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
