r"""Steps of the square-root variance $dv=\kappa(\theta-v)dt+\sigma\sqrt v\,dW$ and of the return it drives, two ways.

A scheme is a pytree of vectors by asset for one length of step (`QuadraticExponential.of`, `FullTruncation.of`). Its
`step` takes the variance and a standard normal score and gives the next variance, the integral of the variance over the
step, and the part of the return that the variance's driver explains. What is left of the return is
$\sqrt{(1-\rho^2)\,\text{integral}}\;\varepsilon$ with $\varepsilon$ standard normal and independent of the score.
`lasting` and `within` say what becomes of a jump of the variance that comes at a uniform time within the step: the
share that is left at its end, and what a jump of 1 adds to the integral, both on average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim.numerics import Pair, Rows, each_asset, materialised, safe_log, safe_sqrt
from qpo_sim.types import Array

# psi above which the exponential branch is taken; Andersen finds any value in [1, 2] as good.
SWITCH = 1.5


class Step(NamedTuple):
    """What a scheme says of a step.

    Attributes:
      variance: at the end, per year.
      integral: of the variance over the step.
      shift: the driver's part of the log-return, with what makes E[exp(return)] = 1 when asked for.
    """

    variance: Rows
    integral: Rows
    shift: Rows


class QuadraticExponential(NamedTuple):
    r"""Andersen's (2008) QE scheme with the martingale correction, QE-M.

    Given v, the next variance v' has the exact conditional mean m and variance $s^2$. Where $\psi=s^2/m^2\le1.5$ it is
    $a(b+z)^2$; above that it is 0 or an exponential, picked by the uniform $\Phi(z)$. The return given both ends is
    $K_0+K_1v+K_2v'+\sqrt{K_3v+K_4v'}\,\varepsilon$ with the central weights $\gamma_1=\gamma_2=\frac12$, and $K_0$ is
    replaced by $K_0^*=-\log E[e^{Av'}\mid v]-(K_1+\frac12K_3)v$, $A=K_2+\frac12K_4$.

    Pathwise gradient: every leaf, but v' is not continuous in v and the parameters where psi passes 1.5.

    Attributes:
      kappa: speed at which the variance returns, per year.
      theta: long-run variance.
      years: length of the step.
      pull: $1-e^{-\kappa\Delta}$.
      spread: coefficient of v in $s^2$.
      floor: $s^2$ at v = 0.
      own: $\rho/\sigma$.
      slope: $K_2$.
      free: $K_3=K_4$.
      tilt: A.
      lasting: see the module.
      within: see the module.
    """

    kappa: Float[Array, " assets"]
    theta: Float[Array, " assets"]
    years: Float[Array, " assets"]
    pull: Float[Array, " assets"]
    spread: Float[Array, " assets"]
    floor: Float[Array, " assets"]
    own: Float[Array, " assets"]
    slope: Float[Array, " assets"]
    free: Float[Array, " assets"]
    tilt: Float[Array, " assets"]
    lasting: Float[Array, " assets"]
    within: Float[Array, " assets"]

    @classmethod
    def of(cls, kappa: Array, theta: Array, vol_of_vol: Array, rho: Array, dt: float) -> "QuadraticExponential":
        """The scheme for steps of `dt` years."""
        pull = -jnp.expm1(-kappa * dt)
        variance_rate = vol_of_vol * vol_of_vol / kappa
        own = rho / vol_of_vol
        slope = own + 0.5 * dt * (kappa * own - 0.5)
        free = 0.5 * dt * (1.0 - rho * rho)
        lasting = pull / (kappa * dt)
        return cls(
            kappa=kappa,
            theta=theta,
            years=jnp.full_like(kappa, dt),
            pull=pull,
            spread=variance_rate * pull * (1.0 - pull),
            floor=0.5 * theta * variance_rate * pull * pull,
            own=own,
            slope=slope,
            free=free,
            tilt=slope + 0.5 * free,
            lasting=lasting,
            within=(1.0 - lasting) / kappa,
        )

    def step(self, v: Rows, score: Rows, *, is_martingale: bool) -> Step:
        r"""One step of all assets; without `is_martingale` the shift is $\rho\int\sqrt v\,dW$ alone."""
        is_matrix = hasattr(v, "ndim")
        # One loop for all assets: it is long, and would be compiled once for each of them.
        matrices = (v, score) if is_matrix else materialised(_stacked)(v, score)
        pair = materialised(_next_variances)(self, *matrices)
        after, excess = (x if is_matrix else tuple(x[i] for i in range(len(v))) for x in pair)
        integral = each_asset(lambda x, y, years: 0.5 * years * (x + y), v, after, self.years)
        if is_martingale:
            shift = each_asset(_martingale_shift, v, after, excess, self.theta, self.pull, self.slope, self.free)
        else:
            shift = each_asset(_leverage, v, after, integral, self.kappa, self.theta, self.own, self.years)
        return Step(after, integral, shift)


def _stacked(*containers: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(jnp.stack(rows) for rows in containers)


def _next_variances(scheme: QuadraticExponential, v: Array, score: Array) -> Pair:
    return quadratic_exponential(QuadraticExponential(*(x[:, None] for x in scheme)), v, score)


def quadratic_exponential(scheme: QuadraticExponential, v: Array, score: Array) -> Pair:
    r"""The next variance, and $\log E[e^{Av'}\mid v]-Am$ (NaN where that mean does not exist).

    Andersen (2008) secs 3.2 and 4.3. The logarithm is given less its leading term $Am$, because the return needs
    $K_2v'$ less the logarithm: two numbers that nearly cancel.
    """
    tilt = scheme.tilt
    m = v + scheme.pull * (scheme.theta - v)
    ratio = m * m / (scheme.spread * v + scheme.floor)
    is_quadratic = ratio * SWITCH >= 1.0
    # Each branch sees a psi of its own side, so that the one that is not taken stays finite.
    x = 2.0 * jnp.maximum(ratio, 1.0 / SWITCH)
    b_square = x - 1.0 + jnp.sqrt(x * (x - 1.0))
    a = m / (1.0 + b_square)
    quadratic = m + a * (score * score - 1.0 + 2.0 * jnp.sqrt(b_square) * score)
    # 1 - p = 1 / half_psi_plus and 1 / beta = scale; -log(1 - U) is that of the score's upper tail.
    half_psi_plus = 0.5 + 0.5 / jnp.minimum(ratio, 1.0 / SWITCH)
    scale = m * half_psi_plus
    tail = -safe_log(0.5 * lax.erfc(score * 0.5**0.5))
    exponential = scale * jnp.maximum(tail - jnp.log(half_psi_plus), 0.0)
    after = jnp.where(is_quadratic, jnp.maximum(quadratic, 0.0), exponential)

    y, w = 2.0 * tilt * a, tilt * scale
    left = jnp.where(is_quadratic, 1.0 - y, 1.0 - w)
    left = jnp.where(left > 0.0, left, jnp.nan)
    log = jnp.log1p(jnp.where(is_quadratic, -y, w / (half_psi_plus * left)))
    of_quadratic = tilt * a * (2.0 * tilt * m - 1.0) / left - 0.5 * log
    return Pair(after, jnp.where(is_quadratic, of_quadratic, log - tilt * m))


def _martingale_shift(v, after, excess, theta, pull, slope, free):
    # K0* + K1 v + K2 v'
    m = v + pull * (theta - v)
    return slope * (after - m) - 0.5 * free * (v + m) - excess


def _leverage(v, after, integral, kappa, theta, own, years):
    # From the equation of v: v' - v - kappa (theta dt - integral) is vol_of_vol times the integral of sqrt(v) dW.
    return own * (after - v - kappa * (theta * years - integral))


class FullTruncation(NamedTuple):
    r"""Euler's scheme with full truncation, Lord, Koekkoek & van Dijk (2010).

    $v'=v+\kappa(\theta-v^+)\Delta+\sigma\sqrt{v^+\Delta}\,z$; the return sees $v^+\Delta$ and $z$ itself. First order
    in the step.

    Pathwise gradient: every leaf (zero through a root at $v\le0$).

    Attributes:
      theta: long-run variance.
      years: length of the step.
      pull: $\kappa\Delta$.
      spread: $\sigma\sqrt\Delta$.
      rho: correlation of price and variance.
      lasting: see the module; the variance moves at the ends of steps only, so a jump lasts whole.
      within: see the module.
    """

    theta: Float[Array, " assets"]
    years: Float[Array, " assets"]
    pull: Float[Array, " assets"]
    spread: Float[Array, " assets"]
    rho: Float[Array, " assets"]
    lasting: Float[Array, " assets"]
    within: Float[Array, " assets"]

    @classmethod
    def of(cls, kappa: Array, theta: Array, vol_of_vol: Array, rho: Array, dt: float) -> "FullTruncation":
        """The scheme for steps of `dt` years."""
        return cls(
            theta=theta,
            years=jnp.full_like(kappa, dt),
            pull=kappa * dt,
            spread=vol_of_vol * dt**0.5,
            rho=rho,
            lasting=jnp.ones_like(kappa),
            within=jnp.full_like(kappa, 0.5 * dt),
        )

    def step(self, v: Rows, score: Rows, *, is_martingale: bool) -> Step:
        r"""One step of all assets; without `is_martingale` the shift is $\rho\sqrt{v^+\Delta}\,z$ alone."""

        def next_variance(x, z, theta, pull, spread):
            positive = jnp.maximum(x, 0.0)
            return x + pull * (theta - positive) + spread * safe_sqrt(positive) * z

        def shift(x, z, rho):
            explained = rho * safe_sqrt(x) * z
            return explained - 0.5 * x if is_martingale else explained

        after = each_asset(next_variance, v, score, self.theta, self.pull, self.spread)
        integral = each_asset(lambda x, years: jnp.maximum(x, 0.0) * years, v, self.years)
        return Step(after, integral, each_asset(shift, integral, score, self.rho))


SCHEMES: dict[str, type[QuadraticExponential] | type[FullTruncation]] = {
    "qe": QuadraticExponential,
    "euler": FullTruncation,
}


def correlated(factor: Array | None, rows: Rows) -> Rows:
    """Rows of `factor` times the rows, for a lower triangular factor or None for the identity."""
    return rows if factor is None else product(factor, rows, is_lower=True)


def product(matrix: Array, rows: Rows, *, is_lower: bool = False) -> Rows:
    """Rows of an (assets, assets) matrix times the rows."""
    if hasattr(rows, "ndim"):
        return jnp.matmul(matrix, rows, precision=lax.Precision.HIGHEST)
    n = len(rows)
    return tuple(_dot(matrix[i], rows[: i + 1] if is_lower else rows) for i in range(n))


def _dot(weights: Array, rows: Sequence[Array]) -> Array:
    return sum((weights[j] * row for j, row in enumerate(rows[1:], 1)), weights[0] * rows[0])
