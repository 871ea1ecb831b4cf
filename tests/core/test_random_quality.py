"""Statistical quality of the addressed generator and of the uniforms and normals made from it.

A check maps a generator to p-values. A test fails when the smallest p-value, times their number, is below `ALARM`: with
other seeds a sound generator would fail a test once in ten million times (p-values come from limit laws, so the promise
kept is once in a million). Every check is also shown generators it must reject: the cipher cut to a few rounds (some
checks still see nine), and a multiplicative hash of the address in its place.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import ndtr
from scipy import special, stats

from qpo_sim import random
from qpo_sim.random import Stream, StreamKey

ALARM = 1e-7
N = 1 << 19
N_CHUNKS = 20  # of N draws: 10^7
CELLS = 1 << 12


class Address(NamedTuple):
    """One address, or an array of them in the order in which the words are read."""

    path: np.ndarray | int = 0
    step: np.ndarray | int = 0
    slot: np.ndarray | int = 0
    seed: np.ndarray | int = 0
    stream: np.ndarray | int = Stream.SHOCK


Words = tuple[np.ndarray, np.ndarray]
Generator = Callable[[Address], Words]
Check = Callable[[Generator, Address], np.ndarray]

_I = np.arange(N)
# Orders in which a simulator, or the comparison of two simulations, walks through the addresses.
ORDERS = {
    "paths": Address(path=_I, step=29, slot=1, seed=1),
    "strided paths": Address(path=_I << 13, step=30, slot=0, seed=2),
    "steps": Address(step=_I, path=17, seed=3),
    "slots": Address(slot=_I % 4096, step=_I // 4096, path=18, seed=4),
    "blocks": Address(path=_I % 1024, slot=_I // 1024 % 4, step=_I // 4096, seed=5),
    "streams": Address(stream=_I % 4, path=_I // 4, seed=6),
    "seeds": Address(seed=_I, path=19, step=3),
    "high seeds": Address(seed=_I << 32, path=20, step=4),
    "paths of seeds": Address(seed=_I // 16, path=_I % 16, step=5),
}


@partial(jax.jit, static_argnames="n_rounds")
def _cipher(path, word, high, low, *, n_rounds: int):
    return random.threefry2x32(path, word, StreamKey(high, low), n_rounds=n_rounds)


def _parts(address: Address) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    path, step, slot, seed, stream = (np.atleast_1d(np.asarray(part, np.uint64)) for part in address)
    return path, (step << np.uint64(random.SLOT_BITS)) + slot, seed, stream


def threefry(address: Address, *, n_rounds: int = 20) -> Words:
    """Words of `random.bits` with keys of `random.stream_key`, any part of the address an array."""
    path, word, seed, stream = _parts(address)
    seed_key = StreamKey((seed >> np.uint64(32)).astype(np.uint32), seed.astype(np.uint32))
    keys = random.threefry2x32(stream.astype(np.uint32), np.zeros(1, np.uint32), seed_key)
    size = max(path.size, word.size, seed.size, stream.size)
    parts = (np.broadcast_to(part.astype(np.uint32), size) for part in (path, word, *keys))
    words = _cipher(*parts, n_rounds=n_rounds)
    return np.asarray(words[0]), np.asarray(words[1])


def linear_hash(address: Address) -> Words:
    """A multiplicative hash of the whole address, as a counter-based generator must not be."""
    path, word, seed, stream = _parts(address)
    state = path * np.uint64(0x9E3779B97F4A7C15) + word * np.uint64(0xC2B2AE3D27D4EB4F)
    state = state + seed * np.uint64(0x165667B19E3779F9) + stream * np.uint64(0x85EBCA77C2B2AE63)
    return (state >> np.uint64(32)).astype(np.uint32), state.astype(np.uint32)


def _rounds(n_rounds: int) -> Generator:
    return partial(threefry, n_rounds=n_rounds)


def _p_normal(z: np.ndarray) -> np.ndarray:
    return special.erfc(np.abs(z).ravel() / np.sqrt(2.0))


def _p_two_sided(law, x) -> np.ndarray:
    # Too good a fit is as wrong as a bad one: points on a lattice fill cells too evenly.
    return np.minimum(1.0, 2.0 * np.minimum(law.cdf(x), law.sf(x))).ravel()


def _p_cells(count: np.ndarray) -> np.ndarray:
    # Equally likely cells, one histogram per row.
    expected = count.sum(axis=-1, keepdims=True) / count.shape[-1]
    return _p_two_sided(stats.chi2(count.shape[-1] - 1), np.sum((count - expected) ** 2 / expected, axis=-1))


def _p_count(count, n, p) -> np.ndarray:
    law = stats.binom(n, p)
    return np.ravel(np.minimum(1.0, 2.0 * np.minimum(law.cdf(count), law.sf(np.asarray(count) - 1))))


def _alarm(p_values: np.ndarray) -> float:
    return float(np.min(p_values) * np.size(p_values))


@jax.jit
def _normals(word0, word1):
    first, second = random.normal_pair(word0, word1)
    return jnp.stack([first, second, random.normal_score(word0), random.normal_score(word1)])


def _gaussians(words: Words) -> np.ndarray:
    """The normals of a pair, then the scores of the two words; one row each."""
    return np.asarray(_normals(*words))


# ----------------------------------------------------------------------------- the cipher itself


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_known_answers_with_13_rounds(counter, key, expected):
    # kat_vectors of Random123; 13 is no multiple of four, so the last injection of the key must be left out
    x0, x1, high, low = (np.array([value], np.uint32) for value in (*counter, *key))
    got = random.threefry2x32(x0, x1, StreamKey(high, low), n_rounds=13)
    assert (int(got[0][0]), int(got[1][0])) == expected


def test_the_words_tested_here_are_those_of_the_package():
    address = Address(path=np.arange(8) << 29, step=random.MAX_STEPS - 1, slot=77, seed=2**40 + 5, stream=Stream.REGIME)
    key = random.stream_key(2**40 + 5, Stream.REGIME)
    expected = random.bits(key, jnp.asarray(address.path, jnp.uint32), jnp.int32(address.step), 77)
    np.testing.assert_array_equal(threefry(address), expected)


# ----------------------------------------------------------------------------- marginal laws on 10^7 draws

SERIES = ("uniform of word 0", "uniform of word 1", "pair, first", "pair, second", "score of word 0", "score of word 1")
THRESHOLDS = (3.0, 4.0, 5.0)


class Sample(NamedTuple):
    """What is kept of the large sample; the first axis is `SERIES`, or its last four where only normals count."""

    n: int
    cells: np.ndarray
    polynomials: np.ndarray
    above: np.ndarray
    below: np.ndarray
    outside: np.ndarray
    extreme: np.ndarray
    largest_radius: float


@jax.jit
def _uniforms(word0, word1):
    return jnp.stack([random.uniform(word0), random.uniform(word1)])


@jax.jit
def _cells(u, z):
    return (jnp.minimum(jnp.concatenate([u, ndtr(z)]), 1.0 - 2.0**-24) * CELLS).astype(jnp.int32)


@jax.jit
def _polynomial_sums(u, z):
    x = 2.0 * u - 1.0
    legendre, hermite = [jnp.ones_like(x), x], [jnp.ones_like(z), z]
    for k in range(1, 6):
        legendre.append(((2 * k + 1) * x * legendre[k] - k * legendre[k - 1]) / (k + 1))
        hermite.append(z * hermite[k] - k * hermite[k - 1])
    norms = [(math.sqrt(2 * k + 1), 1.0 / math.sqrt(math.factorial(k))) for k in range(7)]
    return jnp.stack(
        [
            jnp.concatenate([a * jnp.sum(p, 1, jnp.float64), b * jnp.sum(h, 1, jnp.float64)])
            for (a, b), p, h in zip(norms[1:], legendre[1:], hermite[1:], strict=True)
        ],
        axis=1,
    )


def _beyond(z: np.ndarray) -> tuple[np.ndarray, ...]:
    level, row = np.array(THRESHOLDS, np.float32), np.sort(z, axis=1)
    squared = np.sort(z[0] ** 2 + z[1] ** 2)
    return (
        np.array([x.size - np.searchsorted(x, level, side="right") for x in row]),
        np.array([np.searchsorted(x, -level) for x in row]),
        squared.size - np.searchsorted(squared, level**2, side="right"),
        np.maximum(row[:, -1], -row[:, 0]),
        np.sqrt(squared[-1]),
    )


def _sample(generator: Generator, n_chunks: int) -> Sample:
    cells = np.zeros((len(SERIES), CELLS))
    polynomials, beyond = np.zeros((len(SERIES), 6)), []
    for c in range(n_chunks):
        words = generator(Address(path=_I + c * N, step=11, slot=2, seed=7))
        u, z = _uniforms(*words), _normals(*words)
        polynomials += np.asarray(_polynomial_sums(u, z))
        beyond.append(_beyond(np.asarray(z)))
        cells += [np.bincount(row, minlength=CELLS) for row in np.asarray(_cells(u, z))]
    above, below, outside, extreme, radius = (np.array(x) for x in zip(*beyond, strict=True))
    return Sample(
        n_chunks * N,
        cells,
        polynomials,
        above.sum(axis=0),
        below.sum(axis=0),
        outside.sum(axis=0),
        extreme.max(axis=0),
        float(radius.max()),
    )


@pytest.fixture(scope="module")
def sample() -> Sample:
    return _sample(threefry, N_CHUNKS)


def moments(sample: Sample) -> np.ndarray:
    """Means of the Legendre polynomials of the uniforms and the Hermite polynomials of the normals, degrees 1 to 6."""
    return _p_normal(sample.polynomials / np.sqrt(sample.n))


def cells(sample: Sample) -> np.ndarray:
    """Chi-square and Kolmogorov-Smirnov on 4096 equally likely cells."""
    distance = np.abs(np.cumsum(sample.cells, axis=1) / sample.n - np.arange(1, CELLS + 1) / CELLS).max(axis=1)
    # The largest distance at the cell borders is at most the supremum over all points: the test is conservative.
    return np.concatenate([_p_cells(sample.cells), special.kolmogorov(distance * np.sqrt(sample.n))])


def tails(sample: Sample) -> np.ndarray:
    """Counts beyond 3, 4 and 5 standard deviations on each side, and of pairs outside these radii."""
    level = np.array(THRESHOLDS)
    p = np.concatenate([_p_count(count, sample.n, stats.norm.sf(level)) for count in (sample.above, sample.below)])
    return np.concatenate([p, _p_count(sample.outside, sample.n, np.exp(-0.5 * level**2))])


@pytest.mark.parametrize("check", [moments, cells, tails])
def test_marginal_laws(check, sample):
    assert _alarm(check(sample)) > ALARM


@pytest.mark.parametrize(
    ("check", "generator"), [(moments, _rounds(4)), (cells, _rounds(4)), (cells, linear_hash), (tails, _rounds(3))]
)
def test_marginal_laws_reject(check, generator):
    assert _alarm(check(_sample(generator, 2))) < ALARM


def test_normals_stay_within_their_stated_range(sample):
    # ... and come near it: 10^7 draws of a normal have a maximum of 5.3 +- 0.3, pairs one of 5.7 +- 0.3.
    assert np.all(sample.extreme[2:] <= 5.42) and np.all(sample.extreme > 4.8)
    assert 5.2 < sample.largest_radius < np.sqrt(48.0 * np.log(2.0)) + 1e-5


def test_tail_probabilities_of_the_maps_are_right_to_a_cell():
    # Every word that leads beyond 4.3, so no chance: a score has cells of 2^-25 there and is 1.5 of them short at most,
    # a radius cells of 2^-23, met to the half that a midpoint leaves.
    n = 1 << 16
    level = np.linspace(4.3, 5.41, 38)
    for word in (np.arange(2**31 - n, 2**31), np.arange(2**31, 2**31 + n)):
        score = np.sort(np.abs(np.asarray(jax.jit(random.normal_score)(word.astype(np.uint32)))))
        missing = stats.norm.sf(level) - (n - np.searchsorted(score, level, side="right")) / 2.0**32
        assert np.all(np.abs(missing) < 1.5 * 2.0**-25)
    first, second = jax.jit(random.normal_pair)(np.arange(n, dtype=np.uint32) << 9, np.zeros(n, np.uint32))
    radius = np.sort(np.hypot(np.asarray(first, np.float64), np.asarray(second, np.float64)))
    missing = np.exp(-0.5 * level**2) - (n - np.searchsorted(radius, level, side="right")) / 2.0**23
    assert np.all(np.abs(missing) < 0.6 * 2.0**-23)


# ----------------------------------------------------------------------------- independence along an order


def correlations(generator: Generator, address: Address) -> np.ndarray:
    """Correlations of the normals of an address, and of their squares, with those 0 to 64 addresses further on."""
    z = _gaussians(generator(address))
    z = np.concatenate([z, (z * z - 1.0) * np.float32(np.sqrt(0.5))])
    n = z.shape[1]
    lagged = [z[:, :-lag] @ z[:, lag:].T / np.sqrt(n - lag) for lag in range(1, 65)]
    together = z @ z.T / np.sqrt(n)
    # At lag 0 only the two normals of a pair and the scores of the two words are independent.
    same_block = [together[row, column] for a, b in ((0, 1), (2, 3)) for row in (a, a + 4) for column in (b, b + 4)]
    return _p_normal(np.append(np.ravel(lagged), same_block))


def serial(generator: Generator, address: Address) -> np.ndarray:
    """Chi-square of pairs and triples of successive words, and of the two words of a block, in high and low bits."""
    word0, word1 = generator(address)
    p = []
    for shift in (0, 13, 25):
        field0, field1 = ((word >> np.uint32(shift)).astype(np.int64) & 127 for word in (word0, word1))
        for field in (field0, field1):
            pair = field[: N // 2 * 2].reshape(-1, 2)
            triple = field[: N // 3 * 3].reshape(-1, 3) >> 3
            p.append(_p_cells(np.bincount(pair @ [128, 1], minlength=128**2)))
            p.append(_p_cells(np.bincount(triple @ [256, 16, 1], minlength=16**3)))
        p.append(_p_cells(np.bincount(field0 * 128 + field1, minlength=128**2)))
    return np.concatenate(p)


def lattice(generator: Generator, address: Address) -> np.ndarray:
    r"""Waves that points on a lattice would be in phase with.

    The periodogram of $e^{2\pi iu}$ and, on some of the words, $|\sum_j e^{2\pi i(h_1u_j+h_2u_{j+1}+h_3u_{j+2})}|^2/n$
    for whole $h$ up to 4: exponential for independent uniforms.
    """
    power, n = [], N // 16
    for word in generator(address):
        angle = (word.view(np.int32) * (2.0 * np.pi / 2**32)).astype(np.float32)
        wave = np.cos(angle) + np.complex64(1j) * np.sin(angle)
        power.append(np.abs(np.fft.fft(wave)) ** 2 / N)
        part = wave[: n + 2]
        powers = np.stack([part**h for h in range(5)])
        powers = np.concatenate([powers[:0:-1].conj(), powers])
        first_two = (powers[:, None, :-2] * powers[None, :, 1:-1]).reshape(81, n)
        sums = (first_two @ powers[:, 2:].T).ravel()
        # The middle is h = 0, and h and -h say the same.
        power.append(np.abs(sums[: sums.size // 2]) ** 2 / n)
    return np.exp(-np.concatenate(power))


def dispersion(generator: Generator, address: Address) -> np.ndarray:
    """Variance of block sums of the normals and of their squares, over consecutive and over strided blocks."""
    z = _gaussians(generator(address))
    p = []
    for size in (2, 16, 256, 4096, 65536):
        for block in (z.reshape(4, -1, size).sum(2), z.reshape(4, size, -1).sum(1)):
            n_blocks = block.shape[1]
            p.append(_p_two_sided(stats.chi2(n_blocks), np.sum(block.astype(np.float64) ** 2, 1) / size))
    for size in (256, 4096):
        squares = z * z - 1.0
        for block in (squares.reshape(4, -1, size).sum(2), squares.reshape(4, size, -1).sum(1)):
            # The excess kurtosis of a sum of squares is 12 / size: as many degrees of freedom less.
            dof = block.shape[1] / (1.0 + 6.0 / size)
            p.append(_p_two_sided(stats.chi2(dof), dof * np.mean(block.astype(np.float64) ** 2, 1) / (2.0 * size)))
    return np.concatenate(p)


def bit_balance(generator: Generator, address: Address) -> np.ndarray:
    """Ones in each bit, and changes between the words of a block, neighbouring bits, addresses, halves of the order."""
    word0, word1 = generator(address)
    z = []
    for word in (word0, word1, word0 ^ word1, word0 ^ (word0 << np.uint32(1) | word1 >> np.uint32(31))):
        for bit in (word, word[1:] ^ word[:-1], word[N // 2 :] ^ word[: N // 2]):
            ones = np.array([np.count_nonzero(bit & np.uint32(1 << k)) for k in range(32)])
            z.append((2.0 * ones - bit.size) / np.sqrt(bit.size))
    return _p_normal(np.concatenate(z))


def runs(generator: Generator, address: Address) -> np.ndarray:
    """Number and lengths of the runs of equal bits in the words strung together."""
    p = []
    word0, word1 = (word[: N // 4] for word in generator(address))
    for words in ([word0, word1], [word0 ^ word1]):
        bits = np.unpackbits(np.stack(words, axis=1).astype(">u4").view(np.uint8))
        ends = np.flatnonzero(bits[1:] != bits[:-1])
        lengths = np.bincount(np.minimum(np.diff(ends), 16), minlength=17)[1:]
        expected = lengths.sum() * np.append(0.5 ** np.arange(1, 16), 0.5**15)
        p.append(_p_two_sided(stats.chi2(15), np.sum((lengths - expected) ** 2 / expected)))
        p.append(_p_normal((2.0 * ends.size - bits.size) / np.sqrt(bits.size)))
    return np.concatenate(p)


def birthday_spacings(generator: Generator, address: Address) -> np.ndarray:
    """Equal spacings among 4096 sorted words, for the words as they are and rotated by half: Marsaglia's test."""
    days, n_samples = 4096, N // 4096
    p = []
    for word in generator(address):
        for shown in (word, word << np.uint32(16) | word >> np.uint32(16)):
            spacing = np.sort(np.diff(np.sort(shown.reshape(n_samples, days), axis=1), axis=1), axis=1)
            law = stats.poisson(n_samples * days**3 / 2.0**34)
            equal = np.count_nonzero(spacing[:, 1:] == spacing[:, :-1])
            p.append(min(1.0, 2.0 * min(law.cdf(equal), law.sf(equal - 1))))
    return np.array(p)


def avalanche(generator: Generator, address: Address) -> np.ndarray:
    """Flipping any bit of path, step, slot, seed or stream flips each output bit with probability 1/2.

    A count per input and output bit, and per input bit the law of the number of output bits flipped.
    """
    n = 1 << 12
    # With the odd ones a pair of addresses would be counted from both its ends.
    is_even = np.bitwise_count(_I) % 2 == 0
    base = Address(*(np.broadcast_to(np.asarray(part, np.uint64), N)[is_even][:n] for part in address))
    before = generator(base)
    flipped = []
    for name, width in (("path", 32), ("step", 20), ("slot", 12), ("seed", 64), ("stream", 2)):
        for k in range(width):
            changed = base._replace(**{name: getattr(base, name) ^ np.uint64(1 << k)})
            flipped.append(np.stack([a ^ b for a, b in zip(before, generator(changed), strict=True)], axis=1))
    bits = np.unpackbits(np.array(flipped).view(np.uint8).reshape(len(flipped), n, 8), axis=2)
    z = (2.0 * bits.sum(axis=1, dtype=np.int32) - n) / np.sqrt(n)
    weight = bits.sum(axis=2, dtype=np.uint8)
    edges = np.append(np.arange(23, 42), 64)
    expected = n * np.diff(stats.binom(64, 0.5).cdf(np.insert(edges, 0, -1)))
    count = np.array([np.bincount(np.searchsorted(edges, row), minlength=edges.size) for row in weight])
    chi2 = np.sum((count - expected) ** 2 / expected, axis=1)
    return np.concatenate([_p_normal(z), _p_two_sided(stats.chi2(edges.size - 1), chi2)])


CHECKS: tuple[Check, ...] = (
    correlations,
    serial,
    lattice,
    dispersion,
    bit_balance,
    runs,
    birthday_spacings,
    avalanche,
)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_words_are_independent_along(check, order):
    assert _alarm(check(threefry, ORDERS[order])) > ALARM


@pytest.mark.parametrize(
    ("check", "n_rounds"),
    [
        (correlations, 9),
        (serial, 9),
        (lattice, 8),
        (dispersion, 8),
        (bit_balance, 9),
        (runs, 5),
        (birthday_spacings, 6),
        (avalanche, 9),
    ],
)
def test_checks_reject_too_few_rounds(check, n_rounds):
    assert _alarm(check(_rounds(n_rounds), ORDERS["paths"])) < ALARM


# All but the runs: a linear sequence has about the right number of each length.
@pytest.mark.parametrize("order", ["paths", "steps", "seeds"])
@pytest.mark.parametrize("check", [check for check in CHECKS if check is not runs])
def test_checks_reject_a_linear_hash_of_the_address(check, order):
    assert _alarm(check(linear_hash, ORDERS[order])) < ALARM
