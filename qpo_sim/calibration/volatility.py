r"""Quasi-maximum likelihood of conditional variances, for all assets at once: GARCH, GJR, TARCH, EGARCH and EWMA.

Per asset, with $e_t = r_t - \mu$ and $z_t = e_t/\sqrt{h_t}$,

- `garch`, `gjr`: $h_{t+1} = \omega + (\alpha + \gamma 1(e_t<0)) e_t^2 + \beta h_t$ (gamma = 0 in `garch`);
- `tarch`: $s_{t+1} = \omega + (\alpha + \gamma 1(e_t<0)) |e_t| + \beta s_t$ with $s_t = \sqrt{h_t}$ (also ZARCH);
- `egarch`: $\ln h_{t+1} = \omega + \alpha (|z_t| - \sqrt{2/\pi}) + \gamma z_t + \beta \ln h_t$;
- `ewma`: $h_{t+1} = (1 - \lambda) e_t^2 + \lambda h_t$.

A missing return puts its expectation given the past in the place of the news, so the variance goes on as forecast; rows
before an asset's first return are left out. Bollerslev (1986); Glosten, Jagannathan & Runkle (1993); Zakoian (1994);
Nelson (1991); RiskMetrics (1996). Parameter conventions and the start are those of the arch package.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Float

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
from qpo_sim.calibration.inputs import read_returns
from qpo_sim.errors import InputError
from qpo_sim.types import Array

MODELS = ("garch", "gjr", "tarch", "egarch", "ewma")
MIN_OBSERVATIONS = 100
SEED_STEPS = 25  # squares whose mean starts an EWMA with a given decay

# The start is a weighted mean of the first news, as in the arch package.
_BACKCAST_DECAY = 0.94
_BACKCAST_STEPS = 75
_MEAN_ABSOLUTE = float(np.sqrt(2.0 / np.pi))
_LOG_TWO_PI = float(np.log(2.0 * np.pi))
_DOF_BOUNDS = (2.05, 500.0)
_LARGEST_LOG = 50.0  # of a variance, in units of the sample's
_AT_BOUND = 1e-6
_N_CLIMBS = 2
_UNROLL = 1


@dataclass(frozen=True)
class _Model:
    """What picks the program: recursion, density, mean and the set of allowed parameters."""

    kind: str
    innovation: str
    mean: str
    persistence: str

    @property
    def has_mean(self) -> bool:
        return self.mean == "constant"

    @property
    def has_dof(self) -> bool:
        return self.innovation == "student_t"

    @property
    def dynamics(self) -> tuple[str, ...]:
        """Parameters of the recursion."""
        if self.kind == "ewma":
            return ("decay",)
        return ("omega", "alpha", "beta") if self.kind == "garch" else ("omega", "alpha", "gamma", "beta")

    @property
    def names(self) -> tuple[str, ...]:
        return ("mean",) * self.has_mean + self.dynamics + ("dof",) * self.has_dof

    @property
    def n_parameters(self) -> int:
        return len(self.names) - self.is_integrated

    @property
    def is_integrated(self) -> bool:
        return self.persistence == "integrated" and self.kind in ("garch", "gjr", "tarch")


class _Data(NamedTuple):
    """One asset's returns in units of their standard deviation, 0 where missing."""

    values: Array
    is_value: Array
    has_started: Array
    weight: Array
    first: Array
    center: Array


class _Found(NamedTuple):
    values: Array
    information: Information
    log_likelihood: Array
    variance: Array
    next_variance: Array
    minimum: Minimum


@dataclass(frozen=True, eq=False)
class VolatilityFit:
    """Fitted conditional variances of several assets, per step and in the square of the returns' unit.

    Attributes:
      model: `garch`, `gjr`, `tarch`, `egarch` or `ewma`.
      innovation: `normal` or `student_t`.
      fit: estimates with their covariance; parameters `mean`, `omega`, `alpha`, `gamma`, `beta` or `decay`, `dof`,
        those that the model has.
      variance: variance of every step given the returns before it; the first one of an asset before its first return.
      next_variance: variance of the step after the record, from which a simulation starts.
    """

    model: str
    innovation: str
    fit: Fit
    variance: Float[np.ndarray, "steps assets"]
    next_variance: Float[np.ndarray, " assets"]

    def market_options(self) -> dict[str, np.ndarray]:
        """Arguments of the market's builder of the same name (`garch` for `gjr`), one number per asset.

        Raises:
          InputError: `tarch`, which the market does not have.
        """
        if self.model == "tarch":
            raise InputError("model 'tarch' has no counterpart in the market; fit 'gjr' or 'egarch' to simulate.")
        names = [name for name in self.fit.names if name not in ("mean", "dof")]
        return {name: self.fit[name] for name in names} | {"initial_variance": self.next_variance}

    def dof(self) -> Float[np.ndarray, " assets"]:
        """Degrees of freedom of the standardised innovations; infinite for normal ones."""
        return self.fit["dof"] if "dof" in self.fit.names else np.full(len(self.fit.assets), np.inf)

    def persistence(self) -> Float[np.ndarray, " assets"]:
        r"""$\alpha + \gamma/2 + \beta$; $\beta$ for `egarch` and 1 for `ewma`."""
        if self.model == "ewma":
            return np.ones(len(self.fit.assets))
        if self.model == "egarch":
            return self.fit["beta"]
        gamma = self.fit["gamma"] if "gamma" in self.fit.names else 0.0
        return self.fit["alpha"] + 0.5 * gamma + self.fit["beta"]


class Ewma(NamedTuple):
    """Exponentially weighted second moments of returns about zero.

    Attributes:
      assets: names.
      variance: before each step.
      covariance: after the last step, from which a simulation starts.
    """

    assets: tuple[str, ...]
    variance: Float[np.ndarray, "steps assets"]
    covariance: Float[np.ndarray, "assets assets"]

    def correlation(self) -> Float[np.ndarray, "assets assets"]:
        """Correlation after the last step."""
        deviation = np.sqrt(np.diagonal(self.covariance))
        return self.covariance / (deviation[:, None] * deviation[None, :])


def fit_volatility(
    returns: Any,
    *,
    model: Literal["garch", "gjr", "tarch", "egarch", "ewma"] = "garch",
    innovation: Literal["normal", "student_t"] = "normal",
    mean: Literal["constant", "zero"] = "constant",
    persistence: Literal["stationary", "integrated", "free"] = "stationary",
    initial: Literal["backcast", "sample"] = "backcast",
    half_life: float | None = None,
) -> VolatilityFit:
    r"""Fit a conditional variance to every column.

    Newton's method from the best two of a grid of starts, all assets in one program, in float64.

    Args:
      returns: log-returns, one row per step, oldest first, one column per asset, NaN where missing.
      model: the recursion (see the module).
      innovation: density of the standardised return; Student-t is scaled to variance 1, with dof in [2.05, 500].
      mean: whether the mean return is estimated or 0.
      persistence: `stationary` keeps $\alpha + \gamma/2 + \beta$ below 1 (for `tarch` too, as the arch package does;
        $|\beta| < 1$ for `egarch`), `integrated` sets it to 1 (not for `egarch`), `free` leaves it alone but keeps
        $\beta < 1$; `ewma` is always integrated.
      initial: level before the first return. `backcast`: mean of the first 75 squares of returns less their sample
        mean (absolute values for `tarch`) with weights proportional to 0.94^t, the arch package's. `sample`: plain mean
        of all of them.
      half_life: steps after which a return counts half; None weighs all alike. The weights have mean 1.

    Raises:
      InputError: an unknown option, returns that cannot be read, fewer than 100 in a column, or one that is constant.
    """
    chosen = _Model(
        choice("model", model, MODELS),
        choice("innovation", innovation, ("normal", "student_t")),
        choice("mean", mean, ("constant", "zero")),
        choice("persistence", persistence, ("stationary", "integrated", "free")),
    )
    if chosen.persistence == "integrated" and chosen.kind == "egarch":
        raise InputError("persistence is 'integrated' for model 'egarch'; choose stationary or free.")
    table = read_returns(returns, 24.0)
    for at, name in enumerate(table.assets):
        check_column(name, table.values[:, at], MIN_OBSERVATIONS)
    data, scale = _prepare(table.values, chosen, choice("initial", initial, ("backcast", "sample")), half_life)
    with jax.enable_x64(True):
        found = jax.device_get(_fit_assets(chosen, data, scale))
    fit = Fit(
        assets=table.assets,
        names=chosen.names,
        values=found.values,
        hessian_covariance=found.information.hessian_covariance,
        sandwich_covariance=found.information.sandwich_covariance,
        has_covariance=found.information.has_covariance,
        is_at_bound=_is_at_bound(chosen, found.values, scale),
        log_likelihood=found.log_likelihood,
        n_parameters=chosen.n_parameters,
        n_observations=(~np.isnan(table.values)).sum(axis=0),
        n_iterations=found.minimum.n_iterations,
        converged=found.minimum.has_converged,
    )
    return VolatilityFit(model, innovation, fit, found.variance.T, found.next_variance)


def ewma(returns: Any, *, decay: float = 0.94, seed_steps: int = SEED_STEPS) -> Ewma:
    r"""Covariance $S_{t+1} = \lambda S_t + (1 - \lambda) r_t r_t^\top$ at a given decay; RiskMetrics (1996).

    It starts, before the first row, at the mean of the products of the first `seed_steps` rows that have them. A
    product with a missing return leaves its entry as it is, after which S need not be positive definite.

    Args:
      returns: as in `fit_volatility`; about zero, no mean is taken off.
      decay: $\lambda$ in (0, 1) per step; its half-life is log(1/2) / log(decay).
      seed_steps: products in the start, at least 1.

    Raises:
      InputError: a decay or number out of range, returns that cannot be read, a column that is too short or constant,
        or two assets without a common row.
    """
    if not 0.0 < decay < 1.0:
        raise InputError(f"decay is {decay}; it must lie strictly between 0 and 1, e.g. 0.94 for daily returns.")
    if seed_steps < 1:
        raise InputError(f"seed_steps is {seed_steps}; it must be at least 1.")
    table = read_returns(returns, 24.0)
    for at, name in enumerate(table.assets):
        check_column(name, table.values[:, at], 2)
    present = (~np.isnan(table.values)).astype(np.float64)
    common = present.T @ present
    if (common == 0.0).any():
        i, j = np.argwhere(common == 0.0)[0]
        raise InputError(
            f"returns, columns {table.assets[i]!r} and {table.assets[j]!r} have no row in common, so no covariance; "
            "leave one of them out."
        )
    covariance = _seed(table.values, int(seed_steps))
    variance = np.empty_like(table.values)
    for t, row in enumerate(table.values):
        variance[t] = np.diagonal(covariance)
        product = row[:, None] * row[None, :]
        covariance = np.where(np.isnan(product), covariance, decay * covariance + (1.0 - decay) * product)
    return Ewma(table.assets, variance, covariance)


def _seed(values, seed_steps):
    n_assets = values.shape[1]
    start = np.empty((n_assets, n_assets))
    for i in range(n_assets):
        for j in range(i + 1):
            product = values[:, i] * values[:, j]
            start[i, j] = start[j, i] = product[~np.isnan(product)][:seed_steps].mean()
    return start


def _prepare(values, model, initial, half_life):
    n_steps, n_assets = values.shape
    is_value = ~np.isnan(values)
    center = np.nanmean(values, axis=0) if model.has_mean else np.zeros(n_assets)
    scale = np.sqrt(np.nanmean((values - center) ** 2, axis=0))
    scaled, center = values / scale, center / scale

    weight = is_value.astype(np.float64)
    if half_life is not None:
        if not 0.0 < half_life < np.inf:
            raise InputError(
                f"half_life is {half_life}; it must be a positive number of steps, or None for no weights."
            )
        weight *= 0.5 ** (np.arange(n_steps)[::-1, None] / half_life)
        weight *= is_value.sum(axis=0) / weight.sum(axis=0)

    power = 1.0 if model.kind == "tarch" else 2.0
    first = np.empty(n_assets)
    for at in range(n_assets):
        news = np.abs(scaled[is_value[:, at], at] - center[at]) ** power
        if initial == "backcast":
            news = news[:_BACKCAST_STEPS]
            first[at] = np.average(news, weights=_BACKCAST_DECAY ** np.arange(len(news)))
        else:
            first[at] = news.mean()
    # A record that opens with unchanged prices has no level of its own; the sample's is 1.
    first = np.maximum(first, 1e-8)
    data = _Data(
        values=np.where(is_value, scaled, 0.0).T,
        is_value=is_value.T.astype(np.float64),
        has_started=np.maximum.accumulate(is_value, axis=0).T,
        weight=weight.T,
        first=first,
        center=center,
    )
    return data, scale


def _is_at_bound(model, values, scale):
    at = {name: values[:, k] for k, name in enumerate(model.names)}
    bound = {name: np.zeros(len(scale), dtype=bool) for name in model.names}
    if model.has_dof:
        low, high = _DOF_BOUNDS
        bound["dof"] = (at["dof"] < low * (1.0 + 1e-4)) | (at["dof"] > high * (1.0 - 1e-2))
    if model.kind == "ewma":
        bound["decay"] = (at["decay"] < _AT_BOUND) | (at["decay"] > 1.0 - _AT_BOUND)
    elif model.kind == "egarch":
        bound["beta"] = np.abs(at["beta"]) > 1.0 - _AT_BOUND
    else:
        gamma = at.get("gamma", np.zeros(len(scale)))
        is_integrated = (at["alpha"] + 0.5 * gamma + at["beta"] > 1.0 - _AT_BOUND) & (model.persistence == "stationary")
        bound["omega"] = at["omega"] < _AT_BOUND * scale ** (1.0 if model.kind == "tarch" else 2.0)
        bound["alpha"] = at["alpha"] < _AT_BOUND
        bound["beta"] = (at["beta"] < _AT_BOUND) | (at["beta"] > 1.0 - _AT_BOUND) | is_integrated
        if "gamma" in at:
            bound["gamma"] = at["alpha"] + gamma < _AT_BOUND
    return np.stack([bound[name] for name in model.names], axis=1)


@partial(jax.jit, static_argnums=0)
def _fit_assets(model, data, scale):
    return jax.vmap(partial(_fit_one, model))(data, scale)


def _fit_one(model, data, scale):
    n = jnp.sum(data.is_value)

    def objective(point):
        return -jnp.sum(_terms(model, _core(model, point), data)) / n

    grid = _starts(model, data)
    heights = jax.vmap(objective)(grid)
    best = jnp.argsort(jnp.where(jnp.isfinite(heights), heights, jnp.inf))[:_N_CLIMBS]
    minimum = best_minimum(jax.vmap(partial(minimise, objective))(grid[best]))

    core = _core(model, minimum.point)
    values, found = reported(
        information(lambda x: _terms(model, x, data), core), partial(_expand, model, scale=scale), core
    )
    path, last = _variances(model, _named(model, core), data)
    log_likelihood = -n * minimum.value - jnp.sum(data.weight) * jnp.log(scale)
    return _Found(values, found, log_likelihood, path * scale**2, last * scale**2, minimum)


def _starts(model, data):
    """Starts in unbounded coordinates; a grid of news and persistence whose stationary variance is the sample's, 1."""
    if model.kind == "ewma":
        dynamics = [[_logit(decay)] for decay in (0.8, 0.94, 0.98)]
    elif model.kind == "egarch":
        beta = (lambda b: np.arctanh(b)) if model.persistence != "free" else (lambda b: b)
        dynamics = [
            [0.0, alpha, gamma, beta(b)]
            for alpha in (0.05, 0.1, 0.2)
            for gamma in (-0.1, 0.0)
            for b in (0.7, 0.9, 0.98)
        ]
    else:
        dynamics = [
            _linear_start(model, alpha, gamma, total)
            for alpha in (0.02, 0.06, 0.12, 0.2)
            for gamma in ((0.0,) if model.kind == "garch" else (0.01, 0.1))
            for total in (0.6, 0.9, 0.98)
        ]
    n = len(dynamics)
    columns = [data.center * jnp.ones((n, 1))] if model.has_mean else []
    columns.append(jnp.asarray(np.array(dynamics, dtype=np.float64)))
    if model.has_dof:
        columns.append(jnp.full((n, 1), _logit(_inverse_share(6.0))))
    return jnp.concatenate(columns, axis=1)


def _linear_start(model, alpha, gamma, total):
    beta = total - alpha - 0.5 * gamma
    omega = 1.0 - total
    if model.kind == "tarch":
        omega = max(1.0 - (alpha + 0.5 * gamma) * _MEAN_ABSOLUTE - beta, 1e-3)
    news = [alpha] if model.kind == "garch" else [0.5 * alpha, 0.5 * (alpha + gamma)]
    if model.persistence == "stationary":
        tail = [np.log(share / (1.0 - total)) for share in (*news, beta)]
    elif model.persistence == "integrated":
        tail = [np.log(share / beta) for share in news]
    else:
        tail = [*np.log(news), _logit(beta)]
    return [np.log(omega), *tail]


def _core(model, point):
    """From unbounded coordinates to independent parameters in units of the sample's standard deviation.

    In a stationary linear recursion the halves of the news on either side, beta and the slack to 1 are shares by
    softmax; in an integrated one there is no slack, and beta follows from the rest.
    """
    head, tail = int(model.has_mean), len(point) - int(model.has_dof)
    parts, dynamics = [point[:head]], point[head:tail]
    if model.kind == "ewma":
        parts.append(jax.nn.sigmoid(dynamics))
    elif model.kind == "egarch":
        parts += [dynamics[:3], dynamics[3:] if model.persistence == "free" else jnp.tanh(dynamics[3:])]
    else:
        parts += [jnp.exp(dynamics[:1]), _shares(model, dynamics[1:])]
    if model.has_dof:
        low, high = _DOF_BOUNDS
        parts.append(1.0 / (1.0 / high + (1.0 / low - 1.0 / high) * jax.nn.sigmoid(point[tail:])))
    return jnp.concatenate(parts)


def _shares(model, logits):
    n_news = 1 if model.kind == "garch" else 2
    if model.persistence == "free":
        news, beta = jnp.exp(logits[:n_news]), jax.nn.sigmoid(logits[n_news:])
    else:
        shares = jax.nn.softmax(jnp.append(logits, 0.0))
        news, beta = shares[:n_news], shares[n_news : len(logits)]
    if n_news == 2:
        news = jnp.stack([2.0 * news[0], 2.0 * (news[1] - news[0])])
    return jnp.concatenate([news, beta])


def _named(model, core):
    """All parameters by name; gamma is 0 and beta follows where the model does not have them."""
    names = [name for name in model.names if not (model.is_integrated and name == "beta")]
    p = {name: core[k] for k, name in enumerate(names)}
    p.setdefault("mean", jnp.zeros_like(core[0]))
    if model.kind != "ewma":
        p.setdefault("gamma", jnp.zeros_like(core[0]))
    if model.is_integrated:
        p["beta"] = 1.0 - p["alpha"] - 0.5 * p["gamma"]
    return p


def _expand(model, core, scale):
    """All parameters of the model in the returns' units."""
    p = _named(model, core)
    p["mean"] = p["mean"] * scale
    if model.kind == "egarch":
        p["omega"] = p["omega"] + (1.0 - p["beta"]) * 2.0 * jnp.log(scale)
    elif model.kind == "tarch":
        p["omega"] = p["omega"] * scale
    elif model.kind != "ewma":
        p["omega"] = p["omega"] * scale**2
    return jnp.stack([p[name] for name in model.names])


def _terms(model, core, data):
    """Weighted log-density of every return, 0 where missing."""
    p = _named(model, core)
    variance, _ = _variances(model, p, data)
    square = (data.values - p["mean"]) ** 2 / variance
    if model.has_dof:
        dof = p["dof"]
        constant = gammaln(0.5 * (dof + 1.0)) - gammaln(0.5 * dof) - 0.5 * jnp.log(np.pi * (dof - 2.0))
        density = constant - 0.5 * jnp.log(variance) - 0.5 * (dof + 1.0) * jnp.log1p(square / (dof - 2.0))
    else:
        density = -0.5 * (_LOG_TWO_PI + jnp.log(variance) + square)
    return data.weight * density


def _variances(model, p, data):
    """Variance of every step and of the one after the record."""
    news = data.values - p["mean"]
    down = (news < 0.0).astype(news.dtype)
    if model.kind == "egarch":
        # The news need the variance of their own step, so the whole step is in the loop.
        centre = data.is_value * _MEAN_ABSOLUTE
        forecast = (1.0 - data.is_value) * (_mean_absolute(model, p) - _MEAN_ABSOLUTE)
        rows = data.has_started, data.is_value * news, p["alpha"] * (forecast - centre) + p["omega"]
        first = p["omega"] + p["beta"] * jnp.log(data.first)

        def egarch_step(x, row):
            e, constant = row
            z = e * jnp.exp(-0.5 * x)
            following = constant + p["beta"] * x + p["alpha"] * jnp.abs(z) + p["gamma"] * z
            return jnp.clip(following, -_LARGEST_LOG, _LARGEST_LOG)

        step = egarch_step

    else:
        omega, up, extra, beta = _linear(model, p)
        absolute = jnp.abs(news) if model.kind == "tarch" else news**2
        moment = _mean_absolute(model, p) if model.kind == "tarch" else 1.0
        driven = omega + data.is_value * (up + extra * down) * absolute
        slope = beta + (1.0 - data.is_value) * (up + 0.5 * extra) * moment
        rows = data.has_started, driven, slope
        first = data.first if model.kind == "ewma" else omega + (up + 0.5 * extra + beta) * data.first

        def linear_step(x, row):
            constant, factor = row
            return constant + factor * x

        step = linear_step

    def body(x, row):
        has_started, *rest = row
        return jnp.where(has_started, step(x, rest), x), x

    last, path = lax.scan(body, first, rows, unroll=_UNROLL)
    to_variance = {"egarch": jnp.exp, "tarch": jnp.square}.get(model.kind, lambda x: x)
    return to_variance(path), to_variance(last)


def _linear(model, p):
    if model.kind == "ewma":
        zero = jnp.zeros_like(p["decay"])
        return zero, 1.0 - p["decay"], zero, p["decay"]
    return p["omega"], p["alpha"], p["gamma"], p["beta"]


def _mean_absolute(model, p):
    """E|z| of the innovation with variance 1."""
    if not model.has_dof:
        return _MEAN_ABSOLUTE
    dof = p["dof"]
    return jnp.sqrt((dof - 2.0) / np.pi) * jnp.exp(gammaln(0.5 * (dof - 1.0)) - gammaln(0.5 * dof))


def _logit(x):
    return float(np.log(x / (1.0 - x)))


def _inverse_share(dof):
    low, high = _DOF_BOUNDS
    return (1.0 / dof - 1.0 / high) / (1.0 / low - 1.0 / high)
