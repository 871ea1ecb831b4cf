r"""Futures contracts: value, profit, notional and delta of linear, inverse, quanto and dated ones.

| | linear | inverse | quanto |
|---|---|---|---|
| size | coins q | USD notional N | coins q, multiplier m |
| settled in | quote currency | the coin | another coin, price $P_s$ |
| profit from E to P | $q (P - E)$ | $N (1/E - 1/P)$ coins | $m q (P - E)$ coins |
| notional | $|q| P$ | $|N| / P$ coins | $m |q| P$ coins |
| delta to P | $q$ | $N / P^2$ coins | $m q$ coins |
| USD value of one unit | $P$ | $-P_s / P$ | $m P P_s$ |

Quantities are signed, short below 0. The last row is what an account adds up: equity = balance x coin price + sum of
quantity x unit value, where the balance holds the entry (- q E, + N/E, - m q E). An inverse perpetual marked at its
own coin's price has the constant unit value -1. Dated futures are linear or inverse ones whose P is their own forward.

Functions are elementwise on arrays (path axis last), differentiable, and homogeneous in money. Sources: Binance,
"USDT-M and COIN-M futures"; BitMEX, "Perpetual contracts guide" (inverse and quanto).
"""

from typing import NamedTuple

import jax.numpy as jnp

from qpo_sim.numerics import safe_log
from qpo_sim.types import Array


def linear_profit(quantity: Array, entry: Array, price: Array) -> Array:
    """Unrealised profit of a linear contract, in quote currency."""
    return quantity * (price - entry)


def linear_notional(quantity: Array, price: Array) -> Array:
    """Value of a linear position at a price, sign dropped, in quote currency."""
    return jnp.abs(quantity) * price


def linear_unit_value(price: Array) -> Array:
    """Value of one coin of a linear contract in an account whose balance holds - quantity x entry."""
    return price


def inverse_profit(notional: Array, entry: Array, price: Array) -> Array:
    """Unrealised profit of an inverse contract in coins, N (1/E - 1/P)."""
    return notional * (1.0 / entry - 1.0 / price)


def inverse_notional(notional: Array, price: Array) -> Array:
    """Value of an inverse position at a price, sign dropped, in coins."""
    return jnp.abs(notional) / price


def inverse_delta(notional: Array, price: Array) -> Array:
    """Derivative of the profit of an inverse contract by the price, coins per USD; times the price: coins of delta."""
    return notional / (price * price)


def inverse_equity(margin: Array, notional: Array, entry: Array, price: Array, *, coin_price: Array) -> Array:
    """Equity in USD of `margin` coins and an inverse position: (margin + profit) x price of the coin.

    Constant in the price for a short with |N| = margin x entry marked at the coin's own price.
    """
    return (margin + inverse_profit(notional, entry, price)) * coin_price


def inverse_unit_value(price: Array, coin_price: Array) -> Array:
    """USD value of one USD of notional in an account whose balance holds + notional / entry coins: -P_s / P.

    Exactly -1 where the contract's price is the coin's.
    """
    return -coin_price / price


def quanto_profit(quantity: Array, entry: Array, price: Array, *, multiplier: Array) -> Array:
    """Unrealised profit of a quanto contract in settlement coins: m coins per unit of price and contract."""
    return multiplier * quantity * (price - entry)


def quanto_notional(quantity: Array, price: Array, *, multiplier: Array) -> Array:
    """Value of a quanto position at a price, sign dropped, in settlement coins."""
    return multiplier * jnp.abs(quantity) * price


def quanto_unit_value(price: Array, settlement_price: Array, *, multiplier: Array) -> Array:
    """USD value of one quanto contract in an account whose balance holds - m x quantity x entry coins."""
    return multiplier * price * settlement_price


class QuantoDelta(NamedTuple):
    """USD delta of a quanto position's profit: by the price of the underlying and by that of the settlement coin."""

    underlying: Array
    settlement: Array


def quanto_delta(
    quantity: Array, entry: Array, price: Array, settlement_price: Array, *, multiplier: Array
) -> QuantoDelta:
    """Derivatives of the profit in USD, m q (P - E) P_s, by P and by P_s."""
    return QuantoDelta(
        multiplier * quantity * settlement_price, quanto_profit(quantity, entry, price, multiplier=multiplier)
    )


def forward_price(spot: Array, carry: Array, years: Array) -> Array:
    """Price of a dated future with a carry per year (continuous), S exp(c T); the spot at and after expiry."""
    return spot * jnp.exp(carry * jnp.maximum(years, 0.0))


def implied_carry(spot: Array, forward: Array, years: Array) -> Array:
    """Carry per year (continuous) in a forward, log(F / S) / T, for T above 0."""
    return safe_log(forward / spot) / years


def dated_delta(quantity: Array, carry: Array, years: Array) -> Array:
    """Delta of a linear dated future to the spot price, q exp(c T): above q in contango."""
    return quantity * jnp.exp(carry * jnp.maximum(years, 0.0))


def average_entry(quantity: Array, entry: Array, added: Array, price: Array) -> Array:
    """Entry price of a linear position after adding to it: average by coins; both quantities of one sign."""
    return (quantity * entry + added * price) / (quantity + added)


def inverse_average_entry(notional: Array, entry: Array, added: Array, price: Array) -> Array:
    """Entry price of an inverse position after adding to it: harmonic average by notional, both of one sign."""
    return (notional + added) / (notional / entry + added / price)
