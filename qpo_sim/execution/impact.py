r"""What a trade costs on an order book: price impact, spread and fee, with depth that follows the market.

Impacts are relative price moves against the trader, >= 0, for sizes of either sign. Depth m is the multiple of normal
depth (1 calm, 0.3 turbulent, 0.01 to 0.05 in a crash, inferred): volume V acts as m V and spreads grow by m^(-1/2).

Donier & Bonart (2015), A million metaorder analysis of market impact on the Bitcoin: the square-root law holds over
four decades of size and during the whole trajectory. Its prefactor of about 0.9 (0.5 to 1.5) is not confirmed by a
published table.
"""

from typing import NamedTuple

import jax.numpy as jnp

from qpo_sim.numerics import safe_sqrt
from qpo_sim.types import Array

PREFACTOR = 0.9
# Mean over an order of a square root that ends at 1.
AVERAGE_OF_PEAK = 2.0 / 3.0
# Almgren, Thum, Hauptmann & Li (2005), Direct estimation of equity market impact; not confirmed by a second source.
PERMANENT_COEFFICIENT = 0.314
TEMPORARY_COEFFICIENT = 0.142
TEMPORARY_EXPONENT = 0.6


class TradeCost(NamedTuple):
    """Cost of a trade by cause, in money, each >= 0."""

    fee: Array
    spread: Array
    impact: Array

    @property
    def total(self) -> Array:
        """Sum of the causes."""
        return self.fee + self.spread + self.impact


class Fill(NamedTuple):
    """Part of an order that is filled and what is left of it, both with the sign of the order."""

    filled: Array
    left: Array


def square_root_peak(
    quantity: Array, volume: Array, volatility: Array, *, prefactor: Array = PREFACTOR, depth: Array = 1.0
) -> Array:
    r"""Impact at the end of an order, $Y \sigma_D \sqrt{|Q|/(m V_D)}$.

    Args:
      quantity: Q of the whole order, either sign, in the unit of `volume`.
      volume: V_D > 0, traded per day.
      volatility: sigma_D of log returns per square root of a day.
      prefactor: Y.
      depth: m > 0.

    Pathwise gradient: all arguments; taken as zero in an empty order.
    """
    return prefactor * volatility * safe_sqrt(jnp.abs(quantity) / (volume * depth))


def square_root_average(
    quantity: Array, volume: Array, volatility: Array, *, prefactor: Array = PREFACTOR, depth: Array = 1.0
) -> Array:
    """Average cost of an order over its arrival price, 2/3 of the peak; arguments as in `square_root_peak`.

    Pathwise gradient: all arguments; taken as zero in an empty order.
    """
    return AVERAGE_OF_PEAK * square_root_peak(quantity, volume, volatility, prefactor=prefactor, depth=depth)


def square_root_after(peak: Array, elapsed: Array) -> Array:
    r"""Impact left after the end of an order, $I (\sqrt{1+z} - \sqrt z)$, z the time since in durations of the order.

    The propagator form that belongs to the square root of time (Gatheral 2010, No-dynamic-arbitrage and market impact,
    decay exponent 1/2): 2/3 after a sixth of the duration, then slowly to 0.

    Pathwise gradient: peak, elapsed where it is above 0.
    """
    return peak / (jnp.sqrt(1.0 + elapsed) + safe_sqrt(elapsed))


def linear_peak(quantity: Array, depth_per_log_move: Array) -> Array:
    """Impact at the end of an order on a book of constant depth, |Q|/D (Kyle 1985); its average cost is half of it.

    Args:
      quantity: Q, either sign.
      depth_per_log_move: D > 0, quantity that moves the log price by 1.

    Pathwise gradient: all arguments.
    """
    return jnp.abs(quantity) / depth_per_log_move


def linear_average(quantity: Array, depth_per_log_move: Array) -> Array:
    """Average cost of an order on a book of constant depth, half the peak; arguments as in `linear_peak`.

    Pathwise gradient: all arguments.
    """
    return 0.5 * linear_peak(quantity, depth_per_log_move)


def almgren_average(
    quantity: Array,
    volume: Array,
    volatility: Array,
    duration: Array,
    shares_outstanding: Array,
    *,
    permanent: Array = PERMANENT_COEFFICIENT,
    temporary: Array = TEMPORARY_COEFFICIENT,
    exponent: Array = TEMPORARY_EXPONENT,
) -> Array:
    r"""Average cost with permanent and temporary impact,
    $\tfrac12 \gamma \sigma (|Q|/V)(\Theta/V)^{1/4} + \eta \sigma |Q/(V T)|^{3/5}$.

    Fitted to US equities: Almgren, Thum, Hauptmann & Li (2005).

    Args:
      quantity: Q, either sign.
      volume: V > 0 per day.
      volatility: sigma per square root of a day.
      duration: T > 0 of the order in days.
      shares_outstanding: Theta > 0, in the unit of the quantity.
      permanent: gamma.
      temporary: eta.
      exponent: of the temporary impact.

    Pathwise gradient: all arguments; taken as zero in an empty order.
    """  # noqa: D205
    size = jnp.abs(quantity) / volume
    rate = size / duration
    trades = rate > 0.0
    power = jnp.where(trades, jnp.exp(exponent * jnp.log(jnp.where(trades, rate, 1.0))), 0.0)
    lasting = permanent * volatility * size * jnp.sqrt(jnp.sqrt(shares_outstanding / volume))
    return 0.5 * lasting + temporary * volatility * power


def stressed_half_spread(half_spread: Array, depth: Array) -> Array:
    r"""Half the quoted spread at depth m, $s\,m^{-1/2}$.

    Pathwise gradient: all arguments.
    """
    return half_spread / jnp.sqrt(depth)


def trade_cost(
    notional: Array,
    *,
    fee: Array,
    half_spread: Array,
    volume: Array,
    volatility: Array,
    depth: Array = 1.0,
    prefactor: Array = PREFACTOR,
) -> TradeCost:
    """Cost of a trade by cause: taker fee, half spread at the present depth, average square-root impact.

    Args:
      notional: traded, either sign, in money.
      fee: of the notional.
      half_spread: half the quoted spread at normal depth, relative to the price.
      volume: per day in money, at normal depth, > 0.
      volatility: of log returns per square root of a day.
      depth: m > 0.
      prefactor: Y of the square-root law.

    Pathwise gradient: all arguments but the sign of a trade of nothing.
    """
    size = jnp.abs(notional)
    impact = square_root_average(notional, volume, volatility, prefactor=prefactor, depth=depth)
    return TradeCost(fee * size, stressed_half_spread(half_spread, depth) * size, impact * size)


def fill_within(quantity: Array, volume: Array, participation: Array) -> Fill:
    """Order cut to a share of the volume; what is left may be carried to the next step.

    Args:
      quantity: wanted, either sign.
      volume: of the step, at its depth.
      participation: greatest share of the volume.

    Pathwise gradient: all arguments (almost everywhere).
    """
    limit = participation * volume
    filled = jnp.clip(quantity, -limit, limit)
    return Fill(filled, quantity - filled)
