"""Draws of a shock component on its own, without a market."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpo_sim.random import Address, Stream, stream_key


@partial(jax.jit, static_argnames=("n_paths", "n_steps", "masks_of"))
def paths_of(component, prepared, key, *, n_paths, n_steps=1, masks_of=None):
    """(steps, assets, paths) shocks; `masks_of(path)` gives the regime masks, the same in all steps."""
    path = jnp.arange(n_paths, dtype=jnp.uint32)
    one = jnp.ones(n_paths, jax.tree.leaves(component)[0].dtype)
    masks = () if masks_of is None else masks_of(path)

    def body(state, t):
        # The line hands over addresses one step further on than t.
        state, shocks = component.step(prepared, t, state, masks, Address(key, path, t + 1, 0))
        return state, jnp.stack(list(shocks.eps))

    state = component.init(prepared, one, Address(key, path, jnp.zeros((), jnp.int32), 0))
    return lax.scan(body, state, jnp.arange(n_steps, dtype=jnp.int32))[1]


def draw(component, n_paths, n_steps=1, *, seed=0, masks_of=None, sub_steps=1) -> np.ndarray:
    """`paths_of` in float64 numpy."""
    prepared = component.prepare(sub_steps=sub_steps)
    key = stream_key(seed, Stream.MIXING)
    return np.asarray(
        paths_of(component, prepared, key, n_paths=n_paths, n_steps=n_steps, masks_of=masks_of), np.float64
    )


def tail_frequency(x, level, upper=False):
    """Share of joint exceedances of both rows' own sample quantiles, over the level, and its binomial error."""
    x = -x if upper else x
    q = np.quantile(x, level, axis=1, keepdims=True)
    p = np.mean(np.all(x < q, axis=0))
    return p / level, np.sqrt(p * (1.0 - p) / x.shape[1]) / level
