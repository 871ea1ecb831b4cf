"""How fast each market preset simulates, next to the plain diffusion in the same run.

The market alone, without a book: 10 assets of the embedded data, every preset of `conf/market/`. CPU time counts every
thread; each figure is the minimum of interleaved repetitions, the ratio that of the figures. Compile times are of a
cold start; they do not come from the persistent cache.
"""

import argparse
import time
from typing import Any

from benchmark_paths import interleaved, n_cores, start_jax, table


def presets_of(names: list[str] | None) -> list[str]:
    """The presets asked for, all when none are; the diffusion always first."""
    from qpo_sim.config import conf_folder

    files = (conf_folder() / "market").glob("*.yaml")
    found = sorted(path.stem for path in files if path.stem not in ("composed", "history"))
    chosen = found if names is None else names
    return ["gbm", *(name for name in chosen if name != "gbm")]


def market_of(name: str) -> Any:
    """Market of a preset, fitted or scaled to the embedded data."""
    from qpo_sim import data, jobs
    from qpo_sim.config import load

    config = load([f"market={name}"])
    prices = data.load_prices(config.data.path, assets=config.data.assets, exclude=config.data.exclude)
    prices = prices.iloc[:, :10]
    return jobs.build_market(config, prices, data.log_returns(prices))[1]


def program_of(market: Any, n_paths: int, n_steps: int) -> tuple[Any, float]:
    """A run of the compiled market, and the seconds it took to compile."""
    import jax
    import jax.numpy as jnp

    from qpo_sim import random
    from qpo_sim.compute.run import device_mesh
    from qpo_sim.market import line, model
    from qpo_sim.simulate import Plan, context_of, run_line

    plan = Plan(n_steps, dates=(n_steps,))
    prepared = model.prepare_once(market)
    keys = random.stream_keys(0)
    mesh = device_mesh(None)
    path = jax.device_put(jnp.arange(n_paths, dtype=jnp.uint32), jax.NamedSharding(mesh, jax.P("paths")))

    def run(prepared: Any, keys: Any, path: Any) -> Any:
        context = context_of(market, prepared, None, keys, path, plan)
        return run_line(line.stages(market), context)[-1]

    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P(), jax.P(), jax.P("paths")), out_specs=rows_spec(market), check_vma=False
    )
    clock = time.perf_counter()
    program = jax.jit(spread).lower(prepared, keys, path).compile()
    seconds = time.perf_counter() - clock
    return lambda repetition: jax.block_until_ready(program(prepared, keys, path)), seconds


def rows_spec(market: Any) -> Any:
    """How the log-prices lie on the devices: rows by asset when they are few."""
    import jax

    from qpo_sim.numerics import MAX_UNROLLED_ASSETS

    few = market.n_assets <= MAX_UNROLLED_ASSETS
    return (jax.P("paths"),) * market.n_assets if few else jax.P(None, "paths")


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="How fast each market preset simulates.")
    parser.add_argument("--markets", nargs="+", help="presets (default: all)")
    parser.add_argument("--paths", type=int, default=8192, help="paths (default 8192)")
    parser.add_argument("--steps", type=int, default=30, help="steps (default 30)")
    parser.add_argument("--repetitions", type=int, default=7, help="interleaved repetitions (default 7)")
    parser.add_argument("--devices", type=int, default=n_cores(), help="host devices (default: one per core)")
    options = parser.parse_args(arguments)
    start_jax(options.devices)
    markets = {name: market_of(name) for name in presets_of(options.markets)}
    programs = {name: program_of(market, options.paths, options.steps) for name, market in markets.items()}
    times, _ = interleaved({name: run for name, (run, _) in programs.items()}, options.repetitions)
    best = {name: min(cpu for _, cpu in pairs) for name, pairs in times.items()}
    rows = []
    for name, (_, seconds) in programs.items():
        items = options.paths * options.steps * markets[name].n_assets
        speed, cost = items / best[name], best[name] / best["gbm"]
        rows.append((name, f"{1e9 / speed:.1f}", f"{speed / 1e6:.0f}", f"{cost:.2f}", f"{seconds:.1f}"))
    header = ("market", "CPU ns per path-step-asset", "million a CPU second", "CPU / gbm", "compile s")
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
