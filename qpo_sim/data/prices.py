"""Price tables that are safe to compute with: selection, checks, log-returns and a fingerprint."""

import datetime as dt
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from qpo_sim.data.tables import (
    PriceTable,
    asset_names,
    day,
    is_whole_day,
    parse_dates,
    price_table,
    read_table,
)
from qpo_sim.errors import InputError, did_you_mean

EMBEDDED_FILE = "crypto_daily_2020_2023.csv.gz"
EMBEDDED_FINGERPRINT = "152dd245b9910dba7895493ddb89684499c5807c1e4b71552f54dffadcd4c1ce"
MIN_RETURNS = 30

_MICROSECONDS_PER_HOUR = 3_600_000_000


def load_prices(
    path: str | os.PathLike[str] | None = None,
    *,
    assets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    start: str | dt.date | None = None,
    end: str | dt.date | None = None,
    missing: str = "error",
) -> pd.DataFrame:
    """Prices by date and asset, checked: sorted, evenly spaced, positive, without holes.

    Reads CSV, gzipped CSV and Parquet (the last needs the extra `data`), told apart by content, in two shapes: wide (a
    date column and one column per asset) or long (a date column, `asset`, and `close` or `price`; `close` wins; other
    columns are ignored). The date column is called date, time, time_utc, timestamp, datetime, open_time or
    open_time_utc in any case and holds ISO 8601 dates or epoch numbers; a time with a zone is turned to UTC, one
    without is taken as UTC. Only the assets and dates asked for are checked, so a fault elsewhere can be stepped round.

    Args:
      path: the file; None reads the daily closes in USD that ship with the package (13 assets, 2020-2023).
      assets: names to keep, in this order; None keeps all in the order of the file.
      exclude: names to leave out.
      start: first date to keep, inclusive; None keeps all.
      end: last date to keep, inclusive; a date without a time means its whole day.
      missing: what a hole between an asset's first and last price does: "error", or "allow" to keep it as NaN.

    Returns:
      float64 prices > 0, one column per asset. Index `date` without zone, increasing, evenly spaced. NaN before an
      asset's first price and after its last means not listed then. Dates on which no asset is listed are cut off at
      both ends.

    Raises:
      InputError: the file or an argument breaks a rule; the message names the place (row: line of a CSV file, header
        = 1; row of a Parquet table) and how to mend it.
    """
    if missing not in ("error", "allow"):
        raise InputError(f"data.missing={missing!r} must be 'error' or 'allow'.")
    content, source = _read_bytes(path)
    raw = read_table(content, source)
    table = price_table(raw, _choose(asset_names(raw), assets, exclude, source))
    table = _trim(_cut(table, start, end))
    _check_length(table)
    _check_values(table.prices, source, table.rows)
    _check_spacing(table)
    if missing == "error":
        _check_holes(table)
    return table.prices


def log_returns(prices: pd.DataFrame) -> pd.DataFrame:
    r"""Log-returns per step, $r_t = \ln(P_t / P_{t-1})$; dimensionless, the first date is dropped.

    NaN where either price is missing, so that a hole of one price costs two returns.

    Raises:
      InputError: the dates are not evenly spaced or a price is not positive and finite.
    """
    step_hours(prices)
    _check_values(prices, "prices", None)
    log_price = np.log(prices.to_numpy(dtype=np.float64))
    return pd.DataFrame(np.diff(log_price, axis=0), index=prices.index[1:], columns=prices.columns)


def step_hours(prices: pd.DataFrame) -> float:
    """Spacing of the dates in hours: 24.0 for daily prices, 0.25 for quarter-hourly ones.

    Raises:
      InputError: there are fewer than two dates or they are not evenly spaced and increasing.
    """
    stamps = _microseconds(prices)
    if len(stamps) < 2:
        raise InputError(f"prices has {len(stamps)} dates; at least 2 are needed to know the step.")
    steps = np.diff(stamps)
    if steps[0] <= 0 or (steps != steps[0]).any():
        odd = int(np.argmax((steps != steps[0]) | (steps <= 0)))
        raise InputError(
            f"prices: date {day(prices.index[odd + 1])} follows {day(prices.index[odd])} after {_hours(steps[odd])} "
            f"where the first step is {_hours(steps[0])}; dates must increase evenly, sort the table and fill its gaps."
        )
    return float(steps[0] / _MICROSECONDS_PER_HOUR)


def fingerprint(frame: pd.DataFrame) -> str:
    """SHA-256, in hex, of a table's dates (microseconds), column names and float64 values.

    The same table has the same fingerprint on every platform and from every file format; all NaN count as one, as do
    both zeros. Derived tables such as log-returns can differ between platforms in the last bit of a logarithm:
    take the fingerprint of prices.

    Raises:
      InputError: the index holds no dates.
    """
    # Adding 0.0 turns -0.0 into 0.0; NaN come in many bit patterns.
    values = frame.to_numpy(dtype=np.float64) + 0.0
    values = np.where(np.isnan(values), np.nan, values)
    digest = hashlib.sha256()
    digest.update(json.dumps([str(name) for name in frame.columns]).encode())
    digest.update(np.ascontiguousarray(_microseconds(frame), dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def _read_bytes(path: str | os.PathLike[str] | None) -> tuple[bytes, str]:
    """The content of the file and how errors call it."""
    if path is None:
        return resources.files("qpo_sim.data").joinpath("embedded", EMBEDDED_FILE).read_bytes(), "embedded prices"
    source = f"data.path={os.fspath(path)!r}"
    try:
        return Path(os.path.expanduser(path)).read_bytes(), source
    except FileNotFoundError as error:
        raise InputError(
            f"{source} does not exist (looked in {Path.cwd()}); give the path of a CSV, gzipped CSV or Parquet file."
        ) from error
    except OSError as error:
        raise InputError(
            f"{source} cannot be read ({error.strerror}); give the path of a CSV, gzipped CSV or Parquet file."
        ) from error


def _choose(available: list[str], assets: Sequence[str] | None, exclude: Sequence[str], source: str) -> list[str]:
    """Names to keep, in order."""
    # One name on a command line comes as plain text.
    wanted = available if assets is None else [assets] if isinstance(assets, str) else list(assets)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)
    for field, names in (("data.assets", wanted), ("data.exclude", unwanted)):
        for at, name in enumerate(names):
            if name not in available:
                raise InputError(
                    f"{field}: {name!r} is not in {source}, which has {', '.join(available)}: "
                    f"{did_you_mean(name, available)}."
                )
            if name in names[:at]:
                raise InputError(f"{field}: {name!r} is given twice; name each asset once.")
    kept = [name for name in wanted if name not in unwanted]
    if not kept:
        raise InputError(f"data.assets less data.exclude leaves no asset; keep at least one of {', '.join(available)}.")
    return kept


def _cut(table: PriceTable, start: str | dt.date | None, end: str | dt.date | None) -> PriceTable:
    """The dates from `start` to `end`, both inclusive."""
    index = table.prices.index
    keep = np.ones(len(index), dtype=bool)
    if start is not None:
        keep &= index >= _bound("data.start", start)
    if end is not None:
        bound = _bound("data.end", end)
        keep &= index < bound + np.timedelta64(1, "D") if is_whole_day(_text(end)) else index <= bound
    if not keep.any():
        given = " and ".join(
            f"{field}={_text(value)}"
            for field, value in (("data.start", start), ("data.end", end))
            if value is not None
        )
        raise InputError(
            f"{given}: no date is left of {table.source}, which runs from {day(index[0])} to {day(index[-1])}; "
            "choose a span inside."
        )
    return table.select(keep)


def _bound(field: str, value: str | dt.date) -> np.datetime64:
    times, bad = parse_dates(pd.Series([_text(value)], dtype=object))
    if bad[0]:
        raise InputError(f"{field}={value!r} is not a date; write an ISO 8601 date such as 2020-01-31.")
    return times.to_numpy()[0]


def _text(value: str | dt.date | None) -> str:
    return value.isoformat() if isinstance(value, dt.date) else str(value).strip()


def _trim(table: PriceTable) -> PriceTable:
    """Cut the dates before the first and after the last price of all."""
    listed = table.prices.notna()
    absent = listed.columns[~listed.any()]
    if len(absent):
        raise InputError(
            f"{table.source}, column {absent[0]!r} has no price from {day(table.prices.index[0])} to "
            f"{day(table.prices.index[-1])}; leave it out with data.exclude or widen data.start and data.end."
        )
    return table.select(_inside(listed.any(axis=1).to_numpy()[:, None])[:, 0])


def _inside(listed: np.ndarray) -> np.ndarray:
    """True from the first to the last true of each column."""
    return np.logical_or.accumulate(listed) & np.logical_or.accumulate(listed[::-1])[::-1]


def _check_length(table: PriceTable) -> None:
    listed, index = table.prices.notna().to_numpy(), table.prices.index
    n_returns = (listed[1:] & listed[:-1]).sum(axis=0)
    if (short := n_returns < MIN_RETURNS).any():
        column = int(np.argmax(short))
        raise InputError(
            f"{table.source}, column {table.prices.columns[column]!r} has {n_returns[column]} returns from "
            f"{day(index[0])} to {day(index[-1])}; at least {MIN_RETURNS} are needed, give more rows or leave it out "
            "with data.exclude."
        )


def _check_values(prices: pd.DataFrame, source: str, rows: np.ndarray | None) -> None:
    values = prices.to_numpy(dtype=np.float64)
    bad = ~np.isnan(values) & ~((values > 0.0) & np.isfinite(values))
    if bad.any():
        at, column = np.argwhere(bad)[0].tolist()
        raise InputError(
            f"{_place(source, rows, at, column)}column {prices.columns[column]!r}: price {values[at, column]:g} on "
            f"{day(prices.index[at])} is not positive and finite; correct it or leave the cell empty if there is none."
        )


def _check_spacing(table: PriceTable) -> None:
    index = table.prices.index
    steps = np.diff(_microseconds(table.prices))
    sizes, counts = np.unique(steps, return_counts=True)
    usual = sizes[np.argmax(counts)]
    if len(sizes) > 1:
        odd = int(np.argmax(steps != usual)) + 1
        row = table.rows[odd][table.rows[odd] > 0].min()
        raise InputError(
            f"{table.source}, row {row}: date {day(index[odd])} follows {day(index[odd - 1])} after "
            f"{_hours(steps[odd - 1])} where the spacing is {_hours(usual)}; dates must be evenly spaced, add the "
            "missing rows or choose an even span with data.start and data.end."
        )


def _check_holes(table: PriceTable) -> None:
    listed = table.prices.notna().to_numpy()
    holes = _inside(listed) & ~listed
    if holes.any():
        at, column = np.argwhere(holes)[0].tolist()
        first, last = table.prices.index[np.flatnonzero(listed[:, column])[[0, -1]]]
        raise InputError(
            f"{_place(table.source, table.rows, at, column)}column {table.prices.columns[column]!r}: the price on "
            f"{day(table.prices.index[at])} is missing although the asset is listed from {day(first)} to {day(last)}; "
            "fill it in, leave the asset out with data.exclude, or set data.missing=allow."
        )


def _place(source: str, rows: np.ndarray | None, at: int, column: int) -> str:
    """File and, where the cell stands in one, row."""
    return f"{source}, row {rows[at, column]}, " if rows is not None and rows[at, column] else f"{source}, "


def _microseconds(frame: pd.DataFrame) -> np.ndarray:
    """Dates as whole microseconds since 1970 in UTC."""
    index = frame.index
    if not isinstance(index, pd.DatetimeIndex):
        raise InputError(f"the table's index is {type(index).__name__}; it must hold dates (a pandas DatetimeIndex).")
    return index.as_unit("us").asi8


def _hours(microseconds: np.int64) -> str:
    return f"{microseconds / _MICROSECONDS_PER_HOUR:g} h"
