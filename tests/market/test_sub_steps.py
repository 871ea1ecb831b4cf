"""Shocks over sub-steps of the base step: those that allow it keep the law of the base step, the others say no."""

import importlib
import pkgutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qpo_sim.errors import InputError
from qpo_sim.market import dependence, presets
from qpo_sim.simulate import Plan, market_paths

N_PATHS = 50_000
MODULES = [
    importlib.import_module(f"{dependence.__name__}.{m.name}") for m in pkgutil.iter_modules(dependence.__path__)
]
SHOCKS = {m.__name__.rsplit(".", 1)[1]: m.example for m in MODULES if hasattr(m, "example")}


def market_of(name):
    base = presets.gbm(("A", "B", "C"), [0.8, 0.9, 1.0], 0.5 * np.eye(3) + 0.5)
    return replace(base, shock=SHOCKS[name](3, jnp.float32))


def log_prices(market, step_hours):
    n_steps = int(48.0 / step_hours)
    return np.asarray(market_paths(market, N_PATHS, Plan(n_steps, step_hours=step_hours)).log_price, np.float64)


def test_every_shock_says_whether_it_can_be_cut():
    assert len(SHOCKS) >= 6
    cut = {name for name in SHOCKS if not market_of(name).shock.needs_base_step}
    assert {"dcc", "factor", "mixture"} <= cut < set(SHOCKS)


@pytest.mark.parametrize("name", SHOCKS)
def test_two_sub_steps_run_or_are_refused(name):
    """Mean size of two days' returns and of products of assets, five standard errors: false alarm 6e-7 each."""
    market = market_of(name)
    if market.shock.needs_base_step:
        with pytest.raises(InputError, match="whole steps of 24 hours: set simulation.step_hours to 24, or fit"):
            market_paths(market, 4, Plan(4, step_hours=12.0))
        return
    whole, halves = log_prices(market, 24.0), log_prices(market, 12.0)
    assert halves.shape[0] == 2 * whole.shape[0]
    for of_path in (np.abs, lambda x: np.sqrt(np.abs(x * np.roll(x, 1, axis=0)))):
        for day in (0, 1):
            a, b = of_path(whole[day]), of_path(halves[2 * day + 1])
            error = np.sqrt((a.var(axis=1) + b.var(axis=1)) / N_PATHS)
            assert np.all(np.abs(a.mean(axis=1) - b.mean(axis=1)) < 5.0 * error), (name, day)
