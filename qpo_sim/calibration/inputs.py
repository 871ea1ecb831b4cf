"""Border checks of returns, and their packing into blocks of equal missing pattern."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.calibration.regime_student_t import Observations
from qpo_sim.errors import InputError

MIN_ROWS_PER_REGIME = 10
MIN_ROWS_PER_ASSET = 2
MIN_OBSERVATIONS = 30
_BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
_BLOCK_COST = 12  # what a block costs beside its rows (factors to fetch, moments to sum), in rows


class ReturnTable(NamedTuple):
    """Checked log-returns per step; NaN where missing."""

    values: Float[np.ndarray, "steps assets"]
    assets: tuple[str, ...]
    step_hours: float


def read_returns(returns: Any, step_hours: float | None = None) -> ReturnTable:
    """Values, names and step of a pandas table or an array of log-returns.

    Args:
      returns: one row per step, oldest first, one column per asset; NaN where there is none. An array may have one
        axis for a single asset.
      step_hours: hours per row; None reads it off the table's dates, and takes 24 where there are none.

    Raises:
      InputError: wrong number of axes, an infinite value, a name given twice, uneven dates or a bad step.
    """
    try:
        values = np.array(returns, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"returns holds values that are not numbers ({error}); give a table of log-returns."
        ) from error
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"returns has shape {values.shape}; it must have rows (steps) and columns (assets).")
    columns = getattr(returns, "columns", None)
    names = tuple(f"asset_{a}" for a in range(values.shape[1])) if columns is None else tuple(map(str, columns))
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InputError(f"returns names the asset {name!r} twice; give each column its own name.")
    if (infinite := np.isinf(values)).any():
        row, column = np.argwhere(infinite)[0]
        raise InputError(
            f"returns, row {row}, column {names[column]!r} is {values[row, column]}; "
            "it must be finite, or NaN where there is no return: correct the price behind it."
        )
    return ReturnTable(values, names, _step_hours(returns, step_hours))


def check_enough(table: ReturnTable, n_regimes: int) -> None:
    """Enough rows for the number of parameters, and something to fit in every column.

    Raises:
      InputError: fewer than 10 rows per regime or 2 rows per asset, an asset with fewer than 30 returns, or one whose
        returns never change.
    """
    has_value = ~np.isnan(table.values)
    n_rows, n_assets = int(has_value.any(axis=1).sum()), len(table.assets)
    counts = has_value.sum(axis=0)
    if (short := counts < MIN_OBSERVATIONS).any():
        column = int(np.argmax(short))
        raise InputError(
            f"returns, column {table.assets[column]!r} has {counts[column]} values; "
            f"a fit needs at least {MIN_OBSERVATIONS}: give a longer history or leave the asset out."
        )
    if n_rows < MIN_ROWS_PER_REGIME * n_regimes or n_rows <= MIN_ROWS_PER_ASSET * n_assets:
        raise InputError(
            f"returns has {n_rows} rows with values, too few for n_regimes={n_regimes} and {n_assets} assets; at least "
            f"{MIN_ROWS_PER_REGIME} per regime and more than {MIN_ROWS_PER_ASSET} per asset are needed: "
            "give a longer history, fewer regimes or fewer assets."
        )
    flat = np.nanmin(table.values, axis=0) == np.nanmax(table.values, axis=0)
    if flat.any():
        column = int(np.argmax(flat))
        raise InputError(
            f"returns, column {table.assets[column]!r} is {np.nanmin(table.values[:, column]):g} in every row; "
            "a fit needs returns that vary: check its prices or leave the asset out."
        )


def pack(values: Float[np.ndarray, "steps assets"]) -> Observations:
    """Blocks of rows with equal missing pattern (see `Observations`), as numpy arrays."""
    is_value = ~np.isnan(values)
    has_value = is_value.any(axis=1)
    rows = np.flatnonzero(has_value)
    patterns, pattern_of = np.unique(is_value[rows], axis=0, return_inverse=True)
    pattern_of = pattern_of.reshape(-1)
    counts = np.bincount(pattern_of, minlength=len(patterns))
    size = min(_BLOCK_SIZES, key=lambda size: int(np.ceil(counts / size).sum()) * (size + _BLOCK_COST))
    n_blocks = np.ceil(counts / size).astype(int)

    # Stable sorting keeps time order within a pattern; each pattern starts a new block.
    order = np.argsort(pattern_of, kind="stable")
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = within + np.repeat((np.cumsum(n_blocks) - n_blocks) * size, counts)
    time = np.zeros(n_blocks.sum() * size, dtype=np.int32)
    is_row = np.zeros(n_blocks.sum() * size)
    place = np.zeros(len(values), dtype=np.int32)
    time[at], is_row[at], place[rows[order]] = rows[order], 1.0, at
    blocked = np.where(is_row[:, None] > 0.0, np.nan_to_num(values[time]), 0.0)
    return Observations(
        values=blocked.reshape(-1, size, values.shape[1]),
        pattern=np.repeat(np.arange(len(patterns), dtype=np.int32), n_blocks),
        is_observed=patterns,
        time=time.reshape(-1, size),
        is_row=is_row.reshape(-1, size),
        place=place,
        has_value=has_value.astype(np.float64),
    )


def _step_hours(returns: Any, step_hours: float | None) -> float:
    if step_hours is not None:
        if not 0.0 < step_hours < np.inf:
            raise InputError(f"step_hours={step_hours} must be a positive number of hours, 24 for daily returns.")
        return float(step_hours)
    index: Any = getattr(returns, "index", None)
    if getattr(getattr(index, "dtype", None), "kind", "") != "M" or len(index) < 2:
        return 24.0
    steps = np.diff(np.asarray(index, dtype="datetime64[us]").astype(np.int64))
    if steps[0] <= 0 or (steps != steps[0]).any():
        odd = int(np.argmax((steps != steps[0]) | (steps <= 0))) + 1
        raise InputError(
            f"returns, row {odd}: date {index[odd]} does not follow {index[odd - 1]} by the step of the first two "
            "rows; dates must increase evenly: sort them and put a row of NaN where one is missing."
        )
    return float(steps[0]) / 3.6e9
