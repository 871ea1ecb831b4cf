"""Streaming run: chunks of paths over all devices, merged partial results, constant memory.

One call of the compiled program simulates a batch: every device takes a consecutive share of it, in chunks sized to its
cache. The host reduces batch k while the devices simulate batch k + 1.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial as bind
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from qpo_sim import random
from qpo_sim.book.ledger import Book
from qpo_sim.compute import partial as partials
from qpo_sim.compute.partial import PATH_BLOCK, Partial
from qpo_sim.errors import InputError, check_level
from qpo_sim.market import model as market_model
from qpo_sim.market.model import Market
from qpo_sim.simulate import Outcome, Plan, check_fit, default_dates, simulate_prepared

BATCH = 65_536
_KEPT = ("equity", "max_drawdown", "hit_probability", "is_liquidated", "accounts", "components", "is_finite")


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told after each batch."""

    n_done: int
    n_paths: int
    seconds: float
    partial: Partial


@dataclass(frozen=True)
class Engine:
    """A compiled batch: `batch(book, first)` simulates `size` consecutive paths of a book of the compiled shape."""

    market: Market
    plan: Plan
    mesh: Mesh
    size: int
    prepared: Any
    keys: Any
    program: Any
    compile_seconds: float

    def batch(self, book: Book, first: int) -> dict[str, Any]:
        """Arrays of `simulate.Outcome` by name for paths first .. first + size - 1; returns before they are done."""
        return self.program(np.uint32(first), self.keys, self.market, self.prepared, book)


@dataclass(frozen=True)
class Run:
    """A finished run: what was asked, the merged result, and how long each part took (seconds)."""

    market: Market
    book: Book
    plan: Plan
    seed: int
    n_paths: int
    levels: tuple[float, ...]
    horizons: tuple[int, ...]
    partial: Partial
    engine: Engine
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices that simulated."""
        return tuple(str(device) for device in self.engine.mesh.devices.flat)

    @property
    def horizon_days(self) -> tuple[float, ...]:
        """Length of each horizon in days."""
        return tuple(h * self.plan.step_hours / 24.0 for h in self.horizons)


def device_mesh(devices: int | None = None) -> Mesh:
    """Mesh over the first `devices` devices (all when None); paths are split along its only axis."""
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise InputError(f"compute.devices is {devices}; this process has {len(available)} device(s).")
    return Mesh(np.array(available[:count]), ("paths",))


def check_chunk_size(chunk_size: int) -> int:
    """The chunk size itself.

    Raises:
      InputError: not a power of two in 256..65536.
    """
    if not (256 <= chunk_size <= 65_536 and chunk_size & (chunk_size - 1) == 0):
        raise InputError(f"simulation.chunk_size is {chunk_size}; it must be a power of two between 256 and 65536.")
    return chunk_size


def compile_batch(market: Market, book: Book, plan: Plan, mesh: Mesh, *, chunk_size: int, chunks: int) -> Any:
    """Jitted function (first_path, keys, market, prepared, book) -> arrays of the batch, paths last and in order."""
    n_devices = mesh.devices.size

    def on_device(first, keys, market, prepared, book):
        def chunk(k):
            path = first[0] + k * np.uint32(chunk_size) + jnp.arange(chunk_size, dtype=jnp.uint32)
            return kept(simulate_prepared(market, prepared, book, keys, path, plan))

        rows = lax.map(chunk, jnp.arange(chunks, dtype=jnp.uint32))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], chunks * chunk_size), rows)

    replicated = Spec()
    shape = jax.eval_shape(
        lambda m, b: kept(
            simulate_prepared(m, market_model.prepare(m), b, random.stream_keys(0), jnp.zeros(8, jnp.uint32), plan)
        ),
        market,
        book,
    )
    sharded = jax.tree.map(lambda s: Spec(*[None] * (s.ndim - 1), "paths"), shape)
    local = jax.shard_map(
        on_device, mesh=mesh, in_specs=(Spec("paths"), *[replicated] * 4), out_specs=sharded, check_vma=False
    )

    def batch(first, keys, market, prepared, book):
        starts = first + jnp.arange(n_devices, dtype=jnp.uint32) * np.uint32(chunk_size * chunks)
        return local(starts, keys, market, prepared, book)

    return jax.jit(batch)


def kept(outcome: Outcome) -> dict[str, Any]:
    """The parts of an outcome that a streaming run reduces."""
    return {name: getattr(outcome, name) for name in _KEPT}


def build_engine(
    market: Market,
    book: Book,
    plan: Plan,
    *,
    n_paths: int,
    seed: int = 0,
    chunk_size: int = 8192,
    devices: int | None = None,
) -> Engine:
    """Compiles the batch for a market, a shape of book and a plan.

    Args:
      market: see `market`.
      book: any book of the shape that will be simulated.
      plan: steps and what is kept.
      n_paths: paths the engine will be asked for; a small run gets a small batch.
      seed: 64-bit seed.
      chunk_size: paths per inner loop, a power of two; results do not depend on it.
      devices: how many devices, all when omitted; results do not depend on it.

    Raises:
      InputError: sizes that cannot be, or market, book and plan that do not fit together.
    """
    sub_steps = check_fit(market, book, plan)
    mesh = device_mesh(devices)
    n_devices = mesh.devices.size
    share = 1 << max(8, math.ceil(math.log2(max(1, math.ceil(n_paths / n_devices)))))
    chunk_size = min(check_chunk_size(chunk_size), share)
    unit = n_devices * chunk_size
    chunks = max(1, min(math.ceil(BATCH / unit), math.ceil(n_paths / unit)))
    if n_paths > unit * chunks:
        # A batch of a long run is a whole number of blocks, so that no block sum is split between two batches.
        blocks = PATH_BLOCK // math.gcd(PATH_BLOCK, unit)
        chunks = math.ceil(chunks / blocks) * blocks
    clock = time.perf_counter()
    prepared = jax.jit(bind(market_model.prepare, sub_steps=sub_steps))(market)
    keys = random.stream_keys(seed)
    function = compile_batch(market, book, plan, mesh, chunk_size=chunk_size, chunks=chunks)
    program = function.lower(np.uint32(0), keys, market, prepared, book).compile()
    return Engine(market, plan, mesh, unit * chunks, prepared, keys, program, time.perf_counter() - clock)


def run(
    market: Market,
    book: Book,
    *,
    n_paths: int,
    n_steps: int,
    step_hours: float | None = None,
    seed: int = 0,
    monitoring: str = "bridge",
    levels: tuple[float, ...] = (0.95, 0.99, 0.999),
    horizons: tuple[int, ...] = (),
    chunk_size: int = 8192,
    devices: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Simulates `n_paths` paths and returns the merged result.

    Args:
      market: see `market`.
      book: see `book`.
      n_paths: paths, numbered from 0.
      n_steps: simulation steps.
      step_hours: length of a step, the market's base step when omitted.
      seed: 64-bit seed.
      monitoring: "bridge" or "step" (see `book.ledger`).
      levels: confidence levels that will be asked for; they size the exact tail.
      horizons: step counts at which losses are measured, the end is always one.
      chunk_size: paths per inner loop, a power of two; results do not depend on it.
      devices: how many devices, all when omitted; results do not depend on it.
      progress: called after each batch.

    Raises:
      InputError: a size, level or horizon that cannot be.
    """
    if not 1 <= n_paths <= 2**32:
        raise InputError(f"simulation.n_paths is {n_paths}; it must lie in 1..2^32.")
    if not levels:
        raise InputError("risk levels are empty; give at least one confidence level, e.g. 0.99.")
    for level in levels:
        check_level(level)
    horizons = tuple(sorted({*horizons, n_steps}))
    if horizons[0] < 1 or horizons[-1] > n_steps:
        raise InputError(f"risk horizons must lie in 1..{n_steps} steps, got {list(horizons)}.")
    plan = Plan(
        n_steps,
        step_hours=market.step_hours if step_hours is None else step_hours,
        monitoring=monitoring,
        dates=default_dates(n_steps, horizons),
    )
    rows = tuple(plan.dates.index(h) for h in horizons)
    engine = build_engine(market, book, plan, n_paths=n_paths, seed=seed, chunk_size=chunk_size, devices=devices)
    timings = {"compile": engine.compile_seconds}
    clock = time.perf_counter()

    keep = partials.tail_size(n_paths, min(levels))
    merged = partials.zero(keep)
    host = 0.0
    pending: tuple[int, Any] | None = None
    n_batches = math.ceil(n_paths / engine.size)
    for k in range(n_batches + 1):
        launched = (k * engine.size, engine.batch(book, k * engine.size)) if k < n_batches else None
        if pending is not None:
            first, arrays = pending
            size = min(engine.size, n_paths - first)
            arrays = jax.tree.map(lambda x, size=size: np.asarray(x)[..., :size], arrays)
            begun = time.perf_counter()
            threshold = [t.loss[-1] if t.loss.size == keep else -np.inf for t in merged.tails] or None
            merged = merged.merge(partials.partial_of(arrays, first, horizons=rows, keep=keep, threshold=threshold))
            host += time.perf_counter() - begun
            if progress is not None:
                progress(Progress(first + size, n_paths, time.perf_counter() - clock, merged))
        pending = launched
    timings["simulate"] = time.perf_counter() - clock
    timings["reduce"] = host
    return Run(market, book, plan, seed, n_paths, tuple(sorted(levels)), horizons, merged, engine, timings)
