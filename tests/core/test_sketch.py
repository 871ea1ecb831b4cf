"""Tail measures of a stream against an exact sort of all losses: the fine histogram, and the worst paths kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpo_sim.compute import histogram, partial
from qpo_sim.compute.partial import PATH_BLOCK
from qpo_sim.risk import summary

N = 1_000_000
LEVELS = (0.95, 0.99, 0.999)
# The widest bin relative to its loss; the quantile and the bin's mean lie in the same bin.
WIDTH = 2.0 ** (6 - partial.FINE_BITS)


def _mixture(rng, n):
    """Normal losses, and accounts liquidated at three prices: 3 % lose the same to the last bit, 0.6 % more, 0.2 %."""
    loss, u = 0.05 * rng.standard_normal(n), rng.random(n)
    for below, atom in ((0.038, 0.31), (0.008, 0.47), (0.002, 0.4702)):
        loss[u < below] = atom
    return loss


LAWS = {
    "t(3)": lambda rng, n: 0.03 * rng.standard_t(3, n),
    "normal": lambda rng, n: 0.1 * rng.standard_normal(n),
    "normal, a thousandth of it": lambda rng, n: 1e-4 * rng.standard_normal(n),
    "lognormal": lambda rng, n: 0.2 * np.exp(rng.standard_normal(n)) - 0.25,
    "skewed, bounded": lambda rng, n: 1.2 * rng.beta(0.7, 4.0, n) - 0.2,
    "mixture with atoms": _mixture,
    "always a gain": lambda rng, n: -rng.gamma(2.0, 0.05, n) - 0.01,
}


def _streamed(equity, keep):
    """Partial result of a stream of paths that came in parts; only the equity at the end matters."""
    seen = partial.zero(keep)
    step = 37 * PATH_BLOCK
    for first in range(0, equity.size, step):
        own = equity[None, first : first + step]
        n = own.shape[1]
        part = dict(
            equity=own, max_drawdown=np.maximum(np.float32(1.0) - own[0], 0.0), accounts=None, components=None,
            hit_probability=np.zeros((1, 0, n), np.float32), is_liquidated=np.zeros((0, n), bool),
            is_finite=np.ones(n, bool),
        )  # fmt: skip
        seen = partial.add(seen, [part], first, horizons=(0,))
    return seen


def _sorted(equity):
    return np.sort(np.float32(1.0) - equity).astype(np.float64)[::-1]


def _exact(worst_first, level):
    """VaR and CVaR by definition; (1 - level) n is a whole number here."""
    k = round((1.0 - level) * worst_first.size)
    return worst_first[k], worst_first[:k].mean()


@pytest.fixture(scope="module", params=LAWS)
def sample(request):
    equity = (1.0 - LAWS[request.param](np.random.default_rng(11), N)).astype(np.float32)
    return equity, _sorted(equity)


def test_histogram_against_an_exact_sort(sample):
    equity, worst_first = sample
    seen = _streamed(equity, 10)
    for level in LEVELS:
        var, cvar = _exact(worst_first, level)
        got_var, got_cvar = (e.value for e in summary.tail_measures(seen, 0, level))
        assert got_var == pytest.approx(var, rel=5e-4), level
        assert got_cvar == pytest.approx(cvar, rel=1e-5), level


def test_worst_paths_are_as_good_as_a_sort(sample):
    equity, worst_first = sample
    seen = _streamed(equity, partial.tail_size(N, min(LEVELS)))
    for level in LEVELS:
        var, cvar = _exact(worst_first, level)
        got_var, got_cvar = (e.value for e in summary.tail_measures(seen, 0, level))
        assert got_var == var, level
        assert got_cvar == pytest.approx(cvar, rel=1e-13), level


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-5, 1e3), st.integers(1, 40))
def test_value_at_risk_of_any_law_is_off_by_less_than_a_bin(seed, scale, n_atoms):
    # Atoms at random distances, many of them within a bin: the law that a sketch likes least.
    rng = np.random.default_rng(seed)
    atoms = scale * (1.0 + 10.0 ** rng.uniform(-5.0, 0.0, n_atoms)) * rng.choice([-1.0, 1.0], n_atoms)
    loss = rng.choice(atoms, 2000).astype(np.float32)
    sketch = histogram.zero(1, partial.FINE_BITS, with_sums=True)
    histogram.count(sketch, [loss])
    points = summary._from_histogram(sketch, 0, 2000.0)
    worst_first = np.sort(loss).astype(np.float64)[::-1]
    for level in LEVELS:
        var, cvar = _exact(worst_first, level)
        assert summary.tail.value_at_risk(points, level=level).value == pytest.approx(var, rel=WIDTH)
        got = summary.tail.conditional_value_at_risk(points, level=level).value
        # What is cut at the level is at most one bin.
        assert got == pytest.approx(cvar, abs=WIDTH * np.abs(worst_first).max())


def test_fan_of_quantiles_against_an_exact_sort(sample):
    equity, worst_first = sample
    seen = _streamed(equity, 10)
    profit = -worst_first
    for p in (0.05, 0.25, 0.5, 0.75, 0.95):
        exact = np.quantile(profit, p, method="inverted_cdf")
        # To a bin everywhere; a density that is smooth across the bin gains much from the interpolation.
        assert seen.equity.quantile(0, p) == pytest.approx(exact, rel=2.0 ** (6 - partial.COARSE_BITS), abs=1e-6)
