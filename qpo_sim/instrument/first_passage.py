r"""Liquidation as a first passage of a log distance to zero, shared by all kinds of accounts.

An account's distance is $x = \log(\text{assets side} / \text{liabilities side})$; it is liquidated when $x \le 0$.
Over one step its conditional variance is $w'\Sigma w$ with the elasticities $w_i = \partial x / \partial \log P_i$,
and the Brownian-bridge crossing probability follows: exact when one asset moves x, first order in the step for several.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from qpo_sim.market import model as market_model
from qpo_sim.numerics import bridge_crossing, materialised
from qpo_sim.types import Array, Context


class Options(NamedTuple):
    """What picks the program.

    `bridge`: test between the step ends too; `attribution`: keep what the P&L by position needs; `drawn`: carry the
    drawn branch; `record`: keep distances for recorded paths.
    """

    bridge: bool
    attribution: bool
    drawn: bool
    record: bool


class Distance(NamedTuple):
    """Log distance x to liquidation and its elasticities to the log-prices of the account's assets."""

    x: Array
    elasticity: tuple[Array, ...]


class Survival(NamedTuple):
    """Survival branch of an account.

    `hit_probability` is the probability F, given the path's step ends, of having been liquidated by now; `left` is what
    a liquidation leaves, weighted with F; `distance` the distance now, kept only where paths are recorded.
    """

    hit_probability: Array
    left: tuple[Array, ...]
    distance: Any = ()


class ProfitAndLoss(NamedTuple):
    """P&L of an account: price moves by position, then what else moved its equity."""

    price: tuple[Array, ...]
    funding: Array
    interest: Array
    fees: Array
    liquidation: Array


def survive(before: Survival, crossing: Array, left: tuple[Array, ...], distance: Array, options: Options) -> Survival:
    """Survival branch after a step in which the account is liquidated with probability `crossing`."""
    # F grows by its increments: unlike a product of survival probabilities it keeps tiny ones in float32.
    newly = (1.0 - before.hit_probability) * crossing
    return Survival(
        before.hit_probability + newly,
        tuple(total + newly * share for total, share in zip(before.left, left, strict=True)),
        distance if options.record else (),
    )


def step_moments(distance: Distance, assets: tuple[int, ...], context: Context, scale: Any) -> tuple[Array, tuple]:
    """Variance of x over the step and its covariance with each log-price."""

    def covariances(market, scale, weights):
        return market_model.step_covariances(market, scale, assets, weights)

    covariance = materialised(covariances)(context.market, scale, distance.elasticity)
    variance = sum(w * c for w, c in zip(distance.elasticity, covariance, strict=True))
    return jnp.maximum(variance, 1e-20), covariance


def price_at_barrier(price: Array, x: Array, slope: Array) -> Array:
    """Price when the account touches its barrier: the log-price moved back by its regression on x.

    For one asset this is the liquidation price itself. The clip only concerns crossings too improbable to be drawn.
    """
    return price * jnp.exp(jnp.clip(-x * slope, -4.0, 4.0))


def crossing_and_prices(
    context: Context, assets: tuple[int, ...], scale: Any, start: Array, now: Distance, prices: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """Probability that x touches 0 between the step ends, and the prices when it does.

    Args:
      context: market and clock.
      assets: assets of the account.
      scale: conditional scale of the step.
      start: x at the start of the step.
      now: distance at its end.
      prices: relative prices at its end, in the order of `assets`.

    Jumps are taken at the end of the step, their effect on x to first order: for jumps spread over the step the bias is
    of the order of the step.
    """
    variance, covariance = step_moments(now, assets, context, scale)
    has_jumps = len(scale.jump) > 0

    def touch(start, x, before, variance, covariance, prices):
        slopes = [c / variance for c in covariance]
        hit = tuple(price_at_barrier(p, x, slope) for p, slope in zip(prices, slopes, strict=True))
        if not has_jumps:
            return bridge_crossing(start, x, variance), hit
        # The diffusion goes to `before`, then the jump: the account is closed at the barrier by the one, at the price
        # behind the gap by the other.
        jumps_over = (before > 0.0) & (x <= 0.0)
        hit = tuple(jnp.where(jumps_over, p, h) for p, h in zip(prices, hit, strict=True))
        return jnp.where(x <= 0.0, 1.0, bridge_crossing(start, before, variance)), hit

    before = now.x - market_model.jump_move(scale, assets, now.elasticity) if has_jumps else now.x
    return materialised(touch)(start, now.x, before, variance, covariance, prices)
