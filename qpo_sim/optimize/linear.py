r"""Portfolios whose gradient in the weights needs no tape: rebalanced to constant weights, and bought and held.

**Rebalanced.** With exposures $x = \ell w$ (leverage times weights) and simple returns $R_t$ the wealth is
$W_T = \prod_t (1 + x'R_t)$, so that $\partial \log W_T / \partial x_i = \sum_t R_{t,i} / (1 + x'R_t)$: the sums are
carried along with the wealth, and any gradient is one product with them.

**Bought and held.** The terminal value is linear in the weights: one matrix of terminal prices, simulated once, serves
every weight vector.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.errors import InputError
from qpo_sim.market import line as market_line
from qpo_sim.market import model as market_model
from qpo_sim.market.model import Market, Prepared
from qpo_sim.simulate import Plan, context_of, padded, run_line, sub_steps_of
from qpo_sim.types import Array, Context, Stage, Upstream


class Wealth(NamedTuple):
    """State of the wealth stage: wealth, log-prices before the step, sums R_i / (1 + x'R) (none when not asked for)."""

    wealth: Array
    previous: tuple[Array, ...]
    sums: tuple[Array, ...]


def wealth_stage(n_assets: int, *, with_sums: bool) -> Stage:
    """Wealth of a portfolio rebalanced before every step to the exposures in `Context.book`, behind the market's line.

    What is not invested earns nothing. A step that costs all of the wealth or more ends the path at 0.

    Args:
      n_assets: number of assets.
      with_sums: carry the derivatives of log W in the exposures.
    """

    def init(context: Context):
        one = jnp.ones(context.path.shape, context.book.dtype)
        zeros = (0.0 * one,) * n_assets
        return Wealth(one, zeros, zeros if with_sums else ())

    def step(context: Context, t, state: Wealth, upstream: Upstream):
        log_price = tuple(upstream.state[i] for i in range(n_assets))
        returns = [jnp.expm1(now - before) for now, before in zip(log_price, state.previous, strict=True)]
        growth = jnp.maximum(1.0 + sum(context.book[i] * r for i, r in enumerate(returns)), 0.0)
        # At 0 the derivative is 0, whatever the sums are; they only have to stay finite.
        inverse = 1.0 / jnp.where(growth > 0.0, growth, 1.0)
        sums = tuple(total + inverse * r for total, r in zip(state.sums, returns, strict=True)) if with_sums else ()
        return Wealth(state.wealth * growth, log_price, sums), ()

    return Stage("wealth", init, step)


def _wealth(market: Market, prepared: Prepared, exposure: Array, keys: Any, path: Array, plan: Plan, with_sums: bool):
    context = context_of(market, prepared, None, keys, path, plan)._replace(book=exposure)
    line = (*market_line.stages(market), wealth_stage(market.n_assets, with_sums=with_sums))
    return run_line(line, context, plan.remat)[-1]


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def rebalanced_prepared(
    market: Market, prepared: Prepared, exposure: Float[Array, " assets"], keys: Any, path: Array, plan: Plan
) -> Float[Array, " paths"]:
    """Terminal wealth of the given paths over the starting wealth; traceable, to be jitted by the caller.

    Pathwise gradient: exposure, first order. None: the market (its derivatives read as zero).
    """
    return _wealth(market, prepared, exposure, keys, path, plan, False).wealth


@rebalanced_prepared.defjvp
def _rebalanced_jvp(plan, primals, tangents):
    market, prepared, exposure, keys, path = primals
    state: Wealth = _wealth(market, prepared, exposure, keys, path, plan, True)
    sums = jnp.stack(state.sums)
    slope = lax.dot_general(tangents[2], sums, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return state.wealth, state.wealth * slope


@partial(jax.jit, static_argnames="plan")
def _rebalanced(market: Market, exposure: Array, keys: Any, path: Array, plan: Plan) -> Array:
    fixed = lax.stop_gradient(market)
    prepared = market_model.prepare(fixed, sub_steps=round(market.step_hours / plan.step_hours))
    return rebalanced_prepared(fixed, prepared, exposure, keys, path, plan)


def rebalanced_wealth(
    market: Market, weights: Float[Array, " assets"], leverage: Any, path: Any, plan: Plan, *, seed: int = 0
) -> Float[Array, " paths"]:
    r"""Terminal wealth, over the starting wealth, of a portfolio rebalanced to constant weights before every step.

    $W_T = \prod_t \max(1 + \ell\, w'R_t, 0)$ with simple returns R; what is not invested earns nothing, and there is no
    margin call between the steps.

    Pathwise gradient: weights and leverage (first order), in one pass without a tape. None: the market.

    Args:
      market: see `market`.
      weights: share of the invested wealth by asset, in the market's order.
      leverage: invested wealth over wealth.
      path: path numbers, or an int n for the paths 0..n-1.
      plan: steps; the rest of it does not matter here.
      seed: 64-bit seed.

    Raises:
      InputError: not one weight per asset, or a step that does not divide the base step.
    """
    exposure = leverage * jnp.asarray(weights, market.drift.dtype)
    if exposure.shape != (market.n_assets,):
        raise InputError(f"weights has shape {exposure.shape}; it must have one entry for each of {market.assets}.")
    sub_steps_of(market, plan)
    path, n = padded(path)
    return _rebalanced(market, exposure, random.stream_keys(seed), path, plan)[:n]


def prices_prepared(market: Market, prepared: Prepared, keys: Any, path: Array, plan: Plan) -> Array:
    """`terminal_prices` of the given paths; traceable, to be jitted by the caller."""
    context = context_of(market, prepared, None, keys, path, plan)
    log_price = run_line(market_line.stages(market), context, plan.remat)[-1]
    return jnp.exp(jnp.stack(list(log_price)))


@partial(jax.jit, static_argnames="plan")
def _terminal_prices(market: Market, keys: Any, path: Array, plan: Plan) -> Array:
    prepared = market_model.prepare(market, sub_steps=round(market.step_hours / plan.step_hours))
    return prices_prepared(market, prepared, keys, path, plan)


def terminal_prices(market: Market, path: Any, plan: Plan, *, seed: int = 0) -> Float[Array, "assets paths"]:
    """Prices after the last step over those at the start.

    The value of a portfolio of weights w bought at the start and held is `cash + w @ terminal_prices(...)`.

    Pathwise gradient: the market's drift, volatility, correlation and dof.

    Args:
      market: see `market`.
      path: path numbers, or an int n for the paths 0..n-1.
      plan: steps; the rest of it does not matter here.
      seed: 64-bit seed.

    Raises:
      InputError: a step that does not divide the base step.
    """
    sub_steps_of(market, plan)
    path, n = padded(path)
    return _terminal_prices(market, random.stream_keys(seed), path, plan)[:, :n]
