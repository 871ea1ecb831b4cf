"""VaR, CVaR, their errors and components against textbook values and hand-computed samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qpo_sim.errors import InputError
from qpo_sim.risk.tail import component_cvar, conditional_value_at_risk, tail_sample, value_at_risk

LAWS = {"normal": stats.norm, "t4": stats.t(4), "t3": stats.t(3)}


def _grid(law, n=400_001):
    """A sample without sampling error: quantiles at cell midpoints."""
    return law.ppf((np.arange(n) + 0.5) / n)


def _both(loss, level, weight=None):
    sample = tail_sample(loss, weight)
    return value_at_risk(sample, level=level), conditional_value_at_risk(sample, level=level)


def test_normal_loss(cases):
    loss = _grid(stats.norm)
    for level, row in cases("models")["C01"]["expected"].items():
        var, cvar = _both(loss, float(level))
        assert var.value == pytest.approx(row["VaR"], abs=5e-4)
        assert cvar.value == pytest.approx(row["ES"], abs=5e-4)  # the grid itself ends at 1/(2n)


def test_textbook_table(cases):
    case = cases("models")["C03"]
    p = case["inputs"]
    scale = p["V"] * p["annual_vol"] / np.sqrt(p["days"])
    for name, law in (("normal", stats.norm), ("t4 unit var", stats.t(4, scale=np.sqrt(0.5)))):
        loss = scale * _grid(law)
        for level, (var, cvar) in case["expected"][name].items():
            got_var, got_cvar = _both(loss, float(level))
            assert got_var.value == pytest.approx(var, rel=2e-4)
            assert got_cvar.value == pytest.approx(cvar, rel=5e-4)  # the grid itself ends at 1/(2n)


@pytest.mark.parametrize("xp", [np, jnp])
def test_sample_conventions(cases, xp):
    expected = cases("models")["C09"]["expected"]
    loss = xp.asarray(np.random.default_rng(0).permutation(np.arange(1.0, 101.0)))
    var, cvar = _both(loss, 0.95)
    assert float(var.value) == expected["VaR_95"]["inverted_cdf"]
    assert float(cvar.value) == pytest.approx(expected["ES_95_fractional"], abs=1e-9)
    assert float(_both(loss, 0.975)[1].value) == pytest.approx(expected["ES_975_fractional"], abs=1e-9)
    ties = xp.asarray([5.0] * 4 + [1.0] * 16)
    var, cvar = _both(ties, 0.9)
    assert float(var.value) == expected["ties"]["VaR"]
    assert float(cvar.value) == pytest.approx(expected["ties"]["ES"], abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999]))
def test_value_at_risk_is_the_inverse_distribution_function(n, level):
    loss = np.random.default_rng(n).permutation(np.arange(n, dtype=float))
    # smallest x with P(L <= x) >= level, in exact integers: rank = ceil(level n)
    millis = round(level * 1000)
    rank = -(-millis * n // 1000)
    assert value_at_risk(tail_sample(loss), level=level).value == loss.min() + rank - 1


def test_single_precision_picks_the_same_order_statistic():
    misses = []
    for n in (100, 1000, 4096, 10_000, 65_536, 100_000):
        for level in (0.9, 0.95, 0.975, 0.99, 0.999):
            loss = np.arange(n, dtype=np.float32)
            exact = value_at_risk(tail_sample(loss.astype(np.float64)), level=level).value
            single = value_at_risk(tail_sample(jnp.asarray(loss)), level=level).value
            if float(single) != float(exact):
                misses.append((n, level, float(single), float(exact)))
    assert not misses, misses


def test_standard_errors_are_the_asymptotic_ones(cases):
    n = 400_001
    for name, row in cases("models")["C14"]["expected"].items():
        law, level = name.split(",a=")
        var, cvar = _both(_grid(LAWS[law], n), float(level))
        assert var.std_error * np.sqrt(n) == pytest.approx(row["sd1_VaR"], rel=0.05)
        assert cvar.std_error * np.sqrt(n) == pytest.approx(row["sd1_ES"], rel=0.05)


def test_value_at_risk_is_not_subadditive_and_shortfall_is(cases):
    case = cases("models")["C23"]
    expected, level = case["expected"], case["inputs"]["level"]
    pd = case["inputs"]["pd"]
    single = tail_sample(np.array([100.0, 0.0]), np.array([pd, 1.0 - pd]))
    two = tail_sample(np.array([200.0, 100.0, 0.0]), np.array([pd**2, 2 * pd * (1 - pd), (1 - pd) ** 2]))
    assert value_at_risk(single, level=level).value == expected["VaR95_single"]
    assert value_at_risk(two, level=level).value == expected["VaR95_two"]
    assert conditional_value_at_risk(single, level=level).value == pytest.approx(expected["ES95_single"], abs=1e-9)
    assert conditional_value_at_risk(two, level=level).value == pytest.approx(expected["ES95_two"], abs=1e-9)


def test_euler_components_of_historical_shortfall(cases):
    case = cases("models")["C25"]
    expected, level = case["expected"], case["inputs"]["level"]
    mixing = [[0.02, 0.01, 0.0], [0.0, 0.02, 0.004], [0.0, 0.0, 0.01]]
    returns = np.random.default_rng(2025).standard_t(4, (1000, 3)) @ np.array(mixing)
    np.testing.assert_allclose(returns[0], expected["check_first_row"])
    parts = -(returns * np.array(case["inputs"]["weights"])).T
    loss = parts.sum(axis=0)
    sample = tail_sample(loss)
    components, _ = component_cvar(sample, parts[:, np.argsort(-loss, kind="stable")], level=level)
    np.testing.assert_allclose(components.value, expected["components"], atol=1e-10)
    cvar = conditional_value_at_risk(sample, level=level)
    assert cvar.value == pytest.approx(expected["ES95"], abs=1e-10)
    assert components.value.sum() == pytest.approx(cvar.value, abs=1e-13)


def test_component_errors_match_replications():
    # 300 replications: their spread is known to 4 %, the band of 20 % is five standard deviations.
    rng = np.random.default_rng(3)
    values, errors = [], []
    for _ in range(300):
        parts = rng.standard_t(5, (2, 4000)) * np.array([[1.0], [0.4]])
        loss = parts.sum(axis=0)
        order = np.argsort(-loss, kind="stable")
        estimate, _ = component_cvar(tail_sample(loss), parts[:, order], level=0.95)
        values.append(estimate.value)
        errors.append(estimate.std_error)
    ratio = np.mean(errors, axis=0) / np.std(values, axis=0)
    assert np.all(np.abs(ratio - 1.0) < 0.2), ratio


def _scenarios(case):
    rng = np.random.default_rng(20240601)
    vol = np.array([0.035, 0.045, 0.06, 0.02, 0.002])
    corr = np.array(
        [
            [1, 0.75, 0.6, 0.3, 0],
            [0.75, 1, 0.65, 0.3, 0],
            [0.6, 0.65, 1, 0.25, 0],
            [0.3, 0.3, 0.25, 1, 0.1],
            [0, 0, 0, 0.1, 1],
        ]
    )
    z = rng.standard_normal((1000, 5)) @ np.linalg.cholesky(corr).T
    w = rng.chisquare(4.0, (1000, 1)) / 4.0
    r = np.array([0.0015, 0.0018, 0.0022, 0.0006, 0.0001]) + vol * np.sqrt(0.5) * z / np.sqrt(w)
    np.testing.assert_allclose(r[0], case["inputs"]["scenarios"]["row0"])
    return r


def test_gradient_of_shortfall_on_scenarios(cases):
    returns = jnp.asarray(_scenarios(cases("models")["E04"]))
    case = cases("models")["F10"]
    weights = jnp.asarray(case["inputs"]["weights"])

    def risk(measure, w):
        return measure(tail_sample(-(returns @ w)), level=0.95).value

    value, gradient = jax.value_and_grad(partial(risk, conditional_value_at_risk))(weights)
    assert float(value) == pytest.approx(case["expected"]["cvar"], abs=1e-12)
    np.testing.assert_allclose(gradient, case["expected"]["grad_cvar"], atol=1e-12)
    # The case takes the 50th worst; the inverse distribution function at 0.95 takes the 51st: the next path.
    loss = -np.asarray(returns @ weights)
    worst = np.argsort(-loss, kind="stable")
    assert loss[worst[49]] == pytest.approx(case["expected"]["var_50th_worst"], abs=1e-12)
    value, gradient = jax.value_and_grad(partial(risk, value_at_risk))(weights)
    assert float(value) == pytest.approx(loss[worst[50]], abs=1e-15)
    np.testing.assert_allclose(gradient, -np.asarray(returns)[worst[50]], atol=1e-12)


@pytest.mark.parametrize("level", [0.951, 0.95])
def test_gradient_of_shortfall_is_the_directional_derivative(level):
    # Half a path lies at the edge of the tail (49.5 or 50.5 of 1000). CVaR is piecewise linear: differences are exact.
    rng = np.random.default_rng(8)
    returns = jnp.asarray(rng.standard_t(4, (1000, 2)))

    def risk(w):
        return conditional_value_at_risk(tail_sample(-(returns @ w)), level=level - 0.0005).value

    w, h = jnp.asarray([0.7, 0.3]), 1e-7
    numeric = [(risk(w + h * e) - risk(w - h * e)) / (2 * h) for e in jnp.eye(2)]
    np.testing.assert_allclose(jax.grad(risk)(w), numeric, rtol=1e-6)


def test_gradient_of_shortfall_sees_an_atom_at_value_at_risk():
    # Accounts liquidated at the same price lose the same: 4 of 20 losses tie where the worst 2 are asked for.
    atom = jnp.asarray([1.0] * 4 + [0.1] * 16)
    slope = jax.grad(lambda w: conditional_value_at_risk(tail_sample(w * atom), level=0.9).value)(0.5)
    assert float(slope) == pytest.approx(1.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_weighted_sample_is_the_replicated_one(seed, level):
    rng = np.random.default_rng(seed)
    loss, count = rng.normal(size=60), rng.integers(0, 5, 60)
    count[0] += 1
    for measure in (value_at_risk, conditional_value_at_risk):
        weighted = measure(tail_sample(loss, count.astype(float)), level=level).value
        replicated = measure(tail_sample(np.repeat(loss, count)), level=level).value
        assert weighted == pytest.approx(replicated, abs=1e-12)
        # scaling all weights changes nothing, the error included
        a = measure(tail_sample(loss, count.astype(float)), level=level)
        b = measure(tail_sample(loss, 7.5 * count.astype(float)), level=level)
        assert a.value == pytest.approx(b.value, abs=1e-12) and a.std_error == pytest.approx(b.std_error, abs=1e-12)


@pytest.mark.parametrize("level", [0.95, 0.99, 0.999])
def test_worst_part_of_a_sample_is_enough(level):
    loss = np.random.default_rng(1).standard_t(3, 20_000)
    parts = np.random.default_rng(2).normal(size=(2, 20_000))
    parts[1] = loss - parts[0]
    order = np.argsort(-loss, kind="stable")
    whole, worst = tail_sample(loss), tail_sample(loss[order[:1400]], total=20_000.0)
    for measure in (value_at_risk, conditional_value_at_risk):
        a, b = measure(whole, level=level), measure(worst, level=level)
        assert a.value == pytest.approx(b.value, rel=1e-14)  # numpy adds arrays of other lengths in other pairs
        assert a.std_error == pytest.approx(b.std_error, rel=1e-9)
    a, _ = component_cvar(whole, parts[:, order], level=level)
    b, _ = component_cvar(worst, parts[:, order[:1400]], level=level)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-12)
    np.testing.assert_allclose(a.std_error, b.std_error, rtol=1e-9)


def test_expected_shortfall_is_coherent():
    a, b = np.random.default_rng(3).standard_t(4.0, (2, 4001))
    es = lambda loss: conditional_value_at_risk(tail_sample(loss), level=0.9).value  # noqa: E731
    assert es(a + 2.0) == pytest.approx(es(a) + 2.0, rel=1e-12)
    assert es(3.0 * a) == pytest.approx(3.0 * es(a), rel=1e-12)
    assert es(a + b) <= es(a) + es(b) + 1e-12
    assert es(np.maximum(a, b)) >= es(a)
    assert es(a) >= value_at_risk(tail_sample(a), level=0.9).value


def test_order_of_the_sample_does_not_matter():
    rng = np.random.default_rng(5)
    loss = np.round(rng.normal(size=500), 1)  # many ties
    for measure in (value_at_risk, conditional_value_at_risk):
        a, b = (measure(tail_sample(x), level=0.95) for x in (loss, rng.permutation(loss)))
        assert a.value == b.value and a.std_error == pytest.approx(b.std_error, rel=1e-12)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_impossible_levels_are_refused(level):
    sample = tail_sample(np.arange(10.0))
    for measure in (value_at_risk, conditional_value_at_risk):
        with pytest.raises(InputError, match="confidence level"):
            measure(sample, level=level)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_tiny_samples_give_finite_numbers(n):
    loss = np.arange(float(n))
    for estimate in _both(loss, 0.99):
        assert np.isfinite(estimate.value) and np.isfinite(estimate.std_error)
        assert estimate.value == pytest.approx(n - 1.0)
