"""Objectives against their definitions, finite differences and reference cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optimize.scenarios import scenarios

from qpo_sim.numerics import weighted_quantile
from qpo_sim.optimize import objective

quantile = jax.jit(weighted_quantile)
N = 40
# One size: each size would be compiled anew.
values = st.lists(st.floats(-10.0, 10.0, allow_subnormal=False), min_size=N, max_size=N).map(np.array)
weights = st.lists(st.integers(0, 3), min_size=N, max_size=N).map(lambda w: np.array(w, float))


def sorted_quantile(value, weight, upper_weight):
    """Smallest sample point with at most `upper_weight` of weight above it, by sorting."""
    order = np.argsort(value)
    value, weight = value[order], weight[order]
    above = np.array([weight[value > x].sum() for x in value])
    return value[np.flatnonzero(above <= upper_weight)[0]]


@settings(max_examples=200, deadline=None)
@given(value=values, weight=weights, upper=st.integers(0, 60))
def test_weighted_quantile_is_the_sorted_one(value, weight, upper):
    # Whole weights: both sums are exact, so a tie of weight and bound falls to the same side in both. There is no such
    # x where all of the weight may lie above it.
    assume(weight.sum() > upper)
    expected = sorted_quantile(value, weight, float(upper))
    found = float(quantile(value, weight, float(upper)))
    assert found == pytest.approx(expected, abs=1e-9)
    assert weight[value > found].sum() <= upper


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_weighted_quantile_of_equal_weights_is_the_inverse_distribution_function(level):
    loss = np.random.default_rng(1).standard_t(3, 1000)
    found = float(quantile(loss, np.ones(1000), round(1000 * (1.0 - level))))
    assert found == pytest.approx(np.quantile(loss, level, method="inverted_cdf"), abs=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_weighted_quantile_survives_far_outliers(dtype):
    """The bisection works on the range: one path far out must not cost the others their digits."""
    loss = np.random.default_rng(2).normal(size=4096)
    loss[7] = 1e4
    found = float(quantile(jnp.asarray(loss, dtype), jnp.ones(4096, dtype), jnp.asarray(40.0, dtype)))
    expected = np.quantile(loss, 1.0 - 40.0 / 4096.0, method="inverted_cdf")
    assert found == pytest.approx(expected, abs=2e-3 if dtype == jnp.float32 else 2e-8)


def sample(seed=0, n=2000):
    g = np.random.default_rng(seed)
    returns = 0.002 + 0.05 * g.standard_t(4, (n, 3)) @ np.array([[1.0, 0.5, 0.2], [0.0, 0.8, 0.1], [0.0, 0.0, 0.6]])
    return returns, g.uniform(0.2, 1.8, n)


def definition(name, loss, weight, level, risk_aversion):
    """Straight from the definitions, in numpy, by sorting."""
    p = weight / weight.sum()
    mean = p @ loss
    if name == "sharpe":
        return mean / np.sqrt(p @ (loss - mean) ** 2)
    if name == "sortino":
        return mean / np.sqrt(p @ np.maximum(loss, 0.0) ** 2)
    order = np.argsort(-loss)
    tail = np.minimum(np.cumsum(p[order]), 1.0 - level)
    cvar = np.diff(tail, prepend=0.0) @ loss[order] / (1.0 - level)
    return cvar if name == "cvar" else mean + risk_aversion * cvar


@pytest.mark.parametrize("name", list(objective.OBJECTIVES))
def test_objectives_are_their_definitions(name):
    returns, weight = sample()
    loss = -(returns @ [0.5, 0.3, 0.2])
    found = objective.bind(name, level=0.95, risk_aversion=0.7)(loss, weight)
    assert float(found) == pytest.approx(definition(name, loss, weight, 0.95, 0.7), rel=1e-10)


@pytest.mark.parametrize("name", list(objective.OBJECTIVES))
def test_gradients_against_finite_differences(name):
    """In the portfolio weights and in the sample weights, both of which the simulator differentiates through."""
    returns, weight = sample()
    score = objective.bind(name, level=0.95, risk_aversion=0.7)

    def value(theta):
        portfolio, tilt = theta[:3], theta[3]
        # The sample weights keep their sum, as the mixture's do.
        tilted = weight * (1.0 + tilt * jnp.tanh(returns[:, 0] / 0.05))
        return score(-(returns @ portfolio), tilted * weight.sum() / jnp.sum(tilted))

    theta = np.array([0.5, 0.3, 0.2, 0.1])
    found = jax.grad(value)(theta)
    call = jax.jit(value)
    step = 1e-6
    expected = [
        (float(call(theta + step * unit)) - float(call(theta - step * unit))) / (2.0 * step) for unit in np.eye(4)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def test_gradient_of_cvar_on_scenarios(cases):
    case = cases("models")["F10"]
    returns = scenarios(cases("models")["E04"])
    weights = np.array(case["inputs"]["weights"])
    cvar = lambda w: objective.cvar(-(returns @ w), jnp.ones(1000), level=0.95)  # noqa: E731
    value, gradient = jax.value_and_grad(cvar)(weights)
    # The tail is a whole number of scenarios: the boundary one has no part in it.
    assert float(value) == pytest.approx(case["expected"]["cvar"], abs=1e-12)
    np.testing.assert_allclose(gradient, case["expected"]["grad_cvar"], atol=1e-12)


def test_degenerate_samples_have_finite_values_and_gradients():
    """All outcomes equal (a book of cash), no losses at all, and weights of zero."""
    for name in objective.OBJECTIVES:
        score = objective.bind(name, level=0.99, risk_aversion=1.0)
        for loss, weight in (
            (np.zeros(64), np.ones(64)),
            (np.full(64, 0.1), np.ones(64)),
            (np.linspace(-0.2, -0.1, 64), np.ones(64)),
            (np.linspace(-0.2, 0.1, 64), np.repeat([0.0, 1.0], 32)),
        ):
            value, gradients = jax.value_and_grad(score, argnums=(0, 1))(loss, weight)
            assert np.isfinite(value), name
            assert all(np.all(np.isfinite(g)) for g in gradients), name
