"""Reading, checking and naming what is wrong: the border between files and numbers."""

import datetime as dt
import gzip
import hashlib
import io
import json
import re
import sys
from decimal import Decimal
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from qpo_sim.data import EMBEDDED_FINGERPRINT, fingerprint, load_prices, log_returns, step_hours
from qpo_sim.errors import InputError

N_ROWS = 40


def make_prices(n_rows: int = N_ROWS, freq: str = "D") -> pd.DataFrame:
    """Two assets listed throughout, one listed late, one delisted early."""
    values = 100.0 * np.exp(np.random.default_rng(5).normal(0.0, 0.03, (n_rows, 4)).cumsum(axis=0))
    values[:3, 2] = np.nan
    values[-2:, 3] = np.nan
    index = pd.date_range("2021-03-01", periods=n_rows, freq=freq, name="date", unit="us")
    return pd.DataFrame(
        values, index=pd.DatetimeIndex(index.to_numpy(), name="date"), columns=pd.Index(["BTC", "ETH", "SOL", "LUNA"])
    )


def make_long(prices: pd.DataFrame, price: str = "close") -> pd.DataFrame:
    """One row per date and asset, holes dropped, and a column that must be ignored."""
    rows = [
        {"date": date, "asset": asset, "volume": "not a number", price: value}
        for date, row in prices.iterrows()
        for asset, value in row.items()
        if not np.isnan(value)
    ]
    return pd.DataFrame(rows, columns=["date", "asset", "volume", price])


def write(folder: Path, text: str, name: str = "prices.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def wide_lines() -> list[str]:
    """Header and lines of a good wide file; line k of the file is element k - 1."""
    return make_prices().to_csv().splitlines()


def long_lines() -> list[str]:
    return make_long(make_prices()).to_csv(index=False).splitlines()


def edit(lines: list[str], row: int, column: int, cell: str) -> list[str]:
    """The lines with one cell replaced; row is the 1-based line of the file, column counts from 0."""
    cells = lines[row - 1].split(",")
    cells[column] = cell
    return [*lines[: row - 1], ",".join(cells), *lines[row:]]


def refusal(path, **options) -> str:
    """The message with which the file is refused; checks that it is one sentence on one line."""
    with pytest.raises(InputError) as caught:
        load_prices(path, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# The table that ships with the package.


def test_embedded_prices_are_the_published_ones():
    prices = load_prices()
    assert list(prices.columns) == "BTC ETH BNB ADA XRP USDT DOGE USDC AVAX LUNA LINK MATIC ALGO".split()
    assert prices.shape == (1461, 13)
    assert (prices.index[0], prices.index[-1]) == (pd.Timestamp("2020-01-01"), pd.Timestamp("2023-12-31"))
    assert prices.index.name == "date" and step_hours(prices) == 24.0
    assert fingerprint(prices) == EMBEDDED_FINGERPRINT
    assert prices["AVAX"].first_valid_index() == pd.Timestamp("2020-09-22")
    assert prices["LUNA"].last_valid_index() == pd.Timestamp("2022-10-09")
    assert prices.drop(columns=["AVAX", "LUNA"]).notna().all(axis=None)


def test_embedded_file_is_reproducible_and_carries_its_licence():
    folder = resources.files("qpo_sim.data").joinpath("embedded")
    content = folder.joinpath("crypto_daily_2020_2023.csv.gz").read_bytes()
    assert content[3] == 0 and content[4:8] == bytes(4)  # no name, no time in the gzip header
    notice = folder.joinpath("NOTICE").read_text()
    assert_says(
        notice, "Copyright (c) 2024 Aleksey Novokhatskiy", "Permission is hereby granted", "pyscarcopula 0.22.1"
    )


def test_embedded_file_equals_its_source(shared):
    source = load_prices(shared / "data" / "embed_candidate_daily_2020_2023.csv")
    assert_frame_equal(source, load_prices())


@pytest.mark.parametrize(
    ("date", "asset", "percent"),
    [
        ("2020-03-12", "BTC", -37.2),
        ("2020-03-12", "ETH", -42.3),
        ("2020-03-12", "LINK", -45.9),
        ("2021-05-19", "BTC", -13.8),
        ("2021-05-19", "AVAX", -36.5),
        ("2022-05-11", "LUNA", -93.9),
        ("2022-05-12", "LUNA", -99.7),
        ("2022-11-09", "BTC", -14.3),
        ("2023-03-11", "USDC", -2.8),
    ],
)
def test_embedded_prices_hold_the_known_crashes(date, asset, percent):
    moves = log_returns(load_prices(assets=[asset])).apply(np.expm1)
    assert 100.0 * moves.loc[date, asset] == pytest.approx(percent, abs=0.06)


def test_embedded_prices_agree_with_exchange_closes(shared):
    names = ["BTC", "ETH", "BNB", "ADA", "XRP", "DOGE", "LINK", "AVAX", "ALGO"]
    ours = load_prices(assets=names, start="2020-10-01")
    theirs = load_prices(
        shared / "data" / "prices_daily_close.csv.gz", assets=names, start="2020-10-01", end="2023-12-31"
    )
    gap = (ours / theirs).apply(np.log).abs()
    assert (gap.median() < 0.002).all() and gap.max(axis=None) < 0.12
    correlation = log_returns(ours).corrwith(log_returns(theirs))
    assert (correlation > 0.985).all()


# Shapes and formats.


@pytest.mark.parametrize("freq", ["D", "h", "8h", "15min", "7D"])
@pytest.mark.parametrize("form", ["wide.csv", "wide.csv.gz", "wide.parquet", "long.csv", "long.csv.gz", "long.parquet"])
def test_every_form_gives_the_same_table(tmp_path, form, freq):
    prices = make_prices(freq=freq)
    table = prices.reset_index() if form.startswith("wide") else make_long(prices, price="price")
    path = tmp_path / form
    if form.endswith("parquet"):
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    read = load_prices(path, assets=list(prices.columns))
    assert_frame_equal(read, prices)
    assert fingerprint(read) == fingerprint(prices)
    assert step_hours(read) == {"D": 24.0, "h": 1.0, "8h": 8.0, "15min": 0.25, "7D": 168.0}[freq]


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_round_trips_keep_every_bit(tmp_path_factory, data):
    n_rows, n_assets = data.draw(st.integers(31, 45)), data.draw(st.integers(1, 4))
    price = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False)  # down to the subnormal
    values = np.array(data.draw(st.lists(price, min_size=n_rows * n_assets, max_size=n_rows * n_assets)))
    start = data.draw(st.datetimes(dt.datetime(1990, 1, 1), dt.datetime(2040, 1, 1)))
    step = data.draw(st.sampled_from(["1s", "15min", "1h", "8h", "1D"]))
    index = pd.DatetimeIndex(pd.date_range(start, periods=n_rows, freq=step, unit="us").to_numpy(), name="date")
    name = st.from_regex(r"[A-Z0-9]{1,6}[0-9]", fullmatch=True)  # ends in a digit: never the name of the date column
    names = data.draw(st.lists(name, min_size=n_assets, max_size=n_assets, unique=True))
    prices = pd.DataFrame(values.reshape(n_rows, n_assets), index=index, columns=pd.Index(names))
    folder = tmp_path_factory.mktemp("round_trip")
    wide, long = prices.reset_index(), make_long(prices)
    wide.to_csv(folder / "wide.csv", index=False)
    wide.to_parquet(folder / "wide.parquet")
    long.sample(frac=1.0, random_state=1).sort_values("date").to_csv(folder / "long.csv.gz", index=False)
    long.sort_values(["asset", "date"]).to_parquet(folder / "long.parquet")
    for path in folder.iterdir():
        assert_frame_equal(load_prices(path, assets=names), prices, check_exact=True)


def test_recognises_content_whatever_the_name(tmp_path):
    prices = make_prices()
    prices.reset_index().to_parquet(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(gzip.compress(prices.to_csv().encode()))
    write(tmp_path, prices.to_csv(sep=";"), "c.txt")
    write(tmp_path, "\ufeff" + prices.to_csv(sep="\t"), "d.tsv")
    write(tmp_path, prices.to_csv(lineterminator="\r\n"), "e")
    for path in tmp_path.iterdir():
        assert_frame_equal(load_prices(str(path)), prices)


def test_parquet_with_dates_in_the_index_or_as_plain_days(tmp_path):
    prices = make_prices()
    prices.to_parquet(tmp_path / "index.parquet")
    days = prices.reset_index()
    days["date"] = days["date"].dt.date
    days.to_parquet(tmp_path / "days.parquet")
    for name in ("index", "days"):
        assert_frame_equal(load_prices(tmp_path / f"{name}.parquet"), prices)


@pytest.mark.parametrize("name", ["Date", "TIME", "time_utc", "Timestamp", "datetime", "open_time"])
def test_names_of_the_date_column(tmp_path, name):
    prices = make_prices()
    assert_frame_equal(load_prices(write(tmp_path, prices.to_csv(index_label=name))), prices)


@pytest.mark.parametrize(
    "write_date",
    [
        lambda date: date.strftime("%Y-%m-%dT%H:%MZ"),
        lambda date: date.strftime("%Y/%m/%d %H:%M"),
        lambda date: (date + pd.Timedelta(hours=3)).strftime("%Y-%m-%d %H:%M:%S+03:00"),
        lambda date: (date - pd.Timedelta(hours=5)).strftime("%Y-%m-%dT%H:%M:%S-0500"),
        lambda date: str(int(date.timestamp())),
        lambda date: str(int(date.timestamp()) * 1_000),
        lambda date: str(int(date.timestamp()) * 1_000_000),
        lambda date: str(int(date.timestamp()) * 1_000_000_000),
    ],
)
def test_dates_with_zone_or_since_1970_become_utc(tmp_path, write_date):
    prices = make_prices(freq="h")
    text = prices.set_axis([write_date(date) for date in prices.index]).to_csv(index_label="time")
    assert_frame_equal(load_prices(write(tmp_path, text)), prices)


def test_parquet_with_a_time_zone_becomes_utc(tmp_path):
    prices = make_prices(freq="h")
    table = prices.tz_localize("UTC").tz_convert("America/New_York").reset_index()
    table.to_parquet(tmp_path / "zone.parquet")
    assert_frame_equal(load_prices(tmp_path / "zone.parquet"), prices)


def test_eight_digits_are_a_day(tmp_path):
    prices = make_prices()
    table = prices.reset_index()
    table["date"] = table["date"].dt.strftime("%Y%m%d").astype(int)
    table.to_parquet(tmp_path / "days.parquet")
    table.to_csv(tmp_path / "days.csv", index=False)
    for path in tmp_path.iterdir():
        assert_frame_equal(load_prices(path), prices)


def test_blank_lines_and_missing_marks(tmp_path):
    prices = make_prices()
    text = "\n" + prices.to_csv(na_rep="NaN").replace("\n", "\n\n").replace("NaN", " n/a ") + ",,,,\n"
    assert_frame_equal(load_prices(write(tmp_path, text)), prices)


def test_close_is_preferred_to_price_in_a_long_table(tmp_path):
    table = make_long(make_prices()).assign(price=1.0)
    read = load_prices(write(tmp_path, table.to_csv(index=False)), assets=list(make_prices().columns))
    assert_frame_equal(read, make_prices())


def test_needs_the_extra_for_parquet_only(tmp_path, monkeypatch):
    path = tmp_path / "prices.parquet"
    make_prices().reset_index().to_parquet(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_says(refusal(path), str(path), 'pip install "qpo_sim[data]"')


# Larger real files.


def test_long_and_wide_real_tables_agree(shared):
    wide = load_prices(shared / "data" / "prices_daily_close.csv.gz")
    long = load_prices(shared / "data" / "prices_daily_ohlcv.csv.gz", assets=list(wide.columns))
    assert_frame_equal(wide, long)
    moves = log_returns(wide).apply(np.expm1)
    for date, asset, percent in [
        ("2020-03-12", "BTC", -39.5),
        ("2022-05-11", "LUNA", -93.9),
        ("2025-10-10", "AVAX", -27.1),
    ]:
        assert 100.0 * moves.loc[date, asset] == pytest.approx(percent, abs=0.06)


def test_hourly_real_table(shared):
    prices = load_prices(shared / "data" / "prices_hourly_close_2020_2024.csv.gz")
    assert prices.shape == (31972, 13) and step_hours(prices) == 1.0
    assert prices.index[0] == pd.Timestamp("2020-10-23 08:00")


def test_hourly_long_real_table(shared):
    prices = load_prices(shared / "data" / "prices_hourly_ohlcv_2025q4.csv.gz", start="2025-10-10", end="2025-10-12")
    assert prices.shape == (72, 15)


# Choosing assets and dates.


def test_assets_select_and_order(tmp_path):
    path = write(tmp_path, make_prices().to_csv())
    assert_frame_equal(load_prices(path, assets=["SOL", "BTC"]), make_prices()[["SOL", "BTC"]])
    assert list(load_prices(path, exclude=["ETH"]).columns) == ["BTC", "SOL", "LUNA"]
    assert list(load_prices(path, assets="ETH").columns) == ["ETH"]
    assert list(load_prices(path, assets=("LUNA", "ETH"), exclude="LUNA").columns) == ["ETH"]


def test_dates_before_any_listing_are_cut(tmp_path):
    prices = make_prices()
    for text in (prices.to_csv(), make_long(prices).to_csv(index=False)):
        read = load_prices(write(tmp_path, text), assets=["SOL"])
        assert_frame_equal(read, prices[["SOL"]].iloc[3:])
        assert_frame_equal(load_prices(write(tmp_path, text), assets=["LUNA"]), prices[["LUNA"]].iloc[:-2])


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        ("2021-03-02", "2021-03-05", "2021-03-02 00:00", "2021-03-05 23:00"),
        ("2021-03-02T10:00", "2021-03-05T10:00Z", "2021-03-02 10:00", "2021-03-05 10:00"),
        (dt.date(2021, 3, 2), dt.date(2021, 3, 5), "2021-03-02 00:00", "2021-03-05 23:00"),
        (pd.Timestamp("2021-03-02"), pd.Timestamp("2021-03-05"), "2021-03-02 00:00", "2021-03-05 00:00"),
        (pd.Timestamp("2021-03-02", tz="Asia/Tokyo"), None, "2021-03-01 15:00", "2021-03-09 08:00"),
        (None, "20210305", "2021-03-01 00:00", "2021-03-05 23:00"),
    ],
)
def test_start_and_end_are_inclusive(tmp_path, start, end, first, last):
    path = write(tmp_path, make_prices(201, "h").to_csv())
    read = load_prices(path, assets=["BTC"], start=start, end=end)
    assert (read.index[0], read.index[-1]) == (pd.Timestamp(first), pd.Timestamp(last))


def test_faults_outside_the_choice_do_not_matter(tmp_path):
    lines = edit(edit(wide_lines(), 20, 1, "text"), 3, 2, "-1")
    path = write(tmp_path, "\n".join(lines))
    read = load_prices(path, exclude=["BTC"], start="2021-03-04")
    assert_frame_equal(read, make_prices()[["ETH", "SOL", "LUNA"]].iloc[3:])


# What is refused, and how it is said.


def test_unknown_assets(tmp_path):
    path = write(tmp_path, make_prices().to_csv())
    assert_says(refusal(path, assets=["BTC", "LUNE"]), "data.assets", "'LUNE'", "did you mean 'LUNA'?", "BTC, ETH, SOL")
    assert_says(refusal(path, assets=["btc"]), "did you mean 'BTC'?")
    assert_says(refusal(path, exclude=["ETHH"]), "data.exclude", "'ETHH'", "did you mean 'ETH'?")
    assert "did you mean" not in refusal(path, assets=["ZZZZ"])
    assert_says(refusal(path, assets=["BTC", "BTC"]), "data.assets", "'BTC'", "twice")
    assert_says(refusal(path, assets=["BTC"], exclude=["BTC"]), "data.assets less data.exclude leaves no asset")
    assert_says(refusal(path, assets=[]), "no asset")


def test_impossible_spans(tmp_path):
    path = write(tmp_path, make_prices().to_csv())
    assert_says(refusal(path, start="soon"), "data.start='soon'", "is not a date", "2020-01-31")
    assert_says(refusal(path, end="now"), "data.end='now'", "is not a date")
    assert_says(refusal(path, end="2021"), "data.end='2021'", "is not a date")
    assert_says(refusal(path, start="2022-01-01"), "data.start=2022-01-01", "runs from 2021-03-01 to 2021-04-09")
    assert_says(refusal(path, start="2021-03-09", end="2021-03-02"), "data.start=2021-03-09 and data.end=2021-03-02")
    assert_says(refusal(path, missing="drop"), "data.missing='drop'", "'error' or 'allow'")


def test_missing_and_unreadable_files(tmp_path):
    assert_says(refusal(tmp_path / "none.csv"), "none.csv", "does not exist", str(Path.cwd()))
    assert_says(refusal(tmp_path), "cannot be read", "directory")
    good = make_prices().to_csv().encode()
    buffer = io.BytesIO()
    make_prices().reset_index().to_parquet(buffer)
    for name, content, parts in [
        ("empty.csv", b"", ["is empty"]),
        ("blank.csv", b"\n  \n", ["is empty"]),
        ("empty.csv.gz", gzip.compress(b""), ["is empty"]),
        ("header.csv", b"date,BTC\n", ["header but no rows"]),
        ("cut.csv.gz", gzip.compress(good)[:-40], ["damaged gzip"]),
        ("noise.csv", bytes(range(256)), ["cannot be read as CSV, gzipped CSV or Parquet"]),
        ("quote.csv", b'date,BTC\n2021-01-01,"7', ["cannot be read as CSV, gzipped CSV or Parquet"]),
        ("cut.parquet", buffer.getvalue()[:-40], ["damaged Parquet"]),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        assert_says(refusal(path), name, *parts)


def test_empty_parquet(tmp_path):
    make_prices().iloc[:0].reset_index().to_parquet(tmp_path / "a.parquet")
    assert_says(refusal(tmp_path / "a.parquet"), "has no rows")


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ("day,BTC", ["no date column among 'day', 'BTC'", "date, time, time_utc, timestamp, datetime"]),
        ("date,Timestamp", ["2 date columns ('date', 'Timestamp')", "keep one"]),
        ("date,BTC,ETH,BTC", ["2 columns named 'BTC'", "unique"]),
        ("date,BTC,", ["column 3 has no name"]),
        ("date", ["no price column"]),
        ("date,asset,last", ["'asset' but neither 'close' nor 'price'", "'last'"]),
        ("date,open,high,low,close,volume", ["no column 'asset'"]),
    ],
)
def test_headers(tmp_path, header, parts):
    line = "2021-01-01" + ",1.0" * header.count(",")
    assert_says(refusal(write(tmp_path, f"{header}\n{line}\n")), "prices.csv", *parts)


def test_rows_with_too_few_or_too_many_fields(tmp_path):
    lines = wide_lines()
    cut = [*lines[:-1], lines[-1].rsplit(",", 3)[0]]
    assert_says(refusal(write(tmp_path, "\n".join(cut))), f"row {len(lines)}:", "2 fields", "header has 5")
    assert_says(refusal(write(tmp_path, "\n".join([*lines[:6], lines[6] + ",1", *lines[7:]]))), "row 7:", "6 fields")


@pytest.mark.parametrize("bad", ["soon", "now", "", "2021-02-30", "03/04/2021", "2021", "2021-03", "44256.5"])
def test_dates_that_are_none(tmp_path, bad):
    for lines in (wide_lines(), long_lines()):
        path = write(tmp_path, "\n".join(edit(lines, 8, 0, bad)))
        assert_says(refusal(path), "row 8, column 'date'", f"{bad!r} is not a date", "ISO 8601")


def test_row_numbers_count_blank_lines(tmp_path):
    lines = edit(wide_lines(), 8, 0, "soon")
    assert_says(refusal(write(tmp_path, "\n".join([*lines[:4], "", "", *lines[4:]]))), "row 10, column 'date'")


def test_repeated_dates(tmp_path):
    lines = wide_lines()
    path = write(tmp_path, "\n".join([*lines[:9], lines[4], *lines[9:]]))
    assert_says(refusal(path), "row 10, column 'date'", "2021-03-04 is already in row 5", "unique")
    lines = long_lines()
    path = write(tmp_path, "\n".join([*lines, lines[4]]))
    assert_says(refusal(path), f"row {len(lines) + 1}:", "2021-03-02 of asset 'BTC' is already in row 5", "once")


def test_dates_that_go_back(tmp_path):
    lines = wide_lines()
    lines[10], lines[11] = lines[11], lines[10]
    message = refusal(write(tmp_path, "\n".join(lines)))
    assert_says(message, "row 12, column 'date'", "2021-03-10 comes after the later 2021-03-11 of row 11", "sort")
    lines = long_lines()
    lines[2], lines[5] = lines[5], lines[2]  # two rows of ETH
    assert_says(refusal(write(tmp_path, "\n".join(lines))), "row 6, column 'date'", "2021-03-01", "2021-03-02 of row 3")


def test_uneven_spacing(tmp_path):
    lines = wide_lines()
    message = refusal(write(tmp_path, "\n".join([*lines[:10], *lines[12:]])))
    assert_says(message, "row 11:", "2021-03-12 follows 2021-03-09 after 72 h", "spacing is 24 h", "missing rows")
    mixed = [
        *lines,
        *make_prices(30, "h")
        .set_axis(pd.date_range("2021-04-09 01:00", periods=30, freq="h"))
        .to_csv(header=False)
        .splitlines(),
    ]
    message = refusal(write(tmp_path, "\n".join(mixed)), assets=["BTC"])
    assert_says(message, "row 42:", "2021-04-09 01:00:00 follows 2021-04-09 after 1 h", "24 h")
    lines = [line for line in long_lines() if not line.startswith("2021-03-10")]
    row = next(row for row, line in enumerate(lines, start=1) if line.startswith("2021-03-11"))
    assert_says(refusal(write(tmp_path, "\n".join(lines))), f"row {row}:", "2021-03-11 follows 2021-03-09 after 48 h")


@pytest.mark.parametrize("bad", ["abc", "1,5", "7 200", "$5", "1.2.3", "True"])
def test_prices_that_are_no_numbers(tmp_path, bad):
    path = write(tmp_path, "\n".join(edit(wide_lines(), 8, 2, f'"{bad}"')))
    assert_says(refusal(path), f"row 8, column 'ETH': price {bad!r} on 2021-03-07 is not a number", "data.exclude")
    path = write(tmp_path, "\n".join(edit(long_lines(), 8, 3, f'"{bad}"')))
    assert_says(refusal(path), f"row 8, column 'close': price {bad!r} on 2021-03-03 is not a number")


@pytest.mark.parametrize("bad", ["0", "-3.5", "inf", "-Infinity", "1e400"])
def test_prices_that_cannot_be(tmp_path, bad):
    shown = f"price {float(bad):g} on 2021-03-07 is not positive and finite"
    assert_says(refusal(write(tmp_path, "\n".join(edit(wide_lines(), 8, 2, bad)))), "row 8, column 'ETH'", shown)
    lines = long_lines()
    row = next(row for row, line in enumerate(lines, start=1) if line.startswith("2021-03-07,ETH"))
    path = write(tmp_path, "\n".join(edit(lines, row, 3, bad)))
    assert_says(refusal(path, missing="allow"), f"row {row}, column 'ETH'", shown)
    table = make_prices().reset_index()
    table.loc[6, "ETH"] = float(bad)
    table.to_parquet(tmp_path / "a.parquet")
    assert_says(refusal(tmp_path / "a.parquet"), "row 7, column 'ETH'", shown)


def test_holes(tmp_path):
    prices = make_prices()
    prices.iloc[20, 2] = np.nan
    wide, long = write(tmp_path, prices.to_csv(), "wide.csv"), write(tmp_path, make_long(prices).to_csv(), "long.csv")
    parts = ["column 'SOL': the price on 2021-03-21 is missing", "listed from 2021-03-04 to 2021-04-09", "data.missing"]
    assert_says(refusal(wide), "row 22, ", *parts)
    message = refusal(long)  # the file has no such row
    assert_says(message, *parts)
    assert re.search(r"row \d", message) is None
    for path in (wide, long):
        assert_frame_equal(load_prices(path, assets=list(prices.columns), missing="allow"), prices)


def test_too_few_prices(tmp_path):
    path = write(tmp_path, make_prices(30).iloc[:, :2].to_csv())
    assert_says(refusal(path), "column 'BTC' has 29 returns from 2021-03-01 to 2021-03-30", "at least 30 are needed")
    assert load_prices(write(tmp_path, make_prices(31).iloc[:, :2].to_csv())).shape == (31, 2)
    path = write(tmp_path, make_prices(33).to_csv())  # SOL has 30 prices, LUNA 31
    assert_says(refusal(path), "column 'SOL' has 29 returns")
    assert load_prices(path, exclude=["SOL"]).shape == (33, 3)


def test_returns_are_counted_not_prices(tmp_path):
    prices = make_prices(60)
    prices.iloc[1:59:2, 0] = np.nan  # 31 prices of BTC, of which two stand side by side
    path = write(tmp_path, prices.to_csv())
    assert_says(refusal(path, missing="allow"), "column 'BTC' has 1 returns")


def test_assets_without_a_price(tmp_path):
    path = write(tmp_path, make_prices().assign(NEW=np.nan).to_csv())
    assert_says(refusal(path), "column 'NEW' has no price from 2021-03-01 to 2021-04-09", "data.exclude")


@pytest.mark.parametrize("cell", [[1.0, 2.0], True, dt.date(2021, 3, 1), b"1"])
def test_parquet_columns_that_hold_no_prices(tmp_path, cell):
    make_prices().reset_index().assign(NOTE=[cell] * N_ROWS).to_parquet(tmp_path / "a.parquet")
    assert_says(refusal(tmp_path / "a.parquet"), "row 1, column 'NOTE'", "is not a number", "data.exclude")
    assert_frame_equal(load_prices(tmp_path / "a.parquet", exclude=["NOTE"]), make_prices())


def test_parquet_columns_of_other_number_types(tmp_path):
    prices = make_prices()[["BTC", "ETH"]].round(2)
    table = prices.reset_index()
    table["ETH"] = [Decimal(str(price)) for price in table["ETH"]]
    table["BTC"] = table["BTC"].round().astype("Int32")
    table.to_parquet(tmp_path / "a.parquet")
    assert_frame_equal(load_prices(tmp_path / "a.parquet"), prices.assign(BTC=prices["BTC"].round()))


def test_parquet_with_a_column_twice(tmp_path):
    table = pa.Table.from_pandas(make_prices().reset_index()).rename_columns(["date", "BTC", "ETH", "BTC", "LUNA"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert_says(refusal(tmp_path / "a.parquet"), "2 columns named 'BTC'")


def test_assets_without_a_name(tmp_path):
    path = write(tmp_path, "\n".join(edit(long_lines(), 8, 1, " ")))
    assert_says(refusal(path), "row 8, column 'asset'", "empty")


@settings(deadline=None, max_examples=200)
@given(
    content=st.binary(max_size=200)
    | st.text(alphabet='date,asetclospricBTC0123456789-.\n"; ', max_size=200).map(str.encode)
)
def test_any_bytes_are_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "noise.csv"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_prices(path)


# Returns, steps and fingerprints.


def test_log_returns_by_hand():
    prices = make_prices()
    prices.iloc[20, 0] = np.nan
    returns = log_returns(prices)
    assert returns.index.equals(prices.index[1:]) and list(returns.columns) == list(prices.columns)
    assert returns.iloc[0, 1] == pytest.approx(np.log(prices.iloc[1, 1] / prices.iloc[0, 1]), rel=1e-12)
    assert list(np.flatnonzero(returns["BTC"].isna())) == [19, 20]
    assert returns["SOL"].isna().sum() == 3 and returns["LUNA"].isna().sum() == 2
    whole = np.exp(returns["ETH"].sum()) * prices["ETH"].iloc[0]
    assert whole == pytest.approx(prices["ETH"].iloc[-1], rel=1e-12)


def test_log_returns_of_bad_tables():
    prices = make_prices()
    with pytest.raises(InputError, match="column 'ETH': price -1 on 2021-03-04 is not positive"):
        log_returns(prices.assign(ETH=prices["ETH"].where(prices.index != "2021-03-04", -1.0)))
    with pytest.raises(InputError, match="2021-03-06 follows 2021-03-04 after 48 h where the first step is 24 h"):
        log_returns(prices.drop(index=pd.Timestamp("2021-03-05")))
    with pytest.raises(InputError, match="must increase"):
        log_returns(prices.iloc[::-1])
    with pytest.raises(InputError, match="has 1 dates"):
        step_hours(prices.iloc[:1])
    with pytest.raises(InputError, match="RangeIndex"):
        step_hours(prices.reset_index(drop=True))


def test_fingerprint_sees_what_matters_and_nothing_else():
    prices = make_prices()
    base = fingerprint(prices)
    nudged = prices.copy()
    nudged.iloc[7, 1] = np.nextafter(nudged.iloc[7, 1], np.inf)
    different = {
        fingerprint(table)
        for table in (
            nudged,
            prices.iloc[1:],
            prices[["ETH", "BTC", "SOL", "LUNA"]],
            prices.rename(columns={"BTC": "XBT"}),
            prices.set_axis(prices.index + pd.Timedelta(hours=1)),
            prices.fillna(1.0),
        )
    }
    assert len(different | {base}) == 7
    same = [
        prices.T.copy().T,
        prices.set_axis(prices.index.astype("datetime64[ns]").rename("time")),
        prices.tz_localize("UTC").tz_convert("Asia/Tokyo"),
        prices.where(prices.notna(), -np.nan),
    ]
    assert {fingerprint(table) for table in same} == {base}


def test_fingerprint_is_the_documented_hash():
    index = pd.DatetimeIndex(["1970-01-01", "1970-01-02"])
    table = pd.DataFrame({"A": [1.0, 2.0]}, index=index)
    content = json.dumps(["A"]).encode() + (0).to_bytes(8, "little") + (86_400_000_000).to_bytes(8, "little")
    content += bytes.fromhex("000000000000f03f") + bytes.fromhex("0000000000000040")
    assert fingerprint(table) == hashlib.sha256(content).hexdigest()
