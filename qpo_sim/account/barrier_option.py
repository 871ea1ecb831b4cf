r"""Barrier option bought outright: knocked in or out along the path, paid for in full, so that nothing is owed.

The option is on the price without carry (see `instrument.barrier`). Whether the barrier is touched between step ends is
drawn with the bridge probability given the step's conditional variance, at step ends alone under `step` monitoring;
jumps come at the end of the step. The mark is the closed form at one volatility: that of the market's surface at the
strike, or a constant one where the market has none.

Pathwise gradient: values between touches; the movement of touches is not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.account.protocol import Moment, Status, booking
from qpo_sim.errors import InputError, did_you_mean, finite
from qpo_sim.instrument import barrier as barriers
from qpo_sim.instrument.contract import Option
from qpo_sim.instrument.first_passage import Distance, Options, step_moments
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import model as market_model
from qpo_sim.numerics import materialised, rounded
from qpo_sim.policy.orders import AccountView, Order
from qpo_sim.types import DAYS_PER_YEAR, Array, Context

# Within this much of the expiry, half a minute, it has come.
_EXPIRY_SLACK = 1e-6
_FAR = 1e3
_TINY = 1e-12


class State(NamedTuple):
    """Units, whether the barrier is untouched, what the expiry paid, and the status."""

    units: Array
    is_untouched: Array
    cash: Array
    status: Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BarrierOption:
    """Parameters of a holding of barrier options.

    Attributes:
      premium: value at the start, units of the capital.
      contract: the option without its barrier.
      barrier: level over the starting price.
      trading_cost: share of the value that a policy's trade costs.
      is_up: the barrier is above the starting price (static).
      is_in: a touch brings the option to life, else it ends it (static).
      name: of the account (static).
      venue: of the account (static).
    """

    premium: Float[Array, ""]
    contract: Option
    barrier: Float[Array, ""]
    trading_cost: Float[Array, ""]
    is_up: bool = field(metadata={"static": True})
    is_in: bool = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    venue: str = field(default="dealer", metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `protocol.Account`."""
        return (self.contract.asset,)

    @property
    def can_be_liquidated(self) -> bool:
        """See `protocol.Account`."""
        return False

    def start_value(self) -> float:
        """Premium, a fraction of the capital."""
        return float(self.premium)

    def components(self, assets: tuple[str, ...]) -> tuple[str, ...]:
        """See `protocol.Account`."""
        kind = f"{'up' if self.is_up else 'down'}-and-{'in' if self.is_in else 'out'}"
        return (f"{assets[self.contract.asset]} {kind} {'call' if self.contract.is_call else 'put'}",)

    def mark(self, scene: Scene, is_untouched: Array) -> Array:
        """Value of one unit."""
        price = scene.prices[self.contract.asset]
        volatility = self.contract.implied_volatility(scene)
        untouched = barriers.value(
            price,
            self.contract.strike,
            self.barrier,
            self.contract.time_left(scene),
            volatility,
            is_call=self.contract.is_call,
            is_up=self.is_up,
            is_in=self.is_in,
        )
        touched = self.contract.mark_at(scene, volatility) if self.is_in else 0.0
        return jnp.where(is_untouched > 0.0, untouched, touched)

    def init(self, context: Context, scene: Scene, options: Options) -> State:
        """See `protocol.Account`."""
        one = jnp.ones_like(scene.prices[0])
        zero = 0.0 * one
        status = Status(self.premium * one, _FAR * one, zero, zero, zero, booking(1, zero))
        return State(self.premium / jnp.maximum(self.mark(scene, one), _TINY), one, zero, status)

    def step(self, context: Context, t: Array, state: State, moment: Moment, uniform: Array, options: Options) -> State:
        """See `protocol.Account`."""
        asset = self.contract.asset
        one = jnp.ones_like(uniform)
        variance = step_moments(Distance(one, (one,)), self.assets, context, moment.scale)[0]
        jump = market_model.jump_move(moment.scale, self.assets, (one,))

        def settled(account: BarrierOption, state: State, moment: Moment, uniform, variance, jump):
            start, end = moment.before.prices[asset], moment.after.prices[asset]
            survives = 1.0
            if options.bridge:
                survives = barriers.step_survival(
                    start, end * jnp.exp(-jump), account.barrier, variance, is_up=account.is_up
                )
            is_beyond = end >= account.barrier if account.is_up else end <= account.barrier
            is_touched = is_beyond | (uniform >= survives)
            is_untouched = jnp.where(is_touched, 0.0, state.is_untouched)
            before = account.mark(moment.before, state.is_untouched)
            after = account.mark(moment.after, is_untouched)
            booked = state.status.booking.moved((state.units * (after - before),))
            expires = moment.after.years > account.contract.expiry_years - _EXPIRY_SLACK
            cash = state.cash + jnp.where(expires, state.units * after, 0.0)
            units = jnp.where(expires, 0.0, state.units)
            status = state.status._replace(equity=units * after + cash, booking=booked)
            return State(units, is_untouched, cash, status)

        return materialised(settled)(self, state, moment, uniform, variance, jump)

    def view(self, state: State, scene: Scene) -> AccountView:
        """See `protocol.Account`; `gross` is the value, and nothing is required."""
        asset = self.contract.asset
        price = scene.prices[asset]

        def worth(move):
            return state.units * self.mark(scene.at_prices((asset,), (price * (1.0 + move),)), state.is_untouched)

        _, delta = jax.jvp(worth, (jnp.zeros_like(price),), (jnp.ones_like(price),))
        equity = state.status.equity
        zero = jnp.zeros_like(equity)
        return AccountView(equity, zero, zero, equity, equity, (delta,), jnp.where(state.units > 0.0, 1.0, zero))

    def fill(self, state: State, scene: Scene, order: Order) -> tuple[State, Array]:
        """See `protocol.Account`: `keep` in [0, 1] sells the rest and takes as much of what the expiry paid out.

        A transfer buys options at the mark, as far as they are worth anything; a negative one takes value out. A trade
        costs a share of the value it moves.
        """
        mark = self.mark(scene, state.is_untouched)
        moved = jnp.zeros_like(state.units)
        if order.keep is not None:
            state, out = self._taken(state, mark, 1.0 - jnp.clip(order.keep, 0.0, 1.0))
            moved = moved - out
        if order.transfer is not None:
            # What has expired or been knocked out cannot be bought.
            can_buy = (mark > _TINY) & (scene.years < self.contract.expiry_years - _EXPIRY_SLACK)
            paid = jnp.where(can_buy, jnp.maximum(order.transfer, 0.0), 0.0)
            cost = self.trading_cost * paid
            bought = (paid - cost) / jnp.where(can_buy, mark, 1.0)
            state = _charged(state._replace(units=state.units + bought), cost)
            worth = state.units * mark + state.cash
            share = jnp.clip(jnp.maximum(-order.transfer, 0.0) / jnp.maximum(worth, _TINY), 0.0, 1.0)
            state, out = self._taken(state, mark, share)
            moved = moved + paid - out
        status = state.status._replace(equity=state.units * mark + state.cash)
        return state._replace(status=status), moved

    def _taken(self, state: State, mark: Array, share: Array) -> tuple[State, Array]:
        # Takes a share out of everything; the cash that arrives.
        sold = share * state.units * mark
        cost = self.trading_cost * sold
        out = sold - cost + share * state.cash
        left = 1.0 - share
        return _charged(state._replace(units=state.units * left, cash=state.cash * left), cost), out


def _charged(state: State, cost: Array) -> State:
    return state._replace(status=state.status._replace(booking=state.status.booking.plus(trading=-cost)))


# ----------------------------------------------------------------------------- building


def barrier_option(
    *,
    name: str,
    asset: str,
    type: str,  # noqa: A002
    knock: str,
    moneyness: float | None = None,
    strike: float | None = None,
    barrier: float,
    days: float,
    premium: float,
    volatility: float = 0.6,
    trading_cost: float = 0.0,
    venue: str = "dealer",
    assets: Sequence[str],
    prices: Mapping[str, float],
    dtype: Any = jnp.float32,
) -> BarrierOption:
    """Barrier option from a description.

    Args:
      name: of the account.
      asset: the underlying.
      type: call or put.
      knock: in or out.
      moneyness: strike over the starting price; either this or `strike`.
      strike: in USD.
      barrier: level over the starting price; above 1 it is an up barrier, below 1 a down barrier.
      days: to expiry.
      premium: what is spent on it at the model's value, as a fraction of the capital.
      volatility: per year, where the market has no surface.
      trading_cost: share of the value that a policy's trade costs.
      venue: a name for reports.
      assets: the market's assets.
      prices: starting prices in USD.
      dtype: precision of the paths.

    Raises:
      InputError: an unknown asset or kind, an option that is worth nothing, a number out of bounds.
    """
    if asset not in assets:
        raise InputError(f"asset is {asset!r}: {did_you_mean(str(asset), assets)}")
    for key, word, choices in (("type", type, ("call", "put")), ("knock", knock, ("in", "out"))):
        if word not in choices:
            raise InputError(f"{key} is {word!r}; it must be {' or '.join(choices)}.")
    if (strike is None) == (moneyness is None):
        raise InputError("give either strike in USD or moneyness (strike over the price), and not both.")
    if strike is not None and asset not in prices:
        raise InputError(f"strike needs the starting price of {asset}, which is not known here.")
    level = finite(moneyness, "moneyness") if strike is None else finite(strike, "strike") / float(prices[asset])
    numbers = {"barrier": barrier, "days": days, "premium": premium, "volatility": volatility}
    checked = {key: finite(number, key) for key, number in numbers.items()}
    for key, number in {"strike": level, **checked}.items():
        if not number > 0.0:
            raise InputError(f"{key} is {number:g}; it must be positive.")
    if checked["barrier"] == 1.0:
        raise InputError("barrier is 1: it would be touched at once; move it away from the starting price.")
    cost = finite(trading_cost, "trading_cost")
    if not 0.0 <= cost < 1.0:
        raise InputError(f"trading_cost is {cost:g}; it must lie in [0, 1).")
    is_up = checked["barrier"] > 1.0
    years = checked["days"] / DAYS_PER_YEAR
    worth = barriers.value(
        1.0, level, checked["barrier"], years, checked["volatility"], is_call=type == "call", is_up=is_up,
        is_in=knock == "in",
    )  # fmt: skip
    if not float(worth) > 1e-6:
        raise InputError(
            f"barrier is {checked['barrier']:g} and the strike {level:g} times the price: this option is worth "
            f"{float(worth):.1g} of the price, too little to be bought; move the barrier or the strike."
        )
    contract = Option(
        rounded(np.float64(level), dtype),
        rounded(np.float64(years), dtype),
        rounded(np.float64(checked["volatility"]), dtype),
        rounded(np.float64(0.0), dtype),
        list(assets).index(asset),
        type == "call",
    )
    return BarrierOption(
        premium=rounded(checked["premium"], dtype),
        contract=contract,
        barrier=rounded(checked["barrier"], dtype),
        trading_cost=rounded(cost, dtype),
        is_up=is_up,
        is_in=knock == "in",
        name=str(name),
        venue=str(venue),
    )
