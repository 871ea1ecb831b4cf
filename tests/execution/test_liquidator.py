"""Economics of a liquidator against the worked case, and closed forms against their definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpo_sim.execution import gas, liquidator
from qpo_sim.execution.liquidator import ConstantProduct, Deal


def _terms(p) -> tuple[ConstantProduct, Deal]:
    cost = gas.cost(p["gas"], p["gwei"], p["eth"])
    pool = ConstantProduct(float(p["pool"]["x"]), p["pool"]["y"], p["pool"]["fee"])
    return pool, Deal(p["bonus"], p["protocol_fee"], float(p["oracle_price"]), cost)


def test_lend_16_profit_break_even_and_optimum(cases):
    case = cases("domain")["lend-16"]
    p, expected = case["inputs"], case["expected"]
    pool, deal = _terms(p)
    repay = jnp.asarray(p["repay"], jnp.float64)
    profit = liquidator.profit(repay, partial(liquidator.sell, pool), deal)
    between, best = liquidator.break_even_repay(pool, deal), liquidator.optimal_repay(pool, deal)
    got = {
        "profit": profit,
        "break_even_low": between.low,
        "break_even_high": between.high,
        "optimal_repay": best.repay,
        "max_profit": best.profit,
    }
    for key, value in expected.items():
        # Closer than the case's tolerance, but for the digits that its numerical optimum lacks.
        np.testing.assert_allclose(got[key], value, rtol=1e-7)
    assert np.asarray(liquidator.acts(profit)).tolist() == [value > 0.0 for value in expected["profit"]]


TERMS = st.tuples(
    st.floats(50.0, 1e5), st.floats(0.005, 0.15), st.floats(0.0, 1.0), st.floats(0.0, 0.01), st.floats(0.0, 300.0),
    st.floats(0.0, 0.9), st.floats(0.97, 1.03),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(TERMS)
def test_closed_forms_by_definition(terms):
    coins, bonus, protocol_fee, fee, cost, bid, market = terms
    pool, deal = ConstantProduct(coins, coins * 2000.0 * market, fee), Deal(bonus, protocol_fee, 2000.0, cost, bid)
    profit = lambda repay: liquidator.profit(repay, partial(liquidator.sell, pool), deal)  # noqa: E731
    best, between = liquidator.optimal_repay(pool, deal), liquidator.break_even_repay(pool, deal)
    money = coins * 2000.0
    assert float(profit(best.repay)) == pytest.approx(float(best.profit), abs=1e-9 * money)
    # Concave: no better on a grid.
    assert np.all(np.asarray(profit(jnp.linspace(0.0, money, 101))) <= float(best.profit) + 1e-9 * money)
    if float(best.profit) > 1e-9 * money:
        for root in between:
            assert float(profit(root)) == pytest.approx(0.0, abs=1e-8 * money)
        assert 0.0 <= float(between.low) <= float(best.repay) <= float(between.high)
    elif float(best.profit) < -1e-9 * money:
        assert np.isnan(between.low) and np.isnan(between.high)
    limit = 0.5 * float(best.repay)
    capped = liquidator.optimal_repay(pool, deal, most=limit)
    assert float(capped.repay) == pytest.approx(limit)
    assert float(capped.profit) <= float(best.profit) + 1e-12 * money


def test_terms_vectorise_over_paths_in_single_precision():
    row = lambda *values: jnp.asarray(values, jnp.float32)  # noqa: E731
    pool = ConstantProduct(row(5000.0, 1000.0), row(1.5e7, 3e6), jnp.float32(0.003))
    deal = Deal(jnp.float32(0.055), jnp.float32(0.1), row(3000.0, 3000.0), row(30.0, 30.0))
    best = liquidator.optimal_repay(pool, deal)
    assert best.repay.dtype == jnp.float32
    np.testing.assert_allclose(best.repay, [328473.4, 65694.68], rtol=1e-3)
    between = liquidator.break_even_repay(pool, deal)
    np.testing.assert_allclose([between.low[0], between.high[0]], [647.889, 663795.3], rtol=1e-3)


def test_gradients_against_finite_differences():
    def value(x):
        pool, deal = ConstantProduct(x[0], x[1], x[2]), Deal(x[3], x[4], x[5], x[6], x[7])
        between = liquidator.break_even_repay(pool, deal)
        return liquidator.optimal_repay(pool, deal).profit + between.low + between.high

    x = jnp.asarray([5000.0, 1.5e7, 0.003, 0.055, 0.1, 3000.0, 30.0, 0.2])
    gradient = jax.grad(value)(x)
    for i in range(x.size):
        step = jnp.zeros_like(x).at[i].set(1e-6 * x[i])
        slope = (value(x + step) - value(x - step)) / (2e-6 * x[i])
        assert float(gradient[i]) == pytest.approx(float(slope), rel=1e-5)


def test_margin_losses_and_uncoverable_positions():
    assert float(liquidator.margin(0.05, 0.95)) == pytest.approx(-0.0025)
    assert np.asarray(liquidator.is_uncoverable(np.array([0.94, 0.96]), 0.055)).tolist() == [False, True]
    np.testing.assert_allclose(liquidator.protocol_loss(np.array([90.0, 120.0]), 1.0, 100.0), [0.0, 20.0])


def test_a_bid_of_the_whole_bonus_leaves_nothing():
    pool, deal = ConstantProduct(1e9, 2e12, 0.0), Deal(0.05, 0.1, 2000.0, 0.0, 1.0)
    profit = liquidator.profit(jnp.asarray(1000.0), partial(liquidator.sell, pool), deal)
    assert float(profit) == pytest.approx(0.0, abs=1e-3)
