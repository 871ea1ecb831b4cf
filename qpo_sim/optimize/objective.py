r"""Objectives of a weighted sample of outcomes, all to be minimised, all differentiable in outcome and weight.

Signature: `objective(loss, weight, *, level, risk_aversion)` with losses as fractions of the capital and weights that
sum to the number of paths.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim.numerics import safe_sqrt, weighted_quantile
from qpo_sim.types import Array


def _mean(value: Array, weight: Array) -> Array:
    return jnp.sum(weight * value) / jnp.sum(weight)


def cvar(loss: Float[Array, " n"], weight: Float[Array, " n"], *, level: float, risk_aversion: float = 0.0) -> Array:
    """Conditional value at risk: the weighted mean of the worst 1 - level, an atom at its edge counted in part.

    The tail's edge and the share of an atom in it are held fixed: CVaR is stationary in both (Rockafellar & Uryasev
    2002).
    """
    fixed_weight = lax.stop_gradient(weight)
    tail = (1.0 - level) * jnp.sum(fixed_weight)
    edge = weighted_quantile(loss, weight, tail)
    fixed_loss = lax.stop_gradient(loss)
    excess = fixed_loss - edge
    width = 1e-6 * (1.0 + jnp.abs(edge))
    beyond = jnp.where(excess > width, fixed_weight, 0.0)
    at_edge = jnp.where(jnp.abs(excess) <= width, fixed_weight, 0.0)
    share = (tail - jnp.sum(beyond)) / jnp.maximum(jnp.sum(at_edge), 1e-12)
    inside = beyond + jnp.clip(share, 0.0, 1.0) * at_edge
    missing = tail - jnp.sum(inside)
    return (
        jnp.sum(inside * loss) + missing * edge + jnp.sum((weight - fixed_weight) * jnp.maximum(excess, 0.0))
    ) / tail


def mean_cvar(
    loss: Float[Array, " n"], weight: Float[Array, " n"], *, level: float, risk_aversion: float = 1.0
) -> Array:
    """Mean loss plus `risk_aversion` times CVaR."""
    return _mean(loss, weight) + risk_aversion * cvar(loss, weight, level=level)


def sharpe(
    loss: Float[Array, " n"], weight: Float[Array, " n"], *, level: float = 0.0, risk_aversion: float = 0.0
) -> Array:
    """Minus the mean return over its standard deviation, over the horizon (not annualised)."""
    mean = _mean(loss, weight)
    return mean / jnp.maximum(safe_sqrt(_mean((loss - mean) ** 2, weight)), 1e-9)


def sortino(
    loss: Float[Array, " n"], weight: Float[Array, " n"], *, level: float = 0.0, risk_aversion: float = 0.0
) -> Array:
    """Minus the mean return over its downside deviation (root mean square of the losses), over the horizon."""
    down = _mean(jnp.square(jnp.maximum(loss, 0.0)), weight)
    return _mean(loss, weight) / jnp.maximum(safe_sqrt(down), 1e-9)


OBJECTIVES: dict[str, Callable[..., Array]] = {
    "cvar": cvar,
    "mean_cvar": mean_cvar,
    "sharpe": sharpe,
    "sortino": sortino,
}


def bind(name: str, *, level: float, risk_aversion: float) -> Callable[[Array, Array], Array]:
    """Objective of (loss, weight) by name."""
    return partial(OBJECTIVES[name], level=level, risk_aversion=risk_aversion)
