import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate, stats

from qpo_sim.calibration import calibrate, filter_regimes, regime_student_t
from qpo_sim.calibration.inputs import pack
from qpo_sim.calibration.regime_student_t import Params, Settings, em_step, evaluate
from qpo_sim.calibration.starts import starting_params

FLOOR = 1e-3


def settings(**changes):
    values = {"sticky": 0.0, "scale_floor": FLOOR, "dof_floor": 2.1, "dof_cap": 200.0, "tolerance": 1e-5} | changes
    return Settings(*map(np.float64, values.values()), np.int32(100))


def standardised(values):
    return (values - np.nanmean(values, axis=0)) / np.nanstd(values, axis=0)


def test_likelihood_filter_and_smoother_equal_a_naive_implementation(record, two_regimes, naive_posterior):
    found = filter_regimes(record, two_regimes)
    total, filtered, smoothed = naive_posterior(record, two_regimes)
    assert_allclose(found.log_likelihood, total, rtol=1e-12)
    assert_allclose(found.filtered, filtered, atol=1e-11)
    assert_allclose(found.smoothed, smoothed, atol=1e-11)


def test_a_missing_value_is_integrated_out(two_regimes):
    k = 1
    single = Params(
        np.ones(1), np.ones((1, 1)), *(getattr(two_regimes, n)[k : k + 1] for n in ("mean", "scale", "dof"))
    )
    law = stats.multivariate_t(two_regimes.mean[k], two_regimes.scale[k], df=two_regimes.dof[k])
    density, _ = integrate.quad(lambda x: law.pdf([x, 0.02]), -2.0, 2.0, points=[0.0], epsabs=0.0, epsrel=1e-11)
    found = evaluate(pack(np.array([[np.nan, 0.02]])), single)
    assert_allclose(found.log_likelihood, np.log(density), rtol=1e-8)


def test_many_missing_patterns_cost_no_accuracy(two_regimes, simulate, naive_posterior):
    scale = np.stack([np.eye(6) * 1e-4, np.eye(6) * 9e-4]) + 2e-5
    market = Params(two_regimes.start, two_regimes.transition, np.zeros((2, 6)), scale, two_regimes.dof)
    rng = np.random.default_rng(3)
    values, _ = simulate(market, 120, seed=5)
    values[rng.random(values.shape) < 0.3] = np.nan
    assert len(pack(values).is_observed) > 30
    found, (total, _, smoothed) = evaluate(pack(values), market), naive_posterior(values, market)
    assert_allclose(found.log_likelihood, total, rtol=1e-12)
    assert_allclose(found.smoothed, smoothed, atol=1e-11)


def test_rows_without_any_value_only_let_the_chain_move_on(record, two_regimes):
    last = filter_regimes(record, two_regimes)
    longer = filter_regimes(np.vstack([record, np.full((3, 2), np.nan)]), two_regimes)
    assert_allclose(longer.log_likelihood, last.log_likelihood, rtol=1e-14)
    ahead = last.filtered[-1] @ np.linalg.matrix_power(two_regimes.transition, 3)
    assert_allclose(longer.filtered[-1], ahead, atol=1e-13)
    assert_allclose(longer.smoothed[:-3], last.smoothed, atol=1e-12)


@pytest.mark.parametrize("sticky", [0.0, 25.0])
def test_em_never_lowers_the_penalised_likelihood(record, sticky):
    values = standardised(record)
    observations, chosen = pack(values), settings(sticky=sticky)
    starts = starting_params(values, n_regimes=3, n_restarts=2, seed=1, dof=30.0)
    for restart in range(2):
        params, trace = jax.tree.map(lambda leaf, r=restart: leaf[r], starts), []
        for _ in range(120):
            params, objective = em_step(observations, params, chosen)
            trace.append(float(objective))
        assert trace[-1] > trace[0] + 10.0
        assert np.min(np.diff(trace)) > -1e-9


def test_the_fit_is_a_stationary_point_of_the_penalised_likelihood(record):
    fit = calibrate(record, n_regimes=2, n_restarts=2, tolerance=1e-10, max_iterations=5000, scale_floor=FLOOR)
    deviation = np.nanstd(record, axis=0)
    values = standardised(record)
    observations = pack(values)
    mean = (fit.mean - np.nanmean(record, axis=0)) / deviation
    root = np.linalg.cholesky(fit.scale / np.outer(deviation, deviation))

    def objective(free):
        scale = free["root"] @ jnp.swapaxes(free["root"], 1, 2)
        transition = jax.nn.softmax(free["transition"], axis=1)
        params = Params(jnp.asarray(fit.start), transition, free["mean"], scale, jnp.exp(free["log_dof"]))
        penalty = 0.5 * FLOOR * jnp.sum(jnp.trace(jnp.linalg.inv(scale), axis1=1, axis2=2))
        return evaluate(observations, params).log_likelihood - penalty

    at = {"transition": np.log(fit.transition), "mean": mean, "root": root, "log_dof": np.log(fit.dof)}
    slope = jax.grad(objective)(jax.tree.map(jnp.asarray, at))
    # A hundredth of a standard error away the slope would be of order 0.01 sqrt(400) = 0.2.
    for name, leaf in slope.items():
        leaf = np.tril(leaf) if name == "root" else np.asarray(leaf)
        assert np.abs(leaf).max() < 5e-3, name


def test_a_compiler_without_the_option_fits_without_it(monkeypatch):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_cpu_use_fusion_emitters'")

    monkeypatch.setattr(regime_student_t, "_fit_restarts_quick", refuse)
    monkeypatch.setattr(regime_student_t, "_fit_restarts", lambda *arguments: arguments)
    assert regime_student_t.fit_restarts(1, 2, 3, is_dof_fixed=True) == (1, 2, 3, True)


def test_one_regime_is_the_univariate_t_maximum_likelihood_fit():
    values = stats.t.rvs(3.5, loc=0.001, scale=0.02, size=1500, random_state=8)
    fit = calibrate(values, n_regimes=1, tolerance=1e-9, scale_floor=1e-9)
    dof, loc, scale = stats.t.fit(values, 3.0, loc=0.0, scale=0.02)
    assert_allclose(fit.log_likelihood, stats.t.logpdf(values, dof, loc, scale).sum(), atol=1e-4)
    assert fit.log_likelihood >= stats.t.logpdf(values, dof, loc, scale).sum() - 1e-6
    assert_allclose([fit.dof[0], fit.scale[0, 0, 0] ** 0.5], [dof, scale], rtol=2e-3)
    assert_allclose(fit.mean[0, 0], loc, atol=1e-5)


def test_one_regime_cannot_be_improved_by_a_general_optimiser():
    from scipy.optimize import minimize

    law = stats.multivariate_t([0.001, -0.002], [[4e-4, 2e-4], [2e-4, 9e-4]], df=4.5)
    values = law.rvs(size=600, random_state=2)
    fit = calibrate(values, n_regimes=1, tolerance=1e-10, scale_floor=1e-9)

    def loss(free):
        root = np.array([[np.exp(free[2]), 0.0], [free[3], np.exp(free[4])]]) * 0.02
        return -stats.multivariate_t(free[:2] * 0.01, root @ root.T, df=np.exp(free[5])).logpdf(values).sum()

    best = minimize(loss, [0.0, 0.0, 0.0, 0.0, 0.0, 1.5], method="BFGS", options={"gtol": 1e-4})
    assert_allclose(fit.log_likelihood, -best.fun, atol=1e-5)
    assert_allclose(fit.mean[0], best.x[:2] * 0.01, atol=1e-6)
    assert_allclose(fit.dof[0], np.exp(best.x[5]), rtol=1e-3)


def test_gaussian_regimes_equal_statsmodels(two_regimes, simulate):
    from statsmodels.tsa.regime_switching.markov_regression import MarkovRegression

    values = 100.0 * simulate(two_regimes, 500, seed=21)[0][:, 0]
    # statsmodels lets a known start make two transitions before the first value, as two rows without value do here.
    led = np.r_[np.nan, np.nan, values]
    fit = calibrate(led, n_regimes=2, dof=np.inf, tolerance=1e-9, scale_floor=1e-9, max_iterations=5000)
    peer = MarkovRegression(values, k_regimes=2, trend="c", switching_variance=True)
    peer.initialize_known(fit.start)
    ours = np.r_[fit.transition[0, 0], fit.transition[1, 0], fit.mean[:, 0], fit.scale[:, 0, 0]]
    at_ours = peer.smooth(ours)
    assert_allclose(fit.log_likelihood, at_ours.llf, rtol=1e-10)
    assert_allclose(fit.smoothed[2:], at_ours.smoothed_marginal_probabilities, atol=1e-8)
    improved = peer.fit(start_params=ours, disp=False)
    assert improved.llf - fit.log_likelihood < 1e-4
    assert_allclose(ours, improved.params, rtol=2e-2, atol=2e-3)
    assert np.isinf(fit.dof).all()
    assert fit.n_parameters == 2 + 1 + 2 * 2
