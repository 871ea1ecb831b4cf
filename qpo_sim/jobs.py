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
from qpo_sim.compute import partial as partials
from qpo_sim.compute.partial import Partial
from qpo_sim.compute.run import Progress, Run
from qpo_sim.config import Timeline, check_assets, timeline
from qpo_sim.config.schema import ComposedMarket, Config, GbmMarket, HistoryMarket, RegimeStudentTMarket
from qpo_sim.data.tables import price_table, read_table
from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market import Market, compose, presets
from qpo_sim.market.line import MarketRecord
from qpo_sim.market.statistics import market_statistics
from qpo_sim.report import RunReport, terminal_summary, write_csv, write_json, write_report
from qpo_sim.risk import liquidation, moments, summary
from qpo_sim.risk.limits import BREACHED, judge
from qpo_sim.risk.liquidation_at_risk import margin_needed
from qpo_sim.risk.summary import Measure
from qpo_sim.simulate import Outcome, Plan, market_paths, simulate_again, simulate_paths
from qpo_sim.types import Estimate

OK, LIMIT_BREACHED = 0, 3
_FAN = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_N_WORST = 10
# Paths whose accounts are kept at every date, and paths on which a needed margin is sought.
_N_RECORDED, _N_SOUGHT = 8192, 16_384
_ACCOUNT_FAN = (0.05, 0.25, 0.5, 0.75, 0.95)

ProgressBar = Callable[..., Any]


@dataclass(frozen=True)
class History:
    """The data as one path.

    Attributes:
      prices: USD, one row per point; the first is the start.
      labels: when each point was, in the data's own time stamps.
      has_extremes: whether lows and highs of bars are among the points.
    """

    prices: pd.DataFrame
    labels: tuple[str, ...]
    has_extremes: bool = False


@dataclass(frozen=True)
class Session:
    """What every job starts from; `history` is there when the market is the data themselves."""

    config: Config
    prices: pd.DataFrame
    returns: pd.DataFrame
    fit: RegimeFit | None
    market: Market
    book: Book
    timeline: Timeline
    timings: dict[str, float]
    history: History | None = None

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
    if isinstance(config.market, HistoryMarket) and config.job != "replay":
        raise InputError(
            f"market=history is one path, the data themselves, and job={config.job} needs many: use job=replay, or "
            "another market."
        )
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
    if isinstance(config.market, HistoryMarket):
        return _open_history(config, prices, returns, timings, clock)
    steps = timeline(config, data.step_hours(prices))
    timings["data"] = time.perf_counter() - clock
    # The book first: a mistake in it is told before the fit is waited for.
    last = {asset: float(prices[asset].dropna().iloc[-1]) for asset in prices.columns}
    book = book_of(config, tuple(prices.columns), last)
    clock = time.perf_counter()
    fit, market = build_market(config, prices, returns)
    timings["calibrate"] = time.perf_counter() - clock
    return Session(config, prices, returns, fit, market, book, steps, timings)


def _open_history(
    config: Config, prices: pd.DataFrame, returns: pd.DataFrame, timings: dict[str, float], clock: float
) -> Session:
    history = history_of(config, prices)
    n_steps = len(history.prices) - 1
    hours = data.step_hours(prices) * len(prices) / len(history.prices)
    start = {asset: float(history.prices[asset].iloc[0]) for asset in prices.columns}
    book = book_of(config, tuple(prices.columns), start)
    timings["data"] = time.perf_counter() - clock
    # Nothing of it is drawn: it carries the names of the assets and the clock.
    market = presets.gbm(tuple(prices.columns), [1.0] * prices.shape[1], step_hours=hours)
    steps = Timeline(hours, n_steps, (n_steps * hours / 24.0,), (n_steps,))
    return Session(config, prices, returns, None, market, book, steps, timings, history)


def history_of(config: Config, prices: pd.DataFrame) -> History:
    """The path that the data are: closes, or four points per bar.

    Raises:
      InputError: a price is missing, or open, high or low are asked for and not in the file, or do not enclose the
        close.
    """
    holes = prices.isna().to_numpy()
    if holes.any():
        at, k = np.argwhere(holes)[0]
        raise InputError(
            f"{prices.columns[k]} has no price on {prices.index[at]}: a replay needs every price, leave the asset out "
            "with data.exclude or narrow data.start and data.end."
        )
    form = "%Y-%m-%d" if data.step_hours(prices) % 24.0 == 0.0 else "%Y-%m-%d %H:%M"
    stamps = [stamp.strftime(form) for stamp in prices.index]
    assert isinstance(config.market, HistoryMarket)
    if config.market.intrabar == "close":
        return History(prices, tuple(stamps))
    bars = {name: _bar_column(config, name, prices) for name in ("open", "high", "low")}
    bars["close"] = prices.to_numpy(np.float64)
    for asset, high, low, *ends in zip(
        prices.columns, *(bars[name].T for name in ("high", "low", "open", "close")), strict=True
    ):
        bad = np.flatnonzero((low > np.minimum(*ends)) | (high < np.maximum(*ends)))
        if bad.size:
            raise InputError(
                f"{config.data.path}: {asset} has a high or low on {stamps[bad[0]]} that does not enclose its open and "
                "close; mend the row."
            )
    rises = bars["close"] >= bars["open"]
    first, second = np.where(rises, bars["low"], bars["high"]), np.where(rises, bars["high"], bars["low"])
    points = np.stack([bars["open"], first, second, bars["close"]], axis=1).reshape(-1, prices.shape[1])
    index = np.repeat(prices.index.to_numpy(), 4)
    words = ("open", "first extreme", "second extreme", "close")
    return History(
        pd.DataFrame(points, index=pd.DatetimeIndex(index), columns=prices.columns),
        tuple(f"{stamp} ({word})" for stamp in stamps for word in words),
        has_extremes=True,
    )


def _bar_column(config: Config, name: str, prices: pd.DataFrame) -> np.ndarray:
    path = config.data.path
    if path is None:
        raise InputError(
            "market.intrabar=low_high needs open, high and low, which the embedded prices lack: give "
            "data.path, or use market.intrabar=close."
        )
    raw = read_table(Path(path).expanduser().read_bytes(), f"data.path={path!r}")
    named = {column.strip().lower(): column for column in raw.columns}
    missing = [column for column in (name, "close", "asset") if column not in named]
    if missing:
        raise InputError(
            f"market.intrabar=low_high needs a long file with the columns asset, open, high, low and close; {path} has "
            f"no column {missing[0]!r}: use market.intrabar=close."
        )
    # Read as a table of closes is, with the other column in its place.
    columns = {**raw.columns, named["close"]: raw.columns[named[name]]}
    table = price_table(raw._replace(columns=columns), list(prices.columns)).prices.reindex(prices.index)
    values = table.to_numpy(np.float64)
    if not (np.isfinite(values) & (values > 0.0)).all():
        at, k = np.argwhere(~(np.isfinite(values) & (values > 0.0)))[0]
        raise InputError(
            f"{path}: {prices.columns[k]} has {name} {values[at, k]:g} on {prices.index[at]}; it must be positive."
        )
    return values


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
        statistics = market_statistics(returns, step_hours=hours)
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
        statistics = market_statistics(returns, step_hours=hours, labels=labels)
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


def book_of(config: Config, assets: tuple[str, ...], prices: dict[str, float]) -> Book:
    """Book of the configuration at the given prices."""
    venues = {name: venue.from_config(rule, name=name) for name, rule in config.venue.items()}

    def find(name: str) -> Any:
        if name not in venues:
            raise InputError(f"there is no venue {name!r}: {did_you_mean(name, venues)}")
        return venues[name]

    book = config.book
    return build_book(
        assets,
        capital=book.capital,
        spot=book.spot,
        perpetuals=[_plain(account) for account in book.perpetuals],
        loans=[_plain(loan) for loan in book.loans],
        accounts=book.accounts,
        policies=book.policies,
        trading_costs=book.trading_costs,
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
        # Of history nothing is known between its rows.
        monitoring="step" if session.history is not None else session.config.simulation.monitoring,
        dates=tuple(range(1, n_steps + 1)),
        record_paths=True,
    )
    clock = time.perf_counter()
    path = np.array([number], np.uint32)
    if session.history is None:
        found = simulate_paths(session.market, session.book, path, plan, seed=session.config.seed)
        market = jax.tree.map(np.asarray, market_paths(session.market, path, plan, seed=session.config.seed))
    else:
        market = _history_record(session)
        found = simulate_again(session.market, session.book, 1, plan, record=market)
    outcome = jax.tree.map(np.asarray, found)
    session.timings["replay"] = time.perf_counter() - clock
    days = np.arange(n_steps + 1) * hours / 24.0
    names = session.book.account_names
    columns: dict[str, Any] = {}
    for i, asset in enumerate(session.market.assets):
        columns[f"price:{asset}"] = np.append(1.0, np.exp(market.log_price[:, i, 0]))
    equity = np.append(1.0, outcome.equity[:, 0])
    columns["equity"] = equity
    regime = (market.masks[:, :, 0] * np.arange(1, market.masks.shape[1] + 1)).sum(axis=1)
    if session.history is None:
        columns["regime"] = np.append(regime[:1], regime)
    record = outcome.record
    for j, name in enumerate(names):
        ratio = np.exp(record.distance[:, j, 0].astype(np.float64))
        closed = record.is_liquidated[:, j, 0] > 0.5
        # Of accounts with fixed positions it is that of the untouched account; a closed one has nothing to liquidate.
        ratio = np.where(closed & (j < session.book.n_fixed) | (ratio > 1e4), np.nan, ratio)
        columns[f"margin_ratio:{name}"] = np.append(np.nan, ratio)
    for name, rows in (market.side or {}).items():
        assets = session.market.assets
        for i, row in enumerate(np.atleast_3d(rows.astype(np.float64)).reshape(n_steps, -1).T):
            label = assets[i] if rows.ndim == 3 and rows.shape[1] == len(assets) else str(i)
            columns[f"side:{name}:{label}"] = np.append(np.nan, row)
    frame = pd.DataFrame(columns, index=pd.Index(days, name="day"))
    drawdown = float(outcome.max_drawdown[0])
    title = _title(session) if session.history is not None else f"Path {number}: {_title(session)}"
    return RunReport(
        job="replay",
        title=title,
        capital=session.config.book.capital,
        horizon_days=session.horizon_days,
        n_paths=1,
        n_steps=n_steps,
        step_hours=hours,
        assets=session.market.assets,
        replay=frame,
        replay_events=_events(session, frame, outcome, regime),
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


def _history_record(session: Session) -> MarketRecord:
    assert session.history is not None
    prices = session.history.prices.to_numpy(np.float64)
    dtype = session.market.drift.dtype
    log_price = np.log(prices[1:] / prices[0])[:, :, None].astype(dtype)
    n_steps = log_price.shape[0]
    return MarketRecord(log_price, np.zeros((n_steps, 0, 1), dtype), np.ones((n_steps, 1), dtype))


def _events(session: Session, frame: pd.DataFrame, outcome: Outcome, regime: np.ndarray) -> pd.DataFrame:
    """What happened, in order: turns of the market, liquidations with price and loss, the book's worst step."""
    days, record = [float(day) for day in frame.index][1:], outcome.record
    assert record is not None
    times = None if session.history is None else session.history.labels[1:]
    labels = _labels(int(session.market.n_regimes))
    nothing = {"account": "", "price_usd": np.nan, "loss_usd": np.nan}
    rows: list[dict[str, Any]] = [
        {"step": t, "event": f"the market turns {labels[int(regime[t])]}", **nothing}
        for t in range(1, regime.size)
        if regime[t] != regime[t - 1]
    ]
    capital = session.config.book.capital
    for j, (name, start) in enumerate(zip(session.book.account_names, start_equities(session.book), strict=True)):
        hits = np.flatnonzero(record.is_liquidated[:, j, 0] > 0.5)
        if not hits.size:
            continue
        t = int(hits[0])
        left = float(record.account_equity[t, j, 0])
        loss = capital * (start - left)
        asset, price = _main_price(session, j, frame, t)
        at = f" with {asset} at {price:,.6g} {'USD' if session.history is not None else 'of its start'}"
        event = f"{name} is liquidated{at}; of {capital * start:,.0f} USD in it {capital * left:,.0f} USD are left"
        rows.append({"step": t, "event": event, "account": name, "price_usd": price, "loss_usd": loss})
        if session.history is None:
            rows[-1]["price_usd"] = price * float(session.prices[asset].dropna().iloc[-1])
    move = frame["equity"].diff().to_numpy()[1:]
    worst = int(np.argmin(move))
    text = f"the book's worst step: {100.0 * move[worst]:+.2f} % of the capital"
    rows.append({"step": worst, "event": text, **nothing})
    rows.sort(key=lambda row: row["step"])
    table = pd.DataFrame(rows)
    steps = table.pop("step")
    table.insert(0, "day", [days[t] for t in steps])
    if times is not None:
        table.insert(1, "time", [times[t] for t in steps])
        table["event"] = [f"{times[t]}: {event}" for t, event in zip(steps, table["event"], strict=True)]
    return table


def _main_price(session: Session, j: int, frame: pd.DataFrame, t: int) -> tuple[str, float]:
    # The asset in which an account is largest, and its price at the end of a step: USD in history, else over the start.
    book = session.book
    if j < len(book.perpetuals):
        held, assets = np.abs(np.asarray(book.perpetuals[j].quantity)), book.perpetual_shapes[j].assets
    elif j < book.n_fixed:
        k = j - len(book.perpetuals)
        held, assets = np.asarray(book.loans[k].collateral), book.loan_shapes[k].collateral_assets
    else:
        holding = [h for h in book.holdings if h.can_be_liquidated][j - book.n_fixed]
        assets = tuple(c.asset for c in getattr(holding, "contracts", ())) or holding.assets
        held = np.abs(np.asarray(getattr(holding, "quantity", np.ones(len(assets)))))[: len(assets)]
    asset = book.assets[assets[int(np.argmax(held))]]
    if session.history is not None:
        return asset, float(session.history.prices[asset].iloc[t + 1])
    return asset, float(frame[f"price:{asset}"].iloc[t + 1])


def start_equities(book: Book) -> list[float]:
    """Equity of each account that can be liquidated at the start, a fraction of the capital."""
    rows = [
        float(account.margin) + float(np.sum(np.asarray(account.quantity) * (1.0 - np.asarray(account.entry))))
        for account in book.perpetuals
    ]
    rows += [
        float(np.sum(np.asarray(loan.collateral))) - float(loan.debt_cash) - float(np.sum(np.asarray(loan.debt)))
        for loan in book.loans
    ]
    return rows + [float(holding.start_value()) for holding in book.holdings if holding.can_be_liquidated]


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
    config, partial = session.config, finished.partial
    clock = time.perf_counter()
    recorded = _recorded(session, finished)
    session.timings["record"] = time.perf_counter() - clock
    clock = time.perf_counter()
    measures = summary.measures(finished)
    # From all paths where the run kept what liquidations did, else from those that are recorded.
    detail = partial if "bad_debt" in partial.sums or recorded is None else recorded.partial
    if detail is not None and "bad_debt" in detail.sums:
        measures += summary.liquidation_measures(detail, session.book, session.horizon_days)
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
        liquidation_by_regime=_by_regime(session, recorded),
        account_fan=_account_fan(session, recorded),
        n_recorded=0 if recorded is None else recorded.n_paths,
        n_liquidation_paths=0 if detail is None else detail.n_used,
        account_venues=dict(zip(session.book.account_names, session.book.account_venues, strict=True)),
        liquidation_at_risk=_liquidation_at_risk(session),
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


@dataclass(frozen=True)
class _Recorded:
    """The first paths of a run once more, with their accounts at every date."""

    outcome: Outcome
    days: np.ndarray
    partial: Partial
    n_paths: int


def _recorded(session: Session, finished: Run) -> _Recorded | None:
    if not session.book.n_accounts:
        return None
    # What liquidations did is either known of all paths already or still to be told.
    plan = replace(finished.plan, record_paths=True, attribution="bad_debt" not in finished.partial.sums)
    n = min(finished.n_paths, _N_RECORDED)
    found = jax.tree.map(np.asarray, simulate_again(session.market, session.book, n, plan, seed=session.config.seed))
    sums = partials.partial_of(found._asdict(), 0, horizons=(len(plan.dates) - 1,), keep=1)
    return _Recorded(found, np.asarray(plan.dates) * plan.step_hours / 24.0, sums, n)


def _by_regime(session: Session, recorded: _Recorded | None) -> pd.DataFrame | None:
    """Probability of a liquidation that happens in each regime."""
    if recorded is None or session.market.n_regimes == 1:
        return None
    assert recorded.outcome.record is not None
    hits = recorded.outcome.record.hit_by_regime.astype(np.float64)
    square, n = np.square(hits).sum(axis=-1), float(recorded.n_paths)
    found = liquidation.liquidation_probability(hits.sum(axis=-1), square, n)
    labels = _labels(session.market.n_regimes)
    return pd.DataFrame(
        [
            (name, label, found.value[k, j], found.std_error[k, j])
            for j, name in enumerate(session.book.account_names)
            for k, label in enumerate(labels)
        ],
        columns=["account", "regime", "probability", "std_error"],
    )


def _account_fan(session: Session, recorded: _Recorded | None) -> pd.DataFrame | None:
    """Quantiles over the paths of the margin ratio and the exposure of each account that is still untouched."""
    if recorded is None:
        return None
    record, frames = recorded.outcome.record, []
    assert record is not None
    for kind, rows in (("margin_ratio", np.exp(record.distance.astype(np.float64))), ("exposure", record.exposure)):
        for j, name in enumerate(session.book.account_names):
            open_ = record.is_liquidated[:, j] < 0.5
            seen = [
                np.quantile(row[alive], _ACCOUNT_FAN) if alive.any() else np.full(len(_ACCOUNT_FAN), np.nan)
                for row, alive in zip(rows[:, j].astype(np.float64), open_, strict=True)
            ]
            if np.isnan(seen).all():
                continue
            frame = pd.DataFrame(seen, columns=[f"q{round(100 * p):02d}" for p in _ACCOUNT_FAN])
            frame.insert(0, "account", name)
            frame.insert(1, "kind", kind)
            frame.insert(2, "day", recorded.days)
            frame.insert(3, "share", open_.mean(axis=1))
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None


def _liquidation_at_risk(session: Session) -> pd.DataFrame | None:
    """Margin or collateral that each account needs, sought on the same paths for all multiples."""
    levels = session.config.risk.liquidation_at_risk
    if not levels or not session.book.n_accounts:
        return None
    clock = time.perf_counter()
    plan = Plan(
        session.n_steps,
        step_hours=session.step_hours,
        monitoring=session.config.simulation.monitoring,
        dates=(session.n_steps,),
        attribution=False,
        drawn=False,
    )
    n, rows = min(session.config.simulation.n_paths, _N_SOUGHT), []
    for j, (name, now) in enumerate(zip(session.book.account_names, margins_of(session.book), strict=True)):
        if now is None:
            continue

        def probability(multiple: float, j: int = j) -> Estimate:
            book = with_margin(session.book, j, multiple)
            found = simulate_again(session.market, book, n, plan, seed=session.config.seed)
            hit = np.asarray(found.conditional.hit_probability[j], np.float64)
            return liquidation.liquidation_probability(hit.sum(), np.square(hit).sum(), float(n))

        for place, level in enumerate(levels):
            found = margin_needed(probability, level, tolerance=1e-3, place=f"risk.liquidation_at_risk[{place}]")
            needed, error = (now * float(x) for x in found.multiple)
            rows.append((name, level, now, needed, error, n))
    session.timings["liquidation_at_risk"] = time.perf_counter() - clock
    return pd.DataFrame(rows, columns=["account", "level", "now", "needed", "std_error", "n_paths"])


def margins_of(book: Book) -> list[float | None]:
    """What `with_margin` multiplies in each account that can be liquidated, in units of the capital.

    Equity of a perpetual or margin account at the start, value of a loan's collateral; None where it is not known.
    """
    rows: list[float | None] = list(start_equities(book))
    for k, loan in enumerate(book.loans):
        rows[len(book.perpetuals) + k] = float(np.sum(np.asarray(loan.collateral)))
    others = [holding for holding in book.holdings if holding.can_be_liquidated]
    for k, holding in enumerate(others):
        if not hasattr(holding, "balance"):
            rows[book.n_fixed + k] = None
    return rows


def with_margin(book: Book, account: int, multiple: float) -> Book:
    """Book in which an account has another margin; every other number stays.

    Money is put in so that the equity at the start of a perpetual or margin account is the multiple of what it was (a
    margin account takes it in its first currency); of a loan all collateral is multiplied.

    Args:
      book: the book.
      account: number in `Book.account_names`.
      multiple: see above.
    """
    n_perpetuals = len(book.perpetuals)
    if account < n_perpetuals:
        kept = list(book.perpetuals)
        more = (multiple - 1.0) * start_equities(book)[account]
        kept[account] = kept[account]._replace(margin=kept[account].margin + np.float32(more))
        return replace(book, perpetuals=tuple(kept))
    if account < book.n_fixed:
        loans, k = list(book.loans), account - n_perpetuals
        loans[k] = loans[k]._replace(collateral=loans[k].collateral * np.float32(multiple))
        return replace(book, loans=tuple(loans))
    at = [k for k, holding in enumerate(book.holdings) if holding.can_be_liquidated][account - book.n_fixed]
    holdings, more = list(book.holdings), (multiple - 1.0) * start_equities(book)[account]
    balance = np.array(holdings[at].balance)
    balance[0] += more
    holdings[at] = replace(holdings[at], balance=jax.device_put(balance))
    return replace(book, holdings=tuple(holdings))


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
        correlation = market_statistics(session.returns, step_hours=session.market.step_hours).correlation
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
    source = "embedded daily prices" if session.config.data.path is None else Path(session.config.data.path).name
    if session.history is not None:
        labels = session.history.labels
        return f"History from {labels[0]} to {labels[-1]}, {source}"
    names = {"regime_student_t": "Regime-switching Student-t market", "gbm": "Geometric Brownian motion"}
    name = market.name if isinstance(market, ComposedMarket) else names[market.kind]
    options = market.drift
    drift = "no drift assumed" if (options.kind, options.shrinkage) == ("shrunk", 1.0) else f"{options.kind} drift"
    return f"{name}, {drift}, {source}"


def _notes(session: Session) -> tuple[str, ...]:
    """What a reader must know of this market and its approximations."""
    market, notes = session.market, [*_monitoring_notes(session), *_policy_notes(session)]
    if session.history is not None:
        return tuple(notes)
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
        notes.append(
            "Funding, depth, gas and the other side processes are simulated; margin accounts and policies read them, "
            "the accounts under book.perpetuals and book.loans of a book without policies do not."
        )
    return tuple(notes)


def _monitoring_notes(session: Session) -> list[str]:
    """How each account is looked at, and what that misses."""
    book = session.book
    if not book.n_accounts:
        return []
    hours = f"{session.step_hours:g} hours"
    if session.history is not None:
        note = "Accounts are checked at the prices in the data only; what happened between them is not known."
        if session.history.has_extremes:
            note += (
                " The extremes of a bar are taken in the order of its direction and of all assets at once: the true "
                "order is unknown, so that a cross account may look worse or better than it was."
            )
        return [note]
    if session.config.simulation.monitoring == "step":
        return [
            f"Accounts are checked at the ends of steps of {hours} only: excursions within a step are missed, so the "
            "probabilities of liquidation are too low."
        ]
    groups: dict[str, list[str]] = {"exact": [], "first order": []}
    shapes = [(shape.name, len(shape.assets)) for shape in book.perpetual_shapes]
    shapes += [(shape.name, len(shape.collateral_assets + shape.debt_assets)) for shape in book.loan_shapes]
    for name, n_assets in shapes:
        groups["exact" if n_assets == 1 else "first order"].append(name)
    for holding in book.holdings:
        if not holding.can_be_liquidated:
            continue
        n_points = getattr(holding, "n_points", 1)
        kind = f"{n_points} points" if n_points > 1 else "first order"
        # Without side processes every trigger is the index.
        sees_index = getattr(holding, "trigger", "index") == "index" or not session.market.side
        is_single = len(holding.assets) == 1 and sees_index
        groups.setdefault("exact" if n_points == 1 and is_single else kind, []).append(holding.name)
    notes = []
    for kind, names in groups.items():
        if not names:
            continue
        who = f"{_listed(names)} {'is' if len(names) == 1 else 'are'} checked"
        if kind == "exact":
            notes.append(
                f"{who} at every moment of a step: the probability of touching the barrier between the step ends is "
                "that of a Brownian bridge, exact where one price moves the account and shocks are Gaussian in a step."
            )
        elif kind == "first order":
            notes.append(
                f"{who} between the step ends by a Brownian bridge of the margin ratio, to first order in the step of "
                f"{hours} where several prices move it: a shorter simulation.step_hours shows how far it is off."
            )
        else:
            notes.append(
                f"{who} at {kind} within each step of {hours} and by a Brownian bridge between them, to first order "
                "in such a part: more n_points show how far it is off."
            )
    return notes


def _policy_notes(session: Session) -> list[str]:
    """The policies in words, in the order in which they act."""
    notes = []
    for k, policy in enumerate(session.config.book.policies):
        options = ", ".join(f"{key.replace('_', ' ')} {_told(value)}" for key, value in policy.items() if key != "kind")
        kind = str(policy.get("kind", "")).replace("_", " ")
        notes.append(f"Policy {k + 1}, after each step: {kind}{f' ({options})' if options else ''}.")
    return notes


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return _listed([_told(item) for item in value])
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


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
