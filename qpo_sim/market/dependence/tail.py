r"""How much assets fall and rise together: tail dependence and crash correlation, of data and of t copulas.

Measures of a table of returns with dates in rows and assets in columns, in float64 numpy; NaN where an asset has no
return. Each pair is measured on the dates that both have, with ranks among those.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, check_level
from qpo_sim.market.dependence.copula import tail_dependence_t
from qpo_sim.types import Estimate

METHODS = ("delta", "bootstrap")
# Fewest dates in the tail of a pair for its entry not to be NaN.
MIN_TAIL = 5


class TailDependence(NamedTuple):
    """Lower and upper tail dependence of all pairs at a level, and the number of dates of each pair."""

    lower: Estimate
    upper: Estimate
    n_dates: Float[np.ndarray, "assets assets"]


def tail_dependence(
    returns: Any,
    *,
    level: float = 0.05,
    method: str = "delta",
    block_length: int = 10,
    n_resamples: int = 400,
    seed: int = 0,
) -> TailDependence:
    r"""Empirical tail dependence $\hat\lambda_L(q)=\hat C(q,q)/q$ and $\hat\lambda_U(q)=\hat P(U>1-q,V>1-q)/q$.

    The share of one asset's worst (best) q of dates that are among the other's worst (best) q.

    The standard error is by the delta method, for the empirical copula of independent dates at a fixed level (Schmidt &
    Stadtmueller 2006; Fermanian, Radulovic & Wegkamp 2004): with $c_1, c_2$ the derivatives of C at (q, q), of
    $C(1-C)+(c_1^2+c_2^2)q(1-q)-2(c_1+c_2)C(1-q)+2c_1c_2(C-q^2)$ over $nq^2$. Or from circular blocks of
    dates, the same for all assets and with quantiles of their own in each resample: these also cover that bad days come
    in clusters. For the 95 % interval see `Estimate.interval`.

    Args:
      returns: dates x assets, NaN where there is none.
      level: q, the share of dates that counts as the tail.
      method: "delta" or "bootstrap".
      block_length: dates per block of the bootstrap.
      n_resamples: of the bootstrap.
      seed: of the bootstrap.

    Returns:
      Matrices with ones on the diagonal; NaN for pairs with fewer than `MIN_TAIL` dates in the tail.

    Raises:
      InputError: a table that is not two-dimensional or holds infinities, a level outside (0, 0.5), unknown method.
    """
    x = _table(returns)
    if not 0.0 < level < 0.5:
        raise InputError(f"level is {level}; the share of dates in a tail must lie in (0, 0.5), e.g. 0.05.")
    if method not in METHODS:
        raise InputError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if block_length < 1 or n_resamples < 2:
        raise InputError(f"block_length is {block_length} and n_resamples {n_resamples}; at least 1 and 2 are needed.")
    n = x.shape[1]
    value, error = np.ones((2, n, n)), np.zeros((2, n, n))
    n_dates = np.zeros((n, n))
    for i in range(n):
        n_dates[i, i] = np.count_nonzero(~np.isnan(x[:, i]))
        for j in range(i):
            both = ~np.isnan(x[:, i]) & ~np.isnan(x[:, j])
            pair = x[both][:, [i, j]]
            n_dates[i, j] = n_dates[j, i] = pair.shape[0]
            for side, sign in enumerate((1.0, -1.0)):
                found = _pair_tail(sign * pair, level, method, block_length, n_resamples, seed)
                value[side, i, j], error[side, i, j] = value[side, j, i], error[side, j, i] = found
    return TailDependence(Estimate(value[0], error[0]), Estimate(value[1], error[1]), n_dates)


def _pair_tail(
    pair: np.ndarray, level: float, method: str, block_length: int, n_resamples: int, seed: int
) -> tuple[float, float]:
    n_dates = pair.shape[0]
    n_tail = int(level * (n_dates + 1))
    if n_tail < MIN_TAIL:
        return np.nan, np.nan
    value = _share(pair[None], n_tail)[0]
    if method == "delta":
        return value, _delta_error(pair, value, n_tail)
    rng = np.random.default_rng(seed)
    n_blocks = -(-n_dates // block_length)
    starts = rng.integers(n_dates, size=(n_resamples, n_blocks, 1))
    dates = ((starts + np.arange(block_length)) % n_dates).reshape(n_resamples, -1)[:, :n_dates]
    return value, float(np.std(_share(pair[dates], n_tail), ddof=1))


def _share(pairs: np.ndarray, n_tail: int) -> np.ndarray:
    # Of tables (resamples, dates, 2): dates with both in the tail, over dates with one. Ties enter together.
    threshold = np.partition(pairs, n_tail - 1, axis=1)[:, n_tail - 1, :]
    in_tail = pairs <= threshold[:, None, :]
    return np.count_nonzero(in_tail.all(axis=2), axis=1) / np.mean(np.count_nonzero(in_tail, axis=1), axis=1)


def _delta_error(pair: np.ndarray, value: float, n_tail: int) -> float:
    n = pair.shape[0]
    rank = np.argsort(np.argsort(pair, axis=0), axis=0) + 1
    # Derivatives of C at the corner from a band of ranks about it, as wide as the tail has room for.
    width = max(2, int(min(n_tail / 2, n**0.5)))
    slopes = []
    for own, other in ((0, 1), (1, 0)):
        band = np.abs(rank[:, own] - n_tail) <= width
        slopes.append(np.mean(rank[band, other] <= n_tail))
    c1, c2 = slopes
    q = n_tail / n
    c = value * q
    variance = (
        c * (1.0 - c) + (c1**2 + c2**2) * q * (1.0 - q) - 2.0 * (c1 + c2) * c * (1.0 - q) + 2.0 * c1 * c2 * (c - q * q)
    )
    return float(np.sqrt(max(variance, 0.0) / n) / q)


def t_copula_tail_dependence(correlation: Any, dof: float, *, level: float | None = None) -> np.ndarray:
    r"""Tail dependence of the t copula, in both tails alike: its limit (`copula.tail_dependence_t`), or at a level.

    At a level q it is $C(q,q)/q$, which `tail_dependence` estimates and which lies above the limit.

    Args:
      correlation: matrix, or any array of correlations in [-1, 1].
      dof: degrees of freedom, positive; infinity for the Gaussian copula.
      level: q in (0, 0.5), or None for the limit.

    Raises:
      InputError: correlations, dof or level out of their range.
    """
    rho = np.asarray(correlation, np.float64)
    if not np.all(np.abs(rho) <= 1.0):
        raise InputError("correlation has entries outside [-1, 1].")
    if not dof > 0.0:
        raise InputError(f"dof is {dof}; it must be positive.")
    inner = np.abs(rho) < 1.0
    safe = np.where(inner, rho, 0.0)
    if level is None:
        value = np.zeros_like(safe) if np.isinf(dof) else tail_dependence_t(dof, safe)
    else:
        if not 0.0 < check_level(level) < 0.5:
            raise InputError(f"level is {level}; it must lie in (0, 0.5), e.g. 0.05.")
        value = _joint_tail(safe, dof, level)
    return np.where(inner, value, np.where(rho > 0.0, 1.0, 0.0))


def _joint_tail(rho: np.ndarray, dof: float, level: float) -> np.ndarray:
    # C(q, q) / q as the mean over u in (0, q) of P(V <= q | U = u), with nodes that crowd at 0, where it bends.
    from scipy import special

    nodes, weights = np.polynomial.legendre.leggauss(200)
    s = 0.5 * (nodes + 1.0)
    u, weight = level * s**4, 0.5 * weights * 4.0 * s**3
    rho = rho[..., None]
    if np.isinf(dof):
        x, edge = special.ndtri(u), special.ndtri(level)
        inside = special.ndtr((edge - rho * x) / np.sqrt(1.0 - rho**2))
    else:
        x, edge = special.stdtrit(dof, u), special.stdtrit(dof, level)
        scale = np.sqrt((dof + x**2) * (1.0 - rho**2) / (dof + 1.0))
        inside = special.stdtr(dof + 1.0, (edge - rho * x) / scale)
    return inside @ weight


class CrashCorrelation(NamedTuple):
    """Correlation of all pairs on the dates on which one asset is in its lower tail, and how many dates those are.

    `given` names the asset's column, `label` the regime (None for all dates).
    """

    given: int
    label: Any
    correlation: Estimate
    n_dates: Float[np.ndarray, "assets assets"]


def crash_correlation(
    returns: Any, given: int, *, level: float = 0.05, labels: Sequence[Any] | None = None
) -> tuple[CrashCorrelation, ...]:
    r"""Correlation of returns on the dates on which the asset `given` is at or below its `level` quantile.

    Conditioning on one end of an asset's returns cuts its variance and with it the correlations of even a Gaussian law;
    compare with a model through the same function, not with the unconditional correlation. Standard errors are those
    of the influence function $z_iz_j-\rho(z_i^2+z_j^2)/2$ of independent dates, whatever the law.

    Args:
      returns: dates x assets, NaN where there is none.
      given: column of the asset that crashes.
      level: probability of the quantile.
      labels: one regime per date; the quantile is then that of the asset's returns within the regime.

    Returns:
      One result for each regime in sorted order, or one for all dates; NaN for pairs with fewer than `MIN_TAIL` dates.

    Raises:
      InputError: a bad table, a column that is not there, a level outside (0, 1), or labels of another length.
    """
    x = _table(returns)
    check_level(level)
    if not 0 <= given < x.shape[1]:
        raise InputError(f"given is {given}; the table has the columns 0 to {x.shape[1] - 1}.")
    if labels is None:
        return (_crash(x, given, level, None),)
    of = np.asarray(labels)
    if of.shape != (x.shape[0],):
        raise InputError(f"labels has shape {of.shape}; {x.shape[0]} dates need one label each.")
    return tuple(_crash(x[of == label], given, level, label) for label in np.unique(of).tolist())


def _crash(x: np.ndarray, given: int, level: float, label: Any) -> CrashCorrelation:
    own = x[:, given]
    here = ~np.isnan(own)
    crash = here.copy()
    if here.any():
        crash[here] = own[here] <= np.quantile(own[here], level, method="inverted_cdf")
    rows, n = x[crash], x.shape[1]
    value, error, n_dates = np.full((n, n), np.nan), np.full((n, n), np.nan), np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            both = ~np.isnan(rows[:, i]) & ~np.isnan(rows[:, j])
            a, b = rows[both, i], rows[both, j]
            n_dates[i, j] = n_dates[j, i] = a.size
            if a.size < MIN_TAIL or a.std() == 0.0 or b.std() == 0.0:
                continue
            a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
            rho = float(np.mean(a * b))
            influence = a * b - 0.5 * rho * (a * a + b * b)
            value[i, j] = value[j, i] = rho
            error[i, j] = error[j, i] = float(np.std(influence) / np.sqrt(a.size))
    return CrashCorrelation(given, label, Estimate(value, error), n_dates)


def _table(returns: Any) -> np.ndarray:
    x = np.asarray(returns, np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise InputError(f"returns have shape {x.shape}; they must be a table of dates x assets.")
    if np.isinf(x).any():
        date, asset = np.argwhere(np.isinf(x))[0]
        raise InputError(f"returns are infinite in row {date + 1}, column {asset + 1}; use NaN where there is none.")
    return x
