"""A market from a plain description: which components, with which numbers, and what is taken from data.

Components are found by folder: a module of `market.volatility`, `market.dependence`, `market.jump` or `market.side` has
a function of its own name that makes its component, or names several in `BUILDERS`. A description picks one by `kind`
and gives its arguments by name. Nothing is looked up elsewhere, and nothing is executed from a description.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from qpo_sim.errors import InputError
from qpo_sim.market import presets, regime
from qpo_sim.market.model import Market
from qpo_sim.types import HOURS_PER_YEAR

FOLDERS = ("volatility", "dependence", "jump", "side")

# Arguments of builders that the market itself knows; a description need not and cannot repeat them.
_KNOWN = ("dtype", "step_hours", "n_assets", "assets", "n_regimes")


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
        deviation = np.nanstd(self.returns, axis=0, ddof=1)
        # Squares with a half-life of ten steps: the variance now.
        weights = 0.5 ** (np.arange(len(self.returns))[::-1] / 10.0)
        known = ~np.isnan(self.returns)
        recent = np.nansum(weights[:, None] * self.returns**2, axis=0) / (weights[:, None] * known).sum(axis=0)
        # Without what the eye calls a jump: returns beyond four times the exponentially weighted deviation before them.
        diffusive = np.nanstd(np.where(_is_jump(self.returns), np.nan, self.returns), axis=0, ddof=1)
        offered = {
            "diffusive_volatility_per_year": diffusive * np.sqrt(self.steps_per_year),
            "variance_ratio": recent / deviation**2,
            "volatility_per_year": deviation * np.sqrt(self.steps_per_year),
            "variance_per_year": deviation**2 * self.steps_per_year,
            "recent_variance_per_year": recent * self.steps_per_year,
            "mean_per_year": np.nanmean(self.returns, axis=0) * self.steps_per_year,
            "volatility": deviation,
            "variance": deviation**2,
            "correlation": self.correlation,
            # The assets that move most with all others first.
            "order": [int(i) for i in np.argsort(-np.abs(self.correlation).sum(axis=1), kind="stable")],
            "loadings": _principal_loadings(self.correlation),
            "returns": self.returns,
            "labels": self.labels,
        }
        if name not in offered:
            raise InputError(f"{place} takes data.{name}, which does not exist{_hint(name, offered)}.")
        if offered[name] is None:
            raise InputError(f"{place} takes data.{name}, which needs regimes: kind: fitted.")
        return offered[name]


def _principal_loadings(correlation: np.ndarray, n_factors: int = 3) -> np.ndarray:
    # Principal components of the correlation matrix; every asset keeps a part of its own.
    values, vectors = np.linalg.eigh(correlation)
    largest = slice(None, -1 - min(n_factors, max(1, len(values) - 1)), -1)
    loadings = vectors[:, largest] * np.sqrt(values[largest])
    share = np.sum(loadings**2, axis=1, keepdims=True)
    return loadings * np.sqrt(np.minimum(1.0, 0.98 / share))


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


def _is_jump(returns: np.ndarray, *, decay: float = 0.94, threshold: float = 4.0) -> np.ndarray:
    variance = np.nanvar(returns, axis=0)
    found = np.zeros(returns.shape, bool)
    for t, row in enumerate(returns):
        square = np.where(np.isnan(row), variance, row**2)
        found[t] = square > threshold**2 * variance
        variance = decay * variance + (1.0 - decay) * np.minimum(square, threshold**2 * variance)
    return found


@cache
def builders(folder: str) -> dict[str, Callable[..., Any]]:
    """Functions that make the components of a folder, by kind."""
    package = importlib.import_module(f"qpo_sim.market.{folder}")
    found: dict[str, Callable[..., Any]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        own = (module.name,) if hasattr(loaded, module.name) else ()
        for name in getattr(loaded, "BUILDERS", own):
            found[name] = getattr(loaded, name)
    return found


def component(folder: str, described: Mapping[str, Any], place: str, data: Statistics, **known: Any) -> Any:
    """Component that `described` names: `kind` and the arguments of its builder.

    An argument is a number, text, a list, `data.<statistic>`, or a table by asset (with `default` for the others).

    Args:
      folder: one of `FOLDERS`.
      described: the description.
      place: where it stands, for messages.
      data: statistics, and the assets.
      known: arguments that builders may take from the market.

    Raises:
      InputError: an unknown kind or argument, a missing one, or one its builder refuses.
    """
    offered = builders(folder)
    kind = described.get("kind")
    if kind not in offered:
        raise InputError(
            f"{place}.kind is {kind!r}; it must be one of {', '.join(sorted(offered))}{_hint(kind, offered)}."
        )
    builder = offered[kind]
    parameters = inspect.signature(builder).parameters
    arguments = {name: known[name] for name in known if name in parameters}
    for name, value in described.items():
        if name == "kind":
            continue
        if name not in parameters or name in _KNOWN:
            allowed = [p for p in parameters if p not in _KNOWN]
            raise InputError(
                f"{place}.{name} is not an option of {kind}, which has {', '.join(allowed)}{_hint(name, allowed)}."
            )
        arguments[name] = resolved(value, f"{place}.{name}", data)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and name not in arguments
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    if missing:
        raise InputError(f"{place}.{missing[0]} is missing: {kind} needs it.")
    try:
        return builder(**arguments)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def resolved(value: Any, place: str, data: Statistics) -> Any:
    """A described value with statistics and tables by asset filled in."""
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


def compose_market(
    data: Statistics,
    *,
    volatility_per_year: Any = "data.volatility_per_year",
    correlation: Any = "data.correlation",
    dof: float | Sequence[float] | None = None,
    regimes: Mapping[str, Any] | None = None,
    volatility: Mapping[str, Any] | None = None,
    shock: Mapping[str, Any] | None = None,
    jumps: Sequence[Mapping[str, Any]] = (),
    side: Sequence[Mapping[str, Any]] = (),
    drift: str = "shrunk",
    shrinkage: float = 1.0,
    per_year: float | Mapping[str, float] = 0.0,
    rate_per_year: float = 0.0,
    mixing_cut: float = 1e-4,
    fit: Any = None,
    dtype: Any = jnp.float32,
) -> Market:
    """Market of the described components.

    Args:
      data: assets and statistics that the description refers to.
      volatility_per_year: level of each asset, times that of the regime; None when the volatility model has its own.
      correlation: matrix, one number for all pairs, or `data.correlation`; per regime as a list of these.
      dof: degrees of freedom of the elliptical shock, one or one per regime; None is Gaussian.
      regimes: None for one; `kind: fitted` takes volatilities, correlations, dof and means from `fit`; `kind: markov`
        has `transition` and, per regime, `volatility` (a factor on the level) and optionally `initial` and
        `mean_per_year`; `kind: semi_markov` has `mean_duration`, `shape` and `embedded` instead of `transition`. With
        `drivers`: covariates by name with `slopes` (see `regime.Drivers`).
      volatility: component of `market.volatility`.
      shock: component of `market.dependence`; None is the elliptical shock of `correlation` and `dof`.
      jumps: components of `market.jump`.
      side: components of `market.side`, in order.
      drift: as in `presets.regime_student_t`. "risk_neutral" and "user" make the expected price grow at that rate
        exactly, whatever volatility and jumps do; "historical" and "shrunk" are the mean log-return without jumps.
      shrinkage: as there.
      per_year: as there.
      rate_per_year: as there.
      mixing_cut: far quantile of the Student-t mixing variable (see `shock`).
      fit: a `calibration.RegimeFit`, for `regimes: {kind: fitted}`.
      dtype: precision of the paths.

    Raises:
      InputError: a description that cannot be met, with its place.
    """
    n = len(data.assets)
    root = np.sqrt(data.steps_per_year)
    chain = _regimes(regimes, data, fit)
    n_regimes = len(chain.volatility)
    if volatility_per_year is None:
        level = np.ones(n)
    else:
        per_year_level = resolved(volatility_per_year, "market.volatility_per_year", data)
        level = np.broadcast_to(np.asarray(per_year_level, np.float64), (n,)) / root
    if not np.all((level > 0.0) & np.isfinite(level)):
        raise InputError(f"market.volatility_per_year must be positive for every asset, got {(level * root).tolist()}.")
    steps = level[None, :] * chain.volatility if chain.level is None else chain.level
    known = {
        "dtype": dtype, "step_hours": data.step_hours, "n_assets": n, "assets": data.assets, "n_regimes": n_regimes,
    }  # fmt: skip
    is_martingale = drift in ("risk_neutral", "user")
    with_martingale = {**known, "martingale": is_martingale}

    def part(folder: str, described: Mapping[str, Any] | None, place: str) -> Any:
        return None if described is None else component(folder, described, place, data, **with_martingale)

    def referred(described: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        found = {"regimes.transition": chain.transition, "regimes.labels": data.labels}
        return described and {k: found.get(v, v) if isinstance(v, str) else v for k, v in described.items()}

    volatility_part, filtered = _volatility(part, referred(volatility), level, data)
    if shock is not None and shock.get("conditional_volatility") == "data.conditional_volatility":
        if filtered is None:
            raise InputError(
                "market.shock takes data.conditional_volatility, which needs market.volatility of kind garch."
            )
        shock = {**shock, "conditional_volatility": filtered * level}
    shock_part = part("dependence", referred(shock), "market.shock")
    mean_of_data = np.nanmean(data.returns, axis=0)[None] + 0.0 * steps if chain.mean is None else chain.mean
    if hasattr(shock_part, "shock"):
        # Resampled data bring their own level and mean, by regime where there are labels.
        if shock is not None and "conditional_volatility" in shock:
            # Residuals: in units of the conditional volatility.
            steps = steps * shock_part.std
        else:
            steps = shock_part.std * np.ones((n_regimes, 1))
            mean_of_data = shock_part.mean * np.ones((n_regimes, 1))
        shock_part = shock_part.shock
    cholesky = None
    if shock_part is None:
        cholesky = np.stack(
            [
                _cholesky(c, n, f"market.correlation of regime {k}")
                for k, c in enumerate(chain.correlation(correlation, data))
            ]
        )
    dofs = _dofs(chain.dof if dof is None else dof, n_regimes)
    years = 1.0 / data.steps_per_year
    if drift not in presets.DRIFTS:
        raise InputError(f"market.drift.kind is {drift!r}; it must be one of {', '.join(presets.DRIFTS)}.")
    if is_martingale:
        growth = rate_per_year if drift == "risk_neutral" else presets.per_asset(per_year, data.assets)
        mean = np.broadcast_to(np.asarray(growth, np.float64) * years, (n_regimes, n))
    else:
        keep = 1.0 if drift == "historical" else 1.0 - shrinkage
        mean = keep * mean_of_data

    def cast(x: Any) -> Any:
        return presets.rounded(x, dtype)

    own_martingale = (
        volatility is not None
        and "martingale"
        in inspect.signature(builders("volatility").get(volatility.get("kind", ""), compose_market)).parameters
    )
    return Market(
        initial=cast(chain.initial),
        transition=cast(chain.transition),
        drift=cast(mean),
        volatility=cast(steps),
        correlation_cholesky=None if cholesky is None else cast(cholesky),
        dof=None if dofs is None or shock_part is not None else cast(dofs),
        assets=data.assets,
        step_hours=float(data.step_hours),
        mixing_cut=mixing_cut if dofs is not None else 0.0,
        volatility_model=volatility_part,
        shock=shock_part,
        jumps=tuple(part("jump", jump, f"market.jumps[{k}]") for k, jump in enumerate(jumps)),
        side=tuple(part("side", one, f"market.side[{k}]") for k, one in enumerate(side)),
        drivers=chain.drivers(dtype),
        compensated=is_martingale and not own_martingale,
        regime_of=chain.regime_of,
    )


def _volatility(part: Callable[..., Any], described: Mapping[str, Any] | None, level: np.ndarray, data: Statistics):
    # The volatility model; for GARCH also the conditional standard deviations of the data, in units of the level.
    if described is None or described.get("kind") != "garch":
        return part("volatility", described, "market.volatility"), None
    from qpo_sim.market.volatility import garch

    starts_now = described.get("initial_variance") == "data.filtered_variance"
    options = {key: value for key, value in described.items() if not (starts_now and key == "initial_variance")}
    model = part("volatility", options, "market.volatility")
    standardised = (data.returns - np.nanmean(data.returns, axis=0)) / level
    # A missing return is one of ordinary size: it moves the variance towards its mean.
    variance = garch.filtered_variance(np.where(np.isnan(standardised), 1.0, standardised), model)
    if starts_now:
        options = {**options, "initial_variance": variance[-1]}
        model = part("volatility", options, "market.volatility")
    return model, np.sqrt(variance[:-1])


def needs_fit(regimes: Mapping[str, Any] | None, shock: Mapping[str, Any] | None) -> bool:
    """Whether a description takes anything from fitted regimes."""
    return (regimes or {}).get("kind") == "fitted" or "data.labels" in (shock or {}).values()


@dataclass(frozen=True)
class _Chain:
    # Regimes as described: the chain of states and what each regime has.
    initial: np.ndarray
    transition: np.ndarray
    volatility: np.ndarray  # (regimes, 1) factors on the level
    regime_of: tuple[int, ...] | None = None
    level: np.ndarray | None = None  # (regimes, assets) standard deviations per step, when fitted
    mean: np.ndarray | None = None
    dof: Any = None
    correlations: Any = None
    driven_by: Mapping[str, Any] | None = None

    def correlation(self, given: Any, data: Statistics) -> list[Any]:
        if self.correlations is not None:
            return list(self.correlations)
        one_each = isinstance(given, list | tuple) and len(given) == len(self.volatility) and np.ndim(given[0]) != 1
        rows = given if one_each else [given] * len(self.volatility)
        return [resolved(row, "market.correlation", data) for row in rows]

    def drivers(self, dtype: Any) -> regime.Drivers | None:
        if self.driven_by is None:
            return None
        options = dict(self.driven_by)
        slopes = options.pop("slopes", None)
        reference, half_life = float(options.pop("reference", 0.03)), float(options.pop("half_life", 10.0))
        if options or not isinstance(slopes, Mapping) or not slopes:
            raise InputError(
                "market.regimes.drivers has `slopes` (a states x states matrix by covariate), `reference` and "
                f"`half_life`, got {sorted(self.driven_by)}."
            )
        n = len(self.initial)
        matrices = [np.asarray(slope, np.float64) for slope in slopes.values()]
        if any(matrix.shape != (n, n) for matrix in matrices) or reference <= 0.0 or half_life <= 0.0:
            raise InputError(
                f"market.regimes.drivers: each slope is a {n} x {n} matrix, reference and half_life are positive."
            )
        return regime.Drivers(
            presets.rounded(np.stack(matrices), dtype), presets.rounded(reference, dtype), tuple(slopes), half_life
        )


def _regimes(described: Mapping[str, Any] | None, data: Statistics, fit: Any) -> _Chain:
    if described is None:
        return _Chain(np.ones(1), np.ones((1, 1)), np.ones((1, 1)))
    options = {
        key: resolved(value, f"market.regimes.{key}", data) for key, value in described.items() if key != "drivers"
    }
    kind, driven_by = options.pop("kind", None), described.get("drivers")
    if kind == "fitted":
        if fit is None:
            raise InputError("market.regimes: kind fitted needs a fit (`calibrate`).")
        covariance = fit.covariance()
        deviation = np.sqrt(np.einsum("kii->ki", covariance))
        correlations = covariance / deviation[:, :, None] / deviation[:, None, :]
        _only(options, (), kind)
        ones = np.ones((len(fit.dof), 1))
        dof = np.minimum(np.asarray(fit.dof, np.float64), 1e6)
        return _Chain(fit.initial, fit.transition, ones, None, deviation, fit.mean, dof, correlations, driven_by)
    factors = np.asarray(options.pop("volatility", ()), np.float64)
    if kind not in ("markov", "semi_markov"):
        raise InputError(f"market.regimes.kind is {kind!r}; it must be fitted, markov or semi_markov.")
    if factors.ndim != 1 or factors.size < 1 or not np.all(factors > 0.0):
        raise InputError("market.regimes.volatility must list a positive factor on the volatility for each regime.")
    n = factors.size
    mean = options.pop("mean_per_year", None)
    if mean is not None:
        mean = np.asarray(mean, np.float64).reshape(n, -1) / data.steps_per_year * np.ones((1, len(data.assets)))
    dof = options.pop("dof", None)
    initial = options.pop("initial", None)
    if kind == "markov":
        transition = np.asarray(options.pop("transition", np.zeros((0, 0))), np.float64)
        _only(options, ("transition", "volatility", "initial", "mean_per_year", "dof", "drivers"), kind)
        if transition.shape != (n, n):
            raise InputError(f"market.regimes.transition must be a {n} x {n} matrix, got shape {transition.shape}.")
        regime.check_rows("market.regimes.transition", transition)
        # In NumPy: the law before the first step of a chain that has run for ever.
        system = np.vstack([transition.T - np.eye(n), np.ones(n)])
        law = np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]
        initial = (
            np.clip(law, 0.0, 1.0) / np.clip(law, 0.0, 1.0).sum() if initial is None else np.asarray(initial, float)
        )
        if initial.shape != (n,):
            raise InputError(f"market.regimes.initial must have {n} probabilities, got {initial.tolist()}.")
        regime.check_rows("market.regimes.initial", initial[None])
        return _Chain(initial, transition, factors[:, None], None, None, mean, dof, None, driven_by)
    needed = [options.pop(name, None) for name in ("mean_duration", "shape", "embedded")]
    _only(options, ("mean_duration", "shape", "embedded", "volatility", "initial", "mean_per_year", "dof"), kind)
    if any(value is None for value in needed):
        raise InputError("market.regimes of kind semi_markov need mean_duration, shape and embedded.")
    duration = np.asarray(needed[0], np.float64)
    if initial is None:
        # Long-run share: how often a regime comes times how long it stays.
        embedded = np.asarray(needed[2], np.float64)
        system = np.vstack([embedded.T - np.eye(n), np.ones(n)])
        visits = np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]
        initial = visits * duration / np.sum(visits * duration)
    start, transition, regime_of = regime.semi_markov(initial, duration, needed[1], needed[2])
    return _Chain(start, transition, factors[:, None], regime_of, None, mean, dof, None, driven_by)


def _only(options: Mapping[str, Any], allowed: Sequence[str], kind: str) -> None:
    if options:
        name = next(iter(options))
        offered = ", ".join(allowed) or "no options"
        raise InputError(
            f"market.regimes.{name} is not an option of {kind}, which has {offered}{_hint(name, allowed)}."
        )


def _cholesky(given: Any, n: int, place: str) -> np.ndarray:
    matrix = np.asarray(given, np.float64)
    if matrix.ndim == 0:
        matrix = np.where(np.eye(n) > 0.0, 1.0, float(matrix))
    if matrix.shape != (n, n) or not np.allclose(matrix, matrix.T, atol=1e-8) or not np.allclose(np.diag(matrix), 1.0):
        raise InputError(f"{place} must be a symmetric {n} x {n} matrix with a diagonal of ones.")
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        smallest = np.linalg.eigvalsh(matrix)[0]
        raise InputError(
            f"{place} must be positive definite, its smallest eigenvalue is {smallest:.3g}: repair it "
            "(`market.dependence.correlation.nearest_correlation`)."
        ) from error


def _dofs(given: Any, n_regimes: int) -> np.ndarray | None:
    if given is None:
        return None
    dof = np.broadcast_to(np.asarray(given, np.float64), (n_regimes,))
    if not np.all(dof > 2.0):
        raise InputError(f"market.dof is {dof.tolist()}; it must exceed 2, where the variance exists.")
    return np.minimum(dof, 1e6)


def _hint(name: Any, offered: Any) -> str:
    near = get_close_matches(str(name), list(offered), n=1)
    return f"; did you mean {near[0]}?" if near else ""
