"""Writing a run's folder: everything is made in memory first, then every file appears at once or not at all.

Tables are CSV unless Parquet is asked for: the files a run leaves must not depend on what happens to be installed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd

from qpo_sim.errors import InputError
from qpo_sim.report.content import RunReport
from qpo_sim.report.formatting import unit_of
from qpo_sim.report.page import render_page
from qpo_sim.report.svg import missing
from qpo_sim.report.words import verdict

SCHEMA = 1
# Small tables of estimates also stand in result.json; curves and histories only in tables/.
_IN_RESULT = (
    "limits",
    "weights",
    "comparison",
    "attribution",
    "ledger",
    "regime_table",
    "worst_paths",
    "liquidation_by_regime",
    "liquidation_at_risk",
)
_TABLES = (
    "measures",
    "fan",
    "loss_histogram",
    "hazard",
    "account_fan",
    *_IN_RESULT,
    "convergence",
    "optimizer_trace",
    "replay_events",
)
_WITH_INDEX = ("regime_history", "replay")


def write_report(
    report: RunReport, folder: str | os.PathLike, *, parquet: bool = False, html: bool = True
) -> dict[str, Path]:
    """Write result.json, tables/, figures/, report.html and manifest.json.

    Args:
        report: what to write.
        folder: where; made if absent.
        parquet: write the tables as Parquet (needs pyarrow), else as CSV.
        html: write report.html and the figures.

    Returns:
        Where things are: `result`, `report`, `manifest`, and `table:<name>` and `figure:<name>` for each of these.

    Raises:
        InputError: a package that the report needs is not installed. Nothing is written then, as for every error.
    """
    folder = Path(folder)
    names: dict[str, str] = {"result": "result.json"}
    content: dict[str, bytes] = {"result.json": json_bytes(result(report))}
    pictures = []
    if html:
        page, pictures = render_page(report)
        names["report"] = "report.html"
        content["report.html"] = page.encode()
    for name, table in tables(report).items():
        path = f"tables/{name}.{'parquet' if parquet else 'csv'}"
        names[f"table:{name}"] = path
        content[path] = parquet_bytes(table) if parquet else csv_bytes(table)
    for drawn in pictures:
        path = f"figures/{drawn.name}.svg"
        names[f"figure:{drawn.name}"] = path
        content[path] = drawn.standalone.encode()
    # Last, because it names the others.
    names["manifest"] = "manifest.json"
    content["manifest.json"] = json_bytes(manifest(report, content))
    write_files({folder / path: data for path, data in content.items()})
    return {name: folder / path for name, path in names.items()}


def result(report: RunReport) -> dict[str, Any]:
    """What result.json holds: plain values, every estimate as value, std_error and unit."""
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "job": report.job,
        "title": report.title,
        "capital": report.capital,
        "horizon_days": report.horizon_days,
        "n_paths": report.n_paths,
        "n_steps": report.n_steps,
        "step_hours": report.step_hours,
        "assets": list(report.assets),
        "units": {"capital": "USD", "horizon_days": "days", "losses": "fraction of capital, positive is bad"},
        "verdict": verdict(report),
        "measures": [] if report.measures is None else _records(report.measures),
    }
    for name in _IN_RESULT:
        table = getattr(report, name)
        found[name] = [] if table is None else _records(_with_unit(name, table))
    found["attribution_level"] = report.attribution_level
    return found


def _with_unit(name: str, table: pd.DataFrame) -> pd.DataFrame:
    if "unit" in table.columns:
        return table
    if "measure" in table.columns:
        return table.assign(unit=[unit_of(str(measure)) for measure in table["measure"]])
    return table.assign(unit="fraction of capital") if name in ("attribution", "ledger") else table


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def tables(report: RunReport) -> dict[str, pd.DataFrame]:
    """The tables of a report by name, each with plain columns (an index becomes the first column)."""
    found = {name: getattr(report, name) for name in _TABLES if report.has(name)}
    for name in _WITH_INDEX:
        if report.has(name):
            table = getattr(report, name)
            found[name] = table.rename_axis(
                table.index.name or ("date" if name == "regime_history" else "day")
            ).reset_index()
    if report.has("price_history"):
        series = report.price_history
        assert series is not None
        frame = series.rename(series.name or "price").to_frame()
        found["price_history"] = frame.rename_axis(series.index.name or "date").reset_index()
    if report.has("correlation"):
        parts = [
            matrix.rename_axis("asset").reset_index().assign(regime=name)
            for name, matrix in (report.correlation or {}).items()
        ]
        table = pd.concat(parts, ignore_index=True)
        found["correlation"] = table[["regime", *[column for column in table.columns if column != "regime"]]]
    return found


def manifest(report: RunReport, content: Mapping[str, bytes]) -> dict[str, Any]:
    """The report's manifest with the size and SHA-256 of every file written beside it."""
    files = {path: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in content.items()}
    return {**report.manifest, "schema": SCHEMA, "job": report.job, "files": files}


def jsonable(value: Any) -> Any:
    """A value as strict JSON can hold it: NaN and infinities are null, numpy and paths are plain."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [jsonable(item) for item in items]
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, PurePath):
        return value.as_posix()
    return str(value)


def json_bytes(value: Any) -> bytes:
    """Strict, indented JSON with a final newline."""
    return (json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def csv_bytes(table: pd.DataFrame) -> bytes:
    """A table as CSV: UTF-8, comma, no index, LF line ends, shortest digits that read back to the same number."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as zstd-compressed Parquet.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(missing("pyarrow")) from error
    stream = io.BytesIO()
    table.to_parquet(stream, engine="pyarrow", compression="zstd", index=False)
    return stream.getvalue()


def write_files(content: Mapping[Path, bytes]) -> None:
    """Write several files so that none of them is ever seen half-written.

    All go to temporary names first; only when every one of them is complete are they moved to their places. On an
    error the temporary files and the folders made for them are taken away again.
    """
    waiting: list[tuple[Path, Path]] = []
    made: list[Path] = []
    try:
        for path, data in content.items():
            _make_folder(path.parent, made)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            waiting.append((temporary, path))
            temporary.write_bytes(data)
        while waiting:
            os.replace(*waiting[0])
            waiting.pop(0)
    except BaseException:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    for part in [*reversed(folder.parents), folder]:
        if not part.exists():
            part.mkdir(exist_ok=True)
            made.append(part)


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write one file atomically; returns its path."""
    path = Path(path)
    write_files({path: data})
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write UTF-8 text atomically; returns the path."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write strict JSON (NaN becomes null) atomically; returns the path."""
    return write_bytes(path, json_bytes(value))


def write_csv(path: str | os.PathLike, table: pd.DataFrame) -> Path:
    """Write a table as CSV atomically; returns the path."""
    return write_bytes(path, csv_bytes(table))


def write_parquet(path: str | os.PathLike, table: pd.DataFrame) -> Path:
    """Write a table as Parquet atomically; returns the path."""
    return write_bytes(path, parquet_bytes(table))
