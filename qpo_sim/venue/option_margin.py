r"""Standard margin of options: each position by itself, as a share of the underlying plus the option's mark.

Per coin of a written option, U the underlying in the margin's currency (1 when that is the coin itself):

- call: $IM = \max(0.15\,U - O, 0.1\,U) + \text{mark}$, $MM = 0.075\,U + \text{mark}$;
- put: $MM = \max(0.075\,U, 0.075\,\text{mark}) + \text{mark}$,
  $IM = \max(\max(0.15\,U - O, 0.1\,U) + \text{mark}, MM)$,

with O = max(w (K - F), 0) U/F, the amount out of the money. A bought option has been paid for and needs none.
Deribit publishes this for coin-settled options, in coins (doc.tslab.pro, "Deribit margin requirements calculation");
Aevo in USD, U the index and 0.1 instead of 0.075 (docs.aevo.xyz, "Standard margin").

The margin holds what the written option is worth, so the balance that has to cover it counts premiums received but no
option values; against an equity in which written options count at their mark, it is what `net_of_mark` leaves of it,
and bought options do not count as collateral.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import rounded
from qpo_sim.types import Array, Held, Positions, Requirements
from qpo_sim.venue.size_margin import BoundSizes, SizeMargin
from qpo_sim.venue.tiered_margin import FUTURES, LiquidationProcess, check_kinds, liquidation_process

SETTLEMENTS = ("inverse", "linear")


class Rates(NamedTuple):
    """Shares of the underlying: initial margin at the money, its least, and maintenance margin."""

    initial: Array
    least_initial: Array
    maintenance: Array


class OptionRequirement(NamedTuple):
    """Initial and maintenance margin of a position, in the currency of its mark."""

    initial: Array
    maintenance: Array


def out_of_the_money(underlying: Array, strike: Array, *, is_call: Any) -> Array:
    """Amount out of the money over the underlying, max(w (K - F), 0) / F.

    Pathwise gradient: underlying, strike.
    """
    sign = jnp.where(is_call, 1.0, -1.0)
    return jnp.maximum(sign * (strike - underlying), 0.0) / underlying


def margin(
    rates: Rates,
    quantity: Array,
    mark: Array,
    underlying: Array,
    strike: Array,
    *,
    is_call: Any,
    is_coin_settled: bool = False,
    net_of_mark: bool = False,
) -> OptionRequirement:
    """Standard margin of one option position; it grows in proportion to the quantity.

    Args:
      rates: shares of the underlying.
      quantity: in coins, negative when written; a bought position needs nothing.
      mark: of the option per coin: in coins if `is_coin_settled`, else in the unit of the underlying.
      underlying: price of the underlying (on Deribit of the forward of the same expiry).
      strike: strike.
      is_call: else a put; a bool or an array of them.
      is_coin_settled: margin in coins, else in the unit of the underlying.
      net_of_mark: leave out the mark itself, for comparison with an equity that counts written options at their mark.

    Pathwise gradient: all but the flags.
    """
    unit = 1.0 if is_coin_settled else underlying
    written = jnp.maximum(-quantity, 0.0)
    share = jnp.maximum(rates.initial - out_of_the_money(underlying, strike, is_call=is_call), rates.least_initial)
    maintenance = rates.maintenance * jnp.where(is_call, unit, jnp.maximum(unit, mark))
    # For a call the maximum is idle as long as the least initial share exceeds the maintenance share.
    initial = jnp.where(is_call, share * unit, jnp.maximum(share * unit, maintenance))
    owed = 0.0 if net_of_mark else mark
    return OptionRequirement(written * (initial + owed), written * (maintenance + owed))


@dataclass(frozen=True)
class OptionMargin:
    """An option venue with standard margin.

    Attributes:
      initial_rate: share of the underlying in the initial margin of a written option at the money.
      least_initial_rate: share that it does not fall below, however far out of the money.
      maintenance_rate: share of the underlying in the maintenance margin.
      maker_fee_rate: fee as a share of the underlying, by settlement ("inverse", "linear").
      taker_fee_rate: the same for orders that take liquidity.
      delivery_fee_rate: the same at expiry, for options that pay.
      fee_cap: share of the option's price that no fee exceeds.
      futures: `maintenance` and `initial` of `SizeMargin`, for perpetuals and futures; empty: it covers none.
      futures_taker_fee_rate: fee on the notional of perpetuals and futures.
      liquidation_fee_rate: fee on the closed notional, one number or by asset with `default`.
      liquidation_slippage: share of the notional lost when positions are closed into the book.
      liquidation: mapping of `LiquidationProcess` fields.
      funding_rate: paid by longs of perpetuals per interval on the notional.
      funding_interval_hours: hours between funding stamps.
      name: for messages and reports.
      source: where the rates come from.
      as_of: date of the rates.
    """

    initial_rate: float = 0.15
    least_initial_rate: float = 0.1
    maintenance_rate: float = 0.075
    maker_fee_rate: Mapping[str, float] = field(default_factory=dict)
    taker_fee_rate: Mapping[str, float] = field(default_factory=dict)
    delivery_fee_rate: Mapping[str, float] = field(default_factory=dict)
    fee_cap: float = 0.125
    futures: Mapping[str, Any] = field(default_factory=dict)
    futures_taker_fee_rate: float = 0.0
    liquidation_fee_rate: Any = 0.0
    liquidation_slippage: float = 0.0
    liquidation: Mapping[str, Any] = field(default_factory=dict)
    funding_rate: float = 0.0
    funding_interval_hours: float = 8.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""
    size_margin: SizeMargin | None = field(init=False, repr=False, compare=False, default=None)
    process: LiquidationProcess = field(init=False, compare=False, default=LiquidationProcess())

    def __post_init__(self) -> None:
        """Checks ranges once."""
        for key in ("initial_rate", "least_initial_rate", "maintenance_rate"):
            value = getattr(self, key)
            if not 0.0 < value < 1.0:
                raise InputError(
                    f"venue {self.name}: {key} is {value}; it must lie in (0, 1), a share of the underlying."
                )
        if not self.maintenance_rate <= self.least_initial_rate <= self.initial_rate:
            raise InputError(
                f"venue {self.name}: maintenance_rate {self.maintenance_rate}, least_initial_rate "
                f"{self.least_initial_rate} and initial_rate {self.initial_rate} must not fall in this order, else a "
                "new position could be liquidated at once."
            )
        check_fees(self)
        check_closing(self)
        if self.futures:
            for key in self.futures:
                if key not in ("maintenance", "initial"):
                    raise InputError(
                        f"venue {self.name}: futures.{key} is not an option; it has maintenance and initial."
                    )
            if len(self.futures) < 2:
                raise InputError(f"venue {self.name}: futures needs both maintenance and initial.")
            object.__setattr__(self, "size_margin", SizeMargin(**self.futures, name=self.name))
        object.__setattr__(self, "process", liquidation_process(self.liquidation, name=self.name))

    @property
    def rates(self) -> Rates:
        """Rates of `margin`."""
        return Rates(self.initial_rate, self.least_initial_rate, self.maintenance_rate)

    def fee_rate(self, which: str, *, is_coin_settled: bool) -> float:
        """Fee rate "maker", "taker" or "delivery"; 0 where the venue gives none."""
        return fee_rate(self, which, is_coin_settled=is_coin_settled)

    def bind(self, positions: Positions, *, capital: float, prices: Mapping[str, float], dtype: Any) -> "BoundOptions":
        """The rule for the positions of one account; arguments as in `TieredMargin.bind`.

        Raises:
          InputError: a kind of contract that the rule does not cover, a future of an asset that `futures` does not
            list, or one whose starting price is not known.
        """
        check_kinds(self.name, positions.kinds, ("Option", *FUTURES) if self.size_margin else ("Option",))
        futures = [i for i, kind in enumerate(positions.kinds) if kind != "Option"]
        bound = None
        if futures and self.size_margin is not None:
            bound = self.size_margin.bind(positions.only(futures), capital=capital, prices=prices, dtype=dtype)
        return BoundOptions(Rates(*(rounded(rate, dtype) for rate in self.rates)), bound)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundOptions:
    """Standard margin of the positions of one account: options by `rates`, the others by their size."""

    rates: Rates
    futures: BoundSizes | None

    @property
    def counts_option_value(self) -> bool:
        """Margin of a written option holds its mark, and a bought one is no collateral: marks are in no equity."""
        return False

    def requirements(self, held: tuple[Held, ...]) -> Requirements:
        """Maintenance margin of the positions in USD. Pathwise gradient: prices, quantities, rates."""
        futures = () if self.futures is None else self.futures.requirements(_futures(held)).by_position
        return Requirements(self._merged(held, futures, "maintenance"), 0.0)

    def initial_margin(self, held: tuple[Held, ...]) -> tuple[Array, ...]:
        """Initial margin of each position."""
        futures = () if self.futures is None else self.futures.initial_margin(_futures(held))
        return self._merged(held, futures, "initial")

    def _merged(
        self, held: tuple[Held, ...], futures: tuple[Array, ...], which: str
    ) -> tuple[Float[Array, "..."], ...]:
        rest = iter(futures)
        return tuple(next(rest) if p.option is None else getattr(self._option(p), which) for p in held)

    def _option(self, position: Held) -> OptionRequirement:
        terms = position.option
        assert terms is not None
        # In coins where the option is: margin there times the price is margin in USD.
        price = position.price if terms.is_coin_settled else 1.0
        coins = margin(
            self.rates,
            position.quantity,
            position.mark / price,
            terms.forward,
            terms.strike,
            is_call=terms.is_call,
            is_coin_settled=terms.is_coin_settled,
        )
        return OptionRequirement(coins.initial * price, coins.maintenance * price)


def _futures(held: tuple[Held, ...]) -> tuple[Held, ...]:
    return tuple(position for position in held if position.option is None)


def check_closing(venue: Any) -> None:
    """Checks what an option venue says of liquidations and funding.

    Raises:
      InputError: a rate not in [0, 1), an interval that is not positive.
    """
    fees = venue.liquidation_fee_rate
    rates = {
        **({f"liquidation_fee_rate.{k}": v for k, v in fees.items()} if isinstance(fees, Mapping) else {}),
        **({} if isinstance(fees, Mapping) else {"liquidation_fee_rate": fees}),
        "liquidation_slippage": venue.liquidation_slippage,
        "futures_taker_fee_rate": venue.futures_taker_fee_rate,
    }
    for key, value in rates.items():
        if not 0.0 <= value < 1.0:
            raise InputError(f"venue {venue.name}: {key} is {value}; it must lie in [0, 1).")
    if not venue.funding_interval_hours > 0.0:
        raise InputError(
            f"venue {venue.name}: funding_interval_hours is {venue.funding_interval_hours}; it must be positive."
        )


def fee_rate(venue: Any, which: str, *, is_coin_settled: bool) -> float:
    """Fee rate "maker", "taker" or "delivery" of an option venue; 0 where it gives none."""
    return float(getattr(venue, f"{which}_fee_rate").get("inverse" if is_coin_settled else "linear", 0.0))


def check_fees(venue: Any) -> None:
    """Checks the fee tables of an option venue.

    Raises:
      InputError: a settlement other than inverse or linear, a rate not in [0, 1), a cap not in (0, 1].
    """
    for key in ("maker_fee_rate", "taker_fee_rate", "delivery_fee_rate"):
        for settlement, value in getattr(venue, key).items():
            if settlement not in SETTLEMENTS:
                raise InputError(
                    f"venue {venue.name}: {key} has a row {settlement!r}; its rows are {' and '.join(SETTLEMENTS)}."
                )
            if not 0.0 <= value < 1.0:
                raise InputError(
                    f"venue {venue.name}: {key}.{settlement} is {value}; it must lie in [0, 1), a share of the "
                    "underlying."
                )
    if not 0.0 < venue.fee_cap <= 1.0:
        raise InputError(
            f"venue {venue.name}: fee_cap is {venue.fee_cap}; it must lie in (0, 1], a share of the option's price."
        )
