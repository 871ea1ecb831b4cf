"""How time and memory grow with assets, steps and paths: tables with the exponent that fits each.

Each row is a run of the kernel alone (workload W1 of `qpo_sim.bench.workload` with another size), timed in process CPU
seconds, the smallest of a few. The memory table runs each size in a process of its own through the whole streaming run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ASSETS, STEPS, PATHS = (1, 3, 10, 32, 100), (50, 100, 200, 400), (16_384, 65_536, 262_144)
MEMORY_PATHS = (10**5, 10**6, 10**7, 10**8)


def cost(n_assets: int, n_steps: int, n_paths: int) -> float:
    """CPU seconds of the simulation of `n_paths` paths."""
    import jax

    from qpo_sim.bench import workload
    from qpo_sim.compute.run import build_engine
    from qpo_sim.simulate import Plan

    model = workload.parameters(n_assets)
    assets = workload.names(model)
    market, book = workload.market_of(model, assets), workload.book_of(model, assets)
    plan = Plan(n_steps, monitoring="step", attribution=False, dates=(n_steps,))
    engine = build_engine(market, book, plan, n_paths=n_paths)
    best = np.inf
    for repetition in range(4):
        start = time.process_time()
        for first in range(0, n_paths, engine.size):
            jax.block_until_ready(engine.batch(book, first))
        if repetition:
            best = min(best, time.process_time() - start)
    return best * n_paths / (-(-n_paths // engine.size) * engine.size)


def peak_memory(n_paths: int, n_steps: int) -> dict[str, float]:
    """Peak resident MiB and seconds of a streamed run of W1."""
    from qpo_sim.bench import workload
    from qpo_sim.compute.run import run

    model = workload.parameters(10)
    assets = workload.names(model)
    start = time.perf_counter()
    run(workload.market_of(model, assets), workload.book_of(model, assets), n_paths=n_paths, n_steps=n_steps)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return {"peak": float(peak.split()[1]) / 2**10, "seconds": time.perf_counter() - start}


def table(name: str, sizes: tuple[int, ...], costs: list[float], items: list[float]) -> None:
    """Prints a Markdown table and the slope of log cost on log size."""
    slope = np.polyfit(np.log(sizes[-3:]), np.log(costs[-3:]), 1)[0]
    print(f"\n| {name} | CPU s | ns per path-step-asset |\n|---:|---:|---:|")
    for size, seconds, item in zip(sizes, costs, items, strict=True):
        print(f"| {size} | {seconds:.3f} | {1e9 * seconds / item:.2f} |")
    print(f"\nExponent of the last three: {slope:.2f}")


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory-steps", type=int, default=5, help="steps of the memory runs (default 5)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import qpo_sim

    qpo_sim.use_cores()
    if options.alone:
        print(json.dumps(peak_memory(options.alone, options.memory_steps)))
        return 0
    assets, steps, paths, memory = ASSETS, STEPS, PATHS, MEMORY_PATHS
    if options.quick:
        assets, steps, paths, memory = (1, 2, 4), (2, 4, 8), (512, 1024, 2048), (1000, 4000)
    n, t = (256, 4) if options.quick else (16_384, 100)
    table("assets", assets, [cost(a, t, n) for a in assets], [float(a * t * n) for a in assets])
    table("steps", steps, [cost(10, s, n) for s in steps], [10.0 * s * n for s in steps])
    table("paths", paths, [cost(10, t, p) for p in paths], [10.0 * t * p for p in paths])
    print(f"\n| paths (x {options.memory_steps} steps x 10 assets) | peak MiB | wall s |\n|---:|---:|---:|")
    for n_paths in memory:
        command = [sys.executable, str(Path(__file__).resolve()), "--alone", str(n_paths)]
        command += ["--memory-steps", str(options.memory_steps)]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"| {n_paths} | {done['peak']:.0f} | {done['seconds']:.1f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
