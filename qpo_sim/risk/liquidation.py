r"""Liquidation as a first passage: probability, hazard and timing per account, from survival weights.

Per path and account the simulator gives $F_t$, the conditional probability given the path's step ends of having been
liquidated by t. Its mean over paths is the liquidation probability, and its sample variance the error: never larger
than that of counting drawn liquidations (conditional Monte Carlo, Asmussen & Glynn 2007, V.4). With step monitoring F
is 0 or 1 and the same formulas count.
"""

import numpy as np
from jaxtyping import Float

from qpo_sim.risk.moments import mean, probability
from qpo_sim.types import Array, Estimate


def liquidation_probability(total: Array, total_square: Array, n: float) -> Estimate:
    """Probability of having been liquidated from the sums of F and F^2 over n paths.

    Where every F is 0 or 1 (and so might all be 0) the Agresti-Coull error is used, which then does not read 0.
    """
    estimate = mean(total, total_square, n)
    counted = probability(total, n)
    is_count = np.abs(total - total_square) <= 1e-12 * np.maximum(total, 1.0)
    return Estimate(estimate.value, np.where(is_count, counted.std_error, estimate.std_error))


def given_liquidation(total: Array, total_square: Array, count: Array) -> Estimate:
    r"""Mean of an amount over the paths on which its account is liquidated; NaN where there is none.

    Ratio of means $\sum c / \sum 1_{liq}$ by the delta method; c is zero where nothing is liquidated, so that the sums
    of c and its square are enough: $\mathrm{Var} \approx (\sum c^2 - R^2 N) / N^2$ with N liquidated paths.

    Args:
      total: sum of the amount over n paths.
      total_square: sum of its squares.
      count: number of paths with a liquidation, N.
    """
    total, total_square, count = (np.asarray(x, np.float64) for x in (total, total_square, count))
    seen = np.maximum(count, 1.0)
    ratio = total / seen
    error = np.sqrt(np.maximum(total_square - ratio**2 * count, 0.0)) / seen
    # One case has a value and no error.
    return Estimate(np.where(count > 0.0, ratio, np.nan), np.where(count > 1.0, error, np.nan))


def time_quantile(days: Float[Array, " dates"], cumulative: Float[Array, " dates"], share: float, n: float) -> Estimate:
    r"""Day by which a share of the liquidations within the horizon has happened.

    Root of $F(t) = p F(T)$, F interpolated linearly between the dates and zero at the start. Error by the delta method,
    $\mathrm{Var}\{F(t) - p F(T)\} / f(t)^2$, with the variance of counted liquidations
    $F(t)(1 - 2p) + p^2 F(T)$ over n: conditional probabilities scatter less, so that the error is on the safe side.

    Args:
      days: dates, increasing.
      cumulative: probability of having been liquidated by each of them.
      share: p in (0, 1).
      n: number of paths.
    """
    days, curve = np.append(0.0, days), np.append(0.0, cumulative)
    end = float(curve[-1])
    if end <= 0.0:
        return Estimate(np.nan, np.nan)
    target = share * end
    k = min(max(int(np.searchsorted(curve, target, side="left")), 1), days.size - 1)
    slope = (curve[k] - curve[k - 1]) / (days[k] - days[k - 1])
    if slope <= 0.0:
        return Estimate(float(days[k]), np.nan)
    value = float(days[k - 1] + (target - curve[k - 1]) / slope)
    variance = (target * (1.0 - 2.0 * share) + share**2 * end) / n
    return Estimate(value, float(np.sqrt(variance) / slope))


def hazard(cumulative: Float[Array, "dates ..."]) -> Float[Array, "dates ..."]:
    """Probability of being liquidated in each interval given survival until its start."""
    before = np.concatenate([np.zeros_like(cumulative[:1]), cumulative[:-1]])
    return (cumulative - before) / np.maximum(1.0 - before, 1e-300)
