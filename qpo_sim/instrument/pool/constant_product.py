r"""Constant-product pool x y = L^2 and the full-range share in it.

Adams, Zinsmeister & Robinson (2020), Uniswap v2 Core; Angeris, Kao, Chiang, Noyes & Chitra (2019), An analysis of
Uniswap markets.
"""

from typing import NamedTuple

import jax.numpy as jnp

from qpo_sim.types import Array


class Swap(NamedTuple):
    """What a swap gives; prices are units of the coin paid in per unit of the coin taken out.

    Attributes:
      amount_out: taken out of the pool, >= 0.
      average_price: amount in over amount out, fee included; its limit for an empty swap.
      mid_after: marginal price without fee after the swap, with the fee left in the pool.
      slippage: average price over the mid before, minus 1; >= 0, fee included.
    """

    amount_out: Array
    average_price: Array
    mid_after: Array
    slippage: Array


class Holdings(NamedTuple):
    """Amounts of both coins behind a share."""

    base: Array
    quote: Array


def amount_out(reserve_in: Array, reserve_out: Array, amount_in: Array, fee: Array) -> Array:
    r"""Output of a swap, $y (1-f) d / (x + (1-f) d)$.

    Args:
      reserve_in: x, of the coin paid in, > 0.
      reserve_out: y, of the coin taken out, > 0.
      amount_in: d >= 0, fee included.
      fee: f, of the input.

    Pathwise gradient: all arguments.
    """
    net = (1.0 - fee) * amount_in
    return reserve_out * net / (reserve_in + net)


def amount_in(reserve_in: Array, reserve_out: Array, amount_out: Array, fee: Array) -> Array:
    """Input that takes `amount_out` < `reserve_out` out of the pool; the inverse of `amount_out`.

    Pathwise gradient: all arguments.
    """
    return reserve_in * amount_out / ((reserve_out - amount_out) * (1.0 - fee))


def swap(reserve_in: Array, reserve_out: Array, amount_in: Array, fee: Array) -> Swap:
    r"""Output and prices of a swap; arguments as in `amount_out`.

    The slippage is $d/x + f/(1-f)$ exactly, so nothing cancels in small swaps.

    Pathwise gradient: all arguments.
    """
    keep = 1.0 - fee
    relative = amount_in / reserve_in
    mid = reserve_in / reserve_out
    slippage = relative + fee / keep
    return Swap(
        amount_out(reserve_in, reserve_out, amount_in, fee),
        mid * (1.0 + slippage),
        mid * (1.0 + relative) * (1.0 + keep * relative),
        slippage,
    )


def growth(reserve_in: Array, amount_in: Array, fee: Array) -> Array:
    r"""Factor by which the fee of one swap raises L, $\sqrt{(x + d)/(x + (1-f) d)} \ge 1$.

    Pathwise gradient: all arguments.
    """
    return jnp.sqrt((reserve_in + amount_in) / (reserve_in + (1.0 - fee) * amount_in))


def holdings(liquidity: Array, price: Array) -> Holdings:
    r"""Coins behind a share at the external price P, $(L/\sqrt P, L \sqrt P)$.

    Pathwise gradient: all arguments.
    """
    root = jnp.sqrt(price)
    return Holdings(liquidity / root, liquidity * root)


def value(liquidity: Array, price: Array) -> Array:
    r"""Value of a share in the quote coin, $2 L \sqrt P$.

    Pathwise gradient: all arguments; the derivative in the price is the amount of the base coin.
    """
    return 2.0 * liquidity * jnp.sqrt(price)


def liquidity_from_value(value: Array, price: Array) -> Array:
    r"""L of a share worth `value` in the quote coin at price P, $V/(2 \sqrt P)$.

    Pathwise gradient: all arguments.
    """
    return value / (2.0 * jnp.sqrt(price))


def value_factor(price_ratio: Array) -> Array:
    r"""Value of a share in the quote coin over its value at the start, $\sqrt r$ at price ratio r, fees excluded.

    Pathwise gradient: yes.
    """
    return jnp.sqrt(price_ratio)


def impermanent_loss(price_ratio: Array) -> Array:
    r"""Share over the coins that were put in, minus 1: $2\sqrt r/(1+r) - 1 = -(1-\sqrt r)^2/(1+r) \le 0$.

    Pathwise gradient: yes.
    """
    gap = 1.0 - jnp.sqrt(price_ratio)
    return -gap * gap / (1.0 + price_ratio)
