"""Discrete-time volatility components. Statistics within 4 standard errors (false alarm 6e-5 each), seeds fixed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qpo_sim import numerics
from qpo_sim.errors import InputError
from qpo_sim.market import regime, shock
from qpo_sim.market.volatility import asset_chain, component_garch, egarch, ewma, garch, ms_garch
from qpo_sim.random import Address, Stream, stream_key

F32, F64 = np.float32, np.float64
FAMILY = (garch, ewma, egarch, component_garch, ms_garch, asset_chain)
GARCHES = FAMILY[:-1]
CALM_AND_WILD = [[0.98, 0.02], [0.06, 0.94]]


def name_of(module):
    return module.__name__.rsplit(".", 1)[-1]


@partial(jax.jit, static_argnames=("n_rows", "n_steps", "kind"))
def draws(key, *, n_rows, n_steps, kind):
    """(steps, rows) draws of one slot, outside the loop so that models compile fast."""
    row = jnp.arange(n_rows, dtype=jnp.uint32)
    return lax.map(lambda t: getattr(Address(key, row, t, 0), kind)(1)[0], jnp.arange(n_steps, dtype=jnp.int32))


def shocks(n_paths, n_steps, *, n_assets=1, dtype=F64, seed=1, dof=None):
    """Independent standardised shocks (steps, assets, paths): Gaussian, or Student-t with all its tail."""
    options = dict(n_rows=n_assets * n_paths, n_steps=n_steps)
    eps = draws(stream_key(seed, Stream.SHOCK), kind="normals", **options).astype(dtype)
    if dof is not None:
        coefficients = shock.mixing_coefficients(jnp.asarray([dof], dtype))
        score = draws(stream_key(seed, Stream.MIXING), kind="scores", **options).astype(dtype)
        eps = shock.mixing_scale(score, (), coefficients, jnp.asarray(shock.score_floor(0.0), dtype)) * eps
    return eps.reshape(n_steps, n_assets, n_paths)


def simulate(
    model, n_paths, n_steps, *, n_assets=1, dtype=F64, burn=0, seed=1, chain=None, dof=None, sub_steps=1, jit=True
):
    """Shocks, factors and regimes after `burn` steps: (steps, assets, paths) twice, (steps, regimes - 1, paths).

    `chain` is the transition matrix of the regimes and the law of the regime just before the first step.
    """
    path, one = jnp.arange(n_paths, dtype=jnp.uint32), jnp.ones(n_paths, dtype)
    key = stream_key(seed, Stream.VOLATILITY)
    eps = shocks(n_paths, burn + n_steps, n_assets=n_assets, dtype=dtype, seed=seed, dof=dof)
    u, first = (
        draws(stream_key(seed, stream), n_rows=n_paths, n_steps=n, kind="uniforms").astype(dtype)
        for stream, n in ((Stream.REGIME, burn + n_steps), (Stream.START, 1))
    )
    is_matrix = n_assets > numerics.MAX_UNROLLED_ASSETS

    def whole(model, eps, u, first):
        prepared = model.prepare(sub_steps=sub_steps, step_hours=24.0 / sub_steps)
        masks, cuts = (), None
        if chain is not None:
            transition, law = (jnp.asarray(x, dtype) for x in chain)
            cuts = regime.thresholds(transition)
            masks = regime.masks_from_uniform(first, list(regime.thresholds(law)))

        def step(carry, draw):
            (masks, state), (t, eps, u) = carry, draw
            rows = eps if is_matrix else tuple(eps)
            masks = masks if cuts is None else regime.next_masks(u, masks, cuts)
            state, local = model.open(prepared, t, state, masks, Address(key, path, t + 1, 3))
            state = model.close(prepared, t, state, masks, local, rows)
            return (masks, state), (jnp.stack(list(local.factor)), jnp.stack(masks) if masks else ())

        start = model.init(prepared, one, n_assets, burn + n_steps, Address(key, path, jnp.zeros((), jnp.int32), 3))
        carry, steps = (masks, start), (jnp.arange(burn + n_steps, dtype=jnp.int32), eps, u)
        if burn:
            carry, _ = lax.scan(lambda c, d: (step(c, d)[0], None), carry, jax.tree.map(lambda x: x[:burn], steps))
        return lax.scan(step, carry, jax.tree.map(lambda x: x[burn:], steps))[1]

    return eps[burn:], *(jax.jit(whole) if jit else whole)(model, eps, u, first[0])


def host(records):
    return tuple(np.asarray(record, F64) if not isinstance(record, tuple) else record for record in records)


def assert_estimate(function, samples, expected, n_sigma=4.0):
    """A smooth function of means of per-path samples, with the error of the delta method."""
    samples = np.asarray(samples, F64)
    means = samples.mean(axis=1)
    value, slope = jax.value_and_grad(function)(jnp.asarray(means))
    error = np.std(np.asarray(slope) @ samples, ddof=1) / np.sqrt(samples.shape[1])
    rounding = 1e-12 * abs(expected)
    assert abs(float(value) - expected) <= n_sigma * error + rounding, (float(value), expected, error)


def assert_mean(sample, expected):
    assert_estimate(lambda m: m[0], np.asarray(sample)[None], expected)


def kurtosis(m):
    return m[1] / m[0] ** 2


def square_correlation(m):
    return (m[2] - m[0] ** 2) / (m[1] - m[0] ** 2)


def assert_second_order(news, variance, expected_kurtosis, acf):
    """Variance, kurtosis and autocorrelation of squares of stationary news (steps, paths); acf = {lag: value}."""
    square = news**2
    moments = [square.mean(axis=0), (square**2).mean(axis=0)]
    assert_mean(moments[0], variance)
    assert_estimate(kurtosis, moments, expected_kurtosis)
    for lag, value in acf.items():
        cross = (square[lag:] * square[:-lag]).mean(axis=0)
        assert_estimate(square_correlation, [*moments, cross], value)


# Cases


def test_garch_moments(cases):
    case = cases("models")["A08"]
    p, expected = case["inputs"], case["expected"]
    model = garch.garch(p["omega"], p["alpha"], p["beta"], dtype=F64)
    rel = case["tolerance"]["closed_form_rel"]
    np.testing.assert_allclose(model.stationary_variance(), expected["variance"], rtol=rel)
    eps, factor, _ = host(simulate(model, 1 << 16, 60, burn=250))
    news = (eps * factor)[:, 0]
    first, decay = expected["acf_squares_lag1"], expected["acf_squares_decay"]
    acf = {lag: first * decay ** (lag - 1) for lag in (1, 2, 5, 20)}
    assert_second_order(news, expected["variance"], expected["kurtosis"], acf)
    for h, value in expected["kurtosis_h_day_sum"].items():
        total = news.reshape(-1, int(h), news.shape[1]).sum(axis=1)
        assert_estimate(kurtosis, [(total**2).mean(axis=0), (total**4).mean(axis=0)], value)


def test_egarch_moments(cases):
    case = cases("models")["A11"]
    p, expected = case["inputs"], case["expected"]
    model = egarch.egarch(p["omega"], p["alpha"], p["beta"], p["gamma"], dtype=F64)
    rel = case["tolerance"]["closed_form_rel"]
    np.testing.assert_allclose(model.stationary_variance(), expected["variance"], rtol=rel)
    np.testing.assert_allclose(model.initial_variance, expected["variance"], rtol=rel)
    parameters = p["omega"], p["alpha"], p["beta"], p["gamma"]
    log_ratio = egarch.log_mean_variance(*parameters, power=2.0) - 2.0 * egarch.log_mean_variance(*parameters)
    np.testing.assert_allclose(3.0 * np.exp(log_ratio), expected["kurtosis"], rtol=rel)
    naive = np.exp(p["omega"] / (1.0 - p["beta"]))
    np.testing.assert_allclose(naive, expected["naive_exp_mean_log"], rtol=rel)
    single = egarch.egarch(*parameters, dtype=F32)
    eps, factor, _ = host(simulate(single, 1 << 16, 40, burn=600, dtype=F32))
    assert_second_order((eps * factor)[:, 0], expected["variance"], expected["kurtosis"], {})


def test_filter_and_forecast_against_arch(cases):
    sp500 = pytest.importorskip("arch.data.sp500")
    case = cases("models")["A12"]
    p, expected, tolerance = case["inputs"]["params"], case["expected"], case["tolerance"]["abs"]
    returns = 100.0 * sp500.load()["Adj Close"].pct_change().dropna().to_numpy()
    assert len(returns) == expected["n_obs"]
    assert abs(garch.arch_backcast(returns[:, None])[0] - expected["backcast"]) < tolerance
    model = garch.garch(p["omega"], p["alpha"], p["beta"], dtype=F64)
    variance = garch.filtered_variance(returns, model, mean=p["mu"])[:, 0]
    assert variance.shape == (len(returns) + 1,)
    residual = returns - p["mu"]
    terms = np.log(2.0 * np.pi) + np.log(variance[:-1]) + residual**2 / variance[:-1]
    assert abs(-0.5 * terms.sum() - expected["loglik"]) < tolerance
    forecast = garch.variance_forecast(model, variance[-1], 20)[:, 0]
    for h in (1, 5, 20):
        assert abs(forecast[h - 1] - expected[f"variance_forecast_h{h}"]) < tolerance
    assert abs(forecast.sum() - expected["h20_day_cumulative_variance"]) < tolerance


def test_ms_garch_moments(cases):
    case = cases("models")["A28"]
    p, expected, rel = case["inputs"], case["expected"], case["tolerance"]["closed_form_rel"]
    model = ms_garch.ms_garch(p["omega"], p["alpha"], p["beta"], p["P"], dtype=F64)
    np.testing.assert_allclose(model.stationary_variance(), expected["unconditional_variance"], rtol=rel)
    np.testing.assert_allclose(model.spectral_radius(), expected["spectral_radius"], rtol=rel)
    law = asset_chain.stationary_law(np.array(p["P"]))
    np.testing.assert_allclose(law, expected["stationary_prob"], rtol=rel)
    own = np.einsum("jja->j", model.variance_given_regime())
    np.testing.assert_allclose(own, expected["E_h_given_regime"], rtol=rel)
    # The start given the first regime makes every step stationary, the first one and those far from it.
    for burn in (0, 300):
        eps, factor, masks = host(simulate(model, 1 << 16, 3, burn=burn, chain=(p["P"], law)))
        square = factor[:, 0] ** 2
        assert_mean(((eps * factor)[:, 0] ** 2).mean(axis=0), expected["unconditional_variance"])
        for k, value in enumerate(expected["E_h_given_regime"]):
            held = masks[0, 0] == k
            assert_mean(square[0][held], value)


def test_garch_student_t_over_a_month(cases):
    case = cases("models")["B21"]
    p, expected, tolerance = case["inputs"], case["expected"], case["tolerance"]
    start = 1.5 * p["omega"] / (1.0 - p["alpha"] - p["beta"])
    model = garch.garch(p["omega"], p["alpha"], p["beta"], initial_variance=start, dtype=F64)
    exact = garch.variance_forecast(model, start, p["days"]).sum()
    np.testing.assert_allclose(exact, expected["variance_30d_exact"], rtol=tolerance["variance_rel"])
    n_paths = 1 << 20
    model = garch.garch(p["omega"], p["alpha"], p["beta"], initial_variance=start, dtype=F32)
    eps, factor, _ = simulate(model, n_paths, p["days"], dtype=F32, dof=p["nu"])
    log_price = np.cumsum(p["mean"] + np.asarray(eps * factor)[:, 0], axis=0, dtype=F64)
    loss = -log_price[-1]
    assert_mean((log_price[-1] - p["days"] * p["mean"]) ** 2, exact)
    for level, value in expected["VaR_log"].items():
        var = np.quantile(loss, float(level))
        assert abs(var - value) < tolerance["mc_abs"]["VaR_log"]
        assert abs(loss[loss >= var].mean() - expected["ES_log"][level]) < tolerance["mc_abs"]["ES_log"]
    low = log_price.min(axis=0)
    for barrier, value in expected["prob_hit"].items():
        error = np.hypot(expected["se_prob"][barrier], np.sqrt(value * (1.0 - value) / n_paths))
        assert abs(np.mean(low <= np.log(float(barrier))) - value) < 4.0 * error


# Moments against theory


def test_gjr_moments():
    omega, alpha, beta, gamma = 3e-5, 0.03, 0.85, 0.12
    model = garch.garch(omega, alpha, beta, gamma, dtype=F64)
    p = alpha + 0.5 * gamma + beta
    second = beta**2 + 2.0 * beta * (alpha + 0.5 * gamma) + 3.0 * (alpha**2 + alpha * gamma + 0.5 * gamma**2)
    value = 3.0 * (1.0 - p**2) / (1.0 - second)
    np.testing.assert_allclose(model.stationary_variance(), omega / (1.0 - p), rtol=1e-13)
    eps, factor, _ = host(simulate(model, 1 << 16, 40, burn=250, seed=2))
    assert_second_order((eps * factor)[:, 0], omega / (1.0 - p), value, {})
    # Falls raise the next variance by gamma e^2 more: regression of h' on the two squares is exact.
    h, news = factor[:, 0] ** 2, (eps * factor)[:, 0]
    columns = [np.ones_like(h[1:]), news[:-1] ** 2, news[:-1] ** 2 * (news[:-1] < 0.0), h[:-1]]
    found = np.linalg.lstsq(np.stack([c[:, :50].ravel() for c in columns], axis=1), h[1:, :50].ravel(), rcond=None)[0]
    np.testing.assert_allclose(found, [omega, alpha, gamma, beta], rtol=1e-8)


def _component_theory(level, rho, phi, alpha, beta, lags):
    # x = (h, q), x' = c + (A + z^2 R) x with Gaussian z: second moments of x and of z^2 h by linear equations.
    memory = np.array([[beta - phi, rho - alpha - beta], [-phi, rho]])
    news = np.array([[alpha + phi, 0.0], [phi, 0.0]])
    c = level * (1.0 - rho) * np.ones(2)
    mean = np.linalg.solve(np.eye(2) - memory - news, c)
    step = memory + news
    square = np.kron(memory, memory) + np.kron(memory, news) + np.kron(news, memory) + 3.0 * np.kron(news, news)
    constant = np.kron(c, c) + (np.kron(c[:, None], step) + np.kron(step, c[:, None])) @ mean
    second = np.linalg.solve(np.eye(4) - square, constant)
    m4 = 3.0 * second[0]
    # E[z^2 h (x' - mean)], then forward by the mean dynamics.
    cross = c * mean[0] + memory @ second[[0, 1]] + news @ (3.0 * second[[0, 1]]) - mean * mean[0]
    acf = {}
    for lag in range(1, max(lags) + 1):
        acf[lag] = cross[0] / (m4 - mean[0] ** 2)
        cross = step @ cross
    return mean, m4 / mean[0] ** 2, {lag: acf[lag] for lag in lags}


def test_component_garch_moments():
    level, rho, phi, alpha, beta = 4e-4, 0.98, 0.03, 0.06, 0.8
    mean, value, acf = _component_theory(level, rho, phi, alpha, beta, (1, 5, 15))
    np.testing.assert_allclose(mean, level)
    model = component_garch.component_garch(level, rho, phi, alpha, beta, dtype=F64)
    np.testing.assert_allclose(model.stationary_variance(), level, rtol=1e-15)
    eps, factor, _ = host(simulate(model, 1 << 16, 40, burn=600, seed=3))
    assert_second_order((eps * factor)[:, 0], level, value, acf)


def test_ewma_variance_is_a_martingale():
    model = ewma.ewma(4e-4, 0.94, dtype=F64)
    assert model.stationary_variance() is None
    eps, factor, _ = host(simulate(model, 1 << 16, 30, seed=4))
    for t in (0, 10, 29):
        np.testing.assert_allclose(factor[0], 0.02, rtol=1e-14)
        if t:
            assert_mean(factor[t, 0] ** 2, 4e-4)


def test_asset_chain_law():
    transition = np.array([[[0.95, 0.04, 0.01], [0.1, 0.85, 0.05], [0.02, 0.2, 0.78]], np.full((3, 3), 1.0 / 3.0)])
    scale = np.array([0.5, 1.0, 3.0])
    model = asset_chain.asset_chain(scale, transition, dtype=F64)
    law = asset_chain.stationary_law(transition)
    np.testing.assert_allclose(np.einsum("ik,ikj->ij", law, transition), law, atol=1e-14)
    np.testing.assert_allclose(model.stationary_variance(), law @ scale**2, rtol=1e-12)
    eps, factor, _ = host(simulate(model, 1 << 16, 30, n_assets=2, dtype=F64))
    state = np.searchsorted(scale - 1e-6, factor) - 1
    np.testing.assert_allclose(factor, scale[state], rtol=1e-14)
    for i in range(2):
        for k in range(3):
            for t in (0, 29):
                assert_mean(state[t, i] == k, law[i, k])
            held = state[3, i] == k
            for j in range(3):
                assert_mean(state[4, i][held] == j, transition[i, k, j])
    # The chains know nothing of each other, of their shocks, or of the next uniform of the same slot.
    for a, b in ((factor[7, 0], factor[7, 1]), (factor[7, 0], eps[7, 0]), (factor[7, 1], eps[6, 0])):
        assert_mean((a - a.mean()) * (b - b.mean()), 0.0)


def test_asset_chain_starts_from_its_initial_law():
    transition = np.array([[0.9, 0.1], [0.3, 0.7]])
    model = asset_chain.asset_chain([1.0, 2.0], transition, initial=[0.2, 0.8], n_assets=3, dtype=F32)
    factor = host(simulate(model, 1 << 16, 2, n_assets=3, dtype=F32))[1]
    first = np.array([0.2, 0.8]) @ transition
    for i in range(3):
        assert_mean(factor[0, i] == 2.0, first[1])
        assert_mean((factor[0, i] == 2.0) & (factor[1, i] == 1.0), first[1] * transition[1, 0])


def test_asset_chain_normalised_keeps_the_variance():
    given = asset_chain.asset_chain([1.0, 3.0], CALM_AND_WILD, dtype=F64)
    model = asset_chain.asset_chain([1.0, 3.0], CALM_AND_WILD, normalised=True, dtype=F64)
    np.testing.assert_allclose(given.stationary_variance(), 0.75 + 0.25 * 9.0, rtol=1e-13)
    np.testing.assert_allclose(model.stationary_variance(), 1.0, rtol=1e-13)
    np.testing.assert_allclose(model.scale[:, 1] / model.scale[:, 0], 3.0, rtol=1e-14)
    assert_mean(host(simulate(model, 1 << 16, 1, dtype=F64))[1][0, 0] ** 2, 1.0)


def test_asset_chain_is_held_within_a_base_step():
    model = asset_chain.example(3, F64)
    assert not model.needs_base_step and model.n_slots == 2
    whole = host(simulate(model, 256, 12, n_assets=3))[1]
    cut = host(simulate(model, 256, 48, n_assets=3, sub_steps=4))[1]
    np.testing.assert_array_equal(cut.reshape(12, 4, 3, 256), np.repeat(whole[:, None], 4, axis=1))


def test_asset_chain_mirror_reverses_the_uniforms():
    model = asset_chain.asset_chain([1.0, 2.0], np.full((2, 2), 0.5), dtype=F64)
    prepared = model.prepare(sub_steps=1, step_hours=24.0)
    path, t = jnp.arange(512, dtype=jnp.uint32), jnp.zeros((), jnp.int32)
    key = stream_key(5, Stream.VOLATILITY)
    found = []
    for mirror in (None, jnp.full(512, 0xFFFFFFFF, jnp.uint32)):
        at = Address(key, path, t + 1, 0, mirror)
        state = model.init(prepared, jnp.ones(512), 1, 1, at)
        found.append(np.asarray(model.open(prepared, t, state, (), at)[1].factor[0]))
    np.testing.assert_array_equal(found[0] + found[1], 3.0)


# The recursion itself, against independent loops


def _loop_garch(m, z, masks):
    h = m["initial_variance"]
    for eps in z:
        yield np.sqrt(h)
        e = np.sqrt(h) * eps
        h = m["omega"] + m["alpha"] * e**2 + m["gamma"] * e**2 * (e < 0.0) + m["beta"] * h


def _loop_ewma(m, z, masks):
    h = m["initial_variance"]
    for eps in z:
        yield np.sqrt(h)
        h = m["decay"] * h + (1.0 - m["decay"]) * h * eps**2


def _loop_egarch(m, z, masks):
    h = m["initial_variance"]
    for eps in z:
        yield np.sqrt(h)
        news = m["alpha"] * (np.abs(eps) - np.sqrt(2.0 / np.pi)) + m["gamma"] * eps
        h = np.exp(m["omega"] + m["beta"] * np.log(h) + news)


def _loop_component_garch(m, z, masks):
    h, q = m["initial_variance"], m["initial_permanent"]
    for eps in z:
        yield np.sqrt(h)
        square = h * eps**2
        q_next = m["level"] + m["permanence"] * (q - m["level"]) + m["permanent_news"] * (square - h)
        h, q = q_next + m["alpha"] * (square - q) + m["beta"] * (h - q), q_next


def _loop_ms_garch(m, z, masks):
    h = None
    for eps, mask in zip(z, masks, strict=True):
        state = mask[0].astype(int)
        if h is None:
            h = np.moveaxis(m["initial_variance"][..., 0][state], 0, -1)
            h = np.stack([m["initial_variance"][state, :, i].T for i in range(len(eps))], axis=1)
        held = np.take_along_axis(h, state[None, None, :], axis=0)[0]
        yield np.sqrt(held)
        e = np.sqrt(held) * eps
        h = m["omega"] + m["alpha"] * e**2 + m["beta"] * h


@pytest.mark.parametrize("module", GARCHES, ids=name_of)
@pytest.mark.parametrize("n_assets", [3, 33])
def test_recursion_against_a_loop(module, n_assets):
    model = module.example(n_assets, F64)
    chain = (CALM_AND_WILD, [0.5, 0.5]) if module is ms_garch else None
    eps, factor, masks = host(simulate(model, 64, 50, n_assets=n_assets, chain=chain))
    leaves = {field.name: np.asarray(getattr(model, field.name)) for field in dataclasses.fields(model)}
    named = {name: leaf if name == "transition" or leaf.ndim == 3 else leaf[..., None] for name, leaf in leaves.items()}
    loop = globals()[f"_loop_{name_of(module)}"](named, eps, masks)
    expected = np.stack([np.broadcast_to(row, factor.shape[1:]) for row in loop])
    np.testing.assert_allclose(factor, expected, rtol=1e-13)


def test_recursion_against_arch():
    """What arch filters out of simulated returns is what was simulated, once its own start is forgotten."""
    arch = pytest.importorskip("arch")
    n = 1500
    models = {
        "GARCH": (garch.garch(0.05, 0.04, 0.8, 0.1, dtype=F64), ("omega", "alpha", "gamma", "beta")),
        "EGARCH": (egarch.egarch(0.02, 0.2, 0.95, -0.1, dtype=F64), ("omega", "alpha", "gamma", "beta")),
    }
    for vol, (model, order) in models.items():
        eps, factor, _ = host(simulate(model, 1, n))
        returns = (eps * factor)[:, 0, 0]
        reference = arch.arch_model(returns, mean="Constant", vol=vol, p=1, o=1, q=1, rescale=False)
        fixed = reference.fix([0.0] + [float(getattr(model, name)[0]) for name in order])
        volatility = np.asarray(fixed.conditional_volatility)
        np.testing.assert_allclose(volatility[800:], factor[800:, 0, 0], rtol=1e-10)
        if vol == "GARCH":
            mine = garch.filtered_variance(returns, model)
            np.testing.assert_allclose(mine[:-1, 0], volatility**2, rtol=1e-11)
            ahead = fixed.forecast(horizon=7).variance.to_numpy()[-1]
            np.testing.assert_allclose(garch.variance_forecast(model, mine[-1], 7)[:, 0], ahead, rtol=1e-11)


def test_filter_continues_a_simulation():
    model = garch.garch([2e-5, 4e-5], [0.05, 0.1], [0.9, 0.8], [0.04, 0.0], initial_variance=1e-3, dtype=F64)
    eps, factor, _ = host(simulate(model, 1, 60, n_assets=2))
    total = garch.persistence(*(np.asarray(x) for x in (model.alpha, model.beta, model.gamma)))
    backcast = (1e-3 - np.asarray(model.omega)) / total
    variance = garch.filtered_variance((eps * factor)[:, :, 0] + 0.001, model, mean=0.001, backcast=backcast)
    assert variance.shape == (61, 2)
    np.testing.assert_allclose(variance[:-1], factor[:, :, 0] ** 2, rtol=1e-12)
    smooth = ewma.filtered_variance(np.array([0.01, -0.02, 0.0]), 0.9, backcast=1e-4)
    np.testing.assert_allclose(smooth[:, 0], [1e-4, 1e-4, 0.9e-4 + 0.4e-4, 0.9 * 1.3e-4], rtol=1e-13)


# Limits


def test_garch_without_news_is_constant():
    factor = host(simulate(garch.garch(4e-4, 0.0, 0.0, dtype=F64), 32, 20))[1]
    np.testing.assert_allclose(factor, 0.02, rtol=1e-15)
    log = egarch.egarch(np.log(4e-4), 0.0, 0.0, dtype=F64)
    np.testing.assert_allclose(host(simulate(log, 32, 20))[1], 0.02, rtol=1e-14)
    chain = asset_chain.asset_chain([2.0, 2.0], CALM_AND_WILD, dtype=F64)
    np.testing.assert_array_equal(host(simulate(chain, 32, 20))[1], 2.0)


def test_models_that_contain_garch():
    plain = garch.garch(2e-5, 0.1, 0.85, dtype=F64)
    expected = host(simulate(plain, 64, 100))[1]
    others = {
        "gamma = 0": garch.garch(2e-5, 0.1, 0.85, 0.0, dtype=F64),
        "one regime": ms_garch.ms_garch([2e-5], [0.1], [0.85], [[1.0]], dtype=F64),
        "no permanent news": component_garch.component_garch(4e-4, 0.99, 0.0, 0.1, 0.85, dtype=F64),
    }
    for name, model in others.items():
        np.testing.assert_allclose(host(simulate(model, 64, 100))[1], expected, rtol=1e-12, err_msg=name)
    equal = ms_garch.ms_garch([2e-5] * 2, [0.1] * 2, [0.85] * 2, CALM_AND_WILD, dtype=F64)
    found = host(simulate(equal, 64, 100, chain=(CALM_AND_WILD, [0.5, 0.5])))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(equal.stationary_variance(), plain.stationary_variance(), rtol=1e-12)
    np.testing.assert_allclose(equal.spectral_radius(), 0.95, rtol=1e-12)
    # Without constant and with the weights summing to one it is the exponentially weighted variance.
    smooth = ewma.ewma(4e-4, 0.9, dtype=F64)
    limit = dataclasses.replace(plain, omega=0.0 * plain.omega, alpha=0.1 + 0 * plain.alpha, beta=0.9 + 0 * plain.beta)
    np.testing.assert_allclose(host(simulate(smooth, 64, 100))[1], host(simulate(limit, 64, 100))[1], rtol=1e-12)


@pytest.mark.parametrize("beta", [0.9999, 0.999, 0.5, 0.0, -0.7])
def test_egarch_product_is_summed_to_the_end(beta):
    """Against the plain product over all terms that differ from 1 in double precision."""
    from scipy import special

    omega, alpha, gamma = -0.002, 0.02, -0.01
    s = beta ** np.arange(1 if beta == 0.0 else int(np.ceil(-25.0 / np.log(abs(beta)))))
    a, b = s * (alpha + gamma), s * (alpha - gamma)
    terms = np.exp(a**2 / 2) * special.ndtr(a) + np.exp(b**2 / 2) * special.ndtr(b)
    expected = omega / (1.0 - beta) + np.sum(np.log(terms) - s * alpha * np.sqrt(2.0 / np.pi))
    np.testing.assert_allclose(egarch.log_mean_variance(omega, alpha, beta, gamma), expected, rtol=1e-9)


def test_component_garch_stays_positive():
    """No sequence of news, however long without any or however large, makes the variance negative."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        rho = rng.uniform(0.5, 0.999)
        total = rho * rng.uniform(0.2, 0.999)
        alpha = total * rng.uniform(0.0, 1.0)
        beta = total - alpha
        phi = beta * rng.uniform(0.0, 1.0)
        slower = 0.5 * (rho + beta - phi + np.sqrt((rho - beta - phi) ** 2 + 4.0 * alpha * phi))
        start = 0.999 * (rho - total) / (rho - slower)
        options = dict(initial_variance=min(start, 50.0), dtype=F64)
        model = component_garch.component_garch(1.0, rho, phi, alpha, beta, **options)
        prepared = model.prepare(sub_steps=1, step_hours=24.0)
        state = model.init(prepared, np.ones(4), 1, 200, None)
        state = jax.tree.map(np.asarray, state)
        leaves = [float(getattr(model, name)[0]) for name in ("level", "permanence", "permanent_news", "alpha", "beta")]
        h, q = state.variance[0], state.permanent[0]
        for t in range(200):
            assert np.all(h > 0.0)
            size = [0.0, 6.0 if t == 0 else 0.0, 3.0 * (t % 40 == 0), 3.0 * (t < 20)]
            h, q = component_garch._next_variances(h, q, np.array(size), *leaves)


# Borders


REFUSALS = [
    (lambda: garch.garch(0.0, 0.1, 0.8), r"garch\.omega is 0; it must be positive"),
    (lambda: garch.garch(1e-5, [0.1, -0.2], 0.8), r"garch\.alpha\[1\] is -0\.2.*negative"),
    (lambda: garch.garch(1e-5, 0.1, -0.8), r"garch\.beta is -0\.8.*negative"),
    (lambda: garch.garch(1e-5, 0.1, 0.8, -0.2), r"alpha \+ garch\.gamma is -0\.1"),
    (lambda: garch.garch(1e-5, 0.1, 0.9), r"alpha \+ gamma/2 \+ beta is 1; it must be below 1 .*ewma"),
    (lambda: garch.garch(1e-5, 0.1, 0.85, 0.1), r"gamma/2 \+ beta is 1"),
    (lambda: garch.garch(1e-5, 0.1, 0.8, initial_variance=-1.0), r"initial_variance is -1; it must be positive"),
    (lambda: garch.garch(1e-5, [0.1, 0.1], [0.8, 0.8, 0.8]), r"garch\.alpha has 2 values for 3 assets"),
    (lambda: garch.garch(1e-5, [[0.1]], 0.8), r"garch\.alpha has the shape \(1, 1\)"),
    (lambda: garch.garch(1e-5, np.nan, 0.8), r"garch\.alpha is nan; every value must be finite"),
    (lambda: garch.garch(1e-5, "much", 0.8), r"garch\.alpha is 'much'; it must be a number"),
    (lambda: ewma.ewma(1e-4, 1.0), r"ewma\.decay is 1; it must lie strictly between 0 and 1"),
    (lambda: ewma.ewma(0.0), r"ewma\.initial_variance is 0; it must be positive"),
    (lambda: egarch.egarch(-0.1, 0.1, 1.0), r"egarch\.beta is 1; its size must be below 1"),
    (lambda: egarch.egarch(-0.1, 0.1, -1.5), r"egarch\.beta is -1\.5"),
    (lambda: egarch.egarch(-9.0, 0.1, 0.99), r"log-variance of egarch is -8.*no usable variance"),
    (lambda: component_garch.component_garch(1e-4, 1.0, 0.0, 0.1, 0.8), r"permanence is 1; it must be below 1"),
    (lambda: component_garch.component_garch(1e-4, 0.9, 0.0, 0.1, 0.85), r"alpha \+ beta is 0\.95.*below the perm"),
    (lambda: component_garch.component_garch(1e-4, 0.99, 0.3, 0.1, 0.2), r"permanent_news is 0\.3.*not exceed beta"),
    (
        lambda: component_garch.component_garch(1e-4, 0.99, 0.03, 0.08, 0.8, initial_variance=1e-3),
        r"initial_variance\[0\] is 0\.001.*must not exceed 0\.000[67].*raise initial_permanent",
    ),
    (lambda: ms_garch.ms_garch([1, 1], [0.1, 0.4], [0.9, 0.9], CALM_AND_WILD), r"spectral radius of ms_garch is 1\."),
    (lambda: ms_garch.ms_garch([1, 1], [0.1, 0.1], [0.8, 0.8], [[0.9, 0.2], [0.5, 0.5]]), r"sum of .*\[0\] is 1\.1"),
    (lambda: ms_garch.ms_garch([1, 1], [0.1, 0.1], [0.8, -0.8], CALM_AND_WILD), r"ms_garch\.beta\[1, 0\] is -0\.8"),
    (lambda: ms_garch.ms_garch([1, 0], [0.1, 0.1], [0.8, 0.8], CALM_AND_WILD), r"ms_garch\.omega\[1, 0\] is 0"),
    (lambda: ms_garch.ms_garch([1, 1, 1], 0.1, 0.8, CALM_AND_WILD), r"ms_garch\.omega has the shape \(3,\).*2 regime"),
    (lambda: ms_garch.ms_garch([1, 1], [0.1, 0.1], [0.8, 0.8], np.eye(2)), r"no unique stationary law"),
    (
        lambda: asset_chain.asset_chain([1.0, -1.0], CALM_AND_WILD),
        r"asset_chain\.scale\[1\] is -1; it must be positive",
    ),
    (lambda: asset_chain.asset_chain([1.0, 2.0], [[0.9, 0.2], [0.1, 0.9]]), r"sum of asset_chain\.transition\[0\] is"),
    (lambda: asset_chain.asset_chain([1.0, 2.0], [[1.1, -0.1], [0, 1]]), r"transition\[0, 0\] is 1\.1; a probability"),
    (lambda: asset_chain.asset_chain([1.0, 2.0, 3.0], CALM_AND_WILD), r"scale has the shape \(3,\); with 2 states"),
    (
        lambda: asset_chain.asset_chain([1.0, 2.0], [[0.9, 0.1]]),
        r"transition has the shape \(1, 2\); it must be square",
    ),
    (lambda: asset_chain.asset_chain([1.0], [[1.0]]), r"1 state; a chain needs at least 2"),
    (lambda: asset_chain.asset_chain([1.0, 2.0], np.eye(2)), r"no unique stationary law"),
    (lambda: asset_chain.asset_chain([1.0, 2.0], CALM_AND_WILD, initial=[0.5, 0.4]), r"sum of asset_chain\.initial is"),
    (lambda: garch.filtered_variance(np.zeros((5, 2)), garch.example(3, F64)), r"shape \(5, 2\).*3 asset"),
    (lambda: garch.filtered_variance([0.1, np.nan], garch.example(1, F64)), r"returns\[1, 0\] is nan"),
]


@pytest.mark.parametrize("build, message", REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize("module", FAMILY, ids=name_of)
def test_number_of_assets_must_match(module):
    model = module.example(2, F64)
    with pytest.raises(InputError, match="parameters for 2 asset.*market has 3"):
        model.init(model.prepare(sub_steps=1, step_hours=24.0), jnp.ones(4), 3, 1, None)


@pytest.mark.parametrize("module", FAMILY, ids=name_of)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_is_well_formed(module, dtype):
    model = module.example(4, dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(model))
    assert model.needs_base_step == (module is not asset_chain)
    variance = model.stationary_variance()
    if module is not ewma:
        assert variance.shape == (4,) and variance.dtype == F64 and np.all(variance > 0.0)
    if module is not asset_chain and module is not ewma:
        assert np.all((np.sqrt(variance * 365.0) > 0.5) & (np.sqrt(variance * 365.0) < 1.0))


def test_starts_given_by_hand():
    two = ms_garch.ms_garch([1.0, 2.0], [0.1, 0.1], [0.8, 0.8], CALM_AND_WILD, initial_variance=[4.0, 9.0], dtype=F64)
    _, factor, masks = host(simulate(two, 64, 1, chain=(CALM_AND_WILD, [0.5, 0.5])))
    np.testing.assert_array_equal(factor[0, 0], np.where(masks[0, 0] == 1.0, 3.0, 2.0))
    for model in (
        garch.garch(1e-5, 0.1, 0.8, initial_variance=4.0, dtype=F64),
        egarch.egarch(-0.1, 0.1, 0.9, initial_variance=4.0, dtype=F64),
        component_garch.component_garch(3.0, 0.99, 0.01, 0.1, 0.8, initial_variance=4.0, dtype=F64),
        ewma.ewma(4.0, dtype=F64),
    ):
        np.testing.assert_allclose(host(simulate(model, 4, 1))[1], 2.0, rtol=1e-14)


# Gradients, length, containers


DECLARED = {
    "garch": ("omega", "alpha", "beta", "gamma", "initial_variance"),
    "ewma": ("decay", "initial_variance"),
    "egarch": ("omega", "alpha", "beta", "gamma", "initial_variance"),
    "component_garch": tuple(f.name for f in dataclasses.fields(component_garch.ComponentGarch)),
    "ms_garch": ("omega", "alpha", "beta", "initial_variance"),
    "asset_chain": ("scale",),
}


@pytest.mark.parametrize("module", FAMILY, ids=name_of)
def test_gradient_of_the_terminal_variance(module):
    model = module.example(1, F64)
    chain = (CALM_AND_WILD, [0.5, 0.5]) if module is ms_garch else None
    tail = 1e4 if module is not asset_chain else 1.0

    @jax.jit
    def mean_variance(model):
        records = simulate(model, 256, 60, chain=chain, jit=False)
        return tail * jnp.mean(records[1][-1] ** 2)

    gradient = jax.grad(mean_variance)(model)
    for field in dataclasses.fields(model):
        leaf, slope = np.asarray(getattr(model, field.name)), np.asarray(getattr(gradient, field.name))
        if field.name not in DECLARED[name_of(module)]:
            if module is ms_garch:
                assert np.all(slope == 0.0)
            continue
        direction = 1.0 + np.arange(leaf.size).reshape(leaf.shape) / leaf.size
        step = 1e-5 * np.abs(leaf).max() * direction
        up, down = (
            float(mean_variance(dataclasses.replace(model, **{field.name: jnp.asarray(leaf + sign * step)})))
            for sign in (1.0, -1.0)
        )
        expected, found = 0.5 * (up - down), float(np.sum(slope * step))
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12, err_msg=field.name)
        assert abs(found) > 0.0, field.name


@pytest.mark.parametrize("module", FAMILY, ids=name_of)
@pytest.mark.parametrize("n_assets", [1, 30])
@pytest.mark.slow
def test_finite_over_ten_thousand_steps(module, n_assets):
    model = module.example(n_assets, F32)
    chain = (CALM_AND_WILD, [0.5, 0.5]) if module is ms_garch else None
    options = dict(n_assets=n_assets, dtype=F32, chain=chain)
    _, factor, _ = simulate(model, 4, 50, burn=9950, **options)
    assert np.all(np.isfinite(factor)) and np.all(np.asarray(factor) > 0.0)


def test_faded_ewma_keeps_a_finite_gradient():
    def terminal(model):
        return jnp.sum(simulate(model, 8, 3000, dtype=F32, jit=False)[1][-1])

    value, gradient = jax.jit(jax.value_and_grad(terminal))(ewma.ewma(1e-3, 0.5))
    assert 8e-15 <= value < 1e-12
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("module", FAMILY, ids=name_of)
@pytest.mark.slow
def test_matrix_of_assets_equals_rows(module, monkeypatch):
    model = module.example(33, F64)
    chain = (CALM_AND_WILD, [0.5, 0.5]) if module is ms_garch else None
    options = dict(n_assets=33, chain=chain)
    matrix = host(simulate(model, 32, 20, **options))[1]
    for owner in (numerics, garch, asset_chain):
        monkeypatch.setattr(owner, "MAX_UNROLLED_ASSETS", 64)
    rows = host(simulate(model, 32, 20, **options))[1]
    np.testing.assert_allclose(matrix, rows, rtol=1e-13)
