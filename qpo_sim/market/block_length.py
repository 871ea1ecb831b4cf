r"""Block length of a bootstrap, chosen from the data: Politis & White (2004), Patton, Politis & White (2009).

The length minimises the mean squared error of the bootstrap's variance of a sample mean. With the flat-top kernel
$\lambda(x) = \min(1, 2(1-|x|))$ and sample autocovariances $\hat R(k)$, both sums over $|k| \le M$,

$$G = \sum \lambda(k/M)\,|k|\,\hat R(k), \qquad g = \sum \lambda(k/M)\,\hat R(k), \qquad
b = \Big(\frac{2 G^2}{D}\Big)^{1/3} n^{1/3},$$

where $D = 2 g^2$ for the stationary bootstrap and $\tfrac43 g^2$ for circular blocks. M is twice the first lag k from
which $K$ lags $k, \dots, k+K-1$ have $|\hat\rho| < 2\sqrt{\log_{10} n / n}$, $K = \max(5, \log_{10} n)$: the convention
of the authors' own program, and of the packages arch and np (arch divides $\hat R(k)$ by the variances of the two
overlapping parts instead of $\hat R(0)$, so where some $\hat\rho$ is all but at the band its M can be another). It is
about a *mean*: give returns for the mean of returns, squared returns for the clustering of volatility, which is what
the risk of a path depends on.
"""

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.types import Array

KINDS = ("stationary", "circular")
MIN_LENGTH = 12


def optimal_block_length(
    series: Float[Array, "dates series"] | Float[Array, " dates"],
    *,
    kind: str = "stationary",
    over: str | None = "mean",
) -> float | Float[np.ndarray, " series"]:
    """Block length of one or several series, at least 1 and at most min(3 sqrt(n), n / 3) rounded up.

    Args:
      series: observations in order of time, one column per series; NaN are left out of their column, as if the dates
        around them were neighbours.
      kind: stationary (the expected length) or circular.
      over: mean or max over the series, or None for one length per series.

    Raises:
      InputError: unknown kind or aggregate, fewer than 12 observations, an infinite or a constant series.
    """
    if kind not in KINDS:
        raise InputError(f"block length kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    if over not in ("mean", "max", None):
        raise InputError(f"block length over is {over!r}; it must be mean, max or None (one length per series).")
    columns = np.asarray(series, np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or columns.shape[1] == 0:
        raise InputError(f"block length series has the shape {columns.shape}; it must be (dates, series).")
    lengths = np.array([_single(column[~np.isnan(column)], kind, j) for j, column in enumerate(columns.T)])
    if over is None:
        return lengths
    return float(lengths.mean() if over == "mean" else lengths.max())


def _single(x: np.ndarray, kind: str, column: int) -> float:
    n = x.size
    if n < MIN_LENGTH:
        raise InputError(
            f"block length column {column} has {n} observations; it takes at least {MIN_LENGTH}: give the length "
            f"yourself."
        )
    if not np.all(np.isfinite(x)):
        raise InputError(f"block length column {column} holds an infinite value; every observation must be finite.")
    largest, x = np.abs(x).max(), x - x.mean()
    if not np.sqrt(x @ x / n) > 1e-12 * largest:
        raise InputError(f"block length column {column} is constant; leave it out or give the length yourself.")
    n_quiet = max(5, int(np.log10(n)))
    max_lag = min(int(np.ceil(np.sqrt(n))) + n_quiet, n - 1)
    covariance = np.array([x[k:] @ x[: n - k] for k in range(max_lag + 1)]) / n
    m = _bandwidth(np.abs(covariance / covariance[0]), n, n_quiet)
    lag = np.arange(1, m + 1)
    weight = np.minimum(1.0, 2.0 * (1.0 - lag / m))
    slope = 2.0 * np.sum(weight * lag * covariance[1 : m + 1])
    spectrum = covariance[0] + 2.0 * np.sum(weight * covariance[1 : m + 1])
    longest = float(np.ceil(min(3.0 * np.sqrt(n), n / 3.0)))
    # The flat-top estimate of the spectrum can be 0: nothing then speaks against the longest blocks.
    constant = (2.0 if kind == "stationary" else 4.0 / 3.0) * max(spectrum**2, 1e-300)
    return min(max((2.0 * slope**2 / constant * n) ** (1.0 / 3.0), 1.0), longest)


def _bandwidth(correlation: np.ndarray, n: int, n_quiet: int) -> int:
    max_lag = correlation.size - 1
    quiet = correlation < 2.0 * np.sqrt(np.log10(n) / n)
    for start in range(1, max_lag - n_quiet + 2):
        if quiet[start : start + n_quiet].all():
            return min(2 * start, max_lag)
    return max_lag
