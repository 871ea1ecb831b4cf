"""Accounts whose positions may change along a path: what the ledger asks of them.

An account is a frozen dataclass of parameters (a pytree) with static shape. It steps along the path as it is: there is
one outcome per path, the drawn one. Its probability of liquidation is estimated by the sum of the conditional
probabilities of the steps up to its first liquidation (the compensator of that event): unbiased whatever a policy does,
and less noisy than counting. Unlike a probability it can exceed one on a single path.

Pathwise gradient: of values between liquidations; the movement of liquidation times is not seen.
"""

from typing import Any, NamedTuple, Protocol

from qpo_sim.instrument.first_passage import Options
from qpo_sim.instrument.scene import Scene
from qpo_sim.policy.orders import AccountView, Order
from qpo_sim.random import Address
from qpo_sim.types import HOURS_PER_YEAR, Array, Context


class Moment(NamedTuple):
    """What an account sees of a step: the scenes at its ends and the conditional scale between them.

    `address` is where its draws of the step begin.
    """

    before: Scene
    after: Scene
    scale: Any
    address: Address


class Booking(NamedTuple):
    """P&L since the start by cause.

    Their sum is the change of equity less what was transferred into the account.

    Attributes:
      price: moves of prices, by component.
      funding: funding of perpetuals.
      interest: on debt (negative) and deposits.
      fees: of liquidations and deliveries.
      liquidation: slippage and bonuses of liquidations, and what others bear of their losses (positive).
      trading: fees and slippage of a policy's trades.
      income: pool fees and staking rewards.
    """

    price: tuple[Array, ...]
    funding: Array
    interest: Array
    fees: Array
    liquidation: Array
    trading: Array
    income: Array

    def plus(self, **amounts: Array) -> "Booking":
        """With amounts added by cause."""
        return self._replace(**{name: getattr(self, name) + amount for name, amount in amounts.items()})

    def moved(self, amounts: tuple[Array, ...]) -> "Booking":
        """With price moves added by component."""
        return self._replace(price=tuple(a + b for a, b in zip(self.price, amounts, strict=True)))


class Status(NamedTuple):
    """What an account says after a step.

    Attributes:
      equity: value to the holder, units of the capital.
      distance: log distance to liquidation; large where nothing can be liquidated.
      hit_probability: see the module.
      liquidated: 1 once it has been liquidated, wholly or in part.
      bad_debt: what others bear of its losses so far (insurance fund, lenders).
      booking: P&L by cause.
    """

    equity: Array
    distance: Array
    hit_probability: Array
    liquidated: Array
    bad_debt: Array
    booking: Booking


def booking(n_components: int, zero: Array) -> Booking:
    """Nothing booked."""
    return Booking((zero,) * n_components, *(zero,) * 6)


class Account(Protocol):
    """What a file of this folder offers: parameters as leaves, names and shape as static fields."""

    name: str
    venue: str

    @property
    def assets(self) -> tuple[int, ...]:
        """Assets whose prices it depends on."""
        ...

    @property
    def can_be_liquidated(self) -> bool:
        """Whether it has a row among the accounts that can be liquidated."""
        ...

    def components(self, assets: tuple[str, ...]) -> tuple[str, ...]:
        """Labels of its P&L components, in the order of `Booking.price`."""
        ...

    def init(self, context: Context, scene: Scene, options: Options) -> Any:
        """State before the first step; a NamedTuple with a field `status`."""
        ...

    def step(self, context: Context, t: Array, state: Any, moment: Moment, uniform: Array, options: Options) -> Any:
        """State after one step: what is due, a liquidation where the uniform falls below its probability, the marks."""
        ...

    def view(self, state: Any, scene: Scene) -> AccountView:
        """What policies see."""
        ...

    def fill(self, state: Any, scene: Scene, order: Order) -> tuple[Any, Array]:
        """State after an order, and the cash that left the outside for the account (negative: came out of it)."""
        ...


def oracle_feeds(context: Context) -> tuple[int, ...]:
    """Asset of each feed of the market's oracle."""
    for bound in context.market.side:
        if type(bound.component).__name__ == "Oracle":
            return bound.component.drivers
    return ()


def years(context: Context, t: Array) -> Array:
    """Time since the start at the end of step t."""
    return (t + 1).astype(context.market.drift.dtype) * (context.step_hours / HOURS_PER_YEAR)
