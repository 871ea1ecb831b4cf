"""Which expected return the simulation assumes: historical, shrunk to zero, risk-neutral or the user's own.

Sample means of daily crypto returns have standard errors as large as themselves; a risk figure over 30 days should not
depend on them by accident. So the choice is explicit, and the report names it.
"""

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.types import Array


def historical(mean: Float[Array, "regimes assets"]) -> Float[Array, "regimes assets"]:
    """Mean log-return per step of each regime, as fitted."""
    return mean


def shrunk(mean: Float[Array, "regimes assets"], shrinkage: float) -> Float[Array, "regimes assets"]:
    """Fitted means times (1 - shrinkage); shrinkage 1 assumes no drift of the log-price in any regime."""
    return (1.0 - shrinkage) * mean


def risk_neutral(
    log_mean_exp: Float[Array, "regimes assets"], rate_per_step: Float[Array, ""]
) -> Float[Array, "regimes assets"]:
    r"""Drift that makes the expected simple return equal the rate in every regime: $r - \log E[e^{\varepsilon}]$.

    It exists because the mixing variable is cut (see `shock`).
    """
    return rate_per_step - log_mean_exp


def user(
    expected_per_step: Float[Array, " assets"], log_mean_exp: Float[Array, "regimes assets"]
) -> Float[Array, "regimes assets"]:
    """Drift under which the price of each asset is expected to grow by exp(expected_per_step) in every regime."""
    return jnp.asarray(expected_per_step)[None, :] - log_mean_exp
