"""The market: regime, volatility, shock and dependence composed into the first stages of the simulation line.

A market is a pytree of parameters (differentiable, sweepable leaf by leaf) with its static shape beside it. `prepare`
turns the parameters into the constants the kernel reads; `stages` are the pure step functions.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.market import regime, shock
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Pair, regime_matvec, rows_like, select
from qpo_sim.random import Stream
from qpo_sim.types import Array, Context, Stage, Upstream


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Market:
    r"""Regime-switching market with multivariate Student-t (or Gaussian) log-returns.

    Per base step, in regime k: $r = \mu_k + H\, \mathrm{diag}(\sigma_k) L_k z$ with $L_k L_k'$ the correlation matrix,
    z standard normal and H the shared mixing scale (see `shock`; H = 1 when `dof` is None). A run may use several
    sub-steps per base step: regime and mixing scale are held within the base step and the Gaussian part is a Brownian
    motion, so the law of a base step does not depend on the number of sub-steps.

    Attributes:
      initial: law of the regime just before the first step (the filtered law of the last observed day).
      transition: rows sum to one; the regime moves before each base step.
      drift: mean log-return per base step.
      volatility: standard deviation of the log-return per base step, before the cut of the mixing variable.
      correlation_cholesky: lower Cholesky factor of each regime's correlation matrix.
      dof: degrees of freedom per regime (> 2), or None for Gaussian shocks.
      assets: names, in column order (static).
      step_hours: length of the base step in hours (static).
      mixing_cut: probability of the far quantile at which the mixing variable is cut (static).

    Pathwise gradient: drift, volatility, correlation_cholesky, dof. None: initial, transition (discrete draws).
    """

    initial: Float[Array, " regimes"]
    transition: Float[Array, "regimes regimes"]
    drift: Float[Array, "regimes assets"]
    volatility: Float[Array, "regimes assets"]
    correlation_cholesky: Float[Array, "regimes assets assets"]
    dof: Float[Array, " regimes"] | None
    assets: tuple[str, ...] = field(metadata={"static": True})
    step_hours: float = field(default=24.0, metadata={"static": True})
    mixing_cut: float = field(default=shock.MIXING_CUT, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return len(self.assets)

    @property
    def n_regimes(self) -> int:
        """Number of regimes."""
        return self.initial.shape[0]


class Mixing(NamedTuple):
    """Polynomial of the log mixing scale per regime, and the score at which it is cut."""

    coefficients: Float[Array, "coefficients regimes"]
    floor: Float[Array, ""]


class Prepared(NamedTuple):
    """What the kernel reads of a market; drift, factor and covariance are per simulation step."""

    initial_cuts: Float[Array, " cuts"]
    transition_cuts: Float[Array, "regimes cuts"]
    drift: Float[Array, "regimes assets"]
    factor: Float[Array, "regimes assets assets"]
    covariance: Float[Array, "regimes assets assets"]
    mixing: Mixing | None


class Scale(NamedTuple):
    """Conditional scale of one step: given it the log-returns are Gaussian with covariance H^2 Sigma_k."""

    masks: tuple[Array, ...]
    mixing: Array


def prepare(market: Market, *, sub_steps: int = 1) -> Prepared:
    """Constants of the kernel for a market whose base step is cut into `sub_steps` simulation steps."""
    factor = (
        market.volatility[:, :, None]
        * market.correlation_cholesky
        / jnp.sqrt(jnp.asarray(sub_steps, market.drift.dtype))
    )
    return Prepared(
        initial_cuts=regime.thresholds(market.initial),
        transition_cuts=regime.thresholds(market.transition),
        drift=market.drift / sub_steps,
        factor=factor,
        covariance=jnp.einsum("kij,klj->kil", factor, factor, precision=lax.Precision.HIGHEST),
        mixing=_mixing(market),
    )


_prepare = jax.jit(prepare, static_argnames="sub_steps")


def prepare_once(market: Market, *, sub_steps: int = 1) -> Prepared:
    """`prepare` outside any trace: a program that calls back to the host is never kept in the compilation cache."""
    return _prepare(replace(market, dof=None), sub_steps=sub_steps)._replace(mixing=_mixing(market))


def _mixing(market: Market) -> Mixing | None:
    if market.dof is None:
        return None
    floor = np.asarray(shock.score_floor(market.mixing_cut), market.drift.dtype)
    return Mixing(shock.mixing_coefficients(market.dof), floor)


def gaussian_covariance(prepared: Prepared, scale: Scale, i: int, j: int) -> Float[Array, " paths"]:
    """Covariance of the log-returns of assets i and j over one simulation step, given the regime and H = 1."""
    return select(scale.masks, prepared.covariance[:, i, j])


def mixing_square(prepared: Prepared, scale: Scale) -> Array | float:
    """H^2, the factor of all conditional covariances of one simulation step."""
    return 1.0 if prepared.mixing is None else scale.mixing * scale.mixing


def stages(market: Market) -> tuple[Stage, ...]:
    """The market's part of the line: draws, then regime and scale, then log-prices.

    The last stage's state is `log_price` (cumulative log-return since the start, rows by asset) and its output the
    `Scale` of the step.
    """
    dtype = market.drift.dtype
    n_pairs = (market.n_assets + 1) // 2
    draws_regime = market.n_regimes > 1
    draws_mixing = market.dof is not None

    def draws_init(context: Context):
        return ()

    def draws_step(context: Context, t, state, upstream: Upstream):
        # One pair of words per base step: the regime's uniform and the mixing score.
        if not (draws_regime or draws_mixing):
            return (), None
        word0, word1 = random.bits(context.keys[Stream.REGIME], context.path, t // context.sub_steps, 0)
        return (), Pair(random.uniform(word0), random.normal_score(word1))

    def regime_init(context: Context):
        step = jnp.zeros((), jnp.int32)
        u = random.uniform(random.bits(context.keys[Stream.START], context.path, step, 0)[0]).astype(dtype)
        cuts = context.market.initial_cuts
        masks = regime.masks_from_uniform(u, [cuts[k] for k in range(cuts.shape[0])])
        return Scale(masks, jnp.ones_like(u))

    def regime_step(context: Context, t, state: Scale, upstream: Upstream):
        scale = state
        if upstream.output is not None:
            u, score = (row.astype(dtype) for row in upstream.output)
            masks = regime.next_masks(u, state.masks, context.market.transition_cuts) if draws_regime else ()
            mixing = shock.mixing_scale(score, masks, *context.market.mixing) if draws_mixing else state.mixing
            scale = Scale(masks, mixing)
        if context.sub_steps > 1:
            opens = t % context.sub_steps == 0
            scale = jax.tree.map(lambda new, old: jnp.where(opens, new, old), scale, state)
        return scale, random.normal_pairs(context.keys[Stream.SHOCK], context.path, t, n_pairs)

    def price_init(context: Context):
        zero = jnp.zeros(context.path.shape, dtype)
        rows = (zero,) * market.n_assets
        return rows if market.n_assets <= MAX_UNROLLED_ASSETS else jnp.stack(rows)

    def price_step(context: Context, t, state, upstream: Upstream):
        scale: Scale = upstream.state
        z = [z.astype(dtype) for pair in upstream.output for z in pair][: market.n_assets]
        prepared = context.market
        shocks = regime_matvec(prepared.factor, scale.masks, z)
        log_price = rows_like(
            state,
            [
                state[i]
                + select(scale.masks, prepared.drift[:, i])
                + (shocks[i] * scale.mixing if draws_mixing else shocks[i])
                for i in range(market.n_assets)
            ],
        )
        return log_price, scale

    return (
        Stage("draws", draws_init, draws_step),
        Stage("regime", regime_init, regime_step),
        Stage("price", price_init, price_step),
    )


class MarketRecord(NamedTuple):
    """Market paths kept whole: what a book needs of every step."""

    log_price: Float[Array, "steps assets paths"]
    masks: Float[Array, "steps masks paths"]
    mixing: Float[Array, "steps paths"]


def record_stage(market: Market) -> Stage:
    """Observer behind the market's stages that keeps a `MarketRecord`."""

    def init(context: Context):
        def zeros(*shape: int) -> Array:
            return jnp.zeros((context.n_steps, *shape, *context.path.shape), market.drift.dtype)

        return MarketRecord(zeros(market.n_assets), zeros(market.n_regimes - 1), zeros())

    def step(context: Context, t, state: MarketRecord, upstream: Upstream):
        scale: Scale = upstream.output
        put = lax.dynamic_update_index_in_dim
        masks = put(state.masks, jnp.stack(scale.masks), t, 0) if scale.masks else state.masks
        log_price = put(state.log_price, jnp.stack(list(upstream.state)), t, 0)
        return MarketRecord(log_price, masks, put(state.mixing, scale.mixing, t, 0)), ()

    return Stage("record", init, step)


def replay_stages(market: Market) -> tuple[Stage, ...]:
    """The market's part of the line when `Context.record` already holds its paths."""

    def init(context: Context):
        return (jnp.zeros(context.path.shape, market.drift.dtype),) * market.n_assets

    def step(context: Context, t, state, upstream: Upstream):
        row = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, t, 0, keepdims=False), context.record)
        masks = tuple(row.masks[k] for k in range(market.n_regimes - 1))
        return tuple(row.log_price[i] for i in range(market.n_assets)), Scale(masks, row.mixing)

    return (Stage("price", init, step),)
