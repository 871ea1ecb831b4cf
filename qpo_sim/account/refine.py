"""Crossing of an account whose distance to liquidation is no diffusion of its own: looked at within the step.

Given the step's ends the diffusive part of the log-prices is a Brownian bridge. Its values at a few times in between
are drawn, the distance and its elasticities are taken at each, and crossing between neighbours follows from those. The
error of the elasticities is then that of a step that many times shorter.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from qpo_sim.instrument.first_passage import Distance, price_at_barrier, step_moments
from qpo_sim.numerics import bridge_crossing, safe_sqrt
from qpo_sim.random import Address
from qpo_sim.types import Array, Context

# Slots of draws that one account may take.
MAX_SLOTS = 1024


class Crossing(NamedTuple):
    """Probability of a liquidation during the step, and the prices at which a drawn one happens."""

    probability: Array
    prices: tuple[Array, ...]


def crossing(
    context: Context,
    assets: tuple[int, ...],
    scale: object,
    start: tuple[Array, ...],
    end: tuple[Array, ...],
    distance: Callable[[tuple[Array, ...], Array], Distance],
    uniform: Array,
    address: Address,
    n_points: int,
) -> Crossing:
    """Probability that the distance touches 0 within a step, by the distances at `n_points` times of it.

    Args:
      context: market and clock.
      assets: of the account.
      scale: conditional scale of the step.
      start: their prices at the start of the step.
      end: at its end.
      distance: distance and elasticities at prices of the assets and a time, as a share of the step.
      uniform: what decides on a liquidation; the first part of the step whose cumulated probability exceeds it is where
        it happens.
      address: of the draws between.
      n_points: parts of the step.

    Jumps come at the end of the step.
    """
    n, dtype = len(assets), uniform.dtype
    factor = _factor(context, assets, scale, uniform)
    jumps = [scale.jump[i] if len(scale.jump) else jnp.zeros_like(uniform) for i in assets]  # type: ignore[attr-defined]
    target = [jnp.log(price) - jump for price, jump in zip(end, jumps, strict=True)]
    first = distance(start, jnp.zeros((), dtype)).x
    slots = (n + 1) // 2
    rows = [jnp.stack(address.after(k * slots).normals(n)) for k in range(n_points - 1)]
    # The last part ends where the step does.
    normals = jnp.stack([*rows, jnp.zeros((n, *uniform.shape))]).astype(dtype)

    def part(carry, row):
        log_prices, x, alive, hit = carry
        k, z = row
        left = (n_points - k).astype(dtype)
        noise = safe_sqrt((left - 1.0) / (left * n_points))
        log_prices = tuple(
            now + (goal - now) / left + noise * sum(factor[i][j] * z[j] for j in range(i + 1))
            for i, (now, goal) in enumerate(zip(log_prices, target, strict=True))
        )
        prices = tuple(jnp.exp(row) for row in log_prices)
        now = distance(prices, (k + 1).astype(dtype) / n_points)
        variance, covariance = step_moments(now, assets, context, scale)
        probability = bridge_crossing(x, now.x, variance / n_points)
        falls = (1.0 - alive) <= uniform
        alive_after = alive * (1.0 - probability)
        here = falls & ((1.0 - alive_after) > uniform)
        at = tuple(price_at_barrier(p, now.x, c / variance) for p, c in zip(prices, covariance, strict=True))
        hit = tuple(jnp.where(here, new, old) for new, old in zip(at, hit, strict=True))
        return (log_prices, now.x, alive_after, hit), None

    carry = (tuple(jnp.log(price) for price in start), first, jnp.ones_like(uniform), end)
    (_, _, alive, hit), _ = lax.scan(part, carry, (jnp.arange(n_points, dtype=jnp.int32), normals))
    # A jump over the barrier closes the account behind the gap; what is below its margin at the start is closed there.
    gone = distance(end, jnp.ones((), dtype)).x <= 0.0
    hit = tuple(jnp.where(first <= 0.0, a, b) for a, b in zip(start, hit, strict=True))
    return Crossing(jnp.where(gone | (first <= 0.0), 1.0, 1.0 - alive), hit)


def _factor(context: Context, assets: tuple[int, ...], scale: object, like: Array) -> list[list[Array]]:
    # Lower Cholesky factor of the step's covariance of the account's assets, entry by entry for all paths.
    n, one = len(assets), jnp.ones_like(like)
    columns = []
    for j in range(n):
        unit = Distance(one, tuple(one if i == j else 0.0 * one for i in range(n)))
        columns.append(step_moments(unit, assets, context, scale)[1])
    factor: list[list[Array]] = []
    for i in range(n):
        row: list[Array] = []
        for j in range(i + 1):
            rest = columns[j][i] - sum((row[k] * factor[j][k] if j < i else row[k] * row[k] for k in range(j)), 0.0)
            if i == j:
                row.append(safe_sqrt(rest))
            else:
                pivot = factor[j][j]
                row.append(jnp.where(pivot > 0.0, rest / jnp.where(pivot > 0.0, pivot, 1.0), 0.0))
        factor.append(row)
    return factor
