"""Speed as ratios measured in one process, all parts taking turns: what two runs on one machine have in common.

Times are process CPU seconds (every thread counts), the smallest of the repetitions: on a shared machine the smallest
is the one least disturbed, and CPU seconds do not count waiting.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qpo_sim.bench import workload
from qpo_sim.book import Book
from qpo_sim.compute import histogram
from qpo_sim.compute import partial as partials
from qpo_sim.compute.run import Engine, build_engine
from qpo_sim.market.model import Market
from qpo_sim.optimize import portfolio
from qpo_sim.simulate import Plan, record_market

N_LOSSES = 1 << 20
SLOWER = "slower"


class Measured(NamedTuple):
    """A ratio (more is better), what it divides, and the two costs behind it in `unit`."""

    name: str
    ratio: float
    of: str
    over: str
    numerator: float
    denominator: float
    unit: str


def interleaved(
    functions: Mapping[str, Callable[[int], Any]], repetitions: int, tick: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Smallest process CPU seconds of each function over the repetitions; they take turns after one round of warm-up.

    Args:
      functions: by name; each is called with the number of the repetition and must not return before it is done.
      repetitions: timed rounds.
      tick: called after each call.
    """
    best = dict.fromkeys(functions, np.inf)
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            start = time.process_time()
            function(repetition)
            seconds = time.process_time() - start
            if repetition:
                best[name] = min(best[name], seconds)
            tick()
    return best


def judge(ratio: float, reference: float | None, tolerance: float) -> str:
    """`SLOWER` when the ratio is more than the tolerance (a share) below its reference."""
    if reference is None:
        return "not judged"
    return SLOWER if ratio < (1.0 - tolerance) * reference else "holds"


def n_calls(repetitions: int) -> int:
    """How often `measure` calls its `tick`."""
    return 10 * (repetitions + 1)


def measure(
    market: Market,
    book: Book,
    *,
    n_steps: int,
    step_hours: float,
    monitoring: str,
    repetitions: int = 5,
    n_paths: int = 32_768,
    tick: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Ratios of this machine and installation for the fixed workloads and for a book of one's own.

    Args:
      market: market of the book.
      book: book whose kernel, gradient and reduction are measured.
      n_steps: simulation steps of the book.
      step_hours: length of a step.
      monitoring: "bridge" or "step".
      repetitions: timed rounds; the smallest time counts.
      n_paths: paths of the book in a round; the workloads take a half and an eighth of them.
      tick: called after each timed call, `n_calls(repetitions)` times.
    """
    plan = Plan(n_steps, step_hours=step_hours, monitoring=monitoring)
    engine = build_engine(market, book, plan, n_paths=n_paths)
    batch = [jax.tree.map(np.asarray, engine.batch(book, 0))]
    loss = np.random.default_rng(0).standard_t(3.0, N_LOSSES).astype(np.float32)
    forward, gradient = _objective(engine, book)
    w1, w1_numpy, w1_work = _workload(10, 365, n_paths // 2)
    w3, w3_numpy, w3_work = _workload(100, 100, n_paths // 8)
    sketch = histogram.zero(1, partials.FINE_BITS, with_sums=True)
    seconds = interleaved(
        {
            "w1": w1,
            "w1_numpy": w1_numpy,
            "w3": w3,
            "w3_numpy": w3_numpy,
            "book": lambda r: jax.block_until_ready(engine.batch(book, r * engine.size)),
            "forward": lambda r: jax.block_until_ready(forward()),
            "gradient": lambda r: jax.block_until_ready(gradient()),
            "reduction": lambda r: partials.add(
                partials.zero(partials.tail_size(10**6, 0.95)), batch, 0, horizons=(len(plan.dates) - 1,)
            ),
            "sketch": lambda r: histogram.count(sketch, [loss]),
            "sort": lambda r: np.sort(loss),
        },
        repetitions,
        tick,
    )
    work = {
        "w1": w1_work, "w1_numpy": w1_work, "w3": w3_work, "w3_numpy": w3_work,
        "book": engine.size * n_steps * market.n_assets, "forward": 1e6, "gradient": 1e6,
        "reduction": engine.size * n_steps * market.n_assets, "sketch": loss.size, "sort": loss.size,
    }  # fmt: skip
    cost = {name: 1e9 * seconds[name] / work[name] for name in seconds}
    per_item, per_loss, call = "ns per path-step-asset", "ns per loss", "ms a call"

    def row(name: str, of: str, over: str, numerator: str, denominator: str, unit: str) -> Measured:
        return Measured(name, cost[numerator] / cost[denominator], of, over, cost[numerator], cost[denominator], unit)

    return [
        row("paths", "NumPy", "W1, 10 assets", "w1_numpy", "w1", per_item),
        row("paths_100_assets", "NumPy", "W3, 100 assets", "w3_numpy", "w3", per_item),
        row("book", "W1, 10 assets", "book", "w1", "book", per_item),
        row("reduction", "book", "reduction of its outcomes", "book", "reduction", per_item),
        row("gradient", "objective", "objective and gradient", "forward", "gradient", call),
        row("sketch", "np.sort", "histogram of losses", "sort", "sketch", per_loss),
    ]


def _workload(n_assets: int, n_steps: int, n_paths: int) -> tuple[Callable, Callable, float]:
    model = workload.parameters(n_assets)
    assets = workload.names(model)
    market, book = workload.market_of(model, assets), workload.book_of(model, assets)
    plan = Plan(n_steps, monitoring="step", attribution=False, dates=(n_steps,))
    engine: Engine = build_engine(market, book, plan, n_paths=n_paths)

    def ours(repetition: int) -> None:
        jax.block_until_ready(engine.batch(book, repetition * engine.size))

    def numpy(repetition: int) -> None:
        workload.numpy_paths(model, engine.size, n_steps, repetition)

    return ours, numpy, float(engine.size * n_steps * n_assets)


def _objective(engine: Engine, book: Book, n_paths: int = 8192) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """CVaR of the book over recorded market paths, alone and with its gradient in the weights."""
    market, mesh, keys, prepared = engine.market, engine.mesh, engine.keys, engine.prepared
    plan = replace(engine.plan, attribution=False, drawn=False)
    score = portfolio.ThroughSimulator("cvar", 0.99, 1.0, 0.0, plan, mesh)
    book = portfolio.marked(book)
    path = jnp.arange(n_paths - n_paths % mesh.devices.size, dtype=jnp.uint32)
    problem = portfolio.Problem(market, prepared, book, keys, path, portfolio.bounds_of(book))
    record = jax.jit(lambda p: record_market(p.market, p.prepared, p.keys, p.path, plan))(problem)
    problem = problem._replace(record=record)
    weights = portfolio.weights_of(book)
    forward = jax.jit(score).lower(weights, problem).compile()
    gradient = jax.jit(jax.value_and_grad(score)).lower(weights, problem).compile()
    return lambda: forward(weights, problem), lambda: gradient(weights, problem)
