"""Markov regimes: one uniform per step moves a one-hot regime along the rows of a transition matrix."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.numerics import select
from qpo_sim.types import Array


def thresholds(probability: Float[Array, "... regimes"]) -> Float[Array, "... regimes-1"]:
    """Cumulative probabilities without the last (1): the cut points at which a uniform changes its regime."""
    return jnp.cumsum(probability, axis=-1)[..., :-1]


def masks_from_uniform(u: Float[Array, " paths"], cuts: Sequence[Array]) -> tuple[Array, ...]:
    """One-hot masks (floating, without regime 0) of the interval between the cut points in which u falls."""
    above = [(u > cut).astype(u.dtype) for cut in cuts]
    return tuple(a - b for a, b in zip(above, [*above[1:], jnp.zeros_like(u)], strict=True)) if above else ()


def next_masks(u: Float[Array, " paths"], masks: Sequence[Array], cuts: Float[Array, "regimes regimes-1"]):
    """Masks of the next regime given the masks of the present one.

    Pathwise gradient: none in the transition probabilities (the draw is discrete).
    """
    return masks_from_uniform(u, [select(masks, cuts[:, k]) for k in range(cuts.shape[1])])


def stationary(transition: Float[Array, "regimes regimes"]) -> Float[Array, " regimes"]:
    r"""Stationary law: the solution of $\pi' P = \pi'$, $\pi' 1 = 1$."""
    n = transition.shape[0]
    system = jnp.concatenate(
        [(jnp.eye(n, dtype=transition.dtype) - transition).T[:-1], jnp.ones((1, n), transition.dtype)]
    )
    return jnp.linalg.solve(system, jnp.zeros(n, transition.dtype).at[-1].set(1.0))
