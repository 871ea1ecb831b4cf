"""What a policy sees at the end of a step, and what it may order.

A policy decides on what the ledger says after the step has been settled, and its orders are filled at the prices of
that moment, with costs. It never sees a later price, nor the draws behind the present one.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from qpo_sim.numerics import Rows
from qpo_sim.types import Array


class AccountView(NamedTuple):
    """An account at the end of a step, one row of paths each.

    Attributes:
      equity: value to the holder.
      requirement: maintenance margin of a margin account; the debt of a loan.
      ratio: requirement over margin equity, or one over the health factor: 1 is the point of liquidation, 0 is no risk.
      gross: sum of the absolute notionals of a margin account; the debt of a loan.
      collateral: margin equity of a margin account; threshold-weighted collateral of a loan.
      delta: change of equity per relative change of each asset's price, in the order of the account's `assets`.
      is_open: 1 while it can be traded.
      quantity: units by position.
      unit_delta: delta of one unit of each position in its underlying.
      unit_vega: change of one unit's value per 1.00 of implied volatility, by position.
    """

    equity: Array
    requirement: Array
    ratio: Array
    gross: Array
    collateral: Array
    delta: tuple[Array, ...]
    is_open: Array
    quantity: tuple[Array, ...] = ()
    unit_delta: tuple[Array, ...] = ()
    unit_vega: tuple[Array, ...] = ()


class DeskView(NamedTuple):
    """The book at the end of a step.

    Attributes:
      equity: of everything.
      cash: outside accounts.
      spot: value of each outright holding.
      prices: relative price of each asset.
      accounts: see `AccountView`.
      side: outputs of the side processes.
      masks: one-hot masks of the regime (without regime 0).
    """

    equity: Array
    cash: Array
    spot: tuple[Array, ...]
    prices: Rows
    accounts: tuple[AccountView, ...]
    side: dict[str, Any]
    masks: tuple[Array, ...]


class Order(NamedTuple):
    """What one account is to do, in this order; None for nothing.

    Attributes:
      keep: factor on all its positions (loans: on the debt, repaid from collateral), 0 to close everything.
      trade: units to buy of single positions, by position number.
      transfer: cash moved from outside into the account (loans: debt repaid), negative for out of it; limited by the
        cash there is.
    """

    keep: Array | None = None
    trade: tuple[tuple[int, Array], ...] = ()
    transfer: Array | None = None


class Orders(NamedTuple):
    """What the book is to do after a step.

    Attributes:
      spot: value to buy of each outright holding; None for nothing.
      accounts: by account number.
    """

    spot: tuple[Array, ...] | None = None
    accounts: tuple[tuple[int, Order], ...] = ()


def muted(orders: Orders, acts: Array) -> Orders:
    """The orders where `acts` is 1, nothing where it is 0."""

    def order(one: Order) -> Order:
        return Order(
            None if one.keep is None else jnp.where(acts > 0.0, one.keep, 1.0),
            tuple((k, jnp.where(acts > 0.0, units, 0.0)) for k, units in one.trade),
            None if one.transfer is None else jnp.where(acts > 0.0, one.transfer, 0.0),
        )

    spot = None if orders.spot is None else tuple(jnp.where(acts > 0.0, value, 0.0) for value in orders.spot)
    return Orders(spot, tuple((j, order(one)) for j, one in orders.accounts))
