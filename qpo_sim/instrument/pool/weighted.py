r"""Weighted (constant-mean) pool prod_i B_i^{w_i} = k with weights that sum to 1, and the share in it.

Martinelli & Mushegian (2019), Balancer whitepaper. Constant product is the case w = 1/2.
"""

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.instrument.pool.axes import aligned
from qpo_sim.instrument.pool.constant_product import Swap
from qpo_sim.types import Array

# Below this input over balance the ratio of average to marginal price comes from its series.
_SMALL_SWAP = 1e-5


def amount_out(
    balance_in: Array, balance_out: Array, weight_in: Array, weight_out: Array, amount_in: Array, fee: Array
) -> Array:
    r"""Output of a swap, $B_o (1 - (B_i/(B_i + a (1-f)))^{w_i/w_o})$.

    Args:
      balance_in: B_i > 0.
      balance_out: B_o > 0.
      weight_in: w_i in (0, 1).
      weight_out: w_o in (0, 1).
      amount_in: a >= 0, fee included.
      fee: f, of the input.

    Pathwise gradient: all arguments.
    """
    relative = (1.0 - fee) * amount_in / balance_in
    return -balance_out * jnp.expm1(-(weight_in / weight_out) * jnp.log1p(relative))


def spot_price(balance_in: Array, balance_out: Array, weight_in: Array, weight_out: Array) -> Array:
    r"""Marginal price without fee, $(B_i/w_i)/(B_o/w_o)$: units paid in per unit taken out.

    Pathwise gradient: all arguments.
    """
    return balance_in / weight_in / (balance_out / weight_out)


def swap(
    balance_in: Array, balance_out: Array, weight_in: Array, weight_out: Array, amount_in: Array, fee: Array
) -> Swap:
    """Output and prices of a swap; arguments as in `amount_out`.

    Pathwise gradient: all arguments.
    """
    keep = 1.0 - fee
    power = weight_in / weight_out
    gross = amount_in / balance_in
    net = keep * gross
    mid = spot_price(balance_in, balance_out, weight_in, weight_out)
    # Average over marginal price without fee, p u / (1 - (1+u)^-p): 0/0 for an empty swap.
    is_small = net < _SMALL_SWAP
    wide = jnp.where(is_small, 1.0, net)
    series = 1.0 / (1.0 - 0.5 * (power + 1.0) * net * (1.0 - (power + 2.0) * net / 3.0))
    ratio = jnp.where(is_small, series, -power * wide / jnp.expm1(-power * jnp.log1p(wide)))
    return Swap(
        amount_out(balance_in, balance_out, weight_in, weight_out, amount_in, fee),
        mid * ratio / keep,
        mid * (1.0 + gross) * jnp.exp(power * jnp.log1p(net)),
        (ratio - 1.0 + fee) / keep,
    )


def holdings(
    invariant: Array, prices: Float[Array, "coins ..."], weights: Float[Array, "coins ..."]
) -> Float[Array, "coins ..."]:
    r"""Coins behind a share at external prices: $B_i = w_i V / P_i$.

    Args:
      invariant: k = prod B_i^{w_i}.
      prices: of the coins in one currency.
      weights: sum to 1 over coins.

    Pathwise gradient: all arguments.
    """
    prices, weights = aligned(prices, weights)
    return weights * value(invariant, prices, weights) / prices


def value(invariant: Array, prices: Float[Array, "coins ..."], weights: Float[Array, "coins ..."]) -> Array:
    r"""Value of a share, $V = k \prod_i (P_i/w_i)^{w_i}$, in the currency of the prices.

    Pathwise gradient: all arguments; the derivative in a price is the amount of that coin.
    """
    prices, weights = aligned(prices, weights)
    return invariant * jnp.exp(jnp.sum(weights * jnp.log(prices / weights), axis=0))


def invariant_from_value(value: Array, prices: Float[Array, "coins ..."], weights: Float[Array, "coins ..."]) -> Array:
    """Invariant k of a share worth `value` at the given prices.

    Pathwise gradient: all arguments.
    """
    prices, weights = aligned(prices, weights)
    return value * jnp.exp(-jnp.sum(weights * jnp.log(prices / weights), axis=0))


def value_factor(price_ratio: Array, weight: Array) -> Array:
    r"""Value of a two-coin share in the quote coin over its value at the start, $r^w$, fees excluded.

    Args:
      price_ratio: r, price of the base coin over its price at the start.
      weight: w, of the base coin.

    Pathwise gradient: all arguments.
    """
    return jnp.exp(weight * jnp.log(price_ratio))


def impermanent_loss(price_ratio: Array, weight: Array) -> Array:
    r"""Two-coin share over the coins that were put in, minus 1: $r^w/(w r + 1 - w) - 1 \le 0$.

    Pathwise gradient: all arguments.
    """
    return jnp.expm1(weight * jnp.log(price_ratio) - jnp.log1p(weight * (price_ratio - 1.0)))


def basket_impermanent_loss(
    price_ratios: Float[Array, "coins ..."], weights: Float[Array, "coins ..."]
) -> Float[Array, "..."]:
    r"""Share over the coins that were put in, minus 1, for many coins: $\prod r_i^{w_i}/\sum w_i r_i - 1 \le 0$.

    Pathwise gradient: all arguments.
    """
    price_ratios, weights = aligned(price_ratios, weights)
    held = jnp.log1p(jnp.sum(weights * (price_ratios - 1.0), axis=0))
    return jnp.expm1(jnp.sum(weights * jnp.log(price_ratios), axis=0) - held)


def expected_value_factor(weight: Array, volatility: Array, time: Array, drift: Array = 0.0) -> Array:
    r"""Mean of `value_factor` under geometric Brownian motion, $\exp(w \mu T - w(1-w) \sigma^2 T/2)$.

    Args:
      weight: w, of the base coin.
      volatility: sigma of the log price per square root of a unit of time.
      time: T, in the same unit.
      drift: mu, of the price: E[P_T] = P_0 exp(mu T).

    Pathwise gradient: all arguments.
    """
    return jnp.exp(weight * drift * time - 0.5 * weight * (1.0 - weight) * volatility * volatility * time)
