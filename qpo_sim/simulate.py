"""The one loop: paths through a market and a book, step by step, and what observers keep of them.

Each step runs a line of stages, each on the state and output of the one before it. What a stage gives is stored before
the next one reads it (see `numerics.materialised`), so that a value with several readers is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, UInt32

from qpo_sim import random
from qpo_sim.book import ledger
from qpo_sim.book.ledger import Book, Conditional
from qpo_sim.errors import InputError
from qpo_sim.instrument.first_passage import Options
from qpo_sim.market import line as market_line
from qpo_sim.market import model as market_model
from qpo_sim.market.line import MarketRecord
from qpo_sim.market.model import Market, Prepared
from qpo_sim.numerics import buffer, lookup, materialised, put
from qpo_sim.types import Array, Context, Stage, Upstream

MAX_DATES = 64
MONITORING = ("bridge", "step")

# From the most memory to the least, and the choice between them by size.
REMAT = ("store", "step", "two-level", "auto")

# What the steps of one device may leave in memory for a gradient when `Plan.remat` is "auto".
GRADIENT_BYTES = 1 << 29


@dataclass(frozen=True)
class Plan:
    """What is simulated and what is kept; static, one compiled program per plan and shape.

    Attributes:
      n_steps: simulation steps.
      step_hours: length of a step; it must divide the market's base step.
      monitoring: liquidation tested "bridge" (between the step ends too) or "step" (at the step ends only).
      dates: step counts after which the equity is recorded, increasing, the last one `n_steps`.
      attribution: keep P&L accounts and components.
      drawn: carry the drawn branch; without it only `Outcome.conditional` is known (what gradients need).
      record_paths: keep the accounts at every date (for replay).
      remat: what a reverse-mode gradient keeps of the steps. "store": the inputs of every stage; "step": the states
        before each step, which is then done again; "two-level": the states before each of about sqrt(n_steps) blocks of
        steps, and what "store" keeps within the one block that is done again: memory of order sqrt(n_steps) (Griewank &
        Walther 2008, ch. 12); "auto": the first of these that leaves at most `GRADIENT_BYTES` per device. Draws are
        made again from their addresses. Values and gradients are the same to rounding.
      antithetic: paths 2k and 2k + 1 are partners: every normal of one is minus that of the other, every uniform u is
        1 - u. Standard errors are then those of the means of pairs; `compute.run` simulates independent paths only.
    """

    n_steps: int
    step_hours: float = 24.0
    monitoring: str = "bridge"
    dates: tuple[int, ...] = ()
    attribution: bool = True
    drawn: bool = True
    record_paths: bool = False
    remat: str = "store"
    antithetic: bool = False

    def __post_init__(self) -> None:
        """Checks what cannot be simulated; fills in the dates."""
        if not 1 <= self.n_steps < random.MAX_STEPS:
            raise InputError(f"n_steps is {self.n_steps}; it must lie in 1..{random.MAX_STEPS - 1}.")
        if not (np.isfinite(self.step_hours) and self.step_hours > 0.0):
            raise InputError(f"step_hours is {self.step_hours}; it must be a positive number of hours.")
        if self.monitoring not in MONITORING:
            raise InputError(f"monitoring is {self.monitoring!r}; it must be one of {', '.join(MONITORING)}.")
        if self.remat not in REMAT:
            raise InputError(f"remat is {self.remat!r}; it must be one of {', '.join(REMAT)}.")
        dates = self.dates or default_dates(self.n_steps)
        if list(dates) != sorted(set(dates)) or dates[0] < 1 or dates[-1] != self.n_steps:
            raise InputError(f"dates must increase from at least 1 to n_steps = {self.n_steps}, got {list(dates)}.")
        object.__setattr__(self, "dates", tuple(int(d) for d in dates))


def default_dates(n_steps: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Step counts to record: every step while there are few, else an even grid; always those wanted and the last."""
    if n_steps <= MAX_DATES:
        grid = range(1, n_steps + 1)
    else:
        grid = np.unique(np.round(np.linspace(0, n_steps, MAX_DATES + 1))[1:].astype(int)).tolist()
    return tuple(sorted({*grid, *(int(w) for w in wanted), n_steps}))


class Record(NamedTuple):
    """The accounts at the plan's dates.

    Equity, liquidations and exposure (see `ledger.exposures`) are the drawn branch's; the log distance to liquidation
    of an account with fixed positions is that of the account as if it were never liquidated. `hit_by_regime` is the
    part of the final hit probability that arose in steps of each regime.
    """

    account_equity: Float[Array, "dates accounts paths"]
    is_liquidated: Float[Array, "dates accounts paths"]
    distance: Float[Array, "dates accounts paths"]
    exposure: Float[Array, "dates accounts paths"]
    hit_by_regime: Float[Array, "regimes accounts paths"]


class Outcome(NamedTuple):
    """What one batch of paths leaves behind; the path axis is last, money in units of the starting capital.

    Attributes:
      equity: book equity at the plan's dates.
      max_drawdown: largest fall from the running peak (the start counts as a peak), as a share of the peak.
      hit_probability: per date and account, the conditional probability given the path's step ends that the account has
        been liquidated by then (1 - survival weight).
      is_liquidated: drawn branch, per account.
      account_equity: drawn branch, per account, at the end.
      conditional: terminal values of the survival branch.
      accounts: P&L by account (price, funding, interest, fees, liquidation), None without attribution.
      components: P&L by `Book.components`, None without attribution.
      is_finite: False where any number of the path is not finite.
      liquidations: rows by the names of `ledger.Liquidations`, None without attribution or accounts.
      record: accounts at every date, None unless asked for.

    Without the drawn branch only `conditional` and `is_finite` are there.

    Pathwise gradient: `conditional` and `hit_probability` in every leaf of the book and in the market's drift,
    volatility, correlation and dof (bridge monitoring). The drawn branch is blind to how liquidation times move.
    """

    equity: Float[Array, "dates paths"] | None
    max_drawdown: Float[Array, " paths"] | None
    hit_probability: Float[Array, "dates accounts paths"] | None
    is_liquidated: Bool[Array, "accounts paths"] | None
    account_equity: Float[Array, "accounts paths"] | None
    conditional: Conditional
    accounts: dict[str, Array] | None
    components: Float[Array, "components paths"] | None
    is_finite: Bool[Array, " paths"]
    record: Record | None
    liquidations: dict[str, Float[Array, "rows paths"]] | None = None


class ObserverState(NamedTuple):
    """Running peak and drawdown, and the recorded dates."""

    peak: Array
    drawdown: Array
    equity: Array
    hit_probability: Array
    record: Record | None
    # Of the step before and its sums by regime, where paths are recorded.
    hits: tuple[Array, ...] = ()
    by_regime: tuple[tuple[Array, ...], ...] = ()


def _observer(book: Book, plan: Plan) -> Stage:
    # Slot of the date at or after each step: later steps of the same slot overwrite earlier ones, so that each slot
    # ends with the value at its date and no step needs a branch.
    slots = np.searchsorted(np.asarray(plan.dates), np.arange(plan.n_steps) + 1).astype(np.int32)
    n_dates, n_accounts = len(plan.dates), book.n_accounts

    def init(context: Context):
        one = jnp.ones(context.path.shape, context.market.drift.dtype)
        record, hits, by_regime = None, (), ()
        if plan.record_paths:
            record = Record(*(buffer((n_dates, n_accounts), one) for _ in range(4)), hit_by_regime=())
            hits = (0.0 * one,) * n_accounts
            by_regime = (hits,) * context.market.drift.shape[0]
        equity, hit = buffer((n_dates,), one), buffer((n_dates, n_accounts), one)
        return ObserverState(one, 0.0 * one, equity, hit, record, hits, by_regime)

    def step(context: Context, t, state: ObserverState, upstream: Upstream):
        books, equity = upstream.state, upstream.output
        slot = lookup(slots, t)
        peak = jnp.maximum(state.peak, equity)
        hits = [s.hit_probability for s in books.survival]
        hit_probability = state.hit_probability
        if hits:
            hit_probability = put(hit_probability, slot, hits)
        record, by_regime = state.record, state.by_regime
        if record is not None and n_accounts:
            rows = (
                [drawn.equity for drawn in books.drawn],
                [drawn.liquidated for drawn in books.drawn],
                [survival.distance for survival in books.survival],
                list(books.exposure),
            )
            record = Record(
                *(put(kept, slot, new) for kept, new in zip(record[:4], rows, strict=True)), hit_by_regime=()
            )
            newly = [now - before for now, before in zip(hits, state.hits, strict=True)]
            masks = (1.0 - sum(books.masks), *books.masks)
            by_regime = tuple(
                tuple(total + mask * more for total, more in zip(totals, newly, strict=True))
                for mask, totals in zip(masks, by_regime, strict=True)
            )
        return ObserverState(
            peak,
            jnp.maximum(state.drawdown, 1.0 - equity / peak),
            put(state.equity, slot, equity),
            hit_probability,
            record,
            tuple(hits) if record is not None else (),
            by_regime,
        ), ()

    return Stage("observe", init, step)


def line_step(stages: Sequence[Stage], context: Context) -> Callable[[list[Any], Array], tuple[list[Any], Any]]:
    """Function (states of all stages, t) -> states after step t, and the output of the last stage."""
    traced = (context.market, context.book, context.keys, context.path, context.record, context.mirror)

    def unit(stage: Stage) -> Any:
        def step(traced, t, state, upstream):
            market, book, keys, path, record, mirror = traced
            inside = context._replace(market=market, book=book, keys=keys, path=path, record=record, mirror=mirror)
            return stage.step(inside, t, state, upstream)

        return materialised(step)

    units = [unit(stage) for stage in stages]

    def body(states, t):
        after, upstream = [], Upstream((), ())
        for step, state in zip(units, states, strict=True):
            upstream = Upstream(*step(traced, t, state, upstream))
            after.append(upstream.state)
        return after, upstream.output

    return body


def run_line(stages: Sequence[Stage], context: Context, remat: str = "store") -> list[Any]:
    """States of all stages after `context.n_steps` steps.

    Args:
      stages: the line, in order.
      context: what the stages read.
      remat: what reverse mode keeps of the steps, see `Plan`; without a gradient it changes nothing but the program.
    """
    if remat == "auto":
        sizes = ((name, residual_bytes(stages, context, name)) for name in REMAT[:-1])
        remat = next((name for name, size in sizes if size <= GRADIENT_BYTES), REMAT[-2])
    return _scan(stages, context, remat)[0]


def _scan(
    stages: Sequence[Stage], context: Context, remat: str, keep: Callable[[Any, Any], Any] | None = None
) -> tuple[list[Any], Any]:
    # Final states, and what `keep` makes of the last stage's state and output in every step.
    step = line_step(stages, context)
    start = [stage.init(context) for stage in stages]
    t = jnp.arange(context.n_steps, dtype=jnp.int32)

    def body(states, t):
        after, output = step(states, t)
        return after, None if keep is None else keep(after[-1], output)

    if remat == "store":
        return lax.scan(body, start, t)
    if remat == "step":
        return lax.scan(jax.checkpoint(body, prevent_cse=False), start, t)
    length = _block_length(context.n_steps)
    n_blocks = -(-context.n_steps // length)
    is_padded = n_blocks * length > context.n_steps

    def masked(states, t):
        # Steps beyond the last one leave everything as it is.
        after, _ = step(states, t)
        if is_padded:
            after = jax.tree.map(partial(jnp.where, t < context.n_steps), after, states)
        return after, None

    def block(states, t):
        return lax.scan(masked, states, t)[0], None

    t = jnp.arange(n_blocks * length, dtype=jnp.int32).reshape(n_blocks, length)
    return lax.scan(jax.checkpoint(block, prevent_cse=False), start, t)


def _block_length(n_steps: int) -> int:
    # Near the square root, where blocks and steps of one block together are fewest; of those the one that wastes least.
    root = n_steps**0.5
    lengths = range(max(1, round(0.7 * root)), round(1.4 * root) + 1)
    return min(lengths, key=lambda b: (-(-n_steps // b) * b, abs(b - root)))


def residual_bytes(stages: Sequence[Stage], context: Context, remat: str) -> int:
    """Memory between the forward and the backward loop of a gradient in all of market and book; traceable.

    Only shapes are computed for it. It includes what a block keeps of its steps while it is done again, but not what
    the arithmetic of one step needs.
    """
    traced = context.market, context.book
    is_real = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)  # noqa: E731
    leaves, treedef = jax.tree.flatten(traced)

    def run(reals):
        given = iter(reals)
        market, book = treedef.unflatten([next(given) if is_real(x) else x for x in leaves])
        return [
            x
            for x in jax.tree.leaves(run_line(stages, context._replace(market=market, book=book), remat))
            if is_real(x)
        ]

    kept = jax.eval_shape(lambda reals: jax.vjp(run, reals)[1], [x for x in leaves if is_real(x)])
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    if remat == "two-level":
        size += residual_bytes(stages, context._replace(n_steps=_block_length(context.n_steps)), "store")
    return size


def record_market(
    market: Market, prepared: Prepared, keys: Any, path: UInt32[Array, " paths"], plan: Plan
) -> MarketRecord:
    """The market's paths alone, kept whole; traceable. A book simulated on them sees the same numbers as in a run."""
    context = context_of(market, prepared, None, keys, path, plan)
    return _scan(market_line.stages(market), context, "store", market_line.record_of)[1]


def record_bytes(market: Market, plan: Plan, n_paths: int) -> int:
    """Memory of `record_market`, side processes not counted."""
    rows = market.n_assets * (3 if market.is_composed else 1) + market.n_regimes
    return rows * plan.n_steps * n_paths * market.drift.dtype.itemsize


def simulate_prepared(
    market: Market,
    prepared: Prepared,
    book: Book,
    keys: Any,
    path: UInt32[Array, " paths"],
    plan: Plan,
    record: MarketRecord | None = None,
) -> Outcome:
    """Outcome of the given paths; traceable, to be jitted by the caller.

    Args:
      market: static shape of the market.
      prepared: its constants, from `market.prepare`.
      book: see `book`.
      keys: stream keys of the seed.
      path: path numbers.
      plan: steps and what is kept.
      record: market paths made before with `record_market`; else they are made on the way.
    """
    context = context_of(market, prepared, book, keys, path, plan, record)
    line = stage_line(market, book, plan, record)
    return outcome_of(*finish(line, run_line(line, context, plan.remat), context, plan))


def context_of(
    market: Market, prepared: Prepared, book: Book | None, keys: Any, path: Array, plan: Plan, record: Any = None
) -> Context:
    """What the stages of a plan read."""
    sub_steps = round(market.step_hours / plan.step_hours)
    path, mirror = random.antithetic(path) if plan.antithetic else (path, None)
    return Context(prepared, book, keys, path, plan.n_steps, sub_steps, plan.step_hours, record, mirror)


def _options(plan: Plan) -> Options:
    return Options(plan.monitoring == "bridge", plan.attribution and plan.drawn, plan.drawn, plan.record_paths)


def stage_line(market: Market, book: Book, plan: Plan, record: MarketRecord | None = None) -> tuple[Stage, ...]:
    """All stages of a plan, in order."""
    before = market_line.stages(market) if record is None else market_line.replay_stages(market)
    line = (*before, *ledger.stages(book, _options(plan)))
    return (*line, _observer(book, plan)) if plan.drawn else line


def finish(
    line: Sequence[Stage], states: Sequence[Any], context: Context, plan: Plan
) -> tuple[ledger.Closing, ObserverState | None]:
    """What the ledger and the observer say after the last step."""
    by_name = dict(zip([stage.name for stage in line], states, strict=True))
    closing = ledger.close(context, by_name["price"], by_name["margin"], by_name["settle"], _options(plan))
    return closing, by_name.get("observe")


def outcome_of(closing: ledger.Closing, seen: ObserverState | None) -> Outcome:
    """The outcome as arrays, from what `finish` gives."""
    zero = jnp.zeros_like(closing.conditional.outright if seen is None else seen.drawdown)

    def stack(rows: Sequence[Array]) -> Array:
        return jnp.stack(list(rows)) if rows else jnp.zeros((0, *zero.shape), zero.dtype)

    conditional = closing.conditional
    if conditional is not None:
        outright, *by_account = conditional
        conditional = Conditional(outright, *map(stack, by_account))
    if seen is None:
        is_finite = jnp.isfinite(conditional.outright + jnp.sum(conditional.survived + conditional.liquidated, axis=0))
        return Outcome(None, None, None, None, None, conditional, None, None, is_finite, None)
    components = None if closing.components is None else stack(closing.components)
    # An equity that is not finite stays in the drawdown, a probability that is not in the later ones.
    last = [seen.drawdown, *seen.hit_probability[-1], *(components if components is not None else ())]
    is_finite = jnp.isfinite(sum(last))
    record = seen.record
    if record is not None:
        record = record._replace(hit_by_regime=jnp.stack([stack(rows) for rows in seen.by_regime]))
    liquidations = closing.liquidations
    return Outcome(
        equity=seen.equity,
        max_drawdown=seen.drawdown,
        hit_probability=seen.hit_probability,
        is_liquidated=stack(closing.liquidated or ()) > 0.5,
        account_equity=stack(closing.account_equity or ()),
        conditional=conditional,
        accounts=closing.accounts,
        components=components,
        is_finite=is_finite,
        record=record,
        liquidations=None if liquidations is None else {k: stack(v) for k, v in liquidations._asdict().items()},
    )


def check_fit(market: Market, book: Book, plan: Plan) -> int:
    """Number of simulation steps per base step.

    Raises:
      InputError: market and book disagree on the assets, or the step does not divide the base step.
    """
    if market.assets != book.assets:
        raise InputError(f"the book is built for {', '.join(book.assets)}, the market has {', '.join(market.assets)}.")
    return sub_steps_of(market, plan)


def sub_steps_of(market: Market, plan: Plan) -> int:
    """Number of simulation steps per base step.

    Raises:
      InputError: the step does not divide the base step.
    """
    ratio = market.step_hours / plan.step_hours
    if abs(ratio - round(ratio)) > 1e-9 or ratio < 0.5:
        raise InputError(
            f"step_hours is {plan.step_hours:g}; it must divide the market's base step of {market.step_hours:g} hours."
        )
    return round(ratio)


@partial(jax.jit, static_argnames="plan")
def _simulate(market: Market, book: Book, keys: Any, path: Array, plan: Plan) -> Outcome:
    prepared = market_model.prepare(market, sub_steps=round(market.step_hours / plan.step_hours))
    return simulate_prepared(market, prepared, book, keys, path, plan)


def simulate_paths(market: Market, book: Book, path: Any, plan: Plan, *, seed: int = 0) -> Outcome:
    """Outcome of the named paths, all in memory: the pure function behind runs, gradients and replay.

    Args:
      market: see `market`.
      book: see `book`; its assets must be the market's.
      path: path numbers, an integer array, or an int n for the paths 0..n-1.
      plan: steps, monitoring and what is kept.
      seed: 64-bit seed; a path is the same path whichever others are asked for with it.

    Raises:
      InputError: market, book and plan do not fit together.
    """
    check_fit(market, book, plan)
    path, n = padded(path)
    outcome = _simulate(market, book, random.stream_keys(seed), path, plan)
    return jax.tree.map(lambda x: x[..., :n], outcome)


@partial(jax.jit, static_argnames="plan")
def _simulate_prepared(
    market: Market, prepared: Prepared, book: Book, keys: Any, path: Array, plan: Plan, record: MarketRecord | None
) -> Outcome:
    return simulate_prepared(market, prepared, book, keys, path, plan, record)


def simulate_again(
    market: Market, book: Book, path: Any, plan: Plan, *, seed: int = 0, record: MarketRecord | None = None
) -> Outcome:
    """The same as `simulate_paths`, by a program that the compilation cache on disk keeps; not traceable.

    Args:
      market: see `market`.
      book: see `book`; its assets must be the market's.
      path: path numbers, or an int n for the paths 0..n-1.
      plan: steps, monitoring and what is kept.
      seed: 64-bit seed.
      record: market paths that are given, e.g. history (steps first, paths last); `path` only numbers them then.

    Raises:
      InputError: market, book, paths and plan do not fit together.
    """
    sub_steps = check_fit(market, book, plan)
    path, n = padded(path)
    if record is not None:
        n_steps, n_assets, n_given = record.log_price.shape
        if (n_steps, n_assets, n_given) != (plan.n_steps, market.n_assets, n):
            raise InputError(
                f"the given paths have {n_steps} steps of {n_assets} assets on {n_given} paths; the plan has "
                f"{plan.n_steps} steps, the market {market.n_assets} assets, and {n} paths are asked for."
            )
        record = jax.tree.map(lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % 256)], mode="edge"), record)
    prepared = market_model.prepare_once(market, sub_steps=sub_steps)
    outcome = _simulate_prepared(market, prepared, book, random.stream_keys(seed), path, plan, record)
    return jax.tree.map(lambda x: x[..., :n], outcome)


def padded(path: Any) -> tuple[Array, int]:
    """Path numbers, the last one repeated up to a multiple of 256, and how many of them were asked for."""
    # Whole vectors of lanes: the remainder of a loop is compiled to other instructions, whose exp differs in the last
    # bit, and path 17 is to be the same alone and in company.
    # In NumPy: JAX would compile a program for each shape.
    path = np.arange(path, dtype=np.uint32) if isinstance(path, int) else np.asarray(path, np.uint32)
    n = path.shape[0]
    return jax.device_put(np.pad(path, (0, -n % 256), mode="edge")), n


@partial(jax.jit, static_argnames="plan")
def _record(market: Market, keys: Any, path: Array, plan: Plan) -> MarketRecord:
    prepared = market_model.prepare(market, sub_steps=round(market.step_hours / plan.step_hours))
    return record_market(market, prepared, keys, path, plan)


def market_paths(market: Market, path: Any, plan: Plan, *, seed: int = 0) -> MarketRecord:
    """Market paths at every step: cumulative log-returns, one-hot regimes and mixing scales.

    Args:
      market: see `market`.
      path: path numbers, or an int n for the paths 0..n-1.
      plan: steps.
      seed: 64-bit seed.
    """
    path, n = padded(path)
    record = _record(market, random.stream_keys(seed), path, plan)
    return jax.tree.map(lambda x: x[..., :n], record)
