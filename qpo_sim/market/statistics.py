"""Statistics of a record of returns, and descriptions with these filled in where they say `data.<name>`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from qpo_sim.errors import InputError
from qpo_sim.types import HOURS_PER_YEAR

# Factors of `data.loadings`, where there are assets enough.
N_FACTORS = 3


@dataclass(frozen=True)
class Statistics:
    """What a description may take from data, written as `data.<name>`: per-step log-returns and what follows from them.

    Attributes:
      assets: names, in column order.
      step_hours: length of a step.
      returns: log-returns, dates by assets, NaN where missing.
      correlation: positive definite correlation matrix of the returns.
      labels: regime of each date, for resampling within regimes; None when no regimes were fitted.
    """

    assets: tuple[str, ...]
    step_hours: float
    returns: np.ndarray
    correlation: np.ndarray
    labels: np.ndarray | None = None
    steps_per_year: float = field(init=False)

    def __post_init__(self) -> None:
        """Fills in what follows."""
        object.__setattr__(self, "steps_per_year", HOURS_PER_YEAR / self.step_hours)

    def value(self, name: str, place: str) -> Any:
        """The statistic called `name`.

        Raises:
          InputError: there is none of that name, or it needs what the data do not have.
        """
        if name not in _OFFERED:
            raise InputError(f"{place} takes data.{name}, which does not exist{hint(name, _OFFERED)}.")
        found = _OFFERED[name](self)
        if found is None:
            raise InputError(f"{place} takes data.{name}, which needs regimes: kind: fitted.")
        return found


def market_statistics(
    returns: Any, *, assets: Sequence[str] | None = None, step_hours: float | None = None, labels: Any = None
) -> Statistics:
    """Statistics of a table of log-returns.

    Args:
      returns: DataFrame with a date index and a column per asset, or a (dates, assets) array; NaN where missing.
      assets: names, those of the columns when omitted.
      step_hours: length of a step, that of the index when omitted.
      labels: regime of each date, for resampling within regimes.

    Raises:
      InputError: an array without names or step, or fewer than two returns of an asset.
    """
    values = np.asarray(returns, np.float64)
    columns, index = getattr(returns, "columns", None), getattr(returns, "index", None)
    named = columns if assets is None else assets
    if named is None or (index is None and step_hours is None):
        raise InputError("returns without columns and dates need `assets` and `step_hours`.")
    names = tuple(str(name) for name in named)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise InputError(f"returns has shape {values.shape}; it must have a column for each of {', '.join(names)}.")
    counts = np.sum(~np.isnan(values), axis=0)
    if np.any(counts < 2):
        raise InputError(f"{names[int(np.argmin(counts))]} has fewer than two returns: there is no volatility in them.")
    if step_hours is None:
        step_hours = float(np.median(np.diff(np.asarray(index, "datetime64[s]")).astype(np.float64))) / 3600.0
    return Statistics(names, step_hours, values, _pairwise_correlation(values), labels)


def resolved(value: Any, place: str, data: Statistics) -> Any:
    """A described value with statistics and tables by asset filled in.

    Raises:
      InputError: an unknown statistic, or a table that leaves out an asset and has no `default`.
    """
    if isinstance(value, str) and value.startswith("data."):
        return data.value(value.removeprefix("data."), place)
    if isinstance(value, Mapping):
        names = set(value) - {"default"}
        if names and names <= set(data.assets):
            missing = [asset for asset in data.assets if asset not in value]
            if missing and "default" not in value:
                raise InputError(f"{place} names assets but not {missing[0]}: add it, or a `default`.")
            return np.array([float(value.get(asset, value.get("default"))) for asset in data.assets])
        return {key: resolved(item, f"{place}.{key}", data) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(item, f"{place}[{k}]", data) for k, item in enumerate(value)]
    return value


def hint(name: Any, offered: Any) -> str:
    """Words that follow a name that is none of those offered: the nearest, or nothing."""
    near = get_close_matches(str(name), list(offered), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _deviation(data: Statistics) -> np.ndarray:
    return np.nanstd(data.returns, axis=0, ddof=1)


def _recent_variance(data: Statistics) -> np.ndarray:
    # Squares with a half-life of ten steps: the variance now.
    weights = 0.5 ** (np.arange(len(data.returns))[::-1, None] / 10.0)
    known = ~np.isnan(data.returns)
    return np.nansum(weights * data.returns**2, axis=0) / (weights * known).sum(axis=0)


def _diffusive_deviation(data: Statistics) -> np.ndarray:
    # Without what the eye calls a jump: returns beyond four times the exponentially weighted deviation before them.
    return np.nanstd(np.where(_is_jump(data.returns), np.nan, data.returns), axis=0, ddof=1)


def _is_jump(returns: np.ndarray, *, decay: float = 0.94, threshold: float = 4.0) -> np.ndarray:
    variance = np.nanvar(returns, axis=0)
    found = np.zeros(returns.shape, bool)
    for t, row in enumerate(returns):
        square = np.where(np.isnan(row), variance, row**2)
        found[t] = square > threshold**2 * variance
        variance = decay * variance + (1.0 - decay) * np.minimum(square, threshold**2 * variance)
    return found


def _order(data: Statistics) -> list[int]:
    # The assets that move most with all others first.
    return [int(i) for i in np.argsort(-np.abs(data.correlation).sum(axis=1), kind="stable")]


def _loadings(data: Statistics) -> np.ndarray:
    from qpo_sim.market.dependence.factor import principal_factors

    n = len(data.assets)
    # One asset has no correlations for a factor to explain: it is all its own.
    return principal_factors(data.correlation, min(N_FACTORS, n - 1)) if n > 1 else np.zeros((1, 1))


def _pairwise_correlation(returns: np.ndarray) -> np.ndarray:
    # Of the dates that two assets share; such entries need not be consistent, so the matrix may need repair.
    from qpo_sim.market.dependence.correlation import nearest_correlation

    known = ~np.isnan(returns)
    n = known.T.astype(float) @ known
    filled = np.where(known, returns, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.T @ known / n
        covariance = filled.T @ filled / n - mean * mean.T
        variance = (filled**2).T @ known / n - mean**2
        correlation = covariance / np.sqrt(variance * variance.T)
    correlation = np.where(np.isfinite(correlation), np.clip(correlation, -1.0, 1.0), 0.0)
    np.fill_diagonal(correlation, 1.0)
    return correlation if np.linalg.eigvalsh(correlation)[0] > 1e-8 else nearest_correlation(correlation)


_OFFERED: dict[str, Callable[[Statistics], Any]] = {
    "diffusive_volatility_per_year": lambda data: _diffusive_deviation(data) * np.sqrt(data.steps_per_year),
    "variance_ratio": lambda data: _recent_variance(data) / _deviation(data) ** 2,
    "volatility_per_year": lambda data: _deviation(data) * np.sqrt(data.steps_per_year),
    "variance_per_year": lambda data: _deviation(data) ** 2 * data.steps_per_year,
    "recent_variance_per_year": lambda data: _recent_variance(data) * data.steps_per_year,
    "mean_per_year": lambda data: np.nanmean(data.returns, axis=0) * data.steps_per_year,
    "volatility": _deviation,
    "variance": lambda data: _deviation(data) ** 2,
    "correlation": lambda data: data.correlation,
    "order": _order,
    "loadings": _loadings,
    "returns": lambda data: data.returns,
    "labels": lambda data: data.labels,
}
