"""How long a crowd of loans takes and what memory it needs, by the number of loans.

Four collaterals with the volatilities of a crisis, loans of lognormal size and Dirichlet mixtures of them, debt in USD,
health factors 1.02 plus an exponential of mean 0.6, the shipped Aave rule. Each size runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

LOANS, PATHS, STEPS = (1000, 10_000, 100_000), 10_000, 30
ASSETS = ("ETH", "BTC", "LINK", "AVAX")


def crowd_of(n_loans: int) -> Any:
    """Random loans."""
    from qpo_sim.account.lending_crowd import loan_crowd
    from qpo_sim.venue import load

    rng, rule = np.random.default_rng(0), load("aave_v3")
    size = np.exp(rng.normal(9.0, 1.5, n_loans))
    held = size[:, None] * rng.dirichlet(np.full(len(ASSETS), 0.5), n_loans)
    threshold = np.array([rule.value("liquidation_threshold", asset) for asset in ASSETS])
    debt = held @ threshold / (1.02 + rng.exponential(0.6, n_loans))
    return loan_crowd(rule, dict(zip(ASSETS, held.T, strict=True)), {"USD": debt}, assets=ASSETS)


def measure(n_loans: int, n_paths: int, n_steps: int) -> dict[str, float]:
    """Seconds, CPU seconds, seconds of the first call (compiling), peak resident MiB, and what came out."""
    from qpo_sim.compute.loan_crowd import simulate_crowd
    from qpo_sim.market import gbm
    from qpo_sim.simulate import Plan

    correlation = np.full((len(ASSETS), len(ASSETS)), 0.6) + 0.4 * np.eye(len(ASSETS))
    market = gbm(ASSETS, [1.2, 1.0, 1.5, 1.6], correlation)
    crowd, plan = crowd_of(n_loans), Plan(n_steps, monitoring="step")
    start = time.perf_counter()
    # As few paths as compile the program of the full run.
    simulate_crowd(market, crowd, plan, min(n_paths, 512), seed=1)
    first = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    result = simulate_crowd(market, crowd, plan, n_paths)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return {
        "seconds": seconds,
        "cpu": cpu,
        "first": first,
        "peak": float(peak.split()[1]) / 2**10,
        "liquidated": float(result.probability.value.mean()),
        "repaid": float(result.repaid.mean()),
        "loss": float(result.lost.mean()),
        "quantile": float(np.quantile(result.lost, 0.99)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loans", type=int, nargs="+", default=LOANS, help="numbers of loans")
    parser.add_argument("--paths", type=int, default=PATHS, help=f"paths (default {PATHS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"daily steps (default {STEPS})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.loans, options.paths, options.steps = (100, 300), 512, 3
    import qpo_sim

    qpo_sim.use_cores()
    if options.alone:
        print(json.dumps(measure(options.alone, options.paths, options.steps)))
        return 0
    print(f"{options.paths} paths, {options.steps} steps\n")
    print(
        "| loans | s | CPU s | CPU ns per loan-path-step | first call s | peak MiB | liquidated | repaid USD | "
        "loss USD | its 99 % quantile |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = []
    for n_loans in options.loans:
        command = [sys.executable, __file__, "--alone", str(n_loans)]
        command += ["--paths", str(options.paths), "--steps", str(options.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        each = 1e9 * row["cpu"] / (n_loans * options.paths * options.steps)
        print(
            f"| {n_loans} | {row['seconds']:.1f} | {row['cpu']:.1f} | {each:.2f} | {row['first']:.1f} | "
            f"{row['peak']:.0f} | {row['liquidated']:.4f} | {row['repaid']:.4g} | {row['loss']:.4g} | "
            f"{row['quantile']:.4g} |",
            flush=True,
        )
    if len(rows) > 1:
        slope = np.polyfit(np.log(options.loans), np.log([row["cpu"] for row in rows]), 1)[0]
        print(f"\nExponent of CPU time in the number of loans: {slope:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
