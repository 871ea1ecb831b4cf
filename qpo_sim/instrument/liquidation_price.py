r"""Liquidation and bankruptcy prices of perpetual positions in every convention, for reports and tests.

All solve equity = maintenance margin. As a function of the price of a linear contract, or of $u = 1/P$ for an inverse
one, equity is linear and maintenance convex, so the safe prices are an interval (`venue.tiered_margin.price_band`) with
exact ends. Scalars in float64; an account of many positions has no liquidation price, it has the factor by which all
prices may move together.
"""

from collections.abc import Sequence
from math import inf, log
from typing import NamedTuple

from qpo_sim.errors import InputError
from qpo_sim.types import Array
from qpo_sim.venue.tiered_margin import PriceBand, TierSchedule, maintenance_margin, one_rate, price_band


class Leg(NamedTuple):
    """Position of a contract: `size` in coins (linear) or USD (inverse), short below 0; entry price; its tiers.

    Tiers are by notional: in quote currency for linear, in coins for inverse contracts.
    """

    size: float
    entry: float
    schedule: TierSchedule


def linear_band(
    legs: Sequence[Leg],
    *,
    margin: float,
    other_maintenance: float = 0.0,
    other_profit: float = 0.0,
    liquidation_fee_rate: float = 0.0,
    taker_fee_rate: float = 0.0,
) -> PriceBand:
    """Safe prices of one linear contract; two legs of opposite signs are a hedge-mode position with shared prices.

    Maintenance is the sum over the legs, each in its own tier. A long has a lower end only, a short an upper one; a
    hedge can have both, as its maintenance grows with the price while its profit stands still.

    Args:
      legs: the positions.
      margin: wallet balance (cross) or isolated margin.
      other_maintenance: maintenance margin of the account's other positions.
      other_profit: unrealised profit of the account's other positions.
      liquidation_fee_rate: fee on the notional at the liquidation price that counts as maintenance (OKX).
      taker_fee_rate: fee for closing at the bankruptcy price that counts as maintenance (Bybit); one leg only.

    Raises:
      InputError: a taker fee with several legs, whose bankruptcy price would not be one price.

    Source: Binance support, "How to calculate liquidation price of USDT-M futures contracts".
    """
    constant = margin - other_maintenance + other_profit - sum(leg.size * leg.entry for leg in legs)
    if taker_fee_rate > 0.0:
        _check_one_leg(legs)
        bankruptcy = linear_bankruptcy(legs[0], margin=margin, taker_fee_rate=taker_fee_rate)
        constant -= taker_fee_rate * abs(legs[0].size) * bankruptcy
    pairs = [(leg.size, leg.schedule) for leg in legs]
    return price_band(pairs, constant=constant, liquidation_fee_rate=liquidation_fee_rate)


def inverse_band(
    legs: Sequence[Leg],
    *,
    margin: float,
    other_maintenance: float = 0.0,
    other_profit: float = 0.0,
    maintenance_on: str = "liquidation",
    liquidation_fee_rate: float = 0.0,
    taker_fee_rate: float = 0.0,
) -> PriceBand:
    r"""Safe prices of one inverse contract.

    The ends solve $W + \sum N_j (1/E_j - 1/P) = \sum MM_j$. With maintenance on the value at the liquidation price
    (Binance COIN-M, OKX, Deribit) $MM = r N/P - c$; with maintenance on the entry value (Bybit) $MM = r N/E - c$ does
    not move. For one leg of B contracts of M USD the first is $B M (r + s) / (W + c + s B M / E)$, s the side.

    Args:
      legs: the positions, sizes in USD.
      margin: wallet balance (cross) or isolated margin, in coins.
      other_maintenance: maintenance margin of the account's other positions, in coins.
      other_profit: unrealised profit of the account's other positions, in coins.
      maintenance_on: `liquidation` or `entry`.
      liquidation_fee_rate: fee on the value at the liquidation price that counts as maintenance.
      taker_fee_rate: fee for closing at the bankruptcy price that counts as maintenance; one leg only.

    Raises:
      InputError: an unknown `maintenance_on`, or a taker fee with several legs.

    Sources: Binance support, "How to calculate liquidation price of COIN-M futures contracts"; Bybit help centre,
    "Liquidation price calculation under isolated mode (unified trading account)" and 360039261334.
    """
    if maintenance_on not in ("liquidation", "entry"):
        raise InputError(f"maintenance_on is {maintenance_on!r}; it must be `liquidation` or `entry`.")
    constant = margin - other_maintenance + other_profit + sum(leg.size / leg.entry for leg in legs)
    if taker_fee_rate > 0.0:
        _check_one_leg(legs)
        bankruptcy = inverse_bankruptcy(legs[0], margin=margin, taker_fee_rate=taker_fee_rate)
        constant -= taker_fee_rate * abs(legs[0].size) / bankruptcy
    pairs = [(-leg.size, leg.schedule) for leg in legs]
    if maintenance_on == "entry":
        constant -= sum(float(maintenance_margin(leg.schedule, leg.size / leg.entry)) for leg in legs)
        pairs = [(size, one_rate(0.0)) for size, _ in pairs]
    # A position of N USD is one of -N units of 1/P.
    coins = price_band(pairs, constant=constant, liquidation_fee_rate=liquidation_fee_rate)
    if coins.lower == inf:
        return coins
    return PriceBand(_reciprocal(coins.upper), _reciprocal(coins.lower))


def joint_factor_band(
    legs: Sequence[Leg], prices: Sequence[float], *, margin: float, liquidation_fee_rate: float = 0.0
) -> PriceBand:
    """Factors on all prices at once between which a cross account of linear positions is safe.

    Args:
      legs: one position per contract.
      prices: their prices, in the order of the legs.
      margin: wallet balance.
      liquidation_fee_rate: see `linear_band`.
    """
    constant = margin - sum(leg.size * leg.entry for leg in legs)
    pairs = [(leg.size * price, leg.schedule) for leg, price in zip(legs, prices, strict=True)]
    return price_band(pairs, constant=constant, liquidation_fee_rate=liquidation_fee_rate)


def price_from_mark(price: Array, *, side: Array, size: Array, margin_available: Array, rate: Array) -> Array:
    r"""Liquidation price seen from the current price, $P - s\,A / q / (1 - r s)$.

    The root of `linear_band` while the position stays in its tier; at or below 0 there is none. Elementwise.

    Args:
      price: mark price P.
      side: s, 1 long, -1 short.
      size: q in coins, positive.
      margin_available: A, equity (cross) or isolated margin with profit, less the maintenance margin at P.
      rate: r, maintenance margin rate of the tier (1 / maintenance leverage).

    Source: Hyperliquid documentation, "Liquidations".
    """
    return price - side * margin_available / size / (1.0 - rate * side)


def log_distance(leverage: float, rate: float, side: int) -> float:
    r"""Log move against an isolated linear position of one tier that liquidates it.

    Long $-\ln[(1 - 1/l)/(1 - r)]$, infinite for l <= 1; short $\ln[(1 + 1/l)/(1 + r)]$.

    Args:
      leverage: l, notional over margin at entry.
      rate: r, maintenance margin rate.
      side: 1 long, -1 short.
    """
    left = 1.0 - side / leverage
    return side * -log(left / (1.0 - side * rate)) if left > 0.0 else inf


def linear_bankruptcy(leg: Leg, *, margin: float, taker_fee_rate: float = 0.0) -> float:
    """Price at which closing a linear position leaves nothing, taker fee on its value there paid; 0 if there is none.

    E - margin / size without the fee.
    """
    price = (leg.size * leg.entry - margin) / (leg.size - taker_fee_rate * abs(leg.size))
    return max(price, 0.0)


def inverse_bankruptcy(leg: Leg, *, margin: float, taker_fee_rate: float = 0.0) -> float:
    """Price at which closing an inverse position leaves nothing; infinite if there is none.

    The root of W + N (1/E - 1/P) - t |N| / P = 0, where W is in coins. A short with W >= |N| / E has none.
    """
    coins = margin + leg.size / leg.entry
    price = (leg.size + taker_fee_rate * abs(leg.size)) / coins if coins != 0.0 else inf
    return price if price > 0.0 else inf


def _check_one_leg(legs: Sequence[Leg]) -> None:
    if len(legs) != 1:
        raise InputError(f"taker_fee_rate is given with {len(legs)} legs; the fee at the bankruptcy price needs one.")


def _reciprocal(value: float) -> float:
    return inf if value == 0.0 else 1.0 / value
