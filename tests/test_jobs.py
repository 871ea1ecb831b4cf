"""The jobs end to end on small runs: what they write, what they return, and that a path is one path everywhere."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tqdm import tqdm

from qpo_sim import jobs
from qpo_sim.compute import run as simulate_run
from qpo_sim.config import load
from qpo_sim.errors import InputError
from qpo_sim.risk.summary import Measure
from qpo_sim.simulate import Plan, simulate_paths

QUIET = partial(tqdm, disable=True)
N_PATHS = 4096
BOOK = """
capital: 1000000
spot: {BTC: 0.3, ETH: 0.2}
perpetuals:
  - {name: cross, mode: cross, venue: binance, margin: 0.12, positions: {BTC: 0.9, ETH: -0.4}}
loans: []
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """Folder with a two-asset book, in which fits are kept as well."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "book").mkdir()
    (folder / "book" / "tiny.yaml").write_text(BOOK)
    return folder


@pytest.fixture(scope="module")
def options(mine):
    """Configuration of a small job, from overrides."""

    def compose(*overrides: str):
        return load(
            [
                "book=tiny",
                "data.assets=[BTC,ETH]",
                "calibration.n_regimes=2",
                "calibration.n_restarts=2",
                f"calibration.cache_dir={mine / 'fits'}",
                f"simulation.n_paths={N_PATHS}",
                "simulation.n_steps=5",
                "simulation.chunk_size=256",
                "risk.levels=[0.95,0.99]",
                "risk.horizons_days=null",
                "risk.limits=[]",
                "compute.devices=1",
                *overrides,
            ],
            config_dir=mine,
        )

    return compose


def limit(name: str, most: float, measure: str = "conditional_value_at_risk", level: str = "0.95") -> str:
    return f"{{name: {name}, measure: {measure}, level: {level}, max: {most}}}"


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "tables" / f"{name}.csv")


class Done:
    """A finished job: exit code and what lies in its folder."""

    def __init__(self, config, folder: Path):
        self.config, self.folder = config, folder
        self.code = jobs.run(config, folder, QUIET)
        self.result = json.loads((folder / "result.json").read_text())
        self.manifest = json.loads((folder / "manifest.json").read_text())

    def measure(self, name: str, **where) -> dict:
        rows = [
            row
            for row in self.result["measures"]
            if row["measure"] == name and all(row[key] == value for key, value in where.items())
        ]
        assert len(rows) == 1, (name, where, rows)
        return rows[0]


@pytest.fixture(scope="module")
def risk(options, tmp_path_factory) -> Done:
    limits = ",".join([limit("tail", 0.001), limit("loose", 5.0), limit("loss", 1.0, "probability_of_loss", "null")])
    return Done(options("job=risk", f"risk.limits=[{limits}]"), tmp_path_factory.mktemp("risk"))


@pytest.fixture(scope="module")
def session(options):
    return jobs.open_session(options("job=risk"))


# ----------------------------------------------------------------------------- risk


def test_every_measure_has_its_error(risk):
    rows = risk.result["measures"]
    assert {row["horizon_days"] for row in rows} == {1.0, 5.0}
    for row in rows:
        assert row["value"] is not None and row["std_error"] is not None, row
        assert row["std_error"] >= 0.0 and row["unit"]
    for name in ("value_at_risk", "conditional_value_at_risk"):
        for level in (0.95, 0.99):
            row = risk.measure(name, level=level, horizon_days=5.0)
            assert 0.0 < row["std_error"] < row["value"] < 1.0
    var, cvar = (risk.measure(n, level=0.99, horizon_days=5.0) for n in ("value_at_risk", "conditional_value_at_risk"))
    assert cvar["value"] > var["value"]
    assert 0.0 < risk.measure("liquidation_probability", account="cross", horizon_days=5.0)["value"] < 1.0


def test_numbers_are_those_of_the_paths(risk, session):
    """Every headline number once more from the paths themselves."""
    plan = Plan(5, dates=(1, 2, 3, 4, 5), attribution=False)
    outcome = simulate_paths(session.market, session.book, N_PATHS, plan, seed=session.config.seed)
    loss = 1.0 - np.asarray(outcome.equity[-1], np.float64)
    var = risk.measure("value_at_risk", level=0.95, horizon_days=5.0)["value"]
    assert var == pytest.approx(np.quantile(loss, 0.95, method="inverted_cdf"), abs=1e-6)
    q, k = np.sort(loss)[::-1], 0.05 * N_PATHS
    cvar = (q[: int(k)].sum() + (k - int(k)) * q[int(k)]) / k
    assert risk.measure("conditional_value_at_risk", level=0.95, horizon_days=5.0)["value"] == pytest.approx(
        cvar, abs=1e-6
    )
    assert risk.measure("mean_return", horizon_days=5.0)["value"] == pytest.approx(-loss.mean(), abs=1e-6)
    assert risk.measure("expected_max_drawdown", horizon_days=5.0)["value"] == pytest.approx(
        float(np.asarray(outcome.max_drawdown, np.float64).mean()), abs=1e-6
    )
    hit = risk.measure("liquidation_probability", account="cross", horizon_days=5.0)["value"]
    assert hit == pytest.approx(float(np.asarray(outcome.hit_probability[-1, 0], np.float64).mean()), abs=1e-6)
    worst = read(risk.folder, "worst_paths")
    np.testing.assert_array_equal(np.sort(worst["loss"])[::-1], worst["loss"])
    np.testing.assert_allclose(worst["loss"], q[:10], atol=1e-6)


def test_tables_agree_with_each_other(risk):
    attribution = read(risk.folder, "attribution")
    level = risk.result["attribution_level"]
    cvar = risk.measure("conditional_value_at_risk", level=level, horizon_days=5.0)["value"]
    assert attribution["contribution"].sum() == pytest.approx(cvar, abs=2e-6)
    assert attribution["share"].sum() == pytest.approx(1.0, abs=1e-5)
    ledger = read(risk.folder, "ledger").set_index("account")
    parts = ledger.drop(index="total")
    assert set(parts.index) == {"price", "funding", "interest", "fees", "liquidation", "trading", "income"}
    assert parts["mean"].sum() == pytest.approx(ledger.loc["total", "mean"], abs=1e-6)
    assert ledger.loc["total", "mean"] == pytest.approx(
        risk.measure("mean_return", horizon_days=5.0)["value"], abs=1e-6
    )
    hazard = read(risk.folder, "hazard")
    assert hazard["hazard"].sum() == pytest.approx(hazard["cumulative"].iloc[-1], abs=1e-6)
    hit = risk.measure("liquidation_probability", account="cross", horizon_days=5.0)["value"]
    assert hazard["cumulative"].iloc[-1] == pytest.approx(hit, abs=1e-6)
    histogram = read(risk.folder, "loss_histogram")
    assert ((histogram["right"] - histogram["left"]) * histogram["density"]).sum() == pytest.approx(0.999, abs=2e-4)
    fan = read(risk.folder, "fan")
    assert list(fan["day"]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert np.all(fan.iloc[0, 1:] == 1.0)
    assert np.all(np.diff(fan[["q01", "q05", "q25", "q50", "q75", "q95", "q99"]].to_numpy(), axis=1) >= 0.0)
    assert read(risk.folder, "convergence")["n_paths"].iloc[-1] == N_PATHS


def test_manifest_tells_the_run_again(risk, session):
    manifest = risk.manifest
    assert manifest["seed"] == 0 and manifest["paths_not_finite"] == 0
    assert manifest["config"]["simulation"]["n_paths"] == N_PATHS
    assert manifest["data"]["rows"] == len(session.prices)
    assert {"qpo-sim", "jax", "numpy"} <= set(manifest["versions"])
    assert {"data", "calibrate", "compile", "simulate"} <= set(manifest["timings_seconds"])
    assert set(manifest["files"]) >= {"result.json", "report.html", "tables/measures.csv"}
    assert (risk.folder / "report.html").stat().st_size > 10_000


def test_breach_beyond_the_error_is_code_3(risk):
    assert risk.code == jobs.LIMIT_BREACHED == 3
    assert {row["name"]: row["status"] for row in risk.result["limits"]} == {
        "tail": "breached", "loose": "ok", "loss": "ok",
    }  # fmt: skip


def test_limits_know_their_error_bar(risk, options):
    """Just below the value the breach may be chance; an error bar further it is none."""
    row = risk.measure("conditional_value_at_risk", level=0.95, horizon_days=5.0)
    table = read(risk.folder, "measures").fillna({"account": ""})
    measures = [Measure(**values) for values in table.to_dict("records")]
    bar = 1.959963984540054 * row["std_error"]
    for shift, status in ((-1.01, "breached"), (-0.99, "within error"), (0.99, "within error"), (1.01, "ok")):
        config = options(f"risk.limits=[{limit('x', row['value'] + shift * bar)}]")
        assert list(jobs._limits(config, measures)["status"]) == [status]
    # A horizon of its own, and one that the run does not have.
    first = risk.measure("conditional_value_at_risk", level=0.95, horizon_days=1.0)["value"]
    config = options(f"risk.limits=[{limit('x', 1.0)[:-1]}, horizon_days: 1}}]")
    assert jobs._limits(config, measures)["value"].iloc[0] == pytest.approx(first)
    with pytest.raises(InputError, match="horizon"):
        jobs.open_session(options(f"risk.limits=[{limit('x', 1.0)[:-1]}, horizon_days: 9}}]"))
    assert jobs._limits(options(), measures) is None


# ----------------------------------------------------------------------------- replay


def replayed(options, folder: Path, k: int) -> tuple[Done, pd.DataFrame]:
    done = Done(options("job=replay", f"path={k}", "report.html=false"), folder)
    return done, read(folder, "replay")


def test_worst_path_is_the_same_alone_and_in_every_run(risk, options, session, tmp_path):
    """Chunks of 256 and of 1024, the paths in memory, and the path alone: one path."""
    small = read(risk.folder, "worst_paths")
    other, _ = jobs.simulate_book(
        dataclasses.replace(session, config=options("job=risk", "simulation.chunk_size=1024")), QUIET
    )
    large = jobs._worst_paths(other)
    np.testing.assert_array_equal(small["path"], large["path"])
    np.testing.assert_array_equal(small["loss"], large["loss"])
    np.testing.assert_array_equal(small["max_drawdown"], large["max_drawdown"])
    k = int(small["path"][0])
    done, story = replayed(options, tmp_path, k)
    [told] = done.result["worst_paths"]
    assert done.code == 0
    # The loss of the run is single precision before it is written: bit for bit the same number.
    assert np.float32(told["loss"]) == np.float32(small["loss"][0])
    assert told["max_drawdown"] == small["max_drawdown"][0]
    assert told["liquidated"] == small["liquidated"].fillna("")[0]
    row = simulate_paths(session.market, session.book, N_PATHS, Plan(5, attribution=False)).equity[:, k]
    np.testing.assert_array_equal(np.float32(story["equity"]), np.append(np.float32(1.0), np.asarray(row)))
    # It was the worst of all: something happened, and the events say so.
    if told["liquidated"]:
        assert read(tmp_path, "replay_events")["event"].str.contains("cross is liquidated").any()


def test_replay_tells_prices_regime_and_margin(options, session, tmp_path):
    done, story = replayed(options, tmp_path, 17)
    assert list(story.columns) == ["day", "price:BTC", "price:ETH", "equity", "regime", "margin_ratio:cross"]
    assert list(story["day"]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert np.all(story.iloc[0][["price:BTC", "price:ETH", "equity"]] == 1.0)
    assert set(story["regime"]) <= {0, 1}
    if not done.result["worst_paths"][0]["liquidated"]:
        # Equity from the story's own prices, without funding: spot, cash and the account's margin.
        btc, eth = story["price:BTC"], story["price:ETH"]
        value = 0.38 + 0.3 * btc + 0.2 * eth + 0.12 + 0.9 * (btc - 1.0) - 0.4 * (eth - 1.0)
        funding = 0.0001 * 3 * (0.9 - 0.4) * np.arange(6)
        np.testing.assert_allclose(story["equity"], value - funding, atol=5e-4)
        assert np.all(story["margin_ratio:cross"][1:] > 1.0)


# ----------------------------------------------------------------------------- optimize, calibrate


def test_optimize_writes_weights_and_comparison(options, tmp_path):
    done = Done(
        options(
            "job=optimize", "optimizer.n_steps=25", "optimizer.n_paths=1024", "optimizer.n_test_paths=4096",
            "optimizer.gross_leverage=0.8", "simulation.n_steps=3",
        ),
        tmp_path,
    )  # fmt: skip
    assert done.code == 0 and done.result["job"] == "optimize"
    weights = read(tmp_path, "weights").set_index("position")
    assert list(weights.index) == ["BTC spot", "ETH spot", "BTC cross", "ETH cross"]
    np.testing.assert_allclose(weights["before"], [0.3, 0.2, 0.9, -0.4], atol=1e-6)
    assert weights["after"].iloc[:2].sum() == pytest.approx(0.5, abs=1e-5)
    assert weights["after"].iloc[2:].abs().sum() <= 0.8 + 1e-5
    comparison = read(tmp_path, "comparison")
    assert comparison["std_error"].notna().all() and comparison["difference_std_error"].notna().all()
    assert comparison["measure"].iloc[0] == "conditional_value_at_risk"
    cvar = comparison[comparison["measure"] == "conditional_value_at_risk"].set_index("portfolio")
    row = cvar.loc["optimised"]
    assert row["difference"] + 3.0 * row["difference_std_error"] < 0.0
    assert row["value"] - cvar.loc["start", "value"] == pytest.approx(row["difference"], abs=1e-9)
    trace = read(tmp_path, "optimizer_trace")
    assert len(trace) == 26 and trace["objective"].notna().all()
    assert "optimize" in done.manifest["timings_seconds"]
    # The whole risk report of the starting book is there as well.
    assert done.measure("value_at_risk", level=0.99, horizon_days=3.0)["value"] > 0.0


def test_calibrate_writes_the_regimes(options, tmp_path):
    done = Done(options("job=calibrate"), tmp_path)
    assert done.code == 0 and done.result["measures"] == []
    table = read(tmp_path, "regime_table")
    assert list(table["regime"]) == ["calm", "turbulent"]
    assert table["mean_volatility_per_year"].is_monotonic_increasing
    assert table["share"].sum() == pytest.approx(1.0)
    history = read(tmp_path, "regime_history")
    np.testing.assert_allclose(history[["calm", "turbulent"]].sum(axis=1), 1.0, atol=1e-9)
    assert "calibration" in done.manifest


def test_calibrate_needs_a_regime_market(options, tmp_path):
    with pytest.raises(InputError, match="regime_student_t"):
        jobs.run(options("job=calibrate", "market=gbm"), tmp_path / "out", QUIET)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- other markets, clocks and files


def test_gbm_market_has_the_moments_of_the_data(options, tmp_path):
    """The control model: volatility of the spot-only book from the sample covariance, in sub-steps of six hours."""
    config = options(
        "job=risk", "market=gbm", "~book.perpetuals", "simulation.step_hours=6", "simulation.n_steps=8",
        "report.html=false", "risk.horizons_days=[1,2]",
    )  # fmt: skip
    done = Done(config, tmp_path)
    assert done.code == 0
    assert done.result["step_hours"] == 6.0 and done.result["horizon_days"] == 2.0
    assert {row["horizon_days"] for row in done.result["measures"]} == {1.0, 2.0}
    returns = jobs.open_session(config).returns.to_numpy()
    # Two days without drift of the log-price: lognormal moments of 0.3 BTC + 0.2 ETH.
    cov, w = 2.0 * np.cov(returns.T), np.array([0.3, 0.2])
    mean = np.exp(0.5 * np.diag(cov))
    variance = w @ (np.outer(mean, mean) * (np.exp(cov) - 1.0)) @ w
    found = done.measure("volatility", horizon_days=2.0)
    assert abs(found["value"] - np.sqrt(variance)) < 4.0 * found["std_error"]
    found = done.measure("mean_return", horizon_days=2.0)
    assert abs(found["value"] - w @ (mean - 1.0)) < 4.0 * found["std_error"]
    assert list(read(tmp_path, "fan")["day"]) == [0.25 * k for k in range(9)]


@pytest.fixture(scope="module")
def prices(session) -> pd.DataFrame:
    return session.prices.iloc[-400:].copy()


def with_file(options, table: pd.DataFrame, folder: Path, *overrides: str):
    file = folder / "prices.csv"
    table.to_csv(file, index_label="date")
    return options("data=file", f"data.path={file}", "data.assets=null", *overrides)


def test_users_file_with_a_late_listing(options, prices, tmp_path):
    """An asset listed later is masked until then, and the last prices are those of the file."""
    late = prices.copy()
    late.iloc[:120, 1] = np.nan
    late["XYZ"] = 1.0 + 0.1 * np.sin(np.arange(len(late))) + 0.001 * np.arange(len(late))
    config = with_file(options, late, tmp_path, "job=calibrate", "report.html=false")
    done = Done(config, tmp_path / "out")
    assert done.result["assets"] == ["BTC", "ETH", "XYZ"]
    assert done.manifest["data"]["rows"] == 400
    opened = jobs.open_session(config)
    assert opened.returns["ETH"].isna().sum() == 120
    assert opened.fit is not None and np.isfinite(opened.fit.scale).all()
    assert "prices.csv" in done.result["title"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.assign(BTC=t["BTC"].where(t.index != t.index[7], -1.0)), ("BTC", "row 9")),
        (lambda t: t.assign(ETH=t["ETH"].where(t.index != t.index[200])), ("ETH",)),
        (lambda t: t.iloc[[*range(50), 49, *range(50, 400)]], ("twice|duplicate|already",)),
        (lambda t: t.iloc[::-1], ("increas|sort|order",)),
        (lambda t: t.drop(index=t.index[100]), ("regular|step|apart|spacing",)),
        (lambda t: t.iloc[:10], ("few|least",)),
        (lambda t: t.drop(columns="ETH"), ("ETH",)),
        (lambda t: t.astype(object).where((t.index != t.index[3])[:, None] | np.zeros((1, 2), bool), "n/q"), ("n/q",)),
    ],
)
def test_bad_files_are_one_sentence_and_leave_nothing(options, prices, tmp_path, spoil, words):
    config = with_file(options, spoil(prices), tmp_path, "job=risk")
    folder = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        jobs.run(config, folder, QUIET)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert pd.Series([message]).str.contains(word, case=False).all(), message
    assert not folder.exists()


def test_asset_of_the_book_that_the_data_lack(options, tmp_path):
    with pytest.raises(InputError, match="ETH"):
        jobs.run(options("data.assets=[BTC,BNB]"), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_entry_prices_are_in_dollars(options, session):
    """An account opened below the last price has that profit already, and the book less cash."""
    last = float(session.prices["BTC"].iloc[-1])
    book = jobs.open_session(options(f"+book.perpetuals.0.entry.BTC={0.9 * last}")).book
    np.testing.assert_allclose(book.perpetuals[0].entry, [0.9, 1.0], rtol=1e-6)
    assert float(book.cash) == pytest.approx(1.0 - 0.5 - (0.12 + 0.9 * 0.1), abs=1e-6)


def test_the_library_and_the_command_line_agree(risk, session):
    """`qpo.run` on the session's own market and book gives the same digits as the job."""
    finished = simulate_run(
        session.market, session.book, n_paths=N_PATHS, n_steps=5, levels=(0.95, 0.99), horizons=(1,), devices=2
    )
    worst = jobs._worst_paths(finished)
    np.testing.assert_array_equal(worst["path"], read(risk.folder, "worst_paths")["path"])


# ----------------------------------------------------------------------------- liquidation


def test_what_liquidations_cost_is_told_by_account_and_venue(risk):
    for name in ("expected_bad_debt", "expected_liquidation_cost", "liquidation_cost_if_liquidated"):
        assert risk.measure(name, account="cross")["std_error"] is not None, name
        assert risk.measure(f"venue_{name}", account="binance")["value"] == risk.measure(name, account="cross")["value"]
    chance = risk.measure("liquidation_probability", account="cross", horizon_days=5.0)["value"]
    needless = risk.measure("needless_liquidation_probability", account="cross")
    assert 0.0 < needless["value"] < chance and needless["std_error"] > 0.0
    days = [
        row["value"]
        for row in risk.result["measures"]
        if row["measure"] == "time_to_liquidation_quantile" and row["account"] == "cross"
    ]
    assert days == sorted(days) and 0.0 < days[0] and days[-1] <= 5.0


def test_liquidations_by_regime_add_up(risk):
    """All paths of this run are among those that are recorded, so that the parts sum to the whole."""
    parts = read(risk.folder, "liquidation_by_regime")
    chance = risk.measure("liquidation_probability", account="cross", horizon_days=5.0)["value"]
    assert list(parts["regime"]) == ["calm", "turbulent"]
    assert parts["probability"].sum() == pytest.approx(chance, rel=1e-5)


def test_account_fan(risk):
    fan = read(risk.folder, "account_fan")
    assert set(fan["kind"]) == {"margin_ratio", "exposure"} and (fan["q05"] <= fan["q95"]).all()
    ratio = fan[fan["kind"] == "margin_ratio"]
    assert (ratio["q05"] > 1.0).all() and (np.diff(ratio["share"]) <= 0.0).all()
    # Notionals of 0.9 and 0.4 at the start.
    assert fan[fan["kind"] == "exposure"]["q50"].iloc[0] == pytest.approx(1.3, abs=0.1)


MARGIN_BOOK = """
capital: 1000000
perpetuals: [{name: fixed, mode: isolated, venue: binance, margin: 0.2, positions: {BTC: 0.8}}]
loans: [{name: loan, venue: aave_v3, collateral: {ETH: 0.4}, debt: {USD: 0.28}}]
accounts:
  - kind: margin
    name: free
    venue: binance
    balance: {USD: 0.2}
    positions: [{kind: linear, asset: BTC, notional: 0.8}]
"""


def test_margin_needed_of_three_kinds_of_accounts(options, mine):
    """The same position needs the same margin whichever account carries it, and at that margin the odds are right.

    4.5 standard errors, the draws of the two accounts being the same up to their uniforms.
    """
    (mine / "book" / "margins.yaml").write_text(MARGIN_BOOK)
    session = jobs.open_session(options("job=risk", "book=margins"))
    risk_options = dataclasses.replace(session.config.risk, liquidation_at_risk=(0.05,))
    config = dataclasses.replace(session.config, risk=risk_options)
    session = dataclasses.replace(session, config=config)
    found = jobs._liquidation_at_risk(session).set_index("account")
    assert list(found.index) == ["fixed", "loan", "free"]
    fixed, free = found.loc["fixed"], found.loc["free"]
    assert abs(fixed["needed"] - free["needed"]) < 4.5 * np.hypot(fixed["std_error"], free["std_error"])
    np.testing.assert_allclose([fixed["now"], free["now"], found.loc["loan", "now"]], [0.2, 0.2, 0.4], rtol=1e-6)
    plan = Plan(5, monitoring="bridge", dates=(5,), attribution=False, drawn=False)
    for j, name in enumerate(found.index):
        row = found.loc[name]
        book = jobs.with_margin(session.book, j, row["needed"] / row["now"])
        hit = np.asarray(simulate_paths(session.market, book, N_PATHS, plan, seed=0).conditional.hit_probability[j])
        assert hit.mean(dtype=np.float64) == pytest.approx(0.05, rel=0.02), name


def test_notes_say_how_accounts_are_checked(options, mine):
    (mine / "book" / "margins.yaml").write_text(MARGIN_BOOK)
    notes = " ".join(jobs._notes(jobs.open_session(options("job=risk", "book=margins"))))
    assert "fixed, loan and free are checked at every moment" in notes
    notes = " ".join(jobs._notes(jobs.open_session(options("job=risk", "simulation.monitoring=step"))))
    assert "too low" in notes
    notes = " ".join(jobs._notes(jobs.open_session(options("job=risk"))))
    assert "cross is checked between the step ends" in notes and "first order" in notes


# ----------------------------------------------------------------------------- history


HOURS = 40
OCTOBER = Path(__file__).resolve().parents[2] / "shared" / "data" / "prices_hourly_ohlcv_2025q4.csv.gz"


def bars() -> pd.DataFrame:
    """Hourly bars of two assets: even, but for a wick of BTC to 85 % in hour 20 that its close does not show."""
    time = pd.date_range("2025-10-10", periods=HOURS, freq="h", tz="UTC")
    rows = []
    for asset, level in (("BTC", 100.0), ("ETH", 10.0)):
        close = level * (1.0 + 0.0005 * np.arange(1, HOURS + 1))
        start = np.append(level, close[:-1])
        low = np.minimum(start, close) * np.where((np.arange(HOURS) == 20) & (asset == "BTC"), 0.85, 0.999)
        high = np.maximum(start, close) * 1.001
        rows.append(
            pd.DataFrame(
                {"open_time_utc": time, "asset": asset, "open": start, "high": high, "low": low, "close": close}
            )
        )
    return pd.concat(rows, ignore_index=True)


def history(options, folder: Path, table: pd.DataFrame, *overrides: str):
    file = folder / "bars.csv"
    table.to_csv(file, index=False)
    return options("job=replay", "market=history", "data=file", f"data.path={file}", "data.assets=null", *overrides)


def test_history_starts_at_the_first_row_and_ends_at_the_last(options, tmp_path):
    table = bars()
    done = Done(history(options, tmp_path, table), tmp_path / "out")
    path = read(done.folder, "replay")
    close = table[table["asset"] == "BTC"]["close"].to_numpy()
    np.testing.assert_allclose(path["price:BTC"], close / close[0], rtol=1e-6)
    assert done.result["n_steps"] == HOURS - 1 and done.result["step_hours"] == 1.0
    # Spot of 0.5 and a short of 0.4 in ETH and long of 0.9 in BTC; both assets move alike, funding is due twice.
    growth = close[-1] / close[0] - 1.0
    assert path["equity"].iloc[-1] == pytest.approx(1.0 + growth * (0.5 + 0.9 - 0.4), abs=5e-4)
    assert not done.result["worst_paths"][0]["liquidated"]


def test_extremes_of_bars_liquidate_where_closes_do_not(options, tmp_path):
    done = Done(history(options, tmp_path, bars(), "market.intrabar=low_high"), tmp_path / "out")
    path, events = read(done.folder, "replay"), read(done.folder, "replay_events")
    assert len(path) == 4 * HOURS and done.result["step_hours"] == 0.25
    bar = bars().query("asset == 'BTC'").iloc[20]
    # A bar that rises: open, low, high, close.
    expected = bar[["open", "low", "high", "close"]].to_numpy(float) / 100.0
    np.testing.assert_allclose(path["price:BTC"].iloc[80:84], expected, rtol=1e-6)
    hit = events[events["account"] == "cross"].iloc[0]
    assert hit["time"] == "2025-10-10 20:00 (first extreme)"
    assert hit["price_usd"] == pytest.approx(bar["low"])
    # The long loses 0.9 times about 15 % of the capital, more than the margin of 0.12: nothing of it is left.
    assert hit["loss_usd"] == pytest.approx(120_000.0, rel=1e-6)
    assert "cross is liquidated with BTC" in done.result["verdict"][1]


@pytest.mark.parametrize("job", ["risk", "optimize", "calibrate"])
def test_history_is_refused_by_jobs_that_need_many_paths(options, tmp_path, job):
    config = dataclasses.replace(history(options, tmp_path, bars()), job=job)
    with pytest.raises(InputError, match=f"job={job} needs many: use job=replay"):
        jobs.run(config, tmp_path / "out", QUIET)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.drop(columns="low"), "no column 'low'"),
        (lambda t: t.assign(high=np.where(t.index == 5, 0.5 * t["high"], t["high"])), "does not enclose"),
        (lambda t: t.assign(low=np.where(t.index == 5, -1.0, t["low"])), "low -1"),
    ],
)
def test_bad_bars_are_one_sentence(options, tmp_path, spoil, words):
    config = history(options, tmp_path, spoil(bars()), "market.intrabar=low_high")
    with pytest.raises(InputError, match=words):
        jobs.run(config, tmp_path / "out", QUIET)


@pytest.mark.skipif(not OCTOBER.is_file(), reason="the shared hourly bars are not here")
def test_october_2025(tmp_path):
    """The four leveraged accounts go on 10 October; the hedged short does not."""
    done = Done(load(["+experiment=october_2025", f"data.path={OCTOBER}", "report.html=false"]), tmp_path / "out")
    events = read(done.folder, "replay_events").dropna(subset="account").set_index("account")
    assert list(events.index) == ["btc_20x", "alt_basket_10x", "eth_loan", "sol_5x"]
    assert events["time"].str.startswith("2025-10-10").all()
    # ETH's low of the day takes the health factor, 1.19 at the start, below one.
    assert events.loc["eth_loan", "price_usd"] == pytest.approx(3400.0)
    assert (events["loss_usd"] > 0.0).all() and events.loc["btc_20x", "loss_usd"] == pytest.approx(50_000.0, rel=1e-3)
