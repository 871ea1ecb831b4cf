"""VaR backtests against published regions, hand-computed likelihoods and their own rate of rejection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.validation import exceedance as ex


def _record(generator, n=1000, p=0.05):
    return generator.random(n) < p


def _clustered(generator, n=1000, p=0.05, stay=0.4):
    """A two-state chain with P(exceedance) = p and P(exceedance | exceedance) = stay."""
    enter = p * (1.0 - stay) / (1.0 - p)
    uniform, hit = generator.random(n), np.zeros(n, dtype=bool)
    hit[0] = uniform[0] < p
    for t in range(1, n):
        hit[t] = uniform[t] < (stay if hit[t - 1] else enter)
    return hit


def test_exceedances_are_strict():
    np.testing.assert_array_equal(ex.exceedances(np.array([1.0, 2.0, 3.0]), 2.0), [False, False, True])
    forecast = np.array([0.0, 3.0, 5.0])
    np.testing.assert_array_equal(ex.exceedances(np.array([1.0, 2.0, 5.0]), forecast), [True, False, False])


def test_kupiec_regions_and_values(cases):
    case = cases("models")["C16"]
    for key, (low, high) in case["expected"]["nonreject_inclusive"].items():
        p, n = (part.split("=")[1] for part in key.split(","))
        kept = [
            x
            for x in range(int(n) + 1)
            if ex.kupiec(x, int(n), level=1.0 - float(p)).statistic < case["inputs"]["critical"]
        ]
        assert kept == list(range(low, high + 1)), key
    want, near = case["expected"], {"abs": case["tolerance"]["abs"]}
    assert ex.kupiec(20, 252, level=0.95).statistic == pytest.approx(want["jpmorgan_20_of_252_p05"], **near)
    assert ex.kupiec(16, 1000, level=0.99).statistic == pytest.approx(want["LR_n1000_x16_p01"], **near)
    assert ex.kupiec(0, 250, level=0.99).statistic == pytest.approx(want["LR_n250_x0_p01"], **near)
    assert ex.kupiec(20, 1000, level=0.99).p_value == pytest.approx(want["pvalue_n1000_x20_p01"], **near)


def test_kupiec_at_both_ends():
    assert ex.kupiec(0, 250, level=0.99).statistic == pytest.approx(-500.0 * np.log(0.99))
    assert ex.kupiec(250, 250, level=0.99).statistic == pytest.approx(-500.0 * np.log(0.01))


@given(n=st.integers(1, 500), share=st.floats(0.0, 1.0), level=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_kupiec_is_a_likelihood_ratio(n, share, level):
    x = round(share * n)
    done = ex.kupiec(x, n, level=level)
    direct = 2.0 * (stats.binom.logpmf(x, n, x / n) - stats.binom.logpmf(x, n, 1.0 - level))
    assert done.statistic == pytest.approx(direct, abs=1e-6 * (1.0 + n))
    assert done.statistic >= 0.0 and 0.0 <= done.p_value <= 1.0
    # Days without an exceedance play the part of exceedances at the other level.
    assert done.statistic == pytest.approx(ex.kupiec(n - x, n, level=1.0 - level).statistic, abs=1e-6)


def test_binomial_is_exact():
    done = ex.exact_binomial(7, 250, level=0.99)
    probability = stats.binom.pmf(np.arange(251), 250, 0.01)
    assert done.p_too_many == pytest.approx(probability[7:].sum())
    assert done.p_too_few == pytest.approx(probability[:8].sum())
    assert done.p_value == pytest.approx(probability[probability <= probability[7] * (1 + 1e-7)].sum())
    assert done.expected == pytest.approx(2.5)


def test_basel_probabilities_and_zones(cases):
    case = cases("models")["C18"]
    for count, want in case["expected"].items():
        light = ex.traffic_light(int(count), case["inputs"]["n"], level=1.0 - case["inputs"]["p"])
        assert light.cumulative_probability == pytest.approx(want, abs=case["tolerance"]["abs"])
    zones = [ex.traffic_light(k).zone for k in range(13)]
    assert zones == ["green"] * 5 + ["yellow"] * 5 + ["red"] * 3


def test_basel_multipliers():
    old = [ex.traffic_light(k, edition="1996").multiplier for k in (0, 4, 5, 6, 7, 8, 9, 10, 40)]
    assert old == [3.0, 3.0, 3.4, 3.5, 3.65, 3.75, 3.85, 4.0, 4.0]
    new = [ex.traffic_light(k).multiplier for k in (0, 4, 5, 6, 7, 8, 9, 10, 40)]
    assert new == [1.5, 1.5, 1.7, 1.76, 1.83, 1.88, 1.92, 2.0, 2.0]
    assert ex.traffic_light(5, 500).multiplier is None


def test_christoffersen_by_hand():
    hit = np.array([0, 0, 1, 1, 0, 1, 0, 0, 0, 1], dtype=bool)
    done = ex.christoffersen(hit, level=0.9)
    np.testing.assert_array_equal(done.transitions, [[3, 3], [2, 1]])
    free = 6 * np.log(0.5) + 2 * np.log(2 / 3) + np.log(1 / 3)
    pooled = 4 * np.log(4 / 9) + 5 * np.log(5 / 9)
    assert done.independence.statistic == pytest.approx(2.0 * (free - pooled))
    assert done.conditional.statistic == pytest.approx(done.unconditional.statistic + done.independence.statistic)
    given_first = ex.christoffersen(hit, level=0.9, condition_on_first=True)
    null = 4 * np.log(0.1) + 5 * np.log(0.9)
    assert given_first.conditional.statistic == pytest.approx(2.0 * (free - null))


@pytest.mark.parametrize("kind", [False, True])
def test_records_of_one_kind_say_nothing_of_dependence(kind):
    done = ex.christoffersen(np.full(100, kind), level=0.99)
    assert done.independence.statistic == 0.0 and done.independence.p_value == 1.0
    assert ex.dynamic_quantile(np.full(100, kind), level=0.99).dof == 1


def test_time_until_first_by_hand():
    hit = np.zeros(50, dtype=bool)
    hit[6] = True
    want = -2.0 * (np.log(0.01) + 6 * np.log(0.99) - np.log(1 / 7) - 6 * np.log(6 / 7))
    assert ex.time_until_first(hit, level=0.99).statistic == pytest.approx(want)
    assert ex.time_until_first(np.zeros(50, dtype=bool), level=0.99).statistic == pytest.approx(-100 * np.log(0.99))


def test_mixed_kupiec_adds_its_parts():
    hit = np.zeros(100, dtype=bool)
    hit[[6, 7, 50]] = True
    parts = [ex.time_until_first(np.arange(100) == wait - 1, level=0.99).statistic for wait in (7, 1, 43)]
    done = ex.mixed_kupiec(hit, level=0.99)
    assert done.statistic == pytest.approx(sum(parts) + ex.kupiec(3, 100, level=0.99).statistic)
    assert done.dof == 4
    assert ex.mixed_kupiec(np.zeros(9, dtype=bool), level=0.99) == ex.kupiec(0, 9, level=0.99)


def test_dynamic_quantile_is_the_wald_statistic():
    generator = np.random.default_rng(5)
    hit, forecast = _record(generator, 600), 1.0 + generator.random(600)
    done = ex.dynamic_quantile(hit, forecast, level=0.95, n_lags=2)
    surprise = hit - 0.05
    design = np.stack([np.ones(598), surprise[1:-1], surprise[:-2], forecast[2:]], axis=1)
    beta = np.linalg.solve(design.T @ design, design.T @ surprise[2:])
    np.testing.assert_allclose(done.coefficients, beta, rtol=1e-9)
    assert done.statistic == pytest.approx(beta @ design.T @ design @ beta / (0.05 * 0.95))
    assert done.dof == 4
    in_cents = ex.dynamic_quantile(hit, 1e9 * forecast, level=0.95, n_lags=2)
    assert in_cents.statistic == pytest.approx(done.statistic) and in_cents.dof == 4


def test_dynamic_quantile_drops_columns_that_repeat_others():
    hit = _record(np.random.default_rng(6), 600)
    plain = ex.dynamic_quantile(hit, level=0.95)
    constant = ex.dynamic_quantile(hit, np.full(600, 3.0), level=0.95)
    assert constant.dof == plain.dof == 5
    assert constant.statistic == pytest.approx(plain.statistic)


def test_weibull_duration_maximises_its_likelihood():
    generator = np.random.default_rng(8)
    hit = _record(generator, 3000, 0.02)
    done = ex.weibull_duration(hit, level=0.98)
    days = np.flatnonzero(hit)
    whole, cut = np.diff(days), np.array([days[0] + 1, 3000 - 1 - days[-1]])

    def log_likelihood(rate, shape):
        law = {"c": shape, "scale": 1.0 / rate}
        return stats.weibull_min.logpdf(whole, **law).sum() + stats.weibull_min.logsf(cut, **law).sum()

    top = log_likelihood(done.rate, done.shape)
    for rate, shape in [(1.001, 1.0), (0.999, 1.0), (1.0, 1.001), (1.0, 0.999)]:
        assert log_likelihood(done.rate * rate, done.shape * shape) < top
    assert done.conditional.statistic == pytest.approx(2.0 * (top - log_likelihood(0.02, 1.0)), abs=1e-6)
    flat = days.size - 1
    assert done.independence.statistic == pytest.approx(
        2.0 * (top - log_likelihood(flat / (whole.sum() + cut.sum()), 1.0)), abs=1e-6
    )
    assert done.n_durations == flat


def test_weibull_duration_needs_three_exceedances():
    hit = np.zeros(100, dtype=bool)
    hit[[5, 50]] = True
    assert np.isnan(ex.weibull_duration(hit, level=0.99).independence.p_value)


def test_quantile_interval_has_its_coverage():
    """Exact coverage is read off the binomial; 2 000 samples agree within 4 standard errors (6e-5)."""
    generator, truth = np.random.default_rng(9), stats.expon.ppf(0.95)
    done = [ex.value_at_risk_interval(generator.exponential(size=300), level=0.95) for _ in range(2000)]
    inside = np.mean([one.low <= truth < one.high for one in done])
    assert done[0].coverage >= 0.95
    assert abs(inside - done[0].coverage) < 4.0 * np.sqrt(0.05 * 0.95 / 2000)
    law = stats.binom(300, 0.95)
    assert law.cdf(done[0].rank_low - 1) <= 0.025 < law.cdf(done[0].rank_low)
    assert law.sf(done[0].rank_high - 1) <= 0.025 < law.sf(done[0].rank_high - 2)


def test_quantile_interval_against_the_density(cases):
    """Half-width / 1.96 is the standard error sqrt(a(1-a)/n)/f of C14; widths of 20 samples agree to 10 %."""
    want = cases("models")["C14"]["expected"]
    laws = {"normal": stats.norm, "t4": stats.t(4), "t3": stats.t(3)}
    generator, n = np.random.default_rng(10), 40_000
    for key, row in want.items():
        name, level = key.split(",a=")
        widths = []
        for _ in range(20):
            done = ex.value_at_risk_interval(laws[name].rvs(size=n, random_state=generator), level=float(level))
            widths.append(done.high - done.low)
        assert np.mean(widths) / (2 * 1.96) * n**0.5 == pytest.approx(row["sd1_VaR"], rel=0.1), key


# The chi-square laws are those of long records. With 1 000 days and 50 exceedances the rates below are near nominal;
# where the law of whole numbers keeps them off, the bound says by how much.
SIZES = {
    "kupiec": (lambda hit: ex.kupiec(int(hit.sum()), hit.size, level=0.95).p_value, 0.05, 0.05),
    "binomial": (lambda hit: ex.exact_binomial(int(hit.sum()), hit.size, level=0.95).p_value, 0.04, 0.05),
    "independence": (lambda hit: ex.christoffersen(hit, level=0.95).independence.p_value, 0.05, 0.08),
    "conditional": (lambda hit: ex.christoffersen(hit, level=0.95).conditional.p_value, 0.05, 0.08),
    "dynamic quantile": (lambda hit: ex.dynamic_quantile(hit, level=0.95).p_value, 0.05, 0.07),
}


@pytest.mark.parametrize("name", SIZES)
def test_size(name, rejections, assert_size):
    p_of, low, high = SIZES[name]
    assert_size(rejections(lambda generator: p_of(_record(generator))), low=low, high=high)


def test_size_of_durations_where_days_are_short(rejections, assert_size):
    def p_of(generator):
        return ex.weibull_duration(_record(generator, 4000, 0.01), level=0.99).independence.p_value

    assert_size(rejections(p_of))


def test_power_against_too_many(rejections):
    def p_of(generator):
        return ex.kupiec(int(_record(generator, 1000, 0.08).sum()), 1000, level=0.95).p_value

    assert rejections(p_of) > 0.9


@pytest.mark.parametrize("name", ["independence", "conditional", "dynamic quantile"])
def test_power_against_clusters(name, rejections):
    assert rejections(lambda generator: SIZES[name][0](_clustered(generator)), n=100) > 0.9


def test_durations_see_clusters(rejections):
    def p_of(generator):
        return ex.weibull_duration(_clustered(generator, stay=0.5), level=0.95).independence.p_value

    assert rejections(p_of, n=100) > 0.9
    assert ex.weibull_duration(_clustered(np.random.default_rng(1), stay=0.5), level=0.95).shape < 1.0


STATISTICS = {
    "conditional coverage": lambda hit: ex.christoffersen(hit, level=0.99).conditional.statistic,
    "mixed": lambda hit: ex.mixed_kupiec(hit, level=0.99).statistic,
    "first": lambda hit: ex.time_until_first(hit, level=0.99).statistic,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_monte_carlo_p_values_are_uniform_in_short_records(name, assert_uniform):
    """250 days at 99 %, where the chi-square law is far off and most statistics are tied."""

    def p_of(generator):
        seed = int(generator.integers(2**31))
        hit = _record(generator, 250, 0.01)
        return ex.monte_carlo_p_value(STATISTICS[name], hit, level=0.99, n_draws=99, seed=seed)

    assert_uniform(p_of)


def test_monte_carlo_p_value_repeats_and_passes_nan_on():
    hit = _record(np.random.default_rng(2), 250, 0.05)
    first, second = (ex.monte_carlo_p_value(STATISTICS["mixed"], hit, level=0.99, n_draws=99, seed=4) for _ in range(2))
    assert first == second
    duration = ex.monte_carlo_p_value(
        lambda h: ex.weibull_duration(h, level=0.99).independence.statistic,
        np.zeros(250, dtype=bool),
        level=0.99,
        n_draws=9,
        seed=1,
    )
    assert np.isnan(duration)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ex.kupiec(5, 4, level=0.99), "n_exceedances is 5 of 4"),
        (lambda: ex.kupiec(0, 0, level=0.99), "at least one day"),
        (lambda: ex.kupiec(1, 4, level=1.0), "confidence level"),
        (lambda: ex.exceedances(np.array([1.0, np.nan]), 1.0), "loss at"),
        (lambda: ex.exceedances(np.array([1.0, 2.0]), np.ones(3)), "lengths differ"),
        (lambda: ex.christoffersen(np.array([0.0, 2.0]), level=0.9), "is_exceedance at 1 is 2.0"),
        (lambda: ex.dynamic_quantile(np.zeros(5), level=0.9), "at least 12 rows"),
        (lambda: ex.traffic_light(1, edition="2001"), "edition"),  # pyright: ignore[reportArgumentType]
        (lambda: ex.value_at_risk_interval(np.ones(20), level=0.99), "too few"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
