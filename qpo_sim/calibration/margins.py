r"""Maximum likelihood of the law of single returns, for all assets at once, and of the tail beyond a threshold.

`fit_margin` takes returns as independent draws of a Student-t, of Hansen's skewed t or of a normal inverse Gaussian
law; `fit_tail` fits a generalised Pareto law to what exceeds a threshold, and `threshold_scan` shows how that fit
depends on the threshold. NaN are left out, asset by asset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Float, Int

from qpo_sim.calibration.inference import (
    Fit,
    Information,
    Minimum,
    best_minimum,
    check_column,
    choice,
    information,
    minimise,
    reported,
)
from qpo_sim.calibration.inputs import MIN_OBSERVATIONS, read_returns
from qpo_sim.errors import InputError
from qpo_sim.types import Array

FAMILIES = {
    "student_t": ("loc", "scale", "dof"),
    "skew_t": ("loc", "scale", "dof", "skew"),
    "nig": ("alpha", "beta", "delta", "mu"),
}
MIN_EXCEEDANCES = 10

_DOF_BOUNDS = {"student_t": (0.2, 500.0), "skew_t": (2.05, 500.0)}
_SMALLEST_SCALE = 1e-6  # in units of the sample's spread; bounds the likelihood of samples with many equal values
_LARGEST_ALPHA = 1e3  # in the same units; the law is normal long before
_SMALLEST_XI = -0.5  # maximum likelihood is regular above it: Smith (1985)
_QUARTILES_OF_NORMAL = 1.3489795003921634
_BESSEL_NODES = 64
_SERIES_BELOW = 1e-3


class _Found(NamedTuple):
    values: Array
    information: Information
    log_likelihood: Array
    minimum: Minimum


@dataclass(frozen=True, eq=False)
class TailFit:
    r"""Generalised Pareto laws of the excesses $y = x - u > 0$, $P(Y > y) = (1 + \xi y / \beta)^{-1/\xi}$, per asset.

    Attributes:
      fit: estimates `xi` (shape, above 0 for a heavy tail) and `beta` (scale, in the data's unit), with covariance.
      threshold: u.
      n_exceedances: values above it.
      n_values: values there are.
    """

    fit: Fit
    threshold: Float[np.ndarray, " assets"]
    n_exceedances: Int[np.ndarray, " assets"]
    n_values: Int[np.ndarray, " assets"]

    def value_at_risk(self, level: float) -> Float[np.ndarray, " assets"]:
        r"""Quantile $u + \frac\beta\xi \left[\left(\frac{1-a}{k/n}\right)^{-\xi} - 1\right]$ of the data at level a.

        McNeil, Frey & Embrechts (2015), eq. (5.18).

        Raises:
          InputError: a level outside the tail, at or below 1 - k/n.
        """
        share = self.n_exceedances / self.n_values
        if not 0.0 < 1.0 - level <= share.min():
            raise InputError(f"level is {level}; it must lie in [{1.0 - share.min():.6g}, 1), where the tail is.")
        log_ratio = -np.log((1.0 - level) / share)
        a = self.fit["xi"] * log_ratio
        growth = np.where(np.abs(a) > 1e-12, np.expm1(a) / np.where(np.abs(a) > 1e-12, a, 1.0), 1.0)
        return self.threshold + self.fit["beta"] * log_ratio * growth

    def expected_shortfall(self, level: float) -> Float[np.ndarray, " assets"]:
        r"""Mean beyond the quantile, $(\mathrm{VaR}_a + \beta - \xi u) / (1 - \xi)$; infinite for $\xi \ge 1$.

        McNeil, Frey & Embrechts (2015), eq. (5.19).

        Raises:
          InputError: as `value_at_risk`.
        """
        xi = self.fit["xi"]
        above = self.value_at_risk(level) + self.fit["beta"] - xi * self.threshold
        return np.where(xi < 1.0, above / np.where(xi < 1.0, 1.0 - xi, 1.0), np.inf)


class ThresholdScan(NamedTuple):
    r"""Tail fits over thresholds; above a good threshold `xi` and `modified_scale` are level and `mean_excess` linear.

    Attributes:
      threshold: $X_{(k+1)}$ for each number k of upper values.
      n_exceedances: values above it, below k where values are equal.
      xi: shape.
      xi_error: its standard error (Hessian).
      modified_scale: $\beta - \xi u$, which does not depend on the threshold within the tail.
      mean_excess: mean of x - u over the exceedances, with slope $\xi / (1 - \xi)$ in u.
      mean_excess_error: its standard error.
      converged: whether the fit did.
    """

    threshold: Float[np.ndarray, "thresholds assets"]
    n_exceedances: Int[np.ndarray, "thresholds assets"]
    xi: Float[np.ndarray, "thresholds assets"]
    xi_error: Float[np.ndarray, "thresholds assets"]
    modified_scale: Float[np.ndarray, "thresholds assets"]
    mean_excess: Float[np.ndarray, "thresholds assets"]
    mean_excess_error: Float[np.ndarray, "thresholds assets"]
    converged: Any


def fit_margin(returns: Any, *, family: Literal["student_t", "skew_t", "nig"] = "student_t") -> Fit:
    r"""Fit the law of every column.

    - `student_t`: `loc`, `scale` (of the t, not the standard deviation) and `dof` in [0.2, 500].
    - `skew_t`: mean `loc`, standard deviation `scale`, `dof` in [2.05, 500] and `skew` in (-1, 1), negative for a
      heavier lower tail; Hansen (1994).
    - `nig`: steepness `alpha`, asymmetry `beta`, scale `delta` and location `mu` of
      $f(x) = \frac{\alpha\delta K_1(\alpha q)}{\pi q} e^{\delta\sqrt{\alpha^2-\beta^2} + \beta(x-\mu)}$,
      $q = \sqrt{\delta^2 + (x-\mu)^2}$; Barndorff-Nielsen (1997).

    Args:
      returns: one row per step, one column per asset, NaN where missing.
      family: the law.

    Raises:
      InputError: another family, returns that cannot be read, fewer than 30 in a column, or one that is constant.
    """
    names = FAMILIES[choice("family", family, tuple(FAMILIES))]
    table = read_returns(returns, 24.0)
    for at, name in enumerate(table.assets):
        check_column(name, table.values[:, at], MIN_OBSERVATIONS)
    lower, center, upper = np.nanquantile(table.values, [0.25, 0.5, 0.75], axis=0)
    scale = (upper - lower) / _QUARTILES_OF_NORMAL
    scale = np.where(scale > 1e-9 * np.nanstd(table.values, axis=0), scale, np.nanstd(table.values, axis=0))
    is_value = ~np.isnan(table.values)
    scaled = np.where(is_value, (table.values - center) / scale, 0.0)
    with jax.enable_x64(True):
        found = jax.device_get(_fit_columns(family, scaled.T, is_value.T.astype(np.float64), center, scale))
    return _as_fit(table.assets, names, found, is_value.sum(axis=0), _margin_bounds(family, found.values, scale))


def fit_tail(losses: Any, *, threshold: Any = None, n_upper: int | None = None, share: float | None = None) -> TailFit:
    """Fit a generalised Pareto law to the upper tail of every column; give -returns for the tail of falls.

    Args:
      losses: one row per step, one column per asset, NaN where missing.
      threshold: what must be exceeded, one number for all assets or one per asset.
      n_upper: instead, how many of the largest values to exceed it (fewer where values are equal).
      share: instead, their share of an asset's values, in (0, 1).

    Raises:
      InputError: not exactly one of the three, one out of range, losses that cannot be read, or fewer than 10
        exceedances of an asset or ones that are all equal.
    """
    table = read_returns(losses, 24.0)
    n_values = (~np.isnan(table.values)).sum(axis=0)
    at = _thresholds(table.values, table.assets, n_values, threshold, n_upper, share)
    excess = _excesses(table.values, table.assets, at)
    found = _fit_excesses(excess)
    counts = (excess > 0.0).sum(axis=0)
    bound = np.stack([found.values[:, 0] < _SMALLEST_XI + 1e-4, np.zeros(len(at), dtype=bool)], axis=1)
    return TailFit(_as_fit(table.assets, ("xi", "beta"), found, counts, bound), at, counts, n_values)


def threshold_scan(losses: Any, n_upper: Sequence[int]) -> ThresholdScan:
    """Tail fits above many thresholds, all in one program: what to look at before a threshold is chosen.

    Args:
      losses: as in `fit_tail`.
      n_upper: numbers of upper values, at least 10 each.

    Raises:
      InputError: as `fit_tail`.
    """
    table = read_returns(losses, 24.0)
    n_values = (~np.isnan(table.values)).sum(axis=0)
    if len(n_upper) == 0:
        raise InputError("n_upper is empty; give at least one number of upper values.")
    at = np.stack([_thresholds(table.values, table.assets, n_values, None, int(k), None) for k in n_upper])
    excess = np.concatenate([_excesses(table.values, table.assets, row) for row in at], axis=1)
    found = _fit_excesses(excess)
    counts = (excess > 0.0).sum(axis=0)
    mean = excess.sum(axis=0) / counts
    spread = np.where(excess > 0.0, excess - mean, 0.0)
    error = np.sqrt((spread**2).sum(axis=0) / (counts - 1.0) / counts)
    xi, beta = found.values.T
    columns = (
        counts,
        xi,
        np.sqrt(found.information.hessian_covariance[:, 0, 0]),
        beta - xi * at.reshape(-1),
        mean,
        error,
        found.minimum.has_converged,
    )
    return ThresholdScan(at, *(column.reshape(at.shape) for column in columns))


def _thresholds(values, assets, n_values, threshold, n_upper, share):
    if sum(option is not None for option in (threshold, n_upper, share)) != 1:
        raise InputError("give exactly one of threshold, n_upper and share; they all say where the tail begins.")
    if threshold is not None:
        at = np.asarray(threshold, dtype=np.float64)
        if at.shape not in ((), (1,), (len(assets),)) or not np.isfinite(at).all():
            raise InputError(f"threshold is {threshold!r}; it must be one finite number, or one per asset.")
        return np.array(np.broadcast_to(at, (len(assets),)))
    if share is not None and not 0.0 < share < 1.0:
        raise InputError(f"share is {share}; it must lie strictly between 0 and 1, e.g. 0.1.")
    at = np.empty(len(assets))
    for column, name in enumerate(assets):
        k = int(n_upper) if n_upper is not None else int(share * n_values[column])
        if not MIN_EXCEEDANCES <= k < n_values[column]:
            raise InputError(
                f"losses, column {name!r}: {k} upper values of {n_values[column]}; a tail needs at least "
                f"{MIN_EXCEEDANCES} of them and a threshold below: give a longer history or another number."
            )
        seen = values[~np.isnan(values[:, column]), column]
        at[column] = np.partition(seen, -k - 1)[-k - 1]
    return at


def _excesses(values, assets, threshold):
    excess = np.where(np.isnan(values), 0.0, np.maximum(np.nan_to_num(values) - threshold, 0.0))
    for column, name in enumerate(assets):
        above = excess[excess[:, column] > 0.0, column]
        if above.size < MIN_EXCEEDANCES:
            raise InputError(
                f"losses, column {name!r} has {above.size} values above the threshold {threshold[column]:g}; a tail "
                f"needs at least {MIN_EXCEEDANCES}: lower it."
            )
        if np.ptp(above) <= 1e-12 * above.max():
            raise InputError(
                f"losses, column {name!r}: all {above.size} values above the threshold {threshold[column]:g} are "
                "equal; a fit needs values that vary: check the data."
            )
    return excess


def _as_fit(assets, names, found, n_observations, is_at_bound):
    return Fit(
        assets=assets,
        names=names,
        values=found.values,
        hessian_covariance=found.information.hessian_covariance,
        sandwich_covariance=found.information.sandwich_covariance,
        has_covariance=found.information.has_covariance,
        is_at_bound=is_at_bound,
        log_likelihood=found.log_likelihood,
        n_parameters=len(names),
        n_observations=n_observations,
        n_iterations=found.minimum.n_iterations,
        converged=found.minimum.has_converged,
    )


def _margin_bounds(family, values, scale):
    bound = np.zeros(values.shape, dtype=bool)
    if family == "nig":
        bound[:, 0] = values[:, 0] * scale > 0.99 * _LARGEST_ALPHA
        bound[:, 1] = np.abs(values[:, 1]) > (1.0 - 1e-6) * values[:, 0]
        bound[:, 2] = values[:, 2] < 2.0 * _SMALLEST_SCALE * scale
        return bound
    low, high = _DOF_BOUNDS[family]
    bound[:, 1] = values[:, 1] < 2.0 * _SMALLEST_SCALE * scale
    bound[:, 2] = (values[:, 2] < low * (1.0 + 1e-4)) | (values[:, 2] > 0.99 * high)
    if family == "skew_t":
        bound[:, 3] = np.abs(values[:, 3]) > 1.0 - 1e-6
    return bound


@partial(jax.jit, static_argnums=0)
def _fit_columns(family, values, weight, center, scale):
    def one(values, weight, center, scale):
        starts = jnp.asarray(_STARTS[family])
        return _climb(
            lambda core: weight * _DENSITIES[family](core, values),
            partial(_core, family),
            partial(_expand, family, center=center, scale=scale),
            starts,
            jnp.sum(weight),
            scale,
        )

    return jax.vmap(one)(values, weight, center, scale)


def _fit_excesses(excess):
    scale = excess.sum(axis=0) / (excess > 0.0).sum(axis=0)
    with jax.enable_x64(True):
        return jax.device_get(_fit_pareto((excess / scale).T, scale))


@jax.jit
def _fit_pareto(excess, scale):
    def one(excess, scale):
        weight = (excess > 0.0).astype(excess.dtype)
        starts = jnp.array([[np.log(xi - _SMALLEST_XI), np.log(max(1.0 - xi, 0.2))] for xi in (0.05, 0.3, 0.8)])
        return _climb(
            lambda core: jnp.where(weight > 0.0, _pareto(core, excess), 0.0),
            lambda point: jnp.stack([_SMALLEST_XI + jnp.exp(point[0]), jnp.exp(point[1])]),
            lambda core: jnp.stack([core[0], core[1] * scale]),
            starts,
            jnp.sum(weight),
            scale,
        )

    return jax.vmap(one)(excess, scale)


def _climb(terms, to_core, expand, starts, n, scale):
    def objective(point):
        return -jnp.sum(terms(to_core(point))) / n

    minimum = best_minimum(jax.vmap(partial(minimise, objective))(starts))
    core = to_core(minimum.point)
    values, found = reported(information(terms, core), expand, core)
    return _Found(values, found, -n * (minimum.value + jnp.log(scale)), minimum)


def _core(family, point):
    """From unbounded coordinates to parameters in units of the sample's spread, about its median."""
    if family == "nig":
        alpha = _LARGEST_ALPHA * jax.nn.sigmoid(point[0])
        return jnp.stack([alpha, alpha * jnp.tanh(point[1]), _SMALLEST_SCALE + jnp.exp(point[2]), point[3]])
    low, high = _DOF_BOUNDS[family]
    dof = 1.0 / (1.0 / high + (1.0 / low - 1.0 / high) * jax.nn.sigmoid(point[2]))
    parts = [point[0], _SMALLEST_SCALE + jnp.exp(point[1]), dof]
    return jnp.stack(parts if family == "student_t" else [*parts, jnp.tanh(point[3])])


def _expand(family, core, center, scale):
    if family == "nig":
        return jnp.stack([core[0] / scale, core[1] / scale, core[2] * scale, center + core[3] * scale])
    return jnp.concatenate([jnp.stack([center + core[0] * scale, core[1] * scale]), core[2:]])


def _student_t(core, x):
    loc, scale, dof = core
    constant = gammaln(0.5 * (dof + 1.0)) - gammaln(0.5 * dof) - 0.5 * jnp.log(np.pi * dof)
    return constant - jnp.log(scale) - 0.5 * (dof + 1.0) * jnp.log1p(((x - loc) / scale) ** 2 / dof)


def _skew_t(core, x):
    mean, deviation, dof, skew = core
    log_c = gammaln(0.5 * (dof + 1.0)) - gammaln(0.5 * dof) - 0.5 * jnp.log(np.pi * (dof - 2.0))
    a = 4.0 * skew * jnp.exp(log_c) * (dof - 2.0) / (dof - 1.0)
    b = jnp.sqrt(1.0 + 3.0 * skew**2 - a**2)
    y = b * (x - mean) / deviation + a
    half = jnp.where(y < 0.0, 1.0 - skew, 1.0 + skew)
    return log_c + jnp.log(b / deviation) - 0.5 * (dof + 1.0) * jnp.log1p((y / half) ** 2 / (dof - 2.0))


def _nig(core, x):
    alpha, beta, delta, mu = core
    q = jnp.sqrt(delta**2 + (x - mu) ** 2)
    slope = jnp.sqrt((alpha - beta) * (alpha + beta))
    # Both exponents are large for a nearly normal law; their difference is taken in a form without cancellation.
    decay = alpha * (delta - q) - delta * beta**2 / (alpha + slope)
    return jnp.log(alpha * delta / np.pi) - jnp.log(q) + _log_bessel(alpha * q) + decay + beta * (x - mu)


def _log_bessel(z):
    r"""$\ln(e^z K_1(z))$ from $\int_0^\infty e^{-z(\cosh t - 1)} \cosh t\,dt$.

    The trapezoidal rule converges exponentially for this even analytic integrand, which is below e^-40 beyond the last
    node. The nodes follow z, but the integral does not depend on them, so they carry no derivative.
    """
    width = 2.0 * jnp.arcsinh(jnp.sqrt(20.0 / lax.stop_gradient(z)))
    weight = np.ones(_BESSEL_NODES)
    weight[0] = 0.5
    t = width[:, None] * (np.arange(_BESSEL_NODES) / (_BESSEL_NODES - 1.0))[None, :]
    rise = 2.0 * jnp.sinh(0.5 * t) ** 2
    total = jnp.sum(weight[None, :] * jnp.exp(-z[:, None] * rise) * (1.0 + rise), axis=1)
    return jnp.log(total * width / (_BESSEL_NODES - 1.0))


def _pareto(core, excess):
    xi, beta = core
    y = excess / beta
    a = xi * y
    is_inside, is_small = 1.0 + a > 0.0, jnp.abs(a) < _SERIES_BELOW
    near = jnp.where(is_small, a, 0.0)
    far = jnp.where(is_inside & ~is_small, a, 1.0)
    series = 1.0 - near * (1.0 / 2.0 - near * (1.0 / 3.0 - near * (1.0 / 4.0 - near * (1.0 / 5.0 - near / 6.0))))
    ratio = jnp.where(is_small, series, jnp.log1p(far) / far)
    return jnp.where(is_inside, -jnp.log(beta) - (1.0 + xi) * y * ratio, -jnp.inf)


def _inverse_share(family, dof):
    low, high = _DOF_BOUNDS[family]
    share = (1.0 / dof - 1.0 / high) / (1.0 / low - 1.0 / high)
    return np.log(share / (1.0 - share))


_DENSITIES = {"student_t": _student_t, "skew_t": _skew_t, "nig": _nig}
_STARTS = {
    "student_t": np.array([[0.0, -0.1, _inverse_share("student_t", dof)] for dof in (3.0, 10.0)]),
    "skew_t": np.array(
        [[0.0, 0.2, _inverse_share("skew_t", dof), skew] for dof in (4.0, 12.0) for skew in (-0.05, 0.05)]
    ),
    "nig": np.array([[np.log(a / _LARGEST_ALPHA), 0.0, np.log(a), 0.0] for a in (0.7, 2.0)]),
}
