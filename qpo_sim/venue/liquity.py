r"""Troves of Liquity v1 (LUSD) and v2 (BOLD): liquidation by stability pool or redistribution, and redemption.

A trove is liquidated whole when its collateral ratio falls below the minimum (MCR, 110 %). The stability pool burns the
debt and receives the collateral; what the pool cannot cover goes to the other troves, debt and collateral.

v1 also has a recovery mode while the system's ratio (TCR) is below the critical one (150 %): then troves below
TCR are liquidatable too if the pool covers all their debt, and lose at most 110 % of it; below 100 % they are
redistributed whole. The liquidator gets 0.5 % of the collateral and the 200 LUSD that were set aside at opening and
count as debt. In v2 collateral beyond debt plus a penalty (5 % through the pool, 10 % by redistribution) stays with
the owner; the liquidator gets a deposit (0.0375 WETH) and 0.5 %, at most 2 units, of what goes to the pool.

Anyone may redeem the coin at face value: from the troves with the lowest ratio (v1) or interest rate (v2), for a fee of
0.5 % plus a base rate that rises by half (v1) of the redeemed share of the supply and decays by half in 12 hours (not
confirmed by a published table).
Sources: liquity/dev and liquity/bold, TroveManager.sol; docs.liquity.org.
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
    log_weighted_ratio,
    market_rows,
    one_of_each,
)


class LiquityV1Params(NamedTuple):
    """Parameters of a trove of v1; money in units of the capital.

    `pool` is the stability pool, `system_ratio` the TCR; both may be rows of paths.
    """

    min_ratio: Float[Array, ""]
    critical_ratio: Float[Array, ""]
    gas_deposit: Float[Array, ""]
    gas_share: Float[Array, ""]
    pool: Array
    system_ratio: Array


class LiquityV2Params(NamedTuple):
    """Parameters of a trove of v2; money in units of the capital.

    `gas_cap` is a value; it and `pool` may be rows of paths.
    """

    min_ratio: Float[Array, ""]
    pool_penalty: Float[Array, ""]
    redistribution_penalty: Float[Array, ""]
    gas_deposit: Float[Array, ""]
    gas_share: Float[Array, ""]
    gas_cap: Array
    pool: Array


class TroveLiquidation(NamedTuple):
    """Where a trove's debt and collateral go, in values.

    `offset` is the debt that the pool burns, for `to_pool` of collateral; the rest of the debt goes to the other troves
    with `to_others`; `to_liquidator` is collateral, `surplus` stays with the owner.
    """

    offset: Array
    redistributed: Array
    to_pool: Array
    to_others: Array
    to_liquidator: Array
    surplus: Array


def _share(part: Array, whole: Array) -> Array:
    return part / jnp.where(whole > 0.0, whole, 1.0)


def is_recovery(system_ratio: Array, critical_ratio: Array) -> Array:
    """Whether the system is in recovery mode: TCR below the critical ratio."""
    return system_ratio < critical_ratio


def liquidatable_ratio(min_ratio: Array, critical_ratio: Array, system_ratio: Array) -> Array:
    """Collateral ratio below which a v1 trove may be liquidated: MCR, or in recovery mode TCR where that is above."""
    return jnp.where(is_recovery(system_ratio, critical_ratio), jnp.maximum(min_ratio, system_ratio), min_ratio)


def liquidate_v1(
    collateral: Array,
    debt: Array,
    *,
    pool: Array,
    system_ratio: Array = 10.0,
    min_ratio: Array = 1.1,
    critical_ratio: Array = 1.5,
    gas_share: Array = 0.005,
) -> TroveLiquidation:
    """Liquidation of a v1 trove.

    Where recovery mode lets a trove above MCR be liquidated but the pool does not cover its debt, nothing happens.

    Args:
      collateral: value at the oracle's price.
      debt: including the gas deposit.
      pool: stability pool.
      system_ratio: TCR.
      min_ratio: MCR.
      critical_ratio: CCR.
      gas_share: share of the collateral for the liquidator.
    """
    recovery = is_recovery(system_ratio, critical_ratio)
    # The pool takes nothing from a trove below 100 % in recovery mode.
    offset = jnp.where(recovery & (collateral <= debt), 0.0, jnp.minimum(pool, debt))
    capped = recovery & (collateral >= min_ratio * debt)
    closes = jnp.logical_not(capped) | (pool >= debt)
    taken = jnp.where(capped, jnp.minimum(min_ratio * debt, collateral), collateral)
    gas = gas_share * taken
    to_pool = (taken - gas) * jnp.where(capped, 1.0, _share(offset, debt))
    return TroveLiquidation(
        offset=jnp.where(closes, offset, 0.0),
        redistributed=jnp.where(closes, debt - offset, 0.0),
        to_pool=jnp.where(closes, to_pool, 0.0),
        to_others=jnp.where(closes, taken - gas - to_pool, 0.0),
        to_liquidator=jnp.where(closes, gas, 0.0),
        surplus=jnp.where(closes, collateral - taken, collateral),
    )


def liquidate_v2(
    collateral: Array,
    debt: Array,
    *,
    pool: Array,
    gas_cap: Array,
    pool_penalty: Array = 0.05,
    redistribution_penalty: Array = 0.1,
    gas_share: Array = 0.005,
) -> TroveLiquidation:
    """Liquidation of a v2 trove.

    Args:
      collateral: value at the oracle's price.
      debt: of the trove.
      pool: stability pool of the branch.
      gas_cap: largest compensation of the liquidator in collateral, as a value (2 units).
      pool_penalty: collateral beyond the debt that the pool gets at most.
      redistribution_penalty: the same for the other troves.
      gas_share: share of the pool's collateral for the liquidator.
    """
    offset = jnp.minimum(pool, debt)
    for_pool = collateral * _share(offset, debt)
    gas = jnp.minimum(gas_share * for_pool, gas_cap)
    to_pool = jnp.minimum(for_pool - gas, offset * (1.0 + pool_penalty))
    surplus = for_pool - gas - to_pool
    rest = debt - offset
    # What the pool's penalty leaves can be taken by the other troves' penalty.
    available = jnp.where(rest > 0.0, collateral - for_pool + surplus, 0.0)
    to_others = jnp.minimum(available, rest * (1.0 + redistribution_penalty))
    return TroveLiquidation(offset, rest, to_pool, to_others, gas, collateral - gas - to_pool - to_others)


def decayed_base_rate(base_rate: Array, hours: Array, *, half_life_hours: Array = 12.0) -> Array:
    """Base rate of redemptions after a time without any."""
    return base_rate * 0.5 ** (hours / half_life_hours)


def redemption_rate(base_rate: Array, share: Array, *, floor: Array = 0.005, beta: Array = 2.0) -> Array:
    """Fee per unit redeemed, floor + base rate + share / beta, at most 1.

    Args:
      base_rate: after its decay, before this redemption.
      share: of the supply that is redeemed.
      floor: smallest fee.
      beta: 2 in v1: the base rate rises by half of the share.
    """
    return jnp.minimum(floor + base_rate + share / beta, 1.0)


def redeemed(debts: Array, rank: Array, amount: Array) -> Array:
    """Debt that each trove loses when `amount` is redeemed in ascending order of `rank`; equal ranks in their order.

    Redemption is at face value: each trove loses collateral of the same value at the oracle's price.

    Args:
      debts: of the troves that can be redeemed (above 100 %), leading axis the trove.
      rank: collateral ratio (v1) or interest rate (v2), same shape.
      amount: of the coin; what exceeds the debts is not redeemed.
    """
    debts, rank = jnp.asarray(debts), jnp.asarray(rank)
    order = jnp.argsort(rank, axis=0, stable=True)
    sorted_debts = jnp.take_along_axis(debts, order, axis=0)
    before = jnp.cumsum(sorted_debts, axis=0) - sorted_debts
    taken = jnp.clip(amount - before, 0.0, sorted_debts)
    return jnp.take_along_axis(taken, jnp.argsort(order, axis=0), axis=0)


def log_health(params: LiquityV1Params | LiquityV2Params, collateral_values: Rows, debt_values: Rows) -> Array:
    """Log of the trove's ratio over the one below which it is liquidatable, <= 0 there (on chain: < 0).

    In recovery mode a trove above MCR that the pool does not cover is measured against MCR.

    Pathwise gradient: min_ratio, values, and system_ratio in recovery mode.
    """
    ratio = params.min_ratio
    if isinstance(params, LiquityV1Params):
        recovery = liquidatable_ratio(params.min_ratio, params.critical_ratio, params.system_ratio)
        ratio = jnp.where(params.pool >= debt_values[0], recovery, params.min_ratio)
    return log_weighted_ratio((1.0 / ratio,), collateral_values, debt_values)


def liquidate(
    params: LiquityV1Params | LiquityV2Params,
    collateral_values: Rows,
    debt_values: Rows,
    collateral_market: Rows | None = None,
    debt_market: Rows | None = None,
) -> LoanLiquidation:
    """Liquidation of the trove. There is no bad debt: pool depositors and other troves bear a shortage.

    The gas deposit that the borrower loses is a negative `credit`; `liquidator` sums over the liquidator, the pool and
    the troves that take over.

    Pathwise gradient: values, market, min_ratio, penalties, gas_share, gas_deposit.
    """
    collateral, debt = collateral_values[0], debt_values[0]
    held, owed = market_rows(collateral_market, collateral_values)[0], market_rows(debt_market, debt_values)[0]
    if isinstance(params, LiquityV1Params):
        done = liquidate_v1(
            collateral,
            debt,
            pool=params.pool,
            system_ratio=params.system_ratio,
            min_ratio=params.min_ratio,
            critical_ratio=params.critical_ratio,
            gas_share=params.gas_share,
        )
    else:
        done = liquidate_v2(
            collateral,
            debt,
            pool=params.pool,
            gas_cap=params.gas_cap,
            pool_penalty=params.pool_penalty,
            redistribution_penalty=params.redistribution_penalty,
            gas_share=params.gas_share,
        )
    repaid = done.offset + done.redistributed
    deposit = jnp.where(repaid > 0.0, params.gas_deposit, 0.0) * owed
    taken = done.to_pool + done.to_others + done.to_liquidator
    zero = jnp.zeros_like(repaid)
    return LoanLiquidation((repaid,), (taken,), (zero,), -deposit, taken * held - repaid * owed + deposit, zero)


@dataclass(frozen=True)
class Liquity:
    """A Liquity system.

    Attributes:
      version: 1 or 2.
      min_ratio: MCR by collateral; `default` serves the others.
      debt: the stablecoin.
      critical_ratio: CCR, below which v1 is in recovery mode.
      system_ratio: TCR when a run starts (v1).
      pool_usd: stability pool when a run starts; far above any debt when omitted.
      gas_deposit_usd: set aside at opening and lost in a liquidation (v1: part of the debt).
      gas_share: share of the collateral for the liquidator.
      gas_cap_usd: its largest value (v2).
      pool_penalty: collateral beyond the debt that the pool gets at most (v2).
      redistribution_penalty: the same for other troves (v2).
      redemption_floor: smallest redemption fee.
      borrow_rate_per_year: continuously compounded; 0 in v1, set by the user in v2.
      name: for messages and reports.
      source: where the parameters come from.
      as_of: date of the parameters.
    """

    version: int
    min_ratio: Mapping[str, float]
    debt: str = "LUSD"
    critical_ratio: float = 1.5
    system_ratio: float = 2.5
    pool_usd: float | None = None
    gas_deposit_usd: float = 0.0
    gas_share: float = 0.005
    gas_cap_usd: float | None = None
    pool_penalty: float = 0.05
    redistribution_penalty: float = 0.1
    redemption_floor: float = 0.005
    borrow_rate_per_year: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""

    log_health = staticmethod(log_health)
    liquidate = staticmethod(liquidate)

    def __post_init__(self) -> None:
        """Checks ranges once."""
        if self.version not in (1, 2):
            raise InputError(f"venue {self.name}: version is {self.version!r}, it must be 1 or 2.")
        for asset, ratio in self.min_ratio.items():
            check_fraction(self.name, f"min_ratio.{asset}", ratio, low=1.0, high=10.0, above=True)
            if not ratio < self.critical_ratio:
                raise InputError(
                    f"venue {self.name}: critical_ratio is {self.critical_ratio}, it must be above min_ratio.{asset} "
                    f"({ratio})."
                )
        check_fraction(self.name, "system_ratio", self.system_ratio, high=1e6, above=True)
        for key in ("gas_share", "pool_penalty", "redistribution_penalty", "redemption_floor"):
            check_fraction(self.name, key, getattr(self, key))
        check_fraction(self.name, "gas_deposit_usd", self.gas_deposit_usd, high=1e9)
        for key in ("pool_usd", "gas_cap_usd"):
            value = getattr(self, key)
            if value is not None and not value >= 0.0:
                raise InputError(f"venue {self.name}: {key} is {value}; it must not be negative, or be left out.")

    def ratio(self, asset: str) -> float:
        """MCR of a collateral.

        Raises:
          InputError: the system does not accept the asset.
        """
        for name in (asset, "default"):
            if name in self.min_ratio:
                return float(self.min_ratio[name])
        raise InputError(f"venue {self.name} does not accept {asset} as collateral, only {', '.join(self.min_ratio)}.")

    def params(
        self, collateral: Sequence[str], debt: Sequence[str], *, capital: float = 1.0, dtype: Any = jnp.float32
    ) -> LiquityV1Params | LiquityV2Params:
        """Arrays of a trove (see `HealthFactor.params`).

        Raises:
          InputError: several collaterals or debts, another debt than the coin, or a collateral that the system does not
            accept.
        """
        asset, _ = one_of_each(self.name, collateral, debt, "trove", coin=self.debt)

        def number(value: float) -> Array:
            return rounded(value, dtype)

        def money(value: float | None) -> Array:
            # Without a limit: far above any debt, and finite in single precision.
            return number(1e30 if value is None else value / capital)

        ratio, deposit, pool = number(self.ratio(asset)), money(self.gas_deposit_usd), money(self.pool_usd)
        share = number(self.gas_share)
        if self.version == 1:
            return LiquityV1Params(ratio, number(self.critical_ratio), deposit, share, pool, number(self.system_ratio))
        penalties = number(self.pool_penalty), number(self.redistribution_penalty)
        return LiquityV2Params(ratio, *penalties, deposit, share, money(self.gas_cap_usd), pool)
