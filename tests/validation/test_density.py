"""Tests of probability integral transforms: the reference sequence, scipy, size and power."""

import numpy as np
import pytest
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.validation import calibration_tests as ct


def test_reference_sequence(cases):
    case = cases("models")["C20"]
    i = np.arange(1, case["inputs"]["n"] + 1)
    rank = (((i - 0.5) / i.size) ** case["inputs"]["power"])[np.argsort(np.sin(12.9898 * i))]
    want, near = case["expected"], {"abs": case["tolerance"]["abs"]}
    ks, berkowitz = ct.kolmogorov_smirnov(rank), ct.berkowitz(rank)
    assert ks.statistic == pytest.approx(want["ks_stat"], **near)
    assert ks.p_value == pytest.approx(want["ks_pvalue"], **near)
    assert ct.cramer_von_mises(rank).statistic == pytest.approx(want["cramer_von_mises"], **near)
    assert berkowitz.statistic == pytest.approx(want["berkowitz_LR3"], **near)
    assert berkowitz.p_value == pytest.approx(want["berkowitz_p"], **near)


def test_anderson_darling_against_published_quantiles():
    """Limit law: 2.492 at 5 %, 3.878 at 1 % (Stephens 1974), 1.933 at 10 %."""
    for statistic, p in [(1.933, 0.10), (2.492, 0.05), (3.878, 0.01)]:
        assert 1.0 - ct._anderson_darling_limit(statistic) == pytest.approx(p, abs=2e-4)


def test_anderson_darling_is_the_weighted_distance():
    u = np.sort(np.random.default_rng(1).random(40))
    edges = np.concatenate([[0.0], u, [1.0]])
    total = 0.0
    for k in range(41):
        # Integral of (k/n - x)^2 / (x (1-x)) over a cell where the distribution function is k/n.
        a, b, c = edges[k], edges[k + 1], k / 40
        inner = c**2 * (np.log(b / a) if k else 0.0) - (1 - c) ** 2 * (np.log((1 - b) / (1 - a)) if k < 40 else 0.0)
        total += inner - (b - a)
    assert ct.anderson_darling(u).statistic == pytest.approx(40 * total)


@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("test", [ct.kolmogorov_smirnov, ct.cramer_von_mises, ct.anderson_darling])
def test_distances_have_uniform_p_values(test, n, assert_uniform):
    assert_uniform(lambda generator: test(generator.random(n)).p_value, n=1000)


@pytest.mark.parametrize("tests", ["joint", "independence"])
def test_berkowitz_size(tests, rejections, assert_size):
    assert_size(rejections(lambda generator: ct.berkowitz(generator.random(500), tests=tests).p_value))


def test_berkowitz_tail_size(rejections, assert_size):
    assert_size(rejections(lambda generator: ct.berkowitz_tail(generator.random(1000), level=0.9).p_value))


def _autoregressive(generator, n=500, rho=0.25):
    z = generator.normal(size=n)
    for t in range(1, n):
        z[t] = rho * z[t - 1] + np.sqrt(1 - rho**2) * z[t]
    return stats.norm.cdf(z)


POWER = {
    "wide": (ct.berkowitz, lambda g: stats.norm.cdf(1.2 * g.normal(size=500))),
    "shifted": (ct.berkowitz, lambda g: stats.norm.cdf(0.2 + g.normal(size=500))),
    "dependent": (ct.berkowitz, _autoregressive),
    "dependent alone": (lambda u: ct.berkowitz(u, tests="independence"), _autoregressive),
    "tail": (lambda u: ct.berkowitz_tail(u, level=0.9), lambda g: stats.norm.cdf(1.3 * g.normal(size=1000))),
    "anderson-darling": (ct.anderson_darling, lambda g: stats.norm.cdf(1.3 * g.normal(size=500))),
    "shifted for ks": (ct.kolmogorov_smirnov, lambda g: stats.norm.cdf(0.25 + g.normal(size=500))),
}


@pytest.mark.parametrize("name", POWER)
def test_power(name, rejections):
    test, draw = POWER[name]
    assert rejections(lambda generator: test(draw(generator)).p_value, n=100) > 0.85


def test_berkowitz_reads_the_kind_of_error():
    generator = np.random.default_rng(2)
    done = ct.berkowitz(stats.norm.cdf(0.3 + 1.5 * generator.normal(size=20_000)))
    # Standard errors 0.011, 0.023 and 0.007; 5 of them.
    assert done.mean == pytest.approx(0.3, abs=0.055)
    assert done.variance == pytest.approx(2.25, abs=0.12)
    assert done.autocorrelation == pytest.approx(0.0, abs=0.036)


def test_tail_test_looks_at_the_tail_only():
    rank = np.random.default_rng(3).random(1000)
    moved = np.where(rank < 0.9, 0.9 * (rank / 0.9) ** 3, rank)
    assert ct.berkowitz_tail(moved, level=0.9)[:5] == ct.berkowitz_tail(rank, level=0.9)[:5]


@pytest.mark.parametrize("n_draws", [1, 9, 200])
def test_pit_is_uniform_for_any_number_of_draws(n_draws):
    """KS at 1e-4 on 3 000 days."""
    generator = np.random.default_rng(n_draws)
    rank = ct.pit(generator.normal(size=3000), generator.normal(size=(3000, n_draws)), seed=1)
    assert stats.kstest(rank, "uniform").pvalue > 1e-4


def test_pit_is_uniform_with_atoms():
    generator = np.random.default_rng(4)
    rank = ct.pit(generator.poisson(1.0, 3000), generator.poisson(1.0, (3000, 50)), seed=1)
    assert stats.kstest(rank, "uniform").pvalue > 1e-4
    assert 0.0 < rank.min() and rank.max() < 1.0


def test_pit_sees_only_ranks():
    generator = np.random.default_rng(5)
    y, sample = generator.normal(size=50), generator.normal(size=(50, 20))
    np.testing.assert_array_equal(ct.pit(np.exp(y), np.exp(sample), seed=3), ct.pit(y, sample, seed=3))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ct.kolmogorov_smirnov(np.array([0.5, 1.1])), "rank at 1 is 1.1"),
        (lambda: ct.anderson_darling(np.array([0.5, 1.0])), "strictly"),
        (lambda: ct.berkowitz(np.array([0.1, 0.2, 0.3])), "at least 4"),
        (lambda: ct.berkowitz(np.full(10, 0.5)), "values that differ"),
        (lambda: ct.berkowitz(np.linspace(0.1, 0.9, 9), tests="all"), "choose joint"),
        (lambda: ct.berkowitz_tail(np.array([0.1, 0.95]), level=0.9), "at least 2"),
        (lambda: ct.pit(np.zeros(2), np.zeros((3, 4)), seed=1), "lengths differ"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
