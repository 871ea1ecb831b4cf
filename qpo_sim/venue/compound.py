r"""Compound III (Comet): one base asset is borrowed, a liquidation absorbs the whole account.

Liquidatable when $\sum C_i\,\mathrm{liquidateCF}_i < D$; new debt is limited by borrowCF. Absorption credits
$\sum C_i\,\mathrm{liquidationFactor}_i$ against the debt: an excess becomes a balance of the borrower in the base
asset, a shortage is paid by the reserves. The protocol owns the collateral and, while its reserves are below their
target, offers it at a discount of storeFrontPriceFactor (1 - liquidationFactor). Source: compound-finance/comet,
Comet.sol (absorbInternal, quoteCollateral).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.numerics import Rows, rounded
from qpo_sim.types import Array
from qpo_sim.venue.health_factor import (
    LoanLiquidation,
    check_coin,
    check_curve,
    check_fraction,
    log_weighted_ratio,
    market_rows,
    total,
    weighted_sum,
)


class CompoundParams(NamedTuple):
    """Parameters of an account, by collateral; `discount` is that of the storefront."""

    borrow_factor: Float[Array, " collaterals"]
    threshold: Float[Array, " collaterals"]
    liquidation_factor: Float[Array, " collaterals"]
    discount: Float[Array, " collaterals"]


class Absorption(NamedTuple):
    """Books of an absorption in units of the base asset; the protocol's profit counts the resale.

    `user_credit` goes to the borrower, `reserve_loss` is what the credit falls short of the debt, `sale_proceeds` what
    buyers pay for the collateral.
    """

    user_credit: Array
    reserve_loss: Array
    sale_proceeds: Array
    protocol_pnl: Array


def borrow_limit(borrow_factor: Any, collateral_values: Rows) -> Array:
    """Most that may be owed after borrowing, sum of value times borrowCF."""
    return weighted_sum(borrow_factor, collateral_values)


def liquidation_limit(liquidate_factor: Any, collateral_values: Rows) -> Array:
    """Debt above which the account may be absorbed, sum of value times liquidateCF."""
    return weighted_sum(liquidate_factor, collateral_values)


def discount(liquidation_factor: Array, store_front: Array) -> Array:
    """Discount on the oracle's price at which the protocol sells: storeFrontPriceFactor (1 - liquidationFactor)."""
    return store_front * (1.0 - liquidation_factor)


def discounted_price(price: Array, liquidation_factor: Array, store_front: Array) -> Array:
    """Price at which the protocol sells absorbed collateral."""
    return price * (1.0 - discount(liquidation_factor, store_front))


def absorb(collateral_values: Rows, debt: Array, *, liquidation_factor: Any, store_front: Array) -> Absorption:
    """Books of the protocol when an account is absorbed and its collateral sold at the storefront's price at once.

    Args:
      collateral_values: at the oracle's prices.
      debt: of the account, in the base asset.
      liquidation_factor: credited per unit of collateral value, per collateral.
      store_front: storeFrontPriceFactor.
    """
    credited = weighted_sum(liquidation_factor, collateral_values)
    proceeds = sum(
        collateral_values[i] * (1.0 - discount(liquidation_factor[i], store_front))
        for i in range(len(collateral_values))
    )
    credit = jnp.maximum(credited - debt, 0.0)
    return Absorption(credit, jnp.maximum(debt - credited, 0.0), proceeds, proceeds - debt - credit)


def log_health(params: CompoundParams, collateral_values: Rows, debt_values: Rows) -> Array:
    """Log of liquidation limit over debt, <= 0 where liquidatable (on chain: < 0).

    Pathwise gradient: threshold, values.
    """
    return log_weighted_ratio(params.threshold, collateral_values, debt_values)


def liquidate(
    params: CompoundParams,
    collateral_values: Rows,
    debt_values: Rows,
    collateral_market: Rows | None = None,
    debt_market: Rows | None = None,
) -> LoanLiquidation:
    """Absorption of the account. Buyers take the collateral where the storefront is below the market.

    What is dearer than the market stays with the protocol, at its market value.

    Pathwise gradient: values, liquidation_factor, discount.
    """
    debt = debt_values[0]
    held, owed = market_rows(collateral_market, collateral_values), market_rows(debt_market, debt_values)[0]
    seized = tuple(collateral_values[i] for i in range(len(collateral_values)))
    credited = weighted_sum(params.liquidation_factor, collateral_values)
    bad, credit = jnp.maximum(debt - credited, 0.0), jnp.maximum(credited - debt, 0.0)
    asked = [(1.0 - params.discount[i]) * owed for i in range(len(seized))]
    buyers = total([s * jnp.maximum(m - a, 0.0) for s, m, a in zip(seized, held, asked, strict=True)])
    proceeds = total([s * jnp.minimum(m, a) for s, m, a in zip(seized, held, asked, strict=True)])
    repaid = debt - bad
    return LoanLiquidation((repaid,), seized, (bad,), credit * owed, buyers, proceeds - (repaid + credit) * owed)


CURVE = ("kink", "base", "low", "high")
FACTORS = ("borrow", "liquidate", "liquidation_factor")


@dataclass(frozen=True)
class Compound:
    """A Comet market.

    Attributes:
      base: the asset that is borrowed.
      factors: `{borrow, liquidate, liquidation_factor}` per collateral; `default` serves the others.
      store_front: share of the liquidation penalty passed on to buyers.
      borrow_curve: `{kink, base, low, high}`, slopes per unit of utilisation, per year.
      supply_curve: the same for suppliers.
      borrow_rate_per_year: continuously compounded, on the debt.
      name: for messages and reports.
      source: where the parameters come from.
      as_of: date of the parameters.
    """

    base: str
    factors: Mapping[str, Mapping[str, float]]
    store_front: float
    borrow_curve: Mapping[str, float] = field(default_factory=dict)
    supply_curve: Mapping[str, float] = field(default_factory=dict)
    borrow_rate_per_year: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""

    log_health = staticmethod(log_health)
    liquidate = staticmethod(liquidate)

    def __post_init__(self) -> None:
        """Checks ranges once."""
        for asset, factors in self.factors.items():
            for key in FACTORS:
                if key not in factors:
                    raise InputError(f"venue {self.name}: factors.{asset}.{key} is missing; give a number in (0, 1).")
                check_fraction(self.name, f"factors.{asset}.{key}", factors[key], above=True)
            for key in factors:
                if key not in FACTORS:
                    raise InputError(
                        f"venue {self.name}: factors.{asset}.{key} is unknown: {did_you_mean(str(key), FACTORS)}."
                    )
            if not factors["borrow"] < factors["liquidate"]:
                raise InputError(
                    f"venue {self.name}: factors.{asset}.borrow is {factors['borrow']}, it must be below liquidate "
                    f"({factors['liquidate']})."
                )
        check_fraction(self.name, "store_front", self.store_front)
        for key in ("borrow_curve", "supply_curve"):
            if getattr(self, key):
                check_curve(self.name, key, getattr(self, key), CURVE, "kink")

    def factor(self, key: str, asset: str) -> float:
        """`borrow`, `liquidate` or `liquidation_factor` of a collateral.

        Raises:
          InputError: the market does not accept the asset.
        """
        for name in (asset, "default"):
            if name in self.factors:
                return float(self.factors[name][key])
        raise InputError(f"venue {self.name} does not accept {asset} as collateral, only {', '.join(self.factors)}.")

    def params(
        self, collateral: Sequence[str], debt: Sequence[str], *, capital: float = 1.0, dtype: Any = jnp.float32
    ) -> CompoundParams:
        """Arrays of an account (see `HealthFactor.params`; nothing here depends on the capital).

        Raises:
          InputError: a debt other than the base asset, or a collateral that the market does not accept.
        """
        check_coin(self.name, debt, self.base)
        kept = [self.factor("liquidation_factor", asset) for asset in collateral]
        return CompoundParams(
            rounded([self.factor("borrow", asset) for asset in collateral], dtype),
            rounded([self.factor("liquidate", asset) for asset in collateral], dtype),
            rounded(kept, dtype),
            rounded([self.store_front * (1.0 - factor) for factor in kept], dtype),
        )
