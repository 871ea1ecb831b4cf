r"""Economics of a liquidator: repay a debt, get collateral with a bonus, sell it into a pool, pay gas.

Repaying R gives $c = R/p\,(1 + b(1 - \varphi))$ coins at the oracle's price p (bonus b, of which the protocol keeps
the share $\varphi$). A constant-product pool (x coins, y money, fee f) pays $y a/(x + a)$ for $a = c(1 - f)$. With gas
g and a share s of the bonus bid to block builders or an oracle auction,

$$\mathrm{profit}(R) = \frac{y k R}{x + k R} - R\,(1 + s\,b(1-\varphi)) - g, \qquad k = (1 - f)(1 + b(1-\varphi))/p ,$$

a concave function with two break-even sizes (gas below, slippage above) and one optimum, all in closed form.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.instrument.pool import constant_product
from qpo_sim.numerics import safe_sqrt
from qpo_sim.types import Array


class ConstantProduct(NamedTuple):
    """A pool of two assets with x y constant: reserves in coins and in money, fee as a fraction of what is paid in."""

    coins: Float[Array, "..."]
    money: Float[Array, "..."]
    fee: Float[Array, "..."]


class Deal(NamedTuple):
    """Terms of a liquidation.

    Attributes:
      bonus: of the collateral, e.g. 0.055.
      protocol_fee: share of the bonus that the protocol keeps.
      oracle_price: at which collateral is handed out.
      gas_cost: of the transaction, in money (see `gas.cost`).
      bid: share of the liquidator's bonus that is bid away.
    """

    bonus: Array
    protocol_fee: Array
    oracle_price: Array
    gas_cost: Array
    bid: Array = 0.0


class BreakEven(NamedTuple):
    """Repayments between which a liquidation pays; NaN where none does."""

    low: Array
    high: Array


class Optimum(NamedTuple):
    """Repayment that pays most, and what it pays; 0 and -gas where the price falls from the first coin on."""

    repay: Array
    profit: Array


def sell(pool: ConstantProduct, coins: Array) -> Array:
    """Money that a constant-product pool pays for coins."""
    return constant_product.amount_out(pool.coins, pool.money, coins, pool.fee)


def coins_received(deal: Deal, repay: Array) -> Array:
    """Collateral for a repayment, after the protocol's share."""
    return repay / deal.oracle_price * (1.0 + deal.bonus * (1.0 - deal.protocol_fee))


def margin(bonus: Array, market_over_oracle: Array) -> Array:
    """Gross margin per unit repaid when collateral is sold at the market: (1 + bonus) market / oracle - 1."""
    return (1.0 + bonus) * market_over_oracle - 1.0


def profit(repay: Array, proceeds: Callable[[Array], Array], deal: Deal) -> Array:
    """Net profit of a liquidation.

    Args:
      repay: debt repaid, in money.
      proceeds: money for an amount of coins, e.g. `partial(sell, pool)` or a route's.
      deal: terms.

    Pathwise gradient: all.
    """
    bids = deal.bid * deal.bonus * (1.0 - deal.protocol_fee) * repay
    return proceeds(coins_received(deal, repay)) - repay - bids - deal.gas_cost


def acts(profit: Array) -> Array:
    """Whether a liquidator acts: only for a positive net profit."""
    return profit > 0.0


def _slopes(pool: ConstantProduct, deal: Deal) -> tuple[Array, Array]:
    # k and the cost per unit repaid, see the module.
    kept = deal.bonus * (1.0 - deal.protocol_fee)
    return (1.0 - pool.fee) * (1.0 + kept) / deal.oracle_price, 1.0 + deal.bid * kept


def optimal_repay(pool: ConstantProduct, deal: Deal, *, most: Array = jnp.inf) -> Optimum:
    """Best size of a liquidation that sells into a pool, at most `most` (the close factor's limit).

    The root of d profit / dR = 0, R = (sqrt(x y k / u) - x) / k with cost u per unit repaid.

    Pathwise gradient: all.
    """
    k, unit = _slopes(pool, deal)
    inside = jnp.asarray(pool.coins * pool.money * k / unit)
    best = jnp.clip((safe_sqrt(inside) - pool.coins) / k, 0.0, most)
    return Optimum(best, pool.money * k * best / (pool.coins + k * best) - unit * best - deal.gas_cost)


def break_even_repay(pool: ConstantProduct, deal: Deal) -> BreakEven:
    """Sizes at which a liquidation that sells into a pool just pays.

    The roots of k u R^2 - (y k - x u - k g) R + g x = 0; low is 0 without gas.
    """
    k, unit = _slopes(pool, deal)
    linear = jnp.asarray(pool.money * k - pool.coins * unit - k * deal.gas_cost)
    constant = deal.gas_cost * pool.coins
    discriminant = linear**2 - 4.0 * k * unit * constant
    pays = (discriminant >= 0.0) & (linear > 0.0)
    # The larger root first: subtracting nearly equal numbers would spoil the smaller one.
    whole = jnp.where(pays, linear + safe_sqrt(discriminant), 1.0)
    low, high = 2.0 * constant / whole, 0.5 * whole / (k * unit)
    return BreakEven(jnp.where(pays, low, jnp.nan), jnp.where(pays, high, jnp.nan))


def is_uncoverable(ltv: Array, bonus: Array) -> Array:
    """Whether closing a position in full cannot pay: debt over collateral above 1 / (1 + bonus)."""
    return ltv * (1.0 + bonus) > 1.0


def protocol_loss(debt: Array, coins: Array, price: Array) -> Array:
    """Loss on a position that is closed at an execution price: (debt - coins price)^+."""
    return jnp.maximum(debt - coins * price, 0.0)
