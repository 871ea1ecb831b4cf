"""The jobs of the command line: read, build, call, write. Everything numerical is done elsewhere."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from qpo_sim import calibration, data, optimize, venue
from qpo_sim import compute as engine
from qpo_sim.bench import ratios
from qpo_sim.book import ACCOUNTS, Book, build_book
from qpo_sim.calibration import RegimeFit
from qpo_sim.compute.run import Progress, Run
from qpo_sim.config import Timeline, check_assets, timeline
from qpo_sim.config.schema import ComposedMarket, Config, GbmMarket, RegimeStudentTMarket
from qpo_sim.errors import InputError
from qpo_sim.market import Market, compose, presets
from qpo_sim.report import RunReport, terminal_summary, write_csv, write_json, write_report
from qpo_sim.risk import summary
from qpo_sim.risk.limits import BREACHED, judge
from qpo_sim.risk.summary import Measure
from qpo_sim.simulate import Plan, market_paths, simulate_paths

OK, LIMIT_BREACHED = 0, 3
_FAN = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_N_WORST = 10

ProgressBar = Callable[..., Any]


@dataclass(frozen=True)
class Session:
    """What every job starts from."""

    config: Config
    prices: pd.DataFrame
    returns: pd.DataFrame
    fit: RegimeFit | None
    market: Market
    book: Book
    timeline: Timeline
    timings: dict[str, float]

    @property
    def n_steps(self) -> int:
        """Simulation steps of the run."""
        return self.timeline.n_steps

    @property
    def step_hours(self) -> float:
        """Length of a simulation step."""
        return self.timeline.step_hours

    @property
    def horizon_days(self) -> float:
        """Length of the run in days."""
        return self.timeline.horizon_days


def run(config: Config, folder: Path, progress: ProgressBar) -> int:
    """Runs the job that the configuration names and writes its results into the folder.

    Args:
      config: checked configuration.
      folder: the run's folder.
      progress: maker of progress bars, `progress(total=..., desc=...)`.

    Returns:
      0, or 3 when a risk limit is breached beyond its error bar or, for job=bench, a ratio has fallen.

    Raises:
      InputError: the data or the options do not fit together.
    """
    with _status(progress, "reading prices, fitting the market"):
        session = open_session(config)
    if config.job == "bench":
        return bench_job(session, folder, progress)
    report = {"risk": risk_job, "optimize": optimize_job, "calibrate": calibrate_job, "replay": replay_job}[config.job](
        session, progress
    )
    with _status(progress, "writing the report"):
        written = write_report(report, folder, parquet=config.report.parquet, html=config.report.html)
    print(terminal_summary(report, written))
    if report.limits is not None and BREACHED in set(report.limits["status"]):
        return LIMIT_BREACHED
    return OK


def _status(progress: ProgressBar, text: str) -> Any:
    """A line on the terminal while something runs that has no steps to count."""
    return progress(desc=text, bar_format="{desc}", leave=False)


# ----------------------------------------------------------------------------- building


def open_session(config: Config) -> Session:
    """Prices, fit, market and book of a configuration."""
    timings: dict[str, float] = {}
    clock = time.perf_counter()
    options = config.data
    prices = data.load_prices(
        options.path,
        assets=options.assets,
        exclude=options.exclude,
        start=options.start,
        end=options.end,
        missing=options.missing,
    )
    returns = data.log_returns(prices)
    check_assets(config, tuple(prices.columns))
    steps = timeline(config, data.step_hours(prices))
    timings["data"] = time.perf_counter() - clock
    clock = time.perf_counter()
    fit, market = build_market(config, prices, returns)
    timings["calibrate"] = time.perf_counter() - clock
    last = {asset: float(prices[asset].dropna().iloc[-1]) for asset in prices.columns}
    return Session(config, prices, returns, fit, market, book_of(config, market, last), steps, timings)


def build_market(config: Config, prices: pd.DataFrame, returns: pd.DataFrame) -> tuple[RegimeFit | None, Market]:
    """Market of the configuration, with the fit behind it if there is one."""
    drift = config.market.drift
    choice: dict[str, Any] = {
        "drift": drift.kind,
        "shrinkage": drift.shrinkage,
        "per_year": drift.per_year or 0.0,
        "rate_per_year": drift.rate_per_year,
    }
    market = config.market
    hours = data.step_hours(prices)
    if isinstance(market, GbmMarket):
        statistics = compose.market_statistics(returns, step_hours=hours)
        return None, presets.gbm(
            statistics.assets,
            list(statistics.value("volatility_per_year", "gbm")),
            statistics.correlation,
            step_hours=hours,
            mean_per_year=list(statistics.value("mean_per_year", "gbm")),
            **choice,
        )
    if isinstance(market, ComposedMarket):
        fit = _fit_of(config, returns, hours) if compose.needs_fit(market.regimes, market.shock) else None
        labels = None if fit is None else np.argmax(fit.smoothed, axis=1)
        statistics = compose.market_statistics(returns, step_hours=hours, labels=labels)
        parts = {f.name: getattr(market, f.name) for f in fields(market) if f.name not in ("kind", "name", "drift")}
        return fit, compose.compose_market(statistics, fit=fit, **parts, **choice)
    assert isinstance(market, RegimeStudentTMarket)
    fit = _fit_of(config, returns, hours)
    return fit, presets.regime_student_t(fit, mixing_cut=market.mixing_cut, **choice)


def _fit_of(config: Config, returns: pd.DataFrame, hours: float) -> RegimeFit:
    options = config.calibration
    fitted = {
        "n_regimes": options.n_regimes,
        "n_restarts": options.n_restarts,
        "sticky": options.sticky,
        "dof_floor": options.dof_floor,
        "step_hours": hours,
    }
    if options.cache:
        return calibration.cached_calibrate(returns, cache_dir=options.cache_dir, **fitted)
    return calibration.calibrate(returns, **fitted)


def book_of(config: Config, market: Market, prices: dict[str, float]) -> Book:
    """Book of the configuration at the last prices."""
    venues = {name: venue.from_config(_plain(rule), name=name) for name, rule in config.venue.items()}

    def find(name: str) -> Any:
        if name not in venues:
            raise InputError(f"there is no venue {name!r}; configured are {', '.join(venues)}.")
        return venues[name]

    book = config.book
    return build_book(
        market.assets,
        capital=book.capital,
        spot=book.spot,
        perpetuals=[_plain(account) for account in book.perpetuals],
        loans=[_plain(loan) for loan in book.loans],
        prices=prices,
        venue=find,
    )


def _plain(value: Any) -> dict[str, Any]:
    return asdict(value)


# ----------------------------------------------------------------------------- jobs


def risk_job(session: Session, progress: ProgressBar) -> RunReport:
    """Risk of the book as it stands."""
    finished, convergence = simulate_book(session, progress)
    return _risk_report(session, finished, convergence)


def optimize_job(session: Session, progress: ProgressBar) -> RunReport:
    """Risk of the book as it stands, better weights, and both on fresh paths."""
    finished, convergence = simulate_book(session, progress)
    report = _risk_report(session, finished, convergence)
    options = session.config.optimizer
    clock = time.perf_counter()
    with progress(total=options.n_steps, desc=f"weights: {options.objective}", unit="step") as bar:
        found = optimize.optimize_weights(
            session.market,
            session.book,
            n_steps=session.n_steps,
            step_hours=session.step_hours,
            monitoring=session.config.simulation.monitoring,
            objective_name=options.objective,
            level=options.level,
            risk_aversion=options.risk_aversion,
            liquidation_penalty=options.liquidation_penalty,
            lower=options.lower,
            upper=options.upper,
            gross_leverage=options.gross_leverage,
            learning_rate=options.learning_rate,
            n_iterations=options.n_steps,
            n_paths=options.n_paths,
            n_test_paths=options.n_test_paths,
            seed=session.config.seed,
            devices=session.config.compute.devices,
            engine=finished.engine,
        )
        bar.update(options.n_steps)
    session.timings["optimize"] = time.perf_counter() - clock
    weights = pd.DataFrame(
        {"position": found.positions, "before": found.before, "after": found.after, "equal": found.equal}
    )
    trace = np.asarray(found.solution.trace, np.float64)
    comparison = pd.DataFrame(found.comparison)
    # What was optimised for comes first.
    first = {"sharpe": "sharpe_ratio", "sortino": "sortino_ratio"}.get(options.objective, "conditional_value_at_risk")
    comparison = comparison.sort_values("measure", key=lambda name: name != first, kind="stable", ignore_index=True)
    comparison["level"] = np.where(comparison["measure"] == "conditional_value_at_risk", options.level, np.nan)
    return replace(
        report,
        job="optimize",
        weights=weights,
        comparison=comparison,
        optimizer_trace=pd.DataFrame({"step": np.arange(trace.size), "objective": trace}),
        notes=_notes(session),
        manifest=_manifest(session, finished),
    )


def calibrate_job(session: Session, progress: ProgressBar) -> RunReport:
    """The fitted market alone."""
    if session.fit is None:
        raise InputError("job=calibrate fits regimes, and this market has none fitted; choose market=regime_student_t.")
    return RunReport(
        job="calibrate",
        title=_title(session),
        capital=session.config.book.capital,
        horizon_days=session.horizon_days,
        n_paths=0,
        n_steps=session.n_steps,
        step_hours=session.step_hours,
        assets=session.market.assets,
        notes=_notes(session),
        manifest=_manifest(session),
        **_fit_tables(session),
    )


def replay_job(session: Session, progress: ProgressBar) -> RunReport:
    """One path, told step by step; the same numbers as in a run of any size."""
    number = session.config.path
    n_steps, hours = session.n_steps, session.step_hours
    plan = Plan(
        n_steps,
        step_hours=hours,
        monitoring=session.config.simulation.monitoring,
        dates=tuple(range(1, n_steps + 1)),
        record_paths=True,
    )
    clock = time.perf_counter()
    path = np.array([number], np.uint32)
    outcome = jax.tree.map(
        np.asarray, simulate_paths(session.market, session.book, path, plan, seed=session.config.seed)
    )
    market = jax.tree.map(np.asarray, market_paths(session.market, path, plan, seed=session.config.seed))
    session.timings["replay"] = time.perf_counter() - clock
    days = np.arange(n_steps + 1) * hours / 24.0
    names = session.book.account_names
    columns: dict[str, Any] = {}
    for i, asset in enumerate(session.market.assets):
        columns[f"price:{asset}"] = np.append(1.0, np.exp(market.log_price[:, i, 0]))
    equity = np.append(1.0, outcome.equity[:, 0])
    columns["equity"] = equity
    regime = (market.masks[:, :, 0] * np.arange(1, market.masks.shape[1] + 1)).sum(axis=1)
    columns["regime"] = np.append(regime[:1], regime)
    record = outcome.record
    for j, name in enumerate(names):
        ratio = np.exp(record.distance[:, j, 0].astype(np.float64))
        closed = record.is_liquidated[:, j, 0] > 0.5
        # After a perpetual account is closed there is nothing left to liquidate.
        if j < len(session.book.perpetual_shapes):
            ratio = np.where(closed, np.nan, ratio)
        columns[f"margin_ratio:{name}"] = np.append(np.nan, ratio)
    for name, rows in (market.side or {}).items():
        assets = session.market.assets
        for i, row in enumerate(np.atleast_3d(rows.astype(np.float64)).reshape(n_steps, -1).T):
            label = assets[i] if rows.ndim == 3 and rows.shape[1] == len(assets) else str(i)
            columns[f"side:{name}:{label}"] = np.append(np.nan, row)
    frame = pd.DataFrame(columns, index=pd.Index(days, name="day"))
    drawdown = float(outcome.max_drawdown[0])
    return RunReport(
        job="replay",
        title=f"Path {number}: {_title(session)}",
        capital=session.config.book.capital,
        horizon_days=session.horizon_days,
        n_paths=1,
        n_steps=n_steps,
        step_hours=hours,
        assets=session.market.assets,
        replay=frame,
        replay_events=_events(session, frame, record, regime),
        worst_paths=pd.DataFrame(
            {
                "path": [number],
                "loss": [1.0 - float(equity[-1])],
                "max_drawdown": [drawdown],
                "liquidated": [",".join(n for n, hit in zip(names, outcome.is_liquidated[:, 0], strict=True) if hit)],
            }
        ),
        notes=_notes(session),
        manifest=_manifest(session),
    )


def _events(session: Session, frame: pd.DataFrame, record: Any, regime: np.ndarray) -> pd.DataFrame:
    days = [float(day) for day in frame.index][1:]
    labels = _labels(int(session.market.n_regimes))
    rows: list[tuple[float, str]] = [
        (days[t], f"the market turns {labels[int(regime[t])]}")
        for t in range(1, regime.size)
        if regime[t] != regime[t - 1]
    ]
    for j, name in enumerate(session.book.account_names):
        hits = np.flatnonzero(record.is_liquidated[:, j, 0] > 0.5)
        if hits.size:
            rows.append((days[hits[0]], f"{name} is liquidated"))
    move = frame["equity"].diff().to_numpy()[1:]
    worst = int(np.argmin(move))
    rows.append((days[worst], f"the book's worst step: {100.0 * move[worst]:+.2f} % of the capital"))
    return pd.DataFrame(sorted(rows), columns=["day", "event"])


def bench_job(session: Session, folder: Path, progress: ProgressBar) -> int:
    """Measures speed as ratios, writes bench.csv and manifest.json, and judges them against the references."""
    options = session.config.bench
    with progress(total=ratios.n_calls(options.repetitions), desc="measuring") as bar:
        rows = ratios.measure(
            session.market,
            session.book,
            n_steps=session.n_steps,
            step_hours=session.step_hours,
            monitoring=session.config.simulation.monitoring,
            repetitions=options.repetitions,
            tick=lambda: bar.update(1),
        )
    references = vars(options.reference)
    verdicts = [ratios.judge(row.ratio, references[row.name], options.tolerance) for row in rows]
    table = pd.DataFrame([row._asdict() for row in rows])
    table["reference"], table["verdict"] = [references[row.name] for row in rows], verdicts
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "bench.csv", table)
    write_json(folder / "manifest.json", _manifest(session))
    print(f"Speed by process CPU time, smallest of {options.repetitions} rounds; more is better.\n")
    for row, verdict in zip(rows, verdicts, strict=True):
        reference = references[row.name]
        judged = verdict if reference is None else f"{verdict} (reference {reference:.2f})"
        costs = f"{row.of} {row.numerator:.3g}, {row.over} {row.denominator:.3g} {row.unit}"
        print(f"  {row.name:17} {row.ratio:6.2f}  {judged:26} {costs}")
    print(f"\nresults     {folder / 'bench.csv'}")
    return LIMIT_BREACHED if ratios.SLOWER in verdicts else OK


# ----------------------------------------------------------------------------- simulation and its tables


def simulate_book(session: Session, progress: ProgressBar) -> tuple[Run, pd.DataFrame]:
    """The streamed run and its running estimates."""
    config = session.config
    hours, n_steps = session.step_hours, session.n_steps
    level = config.risk.attribution_level
    rows: list[tuple[int, str, float, float, float]] = []
    mark = 1

    with progress(total=config.simulation.n_paths, desc="compiling", unit="path") as bar:

        def after_batch(state: Progress) -> None:
            nonlocal mark
            last = len(state.partial.tails) - 1
            var, cvar = summary.tail_measures(state.partial, last, level)
            bar.set_description("paths", refresh=False)
            # The rate and the time left are those of the simulation, without the compilation before it.
            bar.start_t = time.time() - state.seconds
            bar.set_postfix_str(
                f"CVaR{100 * level:g} {100 * float(cvar.value):.2f} ± {100 * float(cvar.std_error):.2f} %"
            )
            bar.update(state.n_done - bar.n)
            if state.n_done >= mark or state.n_done == state.n_paths:
                mark = 2 * state.n_done
                for name, estimate in (("value_at_risk", var), ("conditional_value_at_risk", cvar)):
                    rows.append((state.n_done, name, level, float(estimate.value), float(estimate.std_error)))

        finished = engine.run(
            session.market,
            session.book,
            n_paths=config.simulation.n_paths,
            n_steps=n_steps,
            step_hours=hours,
            seed=config.seed,
            monitoring=config.simulation.monitoring,
            levels=tuple(sorted({*config.risk.levels, level})),
            horizons=session.timeline.horizon_steps,
            chunk_size=config.simulation.chunk_size,
            devices=config.compute.devices,
            kernel=config.simulation.kernel,
            progress=after_batch,
        )
    session.timings.update(finished.timings)
    return finished, pd.DataFrame(rows, columns=["n_paths", "measure", "level", "value", "std_error"])


def _risk_report(session: Session, finished: Run, convergence: pd.DataFrame) -> RunReport:
    clock = time.perf_counter()
    config, partial = session.config, finished.partial
    measures = summary.measures(finished)
    level = config.risk.attribution_level
    days = np.asarray(finished.plan.dates) * session.step_hours / 24.0
    n = float(partial.n_used)
    fan = pd.DataFrame(summary.fan(finished, _FAN), columns=[f"q{round(100 * p):02d}" for p in _FAN])
    fan.insert(0, "day", days)
    fan.insert(1, "mean", partial.total("equity") / n)
    start = pd.DataFrame({c: [0.0 if c == "day" else 1.0] for c in fan.columns})
    edges, density = summary.loss_density(finished)
    components, contribution = summary.attribution(finished, level)
    value, error = np.asarray(contribution.value), np.asarray(contribution.std_error)
    attribution = pd.DataFrame(
        {
            "position": [position for position, _ in components],
            "account": [account for _, account in components],
            "contribution": value,
            "std_error": error,
            "share": value / value.sum(),
        }
    )
    session.timings["measure"] = time.perf_counter() - clock
    return RunReport(
        job="risk",
        title=_title(session),
        capital=config.book.capital,
        horizon_days=session.horizon_days,
        n_paths=finished.n_paths,
        n_steps=session.n_steps,
        step_hours=session.step_hours,
        assets=session.market.assets,
        measures=pd.DataFrame(measures),
        fan=pd.concat([start, fan], ignore_index=True),
        loss_histogram=pd.DataFrame({"left": edges[:-1], "right": edges[1:], "density": density}),
        hazard=_hazard(finished, days),
        attribution=attribution,
        attribution_level=level,
        ledger=_ledger(finished, level),
        convergence=convergence,
        worst_paths=_worst_paths(finished),
        limits=_limits(config, measures),
        notes=_notes(session),
        manifest=_manifest(session, finished),
        **_fit_tables(session),
    )


def _hazard(finished: Run, days: np.ndarray) -> pd.DataFrame | None:
    names = finished.book.account_names
    if not names:
        return None
    n = float(finished.partial.n_used)
    total = finished.partial.total
    increment, square = total("hazard") / n, total("hazard_square") / n
    curve = summary.liquidation_curve(finished.partial)
    frames = [
        pd.DataFrame(
            {
                "account": name,
                "day": days,
                "hazard": increment[:, j],
                "hazard_std_error": np.sqrt(np.maximum(square[:, j] - increment[:, j] ** 2, 0.0) / n),
                "cumulative": curve.value[:, j],
                "cumulative_std_error": curve.std_error[:, j],
            }
        )
        for j, name in enumerate(names)
    ]
    return pd.concat(frames, ignore_index=True)


def _ledger(finished: Run, level: float) -> pd.DataFrame:
    from qpo_sim.risk import moments

    partial, n = finished.partial, float(finished.partial.n_used)
    mean = moments.mean(partial.total("accounts"), partial.total("accounts_square"), n)
    worst = partial.tails[-1].extra["accounts"].astype(np.float64)
    tail = worst[:, : max(1, round(n * (1.0 - level)))].mean(axis=1)
    pnl = summary.return_sums(partial, len(finished.horizons) - 1)
    total = moments.mean(pnl.r1, pnl.r2, n)
    return pd.DataFrame(
        {
            "account": [*ACCOUNTS, "total"],
            "mean": [*mean.value, float(total.value)],
            "std_error": [*mean.std_error, float(total.std_error)],
            "tail_mean": [*tail, tail.sum()],
        }
    )


def _worst_paths(finished: Run) -> pd.DataFrame:
    tail = finished.partial.tails[-1]
    names = finished.book.account_names
    hit = tail.extra["is_liquidated"]
    return pd.DataFrame(
        {
            "path": tail.path[:_N_WORST],
            "loss": tail.loss[:_N_WORST].astype(np.float64),
            "max_drawdown": tail.extra["max_drawdown"][0, :_N_WORST].astype(np.float64),
            "liquidated": [
                ",".join(name for name, flag in zip(names, hit[:, k], strict=True) if flag > 0.5)
                for k in range(min(_N_WORST, tail.loss.size))
            ],
        }
    )


def _limits(config: Config, measures: list[Measure]) -> pd.DataFrame | None:
    verdicts = [
        judge(
            measures,
            name=limit.name,
            measure=limit.measure,
            limit=limit.max,
            level=limit.level,
            account=limit.account,
            horizon_days=limit.horizon_days,
        )
        for limit in config.risk.limits
    ]
    return pd.DataFrame(verdicts) if verdicts else None


def _labels(n_regimes: int) -> list[str]:
    return {1: ["all days"], 2: ["calm", "turbulent"], 3: ["calm", "middle", "turbulent"]}.get(
        n_regimes, [f"regime {k + 1}" for k in range(n_regimes)]
    )


def _fit_tables(session: Session) -> dict[str, Any]:
    fit, assets = session.fit, list(session.market.assets)
    if fit is None:
        # The correlation in the data: a composed market need not have a matrix of its own.
        correlation = compose.market_statistics(session.returns, step_hours=session.market.step_hours).correlation
        return {"correlation": {"all days": pd.DataFrame(correlation, assets, assets)}}
    labels = _labels(fit.transition.shape[0])
    correlation = fit.correlation()
    off = ~np.eye(len(assets), dtype=bool)
    table = pd.DataFrame(
        {
            "regime": labels,
            "share": fit.smoothed.mean(axis=0),
            "mean_duration_days": fit.durations * fit.step_hours / 24.0,
            "dof": fit.dof,
            "mean_volatility_per_year": fit.volatility_per_year().mean(axis=1),
            "mean_correlation": [float(c[off].mean()) if off.any() else np.nan for c in correlation],
        }
    )
    first = session.prices.iloc[:, 0]
    return {
        "regime_history": pd.DataFrame(fit.smoothed, index=session.returns.index, columns=labels),
        "price_history": first.loc[session.returns.index].rename(str(first.name)),
        "regime_table": table,
        "correlation": {label: pd.DataFrame(c, assets, assets) for label, c in zip(labels, correlation, strict=True)},
    }


def _title(session: Session) -> str:
    market = session.config.market
    names = {"regime_student_t": "Regime-switching Student-t market", "gbm": "Geometric Brownian motion"}
    name = market.name if isinstance(market, ComposedMarket) else names[market.kind]
    options = market.drift
    drift = "no drift assumed" if (options.kind, options.shrinkage) == ("shrunk", 1.0) else f"{options.kind} drift"
    source = "embedded daily prices" if session.config.data.path is None else Path(session.config.data.path).name
    return f"{name}, {drift}, {source}"


def _notes(session: Session) -> tuple[str, ...]:
    """What a reader must know of this market and its approximations."""
    market, notes = session.market, []
    if session.book.n_accounts and session.config.simulation.monitoring == "bridge":
        if not market.is_conditionally_gaussian:
            notes.append(
                "Liquidation between steps is approximate in this market: its shocks are not Gaussian within a step, "
                "and the crossing probability uses their conditional variance. simulation.monitoring=step tests at the "
                "step ends only."
            )
        if market.jumps:
            notes.append(
                "Jumps are taken at the end of their step; an account that a jump carries over its barrier is closed "
                "at the price behind the gap."
            )
    for jump in market.jumps:
        if hasattr(jump, "branching_ratio"):
            notes.append(f"The self-exciting jumps have a branching ratio of {jump.branching_ratio():.2f}.")
    if market.side:
        notes.append("Funding, depth, gas and the other side processes are simulated; positions do not read them yet.")
    return tuple(notes)


def _manifest(session: Session, finished: Run | None = None) -> dict[str, Any]:
    fit = session.fit
    content: dict[str, Any] = {
        "versions": {
            name: _version(name) for name in ("qpo-sim", "jax", "jaxlib", "numpy", "optax", "pandas", "hydra-core")
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(d) for d in jax.devices()],
        "seed": session.config.seed,
        "data": {
            "fingerprint": data.fingerprint(session.prices),
            "rows": len(session.prices),
            "first": str(session.prices.index[0]),
            "last": str(session.prices.index[-1]),
        },
        "timings_seconds": {k: round(v, 3) for k, v in session.timings.items()},
        "config": asdict(session.config),
    }
    if fit is not None:
        content["calibration"] = fit.summary()
    if finished is not None:
        content["paths_not_finite"] = finished.partial.n_not_finite
        content["kernel"] = {"name": finished.kernel, "reason": finished.engine.kernel_reason}
    return content


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
