"""What every component must do, found by listing the folders: run in the line, alone and beside any other one."""

import importlib
import pkgutil
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpo_sim import random, simulate
from qpo_sim.market import compose, line, model, presets
from qpo_sim.simulate import Plan, market_paths

KIND = {"volatility": "volatility_model", "dependence": "shock", "jump": "jumps", "side": "side"}


def components():
    for folder in compose.FOLDERS:
        package = importlib.import_module(f"qpo_sim.market.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            if hasattr(loaded, "example"):
                yield folder, module.name, loaded.example


COMPONENTS = list(components())
IDS = [name for _, name, _ in COMPONENTS]


def market_with(parts, n_assets, dtype=jnp.float32):
    """Two or three regimes where a component needs them, one otherwise."""
    assets = tuple(f"A{i}" for i in range(n_assets))
    correlation = 0.5 * np.eye(n_assets) + 0.5
    market = presets.gbm(assets, [0.8] * n_assets, correlation, dtype=dtype)
    made = [(folder, example(n_assets, dtype)) for folder, _, example in parts]
    n_regimes = max([getattr(component, "n_regimes", 1) or 1 for _, component in made])
    if n_regimes > 1:
        stay = 0.9 * np.eye(n_regimes) + 0.1 / n_regimes
        market = replace(
            market,
            initial=presets.rounded(np.full(n_regimes, 1.0 / n_regimes), dtype),
            transition=presets.rounded(stay / stay.sum(axis=1, keepdims=True), dtype),
            **{
                name: jnp.repeat(getattr(market, name), n_regimes, axis=0)
                for name in ("drift", "volatility", "correlation_cholesky")
            },
        )
    for folder, component in made:
        if folder in ("jump", "side"):
            market = replace(market, **{KIND[folder]: (*getattr(market, KIND[folder]), component)})
        else:
            market = replace(market, **{KIND[folder]: component})
    return market


def finite(record):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(record) if jnp.issubdtype(x.dtype, jnp.floating))


@partial(jax.jit, static_argnames="plan")
def _last_step(market, keys, path, plan):
    prepared = model.prepare(market)
    context = simulate.context_of(market, prepared, None, keys, path, plan)
    return simulate.run_line(line.stages(market), context)


def last_step(market, plan):
    """States of all stages after the last step: nothing that has gone wrong on the way is finite in all of them."""
    return _last_step(market, random.stream_keys(0), jnp.arange(2, dtype=jnp.uint32), plan)


def test_every_folder_has_components():
    assert {folder for folder, _, _ in COMPONENTS} == set(compose.FOLDERS)
    assert len(COMPONENTS) > 20


@pytest.mark.parametrize(("folder", "name", "example"), COMPONENTS, ids=IDS)
def test_each_component_runs_and_a_path_is_the_same_alone_and_in_company(folder, name, example):
    market = market_with([(folder, name, example)], 2)
    company = market_paths(market, 256, Plan(12))
    assert finite(company)
    assert float(jnp.std(company.log_price[-1])) > 0.0
    alone = market_paths(market, np.array([71]), Plan(12))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[..., 0], b[..., 71]), alone, company)


def covering():
    """Compositions of one component per folder in which every two components of different folders meet (greedy)."""
    by_folder = {folder: [part for part in COMPONENTS if part[0] == folder] for folder in compose.FOLDERS}
    left = {frozenset((a[1], b[1])) for a, b in combinations(COMPONENTS, 2) if a[0] != b[0]}
    found = []
    while left:
        best = max(
            product(*by_folder.values()),
            key=lambda parts: sum(frozenset((a[1], b[1])) in left for a, b in combinations(parts, 2)),
        )
        found.append(best)
        left -= {frozenset((a[1], b[1])) for a, b in combinations(best, 2)}
    return found


COVERING = covering()


@pytest.mark.slow
@pytest.mark.parametrize("n_assets", [1, 30])
@pytest.mark.parametrize("parts", COVERING, ids=["-".join(part[1] for part in parts) for parts in COVERING])
def test_any_components_together_run_ten_thousand_steps(parts, n_assets):
    # The history that rough volatility keeps grows with the steps.
    is_rough = any(name == "rough_bergomi" for _, name, _ in parts)
    market = market_with(parts, n_assets)
    assert finite(last_step(market, Plan(500 if is_rough else 10_000)))
