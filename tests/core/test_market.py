"""Simulated paths against exact laws. Frequencies and means within 4 standard errors (false alarm 6e-5 each)."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import (
    F64,
    assert_frequency,
    assert_lower_tail_mean,
    assert_mc,
    assert_quantile,
    prices,
    single_market,
    spot_book,
    touch_book,
)
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.market import gbm, model, presets, regime, regime_student_t
from qpo_sim.simulate import Plan, market_paths, simulate_paths

N = 1 << 17


def test_gbm_terminal_law(cases):
    case = cases("models")["A01"]
    expected, sd = case["expected"], case["tolerance"]["sd_per_path_mean"]
    market = gbm(("X",), [0.8], step_hours=8760.0 / 4, drift="user", per_year=0.4, dtype=F64)
    s = 100.0 * prices(market, N, 4, dates=(4,))[0, 0]
    assert abs(s.mean() - expected["E_S"]) < 4.0 * sd / np.sqrt(N)
    log = np.log(s / 100.0)
    assert_mc(log, expected["mean_log"])
    assert_mc((log - expected["mean_log"]) ** 2, expected["var_log"])
    for level, quantile in expected["quantiles"].items():
        assert_quantile(s, float(level), quantile)
    for level, mean in expected["mean_below_quantile"].items():
        assert_lower_tail_mean(s, float(level), mean)
    assert stats.kstest((log - 0.08) / 0.8, "norm").pvalue > 1e-4


def test_lognormal_value_at_risk(cases):
    case = cases("models")["C05"]
    market = gbm(("X",), [0.8], drift="user", per_year=0.1, dtype=F64)
    s = prices(market, N, 30, dates=(30,))[0, 0]
    for level, row in case["expected"].items():
        tail = 1.0 - float(level)
        assert_quantile(s - 1.0, tail, -row["VaR_simple"])
        assert_quantile(np.log(s), tail, -row["VaR_log"])
        assert_lower_tail_mean(s - 1.0, tail, -row["ES_simple"])


def test_regime_switching_lognormal(cases):
    case = cases("models")["A23"]
    p = case["inputs"]
    transition = [[1 - p["p12"], p["p12"]], [p["p21"], 1 - p["p21"]]]
    pi = case["expected"]["stationary_p1"]
    market = single_market(
        drift=[p["m1"], p["m2"]],
        volatility=[p["s1"], p["s2"]],
        transition=transition,
        initial=[pi, 1.0 - pi],
        step_hours=730.0,
    )
    np.testing.assert_allclose(regime.stationary_law(market.transition)[0], pi, rtol=1e-12)
    paths = prices(market, N, 120, dates=(12, 60, 120))[:, 0]
    for s, horizon in zip(paths, ("1y", "5y", "10y"), strict=True):
        row = case["expected"]["horizons"][horizon]
        assert_mc(s, row["mean"])
        assert_frequency(np.count_nonzero(s < 1.0), N, row["P_below_1"])
        for level, quantile in row["quantile"].items():
            assert_quantile(s, float(level), quantile)
        for level, mean in row["lower_tail_mean"].items():
            assert_lower_tail_mean(s, float(level), mean)


def _batched(statistic, x, n_batches=64):
    values = np.array([statistic(b) for b in np.array_split(x, n_batches, axis=-1)])
    return values.mean(), values.std(ddof=1) / np.sqrt(n_batches)


def test_markov_switching_moments_and_memory(cases):
    case = cases("models")["A26"]
    p, expected = case["inputs"], case["expected"]
    transition = [[p["p11"], 1 - p["p11"]], [1 - p["p22"], p["p22"]]]
    pi = expected["stationary_p1"]
    market = single_market(drift=p["mu"], volatility=p["sigma"], transition=transition, initial=[pi, 1 - pi])
    log = np.log(prices(market, N, 30)[:, 0])
    r = np.diff(log, axis=0, prepend=0.0)

    def check(statistic, value, x=r):
        got, error = _batched(statistic, x)
        assert abs(got - value) < 4.0 * error, (got, value, error)

    def autocovariance(x, mean, lag):
        return ((x[lag:] - mean) * (x[:-lag] - mean)).mean()

    mean, variance = expected["mean"], expected["var"]
    check(np.mean, mean)
    check(lambda x: np.mean((x - mean) ** 2), variance)
    check(lambda x: np.mean((x - mean) ** 3) / variance**1.5, expected["skew"])
    check(lambda x: np.mean((x - mean) ** 4) / variance**2 - 3.0, expected["excess_kurt"])
    check(lambda x: autocovariance(x, mean, 1) / variance, expected["acf_r_lag1"])
    square_mean = variance + mean**2
    k = np.array(p["sigma"]) ** 2, np.array(p["mu"])
    fourth = np.array([pi, 1 - pi]) @ (3 * k[0] ** 2 + 6 * k[0] * k[1] ** 2 + k[1] ** 4)
    for lag, value in expected["acf_r2"].items():
        check(lambda x, lag=int(lag): autocovariance(x**2, square_mean, lag) / (fourth - square_mean**2), value)
    for days, value in expected["var_n_day"].items():
        n = int(days)
        check(lambda x, n=n: np.mean((x - n * mean) ** 2), value, log[n - 1])


def test_regime_switching_student_t(cases):
    case = cases("models")["A38"]
    p = case["inputs"]
    pi = regime.stationary_law(p["P"])
    # The case has no cut; at 1e-5 per day it moves these quantiles by far less than the errors at this sample size.
    market = single_market(drift=p["mu"], volatility=p["sd"], dof=p["nu"], transition=p["P"], initial=pi)
    paths = prices(market, 2 * N, 30, dates=(1, 10, 30))[:, 0]
    for s, horizon in zip(paths, ("1d", "10d", "30d"), strict=True):
        row = case["expected"][horizon]
        for level, quantile in row["log_quantiles"].items():
            assert_quantile(np.log(s), float(level), quantile)
        for level, mean in row["mean_simple_return_below"].items():
            assert_lower_tail_mean(s - 1.0, float(level), mean)


def test_step_monitored_barrier_of_student_t(cases):
    case = cases("models")["B17"]
    p = case["inputs"]
    market = single_market(drift=p["daily_mean"], volatility=p["daily_sd"], dof=p["nu"])
    s = prices(market, N, 30)[:, 0]
    plan = Plan(30, monitoring="step", dates=(7, 30), attribution=False)
    for barrier in p["barriers"]:
        outcome = simulate_paths(market, touch_book(market, barrier), N, plan)
        hit = np.asarray(outcome.hit_probability[:, 0])
        for d, days in enumerate(p["days"]):
            expected = case["expected"][f"H={barrier},days={days}"]
            touched = np.any(s[:days] <= barrier, axis=0)
            assert_frequency(touched.sum(), N, expected)
            # The account sees exactly what the path shows.
            np.testing.assert_array_equal(hit[d], touched)
        np.testing.assert_array_equal(outcome.is_liquidated[0], hit[-1] > 0.5)


def _two_regime_market(dtype=F64):
    rng = np.random.default_rng(4)
    cholesky = []
    for rho in (0.3, 0.8):
        correlation = np.full((3, 3), rho) + (1.0 - rho) * np.eye(3)
        cholesky.append(np.linalg.cholesky(correlation))
    return model.Market(
        initial=jnp.asarray([0.6, 0.4], dtype),
        transition=jnp.asarray([[0.9, 0.1], [0.25, 0.75]], dtype),
        drift=jnp.asarray(rng.normal(0.0, 1e-3, (2, 3)), dtype),
        volatility=jnp.asarray([[0.02, 0.03, 0.04], [0.05, 0.06, 0.08]], dtype),
        correlation_cholesky=jnp.asarray(np.stack(cholesky), dtype),
        dof=jnp.asarray([6.0, 4.5], dtype),
        assets=("A", "B", "C"),
    )


def test_correlation_is_recovered_per_regime():
    base = _two_regime_market()
    for k in range(2):
        market = dataclasses.replace(base, transition=jnp.eye(2), initial=jnp.eye(2)[k], dof=None)
        r = np.log(prices(market, N, 1)[0])
        cholesky = np.asarray(base.correlation_cholesky[k])
        expected = cholesky @ cholesky.T
        got = np.corrcoef(r)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert abs(got[i, j] - expected[i, j]) < 4.0 * (1.0 - expected[i, j] ** 2) / np.sqrt(N)
        for i in range(3):
            assert_mc(r[i], float(base.drift[k, i]))
            assert_mc((r[i] - float(base.drift[k, i])) ** 2, float(base.volatility[k, i]) ** 2)


def test_one_mixing_variable_is_shared_by_all_assets():
    # Squares of uncorrelated assets are correlated under a common scale, not without: dependence in the tails.
    market = dataclasses.replace(
        _two_regime_market(), transition=jnp.eye(2), initial=jnp.asarray([1.0, 0.0]), dof=jnp.asarray([3.0, 3.0]),
        correlation_cholesky=jnp.broadcast_to(jnp.eye(3), (2, 3, 3)),
    )  # fmt: skip
    r = np.log(prices(market, N, 1)[0]) - np.asarray(market.drift[0])[:, None]
    assert abs(np.corrcoef(r[0], r[1])[0, 1]) < 0.02
    q = [np.quantile(np.abs(x), 0.99) for x in r]
    both = np.mean((np.abs(r[0]) > q[0]) & (np.abs(r[1]) > q[1]))
    # Exact joint exceedance by quadrature over the chi-square: about 0.0027, against 0.0001 if independent.
    c = stats.t.ppf(0.995, 3.0)
    w = stats.chi2.ppf((np.arange(20000) + 0.5) / 20000, 3.0) / 3.0
    exact = np.mean((2.0 * stats.norm.sf(c * np.sqrt(w))) ** 2)
    assert_frequency(both * N, N, exact, n_sigma=5.0)


def test_risk_neutral_prices_are_martingales():
    fit = SimpleNamespace(
        assets=("A", "B"),
        initial=np.array([0.7, 0.3]),
        transition=np.array([[0.95, 0.05], [0.2, 0.8]]),
        mean=np.array([[0.01, -0.02], [0.03, 0.05]]),
        scale=np.array([[[2e-4, 1e-4], [1e-4, 3e-4]], [[6e-4, 3e-4], [3e-4, 9e-4]]]),
        dof=np.array([6.0, 4.0]),
        step_hours=24.0,
    )
    for sub in (1, 3):
        market = regime_student_t(fit, drift="risk_neutral", rate_per_year=0.5, dtype=F64)
        s = prices(market, N, 20 * sub, step_hours=24.0 / sub, dates=(sub, 20 * sub), seed=sub)
        for d, days in enumerate((1, 20)):
            for a in range(2):
                assert_mc(s[d, a], np.exp(0.5 * days / 365.0))
    market = regime_student_t(fit, drift="user", per_year={"A": 0.8, "B": -0.4}, dtype=F64)
    s = prices(market, N, 20, dates=(20,))[0]
    assert_mc(s[0], np.exp(0.8 * 20 / 365.0))
    assert_mc(s[1], np.exp(-0.4 * 20 / 365.0))
    for choice, factor in (("historical", 1.0), ("shrunk", 0.25)):
        market = regime_student_t(fit, drift=choice, shrinkage=0.75, dtype=F64)
        np.testing.assert_allclose(market.drift, factor * fit.mean, rtol=1e-12)
    covariance = np.einsum(
        "ka,kab,kcb,kc->kac",
        market.volatility,
        market.correlation_cholesky,
        market.correlation_cholesky,
        market.volatility,
    )
    np.testing.assert_allclose(covariance, fit.scale * (fit.dof / (fit.dof - 2.0))[:, None, None], rtol=1e-12)


def test_sub_steps_do_not_change_the_law_of_a_base_step():
    # Two-sample Kolmogorov-Smirnov on independent seeds at 1e-4, twice.
    market = single_market(drift=[0.001, -0.002], volatility=[0.02, 0.06], dof=[5.0, 3.0],
                           transition=[[0.9, 0.1], [0.3, 0.7]], initial=[0.5, 0.5])  # fmt: skip
    whole = np.log(prices(market, N, 3, dates=(1, 3), seed=1)[:, 0])
    parts = np.log(prices(market, N, 12, step_hours=6.0, dates=(4, 12), seed=2)[:, 0])
    for a, b in zip(whole, parts, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-4


@pytest.mark.parametrize("dof", [None, 3.0])
def test_bridged_touch_probability_does_not_depend_on_sub_steps(dof):
    # Given the mixing scale a base step is a Brownian motion, so the bridge is exact at any step, for t shocks too.
    market = single_market(volatility=0.04, dof=dof)
    book = touch_book(market, 0.85)
    rows = []
    for sub, seed in ((1, 1), (4, 2)):
        plan = Plan(7 * sub, step_hours=24.0 / sub, dates=(7 * sub,), attribution=False)
        f = np.asarray(simulate_paths(market, book, N, plan, seed=seed).hit_probability[-1, 0])
        rows.append((f.mean(), f.std() / np.sqrt(N)))
    (a, sa), (b, sb) = rows
    assert abs(a - b) < 4.0 * np.hypot(sa, sb)


def test_regimes_follow_the_chain_and_are_independent_of_the_shocks():
    # Drifts far apart and tiny volatility: every return shows its regime.
    transition = np.array([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.05, 0.25, 0.7]])
    initial = np.array([0.2, 0.5, 0.3])
    market = single_market(drift=[0.0, 0.01, 0.02], volatility=[1e-4] * 3, transition=transition, initial=initial)
    n, n_steps = 1 << 15, 12
    r = np.diff(np.log(prices(market, n, n_steps)[:, 0]), axis=0, prepend=0.0)
    state = np.rint(r / 0.01).astype(int)
    z = (r - 0.01 * state) / 1e-4
    law = initial @ transition
    for k in range(3):
        assert_frequency(np.count_nonzero(state[0] == k), n, law[k])
        for j in range(3):
            now = state[:-1] == k
            assert_frequency(np.count_nonzero(now & (state[1:] == j)), np.count_nonzero(now), transition[k, j])
        # shock given this regime, given the previous one, and given the next one
        for chosen in (z[state == k], z[1:][state[:-1] == k], z[:-1][state[1:] == k]):
            assert_mc(chosen, 0.0)
            assert_mc(chosen**2, 1.0)
    for lag in (1, 2, 5):
        assert_mc(z[lag:] * z[:-lag], 0.0)
        assert_mc((z[lag:] ** 2 - 1.0) * (z[:-lag] ** 2 - 1.0), 0.0)
    # Markov: given the present, the past does not matter.
    for past in range(3):
        chosen = (state[:-2] == past) & (state[1:-1] == 1)
        assert_frequency(np.count_nonzero(chosen & (state[2:] == 2)), np.count_nonzero(chosen), transition[1, 2])


def test_regime_is_held_within_a_base_step():
    market = single_market(drift=[0.0, 0.04], volatility=[1e-4] * 2, transition=[[0.5, 0.5]] * 2, initial=[0.5, 0.5])
    r = np.diff(np.log(prices(market, 512, 20, step_hours=6.0)[:, 0]), axis=0, prepend=0.0)
    state = np.rint(r / 0.01).astype(int).reshape(5, 4, 512)
    assert np.all(state == state[:, :1])
    assert 0.4 < state.mean() < 0.6


def test_absorbing_regime_from_a_degenerate_start():
    market = single_market(
        drift=[0.0, 0.01], volatility=[1e-4] * 2, transition=[[0.0, 1.0], [0.0, 1.0]], initial=[1.0, 0.0]
    )
    s = prices(market, 256, 2)[:, 0]
    np.testing.assert_allclose(np.log(s[1]), 0.02, atol=1e-3)


def test_record_shows_the_paths():
    market = _two_regime_market()
    plan = Plan(6, dates=(2, 5, 6), record_paths=True)
    record = simulate_paths(market, touch_book(market, 0.8, asset="B"), 64, plan, seed=3).record
    paths = market_paths(market, 64, plan, seed=3)
    expected = np.log(prices(market, 64, 6, dates=(2, 5, 6), seed=3))
    np.testing.assert_allclose(paths.log_price[np.array([1, 4, 5])], expected, rtol=1e-10, atol=1e-12)
    assert set(np.unique(paths.masks)) == {0.0, 1.0}
    assert np.all(np.isfinite(record.account_equity)) and np.any(record.account_equity != record.account_equity[0])


def test_many_assets_take_the_matrix_form():
    n = 33
    names = tuple(f"A{i}" for i in range(n))
    rho = 0.5 * np.ones((n, n)) + 0.5 * np.eye(n)
    volatility = np.linspace(0.2, 1.0, n)
    market = gbm(names, volatility, rho, dtype=F64, drift="historical")
    book = spot_book(market, {names[1]: 0.5, names[-1]: 0.5})
    plan = Plan(1, attribution=False)
    equity = np.asarray(simulate_paths(market, book, 1 << 14, plan).equity[0])
    sigma = volatility[[1, -1]] / np.sqrt(365.0)
    variance = 0.25 * (sigma**2).sum() + 2 * 0.25 * 0.5 * sigma.prod()
    assert_mc((equity - equity.mean()) ** 2, variance, n_sigma=6.0)  # first order in the variance: 0.2 % bias
    # The first two rows of a lower factor are the two-asset market on the same draws.
    small = gbm(names[:2], volatility[:2], rho[:2, :2], dtype=F64, drift="historical")
    alone = dataclasses.replace(book, spot=jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(
        simulate_paths(market, alone, 1 << 14, plan).equity[0], prices(small, 1 << 14, 1)[0, 1], rtol=1e-12
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(drift="guess"), "market.drift.kind"),
        (dict(drift="shrunk", shrinkage=1.5), "shrinkage"),
        (dict(drift="user", per_year={"Z": 0.1}), "Z"),
        (dict(dof=np.array([2.0, 4.0])), "dof"),
    ],
)
def test_presets_refuse(change, words):
    fit = dict(
        assets=("A",), initial=np.ones(2) / 2, transition=np.ones((2, 2)) / 2, mean=np.zeros((2, 1)),
        scale=np.full((2, 1, 1), 1e-4), dof=np.array([3.0, 4.0]), step_hours=24.0,
    )  # fmt: skip
    options = {k: v for k, v in change.items() if k not in fit}
    with pytest.raises(InputError, match=words):
        regime_student_t(SimpleNamespace(**{**fit, **{k: v for k, v in change.items() if k in fit}}), **options)


def test_gbm_refuses_impossible_moments():
    with pytest.raises(InputError, match="volatility"):
        gbm(("A", "B"), [0.5, 0.0])
    with pytest.raises(InputError, match="positive definite"):
        gbm(("A", "B"), [0.5, 0.5], [[1.0, 1.0], [1.0, 1.0]])
    assert presets.DRIFTS == ("historical", "shrunk", "risk_neutral", "user")
