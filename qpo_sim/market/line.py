"""The market's stages of the simulation line: pure step functions, one simulation step at a time."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.errors import InputError
from qpo_sim.market import regime, shock
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.market.jump.base import Jump
from qpo_sim.market.model import Market, Prepared, Scale
from qpo_sim.market.side.view import View, named
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import (
    MAX_UNROLLED_ASSETS,
    Pair,
    Rows,
    each_asset,
    materialised,
    regime_matvec,
    regime_rows,
    rows_like,
    select,
)
from qpo_sim.random import Address, Stream
from qpo_sim.types import Array, Context, Stage, Upstream


def address(context: Context, stream: Stream, step: Array, slot: int = 0) -> Address:
    """Address of the draws of a stream in a step."""
    return Address(context.keys[stream], context.path, step, slot, context.mirror)


def stages(market: Market) -> tuple[Stage, ...]:
    """The market's part of the line.

    The last stage is called "price"; its state is `log_price` (cumulative log-return since the start, rows by asset)
    and its output the `Scale` of the step.
    """
    opening = (_draws_stage(market), _regime_stage(market))
    if not market.is_composed:
        return (*opening, _price_stage(market))
    return (*opening, _return_stage(market), _handed_on(market))


def _draws_regime(market: Market) -> bool:
    return market.initial.shape[0] > 1


def _draws_mixing(market: Market) -> bool:
    return market.dof is not None and market.shock is None


def _zeros(market: Market, context: Context) -> Rows:
    zero = jnp.zeros(context.path.shape, market.drift.dtype)
    rows = (zero,) * market.n_assets
    return rows if market.n_assets <= MAX_UNROLLED_ASSETS else jnp.stack(rows)


def _draws_stage(market: Market) -> Stage:
    def init(context: Context):
        return ()

    def step(context: Context, t, state, upstream: Upstream):
        # One pair of words per base step: the regime's uniform and the mixing score.
        if not (_draws_regime(market) or _draws_mixing(market)):
            return (), None
        word0, word1 = address(context, Stream.REGIME, t // context.sub_steps).words(2)
        return (), Pair(random.uniform(word0), random.normal_score(word1))

    return Stage("draws", init, step)


class _Chain(NamedTuple):
    # Masks of the states of the chain (those of the regimes are sums of them) and the scale that holds in the step.
    states: tuple[Array, ...]
    scale: Scale


def _first_states(market: Market, context: Context) -> tuple[Array, ...]:
    u = address(context, Stream.START, jnp.zeros((), jnp.int32)).uniforms(1)[0].astype(market.drift.dtype)
    cuts = context.market.initial_cuts
    return regime.masks_from_uniform(u, [cuts[k] for k in range(cuts.shape[0])])


def _regime_stage(market: Market) -> Stage:
    # With drivers the chain moves in the stage that knows the path (see `_return_stage`); here only draws are made.
    dtype = market.drift.dtype
    n_pairs = (market.n_assets + 1) // 2
    draws_regime, draws_mixing = _draws_regime(market), _draws_mixing(market)
    is_driven = market.drivers is not None

    def init(context: Context):
        one = jnp.ones(context.path.shape, dtype)
        states = () if is_driven else _first_states(market, context)
        chain = _Chain(states, Scale(regime.regime_masks(states, market.regime_of), one))
        return chain if market.regime_of else chain.scale

    def step(context: Context, t, state, upstream: Upstream):
        chain = state if market.regime_of else _Chain(state.masks, state)
        draws = upstream.output
        after = chain
        if draws is not None and not is_driven:
            u, score = (row.astype(dtype) for row in draws)
            states = regime.next_masks(u, chain.states, context.market.transition_cuts) if draws_regime else ()
            masks = regime.regime_masks(states, market.regime_of)
            mixing = shock.mixing_scale(score, masks, *context.market.mixing) if draws_mixing else chain.scale.mixing
            after = _Chain(states, Scale(masks, mixing))
        if context.sub_steps > 1:
            opens = t % context.sub_steps == 0
            after = jax.tree.map(lambda new, old: jnp.where(opens, new, old), after, chain)
        normals = ()
        if market.shock is None:
            normals = address(context, Stream.SHOCK, t).normal_pairs(n_pairs)
        output = (normals, draws) if market.is_composed else normals
        return after if market.regime_of else after.scale, output

    return Stage("regime", init, step)


def _price_stage(market: Market) -> Stage:
    dtype = market.drift.dtype

    def init(context: Context):
        return _zeros(market, context)

    def step(context: Context, t, state, upstream: Upstream):
        scale: Scale = upstream.state.scale if market.regime_of else upstream.state
        z = [z.astype(dtype) for pair in upstream.output for z in pair][: market.n_assets]
        prepared = context.market
        shocks = regime_matvec(prepared.factor, scale.masks, z)
        log_price = rows_like(
            state,
            [
                state[i]
                + select(scale.masks, prepared.drift[:, i])
                + (shocks[i] * scale.mixing if _draws_mixing(market) else shocks[i])
                for i in range(market.n_assets)
            ],
        )
        return log_price, scale

    return Stage("price", init, step)


class _Return(NamedTuple):
    # State of the return stage.
    log_price: Rows
    shock: Any
    volatility: Any
    jumps: tuple[Any, ...]
    side: tuple[Any, ...]
    # What is known before the step where transitions are driven: states of the chain, covariates, outputs of sides.
    states: tuple[Array, ...]
    drivers: Any
    seen: Any


def _return_stage(market: Market) -> Stage:
    is_driven = market.drivers is not None

    def step(context: Context, t, state: _Return, upstream: Upstream):
        prepared: Prepared = context.market
        chain, (normals, draws) = upstream.state, upstream.output
        scale, states = chain.scale if isinstance(chain, _Chain) else chain, state.states
        if is_driven:
            states, scale = _driven(market, context, t, state, scale, draws)
        masks = scale.masks
        shock_state, shocks = _shock_step(market, context, t, state.shock, scale, normals)
        opened, local = _volatility_open(context, t, state.volatility, masks)
        jump_states, jumps = _jump_step(context, t, state.jumps, masks)
        moved = materialised(partial(_combined, market))(prepared, masks, shocks, local, jumps, state.log_price)
        volatility = _volatility_close(prepared, t, opened, masks, local, shocks)
        view = View(
            moved.log_return, moved.log_price, masks, moved.deviation, moved.jump if len(moved.jump) else None, {}
        )
        sides, outputs = _side_step(context, t + 1, state.side, view)
        drivers = regime.drivers_update(prepared.drivers, state.drivers, moved.log_return) if is_driven else ()
        seen = outputs if is_driven else {}
        after = _Return(moved.log_price, shock_state, volatility, jump_states, sides, states, drivers, seen)
        mixing = scale.mixing if shocks.mixing is None else shocks.mixing
        return after, Scale(masks, mixing, moved.deviation, moved.jump, outputs)

    return Stage("return", partial(_return_init, market), step)


def _return_init(market: Market, context: Context) -> _Return:
    prepared: Prepared = context.market
    one, like = jnp.ones(context.path.shape, market.drift.dtype), _zeros(market, context)
    start = jnp.zeros((), jnp.int32)
    shock_state, volatility, states, drivers, seen = (), (), (), (), {}
    if prepared.shock is not None:
        component, constants = prepared.shock
        shock_state = component.init(constants, one, address(context, Stream.MIXING, start))
    if prepared.volatility_model is not None:
        component, constants = prepared.volatility_model
        at = address(context, Stream.VOLATILITY, start)
        volatility = component.init(constants, one, market.n_assets, context.n_steps, at)
    at_jumps = _addresses(context, prepared.jumps, Stream.JUMP, start)
    jumps = tuple(
        component.init(constants, one, market.n_assets, at)
        for (component, constants), at in zip(prepared.jumps, at_jumps, strict=True)
    )
    at_sides = _addresses(context, prepared.side, Stream.SIDE, start)
    sides = tuple(
        component.init(constants, one, at) for (component, constants), at in zip(prepared.side, at_sides, strict=True)
    )
    if market.drivers is not None:
        states, drivers = _first_states(market, context), regime.drivers_init(prepared.drivers, one)
        # What the side processes say of a step in which nothing happens.
        view = View(like, like, regime.regime_masks(states, market.regime_of), like, None, {})
        seen = _side_step(context, start, sides, view)[1]
    return _Return(like, shock_state, volatility, jumps, sides, states, drivers, seen)


# The draws of a step are one address further on than those of `init`, here and in what follows.


def _shock_step(
    market: Market, context: Context, t: Array, state: Any, scale: Scale, normals: tuple[Pair, ...]
) -> tuple[Any, Shocks]:
    prepared: Prepared = context.market
    if prepared.shock is None:
        return state, _elliptical(market, prepared, scale, normals)
    component, constants = prepared.shock
    at = address(context, Stream.MIXING, t + 1)
    return materialised(component.step)(constants, t, state, scale.masks, at)


def _volatility_open(context: Context, t: Array, state: Any, masks: tuple[Array, ...]) -> tuple[Any, Local]:
    prepared: Prepared = context.market
    if prepared.volatility_model is None:
        return (), Local(())
    component, constants = prepared.volatility_model
    at = address(context, Stream.VOLATILITY, t + 1)
    return materialised(component.open)(constants, t, state, masks, at)


def _volatility_close(
    prepared: Prepared, t: Array, state: Any, masks: tuple[Array, ...], local: Local, shocks: Shocks
) -> Any:
    if prepared.volatility_model is None:
        return ()
    component, constants = prepared.volatility_model
    return component.close(constants, t, state, masks, local, shocks.eps)


def _jump_step(context: Context, t: Array, states: tuple[Any, ...], masks: tuple[Array, ...]) -> tuple[tuple, tuple]:
    prepared: Prepared = context.market
    addresses = _addresses(context, prepared.jumps, Stream.JUMP, t + 1)
    done = [
        materialised(component.step)(constants, t, before, masks, at)
        for (component, constants), before, at in zip(prepared.jumps, states, addresses, strict=True)
    ]
    return tuple(after for after, _ in done), tuple(jump for _, jump in done)


class _Moved(NamedTuple):
    # Log-return, its conditional standard deviation, the part that jumps have in it (or ()), and the log-price after.
    log_return: Rows
    deviation: Rows
    jump: Rows
    log_price: Rows


def _combined(
    market: Market,
    prepared: Prepared,
    masks: tuple[Array, ...],
    shocks: Shocks,
    local: Local,
    jumps: tuple[Jump, ...],
    log_price: Rows,
) -> _Moved:
    deviation = regime_rows(masks, prepared.volatility, log_price)
    if len(local.factor):
        deviation = each_asset(lambda f, v: f * v, local.factor, deviation)
    move = each_asset(lambda d, e: d * e, deviation, shocks.eps)
    added = [regime_rows(masks, prepared.drift, log_price), local.shift]
    added += [jump.compensator for jump in jumps]
    sizes = [size for size in (local.jump, *(jump.size for jump in jumps)) if size is not None]
    if market.compensated:
        added.append(each_asset(lambda c: -c, _cumulants(market, prepared, masks, deviation)))
    total = _sum(sizes)
    move = _sum([move, *(rows for rows in added if rows is not None), *([total] if sizes else ())])
    return _Moved(move, deviation, total, _sum([log_price, move]))


def _sum(terms: list[Rows]) -> Rows:
    if not terms:
        return ()
    return each_asset(lambda *rows: sum(rows[1:], rows[0]), *terms)


def _addresses(context: Context, parts: tuple[Any, ...], stream: Stream, step: Array) -> list[Address]:
    # Components of one kind share a stream, one after the other.
    at, found = address(context, stream, step), []
    for component, _ in parts:
        found.append(at)
        at = at.after(component.n_slots)
    return found


def _elliptical(market: Market, prepared: Prepared, scale: Scale, normals: tuple[Pair, ...]) -> Shocks:
    # The shock of a market without a shock component, standardised.
    def eps(factor, masks, mixing, normals):
        z = [z.astype(factor.dtype) for pair in normals for z in pair][: market.n_assets]
        rows = regime_matvec(factor, masks, z)
        return each_asset(lambda e: e * mixing, rows) if _draws_mixing(market) else rows

    rows = materialised(eps)(prepared.factor, scale.masks, scale.mixing, normals)
    return Shocks(rows, scale.mixing if _draws_mixing(market) else None)


def _driven(
    market: Market, context: Context, t: Array, state: _Return, scale: Scale, draws: Pair
) -> tuple[tuple, Scale]:
    # Regime and mixing of the step where the transition probabilities depend on the path.
    prepared = context.market
    u, score = (row.astype(market.drift.dtype) for row in draws)

    def move(prepared, u, states, drivers, seen):
        cuts = regime.driven_cuts(prepared.drivers, drivers, states, prepared.transition, seen)
        return regime.masks_from_uniform(u, cuts)

    states = materialised(move)(prepared, u, state.states, state.drivers, state.seen)
    if context.sub_steps > 1:
        opens = t % context.sub_steps == 0
        states = jax.tree.map(lambda new, old: jnp.where(opens, new, old), states, state.states)
    masks = regime.regime_masks(states, market.regime_of)
    mixing = scale.mixing
    if _draws_mixing(market):
        mixing = shock.mixing_scale(score, masks, *prepared.mixing)
    return states, Scale(masks, mixing)


def _cumulants(market: Market, prepared: Prepared, masks: tuple[Array, ...], deviation: Rows) -> Rows:
    # log E[exp(deviation * eps)] by asset, given the regime.
    if prepared.shock is not None:
        component, constants = prepared.shock
        cumulants = component.log_mgf(constants, masks, deviation)
        if cumulants is None:
            raise InputError(
                f"the exponential of {type(component).__name__} shocks has no mean: give the shock a cut, or choose "
                "market.drift.kind=historical or shrunk."
            )
        return cumulants
    if prepared.log_mgf is None:
        return each_asset(lambda d: 0.5 * d * d, deviation)
    quadrature = [select(masks, entry) for entry in prepared.log_mgf]
    return each_asset(lambda d: shock.log_mgf(d, quadrature), deviation)


def _side_step(context: Context, step: Array, states: tuple[Any, ...], view: View) -> tuple[tuple, dict[str, Any]]:
    prepared: Prepared = context.market
    after, outputs = [], {}
    addresses = _addresses(context, prepared.side, Stream.SIDE, step)
    for (component, constants), before, at in zip(prepared.side, states, addresses, strict=True):
        state, own = materialised(component.step)(constants, step, before, view._replace(side=dict(outputs)), at)
        after.append(state)
        outputs.update(named(component, own))
    return tuple(after), outputs


def first_outputs(context: Context, one: Array) -> dict[str, Any]:
    """Outputs of the side processes before the first step, rows of the shape of `one`."""
    outputs: dict[str, Any] = {}
    for component, constants in context.market.side:
        outputs.update(named(component, component.first(constants, one)))
    return outputs


def _handed_on(market: Market) -> Stage:
    # What comes after the market reads log-prices and the scale from a stage of this name.
    def init(context: Context):
        return _zeros(market, context)

    def step(context: Context, t, state, upstream: Upstream):
        return upstream.state.log_price, upstream.output

    return Stage("price", init, step)


class MarketRecord(NamedTuple):
    """Market paths kept whole: what a book needs of every step.

    `local`, `jump` and `side` are those of `Scale` (empty where the market has none), steps first, paths last.
    """

    log_price: Float[Array, "steps assets paths"]
    masks: Float[Array, "steps masks paths"]
    mixing: Any
    local: Any = ()
    jump: Any = ()
    side: Any = ()


def record_of(log_price: Rows, scale: Scale) -> MarketRecord:
    """What is kept of one step: the state and output of the line's "price" stage, rows stacked."""

    def stacked(rows: Any) -> Any:
        return jnp.stack(rows) if isinstance(rows, tuple) and rows else rows

    none = jnp.zeros((0, *log_price[0].shape), log_price[0].dtype)
    side = {name: stacked(rows) for name, rows in scale.side.items()} if scale.side else ()
    return MarketRecord(
        stacked(log_price),
        jnp.stack(scale.masks) if scale.masks else none,
        stacked(scale.mixing),
        stacked(scale.local),
        stacked(scale.jump),
        side,
    )


def replay_stages(market: Market) -> tuple[Stage, ...]:
    """The market's part of the line when `Context.record` already holds its paths."""

    def init(context: Context):
        return (jnp.zeros(context.path.shape, market.drift.dtype),) * market.n_assets

    def step(context: Context, t, state, upstream: Upstream):
        row: MarketRecord = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, t, 0, keepdims=False), context.record)
        masks = tuple(row.masks[k] for k in range(market.n_regimes - 1))
        log_price = tuple(row.log_price[i] for i in range(market.n_assets))
        return log_price, Scale(masks, row.mixing, row.local, row.jump, row.side)

    return (Stage("price", init, step),)
