"""GARCH(1,1) with the GJR term for all assets at once: simulation, filter over data and forecast in closed form."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Rows, each_asset, rounded, sqrt
from qpo_sim.types import Array

# The start of a filter is a weighted mean of the first squared residuals, as in the arch package.
BACKCAST_DECAY = 0.94
BACKCAST_STEPS = 75

# Rounding to single precision must not make a model integrated; this has a half-life of 700 000 steps.
LARGEST_PERSISTENCE = 1.0 - 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Garch:
    r"""GARCH(1,1) of Bollerslev (1986) with the asymmetry of Glosten, Jagannathan & Runkle (1993), per asset.

    With the news $e_t = \sqrt{h_t}\,\varepsilon_t$: $h_{t+1} = \omega + \alpha e_t^2 + \gamma e_t^2 1(e_t < 0) + \beta
    h_t$. The factor of the step is $\sqrt{h_t}$. Each asset has its own recursion; dependence comes from the shocks.

    Attributes:
      omega: constant, variance per base step.
      alpha: weight of the last squared news.
      beta: weight of the last variance.
      gamma: additional weight of squared news below zero.
      initial_variance: variance of the first step.

    Pathwise gradient: all leaves. A start that was left to the builder is a number of its own and held fixed.
    """

    omega: Float[Array, " assets"]
    alpha: Float[Array, " assets"]
    beta: Float[Array, " assets"]
    gamma: Float[Array, " assets"]
    initial_variance: Float[Array, " assets"]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: none, all news come from the shocks."""
        return 0

    @property
    def needs_base_step(self) -> bool:
        """The recursion is that of whole base steps."""
        return True

    def stationary_variance(self) -> Float[np.ndarray, " assets"]:
        r"""$\omega / (1 - \alpha - \gamma/2 - \beta)$, for shocks that are as often positive as negative in square."""
        omega, alpha, beta, gamma = parameters(self)
        return omega / (1.0 - persistence(alpha, beta, gamma))

    def prepare(self, *, sub_steps: int, step_hours: float) -> "Garch":
        """The parameters themselves."""
        return self

    def init(self, prepared: "Garch", one: Array, n_assets: int, n_steps: int, address: Any) -> Rows:
        """Variance of the first step."""
        return first_rows(prepared.initial_variance, one, n_assets)

    def open(self, prepared: "Garch", t: Array, state: Rows, masks: Any, address: Any) -> tuple[Rows, Local]:
        """Standard deviation of the step."""
        return state, Local(each_asset(sqrt, state))

    def close(self, prepared: "Garch", t: Array, state: Rows, masks: Any, local: Local, shocks: Rows) -> Rows:
        """Variance of the next step."""
        p = prepared
        return each_asset(_next_variance, state, shocks, p.omega, p.alpha, p.beta, p.gamma)


def _next_variance(h: Array, eps: Array, omega: Array, alpha: Array, beta: Array, gamma: Array) -> Array:
    down = jnp.minimum(eps, 0.0)
    return omega + h * (beta + alpha * (eps * eps) + gamma * (down * down))


def garch(
    omega: Any,
    alpha: Any,
    beta: Any,
    gamma: Any = 0.0,
    *,
    initial_variance: Any = None,
    n_assets: int | None = None,
    dtype: Any = jnp.float32,
) -> Garch:
    """GARCH(1,1), or GJR where gamma is not 0; numbers per base step, one for all assets or one per asset.

    Args:
      omega: constant, positive.
      alpha: weight of squared news, not negative.
      beta: weight of the variance, not negative.
      gamma: additional weight of squared news below zero; alpha + gamma must not be negative.
      initial_variance: variance of the first step, e.g. the last row of `filtered_variance`; stationary if omitted.
      n_assets: number of assets, when it cannot be read off the numbers.
      dtype: precision of the paths.

    Raises:
      InputError: a parameter out of its range, or alpha + gamma/2 + beta not below 1.
    """
    values = {"omega": omega, "alpha": alpha, "beta": beta, "gamma": gamma}
    if initial_variance is not None:
        values["initial_variance"] = initial_variance
    v = asset_vectors("garch", n_assets, values)
    refuse("garch.omega", v["omega"], v["omega"] <= 0.0, "it must be positive, as the variance would fade to 0")
    refuse("garch.alpha", v["alpha"], v["alpha"] < 0.0, "it must not be negative")
    refuse("garch.beta", v["beta"], v["beta"] < 0.0, "it must not be negative")
    up = v["alpha"] + v["gamma"]
    refuse("garch.alpha + garch.gamma", up, up < 0.0, "it must not be negative, so raise gamma or alpha")
    total = persistence(v["alpha"], v["beta"], v["gamma"])
    rule = "it must be below 1 for the variance to be stationary; lower beta, or use ewma for an integrated model"
    refuse("garch.alpha + gamma/2 + beta", total, total > LARGEST_PERSISTENCE, rule)
    start = v.setdefault("initial_variance", v["omega"] / (1.0 - total))
    refuse("garch.initial_variance", start, start <= 0.0, "it must be positive; leave it out to start stationary")
    return Garch(**{name: rounded(value, dtype) for name, value in v.items()})


def persistence(alpha: Any, beta: Any, gamma: Any) -> Any:
    r"""$\alpha + \gamma/2 + \beta$, the rate at which a variance returns to its mean."""
    return alpha + 0.5 * gamma + beta


def parameters(model: Garch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Omega, alpha, beta and gamma in float64."""
    leaves = (model.omega, model.alpha, model.beta, model.gamma)
    omega, alpha, beta, gamma = (np.asarray(leaf, np.float64) for leaf in leaves)
    return omega, alpha, beta, gamma


def filtered_variance(
    returns: Any, params: Garch, *, mean: Any = 0.0, backcast: Any = None
) -> Float[np.ndarray, "steps+1 assets"]:
    r"""Conditional variance of each observed step and, in the last row, of the step after the record.

    $h_1 = \omega + (\alpha + \gamma/2 + \beta) b$ with the backcast b, then the recursion of `Garch` over the residuals
    returns - mean. In float64.

    Args:
      returns: log-returns, (steps,) for one asset or (steps, assets).
      params: the model.
      mean: mean return per step, one number or one per asset.
      backcast: variance before the record; by default the one of the arch package: the mean of the first 75 squares of
        returns less their sample mean with weights proportional to 0.94^t.

    Raises:
      InputError: returns that are not finite, or not of the model's number of assets.
    """
    return variance_recursion(returns, *parameters(params), mean=mean, backcast=backcast)


def variance_recursion(
    returns: Any,
    omega: np.ndarray,
    alpha: np.ndarray,
    beta: np.ndarray,
    gamma: np.ndarray,
    *,
    mean: Any = 0.0,
    backcast: Any = None,
) -> Float[np.ndarray, "steps+1 assets"]:
    """`filtered_variance` for bare parameters (which need not be stationary)."""
    from scipy.signal import lfilter

    n_assets = omega.shape[0]
    record = np.asarray(returns, np.float64)
    record = record[:, None] if record.ndim == 1 else record
    if record.ndim != 2 or record.shape[1] != n_assets or len(record) < 2:
        raise InputError(
            f"returns have the shape {np.shape(returns)}; they must be at least 2 steps of {n_assets} asset(s), as the "
            f"model has: (steps, {n_assets})."
        )
    if not np.all(np.isfinite(record)):
        step, asset = np.argwhere(~np.isfinite(record))[0]
        raise InputError(f"returns[{step}, {asset}] is {record[step, asset]}; fill or drop such rows first.")
    first = arch_backcast(record) if backcast is None else np.broadcast_to(np.asarray(backcast, np.float64), n_assets)
    residual = record - mean
    news = residual**2 * (alpha + gamma * (residual < 0.0))
    driven = np.vstack([persistence(alpha, beta, gamma) * first, news]) + omega
    return np.stack([lfilter([1.0], [1.0, -beta[i]], driven[:, i]) for i in range(n_assets)], axis=1)


def arch_backcast(returns: Float[np.ndarray, "steps assets"]) -> Float[np.ndarray, " assets"]:
    """Variance before the record in the arch package's way."""
    residual = (returns - returns.mean(axis=0))[:BACKCAST_STEPS]
    weight = BACKCAST_DECAY ** np.arange(len(residual))
    return weight @ residual**2 / weight.sum()


def variance_forecast(params: Garch, next_variance: Any, horizon: int) -> Float[np.ndarray, "horizon assets"]:
    r"""Expected variance of each of the next steps, $\bar h + p^{k-1} (h_1 - \bar h)$ with p the persistence.

    The returns of different steps are uncorrelated, so the variance of the return over the horizon is the sum.

    Args:
      params: the model.
      next_variance: variance of the next step, e.g. the last row of `filtered_variance`.
      horizon: number of steps.
    """
    _, alpha, beta, gamma = parameters(params)
    stationary = params.stationary_variance()
    decay = persistence(alpha, beta, gamma) ** np.arange(horizon)[:, None]
    return stationary + decay * (np.asarray(next_variance, np.float64) - stationary)


def example(n_assets: int, dtype: Any) -> Garch:
    """Daily crypto variances: 60 to 90 % a year, half-life of a month."""
    level = (np.linspace(0.6, 0.9, n_assets) / np.sqrt(365.0)) ** 2
    return garch(0.023 * level, 0.08, 0.887, 0.02, n_assets=n_assets, dtype=dtype)


def asset_vectors(model: str, n_assets: int | None, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters of a model as float64 vectors of one length.

    Raises:
      InputError: a value that is not a finite number or vector, or lengths that differ.
    """
    vectors = {name: finite(f"{model}.{name}", value) for name, value in values.items()}
    for name, vector in vectors.items():
        if vector.ndim > 1:
            raise InputError(f"{model}.{name} has the shape {vector.shape}; give one number or one per asset.")
    n = n_assets or max(vector.size for vector in vectors.values())
    for name, vector in vectors.items():
        if vector.size not in (1, n):
            raise InputError(
                f"{model}.{name} has {vector.size} values for {n} assets; give one number or one per asset."
            )
    return {name: np.broadcast_to(vector, (n,)) for name, vector in vectors.items()}


def finite(name: str, value: Any) -> np.ndarray:
    """A parameter in float64.

    Raises:
      InputError: it is not made of finite numbers.
    """
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number or numbers.") from error
    if not np.all(np.isfinite(array)):
        raise InputError(f"{name} is {array.tolist()}; every value must be finite.")
    return array


def refuse(name: str, value: np.ndarray, is_bad: np.ndarray, rule: str) -> None:
    """Raise for the first bad entry.

    Raises:
      InputError: there is one.
    """
    if not np.any(is_bad):
        return
    where = tuple(int(k) for k in np.argwhere(is_bad)[0])
    place = f"[{', '.join(map(str, where))}]" if value.size > 1 else ""
    raise InputError(f"{name}{place} is {value[where]:.9g}; {rule}.")


def first_rows(values: Float[Array, " assets"], one: Float[Array, " paths"], n_assets: int) -> Rows:
    """Rows that hold one number per asset on all paths.

    Raises:
      InputError: the model has parameters for another number of assets.
    """
    if values.shape[0] != n_assets:
        raise InputError(
            f"the volatility model has parameters for {values.shape[0]} asset(s), the market has {n_assets}: give one "
            f"value per asset, or n_assets={n_assets} to its builder."
        )
    if n_assets <= MAX_UNROLLED_ASSETS:
        return tuple(values[i] * one for i in range(n_assets))
    return values[:, None] * one[None, :]
