"""A market from a plain description: which components, with which numbers, and what is taken from data.

Components are found by folder: a module of `market.volatility`, `market.dependence`, `market.jump` or `market.side` has
a function of its own name that makes its component, or names several in `BUILDERS`. A description picks one by `kind`
and gives its arguments by name. Nothing is looked up elsewhere, and nothing is executed from a description.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qpo_sim.errors import InputError
from qpo_sim.market import presets
from qpo_sim.market.chain import Chain, described_chain
from qpo_sim.market.model import Market, check_side_names
from qpo_sim.market.statistics import Statistics, hint, resolved
from qpo_sim.numerics import rounded

FOLDERS = ("volatility", "dependence", "jump", "side")

# Arguments of builders that the market itself knows; a description need not and cannot repeat them.
_KNOWN = ("dtype", "step_hours", "n_assets", "assets", "n_regimes")


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
            f"{place}.kind is {kind!r}; it must be one of {', '.join(sorted(offered))}{hint(kind, offered)}."
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
                f"{place}.{name} is not an option of {kind}, which has {', '.join(allowed)}{hint(name, allowed)}."
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
      side: components of `market.side`, in order; of two of one kind at least one has a `name`, which its outputs
        then bear (`name: dai` makes `dai_peg` of `peg`).
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
    chain = described_chain(regimes, data, fit)
    level = _level(volatility_per_year, data)
    is_martingale = drift in ("risk_neutral", "user")
    maker = _Maker(data, chain, is_martingale, dtype)
    volatility_part, filtered = _volatility(maker, volatility, level)
    made_shock = _shock(maker, shock, None if filtered is None else filtered * level)
    moments = _moments(data, chain, level, shock, made_shock)
    # Resampled data bring their own level and mean beside the shock itself.
    shock_part = getattr(made_shock, "shock", made_shock)
    dofs = _dofs(chain.dof if dof is None else dof, chain.n_regimes)
    growth = rate_per_year if drift == "risk_neutral" else per_year
    mean = _drift(drift, moments.mean, shrinkage, growth, data)
    cholesky = None if shock_part is not None else _choleskys(chain, correlation, data)
    sides = tuple(maker.made("side", one, f"market.side[{k}]") for k, one in enumerate(side))
    check_side_names(sides)
    return Market(
        initial=rounded(chain.initial, dtype),
        transition=rounded(chain.transition, dtype),
        drift=rounded(mean, dtype),
        volatility=rounded(moments.deviation, dtype),
        correlation_cholesky=None if cholesky is None else rounded(cholesky, dtype),
        dof=None if dofs is None or shock_part is not None else rounded(dofs, dtype),
        assets=data.assets,
        step_hours=float(data.step_hours),
        mixing_cut=mixing_cut if dofs is not None else 0.0,
        volatility_model=volatility_part,
        shock=shock_part,
        jumps=tuple(maker.made("jump", jump, f"market.jumps[{k}]") for k, jump in enumerate(jumps)),
        side=sides,
        drivers=chain.made_drivers(dtype),
        compensated=is_martingale and not _is_compensated_itself(volatility),
        regime_of=chain.regime_of,
    )


def needs_fit(regimes: Mapping[str, Any] | None, shock: Mapping[str, Any] | None) -> bool:
    """Whether a description takes anything from fitted regimes."""
    return (regimes or {}).get("kind") == "fitted" or "data.labels" in (shock or {}).values()


class _Maker(NamedTuple):
    # Makes components of one market, with what the market itself knows.
    data: Statistics
    chain: Chain
    is_martingale: bool
    dtype: Any

    def made(self, folder: str, described: Mapping[str, Any] | None, place: str) -> Any:
        if described is None:
            return None
        data = self.data
        return component(
            folder,
            described,
            place,
            data,
            dtype=self.dtype,
            step_hours=data.step_hours,
            n_assets=len(data.assets),
            assets=data.assets,
            n_regimes=self.chain.n_regimes,
            martingale=self.is_martingale,
        )

    def with_regimes(self, described: Mapping[str, Any]) -> dict[str, Any]:
        # The description with what it takes from the market's regimes filled in.
        found = {"regimes.transition": self.chain.transition, "regimes.labels": self.data.labels}
        return {k: found.get(v, v) if isinstance(v, str) else v for k, v in described.items()}


def _level(volatility_per_year: Any, data: Statistics) -> np.ndarray:
    # Standard deviation per step of each asset.
    n = len(data.assets)
    if volatility_per_year is None:
        return np.ones(n)
    per_year = np.asarray(resolved(volatility_per_year, "market.volatility_per_year", data), np.float64)
    if per_year.shape not in ((), (n,)):
        raise InputError(
            f"market.volatility_per_year has the shape {per_year.shape}; give one number, or one for each of the "
            f"{n} assets."
        )
    if not np.all((per_year > 0.0) & np.isfinite(per_year)):
        raise InputError(f"market.volatility_per_year must be positive for every asset, got {per_year.tolist()}.")
    return np.broadcast_to(per_year, (n,)) / np.sqrt(data.steps_per_year)


def _volatility(maker: _Maker, described: Mapping[str, Any] | None, level: np.ndarray) -> tuple[Any, np.ndarray | None]:
    # The volatility model; for GARCH also the conditional standard deviations of the data, in units of the level.
    place = "market.volatility"
    if described is None:
        return None, None
    described = maker.with_regimes(described)
    if described.get("kind") != "garch":
        return maker.made("volatility", described, place), None
    from qpo_sim.market.volatility import garch

    starts_now = described.get("initial_variance") == "data.filtered_variance"
    options = {key: value for key, value in described.items() if not (starts_now and key == "initial_variance")}
    model = maker.made("volatility", options, place)
    returns = maker.data.returns
    standardised = (returns - np.nanmean(returns, axis=0)) / level
    # A missing return is one of ordinary size: it moves the variance towards its mean.
    variance = garch.filtered_variance(np.where(np.isnan(standardised), 1.0, standardised), model)
    if starts_now:
        model = maker.made("volatility", {**options, "initial_variance": variance[-1]}, place)
    return model, np.sqrt(variance[:-1])


def _is_compensated_itself(volatility: Mapping[str, Any] | None) -> bool:
    # Whether the model's own shift makes expected prices grow by the drift.
    if volatility is None:
        return False
    return "martingale" in inspect.signature(builders("volatility")[volatility["kind"]]).parameters


def _shock(maker: _Maker, described: Mapping[str, Any] | None, conditional_volatility: np.ndarray | None) -> Any:
    if described is None:
        return None
    described = maker.with_regimes(described)
    if described.get("conditional_volatility") == "data.conditional_volatility":
        if conditional_volatility is None:
            raise InputError(
                "market.shock takes data.conditional_volatility, which needs market.volatility of kind garch."
            )
        described = {**described, "conditional_volatility": conditional_volatility}
    return maker.made("dependence", described, "market.shock")


class _Moments(NamedTuple):
    # Mean and standard deviation of a step, regimes by assets, before what the volatility model and jumps do.
    mean: np.ndarray
    deviation: np.ndarray


def _moments(
    data: Statistics, chain: Chain, level: np.ndarray, described: Mapping[str, Any] | None, shock: Any
) -> _Moments:
    deviation = level[None, :] * chain.volatility if chain.level is None else chain.level
    mean = np.nanmean(data.returns, axis=0) * np.ones_like(deviation) if chain.mean is None else chain.mean
    if not hasattr(shock, "shock"):
        return _Moments(mean, deviation)
    if described is not None and "conditional_volatility" in described:
        # Residuals: in units of the conditional volatility.
        return _Moments(mean, deviation * shock.std)
    # Resampled data: by regime where there are labels.
    one = np.ones((chain.n_regimes, 1))
    return _Moments(shock.mean * one, shock.std * one)


def _drift(kind: str, mean: np.ndarray, shrinkage: float, growth_per_year: Any, data: Statistics) -> np.ndarray:
    if kind not in presets.DRIFTS:
        raise InputError(f"market.drift.kind is {kind!r}; it must be one of {', '.join(presets.DRIFTS)}.")
    if kind in ("risk_neutral", "user"):
        growth = presets.per_asset(growth_per_year, data.assets) / data.steps_per_year
        return np.broadcast_to(growth, mean.shape)
    return mean if kind == "historical" else (1.0 - shrinkage) * mean


def _choleskys(chain: Chain, described: Any, data: Statistics) -> np.ndarray:
    matrices = chain.correlation(described, data)
    n = len(data.assets)
    return np.stack([_cholesky(c, n, f"market.correlation of regime {k}") for k, c in enumerate(matrices)])


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
