"""Probability forecasts: identities of the scores, size and power of the tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.validation import reliability as rl


def _forecasts(generator, n=1000):
    return generator.beta(1.0, 4.0, size=n)


def _calibrated(generator, n=1000):
    p = _forecasts(generator, n)
    return p, generator.random(n) < p


def _extreme(generator, n=1000):
    """Forecasts twice as far out on the logit scale as the truth."""
    truth = generator.beta(2.0, 4.0, size=n)
    odds = truth / (1.0 - truth)
    return odds**2 / (1.0 + odds**2), generator.random(n) < truth


def test_brier_by_hand():
    done = rl.brier(np.array([0.2, 0.2, 0.8, 0.8]), np.array([0, 1, 1, 1], dtype=bool))
    assert done.score == pytest.approx((0.04 + 0.64 + 0.04 + 0.04) / 4)
    assert done.reliability == pytest.approx((0.3**2 + 0.2**2) / 2)
    assert done.resolution == pytest.approx(0.25**2)
    assert done.uncertainty == pytest.approx(0.75 * 0.25)
    assert done.within_bin == pytest.approx(0.0)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 200), n_bins=st.one_of(st.none(), st.integers(1, 20)))
@settings(max_examples=100, deadline=None)
def test_the_parts_sum_to_the_score(seed, n, n_bins):
    generator = np.random.default_rng(seed)
    p, event = np.round(generator.random(n), 2), generator.random(n) < 0.4
    done = rl.brier(p, event, n_bins=n_bins)
    assert done.reliability - done.resolution + done.uncertainty + done.within_bin == pytest.approx(done.score)
    assert min(done.reliability, done.resolution, done.uncertainty) >= 0.0
    if n_bins is None:
        assert abs(done.within_bin) < 1e-12
    # Naming the other outcome the event changes nothing.
    assert rl.brier(1.0 - p, ~event).score == pytest.approx(done.score)
    assert rl.log_loss(np.clip(1.0 - p, 0.01, 0.99), ~event) == pytest.approx(
        rl.log_loss(np.clip(p, 0.01, 0.99), event)
    )


def test_log_loss_at_the_ends():
    assert rl.log_loss(np.array([0.0, 1.0]), np.array([False, True])) == 0.0
    assert rl.log_loss(np.array([0.0, 1.0]), np.array([True, True])) == np.inf
    assert rl.log_loss(np.array([0.25]), np.array([True])) == pytest.approx(np.log(4.0))


@pytest.mark.parametrize("score", [lambda p, o: rl.brier(p, o).score, rl.log_loss])
def test_scores_are_proper(score):
    """Among constant forecasts the frequency itself scores lowest."""
    event = np.arange(1000) < 230
    grid = np.linspace(0.05, 0.6, 111)
    value = [score(np.full(1000, p), event) for p in grid]
    assert grid[np.argmin(value)] == pytest.approx(0.23)


def test_curve_bins():
    generator = np.random.default_rng(1)
    p, event = _calibrated(generator)
    curve = rl.reliability_curve(p, event, n_bins=8, seed=2)
    np.testing.assert_array_equal(curve.n_cases, 125)
    assert (np.diff(curve.forecast) > 0.0).all()
    assert curve.n_cases @ curve.frequency == pytest.approx(event.sum())
    assert ((curve.low <= curve.forecast) & (curve.forecast <= curve.high)).all()


def test_curve_keeps_equal_forecasts_together():
    p = np.repeat([0.01, 0.3], [90, 10])
    curve = rl.reliability_curve(p, np.zeros(100, dtype=bool), n_bins=5, seed=2)
    np.testing.assert_array_equal(curve.n_cases, [90, 10])
    binomial = stats.binom([90, 10], [0.01, 0.3])
    np.testing.assert_allclose(curve.low, binomial.ppf(0.05) / [90, 10])
    np.testing.assert_allclose(curve.high, binomial.ppf(0.95) / [90, 10])


def test_bars_hold_calibrated_frequencies_as_often_as_stated():
    """10 bins of 400 records. The bars of whole counts hold more than 90 %; 4 standard errors allow 1.9 % less."""
    inside = []
    for i in range(400):
        curve = rl.reliability_curve(*_calibrated(np.random.default_rng([3, i]), 500), n_draws=200, seed=i)
        inside.append((curve.low <= curve.frequency) & (curve.frequency <= curve.high))
    assert 0.9 - 4 * np.sqrt(0.09 / 4000) < np.mean(inside) < 0.97


def test_spiegelhalter_is_the_standardised_brier_score():
    p, event = _calibrated(np.random.default_rng(4))
    done = rl.spiegelhalter(p, event)
    excess = rl.brier(p, event).score - np.mean(p * (1 - p))
    error = np.sqrt(np.sum((1 - 2 * p) ** 2 * p * (1 - p))) / p.size
    assert done.statistic == pytest.approx(excess / error)
    assert np.isnan(rl.spiegelhalter(np.full(5, 0.5), np.ones(5, dtype=bool)).p_value)
    assert rl.spiegelhalter(np.array([0.0, 1.0]), np.array([True, True])).p_value == 0.0


def test_slope_against_statsmodels():
    api = pytest.importorskip("statsmodels.api")
    p, event = _extreme(np.random.default_rng(5), 400)
    x = np.log(p / (1 - p))
    fit = api.Logit(event.astype(float), api.add_constant(x)).fit(disp=0, tol=1e-12)
    done = rl.calibration_slope(p, event)
    np.testing.assert_allclose([done.intercept, done.slope], fit.params, rtol=1e-6)
    null = -rl.log_loss(p, event) * 400
    assert done.statistic == pytest.approx(2.0 * (fit.llf - null), rel=1e-6)


def test_slope_reads_overconfidence():
    """The truth has slope 1/2; standard error about 0.016 at 20 000 cases, 5 of them."""
    done = rl.calibration_slope(*_extreme(np.random.default_rng(6), 20_000))
    assert done.slope == pytest.approx(0.5, abs=0.08)
    assert done.intercept == pytest.approx(0.0, abs=0.1)
    assert done.p_value < 1e-6


def test_slope_does_not_exist_for_separated_events():
    p = np.array([0.1, 0.2, 0.7, 0.8])
    assert np.isnan(rl.calibration_slope(p, p > 0.5).slope)
    assert np.isnan(rl.calibration_slope(p, np.zeros(4, dtype=bool)).slope)
    assert np.isnan(rl.calibration_slope(np.full(4, 0.3), p > 0.5).slope)


@pytest.mark.parametrize("test", [rl.spiegelhalter, rl.calibration_slope])
def test_size_and_power(test, rejections, assert_size, assert_uniform):
    assert_size(rejections(lambda generator: test(*_calibrated(generator)).p_value))
    assert_uniform(lambda generator: test(*_calibrated(generator)).p_value)
    assert rejections(lambda generator: test(*_extreme(generator)).p_value, n=100) > 0.9


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: rl.brier(np.array([1.2]), np.array([True])), "probability at 0 is 1.2"),
        (lambda: rl.brier(np.array([0.2, 0.3]), np.array([True])), "lengths differ"),
        (lambda: rl.log_loss(np.array([0.2]), np.array([0.5])), "is_event at 0"),
        (lambda: rl.calibration_slope(np.array([0.0, 0.5]), np.array([True, False])), "strictly"),
        (lambda: rl.reliability_curve(np.array([0.5]), np.array([True]), n_bins=0, seed=1), "n_bins is 0"),
        (lambda: rl.reliability_curve(np.array([0.5]), np.array([True]), coverage=1.0, seed=1), "confidence level"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
