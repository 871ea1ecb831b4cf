"""Shocks of one step of a Levy process in its own parameters, with the mean and volatility that go with them.

A Levy step has a volatility of its own, so it is for code: a described market takes `mixture.nig` and
`mixture.variance_gamma`.
"""

from typing import Any, NamedTuple

import numpy as np

from qpo_sim.errors import InputError
from qpo_sim.market.dependence.mixture import Mixture, nig, variance_gamma
from qpo_sim.types import HOURS_PER_YEAR


class LevyStep(NamedTuple):
    """Increment of a Levy process over one base step: mean + volatility * shock.

    Attributes:
      shock: the standardised shocks.
      mean: mean of the increment, by asset.
      volatility: its standard deviation, by asset.
    """

    shock: Mixture
    mean: np.ndarray
    volatility: np.ndarray


def nig_levy(
    alpha: Any, beta: Any, delta_per_year: Any, correlation: Any = None, *, step_hours: float = 24.0, **options: Any
) -> LevyStep:
    r"""One step of an NIG Levy process in its own parameters (without the location mu).

    X over T years is NIG(alpha, beta, delta T): with $\gamma = \sqrt{\alpha^2-\beta^2}$ the mean is
    $\delta T\beta/\gamma$, the variance $\delta T\alpha^2/\gamma^3$. Barndorff-Nielsen (1997).

    Args:
      alpha: steepness, > abs(beta); one number or one per asset.
      beta: asymmetry, negative = heavier lower tail.
      delta_per_year: scale per year, > 0.
      correlation: of the Gaussian part, identity when omitted.
      step_hours: length of the base step.
      options: `mixing`, `groups`, `dtype` of `nig`. Shared mixing needs the same delta gamma for all assets.
    """
    alpha, beta, delta = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(x, float)) for x in (alpha, beta, delta_per_year))
    )
    if not np.all(np.abs(beta) < alpha):
        raise InputError(f"alpha is {alpha.tolist()} and beta {beta.tolist()}; alpha must exceed the size of beta.")
    if not np.all(delta > 0.0):
        raise InputError(f"delta_per_year is {delta.tolist()}; it must be positive.")
    delta = delta * step_hours / HOURS_PER_YEAR
    gamma = np.sqrt(alpha**2 - beta**2)
    shape = _levy_shape("delta_per_year sqrt(alpha^2 - beta^2)", delta * gamma, options)
    shock = nig(shape, beta * np.sqrt(delta / gamma), _eye(correlation, alpha.size), **options)
    return LevyStep(shock, delta * beta / gamma, np.sqrt(delta * alpha**2 / gamma**3))


def variance_gamma_levy(
    sigma_per_year: Any,
    theta_per_year: Any,
    nu: Any,
    correlation: Any = None,
    *,
    step_hours: float = 24.0,
    **options: Any,
) -> LevyStep:
    r"""One step of a variance gamma process in its own parameters: $\theta G + \sigma W(G)$, G a gamma clock.

    The clock has mean T and variance nu T over T years. Madan, Carr & Chang (1998).

    Args:
      sigma_per_year: volatility of the Brownian motion, > 0; one number or one per asset.
      theta_per_year: its drift, negative = heavier lower tail.
      nu: variance of the clock per year, in years, > 0. The step must be long against it: step / nu >= 0.1.
      correlation: of the Gaussian part, identity when omitted.
      step_hours: length of the base step.
      options: `mixing`, `groups`, `dtype` of `variance_gamma`. Shared mixing needs one nu.
    """
    sigma, theta, nu = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(x, float)) for x in (sigma_per_year, theta_per_year, nu))
    )
    if not (np.all(sigma > 0.0) and np.all(nu > 0.0)):
        raise InputError(f"sigma_per_year is {sigma.tolist()} and nu {nu.tolist()}; both must be positive.")
    years = step_hours / HOURS_PER_YEAR
    shape = _levy_shape("nu", years / nu, options)
    shock = variance_gamma(shape, theta * np.sqrt(years) / sigma, _eye(correlation, sigma.size), **options)
    return LevyStep(shock, theta * years, np.sqrt((sigma**2 + theta**2 * nu) * years))


def _levy_shape(name: str, shape: np.ndarray, options: dict[str, Any]) -> Any:
    if options.get("mixing", "shared") != "shared":
        return shape
    if not np.allclose(shape, shape[0], rtol=1e-9):
        raise InputError(f"{name} differs between assets; shared mixing needs one. Use mixing='grouped' or 'asset'.")
    return float(shape[0])


def _eye(correlation: Any, n: int) -> Any:
    return np.eye(n) if correlation is None else correlation
