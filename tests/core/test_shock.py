"""The mixing polynomial against scipy's Student-t, what the cut does, and the drift correction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from qpo_sim.market import shock

DOFS = (2.3, 2.5, 3.0, 4.0, 5.0, 8.0, 12.0, 30.0, 50.0)
LEVELS = (0.99, 0.995, 0.999, 0.9999, 0.99999)

# 4000-point Gauss-Legendre over the scores: far below the errors that are tested.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4000)


def _scale(zeta, dof, floor, dtype=jnp.float64):
    scale = shock.mixing_scale(jnp.asarray(zeta, dtype), (), shock.mixing_coefficients(dof), jnp.asarray(floor, dtype))
    return np.asarray(scale, np.float64)


def _scale_law(dof: float, cut: float, dtype=jnp.float64):
    """Scores' weights and the kernel's mixing scale at a fine grid of scores."""
    high = 5.42  # the generator's own range
    zeta = high * _NODES
    weight = high * _WEIGHTS * stats.norm.pdf(zeta)
    scale = _scale(zeta, jnp.asarray([dof], dtype), shock.score_floor(cut), dtype)
    # Both ends of the score carry what lies beyond the generator's range.
    return np.concatenate([weight, [stats.norm.sf(high)] * 2]), np.concatenate([scale, scale[[0]], scale[[-1]]])


def _tail(x: float, weight, scale) -> float:
    return float(weight @ stats.norm.sf(x / scale))


def _quantile(level: float, weight, scale) -> float:
    return optimize.brentq(lambda x: _tail(x, weight, scale) - (1.0 - level), 0.1, 500.0, xtol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dof", DOFS)
def test_mixture_has_the_quantiles_of_student_t(dof):
    weight, scale = _scale_law(dof, 0.0)
    for level in LEVELS:
        exact = stats.t.ppf(level, dof) * np.sqrt((dof - 2.0) / dof)
        assert _quantile(level, weight, scale) == pytest.approx(exact, rel=2e-4), level


@pytest.mark.parametrize("dof", [2.5, 4.0, 30.0])
def test_single_precision_mixing_scale_is_as_good(dof):
    weight, scale = _scale_law(dof, 0.0, jnp.float32)
    for level in LEVELS[:4]:
        exact = stats.t.ppf(level, dof) * np.sqrt((dof - 2.0) / dof)
        assert _quantile(level, weight, scale) == pytest.approx(exact, rel=3e-4), level


@pytest.mark.parametrize("dof", [2.3, 3.0, 5.0, 20.0])
def test_scale_is_decreasing_in_the_score_and_matches_the_chi_square_quantile(dof):
    zeta = np.linspace(-5.42, 5.42, 4001)
    scale = _scale(zeta, jnp.asarray([dof]), -5.6)
    assert np.all(np.diff(scale) < 0.0)
    tail = special.ndtr(-np.abs(zeta))
    chi = np.where(zeta < 0.0, stats.chi2.ppf(tail, dof), stats.chi2.isf(tail, dof))
    # The probability-weighted error is what quantiles see; the largest one sits at the far ends of the range.
    error = np.abs(scale / np.sqrt((dof - 2.0) / chi) - 1.0)
    assert error[np.abs(zeta) < 4.3].max() < 4e-4
    assert error.max() < 1e-2


def test_cut_replaces_the_far_scale_and_nothing_else():
    dof = jnp.asarray([3.0])
    floor = shock.score_floor(1e-5)
    assert floor == pytest.approx(stats.norm.ppf(1e-5))
    zeta = jnp.asarray([-5.4, floor - 1e-9, floor + 1e-9, 0.0, 3.0])
    cut, free = _scale(zeta, dof, floor), _scale(zeta, dof, shock.score_floor(0.0))
    np.testing.assert_array_equal(cut[2:], free[2:])
    assert cut[0] == cut[1] == pytest.approx(cut[2], rel=1e-6) and cut[0] < free[0]


@pytest.mark.parametrize("dof", [2.5, 3.0, 4.0, 6.0, 12.0])
def test_cut_moves_one_day_var_999_by_less_than_two_thousandths(dof):
    cut_var = _quantile(0.999, *_scale_law(dof, shock.MIXING_CUT))
    free_var = _quantile(0.999, *_scale_law(dof, 0.0))
    exact = stats.t.ppf(0.999, dof) * np.sqrt((dof - 2.0) / dof)
    assert abs(cut_var / free_var - 1.0) < 2e-3
    assert abs(cut_var / exact - 1.0) < 2e-3  # cut and polynomial together


@pytest.mark.parametrize("dof", [2.3, 2.6, 4.0, 10.0, 50.0])
def test_derivative_in_dof(dof):
    zeta = jnp.asarray([-4.2, -2.0, -0.5, 0.0, 1.0, 3.0])

    def log_scale(v):
        return jnp.log(shock.mixing_scale(zeta, (), shock.mixing_coefficients(v[None]), jnp.asarray(-5.6)))

    got = np.asarray(jax.jacfwd(log_scale)(jnp.asarray(dof)))
    h = 1e-3 * (dof - 2.0)

    # Richardson on the exact quantile: the kernel's polynomial must have the derivative of the law itself.
    def exact(v):
        z = np.asarray(zeta)
        chi = np.where(z < 0, stats.chi2.ppf(special.ndtr(z), v), stats.chi2.isf(special.ndtr(-z), v))
        return 0.5 * np.log((v - 2.0) / chi)

    coarse, fine = (exact(dof + h) - exact(dof - h)) / (2 * h), (exact(dof + h / 2) - exact(dof - h / 2)) / h
    reference = (4.0 * fine - coarse) / 3.0
    np.testing.assert_allclose(got, reference, rtol=2e-3, atol=2e-3 / dof)
    # And the differentiated function's own slope, to the accuracy it states.
    own = (np.asarray(log_scale(jnp.asarray(dof + h / 2))) - np.asarray(log_scale(jnp.asarray(dof - h / 2)))) / h
    np.testing.assert_allclose(got, own, rtol=1e-5, atol=1e-7)


def test_coefficients_batch_over_regimes():
    dof = jnp.asarray([2.5, 4.0, 30.0])
    together = np.asarray(shock.mixing_coefficients(dof))
    for k in range(3):
        alone = np.asarray(shock.mixing_coefficients(dof[k : k + 1]))[:, 0]
        np.testing.assert_allclose(together[:, k], alone, rtol=1e-10, atol=1e-12)
    mapped = jax.vmap(lambda v: shock.mixing_coefficients(v[None])[:, 0])(dof)
    np.testing.assert_allclose(mapped.T, together, rtol=1e-10, atol=1e-12)


def _log_mean(scale, floor: float, sigma: float) -> float:
    # Split at the cut, where the integrand has a kink; expm1 keeps the digits of a number close to 1.
    total = 0.0
    for low, high in ((-8.5, floor), (floor, 8.5)):
        zeta = (low + high) / 2.0 + (high - low) / 2.0 * _NODES
        weight = (high - low) / 2.0 * _WEIGHTS * stats.norm.pdf(zeta)
        total += weight @ np.expm1(0.5 * (sigma * scale(np.clip(zeta, floor, shock.SCORE_RANGE))) ** 2)
    return float(np.log1p(total))


@pytest.mark.parametrize("dof", [2.5, 4.0, 12.0])
@pytest.mark.parametrize("sigma", [0.005, 0.04, 0.06])
def test_log_mean_exp_against_quadrature(dof, sigma):
    floor = shock.score_floor(shock.MIXING_CUT)
    coefficients = shock.mixing_coefficients(jnp.asarray([dof]))
    got = float(shock.log_mean_exp(jnp.asarray([[sigma**2]]), coefficients, jnp.asarray(floor))[0, 0])
    # The kernel's own law: what makes its prices martingales. 2e-7 per day is 6e-6 of the price in 30 days.
    assert got == pytest.approx(_log_mean(lambda z: _scale(z, jnp.asarray([dof]), floor), floor, sigma), abs=2e-7)

    # The definition with scipy's chi-square quantile instead of the polynomial.
    def exact(z):
        tail = special.ndtr(-np.abs(z))
        return np.sqrt((dof - 2.0) / np.where(z < 0, stats.chi2.ppf(tail, dof), stats.chi2.isf(tail, dof)))

    assert got == pytest.approx(_log_mean(exact, floor, sigma), rel=5e-4)


def test_log_mean_exp_in_single_precision():
    # The border computes in float32 when x64 is off: 1e-7 per step at most.
    floor, dof = shock.score_floor(shock.MIXING_CUT), jnp.asarray([3.0, 8.0], jnp.float32)
    variance = jnp.asarray([[1e-4, 3.6e-3], [1e-4, 3.6e-3]], jnp.float32)
    single = shock.log_mean_exp(variance, shock.mixing_coefficients(dof), jnp.asarray(floor, jnp.float32))
    double = shock.log_mean_exp(
        variance.astype(jnp.float64), shock.mixing_coefficients(dof.astype(jnp.float64)), jnp.asarray(floor)
    )
    np.testing.assert_allclose(single, double, atol=1e-7)
