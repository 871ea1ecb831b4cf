r"""Collateralised debt vaults with Dutch auctions (Maker / Sky, Liquidations 2.0).

A vault is unsafe when collateral times the oracle's price is below the liquidation ratio times the debt. An auction
then has to raise tab = debt times chop; its price starts at top = oracle price times buf and falls as a stairstep,
$\mathrm{top}\cdot\mathrm{cut}^{\lfloor t/\mathrm{step} \rfloor}$. Buyers take any slice; collateral that is left once
tab is raised goes back to the owner. The oracle's price is delayed by an hour (not confirmed by a published table).
Sources: makerdao/dss, dog.sol, clip.sol and abaci.sol; forum.makerdao.com topics 7628, 8477 and 11531.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import Rows, rounded
from qpo_sim.types import Array
from qpo_sim.venue.health_factor import (
    LoanLiquidation,
    check_fraction,
    log_weighted_ratio,
    market_rows,
    one_of_each,
)


class VaultParams(NamedTuple):
    """Parameters of a vault; money in units of the capital.

    `threshold` is one over the liquidation ratio, `buyer_margin` the discount on the market at which buyers take,
    `room` what may still be put up for auction (tab), `dust` the smallest debt of a vault.
    """

    threshold: Float[Array, " 1"]
    chop: Float[Array, ""]
    buf: Float[Array, ""]
    buyer_margin: Float[Array, ""]
    tip: Float[Array, ""]
    chip: Float[Array, ""]
    room: Float[Array, ""]
    dust: Float[Array, ""]


class Auction(NamedTuple):
    """Outcome of an auction: collateral sold and returned (coins), money raised, what is missing of tab and of debt."""

    sold: Array
    returned: Array
    raised: Array
    shortfall: Array
    bad_debt: Array


def liquidation_price(amount: Array, debt: Array, liquidation_ratio: Array) -> Array:
    """Oracle price below which a vault with `amount` coins is unsafe."""
    return liquidation_ratio * debt / amount


def auction_price(top: Array, seconds: Array, *, cut: Array, step_seconds: Array) -> Array:
    """Price of the stairstep auction after a time: top cut^floor(seconds / step).

    Pathwise gradient: top, cut.
    """
    return top * cut ** jnp.floor(jnp.asarray(seconds) / step_seconds)


def seconds_to_reach(buf: Array, *, cut: Array, step_seconds: Array, market: Array = 1.0) -> Array:
    """First time at which the auction's price is at or below the market, 0 where it starts there.

    Args:
      buf: starting price over the oracle's.
      cut: factor per step, in (0, 1).
      step_seconds: length of a step.
      market: market price (less the margin of buyers) over the oracle's.

    No gradient.
    """
    # A quotient that is whole up to rounding needs no further step.
    steps = jnp.ceil(jnp.log(market / jnp.asarray(buf)) / jnp.log(jnp.asarray(cut)) - 1e-9)
    return jnp.maximum(steps, 0.0) * step_seconds


def needs_reset(seconds: Array, price: Array, top: Array, *, tail_seconds: Array, cusp: Array) -> Array:
    """Whether an auction has to be restarted: older than `tail_seconds`, or its price below cusp times top."""
    return (seconds > tail_seconds) | (price / top < cusp)


def keeper_reward(tab: Array, *, tip: Array, chip: Array) -> Array:
    """Paid by the protocol to whoever starts (or restarts) an auction: tip + chip tab."""
    return tip + chip * tab


def auctioned_debt(debt: Array, room: Array, *, chop: Array, dust: Array = 0.0) -> Array:
    """Debt that can be put up for auction now.

    At most room / chop; all of it where less than `dust` would be left; nothing where it would itself be less.

    Args:
      debt: of the unsafe vault.
      room: what the limits ("hole" of the collateral and of all) leave beyond the tabs under auction.
      chop: tab over debt.
      dust: smallest debt of a vault.
    """
    part = jnp.clip(room / chop, 0.0, debt)
    part = jnp.where(part < dust, 0.0, part)
    return jnp.where((debt - part < dust) & (room > 0.0), debt, part)


def auction_queue(debts: Array, limit: Array, *, chop: Array) -> Array:
    """Cycle in which each vault is auctioned when the tabs of one cycle may not exceed `limit`; 0 is the first.

    Vaults are served in their order and may be split; the cycle is that of the last part.

    Args:
      debts: of the unsafe vaults, leading axis the vault.
      limit: largest sum of tabs under auction ("hole").
      chop: tab over debt.
    """
    queued = jnp.cumsum(jnp.asarray(debts) * chop, axis=0)
    return jnp.maximum(jnp.ceil(queued / limit - 1e-9) - 1.0, 0.0)


def auction(debt: Array, amount: Array, price: Array, *, chop: Array) -> Auction:
    """Auction in which all buyers pay one price.

    Args:
      debt: of the vault.
      amount: coins up for auction.
      price: that clears the auction, in units of the debt.
      chop: tab over debt, e.g. 1.13.

    Pathwise gradient: all arguments, away from sold = amount.
    """
    tab = debt * chop
    covers = amount * price >= tab
    sold = jnp.where(covers, tab / jnp.where(covers, price, 1.0), amount)
    raised = jnp.where(covers, tab, amount * price)
    return Auction(sold, amount - sold, raised, tab - raised, jnp.maximum(debt - raised, 0.0))


def log_health(params: VaultParams, collateral_values: Rows, debt_values: Rows) -> Array:
    """Log of collateral over liquidation ratio times debt, <= 0 where liquidatable (on chain: < 0).

    Pathwise gradient: threshold, values.
    """
    return log_weighted_ratio(params.threshold, collateral_values, debt_values)


def liquidate(
    params: VaultParams,
    collateral_values: Rows,
    debt_values: Rows,
    collateral_market: Rows | None = None,
    debt_market: Rows | None = None,
) -> LoanLiquidation:
    """Auction that clears at the market less the buyers' margin, or at its starting price where the market is above.

    Only the debt that has room goes to auction, with its share of the collateral. Bad debt is the loss of the surplus
    buffer; `protocol` is the penalty raised, less the keeper's reward.

    Pathwise gradient: values, market, chop, buf, buyer_margin, tip, chip.
    """
    held, owed = market_rows(collateral_market, collateral_values)[0], market_rows(debt_market, debt_values)[0]
    debt = auctioned_debt(debt_values[0], params.room, chop=params.chop, dust=params.dust)
    part = debt / jnp.where(debt_values[0] > 0.0, debt_values[0], 1.0)
    price = jnp.minimum(params.buf, held * (1.0 - params.buyer_margin) / owed)
    # Per unit of value at the oracle's price the collateral is its own amount.
    done = auction(debt, part * collateral_values[0], price, chop=params.chop)
    repaid = debt - done.bad_debt
    reward = jnp.where(debt > 0.0, keeper_reward(debt * params.chop, tip=params.tip, chip=params.chip), 0.0)
    return LoanLiquidation(
        (repaid,),
        (done.sold,),
        (done.bad_debt,),
        jnp.zeros_like(repaid),
        done.sold * held + (reward - done.raised) * owed,
        (done.raised - repaid - reward) * owed,
    )


@dataclass(frozen=True)
class Vault:
    """Vault types of one collateral each.

    Attributes:
      liquidation_ratio: smallest collateral over debt, per asset; `default` serves the others.
      debt: the stablecoin that is minted.
      chop: what an auction has to raise per unit of debt, e.g. 1.13.
      buf: starting price over the oracle's.
      cut: factor of the price per step.
      step_seconds: length of a step.
      tail_seconds: age at which an auction must be restarted.
      cusp: price over starting price at which it must be restarted.
      tip: fixed reward for starting an auction, in USD.
      chip: reward as a share of tab.
      hole_usd: most that may be under auction at once.
      dust_usd: smallest debt of a vault.
      buyer_margin: discount on the market at which buyers take collateral.
      oracle_delay_hours: age of the price that the rule sees.
      borrow_rate_per_year: stability fee, continuously compounded.
      name: for messages and reports.
      source: where the parameters come from.
      as_of: date of the parameters.
    """

    liquidation_ratio: Mapping[str, float]
    debt: str = "DAI"
    chop: float = 1.13
    buf: float = 1.2
    cut: float = 0.99
    step_seconds: float = 90.0
    tail_seconds: float = 8400.0
    cusp: float = 0.4
    tip: float = 0.0
    chip: float = 0.0
    hole_usd: float | None = None
    dust_usd: float = 0.0
    buyer_margin: float = 0.0
    oracle_delay_hours: float = 1.0
    borrow_rate_per_year: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""

    log_health = staticmethod(log_health)
    liquidate = staticmethod(liquidate)

    def __post_init__(self) -> None:
        """Checks ranges once."""
        for asset, ratio in self.liquidation_ratio.items():
            if not self.chop <= ratio < 100.0:
                raise InputError(
                    f"venue {self.name}: liquidation_ratio.{asset} is {ratio}; it must be at least chop ({self.chop}), "
                    f"else an auction at the liquidation price could not raise the debt and its penalty."
                )
        for key, low, high in (("chop", 1.0, 2.0), ("buf", 1.0, 10.0), ("tip", 0.0, 1e9), ("chip", 0.0, 1.0)):
            check_fraction(self.name, key, getattr(self, key), low=low, high=high)
        for key in ("cut", "cusp"):
            check_fraction(self.name, key, getattr(self, key), above=True)
        for key in ("step_seconds", "tail_seconds"):
            check_fraction(self.name, key, getattr(self, key), high=1e7, above=True)
        for key in ("dust_usd", "oracle_delay_hours"):
            check_fraction(self.name, key, getattr(self, key), high=1e9)
        if not 0.0 <= self.buyer_margin < 1.0:
            raise InputError(f"venue {self.name}: buyer_margin is {self.buyer_margin}, it must lie in [0, 1).")
        if self.hole_usd is not None and not self.hole_usd > 0.0:
            raise InputError(f"venue {self.name}: hole_usd is {self.hole_usd}; it must be positive, or be left out.")

    def ratio(self, asset: str) -> float:
        """Liquidation ratio of a collateral.

        Raises:
          InputError: no vault type for the asset.
        """
        for name in (asset, "default"):
            if name in self.liquidation_ratio:
                return float(self.liquidation_ratio[name])
        raise InputError(
            f"venue {self.name} has no vault for {asset} (liquidation_ratio lists {', '.join(self.liquidation_ratio)})."
        )

    @property
    def auction_seconds(self) -> float:
        """Time until an auction's price has fallen to an unmoved market, net of the buyers' margin."""
        steps = np.ceil(np.log((1.0 - self.buyer_margin) / self.buf) / np.log(self.cut) - 1e-9)
        return float(steps * self.step_seconds)

    def params(
        self, collateral: Sequence[str], debt: Sequence[str], *, capital: float = 1.0, dtype: Any = jnp.float32
    ) -> VaultParams:
        """Arrays of a vault (see `HealthFactor.params`).

        Raises:
          InputError: several collaterals or debts, another debt than the coin, or no vault for the collateral.
        """
        asset, _ = one_of_each(self.name, collateral, debt, "vault", coin=self.debt)
        # Far above any debt, and finite in single precision.
        hole = 1e30 if self.hole_usd is None else self.hole_usd / capital
        plain = (self.chop, self.buf, self.buyer_margin, self.tip / capital, self.chip, hole, self.dust_usd / capital)
        return VaultParams(rounded([1.0 / self.ratio(asset)], dtype), *(rounded(value, dtype) for value in plain))
