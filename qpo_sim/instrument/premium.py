r"""Funding payments and mark prices of perpetual futures from their definitions.

The premium index, its linearly weighted average and the clamped rate are those of the funding process
(`market.side.funding`), here for single numbers or arrays; with them the limits that venues set on the rate, what a
position pays, and the mark prices that decide liquidations.

Sources: Binance support 360033525031 (funding) and "Mark price in USDT-M futures"; Hyperliquid documentation, "Robust
price indices" and "Funding"; Deribit, "Perpetual"; dYdX v4 documentation, "Funding". Clamps, caps and the components of
mark prices of the last three are not confirmed by a published table.
"""

import jax.numpy as jnp

from qpo_sim.errors import InputError
from qpo_sim.market.side.funding import RATE_HOURS, funding_rate, premium_index, weighted_premium
from qpo_sim.types import HOURS_PER_YEAR, Array

__all__ = [
    "annual_rate",
    "basis_mark_price",
    "deribit_mark_price",
    "ema",
    "funding_cap",
    "funding_clamp",
    "funding_rate",
    "hyperliquid_mark_price",
    "impact_notional",
    "interval_rate",
    "inverse_payment",
    "linear_payment",
    "median",
    "median_mark_price",
    "premium_index",
    "trigger_price",
    "weighted_premium",
]


def impact_notional(margin: Array, initial_margin_rate: Array) -> Array:
    """Notional whose average fill prices enter the premium: a margin (200 USDT) over the lowest initial margin rate."""
    return margin / initial_margin_rate


def funding_cap(maintenance_rate: Array, share: float = 0.75) -> Array:
    """Largest rate per interval: a share of the maintenance margin rate of the first tier (0.4 %: 0.30 %)."""
    return share * maintenance_rate


def funding_clamp(initial_rate: Array, maintenance_rate: Array, factor: float = 6.0) -> Array:
    """Largest 8-hour rate as a multiple of initial less maintenance margin fraction (dYdX: 6)."""
    return factor * (initial_rate - maintenance_rate)


def interval_rate(rate: Array, *, interval_hours: float, cap: Array = jnp.inf) -> Array:
    """Rate paid per interval for a rate per 8 hours, bounded by the interval's own cap (Hyperliquid: 4 % per hour)."""
    paid = rate * (interval_hours / RATE_HOURS)
    return jnp.minimum(jnp.maximum(paid, -cap), cap)


def annual_rate(rate: Array) -> Array:
    """Simple rate per year of a rate per 8 hours: 0.01 % is 10.95 %."""
    return rate * (HOURS_PER_YEAR / RATE_HOURS)


def linear_payment(quantity: Array, mark: Array, rate: Array) -> Array:
    """What a linear position pays at a settlement, in quote currency; negative: receives. q coins, short below 0."""
    return quantity * mark * rate


def inverse_payment(notional: Array, mark: Array, rate: Array) -> Array:
    """What an inverse position pays at a settlement, in coins; negative: receives. N in USD, short below 0."""
    return notional / mark * rate


def median(a: Array, b: Array, c: Array) -> Array:
    """Median of three, elementwise. Pathwise gradient: that of the middle one."""
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def ema(before: Array, value: Array, *, seconds: Array, time_constant: Array) -> Array:
    """Exponential average after `seconds` at a value: value + (before - value) exp(-seconds / time constant)."""
    return value + (before - value) * jnp.exp(-seconds / time_constant)


def median_mark_price(index: Array, *, rate: Array, time_share: Array, average_basis: Array, last: Array) -> Array:
    """Binance's mark price: the median of index with funding, index with basis, and last price.

    Args:
      index: price index.
      rate: last funding rate, per interval.
      time_share: time to the next settlement over the interval, in [0, 1].
      average_basis: moving average of the book's mid less index, in price.
      last: last traded price.
    """
    return median(index * (1.0 + rate * time_share), index + average_basis, last)


def hyperliquid_mark_price(
    oracle: Array, *, average_basis: Array, best_bid: Array, best_ask: Array, last: Array, elsewhere: Array
) -> Array:
    """Hyperliquid's mark price: the median of oracle with basis, own book and perpetuals of other venues.

    Args:
      oracle: oracle's spot price.
      average_basis: 150-second exponential average of mid less oracle, in price.
      best_bid: of the own book; its price is the median of best bid, best ask and last.
      best_ask: of the own book.
      last: last traded price.
      elsewhere: weighted median of perpetual prices of other venues.
    """
    return median(oracle + average_basis, median(best_bid, best_ask, last), elsewhere)


def deribit_mark_price(index: Array, *, average_basis: Array, band: Array = jnp.inf) -> Array:
    """Deribit's mark price: index plus the 30-second exponential average of fair impact mid less index.

    `band` bounds the average, as a fraction of the index.
    """
    return index + jnp.minimum(jnp.maximum(average_basis, -band * index), band * index)


def basis_mark_price(index: Array, average_basis: Array) -> Array:
    """Mark price of the simulation, index x (1 + average relative basis)."""
    return index * (1.0 + average_basis)


def trigger_price(liquidate_on: str, *, index: Array, mark: Array, last: Array) -> Array:
    """Price at which a venue tests for liquidation.

    Raises:
      InputError: `liquidate_on` is none of `index`, `mark`, `last`.
    """
    prices = {"index": index, "mark": mark, "last": last}
    if liquidate_on not in prices:
        raise InputError(f"liquidate_on is {liquidate_on!r}; it must be one of {', '.join(prices)}.")
    return prices[liquidate_on]
