"""Markets ready to use: built from a fit, from moments, or as the plain diffusion that serves as control."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qpo_sim.errors import InputError
from qpo_sim.market import drift as drift_choice
from qpo_sim.market import shock
from qpo_sim.market.model import Market
from qpo_sim.numerics import rounded
from qpo_sim.types import HOURS_PER_YEAR, Array

DRIFTS = ("historical", "shrunk", "risk_neutral", "user")


def regime_student_t(
    fit: Any,
    *,
    drift: str = "shrunk",
    shrinkage: float = 1.0,
    per_year: float | Mapping[str, float] | Sequence[float] = 0.0,
    rate_per_year: float = 0.0,
    mixing_cut: float = shock.MIXING_CUT,
    dtype: Any = jnp.float32,
) -> Market:
    r"""Market of a fitted regime model (see `calibration`): starts from the filtered law of the last day.

    The fit's Student-t scale matrices S give the covariance $S\,\nu/(\nu-2)$.

    Args:
      fit: anything with the attributes of `calibration.RegimeFit`.
      drift: historical, shrunk (by `shrinkage`), risk_neutral (at `rate_per_year`) or user (expected growth of the
        price, `per_year`, one number or one per asset).
      shrinkage: share of the fitted mean that is taken away, 1 = no drift of the log-price.
      per_year: expected log growth of the price per year for drift "user".
      rate_per_year: continuously compounded rate for drift "risk_neutral".
      mixing_cut: far quantile of the mixing variable (see `shock`).
      dtype: precision of the paths.

    Raises:
      InputError: unknown drift, a dof not above 2, or a shrinkage outside [0, 1].
    """
    # Infinite dof is a Gaussian regime; a million is the same to float32 and keeps the formulas finite.
    dof = np.minimum(np.asarray(fit.dof, np.float64), 1e6)
    if not np.all(dof > 2.0):
        raise InputError(f"dof must exceed 2 in every regime for the variance to exist, got {dof.tolist()}.")
    covariance = np.asarray(fit.scale, np.float64) * (dof / (dof - 2.0))[:, None, None]
    return _build(
        fit.assets,
        fit.initial,
        fit.transition,
        fit.mean,
        covariance,
        dof,
        fit.step_hours,
        drift=drift,
        shrinkage=shrinkage,
        per_year=per_year,
        rate_per_year=rate_per_year,
        mixing_cut=mixing_cut,
        dtype=dtype,
    )


def gbm(
    assets: Sequence[str],
    volatility_per_year: Sequence[float],
    correlation: Any = None,
    *,
    step_hours: float = 24.0,
    mean_per_year: Sequence[float] | float = 0.0,
    drift: str = "user",
    shrinkage: float = 1.0,
    per_year: float | Mapping[str, float] | Sequence[float] = 0.0,
    rate_per_year: float = 0.0,
    dtype: Any = jnp.float32,
) -> Market:
    r"""Correlated geometric Brownian motions, the control model: one regime, Gaussian shocks.

    Args:
      assets: names.
      volatility_per_year: standard deviation of the log-return per year (365 days).
      correlation: correlation matrix, identity when omitted.
      step_hours: length of the base step.
      mean_per_year: mean log-return per year, used by drift "historical" and "shrunk".
      drift: as in `regime_student_t`; "user" makes E[S_t] = S_0 exp(per_year t).
      shrinkage: as in `regime_student_t`.
      per_year: as in `regime_student_t`.
      rate_per_year: as in `regime_student_t`.
      dtype: precision of the paths.
    """
    n = len(assets)
    years = step_hours / HOURS_PER_YEAR
    volatility = np.broadcast_to(np.asarray(volatility_per_year, np.float64), (n,)) * np.sqrt(years)
    correlation = np.eye(n) if correlation is None else np.asarray(correlation, np.float64)
    covariance = (volatility[:, None] * correlation * volatility[None, :])[None]
    mean = np.broadcast_to(np.asarray(mean_per_year, np.float64) * years, (n,))[None]
    return _build(
        assets,
        np.ones(1),
        np.ones((1, 1)),
        mean,
        covariance,
        None,
        step_hours,
        drift=drift,
        shrinkage=shrinkage,
        per_year=per_year,
        rate_per_year=rate_per_year,
        mixing_cut=0.0,
        dtype=dtype,
    )


def _build(
    assets,
    initial,
    transition,
    mean,
    covariance,
    dof,
    step_hours,
    *,
    drift,
    shrinkage,
    per_year,
    rate_per_year,
    mixing_cut,
    dtype,
) -> Market:
    assets = tuple(assets)
    volatility = np.sqrt(np.einsum("kii->ki", covariance))
    if not np.all(volatility > 0.0):
        raise InputError(f"volatility must be positive for every asset, got {volatility.tolist()}.")
    try:
        cholesky = np.linalg.cholesky(covariance / volatility[:, :, None] / volatility[:, None, :])
    except np.linalg.LinAlgError as error:
        raise InputError("the correlation matrix of each regime must be positive definite; repair it first.") from error
    if drift not in DRIFTS:
        raise InputError(f"market.drift.kind is {drift!r}; it must be one of {', '.join(DRIFTS)}.")
    if not 0.0 <= shrinkage <= 1.0:
        raise InputError(f"market.drift.shrinkage is {shrinkage}; it must lie in [0, 1] (1 takes the whole mean away).")
    years = step_hours / HOURS_PER_YEAR
    mean = np.asarray(mean, np.float64)
    if drift == "historical":
        step_drift = drift_choice.historical(mean)
    elif drift == "shrunk":
        step_drift = drift_choice.shrunk(mean, shrinkage)
    else:
        correction = _log_mean_exp(volatility**2, dof, mixing_cut)
        if drift == "risk_neutral":
            step_drift = drift_choice.risk_neutral(correction, rate_per_year * years)
        else:
            step_drift = drift_choice.user(per_asset(per_year, assets) * years, correction)

    def cast(x: Any) -> Array:
        return rounded(x, dtype)

    return Market(
        initial=cast(initial),
        transition=cast(transition),
        drift=cast(step_drift),
        volatility=cast(volatility),
        correlation_cholesky=cast(cholesky),
        dof=None if dof is None else cast(dof),
        assets=assets,
        step_hours=float(step_hours),
        mixing_cut=float(mixing_cut),
    )


def _log_mean_exp(variance: np.ndarray, dof: np.ndarray | None, cut: float) -> np.ndarray:
    if dof is None:
        return 0.5 * variance
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(float))
    floor = jnp.asarray(shock.score_floor(cut), dtype)
    # At trace time the market is a constant: nothing here is differentiated (change `Market.drift` for that).
    coefficients = lax.stop_gradient(shock.mixing_coefficients(jnp.asarray(dof, dtype)))
    return np.asarray(shock.log_mean_exp(jnp.asarray(variance, dtype), coefficients, floor), np.float64)


def per_asset(per_year: Any, assets: tuple[str, ...]) -> np.ndarray:
    """Growth per year of each asset, from one number or a table by asset (0 for those it does not name)."""
    if isinstance(per_year, Mapping):
        unknown = sorted(set(per_year) - set(assets))
        if unknown:
            raise InputError(
                f"market.drift.per_year names {unknown[0]!r}, which is not among the assets {', '.join(assets)}."
            )
        return np.array([float(per_year.get(asset, 0.0)) for asset in assets])
    return np.broadcast_to(np.asarray(per_year, np.float64), (len(assets),))
