"""Paths of a volatility component alone, with Gaussian shocks; and gradients through them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpo_sim.numerics import each_asset, materialised
from qpo_sim.random import Address, Stream, stream_key
from qpo_sim.types import HOURS_PER_YEAR


def drive(model, path, n_steps, years, *, seed=0, watch=None):
    """Log-prices after `n_steps` equal steps, and what `watch` keeps of every (state, local, eps, log_return)."""
    n, dtype = model.n_assets, model.rho.dtype
    prepared = model.prepare(sub_steps=1, step_hours=years / n_steps * HOURS_PER_YEAR)
    own, others = stream_key(seed, Stream.VOLATILITY), jax.random.fold_in(jax.random.key(seed), path[0])
    one, start = jnp.ones(path.shape, dtype), jnp.zeros((), jnp.int32)
    state = model.init(prepared, one, n, n_steps, Address(own, path, start))
    zero = tuple(0.0 * one for _ in range(n)) if n <= 32 else jnp.zeros((n, *path.shape), dtype)

    def open_(prepared, t, state, path):
        return model.open(prepared, t, state, (), Address(own, path, t + 1))

    def step(carry, t):
        state, log_price = carry
        state, local = materialised(open_)(prepared, t, state, path)
        eps = jax.random.normal(jax.random.fold_in(others, t), (n, *path.shape), dtype)
        eps = eps if hasattr(log_price, "ndim") else tuple(eps)
        parts = [local.shift] + ([] if local.jump is None else [local.jump])
        move = each_asset(lambda f, e, *added: f * e + sum(added), local.factor, eps, *parts)
        kept = None if watch is None else watch(state, local, eps, move)
        state = model.close(prepared, t, state, (), local, eps)
        return (state, each_asset(lambda x, r: x + r, log_price, move)), kept

    (state, log_price), kept = lax.scan(step, (state, zero), jnp.arange(n_steps, dtype=jnp.int32))
    return jnp.stack(list(log_price)), kept


def simulate(model, n_paths, n_steps, years, **options):
    program = jax.jit(partial(drive, n_steps=n_steps, years=years, **options))
    log_price, kept = program(model, jnp.arange(n_paths, dtype=jnp.uint32))
    return np.asarray(log_price, np.float64), jax.tree.map(lambda x: np.asarray(x, np.float64), kept)


def smooth_value(model, n_steps=24, years=0.5):
    """Without a kink in the payoff: a difference quotient would smear it."""
    log_price, _ = drive(model, jnp.arange(4096, dtype=jnp.uint32), n_steps, years)
    return jnp.mean((jnp.exp(log_price) - 0.9) ** 2)


def assert_gradient(value, leaves, *, width=1e-5):
    """Reverse mode against central differences on the same draws, in every entry of every leaf."""
    program, gradient = jax.jit(value), jax.jit(jax.grad(value))(leaves)
    flat, tree = jax.tree.flatten(leaves)
    for k, (leaf, got) in enumerate(zip(flat, jax.tree.leaves(gradient), strict=True)):
        for i in np.ndindex(leaf.shape):
            ends = []
            for sign in (1.0, -1.0):
                moved = [*flat[:k], leaf.at[i].add(sign * width), *flat[k + 1 :]]
                ends.append(program(jax.tree.unflatten(tree, moved)))
            slope = (ends[0] - ends[1]) / (2.0 * width)
            np.testing.assert_allclose(got[i], slope, rtol=1e-4, atol=1e-7, err_msg=f"leaf {k} of {tree}, {i}")
            assert got[i] != 0.0
