r"""One call that measures qpo_sim on a GPU: floors, scan against fused kernel, streaming, gradients, CVaR, quantiles.

    python experiments/gpu/run.py [--budget 460] [--out gpu.json] [--smoke]

It needs the installed package and nothing else. Workload W1: 365 steps of 10 assets, three Markov regimes, Student-t
shocks, one cross-margined account tested at the step ends; W3: the same with 100 assets. Rates are in path-step-assets
per second. Every kernel is compared path by path with the scan before its time counts. A section that fails, or for
which no time is left, says so and the others go on. `--smoke` runs tiny sizes on a CPU, the kernel interpreted: it
shows that the script works, and its times mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Memory is taken as it is needed, so that its peak is the program's own.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from qpo_sim import random
from qpo_sim.book import Book, build_book
from qpo_sim.compute.fused import fused_paths
from qpo_sim.market import Market, prepare
from qpo_sim.numerics import weighted_quantile
from qpo_sim.simulate import Plan, simulate_prepared
from qpo_sim.venue import TieredMargin

# On paper, for 132 processors at 1.7 GHz (Hopper) and W1: about 954 instructions per path and step, the integer ones of
# the cipher being the limit; a scan that is perfectly fused moves its state of 16 words in and out each step.
PAPER = {"kernel_limit": 268e9, "instructions": 95.4, "scan_bytes": 12.8}
N_BINS = 65_536
Table = list[dict[str, Any]]


class Bench:
    """Times programs within a budget and keeps the rows of each table."""

    def __init__(self, budget: float, smoke: bool):
        """Starts the clock; `budget` in seconds."""
        self.start, self.budget, self.smoke = time.perf_counter(), budget, smoke
        self.tables: dict[str, Table] = {}

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.start)

    def row(self, table: str, **cells: Any) -> None:
        """Keeps and shows one row."""
        self.tables.setdefault(table, []).append(cells)
        print(f"{table}: " + ", ".join(f"{k} {_text(v)}" for k, v in cells.items()), flush=True)

    def section(self, name: str, function: Callable[[], None], *, needs: float = 20.0) -> None:
        """Runs a section unless less than `needs` seconds are left; a failure is a row."""
        if self.left < needs and not self.smoke:
            self.row("left out", section=name, reason=f"{self.left:.0f} s left")
            return
        try:
            function()
        except Exception as error:  # one section must not cost the others
            self.row("left out", section=name, reason=f"{type(error).__name__}: {str(error)[:300]}")

    def time(self, function: Callable, *arguments: Any, repetitions: int = 5) -> tuple[Any, dict[str, float]]:
        """Result of the compiled function, and its median time, compile time and temporary memory."""
        clock = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        compiled = time.perf_counter() - clock
        result = jax.block_until_ready(program(*arguments))
        seconds = []
        for _ in range(1 if self.smoke else repetitions):
            clock = time.perf_counter()
            result = jax.block_until_ready(program(*arguments))
            seconds.append(time.perf_counter() - clock)
        memory = program.memory_analysis()
        temporary = float("nan") if memory is None else memory.temp_size_in_bytes / 2**20
        return result, {"ms": 1e3 * statistics.median(seconds), "compile_s": compiled, "temporary_MiB": temporary}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def market_of(n_assets: int, seed: int = 7) -> Market:
    """The workload's market."""
    rng = np.random.default_rng(seed)
    per_year = 0.5 + 0.6 * rng.random(n_assets)
    volatility = np.outer([0.6, 1.0, 2.0], per_year / np.sqrt(365.0))
    cholesky = [np.linalg.cholesky((1.0 - r) * np.eye(n_assets) + r) for r in (0.35, 0.55, 0.85)]
    parts = (
        [0.0, 1.0, 0.0],
        [[0.985, 0.013, 0.002], [0.020, 0.970, 0.010], [0.010, 0.060, 0.930]],
        (np.array([[0.45], [0.05], [-1.2]]) - 0.5 * per_year**2) / 365.0,
        volatility,
        np.stack(cholesky),
        [6.3, 4.7, 3.4],
    )
    return Market(*(jnp.asarray(part, jnp.float32) for part in parts), assets=tuple(f"A{i}" for i in range(n_assets)))


def book_of(market: Market) -> Book:
    """One cross account at 1.5 times its margin."""
    weight = np.random.default_rng(8).random(market.n_assets) + 0.5
    positions = dict(zip(market.assets, (1.5 * weight / weight.sum()).tolist(), strict=True))
    venue = TieredMargin(tiers={"default": [[0.0, 0.10]]})
    return build_book(
        market.assets, perpetuals=[{"name": "account", "venue": venue, "margin": 1.0, "positions": positions}]
    )


def scan_of(market: Market, book: Book, plan: Plan, n_paths: int) -> Callable:
    """Function (first path, keys) -> outcome, by the scan."""
    prepared = jax.jit(prepare)(market)

    def paths(first: Any, keys: Any) -> Any:
        return simulate_prepared(market, prepared, book, keys, first + jnp.arange(n_paths, dtype=jnp.uint32), plan)

    return paths


def watched(outcome: Any) -> tuple[Any, Any, Any]:
    """What W1 keeps of a path: final equity, largest drawdown, whether liquidated."""
    return outcome.equity[-1], outcome.max_drawdown, outcome.is_liquidated[0]


def peak_mib() -> float:
    """Largest device memory in use so far, nan where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**20


# ----------------------------------------------------------------------------- sections


def device(bench: Bench) -> None:
    """What it runs on."""
    one = jax.devices()[0]
    cells: dict[str, Any] = {"jax": jax.__version__, "backend": jax.default_backend(), "device": one.device_kind}
    for name in ("compute_capability", "core_count"):
        cells[name] = getattr(one, name, "unknown")
    cells["memory_MiB"] = (one.memory_stats() or {}).get("bytes_limit", 0) // 2**20
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        cells["driver, clock"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        cells["driver, clock"] = "unknown"
    bench.row("device", **cells)


def floors(bench: Bench) -> dict[str, float]:
    """Rates of memory and arithmetic that nothing can beat: bytes and operations per second."""
    n = 1 << (14 if bench.smoke else 28)
    x = jnp.ones(n, jnp.float32)
    _, copied = bench.time(lambda x: x * np.float32(1.0001), x)
    bytes_per_s = 8.0 * n / copied["ms"] * 1e3

    def chain(x):
        def step(_, v):
            for _ in range(32):
                v = v * np.float32(0.999) + np.float32(0.1)
            return v

        return lax.fori_loop(0, 256, step, x)

    m = n >> 6
    _, computed = bench.time(chain, x[:m])
    flop_per_s = 2.0 * 32 * 256 * m / computed["ms"] * 1e3
    bench.row("floors", **{"copy GB/s": bytes_per_s / 1e9, "multiply-add TFLOP/s": flop_per_s / 1e12})
    return {"bytes": bytes_per_s, "flop": flop_per_s}


def w1(bench: Bench, floor: dict[str, float]) -> tuple[str, int]:
    """The scan and the kernel with each block size; gives the fastest correct one (name, block)."""
    n, steps = (256, 8) if bench.smoke else (1 << 20, 365)
    market = market_of(10)
    book = book_of(market)
    plan = Plan(steps, monitoring="step", attribution=False, dates=(steps,))
    first, keys = np.uint32(0), random.stream_keys(1)
    work = n * steps * market.n_assets

    def row(name: str, measured: dict[str, float], written: float, **more: Any) -> float:
        rate = work / measured["ms"] * 1e3
        cells = {
            "program": name, "paths": n, "ms": measured["ms"], "Gpsa/s": rate / 1e9, "compile_s": measured["compile_s"],
            "temporary_MiB": measured["temporary_MiB"], "B/psa (paper)": written,
            "ms to move them": 1e3 * work * written / floor["bytes"],
            "instructions/psa (paper)": PAPER["instructions"], "share of paper limit": rate / PAPER["kernel_limit"],
        }  # fmt: skip
        bench.row("W1", **cells, **more)
        return rate

    scan = scan_of(market, book, plan, n)
    want, measured = bench.time(lambda f, k: watched(scan(f, k)), first, keys, repetitions=3)
    row("scan", measured, PAPER["scan_bytes"])
    best: tuple[float, tuple[str, int]] = (0.0, ("scan", 0))
    interpret = jax.default_backend() != "gpu"
    for block in (128,) if bench.smoke else (128, 256, 384, 512):
        if bench.left < 60.0 and not bench.smoke:
            break
        try:
            paths = fused_paths(market, jax.jit(prepare)(market), book, plan, n, block=block, interpret=interpret)
            got, measured = bench.time(lambda f, k, paths=paths: watched(paths(f, k)), first, keys)
        except Exception as error:  # another block may work
            bench.row("left out", section=f"W1 fused {block}", reason=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        equity, drawdown, liquidated = (np.asarray(x, np.float64) for x in got)
        flips = liquidated != np.asarray(want[2])
        off = [
            np.abs(x - np.asarray(y, np.float64))[~flips].max() for x, y in zip((equity, drawdown), want, strict=False)
        ]
        # Equity of a path is of order one; a liquidation may turn out otherwise on a tie only.
        agrees = max(off) < 1e-3 and flips.mean() < 1e-4
        # Per step the equity and the hit probability are stored once.
        rate = row(
            f"fused, block {block}", measured, 8.0 / market.n_assets,
            **{"largest difference": float(max(off)), "liquidations that differ": int(flips.sum())},
            agrees=bool(agrees),
        )  # fmt: skip
        if agrees and rate > best[0]:
            best = rate, ("fused", block)
    return best[1]


def streaming(bench: Bench, fastest: tuple[str, int]) -> None:
    """W1 at growing numbers of paths in one program: losses go into a histogram, memory must not grow."""
    size, steps = (256, 8) if bench.smoke else (1 << 20, 365)
    market = market_of(10)
    book = book_of(market)
    plan = Plan(steps, monitoring="step", attribution=False, dates=(steps,))
    name, block = fastest
    if name == "fused":
        interpret = jax.default_backend() != "gpu"
        paths = fused_paths(market, jax.jit(prepare)(market), book, plan, size, block=block, interpret=interpret)
    else:
        paths = scan_of(market, book, plan, size)

    def stream(n_batches, keys):
        def batch(k, total):
            equity, drawdown, liquidated = watched(paths(k.astype(jnp.uint32) * np.uint32(size), keys))
            return total[0] + histogram(1.0 - equity), total[1] + jnp.sum(liquidated), total[2] + jnp.mean(drawdown)

        start = (jnp.zeros(N_BINS, jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(()))
        return lax.fori_loop(np.int32(0), n_batches, batch, start)

    # One program for all sizes.
    program = jax.jit(stream).lower(np.int32(1), random.stream_keys(1)).compile()
    jax.block_until_ready(program(np.int32(1), random.stream_keys(1)))
    for n in (512,) if bench.smoke else (10**6, 10**7, 10**8):
        n_batches = -(-n // size)
        clock = time.perf_counter()
        counts, liquidated, _ = jax.block_until_ready(program(np.int32(n_batches), random.stream_keys(1)))
        seconds = time.perf_counter() - clock
        done = n_batches * size
        assert int(np.asarray(counts, np.int64).sum()) == done
        bench.row(
            "streaming W1", program=name, paths=done, seconds=seconds,
            **{"Gpsa/s": done * steps * market.n_assets / seconds / 1e9, "liquidated": int(liquidated) / done},
            peak_MiB=peak_mib(),
        )  # fmt: skip


def histogram(loss: Any, low: float = -15.0, high: float = 1.0) -> Any:
    """Counts of losses in equal bins; what lies outside goes into the first or last."""
    place = jnp.clip(((loss - low) * (N_BINS / (high - low))).astype(jnp.int32), 0, N_BINS - 1)
    return jnp.zeros(N_BINS, jnp.int32).at[place].add(1)


def w3(bench: Bench) -> None:
    """Many assets: a matrix product per step, by the scan."""
    n_assets, n, steps = (40, 256, 4) if bench.smoke else (100, 1 << 17, 365)
    market = market_of(n_assets)
    plan = Plan(steps, monitoring="step", attribution=False, dates=(steps,))
    paths = scan_of(market, book_of(market), plan, n)
    _, measured = bench.time(lambda f, k: watched(paths(f, k)), np.uint32(0), random.stream_keys(1), repetitions=2)
    bench.row("W3", assets=n_assets, paths=n, **measured, **{"Gpsa/s": n * steps * n_assets / measured["ms"] / 1e6})


def gradients(bench: Bench) -> None:
    """CVaR of the survival branch and its gradient in the positions."""
    n, steps = (256, 6) if bench.smoke else (1 << 15, 90)
    market = market_of(10)
    book = book_of(market)
    plan = Plan(steps, drawn=False, attribution=False)
    prepared = jax.jit(prepare)(market)
    level = 0.99

    def cvar(quantity, keys):
        account = book.perpetuals[0]._replace(quantity=quantity)
        varied = Book(**{**vars(book), "perpetuals": (account,)})
        path = jnp.arange(n, dtype=jnp.uint32)
        end = simulate_prepared(market, prepared, varied, keys, path, plan).conditional
        value = end.outright + jnp.sum((1.0 - end.hit_probability) * end.survived + end.liquidated, axis=0)
        loss = 1.0 - value
        weight = jnp.full(n, 1.0 / n, loss.dtype)
        threshold = weighted_quantile(loss, weight, jnp.asarray(1.0 - level, loss.dtype))
        return threshold + jnp.mean(jnp.maximum(loss - threshold, 0.0)) / (1.0 - level)

    quantity, keys = book.perpetuals[0].quantity, random.stream_keys(1)
    _, forward = bench.time(cvar, quantity, keys, repetitions=3)
    slope, backward = bench.time(jax.grad(cvar), quantity, keys, repetitions=3)
    assert np.all(np.isfinite(slope))
    bench.row(
        "gradients", paths=n, steps=steps, forward_ms=forward["ms"], gradient_ms=backward["ms"],
        ratio=backward["ms"] / forward["ms"], temporary_MiB=backward["temporary_MiB"], compile_s=backward["compile_s"],
    )  # fmt: skip


def optimisation(bench: Bench) -> None:
    """CVaR of a portfolio on a matrix of returns, minimised over weights and threshold by Adam."""
    n, m, iterations = (400, 20, 200) if bench.smoke else (10_000, 392, 2000)
    rng = np.random.default_rng(2)
    factor = rng.standard_normal((n, 8)) @ rng.standard_normal((8, m))
    returns = jnp.asarray(0.01 * factor + 0.02 * rng.standard_t(4.0, (n, m)) + 0.001 * rng.random(m), jnp.float32)
    level = 0.95
    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, iterations))

    def objective(parameters, returns):
        loss = -returns @ jax.nn.softmax(parameters["logits"])
        threshold = parameters["threshold"]
        return threshold + jnp.mean(jnp.maximum(loss - threshold, 0.0)) / (1.0 - level)

    def solve(parameters, returns):
        def step(carry, _):
            parameters, state = carry
            value, slope = jax.value_and_grad(objective)(parameters, returns)
            updates, state = optimiser.update(slope, state, parameters)
            return (optax.apply_updates(parameters, updates), state), value

        (parameters, _), values = lax.scan(step, (parameters, optimiser.init(parameters)), None, length=iterations)
        return objective(parameters, returns), values[0]

    equal = jnp.quantile(-jnp.mean(returns, axis=1), level)
    start = {"logits": jnp.zeros(m, jnp.float32), "threshold": equal}
    (last, initial), measured = bench.time(solve, start, returns, repetitions=3)
    moved = 2.0 * returns.size * 4 * iterations
    bench.row(
        "CVaR optimisation", scenarios=n, assets=m, iterations=iterations, **measured,
        **{"GB/s": moved / measured["ms"] / 1e6, "CVaR before": float(initial), "after": float(last)},
    )  # fmt: skip


def quantiles(bench: Bench) -> None:
    """Quantiles of many losses on the device: bisection on sums, a histogram, a sort."""
    n = 10**4 if bench.smoke else 10**8
    level = 0.99
    loss = jax.jit(lambda: -jnp.expm1(0.3 * jax.random.normal(jax.random.key(0), (n,), jnp.float32)))()
    weight = jnp.ones((), jnp.float32)

    def by_bisection(loss):
        return weighted_quantile(loss, weight, jnp.asarray((1.0 - level) * n, jnp.float32))

    def by_histogram(loss):
        above = jnp.cumsum(histogram(loss)[::-1])[::-1]
        place = jnp.sum(above > np.int32(round((1.0 - level) * n)))
        return -15.0 + 16.0 * place.astype(jnp.float32) / N_BINS

    def by_sort(loss):
        return jnp.sort(loss)[int(level * n)]

    for name, function in {"bisection": by_bisection, "histogram": by_histogram, "sort": by_sort}.items():
        if bench.left < 15.0 and not bench.smoke:
            break
        value, measured = bench.time(function, loss, repetitions=3)
        bench.row("quantiles", method=name, losses=n, **measured, value=float(value))


# ----------------------------------------------------------------------------- output


def markdown(tables: dict[str, Table]) -> str:
    """All tables in Markdown."""
    parts = []
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_text(row.get(column, '')) for column in columns)} |" for row in rows]
        parts.append(f"### {name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Runs every section and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget", type=float, default=460.0, help="seconds after which no section starts (default 460)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="results as JSON (default gpu.json)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    options = parser.parse_args()
    if jax.default_backend() != "gpu" and not options.smoke:
        raise SystemExit("There is no GPU here; --smoke shows on a CPU that the script works.")
    bench = Bench(options.budget, options.smoke)
    floor: dict[str, float] = {"bytes": float("nan"), "flop": float("nan")}
    fastest = [("scan", 0)]
    bench.section("device", lambda: device(bench))
    bench.section("floors", lambda: floor.update(floors(bench)))
    bench.section("W1", lambda: fastest.append(w1(bench, floor)))
    bench.section("streaming", lambda: streaming(bench, fastest[-1]), needs=60.0)
    bench.section("gradients", lambda: gradients(bench), needs=60.0)
    bench.section("CVaR optimisation", lambda: optimisation(bench), needs=40.0)
    bench.section("quantiles", lambda: quantiles(bench), needs=30.0)
    bench.section("W3", lambda: w3(bench), needs=60.0)
    print("\n" + markdown(bench.tables))
    print(
        "\nGpsa/s: 10^9 path-step-assets per second; B/psa: bytes through device memory per path-step-asset,"
        " for the scan when it is perfectly fused, for the kernel what it stores."
    )
    options.out.write_text(json.dumps({"smoke": options.smoke, "tables": bench.tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
