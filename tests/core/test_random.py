"""Addressed random numbers: known answers, marginal laws, independence across every part of an address."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qpo_sim import random
from qpo_sim.random import Stream, StreamKey

N = 1 << 17


def _draws(seed: int, stream: Stream, path, step: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
    key = random.stream_keys(seed)[stream]
    words = random.bits(key, jnp.asarray(path, jnp.uint32), jnp.asarray(step, jnp.int32), slot)
    return np.asarray(words[0]), np.asarray(words[1])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
@pytest.mark.parametrize("xp", [np, jnp])
def test_threefry_known_answers(counter, key, expected, xp):
    # kat_vectors of Random123, threefry2x32 with 20 rounds
    def word(value):
        return xp.asarray(np.array([value], np.uint32))

    got = random.threefry2x32(word(counter[0]), word(counter[1]), StreamKey(np.uint32(key[0]), np.uint32(key[1])))
    assert (int(got[0][0]), int(got[1][0])) == expected


def test_uniform_stays_inside_the_open_interval_and_is_centred_in_its_cell():
    edge = jnp.asarray([0, 1, 511, 512, 2**31, 2**32 - 512, 2**32 - 1], jnp.uint32)
    u = np.asarray(random.uniform(edge), np.float64)
    assert u.dtype == np.float64 and np.all((u > 0.0) & (u < 1.0))
    expected = (np.asarray(edge, np.uint64) >> np.uint64(9)).astype(np.float64) * 2.0**-23 + 2.0**-24
    np.testing.assert_array_equal(u, expected)


def test_uniform_is_uniform():
    # Kolmogorov-Smirnov at 1e-5 each, four addresses: false alarm 4e-5.
    for stream, step, slot in (
        (Stream.REGIME, 0, 0),
        (Stream.SHOCK, 29, 4),
        (Stream.LIQUIDATION, 719, 1),
        (Stream.START, 0, 0),
    ):
        u = np.asarray(random.uniform(jnp.asarray(_draws(3, stream, np.arange(N), step, slot)[0])), np.float64)
        assert stats.kstest(u, "uniform").pvalue > 1e-5


def test_normal_score_is_monotone_symmetric_bounded_and_exact():
    step = 2**14 + 1  # odd, so that all low bits are visited
    word = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    ordered = word[np.argsort(word.astype(np.uint32).view(np.int32), kind="stable")]
    z = np.asarray(random.normal_score(jnp.asarray(ordered)), np.float64)
    assert np.all(np.diff(z) >= -4e-7 * np.abs(z[1:]))
    p = (ordered.view(np.int32).astype(np.float64) + 0.5 + 2.0**31) / 2.0**32
    # Scores stand for the middle of one of 2^24 cells.
    tolerance = 2.0**-24 / stats.norm.pdf(z) + 3e-5
    inner = np.abs(z) < 5.0
    assert np.all(np.abs(z - stats.norm.ppf(p))[inner] < tolerance[inner])
    ends = np.asarray(random.normal_score(jnp.asarray([2**31, 2**31 - 1], jnp.uint32)), np.float64)
    assert np.all(np.isfinite(ends)) and 5.3 < -ends[0] <= 5.42 and 5.3 < ends[1] <= 5.42


def test_normal_score_tails_reach_the_mixing_cut():
    # The 1e-5 quantile of the score decides where the mixing variable is cut: relative accuracy there matters.
    p = np.geomspace(2e-7, 1e-2, 200)
    word = np.floor(p * 2.0**32 - 2.0**31).astype(np.int64).astype(np.int32).view(np.uint32)
    z = np.asarray(random.normal_score(jnp.asarray(word)), np.float64)
    # A 24-bit uniform near one end has spacing 2^-24: the score is off by at most spacing / (2 density).
    spacing = 2.0**-24
    tolerance = spacing / stats.norm.pdf(stats.norm.ppf(p)) + 2e-5
    assert np.all(np.abs(z - stats.norm.ppf(p)) < tolerance)


def test_moments_of_normals():
    # Five standard errors on eight moments and four correlations: false alarm below 1e-5.
    words = map(jnp.asarray, _draws(11, Stream.SHOCK, np.arange(N), 5, 2))
    first, second = (np.asarray(z, np.float64) for z in random.normal_pair(*words))
    score = np.asarray(random.normal_score(jnp.asarray(_draws(11, Stream.REGIME, np.arange(N), 5, 0)[1])), np.float64)
    for z in (first, second, score):
        for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
            assert abs(np.mean(z**power) - mean) < 5.0 * np.sqrt(variance / N)
    for a, b in ((first, second), (first**2 - 1, second**2 - 1), (first, score)):
        product = a * b
        assert abs(product.mean()) < 5.0 * product.std() / np.sqrt(N)


def test_box_muller_tails_against_scipy():
    # Counts beyond each threshold are binomial: five standard deviations plus one count, ten counts, < 1e-5.
    pair = random.normal_pair(*map(jnp.asarray, _draws(5, Stream.SHOCK, np.arange(8 * N), 0, 0)))
    for z in (np.asarray(z, np.float64) for z in pair):
        assert stats.kstest(z, "norm").pvalue > 1e-5
        for threshold in (2.0, 3.0, 4.0, -3.0, -4.0):
            p = stats.norm.sf(abs(threshold))
            seen = np.count_nonzero(z > threshold) if threshold > 0 else np.count_nonzero(z < threshold)
            assert abs(seen - 8 * N * p) < 5.0 * np.sqrt(8 * N * p) + 1.0


def test_box_muller_angle_matches_sin_cos():
    word0 = jnp.full(4096, 123456789, jnp.uint32)
    word1 = np.arange(0, 2**32, 2**20, dtype=np.uint64).astype(np.uint32)
    first, second = (np.asarray(z, np.float64) for z in random.normal_pair(word0, jnp.asarray(word1)))
    pair = first + 1j * second
    radius = np.sqrt(-2.0 * np.log(float(random.uniform(word0[:1])[0])))
    np.testing.assert_allclose(np.abs(pair), radius, rtol=5e-7)
    angle = np.angle(pair * np.conj(pair[0]))
    # Every angle of a fine grid appears once: the map from bits to angles is a bijection of the grid.
    gaps = np.diff(np.sort(angle % (2.0 * np.pi)))
    np.testing.assert_allclose(gaps, 2.0 * np.pi / 4096, rtol=2e-3)


@pytest.mark.parametrize(
    "other",
    [
        dict(path=1),
        dict(path=1 << 31),
        dict(step=1),
        dict(step=2**19),
        dict(slot=1),
        dict(stream=Stream.SHOCK),
        dict(seed=1),
        dict(seed=1 << 40),
    ],
    ids=str,
)
def test_neighbouring_addresses_are_uncorrelated(other):
    # Correlations of scores and of squares: |r| < 5 / sqrt(n) (false alarm 6e-7 each, 32 comparisons).
    base = dict(seed=0, stream=Stream.REGIME, path=0, step=0, slot=0)

    def score(address):
        path = np.arange(N, dtype=np.uint32) + np.uint32(address.pop("path"))
        words = _draws(path=path, **address)
        return [np.asarray(random.normal_score(jnp.asarray(w)), np.float64) for w in words]

    for a in score(dict(base)):
        for b in score({**base, **other}):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5.0 / np.sqrt(N)
            assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 5.0 / np.sqrt(N)


def test_no_two_addresses_collide():
    # 64-bit outputs of 2^20 addresses; a chance collision has probability 2^-25.
    path = np.arange(256, dtype=np.uint32)
    seen = []
    for seed in (0, 1, 2**32):
        for stream in Stream:
            for step in (0, 1, 2, 4095, 4096, random.MAX_STEPS - 1):
                for slot in (0, 1, 2, 16, random.MAX_SLOTS - 1):
                    a, b = _draws(seed, stream, path, step, slot)
                    seen.append(a.astype(np.uint64) << np.uint64(32) | b)
    words = np.concatenate(seen)
    assert np.unique(words).size == words.size


def test_a_draw_depends_on_its_address_only():
    whole = _draws(9, Stream.SHOCK, np.arange(1000), 7, 3)
    alone = _draws(9, Stream.SHOCK, [17], 7, 3)
    assert whole[0][17] == alone[0][0] and whole[1][17] == alone[1][0]
    jitted = jax.jit(lambda p, t: random.bits(random.stream_keys(9)[Stream.SHOCK], p, t, 3))
    np.testing.assert_array_equal(whole[0], jitted(jnp.arange(1000, dtype=jnp.uint32), jnp.int32(7))[0])


def test_stream_numbers_are_frozen():
    # Part of every address: renumbering would silently change every published run.
    assert {s.name: s.value for s in Stream}.items() >= {"START": 0, "REGIME": 1, "SHOCK": 2, "LIQUIDATION": 3}.items()
