r"""Are the forecast distributions right? Tests of probability integral transforms (PIT).

The PIT of a day is $U_t = F_t(y_t)$ with that day's forecast law. Forecasts that are right make U uniform on (0, 1),
and independent from day to day for one-day forecasts. A small p-value speaks against the forecasts.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, check_level
from qpo_sim.types import Array
from qpo_sim.validation.inputs import numbers, randomised_rank, same_length, unit_interval


class Uniformity(NamedTuple):
    """Distance of the PIT's distribution from uniform, and its p-value."""

    statistic: float
    p_value: float


class Berkowitz(NamedTuple):
    """Likelihood ratio, p-value and degrees of freedom; the fitted mean, variance and autocorrelation of z.

    A variance above 1 means forecasts that are too narrow, a mean above 0 outcomes above the forecasts.
    """

    statistic: float
    p_value: float
    dof: int
    mean: float
    variance: float
    autocorrelation: float


def pit(outcome: Float[Array, " days"], sample: Float[Array, "days draws"], *, seed: int) -> Float[Array, " days"]:
    r"""PIT from draws of the forecast law: the outcome's rank among the draws, spread evenly over its cell.

    $U = (\#\{x < y\} + V (\#\{x = y\} + 1))/(n + 1)$ with V uniform: exactly uniform under the null for any number of
    draws and with atoms, since outcome and draws are then exchangeable. The test statistics depend on the seed as soon
    as the draws are few or tied. Czado, Gneiting & Held (2009).

    Args:
      outcome: what happened.
      sample: draws of each day's forecast law.
      seed: of NumPy's default generator, for V.

    Raises:
      InputError: not finite or lengths differ.
    """
    outcome, sample = numbers("outcome", outcome), numbers("sample", sample, axes=2)
    same_length(outcome=outcome, sample=sample)
    return randomised_rank(outcome, sample, np.random.default_rng(seed))


def kolmogorov_smirnov(rank: Float[Array, " days"]) -> Uniformity:
    r"""$\sup_u |F_n(u) - u|$ with its exact law for independent uniforms. Weak in the tails: see `anderson_darling`.

    Raises:
      InputError: a value outside [0, 1].
    """
    from scipy import stats

    done = stats.kstest(unit_interval("rank", rank), "uniform")
    return Uniformity(float(done.statistic), float(done.pvalue))


def cramer_von_mises(rank: Float[Array, " days"]) -> Uniformity:
    r"""$n \int (F_n(u) - u)^2\,du$ for independent uniforms; law of Csorgo & Faraway (1996).

    Raises:
      InputError: a value outside [0, 1], or fewer than 2.
    """
    from scipy import stats

    done = stats.cramervonmises(unit_interval("rank", rank, at_least=2), "uniform")
    return Uniformity(float(done.statistic), float(done.pvalue))


def anderson_darling(rank: Float[Array, " days"]) -> Uniformity:
    r"""$A^2 = -n - \frac1n\sum_i (2i-1)[\log u_{(i)} + \log(1-u_{(n+1-i)})]$ for independent uniforms.

    Weighs the tails up. p-value by Marsaglia & Marsaglia (2004), good to about 1e-5 for n of 8 and more.

    Raises:
      InputError: a value outside (0, 1): there the statistic is infinite.
    """
    u = np.sort(unit_interval("rank", rank, is_open=True))
    n = u.size
    odd = 2.0 * np.arange(1, n + 1) - 1.0
    statistic = float(-n - np.mean(odd * (np.log(u) + np.log1p(-u[::-1]))))
    limit = _anderson_darling_limit(statistic)
    return Uniformity(statistic, float(np.clip(1.0 - limit - _anderson_darling_correction(n, limit), 0.0, 1.0)))


def berkowitz(rank: Float[Array, " days"], *, tests: str = "joint") -> Berkowitz:
    r"""Null: $z_t = \Phi^{-1}(U_t)$ are independent standard normal; against a Gaussian AR(1).

    Likelihood ratio given the first day: $2[\ell(\hat\mu,\hat\sigma^2,\hat\rho) - \ell(0,1,0)]$, chi-square(3). With
    `tests="independence"` only $\rho = 0$ is tested, chi-square(1). Berkowitz (2001).

    Args:
      rank: PIT values in order of time.
      tests: "joint" or "independence".

    Raises:
      InputError: a value outside (0, 1), fewer than 4, all equal, or an unknown `tests`.
    """
    from scipy.special import chdtrc, ndtri

    if tests not in ("joint", "independence"):
        raise InputError(f"tests is {tests!r}; choose joint or independence.")
    z = ndtri(unit_interval("rank", rank, is_open=True, at_least=4))
    now, before = z[1:], z[:-1]
    if np.ptp(before) == 0.0 or np.ptp(now) == 0.0:
        raise InputError("rank has equal values on all days but one; the autocorrelation needs values that differ.")
    rho = float(np.sum((before - before.mean()) * (now - now.mean())) / np.sum((before - before.mean()) ** 2))
    constant = float(now.mean() - rho * before.mean())
    variance = float(np.mean((now - constant - rho * before) ** 2))
    free = _normal_log_likelihood(now - constant - rho * before, variance)
    if tests == "joint":
        null, dof = _normal_log_likelihood(now, 1.0), 3
    else:
        null, dof = _normal_log_likelihood(now - now.mean(), float(np.var(now))), 1
    statistic = max(2.0 * (free - null), 0.0)
    mean = constant / (1.0 - rho) if rho != 1.0 else float("nan")
    return Berkowitz(statistic, float(chdtrc(dof, statistic)), dof, mean, variance, rho)


def berkowitz_tail(rank: Float[Array, " days"], *, level: float) -> Berkowitz:
    r"""Null: z beyond $\Phi^{-1}(a)$ follows the standard normal's tail; the rest enters only by its number.

    Censored normal likelihood with mean and variance free against 0 and 1, chi-square(2). Berkowitz (2001), eq. 9.

    Args:
      rank: PIT values, large for large losses.
      level: confidence a; values above it are the tail.

    Raises:
      InputError: a value outside (0, 1), a level outside (0, 1), or fewer than 2 different values in the tail.
    """
    from scipy import optimize
    from scipy.special import chdtrc, log_ndtr, ndtri

    check_level(level)
    z, edge = ndtri(unit_interval("rank", rank, is_open=True)), float(ndtri(level))
    tail = z[z > edge]
    if np.unique(tail).size < 2:
        raise InputError(f"rank has {tail.size} values above {level}; at least 2 different ones are needed.")
    n_rest = z.size - tail.size

    def log_likelihood(mean: float, log_scale: float) -> float:
        scale = np.exp(log_scale)
        rest = n_rest * log_ndtr((edge - mean) / scale)
        return float(rest) + _normal_log_likelihood(tail - mean, scale**2)

    best = optimize.minimize(
        lambda x: -log_likelihood(*x),
        np.zeros(2),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000, "maxfev": 4000},
    )
    statistic = max(2.0 * (-float(best.fun) - log_likelihood(0.0, 0.0)), 0.0)
    mean, log_scale = (float(x) for x in best.x)
    return Berkowitz(statistic, float(chdtrc(2, statistic)), 2, mean, float(np.exp(2.0 * log_scale)), float("nan"))


def _normal_log_likelihood(residual: Array, variance: float) -> float:
    return float(-0.5 * (residual.size * np.log(2.0 * np.pi * variance) + np.sum(residual**2) / variance))


def _anderson_darling_limit(x: float) -> float:
    # Distribution function for infinitely many values: Marsaglia & Marsaglia's `adinf`.
    if x <= 0.0:
        return 0.0
    if x < 2.0:
        series = (2.00012, 0.247105, -0.0649821, 0.0347962, -0.011672, 0.00168691)
        return float(np.exp(-1.2337141 / x) / np.sqrt(x) * np.polyval(series[::-1], x))
    series = (1.0776, -2.30695, 0.43424, -0.082433, 0.008056, -0.0003146)
    return float(np.exp(-np.exp(np.polyval(series[::-1], x))))


def _anderson_darling_correction(n: int, x: float) -> float:
    # What to add to the limit at n values: their `errfix`.
    if x > 0.8:
        return float(np.polyval((255.7844, -1116.36, 1950.646, -1705.091, 745.2337, -130.2137), x)) / n
    edge = 0.01265 + 0.1757 / n
    if x < edge:
        x /= edge
        return float(np.sqrt(x) * (1.0 - x) * (49.0 * x - 102.0)) * (0.0037 / n**2 + 0.00078 / n + 0.00006) / n
    x = (x - edge) / (0.8 - edge)
    value = np.polyval((1.91864, -8.259, 14.458, -14.6538, 6.54034, -0.00022633), x)
    return float(value) * (0.04213 + 0.01365 / n) / n
