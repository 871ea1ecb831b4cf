r"""StableSwap pool of n coins near par, and the share in it.

With the amplification A of the whitepaper and $\alpha = A n^n$ the balances satisfy

$$ \alpha \sum x_i + D = \alpha D + D^{n+1} / (n^n \prod x_i) . $$

Contracts store $A_{code} = A n^{n-1}$, so that $\alpha = A_{code} n$; see `whitepaper_amplification`. Amounts are in
units of equal par value. Roots are found by a fixed number of Newton steps in logarithms, where the slopes are bounded
and the steps converge from one start for any imbalance; the last two steps are differentiated, which is implicit
differentiation, exact for first and second derivatives. Integer rounding of the contracts is left out.

Egorov (2019), StableSwap: efficient mechanism for stablecoin liquidity.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim.instrument.pool.axes import aligned, stacked
from qpo_sim.instrument.pool.constant_product import Swap
from qpo_sim.numerics import materialised, safe_log
from qpo_sim.types import Array

# Steps without a gradient: 5 bring every pool with alpha in [1e-3, 1e6] and prices within e^15 to 1e-12 in double
# precision; tests hold them to it.
_SEARCH_STEPS = 5
_POLISH_STEPS = 2

Coins = Array | Sequence[Array]


class _Invariant(NamedTuple):
    """D over the sum of balances, and D^(n+1)/(n^n prod x) over the sum of balances."""

    share: Array
    product: Array


def whitepaper_amplification(contract: Array, n_coins: int) -> Array:
    """A of the whitepaper for the A of a contract, A_code / n^(n-1)."""
    return contract / n_coins ** (n_coins - 1)


def contract_amplification(whitepaper: Array, n_coins: int) -> Array:
    """A of a contract for the A of the whitepaper, A n^(n-1)."""
    return whitepaper * n_coins ** (n_coins - 1)


def _alpha(amplification: Array, n_coins: int) -> Array:
    return amplification * float(n_coins**n_coins)


def _relative_invariant(balances: Array, alpha: Array) -> _Invariant:
    r"""Root d of $\alpha + d = \alpha d + d^{n+1}/q$ with $q = \prod (n x_i/S)$ and S the sum of balances."""
    n = balances.shape[0]
    total = jnp.sum(balances, axis=0)
    log_q = jnp.sum(safe_log(n * balances / total), axis=0)
    fixed_alpha, fixed_log_q = lax.stop_gradient(alpha), lax.stop_gradient(log_q)
    # Above the root: the left side is at most max(alpha, 1) for d <= 1.
    log_d = jnp.minimum(0.0, (jnp.log(jnp.maximum(fixed_alpha, 1.0)) + fixed_log_q) / (n + 1))
    for _ in range(_SEARCH_STEPS):
        d = jnp.exp(log_d)
        power = jnp.exp((n + 1) * log_d - fixed_log_q)
        up, down = fixed_alpha + d, fixed_alpha * d + power
        slope = d / up - (fixed_alpha * d + (n + 1) * power) / down
        log_d = log_d - jnp.log(up / down) / slope
    d = jnp.exp(log_d)
    for _ in range(_POLISH_STEPS):
        power = jnp.exp((n + 1) * jnp.log(d) - log_q)
        d = d + (alpha * (1.0 - d) + d - power) / (alpha - 1.0 + (n + 1) * power / d)
    return _Invariant(d, jnp.exp((n + 1) * jnp.log(d) - log_q))


def invariant(balances: Coins, amplification: Array) -> Array:
    """D: value at par of the pool in balance.

    Args:
      balances: (coins, *paths) or one row per coin, > 0.
      amplification: A of the whitepaper, > 0.

    Pathwise gradient: all arguments, to second order.
    """
    x = stacked(balances)
    return jnp.sum(x, axis=0) * _relative_invariant(x, _alpha(amplification, x.shape[0])).share


def balance_of(balances: Coins, coin: int, invariant: Array, amplification: Array) -> Array:
    r"""Balance of one coin that gives the pool the invariant D, all others as they are.

    The invariant is quadratic in one balance, $y^2 + b y = c$ with $b = S' + D/\alpha - D$ and
    $c = D^{n+1}/(n^n \alpha \prod' x)$, primes without the coin; the positive root in the form that does not cancel.

    Args:
      balances: (coins, *paths) or one row per coin; that of `coin` is not read.
      coin: its number (static).
      invariant: D.
      amplification: A of the whitepaper.

    Pathwise gradient: all arguments.
    """
    x = stacked(balances)
    n = x.shape[0]
    alpha = _alpha(amplification, n)
    others = [x[k] for k in range(n) if k != coin]
    b = sum(others) + invariant / alpha - invariant
    # Ratios of about one, as D^(n+1) alone overflows in single precision.
    c = invariant * invariant / (alpha * n)
    for other in others:
        c = c * (invariant / (n * other))
    root = jnp.sqrt(b * b + 4.0 * c)
    falling = jnp.where(b > 0.0, b, 0.0)
    return jnp.where(b > 0.0, 2.0 * c / (falling + root), 0.5 * (root - jnp.where(b > 0.0, 0.0, b)))


def spot_price(balances: Coins, coin_in: int, coin_out: int, amplification: Array) -> Array:
    r"""Marginal price without fee: units of `coin_in` paid per unit of `coin_out`, $F_{out}/F_{in}$.

    $F_i = \alpha + D^{n+1}/(n^n \prod x)/x_i$ is the derivative of the invariant in a balance.

    Args:
      balances: (coins, *paths) or one row per coin.
      coin_in: number of the coin paid in (static).
      coin_out: number of the coin taken out (static).
      amplification: A of the whitepaper.

    Pathwise gradient: balances, amplification.
    """
    x = stacked(balances)
    alpha = _alpha(amplification, x.shape[0])
    power = jnp.sum(x, axis=0) * _relative_invariant(x, alpha).product
    return (alpha + power / x[coin_out]) / (alpha + power / x[coin_in])


def amount_out(
    balances: Coins, coin_in: int, coin_out: int, amount_in: Array, amplification: Array, fee: Array
) -> Array:
    r"""Output of a swap, $(1-f)(y_0 - y_1)$, with the fee taken from the output.

    The difference solves $\Delta^2 - B\Delta + K = 0$ with $B = 2 y_0 + b_1$ and $K = d (y_0 + c_0/(x_0 + d))$ in the
    terms of `balance_of`, all positive: no difference of large numbers is formed.

    Args:
      balances: (coins, *paths) or one row per coin.
      coin_in: number of the coin paid in (static).
      coin_out: number of the coin taken out (static).
      amount_in: d >= 0.
      amplification: A of the whitepaper.
      fee: f, of the output.

    Pathwise gradient: balances, amount_in, amplification, fee.
    """
    x = stacked(balances)
    n = x.shape[0]
    alpha = _alpha(amplification, n)
    total = jnp.sum(x, axis=0)
    share, power = _relative_invariant(x, alpha)
    d, y = share * total, x[coin_out]
    # c of the coin taken out before the swap, D^(n+1)/(n^n alpha prod' x) = (D^(n+1)/(n^n prod x)) y / alpha.
    c = power * total * y / alpha
    gap = total * (1.0 - share)
    linear = y + gap + amount_in + d / alpha
    constant = amount_in * (y + c / (x[coin_in] + amount_in))
    return (1.0 - fee) * 2.0 * constant / (linear + jnp.sqrt(linear * linear - 4.0 * constant))


def swap(balances: Coins, coin_in: int, coin_out: int, amount_in: Array, amplification: Array, fee: Array) -> Swap:
    """Output and prices of a swap; arguments as in `amount_out`, amount_in > 0.

    `mid_after` is the marginal price with the fee left in the pool.

    Pathwise gradient: balances, amount_in, amplification, fee.
    """
    x = stacked(balances)
    out = amount_out(x, coin_in, coin_out, amount_in, amplification, fee)
    after = after_swap(x, coin_in, coin_out, amount_in, out)
    average = amount_in / out
    return Swap(
        out,
        average,
        spot_price(after, coin_in, coin_out, amplification),
        average / spot_price(x, coin_in, coin_out, amplification) - 1.0,
    )


def after_swap(balances: Coins, coin_in: int, coin_out: int, amount_in: Array, amount_out: Array) -> Array:
    """Balances after a swap, (coins, *paths).

    Pathwise gradient: balances and amounts.
    """
    rows = [row for row in stacked(balances)]
    rows[coin_in] = rows[coin_in] + amount_in
    rows[coin_out] = rows[coin_out] - amount_out
    return stacked(rows)


def holdings(invariant: Array, prices: Coins, amplification: Array) -> Float[Array, "coins ..."]:
    r"""Coins behind a share with invariant D when arbitrage has brought the pool to the external prices.

    They minimise $\sum p_i x_i$ on the curve: $x_i = D K/a_i$ with $a_i = \mu p_i - \alpha$,
    $K = (\prod a_i/n^n)^{1/(n+1)}$ and the multiplier $\mu$ from $\alpha (\sum K/a_i - 1) + 1 = K$. Each side of that
    equation is monotone in $\log(\mu p_{min} - \alpha)$.

    Args:
      invariant: D >= 0.
      prices: (coins, *paths) or one row per coin, > 0, in one currency; par is equal prices.
      amplification: A of the whitepaper, > 0.

    Pathwise gradient: all arguments, to second order.
    """
    p = stacked(prices)
    n = p.shape[0]
    alpha = _alpha(amplification, n)
    # Any constant serves as the unit of prices; the smallest keeps every a_i positive, and a difference keeps its own
    # gap exactly 0 where a quotient may round below 1.
    # Rows of coins: sums over an axis would be computed again by each of their readers.
    unit = lax.stop_gradient(jnp.min(p, axis=0))
    gaps = tuple((row - unit) / unit for row in p)

    def terms(log_t, gaps, alpha):
        t = jnp.exp(log_t)
        a = [alpha * gap + t * (1.0 + gap) for gap in gaps]
        k = jnp.exp((sum(jnp.log(one) for one in a) - n * math.log(n)) / (n + 1))
        return k, [k / one for one in a], [t * (1.0 + gap) / one for gap, one in zip(gaps, a, strict=True)]

    def newton(log_t, gaps, alpha):
        k, x, elasticity = terms(log_t, gaps, alpha)
        d_log_k = sum(elasticity) / (n + 1)
        left, right = alpha * sum(x) + 1.0, alpha + k
        d_total = sum(amount * (d_log_k - e) for amount, e in zip(x, elasticity, strict=True))
        slope = alpha * d_total / left - k * d_log_k / right
        return log_t - jnp.log(left / right) / slope

    # A step reads its start many times: fused into the next one it would be computed as often.
    step = materialised(newton)
    alpha = jnp.asarray(alpha)
    log_t = math.log(n) * jnp.ones_like(gaps[0] * alpha)
    for _ in range(_SEARCH_STEPS):
        log_t = step(log_t, lax.stop_gradient(gaps), lax.stop_gradient(alpha))
    for _ in range(_POLISH_STEPS):
        log_t = step(log_t, gaps, alpha)
    return invariant * stacked(terms(log_t, gaps, alpha)[1])


def value(invariant: Array, prices: Coins, amplification: Array) -> Array:
    r"""Value of a share at the external prices, $\sum p_i x_i$ with `holdings`.

    When one coin falls to p the pool drains into it: the share is worth little more than D p.

    Pathwise gradient: all arguments, to second order; the derivative in a price is the amount of that coin.
    """
    p = stacked(prices)
    return jnp.sum(p * holdings(invariant, p, amplification), axis=0)


def invariant_from_value(value: Array, prices: Coins, amplification: Array) -> Array:
    """D of a share worth `value` at the external prices.

    Pathwise gradient: all arguments.
    """
    p = stacked(prices)
    return value / jnp.sum(p * holdings(1.0, p, amplification), axis=0)


def impermanent_loss(start_prices: Coins, prices: Coins, amplification: Array) -> Array:
    """Share over the coins behind it at the start, minus 1, <= 0, fees excluded.

    Args:
      start_prices: (coins,) or (coins, *paths), when the share was bought.
      prices: of the same coins at present.
      amplification: A of the whitepaper.

    Pathwise gradient: all arguments.
    """
    start, p = aligned(start_prices, prices)
    held = jnp.sum(p * holdings(1.0, start, amplification), axis=0)
    return jnp.sum(p * holdings(1.0, p, amplification), axis=0) / held - 1.0
