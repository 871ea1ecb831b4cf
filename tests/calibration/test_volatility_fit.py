"""Fits of conditional variances: reference cases, the arch package, drawn records, holes and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from qpo_sim.calibration import volatility
from qpo_sim.calibration.volatility import ewma, fit_volatility
from qpo_sim.errors import InputError

# Each fit is a program of its own, seconds to compile.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sp500():
    """Daily returns of the S&P 500 in per cent, 1999 to 2018."""
    return 100.0 * pytest.importorskip("arch.data.sp500").load()["Adj Close"].pct_change().dropna()


def draw(n_steps, seed, *, kind="garch", omega=0.05, alpha=0.08, gamma=0.0, beta=0.87, dof=np.inf, mean=0.0):
    """A record of one asset from known parameters, after 500 steps of warming up."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(n_steps + 500)
    if np.isfinite(dof):
        z = rng.standard_t(dof, n_steps + 500) * np.sqrt((dof - 2.0) / dof)
    x, out = (0.0 if kind == "egarch" else 1.0), np.empty(n_steps + 500)
    for t, shock in enumerate(z):
        if kind == "egarch":
            out[t] = np.exp(0.5 * x) * shock
            x = omega + beta * x + alpha * (abs(shock) - np.sqrt(2.0 / np.pi)) + gamma * shock
        else:
            power = 1.0 if kind == "tarch" else 2.0
            out[t] = x ** (1.0 / power) * shock
            x = omega + (alpha + gamma * (shock < 0.0)) * abs(out[t]) ** power + beta * x
    return mean + out[500:]


def assert_same(fit, expected, tolerance):
    names = {"mean": "mu", "alpha": "alpha[1]", "gamma": "gamma[1]", "beta": "beta[1]", "dof": "nu"}
    assert fit.fit.converged.all()
    assert_allclose(fit.fit.log_likelihood[0], expected["loglik"], atol=tolerance["abs"]["loglik"])
    for name in fit.fit.names:
        # The case's alpha is 0 where it is at its bound, which has no relative error.
        value = expected["params"][names.get(name, name)]
        assert_allclose(fit.fit[name][0], value, rtol=tolerance["rel_params"], atol=1e-6, err_msg=name)
    assert_allclose(np.sqrt(fit.variance[-1, 0]), expected["last_cond_vol"], rtol=tolerance["rel_params"])


def test_garch_of_an_index(cases, sp500):
    case = cases("models")["D04"]
    fit = fit_volatility(sp500.to_numpy())
    assert_same(fit, case["expected"], case["tolerance"])
    assert_allclose(fit.fit.std_error()[0], list(case["expected"]["se"].values()), rtol=0.01)
    assert fit.fit.n_observations[0] == case["expected"]["nobs"]


@pytest.mark.parametrize(("innovation", "name"), [("normal", "normal"), ("student_t", "t")])
def test_tarch_of_an_index(cases, sp500, innovation, name):
    case = cases("models")["D06"]
    fit = fit_volatility(sp500.to_numpy(), model="tarch", innovation=innovation)
    assert_same(fit, case["expected"][name], case["tolerance"])
    assert fit.fit.is_at_bound[0, fit.fit.names.index("alpha")]


def test_ewma_of_two_indices(cases, sp500):
    case = cases("models")["D09"]
    nasdaq = 100.0 * pytest.importorskip("arch.data.nasdaq").load()["Adj Close"].pct_change().dropna()
    joint = sp500.to_frame("S&P 500").join(nasdaq.rename("NASDAQ"), how="inner")
    found, expected, tolerance = ewma(joint), case["expected"], case["tolerance"]["rel"]
    assert len(joint) == expected["n_joint"]
    assert_allclose(found.covariance, expected["cov_matrix"], rtol=tolerance)
    assert_allclose(found.correlation()[0, 1], expected["corr"], rtol=tolerance)
    assert_allclose(ewma(sp500.to_numpy()).covariance[0, 0], expected["variance_sp500"], rtol=tolerance)


@pytest.mark.parametrize(
    ("model", "innovation", "options"),
    [("gjr", "normal", {"vol": "GARCH", "o": 1}), ("egarch", "student_t", {"vol": "EGARCH", "o": 1})],
)
def test_same_as_arch(sp500, model, innovation, options):
    arch_model = pytest.importorskip("arch").arch_model
    density = "normal" if innovation == "normal" else "t"
    theirs = arch_model(sp500.iloc[:2500], p=1, q=1, dist=density, **options).fit(disp="off")
    ours = fit_volatility(sp500.to_numpy()[:2500], model=model, innovation=innovation)
    assert ours.fit.converged[0]
    assert_allclose(ours.fit.log_likelihood[0], theirs.loglikelihood, atol=2e-3)
    assert_allclose(ours.fit.values[0], theirs.params.to_numpy(), rtol=2e-3, atol=1e-5)
    assert_allclose(ours.fit.aic[0], theirs.aic, atol=4e-3)
    assert_allclose(ours.fit.bic[0], theirs.bic, atol=4e-3)
    assert_allclose(np.sqrt(ours.variance[:, 0]), theirs.conditional_volatility.to_numpy(), rtol=2e-3)


# Twelve z-scores at most per test, each beyond 4.5 with probability 7e-6 under the normal approximation.
@pytest.mark.parametrize(
    ("model", "innovation", "truth"),
    [
        ("garch", "normal", {"omega": 0.05, "alpha": 0.08, "beta": 0.87}),
        ("gjr", "student_t", {"omega": 0.05, "alpha": 0.05, "gamma": 0.08, "beta": 0.86, "dof": 6.0}),
        ("tarch", "normal", {"omega": 0.06, "alpha": 0.06, "gamma": 0.08, "beta": 0.85}),
        ("egarch", "normal", {"omega": 0.01, "alpha": 0.15, "gamma": -0.08, "beta": 0.95}),
    ],
)
def test_finds_the_parameters_of_drawn_records(model, innovation, truth):
    truth = {"mean": 0.03, **truth}
    kind = model if model in ("tarch", "egarch") else "garch"
    records = np.stack([draw(4000, seed, kind=kind, **truth) for seed in (1, 2)], axis=1)
    fit = fit_volatility(records, model=model, innovation=innovation).fit
    assert fit.converged.all() and fit.has_covariance.all() and not fit.is_at_bound.any()
    expected = np.array([truth[name] for name in fit.names])
    for kind in ("hessian", "sandwich"):
        assert np.abs((fit.values - expected) / fit.std_error(kind)).max() < 4.5


def test_log_likelihood_is_level_at_the_optimum():
    records = np.stack([draw(600, 3), draw(600, 4)], axis=1)
    model = volatility._Model("garch", "student_t", "constant", "stationary")
    data, scale = volatility._prepare(records, model, "backcast", None)
    with jax.enable_x64(True):
        found = jax.device_get(volatility._fit_assets(model, data, scale))
        for a in range(2):
            one = jax.tree.map(lambda leaf, a=a: jnp.asarray(leaf[a]), data)
            slope = jax.grad(lambda x, one=one: jnp.mean(volatility._terms(model, volatility._core(model, x), one)))(
                jnp.asarray(found.minimum.point[a])
            )
            assert np.abs(slope).max() < 1e-5


def test_each_asset_is_fitted_on_its_own():
    records = np.stack([draw(600, 5), 30.0 * draw(600, 6)], axis=1)
    both = fit_volatility(records)
    for a in range(2):
        alone = fit_volatility(records[:, a])
        assert_allclose(alone.fit.values[0], both.fit.values[a], rtol=1e-5, atol=1e-8)
        assert_allclose(alone.next_variance[0], both.next_variance[a], rtol=1e-6)


@pytest.mark.parametrize("model", ["garch", "gjr", "tarch", "egarch"])
def test_scaling_the_returns_scales_the_fit(model):
    record = draw(500, 7, gamma=0.05, beta=0.83)
    small, large = fit_volatility(record, model=model), fit_volatility(1e3 * record, model=model)
    assert_allclose(large.next_variance, 1e6 * small.next_variance, rtol=1e-6)
    assert_allclose(large.fit["beta"], small.fit["beta"], rtol=1e-6)
    assert_allclose(large.fit.log_likelihood, small.fit.log_likelihood - 500 * np.log(1e3), rtol=1e-9)


@pytest.mark.parametrize("model", ["garch", "gjr", "tarch", "egarch"])
def test_variances_follow_the_recursion_through_holes(model):
    record = draw(500, 8, gamma=0.05, beta=0.83)
    record[200:230], record[300], record[-1] = np.nan, np.nan, np.nan
    found = fit_volatility(record, model=model, mean="zero")
    assert found.fit.n_observations[0] == 500 - 32 and found.fit.converged[0]
    omega, alpha, beta = (found.fit[name][0] for name in ("omega", "alpha", "beta"))
    gamma = found.fit["gamma"][0] if model != "garch" else 0.0
    path = np.append(found.variance[:, 0], found.next_variance)
    for t in range(500):
        h, e = path[t], record[t]
        if model == "egarch":
            z = e / np.sqrt(h)
            news = 0.0 if np.isnan(e) else alpha * (abs(z) - np.sqrt(2.0 / np.pi)) + gamma * z
            following = np.exp(omega + beta * np.log(h) + news)
        elif model == "tarch":
            s = np.sqrt(h)
            expected = (alpha + 0.5 * gamma) * np.sqrt(2.0 / np.pi) * s
            following = (omega + beta * s + (expected if np.isnan(e) else (alpha + gamma * (e < 0)) * abs(e))) ** 2
        else:
            expected = (alpha + 0.5 * gamma) * h
            following = omega + beta * h + (expected if np.isnan(e) else (alpha + gamma * (e < 0)) * e**2)
        assert_allclose(path[t + 1], following, rtol=1e-9)


def test_holes_cost_precision_only():
    record = draw(4000, 9)
    record[np.random.default_rng(0).random(4000) < 0.1] = np.nan
    fit = fit_volatility(record, mean="zero").fit
    # Three z-scores.
    assert np.abs((fit.values[0] - [0.05, 0.08, 0.87]) / fit.std_error()[0]).max() < 4.5


def test_rows_before_the_first_return_do_not_count():
    record = draw(500, 10)
    late = fit_volatility(np.append(np.full(100, np.nan), record))
    assert_allclose(late.fit.values, fit_volatility(record).fit.values, rtol=1e-7)
    assert_allclose(late.variance[:100, 0], late.variance[100, 0])


def test_half_life_follows_the_recent_level():
    record = np.append(draw(1000, 11), 3.0 * draw(1000, 12))
    even, recent = fit_volatility(record, mean="zero"), fit_volatility(record, mean="zero", half_life=150.0)
    level = [f.fit["omega"][0] / (1.0 - f.persistence()[0]) for f in (even, recent)]
    assert level[1] > level[0] or recent.persistence()[0] < even.persistence()[0]
    steady = fit_volatility(record, mean="zero", half_life=1e9)
    assert_allclose(steady.fit.values, even.fit.values, rtol=1e-4)


def test_persistence_options():
    record = draw(1500, 13, omega=0.01, alpha=0.1, beta=0.899)
    found = {name: fit_volatility(record, persistence=name) for name in ("stationary", "integrated", "free")}
    assert found["stationary"].persistence()[0] <= 1.0
    assert_allclose(found["integrated"].persistence(), 1.0, rtol=1e-12)
    assert found["integrated"].fit.n_parameters == found["stationary"].fit.n_parameters - 1
    heights = {name: fit.fit.log_likelihood[0] for name, fit in found.items()}
    assert heights["integrated"] <= heights["stationary"] + 1e-6 <= heights["free"] + 2e-6
    # alpha and beta are bound to sum to 1, so their errors are equal.
    error = found["integrated"].fit.std_error()[0]
    assert_allclose(error[2], error[3], rtol=1e-9)


def test_ewma_decay_is_the_best_on_a_grid():
    record = draw(800, 14)
    found = fit_volatility(record, model="ewma", mean="zero")
    first = np.average(record[:75] ** 2, weights=0.94 ** np.arange(75))

    def log_likelihood(decay):
        h, total = first, 0.0
        for value in record:
            total -= 0.5 * (np.log(2.0 * np.pi * h) + value**2 / h)
            h = decay * h + (1.0 - decay) * value**2
        return total

    best = found.fit["decay"][0]
    assert_allclose(found.fit.log_likelihood[0], log_likelihood(best), rtol=1e-10)
    assert all(log_likelihood(best + step) < found.fit.log_likelihood[0] for step in (-0.01, -0.002, 0.002, 0.01))


def test_feeds_the_market():
    from qpo_sim.market.volatility.egarch import egarch
    from qpo_sim.market.volatility.ewma import ewma as market_ewma
    from qpo_sim.market.volatility.garch import filtered_variance, garch

    records = np.stack([draw(600, 15), draw(600, 16)], axis=1)
    found = fit_volatility(records, model="gjr")
    model = garch(**found.market_options(), dtype=jnp.float64)
    again = filtered_variance(records, model, mean=found.fit["mean"])
    assert_allclose(again[:-1], found.variance, rtol=1e-9)
    assert_allclose(again[-1], model.initial_variance, rtol=1e-9)
    assert egarch(**fit_volatility(records, model="egarch").market_options()).n_slots == 0
    assert market_ewma(**fit_volatility(records, model="ewma", mean="zero").market_options()).n_slots == 0
    with pytest.raises(InputError, match="no counterpart"):
        fit_volatility(records, model="tarch").market_options()


def test_same_in_single_precision_sessions():
    record = draw(500, 17)
    expected = fit_volatility(record).fit.values
    with jax.enable_x64(False):
        assert_allclose(fit_volatility(record).fit.values, expected, rtol=1e-12)


def test_independent_returns_give_finite_numbers():
    found = fit_volatility(np.random.default_rng(18).standard_normal((400, 3)))
    assert np.isfinite(found.fit.values).all() and np.isfinite(found.variance).all()
    assert not np.isnan(found.fit.std_error()).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:50], "'BTC' has 50 values; the fit needs at least 100"),
        (lambda x: np.where([[True, False]], x, np.nan), "'ETH' has 0 values"),
        (lambda x: np.where([[True, False]], x, 0.01), "'ETH' is 0.01 in every row"),
        (lambda x: np.where([[True, False]], x, np.inf), "must be finite"),
    ],
)
@pytest.mark.parametrize("model", ["garch", "egarch"])
def test_bad_returns_are_named(change, message, model):
    pandas = pytest.importorskip("pandas")
    values = change(np.stack([draw(200, 19), draw(200, 20)], axis=1))
    with pytest.raises(InputError, match=message):
        fit_volatility(pandas.DataFrame(values, columns=["BTC", "ETH"]), model=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "grach"}, "did you mean 'garch'"),
        ({"innovation": "t"}, "innovation is 't'"),
        ({"persistence": "integrated", "model": "egarch"}, "choose stationary or free"),
        ({"half_life": 0.0}, "half_life is 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        fit_volatility(draw(200, 21), **options)


def test_ewma_refuses_what_it_cannot_do():
    record = draw(50, 22)
    with pytest.raises(InputError, match="decay is 1"):
        ewma(record, decay=1.0)
    with pytest.raises(InputError, match="no row in common"):
        ewma(np.where(np.arange(50)[:, None] % 2 == [[0, 1]], record[:, None], np.nan))


def test_ewma_leaves_a_hole_as_it_is():
    record = np.stack([draw(60, 23), draw(60, 24)], axis=1)
    record[40, 0] = np.nan
    before, after = ewma(record[:40]).covariance, ewma(record[:41]).covariance
    assert_allclose(after[0], before[0])
    assert_allclose(after[1, 1], 0.94 * before[1, 1] + 0.06 * record[40, 1] ** 2)
