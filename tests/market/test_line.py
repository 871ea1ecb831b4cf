"""The composed line: regimes that last or listen, compensation, antithetic partners, equality with the plain line."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qpo_sim.errors import InputError
from qpo_sim.market import control, presets, regime, shock
from qpo_sim.market.model import Market
from qpo_sim.simulate import Plan, market_paths

F64 = jnp.float64
CORRELATION = np.array([[1.0, 0.7, 0.5], [0.7, 1.0, 0.6], [0.5, 0.6, 1.0]])


def two_regimes(**changes):
    market = Market(
        initial=jnp.asarray([0.9, 0.1], F64),
        transition=jnp.asarray([[0.95, 0.05], [0.1, 0.9]], F64),
        drift=jnp.zeros((2, 1), F64),
        volatility=jnp.asarray([[0.01], [0.05]], F64),
        correlation_cholesky=jnp.ones((2, 1, 1), F64),
        dof=jnp.asarray([4.0, 6.0], F64),
        assets=("A",),
    )
    return replace(market, **changes)


def drivers(slope, name="volatility"):
    slopes = jnp.zeros((1, 2, 2), F64).at[0, :, 1].set(slope)
    return regime.Drivers(slopes, jnp.asarray(0.02, F64), (name,))


@pytest.mark.parametrize("dof", [None, 3.0])
def test_compensated_prices_have_mean_one(dof):
    """Four standard errors for three assets: false alarm 2e-4."""
    base = presets.gbm(("A", "B", "C"), [1.5, 0.9, 1.0], CORRELATION, dtype=F64)
    market = replace(
        base,
        compensated=True,
        drift=jnp.zeros((1, 3), F64),
        dof=None if dof is None else jnp.asarray([dof], F64),
        mixing_cut=1e-3,
    )
    price = np.exp(np.asarray(market_paths(market, 200_000, Plan(5)).log_price[-1]))
    error = price.std(axis=1) / np.sqrt(price.shape[1])
    assert np.all(np.abs(price.mean(axis=1) - 1.0) < 4.0 * error)
    assert np.all(error < 2e-3)


def test_cumulants_against_a_finer_quadrature():
    dof = jnp.asarray([2.1, 3.0, 12.0], F64)
    coefficients = shock.mgf_quadrature(dof, 1e-4)
    floor = jnp.asarray(shock.score_floor(1e-4), F64)
    deviation = np.array([2e-4, 1e-3, 1e-2, 0.05, 0.11, 0.15, 0.2, 0.25])
    exact = shock.log_mean_exp(
        jnp.asarray(np.broadcast_to(deviation**2, (3, 8)), F64), shock.mixing_coefficients(dof), floor
    )
    for k in range(3):
        found = shock.log_mgf(jnp.asarray(deviation), [c[k] for c in coefficients])
        np.testing.assert_allclose(found, exact[k], rtol=1e-4)


def test_antithetic_partners_mirror_every_draw():
    base = presets.gbm(("A", "B", "C"), [0.8, 0.9, 1.0], CORRELATION, dtype=F64)
    plan = Plan(4, antithetic=True)
    log_price = np.asarray(market_paths(base, 16, plan).log_price)
    drift = 4 * np.asarray(base.drift[0])
    np.testing.assert_allclose(
        log_price[-1, :, 0::2] + log_price[-1, :, 1::2], np.broadcast_to(2 * drift[:, None], (3, 8)), atol=1e-12
    )
    masks = np.asarray(market_paths(two_regimes(), 4000, plan).masks)[:, 0]
    # Mirrored uniforms put the partners into the rare regime together less often than chance would.
    both = np.mean(masks[0, 0::2] * masks[0, 1::2])
    assert both < 0.25 * masks[0].mean() ** 2


def test_negative_binomial_durations():
    """Mean d and variance d^2/r - d of finished stays; five standard errors."""
    initial, transition, regime_of = regime.semi_markov([0.5, 0.5], [12.0, 5.0], [4, 2], [[0, 1], [1, 0]])
    assert regime_of == (0, 0, 0, 0, 1, 1)
    market = two_regimes(
        initial=jnp.asarray(initial), transition=jnp.asarray(transition), regime_of=regime_of, dof=None
    )
    state = np.asarray(market_paths(market, 3000, Plan(400)).masks)[:, 0].T.astype(int)
    for k, (mean, shape) in enumerate([(12.0, 4), (5.0, 2)]):
        stays = []
        for path in state:
            change = np.flatnonzero(np.diff(path)) + 1
            # The first and the last stay are cut off by the window.
            stays += [b - a for a, b in zip(change[:-1], change[1:], strict=True) if path[a] == k]
        stays = np.array(stays)
        variance = mean**2 / shape - mean
        assert stays.min() >= shape
        # Long stays are cut off more often: 400 steps leave less than one per cent of bias.
        assert abs(stays.mean() - mean) < 5.0 * np.sqrt(variance / stays.size) + 0.01 * mean
        assert abs(stays.var() / variance - 1.0) < 0.06


def test_drivers_without_slope_are_the_markov_chain_and_with_slope_they_move_it():
    plain = market_paths(two_regimes(), 4000, Plan(60))
    still = market_paths(two_regimes(drivers=drivers(0.0)), 4000, Plan(60))
    np.testing.assert_allclose(still.log_price, plain.log_price, atol=1e-12)
    pushed = np.asarray(market_paths(two_regimes(drivers=drivers(1.0)), 4000, Plan(60)).masks)
    assert pushed[-1, 0].mean() > np.asarray(plain.masks)[-1, 0].mean() + 0.05
    # After a big fall the market stays turbulent.
    fallen = np.asarray(market_paths(two_regimes(drivers=drivers(8.0, "drawdown")), 4000, Plan(60)).log_price)
    assert np.isfinite(fallen).all()


@pytest.mark.parametrize("market", [two_regimes(), two_regimes(drivers=drivers(0.0))], ids=["plain", "driven"])
def test_a_path_alone_is_the_path_in_company(market):
    alone = market_paths(market, np.array([71]), Plan(9))
    company = market_paths(market, 300, Plan(9))
    np.testing.assert_array_equal(alone.log_price[:, :, 0], company.log_price[:, :, 71])


def test_semi_markov_refusals():
    for arguments, message in [
        (([0.5, 0.5], [3.0, 2.0], [4, 1], [[0, 1], [1, 0]]), "at least r steps"),
        (([0.5, 0.5], [5.0, 2.0], [2, 1], [[0.5, 0.5], [1, 0]]), "zero diagonal"),
        (([0.5, 0.5], [5.0, 2.0], [2, 1], [[0, 0.9], [1, 0]]), r"sum of embedded\[0\] is 0.9"),
        (([0.5, 0.4], [5.0, 2.0], [2, 1], [[0, 1], [1, 0]]), "sum of initial is 0.9"),
    ]:
        with pytest.raises(InputError, match=message):
            regime.semi_markov(*arguments)


def test_stationary_laws():
    chains = np.array([[[0.9, 0.1], [0.3, 0.7]], [[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.2, 0.8]]])
    # The last chain leaves its second state for ever.
    expected = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]
    np.testing.assert_allclose(regime.stationary_law(chains), expected, rtol=1e-14, atol=1e-16)
    with pytest.raises(InputError, match="no unique stationary law"):
        regime.stationary_law(np.eye(3))


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ([0.5, np.nan], r"x\[1\] is nan; a probability"),
        ([[0.5, 0.5], [1.2, -0.2]], r"x\[1, 0\] is 1.2; a probability"),
        ([0.5, 0.4], "the sum of x is 0.9; "),
    ],
)
def test_laws_are_checked(law, message):
    with pytest.raises(InputError, match=message):
        regime.check_law("x", law)


def test_matched_means_leave_no_error_in_what_is_linear():
    market = presets.gbm(("A", "B", "C"), [0.8, 0.9, 1.0], CORRELATION, dtype=F64)
    record = market_paths(market, 1000, Plan(10))
    growth = jnp.asarray([0.001, 0.0, -0.002], F64)
    matched = control.matched_means(record.log_price, growth)
    expected = np.exp(np.arange(1, 11)[:, None] * np.asarray(growth))
    np.testing.assert_allclose(np.exp(matched).mean(axis=-1), expected, rtol=1e-12)
    # One constant per date and asset: the shape of the sample stays.
    np.testing.assert_allclose(np.std(matched - record.log_price, axis=-1), 0.0, atol=1e-12)


def test_antithetic_pairs_gain_for_prices_and_lose_for_even_payoffs(cases):
    """Variance ratios of case G03: lognormal 2.115, tail indicator 1.01 at one per cent, even function 0.5."""
    case = cases("models")["G03"]["expected"]
    sigma = 0.8
    market = presets.gbm(("A",), [sigma * np.sqrt(365.0)], dtype=F64)
    market = replace(market, drift=jnp.zeros((1, 1), F64))

    def variances(payoff):
        n = 400_000
        plain = payoff(np.asarray(market_paths(market, n, Plan(1), seed=1).log_price[0, 0]) / sigma)
        pairs = payoff(np.asarray(market_paths(market, n, Plan(1, antithetic=True), seed=2).log_price[0, 0]) / sigma)
        return np.var(plain.reshape(-1, 2).mean(axis=1)) / np.var(pairs.reshape(-1, 2).mean(axis=1))

    assert variances(lambda z: np.exp(sigma * z)) == pytest.approx(case["ratio_lognormal"], rel=0.05)
    assert variances(lambda z: (z < -2.3263478740408408) * 1.0) == pytest.approx(case["ratio_tail"]["0.01"], rel=0.05)
    assert variances(lambda z: z * z) == pytest.approx(case["ratio_even_function"], rel=0.05)
