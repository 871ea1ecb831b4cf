r"""Kou's jumps: compound Poisson with double-exponential log-sizes, idiosyncratic and systemic.

The log-size is $+E/\eta_{up}$ with probability p and $-E/\eta_{down}$ otherwise, E a unit exponential. Jump m of a step
takes sign and size from one uniform by inversion of this law; the sums over the jumps that happen are minus the logs of
two masked products, so a column costs one uniform for the count and one per possible jump, and two logs. Exact for a
step of any length. Kou (2002), "A jump-diffusion model for option pricing".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.errors import InputError
from qpo_sim.market.jump import poisson
from qpo_sim.market.jump.poisson import CompoundPoisson
from qpo_sim.numerics import Rows, rounded
from qpo_sim.random import Address
from qpo_sim.types import Array

# Factors of a product before its log is taken: uniforms are at least 2^-24, so five of them never underflow.
_GROUP = 5
_TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoubleExponentialSizes:
    """Double-exponential log-sizes.

    Attributes:
      up_share: probability that a jump is upward, by column.
      eta_up: rate of the upward sizes (mean 1/eta_up).
      eta_down: rate of the downward sizes.

    Pathwise gradient: up_share, eta_up, eta_down (the size is continuous in its uniform, also at the change of sign).
    """

    up_share: Float[Array, " columns"]
    eta_up: Float[Array, " columns"]
    eta_down: Float[Array, " columns"]

    @property
    def parameters(self) -> tuple[Array, ...]:
        """Share of upward jumps and both rates."""
        return self.up_share, self.eta_up, self.eta_down

    @property
    def variance(self) -> np.ndarray:
        """Variance of one jump, by column."""
        p, up, down = (np.asarray(x, np.float64) for x in self.parameters)
        return 2.0 * p / up**2 + 2.0 * (1.0 - p) / down**2 - (p / up - (1.0 - p) / down) ** 2

    def n_slots(self, n_columns: int, max_count: int) -> int:
        """A uniform per column and possible jump."""
        return (n_columns * max_count + 1) // 2

    def draws(self, address: Address, n_columns: int, max_count: int, dtype: Any) -> tuple[Rows, ...]:
        """A row of uniforms per possible jump and column."""
        rows = [row.astype(dtype) for row in poisson.draw(address, n_columns * max_count, random.uniform)]
        return tuple(poisson.in_rows(rows[m * n_columns : (m + 1) * n_columns]) for m in range(max_count))

    def total(self, count: Array, up_share: Array, eta_up: Array, eta_down: Array, *uniforms: Array) -> Array:
        """Sum of `count` jumps."""
        down_share = 1.0 - up_share
        value = 0.0 * count
        for start in range(0, len(uniforms), _GROUP):
            up = down = jnp.ones_like(count)
            for m, u in enumerate(uniforms[start : start + _GROUP], start):
                happens, is_down = count > m, u < down_share
                up = up * jnp.where(happens & ~is_down, (1.0 - u) / jnp.maximum(up_share, _TINY), 1.0)
                down = down * jnp.where(happens & is_down, u / jnp.maximum(down_share, _TINY), 1.0)
            value = value - jnp.log(up) / eta_up + jnp.log(down) / eta_down
        return value

    def mean_exp_minus_one(self, loading: Any = 1.0) -> Array:
        """E[exp(loading J)] - 1, finite for -eta_down < loading < eta_up."""
        up = self.up_share * loading / (self.eta_up - loading)
        return up - (1.0 - self.up_share) * loading / (self.eta_down + loading)


def double_exponential_sizes(
    up_share: Any,
    eta_up: Any,
    eta_down: Any,
    n_columns: int,
    *,
    loading: Any = 1.0,
    prefix: str = "",
    dtype: Any = jnp.float32,
) -> DoubleExponentialSizes:
    """Checked double-exponential sizes; `loading` are the factors with which they enter log-prices.

    Raises:
      InputError: a share outside [0, 1], a rate that is not positive, or one so small that E[exp(jump)] is infinite.
    """
    share = poisson.check_vector(up_share, n_columns, f"{prefix}up_share", low=0.0, high=1.0)
    up = poisson.check_vector(eta_up, n_columns, f"{prefix}eta_up", low=0.0, is_open=True)
    down = poisson.check_vector(eta_down, n_columns, f"{prefix}eta_down", low=0.0, is_open=True)
    highest, lowest = float(np.max(loading)), float(np.min(loading))
    if np.any(up <= highest):
        raise InputError(
            f"{prefix}eta_up is {up.tolist()}; it must exceed {highest:g}, the largest loading of a jump (1 for a jump "
            "of the asset itself), or the expected price is infinite. 1/eta_up is the mean upward log-jump."
        )
    if np.any(down <= -lowest):
        raise InputError(
            f"{prefix}eta_down is {down.tolist()}; it must exceed {-lowest:g}, the largest negative loading of a jump, "
            "or the expected price is infinite."
        )
    return DoubleExponentialSizes(*(rounded(x, dtype) for x in (share, up, down)))


def kou(
    n_assets: int,
    *,
    intensity: Any = None,
    up_share: Any = 0.5,
    eta_up: Any = 25.0,
    eta_down: Any = 20.0,
    systemic: Mapping[str, Any] | None = None,
    martingale: bool = False,
    step_hours: float = 24.0,
    dtype: Any = jnp.float32,
) -> CompoundPoisson:
    """Double-exponential jumps of log-prices; see `poisson.CompoundPoisson` for the law.

    Args:
      n_assets: number of assets.
      intensity: own jumps per year: a number, one per asset, or a table (regimes, assets); None for systemic ones only.
      up_share: probability that an own jump is upward, a number or one per asset.
      eta_up: rate of upward log-sizes, above 1.
      eta_down: rate of downward log-sizes.
      systemic: jumps that all assets share, as plain numbers: `intensity` per year (a number, or one per regime),
        `up_share`, `eta_up` and `eta_down` of the common size, `loading` of each asset (1), and `own_mean`, `own_sd`
        and `correlation` of the assets' own normal noise (0, 0 and independent).
      martingale: give the compensator that makes expected prices independent of the jumps.
      step_hours: longest simulation step, for which the static maximum of jumps per step is chosen.
      dtype: precision of the paths.

    Raises:
      InputError: no jumps at all, a negative intensity, eta_up not above 1, a wrong shape, or too many jumps per step.
    """

    def common(plain: Mapping[str, Any], loading: np.ndarray) -> DoubleExponentialSizes:
        values = (plain.get("up_share", 0.5), plain.get("eta_up", 25.0), plain.get("eta_down", 20.0))
        return double_exponential_sizes(*values, 1, loading=loading, prefix="systemic.", dtype=dtype)

    sizes = None
    if intensity is not None:
        sizes = double_exponential_sizes(up_share, eta_up, eta_down, n_assets, dtype=dtype)
    return poisson.build(
        n_assets,
        intensity=intensity,
        sizes=sizes,
        systemic=systemic,
        systemic_sizes=common,
        size_names=("up_share", "eta_up", "eta_down"),
        martingale=martingale,
        step_hours=step_hours,
        dtype=dtype,
    )


def example(n_assets: int, dtype: Any = jnp.float32) -> CompoundPoisson:
    """Ten own jumps of about 4 % a year, and three market-wide ones, most of them down."""
    systemic = {"intensity": 3.0, "up_share": 0.3, "eta_up": 20.0, "eta_down": 12.0, "own_sd": 0.02}
    return kou(n_assets, intensity=10.0, up_share=0.45, eta_up=25.0, eta_down=22.0, systemic=systemic, dtype=dtype)
