"""Streaming run: chunks of paths over all devices, merged partial results, constant memory.

One call of the compiled program simulates a batch: every device takes a consecutive share of it, in chunks sized to its
cache. The host reduces batch k while the devices simulate batch k + 1.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from qpo_sim import random
from qpo_sim.book.ledger import ACCOUNTS, Book, Liquidations
from qpo_sim.compute import partial as partials
from qpo_sim.compute.partial import PATH_BLOCK, Partial
from qpo_sim.errors import InputError, check_level
from qpo_sim.market import model as market_model
from qpo_sim.market.model import Market
from qpo_sim.simulate import Outcome, Plan, check_fit, default_dates, simulate_prepared

BATCH = 65_536
# A GPU wants more: several programs of the kernel on each of its processors, for each device.
FUSED_BATCH = 262_144
KERNELS = ("auto", "scan", "fused")
log = logging.getLogger(__name__)

_KEPT = (
    "equity",
    "max_drawdown",
    "hit_probability",
    "is_liquidated",
    "accounts",
    "components",
    "liquidations",
    "is_finite",
)


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told after each batch; the next batch uses `partial` up."""

    n_done: int
    n_paths: int
    seconds: float
    partial: Partial


@dataclass(frozen=True)
class Engine:
    """A compiled batch: `batch(book, first)` simulates `size` consecutive paths of a book of the compiled shape.

    `kernel` is what runs the time loop, "scan" or "fused", and `kernel_reason` why. The fused kernel holds the numbers
    of the book it was compiled for and takes no other.
    """

    market: Market
    plan: Plan
    mesh: Mesh
    size: int
    prepared: Any
    keys: Any
    program: Any
    compile_seconds: float
    kernel: str = "scan"
    kernel_reason: str = ""

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
    def kernel(self) -> str:
        """What ran the time loop, "scan" or "fused"; `engine.kernel_reason` says why."""
        return self.engine.kernel

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
    """Jitted function (first_path, keys, market, prepared, book) -> arrays of the batch, paths last and in order.

    The same function for the same shapes, so that JAX finds what it has compiled for them.
    """
    leaves, tree = jax.tree.flatten(_shape_of_kept(market, book, plan))
    return _batch_function(plan, mesh, chunk_size, chunks, tuple(leaves), tree)


@lru_cache(maxsize=32)
def _batch_function(
    plan: Plan, mesh: Mesh, chunk_size: int, chunks: int, leaves: tuple[jax.ShapeDtypeStruct, ...], tree: Any
) -> Any:
    n_devices = mesh.devices.size
    shape = jax.tree.unflatten(tree, leaves)

    def on_device(first, keys, market, prepared, book):
        # Chunks are put where they belong in the device's share at once: stacking and turning them afterwards would
        # move every number two times more.
        def chunk(k, share):
            path = first[0] + k * np.uint32(chunk_size) + jnp.arange(chunk_size, dtype=jnp.uint32)
            rows = kept(simulate_prepared(market, prepared, book, keys, path, plan))
            start = k.astype(jnp.int32) * chunk_size
            return jax.tree.map(lambda x, row: lax.dynamic_update_slice_in_dim(x, row, start, -1), share, rows)

        share = jax.tree.map(lambda s: jnp.zeros((*s.shape, chunks * chunk_size), s.dtype), shape)
        return lax.fori_loop(np.uint32(0), np.uint32(chunks), chunk, share)

    replicated = Spec()
    sharded = jax.tree.map(lambda s: Spec(*[None] * len(s.shape), "paths"), shape)
    local = jax.shard_map(
        on_device, mesh=mesh, in_specs=(Spec("paths"), *[replicated] * 4), out_specs=sharded, check_vma=False
    )

    def batch(first, keys, market, prepared, book):
        starts = first + jnp.arange(n_devices, dtype=jnp.uint32) * np.uint32(chunk_size * chunks)
        return local(starts, keys, market, prepared, book)

    return jax.jit(batch)


def compile_fused(
    market: Market, prepared: Any, book: Book, plan: Plan, mesh: Mesh, *, n_local: int, keys: Any
) -> Callable[..., dict[str, Any]]:
    """Compiled function of the same arguments and result as that of `compile_batch`, one kernel per device and batch.

    It raises an InputError when it is called with a book of other numbers.
    """
    # Pallas takes a quarter of a second to import.
    from qpo_sim.compute import fused

    own = fused.fused_paths(market, prepared, book, plan, n_local)
    paths = fused_batch(own, mesh, n_local)
    program = jax.jit(paths).lower(np.uint32(0), keys).compile()
    numbers = [np.asarray(leaf) for leaf in jax.tree.leaves(book)]

    def batch(first, keys, market, prepared, book):
        if not all(map(np.array_equal, jax.tree.leaves(book), numbers)):
            raise InputError(
                "the fused kernel holds the numbers of the book it was compiled for; build an engine with "
                'kernel="scan" to simulate several books with one program.'
            )
        return program(first, keys)

    return batch


def fused_batch(paths: Callable[[Any, Any], Outcome], mesh: Mesh, n_local: int) -> Callable[[Any, Any], dict[str, Any]]:
    """Function (first path, keys) -> arrays of a batch of `n_local` paths per device; `paths` is from `fused_paths`."""
    local = jax.shard_map(
        lambda first, keys: kept(paths(first[0], keys)),
        mesh=mesh,
        in_specs=(Spec("paths"), Spec()),
        out_specs=jax.tree.map(
            lambda s: Spec(*[None] * (s.ndim - 1), "paths"),
            jax.eval_shape(lambda f, k: kept(paths(f, k)), np.uint32(0), random.stream_keys(0)),
        ),
        check_vma=False,
    )

    def batch(first, keys):
        return local(first + jnp.arange(mesh.devices.size, dtype=jnp.uint32) * np.uint32(n_local), keys)

    return batch


def kept(outcome: Outcome) -> dict[str, Any]:
    """The parts of an outcome that a streaming run reduces."""
    return {name: getattr(outcome, name) for name in _KEPT}


def _shape_of_kept(market: Market, book: Book, plan: Plan) -> dict[str, Any]:
    """Shapes of `kept`, less the axis of the paths. Asking JAX would trace the whole simulation once more."""

    def rows(*shape: int, dtype: Any = market.drift.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    n_dates = len(plan.dates)
    return {
        "equity": rows(n_dates),
        "max_drawdown": rows(),
        "hit_probability": rows(n_dates, book.n_accounts),
        "is_liquidated": rows(book.n_accounts, dtype=np.dtype(bool)),
        "accounts": dict.fromkeys(ACCOUNTS, rows()) if plan.attribution else None,
        "components": rows(len(book.components)) if plan.attribution else None,
        "liquidations": _rows_of_liquidations(book, rows) if plan.attribution and book.n_accounts else None,
        "is_finite": rows(dtype=np.dtype(bool)),
    }


def _rows_of_liquidations(book: Book, rows: Callable[..., Any]) -> dict[str, Any]:
    # A row per account, per account with fixed positions or per venue (see `ledger.Liquidations`).
    accounts, fixed, venues = book.n_accounts, book.n_fixed, len(book.venues)
    by_name = dict(bad_debt=accounts, cost=accounts, needless=fixed)
    return {name: rows(by_name.get(name, venues)) for name in Liquidations._fields}


def build_engine(
    market: Market,
    book: Book,
    plan: Plan,
    *,
    n_paths: int,
    seed: int = 0,
    chunk_size: int = 8192,
    devices: int | None = None,
    kernel: str = "scan",
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
      kernel: what runs the time loop: "scan", which takes any book of the shape; "fused", one GPU kernel for this very
        book (see `fused`), whose results agree with the scan's to float32 rounding; or "auto": fused on a GPU where the
        model allows it, else scan.

    Raises:
      InputError: sizes that cannot be, market, book and plan that do not fit together, or "fused" where it cannot be.
    """
    kernel, reason = _chosen_kernel(kernel, market, plan, book)
    sub_steps = check_fit(market, book, plan)
    mesh = device_mesh(devices)
    n_devices = mesh.devices.size
    share = 1 << max(8, math.ceil(math.log2(max(1, math.ceil(n_paths / n_devices)))))
    chunk_size = min(check_chunk_size(chunk_size), share)
    unit = n_devices * chunk_size

    def chunks_of(batch: int) -> int:
        chunks = max(1, min(math.ceil(batch / unit), math.ceil(n_paths / unit)))
        if n_paths > unit * chunks:
            # A batch of a long run is a whole number of blocks, so that no block sum is split between two batches.
            blocks = PATH_BLOCK // math.gcd(PATH_BLOCK, unit)
            chunks = math.ceil(chunks / blocks) * blocks
        return chunks

    clock = time.perf_counter()
    prepared = market_model.prepare_once(market, sub_steps=sub_steps)
    keys = random.stream_keys(seed)
    program, chunks = None, 0
    if kernel != "scan":
        chunks = chunks_of(FUSED_BATCH * n_devices)
        try:
            program = compile_fused(market, prepared, book, plan, mesh, n_local=chunk_size * chunks, keys=keys)
        except Exception as error:  # compilers of kernels share no class of errors
            reason = f"the kernel does not compile ({_first_line(error)})"
            if kernel == "fused":
                raise InputError(f"simulation.kernel is fused, but {reason}; use auto or scan.") from error
            log.warning("scan instead of the fused kernel: %s", reason)
        kernel = "fused" if program is not None else "scan"
    if program is None:
        chunks = chunks_of(BATCH)
        function = compile_batch(market, book, plan, mesh, chunk_size=chunk_size, chunks=chunks)
        program = function.lower(np.uint32(0), keys, market, prepared, book).compile()
    seconds = time.perf_counter() - clock
    return Engine(market, plan, mesh, unit * chunks, prepared, keys, program, seconds, kernel, reason)


def _chosen_kernel(kernel: str, market: Market, plan: Plan, book: Book) -> tuple[str, str]:
    # What to try, "auto" where the scan may step in, and why.
    if kernel not in KERNELS:
        raise InputError(f"simulation.kernel is {kernel!r}; it must be one of {', '.join(KERNELS)}.")
    if kernel == "scan":
        return "scan", "asked for"
    backend = jax.default_backend()
    if backend == "gpu":
        from qpo_sim.compute import fused

        reason = fused.refusal(market, plan, book)
    else:
        reason = f"it needs a GPU and this process runs on {backend}"
    if reason is None:
        return kernel, "asked for" if kernel == "fused" else "the model allows it"
    if kernel == "fused":
        raise InputError(f"simulation.kernel is fused, but {reason}; use auto or scan.")
    return "scan", f"no fused kernel: {reason}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


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
    kernel: str = "auto",
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
      kernel: what runs the time loop, "auto", "scan" or "fused" (see `build_engine`).
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
    engine = build_engine(
        market, book, plan, n_paths=n_paths, seed=seed, chunk_size=chunk_size, devices=devices, kernel=kernel
    )
    timings = {"compile": engine.compile_seconds}
    clock = time.perf_counter()

    merged = partials.zero(partials.tail_size(n_paths, min(levels)))
    host = 0.0
    pending: tuple[int, Any] | None = None
    n_batches = math.ceil(n_paths / engine.size)
    for k in range(n_batches + 1):
        launched = (k * engine.size, engine.batch(book, k * engine.size)) if k < n_batches else None
        if pending is not None:
            first, arrays = pending
            size = min(engine.size, n_paths - first)
            shares = _shares(arrays, size)
            begun = time.perf_counter()
            merged = partials.add(merged, shares, first, horizons=rows)
            host += time.perf_counter() - begun
            if progress is not None:
                progress(Progress(first + size, n_paths, time.perf_counter() - clock, merged))
        pending = launched
    timings["simulate"] = time.perf_counter() - clock
    timings["reduce"] = host
    return Run(market, book, plan, seed, n_paths, tuple(sorted(levels)), horizons, merged, engine, timings)


def _shares(arrays: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Numpy arrays of what each device made of the first `size` paths of a batch, in the order of the paths."""
    leaves, tree = jax.tree.flatten(arrays)
    shards = [sorted(leaf.addressable_shards, key=lambda shard: shard.index[-1].start or 0) for leaf in leaves]
    share = shards[0][0].data.shape[-1]
    if share % PATH_BLOCK:
        # A block must not be split.
        return [jax.tree.map(lambda x: np.asarray(x)[..., :size], arrays)]
    # Device by device: putting the shares together would copy every number.
    return [
        jax.tree.unflatten(tree, [np.asarray(x[k].data)[..., : size - start] for x in shards])
        for k, start in enumerate(range(0, size, share))
    ]
