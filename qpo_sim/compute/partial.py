"""What a batch of paths leaves behind: sums, histograms and the worst paths, merged exactly.

Merging is associative and commutative to the last bit, with `zero` as its unit, so chunks, devices, processes and
restarts may be combined in any order. Sums are made per fixed block of paths in float64 and then added as integers of
2^-120, which is exact; histograms are exact by construction; the worst paths are ordered by (loss, path number).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.compute import histogram as log_histogram
from qpo_sim.compute.histogram import LogHistogram

# Paths per block: sums inside a block are in float64, blocks are added exactly. Part of a result's identity.
PATH_BLOCK = 8192
# The worst paths kept exactly per horizon. Levels whose tail holds more paths are read from the fine histogram.
TAIL_LIMIT = 200_000
COARSE_BITS, FINE_BITS = 16, 18
_SCALE = 120


class Tail(NamedTuple):
    """The worst paths of one horizon in decreasing order of loss, with what else is known of each (columns)."""

    loss: np.ndarray
    path: np.ndarray
    extra: dict[str, np.ndarray]


@dataclass(frozen=True)
class Partial:
    """Mergeable partial result.

    Attributes:
      n_paths: paths seen.
      n_not_finite: paths with a number that is not finite; they are counted here and left out of everything else.
      sums: exact sums by name, arrays of Python integers in units of 2^-120.
      equity: histogram of the equity at every date.
      losses: fine histogram (with sums) of the loss at every horizon, then one of the maximum drawdown.
      tails: worst paths per horizon.
      tail_size: how many worst paths are kept.
    """

    n_paths: int
    n_not_finite: int
    sums: dict[str, np.ndarray]
    equity: LogHistogram
    losses: LogHistogram
    tails: tuple[Tail, ...]
    tail_size: int

    @property
    def n_used(self) -> int:
        """Paths behind the estimates."""
        return self.n_paths - self.n_not_finite

    def total(self, name: str) -> np.ndarray:
        """Sum over paths as float64."""
        return _from_exact(self.sums[name])

    def merge(self, other: "Partial") -> "Partial":
        """Partial result of both sets of paths."""
        if not self.sums:
            return other
        if not other.sums:
            return self
        return Partial(
            n_paths=self.n_paths + other.n_paths,
            n_not_finite=self.n_not_finite + other.n_not_finite,
            sums={name: value + other.sums[name] for name, value in self.sums.items()},
            equity=self.equity.merge(other.equity),
            losses=self.losses.merge(other.losses),
            tails=tuple(_merge_tails(a, b, self.tail_size) for a, b in zip(self.tails, other.tails, strict=True)),
            tail_size=self.tail_size,
        )


def zero(tail_size: int) -> Partial:
    """The unit of `merge`."""
    empty = LogHistogram(np.zeros((0, 1), np.int64), None)
    return Partial(0, 0, {}, empty, empty, (), tail_size)


def tail_size(n_paths: int, lowest_level: float) -> int:
    """Worst paths to keep so that VaR, CVaR and their errors at the lowest level are exact."""
    expected = n_paths * (1.0 - lowest_level)
    return int(min(n_paths, TAIL_LIMIT, np.ceil(expected + 6.0 * np.sqrt(expected) + 32)))


def partial_of(
    batch: dict[str, Any],
    first_path: int,
    *,
    horizons: tuple[int, ...],
    keep: int,
    threshold: list[float] | None = None,
) -> Partial:
    """Partial result of consecutive paths that start at a block boundary.

    Args:
      batch: arrays of `simulate.Outcome` by name (numpy, paths last).
      first_path: number of the first path.
      horizons: rows of `equity` at which loss measures are taken, the last one is the end.
      keep: worst paths to keep.
      threshold: losses per horizon below which a path cannot be among the worst `keep` of the run (from what was seen
        before); saves sorting, changes nothing.
    """
    finite = batch["is_finite"]
    n = finite.size
    path = first_path + np.arange(n, dtype=np.int64)
    n_not_finite = int(n - np.count_nonzero(finite))
    if n_not_finite:
        # Left-out paths count as nothing in sums, histograms and tails.
        batch = {k: _take(v, finite) for k, v in batch.items()}
        path = path[finite]
    equity = batch["equity"]
    pnl = equity - np.float32(1.0) if equity.dtype == np.float32 else equity - 1.0
    horizon_loss = -pnl[list(horizons)]
    values = _per_path_values(batch, pnl, horizons)
    block = (path - first_path) // PATH_BLOCK
    starts = np.searchsorted(block, np.arange(block[-1] + 1)) if path.size else np.zeros(0, np.int64)
    sums = {name: _exact_block_sums(value, starts) for name, value in values.items()}
    extra = {
        "max_drawdown": batch["max_drawdown"][None],
        "is_liquidated": batch["is_liquidated"].astype(np.float32),
        "components": -batch["components"] if batch["components"] is not None else np.zeros((0, path.size), np.float32),
        "accounts": np.stack([batch["accounts"][name] for name in ACCOUNTS])
        if batch["accounts"]
        else np.zeros((0, path.size), np.float32),
    }
    tails = tuple(
        _worst(loss, path, extra if k == len(horizons) - 1 else {}, keep, threshold[k] if threshold else -np.inf)
        for k, loss in enumerate(horizon_loss)
    )
    return Partial(
        n_paths=n,
        n_not_finite=n_not_finite,
        sums=sums,
        equity=log_histogram.histogram(pnl, COARSE_BITS, with_sums=False),
        losses=log_histogram.histogram(
            np.concatenate([horizon_loss, batch["max_drawdown"][None]]), FINE_BITS, with_sums=True
        ),
        tails=tails,
        tail_size=keep,
    )


def _per_path_values(batch: dict[str, Any], pnl: np.ndarray, horizons: tuple[int, ...]) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {"equity": batch["equity"]}
    returns = pnl[list(horizons)].astype(np.float64)
    downside = np.minimum(returns, 0.0)
    square, down = returns * returns, downside * downside
    values["r1"], values["r2"], values["r3"], values["r4"] = returns, square, square * returns, square * square
    values["d2"], values["d3"], values["d4"] = down, down * downside, down * down
    values["losses"] = (returns < 0.0).astype(np.float64)
    drawdown = batch["max_drawdown"].astype(np.float64)
    values["drawdown"], values["drawdown_square"] = drawdown, drawdown * drawdown
    hit = batch["hit_probability"]
    n_dates, n_accounts, n = hit.shape
    if n_accounts:
        increment = np.diff(hit, axis=0, prepend=np.zeros((1, n_accounts, n), hit.dtype))
        # A liquidation is seen at most once per path, so sums of products are all the variances need.
        values["hit"], values["hit_square"] = hit, np.square(hit)
        values["hazard"], values["hazard_square"] = increment, np.square(increment)
        values["liquidated"] = batch["is_liquidated"].astype(np.float64)
    if batch["accounts"]:
        accounts = np.stack([batch["accounts"][name] for name in ACCOUNTS]).astype(np.float64)
        values["accounts"], values["accounts_square"] = accounts, accounts * accounts
    return values


def _exact_block_sums(value: np.ndarray, starts: np.ndarray) -> np.ndarray:
    # One float64 sum per block (pairwise inside numpy), each turned into an integer of 2^-120 and added exactly.
    ends = np.append(starts[1:], value.shape[-1])[: starts.size]
    total = np.zeros(value.shape[:-1], dtype=object)
    for start, end in zip(starts, ends, strict=True):
        # A contiguous float64 copy: summed on the fly, numpy's cast buffers would group the terms by memory layout.
        block = np.ascontiguousarray(value[..., start:end], np.float64)
        total = total + _to_exact(block.sum(axis=-1))
    return total


# Raises for a sum that is not finite: only finite paths get here.
_to_exact = np.frompyfunc(lambda x: int(math.ldexp(x, _SCALE)), 1, 1)


def _from_exact(value: np.ndarray) -> np.ndarray:
    return np.asarray(np.frompyfunc(lambda i: float(i / (1 << _SCALE)), 1, 1)(value), np.float64)


def _take(value: Any, keep: np.ndarray) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return {k: v[..., keep] for k, v in value.items()}
    return value[..., keep]


def _worst(loss: np.ndarray, path: np.ndarray, extra: dict[str, np.ndarray], keep: int, threshold: float) -> Tail:
    candidates = np.flatnonzero(loss >= threshold)
    if candidates.size > keep:
        values = loss[candidates]
        cut = np.partition(values, values.size - keep)[values.size - keep]
        candidates = candidates[values >= cut]
    return _ordered_tail(loss[candidates], path[candidates], {k: v[:, candidates] for k, v in extra.items()}, keep)


def _ordered_tail(loss: np.ndarray, path: np.ndarray, extra: dict[str, np.ndarray], keep: int) -> Tail:
    order = np.lexsort((path, -loss))[:keep]
    return Tail(loss[order], path[order], {k: v[:, order] for k, v in extra.items()})


def _merge_tails(a: Tail, b: Tail, keep: int) -> Tail:
    if a.loss.size == keep:
        b_in = b.loss >= a.loss[-1]
        if not b_in.any():
            return a
        b = Tail(b.loss[b_in], b.path[b_in], {k: v[:, b_in] for k, v in b.extra.items()})
    extra = {k: np.concatenate([v, b.extra[k]], axis=1) for k, v in a.extra.items()}
    return _ordered_tail(np.concatenate([a.loss, b.loss]), np.concatenate([a.path, b.path]), extra, keep)
