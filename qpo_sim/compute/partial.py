"""What a batch of paths leaves behind: sums, histograms and the worst paths, merged exactly.

Merging is associative and commutative to the last bit, with `zero` as its unit, so chunks, devices, processes and
restarts may be combined in any order. Sums are made per fixed block of paths in float64 and then added as integers of
2^-120, which is exact; histograms are exact by construction; the worst paths are ordered by (loss, path number).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.compute import histogram as log_histogram
from qpo_sim.compute.histogram import LogHistogram
from qpo_sim.types import Array

# Paths per block: sums inside a block are in float64, blocks are added exactly. Part of a result's identity.
PATH_BLOCK = 8192
# The worst paths kept exactly per horizon. Levels whose tail holds more paths are read from the fine histogram.
TAIL_LIMIT = 200_000
COARSE_BITS, FINE_BITS = 13, 17
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
            sums=_merge_sums(self.sums, other.sums),
            equity=self.equity.merge(other.equity),
            losses=self.losses.merge(other.losses),
            tails=_merge_tails(self.tails, other.tails, self.tail_size),
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


def partial_of(batch: dict[str, Any], first_path: int, *, horizons: tuple[int, ...], keep: int) -> Partial:
    """Partial result of consecutive paths that start at a block boundary.

    Args:
      batch: arrays of `simulate.Outcome` by name (numpy, paths last); `liquidations` may be missing.
      first_path: number of the first path.
      horizons: rows of `equity` at which loss measures are taken, the last one is the end.
      keep: worst paths to keep.
    """
    return add(zero(keep), [batch], first_path, horizons=horizons)


def add(seen: Partial, parts: list[dict[str, Any]], first_path: int, *, horizons: tuple[int, ...]) -> Partial:
    """The same as merging `seen` with the partial results of the parts, to the bit, but cheaper.

    Args:
      seen: partial result so far. It is used up: its histograms are counted on in place.
      parts: batches of consecutive paths as for `partial_of`, all but the last a whole number of blocks long.
      first_path: number of the first path of the first part.
      horizons: see `partial_of`.
    """
    equity, losses, sums = seen.equity, seen.losses, seen.sums
    if not sums:
        equity = log_histogram.zero(len(parts[0]["equity"]), COARSE_BITS, with_sums=False)
        losses = log_histogram.zero(len(horizons) + 1, FINE_BITS, with_sums=True)
    # What is better than the worst of a full tail need not be sorted.
    bars = [tail.loss[-1] if tail.loss.size == seen.tail_size else -np.inf for tail in seen.tails]
    fresh: tuple[Tail, ...] = ()
    n_paths = n_finite = 0
    for part in parts:
        finite = part["is_finite"]
        one = part["equity"].dtype.type(1.0)
        loss = one - part["equity"][list(horizons)]
        used = slice(None) if finite.all() else finite
        # Made row by row, so that all of it stays in the cache.
        log_histogram.count(equity, (row[used] - one for row in part["equity"]))
        log_histogram.count(losses, (row[used] for row in (*loss, part["max_drawdown"])))
        sums = _merge_sums(sums, _sums(part, loss))
        tails = _tails(part, loss, first_path + n_paths, seen.tail_size, bars)
        fresh = _merge_tails(fresh, tails, seen.tail_size)
        n_paths += finite.size
        n_finite += int(np.count_nonzero(finite))
    return Partial(
        n_paths=seen.n_paths + n_paths,
        n_not_finite=seen.n_not_finite + n_paths - n_finite,
        sums=sums,
        equity=equity,
        losses=losses,
        tails=_merge_tails(seen.tails, fresh, seen.tail_size),
        tail_size=seen.tail_size,
    )


# ----------------------------------------------------------------------------- sums


def power_sums(value: Float[Array, "... paths"]) -> dict[str, Array]:
    """Sums over paths of powers of the return r and of its downside d = min(r, 0), and the number of losses."""
    downside = np.minimum(value, 0.0)
    square, down_square = value * value, downside * downside
    return {
        "r1": value.sum(-1),
        "r2": np.vecdot(value, value),
        "r3": np.vecdot(square, value),
        "r4": np.vecdot(square, square),
        "d2": np.vecdot(downside, downside),
        "d3": np.vecdot(down_square, downside),
        "d4": np.vecdot(down_square, down_square),
        "losses": np.count_nonzero(value < 0.0, axis=-1).astype(np.float64),
    }


def _sums(batch: dict[str, Any], loss: np.ndarray) -> dict[str, np.ndarray]:
    # Products of blocks this short are summed by one thread and in one order, whatever the number of cores.
    left_out = np.flatnonzero(~batch["is_finite"])
    sums = power_sums(_in_blocks(-loss, left_out))
    # Row by row here and below, so that what a row needs stays in the cache.
    sums["equity"] = np.stack([_in_blocks(row, left_out).sum(-1) for row in batch["equity"]])
    drawdown = _in_blocks(batch["max_drawdown"], left_out)
    sums["drawdown"], sums["drawdown_square"] = drawdown.sum(-1), np.vecdot(drawdown, drawdown)
    if batch["accounts"]:
        accounts = _in_blocks(np.stack([batch["accounts"][name] for name in ACCOUNTS]), left_out)
        sums["accounts"], sums["accounts_square"] = accounts.sum(-1), np.vecdot(accounts, accounts)
    hit = batch["hit_probability"]
    if hit.shape[1]:
        sums["liquidated"] = _in_blocks(batch["is_liquidated"], left_out).sum(-1)
        # A liquidation is seen at most once per path, so sums of products are all the variances need.
        before, by_date = _in_blocks(np.zeros_like(hit[0]), left_out), []
        for row in hit:
            now = _in_blocks(row, left_out)
            increment = np.subtract(now, before, out=before)
            by_date.append((now.sum(-1), np.vecdot(now, now), np.vecdot(increment, increment)))
            before = now
        sums["hit"], sums["hit_square"], sums["hazard_square"] = map(np.stack, zip(*by_date, strict=True))
    for name, rows in (batch.get("liquidations") or {}).items():
        blocks = _in_blocks(rows, left_out)
        sums[name], sums[f"{name}_square"] = blocks.sum(-1), np.vecdot(blocks, blocks)
    exact = {name: np.sum(_to_exact(value), axis=-1) for name, value in sums.items()}
    if "hit" in exact:
        exact["hazard"] = np.diff(exact["hit"], axis=0, prepend=0)
    return exact


def _in_blocks(rows: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Copy in float64 of shape (..., blocks, PATH_BLOCK), 0 for paths left out and to fill the last block.

    A block is summed in the same order whatever else is in the batch.
    """
    n = rows.shape[-1]
    n_blocks = -(-n // PATH_BLOCK)
    blocks = np.empty((*rows.shape[:-1], n_blocks * PATH_BLOCK))
    blocks[..., :n], blocks[..., n:] = rows, 0.0
    blocks[..., left_out] = 0.0
    return blocks.reshape(*rows.shape[:-1], n_blocks, PATH_BLOCK)


def _merge_sums(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a[name] + value for name, value in b.items()} if a else b


# Raises for a sum that is not finite: only finite paths get here.
_to_exact = np.frompyfunc(lambda x: int(math.ldexp(x, _SCALE)), 1, 1)


def _from_exact(value: np.ndarray) -> np.ndarray:
    return np.asarray(np.frompyfunc(lambda i: float(i / (1 << _SCALE)), 1, 1)(value), np.float64)


# ----------------------------------------------------------------------------- worst paths


def _tails(batch: dict[str, Any], loss: np.ndarray, first_path: int, keep: int, bars: list[Any]) -> list[Tail]:
    # Per horizon the worst `keep` finite paths that lose at least the bar (where there is one).
    tails = []
    for k, row in enumerate(loss):
        wanted = batch["is_finite"] & (row >= bars[k]) if bars else batch["is_finite"]
        chosen = np.flatnonzero(wanted)
        if chosen.size > keep:
            values = row[chosen]
            chosen = chosen[values >= np.partition(values, values.size - keep)[values.size - keep]]
        chosen = chosen[_order(row[chosen], chosen)[:keep]]
        tails.append(Tail(row[chosen], first_path + chosen, _extra(batch, chosen) if k == len(loss) - 1 else {}))
    return tails


def _extra(batch: dict[str, Any], chosen: np.ndarray) -> dict[str, np.ndarray]:
    # Accounts and components have no rows without attribution.
    none = np.zeros((0, chosen.size), np.float32)
    accounts, components = batch["accounts"], batch["components"]
    return {
        "max_drawdown": batch["max_drawdown"][None, chosen],
        "is_liquidated": np.take(batch["is_liquidated"], chosen, axis=1).astype(np.float32),
        "components": none if components is None else -np.take(components, chosen, axis=1),
        "accounts": np.stack([accounts[name][chosen] for name in ACCOUNTS]) if accounts else none,
    }


def _order(loss: np.ndarray, path: np.ndarray, *, kind: Literal["quicksort", "stable"] = "quicksort") -> np.ndarray:
    """Positions by decreasing loss, ties by path number; "stable" takes one pass where the losses form two runs."""
    order = np.argsort(-loss, kind=kind)
    ranked = loss[order]
    is_tie = ranked[1:] == ranked[:-1]
    if is_tie.any():
        member = np.flatnonzero(np.append(is_tie, False) | np.append(False, is_tie))
        tied = order[member]
        order[member] = tied[np.lexsort((path[tied], -loss[tied]))]
    return order


def _merge_tails(many: Sequence[Tail], others: Sequence[Tail], keep: int) -> tuple[Tail, ...]:
    return tuple(_merge_tail(a, b, keep) for a, b in zip(many, others, strict=True)) if many else tuple(others)


def _merge_tail(a: Tail, b: Tail, keep: int) -> Tail:
    if a.loss.size == keep:
        n_in = np.count_nonzero(b.loss >= a.loss[-1])
        if not n_in:
            return a
        b = Tail(b.loss[:n_in], b.path[:n_in], {k: v[:, :n_in] for k, v in b.extra.items()})
    loss, path = np.concatenate([a.loss, b.loss]), np.concatenate([a.path, b.path])
    order = _order(loss, path, kind="stable")[:keep]
    extra = {k: np.take(np.concatenate([v, b.extra[k]], axis=1), order, axis=1) for k, v in a.extra.items()}
    return Tail(loss[order], path[order], extra)
