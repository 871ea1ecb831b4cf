"""The solver on problems whose optimum is known."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimize.scenarios import scenarios
from scipy import sparse, stats
from scipy.optimize import linprog

from qpo_sim.optimize import objective
from qpo_sim.optimize.constraints import project_budget, tangent_budget
from qpo_sim.optimize.solve import adam, minimize


@cache
def cvar_at(level):
    """One function object per level: the solver compiles once per object."""

    def cvar_of(weights, data):
        returns = data[0]
        return objective.cvar(-(returns @ weights), jnp.ones(returns.shape[0], returns.dtype), level=level)

    return cvar_of


def onto_simplex(weights, data):
    return project_budget(weights, budget=1.0, lower=jnp.zeros_like(weights), upper=jnp.full_like(weights, data[1]))


def along_simplex(gradient, weights, data):
    return tangent_budget(gradient, weights, lower=jnp.zeros_like(weights), upper=jnp.full_like(weights, data[1]))


def solve(returns, level, cap=1.0, *, n_steps=400, learning_rate=0.05):
    n = returns.shape[1]
    return minimize(
        cvar_at(level),
        jnp.full(n, 1.0 / n, returns.dtype),
        (jnp.asarray(returns), cap),
        project=onto_simplex,
        tangent=along_simplex,
        optimizer=adam(learning_rate, n_steps),
        n_steps=n_steps,
    )


def cvar_programme(returns, level, cap=1.0):
    """Minimum CVaR by the linear programme of Rockafellar & Uryasev, scipy's HiGHS; variables w, threshold, excess."""
    n, k = returns.shape
    cost = np.concatenate([np.zeros(k), [1.0], np.full(n, 1.0 / (n * (1.0 - level)))])
    rows = sparse.hstack([sparse.csr_matrix(-returns), -np.ones((n, 1)), -sparse.eye(n)])
    found = linprog(
        cost,
        A_ub=rows,
        b_ub=np.zeros(n),
        A_eq=np.concatenate([np.ones(k), np.zeros(n + 1)])[None],
        b_eq=[1.0],
        bounds=[(0.0, cap)] * k + [(None, None)] + [(0.0, None)] * n,
        method="highs",
    )
    assert found.success
    return found.fun, found.x[:k]


def test_minimum_cvar_is_the_linear_programme(cases):
    """Promised is 1e-3 relative in the objective."""
    case = cases("models")["E04"]
    returns = scenarios(case)
    level, cap = case["inputs"]["level"], case["inputs"]["cap"]
    optimum, weights = cvar_programme(returns, level, cap)
    assert optimum == pytest.approx(case["expected"]["cvar"], abs=1e-7)
    found = solve(returns, level, cap)
    print(f"relative excess over the programme {float(found.value) / optimum - 1.0:.2e}")
    assert optimum - 1e-12 <= float(found.value) <= optimum * (1.0 + 1e-4)
    np.testing.assert_allclose(found.point, weights, atol=1e-3)
    assert float(jnp.sum(found.point)) == pytest.approx(1.0, abs=1e-12)
    assert float(jnp.min(found.point)) >= 0.0 and float(jnp.max(found.point)) <= cap


@pytest.mark.parametrize("level", [0.9, 0.99])
def test_minimum_cvar_from_single_precision(cases, level):
    returns = scenarios(cases("models")["E04"])
    optimum, _ = cvar_programme(returns, level)
    found = solve(returns.astype(np.float32), level)
    assert found.point.dtype == jnp.float32
    weights = np.asarray(found.point, np.float64)
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    loss = np.sort(-(returns @ (weights / weights.sum())))[::-1]
    reached = loss[: round(1000 * (1.0 - level))].mean()
    print(f"level {level}: relative excess {reached / optimum - 1.0:.2e}")
    assert reached <= optimum * (1.0 + 1e-3)


def test_minimum_shortfall_of_a_student_t_portfolio(cases):
    """On drawn scenarios the optimum is within sampling error of the analytic one, and so is what it is worth there."""
    case = cases("models")["E19"]
    given, expected = case["inputs"], case["expected"]
    mean, cov, nu, level = np.array(given["mean"]), np.array(given["cov"]), given["nu"], given["level"]
    q = stats.t.ppf(level, nu)
    multiplier = np.sqrt((nu - 2) / nu) * stats.t.pdf(q, nu) / (1 - level) * (nu + q * q) / (nu - 1)
    assert multiplier == pytest.approx(expected["multiplier"], rel=1e-9)

    def shortfall(w):
        return -mean @ w + multiplier * np.sqrt(w @ cov @ w)

    assert shortfall(np.array(expected["weights"])) == pytest.approx(expected["ES"], abs=1e-6)
    g = np.random.default_rng(5)
    n = 100_000
    z = g.standard_normal((n, 3)) @ np.linalg.cholesky(cov * (nu - 2) / nu).T
    returns = mean + z / np.sqrt(g.chisquare(nu, (n, 1)) / nu)
    found = solve(returns, level, n_steps=200)
    weights = np.asarray(found.point)
    outcome = -(returns @ weights)
    excess = np.maximum(outcome - np.quantile(outcome, level), 0.0) / (1.0 - level)
    error = excess.std() / np.sqrt(n)
    print(f"in sample {float(found.value):.5f}, analytic {expected['ES']:.5f}, standard error {error:.5f}")
    assert abs(float(found.value) - expected["ES"]) < 4.0 * error
    assert expected["ES"] - 1e-6 <= shortfall(weights) < expected["ES"] + error


def test_normal_minimum_cvar_on_a_line(cases):
    """Rockafellar & Uryasev's three assets: budget and return target leave one direction; exact sample moments."""
    case = cases("models")["E01"]
    given, expected = case["inputs"], case["expected"]
    mean, cov, target = np.array(given["mean"]), np.array(given["cov"]), given["R"]
    g = np.random.default_rng(6)
    z = g.standard_normal((50_000, 3))
    z = np.concatenate([z, -z])
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z))).T
    returns = mean + z @ np.linalg.cholesky(cov).T

    # Sum and mean are given, so the weights lie on a line, cut off where one of them leaves [0, 1].
    basis = np.linalg.svd(np.stack([np.ones(3), mean]))[2][2]
    base = np.linalg.lstsq(np.stack([np.ones(3), mean]), np.array([1.0, target]), rcond=None)[0]
    reach = [(-b / d, (1 - b) / d) for b, d in zip(base, basis, strict=True)]
    low, high = max(min(r) for r in reach), min(max(r) for r in reach)

    def along(s, data):
        return cvar_at(0.95)(base + s * basis, (data,))

    found = minimize(
        along,
        jnp.asarray(0.5 * (low + high)),
        jnp.asarray(returns),
        project=partial(_clip, low, high),
        optimizer=adam(0.05, 150),
        n_steps=150,
    )
    weights = base + float(found.point) * basis
    outcome = -(returns @ weights)
    excess = np.maximum(outcome - np.quantile(outcome, 0.95), 0.0) / 0.05
    assert abs(float(found.value) - expected["CVaR"]["0.95"]) < 4.0 * excess.std() / np.sqrt(len(z))
    np.testing.assert_allclose(weights, expected["weights"], atol=0.1)
    assert weights @ cov @ weights == pytest.approx(expected["variance"], rel=2e-3)


def test_common_part_of_the_gradient_does_not_stall_the_descent():
    """Moving money between assets is all that a budget allows, however large what their gradients have in common."""
    data = (jnp.asarray([1.0, 1.1, 1.2, 1.3]) + 5.0, 1.0)
    found = minimize(
        _linear,
        jnp.full(4, 0.25),
        data,
        project=onto_simplex,
        tangent=along_simplex,
        optimizer=adam(0.05, 200),
        n_steps=200,
    )
    np.testing.assert_allclose(found.point, [1.0, 0.0, 0.0, 0.0], atol=1e-3)


def _linear(point, data):
    return jnp.sum(point * data[0])


def _clip(low, high, point, data):
    return jnp.clip(point, low, high)


def _bowl(point, data):
    return jnp.sum((point["a"] - data) ** 2) + (point["b"] + 1.0) ** 2


def _anywhere(point, data):
    return point


def test_best_point_and_trace_belong_together():
    """The best point seen is returned with its own value, and the trace has the start first."""
    start = {"a": jnp.zeros(2), "b": jnp.asarray(0.0)}
    data = jnp.asarray([1.0, -2.0])
    # A step far too long overshoots, so that the last point is not the best.
    found = minimize(_bowl, start, data, project=_anywhere, optimizer=adam(3.0, 10), n_steps=10)
    assert found.trace.shape == (11,)
    assert float(found.trace[0]) == 6.0
    assert float(found.value) == float(jnp.min(found.trace))
    assert float(_bowl(found.point, data)) == pytest.approx(float(found.value), rel=1e-15)
    found = minimize(_bowl, start, data, project=_anywhere, optimizer=adam(0.1, 400), n_steps=400)
    assert float(found.value) < 1e-6
    assert jax.tree.structure(found.point) == jax.tree.structure(start)


def _lost(point, data):
    """A parabola that is not a number beyond 1."""
    return jnp.where(point < 1.0, (point - 2.0) ** 2, jnp.nan)


def test_a_point_without_a_value_is_never_the_best():
    found = minimize(_lost, jnp.asarray(0.0), None, project=_anywhere, optimizer=adam(0.3, 20), n_steps=20)
    assert np.isnan(found.trace).any()
    assert np.isfinite(float(found.value)) and float(found.point) < 1.0
