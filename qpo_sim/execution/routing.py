r"""Splitting an order over constant-product pools so that it gives the most.

$$ \max \sum_i \frac{y_i \phi_i d_i}{x_i + \phi_i d_i} , \quad \sum d_i = D, \; d_i \ge 0, \; \phi_i = 1 - f_i . $$

With the root $w = \nu^{-1/2}$ of the inverse marginal output, $c_i = x_i/\phi_i$ and $\rho_i = \sqrt{\phi_i y_i/x_i}$
the optimum is water-filling, $d_i = c_i (\rho_i w - 1)^+$: pools are used in the order of $\rho_i$ until the marginal
output of all that are used is the same. Amounts are computed from $w - 1/\rho_{max}$, so that small orders do not drown
in the rounding of large reserves. Concentrated liquidity joins as virtual pools with a capacity (see
`instrument.pool.concentrated`). Angeris, Evans, Chitra & Boyd (2022), Optimal routing for constant function market
makers.
"""

from itertools import combinations
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.instrument.pool.axes import aligned
from qpo_sim.numerics import safe_sqrt
from qpo_sim.types import Array

# Sets of pools double with each pool.
MAX_POOLS_WITH_GAS = 6

_HALVINGS = 40


class Route(NamedTuple):
    """An order over pools.

    Attributes:
      amounts: paid into each pool, fee included, (pools, *paths).
      amount_out: taken out of all.
      marginal_out: nu, what one unit more would give.
      unfilled: of the order, where capacities end it; else 0.
    """

    amounts: Float[Array, "pools ..."]
    amount_out: Array
    marginal_out: Array
    unfilled: Array


class _Pools(NamedTuple):
    """c, rho, rho over the greatest rho minus 1, the greatest rho, and y."""

    size: Array
    root: Array
    behind: Array
    best: Array
    reserve_out: Array


def _pools(reserve_in: Array, reserve_out: Array, fee: Array) -> _Pools:
    keep = 1.0 - fee
    root = safe_sqrt(keep * reserve_out / reserve_in)
    best = lax.stop_gradient(jnp.max(root, axis=0))
    return _Pools(reserve_in / keep, root, root / best - 1.0, best, reserve_out)


def _route(pools: _Pools, level: Array, amounts: Array, amount_in: Array) -> Route:
    out = pools.reserve_out * amounts / (pools.size + amounts)
    w = 1.0 / pools.best + level
    return Route(amounts, jnp.sum(out, axis=0), 1.0 / (w * w), amount_in - jnp.sum(amounts, axis=0))


def _columns(*arrays: Array) -> tuple[Array, ...]:
    """The order (last, without an axis of pools) and the pools' arrays, with axes that meet."""
    *pools, amount = arrays
    *pools, amount = aligned(*pools, jnp.asarray(amount)[None])
    return (*(jnp.broadcast_arrays(*pools)), amount[0])


def split(
    reserve_in: Float[Array, "pools ..."],
    reserve_out: Float[Array, "pools ..."],
    fee: Float[Array, "pools ..."],
    amount_in: Array,
) -> Route:
    r"""Best split by prefixes of the pools in order of $\rho$, exact.

    A prefix m alone would need $w_m = (D + \sum c_i)/\sum c_i\rho_i$; the optimum is the smallest of them, as demand at
    a given w is the greatest over prefixes.

    Args:
      reserve_in: x of the coin paid in, > 0.
      reserve_out: y of the coin taken out, >= 0; a pool without any is not used.
      fee: f of the input.
      amount_in: D >= 0, in total.

    Pathwise gradient: all arguments (almost everywhere: a pool that just enters has a kink in its amount, none in the
    output).
    """
    x, y, f, amount = _columns(reserve_in, reserve_out, fee, amount_in)
    pools = _pools(x, y, f)
    order = jnp.argsort(-lax.stop_gradient(pools.root), axis=0)
    size, root, behind = (jnp.take_along_axis(a, order, axis=0) for a in (pools.size, pools.root, pools.behind))
    needed = (amount - jnp.cumsum(size * behind, axis=0)) / jnp.cumsum(size * root, axis=0)
    level = jnp.min(needed, axis=0)
    return _route(pools, level, pools.size * jnp.maximum(pools.behind + pools.root * level, 0.0), amount)


def split_within(
    reserve_in: Float[Array, "pools ..."],
    reserve_out: Float[Array, "pools ..."],
    fee: Float[Array, "pools ..."],
    amount_in: Array,
    capacity: Float[Array, "pools ..."],
) -> Route:
    """Best split over pools that take limited amounts, by bisection of the marginal price and one Newton step.

    Without sorting. Demand is piecewise linear in the root of the price, so the Newton step after 40 halvings is exact
    and carries the gradient of the optimum.

    Args:
      reserve_in: x of the coin paid in, > 0.
      reserve_out: y of the coin taken out, >= 0.
      fee: f of the input.
      amount_in: D >= 0, in total.
      capacity: greatest amount net of fee that a pool takes, inf for no limit.

    Pathwise gradient: all arguments (almost everywhere).
    """
    x, y, f, limit, amount = _columns(reserve_in, reserve_out, fee, capacity, amount_in)
    pools = _pools(x, y, f)
    limit = limit / (1.0 - f)

    def amounts_at(pools, level, limit):
        return jnp.clip(pools.size * (pools.behind + pools.root * level), 0.0, limit)

    fixed, fixed_limit, target = lax.stop_gradient((pools, limit, amount))
    # At the top every usable pool takes the whole order or all it can.
    usable = fixed.root > 0.0
    most = jnp.minimum(fixed_limit, target)
    top = (most / fixed.size - fixed.behind) / jnp.where(usable, fixed.root, 1.0)
    low, high = jnp.zeros_like(target + fixed.best), jnp.max(jnp.where(usable, top, 0.0), axis=0)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        is_enough = jnp.sum(amounts_at(fixed, middle, fixed_limit), axis=0) >= target
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    high = jnp.broadcast_to(high, low.shape)
    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    level = lax.stop_gradient(0.5 * (low + high))
    demand = amounts_at(pools, level, limit)
    moves = (demand > 0.0) & (demand < limit)
    slope = jnp.sum(jnp.where(moves, pools.size * pools.root, 0.0), axis=0)
    step = (amount - jnp.sum(demand, axis=0)) / jnp.where(slope > 0.0, slope, 1.0)
    level = level + jnp.where(slope > 0.0, step, 0.0)
    return _route(pools, level, amounts_at(pools, level, limit), amount)


def split_with_gas(
    reserve_in: Float[Array, "pools ..."],
    reserve_out: Float[Array, "pools ..."],
    fee: Float[Array, "pools ..."],
    amount_in: Array,
    gas: Float[Array, "pools ..."],
) -> Route:
    """Best split when each pool that is used costs a fixed sum: all sets of pools are tried.

    Args:
      reserve_in: x of the coin paid in, > 0.
      reserve_out: y of the coin taken out, >= 0.
      fee: f of the input.
      amount_in: D >= 0, in total.
      gas: cost of using a pool, in the coin taken out.

    Returns:
      The route; `amount_out` is before gas.

    Raises:
      InputError: more than six pools.

    Pathwise gradient: all arguments, the set of pools as it is.
    """
    x, y, f, cost, amount = _columns(reserve_in, reserve_out, fee, gas, amount_in)
    n = x.shape[0]
    if n > MAX_POOLS_WITH_GAS:
        raise InputError(
            f"{n} pools with gas; at most {MAX_POOLS_WITH_GAS} can be tried in all sets, leave out the smallest ones."
        )
    sets = [chosen for k in range(1, n + 1) for chosen in combinations(range(n), k)]

    def route_over(chosen):
        used = jnp.asarray([i in chosen for i in range(n)]).reshape((n,) + (1,) * (x.ndim - 1))
        route = split(x, jnp.where(used, y, 0.0), f, amount)
        return route, route.amount_out - jnp.sum(jnp.where(used, cost, 0.0), axis=0)

    best, best_net = route_over(sets[0])
    for chosen in sets[1:]:
        route, net = route_over(chosen)
        better = net > best_net
        best = Route(*(jnp.where(better, new, old) for new, old in zip(route, best, strict=True)))
        best_net = jnp.where(better, net, best_net)
    return best
