"""Impact, schedules, routes and gas against reference cases, brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from qpo_sim.errors import InputError
from qpo_sim.execution import gas, impact, routing, schedule
from qpo_sim.instrument.pool import concentrated, constant_product


def test_amm_11_square_root_law(cases):
    case = cases("domain")["amm-11"]
    i, e, tolerance = case["inputs"], case["expected"], case["tolerance"]
    participation = np.array(i["participation"])
    arguments = participation, 1.0, i["sigma_daily"]
    kwargs = {"rtol": tolerance["rel"], "atol": tolerance["abs"]}
    np.testing.assert_allclose(impact.square_root_peak(*arguments, prefactor=i["Y"]), e["peak"], **kwargs)
    np.testing.assert_allclose(impact.square_root_average(*arguments, prefactor=i["Y"]), e["avg_cost"], **kwargs)


# Impact


def test_impact_is_even_and_has_a_gradient_in_an_empty_order():
    q = np.array([-4.0, 4.0])
    for law in (
        lambda q: impact.square_root_peak(q, 100.0, 0.03),
        lambda q: impact.linear_peak(q, 50.0),
        lambda q: impact.almgren_average(q, 100.0, 0.03, 0.5, 1000.0),
    ):
        both = np.asarray(law(q))
        assert both[0] == both[1] > 0.0
        assert np.isfinite(jax.grad(law)(0.0))
    np.testing.assert_allclose(impact.linear_average(q, 50.0), 0.04)


def test_the_average_of_a_square_root_is_two_thirds_of_its_end():
    q = (np.arange(100_000) + 0.5) / 100_000
    mean = np.mean(np.asarray(impact.square_root_peak(q, 100.0, 0.03)))
    assert impact.square_root_average(1.0, 100.0, 0.03) == pytest.approx(mean, rel=1e-6)


def test_depth_acts_on_volume_and_spread():
    assert impact.square_root_peak(5.0, 100.0, 0.03, depth=0.25) == pytest.approx(
        2.0 * float(impact.square_root_peak(5.0, 100.0, 0.03)), rel=1e-13
    )
    assert impact.stressed_half_spread(1e-4, 0.25) == pytest.approx(2e-4)


def test_impact_decays_after_the_order():
    z = np.array([0.0, 1.0 / 6.0, 1.0, 100.0])
    left = np.asarray(impact.square_root_after(0.01, z))
    assert left[0] == 0.01 and left[1] == pytest.approx(0.01 * (np.sqrt(7 / 6) - np.sqrt(1 / 6)))
    assert left[1] == pytest.approx(0.01 * 2 / 3, rel=0.01)
    assert np.all(np.diff(left) < 0.0) and left[-1] < 0.0006


def test_almgren_average_by_hand():
    # 0.5 x 0.314 x 0.02 x 0.1 x 10^(1/4) + 0.142 x 0.02 x 0.5^0.6
    expected = 0.5 * 0.314 * 0.02 * 0.1 * 10.0**0.25 + 0.142 * 0.02 * 0.5**0.6
    assert impact.almgren_average(-10.0, 100.0, 0.02, 0.2, 1000.0) == pytest.approx(expected, rel=1e-12)


def test_trade_cost_adds_its_causes():
    cost = impact.trade_cost(-1e6, fee=4e-4, half_spread=1e-4, volume=1e9, volatility=0.03, depth=0.25)
    assert cost.fee == pytest.approx(400.0)
    assert cost.spread == pytest.approx(200.0)
    assert cost.impact == pytest.approx(1e6 * 0.9 * 0.03 * np.sqrt(1e-3 / 0.25) * 2.0 / 3.0, rel=1e-12)
    assert cost.total == pytest.approx(float(cost.fee + cost.spread + cost.impact))
    total = jax.grad(lambda q: impact.trade_cost(q, fee=0.0, half_spread=0.0, volume=1e9, volatility=0.03).total)
    assert total(0.0) == 0.0


def test_fills_are_cut_to_the_participation_and_nothing_is_lost():
    q = np.array([-30.0, -5.0, 0.0, 8.0, 40.0])
    fill = impact.fill_within(q, 100.0, 0.1)
    np.testing.assert_allclose(fill.filled, [-10.0, -5.0, 0.0, 8.0, 10.0])
    np.testing.assert_allclose(fill.filled + fill.left, q)


# Almgren-Chriss

PLAN = {"volatility": 0.95, "permanent": 2.5e-7, "temporary": 2.5e-6, "fixed": 0.0625}


def test_almgren_chriss_example_of_the_paper():
    # Almgren & Chriss (2000), table 1 and section 3: one million shares over 5 days, kappa about 0.61 per day at
    # lambda = 1e-6 (their kappa uses eta-tilde with tau = 1 day).
    plan = schedule.optimal_schedule(1e6, 5.0, 5, risk_aversion=1e-6, **PLAN)
    adjusted = schedule.adjusted_temporary(2.5e-6, 2.5e-7, 1.0)
    assert adjusted == pytest.approx(2.375e-6)
    kappa = float(schedule.urgency(1e-6, 0.95, adjusted, 1.0))
    assert 2.0 * (np.cosh(kappa) - 1.0) == pytest.approx(1e-6 * 0.95**2 / 2.375e-6, rel=1e-12)
    assert kappa == pytest.approx(0.61, abs=0.005)
    t = np.arange(6.0)
    np.testing.assert_allclose(plan.holdings, 1e6 * np.sinh(kappa * (5.0 - t)) / np.sinh(5.0 * kappa), atol=1e-6)
    np.testing.assert_allclose(np.sum(plan.trades), 1e6)
    n, x = np.asarray(plan.trades), np.asarray(plan.holdings)
    assert plan.expected_cost == pytest.approx(0.5 * 2.5e-7 * 1e12 + 0.0625 * 1e6 + 2.375e-6 * np.sum(n**2), rel=1e-12)
    assert plan.variance == pytest.approx(0.95**2 * np.sum(x[1:] ** 2), rel=1e-12)


@pytest.mark.parametrize("risk_aversion", [0.0, 1e-9, 1e-6, 1e-4])
def test_almgren_chriss_plan_is_the_best_plan(risk_aversion):
    tau = 0.5

    def objective(inner):
        holdings = jnp.concatenate([jnp.array([1.0]), inner, jnp.array([0.0])]) * 1e6
        cost = schedule.expected_cost(holdings, tau, permanent=2.5e-7, temporary=2.5e-6, fixed=0.0625)
        return (cost + risk_aversion * schedule.cost_variance(holdings, tau, 0.95)) / 1e6

    start = np.linspace(1.0, 0.0, 9)[1:-1]
    # Quadratic: one Newton step is exact.
    hessian, gradient = jax.hessian(objective)(start), jax.grad(objective)(start)
    best = start - np.linalg.solve(np.asarray(hessian), np.asarray(gradient))
    plan = schedule.optimal_schedule(1e6, 4.0, 8, risk_aversion=risk_aversion, **PLAN)
    np.testing.assert_allclose(plan.holdings[1:-1] / 1e6, best, atol=1e-9)


def test_almgren_chriss_series_meets_the_formula_and_extremes_stay_finite():
    def first(risk_aversion):
        return schedule.optimal_schedule(1.0, 5.0, 10, risk_aversion=risk_aversion, **PLAN).holdings[1]

    # (kappa T)^2 is about lambda x 0.9025 x 25/2.4375e-6: the switch at 1e-3 is near lambda = 1.0801e-10.
    switch = 1e-3 * 2.4375e-6 / (0.9025 * 25.0)
    np.testing.assert_allclose(first(0.99999 * switch), first(1.00001 * switch), atol=1e-9)
    np.testing.assert_allclose(jax.grad(first)(0.99999 * switch), jax.grad(first)(1.00001 * switch), rtol=1e-4)
    assert jax.grad(first)(0.0) == pytest.approx(float((first(1e-12) - first(0.0)) / 1e-12), rel=1e-3)
    # Nearly all in the first trade: 1/(kappa_tilde tau)^2 is left.
    assert first(1e3) == pytest.approx(2.4375e-6 / (1e3 * 0.9025 * 0.25), rel=1e-6)
    assert np.isfinite(jax.grad(first)(1e3))


def test_almgren_chriss_without_net_temporary_impact_has_no_plan():
    # One trade over 40 days: eta - gamma tau/2 = 2.5e-6 - 5e-6.
    plan = schedule.optimal_schedule(1.0, 40.0, 1, risk_aversion=1e-6, **PLAN)
    assert np.all(np.isnan(plan.holdings)) and np.isnan(plan.expected_cost)


def test_almgren_chriss_over_paths():
    quantity = np.array([1e5, -2e5])
    plan = schedule.optimal_schedule(quantity, 5.0, 5, risk_aversion=np.array([1e-6, 1e-5]), **PLAN)
    assert plan.holdings.shape == (6, 2) and plan.expected_cost.shape == (2,)
    one = schedule.optimal_schedule(-2e5, 5.0, 5, risk_aversion=1e-5, **PLAN)
    np.testing.assert_allclose(plan.holdings[:, 1], one.holdings)
    assert one.expected_cost > 0.0


# Routing

X = np.array([1000.0, 300.0, 5000.0, 50.0])
Y = np.array([2.0e6, 6.3e5, 9.9e6, 9.0e4])
FEE = np.array([0.003, 0.003, 0.0005, 0.01])


def out_of(d, x=X, y=Y, fee=FEE):
    return float(np.sum(np.asarray(constant_product.amount_out(x, y, np.asarray(d), fee))))


@pytest.mark.parametrize("amount", [1e-3, 1.0, 40.0, 900.0, 1e5])
def test_split_is_the_optimum(amount):
    route = routing.split(X, Y, FEE, amount)
    d = np.asarray(route.amounts)
    assert np.all(d >= 0.0) and d.sum() == pytest.approx(amount, rel=1e-12)
    assert route.amount_out == pytest.approx(out_of(d), rel=1e-12)
    # KKT: one marginal output where used, no better one elsewhere.
    marginal = np.asarray(jax.vmap(jax.grad(constant_product.amount_out, 2))(X, Y, d, FEE))
    np.testing.assert_allclose(marginal[d > 0.0], route.marginal_out, rtol=1e-9)
    assert np.all(marginal[d == 0.0] <= route.marginal_out * (1.0 + 1e-12))
    # Brute force cannot beat it.
    for _ in range(3):
        other = optimize.minimize(
            lambda s: -out_of(amount * np.abs(s) / np.abs(s).sum()) / float(route.amount_out),
            np.random.default_rng(_).uniform(0.1, 1.0, 4),
            method="Nelder-Mead",
        )
        assert -other.fun <= 1.0 + 1e-12
    bisected = routing.split_within(X, Y, FEE, amount, np.full(4, np.inf))
    np.testing.assert_allclose(bisected.amounts, d, rtol=1e-9, atol=1e-12 * amount)
    assert bisected.unfilled == pytest.approx(0.0, abs=1e-10 * amount)


def test_water_filling_formula_on_two_pools():
    # 1/sqrt(nu) = (D + sum x/phi)/sum sqrt(x y/phi) with both pools in use.
    x, y, phi, amount = np.array([100.0, 400.0]), np.array([200.0, 790.0]), np.array([0.997, 0.9995]), 50.0
    w = (amount + np.sum(x / phi)) / np.sum(np.sqrt(x * y / phi))
    route = routing.split(x, y, 1.0 - phi, amount)
    np.testing.assert_allclose(route.amounts, (np.sqrt(x * y * phi) * w - x) / phi, rtol=1e-11)
    assert route.marginal_out == pytest.approx(1.0 / w**2, rel=1e-12)


@pytest.mark.parametrize("way", ["prefix", "bisection"])
def test_route_gradients_are_finite_differences(way):
    inf = np.full(4, np.inf)

    def amounts(amount, x):
        if way == "prefix":
            return routing.split(x, Y, FEE, amount).amounts
        return routing.split_within(x, Y, FEE, amount, inf).amounts

    h = 1e-4
    fd = (np.asarray(amounts(300.0 + h, X)) - np.asarray(amounts(300.0 - h, X))) / (2 * h)
    np.testing.assert_allclose(jax.jacfwd(amounts)(300.0, X), fd, rtol=1e-6, atol=1e-9)
    bump = np.array([0.0, h, 0.0, 0.0])
    fd = (np.asarray(amounts(300.0, X + bump)) - np.asarray(amounts(300.0, X - bump))) / (2 * h)
    np.testing.assert_allclose(jax.jacrev(amounts, 1)(300.0, X)[:, 1], fd, rtol=1e-6, atol=1e-8)
    # Envelope: output rises by the marginal output.
    split = jax.value_and_grad(lambda a: routing.split(X, Y, FEE, a).amount_out)(300.0)
    assert split[1] == pytest.approx(float(routing.split(X, Y, FEE, 300.0).marginal_out), rel=1e-10)


def test_split_in_single_precision_and_over_paths():
    amount = np.array([1e-3, 5.0, 700.0])
    exact = routing.split(X, Y, FEE, amount)
    assert exact.amounts.shape == (4, 3)
    np.testing.assert_allclose(exact.amounts[:, 2], routing.split(X, Y, FEE, 700.0).amounts, rtol=1e-12)
    x, y, f, a = (v.astype(np.float32) for v in (X, Y, FEE, amount))
    route = routing.split(x, y, f, a)
    assert route.amounts.dtype == jnp.float32
    np.testing.assert_allclose(route.amount_out, exact.amount_out, rtol=1e-5)
    np.testing.assert_allclose(np.sum(route.amounts, axis=0), amount, rtol=1e-4)


def test_pools_in_use_grow_with_the_order():
    used = [int(np.sum(np.asarray(routing.split(X, Y, FEE, a).amounts) > 0.0)) for a in (1e-3, 10.0, 1e3, 1e5)]
    assert used == sorted(used) and used[0] == 1 and used[-1] == 4


@pytest.mark.parametrize("quote_in", [True, False])
def test_segments_as_pools_give_the_swap_across_them(quote_in):
    boundaries, depth = np.array([0.5, 0.8, 1.0, 1.3, 2.0]), np.array([100.0, 400.0, 250.0, 80.0])
    pools = (concentrated.quote_in_pools if quote_in else concentrated.base_in_pools)(boundaries, depth, 1.1)
    across = concentrated.swap_quote_in_across if quote_in else concentrated.swap_base_in_across
    for amount in (0.5, 30.0, 70.0, 1e4):
        route = routing.split_within(*pools[:2], np.full(4, 0.003), amount, pools.capacity)
        swap = across(boundaries, depth, 1.1, amount, 0.003)
        assert route.amount_out == pytest.approx(float(swap.amount_out), rel=1e-9)
        assert route.unfilled == pytest.approx(float(swap.unfilled), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cost", [0.0, 50.0, 2000.0, 1e6])
def test_route_with_gas_is_the_best_set(cost):
    gas_costs = np.array([1.0, 1.2, 0.8, 2.0]) * cost
    route = routing.split_with_gas(X, Y, FEE, 300.0, gas_costs)
    d = np.asarray(route.amounts)
    net = float(route.amount_out) - gas_costs[d > 0.0].sum()
    assert d.sum() == pytest.approx(300.0, rel=1e-12)
    free = routing.split(X, Y, FEE, 300.0)
    assert net >= float(free.amount_out) - gas_costs[np.asarray(free.amounts) > 0.0].sum() - 1e-6
    for k in range(4):
        assert net >= out_of(300.0, X[k], Y[k], FEE[k]) - gas_costs[k] - 1e-6
    if cost == 0.0:
        np.testing.assert_allclose(d, free.amounts, rtol=1e-12)
    if cost == 1e6:
        assert np.sum(d > 0.0) == 1


def test_route_with_gas_over_too_many_pools():
    with pytest.raises(InputError, match="7 pools"):
        routing.split_with_gas(np.ones(7), np.ones(7), np.zeros(7), 1.0, np.zeros(7))


# Gas


def test_gas_cost():
    # Swap of 180 000 units at 0.1 gwei and ETH at 2000: 3.6 cents.
    assert gas.cost(gas.UNITS["concentrated_swap"], 0.1, 2000.0) == pytest.approx(0.036)
    assert gas.cost(21_000, 30.0, 3000.0, tip=2.0) == pytest.approx(2.016)
    assert gas.layer_2_cost(180_000, 0.005, 2000.0, data_units=500, data_fee=1.0) == pytest.approx(0.0018 + 0.001)
    assert gas.break_even_trade(2.0, 0.001) == pytest.approx(2000.0)


def test_gas_cost_in_single_precision():
    cost = gas.cost(180_000, jnp.float32(0.1), jnp.float32(2000.0))
    assert cost.dtype == jnp.float32 and cost == pytest.approx(0.036, rel=1e-6)
