"""Projected gradient descent with optax in one compiled loop."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpo_sim.types import Array

# Imported where it is used: it takes as long to import as pandas, and most jobs do not optimise.
if TYPE_CHECKING:
    import optax


class Solution(NamedTuple):
    """Best point seen, its objective, and the objective at every step (the last entry is at the end point)."""

    point: Any
    value: Array
    trace: Array


def adam(learning_rate: float, n_steps: int) -> "optax.GradientTransformation":
    """Adam with a cosine decay to a thousandth: large steps find the face, small ones settle on it."""
    import optax

    schedule = optax.cosine_decay_schedule(learning_rate, n_steps, alpha=1e-3)
    return optax.adam(schedule, b1=0.9, b2=0.99)


@partial(jax.jit, static_argnames=("objective", "project", "tangent", "optimizer", "n_steps"))
def minimize(
    objective: Callable[[Any, Any], Array],
    start: Any,
    data: Any,
    *,
    project: Callable[[Any, Any], Any],
    optimizer: "optax.GradientTransformation",
    n_steps: int,
    tangent: Callable[[Any, Any, Any], Any] = lambda gradient, point, data: gradient,
) -> Solution:
    """Minimises `objective(point, data)` over the set onto which `project(point, data)` projects.

    The objective is deterministic in `data` (fixed paths: common random numbers, sample average approximation), so the
    best point seen is well defined and is what is returned.

    Args:
      objective: pure function; static, so pass the same function object to reuse the compiled loop.
      start: feasible starting point, a pytree.
      data: everything else the objective reads (traced).
      project: projection onto the feasible set.
      optimizer: optax transformation.
      n_steps: gradient steps.
      tangent: `tangent(gradient, point, data)` takes from the gradient what the constraints answer to.
    """
    import optax

    value_and_grad = jax.value_and_grad(objective)

    def body(carry, _):
        point, state, best, best_value = carry
        value, gradient = value_and_grad(point, data)
        is_better = value < best_value
        best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), point, best)
        updates, state = optimizer.update(tangent(gradient, point, data), state, point)
        point = project(optax.apply_updates(point, updates), data)
        return (point, state, best, jnp.where(is_better, value, best_value)), value

    start_value = jnp.asarray(jnp.inf, jax.tree.leaves(start)[0].dtype)
    carry = (start, optimizer.init(start), start, start_value)
    # One more turn than steps: its value closes the trace, its update is not used. Evaluating the end point outside the
    # loop would compile the whole simulation a second time.
    (_, _, best, best_value), trace = lax.scan(body, carry, None, length=n_steps + 1)
    return Solution(best, best_value, trace)
