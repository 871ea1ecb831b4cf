"""Primitives: values and gradients where they usually break, and the two forms of the mat-vec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from qpo_sim import numerics
from qpo_sim.numerics import bridge_crossing, regime_matvec, safe_log, safe_sqrt, select


@pytest.mark.parametrize("x", [0.0, -1.0, -0.0, 1e-300, np.inf])
def test_guarded_functions_keep_finite_values_and_gradients(x):
    for function in (safe_log, safe_sqrt):
        value, slope = jax.value_and_grad(function)(jnp.asarray(x))
        assert not np.isnan(value) and np.isfinite(slope)
        if x <= 0.0:
            assert slope == 0.0


def test_guarded_functions_are_exact_where_they_are_defined():
    x = jnp.geomspace(1e-20, 1e20, 41)
    np.testing.assert_allclose(safe_log(x), np.log(x), rtol=1e-15)
    np.testing.assert_allclose(safe_sqrt(x), np.sqrt(x), rtol=1e-15)
    np.testing.assert_allclose(jax.vmap(jax.grad(safe_log))(x), 1.0 / x, rtol=1e-14)
    np.testing.assert_allclose(jax.vmap(jax.grad(safe_sqrt))(x), 0.5 / np.sqrt(x), rtol=1e-14)


def test_polynomial_is_horner():
    coefficients = [1.0, -2.0, 0.5, 3.0]
    x = np.linspace(-2.0, 2.0, 9)
    np.testing.assert_allclose(numerics.polynomial(coefficients, x), np.polyval(coefficients[::-1], x), rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_select_returns_the_entry_for_one_hot_masks(dtype):
    rng = np.random.default_rng(0)
    table = [dtype(v) for v in rng.normal(size=4)]
    for state in range(4):
        masks = [np.array([float(state == k + 1)], dtype) for k in range(3)]
        got = select(masks, table)
        # one rounding of (entry - first) and one of the sum
        bound = np.finfo(dtype).eps * (abs(table[state]) + abs(table[0]))
        assert abs(float(got[0] if state else np.ravel(got)[0]) - float(table[state])) <= bound


def _reference_matvec(factors, state, z):
    return np.stack([factors[k] @ z[:, p] for p, k in enumerate(state)], axis=1)


@pytest.mark.parametrize("n", [1, 5, 32, 33])
@pytest.mark.parametrize("n_states", [1, 3])
def test_matvec_unrolled_and_matrix_form_agree_with_numpy(n, n_states):
    rng = np.random.default_rng(n)
    factors = np.tril(rng.normal(size=(n_states, n, n)))
    state = rng.integers(0, n_states, 17)
    z = rng.normal(size=(n, 17))
    masks = tuple(jnp.asarray(state == k, jnp.float64) for k in range(1, n_states))
    rows = regime_matvec(jnp.asarray(factors), masks, tuple(jnp.asarray(z)))
    assert isinstance(rows, tuple) == (n <= numerics.MAX_UNROLLED_ASSETS)
    np.testing.assert_allclose(np.stack(list(rows)), _reference_matvec(factors, state, z), rtol=1e-12, atol=1e-12)


def test_matvec_forms_agree_on_the_same_input(monkeypatch):
    rng = np.random.default_rng(1)
    factors = jnp.asarray(np.tril(rng.normal(size=(2, 6, 6))))
    masks = (jnp.asarray(rng.integers(0, 2, 50), jnp.float64),)
    z = tuple(jnp.asarray(rng.normal(size=(6, 50))))
    unrolled = np.stack(regime_matvec(factors, masks, z))
    monkeypatch.setattr(numerics, "MAX_UNROLLED_ASSETS", 5)
    np.testing.assert_allclose(regime_matvec(factors, masks, z), unrolled, rtol=1e-13, atol=1e-13)


def test_bridge_crossing_cases(cases):
    for row in cases("models")["B04"]["expected"]:
        p = bridge_crossing(
            jnp.asarray(row["x0"] - row["b"]), jnp.asarray(row["x1"] - row["b"]), row["sigma"] ** 2 * row["dt"]
        )
        assert abs(float(p) - row["p"]) < 1e-14


def test_bridge_crossing_derivatives_at_fixed_ends(cases):
    case = cases("models")["F04"]
    x0, x1, b, sigma, dt = (case["inputs"][k] for k in ("x0", "x1", "b", "sigma", "dt"))
    expected = case["expected"]

    def crossing(sigma, b):
        return bridge_crossing(x0 - b, x1 - b, sigma**2 * dt)

    assert float(crossing(sigma, b)) == pytest.approx(expected["bridge_p"], rel=1e-9)
    by_sigma, by_b = jax.grad(crossing, argnums=(0, 1))(sigma, b)
    assert float(by_sigma) == pytest.approx(expected["bridge_dp_dsigma_fixed_endpoints"], rel=1e-9)
    assert float(by_b) == pytest.approx(expected["bridge_dp_db_fixed_endpoints"], rel=1e-9)


def test_bridge_crossing_integrates_to_the_one_step_probability(cases):
    # Quadrature over the end point: value, conditional variance (G09) and the pathwise derivative in sigma (F04).
    case = cases("models")["G09"]
    b, m, s, horizon = (case["inputs"][k] for k in ("b", "m", "s", "T"))

    def p(z):
        return float(bridge_crossing(-b, m * horizon + s * np.sqrt(horizon) * z - b, s * s * horizon))

    z_barrier = (b - m * horizon) / (s * np.sqrt(horizon))
    first = integrate.quad(lambda z: p(z) * stats.norm.pdf(z), -9, 9, points=[z_barrier], limit=400)[0]
    second = integrate.quad(lambda z: p(z) ** 2 * stats.norm.pdf(z), -9, 9, points=[z_barrier], limit=400)[0]
    assert first == pytest.approx(case["expected"]["P"], abs=1e-9)
    assert second - first**2 == pytest.approx(case["expected"]["var_bridge"], abs=1e-8)

    case = cases("models")["F04"]
    x0, b, sigma, dt = (case["inputs"][k] for k in ("x0", "b", "sigma", "dt"))
    nodes, weights = np.polynomial.legendre.leggauss(400)

    def one_step(sigma):
        # log-price without drift; the part of the end points beyond the barrier has crossed for sure
        low, high = (b - x0) / (0.8 * np.sqrt(dt)), 9.0
        z = low + (high - low) * (jnp.asarray(nodes) + 1.0) / 2.0
        end = jnp.maximum(x0 - b + sigma * np.sqrt(dt) * z, 1e-13)
        density = jnp.asarray(weights) * (high - low) / 2.0 * jnp.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
        return jnp.sum(density * bridge_crossing(x0 - b, end, sigma**2 * dt)) + stats.norm.cdf(low)

    assert float(one_step(sigma)) == pytest.approx(case["expected"]["one_step_prob"], abs=1e-8)
    # The crossing probability is continuous at the barrier, so the pathwise derivative needs no boundary term.
    assert float(jax.grad(one_step)(sigma)) == pytest.approx(case["expected"]["d_dsigma"], rel=1e-5)


@pytest.mark.parametrize(("x0", "x1"), [(-0.1, 0.2), (0.1, -0.2), (0.0, 0.1), (0.1, 0.0), (-0.1, -0.1)])
def test_bridge_crossing_is_certain_beyond_the_barrier_with_zero_gradient(x0, x1):
    value, gradient = jax.value_and_grad(bridge_crossing, argnums=(0, 1, 2))(
        jnp.asarray(x0), jnp.asarray(x1), jnp.asarray(0.01)
    )
    assert value == 1.0 and gradient == (0.0, 0.0, 0.0)


def test_bridge_crossing_survives_zero_variance():
    value, gradient = jax.value_and_grad(bridge_crossing, argnums=(0, 1, 2))(
        jnp.asarray(0.1), jnp.asarray(0.2), jnp.asarray(0.0)
    )
    assert value == 0.0 and np.all(np.isfinite(gradient))
