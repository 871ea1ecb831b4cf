"""What a calibration gives back: the fitted regime market and what a record says about its regimes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.types import HOURS_PER_YEAR

_HOURS_PER_DAY = 24.0


@dataclass(frozen=True, eq=False)
class RegimeFit:
    r"""K-regime Markov market of Student-t log-returns, regimes ordered from calm (0) to turbulent (K-1).

    In regime k the log-returns of a step are $t_{\nu_k}(\mu_k, S_k)$ with one mixing variable for all assets; their
    covariance is $S_k \nu_k / (\nu_k - 2)$. All arrays are float64 NumPy; rates are per step.

    Attributes:
      assets: names, in the order of every asset axis.
      step_hours: hours per step.
      transition: row i, column j: probability of going from regime i to j in one step.
      initial: filtered law of the regime at the last row; a simulation starts from it.
      start: fitted law of the regime at the first row.
      mean: mean log-return per step.
      scale: Student-t scale matrices (not covariances).
      dof: degrees of freedom, above 2; infinity means Gaussian and comes only from `dof=inf`.
      stationary: long-run share of each regime.
      durations: mean stay in steps, 1 / (1 - p_kk); infinite for a regime that is never left.
      log_likelihood: of the returns at these parameters, without any penalty.
      aic: 2 n_parameters - 2 log_likelihood.
      bic: log(n_observations) n_parameters - 2 log_likelihood.
      n_parameters: free parameters.
      n_observations: rows with at least one return.
      n_iterations: iterations of the restart that was kept.
      converged: whether its last iteration gained less than the tolerance.
      filtered: probability of each regime given the rows so far.
      smoothed: probability of each regime given all rows.
      restart_log_likelihoods: where every restart ended.
    """

    assets: tuple[str, ...]
    step_hours: float
    transition: Float[np.ndarray, "regimes regimes"]
    initial: Float[np.ndarray, " regimes"]
    start: Float[np.ndarray, " regimes"]
    mean: Float[np.ndarray, "regimes assets"]
    scale: Float[np.ndarray, "regimes assets assets"]
    dof: Float[np.ndarray, " regimes"]
    stationary: Float[np.ndarray, " regimes"]
    durations: Float[np.ndarray, " regimes"]
    log_likelihood: float
    aic: float
    bic: float
    n_parameters: int
    n_observations: int
    n_iterations: int
    converged: bool
    filtered: Float[np.ndarray, "steps regimes"]
    smoothed: Float[np.ndarray, "steps regimes"]
    restart_log_likelihoods: Float[np.ndarray, " restarts"]

    def covariance(self) -> Float[np.ndarray, "regimes assets assets"]:
        r"""Covariance of the log-returns per step and regime, $S \nu / (\nu - 2)$."""
        return self.scale * variance_factor(self.dof)[:, None, None]

    def volatility_per_year(self) -> Float[np.ndarray, "regimes assets"]:
        """Standard deviation of the log-returns per year (365 days) and regime."""
        return np.sqrt(np.diagonal(self.covariance(), axis1=1, axis2=2) * (HOURS_PER_YEAR / self.step_hours))

    def correlation(self) -> Float[np.ndarray, "regimes assets assets"]:
        """Correlation of the log-returns per regime."""
        deviation = np.sqrt(np.diagonal(self.scale, axis1=1, axis2=2))
        return self.scale / (deviation[:, :, None] * deviation[:, None, :])

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or a JSON file; `regimes` has one row per regime, calm first.

        Volatility is the mean over assets of the yearly one, correlation the mean over pairs (NaN for one asset).
        """
        upper = np.triu_indices(len(self.assets), k=1)
        correlation = [float(c[upper].mean()) if upper[0].size else float("nan") for c in self.correlation()]
        return {
            "n_regimes": len(self.dof),
            "n_assets": len(self.assets),
            "n_observations": self.n_observations,
            "n_parameters": self.n_parameters,
            "log_likelihood": self.log_likelihood,
            "aic": self.aic,
            "bic": self.bic,
            "n_iterations": self.n_iterations,
            "converged": self.converged,
            "regimes": [
                {
                    "regime": k,
                    "share": float(self.stationary[k]),
                    "probability_now": float(self.initial[k]),
                    "mean_duration_days": float(self.durations[k] * self.step_hours / _HOURS_PER_DAY),
                    "dof": float(self.dof[k]),
                    "mean_volatility_per_year": float(self.volatility_per_year()[k].mean()),
                    "mean_correlation": correlation[k],
                }
                for k in range(len(self.dof))
            ],
        }


class RegimePosterior(NamedTuple):
    """What a record of returns says about the regimes of a fit.

    Attributes:
      log_likelihood: of the record at the fit's parameters, starting from `fit.start`.
      filtered: probability of each regime given the rows so far.
      smoothed: probability of each regime given all rows.
    """

    log_likelihood: float
    filtered: Float[np.ndarray, "steps regimes"]
    smoothed: Float[np.ndarray, "steps regimes"]


def stationary_law(transition: Float[np.ndarray, "regimes regimes"]) -> Float[np.ndarray, " regimes"]:
    r"""The law $\pi = \pi P$ with sum 1; the one of least norm where several exist."""
    n = len(transition)
    equations = np.vstack([transition.T - np.eye(n), np.ones(n)])
    law = np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0), rcond=None)[0]
    law = np.maximum(law, 0.0)
    return law / law.sum()


def durations(transition: Float[np.ndarray, "regimes regimes"]) -> Float[np.ndarray, " regimes"]:
    """Mean stay in each regime in steps, 1 / (1 - p_kk)."""
    with np.errstate(divide="ignore"):  # a regime that is never left lasts for ever
        return 1.0 / np.maximum(1.0 - np.diagonal(transition), 0.0)


def variance_factor(dof: Float[np.ndarray, " regimes"]) -> Float[np.ndarray, " regimes"]:
    r"""Covariance over Student-t scale matrix, $\nu / (\nu - 2)$; 1 for a Gaussian."""
    return np.where(np.isinf(dof), 1.0, dof / np.where(np.isinf(dof), 1.0, dof - 2.0))
