"""The path-dependent part of the ledger: accounts that trade, cash and spot that policies move, and the policies.

After a step has been settled each policy in turn sees the book as the ones before it left it, and its orders are filled
at the prices of that moment, with costs: what a policy trades on is never later than what it knows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.account import protocol
from qpo_sim.account.protocol import Moment, Status
from qpo_sim.instrument.first_passage import Options
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import line as market_line
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Rows, materialised
from qpo_sim.policy.orders import DeskView, Orders, muted
from qpo_sim.random import Stream
from qpo_sim.types import Array, Context

# Slots of draws of the accounts of a desk, behind those of the ledger's uniforms. Beyond the last slot accounts share
# draws, which only ties together where in a step they are looked at.
_FIRST_SLOT, _SLOTS, _N_SLOTS = 2048, 64, 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TradingCosts:
    """What outright trades of a policy cost; leaves.

    Attributes:
      fee: on the traded value.
      slippage: on the traded value, in a book of normal depth; over the depth where the market has a depth process.
      gas: per holding traded, units of the capital; times the gas price over its start where the market has one.
    """

    fee: Float[Array, ""]
    slippage: Float[Array, ""]
    gas: Float[Array, ""]


class DeskState(NamedTuple):
    """State of the desk: the last scene, cash and units of spot (empty while no policy moves them), accounts, policies.

    `price` is the P&L of each outright holding so far, `trading` minus the costs of outright trades,
    `first_gas` the gas price at the start where the market has one.
    """

    scene: Scene
    cash: Array
    spot: tuple[Array, ...]
    accounts: tuple[Any, ...]
    policies: tuple[Any, ...]
    price: tuple[Array, ...]
    trading: Array
    first_gas: Any = ()

    @property
    def statuses(self) -> tuple[Status, ...]:
        """What the accounts say."""
        return tuple(state.status for state in self.accounts)


def first_scene(context: Context, one: Array) -> Scene:
    """Before the first step: every relative price is 1, side processes are at their start."""
    n_assets = context.market.drift.shape[1]
    like = (one,) * n_assets if n_assets <= MAX_UNROLLED_ASSETS else jnp.stack((one,) * n_assets)
    return Scene(like, 0.0 * one[:1], market_line.first_outputs(context, one))


def init(context: Context, book: Any, options: Options) -> DeskState:
    """State before the first step."""
    one = jnp.ones(context.path.shape, context.market.drift.dtype)
    scene = first_scene(context, one)
    spot = tuple(book.spot[k] * one for k in range(len(book.spot_assets)))
    states = tuple(holding.init(context, scene, options) for holding in book.holdings)
    zero = 0.0 * one
    state = DeskState(scene, book.cash * one, spot, states, (), (zero,) * len(spot), zero, scene.side.get("gas", ()))
    masks = (zero,) * (context.market.drift.shape[0] - 1)
    view = _view(book, state, masks) if book.policies else None
    return state._replace(policies=tuple(policy.init(view) for policy in book.policies))


def step(context: Context, book: Any, t: Array, state: DeskState, prices: Rows, scale: Any, uniforms: Any, options):
    """State after a step: accounts settled, then policies one after the other."""
    scene = Scene(prices, protocol.years(context, t)[None], scale.side if isinstance(scale.side, dict) else {})
    draws = market_line.address(context, Stream.LIQUIDATION, t, _FIRST_SLOT)
    states = tuple(
        holding.step(context, t, before, Moment(state.scene, scene, scale, at), uniform, options)
        for holding, before, uniform, at in zip(
            book.holdings,
            state.accounts,
            uniforms,
            (draws.after(_SLOTS * j % _N_SLOTS) for j in range(len(book.holdings))),
            strict=True,
        )
    )
    price = tuple(
        total + units * (scene.prices[i] - state.scene.prices[i])
        for total, units, i in zip(state.price, state.spot, book.spot_assets, strict=True)
    )
    state = state._replace(scene=scene, accounts=states, price=price)
    policies = list(state.policies)
    for k, policy in enumerate(book.policies):
        # A kill switch that is off keeps the others from opening again what it has closed.
        halts = [p.halts(policies[j]) for j, p in enumerate(book.policies) if j != k and hasattr(p, "halts")]

        def act(policy, before, book, state, t, masks, halts):
            after, orders = policy.step(context, t, before, _view(book, state, masks))
            acts = jnp.ones_like(state.cash)
            for halt in halts:
                acts = acts * (1.0 - halt)
            return after, _filled(book, state, muted(orders, acts) if halts else orders)

        policies[k], state = materialised(act)(policy, policies[k], book, state, t, scale.masks, halts)
    return state._replace(policies=tuple(policies))


def outright(book: Any, state: DeskState) -> Array:
    """Value of cash and spot."""
    values = (units * state.scene.prices[i] for units, i in zip(state.spot, book.spot_assets, strict=True))
    return sum(values, state.cash)


def _view(book: Any, state: DeskState, masks: tuple[Array, ...]) -> DeskView:
    views = tuple(holding.view(s, state.scene) for holding, s in zip(book.holdings, state.accounts, strict=True))
    spot = tuple(units * state.scene.prices[i] for units, i in zip(state.spot, book.spot_assets, strict=True))
    equity = sum((view.equity for view in views), sum(spot, state.cash))
    return DeskView(equity, state.cash, spot, state.scene.prices, views, state.scene.side, masks)


def _filled(book: Any, state: DeskState, orders: Orders) -> DeskState:
    states, cash = list(state.accounts), state.cash
    for j, order in orders.accounts:
        if order.transfer is not None:
            # What comes out of the cash is limited by it.
            order = order._replace(transfer=jnp.minimum(order.transfer, jnp.maximum(cash, 0.0)))
        states[j], moved = book.holdings[j].fill(states[j], state.scene, order)
        cash = cash - moved
    state = state._replace(accounts=tuple(states), cash=cash)
    if orders.spot is None:
        return state
    prices, spot = state.scene.prices, []
    # No more is sold than there is, then no more bought than the cash pays for.
    values = [
        jnp.maximum(value, -jnp.maximum(units * prices[i], 0.0))
        for value, units, i in zip(orders.spot, state.spot, book.spot_assets, strict=True)
    ]
    costs = [_trading_cost(book, state, i, value) for value, i in zip(values, book.spot_assets, strict=True)]
    zero = jnp.zeros_like(cash)
    sold = sum((jnp.maximum(-v, 0.0) - jnp.where(v < 0.0, c, 0.0) for v, c in zip(values, costs, strict=True)), zero)
    asked = sum((jnp.where(v > 0.0, v + c, 0.0) for v, c in zip(values, costs, strict=True)), zero)
    short = asked > jnp.maximum(cash + sold, 0.0)
    share = jnp.where(short, jnp.maximum(cash + sold, 0.0) / jnp.where(short, asked, 1.0), 1.0)
    for value, cost, units, i in zip(values, costs, state.spot, book.spot_assets, strict=True):
        # The gas of a purchase that is cut short shrinks with it.
        part = jnp.where(value > 0.0, share, 1.0)
        value, cost = part * value, part * cost
        spot.append(units + value / prices[i])
        state = state._replace(cash=state.cash - value - cost, trading=state.trading - cost)
    return state._replace(spot=tuple(spot))


def _trading_cost(book: Any, state: DeskState, asset: int, value: Array) -> Array:
    costs, side = book.trading_costs, state.scene.side
    thinness = 1.0 / jnp.maximum(side["depth"][asset], 1e-3) if "depth" in side else 1.0
    gas = costs.gas * (side["gas"] / state.first_gas if "gas" in side else 1.0) * (value != 0.0)
    return jnp.abs(value) * (costs.fee + jnp.minimum(costs.slippage * thinness, 1.0)) + gas
