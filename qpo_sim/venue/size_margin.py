r"""Margin linear in the size of a position, as on Deribit: a rate $a + b\,|q|$ with |q| in coins.

Initial and maintenance margin are that rate times the value: BTC 2 % + 0.005 % per BTC and 1 % + 0.005 % per BTC.
The size of a linear position is its quantity and does not move with the price; that of an inverse position of N USD is
N/P coins, so that its margin in coins is $a u + b u^2$ with $u = N/P$.

Source: Deribit support, "Linear Perpetual" and "Inverse Perpetual" (standard margin).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import rounded
from qpo_sim.types import Array, Held, Positions, Requirements
from qpo_sim.venue.tiered_margin import (
    FUTURES,
    LiquidationProcess,
    TierSchedule,
    check_kinds,
    coins_per_unit,
    liquidation_process,
    one_rate,
)


class SizeRate(NamedTuple):
    """Margin rate a + b |q| of a size of q coins: `base` a, `per_coin` b."""

    base: Array
    per_coin: Array


def margin_rate(rate: SizeRate, size: Array) -> Array:
    """Margin over value of a position of `size` coins (sign ignored)."""
    return rate.base + rate.per_coin * abs(size)


def margin(rate: SizeRate, size: Array, price: Array) -> Array:
    """Margin of a position of `size` coins (sign ignored) at a price, in the currency of the price.

    With price 1 it is in coins, as for inverse contracts. Pathwise gradient: yes.
    """
    return margin_rate(rate, size) * abs(size) * price


def liquidation_price(rate: SizeRate, *, quantity: float, entry: float, margin: float) -> float | None:
    """Price at which an isolated linear position is liquidated, or None.

    Args:
      rate: of the maintenance margin.
      quantity: coins, negative for a short.
      entry: entry price.
      margin: wallet balance or isolated margin.
    """
    slope = quantity - abs(quantity) * margin_rate(rate, quantity)
    price = (quantity * entry - margin) / slope if slope != 0.0 else inf
    # A rate above 1 makes a long's excess fall with the price: its root is no price that a fall leads to.
    return price if 0.0 < price < inf and (slope > 0.0) == (quantity > 0.0) else None


def inverse_liquidation_price(rate: SizeRate, *, notional: float, entry: float, margin: float) -> float | None:
    r"""Price at which an inverse position is liquidated, or None.

    The root of $W + N/E - N u/|N| = a u + b u^2$ in the value $u = |N|/P$ in coins: u is the positive root of
    $b u^2 + (a + s) u = W + N/E$, the smaller one for a short ($s = -1$).

    Args:
      rate: of the maintenance margin.
      notional: N in USD, negative for a short.
      entry: entry price E.
      margin: W in coins.
    """
    side = 1.0 if notional > 0.0 else -1.0
    linear, constant = rate.base + side, margin + notional / entry
    if rate.per_coin == 0.0:
        value = constant / linear
    else:
        discriminant = linear * linear + 4.0 * rate.per_coin * constant
        if discriminant < 0.0:
            return None
        # A form without cancellation: the root that tends to constant / linear as b falls to 0.
        value = 2.0 * constant / (linear + side * sqrt(discriminant))
    return abs(notional) / value if value > 0.0 else None


@dataclass(frozen=True)
class SizeMargin:
    """A perpetual venue whose margin rates rise linearly with the size of the position.

    Attributes:
      maintenance: [base, per coin] of the maintenance margin rate per asset; `default` serves the others.
      initial: [base, per coin] of the initial margin rate per asset.
      liquidation_fee_rate: fee on the closed notional per asset, or one number for all.
      liquidation_slippage: share of the notional lost when the position is closed into the book.
      liquidation: mapping of `LiquidationProcess` fields.
      funding_rate: paid by longs per interval on the mark notional.
      funding_interval_hours: hours between funding stamps.
      taker_fee_rate: fee on traded notional.
      name: for messages and reports.
      source: where the figures come from.
      as_of: date of the figures.
    """

    maintenance: Mapping[str, Any]
    initial: Mapping[str, Any]
    liquidation_fee_rate: Any = 0.0
    liquidation_slippage: float = 0.0
    liquidation: Mapping[str, Any] = field(default_factory=dict)
    funding_rate: float = 0.0
    funding_interval_hours: float = 8.0
    taker_fee_rate: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""
    process: LiquidationProcess = field(init=False, compare=False, default=LiquidationProcess())

    def __post_init__(self) -> None:
        """Checks every rate once."""
        for key in ("maintenance", "initial"):
            for asset, row in getattr(self, key).items():
                if len(row) != 2 or not (0.0 < row[0] < 1.0 and 0.0 <= row[1] < 1.0):
                    raise InputError(
                        f"venue {self.name}: {key}.{asset} is {row}; it must be [base, per coin] with the base in "
                        "(0, 1) and the other in [0, 1), such as [0.01, 0.00005]."
                    )
        if set(self.maintenance) != set(self.initial):
            raise InputError(
                f"venue {self.name}: maintenance lists {', '.join(self.maintenance)} and initial "
                f"{', '.join(self.initial)}; they must list the same assets."
            )
        for asset in self.maintenance:
            low, high = self.maintenance_rate(asset), self.initial_rate(asset)
            if not (low.base < high.base and low.per_coin <= high.per_coin):
                raise InputError(
                    f"venue {self.name}: initial.{asset} is {self.initial[asset]}; it must exceed the maintenance rate "
                    f"{self.maintenance[asset]} at every size."
                )
        fees = self.liquidation_fee_rate
        for fee in [*fees.values()] if isinstance(fees, Mapping) else [fees]:
            if not 0.0 <= fee < 1.0:
                raise InputError(f"venue {self.name}: liquidation_fee_rate is {fee}, it must lie in [0, 1).")
        if not 0.0 <= self.liquidation_slippage < 1.0:
            raise InputError(
                f"venue {self.name}: liquidation_slippage is {self.liquidation_slippage}, it must lie in [0, 1)."
            )
        if not self.funding_interval_hours > 0.0:
            raise InputError(
                f"venue {self.name}: funding_interval_hours is {self.funding_interval_hours}, it must be positive."
            )
        object.__setattr__(self, "process", liquidation_process(self.liquidation, name=self.name))

    def _of(self, table: Mapping[str, Any], asset: str) -> Any:
        if asset in table:
            return table[asset]
        if "default" in table:
            return table["default"]
        raise InputError(
            f"venue {self.name} has no margin for {asset} and no default; it lists {', '.join(self.maintenance)}."
        )

    def maintenance_rate(self, asset: str) -> SizeRate:
        """Rate of the maintenance margin of an asset.

        Raises:
          InputError: neither the asset nor `default` is listed; so for all methods.
        """
        return SizeRate(*map(float, self._of(self.maintenance, asset)))

    def initial_rate(self, asset: str) -> SizeRate:
        """Rate of the initial margin of an asset."""
        return SizeRate(*map(float, self._of(self.initial, asset)))

    def fee_rate(self, asset: str) -> float:
        """Liquidation fee of an asset on the closed notional."""
        fees = self.liquidation_fee_rate
        return float(self._of(fees, asset)) if isinstance(fees, Mapping) else float(fees)

    def position_schedule(self, asset: str, size: float) -> TierSchedule:
        """Schedule by notional for a position of a fixed size in coins (sign ignored): one tier.

        For an inverse position the size is its value in coins, here that at one price.
        """
        return one_rate(float(margin_rate(self.maintenance_rate(asset), size)))

    def max_leverage(self, asset: str, size: float) -> float:
        """Leverage the venue allows for a position of this size in coins."""
        return 1.0 / float(margin_rate(self.initial_rate(asset), size))

    def bind(self, positions: Positions, *, capital: float, prices: Mapping[str, float], dtype: Any) -> "BoundSizes":
        """The rule for the positions of one account; arguments as in `TieredMargin.bind`.

        Raises:
          InputError: an asset that is not listed, a kind of contract that the rule does not cover, a missing price.
        """
        check_kinds(self.name, positions.kinds, FUTURES)
        coins = coins_per_unit(self.name, positions.assets, capital, prices)

        def rates(of: Any) -> SizeRate:
            rows = np.array([[rate.base, rate.per_coin] for rate in map(of, positions.assets)]).reshape(-1, 2)
            return SizeRate(rounded(rows[:, 0], dtype), rounded(rows[:, 1] * coins, dtype))

        return BoundSizes(rates(self.maintenance_rate), rates(self.initial_rate))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundSizes:
    """Margin rates of the positions of one account, per unit of theirs instead of per coin."""

    maintenance: SizeRate
    initial: SizeRate

    def requirements(self, held: tuple[Held, ...]) -> Requirements:
        """Maintenance margin of the positions. Pathwise gradient: prices, quantities, rates."""
        return Requirements(_margins(self.maintenance, held), 0.0)

    def initial_margin(self, held: tuple[Held, ...]) -> tuple[Array, ...]:
        """Initial margin of each position."""
        return _margins(self.initial, held)


def _margins(rate: SizeRate, held: tuple[Held, ...]) -> tuple[Float[Array, "..."], ...]:
    rows = []
    for i, position in enumerate(held):
        units = jnp.abs(position.quantity)
        # The size of an inverse position is its value in coins.
        size = units / position.price if position.kind == "InversePerpetual" else units
        rows.append(margin_rate(SizeRate(rate.base[i], rate.per_coin[i]), size) * units * position.notional)
    return tuple(rows)
