r"""Measures that need only sums over paths: mean, volatility, Sharpe, Sortino, probabilities.

Ratios are of the simple return over the horizon, scaled to a year by $\sqrt{365/\text{days}}$; the standard errors are
by the delta method with the third and fourth moments (Mertens 2002), so fat tails are in them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.compute.partial import power_sums
from qpo_sim.types import DAYS_PER_YEAR, Array, Estimate


class ReturnSums(NamedTuple):
    """Sums over n paths of the return r and of its downside d = min(r - target, 0), target 0."""

    n: float
    r1: Array
    r2: Array
    r3: Array
    r4: Array
    d2: Array
    d3: Array
    d4: Array
    losses: Array


def return_sums(value: Float[Array, "... paths"]) -> ReturnSums:
    """Sums over the last axis (float64 in, float64 out)."""
    return ReturnSums(float(value.shape[-1]), **power_sums(value))


def mean(total: Array, total_square: Array, n: float) -> Estimate:
    """Sample mean and its standard error from sums."""
    value = total / n
    variance = np.maximum(total_square / n - value**2, 0.0)
    return Estimate(value, np.sqrt(variance / max(n - 1.0, 1.0)))


def probability(count: Array, n: float) -> Estimate:
    """Frequency with the Agresti-Coull error, which does not read 0 when nothing was seen."""
    shrunk = (count + 2.0) / (n + 4.0)
    return Estimate(count / n, np.sqrt(shrunk * (1.0 - shrunk) / (n + 4.0)))


def volatility(sums: ReturnSums) -> Estimate:
    """Standard deviation of the return over the horizon (not annualised)."""
    m1 = sums.r1 / sums.n
    m2 = np.maximum(sums.r2 / sums.n - m1**2, 0.0)
    m4 = _central_fourth(sums)
    sd = np.sqrt(m2)
    return Estimate(sd, np.sqrt(np.maximum(m4 - m2**2, 0.0) / sums.n) / np.maximum(2.0 * sd, 1e-300))


def sharpe_ratio(sums: ReturnSums, *, horizon_days: float) -> Estimate:
    """Mean over standard deviation of the return over the horizon, per square root of a year; no risk-free rate."""
    m1 = sums.r1 / sums.n
    m2 = np.maximum(sums.r2 / sums.n - m1**2, 1e-300)
    m3 = sums.r3 / sums.n - 3.0 * m1 * sums.r2 / sums.n + 2.0 * m1**3
    m4 = _central_fourth(sums)
    ratio = m1 / np.sqrt(m2)
    skew, kurtosis = m3 / m2**1.5, m4 / m2**2
    variance = 1.0 - skew * ratio + (kurtosis - 1.0) / 4.0 * ratio**2
    scale = np.sqrt(DAYS_PER_YEAR / horizon_days)
    return Estimate(scale * ratio, scale * np.sqrt(np.maximum(variance, 0.0) / sums.n))


def sortino_ratio(sums: ReturnSums, *, horizon_days: float) -> Estimate:
    """Mean over downside deviation (root mean square of min(r, 0) over all paths), per square root of a year."""
    m1, down = sums.r1 / sums.n, np.maximum(sums.d2 / sums.n, 1e-300)
    var_r = sums.r2 / sums.n - m1**2
    var_d = sums.d4 / sums.n - down**2
    cov = sums.d3 / sums.n - m1 * down
    by_r, by_d = 1.0 / np.sqrt(down), -0.5 * m1 / down**1.5
    variance = by_r**2 * var_r + 2.0 * by_r * by_d * cov + by_d**2 * var_d
    scale = np.sqrt(DAYS_PER_YEAR / horizon_days)
    return Estimate(scale * m1 / np.sqrt(down), scale * np.sqrt(np.maximum(variance, 0.0) / sums.n))


def _central_fourth(sums: ReturnSums) -> Array:
    m1 = sums.r1 / sums.n
    return sums.r4 / sums.n - 4.0 * m1 * sums.r3 / sums.n + 6.0 * m1**2 * sums.r2 / sums.n - 3.0 * m1**4
