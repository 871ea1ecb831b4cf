r"""Tiered maintenance margin of perpetual venues.

Maintenance margin is a marginal ("tax bracket") function of the notional V: $MM(V) = r_n V - c_n$ in tier n with
$c_0 = 0$, $c_n = c_{n-1} + f_n (r_n - r_{n-1})$ (f: lower bound of the tier), which makes it continuous. Binance USDT-M
futures publish (f, r, c); Bybit calls c the maintenance margin deduction; Hyperliquid uses the same recursion with
$r = 1/(2\,\text{max leverage})$.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.types import Array


class TierSchedule(NamedTuple):
    """Tiers of one contract: lower bounds of the notional, maintenance rates and deductions."""

    floor: Float[Array, " tiers"]
    rate: Float[Array, " tiers"]
    deduction: Float[Array, " tiers"]


def tier_schedule(tiers: Sequence[Sequence[float]], *, name: str = "tiers") -> TierSchedule:
    """Schedule from rows (notional floor, maintenance margin rate, ...); further columns are ignored.

    Raises:
      InputError: first floor not 0, floors not increasing, rates not increasing or outside (0, 1).
    """
    if len(tiers) == 0 or any(len(row) < 2 for row in tiers):
        raise InputError(f"{name} must be a list of [notional floor, maintenance margin rate, max leverage] rows.")
    floor = np.array([row[0] for row in tiers], np.float64)
    rate = np.array([row[1] for row in tiers], np.float64)
    if floor[0] != 0.0:
        raise InputError(
            f"{name}: the first tier starts at {floor[0]:g}, it must start at 0 so that no notional is in a gap."
        )
    for n in range(1, floor.size):
        if not floor[n] > floor[n - 1]:
            raise InputError(
                f"{name}: tier {n + 1} starts at {floor[n]:g}, it must start above tier {n} ({floor[n - 1]:g})."
            )
        if not rate[n] > rate[n - 1]:
            raise InputError(
                f"{name}: tier {n + 1} has rate {rate[n]:g}, it must exceed that of tier {n} ({rate[n - 1]:g})."
            )
    if not (rate[0] > 0.0 and rate[-1] < 1.0):
        raise InputError(f"{name}: maintenance margin rates must lie in (0, 1), got {rate.tolist()}.")
    deduction = np.concatenate([[0.0], np.cumsum(floor[1:] * np.diff(rate))])
    return TierSchedule(floor, rate, deduction)


def active_tier(schedule: TierSchedule, notional: Array) -> tuple[Array, Array]:
    """Rate and deduction of the tier that holds the notional (>= 0); leading axis of the schedule is the tier.

    A sum over tiers instead of a search: no gather, vectorises over paths. Gradient of both: zero.
    """
    rate, deduction = schedule.rate[0], schedule.deduction[0]
    for n in range(1, schedule.rate.shape[0]):
        above = (notional > schedule.floor[n]) * 1.0
        rate = rate + above * (schedule.rate[n] - schedule.rate[n - 1])
        deduction = deduction + above * (schedule.deduction[n] - schedule.deduction[n - 1])
    return rate, deduction


def maintenance_margin(schedule: TierSchedule, notional: Array) -> Array:
    """Maintenance margin of a notional (sign ignored), same currency as the schedule."""
    size = abs(notional)
    rate, deduction = active_tier(schedule, size)
    return rate * size - deduction


def liquidation_price(
    schedule: TierSchedule,
    *,
    quantity: float,
    entry: float,
    margin: float,
    other_maintenance: float = 0.0,
    other_profit: float = 0.0,
) -> float | None:
    """Price at which a linear position is liquidated, the others of its account held fixed; None if there is none.

    The root of margin + quantity (P - entry) + other_profit = MM(|quantity| P) + other_maintenance. Maintenance is
    continuous with slope below one, so the root is unique and lies in the tier that contains it.

    Args:
      schedule: tiers in the margin currency.
      quantity: contracts in coins, negative for a short.
      entry: entry price.
      margin: wallet balance of the account (cross) or isolated margin.
      other_maintenance: maintenance margin of the account's other positions.
      other_profit: unrealised profit of the account's other positions.

    Source: Binance support, "How to calculate liquidation price of USDT-M futures contracts".
    """
    upper = np.append(np.asarray(schedule.floor)[1:], np.inf)
    for low, high, rate, deduction in zip(schedule.floor, upper, schedule.rate, schedule.deduction, strict=True):
        slope = abs(quantity) * rate - quantity
        if slope == 0.0:
            continue
        price = (margin - other_maintenance + other_profit + deduction - quantity * entry) / slope
        if price > 0.0 and low <= abs(quantity) * price <= high:
            return float(price)
    return None


def bankruptcy_price(*, quantity: float, entry: float, margin: float) -> float:
    """Price at which the equity of an isolated position is zero, entry - margin / quantity (quantity signed)."""
    return entry - margin / quantity


@dataclass(frozen=True)
class TieredMargin:
    """A perpetual venue: tiers per asset, liquidation costs and funding.

    Attributes:
      tiers: rows (notional floor, maintenance margin rate, max leverage) in USD per asset; `default` serves the others.
      liquidation_fee_rate: clearance fee on the closed notional.
      liquidation_slippage: share of the notional lost when the position is closed into the book.
      funding_rate: paid by longs per interval on the mark notional.
      funding_interval_hours: hours between funding stamps.
      name: for messages and reports.
      source: where the table comes from.
      as_of: date of the table.
    """

    tiers: Mapping[str, Sequence[Sequence[float]]]
    liquidation_fee_rate: float = 0.0
    liquidation_slippage: float = 0.0
    funding_rate: float = 0.0
    funding_interval_hours: float = 8.0
    taker_fee_rate: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""
    schedules: dict[str, TierSchedule] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every table once."""
        for asset, rows in self.tiers.items():
            self.schedules[asset] = tier_schedule(rows, name=f"venue {self.name}: tiers.{asset}")
        for key in ("liquidation_fee_rate", "liquidation_slippage"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise InputError(f"venue {self.name}: {key} is {value}, it must lie in [0, 1).")
        if not self.funding_interval_hours > 0.0:
            raise InputError(
                f"venue {self.name}: funding_interval_hours is {self.funding_interval_hours}, it must be positive."
            )

    def schedule(self, asset: str) -> TierSchedule:
        """Tier schedule of an asset.

        Raises:
          InputError: neither the asset nor `default` has a table.
        """
        if asset in self.schedules:
            return self.schedules[asset]
        if "default" in self.schedules:
            return self.schedules["default"]
        raise InputError(
            f"venue {self.name} has no tier table for {asset} and no default; it lists {', '.join(self.schedules)}."
        )

    def max_leverage(self, asset: str, notional: float) -> float | None:
        """Leverage the venue allows at this notional, None when the table does not say."""
        rows = self.tiers.get(asset, self.tiers.get("default", ()))
        allowed = [row for row in rows if row[0] <= abs(notional)]
        return float(allowed[-1][2]) if allowed and len(allowed[-1]) > 2 else None
