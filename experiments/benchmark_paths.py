r"""How fast qpo_sim makes paths, next to NumPy and numba on the same workload in one interleaved run.

The workloads are those of `qpo_sim.bench.workload`: W1 has 10 assets and 365 steps, W2 one asset with GARCH variance
and 365 steps, W3 100 assets and 100 steps.

A second table times the shipped leveraged book (bridge monitoring, attribution) through the whole streaming run.

Every implementation draws fresh paths in every repetition. Compile time and peak memory are measured in a process of
their own each. Baselines other than NumPy come from a folder with `baselines.py` (option --baselines), whose `IMPL`
maps names to functions (workload, model, n_paths, n_steps, seed) -> (profit, is_liquidated, max_drawdown).
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when numpy is imported. The products here are small: a second BLAS thread only spins while it waits, and on a
# busy machine multiplies the CPU time of the NumPy baselines by up to seven.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["VECLIB_MAXIMUM_THREADS"] = "1"

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = {"numpy": "NumPy (reference)", "numba": "numba (reference)", "numba_expert": "numba SIMD (reference)"}
OURS, NUMPY, BOOK = "qpo_sim", "NumPy", "book"
LEVELS = (0.95, 0.99)
# Pairs of estimates differ by more than this many standard errors once in 16 000.
MAX_DEVIATION = 4.0
# Assets, steps and paths of each workload.
WORKLOADS = {"W1": (10, 365, 16_384), "W2": (1, 365, 65_536), "W3": (100, 100, 4096)}

Implementation = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sizes:
    """How much is simulated; the book table is left out with `book_paths` = 0."""

    workload: str
    paths: int
    steps: int
    book_paths: int
    book_steps: int
    devices: int


# ----------------------------------------------------------------------------- implementations


def start_jax(devices: int) -> None:
    """One host device per core, which JAX takes only before it is imported; no cache, so that compiling is timed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    import qpo_sim

    qpo_sim.use_cores(devices)
    import jax

    jax.config.update("jax_platforms", "cpu")


def workload(n_assets: int = 10) -> dict[str, Any]:
    """Parameters by the names that the reference baselines read."""
    from qpo_sim.bench import workload

    return workload.parameters(n_assets)


def market_of(model: dict[str, Any], assets: tuple[str, ...]) -> Any:
    """The workload's market."""
    from qpo_sim.bench import workload

    return workload.market_of(model, assets)


def qpo_sim_paths(model: dict[str, Any], sizes: Sizes) -> tuple[Implementation, float]:
    """The compiled batch of qpo_sim and the seconds it took to compile."""
    import jax

    from qpo_sim.bench import workload
    from qpo_sim.compute.run import build_engine
    from qpo_sim.simulate import Plan

    assets = workload.names(model)
    make_market = workload.garch_market_of if sizes.workload == "W2" else workload.market_of
    market, book = make_market(model, assets), workload.book_of(model, assets)
    plan = Plan(sizes.steps, monitoring="step", attribution=False, dates=(sizes.steps,))
    engine = build_engine(market, book, plan, n_paths=sizes.paths, devices=sizes.devices)

    def batch(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = []
        for first in range(0, sizes.paths, engine.size):
            out = jax.block_until_ready(engine.batch(book, seed * sizes.paths + first))
            parts.append((out["equity"][-1], out["is_liquidated"][0], out["max_drawdown"]))
        equity, liquidated, drawdown = (
            np.concatenate([np.asarray(x) for x in part])[: sizes.paths] for part in zip(*parts, strict=True)
        )
        return equity - 1, liquidated, drawdown

    return batch, engine.compile_seconds


def implementation(name: str, model: dict[str, Any], sizes: Sizes, reference: Any) -> tuple[Implementation, float]:
    """An implementation ready to be timed, and the seconds that compiling it took."""
    if name == OURS:
        return qpo_sim_paths(model, sizes)
    if name == NUMPY:
        from qpo_sim.bench.workload import numpy_garch_paths, numpy_paths

        program = numpy_garch_paths if sizes.workload == "W2" else numpy_paths
        return lambda seed: program(model, sizes.paths, sizes.steps, seed), 0.0
    run = reference.IMPL[name]

    def paths(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return run(sizes.workload, model, sizes.paths, sizes.steps, seed)

    if name == "numpy":
        return paths, 0.0
    # The first call compiles; two steps of work beside it do not count.
    clock = time.perf_counter()
    run(sizes.workload, model, 256, 2, 0)
    return paths, time.perf_counter() - clock


def load_reference(folder: Path) -> tuple[Any, list[str], str]:
    """The module of reference baselines, the names usable here, and what is missing in words."""
    if not (folder / "baselines.py").is_file():
        return None, [], f"no baselines.py in {folder}: NumPy is the only baseline."
    # In place of this script's own folder, where numba would take a file for the package `coverage`.
    sys.path[0] = str(folder)
    names, missing = list(REFERENCE), ""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        names, missing = ["numpy"], f"numba cannot be imported ({error}): its baselines are left out."
    try:
        return importlib.import_module("baselines"), names, missing
    except ImportError as error:
        return None, [], f"{folder / 'baselines.py'} cannot be imported ({error}): NumPy is the only baseline."


# ----------------------------------------------------------------------------- measuring


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB (nan where the system does not tell)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: a process started by another inherits that one's peak.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(peak.split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def interleaved(
    functions: dict[str, Implementation], repetitions: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[Any]]]:
    """(wall, process CPU) seconds and results of each repetition; all implementations take turns, after one warm-up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    results: dict[str, list[Any]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            cpu, wall = time.process_time(), time.perf_counter()
            result = function(repetition)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repetition:
                times[name].append((wall, cpu))
            results[name].append(result)
    return times, results


def in_own_process(name: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """What `measure_alone` says in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", name, "--baselines", str(folder)]
    for option, value in vars(sizes).items():
        command += [f"--{option.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(name: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Compile seconds and peak memory of one implementation, or the timings of the book's run."""
    if name in (OURS, BOOK):
        start_jax(sizes.devices)
    if name == BOOK:
        return run_book(sizes)
    reference = load_reference(folder)[0] if name in REFERENCE else None
    function, compile_seconds = implementation(name, workload(WORKLOADS[sizes.workload][0]), sizes, reference)
    before = peak_mib()
    function(0)
    return {"compile": compile_seconds, "peak": peak_mib(), "grown": peak_mib() - before}


def run_book(sizes: Sizes) -> dict[str, float]:
    """Times the shipped leveraged book on the workload's market through the whole streaming run."""
    import yaml

    from qpo_sim.book import build_book
    from qpo_sim.compute.run import run
    from qpo_sim.config.compose import conf_folder
    from qpo_sim.risk import summary

    described = yaml.safe_load((conf_folder() / "book" / "leveraged_mixed.yaml").read_text())
    held = [described["spot"], *(p["positions"] for p in described["perpetuals"])]
    held += [side for loan in described["loans"] for side in (loan["collateral"], loan["debt"])]
    assets = tuple(sorted({asset for positions in held for asset in positions} - {"USD"}))
    market = market_of(workload(len(assets)), assets)
    before = peak_mib()
    cpu, wall = time.process_time(), time.perf_counter()
    book = build_book(assets, **described)
    done = run(market, book, n_paths=sizes.book_paths, n_steps=sizes.book_steps, devices=sizes.devices)
    measures = summary.measures(done)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    var = next(m for m in measures if m.measure == "value_at_risk" and m.level == 0.99)
    return {
        **done.timings, "wall": wall, "cpu": cpu, "assets": len(assets), "before": before, "peak": peak_mib(),
        "var": var.value, "var_error": var.std_error,
    }  # fmt: skip


# ----------------------------------------------------------------------------- statistics


def statistics_of(results: list[Any]) -> dict[str, tuple[float, float]]:
    """Value and standard error of each measure over all repetitions."""
    from qpo_sim.risk import moments, tail

    profit = np.concatenate([np.asarray(r[0], np.float64) for r in results])
    liquidated = np.concatenate([np.asarray(r[1]) for r in results])
    # A margin account cannot lose more than it holds; the reference baselines do not cap it.
    sample = tail.tail_sample(-np.maximum(profit, -1.0))
    rows = {f"VaR{100 * level:g}": tail.value_at_risk(sample, level=level) for level in LEVELS}
    rows["liquidated"] = moments.probability(liquidated.sum(), float(liquidated.size))
    return {name: (float(e.value), float(e.std_error)) for name, e in rows.items()}


def deviation(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Difference of two independent estimates in standard errors."""
    error = math.hypot(a[1], b[1])
    return (a[0] - b[0]) / error if error > 0.0 else 0.0 if a[0] == b[0] else math.inf


# ----------------------------------------------------------------------------- tables


def row(*cells: str) -> str:
    """A Markdown row."""
    return "| " + " | ".join(cells) + " |"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, first column left, the others right."""
    return "\n".join([row(*header), row("---", *["---:"] * (len(header) - 1)), *(row(*cells) for cells in rows)])


def label(name: str) -> str:
    """Name of an implementation in the tables."""
    return REFERENCE.get(name, name)


def speed_table(times: dict[str, list[tuple[float, float]]], alone: dict[str, dict[str, float]], work: float) -> str:
    """Cost per path-step-asset, throughput, compile time and memory by implementation."""
    ours = min(cpu for _, cpu in times[OURS]) / work
    rows = []
    for name, pairs in times.items():
        wall, cpu = (sorted(1e9 * seconds / work for seconds in column) for column in zip(*pairs, strict=True))
        rows.append(
            (
                label(name),
                f"{1e3 / wall[0]:.1f}",
                f"{statistics.median(cpu):.2f}",
                f"{cpu[0]:.2f}",
                f"{statistics.median(wall):.2f}",
                f"{wall[0]:.2f}",
                f"{1e-9 * cpu[0] / ours:.2f}",
                f"{alone[name]['compile']:.1f}",
                f"{alone[name]['peak']:.0f}",
                f"{alone[name]['grown']:.0f}",
            )
        )
    return table(
        (
            "implementation", "million path-steps x assets per s (best wall)", "CPU ns median", "CPU ns min",
            "wall ns median", "wall ns min", "CPU min / qpo_sim", "compile s", "peak MiB", "of it the paths",
        ),
        rows,
    )  # fmt: skip


def agreement_table(results: dict[str, list[Any]]) -> tuple[str, float]:
    """Statistics of each implementation with their deviation from qpo_sim, and the largest deviation."""
    found = {name: statistics_of(r) for name, r in results.items()}
    rows, largest = [], 0.0
    for name, measures in found.items():
        cells = []
        for measure, estimate in measures.items():
            z = deviation(estimate, found[OURS][measure])
            largest = max(largest, abs(z))
            cells.append(f"{estimate[0]:.4f} ± {estimate[1]:.4f}" + ("" if name == OURS else f" ({z:+.1f})"))
        rows.append((label(name), *cells))
    return table(("implementation", *found[OURS]), rows), largest


def book_table(book: dict[str, float], sizes: Sizes) -> str:
    """The book's run: time, throughput, memory."""
    work = sizes.book_paths * sizes.book_steps * book["assets"]
    return table(
        (
            "paths x steps x assets", "wall s", "of it compiling", "simulating", "reducing (overlapped)", "CPU s",
            "paths per s", "CPU ns per path-step-asset", "peak MiB", "before the run", "VaR99",
        ),
        [
            (
                f"{sizes.book_paths} x {sizes.book_steps} x {book['assets']:.0f}",
                f"{book['wall']:.1f}",
                f"{book['compile']:.1f}",
                f"{book['simulate']:.1f}",
                f"{book['reduce']:.1f}",
                f"{book['cpu']:.1f}",
                f"{sizes.book_paths / book['simulate']:.0f}",
                f"{1e9 * book['cpu'] / work:.1f}",
                f"{book['peak']:.0f}",
                f"{book['before']:.0f}",
                f"{book['var']:.5f} ± {book['var_error']:.5f}",
            )
        ],
    )  # fmt: skip


def load_text() -> str:
    """The machine's load over the last minute, where the system tells."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def n_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; `--quick` shrinks what was not given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--baselines", type=Path, default=ROOT.parent / "shared" / "bench" / "perf",
                        help="folder with baselines.py (default: ../shared/bench/perf beside the project)")  # fmt: skip
    parser.add_argument("--repetitions", type=int, help="timed repetitions of each implementation (default 5)")
    parser.add_argument("--workload", choices=WORKLOADS, default="W1",
                        help="W1: 10 assets (default), W2: one asset with GARCH variance, W3: 100 assets")  # fmt: skip
    parser.add_argument("--paths", type=int, help="paths per repetition (default 16384 for W1, 65536 W2, 4096 W3)")
    parser.add_argument("--steps", type=int, help="steps (default 365 for W1 and W2, 100 for W3)")
    parser.add_argument("--book-paths", type=int, help="paths of the leveraged book, 0 to leave it out (default 10^6)")
    parser.add_argument("--book-steps", type=int, help="steps of the leveraged book (default 30)")
    parser.add_argument("--devices", type=int, default=n_cores(), help="host devices (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes in one process: shows that it runs")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    _, steps, paths = WORKLOADS[options.workload]
    usual = {"repetitions": 5, "paths": paths, "steps": steps, "book_paths": 1_000_000, "book_steps": 30}
    tiny = {"repetitions": 2, "paths": 1024, "steps": 8, "book_paths": 2048, "book_steps": 3}
    for name, value in (tiny if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
        elif getattr(options, name) < (name != "book_paths"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.paths % 256:
        parser.error(f"--paths is {options.paths}; it must be a multiple of 256")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; 1 when the implementations disagree."""
    options = parse(arguments)
    sizes = Sizes(
        options.workload, options.paths, options.steps, options.book_paths, options.book_steps, options.devices
    )
    if options.alone:
        print(json.dumps(measure_alone(options.alone, sizes, options.baselines)))
        return 0
    load = load_text()
    start_jax(sizes.devices)
    model = workload(WORKLOADS[options.workload][0])
    reference, names, missing = load_reference(options.baselines)
    if missing:
        print(f"{missing}\n")
    order = [OURS, NUMPY, *names]
    ready = {name: implementation(name, model, sizes, reference) for name in order}
    times, results = interleaved({name: function for name, (function, _) in ready.items()}, options.repetitions)
    if options.quick:
        unknown = float("nan")
        alone = {name: {"compile": ready[name][1], "peak": unknown, "grown": unknown} for name in order}
    else:
        alone = {name: in_own_process(name, sizes, options.baselines) for name in order}

    work = float(sizes.paths * sizes.steps * model["A"])
    print(
        f"{sizes.workload}: {sizes.paths} paths x {sizes.steps} steps x {model['A']} assets, {options.repetitions} "
        f"interleaved repetitions, {sizes.devices} device(s), {n_cores()} core(s), load before the run {load}. "
        f"CPU time counts every thread; ns are per path-step-asset.\n"
    )
    print(speed_table(times, alone, work))
    text, largest = agreement_table(results)
    print("\nStatistics over all repetitions ± standard error (difference to qpo_sim in standard errors):\n")
    print(text)
    if sizes.book_paths:
        print("\nShipped leveraged book on the W1 market, bridge monitoring with attribution, through the whole run:\n")
        book = run_book(sizes) if options.quick else in_own_process(BOOK, sizes, options.baselines)
        print(book_table(book, sizes))
    if largest > MAX_DEVIATION:
        print(f"\nThe implementations disagree: {largest:.1f} standard errors.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
