r"""Isolated lending markets (Morpho Blue): one collateral, one debt, one liquidation threshold, no close factor.

Healthy while collateral times LLTV >= debt. A liquidator may repay all of it and takes collateral worth the repayment
times the incentive factor $\mathrm{LIF} = \min(1.15,\ 1/(1 - 0.3(1 - \mathrm{LLTV})))$. When no collateral is left,
what is left of the debt is written off against the suppliers at once. Sources: morpho-org/morpho-blue, Morpho.sol and
ConstantsLib.sol; docs.morpho.org, "Liquidation".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import Rows, rounded
from qpo_sim.types import Array
from qpo_sim.venue.health_factor import (
    LoanLiquidation,
    check_fraction,
    liquidate_pair,
    log_weighted_ratio,
    market_rows,
    one_of_each,
)

CURSOR = 0.3
MAX_INCENTIVE = 1.15
# Thresholds that governance has enabled; the list is not confirmed by a published table.
ENABLED_LLTV = (0.385, 0.625, 0.77, 0.86, 0.915, 0.945, 0.965, 0.98)


class MorphoParams(NamedTuple):
    """Parameters of a position: threshold and incentive factor of its market, share of the debt that a call repays."""

    threshold: Float[Array, " 1"]
    incentive: Float[Array, ""]
    close_share: Float[Array, ""]


def incentive_factor(lltv: Array) -> Array:
    """Collateral a liquidator gets per unit repaid, min(1.15, 1 / (1 - 0.3 (1 - LLTV)))."""
    return jnp.minimum(MAX_INCENTIVE, 1.0 / (1.0 - CURSOR * (1.0 - lltv)))


def break_even_ltv(lltv: Array) -> Array:
    """Loan-to-value above which a liquidation leaves bad debt, 1 / LIF."""
    return 1.0 / incentive_factor(lltv)


def liquidation_price(amount: Array, lltv: Array, debt: Array) -> Array:
    """Price of the collateral below which the position may be liquidated, in units of the debt."""
    return debt / (amount * lltv)


def log_health(params: MorphoParams, collateral_values: Rows, debt_values: Rows) -> Array:
    """Log of collateral times LLTV over debt, <= 0 where liquidatable (on chain: < 0).

    Pathwise gradient: threshold, values.
    """
    return log_weighted_ratio(params.threshold, collateral_values, debt_values)


def liquidate(
    params: MorphoParams,
    collateral_values: Rows,
    debt_values: Rows,
    collateral_market: Rows | None = None,
    debt_market: Rows | None = None,
) -> LoanLiquidation:
    """One call that repays `close_share` of the debt, or as much as the collateral is worth with the incentive.

    Pathwise gradient: values, incentive, close_share.
    """
    collateral, debt = collateral_values[0], debt_values[0]
    held, owed = market_rows(collateral_market, collateral_values)[0], market_rows(debt_market, debt_values)[0]
    call = liquidate_pair(collateral, debt, params.close_share * debt, bonus=params.incentive - 1.0)
    bad = jnp.where(call.seized >= collateral, debt - call.repaid, 0.0)
    zero = jnp.zeros_like(bad)
    gain = call.seized * held - call.repaid * owed
    return LoanLiquidation((call.repaid,), (call.seized,), (bad,), zero, gain, zero)


@dataclass(frozen=True)
class Morpho:
    """Isolated lending markets.

    Attributes:
      lltv: liquidation loan-to-value by market, named "collateral/debt"; `default` serves the others.
      close_share: share of the debt that a liquidator repays, 1 for all that the collateral covers.
      rate_at_target: of the adaptive curve when a run starts, per year.
      borrow_rate_per_year: continuously compounded, on the debt.
      name: for messages and reports.
      source: where the parameters come from.
      as_of: date of the parameters.
    """

    lltv: Mapping[str, float]
    close_share: float = 1.0
    rate_at_target: float = 0.04
    borrow_rate_per_year: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""

    log_health = staticmethod(log_health)
    liquidate = staticmethod(liquidate)

    def __post_init__(self) -> None:
        """Checks ranges once."""
        for market, value in self.lltv.items():
            if market != "default" and len(str(market).split("/")) != 2:
                raise InputError(f"venue {self.name}: lltv.{market} must be named collateral/debt, e.g. WSTETH/USDC.")
            check_fraction(self.name, f"lltv.{market}", value, above=True)
            if not any(abs(value - enabled) < 1e-9 for enabled in ENABLED_LLTV):
                raise InputError(
                    f"venue {self.name}: lltv.{market} is {value}; markets can only be made with one of "
                    f"{', '.join(f'{v:g}' for v in ENABLED_LLTV)}."
                )
        if not 0.0 < self.close_share <= 1.0:
            raise InputError(f"venue {self.name}: close_share is {self.close_share}, it must lie in (0, 1].")
        check_fraction(self.name, "rate_at_target", self.rate_at_target, low=0.001, high=2.0)

    def market(self, collateral: str, debt: str) -> float:
        """LLTV of a market.

        Raises:
          InputError: the venue lists neither the market nor a default.
        """
        for key in (f"{collateral}/{debt}", "default"):
            if key in self.lltv:
                return float(self.lltv[key])
        raise InputError(f"venue {self.name} has no market {collateral}/{debt} (lltv lists {', '.join(self.lltv)}).")

    def params(
        self, collateral: Sequence[str], debt: Sequence[str], *, capital: float = 1.0, dtype: Any = jnp.float32
    ) -> MorphoParams:
        """Arrays of a position (see `HealthFactor.params`; nothing here depends on the capital).

        Raises:
          InputError: several collaterals or debts, or no such market.
        """
        lltv = self.market(*one_of_each(self.name, collateral, debt, "market"))
        incentive = min(MAX_INCENTIVE, 1.0 / (1.0 - CURSOR * (1.0 - lltv)))
        return MorphoParams(rounded([lltv], dtype), rounded(incentive, dtype), rounded(self.close_share, dtype))
