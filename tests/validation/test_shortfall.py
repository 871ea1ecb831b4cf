"""ES backtests: hand-computed statistics, published critical values, size and power."""

import numpy as np
import pytest
from scipy import integrate, stats

from qpo_sim.errors import InputError
from qpo_sim.validation import shortfall as sf

LEVEL = 0.975


def _student(dof):
    """VaR and ES of Student's t at LEVEL."""
    var = stats.t.ppf(LEVEL, dof)
    return var, stats.t.pdf(var, dof) / (1.0 - LEVEL) * (dof + var**2) / (dof - 1.0)


NORMAL = stats.norm.ppf(LEVEL), stats.norm.pdf(stats.norm.ppf(LEVEL)) / (1.0 - LEVEL)


def _constant(pair, n):
    return np.full(n, pair[0]), np.full(n, pair[1])


def _heavy_sampler(n_days, dof):
    return lambda generator, n_records: generator.standard_t(dof, (n_records, n_days))


def test_statistics_by_hand():
    loss = np.array([1.0, 4.0, -2.0, 6.0])
    var, es = np.array([2.0, 3.0, 2.0, 4.0]), np.array([3.0, 4.0, 3.0, 4.0])
    assert sf.z1(loss, var, es) == pytest.approx(1.0 - (1.0 + 1.5) / 2.0)
    assert sf.z2(loss, var, es, level=0.9) == pytest.approx(1.0 - 2.5 / 0.4)
    assert np.isnan(sf.z1(-(loss**2), var, es))
    assert sf.z2(-(loss**2), var, es, level=0.9) == 1.0


def test_third_statistic_of_a_forecast_law_on_equal_weights():
    """Against the definition: the expected mean of the m worst of T draws, by the law of each order statistic."""
    generator = np.random.default_rng(1)
    sample, n_days = generator.standard_t(4, (1, 6)).repeat(10, axis=0), 10
    rank = generator.random(n_days)
    ordered = np.sort(sample[0])
    top = np.sort(rank)[-2:]
    seen = np.mean([ordered[int(np.ceil(u * 6)) - 1] for u in top])
    edges = np.arange(7) / 6
    expected = np.mean([ordered @ np.diff(stats.beta.cdf(edges, k, n_days + 1 - k)) for k in (9, 10)])
    assert sf.z3(rank, sample, level=0.8) == pytest.approx(1.0 - seen / expected, rel=1e-9)


def test_third_statistic_has_mean_zero():
    """4 standard errors: fails by chance with probability 6e-5."""
    generator = np.random.default_rng(2)
    sample = np.sort(generator.normal(size=(50, 400)), axis=1)
    drawn = sf.z3(generator.random((4000, 50)), sample, level=0.95)
    assert abs(drawn.mean()) < 4.0 * drawn.std() / 4000**0.5


def test_published_critical_values():
    """Acerbi & Szekely, table 3: 250 days at 97.5 %, printed to 0.1 or 0.01.

    Over 40 000 records the standard error of the 5 % quantile is 0.004, of the 0.01 % quantile of thin tails 0.05.
    """
    generator = np.random.default_rng(3)
    thin = sf.z2(generator.normal(size=(40_000, 250)), *NORMAL, level=LEVEL)
    assert np.quantile(thin, 0.05) == pytest.approx(sf.Z2_CRITICAL[0.05], abs=0.02)
    assert np.quantile(thin, 0.0001) == pytest.approx(sf.Z2_CRITICAL[0.0001], abs=0.25)
    for dof, printed in [(5, -0.74), (3, -0.82)]:
        heavy = sf.z2(generator.standard_t(dof, (40_000, 250)), *_student(dof), level=LEVEL)
        assert np.quantile(heavy, 0.05) == pytest.approx(printed, abs=0.025)


def _p_of(test, dof=5.0, scale=1.0, n_days=250):
    var, es = _constant(_student(5), n_days)

    def p_of(generator):
        loss = scale * generator.standard_t(dof, n_days)
        if test == "z3":
            law = np.broadcast_to(generator.standard_t(5, 1000), (n_days, 1000))
        else:
            law = _heavy_sampler(n_days, 5)
        seed = int(generator.integers(2**31))
        return sf.acerbi_szekely(loss, var, es, level=LEVEL, law=law, test=test, n_draws=199, seed=seed).p_value

    return p_of


@pytest.mark.parametrize("test", ["z1", "z2"])
def test_p_values_are_uniform(test, assert_uniform):
    assert_uniform(_p_of(test))


def test_size_of_the_third(rejections, assert_size):
    assert_size(rejections(_p_of("z3"), n=200), n=200)


@pytest.mark.parametrize("test", ["z1", "z2", "z3"])
def test_power_against_heavier_tails(test, rejections):
    """The forecast is t5 where losses are t2, or half as large again.

    Z1 does not look at the number of exceedances and Z3 rests on the six worst days, whose mean varies by a third.
    """
    assert rejections(_p_of(test, dof=2.0, n_days=500), n=60) > 0.5
    if test != "z1":
        assert rejections(_p_of(test, scale=1.5), n=60) > {"z2": 0.8, "z3": 0.5}[test]


def test_draws_and_samplers_agree():
    generator = np.random.default_rng(4)
    var, es = _constant(NORMAL, 100)
    loss = 1.3 * generator.normal(size=100)
    law = generator.normal(size=(100, 5000))
    by_draws = sf.acerbi_szekely(loss, var, es, level=LEVEL, law=law, seed=1)
    by_sampler = sf.acerbi_szekely(loss, var, es, level=LEVEL, law=lambda g, n: g.normal(size=(n, 100)), seed=1)
    assert by_draws.statistic == by_sampler.statistic
    # Two shares of 2 000 draws: 5 standard errors.
    assert abs(by_draws.p_value - by_sampler.p_value) < 5.0 * np.sqrt(2 * 0.25 / 2000)
    again = sf.acerbi_szekely(loss, var, es, level=LEVEL, law=law, seed=1)
    assert again.p_value == by_draws.p_value


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_statistics_do_not_depend_on_the_unit(unit):
    loss = np.random.default_rng(5).normal(size=500)
    var, es = _constant((1.0, 1.6), 500)
    for test in (sf.z1, lambda *series: sf.z2(*series, level=0.84)):
        assert test(unit * loss, unit * var, unit * es) == pytest.approx(test(loss, var, es))
    first = sf.mcneil_frey(loss, var, es, seed=1)
    second = sf.mcneil_frey(unit * loss, unit * var, unit * es, seed=1)
    assert second.statistic == pytest.approx(first.statistic)
    assert second.p_value == first.p_value


def test_residual_test_size_and_power(rejections, assert_size):
    """50 exceedances of a normal law; the forecast's ES is right, or half of the excess beyond VaR short."""
    var, es = stats.norm.ppf(0.95), stats.norm.pdf(stats.norm.ppf(0.95)) / 0.05

    def p_of(generator, short=0.0):
        low = np.full(1000, es - short * (es - var))
        seed = int(generator.integers(2**31))
        return sf.mcneil_frey(generator.normal(size=1000), np.full(1000, var), low, n_draws=299, seed=seed).p_value

    assert_size(rejections(p_of))
    assert rejections(lambda generator: p_of(generator, 0.5), n=100) > 0.8


def test_residual_test_without_enough_exceedances():
    done = sf.mcneil_frey(np.zeros(10), np.ones(10), np.full(10, 2.0), seed=1)
    assert done.n_exceedances == 0 and np.isnan(done.p_value)
    one = sf.mcneil_frey(np.array([0.0, 3.0]), np.ones(2), np.full(2, 2.0), seed=1)
    assert one.n_exceedances == 1 and one.mean == pytest.approx(0.5) and np.isnan(one.p_value)


def test_cumulative_violations_have_the_stated_moments():
    mean = integrate.quad(lambda u: (u - LEVEL) / 0.025, LEVEL, 1)[0]
    second = integrate.quad(lambda u: ((u - LEVEL) / 0.025) ** 2, LEVEL, 1)[0]
    assert mean == pytest.approx(0.025 / 2)
    assert second - mean**2 == pytest.approx(0.025 * (1 / 3 - 0.025 / 4))
    rank = np.array([0.5, 0.95, 1.0, 0.9])
    done = sf.cumulative_violations(rank, level=0.9, n_lags=1)
    assert done.mean == pytest.approx((0.5 + 1.0) / 4)
    assert done.statistic == pytest.approx((0.375 - 0.05) / np.sqrt(0.1 * (1 / 3 - 0.025) / 4))


def test_cumulative_violations_size_and_power(rejections, assert_size):
    def p_of(generator, scale=1.0):
        return sf.cumulative_violations(stats.norm.cdf(scale * generator.normal(size=1000)), level=0.95).p_value

    assert_size(rejections(p_of))
    assert rejections(lambda generator: p_of(generator, 1.3), n=100) > 0.9


def test_cumulative_violations_see_dependence(rejections, assert_size):
    def p_of(generator, stay=0.0):
        rank = generator.random(1000)
        for t in np.flatnonzero(generator.random(999) < stay) + 1:
            rank[t] = rank[t - 1]
        return sf.cumulative_violations(rank, level=0.95).p_box_pierce

    assert_size(rejections(p_of), high=0.08)
    assert rejections(lambda generator: p_of(generator, 0.4), n=100) > 0.9


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"expected_shortfall": np.zeros(5)}, "expected_shortfall at 0"),
        ({"expected_shortfall": np.full(5, 0.5)}, "at least VaR"),
        ({"loss": np.zeros(4)}, "lengths differ"),
        ({"test": "z4"}, "choose from z1"),
        ({"test": "z3", "law": lambda generator, n: None}, "needs draws"),
        ({"law": np.zeros((4, 10))}, "4 rows for 5 days"),
        ({"law": lambda generator, n: np.zeros((n, 4))}, "law drew the shape"),
        ({"level": 0.0}, "confidence level"),
    ],
)
def test_bad_input_is_named(change, word):
    good = {"loss": np.zeros(5), "value_at_risk": np.ones(5), "expected_shortfall": np.full(5, 2.0)}
    good |= {"level": 0.9, "law": np.zeros((5, 10)), "seed": 1}
    with pytest.raises(InputError, match=word):
        sf.acerbi_szekely(**(good | change))
