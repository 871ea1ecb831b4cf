"""What gradients of CVaR cost next to the simulation they differentiate, and how much memory they take.

Routes: the book's weights through the ledger (what `optimize_weights` does for books with accounts); all parameters of
the market through the whole simulation, under each memory plan (`Plan.remat`), or from the paths of the tail alone
(`value_and_gradient`); weights and leverage of a rebalanced portfolio in one pass; weights of a portfolio bought and
held, on the matrix of terminal prices.

CPU time counts every thread; each figure is the minimum of interleaved repetitions, and a ratio compares value and
gradient with the value alone (on the matrix: with making the matrix).
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmark_paths import interleaved, market_of, n_cores, start_jax, table, workload

LEVEL = 0.99


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[int], Any], float]:
    """A run of the compiled function, and its temporary memory per device in MiB."""
    import jax

    program = jax.jit(function).lower(*arguments).compile()
    analysis = program.memory_analysis()
    memory = analysis.temp_size_in_bytes / 2**20 if analysis is not None else float("nan")
    return lambda repetition: jax.block_until_ready(program(*arguments)), memory


def through_ledger(n_paths: int, n_steps: int) -> dict[str, tuple[Callable[[int], Any], float]]:
    """The shipped leveraged book's weights, on recorded market paths, as `optimize_weights` runs them."""
    import jax
    import jax.numpy as jnp
    import yaml

    from qpo_sim import random
    from qpo_sim.book import build_book
    from qpo_sim.compute.run import device_mesh
    from qpo_sim.config.compose import conf_folder
    from qpo_sim.market.model import prepare
    from qpo_sim.optimize import portfolio
    from qpo_sim.simulate import Plan, record_market

    described = yaml.safe_load((conf_folder() / "book" / "leveraged_mixed.yaml").read_text())
    held = [described["spot"], *(p["positions"] for p in described["perpetuals"])]
    held += [side for loan in described["loans"] for side in (loan["collateral"], loan["debt"])]
    assets = tuple(sorted({asset for positions in held for asset in positions} - {"USD"}))
    market = market_of(workload(len(assets)), assets)
    book = portfolio.marked(build_book(assets, **described))
    plan = Plan(n_steps, attribution=False, drawn=False)
    mesh = device_mesh(None)
    score = portfolio.ThroughSimulator("cvar", LEVEL, 1.0, 0.0, plan, mesh)
    everywhere = jax.NamedSharding(mesh, jax.P())
    path = jax.device_put(jnp.arange(n_paths, dtype=jnp.uint32), jax.NamedSharding(mesh, jax.P("paths")))
    prepared = jax.jit(prepare)(market)
    keys = random.stream_keys(0)
    record = jax.jit(record_market, static_argnames="plan")(market, prepared, keys, path, plan)
    problem = portfolio.Problem(market, prepared, book, keys, path, portfolio.bounds_of(book))
    problem = jax.device_put(problem, everywhere)._replace(path=path)
    rows = type(record)(*(jax.P(*[None] * (x.ndim - 1), "paths") for x in record))
    record = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), record, rows)
    problem = problem._replace(record=record)
    weights = jax.device_put(portfolio.weights_of(book), everywhere)
    return {"value": compiled(score, weights, problem), "store": compiled(jax.value_and_grad(score), weights, problem)}


def of_market(n_paths: int, n_steps: int) -> dict[str, tuple[Callable[[int], Any], float]]:
    """Drift, volatility, correlation and dof of W1 with its margin account, tested at the step ends."""
    import jax
    import jax.numpy as jnp

    from qpo_sim.bench import workload
    from qpo_sim.optimize import objective, portfolio
    from qpo_sim.sensitivity import value_and_gradient
    from qpo_sim.simulate import Plan, simulate_paths

    model = workload.parameters()
    assets = workload.names(model)
    market, book = workload.market_of(model, assets), workload.book_of(model, assets)
    path = jnp.arange(n_paths, dtype=jnp.uint32)

    def measure(conditional: Any) -> Any:
        equity, weight = portfolio.mixture(conditional)
        return objective.cvar(1.0 - equity, weight, level=LEVEL)

    def plan_of(remat: str) -> Plan:
        return Plan(n_steps, monitoring="step", attribution=False, drawn=False, dates=(n_steps,), remat=remat)

    def value(remat: str, parameters: dict[str, Any]) -> Any:
        return measure(simulate_paths(replace(market, **parameters), book, path, plan_of(remat)).conditional)

    def of_the_tail(repetition: int) -> Any:
        return value_and_gradient(measure, market, book, path, plan_of("two-level"))

    names = ("drift", "volatility", "correlation_cholesky", "dof")
    parameters = {name: getattr(market, name) for name in names}
    found = {"value": compiled(partial(value, "store"), parameters), "paths of the tail": (of_the_tail, float("nan"))}
    for remat in ("store", "step", "two-level"):
        found[remat] = compiled(jax.value_and_grad(partial(value, remat)), parameters)
    return found


def of_weights(n_paths: int, n_steps: int) -> dict[str, dict[str, tuple[Callable[[int], Any], float]]]:
    """Weights of the W1 assets, rebalanced (and the leverage) or bought and held."""
    import jax
    import jax.numpy as jnp

    from qpo_sim.optimize import objective, rebalanced_wealth, terminal_prices
    from qpo_sim.simulate import Plan

    model = workload()
    market = market_of(model, tuple(f"A{i}" for i in range(model["A"])))
    path, plan = jnp.arange(n_paths, dtype=jnp.uint32), Plan(n_steps, dates=(n_steps,))
    weights, leverage = jnp.asarray(model["w"], jnp.float32), jnp.float32(model["lev"])

    def cvar(wealth: Any) -> Any:
        return objective.cvar(1.0 - wealth, jnp.ones_like(wealth), level=LEVEL)

    def rebalanced(weights: Any, leverage: Any) -> Any:
        return cvar(rebalanced_wealth(market, weights, leverage, path, plan))

    def held(weights: Any, prices: Any) -> Any:
        return cvar(weights @ prices)

    matrix = compiled(lambda path: terminal_prices(market, path, plan), path)
    return {
        "rebalanced": {
            "value": compiled(rebalanced, weights, leverage),
            "one pass": compiled(jax.value_and_grad(rebalanced, argnums=(0, 1)), weights, leverage),
        },
        "bought and held": {
            "value": matrix,
            "on the matrix": compiled(jax.value_and_grad(held), weights, matrix[0](0)),
        },
    }


def measured(route: str, size: str, programs: dict[str, tuple[Callable[[int], Any], float]], repetitions: int):
    """Rows of the table for one route."""
    times, _ = interleaved({name: run for name, (run, _) in programs.items()}, repetitions)
    best = {name: min(cpu for _, cpu in pairs) for name, pairs in times.items()}
    for name, (_, memory) in programs.items():
        ratio = best[name] / best["value"]
        yield route, size, name, f"{1e3 * best[name]:.1f}", f"{ratio:.3g}", f"{memory:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What gradients of CVaR cost next to the simulation.")
    parser.add_argument("--paths", type=int, default=8192, help="paths (default 8192)")
    parser.add_argument("--steps", type=int, nargs="+", default=[91, 365], help="steps of W1 (default 91 365)")
    parser.add_argument("--book-steps", type=int, default=30, help="steps of the leveraged book (default 30)")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--routes", nargs="+", default=["ledger", "market", "weights"],
                        choices=["ledger", "market", "weights"], help="which routes (default: all)")  # fmt: skip
    parser.add_argument("--devices", type=int, default=n_cores(), help="host devices (default: one per core)")
    options = parser.parse_args(arguments)
    start_jax(options.devices)
    rows = []
    if "ledger" in options.routes:
        size = f"{options.paths} x {options.book_steps}"
        found = through_ledger(options.paths, options.book_steps)
        rows += measured("book's weights", size, found, options.repetitions)
    for n_steps in options.steps:
        size = f"{options.paths} x {n_steps}"
        if "market" in options.routes:
            rows += measured("market's parameters", size, of_market(options.paths, n_steps), options.repetitions)
        if "weights" in options.routes:
            for route, found in of_weights(options.paths, n_steps).items():
                rows += measured(route, size, found, options.repetitions)
    header = ("route", "paths x steps", "gradient", "CPU ms", "CPU / value", "temporary MiB per device")
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
