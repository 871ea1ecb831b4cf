"""What a push price feed reports of a given series of prices (the random feed of a market is its side component)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim.types import Array


class Reported(NamedTuple):
    """Reported prices, same shape as the prices, and the number of updates after the first price."""

    price: Float[Array, " times *paths"]
    updates: Float[Array, " *paths"]


def reported(
    prices: Float[Array, " times *paths"],
    *,
    threshold: float,
    heartbeat_seconds: float,
    step_seconds: float,
    latency_steps: int = 0,
) -> Reported:
    """Series that a push feed reports: it updates when |p / last - 1| >= threshold or its report is a heartbeat old.

    The first price is reported at time 0. Deviation is that of the price which the feed sees, `latency_steps` old.

    Args:
      prices: true prices, one step apart.
      threshold: relative deviation, e.g. 0.005.
      heartbeat_seconds: age of a report at which it is renewed.
      step_seconds: time between prices.
      latency_steps: age of the price that the feed sees, in steps.

    Pathwise gradient: prices, through the last update; none of the rule's numbers. Thresholds: Chainlink ETH/USD
    0.5 % and 3600 s.
    """
    prices = jnp.asarray(prices)
    seen = jnp.concatenate([jnp.repeat(prices[:1], latency_steps, axis=0), prices[: prices.shape[0] - latency_steps]])

    def update(state, price):
        last, age, count = state
        age = age + step_seconds
        # A multiple of the step that rounding leaves below the heartbeat is a heartbeat.
        is_new = (jnp.abs(price / last - 1.0) >= threshold) | (age >= heartbeat_seconds * (1.0 - 1e-6))
        last = jnp.where(is_new, price, last)
        state = last, jnp.where(is_new, 0.0, age), count + jnp.where(is_new, 1.0, 0.0)
        return state, last

    zero = jnp.zeros_like(prices[0])
    (_, _, count), rest = lax.scan(update, (seen[0], zero, zero), seen[1:])
    return Reported(jnp.concatenate([seen[:1], rest]), count)


def relative_error(reported: Array, prices: Array) -> Array:
    """Reported over true price, minus 1."""
    return reported / prices - 1.0


def capped_ratio(ratio: Array, *, start: Array, growth_per_year: Array, years: Array) -> Array:
    """Exchange rate of a staked token that an oracle reports at most: it may not grow faster than a cap.

    Args:
      ratio: true exchange rate to the underlying.
      start: exchange rate at the reference time.
      growth_per_year: largest simple growth of `start` per year.
      years: since the reference time.

    Source: bgd-labs/aave-capo, PriceCapAdapterBase.
    """
    return jnp.minimum(ratio, start * (1.0 + growth_per_year * years))
