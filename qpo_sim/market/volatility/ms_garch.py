"""Markov-switching GARCH for all assets at once: every regime keeps its own variance, the regime picks one."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.regime import check_transition, stationary_law
from qpo_sim.market.volatility.garch import LARGEST_PERSISTENCE, finite, first_rows, refuse, rounded
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import Rows, each_asset, regime_rows, select, sqrt
from qpo_sim.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MsGarch:
    r"""Markov-switching GARCH(1,1) of Haas, Mittnik & Paolella (2004), per asset.

    All K variances are carried: $h_{k,t+1} = \omega_k + \alpha_k e_t^2 + \beta_k h_{k,t}$ with the news
    $e_t = \sqrt{h_{S_t,t}}\,\varepsilon_t$ of the regime $S_t$ that holds. The factor of the step is
    $\sqrt{h_{S_t,t}}$. The regime is the market's own.

    Attributes:
      omega: constant of each regime, variance per base step.
      alpha: weight of the last squared news.
      beta: weight of the last variance.
      initial_variance: variances at the first step, (regimes, assets); or, with a leading axis for the regime that
        holds in the first step, their stationary means given that regime.
      transition: transition matrix of the market's regimes, used for the stationary law alone.

    Pathwise gradient: omega, alpha, beta, initial_variance (a start that was left to the builder is a number of its
    own and held fixed). None: transition.
    """

    omega: Float[Array, "regimes assets"]
    alpha: Float[Array, "regimes assets"]
    beta: Float[Array, "regimes assets"]
    initial_variance: Float[Array, "*first regimes assets"]
    transition: Float[Array, "regimes regimes"]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: none, all news come from the shocks."""
        return 0

    @property
    def needs_base_step(self) -> bool:
        """The recursion is that of whole base steps."""
        return True

    @property
    def n_regimes(self) -> int:
        """Number of regimes."""
        return self.omega.shape[0]

    def stationary_variance(self) -> Float[np.ndarray, " assets"]:
        r"""$\sum_j \pi_j E[h_j | S = j]$."""
        given = self.variance_given_regime()
        law = stationary_law(np.asarray(self.transition, np.float64))
        return law @ np.einsum("jja->ja", given)

    def variance_given_regime(self) -> Float[np.ndarray, "regimes regimes assets"]:
        """Stationary mean of each regime's variance (second axis) given the regime that holds (first axis)."""
        leaves = (self.omega, self.alpha, self.beta, self.transition)
        return _variance_given_regime(*(np.asarray(leaf, np.float64) for leaf in leaves))

    def spectral_radius(self) -> Float[np.ndarray, " assets"]:
        """Rate at which mean variances return to their stationary values; below 1."""
        leaves = (self.alpha, self.beta, self.transition)
        return _spectral_radius(*(np.asarray(leaf, np.float64) for leaf in leaves))

    def prepare(self, *, sub_steps: int, step_hours: float) -> "MsGarch":
        """The parameters themselves."""
        return self

    def init(self, prepared: "MsGarch", one: Array, n_assets: int, n_steps: int, address: Any) -> tuple[Rows, ...]:
        """Variance of each regime at the first step; where it depends on the regime, `open` puts it right."""
        start = prepared.initial_variance
        table = start if start.ndim == 2 else start[0]
        return tuple(first_rows(table[k], one, n_assets) for k in range(self.n_regimes))

    def open(
        self, prepared: "MsGarch", t: Array, state: tuple[Rows, ...], masks: Any, address: Any
    ) -> tuple[tuple[Rows, ...], Local]:
        """Standard deviation of the step."""
        start = prepared.initial_variance
        if start.ndim == 3:
            given = [regime_rows(masks, start[:, k], rows) for k, rows in enumerate(state)]
            # The regime of the first step is known only here.
            state = tuple(
                each_asset(lambda new, old: jnp.where(t == 0, new, old), *pair)
                for pair in zip(given, state, strict=True)
            )
        return state, Local(each_asset(lambda *h: sqrt(select(masks, h)), *state))

    def close(
        self, prepared: "MsGarch", t: Array, state: tuple[Rows, ...], masks: Any, local: Local, shocks: Rows
    ) -> tuple[Rows, ...]:
        """Variance of each regime at the next step."""
        p = prepared
        return tuple(
            each_asset(_next_variance, rows, local.factor, shocks, p.omega[k], p.alpha[k], p.beta[k])
            for k, rows in enumerate(state)
        )


def _next_variance(h: Array, factor: Array, eps: Array, omega: Array, alpha: Array, beta: Array) -> Array:
    news = factor * eps
    return omega + alpha * (news * news) + beta * h


def _system(alpha: np.ndarray, beta: np.ndarray, transition: np.ndarray) -> np.ndarray:
    # One asset. m_jk = E[h_k; S = j] moves by m'_jk = omega_k pi_j + sum_i P_ij (alpha_k m_ii + beta_k m_ik).
    k = len(alpha)
    eye = np.eye(k)
    news = np.einsum("ij,k,il->jkil", transition, alpha, eye)
    memory = np.einsum("ij,k,kl->jkil", transition, beta, eye)
    return (news + memory).reshape(k * k, k * k)


def _spectral_radius(alpha: np.ndarray, beta: np.ndarray, transition: np.ndarray) -> np.ndarray:
    systems = [_system(a, b, transition) for a, b in zip(alpha.T, beta.T, strict=True)]
    return np.array([np.abs(np.linalg.eigvals(system)).max() for system in systems])


def _variance_given_regime(
    omega: np.ndarray, alpha: np.ndarray, beta: np.ndarray, transition: np.ndarray
) -> np.ndarray:
    k = len(omega)
    law = stationary_law(transition)
    moments = [
        np.linalg.solve(np.eye(k * k) - _system(a, b, transition), np.outer(law, o).ravel()).reshape(k, k)
        for o, a, b in zip(omega.T, alpha.T, beta.T, strict=True)
    ]
    joint = np.stack(moments, axis=-1)
    # In a regime that dies out no mean is defined; there the mean over all regimes stands in.
    is_alive = (law > 1e-12)[:, None, None]
    return np.where(is_alive, joint / np.where(is_alive, law[:, None, None], 1.0), joint.sum(axis=0))


def ms_garch(
    omega: Any,
    alpha: Any,
    beta: Any,
    transition: Any,
    *,
    initial_variance: Any = None,
    n_assets: int | None = None,
    dtype: Any = jnp.float32,
) -> MsGarch:
    """Markov-switching GARCH(1,1); numbers per base step, (regimes,) for all assets or (regimes, assets).

    A single regime may be explosive (alpha + beta above 1) as long as the whole is stationary.

    Args:
      omega: constant of each regime, positive.
      alpha: weight of squared news, not negative.
      beta: weight of the regime's own variance, not negative.
      transition: transition matrix of the market's regimes, rows sum to 1.
      initial_variance: variance of each regime at the first step; their stationary means given the first regime if
        omitted.
      n_assets: number of assets, when it cannot be read off the numbers.
      dtype: precision of the paths.

    Raises:
      InputError: a parameter out of its range, rows that do not sum to 1, or a spectral radius not below 1.
    """
    matrix = check_transition("ms_garch.transition", transition)
    if matrix.ndim != 2:
        raise InputError(f"ms_garch.transition has the shape {matrix.shape}; all assets share the market's regimes.")
    values = {"omega": omega, "alpha": alpha, "beta": beta}
    if initial_variance is not None:
        values["initial_variance"] = initial_variance
    v = _tables(len(matrix), n_assets, values)
    refuse("ms_garch.omega", v["omega"], v["omega"] <= 0.0, "it must be positive, as the variance would fade to 0")
    refuse("ms_garch.alpha", v["alpha"], v["alpha"] < 0.0, "it must not be negative")
    refuse("ms_garch.beta", v["beta"], v["beta"] < 0.0, "it must not be negative")
    radius = _spectral_radius(v["alpha"], v["beta"], matrix)
    rule = "it must be below 1 for the variance to be stationary; lower alpha or beta, or shorten that regime's stays"
    refuse("the spectral radius of ms_garch", radius, radius > LARGEST_PERSISTENCE, rule)
    if initial_variance is None:
        given = _variance_given_regime(v["omega"], v["alpha"], v["beta"], matrix)
        v["initial_variance"] = given if len(matrix) > 1 else given[0]
    start = v["initial_variance"]
    refuse("ms_garch.initial_variance", start, start <= 0.0, "it must be positive; leave it out to start stationary")
    leaves = {name: rounded(value, dtype) for name, value in v.items()}
    return MsGarch(**leaves, transition=rounded(matrix, dtype))


def _tables(n_regimes: int, n_assets: int | None, values: dict[str, Any]) -> dict[str, np.ndarray]:
    tables = {}
    for name, value in values.items():
        table = finite(f"ms_garch.{name}", value)
        table = table[:, None] if table.ndim == 1 else table
        if table.ndim != 2 or table.shape[0] != n_regimes:
            raise InputError(
                f"ms_garch.{name} has the shape {np.shape(value)}; the transition matrix has {n_regimes} regime(s), so "
                f"give one number for each, ({n_regimes},), or one per regime and asset, ({n_regimes}, assets)."
            )
        tables[name] = table
    n = n_assets or max(table.shape[1] for table in tables.values())
    for name, table in tables.items():
        if table.shape[1] not in (1, n):
            raise InputError(f"ms_garch.{name} has {table.shape[1]} columns for {n} assets; give 1 or {n}.")
    return {name: np.broadcast_to(table, (n_regimes, n)) for name, table in tables.items()}


def example(n_assets: int, dtype: Any) -> MsGarch:
    """Two regimes of daily crypto variances, calm and turbulent."""
    level = (np.linspace(0.6, 0.9, n_assets) / np.sqrt(365.0)) ** 2
    omega = np.array([0.01, 0.12])[:, None] * level
    transition = [[0.98, 0.02], [0.05, 0.95]]
    return ms_garch(omega, [0.03, 0.12], [0.94, 0.84], transition, n_assets=n_assets, dtype=dtype)
