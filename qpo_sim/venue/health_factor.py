"""Health-factor lending (Aave v3): when a loan may be liquidated, how much, and what it costs the borrower.

Health factor = sum(collateral value x liquidation threshold) / debt value; below 1 anyone may repay part of the debt
and take collateral worth the repayment plus a bonus. Source: aave-v3-origin, GenericLogic and LiquidationLogic (from
v3.3 on).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qpo_sim.errors import InputError
from qpo_sim.types import Array


class LoanLiquidation(NamedTuple):
    """Outcome of one liquidation call; all in the account's currency.

    `repaid` leaves the debt, `seized` leaves the collateral (repaid plus bonus), `bad_debt` is what is written off when
    the collateral is exhausted.
    """

    repaid: Array
    seized: Array
    bad_debt: Array


def health_factor(weighted_collateral: Array, debt: Array) -> Array:
    """Threshold-weighted collateral over debt."""
    return weighted_collateral / debt


def liquidate(
    collateral: Array,
    debt: Array,
    health: Array,
    *,
    bonus: Array,
    close_factor: Array,
    full_close_health: Array,
    small_position: Array,
) -> LoanLiquidation:
    """One liquidation call that repays as much as the rules allow.

    Half of the debt (`close_factor`) while the health factor exceeds `full_close_health` (0.95) and both sides are at
    least `small_position` (2000 USD); else all of it. Collateral that does not cover the repayment plus bonus is seized
    whole and the rest of the debt becomes bad debt of the pool.

    Args:
      collateral: value of the collateral.
      debt: value of the debt.
      health: health factor at the liquidation.
      bonus: liquidation bonus, e.g. 0.05.
      close_factor: share of the debt that may be repaid in the ordinary case.
      full_close_health: health factor at or below which all of it may be repaid.
      small_position: value below which all of it may be repaid.
    """
    xp = collateral.__array_namespace__() if hasattr(collateral, "__array_namespace__") else np
    ordinary = (health > full_close_health) & (collateral >= small_position) & (debt >= small_position)
    wanted = debt * xp.where(ordinary, close_factor, 1.0)
    seized = xp.minimum(wanted * (1.0 + bonus), collateral)
    exhausted = wanted * (1.0 + bonus) >= collateral
    repaid = xp.where(exhausted, collateral / (1.0 + bonus), wanted)
    return LoanLiquidation(repaid, seized, xp.where(exhausted, debt - repaid, 0.0 * debt))


@dataclass(frozen=True)
class HealthFactor:
    """A lending venue: thresholds and bonuses per asset, close-factor rule and rates.

    Attributes:
      liquidation_threshold: per asset, `default` serves the others.
      liquidation_bonus: per asset (0.05 = 5 %), `default` serves the others.
      ltv: borrowing limit per asset, checked when a book is built.
      close_factor: share of the debt a liquidation may repay.
      full_close_health_factor: at or below it all debt may be repaid.
      small_position_usd: positions below may be closed whole.
      borrow_rate_per_year: continuously compounded, on the debt.
      name: for messages and reports.
      source: where the parameters come from.
      as_of: date of the parameters.
    """

    liquidation_threshold: Mapping[str, float]
    liquidation_bonus: Mapping[str, float]
    ltv: Mapping[str, float]
    close_factor: float = 0.5
    full_close_health_factor: float = 0.95
    small_position_usd: float = 2000.0
    borrow_rate_per_year: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""

    def __post_init__(self) -> None:
        """Checks ranges once."""
        for key in ("liquidation_threshold", "ltv"):
            for asset, value in getattr(self, key).items():
                if not 0.0 < value < 1.0:
                    raise InputError(f"venue {self.name}: {key}.{asset} is {value}, it must lie in (0, 1).")
        for asset, value in self.liquidation_bonus.items():
            threshold = self.value("liquidation_threshold", asset)
            if not (value >= 0.0 and threshold * (1.0 + value) < 1.0):
                raise InputError(
                    f"venue {self.name}: liquidation_bonus.{asset} is {value}; it must be >= 0 and threshold x (1 + "
                    f"bonus) below 1 (threshold {threshold}), else a liquidation at health factor 1 cannot be covered."
                )
        if not 0.0 < self.close_factor <= 1.0:
            raise InputError(f"venue {self.name}: close_factor is {self.close_factor}, it must lie in (0, 1].")

    def value(self, key: str, asset: str) -> float:
        """Parameter `key` of an asset, or its default.

        Raises:
          InputError: the venue lists neither.
        """
        table = getattr(self, key)
        if asset in table:
            return float(table[asset])
        if "default" in table:
            return float(table["default"])
        raise InputError(f"venue {self.name} does not accept {asset} as collateral ({key} lists {', '.join(table)}).")
