"""How often a test rejects, with the band that chance allows."""

import numpy as np
import pytest
from scipy import stats


@pytest.fixture(scope="session")
def rejections():
    """`rejections(p_of, n, size)`: share of `n` simulated records on which the p-value is at most `size`."""

    def rate(p_of, n=400, size=0.05, seed=20):
        p = np.array([p_of(np.random.default_rng([seed, i])) for i in range(n)])
        return float(np.mean(p[~np.isnan(p)] <= size))

    return rate


@pytest.fixture(scope="session")
def assert_size():
    """The rate of rejection is the nominal one; by chance it fails with probability 6e-5 (4 standard errors)."""

    def check(rate, n=400, size=0.05, low=None, high=None):
        band = 4.0 * np.sqrt(size * (1.0 - size) / n)
        low, high = size if low is None else low, size if high is None else high
        assert low - band <= rate <= high + band

    return check


@pytest.fixture(scope="session")
def assert_uniform():
    """p-values are uniform; by chance it fails with probability 1e-4 (Kolmogorov-Smirnov)."""

    def check(p_of, n=400, seed=30):
        p = np.array([p_of(np.random.default_rng([seed, i])) for i in range(n)])
        assert stats.kstest(p, "uniform").pvalue > 1e-4

    return check
