"""What reducing outcomes costs on the host, part by part and next to sorting the losses; and how far the sketch is off.

The outcomes are those of the shipped leveraged book on the market of `benchmark_paths.py`: 30 steps with every date
kept, attribution, losses at 1, 7 and 30 days. All rows of a table take turns in one process. A cost is the CPU time of
the process over all threads, the smallest of the rounds.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

# First, as it sets how many threads BLAS gets, which is read when numpy is imported.
from benchmark_paths import load_text, market_of, n_cores, start_jax, table, workload  # isort: skip

import numpy as np

N_STEPS, HORIZONS, LEVELS = 30, (1, 7, 30), (0.95, 0.99, 0.999)

LAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "Student-t, 3 degrees of freedom": lambda rng, n: 0.1 * rng.standard_t(3, n),
    "normal": lambda rng, n: 0.05 * rng.standard_normal(n),
    "lognormal": lambda rng, n: np.expm1(0.5 * rng.standard_normal(n)),
    "normal with an atom of 3 %": lambda rng, n: np.where(rng.random(n) < 0.03, 0.35, 0.1 * rng.standard_normal(n)),
}


def book_batches(n_paths: int) -> tuple[list[dict[str, Any]], tuple[int, ...], int]:
    """Outcomes of the leveraged book in batches of numpy arrays, the rows of the horizons, and paths per batch."""
    import jax
    import yaml

    from qpo_sim.book import build_book
    from qpo_sim.compute.run import build_engine
    from qpo_sim.config.compose import conf_folder
    from qpo_sim.simulate import Plan

    described = yaml.safe_load((conf_folder() / "book" / "leveraged_mixed.yaml").read_text())
    held = [described["spot"], *(p["positions"] for p in described["perpetuals"])]
    held += [side for loan in described["loans"] for side in (loan["collateral"], loan["debt"])]
    assets = tuple(sorted({asset for positions in held for asset in positions} - {"USD"}))
    book = build_book(assets, **described)
    plan = Plan(N_STEPS, dates=tuple(range(1, N_STEPS + 1)))
    engine = build_engine(market_of(workload(len(assets)), assets), book, plan, n_paths=n_paths)
    batches = []
    for first in range(0, n_paths, engine.size):
        arrays = engine.batch(book, first)
        batches.append(jax.tree.map(lambda x, size=n_paths - first: np.asarray(x)[..., :size], arrays))
    return batches, tuple(plan.dates.index(h) for h in HORIZONS), engine.size


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Smallest CPU seconds of each function; all take turns, after one warm-up."""
    seconds = dict.fromkeys(functions, float("inf"))
    for k in range(rounds + 1):
        for name, function in functions.items():
            clock = time.process_time()
            function()
            if k:
                seconds[name] = min(seconds[name], time.process_time() - clock)
    return seconds


def worst_paths(batches: list[dict[str, Any]], losses: list[np.ndarray], keep: int) -> Any:
    """Worst paths per horizon, streamed over the batches."""
    from qpo_sim.compute import partial as partials

    tails, first = (), 0
    for batch, loss in zip(batches, losses, strict=True):
        bars = [tail.loss[-1] if tail.loss.size == keep else -np.inf for tail in tails]
        tails = partials._merge_tails(tails, partials._tails(batch, loss, first, keep, bars), keep)
        first += loss.shape[-1]
    return tails


def reduction(batches: list[dict[str, Any]], rows: tuple[int, ...], size: int, keep: int) -> dict[str, Callable]:
    """The reduction of all batches, and each of its parts."""
    from qpo_sim.compute import histogram
    from qpo_sim.compute import partial as partials

    losses = [np.float32(1.0) - batch["equity"][list(rows)] for batch in batches]

    def whole() -> None:
        seen = partials.zero(keep)
        for k, batch in enumerate(batches):
            seen = partials.add(seen, [batch], k * size, horizons=rows)

    def of_equity() -> None:
        into = histogram.zero(len(batches[0]["equity"]), partials.COARSE_BITS, with_sums=False)
        for batch in batches:
            histogram.count(into, (row - np.float32(1.0) for row in batch["equity"]))

    def of_losses() -> None:
        into = histogram.zero(len(rows) + 1, partials.FINE_BITS, with_sums=True)
        for batch, loss in zip(batches, losses, strict=True):
            histogram.count(into, (*loss, batch["max_drawdown"]))

    def sums() -> None:
        for batch, loss in zip(batches, losses, strict=True):
            partials._sums(batch, loss)

    return {
        "whole reduction": whole,
        f"histograms of the equity, {len(batches[0]['equity'])} dates": of_equity,
        f"histograms with sums, {len(rows)} horizons and drawdown": of_losses,
        "exact sums": sums,
        f"worst {keep} paths, {len(rows)} horizons": lambda: worst_paths(batches, losses, keep),
    }


def ways_to_a_tail(loss: np.ndarray, size: int, keep: int) -> dict[str, Callable]:
    """Sorting the losses of one horizon, and what streams instead."""
    import jax
    import jax.numpy as jnp

    from qpo_sim.compute import histogram
    from qpo_sim.compute import partial as partials

    on_device, sort = jnp.asarray(loss), jax.jit(jnp.sort)
    pieces = [loss[first : first + size] for first in range(0, loss.size, size)]
    bare = [
        {
            "is_finite": np.ones(piece.size, bool), "max_drawdown": piece, "components": None, "accounts": None,
            "is_liquidated": np.zeros((0, piece.size), bool),
        }
        for piece in pieces
    ]  # fmt: skip

    def binned() -> None:
        into = histogram.zero(1, partials.FINE_BITS, with_sums=True)
        for piece in pieces:
            histogram.count(into, [piece])

    return {
        "np.sort": lambda: np.sort(loss),
        f"np.partition, worst {keep}": lambda: np.partition(loss, loss.size - keep),
        "jnp.sort": lambda: jax.block_until_ready(sort(on_device)),
        "histogram with sums": binned,
        f"worst {keep} paths": lambda: worst_paths(bare, [piece[None] for piece in pieces], keep),
    }


def cost_table(functions: dict[str, Callable], rounds: int, n_paths: int) -> str:
    """CPU time per path, and as a share of the first row."""
    seconds = interleaved(functions, rounds)
    first = next(iter(seconds.values()))
    rows = [(name, f"{1e9 * cost / n_paths:.1f}", f"{cost / first:.2f}") for name, cost in seconds.items()]
    return table(("what", "CPU ns per path", "over the first row"), rows)


def error_table(losses: dict[str, np.ndarray]) -> str:
    """Relative errors of VaR and CVaR from the histogram, against sorting the same losses."""
    from qpo_sim.compute import histogram
    from qpo_sim.compute import partial as partials
    from qpo_sim.risk import summary, tail

    rows = []
    for name, loss in losses.items():
        exact = tail.tail_sample(loss.astype(np.float64))
        into = histogram.zero(1, partials.FINE_BITS, with_sums=True)
        histogram.count(into, [loss])
        sketch = summary._from_histogram(into, 0, float(loss.size))
        cells = []
        for level in LEVELS:
            for measure in (tail.value_at_risk, tail.conditional_value_at_risk):
                true = measure(exact, level=level).value
                cells.append(f"{measure(sketch, level=level).value / true - 1.0:+.1e}")
        rows.append((name, *cells))
    header = [f"{name}{100.0 * level:g}" for level in LEVELS for name in ("VaR", "CVaR")]
    return table(("losses", *header), rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; `--quick` shrinks what was not given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--paths", type=int, help="paths, all held in memory at once (default 524288)")
    parser.add_argument("--repetitions", type=int, help="timed rounds (default 5)")
    parser.add_argument("--devices", type=int, default=n_cores(), help="host devices (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    options = parser.parse_args(arguments)
    for name, usual, tiny in (("paths", 524_288, 16_384), ("repetitions", 5, 1)):
        if getattr(options, name) is None:
            setattr(options, name, tiny if options.quick else usual)
        elif getattr(options, name) < (1000 if name == "paths" else 1):
            parser.error(f"--{name} is {getattr(options, name)}; that is too few")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    options = parse(arguments)
    load = load_text()
    start_jax(options.devices)
    from qpo_sim.compute import partial as partials

    batches, rows, size = book_batches(options.paths)
    loss = np.concatenate([np.float32(1.0) - batch["equity"][-1] for batch in batches])
    keep = partials.tail_size(options.paths, min(LEVELS))
    print(
        f"Leveraged book: {options.paths} paths in batches of {size}, {options.repetitions} interleaved rounds, "
        f"{n_cores()} core(s), load before the run {load}.\n"
    )
    print(cost_table(reduction(batches, rows, size, keep), options.repetitions, options.paths))
    print("\nOne horizon, single precision:\n")
    print(cost_table(ways_to_a_tail(loss, size, keep), options.repetitions, options.paths))
    print("\nRelative error of the histogram against sorting the same losses:\n")
    rng = np.random.default_rng(0)
    samples = {name: law(rng, options.paths).astype(np.float32) for name, law in LAWS.items()}
    print(error_table({"leveraged book, 30 days": loss, **samples}))


if __name__ == "__main__":
    main()
