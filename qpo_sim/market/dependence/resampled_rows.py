"""Rows of a bootstrap before they are resampled: checks, one table per regime, and what follows from it, in float64."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from numpy.polynomial import chebyshev

from qpo_sim.errors import InputError
from qpo_sim.market.block_length import optimal_block_length

AUTOMATIC = ("squares", "returns")
BANDWIDTHS = ("silverman", "scott")

# Fewer dates than this say nothing of a law; more than 2^23 and 32 random bits would tell the odds of dates apart by
# more than 0.2 % (the relative difference between two dates' probabilities is dates / 2^32).
MIN_DATES = 10
MAX_DATES = 2**23

_MGF_TOLERANCE = 1e-6
_MGF_DEGREES = (8, 12, 16, 20, 24, 28, 32)


class Table(NamedTuple):
    """Rows by regime; NaN where an asset has no value.

    Attributes:
      parts: rows of each regime in order of time, less its mean and over its standard deviation.
      in_time: all of them in order of time.
      groups: assets with gaps, those with the same ones together.
      mean: what was taken out.
      std: population standard deviation that was divided out.
    """

    parts: list[np.ndarray]
    in_time: Float64[np.ndarray, "dates assets"]
    groups: tuple[tuple[int, ...], ...]
    mean: Float64[np.ndarray, "regimes assets"]
    std: Float64[np.ndarray, "regimes assets"]


def by_regime(rows: np.ndarray, regimes: Any, n_regimes: int | None, missing: str, standardised: bool) -> Table:
    """Table of the rows of each regime, standardised unless they are to stay as they are.

    Raises:
      InputError: labels that do not fit, too few dates, or a constant column.
    """
    if missing not in ("complete", "own_dates"):
        raise InputError(f"bootstrap missing is {missing!r}; it must be complete or own_dates.")
    labels, n_regimes = _labels(regimes, n_regimes, rows.shape[0])
    if missing == "complete":
        is_complete = ~np.isnan(rows).any(axis=1)
        rows, labels = rows[is_complete], labels[is_complete]
    _check_dates(rows, labels, n_regimes, missing)
    of_regime = [labels == k for k in range(n_regimes)]
    mean = np.stack([np.nanmean(rows[own], axis=0) for own in of_regime])
    std = np.stack([np.nanstd(rows[own], axis=0) for own in of_regime])
    largest = np.stack([np.nanmax(np.abs(rows[own]), axis=0) for own in of_regime])
    if np.any(std <= 1e-12 * largest):
        k, asset = np.argwhere(std <= 1e-12 * largest)[0]
        raise InputError(
            f"bootstrap column {asset} is constant in regime {k}; an asset needs returns that vary: leave it out."
        )
    if not standardised:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    in_time = (rows - mean[labels]) / std[labels]
    return Table([in_time[own] for own in of_regime], in_time, groups_of(rows), mean, std)


def checked_rows(returns: Any, name: str) -> Float64[np.ndarray, "dates assets"]:
    """Rows in float64, one column where there is one asset.

    Raises:
      InputError: another shape, too many dates, an infinite value, or an asset without any.
    """
    rows = np.asarray(returns, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise InputError(f"bootstrap {name} has the shape {rows.shape}; it must be (dates, assets).")
    if rows.shape[0] >= MAX_DATES:
        raise InputError(
            f"bootstrap {name} has {rows.shape[0]} rows; draws have 32 bits, which tell fewer than {MAX_DATES} dates "
            f"apart evenly: use a coarser step or a shorter sample."
        )
    bad = np.argwhere(np.isinf(rows))
    if bad.size:
        raise InputError(
            f"bootstrap {name} is infinite in row {bad[0][0]}, column {bad[0][1]}; a value must be finite, or NaN "
            f"where there is none."
        )
    empty = np.flatnonzero(np.isnan(rows).all(axis=0))
    if empty.size:
        raise InputError(f"bootstrap {name} column {empty[0]} has no value at all; leave the asset out.")
    return rows


def _labels(regimes: Any, n_regimes: int | None, n_dates: int) -> tuple[np.ndarray, int]:
    # The regime of each date, and how many regimes there are.
    if regimes is None:
        if n_regimes not in (None, 1):
            raise InputError(
                f"bootstrap n_regimes is {n_regimes} but no date has a label; give `regimes`, one per date."
            )
        return np.zeros(n_dates, np.int64), 1
    labels = np.asarray(regimes)
    if labels.shape != (n_dates,):
        raise InputError(
            f"bootstrap regimes has the shape {labels.shape}; it must have one label for each of {n_dates} rows."
        )
    whole = labels.astype(np.int64)
    count = int(labels.max()) + 1 if n_regimes is None else int(n_regimes)
    bad = np.flatnonzero((whole != labels) | (whole < 0) | (whole >= count))
    if bad.size:
        raise InputError(
            f"bootstrap regimes is {labels[bad[0]]} in row {bad[0]}; a label must be one of 0..{count - 1}."
        )
    return whole, count


def _check_dates(rows: np.ndarray, labels: np.ndarray, n_regimes: int, missing: str) -> None:
    has_value = ~np.isnan(rows)
    for k in range(n_regimes):
        in_regime = labels == k
        where = f" in regime {k}" if n_regimes > 1 else ""
        n_dates = int(in_regime.sum())
        if n_dates < MIN_DATES:
            which = "dates on which every asset has a value" if missing == "complete" else "dates"
            raise InputError(
                f"bootstrap has {n_dates} {which}{where}; it takes at least {MIN_DATES}: use a longer sample, fewer "
                f'assets or regimes, or missing="own_dates" for late listings.'
            )
        own = has_value[in_regime].sum(axis=0)
        if own.min() < MIN_DATES:
            raise InputError(
                f"bootstrap column {int(own.argmin())} has {own.min()} values{where}; it takes at least {MIN_DATES}: "
                f"leave the asset out, or use fewer regimes."
            )


def dates_per_block(block_length: float | str, method: str, eps: Float[np.ndarray, "dates assets"]) -> float:
    """Block length, chosen from the standardised rows in order of time where it is a word of `AUTOMATIC`.

    Raises:
      InputError: another word, or a number below 1, above the number of dates, or broken for circular blocks.
    """
    if method == "iid":
        return 1.0
    if isinstance(block_length, str):
        if block_length not in AUTOMATIC:
            raise InputError(
                f"bootstrap block_length is {block_length!r}; it must be a number of dates or one of "
                f"{', '.join(AUTOMATIC)}."
            )
        length = float(optimal_block_length(eps**2 if block_length == "squares" else eps, kind=method))
        return float(np.round(length)) if method == "circular" else length
    if not 1.0 <= block_length <= eps.shape[0]:
        raise InputError(
            f"bootstrap block_length is {block_length}; it must be at least 1 and at most the number of dates, "
            f"{eps.shape[0]}."
        )
    if method == "circular" and block_length != int(block_length):
        raise InputError(f"bootstrap block_length is {block_length}; circular blocks have a whole number of dates.")
    return float(block_length)


def groups_of(rows: Float[np.ndarray, "dates assets"]) -> tuple[tuple[int, ...], ...]:
    """Assets with gaps, those with the same ones together, in order of their first asset."""
    groups: dict[bytes, list[int]] = {}
    for asset, column in enumerate(np.isnan(rows).T):
        if column.any():
            groups.setdefault(column.tobytes(), []).append(asset)
    return tuple(map(tuple, groups.values()))


def covariance(
    eps: Float[np.ndarray, "dates assets"], groups: tuple[tuple[int, ...], ...]
) -> Float64[np.ndarray, "assets assets"]:
    """Exact covariance of the resampled shocks: a borrowed value is independent of all but those borrowed with it."""
    has_value = ~np.isnan(eps)
    centred = np.where(has_value, eps - np.nanmean(eps, axis=0), 0.0)
    product = centred.T @ centred / eps.shape[0]
    for group in groups:
        index = np.ix_(group, group)
        # Both present, or both borrowed from one of their common dates: the covariance over these.
        product[index] = product[index] * eps.shape[0] / has_value[:, group[0]].sum()
    return product


def cholesky(matrices: Float[np.ndarray, "regimes assets assets"]) -> Float64[np.ndarray, "regimes assets assets"]:
    """Lower Cholesky factor of each regime's covariance.

    Raises:
      InputError: one is singular.
    """
    try:
        return np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError as error:
        raise InputError(
            "bootstrap smoothing needs a positive definite covariance in every regime; use more dates than assets, "
            "leave out assets that others add up to, or switch smoothing off."
        ) from error


def bandwidths(
    smoothing: float | str | None, counts: Sequence[int], n_assets: int
) -> Float64[np.ndarray, " regimes"] | None:
    """Bandwidth of the smoothing in each regime, None without.

    Args:
      smoothing: a number, a word of `BANDWIDTHS`, or None.
      counts: dates of each regime.
      n_assets: number of assets.

    Raises:
      InputError: another word, or a negative number.
    """
    if smoothing is None:
        return None
    if isinstance(smoothing, str):
        if smoothing not in BANDWIDTHS:
            raise InputError(
                f"bootstrap smoothing is {smoothing!r}; it must be a bandwidth, None or one of {', '.join(BANDWIDTHS)}."
            )
        dates = np.asarray(counts, np.float64)
        dates = dates * (n_assets + 2.0) / 4.0 if smoothing == "silverman" else dates
        return dates ** (-1.0 / (n_assets + 4.0))
    if not (smoothing >= 0.0 and np.isfinite(smoothing)):
        raise InputError(f"bootstrap smoothing is {smoothing}; a bandwidth must be at least 0, in standard deviations.")
    return np.full(len(counts), float(smoothing))


def cumulant_fit(eps: list[np.ndarray], limit: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Chebyshev coefficients (coefficient, regime, asset), slopes at the limit, and the largest error of the values."""
    # Fitted at the zeros of a Chebyshev polynomial, checked at its extremes, which lie half-way between.
    n_nodes = 2 * _MGF_DEGREES[-1] + 1
    nodes = np.cos(np.pi * (np.arange(n_nodes) + 0.5) / n_nodes)
    between = np.cos(np.pi * np.arange(n_nodes + 1) / n_nodes)
    scales = 0.5 * limit * (np.concatenate([nodes, between]) + 1.0)
    columns = [[c[~np.isnan(c)] for c in part.T] for part in eps]
    values = [[_centred_cumulant(c - c.mean(), scales, limit) for c in row] for row in columns]
    slope = np.array([[slope for _, slope in row] for row in values])
    ratio = np.array([ratio for row in values for ratio, _ in row]).T
    coefficients, error = np.empty(0), np.inf
    for degree in _MGF_DEGREES:
        coefficients = chebyshev.chebfit(nodes, ratio[:n_nodes], degree)
        error = float(np.abs(chebyshev.chebval(between, coefficients) - ratio[n_nodes:].T).max()) * limit**2
        if error < _MGF_TOLERANCE:
            break
    return coefficients.reshape(-1, *slope.shape), slope, error


def _centred_cumulant(x: np.ndarray, scales: np.ndarray, limit: float) -> tuple[np.ndarray, float]:
    """Ratio of log E exp(s x) to s^2 at the scales, and the derivative of the former at the limit; x has mean 0."""
    largest = x.max()
    value = np.array([s * largest + np.log(np.mean(np.exp(s * (x - largest)))) for s in scales])
    square = x * x
    second, third, fourth = square.mean(), square @ x / x.size, square @ square / x.size
    series = second / 2.0 + scales * (third / 6.0 + scales * (fourth - 3.0 * second**2) / 24.0)
    # Near 0 the logarithm has lost its digits, and three terms have them all.
    is_small = scales * np.abs(x).max() < 1e-3
    ratio = np.where(is_small, series, value / np.where(is_small, 1.0, scales) ** 2)
    weight = np.exp(limit * (x - largest))
    return ratio, float(weight @ x / weight.sum())
