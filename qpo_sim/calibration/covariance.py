r"""Covariance matrices from few or incomplete rows: shrinkage, random-matrix cleaning, weights that fade, holes.

All take returns with one row per step, oldest first, and one column per asset; covariances are per step in the square
of the returns' unit, with the denominator n of the maximum likelihood estimate, $S = \frac1n\sum_t x_t x_t'$, after the
mean is taken off (or not, `is_centred=True`). The four that shrink or clean need whole rows and leave the others out;
`pairwise_covariance` and `ewma_covariance` use every value. NumPy in float64, no gradients, no randomness.

Only elliptical returns with enough moments make the intensities optimal: the linear ones need a fourth moment, which
returns with a t tail of 4 or fewer degrees of freedom lack.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.calibration.inputs import ReturnTable, read_returns
from qpo_sim.errors import InputError

# Smallest eigenvalue, on the scale of a correlation matrix, that counts as positive definite.
EIGENVALUE_FLOOR = 1e-10
TARGETS = ("identity", "constant_correlation")
# The kernel of the analytic estimator has a bandwidth n^(-1/3) relative to the eigenvalue, below 1/sqrt(5) from here.
MIN_ROWS_NONLINEAR = 12


class Shrunk(NamedTuple):
    """A covariance between the sample's and a target.

    Attributes:
      covariance: (1 - shrinkage) sample + shrinkage target, positive definite.
      shrinkage: weight of the target, in [0, 1].
      target: what the sample is drawn to.
      sample: covariance of the whole rows, denominator n.
      n_rows: whole rows used.
      n_dropped: rows left out because of a missing value.
    """

    covariance: Float[np.ndarray, "assets assets"]
    shrinkage: float
    target: Float[np.ndarray, "assets assets"]
    sample: Float[np.ndarray, "assets assets"]
    n_rows: int
    n_dropped: int


class NonlinearShrunk(NamedTuple):
    """A covariance with the sample's eigenvectors and eigenvalues of its own.

    Attributes:
      covariance: positive definite.
      eigenvalues: its eigenvalues, in the order of `sample_eigenvalues`; they need not increase.
      sample_eigenvalues: of the sample covariance, increasing.
      n_rows: whole rows used.
      n_dropped: rows left out because of a missing value.
    """

    covariance: Float[np.ndarray, "assets assets"]
    eigenvalues: Float[np.ndarray, " assets"]
    sample_eigenvalues: Float[np.ndarray, " assets"]
    n_rows: int
    n_dropped: int


class Cleaned(NamedTuple):
    """A covariance whose noise eigenvalues are flattened.

    Attributes:
      covariance: positive definite, with the variances of the sample.
      correlation: its correlation matrix.
      edge: upper end of the eigenvalues that noise alone gives the correlation matrix.
      n_signal: eigenvalues above the edge, which are kept.
      noise_variance: variance of the noise, as a share of an asset's variance.
      n_rows: whole rows used.
      n_dropped: rows left out because of a missing value.
    """

    covariance: Float[np.ndarray, "assets assets"]
    correlation: Float[np.ndarray, "assets assets"]
    edge: float
    n_signal: int
    noise_variance: float
    n_rows: int
    n_dropped: int


class Repaired(NamedTuple):
    """A covariance estimated entry by entry, made positive definite where it was not.

    Attributes:
      covariance: positive definite.
      correlation: its correlation matrix.
      n_shared: rows behind each entry.
      is_repaired: whether `clip_to_positive_definite` had to change the correlations.
    """

    covariance: Float[np.ndarray, "assets assets"]
    correlation: Float[np.ndarray, "assets assets"]
    n_shared: Any
    is_repaired: bool


def ledoit_wolf(returns: Any, *, target: str = "identity", is_centred: bool = False) -> Shrunk:
    r"""Linear shrinkage with the intensity that minimises the expected squared Frobenius distance to the truth.

    `identity`: target $\mu I$ with $\mu = \mathrm{tr}\,S/p$ and

    $$\delta = \min\Big(1, \frac{\frac1{n^2}\sum_t \|x_t x_t' - S\|_F^2}{\|S - \mu I\|_F^2}\Big),$$

    Ledoit & Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices", JMVA 88.

    `constant_correlation`: target with the sample's variances and its mean correlation $\bar r$ everywhere, and
    $\delta = \min(1, \max(0, (\pi - \rho)/(n\gamma)))$, where $\pi=\sum_{ij}\pi_{ij}$,
    $\pi_{ij} = \frac1n\sum_t (x_{ti}x_{tj}-s_{ij})^2$, $\gamma = \|F-S\|_F^2$,
    $\rho = \sum_i \pi_{ii} + \sum_{i\ne j}\bar r\,\sqrt{s_{jj}/s_{ii}}\,\vartheta_{ij}$ and
    $\vartheta_{ij}=\frac1n\sum_t (x_{ti}^2-s_{ii})(x_{ti}x_{tj}-s_{ij})$: Ledoit & Wolf (2004), "Honey, I shrunk the
    sample covariance matrix", JPM 30. With two assets the target is the sample and the intensity 0.

    The two intensities come from different formulas and differ several-fold: name the target with the number.

    Args:
      returns: (steps, assets), NaN where missing.
      target: one of `TARGETS`.
      is_centred: take the mean as known to be zero instead of estimating it.

    Raises:
      InputError: unknown target, fewer than 2 assets or 3 whole rows, a constant asset, an infinite value, or a result
        that is not positive definite (assets collinear and no shrinkage that would part them).
    """
    if target not in TARGETS:
        raise InputError(f"shrinkage target is {target!r}; it must be one of {', '.join(TARGETS)}.")
    table, x, n_dropped = _whole_rows(returns, is_centred, 3)
    n, p = x.shape
    sample = x.T @ x / n
    square = x * x
    # The mean of (x_i x_j - s_ij)^2.
    noise = square.T @ square / n - sample * sample
    if target == "identity":
        aim = np.trace(sample) / p * np.eye(p)
        shared = 0.0
    else:
        deviation = np.sqrt(np.diag(sample))
        correlation = sample / np.outer(deviation, deviation)
        mean_correlation = (correlation.sum() - p) / (p * (p - 1))
        aim = mean_correlation * np.outer(deviation, deviation)
        np.fill_diagonal(aim, np.diag(sample))
        # theta[i, j]: covariance of x_i^2 with x_i x_j.
        theta = (square * x).T @ x / n - np.diag(sample)[:, None] * sample
        ratio = deviation[None, :] / deviation[:, None]
        np.fill_diagonal(ratio, 0.0)
        shared = np.trace(noise) + mean_correlation * float((ratio * theta).sum())
    distance = float(((sample - aim) ** 2).sum())
    # A sample that is its own target to rounding leaves nothing to shrink.
    is_apart = distance > 1e-24 * float((sample**2).sum())
    shrinkage = float(np.clip((noise.sum() - shared) / (n * distance), 0.0, 1.0)) if is_apart else 0.0
    return _shrunk(table, sample, aim, shrinkage, n, n_dropped)


def oracle_approximating(returns: Any, *, is_centred: bool = False, has_small_terms: bool = True) -> Shrunk:
    r"""Linear shrinkage to $\mu I$ with the intensity that is optimal for normal returns (OAS).

    $$\delta = \min\Big(1, \frac{(1-\frac2p)\,\mathrm{tr}\,S^2 + \mathrm{tr}^2 S}
    {(n+1-\frac2p)(\mathrm{tr}\,S^2 - \mathrm{tr}^2 S/p)}\Big),$$

    Chen, Wiesel, Eldar & Hero (2010), "Shrinkage algorithms for MMSE covariance estimation", eq. (23).

    Args:
      returns: (steps, assets), NaN where missing.
      is_centred: take the mean as known to be zero instead of estimating it.
      has_small_terms: keep both 2/p; without them it is the approximation for many assets that scikit-learn computes.

    Raises:
      InputError: as `ledoit_wolf`.
    """
    table, x, n_dropped = _whole_rows(returns, is_centred, 3)
    n, p = x.shape
    sample = x.T @ x / n
    trace, of_square = float(np.trace(sample)), float((sample**2).sum())
    small = 2.0 / p if has_small_terms else 0.0
    spread = of_square - trace**2 / p
    top = (1.0 - small) * of_square + trace**2
    # Equal eigenvalues: the sample is the target.
    shrinkage = min(1.0, top / ((n + 1.0 - small) * spread)) if spread > 1e-14 * of_square else 1.0
    return _shrunk(table, sample, trace / p * np.eye(p), shrinkage, n, n_dropped)


def nonlinear_shrinkage(returns: Any, *, is_centred: bool = False) -> NonlinearShrunk:
    r"""Analytic non-linear shrinkage: each sample eigenvalue is moved on its own, the eigenvectors stay.

    With the Epanechnikov kernel of bandwidth $h_j = \lambda_j n^{-1/3}$, $\tilde f$ the density of the sample
    eigenvalues, $\mathcal H_{\tilde f}$ its Hilbert transform and $c = p/n$,

    $$\tilde d_i = \frac{\lambda_i}{[\pi c\lambda_i\tilde f(\lambda_i)]^2 +
    [1-c-\pi c\lambda_i\mathcal H_{\tilde f}(\lambda_i)]^2}$$

    for $p \le n$; for $p > n$ the null eigenvalues share one value of their own. Ledoit & Wolf (2020), "Analytical
    nonlinear shrinkage of large-dimensional covariance matrices", Annals of Statistics 48, secs. 4 and C. An estimated
    mean takes one from n throughout, also in the denominator of the sample covariance.

    Args:
      returns: (steps, assets), NaN where missing.
      is_centred: take the mean as known to be zero instead of estimating it.

    Raises:
      InputError: fewer than 12 whole rows (13 with an estimated mean) or 2 assets, a constant asset, an infinite
        value, or assets that are collinear beyond what too few rows explain.
    """
    table, x, n_dropped = _whole_rows(returns, is_centred, MIN_ROWS_NONLINEAR + (not is_centred))
    n, p = x.shape[0] - (not is_centred), x.shape[1]
    sample = x.T @ x / n
    values, vectors = np.linalg.eigh(sample)
    positive = values[max(0, p - n) :]
    deviation = np.sqrt(np.diag(sample))
    rank = np.linalg.matrix_rank(x / deviation)
    if rank < min(p, n):
        raise InputError(
            f"returns of {', '.join(table.assets[:5])}{', ...' if p > 5 else ''} have rank {rank} instead of "
            f"{min(p, n)}: some asset is a combination of others; leave it out, or use ledoit_wolf."
        )
    h, c = n ** (-1.0 / 3.0), p / n
    width = h * positive[None, :]
    at = (positive[:, None] - positive[None, :]) / width
    root = np.sqrt(5.0)
    density = (0.75 / root * np.maximum(1.0 - at * at / 5.0, 0.0) / width).mean(axis=1)
    # The product with the logarithm tends to 0 at the ends of the kernel.
    is_end = np.abs(at) == root
    log_gap = np.log(np.abs((root - at) / np.where(is_end, 1.0, root + at)) + is_end)
    bend = -0.3 / np.pi * at + 0.75 / (root * np.pi) * (1.0 - at * at / 5.0) * log_gap
    hilbert = (bend / width).mean(axis=1)
    if p <= n:
        moved = positive / ((np.pi * c * positive * density) ** 2 + (1.0 - c - np.pi * c * positive * hilbert) ** 2)
    else:
        at_zero = (
            (0.3 / h**2 + 0.75 / (root * h) * (1.0 - 0.2 / h**2) * np.log((1.0 + root * h) / (1.0 - root * h)))
            * np.mean(1.0 / positive)
            / np.pi
        )
        null = 1.0 / (np.pi * (p - n) / n * at_zero)
        moved = positive / (np.pi**2 * positive**2 * (density**2 + hilbert**2))
        moved = np.concatenate([np.full(p - n, null), moved])
        values = np.concatenate([np.zeros(p - n), positive])
    covariance = _symmetric((vectors * moved) @ vectors.T)
    _check_positive_definite(table, covariance)
    return NonlinearShrunk(covariance, moved, values, x.shape[0], n_dropped)


def marchenko_pastur(returns: Any, *, is_centred: bool = False, noise_variance: float | None = 1.0) -> Cleaned:
    r"""Eigenvalue clipping: the correlation eigenvalues that noise alone can make are replaced by their mean.

    Independent columns of variance $\sigma^2$ give eigenvalues up to $\lambda_+ = \sigma^2(1+\sqrt{p/n})^2$ (Marchenko
    & Pastur 1967). Those at or below the edge become their mean, which keeps the trace; the matrix then gets its unit
    diagonal back, and the sample's variances. Laloux, Cizeau, Bouchaud & Potters (1999); Bouchaud & Potters (2009).

    Args:
      returns: (steps, assets), NaN where missing.
      is_centred: take the mean as known to be zero instead of estimating it; else one row is taken from n.
      noise_variance: share of noise in an asset's variance, in (0, 1]; None for the share that the eigenvalues below
        the edge sum to, found by repetition from 1 (the larger eigenvalues then take less noise with them).

    Raises:
      InputError: a share outside (0, 1], fewer than 3 whole rows or 2 assets, a constant asset, an infinite value, or
        a result that is not positive definite (collinear assets among whose eigenvalues none but 0 is noise).
    """
    if noise_variance is not None and not 0.0 < noise_variance <= 1.0:
        raise InputError(f"noise_variance is {noise_variance}; it must lie in (0, 1], or None to be found.")
    table, x, n_dropped = _whole_rows(returns, is_centred, 3)
    n, p = x.shape
    sample = x.T @ x / n
    deviation = np.sqrt(np.diag(sample))
    values, vectors = np.linalg.eigh(sample / np.outer(deviation, deviation))
    values = np.maximum(values, 0.0)
    unit_edge = (1.0 + np.sqrt(p / (n - (not is_centred)))) ** 2
    share = 1.0 if noise_variance is None else noise_variance
    n_noise = int((values <= share * unit_edge).sum())
    while noise_variance is None and n_noise:
        # The edge only falls, so the repetition ends after at most p rounds.
        lower = float(values[:n_noise].sum()) / p
        n_lower = int((values <= lower * unit_edge).sum())
        if n_lower == n_noise or n_lower == 0:
            share = lower if n_lower else share
            break
        share, n_noise = lower, n_lower
    flat = values.copy()
    if n_noise:
        flat[:n_noise] = values[:n_noise].mean()
    correlation = _unit_diagonal((vectors * flat) @ vectors.T)
    covariance = _symmetric(correlation * np.outer(deviation, deviation))
    _check_positive_definite(table, covariance)
    return Cleaned(covariance, correlation, float(share * unit_edge), p - n_noise, float(share), n, n_dropped)


def ewma_covariance(returns: Any, *, decay: float = 0.94, n_seed: int = 25) -> Repaired:
    r"""Exponentially weighted covariance around a mean of zero, after the last row.

    $S_t = \lambda S_{t-1} + (1-\lambda) x_t x_t'$ over all rows, from the mean of $x x'$ over the first `n_seed` rows;
    the weight of a row halves every $\log 0.5/\log\lambda$ rows, 11.2 at 0.94. J.P. Morgan, RiskMetrics (1996).

    A pair's own clock stops on rows where one of the two is missing, and its seed is the mean of its first `n_seed`
    shared rows. Entries then rest on different rows, so the matrix may not be positive definite, nor is it when fewer
    rows count than there are assets: it is clipped on the scale of correlations.

    Args:
      returns: (steps, assets), NaN where missing; one asset is enough.
      decay: lambda, in (0, 1).
      n_seed: rows of the seed, 1 or more.

    Raises:
      InputError: a decay outside (0, 1), a seed of no row, fewer shared rows of some pair than `n_seed`, an asset whose
        returns never change, an infinite value.
    """
    if not 0.0 < decay < 1.0:
        raise InputError(f"decay is {decay}; it must lie strictly between 0 and 1, e.g. 0.94.")
    if isinstance(n_seed, bool) or not isinstance(n_seed, (int, np.integer)) or n_seed < 1:
        raise InputError(f"n_seed is {n_seed!r}; it must be a whole number, 1 or more.")
    table = read_returns(returns)
    x, seen = np.nan_to_num(table.values), ~np.isnan(table.values)
    n_shared = _check_shared(table, seen, n_seed)
    covariance = np.empty(n_shared.shape)
    for i in range(x.shape[1]):
        together = seen[:, i, None] & seen
        order = np.cumsum(together, axis=0)
        product = np.where(together, x[:, i, None] * x, 0.0)
        seed = np.where(order <= n_seed, product, 0.0).sum(axis=0) / n_seed
        age = (n_shared[i] - order).astype(np.float64)
        covariance[i] = decay ** n_shared[i].astype(np.float64) * seed + (1.0 - decay) * (decay**age * product).sum(0)
    if not np.all(np.diag(covariance) > 0.0):
        i = int(np.argmin(np.diag(covariance)))
        raise InputError(
            f"returns, column {table.assets[i]!r} is 0 on every row that still counts; its variance would be 0: leave "
            "the asset out or take a decay nearer 1."
        )
    return _repaired(covariance, n_shared)


def pairwise_covariance(returns: Any, *, min_shared: int = 3, floor: float = 1e-8) -> Repaired:
    """Covariance from every value there is: variances from an asset's own rows, correlations from shared rows.

    Entries of a matrix made from different rows need not fit together; correlations whose matrix has an eigenvalue
    below `floor` are clipped (`clip_to_positive_definite`), the variances stay. Perfectly collinear assets come out
    with a correlation just inside one.

    Args:
      returns: (steps, assets), NaN where missing.
      min_shared: fewest rows that a pair must share, 3 or more.
      floor: smallest eigenvalue of the correlation matrix, in (0, 1).

    Raises:
      InputError: `min_shared` below 3, a floor outside (0, 1), a pair of assets with too few shared rows or constant on
        them, an infinite value.
    """
    if min_shared < 3:
        raise InputError(f"min_shared is {min_shared}; a correlation takes at least 3 shared rows.")
    _check_floor(floor)
    table = read_returns(returns)
    x, seen = table.values, ~np.isnan(table.values)
    n_shared = _check_shared(table, seen, min_shared)
    p = x.shape[1]
    correlation = np.eye(p)
    for i in range(p):
        for j in range(i):
            rows = seen[:, i] & seen[:, j]
            pair = x[rows][:, [i, j]] - x[rows][:, [i, j]].mean(axis=0)
            norm = np.sqrt((pair**2).sum(axis=0))
            if not np.all(norm > 1e-12 * np.sqrt(np.nansum(x[:, [i, j]] ** 2, axis=0))):
                raise InputError(
                    f"returns of {table.assets[j]!r} or {table.assets[i]!r} never change on the {rows.sum()} rows that "
                    "the two share, so they have no correlation: give a longer history or leave one out."
                )
            correlation[i, j] = correlation[j, i] = np.clip(pair[:, 0] @ pair[:, 1] / norm.prod(), -1.0, 1.0)
    variance = np.nanvar(x, axis=0)
    return _repaired(correlation * np.sqrt(np.outer(variance, variance)), n_shared, floor)


def clip_to_positive_definite(matrix: Any, *, floor: float = 1e-8) -> Float[np.ndarray, "assets assets"]:
    r"""A positive definite matrix near a symmetric one: eigenvalues clipped on the correlation scale, variances kept.

    With $C = D^{-1/2} A D^{-1/2} = V\Lambda V'$, the result is $V\max(\Lambda, f)V'$ scaled back to a unit diagonal,
    mixed with the identity by what the scaling took below the floor, and multiplied by the standard deviations. It is
    not the nearest in the Frobenius norm; Higham (2002) repeats the step to get there. Rebonato & Jaeckel (1999).

    Args:
      matrix: symmetric, with a positive diagonal.
      floor: smallest eigenvalue of the resulting correlation matrix, in (0, 1).

    Raises:
      InputError: not square, finite and symmetric with a positive diagonal, or a floor outside (0, 1).
    """
    _check_floor(floor)
    a = np.asarray(matrix, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] == 0 or not np.all(np.isfinite(a)):
        raise InputError(f"matrix has shape {a.shape}; it must be square with finite entries.")
    if np.any(np.diag(a) <= 0.0):
        i = int(np.argmax(np.diag(a) <= 0.0))
        raise InputError(f"matrix has {a[i, i]:g} on its diagonal in row {i + 1}; a variance must be positive.")
    deviation = np.sqrt(np.diag(a))
    c = a / np.outer(deviation, deviation)
    if np.abs(c - c.T).max() > 1e-6:
        raise InputError("matrix is not symmetric; give the mean of it and its transpose.")
    c = _symmetric(c)
    values, vectors = np.linalg.eigh(c)
    if values[0] >= floor:
        return _symmetric(a)
    c = _unit_diagonal((vectors * np.maximum(values, floor)) @ vectors.T)
    missing = floor - float(np.linalg.eigvalsh(c)[0])
    if missing > 0.0:
        c *= 1.0 - missing / (1.0 - floor + missing)
        np.fill_diagonal(c, 1.0)
    return _symmetric(c * np.outer(deviation, deviation))


def _whole_rows(returns: Any, is_centred: bool, least: int) -> tuple[ReturnTable, np.ndarray, int]:
    """Rows without a hole, their mean taken off unless it is known to be zero; and how many rows have one."""
    table = read_returns(returns)
    if len(table.assets) < 2:
        raise InputError("returns has 1 asset; shrinkage of a covariance matrix takes at least 2.")
    has_hole = np.isnan(table.values).any(axis=1)
    x = table.values[~has_hole]
    if len(x) < least:
        worst = table.assets[int(np.isnan(table.values).sum(axis=0).argmax())]
        raise InputError(
            f"returns has {len(x)} rows without a missing value; at least {least} are needed. Column {worst!r} lacks "
            "the most: leave it out, give a longer history, or use pairwise_covariance."
        )
    _check_varies(table, x)
    return table, x if is_centred else x - x.mean(axis=0), int(has_hole.sum())


def _check_varies(table: ReturnTable, x: np.ndarray) -> None:
    flat = np.nanmin(x, axis=0) == np.nanmax(x, axis=0)
    if flat.any():
        column = int(np.argmax(flat))
        raise InputError(
            f"returns, column {table.assets[column]!r} is {np.nanmin(x[:, column]):g} in every row used; a covariance "
            "needs returns that vary: check its prices or leave the asset out."
        )


def _check_shared(table: ReturnTable, seen: np.ndarray, least: int) -> np.ndarray:
    """Rows that each pair of assets shares; every pair has enough, and every asset varies."""
    n_shared = seen.astype(np.int64).T @ seen.astype(np.int64)
    if n_shared.min() < least:
        i, j = np.unravel_index(int(n_shared.argmin()), n_shared.shape)
        raise InputError(
            f"returns of {table.assets[i]!r} and {table.assets[j]!r} share {n_shared[i, j]} rows; at least {least} are "
            "needed: give a longer history or leave one of them out."
        )
    _check_varies(table, table.values)
    return n_shared


def _check_floor(floor: float) -> None:
    if not 0.0 < floor < 1.0:
        raise InputError(f"floor is {floor}; the smallest eigenvalue must lie strictly between 0 and 1, e.g. 1e-8.")


def _shrunk(
    table: ReturnTable, sample: np.ndarray, target: np.ndarray, shrinkage: float, n_rows: int, n_dropped: int
) -> Shrunk:
    covariance = _symmetric((1.0 - shrinkage) * sample + shrinkage * target)
    _check_positive_definite(table, covariance)
    return Shrunk(covariance, shrinkage, target, sample, n_rows, n_dropped)


def _repaired(covariance: np.ndarray, n_shared: np.ndarray, floor: float = EIGENVALUE_FLOOR) -> Repaired:
    deviation = np.sqrt(np.diag(covariance))
    smallest = float(np.linalg.eigvalsh(covariance / np.outer(deviation, deviation))[0])
    is_repaired = smallest < floor
    covariance = clip_to_positive_definite(covariance, floor=floor) if is_repaired else _symmetric(covariance)
    correlation = _symmetric(covariance / np.outer(deviation, deviation))
    np.fill_diagonal(correlation, 1.0)
    return Repaired(covariance, correlation, n_shared, is_repaired)


def _check_positive_definite(table: ReturnTable, covariance: np.ndarray) -> None:
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    smallest = float(np.linalg.eigvalsh(correlation)[0])
    if smallest < EIGENVALUE_FLOOR:
        off = np.abs(correlation - np.eye(len(correlation)))
        i, j = np.unravel_index(int(off.argmax()), off.shape)
        raise InputError(
            f"the covariance of the returns is not positive definite (smallest eigenvalue {smallest:.2g} of its "
            f"correlations): some assets are collinear; the closest two are {table.assets[i]!r} and "
            f"{table.assets[j]!r}, correlation {correlation[i, j]:.6f}. Leave one out, or repair the matrix with "
            "clip_to_positive_definite."
        )


def _unit_diagonal(matrix: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(np.diag(matrix))
    scaled = _symmetric(matrix / np.outer(deviation, deviation))
    np.fill_diagonal(scaled, 1.0)
    return scaled


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return 0.5 * (matrix + matrix.T)
