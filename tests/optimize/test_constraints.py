"""Projections against a quadratic programme, and what makes a projection one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize

from qpo_sim.errors import InputError
from qpo_sim.optimize.constraints import check_budget, project_budget, project_gross

N = 5
budget_of = jax.jit(project_budget)
gross_of = jax.jit(project_gross)
number = st.floats(-3.0, 3.0, allow_subnormal=False)
vector = st.lists(number, min_size=N, max_size=N).map(np.array)
width = st.lists(st.floats(0.0, 2.0, allow_subnormal=False), min_size=N, max_size=N).map(np.array)
share = st.floats(0.0, 1.0, allow_subnormal=False)
examples = settings(max_examples=150, deadline=None)


@st.composite
def budget_sets(draw):
    lower, span = draw(vector), draw(width)
    upper = lower + span
    budget = lower.sum() + draw(share) * span.sum()
    return lower, upper, budget


@st.composite
def gross_sets(draw):
    lower, upper = -draw(width), draw(width)
    return lower, upper, draw(st.floats(0.0, 6.0, allow_subnormal=False))


def quadratic_programme(point, lower, upper, *, start, constraint, matrix):
    """Nearest point by scipy's SLSQP; variables x, bounded, with linear constraints and distance on matrix @ x."""
    found = minimize(
        lambda x: 0.5 * np.sum((matrix @ x - point) ** 2),
        start,
        jac=lambda x: matrix.T @ (matrix @ x - point),
        bounds=list(zip(lower, upper, strict=True)),
        constraints=[constraint],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success, found.message
    return matrix @ found.x


@pytest.mark.parametrize("seed", range(12))
def test_budget_projection_is_the_quadratic_programme(seed):
    g = np.random.default_rng(seed)
    lower = g.uniform(-0.2, 0.1, N)
    upper = lower + g.uniform(0.1, 0.8, N)
    budget = g.uniform(lower.sum(), upper.sum())
    point = g.normal(0.2, 0.6, N)
    expected = quadratic_programme(
        point,
        lower,
        upper,
        start=lower + (upper - lower) * (budget - lower.sum()) / (upper - lower).sum(),
        constraint=LinearConstraint(np.ones(N), budget, budget),
        matrix=np.eye(N),
    )
    found = budget_of(point, budget=budget, lower=lower, upper=upper)
    np.testing.assert_allclose(found, expected, atol=2e-7)


@pytest.mark.parametrize("seed", range(12))
def test_gross_projection_is_the_quadratic_programme(seed):
    g = np.random.default_rng(seed)
    lower, upper = -g.uniform(0.0, 1.0, N), g.uniform(0.0, 1.0, N)
    point, gross = g.normal(0.0, 1.0, N), g.uniform(0.1, 2.0)
    # w = a - b with a, b >= 0 makes the cap linear.
    expected = quadratic_programme(
        point,
        np.zeros(2 * N),
        np.concatenate([upper, -lower]),
        start=np.zeros(2 * N),
        constraint=LinearConstraint(np.ones(2 * N), -np.inf, gross),
        matrix=np.hstack([np.eye(N), -np.eye(N)]),
    )
    found = gross_of(point, gross=gross, lower=lower, upper=upper)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@examples
@given(point=vector, other=vector, set_=budget_sets())
def test_budget_projection_is_feasible_idempotent_and_nearest(point, other, set_):
    lower, upper, budget = set_
    options = dict(budget=budget, lower=lower, upper=upper)
    found = np.asarray(budget_of(point, **options))
    assert abs(found.sum() - budget) < 1e-12 * (1.0 + np.abs(found).sum() + np.abs(upper).sum())
    assert np.all(found >= lower) and np.all(found <= upper)
    np.testing.assert_allclose(budget_of(found, **options), found, atol=1e-12)
    # Nearest: the angle to every other feasible point is obtuse (the variational inequality).
    feasible = np.asarray(budget_of(other, **options))
    assert (point - found) @ (feasible - found) <= 1e-10


@examples
@given(point=vector, other=vector, set_=gross_sets())
def test_gross_projection_is_feasible_idempotent_and_nearest(point, other, set_):
    lower, upper, gross = set_
    options = dict(gross=gross, lower=lower, upper=upper)
    found = np.asarray(gross_of(point, **options))
    assert np.abs(found).sum() <= gross + 1e-12
    assert np.all(found >= lower) and np.all(found <= upper)
    np.testing.assert_allclose(gross_of(found, **options), found, atol=1e-12)
    feasible = np.asarray(gross_of(other, **options))
    assert (point - found) @ (feasible - found) <= 1e-10


@examples
@given(weights=st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=N, max_size=N).map(np.array))
def test_feasible_points_do_not_move(weights):
    assume(weights.sum() > 0.0)
    zero, one = np.zeros(N), np.ones(N)
    np.testing.assert_allclose(budget_of(weights, budget=weights.sum(), lower=zero, upper=one), weights, atol=1e-14)
    np.testing.assert_array_equal(gross_of(weights, gross=weights.sum() * (1 + 1e-15), lower=-one, upper=one), weights)


def test_known_simplex_projections():
    """Three by hand: shift, drop of the smallest, all on one."""
    simplex = dict(budget=1.0, lower=np.zeros(3), upper=np.ones(3))
    np.testing.assert_allclose(budget_of(np.array([0.5, 0.5, 0.3]), **simplex), [0.4, 0.4, 0.2], atol=1e-15)
    np.testing.assert_allclose(budget_of(np.array([0.8, 0.6, -0.5]), **simplex), [0.6, 0.4, 0.0], atol=1e-15)
    np.testing.assert_allclose(budget_of(np.array([5.0, 0.0, 0.0]), **simplex), [1.0, 0.0, 0.0], atol=1e-15)


def test_single_precision_keeps_the_budget_to_rounding():
    g = np.random.default_rng(0)
    point = jnp.asarray(g.normal(size=10), jnp.float32)
    lower, upper = jnp.zeros(10, jnp.float32), jnp.full(10, 0.3, jnp.float32)
    found = budget_of(point, budget=jnp.float32(1.0), lower=lower, upper=upper)
    assert found.dtype == jnp.float32
    assert abs(float(np.sum(np.asarray(found, np.float64))) - 1.0) < 1e-6
    double = budget_of(
        point.astype(jnp.float64), budget=1.0, lower=lower.astype(jnp.float64), upper=upper.astype(jnp.float64)
    )
    np.testing.assert_allclose(found, double, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "lower", "upper", "words"),
    [
        (1.0, [0.2, 0.5], [0.4, 0.4], "lower bound exceeds its upper bound"),
        (1.0, [0.6, 0.6], [1.0, 1.0], "lower bounds sum to 1.2, above the budget of 1"),
        (1.0, [0.0, 0.0], [0.3, 0.3], "upper bounds sum to 0.6, below the budget of 1"),
        (float("nan"), [0.0, 0.0], [1.0, 1.0], "budget"),
    ],
)
def test_impossible_budgets_are_refused(budget, lower, upper, words):
    with pytest.raises(InputError, match=words):
        check_budget(budget, jnp.asarray(lower), jnp.asarray(upper))


def test_budgets_at_the_very_bounds_are_possible():
    check_budget(1.0, jnp.asarray([0.5, 0.5]), jnp.asarray([0.5, 0.5]))
