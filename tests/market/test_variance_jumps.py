"""Jumps of price and variance: the law of their sums over a step, without Monte Carlo error where it can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from qpo_sim.market import variance_jumps
from qpo_sim.market.variance_jumps import MAX_VARIANCE_JUMPS, VarianceJumps
from qpo_sim.random import Address, Stream, stream_key

F32 = np.float32
MEAN, STD, SIZE, SLOPE = -0.02, 0.05, 0.3, -0.4


def constants_of(expected, **changed):
    """Jumps of one or more assets with these numbers expected of a step of a year."""
    rate = np.atleast_1d(np.asarray(expected, F32))
    numbers = {"mean": MEAN, "std": STD, "variance_mean": SIZE, "leverage": SLOPE} | changed
    leaves = {name: None if x is None else jnp.full(rate.shape, x, jnp.float32) for name, x in numbers.items()}
    return VarianceJumps(intensity=jnp.asarray(rate), **leaves).prepare(1.0)


def probability_above(y, expected):
    """P(sum of exponentials of mean 1 > y), the number of them Poisson."""
    n = np.arange(1, MAX_VARIANCE_JUMPS + 1)
    weight = np.exp(-expected) * expected**n / special.factorial(n)
    return np.sum(weight[:, None] * special.gammaincc(n[:, None], y), axis=0)


@pytest.mark.parametrize("expected", [1e-5, 0.0055, 0.1])
def test_sum_of_the_variance_is_the_quantile_of_its_law(expected):
    # The count decreases in u and the sum does so between its steps, so that the law is compared jump by jump.
    constants = constants_of(expected)
    tails = np.asarray(constants.tails[:, 0, 0], np.float64)
    edges = np.append(tails, 0.0)
    for n in range(1, MAX_VARIANCE_JUMPS + 1):
        width = edges[n - 1] - edges[n]
        if width < 2.0**-20:
            continue
        # On the cells of the uniform: k + 1/2 over 2^31.
        place = np.geomspace(1e-4, 1.0 - 1e-4, 2000) if n > 1 else np.linspace(0.001, 0.999, 2000)
        u = (np.floor((edges[n] + width * place) * 2.0**31) + 0.5) * 2.0**-31
        assert constants.intervals is not None
        made = variance_jumps._sum_of_exponentials(
            jnp.asarray(u[None], jnp.float32), constants.tails[:, 0, :, None], constants.intervals
        )
        r = special.gammaincc(n, np.asarray(made[0], np.float64))
        error = np.abs(r * width + edges[n] - u)
        # Polynomials, and float32 roundings of u and of the sum; the law beyond 4 jumps is less than 1e-7.
        allowed = {1: 0.0, 2: 4e-7, 3: 4e-5, 4: 4e-7}[n]
        assert error.max() < width * (allowed + 4e-7) + 2.0**-24 * edges[n - 1], n


def test_gamma_quantile_against_scipy():
    x = np.concatenate([np.geomspace(1e-6, 1.0, 3000), np.linspace(1.0, 13.9, 3000)])
    is_, not_ = np.ones(x.size, bool), np.zeros(x.size, bool)
    flags = {1: (not_, not_, not_), 2: (is_, not_, not_), 3: (is_, is_, not_), 4: (is_, is_, is_)}
    for n, allowed in {1: 2e-7, 2: 6e-7, 3: 4e-5, 4: 6e-7}.items():
        y = variance_jumps._gamma_quantile(jnp.asarray(x, jnp.float32), *map(jnp.asarray, flags[n]))
        made = special.gammaincc(n, np.asarray(y, np.float64))
        assert np.max(np.abs(made - np.exp(-x.astype(F32).astype(np.float64)))) < allowed, n


@pytest.mark.slow
@pytest.mark.parametrize("n_assets", [3, 33])
def test_moments_of_the_jumps_of_a_step(n_assets):
    # 5 standard errors on the means of four quantities per asset: a false alarm in 10^4 runs at 33 assets.
    expected, n_paths = 0.1, 1 << 18
    constants = constants_of(np.full(n_assets, expected))
    like = (jnp.ones(2),) * n_assets if n_assets <= 32 else jnp.ones((n_assets, 2))
    path = jnp.arange(n_paths, dtype=jnp.uint32)

    @jax.jit
    def run(constants):
        at = Address(stream_key(5, Stream.VOLATILITY), path, jnp.int32(3), 2)
        return variance_jumps.draw(constants, at, like)

    price, variance = (np.stack(list(map(np.asarray, rows))).astype(np.float64) for rows in run(constants))
    cross = expected * (SIZE * MEAN + 2.0 * SLOPE * SIZE**2) + expected**2 * SIZE * (MEAN + SLOPE * SIZE)
    jump = (MEAN + SLOPE * SIZE) ** 2 + STD**2 + (SLOPE * SIZE) ** 2
    square = expected * jump + (expected * (MEAN + SLOPE * SIZE)) ** 2
    wanted = {
        "P(N > 0)": (variance > 0.0, -np.expm1(-expected)),
        "variance": (variance, expected * SIZE),
        "product": (price * variance, cross),
        "square": (price**2, square),
    }
    for name, (sample, value) in wanted.items():
        error = np.std(sample, axis=1) / np.sqrt(n_paths)
        assert np.all(np.abs(np.mean(sample, axis=1) - value) < 5.0 * error), name
    assert np.all((variance > 0.0) == (price != 0.0))
    # Neighbours share slots; their draws do not.
    correlation = np.asarray(np.corrcoef(price))[np.triu_indices(n_assets, 1)]
    assert np.max(np.abs(np.asarray(correlation))) < 6.0 / np.sqrt(n_paths)


def test_no_intensity_makes_no_jumps():
    constants = constants_of([0.0, 0.05])
    path = jnp.arange(1 << 14, dtype=jnp.uint32)
    at = Address(stream_key(6, Stream.VOLATILITY), path, jnp.int32(0), 0)
    made = variance_jumps.draw(constants, at, (jnp.ones(2),) * 2)
    assert made.variance is not None
    assert not np.any(made.price[0]) and not np.any(made.variance[0])
    assert np.all(np.isfinite(made.price[1])) and np.any(made.variance[1])


def test_price_jumps_alone():
    expected, n_paths = 0.5, 1 << 18
    constants = constants_of([expected, expected], variance_mean=None, leverage=None)
    at = Address(stream_key(7, Stream.VOLATILITY), jnp.arange(n_paths, dtype=jnp.uint32), jnp.int32(0), 0)
    made = variance_jumps.draw(constants, at, (jnp.ones(2),) * 2)
    assert made.variance is None
    # 5 standard errors on 4 means: a false alarm in 400 000 runs.
    for row in made.price:
        x = np.exp(np.asarray(row, np.float64))
        mean = np.exp(expected * np.expm1(MEAN + 0.5 * STD**2))
        assert abs(np.mean(x) - mean) < 5.0 * np.std(x) / np.sqrt(n_paths)
        moved = np.mean(np.asarray(row) != 0.0)
        p = -np.expm1(-expected)
        assert abs(moved - p) < 5.0 * np.sqrt(p * (1 - p) / n_paths)
