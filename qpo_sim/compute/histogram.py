"""Mergeable histogram on the leading bits of float32: logarithmic bins without a range to choose.

Counts are integers, and the float32 losses of one bin share their exponent, so their float64 sum is exact: merging is
associative and commutative to the last bit.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from qpo_sim.types import Array


class LogHistogram(NamedTuple):
    """Counts (and sums, or None) per bin; rows are independent histograms of the same size.

    With b bits a bin is 2^(9-b) wide relative to the loss: 0.8 % for 16 bits, 0.2 % for 18. Quantiles interpolated
    inside a bin are about two digits better.
    """

    counts: Int[Array, "rows bins"]
    sums: Float[Array, "rows bins"] | None

    @property
    def bits(self) -> int:
        """Leading bits that select the bin."""
        return int(self.counts.shape[-1]).bit_length() - 1

    def merge(self, other: "LogHistogram") -> "LogHistogram":
        """Histogram of both samples."""
        sums = None if self.sums is None else self.sums + other.sums
        return LogHistogram(self.counts + other.counts, sums)

    def quantile(self, row: int, probability: float) -> float:
        """Value below which the given share of the sample lies, interpolated inside its bin."""
        cumulative = np.cumsum(self.counts[row])
        rank = probability * cumulative[-1]
        k = int(np.searchsorted(cumulative, rank, side="left"))
        k = min(k, cumulative.size - 1)
        left, right = edges(self.bits, np.array([k, k + 1]))
        below = cumulative[k - 1] if k else 0
        share = (rank - below) / max(self.counts[row, k], 1)
        return float(left + share * (right - left))


def zero(n_rows: int, bits: int, *, with_sums: bool) -> LogHistogram:
    """Empty histogram."""
    shape = (n_rows, 1 << bits)
    return LogHistogram(np.zeros(shape, np.int64), np.zeros(shape) if with_sums else None)


def histogram(value: Float[Array, "rows paths"], bits: int, *, with_sums: bool) -> LogHistogram:
    """Histogram of each row."""
    n_rows = value.shape[0]
    value = np.ascontiguousarray(value, np.float32)
    key = _bins(value, bits)
    key += (np.arange(n_rows, dtype=np.int32) << bits)[:, None]
    key = key.ravel()
    shape = (n_rows, 1 << bits)
    counts = np.bincount(key, minlength=n_rows << bits).reshape(shape)
    sums = None
    if with_sums:
        sums = np.bincount(key, weights=value.ravel().astype(np.float64), minlength=n_rows << bits).reshape(shape)
    return LogHistogram(counts, sums)


def _bins(value: np.ndarray, bits: int) -> np.ndarray:
    # The bits of a float32 order like its value once those of negative numbers are turned round; in place, because this
    # runs over every date of every path. Adding 0.0 makes -0.0 the 0.0 it is equal to.
    key = (value + np.float32(0.0)).view(np.int32)
    key ^= (key >> np.int32(31)) & np.int32(0x7FFFFFFF)
    key >>= np.int32(32 - bits)
    key += np.int32(1 << (bits - 1))
    return key


def edges(bits: int, index: np.ndarray) -> np.ndarray:
    """Left edges of the bins with the given indices (float64)."""
    word = (np.clip(index, 0, (1 << bits) - 1).astype(np.uint64) << np.uint64(32 - bits)).astype(np.uint32)
    raw = np.where(word >> np.uint32(31), word ^ np.uint32(0x80000000), ~word).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(raw).view(np.float32).astype(np.float64)
