r"""Value at risk and conditional value at risk (expected shortfall) with standard errors.

Losses are positive. VaR at level a is the smallest loss x with $P(L \le x) \ge a$ (the inverse distribution function,
no interpolation); CVaR is $\mathrm{VaR}_a + E[(L-\mathrm{VaR}_a)^+]/(1-a)$, which splits an atom at VaR by the weight
that falls beyond the level (Rockafellar & Uryasev 2002).

All functions take a `TailSample`: the worst part of a weighted sample whose total weight is known. A whole sample is
the special case where nothing is left out, and the worst paths of a stream are another, so both use the same code. The
functions work on numpy arrays (float64, for reports) and on JAX arrays (differentiable) alike.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import check_level
from qpo_sim.types import Array, Estimate


class TailSample(NamedTuple):
    """Losses in decreasing order with their weights, and the total weight (and squared weight) of the whole sample.

    `square` is the sum of the squared weights of the paths behind an entry: weight^2 for one path, the count for a
    histogram bin of unit weights.
    """

    loss: Float[Array, " tail"]
    weight: Float[Array, " tail"]
    square: Float[Array, " tail"]
    total: float
    total_square: float


def tail_sample(loss: Float[Array, " paths"], weight: Any = None, *, total: float | None = None) -> TailSample:
    """Sorts a sample.

    Args:
      loss: losses of the whole sample, or of its worst part when `total` is given.
      weight: weights, 1 each when omitted (importance or survival weights; they need not sum to one).
      total: weight of the whole sample when `loss` holds only its worst part; equal weights are assumed for the rest.
    """
    xp = loss.__array_namespace__()
    order = xp.argsort(-loss, stable=True)
    weight = xp.ones_like(loss) if weight is None else weight
    weight = weight[order]
    square = weight * weight
    in_sample, in_square = xp.sum(weight), xp.sum(square)
    if total is None:
        return TailSample(loss[order], weight, square, in_sample, in_square)
    return TailSample(loss[order], weight, square, total, in_square + (total - in_sample))


def _quantile(sample: TailSample, tail_weight: Array) -> Array:
    # Smallest loss x with weight(L > x) <= tail_weight: the largest index whose strictly worse weight is within it.
    xp = sample.loss.__array_namespace__()
    worse = xp.cumsum(sample.weight)
    # (1 - level) n may round to just below a whole number of paths; the slack is above that and far below one path.
    index = xp.searchsorted(worse, tail_weight * (1.0 + 1e-12), side="right")
    return sample.loss[xp.clip(index, 0, sample.loss.shape[0] - 1)]


def value_at_risk(sample: TailSample, *, level: float) -> Estimate:
    r"""VaR: the loss that is exceeded with probability at most 1 - level.

    The standard error is a quarter of the distance between the order statistics two binomial standard deviations to
    either side, which needs no density estimate.

    Args:
      sample: see `tail_sample`; it must reach beyond the level.
      level: confidence, e.g. 0.99.

    Pathwise gradient: through the selected order statistic; noisy, prefer CVaR.
    """
    check_level(level)
    tail = (1.0 - level) * sample.total
    spread = 2.0 * _spread(sample, level)
    value = _quantile(sample, tail)
    upper, lower = _quantile(sample, _positive(tail - spread)), _quantile(sample, tail + spread)
    return Estimate(value, (upper - lower) / 4.0)


def _positive(x: Array) -> Array:
    return x * (x > 0.0)


def _spread(sample: TailSample, level: float) -> Array:
    # Standard deviation of the weight found beyond a fixed threshold of exceedance probability 1 - level.
    return (level * (1.0 - level) * sample.total_square) ** 0.5


def conditional_value_at_risk(sample: TailSample, *, level: float) -> Estimate:
    r"""CVaR: mean loss in the worst 1 - level of the probability.

    Standard error $\sqrt{\mathrm{Var}((L-q)^+)}/((1-a)\sqrt n)$ with q the VaR (Hong, Hu & Liu 2014).

    Args:
      sample: see `tail_sample`; it must reach beyond the level.
      level: confidence, e.g. 0.99.

    Pathwise gradient: loss and weight (the weights must keep their sum).
    """
    check_level(level)
    xp = sample.loss.__array_namespace__()
    tail = (1.0 - level) * sample.total
    # The quantile and the share of each path in the tail are held fixed: CVaR is stationary in both.
    q, inside = _fixed(_quantile(sample, tail)), _fixed(_inside(sample, tail))
    excess = xp.where(sample.loss > q, sample.loss - q, 0.0)
    # Sums, as a product of long vectors is split over the cores, which at this length only costs.
    value = xp.sum(inside * sample.loss + (sample.weight - _fixed(sample.weight)) * _fixed(excess)) / tail
    mean = xp.sum(sample.weight * excess) / sample.total
    # Paths outside the tail have excess 0, so each of them adds mean^2 with its own weight squared.
    square = xp.sum(sample.square * ((excess - mean) ** 2 - mean**2)) + sample.total_square * mean**2
    error = xp.sqrt(xp.maximum(square, 0.0)) / sample.total
    return Estimate(value, error / (1.0 - level))


def _inside(sample: TailSample, tail: Array) -> Array:
    # Weight of each path that lies in the worst `tail` of the weight; the path at the edge counts in part.
    xp = sample.loss.__array_namespace__()
    before = xp.cumsum(sample.weight) - sample.weight
    return xp.clip(tail - before, 0.0, sample.weight)


def _fixed(x: Array) -> Array:
    if isinstance(x, np.ndarray | np.generic):
        return x
    from jax import lax

    return lax.stop_gradient(x)


def component_cvar(
    sample: TailSample, components: Float[Array, "components tail"], *, level: float
) -> tuple[Estimate, Array]:
    r"""Euler components of CVaR, $E[L_i \mid L \ge \mathrm{VaR}]$; they sum to CVaR when the losses sum to L.

    Standard error from the influence function $(L_i - m_i)\,1\{L \ge q\}/(1-a)$ with $m_i = E[L_i \mid L = q]$
    estimated from the paths around VaR (Tasche 1999; Hong & Liu 2009).

    Args:
      sample: losses in decreasing order.
      components: losses by component, columns in the order of `sample.loss`.
      level: confidence.

    Returns:
      Estimate per component, and the components' mean at VaR.
    """
    check_level(level)
    xp = sample.loss.__array_namespace__()
    tail = (1.0 - level) * sample.total
    before = xp.cumsum(sample.weight) - sample.weight
    inside = _inside(sample, tail)
    value = components @ inside / tail
    reach = xp.maximum(_spread(sample, level), 10.0 * sample.weight[0])
    near = sample.weight * ((before > tail - reach) & (before < tail + reach))
    at_quantile = components @ near / xp.sum(near)
    share = inside / xp.where(sample.weight > 0.0, sample.weight, 1.0)
    influence = (components - at_quantile[:, None]) * share
    mean = influence @ sample.weight / sample.total
    square = (influence - mean[:, None]) ** 2 @ sample.square
    rest = sample.total_square - xp.sum(sample.square)
    error = xp.sqrt(square + rest * mean**2) / sample.total
    return Estimate(value, error / (1.0 - level)), at_quantile
