"""What a path-step-asset costs at least on this machine, and what it costs: operations, bytes and measured peaks.

Operations are counted in the traced program of one step of workload W1 (see `qpo_sim.bench.workload`), so they are what
the model needs, not what the compiler makes of it. The peaks are measured with the same compiler on one core: chains of
independent multiply-adds, of integer adds, shifts and xors, of exp, log and square roots, on arrays that stay in the
first-level cache; and copies of arrays that fit the second-level cache and of arrays that fit none.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

FLOAT = {"add", "sub", "mul", "max", "min", "neg", "abs", "clamp", "add_any"}
INTEGER = {
    "add",
    "sub",
    "mul",
    "xor",
    "or",
    "and",
    "shift_left",
    "shift_right_logical",
    "shift_right_arithmetic",
    "neg",
}
COMPARE = {"gt", "lt", "ge", "le", "eq", "ne", "select_n", "convert_element_type", "sign"}
SLOW = {"exp": "exp", "log": "log", "sqrt": "sqrt", "div": "div"}
FREE = {"broadcast_in_dim", "bitcast_convert_type", "slice", "squeeze", "reshape", "complex", "real", "imag", "iota"}


def count(jaxpr: Any, n_paths: int) -> Counter:
    """Operations per path of a traced step, by kind; arrays without a path axis are parameters and count nothing."""
    total: Counter = Counter()
    for equation in jaxpr.eqns:
        inner = [p for p in equation.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        if inner:
            for sub in inner:
                total += count(getattr(sub, "jaxpr", sub), n_paths)
            continue
        out = equation.outvars[0].aval
        if n_paths not in out.shape:
            continue
        per_path = out.size / n_paths
        name, is_float = equation.primitive.name, np.issubdtype(out.dtype, np.floating)
        if name in SLOW:
            total[SLOW[name]] += per_path
        elif name in COMPARE:
            total["compare, select, convert"] += per_path
        elif is_float and name in FLOAT:
            total["float add, multiply, max"] += per_path
        elif not is_float and name in INTEGER:
            total["integer"] += per_path
        elif name not in FREE:
            total[f"other ({name})"] += per_path
    return total


def step_of_w1(n_paths: int) -> tuple[Any, int]:
    """Traced line of W1 for one step, and the bytes that its stages hand over per path and step."""
    import jax
    import jax.numpy as jnp

    from qpo_sim import random
    from qpo_sim.bench import workload
    from qpo_sim.book import ledger
    from qpo_sim.instrument.first_passage import Options
    from qpo_sim.market import line as market_line
    from qpo_sim.market import model as market_model
    from qpo_sim.types import Context, Upstream

    model = workload.parameters(10)
    assets = workload.names(model)
    market, book = workload.market_of(model, assets), workload.book_of(model, assets)
    prepared = market_model.prepare(market)
    line = (*market_line.stages(market), *ledger.stages(book, Options(False, False, True, False)))
    moved = 0

    def step(path, states):
        nonlocal moved
        context = Context(prepared, book, random.stream_keys(0), path, 1, 1, 24.0)
        upstream, after = Upstream((), ()), []
        for stage, state in zip(line, states, strict=True):
            upstream = Upstream(*stage.step(context, jnp.int32(0), state, upstream))
            after.append(upstream.state)
            moved += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tuple(upstream)))
        return after

    path = jnp.zeros(n_paths, jnp.uint32)
    context = Context(prepared, book, random.stream_keys(0), path, 1, 1, 24.0)
    states = [stage.init(context) for stage in line]
    traced = jax.make_jaxpr(step)(path, states)
    # Written once and read about once.
    return traced.jaxpr, 2 * moved // n_paths


def seconds(function: Callable[[], Any], repetitions: int = 9) -> float:
    """Smallest process CPU time of a call."""
    best = np.inf
    for _ in range(repetitions):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def peaks() -> dict[str, float]:
    """Billions of operations per second and core."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as Spec

    n, rounds = 2048, 4000
    n_devices = len(jax.devices())
    mesh = Mesh(np.array(jax.devices()), ("lanes",))

    def rate(body: Callable[[Any], Any], start: Any, per_round: float) -> float:
        # All devices at once, as a run does: a program on one of them would share its loops out to idle threads, and
        # their waiting would count as work.
        loop = jax.shard_map(
            lambda x: lax.fori_loop(0, rounds, lambda _, y: body(y), x),
            mesh=mesh, in_specs=Spec("lanes"), out_specs=Spec("lanes"),
        )  # fmt: skip
        spread = jax.device_put(jnp.tile(start, n_devices), NamedSharding(mesh, Spec("lanes")))
        program = jax.jit(loop).lower(spread).compile()
        return n * n_devices * rounds * per_round / seconds(lambda: jax.block_until_ready(program(spread))) / 1e9

    x = jnp.linspace(0.1, 0.9, n, dtype=jnp.float32)

    def multiply_adds(y):
        # Eight independent chains of 16 hide the latency of a multiply-add.
        parts = [y + np.float32(k) for k in range(8)]
        for _ in range(16):
            parts = [p * np.float32(0.999) + np.float32(0.0007) for p in parts]
        return sum(parts) * np.float32(0.125) - np.float32(3.5)

    def integers(y):
        parts = [y + np.uint32(k) for k in range(8)]
        for _ in range(8):
            parts = [((p << np.uint32(7)) ^ (p >> np.uint32(9))) + p for p in parts]
        return reduce(lambda a, b: a ^ b, parts)

    result = {
        "float add, multiply, max": rate(multiply_adds, x, 8 * 16 * 2 + 17),
        "integer": rate(integers, x.view(jnp.uint32), 8 * 8 * 4 + 15),
        "exp": rate(lambda y: jnp.exp(-y), x, 1),
        "log": rate(lambda y: jnp.log(y + np.float32(1.1)), x, 1),
        "sqrt": rate(lambda y: jnp.sqrt(y + np.float32(0.1)), x, 1),
        "div": rate(lambda y: np.float32(1.0) / (y + np.float32(1.0)), x, 1),
        "compare, select, convert": rate(
            lambda y: jnp.where(y > 0.5, y - np.float32(0.3), y + np.float32(0.2)), x, 4
        ),
    }  # fmt: skip
    return result


def bandwidths() -> dict[str, float]:
    """Billions of bytes copied per second and core, reads and writes; before JAX has threads that wait."""
    result = {}
    for name, size in (("bytes, second-level cache", 1 << 16), ("bytes, memory", 1 << 26)):
        # Apart by no multiple of a page, whose loads would wait for the stores.
        source, target = np.ones(size // 4, np.float32), np.zeros(size // 4 + 528, np.float32)[528:]
        repeats = max(1, (1 << 26) // size)

        def copy(source=source, target=target, repeats=repeats) -> None:
            for _ in range(repeats):
                np.copyto(target, source)

        result[name] = 2.0 * size * repeats / seconds(copy) / 1e9
    return result


def measured(n_paths: int) -> float:
    """CPU nanoseconds per path-step-asset of W1."""
    import jax

    from qpo_sim.bench import workload
    from qpo_sim.compute.run import build_engine
    from qpo_sim.simulate import Plan

    model = workload.parameters(10)
    assets = workload.names(model)
    market, book = workload.market_of(model, assets), workload.book_of(model, assets)
    plan = Plan(365, monitoring="step", attribution=False, dates=(365,))
    engine = build_engine(market, book, plan, n_paths=n_paths)
    cost = seconds(lambda: jax.block_until_ready(engine.batch(book, 0)), 7)
    return 1e9 * cost / (engine.size * 365 * 10)


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--paths", type=int, default=16_384, help="paths of the timed run (default 16384)")
    options = parser.parse_args(arguments)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    peak = bandwidths()
    import qpo_sim

    qpo_sim.use_cores()
    jaxpr, moved = step_of_w1(1024)
    operations, cost = count(jaxpr, 1024), measured(options.paths)
    peak |= peaks()
    print("| kind | per path-step-asset | peak of one core, G/s | ns at the peak |\n|---|---:|---:|---:|")
    floor = 0.0
    for kind, number in sorted(operations.items(), key=lambda item: -item[1]):
        each = number / 10.0
        if kind not in peak:
            print(f"| {kind} | {each:.2f} | | |")
            continue
        floor += each / peak[kind]
        print(f"| {kind} | {each:.2f} | {peak[kind]:.1f} | {each / peak[kind]:.2f} |")
    traffic = moved / 10.0 / peak["bytes, second-level cache"]
    print(f"| bytes between units | {moved / 10.0:.0f} | {peak['bytes, second-level cache']:.1f} | {traffic:.2f} |")
    print(f"\nMemory copies at {peak['bytes, memory']:.1f} GB/s (read and write counted).")
    print(f"Arithmetic at the peaks {floor:.2f} ns, measured {cost:.2f} ns of CPU: {100 * floor / cost:.0f} %.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
