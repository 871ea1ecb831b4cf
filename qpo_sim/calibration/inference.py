r"""What maximum-likelihood fits of single assets share: the optimiser, the covariance of the estimates and the result.

With the log-likelihood $\ell(\theta) = \sum_t w_t \ell_t$, its negative Hessian $H$ and its scores
$s_t = w_t \partial\ell_t/\partial\theta$ at the maximum, the covariance of the estimates is $H^{-1}$ when the model is
true and $H^{-1} S H^{-1}$ with $S = \sum_t (s_t - \bar s)(s_t - \bar s)^\top$ (sandwich) when only the moments are:
White (1982), Bollerslev & Wooldridge (1992).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.types import Array

# Predicted gain of one more Newton step, in log-likelihood per observation, below which a fit has converged.
TOLERANCE = 1e-11
MAX_ITERATIONS = 200
_FIRST_RADIUS = 1.0
_LARGEST_RADIUS = 4.0
_SMALLEST_RADIUS = 1e-10
_SMALLEST_CURVATURE = 1e-10


@dataclass(frozen=True, eq=False)
class Fit:
    """Maximum-likelihood estimates of one model for several assets, each fitted on its own. Float64 NumPy arrays.

    Attributes:
      assets: names, in the order of every asset axis.
      names: parameters, in the order of every parameter axis.
      values: estimates, in the units of the data.
      hessian_covariance: covariance of the estimates if the model is true; infinite where `has_covariance` is false.
      sandwich_covariance: covariance that is right for a misspecified density as well; infinite likewise.
      has_covariance: whether the log-likelihood is curved in all directions, without which there is no covariance.
      is_at_bound: estimates at the edge of what is allowed; the normal approximation does not hold for them.
      log_likelihood: at the estimates; weighted, with weights whose mean is 1, where there are weights.
      n_parameters: free parameters per asset.
      n_observations: values used per asset.
      n_iterations: Newton steps of the start that was kept.
      converged: whether one more step would gain less than 1e-11 per observation.
    """

    assets: tuple[str, ...]
    names: tuple[str, ...]
    values: Float[np.ndarray, "assets parameters"]
    hessian_covariance: Float[np.ndarray, "assets parameters parameters"]
    sandwich_covariance: Float[np.ndarray, "assets parameters parameters"]
    has_covariance: Bool[np.ndarray, " assets"]
    is_at_bound: Bool[np.ndarray, "assets parameters"]
    log_likelihood: Float[np.ndarray, " assets"]
    n_parameters: int
    n_observations: Int[np.ndarray, " assets"]
    n_iterations: Int[np.ndarray, " assets"]
    converged: Bool[np.ndarray, " assets"]

    def __getitem__(self, name: str) -> Float[np.ndarray, " assets"]:
        """Estimates of one parameter.

        Raises:
          InputError: the model has no such parameter.
        """
        if name not in self.names:
            raise InputError(f"the fit has no parameter {name!r}: {did_you_mean(name, self.names)}")
        return self.values[:, self.names.index(name)]

    def std_error(self, kind: Literal["hessian", "sandwich"] = "sandwich") -> Float[np.ndarray, "assets parameters"]:
        """Standard errors of the estimates; infinite where there is no covariance.

        Raises:
          InputError: another kind.
        """
        chosen = choice("kind", kind, ("hessian", "sandwich"))
        covariance = self.hessian_covariance if chosen == "hessian" else self.sandwich_covariance
        return np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))

    @property
    def aic(self) -> Float[np.ndarray, " assets"]:
        """Akaike's criterion, 2 n_parameters - 2 log_likelihood."""
        return 2.0 * self.n_parameters - 2.0 * self.log_likelihood

    @property
    def bic(self) -> Float[np.ndarray, " assets"]:
        """Schwarz's criterion, log(n_observations) n_parameters - 2 log_likelihood."""
        return np.log(self.n_observations) * self.n_parameters - 2.0 * self.log_likelihood


class Minimum(NamedTuple):
    """Where a minimisation ended.

    Attributes:
      point: the coordinates.
      value: of the objective there.
      n_iterations: steps tried.
      has_converged: whether the predicted gain of one more step is below `TOLERANCE`.
    """

    point: Float[Array, " coordinates"]
    value: Float[Array, ""]
    n_iterations: Int[Array, ""]
    has_converged: Bool[Array, ""]


class Information(NamedTuple):
    """Curvature and scores of a log-likelihood, and the covariances that follow from them."""

    hessian_covariance: Float[Array, "parameters parameters"]
    sandwich_covariance: Float[Array, "parameters parameters"]
    has_covariance: Bool[Array, ""]


class _Descent(NamedTuple):
    point: Array
    value: Array
    step: Array
    gain: Array
    radius: Array
    n_iterations: Array


def minimise(objective: Callable[[Array], Array], start: Float[Array, " coordinates"]) -> Minimum:
    """Newton's method with the absolute Hessian, steps cut to a radius that shrinks where a step does not pay.

    Meant to be vmapped over starts and assets. The derivatives are taken forward, which keeps no record of a loop over
    time. An objective that is NaN or infinite at a trial point only shortens the step.

    Args:
      objective: smooth function of few unbounded coordinates, of order 1.
      start: where it is finite.
    """

    def look(point):
        value, gradient, hessian = _derivatives(objective, point)
        step = -_solve_absolute(hessian, gradient)
        return value, step, -0.5 * jnp.dot(gradient, step)

    def is_running(d):
        # Written so that a NaN gain stops the descent.
        return (d.gain > TOLERANCE) & (d.radius > _SMALLEST_RADIUS) & (d.n_iterations < MAX_ITERATIONS)

    def iterate(d):
        length = jnp.sqrt(jnp.sum(d.step**2))
        trial = d.point + d.step * jnp.minimum(1.0, d.radius / jnp.maximum(length, 1e-300))
        value, step, gain = look(trial)
        is_better = (value <= d.value) & jnp.all(jnp.isfinite(step))
        pairs = ((trial, d.point), (value, d.value), (step, d.step), (gain, d.gain))
        point, value, step, gain = (jnp.where(is_better, new, old) for new, old in pairs)
        shorter = 0.25 * jnp.minimum(d.radius, jnp.maximum(length, _SMALLEST_RADIUS))
        radius = jnp.where(is_better, jnp.minimum(2.0 * d.radius, _LARGEST_RADIUS), shorter)
        return _Descent(point, value, step, gain, radius, d.n_iterations + 1)

    # The first turn looks at the start itself, so that the derivatives are compiled once.
    infinite = jnp.full((), jnp.inf, start.dtype)
    radius = jnp.full((), _FIRST_RADIUS, start.dtype)
    first = _Descent(start, infinite, jnp.zeros_like(start), infinite, radius, jnp.zeros((), jnp.int32))
    end = lax.while_loop(is_running, iterate, first)
    return Minimum(end.point, end.value, end.n_iterations, (end.gain <= TOLERANCE) & jnp.isfinite(end.value))


def best_minimum(minima: Minimum) -> Minimum:
    """The lowest of several, which stand along the leading axis."""
    at = jnp.argmin(jnp.where(jnp.isfinite(minima.value), minima.value, jnp.inf))
    return jax.tree.map(lambda leaf: leaf[at], minima)


def information(terms: Callable[[Array], Array], values: Float[Array, " parameters"]) -> Information:
    """Covariances of maximum-likelihood estimates (see the module).

    Args:
      terms: weighted log-likelihood of every observation, 0 where one is missing, at given parameters.
      values: the estimates, in units in which they are of order 1.
    """

    def scores_and_mean(point):
        scores = jax.jacfwd(terms)(point)
        return jnp.sum(scores, axis=0), scores

    hessian, scores = jax.jacfwd(scores_and_mean, has_aux=True)(values)
    eigenvalues, vectors = jnp.linalg.eigh(-0.5 * (hessian + hessian.T))
    is_curved = jnp.all(jnp.isfinite(eigenvalues)) & (eigenvalues[0] > 1e-12 * jnp.abs(eigenvalues[-1]))
    inverse = (vectors / jnp.where(is_curved, eigenvalues, 1.0)[None, :]) @ vectors.T
    # A missing observation has score 0 and counts neither in the mean nor in the spread to first order.
    centred = scores - jnp.mean(scores, axis=0)[None, :]
    return Information(inverse, inverse @ (centred.T @ centred) @ inverse, is_curved)


def reported(
    found: Information, expand: Callable[[Array], Array], values: Float[Array, " parameters"]
) -> tuple[Array, Information]:
    """Estimates and covariances in the units of the report, by the delta method.

    Args:
      found: covariances of `values`.
      expand: from `values` to what is reported.
      values: the estimates.
    """
    slope = jax.jacfwd(expand)(values)

    def push(covariance):
        return jnp.where(found.has_covariance, slope @ covariance @ slope.T, jnp.inf)

    pushed = Information(push(found.hessian_covariance), push(found.sandwich_covariance), found.has_covariance)
    return expand(values), pushed


def choice(field: str, value: str, options: tuple[str, ...]) -> str:
    """An option out of a list.

    Raises:
      InputError: not one of them.
    """
    if value not in options:
        raise InputError(f"{field} is {value!r}: {did_you_mean(str(value), options)}")
    return value


def check_column(name: str, values: Float[np.ndarray, " steps"], at_least: int) -> None:
    """Enough values that vary in one asset's column, NaN where missing.

    Raises:
      InputError: fewer than `at_least` values, or a column that is constant up to rounding.
    """
    seen = values[~np.isnan(values)]
    if seen.size < at_least:
        raise InputError(
            f"returns, column {name!r} has {seen.size} values; the fit needs at least {at_least}: "
            "give a longer history or leave the asset out."
        )
    if np.ptp(seen) <= 1e-12 * np.abs(seen).max():
        raise InputError(
            f"returns, column {name!r} is {seen[0]:g} in every row; a fit needs returns that vary: "
            "check its prices or leave the asset out."
        )


def _derivatives(objective, point):
    def twice(x):
        value = objective(x)
        return value, value

    def gradient_and_rest(x):
        gradient, value = jax.jacfwd(twice, has_aux=True)(x)
        return gradient, (value, gradient)

    hessian, (value, gradient) = jax.jacfwd(gradient_and_rest, has_aux=True)(point)
    return value, gradient, hessian


def _solve_absolute(hessian, gradient):
    eigenvalues, vectors = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
    return vectors @ ((vectors.T @ gradient) / jnp.maximum(jnp.abs(eigenvalues), _SMALLEST_CURVATURE))
