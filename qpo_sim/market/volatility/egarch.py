"""EGARCH(1,1) for all assets at once: the logarithm of the variance moves, so no parameter needs a sign."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.market.volatility.garch import LARGEST_PERSISTENCE, asset_vectors, first_rows, refuse, rounded
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import Rows, each_asset
from qpo_sim.types import Array

# E|z| of a standard normal. The news are centred by it whatever the law of the shocks, as in the arch package.
MEAN_ABSOLUTE = float(np.sqrt(2.0 / np.pi))
_SMALL = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Egarch:
    r"""EGARCH(1,1) of Nelson (1991) in the convention of the arch package, per asset.

    $\ln h_{t+1} = \omega + \beta \ln h_t + \alpha (|\varepsilon_t| - \sqrt{2/\pi}) + \gamma \varepsilon_t$ with the
    standardised shock $\varepsilon_t$. The factor of the step is $\sqrt{h_t}$. Under Student-t shocks the expected
    variance is finite only because their scale is cut (see `market.shock`).

    Attributes:
      omega: constant of the log-variance per base step.
      alpha: weight of the size of the shock.
      beta: weight of the last log-variance.
      gamma: weight of the signed shock; below 0, falls raise the variance more than rises.
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
        """Mean of the variance for Gaussian shocks, by Nelson's infinite product (see `log_mean_variance`)."""
        leaves = (np.asarray(leaf, np.float64) for leaf in (self.omega, self.alpha, self.beta, self.gamma))
        return np.exp([log_mean_variance(*values) for values in zip(*leaves, strict=True)])

    def prepare(self, *, sub_steps: int, step_hours: float) -> "Egarch":
        """The parameters themselves."""
        return self

    def init(self, prepared: "Egarch", one: Array, n_assets: int, n_steps: int, address: Any) -> Rows:
        """Log-variance of the first step."""
        return first_rows(jnp.log(prepared.initial_variance), one, n_assets)

    def open(self, prepared: "Egarch", t: Array, state: Rows, masks: Any, address: Any) -> tuple[Rows, Local]:
        """Standard deviation of the step."""
        return state, Local(each_asset(lambda log_h: jnp.exp(0.5 * log_h), state))

    def close(self, prepared: "Egarch", t: Array, state: Rows, masks: Any, local: Local, shocks: Rows) -> Rows:
        """Log-variance of the next step."""
        p = prepared
        return each_asset(_next_log_variance, state, shocks, p.omega, p.alpha, p.beta, p.gamma)


def _next_log_variance(log_h: Array, eps: Array, omega: Array, alpha: Array, beta: Array, gamma: Array) -> Array:
    return omega + beta * log_h + alpha * (jnp.abs(eps) - MEAN_ABSOLUTE) + gamma * eps


def log_mean_variance(omega: float, alpha: float, beta: float, gamma: float, *, power: float = 1.0) -> float:
    r"""$\ln E[h^p]$ of the stationary law under Gaussian shocks; Nelson (1991) theorem 2.1 and appendix 1.

    $\ln h = (\omega - \alpha\sqrt{2/\pi})/(1-\beta) + \sum_j \beta^j g_j$ with independent
    $g_j = \alpha|z_j| + \gamma z_j$ and $E e^{s g} = e^{a^2/2} \Phi(a) + e^{b^2/2} \Phi(b)$, $a = s(\alpha+\gamma)$,
    $b = s(\alpha-\gamma)$. The terms are summed until $|\beta|^j < 10^{-5}$; those left are quadratic in $\beta^j$ to
    1e-15.
    """
    from scipy.special import log_ndtr

    n_terms = 1 if beta == 0.0 else int(np.ceil(np.log(_SMALL) / np.log(abs(beta))))
    s = power * beta ** np.arange(n_terms)
    a, b = s * (alpha + gamma), s * (alpha - gamma)
    log_mgf = np.logaddexp(0.5 * a * a + log_ndtr(a), 0.5 * b * b + log_ndtr(b))
    variance = alpha * alpha * (1.0 - MEAN_ABSOLUTE**2) + gamma * gamma
    rest = 0.5 * variance * power**2 * beta ** (2 * n_terms) / (1.0 - beta * beta)
    return float(power * omega / (1.0 - beta) + np.sum(log_mgf - s * alpha * MEAN_ABSOLUTE) + rest)


def egarch(
    omega: Any,
    alpha: Any,
    beta: Any,
    gamma: Any = 0.0,
    *,
    initial_variance: Any = None,
    n_assets: int | None = None,
    dtype: Any = jnp.float32,
) -> Egarch:
    """EGARCH(1,1); numbers per base step, one for all assets or one per asset.

    Args:
      omega: constant of the log-variance.
      alpha: weight of |shock|.
      beta: weight of the log-variance, |beta| < 1.
      gamma: weight of the signed shock.
      initial_variance: variance of the first step; the stationary mean under Gaussian shocks if omitted.
      n_assets: number of assets, when it cannot be read off the numbers.
      dtype: precision of the paths.

    Raises:
      InputError: a parameter that is not finite, |beta| not below 1, or a start that is not positive.
    """
    values = {"omega": omega, "alpha": alpha, "beta": beta, "gamma": gamma}
    if initial_variance is not None:
        values["initial_variance"] = initial_variance
    v = asset_vectors("egarch", n_assets, values)
    rule = "its size must be below 1 for the log-variance to be stationary"
    refuse("egarch.beta", v["beta"], np.abs(v["beta"]) > LARGEST_PERSISTENCE, rule)
    if initial_variance is None:
        columns = zip(v["omega"], v["alpha"], v["beta"], v["gamma"], strict=True)
        log_start = np.array([log_mean_variance(*column) for column in columns])
        # In float32 a variance outside this is 0 or infinite.
        rule = "the parameters give no usable variance; omega / (1 - beta) is about its logarithm"
        refuse("the stationary log-variance of egarch", log_start, np.abs(log_start) > 80.0, rule)
        v["initial_variance"] = np.exp(log_start)
    start = v["initial_variance"]
    refuse("egarch.initial_variance", start, start <= 0.0, "it must be positive; leave it out to start stationary")
    return Egarch(**{name: rounded(value, dtype) for name, value in v.items()})


def example(n_assets: int, dtype: Any) -> Egarch:
    """Daily crypto variances around 60 to 90 % a year."""
    level = 2.0 * np.log(np.linspace(0.55, 0.85, n_assets) / np.sqrt(365.0))
    return egarch(0.03 * level, 0.15, 0.97, -0.03, n_assets=n_assets, dtype=dtype)
