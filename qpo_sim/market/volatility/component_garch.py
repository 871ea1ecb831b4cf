"""Component GARCH for all assets at once: a slow permanent variance and a fast transitory one around it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.volatility.garch import LARGEST_PERSISTENCE, asset_vectors, first_rows, refuse, rounded
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import Rows, each_asset, sqrt
from qpo_sim.types import Array


class Variances(NamedTuple):
    """Variance of the step and its permanent part."""

    variance: Rows
    permanent: Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ComponentGarch:
    r"""Component GARCH(1,1) of Engle & Lee (1999), per asset.

    With the news $e_t = \sqrt{h_t}\,\varepsilon_t$:
    $q_{t+1} = \sigma^2 + \rho (q_t - \sigma^2) + \varphi (e_t^2 - h_t)$ (permanent) and
    $h_{t+1} = q_{t+1} + \alpha (e_t^2 - q_t) + \beta (h_t - q_t)$. The factor of the step is $\sqrt{h_t}$.

    Attributes:
      level: $\sigma^2$, the mean of the variance per base step.
      permanence: $\rho$, at which the permanent part returns to the level.
      permanent_news: $\varphi$, weight of news in the permanent part.
      alpha: weight of news in the transitory part.
      beta: weight of the last variance in the transitory part, which fades at the rate alpha + beta.
      initial_variance: variance of the first step.
      initial_permanent: permanent part at the first step.

    Pathwise gradient: all leaves. A start that was left to the builder is a number of its own and held fixed.
    """

    level: Float[Array, " assets"]
    permanence: Float[Array, " assets"]
    permanent_news: Float[Array, " assets"]
    alpha: Float[Array, " assets"]
    beta: Float[Array, " assets"]
    initial_variance: Float[Array, " assets"]
    initial_permanent: Float[Array, " assets"]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: none, all news come from the shocks."""
        return 0

    @property
    def needs_base_step(self) -> bool:
        """The recursion is that of whole base steps."""
        return True

    def stationary_variance(self) -> Float[np.ndarray, " assets"]:
        """The level."""
        return np.asarray(self.level, np.float64)

    def prepare(self, *, sub_steps: int, step_hours: float) -> "ComponentGarch":
        """The parameters themselves."""
        return self

    def init(self, prepared: "ComponentGarch", one: Array, n_assets: int, n_steps: int, address: Any) -> Variances:
        """Variance of the first step and its permanent part."""
        starts = (prepared.initial_variance, prepared.initial_permanent)
        return Variances(*(first_rows(start, one, n_assets) for start in starts))

    def open(
        self, prepared: "ComponentGarch", t: Array, state: Variances, masks: Any, address: Any
    ) -> tuple[Variances, Local]:
        """Standard deviation of the step."""
        return state, Local(each_asset(sqrt, state.variance))

    def close(
        self, prepared: "ComponentGarch", t: Array, state: Variances, masks: Any, local: Local, shocks: Rows
    ) -> Variances:
        """Variance of the next step and its permanent part."""
        p = prepared
        parameters = (p.level, p.permanence, p.permanent_news, p.alpha, p.beta)
        return Variances(*each_asset(_next_variances, state.variance, state.permanent, shocks, *parameters))


def _next_variances(
    h: Array, q: Array, eps: Array, level: Array, permanence: Array, permanent_news: Array, alpha: Array, beta: Array
) -> tuple[Array, Array]:
    square = h * (eps * eps)
    permanent = level + permanence * (q - level) + permanent_news * (square - h)
    return permanent + alpha * (square - q) + beta * (h - q), permanent


def component_garch(
    level: Any,
    permanence: Any,
    permanent_news: Any,
    alpha: Any,
    beta: Any,
    *,
    initial_variance: Any = None,
    initial_permanent: Any = None,
    n_assets: int | None = None,
    dtype: Any = jnp.float32,
) -> ComponentGarch:
    r"""Component GARCH(1,1); numbers per base step, one for all assets or one per asset.

    The variance stays positive for every sequence of news when $0 \le \varphi \le \beta$, $\alpha \ge 0$ and $\alpha +
    \beta < \rho < 1$ (Engle & Lee), and the first variance is not too far above its permanent part: without news both
    fade along the slower root $\lambda$ of $(\lambda - \rho)(\lambda - \beta + \varphi) + \varphi(\rho-\alpha-\beta)$,
    which stays in front as long as $h_0 \le q_0 (\rho - \alpha - \beta)/(\rho - \lambda)$.

    Args:
      level: mean of the variance.
      permanence: rate at which the permanent part returns to it, e.g. 0.99.
      permanent_news: weight of news in the permanent part.
      alpha: weight of news in the transitory part.
      beta: weight of the last variance in the transitory part.
      initial_variance: variance of the first step; that of its permanent part if omitted.
      initial_permanent: permanent part at the first step; the level if omitted.
      n_assets: number of assets, when it cannot be read off the numbers.
      dtype: precision of the paths.

    Raises:
      InputError: a parameter out of its range, or a start from which the variance could turn negative.
    """
    values = {
        "level": level,
        "permanence": permanence,
        "permanent_news": permanent_news,
        "alpha": alpha,
        "beta": beta,
    }
    starts = {"initial_variance": initial_variance, "initial_permanent": initial_permanent}
    values |= {name: start for name, start in starts.items() if start is not None}
    model = "component_garch"
    v = asset_vectors(model, n_assets, values)
    q0 = v.setdefault("initial_permanent", v["level"])
    h0 = v.setdefault("initial_variance", q0)
    for name in ("level", "initial_permanent", "initial_variance"):
        refuse(f"{model}.{name}", v[name], v[name] <= 0.0, "it must be positive")
    for name in ("permanent_news", "alpha", "beta"):
        refuse(f"{model}.{name}", v[name], v[name] < 0.0, "it must not be negative")
    rho, phi, total = v["permanence"], v["permanent_news"], v["alpha"] + v["beta"]
    refuse(
        f"{model}.permanence", rho, rho > LARGEST_PERSISTENCE, "it must be below 1 for the variance to be stationary"
    )
    rule = "it must be below the permanence, or the transitory part would outlast the permanent one"
    refuse(f"{model}.alpha + beta", total, total >= rho, rule)
    rule = "it must not exceed beta, or the variance could turn negative"
    refuse(f"{model}.permanent_news", phi, phi > v["beta"], rule)
    sum_of_roots = rho + v["beta"] - phi
    slower = 0.5 * (sum_of_roots + np.sqrt((rho - v["beta"] - phi) ** 2 + 4.0 * v["alpha"] * phi))
    bound = q0 * (rho - total)
    is_high = h0 * (rho - slower) > bound * (1.0 + 1e-12)
    if np.any(is_high):
        i = int(np.argmax(is_high))
        raise InputError(
            f"{model}.initial_variance[{i}] is {h0[i]:.9g}; with initial_permanent {q0[i]:.9g} it must not exceed "
            f"{bound[i] / (rho[i] - slower[i]):.9g}, or the variance could turn negative: raise initial_permanent."
        )
    return ComponentGarch(**{name: rounded(value, dtype) for name, value in v.items()})


def example(n_assets: int, dtype: Any) -> ComponentGarch:
    """Daily crypto variances of 60 to 90 % a year: a permanent part of months, a transitory one of days."""
    level = (np.linspace(0.6, 0.9, n_assets) / np.sqrt(365.0)) ** 2
    return component_garch(level, 0.99, 0.03, 0.08, 0.8, n_assets=n_assets, dtype=dtype)
