"""The gradient from the paths that matter against the gradient through all paths at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, tiered

from qpo_sim import value_and_gradient
from qpo_sim.book import build_book
from qpo_sim.market.model import Market
from qpo_sim.optimize import objective, portfolio
from qpo_sim.sensitivity import pathwise
from qpo_sim.simulate import Plan, simulate_paths

ASSETS = ("A", "B")
PATHS = 3000


@pytest.fixture(scope="module")
def market():
    rho = np.linalg.cholesky(np.array([[1.0, 0.6], [0.6, 1.0]]))
    return Market(
        initial=jnp.asarray([0.7, 0.3], F64),
        transition=jnp.asarray([[0.9, 0.1], [0.3, 0.7]], F64),
        drift=jnp.asarray([[0.0, 0.002], [0.0, 0.004]], F64),
        volatility=jnp.asarray([[0.03, 0.05], [0.06, 0.1]], F64),
        correlation_cholesky=jnp.asarray(np.stack([rho, rho]), F64),
        dof=jnp.asarray([5.0, 4.0], F64),
        assets=ASSETS,
    )


@pytest.fixture(scope="module")
def book():
    account = {"name": "cross", "margin": 0.3, "positions": {"A": 1.5, "B": -0.7}, "venue": tiered()}
    return build_book(ASSETS, capital=1.0, spot={"B": 0.2}, perpetuals=[account], dtype=F64)


def tail(conditional):
    equity, weight = portfolio.mixture(conditional)
    return objective.cvar(1.0 - equity, weight, level=0.99)


def everything(conditional):
    equity, weight = portfolio.mixture(conditional)
    return jnp.sum(weight * equity**2) / PATHS


@pytest.mark.slow
@pytest.mark.parametrize("monitoring", ["bridge", "step"])
@pytest.mark.parametrize("measure", [tail, everything], ids=lambda f: f.__name__)
def test_equals_the_gradient_through_all_paths(market, book, measure, monitoring):
    plan = Plan(7, monitoring=monitoring, attribution=False, drawn=False)

    def through_all(market, book):
        return measure(simulate_paths(market, book, PATHS, plan, seed=3).conditional)

    value, expected = jax.jit(jax.value_and_grad(through_all, argnums=(0, 1)))(market, book)
    found_value, found = value_and_gradient(measure, market, book, PATHS, plan, seed=3)
    np.testing.assert_allclose(found_value, value, rtol=1e-13)
    for name in ("drift", "volatility", "correlation_cholesky", "dof"):
        assert np.any(getattr(found.market, name) != 0.0), name
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        (found.market, found.book),
        expected,
    )


def test_only_the_tail_is_differentiated_and_it_is_enough(market, book, monkeypatch):
    plan = Plan(7, monitoring="step")
    _, found = value_and_gradient(tail, market, book, PATHS, plan)
    assert 0.01 * PATHS <= found.n_paths <= 0.02 * PATHS
    # In small blocks: the same sum.
    monkeypatch.setattr(pathwise, "BLOCK", 256)
    _, blocks = value_and_gradient(everything, market, book, PATHS, plan)
    monkeypatch.setattr(pathwise, "BLOCK", 4096)
    _, whole = value_and_gradient(everything, market, book, PATHS, plan)
    assert whole.n_paths == PATHS
    np.testing.assert_allclose(blocks.market.volatility, whole.market.volatility, rtol=1e-10)


def test_named_paths_and_a_market_without_gradient_leaves(market, book):
    plan = Plan(3, monitoring="step")
    path = np.array([17, 4, 9], np.uint32)
    _, found = value_and_gradient(everything, replace(market, dof=None), book, path, plan)
    assert found.n_paths == 3 and found.market.dof is None
    assert np.all(found.market.transition == 0.0)
