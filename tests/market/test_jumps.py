"""Jump components against exact laws. Means and frequencies within 4 standard errors (false alarm 6e-5 each)."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from reference.builders import F64, assert_frequency, assert_mc
from scipy import integrate, linalg, special, stats

from qpo_sim import numerics
from qpo_sim.errors import InputError
from qpo_sim.market.jump import hawkes as hawkes_module
from qpo_sim.market.jump import hazard as hazard_module
from qpo_sim.market.jump import kou as kou_module
from qpo_sim.market.jump import merton as merton_module
from qpo_sim.market.jump import poisson
from qpo_sim.market.jump.hawkes import hawkes
from qpo_sim.market.jump.hazard import hazard, intensity_from_median, logit_coefficients, logit_quantile, loss_rate
from qpo_sim.market.jump.kou import kou
from qpo_sim.market.jump.merton import merton
from qpo_sim.random import Address, Stream, stream_key
from qpo_sim.types import HOURS_PER_YEAR

N = 1 << 17
YEAR = HOURS_PER_YEAR
MODULES = (merton_module, kou_module, hawkes_module, hazard_module)


def address(path, step, *, seed=0, slot=3, stream=Stream.JUMP, mirror=None):
    return Address(stream_key(seed, stream), path, step, slot, mirror)


class Sums(NamedTuple):
    """State at the end, and by step (if kept) or in total the sizes and compensators (assets, paths)."""

    state: Any
    size: Any
    compensator: Any


def _run(component, prepared, path, mirror, regimes, *, n_steps, keep, n_regimes, seed):
    dtype = jax.tree.leaves(component)[0].dtype
    one = jnp.ones(path.shape, dtype)
    start = address(path, jnp.int32(0), seed=seed, mirror=mirror)
    state = component.init(prepared, one, component.n_assets, start)

    def body(carry, t):
        state, total = carry
        masks = tuple((regimes == k).astype(dtype) for k in range(1, n_regimes))
        state, jump = component.step(prepared, t, state, masks, address(path, t + 1, seed=seed, mirror=mirror))
        is_matrix = component.n_assets > numerics.MAX_UNROLLED_ASSETS
        rows = [rows for rows in jump if rows is not None]
        assert all(hasattr(container, "ndim") == is_matrix for container in rows)
        rows = [jnp.stack(list(container)) for container in rows]
        assert all(x.dtype == dtype for x in rows)
        return (state, [a + b for a, b in zip(total, rows, strict=True)]), (rows if keep else None)

    zero = [jnp.zeros((component.n_assets, *path.shape), dtype)] * (1 + component.martingale)
    (state, total), kept = lax.scan(body, (state, zero), jnp.arange(n_steps, dtype=jnp.int32))
    return state, kept if keep else total


STATIC = ("n_steps", "keep", "n_regimes", "seed")
_run_once = jax.jit(_run, static_argnames=STATIC)
_prepare = jax.jit(lambda component, hours: component.prepare(sub_steps=1, step_hours=hours), static_argnums=1)


def run(component, n_paths=N, n_steps=1, *, hours=24.0, seed=0, keep=False, regimes=None, n_regimes=1, path=None,
        mirror=None, function=_run_once):  # fmt: skip
    path = jnp.arange(n_paths, dtype=jnp.uint32) if path is None else path
    regimes = jnp.zeros(path.shape, jnp.int32) if regimes is None else regimes
    options = dict(n_steps=n_steps, keep=keep, n_regimes=n_regimes, seed=seed)
    state, arrays = function(component, _prepare(component, hours), path, mirror, regimes, **options)
    return Sums(jax.tree.map(np.asarray, state), *(np.asarray(x, np.float64) for x in [*arrays, np.nan][:2]))


def diffusion(volatility, years, n_paths, step=0, seed=9):
    path = jnp.arange(n_paths, dtype=jnp.uint32)
    z = np.asarray(address(path, jnp.int32(step), seed=seed, stream=Stream.SHOCK).normals(1)[0], np.float64)
    return volatility * np.sqrt(years) * z - 0.5 * volatility**2 * years


def assert_characteristic_function(x, frequencies, exact):
    # Real and imaginary part are means of bounded variables.
    for u in frequencies:
        value = exact(u)
        assert_mc(np.cos(u * x), value.real)
        assert_mc(np.sin(u * x), value.imag)


def kou_exponent(u, p, up, down):
    """E[exp(i u J)] - 1."""
    return p * up / (up - 1j * u) + (1.0 - p) * down / (down + 1j * u) - 1.0


# Poisson counts


def test_counts_have_the_poisson_law_and_rare_events_keep_their_digits():
    path = jnp.arange(N, dtype=jnp.uint32)
    for mean in (0.03, 1.7, 12.0):
        n_max = poisson.max_count(mean)
        tails = poisson.tail_probabilities(jnp.asarray([[mean]]), n_max)
        np.testing.assert_allclose(np.ravel(tails), special.pdtrc(np.arange(n_max), mean), rtol=2e-6)
        u = poisson.draw(address(path, jnp.int32(1)), 1, poisson.tail_uniform)[0]
        counts = np.asarray(poisson.count(u, tails[:, :, 0], (), jnp.float64))
        for n in range(int(mean) + 4):
            assert_frequency(np.count_nonzero(counts == n), N, stats.poisson.pmf(n, mean))
    for mean in (1e-5, 0.03, 1.7, 12.0, 24.0):
        n = poisson.max_count(mean)
        assert stats.poisson.sf(n, mean) < poisson.NEGLECTED <= (stats.poisson.sf(n - 1, mean) if n > 1 else 1.0)
    # Regimes whose probabilities differ by ten orders of magnitude do not share a rounding.
    table = jnp.asarray([0.3, 3e-11], jnp.float32)
    mask = (jnp.ones(1, jnp.float32),)
    np.testing.assert_allclose(poisson.choose(mask, table), 3e-11, rtol=1e-6)
    # An event of one in a million is decided by the words below its threshold, to one in 2^31.
    words = jnp.asarray(np.arange(4290, 4300) << 1, jnp.uint32)
    p = 4294.6 / 2.0**31
    np.testing.assert_array_equal(poisson.tail_uniform(words) < np.float32(p), np.arange(4290, 4300) + 0.5 < 4294.6)


@pytest.mark.parametrize("n", [1, 7, 20])
def test_draws_are_those_of_the_address(n):
    path = jnp.arange(33, dtype=jnp.uint32)
    for mirror in (None, (path % 2) * jnp.uint32(0xFFFFFFFF)):
        at = address(path, jnp.int32(5), mirror=mirror)
        rows = poisson.draw(at, n, lambda word: word.astype(jnp.float64))
        np.testing.assert_array_equal(np.stack(rows), np.stack(at.words(n)).astype(float))
        np.testing.assert_allclose(np.stack(poisson.draw_normals(at, n)), np.stack(at.normals(n)), rtol=1e-6)
        for word, row in zip(poisson.words_at(at, jnp.int32(n)), at.after(n).words(2), strict=True):
            np.testing.assert_array_equal(word, row)


# Compound Poisson: Merton and Kou


def _european(log_forward_free, spots, strike, rate, years, *, call=True):
    price = np.asarray(spots)[:, None] * np.exp(rate * years + log_forward_free)
    payoff = np.maximum(price - strike, 0.0) if call else np.maximum(strike - price, 0.0)
    return np.exp(-rate * years) * payoff


def test_merton_option_prices(cases):
    case = cases("models")["A13"]
    p, spots = case["inputs"], case["inputs"]["S0"]
    n_steps = 3
    component = merton(1, intensity=p["lam"], mean=p["jump_log_mean"], sd=p["jump_log_sd"], martingale=True,
                       step_hours=p["T"] * YEAR / n_steps, dtype=F64)  # fmt: skip
    _, jumps, compensation = run(component, 8 * N, n_steps, hours=p["T"] * YEAR / n_steps)
    log = diffusion(p["sigma"], p["T"], 8 * N) + jumps[0] + compensation[0]
    assert_mc(np.exp(log), 1.0)
    for kind in ("call", "put"):
        payoffs = _european(log, spots, p["K"], p["r"], p["T"], call=kind == "call")
        for spot, payoff in zip(spots, payoffs, strict=True):
            assert_mc(payoff, case["expected"]["values"][str(spot)][kind])


def test_kou_option_prices(cases):
    case = cases("models")["A16"]
    for name in ("set1", "set2"):
        p = case["inputs"][name]
        spots = np.atleast_1d(p["S0"])
        hours = p["T"] * YEAR
        component = kou(1, intensity=p["lam"], up_share=p["p_up"], eta_up=p["eta1"], eta_down=p["eta2"],
                        martingale=True, step_hours=hours, dtype=F64)  # fmt: skip
        _, jumps, compensation = run(component, 8 * N, hours=hours)
        log = diffusion(p["sigma"], p["T"], 8 * N) + jumps[0] + compensation[0]
        expected = case["expected"][name]
        for spot, payoff in zip(spots, _european(log, spots, p["K"], p["r"], p["T"]), strict=True):
            assert_mc(payoff, expected[str(int(spot))] if isinstance(expected, dict) else expected)


def test_kou_terminal_law_of_the_first_passage_case(cases):
    p = cases("models")["B06"]["inputs"]
    for intensity in p["lam"]:
        component = kou(1, intensity=intensity, up_share=p["p_up"], eta_up=p["eta1"], eta_down=p["eta2"],
                        step_hours=YEAR * p["t"], dtype=F64)  # fmt: skip
        _, jumps, _ = run(component, hours=YEAR * p["t"])
        for mu in p["mu"]:
            x = mu * p["t"] + 0.5 * p["sigma"] ** 2 * p["t"] + diffusion(p["sigma"], p["t"], N) + jumps[0]

            def exact(u, mu=mu, intensity=intensity):
                jump = intensity * kou_exponent(u, p["p_up"], p["eta1"], p["eta2"])
                return np.exp(p["t"] * (1j * u * mu - 0.5 * (p["sigma"] * u) ** 2 + jump))

            assert_characteristic_function(x, (2.0, 6.0, 12.0), exact)


def test_daily_barrier_under_merton(cases):
    case = cases("models")["B08"]
    p = case["inputs"]
    component = merton(1, intensity=p["lam"], mean=p["jump_log_mean"], sd=p["jump_log_sd"], martingale=True, dtype=F64)
    n_paths, days = N, max(p["days"])
    _, jumps, _ = run(component, n_paths, days, keep=True)
    drift = p["mu"] * p["dt"] - p["lam"] * p["dt"] * np.expm1(p["jump_log_mean"] + 0.5 * p["jump_log_sd"] ** 2)
    log, hit = np.zeros(n_paths), {h: np.zeros(n_paths, bool) for h in p["barriers"]}
    for day in range(days):
        log += drift + diffusion(p["sigma"], p["dt"], n_paths, step=day) + jumps[day, 0]
        for barrier, touched in hit.items():
            touched |= log <= np.log(barrier / p["S0"])
            if day + 1 in p["days"]:
                assert_frequency(touched.sum(), n_paths, case["expected"][f"H={barrier},days={day + 1}"])


def test_kou_sums_are_exact_for_many_jumps_a_step():
    # Eight jumps on average, and shares at both ends; the law does not depend on the number of steps.
    component = kou(3, intensity=8.0, up_share=[0.35, 1.0, 0.0], eta_up=[4.0, 5.0, 6.0], eta_down=[3.0, 4.0, 7.0],
                    step_hours=YEAR, dtype=F64)  # fmt: skip
    for n_steps in (1, 4):
        _, jumps, _ = run(component, N // 2, n_steps, hours=YEAR / n_steps, seed=n_steps)
        for x, p, up, down in zip(jumps, (0.35, 1.0, 0.0), (4.0, 5.0, 6.0), (3.0, 4.0, 7.0), strict=True):
            law = (p, up, down)
            assert_characteristic_function(x, (0.5, 1.0, 2.0), lambda u, law=law: np.exp(8.0 * kou_exponent(u, *law)))


def test_expected_prices_do_not_depend_on_compensated_jumps():
    systemic = dict(intensity=20.0, loading=[1.0, -0.7, 1.4], own_mean=0.01, own_sd=[0.02, 0.0, 0.05])
    normal = merton(3, intensity=[30.0, 0.0, 60.0], mean=-0.05, sd=0.1, martingale=True, dtype=F64,
                    systemic=dict(systemic, mean=-0.1, sd=0.1))  # fmt: skip
    double = kou(3, intensity=30.0, up_share=0.3, eta_up=6.0, eta_down=9.0, martingale=True, dtype=F64,
                 systemic=dict(systemic, up_share=0.6, eta_up=8.0, eta_down=5.0))  # fmt: skip
    for component in (normal, double):
        _, jumps, compensation = run(component, n_steps=10)
        assert np.all(compensation[0] == compensation[0, 0]) and np.all(np.ptp(compensation[:, 0]) > 0.0)
        for x in jumps + compensation:
            assert_mc(np.exp(x), 1.0)
        prepared = component.prepare(sub_steps=1, step_hours=24.0)
        np.testing.assert_allclose(10.0 * component.log_mean_exp(prepared)[0], -compensation[:, 0], rtol=1e-12)


def test_systemic_jumps_come_together_and_their_sizes_correlate():
    rho = np.array([[1.0, 0.4, -0.2], [0.4, 1.0, 0.3], [-0.2, 0.3, 1.0]])
    own_sd, loading = np.array([0.02, 0.03, 0.05]), np.array([1.0, 1.5, -0.5])
    for component, common_variance in (
        (merton(3, systemic=dict(intensity=2.0, mean=-0.05, sd=0.04, loading=loading, own_sd=own_sd, correlation=rho),
                step_hours=YEAR, dtype=F64), 0.04**2),
        (kou(3, systemic=dict(intensity=2.0, up_share=0.3, eta_up=20.0, eta_down=15.0, loading=loading, own_sd=own_sd,
                              correlation=rho), step_hours=YEAR, dtype=F64),
         2 * 0.3 / 400 + 2 * 0.7 / 225 - (0.3 / 20 - 0.7 / 15) ** 2),
    ):  # fmt: skip
        _, jumps, _ = run(component, hours=YEAR)
        assert np.all((jumps[0] == 0.0) == (jumps[2] == 0.0))
        assert_frequency(np.count_nonzero(jumps[0] == 0.0), N, np.exp(-2.0))
        covariance = np.outer(loading, loading) * common_variance + np.outer(own_sd, own_sd) * rho
        expected = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        np.testing.assert_allclose(component.systemic.correlation(), expected, rtol=1e-10)
        # Covariance of the sums: intensity times E[J_i J_j].
        mean_size = -0.05 if common_variance == 0.04**2 else 0.3 / 20 - 0.7 / 15
        second = covariance + np.outer(loading, loading) * mean_size**2
        centred = jumps - 2.0 * loading[:, None] * mean_size
        for i in range(3):
            assert_mc(centred[i], 0.0)
            for j in range(i + 1):
                assert_mc(centred[i] * centred[j], 2.0 * second[i, j])


def test_own_jumps_are_independent_between_assets():
    _, jumps, _ = run(merton(3, intensity=1.0, mean=1.0, step_hours=YEAR, dtype=F64), hours=YEAR)
    for i in range(3):
        for j in range(i):
            assert_mc((jumps[i] - 1.0) * (jumps[j] - 1.0), 0.0)


def test_intensities_by_regime():
    # Sizes are 1, so sums are counts.
    table = [[0.5, 4.0], [6.0, 1e-6]]
    component = merton(2, intensity=table, mean=1.0, step_hours=YEAR, martingale=True, dtype=F64,
                       systemic=dict(intensity=[0.0, 3.0], mean=0.1))  # fmt: skip
    regimes = jnp.arange(N, dtype=jnp.int32) % 2
    _, sums, compensation = run(component, hours=YEAR, regimes=regimes, n_regimes=2)
    common = np.rint(10.0 * (sums - np.floor(sums + 1e-9)))  # fewer than ten: P = 1e-3 of the paths fails, cut below
    for k in range(2):
        own = np.floor(sums[:, np.asarray(regimes) == k] + 1e-9)
        for i in range(2):
            if k == 0:
                for n in range(4):
                    assert_frequency(np.count_nonzero(own[i] == n), N // 2, stats.poisson.pmf(n, table[0][i]))
            rate = (0.0, 3.0)[k]
            expected = table[k][i] * np.expm1(1.0) + rate * np.expm1(0.1)
            np.testing.assert_allclose(compensation[i, np.asarray(regimes) == k], -expected, rtol=1e-12)
            assert_mc(sums[i, np.asarray(regimes) == k], table[k][i] + 0.1 * rate)
    assert np.all(common[:, np.asarray(regimes) == 0] == 0.0)
    with pytest.raises(InputError, match="2 regimes"):
        run(component, 4, hours=YEAR)


def test_own_and_systemic_rows_may_be_for_one_regime():
    component = merton(1, intensity=[[1.0], [2.0]], mean=1.0, systemic=dict(intensity=3.0), dtype=F64)
    assert component.n_regimes == 2 and component.systemic.intensity.shape == (2,)
    with pytest.raises(InputError, match="agree"):
        merton(1, intensity=[[1.0], [2.0]], systemic=dict(intensity=[1.0, 2.0, 3.0]))


# Hawkes


def _hawkes_moments(mu, alpha, beta, years, *, start=None, variance=0.0):
    """Mean and variance of N(0, T] of one type, by the linear equations of its first two moments (test's own)."""
    m0, v0 = mu if start is None else start, variance

    def slope(_, y):
        m, var_l, cov, var_n, _ = y
        return [
            alpha * m - beta * (m - mu),
            -2.0 * (beta - alpha) * var_l + alpha**2 * m,
            -(beta - alpha) * cov + var_l + alpha * m,
            2.0 * cov + m,
            m,
        ]

    y = integrate.solve_ivp(slope, (0.0, years), [m0, v0, 0.0, 0.0, 0.0], rtol=1e-10, atol=1e-12).y[:, -1]
    return y[4], y[3]


def _count_process(p, **options):
    return hawkes(1, mu=p["mu"], alpha=p["alpha"], beta=p["beta"], mean=1.0, dtype=F64, **options)


def test_stationary_hawkes_counts(cases):
    case = cases("models")["A29"]
    p, expected = case["inputs"], case["expected"]
    # One year steps; the memory of 1/(beta - alpha) = 1.1 years is forgotten in 15.
    component = _count_process(p, start="mean", step_hours=YEAR)
    assert component.branching_ratio() == pytest.approx(expected["branching"], rel=1e-12)
    assert component.mean_intensity()[0] == pytest.approx(expected["mean_intensity"], rel=1e-12)
    assert component.expected_events(p["T"])[0] == pytest.approx(expected["mean_N"], rel=1e-10)
    mean, variance = _hawkes_moments(
        p["mu"], p["alpha"], p["beta"], p["T"], start=expected["mean_intensity"], variance=expected["var_intensity"]
    )
    assert (mean, variance) == pytest.approx((expected["mean_N"], expected["var_N"]), rel=1e-7)
    state, counts, _ = run(component, N, 20, hours=YEAR, keep=True)
    n = counts[15:, 0].sum(axis=0)
    np.testing.assert_array_equal(n, np.rint(n))
    assert_mc(n, expected["mean_N"])
    assert_mc((n - expected["mean_N"]) ** 2, expected["var_N"])
    intensity = p["mu"] + np.asarray(state.excess[0])
    assert_mc(intensity, expected["mean_intensity"])
    assert_mc((intensity - expected["mean_intensity"]) ** 2, expected["var_intensity"])
    assert not np.any(state.overflow)


def test_hawkes_from_a_cold_start_and_from_the_stationary_mean():
    p = dict(mu=1.2, alpha=0.6, beta=1.5)
    # The law does not depend on the number of steps.
    for n_steps in (2, 10):
        component = _count_process(p, step_hours=YEAR * 5.0 / n_steps)
        mean, variance = _hawkes_moments(**p, years=5.0)
        _, n, _ = run(component, N, n_steps, hours=YEAR * 5.0 / n_steps, seed=n_steps)
        assert component.expected_events(5.0)[0] == pytest.approx(mean, rel=1e-8)
        assert_mc(n[0], mean)
        assert_mc((n[0] - mean) ** 2, variance)
    # From the mean intensity the mean count is the stationary one, and the variance lies below it.
    mean, variance = _hawkes_moments(**p, years=5.0, start=2.0)
    _, n, _ = run(_count_process(p, start="mean", step_hours=YEAR), N, 5, hours=YEAR)
    assert mean == pytest.approx(10.0) and variance < 23.87
    assert_mc(n[0], mean)
    assert_mc((n[0] - mean) ** 2, variance)
    given = _count_process(p, start=[3.0], step_hours=YEAR)
    assert float(given.start[0]) == pytest.approx(1.8)
    _, n, _ = run(given, N, 1, hours=YEAR)
    assert_mc(n[0], given.expected_events(1.0)[0])


def test_hawkes_waiting_times_are_exact():
    # P(no event in T | x0) = exp(-mu T - x0 (1 - e^{-beta T}) / beta); events come one at a time after it.
    component = hawkes(1, mu=1.0, alpha=1.0, beta=4.0, mean=1.0, start=[3.0], step_hours=YEAR, dtype=F64)
    state, n, _ = run(component, hours=YEAR)
    assert_frequency(np.count_nonzero(n[0] == 0), N, np.exp(-1.0 - 2.0 * -np.expm1(-4.0) / 4.0))
    # Without events the excess decays on its own.
    np.testing.assert_allclose(state.excess[0][n[0] == 0], 2.0 * np.exp(-4.0), rtol=1e-12)


ALPHA, BETA, MU = np.array([[4.0, 3.0], [2.0, 1.5]]), np.array([12.0, 9.0]), np.array([3.0, 1.0])


def test_mutually_exciting_counts():
    component = hawkes(2, mu=MU, alpha=ALPHA, beta=BETA, mean=1.0, step_hours=YEAR / 2, dtype=F64)
    ratio = max(abs(np.linalg.eigvals(ALPHA / BETA[:, None])))
    assert component.branching_ratio() == pytest.approx(ratio, rel=1e-12)
    _, sizes, _ = run(component, N, 2, hours=YEAR / 2, keep=True)
    expected = component.expected_events(1.0)
    for i in range(2):
        assert_mc(sizes[:, i].sum(axis=0), expected[i])
    # The stationary mean is a fixed point of the closed form.
    level = component.mean_intensity()
    np.testing.assert_allclose(component.expected_events(0.7, excess=level - MU), 0.7 * level, rtol=1e-10)
    # Conditional mean of the second half given the state after the first.
    state, first, _ = run(component, N, 1, hours=YEAR / 2)
    np.testing.assert_array_equal(first, sizes[0])
    excess = 2.0 * state.excess
    system = ALPHA - np.diag(BETA)
    response = np.linalg.solve(system, linalg.expm(system * 0.5) - np.eye(2))
    predicted = component.expected_events(0.5, excess=np.zeros(2))[:, None] + response @ excess
    for i in range(2):
        residual = sizes[1, i] - predicted[i]
        assert_mc(residual, 0.0)
        for j in range(2):
            assert_mc(residual * excess[j], 0.0)


@pytest.mark.parametrize("marks", ["normal", "double", "common"])
def test_hawkes_compensator_is_exact_given_the_intensities(marks):
    options = dict(mu=MU, alpha=ALPHA, beta=BETA, start="mean", martingale=True, step_hours=YEAR / 4, dtype=F64)
    normal = dict(mean=[0.05, -0.1], sd=[0.1, 0.2])
    double = dict(up_share=[0.3, 0.6], eta_up=[6.0, 8.0], eta_down=[5.0, 7.0])
    if marks == "common":
        component = hawkes(
            3, loading=[[1.0, 0.0], [0.5, -0.7], [0.0, 1.5]], own_sd=[0.1, 0.0, 0.2], **normal, **options
        )
    else:
        component = hawkes(2, own_sd=0.05, **(normal if marks == "normal" else double), **options)
    _, jumps, compensation = run(component, N, 2, hours=YEAR / 4, keep=True)
    assert np.all(np.ptp(compensation[1], axis=-1) > 0.01)
    for i in range(component.n_assets):
        first, second = np.exp(jumps[:, i] + compensation[:, i])
        assert_mc(first, 1.0)
        # Given the intensities, not only on average: what the second compensator is computed from does not matter.
        for known in compensation[1]:
            assert_mc((second - 1.0) * known, 0.0)


def test_hawkes_marks():
    one = dict(mu=2.0, alpha=1.0, beta=3.0, step_hours=YEAR, dtype=F64)
    component = hawkes(1, up_share=0.4, eta_up=10.0, eta_down=5.0, **one)
    counter = hawkes(1, mean=1.0, max_proposals=component.max_proposals, **one)
    # Proposals of one type take one slot with normal marks and two with double-exponential ones: laws, not draws.
    mean, _ = _hawkes_moments(2.0, 1.0, 3.0, 1.0)
    assert_mc(run(counter, hours=YEAR).size[0], mean)
    size = 0.4 / 10.0 - 0.6 / 5.0
    assert_mc(run(component, hours=YEAR).size[0], mean * size)
    # A common mark moves all assets by their loadings, exactly.
    _, jumps, _ = run(hawkes(3, mean=-0.1, sd=0.2, loading=[1.0, 2.0, -0.5], **one), hours=YEAR)
    np.testing.assert_allclose(jumps[1:], np.outer([2.0, -0.5], jumps[0]), rtol=1e-12)
    _, jumps, _ = run(hawkes(2, mean=-0.1, sd=0.2, **one), hours=YEAR)
    np.testing.assert_array_equal(jumps[0], jumps[1])
    # Own noise has the variance of the number of events.
    _, jumps, _ = run(hawkes(2, mean=0.0, own_sd=[0.1, 0.3], **one), hours=YEAR)
    assert_mc(jumps[0] * jumps[1], 0.0)
    for x, sd in zip(jumps, (0.1, 0.3), strict=True):
        assert_mc(x**2, mean * sd**2)


def test_hawkes_floor_by_regime():
    component = hawkes(1, mu=[[0.5], [5.0]], alpha=1.0, beta=4.0, mean=1.0, step_hours=YEAR, dtype=F64)
    regimes = jnp.arange(N, dtype=jnp.int32) % 2
    _, n, _ = run(component, hours=YEAR, regimes=regimes, n_regimes=2)
    for k in range(2):
        assert_mc(n[0, np.asarray(regimes) == k], component.expected_events(1.0, regime=k)[0])


def test_overflow_is_counted_and_only_there():
    component = _count_process(dict(mu=4.0, alpha=1.0, beta=2.0), step_hours=YEAR, max_proposals=6)
    state, n, _ = run(component, 1 << 12, 3, hours=YEAR)
    overflow = np.asarray(state.overflow)
    assert 0 < np.count_nonzero(overflow) and set(np.unique(overflow)) <= {0.0, 1.0, 2.0, 3.0}
    assert n[0].max() <= 18
    roomy = replace(component, max_proposals=200)
    exact, m, _ = run(roomy, 1 << 12, 3, hours=YEAR)
    assert not np.any(exact.overflow)
    # The slots of events do not depend on the maximum: without normal marks (sd = 0) the paths are the same.
    np.testing.assert_array_equal(n[0][overflow == 0.0], m[0][overflow == 0.0])


# Failures


def test_published_loss_rates(cases):
    case = cases("domain")["risk-01"]
    p, expected = case["inputs"], case["expected"]
    assert loss_rate(p["losses"], p["tvl"]) == pytest.approx(expected["loss_rate"], rel=1e-9)
    assert intensity_from_median(p["median_days"]) == pytest.approx(expected["hazard_per_year"], rel=1e-9)


def test_independent_protocols(cases):
    case = cases("domain")["risk-03"]
    p, expected = case["inputs"], case["expected"]
    component = hazard(p["n"], intensity=p["hazard"], fixed_loss=p["lgd"], dtype=F64)
    probability = component.failure_probability(p["T"])
    np.testing.assert_allclose(probability, expected["p"], rtol=1e-9)
    np.testing.assert_allclose(1.0 - component.expected_value(p["T"]), expected["mean"], rtol=1e-9)
    # A year in 73 steps.
    state, jumps, _ = run(component, N, 73, hours=YEAR * p["T"] / 73)
    loss = np.mean(-np.expm1(jumps), axis=0)
    failures = np.stack(state.failures)
    assert set(np.unique(failures)) == {0.0, 1.0}
    np.testing.assert_allclose(loss, 0.06 * failures.sum(axis=0), atol=1e-6)
    assert_mc(loss, expected["mean"])
    for k in range(4):
        count = np.count_nonzero(failures.sum(axis=0) == k)
        assert_frequency(count, N, stats.binom.pmf(k, p["n"], expected["p"]))
    for level in ("95", "99"):
        var = expected[f"var{level}"]
        assert np.quantile(loss, float(level) / 100.0, method="inverted_cdf") == pytest.approx(var, abs=1e-6)
        excess = np.maximum(loss - var, 0.0) / (1.0 - float(level) / 100.0)
        assert_mc(var + excess, expected[f"cvar{level}"])


def test_common_shocks(cases):
    case = cases("domain")["risk-05"]
    p, expected = case["inputs"], case["expected"]
    component = hazard(2, intensity=[p["l1"], p["l2"]], common_intensity=[p["l12"]], members=[[0, 1]], loss=(2.0, 2.0),
                       dtype=F64)  # fmt: skip
    q = component.failure_probability(p["T"])
    assert tuple(q) == pytest.approx((expected["p1"], expected["p2"]), rel=1e-9)
    joint = component.joint_failure_probability(p["T"], 0, 1)
    assert joint == pytest.approx(expected["joint"], rel=1e-9)
    assert component.default_correlation(p["T"], 0, 1) == pytest.approx(expected["correlation"], rel=1e-9)
    state, _, _ = run(component, N, 12, hours=YEAR / 12)
    failed = np.stack(state.failures) > 0.0
    for row, value in zip(failed, (expected["p1"], expected["p2"]), strict=True):
        assert_frequency(row.sum(), N, value)
    assert_frequency(np.sum(failed[0] & failed[1]), N, expected["joint"])


@pytest.mark.parametrize(
    ("pair", "tolerance"),
    [((1.5, 4.0), 3e-5), ((2.0, 2.0), 3e-5), ((4.0, 2.0), 3e-5), ((2.0, 14.0), 3e-5), ((1.0, 1.0), 4e-4),
     ((0.5, 0.5), 1.1e-3), ((30.0, 20.0), 1e-6)],
)  # fmt: skip
def test_loss_quantiles(pair, tolerance):
    score = np.linspace(-5.42, 5.42, 1001)
    exact = stats.beta.ppf(stats.norm.cdf(score), *pair)
    logit = logit_quantile(*pair, score)
    np.testing.assert_allclose(special.expit(logit)[score < 3.0], exact[score < 3.0], rtol=1e-9)
    coefficients = logit_coefficients(*pair)
    for dtype in (np.float64, np.float32):
        fit = numerics.polynomial(list(coefficients.astype(dtype)), (score / 5.6).astype(dtype))
        assert np.max(np.abs(fit - logit)) < tolerance + (5e-5 if dtype == np.float32 else 0.0)
        assert np.all(np.diff(fit) > 0.0) or dtype == np.float32


def test_losses_given_failure_have_the_beta_law():
    pairs = [(1.5, 4.0), (4.0, 2.0)]
    component = hazard(2, intensity=3.0, loss=pairs, dtype=F64)
    state, jumps, _ = run(component, hours=YEAR)
    for x, failed, (a, b) in zip(jumps, state.failures, pairs, strict=True):
        failed = np.asarray(failed) > 0.0
        loss = -np.expm1(x[failed])
        assert np.all(x[~failed] == 0.0) and np.all(loss > 0.0)
        assert stats.kstest(loss, stats.beta(a, b).cdf).pvalue > 1e-4
        assert_mc(loss, a / (a + b))
        assert_mc((1.0 - loss) ** 2, b * (b + 1.0) / ((a + b) * (a + b + 1.0)))


def test_repeated_failures_compound():
    component = hazard(2, intensity=[2.0, 1.0], loss=[(2.0, 2.0), (2.0, 6.0)], repeated=True, asset=(1, 1), dtype=F64)
    n_steps = 100
    state, jumps, _ = run(component, N, n_steps, hours=YEAR / n_steps)
    assert np.all(jumps[0] == 0.0)
    # Bernoulli per step instead of Poisson: the product over steps is what is exact.
    p, loss = -np.expm1(-component.total_intensity() / n_steps), np.array([0.5, 0.25])
    assert_mc(np.exp(jumps[1]), np.prod((1.0 - p * loss) ** n_steps))
    np.testing.assert_allclose((1.0 - p * loss) ** n_steps, component.expected_value(1.0), rtol=0.011)
    square = np.array([2.0 * 3.0 / (4.0 * 5.0), 6.0 * 7.0 / (8.0 * 9.0)])
    np.testing.assert_allclose(component.expected_square(1.0), np.exp(-np.array([2.0, 1.0]) * (1.0 - square)))
    for row, q in zip(state.failures, p, strict=True):
        assert_mc(row, n_steps * q)


def test_failures_by_regime_and_their_compensator():
    component = hazard(2, intensity=[0.2, 0.5], loss=(2.0, 6.0), common_intensity=[0.1], members=[[0, 1]],
                       regime_multiplier=[1.0, 5.0], martingale=True, dtype=F64)  # fmt: skip
    regimes = jnp.arange(N, dtype=jnp.int32) % 2
    state, jumps, compensation = run(component, N, 4, hours=YEAR / 4, regimes=regimes, n_regimes=2)
    for k in range(2):
        chosen = np.asarray(regimes) == k
        expected = component.failure_probability(1.0, regime=k)
        np.testing.assert_allclose(expected, -np.expm1(-(1.0, 5.0)[k] * np.array([0.3, 0.6])), rtol=1e-12)
        for i in range(2):
            assert_frequency(np.sum(np.asarray(state.failures[i])[chosen]), N // 2, expected[i])
            assert_mc(np.exp(jumps[i] + compensation[i])[chosen], 1.0)


def test_contagion_raises_the_hazard_of_others():
    # Once the first has failed in one half of the year, the second fails in the other at the intensity 0.2 + 3.
    matrix = [[0.0, 0.0], [3.0, 0.0]]
    component = hazard(2, intensity=[1.0, 0.2], loss=(2.0, 2.0), contagion=matrix, contagion_decay=0.5, martingale=True,
                       dtype=F64)  # fmt: skip
    half = YEAR / 2
    first, _, _ = run(component, N, 1, hours=half)
    second, jumps, compensation = run(component, N, 2, hours=half)
    before, after = np.stack(first.failures), np.stack(second.failures)
    np.testing.assert_allclose(first.heat[1], 3.0 * before[0])
    for cause in range(2):
        at_risk = (before[0] == cause) & (before[1] == 0.0)
        assert_frequency(after[1][at_risk].sum(), at_risk.sum(), -np.expm1(-0.5 * (0.2 + 3.0 * cause)))
    np.testing.assert_allclose(second.heat[1], 3.0 * (before[0] * np.exp(-0.25) + (after - before)[0]), rtol=1e-12)
    for i in range(2):
        assert_mc(np.exp(jumps[i] + compensation[i]), 1.0)


# All components


def _small(module, dtype=F64, n_assets=3):
    return module.example(n_assets, dtype)


@pytest.mark.parametrize("module", MODULES)
def test_paths_do_not_depend_on_their_company(module):
    # A hundred steps of a fortnight, so that most paths see jumps.
    component = replace(_small(module, jnp.float32), **({} if module is hazard_module else {"step_hours": 336.0}))
    _, together, _ = run(component, 97, 100, hours=336.0)
    for chosen in ([5], list(range(40, 97))):
        path = jnp.asarray(chosen, jnp.uint32)
        np.testing.assert_allclose(run(component, n_steps=100, hours=336.0, path=path).size, together[:, chosen],
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
    assert np.count_nonzero(np.any(together != 0.0, axis=0)) > 15


@pytest.mark.parametrize("module", MODULES)
def test_antithetic_partners_keep_the_law(module):
    component = _small(module, F64, 1)
    number = jnp.arange(1 << 16, dtype=jnp.uint32)
    path, mirror = number >> 1, (number & 1) * jnp.uint32(0xFFFFFFFF)
    _, plain, _ = run(component, path=path[::2], n_steps=5)
    _, both, _ = run(component, path=path, mirror=mirror, n_steps=5)
    np.testing.assert_array_equal(both[:, ::2], plain)
    # Partners are not independent, but each half has the law of the whole.
    for x in (plain[0], both[0, 1::2]):
        assert_frequency(np.count_nonzero(x), x.size, np.count_nonzero(plain[0]) / x.size, n_sigma=6.0)


@pytest.mark.parametrize("n_assets", [1, pytest.param(30, marks=pytest.mark.slow), 33])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.slow
def test_ten_thousand_steps_stay_finite(module, n_assets):
    state, total, _ = run(module.example(n_assets, jnp.float32), 16, 10_000)
    assert np.all(np.isfinite(total)) and np.any(total != 0.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.slow
def test_many_assets_take_the_matrix_form(module, monkeypatch):
    component = _small(module, F64, 5)
    rows = run(component, 512, 20).size
    for part in (numerics, poisson, hawkes_module):
        monkeypatch.setattr(part, "MAX_UNROLLED_ASSETS", 4)
    fresh = jax.jit(lambda *args, **options: _run(*args, **options), static_argnames=STATIC)
    np.testing.assert_allclose(run(component, 512, 20, function=fresh).size, rows, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_hawkes_of_33_types():
    n = 33
    alpha = 0.3 * np.eye(n) + 0.01
    component = hawkes(n, mu=np.linspace(0.1, 0.5, n), alpha=alpha, beta=1.5, mean=1.0, step_hours=YEAR, dtype=F64)
    state, counts, _ = run(component, 1 << 14, 1, hours=YEAR)
    for row, expected in zip(counts, component.expected_events(1.0), strict=True):
        assert_mc(row, expected)
    assert not np.any(state.overflow)


@pytest.mark.parametrize("module", MODULES)
def test_gradients_are_those_declared(module):
    component = _small(module, F64, 2)
    path = jnp.arange(2048, dtype=jnp.uint32)

    def mean_size(component):
        prepared = component.prepare(sub_steps=1, step_hours=24.0)
        at = address(path, jnp.int32(0))
        state = component.init(prepared, jnp.ones(path.shape), 2, at)

        def body(carry, t):
            state, total = carry
            step = numerics.materialised(lambda *args: component.step(*args, (), address(path, t + 1)))
            state, jump = step(prepared, t, state)
            return (state, total + sum(jump.size)), None

        (state, total), _ = lax.scan(body, (state, jnp.zeros(path.shape)), jnp.arange(20, dtype=jnp.int32))
        return jnp.mean(jnp.exp(total))

    value = jax.jit(mean_size)
    slopes, tree = jax.tree.flatten(jax.jit(jax.grad(mean_size))(component))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(component)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(component)[0]]
    discrete = {
        "intensity",
        "mu",
        "alpha",
        "beta",
        "start",
        "common_intensity",
        "loss_mean",
        "kept_square",
        "contagion",
    }
    for k, (name, slope) in enumerate(zip(names, slopes, strict=True)):
        assert np.all(np.isfinite(slope)), name
        if name.rsplit(".", 1)[1] in discrete:
            assert np.all(np.asarray(slope) == 0.0), name
            continue
        direction = np.cos(np.arange(leaves[k].size)).reshape(leaves[k].shape)
        h = 1e-6 * max(1e-2, np.max(np.abs(leaves[k])))
        moved = []
        for sign in (1.0, -1.0):
            changed = list(leaves)
            changed[k] = leaves[k] + sign * h * direction
            moved.append(float(value(jax.tree.unflatten(tree, [jnp.asarray(x) for x in changed]))))
        difference = (moved[0] - moved[1]) / (2.0 * h)
        assert np.sum(slope * direction) == pytest.approx(difference, rel=2e-5, abs=1e-9), name


def test_compensators_have_gradients_in_the_intensities():
    def level(component):
        return component.prepare(sub_steps=1, step_hours=24.0).log_mean_exp.sum()

    for component, leaf in (
        (merton(2, intensity=5.0, mean=-0.1, sd=0.1, dtype=F64), "intensity"),
        (hawkes(2, mu=[5.0, 3.0], alpha=[[20.0, 5.0], [0.0, 10.0]], beta=60.0, mean=-0.1, sd=0.1, martingale=True,
                dtype=F64), "alpha"),
    ):  # fmt: skip
        slope = getattr(jax.grad(level)(component), leaf)
        value = getattr(component, leaf)
        up, down = (level(replace(component, **{leaf: value.at[0, 1].add(h)})) for h in (1e-4, -1e-4))
        assert float(slope[0, 1]) == pytest.approx(float(up - down) / 2e-4, rel=1e-6)
        assert float(slope[0, 1]) != 0.0


@pytest.mark.parametrize("module", MODULES[:3])
def test_longer_steps_than_built_for_are_refused(module):
    component = module.example(2)
    component.prepare(sub_steps=4, step_hours=6.0)
    with pytest.raises(InputError, match="step_hours=48"):
        component.prepare(sub_steps=1, step_hours=48.0)


@pytest.mark.parametrize("module", MODULES)
def test_another_number_of_assets_is_refused(module):
    component = module.example(2)
    prepared = component.prepare(sub_steps=1, step_hours=24.0)
    with pytest.raises(InputError, match="2 assets"):
        component.init(prepared, jnp.ones(3, jnp.float32), 3, address(jnp.arange(3, dtype=jnp.uint32), jnp.int32(0)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: merton(2, intensity=-1.0), "intensity is -1"),
        (lambda: merton(2, intensity=[1.0, np.nan]), "finite"),
        (lambda: merton(2, intensity=[1.0, 2.0, 3.0]), "shape"),
        (lambda: merton(2, intensity=1.0, sd=-0.1), "sd is"),
        (lambda: merton(2, intensity=1.0, sd="wide"), "number"),
        (lambda: merton(2), "no jumps"),
        (lambda: merton(2, intensity=1e5), "shorter steps"),
        (lambda: merton(2, systemic=dict(mean=1.0)), "intensity"),
        (lambda: merton(2, systemic=dict(intensity=1.0, laoding=1.0)), "loading"),
        (lambda: merton(2, systemic=dict(intensity=-1.0)), "systemic.intensity"),
        (lambda: merton(2, systemic=dict(intensity=1.0, correlation=[[1.0, 2.0], [2.0, 1.0]])), "correlation"),
        (lambda: merton(2, systemic=dict(intensity=1.0, correlation=[[1.0, 1.0], [1.0, 1.0]])), "positive definite"),
        (lambda: kou(1, intensity=1.0, eta_up=1.0), "eta_up"),
        (lambda: kou(1, intensity=1.0, eta_down=0.0), "eta_down"),
        (lambda: kou(1, intensity=1.0, up_share=1.5), "up_share"),
        (lambda: kou(2, systemic=dict(intensity=1.0, eta_up=3.0, loading=[1.0, 4.0])), "largest loading"),
        (lambda: kou(2, systemic=dict(intensity=1.0, eta_down=3.0, loading=[1.0, -4.0])), "negative loading"),
        (lambda: hawkes(1, mu=1.0, alpha=2.0, beta=2.0), "branching ratio"),
        (lambda: hawkes(2, mu=1.0, alpha=[[0.0, 4.0], [4.0, 0.0]], beta=[3.0, 5.0]), "branching ratio"),
        (lambda: hawkes(1, mu=-1.0, alpha=1.0, beta=2.0), "mu is"),
        (lambda: hawkes(1, mu=1.0, alpha=-1.0, beta=2.0), "alpha is"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=0.0), "beta is"),
        (lambda: hawkes(3, mu=1.0, alpha=np.eye(2), beta=2.0), "loadings"),
        (lambda: hawkes(3, mu=1.0, alpha=np.eye(2), beta=2.0, loading=np.ones((2, 2))), "loading has shape"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=2.0, eta_up=5.0), "all of"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=2.0, up_share=0.5, eta_up=1.0, eta_down=5.0), "eta_up"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=2.0, start="warm"), "start"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=2.0, start=[0.5]), "floor"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=2.0, max_proposals=0), "max_proposals"),
        (lambda: hawkes(1, mu=1.0, alpha=1.0, beta=2.0, mean=3.0, step_hours=10 * YEAR, martingale=True), "infinite"),
        (lambda: hazard(2, intensity=-0.1, loss=(2.0, 2.0)), "intensity"),
        (lambda: hazard(2, intensity=0.1, loss=(0.0, 2.0)), "loss is"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, -1.0)), "loss is"),
        (lambda: hazard(2, intensity=0.1, loss=(0.1, 0.1)), "too small"),
        (lambda: hazard(2, intensity=0.1, loss=(1.0, 2.0, 3.0)), "shape"),
        (lambda: hazard(2, intensity=0.1, fixed_loss=1.0), "fixed_loss"),
        (lambda: hazard(2, intensity=0.1), "either"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, 2.0), asset=(0, 2)), "asset"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, 2.0), names=("A",)), "names"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, 2.0), common_intensity=[0.1], members=[[0, 2]]), "members"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, 2.0), common_intensity=[0.1]), "needs members"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, 2.0), contagion=np.ones(2)), "contagion"),
        (lambda: hazard(2, intensity=0.1, loss=(2.0, 2.0), contagion=np.eye(2), repeated=True), "branching ratio"),
        (lambda: hazard(1, intensity=[0.1, 0.1], loss=(2.0, 2.0), asset=(0, 0), common_intensity=[0.1],
                        members=[[0, 1]], martingale=True), "martingale"),
    ],
)  # fmt: skip
def test_builders_refuse(make, words):
    with pytest.raises(InputError, match=words):
        make()
