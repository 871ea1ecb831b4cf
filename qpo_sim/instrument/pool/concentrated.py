r"""Concentrated liquidity: a position between two prices, swaps within and across ranges, ticks.

With the square root S of the price clamped to the range, a position of liquidity L holds $L(1/S - 1/\sqrt b)$ of the
base and $L(S - \sqrt a)$ of the quote coin. Fees are kept beside the position and do not compound. Adams, Zinsmeister,
Salem, Keefer & Robinson (2021), Uniswap v3 Core.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.instrument.pool.axes import aligned
from qpo_sim.instrument.pool.constant_product import Holdings
from qpo_sim.numerics import safe_log
from qpo_sim.types import Array

TICK_BASE = 1.0001
# Ticks between usable range ends, by fee tier.
TICK_SPACING = {0.0001: 1, 0.0005: 10, 0.003: 60, 0.01: 200}


class RangeSwap(NamedTuple):
    """What a swap against ranges of liquidity gives.

    Attributes:
      amount_out: taken out.
      price_after: of the base coin in the quote coin.
      unfilled: part of the amount in, fee included, that found no liquidity.
    """

    amount_out: Array
    price_after: Array
    unfilled: Array


class VirtualPools(NamedTuple):
    """Ranges as constant-product pools with a limit; (segments, *paths) each.

    Attributes:
      reserve_in: virtual reserve of the coin paid in, at the price where a swap enters the segment.
      reserve_out: virtual reserve of the coin taken out.
      capacity: input net of fee that takes the price through the segment.
    """

    reserve_in: Array
    reserve_out: Array
    capacity: Array


def holdings(liquidity: Array, price: Array, lower: Array, upper: Array) -> Holdings:
    """Coins of a position: all base below the range, all quote above it.

    Args:
      liquidity: L.
      price: external price P of the base coin in the quote coin, > 0.
      lower: a, lower end of the range, > 0.
      upper: b > a, upper end of the range.

    Pathwise gradient: all arguments (almost everywhere; the amounts have kinks at the ends of the range).
    """
    inside = jnp.clip(price, lower, upper)
    root, root_lower, root_upper = jnp.sqrt(inside), jnp.sqrt(lower), jnp.sqrt(upper)
    # Differences of prices, not of roots: exact for close numbers.
    base = liquidity * (upper - inside) / ((root_upper + root) * root * root_upper)
    return Holdings(base, liquidity * (inside - lower) / (root + root_lower))


def value(liquidity: Array, price: Array, lower: Array, upper: Array) -> Array:
    r"""Value of a position in the quote coin without its fees, x P + y.

    Pathwise gradient: all arguments; the derivative in the price is the amount of base coin.
    """
    base, quote = holdings(liquidity, price, lower, upper)
    return base * price + quote


def gamma(liquidity: Array, price: Array, lower: Array, upper: Array) -> Array:
    r"""Second derivative of the value in the price, $-L/(2 P^{3/2})$ in range, else 0.

    Pathwise gradient: liquidity, price; none in the ends of the range.
    """
    return jnp.where(is_in_range(price, lower, upper), -0.5 * liquidity / (price * jnp.sqrt(price)), 0.0)


def is_in_range(price: Array, lower: Array, upper: Array) -> Array:
    """Whether the position earns fees, lower <= price < upper."""
    return (price >= lower) & (price < upper)


def liquidity_from_budget(base: Array, quote: Array, price: Array, lower: Array, upper: Array) -> Array:
    r"""L that a budget of both coins buys; what does not fit the ratio is left over.

    In range $\min(x S \sqrt b/(\sqrt b - S), y/(S - \sqrt a))$; below the range the base coin alone counts, above it
    the quote coin alone.

    Pathwise gradient: all arguments (almost everywhere).
    """
    unit = holdings(1.0, price, lower, upper)
    needs_base, needs_quote = unit.base > 0.0, unit.quote > 0.0
    from_base = base / jnp.where(needs_base, unit.base, 1.0)
    from_quote = quote / jnp.where(needs_quote, unit.quote, 1.0)
    return jnp.where(
        needs_base & needs_quote, jnp.minimum(from_base, from_quote), jnp.where(needs_base, from_base, from_quote)
    )


def liquidity_from_value(value: Array, price: Array, lower: Array, upper: Array) -> Array:
    """L of a position worth `value` in the quote coin, its coins in the ratio that the price asks for.

    Pathwise gradient: all arguments (almost everywhere).
    """
    base, quote = holdings(1.0, price, lower, upper)
    return value / (base * price + quote)


def impermanent_loss(start_price: Array, price: Array, lower: Array, upper: Array) -> Array:
    """Position over the coins put in at `start_price`, minus 1, <= 0, fees excluded.

    Pathwise gradient: all arguments (almost everywhere).
    """
    start = holdings(1.0, start_price, lower, upper)
    return value(1.0, price, lower, upper) / (start.base * price + start.quote) - 1.0


def capital_efficiency(price: Array, lower: Array, upper: Array) -> Array:
    r"""Value of a full-range share of the same L over the value of the position, $2 L \sqrt P/V$; P in the range.

    Pathwise gradient: all arguments.
    """
    return 2.0 * jnp.sqrt(price) / value(1.0, price, lower, upper)


def symmetric_capital_efficiency(spread: Array) -> Array:
    r"""`capital_efficiency` of the range [P/s, P s], $1/(1 - s^{-1/2})$ with s > 1.

    Pathwise gradient: yes.
    """
    return -1.0 / jnp.expm1(-0.5 * jnp.log(spread))


def swap_quote_in(liquidity: Array, price: Array, amount_in: Array, fee: Array) -> RangeSwap:
    r"""Swap of the quote coin into the base coin within one range, $\Delta\sqrt P = (1-f) d/L$.

    The price rises; the caller sees to it that it stays in the range (see `swap_quote_in_across`).

    Args:
      liquidity: active L > 0.
      price: P.
      amount_in: d >= 0 of the quote coin, fee included.
      fee: f, of the input.

    Pathwise gradient: all arguments.
    """
    root = jnp.sqrt(price)
    net = (1.0 - fee) * amount_in
    after = root + net / liquidity
    return RangeSwap(net / (root * after), after * after, jnp.zeros_like(after))


def swap_base_in(liquidity: Array, price: Array, amount_in: Array, fee: Array) -> RangeSwap:
    r"""Swap of the base coin into the quote coin within one range, $\Delta(1/\sqrt P) = (1-f) d/L$; the price falls.

    Arguments as in `swap_quote_in`, the amount in the base coin.

    Pathwise gradient: all arguments.
    """
    root = jnp.sqrt(price)
    net = (1.0 - fee) * amount_in
    after = root / (1.0 + net * root / liquidity)
    return RangeSwap(net * root * after, after * after, jnp.zeros_like(after))


class _Segments(NamedTuple):
    """Ends and depth of the segments, and the price where a swap enters each; first axis segments."""

    lower: Array
    upper: Array
    depth: Array
    enter: Array


def _segments(boundaries: Array, liquidity: Array, price: Array) -> _Segments:
    edges, depth, level = aligned(boundaries, liquidity, price)
    return _Segments(edges[:-1], edges[1:], depth, jnp.clip(level, edges[:-1], edges[1:]))


def _pools_up(segments: _Segments) -> VirtualPools:
    lower, upper, depth, enter = segments
    root = jnp.sqrt(enter)
    return VirtualPools(depth * root, depth / root, depth * (upper - enter) / (root + jnp.sqrt(upper)))


def _pools_down(segments: _Segments) -> VirtualPools:
    lower, upper, depth, enter = segments
    root, end = jnp.sqrt(enter), jnp.sqrt(lower)
    return VirtualPools(depth / root, depth * root, depth * (enter - lower) / ((root + end) * root * end))


def quote_in_pools(
    boundaries: Float[Array, "boundaries ..."], liquidity: Float[Array, "segments ..."], price: Array
) -> VirtualPools:
    """Segments that a swap of the quote coin meets on its way up, each as a constant-product pool with a limit.

    Args:
      boundaries: prices between segments, ascending, > 0, one more than segments.
      liquidity: L of each segment, >= 0.
      price: P of the base coin in the quote coin.

    Pathwise gradient: all arguments (almost everywhere).
    """
    return _pools_up(_segments(boundaries, liquidity, jnp.asarray(price)[None]))


def base_in_pools(
    boundaries: Float[Array, "boundaries ..."], liquidity: Float[Array, "segments ..."], price: Array
) -> VirtualPools:
    """Segments that a swap of the base coin meets on its way down; arguments and order as in `quote_in_pools`.

    Pathwise gradient: all arguments (almost everywhere).
    """
    return _pools_down(_segments(boundaries, liquidity, jnp.asarray(price)[None]))


def _filled(capacity: Array, amount: Array) -> Array:
    """Part of `amount` that each segment takes when they fill in the order of the first axis."""
    before = jnp.cumsum(capacity, axis=0) - capacity
    return jnp.clip(amount - before, 0.0, capacity)


def swap_quote_in_across(
    boundaries: Float[Array, "boundaries ..."],
    liquidity: Float[Array, "segments ..."],
    price: Array,
    amount_in: Array,
    fee: Array,
) -> RangeSwap:
    """Swap of the quote coin into the base coin through as many segments as it takes.

    Segments without liquidity are jumped over; a swap that ends where a segment ends leaves the price there.

    Args:
      boundaries: prices between segments, ascending, > 0, one more than segments.
      liquidity: L of each segment, >= 0.
      price: P of the base coin in the quote coin.
      amount_in: of the quote coin, fee included.
      fee: f, of the input.

    Pathwise gradient: all arguments (almost everywhere).
    """
    edges, depths, level, net = aligned(
        boundaries, liquidity, jnp.asarray(price)[None], jnp.asarray((1.0 - fee) * amount_in)[None]
    )
    segments = _segments(edges, depths, level)
    filled = _filled(_pools_up(segments).capacity, net)
    root = jnp.sqrt(segments.enter)
    end = root + filled / jnp.where(segments.depth > 0.0, segments.depth, 1.0)
    last = jnp.max(jnp.where(filled > 0.0, end, jnp.sqrt(level)), axis=0)
    left = net[0] - jnp.sum(filled, axis=0)
    return RangeSwap(jnp.sum(filled / (root * end), axis=0), last * last, left / (1.0 - fee))


def swap_base_in_across(
    boundaries: Float[Array, "boundaries ..."],
    liquidity: Float[Array, "segments ..."],
    price: Array,
    amount_in: Array,
    fee: Array,
) -> RangeSwap:
    """Swap of the base coin into the quote coin through as many segments as it takes; see `swap_quote_in_across`.

    Pathwise gradient: all arguments (almost everywhere).
    """
    edges, depths, level, net = aligned(
        boundaries, liquidity, jnp.asarray(price)[None], jnp.asarray((1.0 - fee) * amount_in)[None]
    )
    segments = _segments(edges, depths, level)
    filled = _filled(_pools_down(segments).capacity[::-1], net)[::-1]
    root = jnp.sqrt(segments.enter)
    end = root / (1.0 + filled * root / jnp.where(segments.depth > 0.0, segments.depth, 1.0))
    last = jnp.min(jnp.where(filled > 0.0, end, jnp.sqrt(level)), axis=0)
    left = net[0] - jnp.sum(filled, axis=0)
    return RangeSwap(jnp.sum(filled * root * end, axis=0), last * last, left / (1.0 - fee))


def fee_income(
    volume: Array, fee: Array, liquidity: Array, active_liquidity: Array, share_in_range: Array = 1.0
) -> Array:
    r"""Fees a position earns, $f \cdot volume \cdot L/L_{active}$ while in range, kept beside the position.

    Args:
      volume: traded in the step, in the currency of the result.
      fee: f.
      liquidity: L of the position.
      active_liquidity: L of all positions in range, this one included, > 0.
      share_in_range: of the step's volume that met the position, e.g. by `share_in_range`.

    Pathwise gradient: all arguments.
    """
    return fee * volume * liquidity / active_liquidity * share_in_range


def share_in_range(price_before: Array, price: Array, lower: Array, upper: Array) -> Array:
    """Share of the log-price move of a step that lies in the range; for a step without a move, whether it is in range.

    A stand-in for the time spent in range that has a gradient in the prices and in the ends of the range.

    Pathwise gradient: all arguments, almost everywhere where the price moves; zero where it does not.
    """
    low, high = jnp.minimum(price_before, price), jnp.maximum(price_before, price)
    move = safe_log(high / low)
    inside = safe_log(jnp.clip(high, lower, upper) / jnp.clip(low, lower, upper))
    moves = move > 0.0
    still = jnp.where(is_in_range(price, lower, upper), 1.0, 0.0)
    return jnp.where(moves, inside / jnp.where(moves, move, 1.0), still)


def price_at_tick(tick: np.ndarray | int) -> np.ndarray:
    """Price of a tick, 1.0001^tick, in raw units: amounts as integers, without the coins' decimals."""
    return np.exp(np.asarray(tick, np.float64) * np.log1p(TICK_BASE - 1.0))


def tick_at_price(price: np.ndarray | float) -> np.ndarray:
    """Greatest tick whose price is at most `price` (raw units, > 0), as the contracts round.

    Raises:
      InputError: a price that is not positive.
    """
    values = np.asarray(price, np.float64)
    if not np.all(values > 0.0):
        raise InputError(f"price is {price}; prices of ticks must be above 0.")
    tick = np.floor(np.log(values) / np.log1p(TICK_BASE - 1.0))
    # The logarithm of the price of a tick may fall on either side of the tick.
    tick = np.where(price_at_tick(tick + 1.0) <= values, tick + 1.0, tick)
    return np.where(price_at_tick(tick) > values, tick - 1.0, tick).astype(np.int64)


def usable_range(lower: float, upper: float, fee: float) -> tuple[float, float]:
    """Range with ends on usable ticks of a fee tier, widened to hold [lower, upper]; raw units.

    Raises:
      InputError: a fee tier that does not exist, or ends out of order.
    """
    if fee not in TICK_SPACING:
        raise InputError(f"fee is {fee}; fee tiers are {', '.join(map(str, TICK_SPACING))}.")
    if not 0.0 < lower < upper:
        raise InputError(f"range is [{lower}, {upper}]; it must satisfy 0 < lower < upper.")
    spacing = TICK_SPACING[fee]
    low, high = int(tick_at_price(lower)), int(tick_at_price(upper))
    high += int(float(price_at_tick(high)) < upper)
    return float(price_at_tick(low // spacing * spacing)), float(price_at_tick(-(-high // spacing) * spacing))
