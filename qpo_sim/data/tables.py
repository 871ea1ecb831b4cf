"""From the bytes of a file to a table of numbers by date and asset, with the place of every cell.

Two shapes are read, told apart by their column names: *wide* (a date column and one column per asset) and *long*
(a date column, a column `asset` and a column `close` or `price`; other columns are ignored). A *row* in an error is the
1-based line of the file for CSV (the header is row 1) and the 1-based row of the table for Parquet.

CSV cells are turned into numbers here, one by one, so that a bad one can be named; each becomes the float nearest to
the written decimal, so a table written to CSV and to Parquet comes back with the same bits.
"""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qpo_sim.errors import InputError

DATE_NAMES = ("date", "time", "time_utc", "timestamp", "datetime", "open_time", "open_time_utc")
PRICE_NAMES = ("close", "price")
MISSING_MARKS = frozenset({"", "na", "n/a", "nan", "null", "none"})

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_DAY = r"\d{4}([-/]?)\d{1,2}\1\d{1,2}"
# Eight digits are a date such as 20200131; more than nineteen do not fit into 64 bits.
_EPOCH = r"\d{9,18}|[1-8]\d{18}"
# Above the limit the next unit is meant: 1e11 seconds is the year 5138, 1e11 milliseconds is 1973.
_EPOCH_UNITS = ((10**11, "s"), (10**14, "ms"), (10**17, "us"))


class RawTable(NamedTuple):
    """A file's cells as they were written."""

    source: str  # what errors call the file
    columns: Mapping[str, pd.Series]  # by name in the order of the file; text for CSV
    rows: np.ndarray  # (rows,) where each row stands in the file


class PriceTable(NamedTuple):
    """Numbers by date and asset and where each stands in the file."""

    source: str
    prices: pd.DataFrame  # index `date`: UTC without zone, increasing; float64, NaN where the cell is empty
    rows: np.ndarray  # (dates, assets) row of the file, 0 where the file has no such row

    def select(self, keep: np.ndarray) -> "PriceTable":
        """The dates where `keep` is true."""
        return self._replace(prices=self.prices[keep], rows=self.rows[keep])


def read_table(content: bytes, source: str) -> RawTable:
    """Read the bytes of a CSV, gzipped CSV or Parquet file; which one it is shows in its first bytes.

    CSV is UTF-8 with a header line, separated by commas, semicolons or tabs. Parquet needs the extra `data`.

    Raises:
      InputError: the bytes are none of the three, are damaged or empty, or a column name comes twice.
    """
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{source} is a damaged gzip file ({error}); write or download it again.") from error
    return _read_parquet(content, source) if content.startswith(_PARQUET_MAGIC) else _read_csv(content, source)


def asset_names(table: RawTable) -> list[str]:
    """Names of the assets in the order of the file: the columns when wide, first appearance when long.

    Raises:
      InputError: there is no date column or more than one, no column that can hold prices, or an asset has no name.
    """
    date, asset = _date_column(table), _asset_column(table)
    if asset is None:
        names = [name for name in table.columns if name != date]
        if {"open", "high", "low", "close"} <= {name.lower() for name in names}:
            raise InputError(
                f"{table.source} has columns open, high, low and close but no column 'asset'; "
                "add one that names the asset of each row, or keep only the date and one column per asset."
            )
        if "" in names:
            place = list(table.columns).index("") + 1
            raise InputError(f"{table.source}, column {place} has no name in the header; name or remove it.")
        if not names:
            raise InputError(f"{table.source} has no price column beside {date!r}; add one column per asset.")
        return names
    labels = [_text(cell) for cell in table.columns[asset]]
    if "" in labels:
        row = table.rows[labels.index("")]
        raise InputError(f"{table.source}, row {row}, column {asset!r}: the asset is empty; write its name.")
    return list(dict.fromkeys(labels))


def price_table(table: RawTable, assets: Sequence[str]) -> PriceTable:
    """Numbers of `assets` by date; columns in the order asked for.

    Raises:
      InputError: a date cannot be read, comes twice (for one asset when long) or goes back in time, or a cell of these
        assets is not a number.
    """
    asset = _asset_column(table)
    return _from_wide(table, assets) if asset is None else _from_long(table, assets, asset)


def parse_dates(values: pd.Series) -> tuple[pd.DatetimeIndex, np.ndarray]:
    """ISO 8601 text, time stamps or epoch numbers to UTC times without zone, in microseconds.

    A time without a zone is taken as UTC. Epoch numbers (all cells are nine digits or more) are read as seconds,
    milliseconds, microseconds or nanoseconds by the size of the largest.

    Returns:
      The times, NaT where the value is no date, and the mask of these.
    """
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        times = pd.DatetimeIndex(pd.to_datetime(values, utc=True))
    else:
        text = [_text(value) for value in values]
        if all(re.fullmatch(_EPOCH, value) for value in text):
            epochs = np.array(text, dtype=np.int64)
            unit = next((unit for limit, unit in _EPOCH_UNITS if epochs.max() < limit), "ns")
            times = pd.DatetimeIndex(pd.to_datetime(epochs, unit=unit, utc=True))
        else:
            # pandas also reads "now" as the moment of reading and "2020" as its first day; neither is a date here.
            text = [value if re.match(_DAY, value) else "" for value in text]
            times = pd.DatetimeIndex(pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce"))
    times = times.tz_localize(None).as_unit("us")
    return times, times.isna()


def is_whole_day(text: str) -> bool:
    """Whether the text is a date without a time of day."""
    return re.fullmatch(_DAY, text) is not None


def day(time: Any) -> str:
    """A time in ISO 8601, without the time of day when that is midnight."""
    time = pd.Timestamp(time)
    return time.strftime("%Y-%m-%d") if time == time.normalize() else time.isoformat(sep=" ")


def _read_csv(content: bytes, source: str) -> RawTable:
    try:
        header, lines, cells = _split_csv(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{source} cannot be read as CSV, gzipped CSV or Parquet ({error}); save it as UTF-8 CSV."
        ) from error
    if not header:
        raise InputError(f"{source} is empty; it must hold a header line and one line per date.")
    _check_header(header, source)
    if not cells:
        raise InputError(f"{source} has a header but no rows; it must hold one line per date.")
    for line, row in zip(lines, cells, strict=True):
        if len(row) != len(header):
            raise InputError(
                f"{source}, row {line}: {len(row)} fields where the header has {len(header)}; "
                "write one field per column, empty where there is no price."
            )
    columns = (pd.Series(column, dtype=object) for column in zip(*cells, strict=True))
    return RawTable(source, dict(zip(header, columns, strict=True)), np.array(lines))


def _split_csv(text: str) -> tuple[list[str], list[int], list[list[str]]]:
    """Header names, line numbers and fields of the lines that are not blank."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    numbered = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    header = [name.strip() for name in numbered[0][1]] if numbered else []
    return header, [line for line, _ in numbered[1:]], [row for _, row in numbered[1:]]


def _read_parquet(content: bytes, source: str) -> RawTable:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f'{source} is a Parquet file, which needs pyarrow; run pip install "qpo_sim[data]" or convert it to CSV.'
        ) from error
    try:
        table = pq.ParquetFile(io.BytesIO(content)).read()
        # What pandas noted about its index is ignored: the index comes back as the plain column it is stored as.
        frame = table.to_pandas(ignore_metadata=True, date_as_object=False)
    except (pa.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{source} is a damaged Parquet file ({detail}); write or download it again.") from error
    _check_header(table.column_names, source)
    if frame.empty:
        raise InputError(f"{source} has no rows; it must hold one row per date.")
    return RawTable(source, dict(frame.items()), np.arange(1, len(frame) + 1))


def _check_header(header: Sequence[str], source: str) -> None:
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise InputError(f"{source} has {count} columns named {name!r}; names must be unique, rename or remove one.")


def _date_column(table: RawTable) -> str:
    found = [column for column in table.columns if column.lower() in DATE_NAMES]
    if not found:
        raise InputError(
            f"{table.source} has no date column among {_listed(table.columns)}; name it one of {', '.join(DATE_NAMES)}."
        )
    if len(found) > 1:
        raise InputError(f"{table.source} has {len(found)} date columns ({_listed(found)}); keep one of them.")
    return found[0]


def _asset_column(table: RawTable) -> str | None:
    """The column that names each row's asset; only a long table has one."""
    return next((column for column in table.columns if column.lower() == "asset"), None)


def _price_column(table: RawTable) -> str:
    by_lower = {column.lower(): column for column in table.columns}
    found = next((by_lower[name] for name in PRICE_NAMES if name in by_lower), None)
    if found is None:
        raise InputError(
            f"{table.source} has a column 'asset' but neither 'close' nor 'price' among {_listed(table.columns)}; "
            "rename the column of prices."
        )
    return found


def _from_wide(table: RawTable, assets: Sequence[str]) -> PriceTable:
    source, rows = table.source, table.rows
    date = _date_column(table)
    times = _dates(table.columns[date], date, rows, source)
    if (repeated := times.duplicated()).any():
        second = int(np.argmax(repeated))
        first = int(np.argmax(times == times[second]))
        raise InputError(
            f"{source}, row {rows[second]}, column {date!r}: date {day(times[second])} is already in "
            f"row {rows[first]}; dates must be unique, remove one."
        )
    _check_order(times, date, rows, source)
    numbers = [_numbers(table.columns[asset], asset, times, rows, source) for asset in assets]
    return PriceTable(
        source, _frame(np.column_stack(numbers), times, assets), np.repeat(rows[:, None], len(assets), axis=1)
    )


def _from_long(table: RawTable, assets: Sequence[str], asset: str) -> PriceTable:
    source, date, price = table.source, _date_column(table), _price_column(table)
    number_of = {name: number for number, name in enumerate(assets)}
    numbers = np.array([number_of.get(_text(cell), -1) for cell in table.columns[asset]])
    keep = np.flatnonzero(numbers >= 0)
    numbers, rows = numbers[keep], table.rows[keep]
    times = _dates(table.columns[date].iloc[keep], date, rows, source)
    dates, at = np.unique(times, return_inverse=True)
    if (repeated := pd.Series(at * len(assets) + numbers).duplicated().to_numpy()).any():
        second = int(np.argmax(repeated))
        first = int(np.argmax((at == at[second]) & (numbers == numbers[second])))
        raise InputError(
            f"{source}, row {rows[second]}: date {day(times[second])} of asset {assets[numbers[second]]!r} is already "
            f"in row {rows[first]}; each date and asset must come once, remove one."
        )
    for number in range(len(assets)):
        own = numbers == number
        _check_order(times[own], date, rows[own], source)
    values = np.full((len(dates), len(assets)), np.nan)
    places = np.zeros(values.shape, dtype=np.int64)
    values[at, numbers] = _numbers(table.columns[price].iloc[keep], price, times, rows, source)
    places[at, numbers] = rows
    return PriceTable(source, _frame(values, pd.DatetimeIndex(dates), assets), places)


def _frame(values: np.ndarray, times: pd.DatetimeIndex, assets: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(values, index=times.rename("date"), columns=pd.Index(list(assets)))


def _dates(cells: pd.Series, date: str, rows: np.ndarray, source: str) -> pd.DatetimeIndex:
    times, bad = parse_dates(cells)
    if bad.any():
        first = int(np.argmax(bad))
        raise InputError(
            f"{source}, row {rows[first]}, column {date!r}: {_text(cells.iloc[first])!r} is not a date; "
            "write ISO 8601 dates such as 2020-01-31 or 2020-01-31T08:00Z."
        )
    return times


def _check_order(times: pd.DatetimeIndex, date: str, rows: np.ndarray, source: str) -> None:
    back = np.diff(times.asi8) < 0
    if back.any():
        at = int(np.argmax(back)) + 1
        raise InputError(
            f"{source}, row {rows[at]}, column {date!r}: date {day(times[at])} comes after the later "
            f"{day(times[at - 1])} of row {rows[at - 1]}; dates must increase, sort the file."
        )


def _numbers(cells: pd.Series, column: str, times: pd.DatetimeIndex, rows: np.ndarray, source: str) -> np.ndarray:
    """The cells as float64, NaN where empty."""
    if pd.api.types.is_numeric_dtype(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
        return cells.to_numpy(dtype=np.float64, na_value=np.nan)
    numbers = np.full(len(cells), np.nan)
    for at, cell in enumerate(cells):
        text = _text(cell)
        try:
            numbers[at] = np.nan if text.lower() in MISSING_MARKS else float(text)
        except ValueError as error:
            raise InputError(
                f"{source}, row {rows[at]}, column {column!r}: price {text!r} on {day(times[at])} is not a number; "
                "write a plain decimal such as 7200.17, leave the cell empty where the asset is not listed, or leave "
                "a column that holds no prices out with data.exclude."
            ) from error
    return numbers


def _text(cell: Any) -> str:
    return "" if pd.api.types.is_scalar(cell) and pd.isna(cell) else str(cell).strip()


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
