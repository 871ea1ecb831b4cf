"""What the options must fulfil together, checked once at the border; everything behind it trusts them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qpo_sim.config.schema import (
    MEASURES_WITH_LEVEL,
    BenchConfig,
    BookConfig,
    CalibrationConfig,
    ComposedMarket,
    Config,
    LimitConfig,
    MarketConfig,
    OptimizerConfig,
    RegimeStudentTMarket,
    RiskConfig,
    SimulationConfig,
)
from qpo_sim.errors import InputError, did_you_mean

EMBEDDED_STEP_HOURS = 24.0
MAX_STEPS = 100_000
# Path numbers are 32-bit addresses of random numbers.
MAX_PATHS = 2**32 - 1
# Fractions are typed by people: 0.1 + 0.2 + 0.7 must count as 1.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Timeline:
    """Simulated time, in whole steps.

    Attributes:
      step_hours: length of a step.
      n_steps: number of steps.
      horizons_days: horizons at which losses are measured, increasing, the last at most the simulated time.
      horizon_steps: the same in steps.
    """

    step_hours: float
    n_steps: int
    horizons_days: tuple[float, ...]
    horizon_steps: tuple[int, ...]

    @property
    def horizon_days(self) -> float:
        """Simulated time in days."""
        return _days(self.n_steps, self.step_hours)


def check(config: Config) -> None:
    """Checks everything that can be known before the data is read.

    Raises:
      InputError: naming the option, its value, the rule and how to mend it.
    """
    from qpo_sim import venue

    _between("seed", config.seed, 0, 2**32 - 1)
    _check_data(config)
    _check_calibration(config.calibration)
    _check_market(config.market)
    for name, rule in config.venue.items():
        venue.from_config(rule, name=name)
    _check_book(config.book)
    _check_simulation(config.simulation)
    _check_risk(config.risk, config.book)
    _check_optimizer(config.optimizer)
    _check_bench(config.bench)
    if config.job == "replay":
        _between("path", config.path, 0, config.simulation.n_paths - 1, "the paths are numbered from 0")
    if config.compute.devices is not None:
        _between("compute.devices", config.compute.devices, 1, 4096)
    if config.data.assets is not None:
        check_assets(config, [asset for asset in config.data.assets if asset not in config.data.exclude])
    if config.data.path is None or config.simulation.step_hours is not None:
        embedded = config.data.path is None
        timeline(config, EMBEDDED_STEP_HOURS if embedded else config.simulation.step_hours or EMBEDDED_STEP_HOURS)


def check_assets(config: Config, assets: Sequence[str]) -> None:
    """Checks the options that name assets against those in the data.

    Args:
      config: all options.
      assets: assets that are simulated.

    Raises:
      InputError: an asset that is not there, with the nearest that is.
    """
    if not assets:
        raise InputError("data.assets leaves no asset: name at least one, or null for all of them")

    def known(key: str, names: Iterable[str], *, also: Sequence[str] = ()) -> None:
        for name in names:
            if name not in assets and name not in also:
                raise InputError(f"{key} names {name!r}, which is not among the assets: {did_you_mean(name, assets)}")

    book = config.book
    known("book.spot", book.spot)
    for place, account in enumerate(book.perpetuals):
        known(f"book.perpetuals[{place}].positions", account.positions)
    for place, loan in enumerate(book.loans):
        known(f"book.loans[{place}].collateral", loan.collateral)
        known(f"book.loans[{place}].debt", loan.debt, also=("USD",))
    if isinstance(config.market.drift.per_year, Mapping):
        known("market.drift.per_year", config.market.drift.per_year)


def timeline(config: Config, data_step_hours: float) -> Timeline:
    """Lays the simulated time and the horizons onto whole steps.

    Args:
      config: all options.
      data_step_hours: step of the data, the longest step that can be simulated.

    Raises:
      InputError: a step that does not divide the data's, or a horizon that is not whole steps or beyond the end.
    """
    simulation, risk = config.simulation, config.risk
    step = simulation.step_hours or data_step_hours
    if _whole(data_step_hours / step) is None:
        raise InputError(
            f"simulation.step_hours={step:g} must divide the data's step of {data_step_hours:g} hours: "
            f"take {data_step_hours:g}, {data_step_hours / 2:g}, {data_step_hours / 3:g} or another whole part"
        )
    n_steps = simulation.n_steps
    if n_steps is None:
        n_steps = _steps("simulation.horizon_days", simulation.horizon_days, step)
    if not 1 <= n_steps <= MAX_STEPS:
        raise InputError(
            f"simulation.horizon_days={simulation.horizon_days:g} is {n_steps} steps of {step:g} hours; "
            f"from 1 to {MAX_STEPS} can be simulated"
        )
    end = _days(n_steps, step)
    if risk.horizons_days is None:
        chosen = [days for days in (1.0, 7.0) if days < end and _whole(days * 24.0 / step) is not None]
        horizons = (*chosen, end)
    else:
        horizons = tuple(sorted(risk.horizons_days))
    steps = []
    for days in horizons:
        if days > end * (1.0 + ROUNDING):
            raise InputError(
                f"risk.horizons_days has {days:g}, beyond the simulated {end:g} days: leave it out, "
                "or raise simulation.horizon_days"
            )
        steps.append(_steps("risk.horizons_days", days, step))
    for place, limit in enumerate(risk.limits):
        days = limit.horizon_days
        if days is not None and not any(math.isclose(days, each, rel_tol=ROUNDING) for each in horizons):
            shown = ", ".join(f"{each:g}" for each in horizons)
            raise InputError(
                f"risk.limits[{place}].horizon_days={days:g} is not a measured horizon: take one of {shown}"
            )
    return Timeline(step, n_steps, horizons, tuple(steps))


def _between(key: str, value: float, low: float, high: float, why: str = "") -> None:
    if not low <= value <= high:
        raise InputError(
            f"{key}={_show(value)} must be from {_show(low)} to {_show(high)}" + (f": {why}" if why else "")
        )


def _show(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _positive(key: str, value: float, mend: str = "") -> None:
    if not value > 0.0:
        raise InputError(f"{key}={value:g} must be above 0" + (f": {mend}" if mend else ""))


def _level(key: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        near = value / 100.0 if 50.0 <= value < 100.0 else 0.99
        raise InputError(f"{key}={value:g} must be a confidence level between 0 and 1, such as {near:g}")


def _unique(key: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{key} has {value!r} more than once: leave it there once")


def _whole(ratio: float) -> int | None:
    """The whole number that a ratio is, up to rounding, if it is one and not 0."""
    if not math.isfinite(ratio) or round(ratio) < 1:
        return None
    return round(ratio) if abs(ratio - round(ratio)) <= ROUNDING * ratio else None


def _days(n_steps: int, step_hours: float) -> float:
    # 168 steps of 0.1 hours are 0.7 days, not 0.7000000000000001.
    return round(n_steps * step_hours / 24.0, 9)


def _steps(key: str, days: float, step_hours: float) -> int:
    _positive(key, days)
    ratio = days * 24.0 / step_hours
    steps = _whole(ratio)
    if steps is None:
        near = max(1, round(min(ratio, 1e15))) * step_hours / 24.0
        raise InputError(f"{key}={days:g} must be whole steps of {step_hours:g} hours: the nearest is {near:.10g} days")
    return steps


def _check_data(config: Config) -> None:
    data = config.data
    _unique("data.exclude", data.exclude)
    if data.assets is not None:
        _unique("data.assets", data.assets)
    # ISO dates compare as text.
    if data.start is not None and data.end is not None and data.start > data.end:
        raise InputError(f"data.start={data.start} must not come after data.end={data.end}: swap them")


def _check_calibration(calibration: CalibrationConfig) -> None:
    _between("calibration.n_regimes", calibration.n_regimes, 1, 8)
    _between("calibration.n_restarts", calibration.n_restarts, 1, 10_000)
    _between("calibration.sticky", calibration.sticky, 0.0, 1e6)
    if not 2.0 < calibration.dof_floor <= 100.0:
        raise InputError(
            f"calibration.dof_floor={calibration.dof_floor:g} must be above 2, where the variance exists, and at most "
            "100: such as 2.1"
        )


def _check_market(market: MarketConfig) -> None:
    drift = market.drift
    _between("market.drift.shrinkage", drift.shrinkage, 0.0, 1.0, "0 keeps the fitted drift, 1 is none")
    _between("market.drift.rate_per_year", drift.rate_per_year, -10.0, 10.0)
    if drift.kind == "user" and drift.per_year is None:
        raise InputError("market.drift.per_year is null: market.drift.kind=user needs a number, or one per asset")
    if drift.kind != "user" and drift.per_year is not None:
        raise InputError(
            f"market.drift.per_year is given but market.drift.kind={drift.kind} does not read it: "
            "set market.drift.kind=user, or market.drift.per_year=null"
        )
    given = drift.per_year if isinstance(drift.per_year, Mapping) else {"": drift.per_year or 0.0}
    for asset, value in given.items():
        _between(f"market.drift.per_year{asset and f'.{asset}'}", value, -100.0, 100.0)
    if isinstance(market, (RegimeStudentTMarket, ComposedMarket)) and not 0.0 < market.mixing_cut <= 0.01:
        raise InputError(
            f"market.mixing_cut={market.mixing_cut:g} must be a probability above 0 and at most 0.01: such as 1e-5"
        )


def _check_book(book: BookConfig) -> None:
    # What it holds and owes is checked where it is built, with the rules of the venues.
    _positive("book.capital", book.capital, "the equity at the start in USD")
    _between("book.capital", book.capital, 0.0, 1e15)
    for group in ("perpetuals", "loans"):
        for place, account in enumerate(getattr(book, group)):
            _name(f"book.{group}[{place}].name", account.name)
    for place, account in enumerate(book.accounts):
        _name(f"book.accounts[{place}].name", str(account.get("name") or ""))
    _unique("the account names of the book", book.account_names)


def _name(key: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"{key}={name!r} must be made of letters, digits, _ and -: such as majors_cross")


def _check_simulation(simulation: SimulationConfig) -> None:
    _between("simulation.n_paths", simulation.n_paths, 2, MAX_PATHS)
    _between("simulation.horizon_days", simulation.horizon_days, 0.0, 36_500.0)
    _positive("simulation.horizon_days", simulation.horizon_days)
    if simulation.n_steps is not None:
        _between("simulation.n_steps", simulation.n_steps, 1, MAX_STEPS)
    if simulation.step_hours is not None:
        _positive("simulation.step_hours", simulation.step_hours)
        _between("simulation.step_hours", simulation.step_hours, 1e-4, 8760.0)
    chunk = simulation.chunk_size
    if not (256 <= chunk <= 65536 and chunk & (chunk - 1) == 0):
        raise InputError(f"simulation.chunk_size={chunk} must be a power of two from 256 to 65536: such as 8192")


def _check_risk(risk: RiskConfig, book: BookConfig) -> None:
    if not risk.levels:
        raise InputError("risk.levels is empty: give at least one confidence level, such as [0.99]")
    for place, level in enumerate(risk.levels):
        _level(f"risk.levels[{place}]", level)
    _unique("risk.levels", risk.levels)
    _level("risk.attribution_level", risk.attribution_level)
    for place, level in enumerate(risk.liquidation_at_risk):
        _between(f"risk.liquidation_at_risk[{place}]", level, 1e-6, 0.5, "a probability of liquidation such as 0.01")
    _unique("risk.liquidation_at_risk", risk.liquidation_at_risk)
    if risk.horizons_days is not None:
        if not risk.horizons_days:
            raise InputError("risk.horizons_days is empty: give at least one, or null for 1, 7 and all days")
        _unique("risk.horizons_days", risk.horizons_days)
        for place, days in enumerate(risk.horizons_days):
            _positive(f"risk.horizons_days[{place}]", days)
    _unique("the names in risk.limits", [limit.name for limit in risk.limits])
    for place, limit in enumerate(risk.limits):
        _check_limit(f"risk.limits[{place}]", limit, risk, book)


def _check_limit(key: str, limit: LimitConfig, risk: RiskConfig, book: BookConfig) -> None:
    if limit.measure in MEASURES_WITH_LEVEL:
        if limit.level is None:
            raise InputError(
                f"{key}.level is missing: {limit.measure} needs one of risk.levels, {_listed(risk.levels)}"
            )
        if limit.level not in risk.levels:
            raise InputError(
                f"{key}.level={limit.level:g} is not measured: take one of risk.levels, {_listed(risk.levels)}"
            )
    elif limit.level is not None:
        raise InputError(f"{key}.level={limit.level:g} has no meaning for {limit.measure}: leave it out")
    if limit.account and limit.account not in book.account_names:
        hint = did_you_mean(limit.account, book.account_names)
        raise InputError(f"{key}.account={limit.account} is not an account of the book: {hint}")
    if limit.account and limit.measure != "liquidation_probability":
        raise InputError(f"{key}.account={limit.account} has no meaning for {limit.measure} of the book: leave it out")
    if limit.horizon_days is not None:
        _positive(f"{key}.horizon_days", limit.horizon_days)
    _between(f"{key}.max", limit.max, 0.0, 1e6)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _level("optimizer.level", optimizer.level)
    _between("optimizer.risk_aversion", optimizer.risk_aversion, 0.0, 1e6)
    _between("optimizer.liquidation_penalty", optimizer.liquidation_penalty, 0.0, 1e6)
    _positive("optimizer.learning_rate", optimizer.learning_rate)
    _between("optimizer.learning_rate", optimizer.learning_rate, 0.0, 100.0)
    _between("optimizer.n_steps", optimizer.n_steps, 1, 1_000_000)
    for name in ("n_paths", "n_test_paths"):
        _between(f"optimizer.{name}", getattr(optimizer, name), 2, MAX_PATHS)
    if optimizer.gross_leverage is not None:
        _between("optimizer.gross_leverage", optimizer.gross_leverage, 0.0, 1000.0)
    for side in ("lower", "upper"):
        bound = getattr(optimizer, side)
        for name, value in (bound if isinstance(bound, Mapping) else {"": bound}).items():
            _between(f"optimizer.{side}{name and f'.{name}'}", value, -1000.0, 1000.0)
    if isinstance(optimizer.lower, float) and isinstance(optimizer.upper, float) and optimizer.lower > optimizer.upper:
        raise InputError(f"optimizer.lower={optimizer.lower:g} is above optimizer.upper={optimizer.upper:g}: swap them")


def _check_bench(bench: BenchConfig) -> None:
    _between("bench.repetitions", bench.repetitions, 1, 1000)
    _between("bench.tolerance", bench.tolerance, 0.0, 1.0)
    for name, ratio in vars(bench.reference).items():
        if ratio is not None:
            _positive(f"bench.reference.{name}", ratio)
