"""Arrays whose first axis runs over coins or segments and whose other axes, if any, run over paths."""

from collections.abc import Sequence

import jax.numpy as jnp

from qpo_sim.types import Array


def stacked(values: Array | Sequence[Array]) -> Array:
    """One array of what is one already or a sequence of rows."""
    if not isinstance(values, tuple | list):
        return jnp.asarray(values)
    return jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(value) for value in values)))


def aligned(*arrays: Array | Sequence[Array]) -> tuple[Array, ...]:
    """The arrays with axes of length 1 added at the end, so that their first axes meet and paths broadcast."""
    full = [stacked(array) for array in arrays]
    rank = max(array.ndim for array in full)
    return tuple(array.reshape(array.shape + (1,) * (rank - array.ndim)) for array in full)
