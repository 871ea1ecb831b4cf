"""The regimes of a market from a plain description: the chain of states and what each regime has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market import regime
from qpo_sim.market.statistics import Statistics, hint, resolved
from qpo_sim.numerics import rounded

_OF_REGIMES = ("volatility", "initial", "mean_per_year", "dof")
_MARKOV = ("transition", *_OF_REGIMES, "drivers")
_SEMI_MARKOV = ("mean_duration", "shape", "embedded", *_OF_REGIMES, "drivers")


@dataclass(frozen=True)
class Chain:
    """Regimes as described.

    Attributes:
      initial: law of the state just before the first step.
      transition: of the states.
      volatility: factor of each regime on the level.
      regime_of: regime of each state, where several states make one regime.
      level: standard deviations per step when they are fitted, else None.
      mean: mean log-returns per step, None for those of the data.
      dof: degrees of freedom by regime, if the regimes bring their own.
      correlations: of each regime, if the regimes bring their own.
      drivers: description of `regime.Drivers`.
    """

    initial: Float[np.ndarray, " states"]
    transition: Float[np.ndarray, "states states"]
    volatility: Float[np.ndarray, "regimes 1"]
    regime_of: tuple[int, ...] | None = None
    level: Float[np.ndarray, "regimes assets"] | None = None
    mean: Float[np.ndarray, "regimes assets"] | None = None
    dof: Any = None
    correlations: Float[np.ndarray, "regimes assets assets"] | None = None
    drivers: Mapping[str, Any] | None = None

    @property
    def n_regimes(self) -> int:
        """Number of regimes."""
        return len(self.volatility)

    def correlation(self, described: Any, data: Statistics) -> list[Any]:
        """Correlation of each regime: its own, or that of the description (one for all, or a list by regime)."""
        if self.correlations is not None:
            return list(self.correlations)
        is_list = isinstance(described, list | tuple)
        one_each = is_list and len(described) == self.n_regimes and np.ndim(described[0]) != 1
        rows = described if one_each else [described] * self.n_regimes
        return [resolved(row, "market.correlation", data) for row in rows]

    def made_drivers(self, dtype: Any) -> regime.Drivers | None:
        """Covariates that move the transition probabilities, or None.

        Raises:
          InputError: options or slopes that do not fit.
        """
        if self.drivers is None:
            return None
        options = dict(self.drivers)
        slopes = options.pop("slopes", None)
        reference, half_life = float(options.pop("reference", 0.03)), float(options.pop("half_life", 10.0))
        if options or not isinstance(slopes, Mapping) or not slopes:
            raise InputError(
                "market.regimes.drivers has `slopes` (a states x states matrix by covariate), `reference` and "
                f"`half_life`, got {sorted(self.drivers)}."
            )
        n = len(self.initial)
        matrices = [np.asarray(slope, np.float64) for slope in slopes.values()]
        if any(matrix.shape != (n, n) for matrix in matrices) or reference <= 0.0 or half_life <= 0.0:
            raise InputError(
                f"market.regimes.drivers: each slope is a {n} x {n} matrix, reference and half_life are positive."
            )
        return regime.Drivers(rounded(np.stack(matrices), dtype), rounded(reference, dtype), tuple(slopes), half_life)


def described_chain(described: Mapping[str, Any] | None, data: Statistics, fit: Any) -> Chain:
    """Chain of a description, see `compose.compose_market`; of one regime for None.

    Raises:
      InputError: a description that cannot be met, with its place.
    """
    if described is None:
        return Chain(np.ones(1), np.ones((1, 1)), np.ones((1, 1)))
    kind, drivers = described.get("kind"), described.get("drivers")
    given = {key: value for key, value in described.items() if key not in ("kind", "drivers")}
    options = {key: resolved(value, f"market.regimes.{key}", data) for key, value in given.items()}
    if kind == "fitted":
        _check_options(options, ("drivers",), kind)
        return _fitted(fit, drivers)
    if kind == "markov":
        _check_options(options, _MARKOV, kind)
        return _markov(options, data, drivers)
    if kind == "semi_markov":
        _check_options(options, _SEMI_MARKOV, kind)
        return _semi_markov(options, data, drivers)
    raise InputError(f"market.regimes.kind is {kind!r}; it must be fitted, markov or semi_markov.")


def _fitted(fit: Any, drivers: Mapping[str, Any] | None) -> Chain:
    if fit is None:
        raise InputError("market.regimes: kind fitted needs a fit (`calibrate`).")
    covariance = fit.covariance()
    deviation = np.sqrt(np.einsum("kii->ki", covariance))
    return Chain(
        initial=fit.initial,
        transition=fit.transition,
        volatility=np.ones((len(fit.dof), 1)),
        level=deviation,
        mean=fit.mean,
        dof=fit.dof,
        correlations=covariance / deviation[:, :, None] / deviation[:, None, :],
        drivers=drivers,
    )


def _markov(options: Mapping[str, Any], data: Statistics, drivers: Mapping[str, Any] | None) -> Chain:
    volatility, mean = _volatility(options), _mean(options, data)
    n = len(volatility)
    transition = np.asarray(options.get("transition", np.zeros((0, 0))), np.float64)
    if transition.shape != (n, n):
        raise InputError(f"market.regimes.transition must be a {n} x {n} matrix, got shape {transition.shape}.")
    regime.check_transition("market.regimes.transition", transition)
    if options.get("initial") is None:
        # The law before the first step of a chain that has run for ever.
        try:
            initial = regime.stationary_law(transition)
        except InputError as error:
            raise InputError(f"market.regimes.transition: {error}") from error
    else:
        initial = np.asarray(options["initial"], np.float64)
        if initial.shape != (n,):
            raise InputError(f"market.regimes.initial must have {n} probabilities, got {initial.tolist()}.")
        regime.check_law("market.regimes.initial", initial)
    return Chain(initial, transition, volatility, mean=mean, dof=options.get("dof"), drivers=drivers)


def _semi_markov(options: Mapping[str, Any], data: Statistics, drivers: Mapping[str, Any] | None) -> Chain:
    volatility, mean = _volatility(options), _mean(options, data)
    needed = [options.get(name) for name in ("mean_duration", "shape", "embedded")]
    if any(value is None for value in needed):
        raise InputError("market.regimes of kind semi_markov need mean_duration, shape and embedded.")
    try:
        start, transition, regime_of = regime.semi_markov(options.get("initial"), *needed)
    except InputError as error:
        raise InputError(f"market.regimes: {error}") from error
    return Chain(start, transition, volatility, regime_of, mean=mean, dof=options.get("dof"), drivers=drivers)


def _volatility(options: Mapping[str, Any]) -> np.ndarray:
    factors = np.asarray(options.get("volatility", ()), np.float64)
    if factors.ndim != 1 or factors.size < 1 or not np.all(factors > 0.0):
        raise InputError("market.regimes.volatility must list a positive factor on the volatility for each regime.")
    return factors[:, None]


def _mean(options: Mapping[str, Any], data: Statistics) -> np.ndarray | None:
    given = options.get("mean_per_year")
    if given is None:
        return None
    n = np.size(options["volatility"])
    return np.asarray(given, np.float64).reshape(n, -1) / data.steps_per_year * np.ones((1, len(data.assets)))


def _check_options(options: Mapping[str, Any], allowed: Sequence[str], kind: str) -> None:
    for name in options:
        if name not in allowed:
            raise InputError(
                f"market.regimes.{name} is not an option of {kind}, which has {', '.join(allowed)}"
                f"{hint(name, allowed)}."
            )
