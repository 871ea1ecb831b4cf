"""Mergeable histogram on the leading bits of float32: logarithmic bins without a range to choose.

Counts are integers, and the losses of one bin share their exponent, so their float64 sum is exact: merging is
associative and commutative to the last bit.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from qpo_sim.types import Array

# Octaves told apart: 32 from 2^-20 to 2^12.
_OCTAVE_BITS, _LOWEST = 5, -20
_SMALLEST, _LARGEST = 2.0**_LOWEST, 2.0 ** (_LOWEST + (1 << _OCTAVE_BITS))
# Bits of the mantissa of a float32, and the bits of 2^-20.
_MANTISSA = 23
_FIRST = (127 + _LOWEST) << _MANTISSA


class LogHistogram(NamedTuple):
    """Counts (and sums, or None) per bin; rows are independent histograms of the same size.

    With b bits a bin is at most 2^(6-b) wide relative to the loss: 0.8 % for 13 bits, 0.05 % for 17. Quantiles
    interpolated inside a bin are about two digits better where the density is smooth.

    What is smaller than 2^-20 in size is counted in the bin of its sign next to 0, and what is larger than 2^12 in the
    last one. In the sums of the bins the one counts as 0 and the other as 2^12, so that no bin mixes exponents.
    """

    counts: Int[Array, "rows bins"]
    sums: Float[Array, "rows bins"] | None

    @property
    def bits(self) -> int:
        """Bits that select the bin: sign, octave and leading bits of the mantissa."""
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


def count(into: LogHistogram, rows: Iterable[Float[Array, " paths"]]) -> None:
    """Counts one more part of the sample in place: new arrays would cost more than the counting."""
    n_bins = into.counts.shape[1]
    smallest, largest = np.float32(_SMALLEST), np.float32(_LARGEST)
    for k, row in enumerate(rows):
        row = np.ascontiguousarray(row, np.float32)
        key = _bins(row, into.bits)
        into.counts[k] += np.bincount(key, minlength=n_bins)
        if into.sums is not None:
            weight = np.clip(row, -largest, largest)
            weight[np.abs(row) < smallest] = 0.0
            into.sums[k] += np.bincount(key, weights=weight, minlength=n_bins)


def _bins(value: np.ndarray, bits: int) -> np.ndarray:
    # The bits of a positive float32 order like its value. Bin k of the positive half is the mirror image of bin k of
    # the negative half, which a complement gives. In place, because this runs over every date of every path.
    word = value.view(np.int32)
    key = word & np.int32(0x7FFFFFFF)
    key -= np.int32(_FIRST)
    key >>= np.int32(_MANTISSA + _OCTAVE_BITS + 1 - bits)
    np.clip(key, np.int32(0), np.int32((1 << (bits - 1)) - 1), out=key)
    key ^= word >> np.int32(31)
    key += np.int32(1 << (bits - 1))
    return key


def edges(bits: int, index: np.ndarray) -> np.ndarray:
    """Left edges of the bins with the given indices (float64); 2^bits gives the right edge of the last bin."""
    k = np.asarray(index, np.int64) - (1 << (bits - 1))
    word = (np.abs(k) << (_MANTISSA + _OCTAVE_BITS + 1 - bits)) + _FIRST
    size = word.astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(k == 0, 0.0, np.copysign(size, k))
