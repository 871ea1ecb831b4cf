"""Health-factor lending (Aave v3): when a loan may be liquidated, how much, and what it costs the borrower.

Health factor = sum(collateral value x liquidation threshold) / debt value; below 1 anyone may repay part of one debt
and take one collateral worth the repayment plus a bonus. Source: aave-v3-origin, GenericLogic and LiquidationLogic
(from v3.3 on), and its notes on v3.3 and v3.6.

`LoanLiquidation` and `log_health` are the shape of every lending rule: a rule has a builder `params(collateral, debt,
...)` of a tuple of arrays, `log_health(params, collateral_values, debt_values)` and `liquidate(params,
collateral_values, debt_values, collateral_market, debt_market)`. Values are those at the oracle's prices, one row per
collateral or debt; market arguments are market price over oracle price in the same form (None: equal). Any entry of the
parameters may be a row of paths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.numerics import Rows, rounded, safe_log
from qpo_sim.types import Array

# Below these an account is empty (values in units of its currency): without debt it is far from liquidation.
_NO_COLLATERAL, _NO_DEBT = 1e-12, 1e-24


class LoanLiquidation(NamedTuple):
    r"""Outcome of one liquidation under any lending rule, in the account's currency.

    The first three are values at the oracle's prices, one row per debt, collateral and debt, and move the borrower's
    amounts by their share of the whole. The others are sums at market prices. With market over oracle prices m
    (collateral) and w (debt), nothing is created or destroyed:

    $$\sum w_j\,\mathrm{repaid}_j + \mathrm{credit} + \mathrm{liquidator} + \mathrm{protocol}
      = \sum m_i\,\mathrm{seized}_i .$$

    Attributes:
      repaid: debt that is paid for.
      seized: collateral that leaves the borrower, whoever gets it.
      bad_debt: debt written off: a loss of suppliers, reserves or a surplus buffer.
      credit: cash paid to the borrower; negative for a deposit that is taken.
      liquidator: gain of those who pay and take collateral: liquidators, auction buyers and keepers, depositors of a
        stability pool, borrowers who take over a redistributed loan. Before gas.
      protocol: gain of the protocol, before bad debt.
    """

    repaid: Any
    seized: Any
    bad_debt: Any
    credit: Any = 0.0
    liquidator: Any = 0.0
    protocol: Any = 0.0


class PairLiquidation(NamedTuple):
    """One call on one collateral and one debt: debt repaid, collateral seized, and the part of it that is a fee."""

    repaid: Array
    seized: Array
    protocol_fee: Array


class HealthFactorParams(NamedTuple):
    """Parameters of a loan under the health-factor rule; thresholds of value in units of the capital.

    `protocol_fee` is the share of the bonus that the protocol keeps.
    """

    threshold: Float[Array, " collaterals"]
    ltv: Float[Array, " collaterals"]
    bonus: Float[Array, " collaterals"]
    protocol_fee: Float[Array, " collaterals"]
    close_factor: Float[Array, ""]
    full_close_health: Float[Array, ""]
    small_position: Float[Array, ""]
    min_leftover: Float[Array, ""]


def health_factor(weighted_collateral: Array, debt: Array) -> Array:
    """Threshold-weighted collateral over debt."""
    return weighted_collateral / debt


def weighted_sum(weights: Any, values: Rows) -> Array:
    """Sum of weight times value over the assets; rows of paths or plain vectors."""
    return sum(weights[i] * values[i] for i in range(len(values)))


def total(values: Rows) -> Array:
    """Sum over the assets."""
    return sum(values[i] for i in range(len(values)))


def average(weights: Any, values: Rows) -> Array:
    """Value-weighted mean, such as the account's average liquidation threshold or loan-to-value limit."""
    return weighted_sum(weights, values) / total(values)


def log_weighted_ratio(weights: Any, collateral_values: Rows, debt_values: Rows) -> Array:
    """Log of weighted collateral over debt, <= 0 where liquidatable; above 25 for an account without debt.

    Pathwise gradient: weights, values.
    """
    held = jnp.maximum(weighted_sum(weights, collateral_values), _NO_COLLATERAL)
    return safe_log(held / jnp.maximum(total(debt_values), _NO_DEBT))


def log_health(params: HealthFactorParams, collateral_values: Rows, debt_values: Rows) -> Array:
    """Log health factor, <= 0 where liquidatable.

    Pathwise gradient: threshold, values.
    """
    return log_weighted_ratio(params.threshold, collateral_values, debt_values)


def available_borrow(ltv: Any, collateral_values: Rows, debt: Array) -> Array:
    """What may still be borrowed: collateral times loan-to-value limit, minus the debt, not below 0."""
    return jnp.maximum(weighted_sum(ltv, collateral_values) - debt, 0.0)


def liquidation_price(amount: Array, threshold: Array, debt: Array, *, other_weighted: Array = 0.0) -> Array:
    """Price of one collateral at which the health factor is 1, all else held fixed; <= 0 where there is none.

    Args:
      amount: of the collateral, in coins.
      threshold: its liquidation threshold.
      debt: value of all debt.
      other_weighted: value times threshold of the other collaterals.
    """
    return (debt - other_weighted) / (amount * threshold)


def joint_drop(weighted_collateral: Array, debt: Array) -> Array:
    """Fall of all collateral prices together that brings the health factor to 1: 1 - debt / weighted collateral."""
    return 1.0 - debt / weighted_collateral


def insolvency_gap(threshold: Array, bonus: Array) -> Array:
    """Largest fall of the price below the trigger that leaves no bad debt after a full liquidation: 1 - LT (1 + b)."""
    return 1.0 - threshold * (1.0 + bonus)


def is_toxic(health: Array, threshold: Array, bonus: Array) -> Array:
    """Whether a partial liquidation worsens the health factor: HF < LT (1 + bonus)."""
    return health < threshold * (1.0 + bonus)


def health_after(weighted_collateral: Array, debt: Array, threshold: Array, seized: Array, repaid: Array) -> Array:
    """Health factor after `repaid` was paid and `seized` of a collateral with this threshold was taken."""
    return (weighted_collateral - threshold * seized) / (debt - repaid)


def max_repay(
    collateral: Array,
    debt: Array,
    total_debt: Array,
    health: Array,
    *,
    close_factor: Array,
    full_close_health: Array,
    small_position: Array,
) -> Array:
    """Most that one call may repay of one debt against one collateral.

    `close_factor` (half) of the *total* debt, but not more than this debt, while the health factor exceeds
    `full_close_health` (0.95) and both this collateral and this debt are at least `small_position` (2000 USD); else all
    of this debt.

    Args:
      collateral: value of this collateral.
      debt: value of this debt.
      total_debt: value of all debts.
      health: health factor at the liquidation.
      close_factor: share of the total debt in the ordinary case.
      full_close_health: health factor at or below which all of this debt may be repaid.
      small_position: value below which all of this debt may be repaid.
    """
    ordinary = (health > full_close_health) & (collateral >= small_position) & (debt >= small_position)
    return jnp.where(ordinary, jnp.minimum(debt, close_factor * total_debt), debt)


def leaves_no_dust(collateral: Array, debt: Array, seized: Array, repaid: Array, *, min_leftover: Array) -> Array:
    """Whether a call is allowed: it clears this debt or this collateral, or leaves at least `min_leftover` of both."""
    cleared = (repaid >= debt) | (seized >= collateral)
    return cleared | ((debt - repaid >= min_leftover) & (collateral - seized >= min_leftover))


def liquidate_pair(
    collateral: Array,
    debt: Array,
    repay: Array,
    *,
    bonus: Array,
    protocol_fee: Array = 0.0,
    min_leftover: Array = 0.0,
) -> PairLiquidation:
    """Largest allowed call that repays up to `repay` of one debt against one collateral.

    seized = repaid (1 + bonus), at most the collateral; of the bonus part the protocol keeps `protocol_fee`. A call
    that would leave dust repays less, so that `min_leftover` of the debt and of the collateral remain.
    """
    factor = 1.0 + bonus
    exhausted = repay * factor >= collateral
    cleared = exhausted | (repay >= debt)
    room = jnp.minimum(debt - min_leftover, (collateral - min_leftover) / factor)
    within = jnp.where(cleared, repay, jnp.clip(room, 0.0, repay))
    repaid = jnp.where(exhausted, collateral / factor, within)
    seized = jnp.where(exhausted, collateral, within * factor)
    return PairLiquidation(repaid, seized, protocol_fee * (seized - seized / factor))


def market_rows(market: Rows | None, values: Rows) -> tuple[Array, ...]:
    """Market over oracle prices as a tuple; ones when they are the same."""
    return tuple(market[i] if market is not None else jnp.ones_like(values[i]) for i in range(len(values)))


def liquidate(
    params: HealthFactorParams,
    collateral_values: Rows,
    debt_values: Rows,
    collateral_market: Rows | None = None,
    debt_market: Rows | None = None,
) -> LoanLiquidation:
    """One liquidation call on the pair of collateral and debt that pays the liquidator most at market prices.

    What is left of the debts when no collateral at all remains is bad debt. The outcome is that of a call; whether the
    account may be called (`log_health` <= 0) and whether it pays (`liquidator` above gas) is for the caller to see.

    Pathwise gradient: values, bonus, protocol_fee and close_factor, for the pair and the case that hold.
    """
    health = jnp.exp(log_health(params, collateral_values, debt_values))
    all_debt, all_collateral = total(debt_values), total(collateral_values)
    held, owed = market_rows(collateral_market, collateral_values), market_rows(debt_market, debt_values)
    calls = {}
    for i in range(len(collateral_values)):
        for j in range(len(debt_values)):
            most = max_repay(
                collateral_values[i],
                debt_values[j],
                all_debt,
                health,
                close_factor=params.close_factor,
                full_close_health=params.full_close_health,
                small_position=params.small_position,
            )
            call = liquidate_pair(
                collateral_values[i],
                debt_values[j],
                most,
                bonus=params.bonus[i],
                protocol_fee=params.protocol_fee[i],
                min_leftover=params.min_leftover,
            )
            calls[i, j] = call, (call.seized - call.protocol_fee) * held[i] - call.repaid * owed[j]

    gains = [gain for _, gain in calls.values()]
    best = gains[0]
    for gain in gains[1:]:
        best = jnp.maximum(best, gain)
    repaid = [jnp.zeros_like(best)] * len(debt_values)
    seized = [jnp.zeros_like(best)] * len(collateral_values)
    fee, open_ = jnp.zeros_like(best), jnp.ones_like(best, bool)
    for (i, j), (call, gain) in calls.items():
        chosen = open_ & (gain >= best)
        open_ = open_ & ~chosen
        repaid[j] = jnp.where(chosen, call.repaid, repaid[j])
        seized[i] = jnp.where(chosen, call.seized, seized[i])
        fee = jnp.where(chosen, call.protocol_fee * held[i], fee)
    is_empty = sum(seized) >= all_collateral
    bad = [jnp.where(is_empty, debt_values[j] - repaid[j], 0.0) for j in range(len(debt_values))]
    return LoanLiquidation(tuple(repaid), tuple(seized), tuple(bad), jnp.zeros_like(best), best, fee)


def liquidate_pro_rata(
    collateral: Array,
    debt: Array,
    health: Array,
    *,
    bonus: Array,
    close_factor: Array,
    full_close_health: Array,
    small_position: Array,
) -> LoanLiquidation:
    """One liquidation of a whole loan, all its collaterals and debts in proportion, that repays as much as allowed.

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
    bad_debt = xp.where(exhausted, debt - repaid, 0.0 * debt)
    return LoanLiquidation(repaid, seized, bad_debt, 0.0 * debt, seized - repaid, 0.0 * debt)


def check_fraction(
    venue: str, key: str, value: float, *, low: float = 0.0, high: float = 1.0, above: bool = False
) -> float:
    """The number itself, as a float.

    Args:
      venue: name of the venue, for the message.
      key: field, for the message.
      value: of the field.
      low: smallest value allowed.
      high: largest value allowed.
      above: whether both ends are excluded.

    Raises:
      InputError: not a number, or outside the bounds.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"venue {venue}: {key} is {value!r}, it must be a number.") from None
    fits = low < number < high if above else low <= number <= high
    if not fits:
        ends = f"({low:g}, {high:g})" if above else f"[{low:g}, {high:g}]"
        raise InputError(f"venue {venue}: {key} is {number:g}, it must lie in {ends}.")
    return number


def check_curve(venue: str, key: str, curve: Mapping[str, float], names: Sequence[str], kink: str) -> None:
    """Checks a kinked rate curve: exactly the keys `names`, all >= 0, the kink inside (0, 1).

    Raises:
      InputError: a key too many or too few, or a number out of bounds.
    """
    for name in names:
        if name not in curve:
            raise InputError(f"venue {venue}: {key}.{name} is missing; a rate curve has {', '.join(names)}.")
    for name, value in curve.items():
        if name not in names:
            raise InputError(f"venue {venue}: {key}.{name} is unknown: {did_you_mean(str(name), names)}.")
        if name == kink:
            check_fraction(venue, f"{key}.{name}", value, above=True)
        else:
            check_fraction(venue, f"{key}.{name}", value, high=100.0)


def check_coin(venue: str, debt: Sequence[str], coin: str) -> None:
    """Checks that the venue's own coin is borrowed; plain "USD" stands for it.

    Raises:
      InputError: another debt, several, or none.
    """
    if list(debt) not in ([coin], ["USD"]):
        listed = ", ".join(debt) or "nothing"
        raise InputError(f"venue {venue} lends {coin} only, and debt lists {listed}; borrow {coin} or plain USD.")


def one_of_each(
    venue: str, collateral: Sequence[str], debt: Sequence[str], kind: str, *, coin: str | None = None
) -> tuple[str, str]:
    """The collateral and the debt of a position that has one of each.

    Args:
      venue: name of the venue, for messages.
      collateral: assets.
      debt: assets.
      kind: what a position is called, for messages.
      coin: the only coin that can be borrowed, if any (see `check_coin`).

    Raises:
      InputError: several or none, or a debt in another coin.
    """
    for side, names in (("collateral", collateral), ("debt", debt)):
        if len(names) != 1:
            raise InputError(
                f"venue {venue}: {side} has {len(names)} assets ({', '.join(names)}); a {kind} position has exactly "
                f"one, so open one position for each."
            )
    if coin is not None:
        check_coin(venue, debt, coin)
    return collateral[0], debt[0]


CURVE = ("optimal", "base", "slope1", "slope2")
EMODE = ("ltv", "liquidation_threshold", "liquidation_bonus", "collateral", "debt")


def _no_fee() -> dict[str, float]:
    return {"default": 0.0}


@dataclass(frozen=True)
class HealthFactor:
    """A lending venue: thresholds and bonuses per asset, close-factor rule, e-modes and rates.

    Attributes:
      liquidation_threshold: per asset, `default` serves the others.
      liquidation_bonus: per asset (0.05 = 5 %), `default` serves the others.
      ltv: borrowing limit per asset, checked when a book is built; 0 for what cannot be borrowed against.
      close_factor: share of the total debt a liquidation may repay.
      full_close_health_factor: at or below it all debt may be repaid.
      small_position_usd: debts against collaterals below it may be closed whole.
      min_leftover_usd: what a liquidation must leave of debt and collateral unless it clears one of them; half of
        `small_position_usd` when omitted.
      liquidation_protocol_fee: share of the bonus that the protocol keeps, per asset.
      emodes: categories by name, each `{ltv, liquidation_threshold, liquidation_bonus, collateral: [assets], debt:
        [assets]}`: they replace the assets' own values for loans that borrow only what the category lists. With
        `isolated: true` nothing can be borrowed against collateral outside it, which still counts for liquidation.
      rate_curve: `{optimal, base, slope1, slope2}` per borrowed asset, per year.
      reserve_factor: share of interest that suppliers do not get, per asset.
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
    min_leftover_usd: float | None = None
    liquidation_protocol_fee: Mapping[str, float] = field(default_factory=_no_fee)
    emodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rate_curve: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reserve_factor: Mapping[str, float] = field(default_factory=_no_fee)
    borrow_rate_per_year: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""

    log_health = staticmethod(log_health)
    liquidate = staticmethod(liquidate)

    def __post_init__(self) -> None:
        """Checks ranges once."""
        for asset, value in self.liquidation_threshold.items():
            if not 0.0 < value < 1.0:
                raise InputError(f"venue {self.name}: liquidation_threshold.{asset} is {value}, it must lie in (0, 1).")
        for asset, value in self.ltv.items():
            if not 0.0 <= value < 1.0:
                raise InputError(f"venue {self.name}: ltv.{asset} is {value}, it must lie in [0, 1).")
        for asset in {**self.ltv, **self.liquidation_threshold}:
            self._check_limit(asset)
        for asset, value in self.liquidation_bonus.items():
            self._check_bonus(f"liquidation_bonus.{asset}", value, self.value("liquidation_threshold", asset))
        if not 0.0 < self.close_factor <= 1.0:
            raise InputError(f"venue {self.name}: close_factor is {self.close_factor}, it must lie in (0, 1].")
        for key in ("liquidation_protocol_fee", "reserve_factor"):
            for asset, value in getattr(self, key).items():
                check_fraction(self.name, f"{key}.{asset}", value)
        if not 0.0 <= 2.0 * self.min_leftover <= self.small_position_usd * (1.0 + 1e-12):
            raise InputError(
                f"venue {self.name}: min_leftover_usd is {self.min_leftover_usd}; it must lie between 0 and half of "
                f"small_position_usd ({self.small_position_usd}), else half of a debt could not be repaid."
            )
        for asset, curve in self.rate_curve.items():
            check_curve(self.name, f"rate_curve.{asset}", curve, CURVE, "optimal")
        for name, emode in self.emodes.items():
            self._check_emode(f"emodes.{name}", emode)

    @property
    def min_leftover(self) -> float:
        """USD of debt and collateral that a liquidation must leave unless it clears one of them."""
        return 0.5 * self.small_position_usd if self.min_leftover_usd is None else float(self.min_leftover_usd)

    def _check_limit(self, asset: str) -> None:
        # Whoever borrows up to the limit must not be liquidatable at once.
        limit, threshold = (t.get(asset, t.get("default")) for t in (self.ltv, self.liquidation_threshold))
        if limit is not None and threshold is not None and limit > threshold:
            raise InputError(
                f"venue {self.name}: ltv.{asset} is {limit}; it must not exceed the liquidation threshold of the asset "
                f"({threshold}): lower ltv or raise liquidation_threshold."
            )

    def _check_bonus(self, key: str, bonus: float, threshold: float) -> None:
        if not (bonus >= 0.0 and threshold * (1.0 + bonus) < 1.0):
            raise InputError(
                f"venue {self.name}: {key} is {bonus}; it must be >= 0 and threshold x (1 + "
                f"bonus) below 1 (threshold {threshold}), else a liquidation at health factor 1 cannot be covered."
            )

    def _check_emode(self, key: str, emode: Mapping[str, Any]) -> None:
        for name in EMODE:
            if name not in emode:
                raise InputError(f"venue {self.name}: {key}.{name} is missing; an e-mode has {', '.join(EMODE)}.")
        known = (*EMODE, "isolated")
        for name in emode:
            if name not in known:
                raise InputError(f"venue {self.name}: {key}.{name} is unknown: {did_you_mean(str(name), known)}.")
        threshold = check_fraction(
            self.name, f"{key}.liquidation_threshold", emode["liquidation_threshold"], above=True
        )
        check_fraction(self.name, f"{key}.ltv", emode["ltv"], high=threshold)
        bonus = check_fraction(self.name, f"{key}.liquidation_bonus", emode["liquidation_bonus"])
        self._check_bonus(f"{key}.liquidation_bonus", bonus, threshold)

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

    def collateral_value(self, key: str, asset: str, emode: str | None = None) -> float:
        """`ltv`, `liquidation_threshold` or `liquidation_bonus` of a collateral, in an e-mode where one is given.

        Raises:
          InputError: an unknown e-mode, or an asset that the venue does not list.
        """
        category = {} if emode is None else self._emode(emode)
        if asset in category.get("collateral", ()):
            return float(category[key])
        own = self.value(key, asset)
        return 0.0 if key == "ltv" and category.get("isolated", False) else own

    def _emode(self, name: str) -> Mapping[str, Any]:
        if name not in self.emodes:
            raise InputError(f"venue {self.name} has no e-mode {name!r}: {did_you_mean(str(name), self.emodes)}.")
        return self.emodes[name]

    def params(
        self,
        collateral: Sequence[str],
        debt: Sequence[str],
        *,
        emode: str | None = None,
        capital: float = 1.0,
        dtype: Any = jnp.float32,
    ) -> HealthFactorParams:
        """Arrays of a loan with these assets.

        Args:
          collateral: assets of the collateral, in the order of the account's rows.
          debt: borrowed assets.
          emode: category that the borrower has chosen.
          capital: USD per unit of the account's values.
          dtype: precision of the paths.

        Raises:
          InputError: an asset that the venue does not accept, or that the e-mode does not let borrow.
        """
        if emode is not None:
            for asset in debt:
                if asset not in self._emode(emode)["debt"]:
                    raise InputError(
                        f"venue {self.name}: e-mode {emode} does not lend {asset}, only "
                        f"{', '.join(self._emode(emode)['debt'])}; leave the e-mode or borrow one of these."
                    )

        def each(key: str) -> Array:
            return rounded([self.collateral_value(key, asset, emode) for asset in collateral], dtype)

        return HealthFactorParams(
            threshold=each("liquidation_threshold"),
            ltv=each("ltv"),
            bonus=each("liquidation_bonus"),
            protocol_fee=rounded([self.value("liquidation_protocol_fee", asset) for asset in collateral], dtype),
            close_factor=rounded(self.close_factor, dtype),
            full_close_health=rounded(self.full_close_health_factor, dtype),
            small_position=rounded(self.small_position_usd / capital, dtype),
            min_leftover=rounded(self.min_leftover / capital, dtype),
        )
