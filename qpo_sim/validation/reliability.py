r"""Probability forecasts of an event (a liquidation, say): scores, their parts, and tests of calibration.

A forecast is calibrated when, of the cases given probability p, a share p has the event.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from qpo_sim.errors import check_level
from qpo_sim.types import Array
from qpo_sim.validation.inputs import flags, same_length, unit_interval, whole


class Brier(NamedTuple):
    """Brier score (lower is better) and its parts: reliability - resolution + uncertainty + within_bin = score."""

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float
    skill: float


class ReliabilityCurve(NamedTuple):
    """Mean forecast, frequency and cases per bin; between `low` and `high` a calibrated forecast's frequency lies."""

    forecast: Float[Array, " bins"]
    frequency: Float[Array, " bins"]
    n_cases: Int[Array, " bins"]
    low: Float[Array, " bins"]
    high: Float[Array, " bins"]


class Calibration(NamedTuple):
    """z-score (above 0 when outcomes are less predictable than said) and two-sided p-value."""

    statistic: float
    p_value: float


class Recalibration(NamedTuple):
    """Logistic recalibration: intercept 0 and slope 1 expected (slope below 1: forecasts too extreme), and the test."""

    intercept: float
    slope: float
    statistic: float
    p_value: float


def brier(probability: Float[Array, " cases"], is_event: Bool[Array, " cases"], *, n_bins: int | None = None) -> Brier:
    r"""Mean of $(p-o)^2$ and its decomposition by groups of like forecasts.

    With $\bar p_k, \bar o_k$ of group k: reliability $\sum n_k(\bar p_k-\bar o_k)^2/n$, resolution
    $\sum n_k(\bar o_k-\bar o)^2/n$, uncertainty $\bar o(1-\bar o)$. Groups of different forecasts leave a rest within
    them, the variance of p less twice its covariance with o, given so that the parts sum to the score.
    Resolution and reliability are both biased upwards when groups are small. Murphy (1973); Stephenson et al. (2008).

    Args:
      probability: forecast of each case.
      is_event: whether it happened.
      n_bins: groups of equal number by forecast; when omitted each different forecast is a group and the rest is 0.

    Raises:
      InputError: a probability outside [0, 1], lengths differ, flags other than 0 and 1, or n_bins below 1.
    """
    p, event = _cases(probability, is_event)
    group = np.unique(p, return_inverse=True)[1] if n_bins is None else _bins(p, n_bins)
    size, mean, rate = _group_means(group, p, event)
    base = event.mean()
    score = float(np.mean((p - event) ** 2))
    reliability = float(size @ (mean - rate) ** 2 / p.size)
    resolution = float(size @ (rate - base) ** 2 / p.size)
    uncertainty = float(base * (1.0 - base))
    inside = p - mean[group]
    within = float(np.mean(inside**2) - 2.0 * np.mean(inside * (event - rate[group])))
    skill = 1.0 - score / uncertainty if uncertainty > 0.0 else float("nan")
    return Brier(score, reliability, resolution, uncertainty, within, skill)


def log_loss(probability: Float[Array, " cases"], is_event: Bool[Array, " cases"]) -> float:
    r"""Mean of $-o\log p - (1-o)\log(1-p)$ in nats; infinite when something happened that was given probability 0.

    Good (1952).

    Raises:
      InputError: a probability outside [0, 1], lengths differ, or flags other than 0 and 1.
    """
    from scipy.special import xlog1py, xlogy

    p, event = _cases(probability, is_event)
    return float(-np.mean(xlogy(event, p) + xlog1py(1.0 - event, -p)))


def reliability_curve(
    probability: Float[Array, " cases"],
    is_event: Bool[Array, " cases"],
    *,
    n_bins: int = 10,
    coverage: float = 0.9,
    n_draws: int = 2000,
    seed: int,
) -> ReliabilityCurve:
    r"""Frequency of the event by bins of equal number of cases, with consistency bars.

    The bars are the central quantiles of a bin's frequency when events are drawn, independently, with the forecasts'
    own probabilities: a frequency outside speaks against calibration in that bin (each bin alone has false-alarm rate
    1 - coverage or less). Cases with equal forecasts share a bin, so bins may be fewer. Brocker & Smith (2007),
    with the forecasts held fixed.

    Args:
      probability: forecast of each case.
      is_event: whether it happened.
      n_bins: bins wanted.
      coverage: of each bar.
      n_draws: records drawn.
      seed: of NumPy's default generator.

    Raises:
      InputError: a probability outside [0, 1], lengths differ, flags other than 0 and 1, n_bins or n_draws below 1, or
        a coverage outside (0, 1).
    """
    check_level(coverage)
    whole("n_draws", n_draws, low=1)
    p, event = _cases(probability, is_event)
    group = _bins(p, n_bins)
    size, mean, rate = _group_means(group, p, event)
    generator = np.random.default_rng(seed)
    drawn = np.stack(
        [np.bincount(group, weights=generator.random(p.size) < p, minlength=size.size) for _ in range(n_draws)]
    )
    miss = (1.0 - coverage) / 2.0
    low = np.quantile(drawn, miss, axis=0, method="inverted_cdf") / size
    high = np.quantile(drawn, 1.0 - miss, axis=0, method="inverted_cdf") / size
    return ReliabilityCurve(mean, rate, size, low, high)


def spiegelhalter(probability: Float[Array, " cases"], is_event: Bool[Array, " cases"]) -> Calibration:
    r"""Null: events are independent with the forecast probabilities.

    $Z = \sum (o-p)(1-2p) / \sqrt{\sum (1-2p)^2 p(1-p)}$, the Brier score less its expectation in standard errors:
    standard normal. Blind where all forecasts are 1/2 (NaN). Spiegelhalter (1986).

    Raises:
      InputError: a probability outside [0, 1], lengths differ, or flags other than 0 and 1.
    """
    from scipy.special import ndtr

    p, event = _cases(probability, is_event)
    tilt = 1.0 - 2.0 * p
    variance = float(np.sum(tilt**2 * p * (1.0 - p)))
    surprise = float(np.sum((event - p) * tilt))
    if variance <= 0.0:
        # Certain forecasts: right everywhere says nothing, wrong once refutes them.
        if (event != p).any() and (tilt != 0.0).all():
            return Calibration(float("inf"), 0.0)
        return Calibration(float("nan"), float("nan"))
    z = surprise / variance**0.5
    return Calibration(z, float(2.0 * ndtr(-abs(z))))


def calibration_slope(probability: Float[Array, " cases"], is_event: Bool[Array, " cases"]) -> Recalibration:
    r"""Null: intercept 0 and slope 1 in $\mathrm{logit}\,P(o=1) = \alpha + \beta\,\mathrm{logit}\,p$.

    Likelihood ratio, chi-square(2). Cox (1958). NaN where the fit does not exist: events of one kind only, equal
    forecasts, or forecasts that separate the events.

    Raises:
      InputError: a probability outside (0, 1), lengths differ, or flags other than 0 and 1.
    """
    from scipy.special import chdtrc, expit, logit

    p, event = _cases(unit_interval("probability", probability, is_open=True), is_event)
    x = logit(p)
    nothing = float("nan")
    happened, not_happened = x[event == 1.0], x[event == 0.0]
    if happened.size == 0 or not_happened.size == 0 or np.ptp(x) == 0.0:
        return Recalibration(nothing, nothing, nothing, nothing)
    if happened.min() >= not_happened.max() or happened.max() <= not_happened.min():
        return Recalibration(nothing, nothing, nothing, nothing)
    design = np.stack([np.ones_like(x), x], axis=1)

    def log_likelihood(beta: Array) -> float:
        score = design @ beta
        return float(event @ score - np.logaddexp(0.0, score).sum())

    beta = np.array([0.0, 1.0])
    value = start = log_likelihood(beta)
    for _ in range(100):
        fitted = expit(design @ beta)
        weight = fitted * (1.0 - fitted)
        move = np.linalg.lstsq(design.T @ (weight[:, None] * design), design.T @ (event - fitted), rcond=None)[0]
        # Newton overshoots from far away; halving keeps the concave likelihood rising.
        while log_likelihood(beta + move) < value - 1e-12 * abs(value) and np.abs(move).max() > 1e-12:
            move = move / 2.0
        beta = beta + move
        value = log_likelihood(beta)
        if np.abs(move).max() < 1e-10:
            break
    statistic = max(2.0 * (value - start), 0.0)
    return Recalibration(float(beta[0]), float(beta[1]), statistic, float(chdtrc(2, statistic)))


def _cases(probability: Array, is_event: Array) -> tuple[np.ndarray, np.ndarray]:
    p, event = unit_interval("probability", probability), flags("is_event", is_event).astype(np.float64)
    same_length(probability=p, is_event=event)
    return p, event


def _bins(p: Array, n_bins: int) -> Int[Array, " cases"]:
    # By rank, ties to one bin: the mean rank of equal forecasts decides.
    whole("n_bins", n_bins, low=1)
    _, inverse, size = np.unique(p, return_inverse=True, return_counts=True)
    middle = np.cumsum(size) - size / 2.0
    bins = np.minimum((middle[inverse] * n_bins / p.size).astype(np.int64), n_bins - 1)
    return np.unique(bins, return_inverse=True)[1]


def _group_means(group: Array, p: Array, event: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = np.bincount(group)
    return size, np.bincount(group, weights=p) / size, np.bincount(group, weights=event) / size
