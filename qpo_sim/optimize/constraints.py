"""Feasible sets as Euclidean projections: budget simplex with bounds, and bounds with a gross cap.

Both projections shift or shrink by one scalar, which bisection finds to rounding; 60 halvings of the starting bracket.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.types import Array

_HALVINGS = 60


def project_budget(
    point: Float[Array, " n"], *, budget: Array, lower: Float[Array, " n"], upper: Float[Array, " n"]
) -> Float[Array, " n"]:
    r"""Nearest point of $\{w: \sum w = \text{budget},\ lower \le w \le upper\}$.

    It is clip(point - tau, lower, upper) for the tau that meets the budget. The set must not be empty (`check_budget`).
    """
    low = jnp.min(point - upper)
    high = jnp.max(point - lower)

    def halve(_, bounds):
        low, high = bounds
        tau = 0.5 * (low + high)
        too_much = jnp.sum(jnp.clip(point - tau, lower, upper)) > budget
        return jnp.where(too_much, tau, low), jnp.where(too_much, high, tau)

    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return jnp.clip(point - 0.5 * (low + high), lower, upper)


def project_gross(
    point: Float[Array, " n"], *, gross: Array, lower: Float[Array, " n"], upper: Float[Array, " n"]
) -> Float[Array, " n"]:
    r"""Nearest point of $\{w: \sum |w| \le \text{gross},\ lower \le w \le upper\}$, for bounds around zero.

    It is the clipped point if that meets the cap, else the clipped soft threshold that meets it exactly.
    """

    def shrunk(tau):
        return jnp.clip(jnp.sign(point) * jnp.maximum(jnp.abs(point) - tau, 0.0), lower, upper)

    def halve(_, bounds):
        low, high = bounds
        tau = 0.5 * (low + high)
        too_much = jnp.sum(jnp.abs(shrunk(tau))) > gross
        return jnp.where(too_much, tau, low), jnp.where(too_much, high, tau)

    bounds = jnp.zeros((), point.dtype), jnp.max(jnp.abs(point))
    _, tau = lax.fori_loop(0, _HALVINGS, halve, bounds)
    return jnp.where(jnp.sum(jnp.abs(shrunk(0.0))) <= gross, shrunk(0.0), shrunk(tau))


def tangent_budget(
    gradient: Float[Array, " n"], point: Float[Array, " n"], *, lower: Float[Array, " n"], upper: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Gradient without the part that only the budget answers to, its mean over the weights inside their bounds.

    Adam gives every coordinate a step of about the same length, so where all derivatives have one sign the projection
    would take the whole step back.
    """
    inside = (point > lower) & (point < upper)
    inside = jnp.where(jnp.any(inside), inside, True)
    return gradient - jnp.sum(jnp.where(inside, gradient, 0.0)) / jnp.sum(inside)


def tangent_gross(gradient: Float[Array, " n"], point: Float[Array, " n"], *, gross: Array) -> Float[Array, " n"]:
    """Gradient without the part that only an active gross cap answers to, for the same reason as `tangent_budget`."""
    side = jnp.sign(point)
    count = jnp.maximum(jnp.sum(jnp.abs(side)), 1.0)
    outward = jnp.minimum(jnp.sum(side * gradient) / count, 0.0)
    is_active = jnp.sum(jnp.abs(point)) >= gross * (1.0 - 1e-6)
    return gradient - jnp.where(is_active, outward, 0.0) * side


def check_budget(budget: float, lower: Array, upper: Array, *, name: str = "weights") -> None:
    """Raises InputError unless some point meets the budget within the bounds."""
    if np.any(lower > upper):
        raise InputError(f"{name}: a lower bound exceeds its upper bound, so no weights can meet both.")
    least, most = float(np.sum(lower)), float(np.sum(upper))
    if not least <= budget + 1e-9:
        raise InputError(f"{name}: the lower bounds sum to {least:.6g}, above the budget of {budget:.6g}; lower them.")
    if not most >= budget - 1e-9:
        raise InputError(f"{name}: the upper bounds sum to {most:.6g}, below the budget of {budget:.6g}; raise them.")
