r"""Jumps that price and variance make together, Duffie, Pan & Singleton (2000), per asset.

At rate $\lambda$ the variance jumps by Y, exponential with mean $\mu_v$, and the log-price by a normal of mean
$\mu+\beta Y$ and standard deviation $\delta$. Without Y these are Merton's jumps of the price alone (Bates 1996). The
sums over a step are exact in law: the count by inversion, the sum of Y as a product of uniforms.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32

from qpo_sim.market.jump import poisson
from qpo_sim.numerics import Rows, each_asset, rows_like
from qpo_sim.random import Address, normal_score, uniform
from qpo_sim.types import Array

# A step counts up to this many jumps; the most jumps expected of a step keep what lies beyond below 1e-7.
MAX_PRICE_JUMPS, MAX_VARIANCE_JUMPS = 12, 4
MOST_PRICE_JUMPS, MOST_VARIANCE_JUMPS = 1.0, 0.1


class VarianceJumps(NamedTuple):
    """Parameters by asset, per year; the last two are None when only the price jumps.

    Pathwise gradient: all but the intensity, whose gradient is exactly zero (discrete draws).

    Attributes:
      intensity: jumps per year.
      mean: mean log-jump of the price, without the variance's part.
      std: its standard deviation, given the variance's jump.
      variance_mean: mean jump of the variance.
      leverage: slope of the price's log-jump in the variance's jump.
    """

    intensity: Float[Array, " assets"]
    mean: Float[Array, " assets"]
    std: Float[Array, " assets"]
    variance_mean: Float[Array, " assets"] | None = None
    leverage: Float[Array, " assets"] | None = None

    @property
    def most_per_step(self) -> float:
        """Most jumps that may be expected of a step."""
        return MOST_PRICE_JUMPS if self.variance_mean is None else MOST_VARIANCE_JUMPS

    @property
    def slots_per_asset(self) -> int:
        """One for a count and a normal, two more for the exponentials."""
        return 1 if self.variance_mean is None else 1 + MAX_VARIANCE_JUMPS // 2

    def prepare(self, dt: float) -> "Constants":
        """Constants for steps of `dt` years."""
        expected = lax.stop_gradient(self.intensity * dt)
        growth = self.mean + 0.5 * self.std * self.std
        if self.variance_mean is not None and self.leverage is not None:
            growth = growth - jnp.log1p(-self.leverage * self.variance_mean)
        n_max = MAX_PRICE_JUMPS if self.variance_mean is None else MAX_VARIANCE_JUMPS
        tails = poisson.tail_probabilities(expected, n_max)[:, None, :]
        return Constants(tails, -expected * jnp.expm1(growth), self)


class Constants(NamedTuple):
    """Jumps per step: P(more than n jumps), minus log E[exp(sum of log-jumps)], and the parameters."""

    tails: Float32[Array, "counts 1 assets"]
    compensator: Float[Array, " assets"]
    jumps: VarianceJumps


class Draw(NamedTuple):
    """Sums over a step: of the log-jumps of the price, and of the jumps of the variance (None when it has none)."""

    price: Rows
    variance: Rows | None


def draw(constants: Constants, address: Address, like: Rows, dtype: Any) -> Draw:
    """The jumps of one step, in the container of `like`."""
    jumps = constants.jumps
    n = jumps.intensity.shape[0]
    words = address.words(2 * n)
    u = rows_like(like, [poisson.tail_uniform(word) for word in words[::2]])
    normal = rows_like(like, [normal_score(word).astype(dtype) for word in words[1::2]])
    count = poisson.count_rows(u, constants.tails, (), dtype)
    price = each_asset(lambda k, z, mean, std: k * mean + jnp.sqrt(k) * std * z, count, normal, jumps.mean, jumps.std)
    if jumps.variance_mean is None:
        return Draw(price, None)
    words = address.after(n).words(MAX_VARIANCE_JUMPS * n)
    columns = [rows_like(like, words[k::MAX_VARIANCE_JUMPS]) for k in range(MAX_VARIANCE_JUMPS)]
    variance = each_asset(_sum_of_exponentials, count, jumps.variance_mean, *columns)
    return Draw(each_asset(lambda x, y, slope: x + slope * y, price, variance, jumps.leverage), variance)


def _sum_of_exponentials(count: Array, mean: Array, *words: Array) -> Array:
    product = jnp.ones_like(count)
    for k, word in enumerate(words):
        product = product * jnp.where(count > k, uniform(word).astype(count.dtype), 1.0)
    return -mean * jnp.log(product)


def mean_variance(jumps: VarianceJumps | None, kappa: Array) -> np.ndarray | float:
    r"""What the jumps add to the long-run variance, $\lambda\mu_v/\kappa$."""
    if jumps is None or jumps.variance_mean is None:
        return 0.0
    intensity, size, speed = (np.asarray(x, np.float64) for x in (jumps.intensity, jumps.variance_mean, kappa))
    return intensity * size / speed
