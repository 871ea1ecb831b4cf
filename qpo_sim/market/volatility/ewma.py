"""Exponentially weighted variance (RiskMetrics): an integrated GARCH without constant, for all assets at once."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.market.volatility.garch import asset_vectors, first_rows, refuse, rounded, variance_recursion
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import Rows, each_asset, sqrt
from qpo_sim.types import Array

# Without a constant almost every path's variance fades to 0 in the end (Nelson 1990, "Stationarity and persistence in
# the GARCH(1,1) model"); it is held here, where its root and the root's gradient are finite in float32.
VARIANCE_FLOOR = 1e-30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ewma:
    r"""$h_{t+1} = \lambda h_t + (1 - \lambda) e_t^2$ with the news $e_t = \sqrt{h_t}\,\varepsilon_t$.

    The factor of the step is $\sqrt{h_t}$. RiskMetrics Technical Document (1996). The expected variance of every later
    step is that of the first; there is no stationary law.

    Attributes:
      decay: $\lambda$ per base step.
      initial_variance: variance of the first step.

    Pathwise gradient: decay, initial_variance; zero on paths whose variance has faded to 1e-30.
    """

    decay: Float[Array, " assets"]
    initial_variance: Float[Array, " assets"]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: none, all news come from the shocks."""
        return 0

    @property
    def needs_base_step(self) -> bool:
        """The recursion is that of whole base steps."""
        return True

    def stationary_variance(self) -> None:
        """None: the model is integrated."""
        return None

    def prepare(self, *, sub_steps: int, step_hours: float) -> "Ewma":
        """The parameters themselves."""
        return self

    def init(self, prepared: "Ewma", one: Array, n_assets: int, n_steps: int, address: Any) -> Rows:
        """Variance of the first step."""
        return first_rows(prepared.initial_variance, one, n_assets)

    def open(self, prepared: "Ewma", t: Array, state: Rows, masks: Any, address: Any) -> tuple[Rows, Local]:
        """Standard deviation of the step."""
        return state, Local(each_asset(sqrt, state))

    def close(self, prepared: "Ewma", t: Array, state: Rows, masks: Any, local: Local, shocks: Rows) -> Rows:
        """Variance of the next step."""
        return each_asset(_next_variance, state, shocks, prepared.decay)


def _next_variance(h: Array, eps: Array, decay: Array) -> Array:
    return jnp.maximum(h * (decay + (1.0 - decay) * (eps * eps)), VARIANCE_FLOOR)


def ewma(initial_variance: Any, decay: Any = 0.94, *, n_assets: int | None = None, dtype: Any = jnp.float32) -> Ewma:
    """Exponentially weighted variance; numbers per base step, one for all assets or one per asset.

    Args:
      initial_variance: variance of the first step, e.g. the last row of `filtered_variance`.
      decay: weight of the last variance, in (0, 1); RiskMetrics takes 0.94 for daily and 0.97 for monthly returns.
      n_assets: number of assets, when it cannot be read off the numbers.
      dtype: precision of the paths.

    Raises:
      InputError: a parameter out of its range.
    """
    v = asset_vectors("ewma", n_assets, {"initial_variance": initial_variance, "decay": decay})
    is_outside = (v["decay"] <= 0.0) | (v["decay"] >= 1.0)
    refuse("ewma.decay", v["decay"], is_outside, "it must lie strictly between 0 and 1, e.g. 0.94 for daily returns")
    start = v["initial_variance"]
    refuse("ewma.initial_variance", start, start <= 0.0, "it must be positive: the model has no level of its own")
    return Ewma(**{name: rounded(value, dtype) for name, value in v.items()})


def filtered_variance(
    returns: Any, decay: Any = 0.94, *, mean: Any = 0.0, backcast: Any = None
) -> Float[np.ndarray, "steps+1 assets"]:
    """Exponentially weighted variance of each observed step and, in the last row, of the step after the record.

    Args:
      returns: log-returns, (steps,) for one asset or (steps, assets).
      decay: weight of the last variance, one number or one per asset.
      mean: mean return per step, one number or one per asset.
      backcast: variance before the record, see `garch.filtered_variance`.

    Raises:
      InputError: returns that are not finite, or a wrong number of decays.
    """
    n_assets = 1 if np.ndim(returns) < 2 else np.shape(returns)[1]
    beta = asset_vectors("ewma", n_assets, {"decay": decay})["decay"]
    zero = np.zeros(n_assets)
    return variance_recursion(returns, zero, 1.0 - beta, beta, zero, mean=mean, backcast=backcast)


def example(n_assets: int, dtype: Any) -> Ewma:
    """Daily crypto variances of 60 to 90 % a year."""
    return ewma((np.linspace(0.6, 0.9, n_assets) / np.sqrt(365.0)) ** 2, 0.94, n_assets=n_assets, dtype=dtype)
