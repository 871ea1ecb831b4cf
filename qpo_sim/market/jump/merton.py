r"""Merton's jumps: compound Poisson with normal log-sizes, idiosyncratic and systemic.

Given N jumps in a step their sum is $N m + \sqrt{N}\, d\, Z$, exact for a step of any length. Merton (1976), "Option
pricing when underlying stock returns are discontinuous"; Glasserman (2003) sec. 3.5.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.market.jump import poisson
from qpo_sim.market.jump.poisson import CompoundPoisson
from qpo_sim.numerics import Rows, rounded
from qpo_sim.random import Address
from qpo_sim.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormalSizes:
    """Normal log-sizes.

    Attributes:
      mean: mean log-size by column.
      sd: standard deviation of the log-size by column.

    Pathwise gradient: mean, sd.
    """

    mean: Float[Array, " columns"]
    sd: Float[Array, " columns"]

    @property
    def parameters(self) -> tuple[Array, ...]:
        """Mean and standard deviation."""
        return self.mean, self.sd

    @property
    def variance(self) -> np.ndarray:
        """Variance of one jump, by column."""
        return np.asarray(self.sd, np.float64) ** 2

    def n_slots(self, n_columns: int, max_count: int) -> int:
        """One normal per column."""
        return (n_columns + 1) // 2

    def draws(self, address: Address, n_columns: int, max_count: int, dtype: Any) -> tuple[Rows, ...]:
        """One row of normals per column."""
        return (poisson.in_rows([row.astype(dtype) for row in poisson.draw_normals(address, n_columns)]),)

    def total(self, count: Array, mean: Array, sd: Array, z: Array) -> Array:
        """Sum of `count` jumps."""
        return count * mean + jnp.sqrt(count) * sd * z

    def mean_exp_minus_one(self, loading: Any = 1.0) -> Array:
        """E[exp(loading J)] - 1."""
        return jnp.expm1(loading * self.mean + 0.5 * (loading * self.sd) ** 2)


def normal_sizes(mean: Any, sd: Any, n_columns: int, *, prefix: str = "", dtype: Any = jnp.float32) -> NormalSizes:
    """Checked normal sizes; `prefix` goes before the names in messages."""
    mean = poisson.check_vector(mean, n_columns, f"{prefix}mean")
    sd = poisson.check_vector(sd, n_columns, f"{prefix}sd", low=0.0)
    return NormalSizes(rounded(mean, dtype), rounded(sd, dtype))


def merton(
    n_assets: int,
    *,
    intensity: Any = None,
    mean: Any = 0.0,
    sd: Any = 0.0,
    systemic: Mapping[str, Any] | None = None,
    martingale: bool = False,
    step_hours: float = 24.0,
    dtype: Any = jnp.float32,
) -> CompoundPoisson:
    """Normal jumps of log-prices; see `poisson.CompoundPoisson` for the law.

    Args:
      n_assets: number of assets.
      intensity: own jumps per year: a number, one per asset, or a table (regimes, assets); None for systemic ones only.
      mean: mean log-size of an own jump, a number or one per asset.
      sd: its standard deviation.
      systemic: jumps that all assets share, as plain numbers: `intensity` per year (a number, or one per regime),
        `mean` and `sd` of the common size, `loading` of each asset (1), `own_mean`, `own_sd` and `correlation` of the
        assets' own noise (0, 0 and independent).
      martingale: give the compensator that makes expected prices independent of the jumps.
      step_hours: longest simulation step, for which the static maximum of jumps per step is chosen.
      dtype: precision of the paths.

    Raises:
      InputError: no jumps at all, a negative intensity or standard deviation, a wrong shape, or too many jumps a step.
    """

    def common(plain: Mapping[str, Any], loading: np.ndarray) -> NormalSizes:
        return normal_sizes(plain.get("mean", 0.0), plain.get("sd", 0.0), 1, prefix="systemic.", dtype=dtype)

    return poisson.build(
        n_assets,
        intensity=intensity,
        sizes=None if intensity is None else normal_sizes(mean, sd, n_assets, dtype=dtype),
        systemic=systemic,
        systemic_sizes=common,
        size_names=("mean", "sd"),
        martingale=martingale,
        step_hours=step_hours,
        dtype=dtype,
    )


def example(n_assets: int, dtype: Any = jnp.float32) -> CompoundPoisson:
    """A dozen small own jumps a year and three market-wide falls."""
    loading = np.linspace(0.8, 1.3, n_assets) if n_assets > 1 else 1.0
    systemic = {"intensity": 3.0, "mean": -0.08, "sd": 0.05, "loading": loading, "own_sd": 0.02}
    return merton(n_assets, intensity=12.0, mean=-0.02, sd=0.06, systemic=systemic, dtype=dtype)
