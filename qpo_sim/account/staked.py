r"""Staked or wrapped token: a claim on an amount of an asset that grows by rewards, at the market's discount.

The value is $a\,P\,d$ with the amount a of the underlying that the token stands for, the price P of the underlying and
the price d of the token in terms of what it stands for (the market's `peg` process of the token's name; 1 without one).
Rewards raise a at a continuous rate of log(1 + reward per year). Losses of the claim itself (slashing, theft) are
permanent impairments of that peg process.

Pathwise gradient: every leaf.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.account.coin import Coin, gas_price
from qpo_sim.account.protocol import Moment, Status, booking
from qpo_sim.errors import InputError, did_you_mean, finite
from qpo_sim.instrument.first_passage import Options
from qpo_sim.instrument.scene import Scene
from qpo_sim.numerics import materialised, rounded
from qpo_sim.policy.orders import AccountView, Order
from qpo_sim.types import HOURS_PER_YEAR, Array, Context

_FAR = 1e3
_TINY = 1e-12


class State(NamedTuple):
    """State after a step.

    Attributes:
      amount: of the underlying that the tokens stand for.
      price: of the underlying that one token unit of it is sold at, discount included.
      underlying: price of the underlying.
      gas: price of gas over its start.
      gas_start: price of gas at the start.
      status: see `protocol.Status`.
    """

    amount: Array
    price: Array
    underlying: Array
    gas: Array
    gas_start: Array
    status: Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Staked:
    """Parameters of a holding of staked tokens.

    Attributes:
      size: value at the start, units of the capital.
      reward_per_hour: continuous rate.
      gas: of a policy's trade, units of the capital at the starting price of gas.
      trading_cost: share of the value that a policy's trade costs.
      token: the token (static).
      name: of the account (static).
      venue: of the account (static).
    """

    size: Float[Array, ""]
    reward_per_hour: Float[Array, ""]
    gas: Float[Array, ""]
    trading_cost: Float[Array, ""]
    token: Coin = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    venue: str = field(default="staking", metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `protocol.Account`."""
        return (self.token.asset,)

    @property
    def can_be_liquidated(self) -> bool:
        """See `protocol.Account`."""
        return False

    def start_value(self) -> float:
        """Value at the start, a fraction of the capital."""
        return float(self.size)

    def components(self, assets: tuple[str, ...]) -> tuple[str, ...]:
        """See `protocol.Account`."""
        return f"{assets[self.token.asset]} staked", f"{self.token.name} discount"

    def init(self, context: Context, scene: Scene, options: Options) -> State:
        """See `protocol.Account`."""
        one = jnp.ones_like(scene.prices[0])
        zero = 0.0 * one
        status = Status(self.size * one, _FAR * one, zero, zero, zero, booking(2, zero))
        return State(self.size * one, one, one, one, gas_price(scene, one) * one, status)

    def step(self, context: Context, t: Array, state: State, moment: Moment, uniform: Array, options: Options) -> State:
        """See `protocol.Account`."""

        def settled(account: Staked, state: State, moment: Moment):
            price, underlying = account.token.price(context, moment.after), moment.after.prices[account.token.asset]
            discount = state.price / state.underlying
            asset_move = state.amount * (underlying - state.underlying) * discount
            whole = state.amount * (price - state.price)
            reward = state.amount * jnp.expm1(account.reward_per_hour * context.step_hours)
            booked = state.status.booking.moved((asset_move, whole - asset_move)).plus(income=reward * price)
            amount = state.amount + reward
            status = state.status._replace(equity=amount * price, booking=booked)
            gas = gas_price(moment.after, price) / state.gas_start
            return State(amount, price, underlying, gas, state.gas_start, status)

        return materialised(settled)(self, state, moment)

    def view(self, state: State, scene: Scene) -> AccountView:
        """See `protocol.Account`; `gross` is the value, and nothing is required."""
        equity = state.status.equity
        zero = jnp.zeros_like(equity)
        is_open = jnp.where(state.amount > 0.0, 1.0, zero)
        return AccountView(equity, zero, zero, equity, equity, (equity,), is_open)

    def fill(self, state: State, scene: Scene, order: Order) -> tuple[State, Array]:
        """See `protocol.Account`: `keep` in [0, 1] sells the rest; a transfer buys tokens, a negative one sells them.

        All at the market's price, discount included, with costs of at most the value that is moved.
        """
        moved = jnp.zeros_like(state.amount)
        if order.keep is not None:
            state, received = self._sold(state, (1.0 - jnp.clip(order.keep, 0.0, 1.0)) * state.amount)
            moved = moved - received
        if order.transfer is not None:
            paid = jnp.maximum(order.transfer, 0.0)
            cost = self._cost(state, paid)
            state = _charged(state._replace(amount=state.amount + (paid - cost) / self._safe(state.price)), cost)
            wanted = jnp.maximum(-order.transfer, 0.0) / self._safe(state.price)
            state, received = self._sold(state, jnp.minimum(wanted, state.amount))
            moved = moved + paid - received
        status = state.status._replace(equity=state.amount * state.price)
        return state._replace(status=status), moved

    @staticmethod
    def _safe(price: Array) -> Array:
        return jnp.maximum(price, _TINY)

    def _sold(self, state: State, amount: Array) -> tuple[State, Array]:
        value = amount * state.price
        cost = self._cost(state, value)
        return _charged(state._replace(amount=state.amount - amount), cost), value - cost

    def _cost(self, state: State, value: Array) -> Array:
        gas = jnp.where(value > 0.0, self.gas * state.gas, 0.0)
        return jnp.minimum(gas + self.trading_cost * value, value)


def _charged(state: State, cost: Array) -> State:
    return state._replace(status=state.status._replace(booking=state.status.booking.plus(trading=-cost)))


def staked(
    *,
    name: str,
    asset: str,
    token: str,
    value: float,
    reward_per_year: float = 0.0,
    gas_usd: float = 0.0,
    trading_cost: float = 0.0,
    venue: str = "staking",
    assets: Sequence[str],
    capital: float,
    dtype: Any = jnp.float32,
) -> Staked:
    """Holding of staked or wrapped tokens from a description.

    Args:
      name: of the account.
      asset: the underlying.
      token: name of the token, also that of its peg process, e.g. stETH.
      value: at the start, as a fraction of the capital.
      reward_per_year: growth of the claim in a year, e.g. 0.03; negative for a fee.
      gas_usd: of a policy's trade at the starting price of gas.
      trading_cost: share of the value that a policy's trade costs.
      venue: a name for reports.
      assets: the market's assets.
      capital: USD.
      dtype: precision of the paths.

    Raises:
      InputError: an unknown asset, a number out of bounds.
    """
    if asset not in assets:
        raise InputError(f"asset is {asset!r}: {did_you_mean(str(asset), assets)}")
    if token in assets:
        raise InputError(f"token is {token!r}, which is an asset of the market itself; hold it as spot.")
    size, reward = finite(value, "value"), finite(reward_per_year, "reward_per_year")
    gas, cost = finite(gas_usd, "gas_usd"), finite(trading_cost, "trading_cost")
    if not size > 0.0:
        raise InputError(f"value is {size:g}; it must be positive.")
    if not -1.0 < reward <= 10.0:
        raise InputError(f"reward_per_year is {reward:g}; it must lie in (-1, 10], e.g. 0.03.")
    if gas < 0.0:
        raise InputError(f"gas_usd is {gas:g}; it must not be negative.")
    if not 0.0 <= cost < 1.0:
        raise InputError(f"trading_cost is {cost:g}; it must lie in [0, 1).")
    return Staked(
        size=rounded(size, dtype),
        reward_per_hour=rounded(np.log1p(reward) / HOURS_PER_YEAR, dtype),
        gas=rounded(gas / capital, dtype),
        trading_cost=rounded(cost, dtype),
        token=Coin(str(token), list(assets).index(asset), True),
        name=str(name),
        venue=str(venue),
    )
