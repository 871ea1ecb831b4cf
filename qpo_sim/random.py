"""Addressed random numbers: every draw is a pure function of (seed, stream, path, step, slot) and of nothing else.

The generator is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3"). The key is made from (seed, stream); the counter is the path number and the packed (step, slot). So path 17
draws the same numbers whatever the chunk size, the device count or the other paths, and a run can be replayed path by
path. `jax.random` makes 64 bits for each 32 it uses and costs several times more on CPU.
"""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float32, Int, UInt32

from qpo_sim.numerics import Pair, polynomial, sqrt
from qpo_sim.types import Array

SLOT_BITS = 12
MAX_STEPS = 2 ** (32 - SLOT_BITS)
MAX_SLOTS = 2**SLOT_BITS

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


class Stream(IntEnum):
    """What a family of draws feeds. A number here is part of every address: append, never renumber."""

    START = 0
    REGIME = 1
    SHOCK = 2
    LIQUIDATION = 3
    VOLATILITY = 4
    JUMP = 5
    SIDE = 6
    MIXING = 7
    RESAMPLE = 8


class StreamKey(NamedTuple):
    """Threefry key of one stream of one seed."""

    high: UInt32[Array, ""]
    low: UInt32[Array, ""]


def threefry2x32(x0: Array, x1: Array, key: StreamKey, *, n_rounds: int = 20) -> tuple[Array, Array]:
    """Threefry-2x32 block cipher on two words of 32 bits; works on numpy and JAX arrays alike."""
    u32 = np.uint32
    schedule = (key.high, key.low, key.high ^ key.low ^ u32(_PARITY))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for r in range(n_rounds):
        shift = _ROTATIONS[(r // 4) % 2][r % 4]
        x0 = x0 + x1
        x1 = ((x1 << u32(shift)) | (x1 >> u32(32 - shift))) ^ x0
        if r % 4 == 3:
            j = r // 4 + 1
            x0, x1 = x0 + schedule[j % 3], x1 + schedule[(j + 1) % 3] + u32(j)
    return x0, x1


def stream_key(seed: int, stream: Stream) -> StreamKey:
    """Key of a stream: the cipher applied to the stream's number under the 64-bit seed, so keys share no structure."""
    seed_key = StreamKey(np.uint32((seed >> 32) & 0xFFFFFFFF), np.uint32(seed & 0xFFFFFFFF))
    with np.errstate(over="ignore"):
        high, low = threefry2x32(np.array([int(stream)], np.uint32), np.zeros(1, np.uint32), seed_key)
    return StreamKey(high[0], low[0])


def stream_keys(seed: int) -> dict[Stream, StreamKey]:
    """Keys of all streams of a seed; a pytree, so that a new seed does not recompile."""
    return {stream: stream_key(seed, stream) for stream in Stream}


def bits(key: StreamKey, path: UInt32[Array, " paths"], step: Int[Array, ""], slot: int) -> tuple[Array, Array]:
    """Two rows of 32 random bits per path at address (step, slot)."""
    word = (step.astype(jnp.uint32) << np.uint32(SLOT_BITS)) + np.uint32(slot)
    return threefry2x32(path, jnp.broadcast_to(word, path.shape), key)


def uniform(word: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """Uniform on (0, 1) with 23 bits, at the middle of its cell: never 0, never 1."""
    one_to_two = lax.bitcast_convert_type((word >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32)
    return one_to_two - np.float32(1.0 - 2.0**-24)


def normal_score(word: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    r"""Standard normal by inversion, monotone in the leading 24 bits up to rounding; |value| <= 5.42.

    $\sqrt2\,\mathrm{erf}^{-1}(x)$ by the two polynomials of Giles (2012), "Approximating the erfinv function", in
    $w = -\log(1 - x^2)$; relative error 4e-7.
    """
    # The middle of one of 2^24 cells of (-1, 1), exact in float32.
    cell = (lax.bitcast_convert_type(word, jnp.int32) >> np.int32(8)).astype(jnp.float32)
    x = (cell + np.float32(0.5)) * np.float32(2.0**-23)
    w = -_log((np.float32(1.0) - x) * (np.float32(1.0) + x))
    centre = polynomial([np.float32(c) for c in _ERF_INV_CENTRE], w - np.float32(2.5))
    tail = polynomial([np.float32(c) for c in _ERF_INV_TAIL], sqrt(jnp.maximum(w, 0.0)) - np.float32(3.0))
    return np.float32(np.sqrt(2.0)) * x * jnp.where(w < np.float32(5.0), centre, tail)


# Lowest power first.
_ERF_INV_CENTRE = (
    1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.00021858087, -4.39150654e-06, -3.5233877e-06,
    3.43273939e-07, 2.81022636e-08,
)  # fmt: skip
_ERF_INV_TAIL = (
    2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773, -0.00367342844, 0.00134934322,
    0.000100950558, -0.000200214257,
)  # fmt: skip


def _log(x: Array) -> Array:
    # Natural logarithm of a positive normal float32 to 1e-7: exponent split and the Cephes logf polynomial, without the
    # branches for zero, infinity and NaN that a uniform on (0, 1) never needs.
    bits_of = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits_of - np.int32(0x3F3504F3)) >> np.int32(23)
    m = lax.bitcast_convert_type(bits_of - (exponent << np.int32(23)), jnp.float32) - np.float32(1.0)
    value = np.float32(7.0376836292e-2)
    for c in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        value = value * m + np.float32(c)
    square = m * m
    value = value * m * square - np.float32(0.5) * square + m
    return value + exponent.astype(jnp.float32) * np.float32(0.6931471805599453)


def _sin_cos(word: Array) -> tuple[Array, Array]:
    # jnp.sin and jnp.cos are scalar calls on XLA:CPU. Two bits choose the quadrant, the others an angle in
    # [-pi/4, pi/4] where short minimax polynomials (Cephes sinf, cosf) are exact to float32.
    quadrant = word >> np.uint32(30)
    cell = lax.bitcast_convert_type(((word << np.uint32(2)) >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32)
    y = (cell - np.float32(1.5 - 2.0**-24)) * np.float32(np.pi / 2.0)
    y2 = y * y
    f = np.float32
    sine = y + y * y2 * (f(-1.6666654611e-1) + y2 * (f(8.3321608736e-3) + y2 * f(-1.9515295891e-4)))
    tail = f(4.166664568298827e-2) + y2 * (f(-1.388731625493765e-3) + y2 * f(2.443315711809948e-5))
    cosine = f(1.0) + y2 * (f(-0.5) + y2 * tail)
    swap = (quadrant & np.uint32(1)) != 0
    a, b = jnp.where(swap, cosine, sine), jnp.where(swap, sine, cosine)
    sign_a = (quadrant & np.uint32(2)) << np.uint32(30)
    sign_b = sign_a ^ ((quadrant & np.uint32(1)) << np.uint32(31))

    def flip(x: Array, sign: Array) -> Array:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ sign, jnp.float32)

    return flip(a, sign_a), flip(b, sign_b)


def normal_pair(word0: UInt32[Array, "..."], word1: UInt32[Array, "..."]) -> Pair:
    """Two independent standard normals (Box-Muller)."""
    radius = sqrt(np.float32(-2.0) * _log(uniform(word0)))
    sine, cosine = _sin_cos(word1)
    return Pair(radius * cosine, radius * sine)


def normal_pairs(key: StreamKey, path: UInt32[Array, " paths"], step: Int[Array, ""], n_pairs: int) -> tuple[Pair, ...]:
    """Normal pairs at the addresses (step, 0) .. (step, n_pairs - 1)."""
    return tuple(normal_pair(*bits(key, path, step, slot)) for slot in range(n_pairs))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Address:
    """Where the draws of one component are in one step: a stream, the paths, the step and the first slot.

    `mirror` is None, or a row that is 0 for a path and 2^32 - 1 for its antithetic partner, which then draws 1 - u
    where the path draws the uniform u, and -z where it draws the normal z.
    """

    key: StreamKey
    path: UInt32[Array, " paths"]
    step: Int[Array, ""]
    slot: int = field(default=0, metadata={"static": True})
    mirror: Any = None

    def after(self, n_slots: int) -> "Address":
        """The address `n_slots` further on."""
        return replace(self, slot=self.slot + n_slots)

    def words(self, n: int) -> list[Array]:
        """`n` rows of 32 random bits, two from each slot."""
        pairs = [bits(self.key, self.path, self.step, self.slot + k) for k in range((n + 1) // 2)]
        return [self._mirrored(word) for pair in pairs for word in pair][:n]

    def uniforms(self, n: int) -> list[Array]:
        """`n` rows of uniforms on (0, 1), see `uniform`."""
        return [uniform(word) for word in self.words(n)]

    def scores(self, n: int) -> list[Array]:
        """`n` rows of standard normals by inversion, see `normal_score`."""
        return [normal_score(word) for word in self.words(n)]

    def normal_pairs(self, n_pairs: int) -> tuple[Pair, ...]:
        """Pairs of independent standard normals, one from each slot; cheaper than `scores`."""
        words = [bits(self.key, self.path, self.step, self.slot + k) for k in range(n_pairs)]
        half_turn = None if self.mirror is None else self.mirror & np.uint32(0x80000000)
        return tuple(normal_pair(a, b if half_turn is None else b ^ half_turn) for a, b in words)

    def normals(self, n: int) -> list[Array]:
        """`n` rows of independent standard normals, two from each slot."""
        return [row for pair in self.normal_pairs((n + 1) // 2) for row in pair][:n]

    def _mirrored(self, word: Array) -> Array:
        return word if self.mirror is None else word ^ self.mirror


def antithetic(path: UInt32[Array, " paths"]) -> tuple[Array, Array]:
    """Address number and mirror of each path when paths 2k and 2k + 1 are antithetic partners."""
    return path >> np.uint32(1), np.uint32(0) - (path & np.uint32(1))
