r"""Jumps that price and variance make together, Duffie, Pan & Singleton (2000), per asset.

At rate $\lambda$ the variance jumps by Y, exponential with mean $\mu_v$, and the log-price by a normal of mean
$\mu+\beta Y$ and standard deviation $\delta$. Without Y these are Merton's jumps of the price alone (Bates 1996).

The sums over a step are drawn by inversion: where a uniform u gives the count N = n it lies in an interval of length
P(N = n), and its place r there is a uniform that gives the sum of Y, $\mu_v\,Q_n(-\log r)$, the upper quantile of the
gamma law of shape n. u is resolved to $2^{-31}$, so r to $2^{-31}/P(N = n)$. $Q_1(x)=x$ is exact; polynomials for n of
2, 3 and 4 put the law of the sum wrong by less than 4e-7, 4e-5 and 4e-7 in probability given n, by 1e-8 in all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32

from qpo_sim.market.jump import poisson
from qpo_sim.numerics import Pair, Rows, materialised, polynomial, rows_like
from qpo_sim.random import Address
from qpo_sim.types import Array

# A step counts up to this many jumps; the most jumps expected of a step keep what lies beyond below 1e-7.
MAX_PRICE_JUMPS, MAX_VARIANCE_JUMPS = 12, 4
MOST_PRICE_JUMPS, MOST_VARIANCE_JUMPS = 1.0, 0.1

# Cells in which `poisson.tail_uniform` puts a uniform.
_N_CELLS = 2.0**31

# Upper quantile of the gamma law at probability exp(-x), lowest power first: of shape 2 in x^(1/2), in which it is
# analytic, and of shapes 3 and 4 in x^(1/4). Weighted least squares on x <= 19, 17 and 14.
_GAMMA_2 = (
    0.0, 1.41425741, 0.666348934, 0.0794612616, -0.0161589552, 0.00254886295, -0.000282196939, 1.90169922e-05,
    -5.74715273e-07,
)  # fmt: skip
_GAMMA_3 = (
    -0.00297023379, 0.66117996, 2.7458849, -2.41349864, 3.6364255, -2.17115831, 1.0369004, -0.261899352, 0.0273442827,
)  # fmt: skip
_GAMMA_4 = (
    0.0, 2.21428704, 0.971868157, 0.640858889, 0.40079695, 0.0981773213, 0.0433507338, -0.0196960978, 0.00234903581,
)  # fmt: skip


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
    def n_slots(self) -> int:
        """A word for the count and the sum of the exponentials, and one for a normal, by asset."""
        return 2 * ((self.intensity.shape[0] + 1) // 2)

    def prepare(self, dt: float) -> "Constants":
        """Constants for steps of `dt` years."""
        expected = lax.stop_gradient(self.intensity * dt)
        growth = self.mean + 0.5 * self.std * self.std
        if self.variance_mean is not None and self.leverage is not None:
            growth = growth - jnp.log1p(-self.leverage * self.variance_mean)
        compensator = -expected * jnp.expm1(growth)
        if self.variance_mean is None:
            tails = poisson.tail_probabilities(expected, MAX_PRICE_JUMPS)
            return Constants(tails[:, None, :], compensator, None, self)
        # On the edges of cells, as places in an interval must fill it; which cells lie below a tail stays the same.
        tails = jnp.round(poisson.tail_probabilities(expected, MAX_VARIANCE_JUMPS) * _N_CELLS) / _N_CELLS
        start = jnp.concatenate([tails[1:], jnp.zeros_like(tails[:1])])
        scale = 1.0 / jnp.maximum(tails - start, 1.0 / _N_CELLS)
        return Constants(tails[:, None, :], compensator, Intervals(start, scale), self)


class Intervals(NamedTuple):
    """Where u lies for n = 1, 2 ... jumps: the start of the interval and one over its length, by asset."""

    start: Float32[Array, "counts assets"]
    scale: Float32[Array, "counts assets"]


class Constants(NamedTuple):
    """Constants of a step.

    Attributes:
      tails: P(more than n jumps).
      compensator: minus log E[exp(sum of log-jumps)].
      intervals: None when only the price jumps.
      jumps: the parameters.
    """

    tails: Float32[Array, "counts 1 assets"]
    compensator: Float[Array, " assets"]
    intervals: Intervals | None
    jumps: VarianceJumps


class Draw(NamedTuple):
    """Sums over a step: of the log-jumps of the price, and of the jumps of the variance (None when it has none)."""

    price: Rows
    variance: Rows | None


def draw(constants: Constants, address: Address, like: Rows) -> Draw:
    """The jumps of one step, in the container of `like`."""
    n = constants.jumps.intensity.shape[0]
    n_pairs = (n + 1) // 2
    u = materialised(lambda at: poisson.uniform_pairs_at(at, n_pairs))(address)
    z = materialised(lambda at: poisson.normal_pairs_at(at, n_pairs))(address.after(n_pairs))
    # Both words of a slot, one for each of two assets.
    rows: list[Any] = [None] * n
    for k, (of_u, of_z) in enumerate(zip(u, z, strict=True)):
        sums = materialised(_sums)(jax.tree.map(lambda x, k=k: x[..., k::2], constants), of_u, of_z)
        price, variance = (sums, None) if constants.intervals is None else sums
        for i in range(k, n, 2):
            rows[i] = (price[i // 2], None if variance is None else variance[i // 2])
    price, variance = zip(*rows, strict=True)
    return Draw(rows_like(like, price), None if constants.intervals is None else rows_like(like, variance))


def _sums(constants: Constants, u: Array, z: Array) -> Array | Pair:
    mean, std = constants.jumps.mean[:, None], constants.jumps.std[:, None]
    u, z, dtype = u[: mean.shape[0]], z[: mean.shape[0]], mean.dtype
    count = poisson.count_rows(u, constants.tails, (), dtype)
    price = count * mean + jnp.sqrt(count) * std * z.astype(dtype)
    if constants.intervals is None:
        return price
    tails = constants.tails[:, 0, :, None]
    assert constants.jumps.variance_mean is not None and constants.jumps.leverage is not None
    variance_mean, leverage = constants.jumps.variance_mean[:, None], constants.jumps.leverage[:, None]
    variance = variance_mean * _sum_of_exponentials(u, tails, constants.intervals).astype(dtype)
    return Pair(price + leverage * variance, variance)


def _sum_of_exponentials(u: Array, tails: Array, intervals: Intervals) -> Array:
    # Of mean 1; 0 where u gives no jump.
    start, scale = (x[0][:, None] for x in intervals)
    for k in range(1, MAX_VARIANCE_JUMPS):
        start = jnp.where(u < tails[k], intervals.start[k][:, None], start)
        scale = jnp.where(u < tails[k], intervals.scale[k][:, None], scale)
    x = jnp.maximum(-jnp.log((u - start) * scale), 0.0)
    return jnp.where(u < tails[0], _gamma_quantile(x, u < tails[1], u < tails[2], u < tails[3]), 0.0)


def _gamma_quantile(x: Array, is_two: Array, is_three: Array, is_four: Array) -> Array:
    root = jnp.sqrt(x)
    many = [jnp.where(is_four, *map(np.float32, pair)) for pair in zip(_GAMMA_4, _GAMMA_3, strict=True)]
    of_many = jnp.maximum(polynomial(many, jnp.sqrt(root)), 0.0)
    of_two = polynomial([np.float32(c) for c in _GAMMA_2], root)
    return jnp.where(is_three, of_many, jnp.where(is_two, of_two, x))


def mean_variance(jumps: VarianceJumps | None, kappa: Array) -> np.ndarray | float:
    r"""What the jumps add to the long-run variance, $\lambda\mu_v/\kappa$."""
    if jumps is None or jumps.variance_mean is None:
        return 0.0
    intensity, size, speed = (np.asarray(x, np.float64) for x in (jumps.intensity, jumps.variance_mean, kappa))
    return intensity * size / speed
