"""Pools against reference cases, closed forms, brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from qpo_sim.errors import InputError
from qpo_sim.instrument.pool import concentrated, constant_product, fees, loss_versus_rebalancing, stableswap, weighted


def close(got, expected, case):
    tolerance = case["tolerance"]
    np.testing.assert_allclose(np.asarray(got, float), expected, rtol=tolerance["rel"], atol=tolerance["abs"])


def slope(f, x, step=1e-5):
    h = step * np.maximum(np.abs(x), 1.0)
    return (f(x + h) - f(x - h)) / (2.0 * h)


def slopes(f, x, step=1e-5):
    """Finite differences in each entry of a vector."""
    x = np.asarray(x, float)
    unit = np.eye(len(x))
    h = step * np.abs(x)
    return np.array([(f(x + h[i] * unit[i]) - f(x - h[i] * unit[i])) / (2.0 * h[i]) for i in range(len(x))])


# Reference cases


def test_amm_01_constant_product_swap(cases):
    case = cases("domain")["amm-01"]
    i, e = case["inputs"], case["expected"]
    swap = constant_product.swap(i["y"], i["x"], i["usdc_in"], i["fee"])
    close(swap, [e["eth_out"], e["avg_price"], e["new_mid"], e["slippage"]], case)


def test_amm_03_concentrated_position_and_swap(cases):
    case = cases("domain")["amm-03"]
    i, e = case["inputs"], case["expected"]
    ends = i["price"], i["lower"], i["upper"]
    liquidity = concentrated.liquidity_from_budget(i["eth"], i["usdc"], *ends)
    base, quote = concentrated.holdings(liquidity, *ends)
    swap = concentrated.swap_quote_in(liquidity, i["price"], i["swap_usdc"], 0.0)
    close([liquidity, base, quote], [e["L"], e["eth"], e["usdc"]], case)
    close([swap.amount_out, swap.price_after], [e["eth_out"], e["new_price"]], case)
    across = concentrated.swap_quote_in_across(
        np.array([i["lower"], i["upper"]]), liquidity[None], i["price"], i["swap_usdc"], 0.0
    )
    close([across.amount_out, across.price_after], [e["eth_out"], e["new_price"]], case)


def test_amm_05_stableswap(cases):
    case = cases("domain")["amm-05"]
    for row, e, contract in zip(
        case["inputs"]["cases"], case["expected"]["results"], case["expected"]["contract_A_equiv"], strict=True
    ):
        x = np.array(row["x"])
        swap = stableswap.swap(x, 0, 1, row["dx"], row["A"], case["inputs"]["fee"])
        got = [stableswap.invariant(x, row["A"]), swap.amount_out, swap.average_price]
        close(got, [e["D"], e["dy"], e["avg_price"]], case)
        assert stableswap.contract_amplification(row["A"], 2) == contract
        assert stableswap.whitepaper_amplification(contract, 2) == row["A"]


def test_amm_07_loss_versus_rebalancing(cases):
    case = cases("domain")["amm-07"]
    i, e = case["inputs"], case["expected"]
    got = [
        1e4 * loss_versus_rebalancing.constant_product(i["sigma_daily"]),
        loss_versus_rebalancing.constant_product(i["sigma_annual"]),
        loss_versus_rebalancing.weighted(i["sigma_annual"], i["w"]),
    ]
    close(got, [e["bp_per_day"], e["annual"], e["weighted_annual"]], case)


def test_amm_09_arbitrage_share(cases):
    case = cases("domain")["amm-09"]
    for k, row in enumerate(case["inputs"]["rows"]):
        arguments = row["sigma_daily"], row["fee"], row["dt_s"] / 86_400.0
        got = [
            loss_versus_rebalancing.arbitrage_share_poisson(*arguments),
            loss_versus_rebalancing.arbitrage_share_constant(*arguments),
        ]
        close(got, [case["expected"]["poisson"][k], case["expected"]["deterministic"][k]], case)


# Constant product and weighted


def test_constant_product_is_the_weighted_pool_of_equal_weights():
    x, y, d, f = 900.0, 2.5e6, np.array([1e-3, 1.0, 50.0, 4000.0]), 0.003
    for ours, theirs in zip(constant_product.swap(x, y, d, f), weighted.swap(x, y, 0.5, 0.5, d, f), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    r = np.array([0.01, 0.5, 1.0, 3.0])
    np.testing.assert_allclose(constant_product.impermanent_loss(r), weighted.impermanent_loss(r, 0.5), atol=1e-14)
    np.testing.assert_allclose(constant_product.value_factor(r), weighted.value_factor(r, 0.5), rtol=1e-14)
    # k = (x y)^(1/2) = L
    np.testing.assert_allclose(
        constant_product.value(3.0, r), weighted.value(3.0, np.stack([r, np.ones(4)]), np.array([0.5, 0.5])), rtol=1e-14
    )


def test_weighted_swap_series_meets_the_formula():
    # Either side of the switch the ratio is 1 + (1 + p) u / 2 + O(u^2).
    for power in (0.25, 1.0, 4.0):
        w_out = 1.0 / (1.0 + power)
        below, above = (
            weighted.swap(1.0, 1.0, power * w_out, w_out, u, 0.0).slippage for u in (0.99999e-5, 1.00001e-5)
        )
        assert below == pytest.approx(0.5 * (1.0 + power) * 1e-5, rel=1e-4)
        assert above / below == pytest.approx(1.0, abs=2.5e-5)


@pytest.mark.parametrize("fee", [0.0, 0.003])
def test_swaps_never_lower_the_invariant_and_round_trips_never_pay(fee):
    rng = np.random.default_rng(1)
    x, y = 10.0 ** rng.uniform(-3, 9, (2, 2000))
    d = x * 10.0 ** rng.uniform(-6, 1, 2000)
    w = rng.uniform(0.2, 0.8, 2000)
    out = weighted.amount_out(x, y, w, 1.0 - w, d, fee)
    growth = w * np.log1p(d / x) + (1.0 - w) * np.log1p(-out / y)
    assert np.all(growth >= -1e-10)
    back = weighted.amount_out(y - out, x + d, 1.0 - w, w, out, fee)
    assert np.all(back <= d * (1.0 + 1e-8))
    out = constant_product.amount_out(x, y, d, fee)
    assert np.all(constant_product.amount_out(y - out, x + d, out, fee) <= d * (1.0 + 1e-8))
    np.testing.assert_allclose(constant_product.growth(x, d, fee) ** 2, (1.0 + d / x) * (1.0 - out / y), rtol=1e-12)


def test_amount_in_inverts_amount_out():
    d = np.array([1e-6, 3.0, 1e5])
    out = constant_product.amount_out(100.0, 70.0, d, 0.01)
    np.testing.assert_allclose(constant_product.amount_in(100.0, 70.0, out, 0.01), d, rtol=1e-10)


@pytest.mark.slow
def test_a_share_is_worth_no_more_than_the_coins_put_in():
    r = np.exp(np.random.default_rng(2).normal(0.0, 2.0, 5000))
    assert np.all(constant_product.impermanent_loss(r) <= 0.0)
    assert np.all(weighted.impermanent_loss(r, 0.8) <= 1e-14)
    assert np.all(concentrated.impermanent_loss(1.0, r, 0.7, 1.6) <= 1e-14)
    prices = np.stack([r, np.ones_like(r), np.sqrt(r)])
    assert np.all(stableswap.impermanent_loss(np.ones(3), prices, 50.0) <= 1e-12)
    assert np.all(weighted.basket_impermanent_loss(prices, np.array([0.2, 0.5, 0.3])) <= 1e-14)
    for loss in (
        constant_product.impermanent_loss(1.0),
        weighted.impermanent_loss(1.0, 0.3),
        concentrated.impermanent_loss(1.2, 1.2, 1.0, 2.0),
        stableswap.impermanent_loss(np.array([1.0, 0.97]), np.array([1.0, 0.97]), 100.0),
    ):
        assert loss == pytest.approx(0.0, abs=1e-14)


def test_weighted_basket_holds_its_weights_and_its_gradient_is_the_holding():
    weights, prices = np.array([0.5, 0.3, 0.2]), np.array([2.0, 30.0, 0.4])
    k = weighted.invariant_from_value(1000.0, prices, weights)
    held = weighted.holdings(k, prices, weights)
    np.testing.assert_allclose(held * prices, 1000.0 * weights, rtol=1e-13)
    assert np.prod(held**weights) == pytest.approx(float(k), rel=1e-13)
    np.testing.assert_allclose(jax.grad(weighted.value, 1)(k, prices, weights), held, rtol=1e-12)


def test_expected_value_factor_is_the_lognormal_mean():
    # 4.5 standard errors: false alarm 7e-6.
    n, sigma, time, drift = 400_000, 0.8, 0.5, 0.3
    z = np.random.default_rng(3).standard_normal(n)
    r = np.exp((drift - 0.5 * sigma**2) * time + sigma * np.sqrt(time) * z)
    sample = np.asarray(weighted.value_factor(r, 0.7))
    expected = weighted.expected_value_factor(0.7, sigma, time, drift)
    assert abs(sample.mean() - expected) < 4.5 * sample.std() / np.sqrt(n)


# StableSwap


def residual(x, d, a):
    n = len(x)
    alpha = a * n**n
    return (alpha * sum(x) + d - alpha * d - d ** (n + 1) / (n**n * np.prod(x))) / d


@pytest.mark.parametrize("n", [2, 3, 4])
def test_stableswap_roots_solve_the_invariant(n):
    rng = np.random.default_rng(n)
    x = 10.0 ** rng.uniform(-4, 4, (n, 300))
    for a in (0.01, 1.0, 85.0, 5000.0):
        d = np.asarray(stableswap.invariant(x, a))
        for k in range(300):
            # Newton's residual over its slope: the relative error of D.
            alpha = a * n**n
            error = residual(x[:, k], d[k], a) / (alpha - 1.0 + (n + 1) * d[k] ** n / (n**n * np.prod(x[:, k])))
            assert abs(error) < 1e-13
        # The root in one balance is that balance; the forward error is that of D over its share.
        y = stableswap.balance_of(x, 1, d, a)
        slack = 1e-13 * d / np.asarray(stableswap.spot_price(x, 1, 0, a)) / x[1]
        assert np.all(np.abs(y / x[1] - 1.0) < 1e-11 + 100.0 * slack * (1.0 + d / x[1]))


def test_stableswap_without_amplification_is_constant_product_and_with_much_is_constant_sum():
    x = np.array([700.0, 1500.0])
    free = constant_product.amount_out(x[0], x[1], 50.0, 0.0)
    assert stableswap.amount_out(x, 0, 1, 50.0, 1e-9, 0.0) == pytest.approx(float(free), rel=1e-6)
    assert stableswap.amount_out(x, 0, 1, 50.0, 1e9, 0.0) == pytest.approx(50.0, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_stableswap_swaps_keep_the_invariant_and_fees_raise_it(n):
    rng = np.random.default_rng(7)
    x = 10.0 ** rng.uniform(2, 6, (n, 500))
    # Up to a tenth of the balance in or out, whichever is less: a drained balance has few digits left.
    dx = 0.1 * np.minimum(x[0], x[1] * stableswap.spot_price(x, 0, 1, 100.0)) * 10.0 ** rng.uniform(-6, 0, 500)
    d = stableswap.invariant(x, 100.0)
    out = stableswap.amount_out(x, 0, 1, dx, 100.0, 0.0)
    after = stableswap.after_swap(x, 0, 1, dx, out)
    np.testing.assert_allclose(stableswap.invariant(after, 100.0), d, rtol=1e-12)
    np.testing.assert_allclose(stableswap.amount_out(after, 1, 0, out, 100.0, 0.0), dx, rtol=1e-9)
    out = stableswap.amount_out(x, 0, 1, dx, 100.0, 0.0004)
    after = stableswap.after_swap(x, 0, 1, dx, out)
    assert np.all(stableswap.invariant(after, 100.0) >= d * (1.0 - 1e-13))
    assert np.all(stableswap.amount_out(after, 1, 0, out, 100.0, 0.0004) <= dx)


def test_stableswap_spot_price_is_the_limit_of_small_swaps():
    x = np.array([1.9e6, 1e5, 4e5])
    swap = stableswap.swap(x, 0, 1, 1e-2, 100.0, 0.0)
    assert swap.average_price == pytest.approx(float(stableswap.spot_price(x, 0, 1, 100.0)), rel=1e-6)
    slope_in_x = jax.grad(lambda d: stableswap.amount_out(x, 0, 1, d, 100.0, 0.0))(0.0)
    assert 1.0 / slope_in_x == pytest.approx(float(stableswap.spot_price(x, 0, 1, 100.0)), rel=1e-10)


@pytest.mark.parametrize("prices", [[1.0, 1.0], [1.0, 0.97], [1.0, 0.2], [1e-3, 1.0, 1.0], [1.0, 1.001, 0.999, 5.0]])
@pytest.mark.parametrize("a", [0.5, 100.0, 4000.0])
def test_stableswap_arbitraged_holdings_lie_on_the_curve_at_the_external_price(prices, a):
    p = np.array(prices)
    x = stableswap.holdings(1e6, p, a)
    assert stableswap.invariant(x, a) == pytest.approx(1e6, rel=1e-11)
    for k in range(1, len(p)):
        assert stableswap.spot_price(x, 0, k, a) == pytest.approx(p[k] / p[0], rel=1e-9)
    assert stableswap.value(1e6, p, a) <= 1e6 * p.sum() / len(p) * (1.0 + 1e-12)


def test_stableswap_share_is_the_cheapest_basket_on_the_curve():
    p, a = np.array([1.0, 0.8]), 30.0
    best = optimize.minimize_scalar(
        lambda x0: x0 + 0.8 * float(stableswap.balance_of(np.array([x0, 1.0]), 1, 1000.0, a)),
        bounds=(1e-6, 2000.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert stableswap.value(1000.0, p, a) == pytest.approx(best.fun, rel=1e-12)


def test_stableswap_drains_into_a_coin_that_loses_its_peg():
    for p in (0.5, 0.05):
        # Nearly all of the pool is the bad coin: little more than D p is left, and less than a constant-product share.
        value = stableswap.value(1.0, np.array([1.0, p]), 1000.0)
        assert p < value < p * 1.1
        assert value < 0.5 * constant_product.value(0.5, p) * 2.0


@pytest.mark.slow
def test_stableswap_gradients_are_finite_differences():
    x, p, a = np.array([1.9e3, 1e2, 7e2]), np.array([1.0, 0.99, 1.02]), 80.0
    np.testing.assert_allclose(
        jax.grad(stableswap.invariant)(x, a), slopes(lambda x: stableswap.invariant(x, a), x), rtol=1e-7
    )
    np.testing.assert_allclose(
        jax.grad(stableswap.invariant, 1)(x, a), slope(lambda a: stableswap.invariant(x, a), a), rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.grad(lambda x: stableswap.amount_out(x, 0, 1, 20.0, a, 0.0004))(x),
        slopes(lambda x: stableswap.amount_out(x, 0, 1, 20.0, a, 0.0004), x),
        rtol=1e-6,
    )
    np.testing.assert_allclose(jax.grad(stableswap.value, 1)(5.0, p, a), stableswap.holdings(5.0, p, a), rtol=1e-10)
    np.testing.assert_allclose(
        jax.hessian(stableswap.value, 1)(5.0, p, a)[0],
        slopes(lambda p: stableswap.holdings(5.0, p, a)[0], p, 1e-6),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        jax.hessian(stableswap.invariant)(x, a)[1],
        slopes(lambda x: jax.grad(stableswap.invariant)(x, a)[1], x),
        rtol=1e-5,
    )
    # Ties in the smallest price: par.
    tied = jax.grad(stableswap.value, 1)(6.0, np.ones(3), a)
    np.testing.assert_allclose(tied, 2.0 * np.ones(3), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_stableswap_converges_in_single_precision_at_any_imbalance(n):
    rng = np.random.default_rng(11)
    x = 10.0 ** rng.uniform(-6, 6, (n, 4000))
    p = np.exp(rng.uniform(-12.0, 0.0, (n, 4000)))
    a = 10.0 ** rng.uniform(-2, 4, 4000)
    x32, p32, a32 = (v.astype(np.float32) for v in (x, p, a))
    d32, d = stableswap.invariant(x32, a32), stableswap.invariant(x32.astype(float), a32.astype(float))
    assert d32.dtype == jnp.float32
    np.testing.assert_allclose(d32, d, rtol=1e-5)
    v32 = stableswap.value(np.float32(1.0), p32, a32)
    assert v32.dtype == jnp.float32
    v = stableswap.value(1.0, p32.astype(float), a32.astype(float))
    np.testing.assert_allclose(v32, v, rtol=1e-4)
    assert np.all(np.isfinite(jax.grad(lambda p: jnp.sum(stableswap.value(np.float32(1.0), p, a32)))(p32)))
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(stableswap.invariant(x, a32)))(x32)))


def test_stableswap_small_swap_does_not_drown_in_single_precision():
    x = np.array([1.2e6, 8e5], np.float32)
    out = stableswap.amount_out(x, 0, 1, np.float32(0.5), np.float32(100.0), np.float32(0.0))
    exact = stableswap.amount_out(x.astype(float), 0, 1, 0.5, 100.0, 0.0)
    assert out.dtype == jnp.float32
    assert out == pytest.approx(float(exact), rel=1e-5)


def test_rows_and_arrays_and_paths_agree():
    p = np.array([[1.0, 1.0, 1.0], [0.9, 1.0, 1.1]])
    np.testing.assert_array_equal(stableswap.value(2.0, p, 50.0), stableswap.value(2.0, (p[0], p[1]), 50.0))
    single = [stableswap.value(2.0, p[:, k], 50.0) for k in range(3)]
    np.testing.assert_allclose(stableswap.value(2.0, p, 50.0), single, rtol=1e-14)


# Concentrated liquidity

BOUNDARIES = np.array([0.5, 0.8, 1.0, 1.3, 2.0])
DEPTH = np.array([100.0, 400.0, 250.0, 80.0])


def test_concentrated_position_outside_its_range_is_one_coin():
    below, above = concentrated.holdings(10.0, 0.5, 0.8, 1.25), concentrated.holdings(10.0, 2.0, 0.8, 1.25)
    assert below.quote == 0.0 and above.base == 0.0
    assert below.base == pytest.approx(10.0 * (1 / np.sqrt(0.8) - 1 / np.sqrt(1.25)), rel=1e-14)
    assert above.quote == pytest.approx(10.0 * (np.sqrt(1.25) - np.sqrt(0.8)), rel=1e-14)
    # A budget of the other coin buys nothing there.
    assert concentrated.liquidity_from_budget(below.base, 0.0, 0.5, 0.8, 1.25) == pytest.approx(10.0)
    assert concentrated.liquidity_from_budget(0.0, above.quote, 2.0, 0.8, 1.25) == pytest.approx(10.0)


def test_concentrated_value_delta_and_gamma():
    p = np.array([0.5, 0.85, 1.0, 1.2, 3.0])
    held = concentrated.holdings(7.0, p, 0.8, 1.25)
    delta = jax.vmap(jax.grad(concentrated.value, 1), (None, 0, None, None))(7.0, p, 0.8, 1.25)
    np.testing.assert_allclose(delta, held.base, rtol=1e-12)
    np.testing.assert_allclose(
        concentrated.gamma(7.0, p, 0.8, 1.25),
        slope(lambda p: concentrated.holdings(7.0, p, 0.8, 1.25).base, p),
        rtol=1e-6,
    )
    for k in (0, 2, 3):
        np.testing.assert_allclose(
            jax.grad(concentrated.value, k)(7.0, 1.1, 0.8, 1.25),
            slope(
                lambda v, k=k: concentrated.value(*[v if j == k else u for j, u in enumerate((7.0, 1.1, 0.8, 1.25))]),
                (7.0, 1.1, 0.8, 1.25)[k],
            ),
            rtol=1e-7,
        )
    value = concentrated.value(concentrated.liquidity_from_value(55.0, p, 0.8, 1.25), p, 0.8, 1.25)
    np.testing.assert_allclose(value, 55.0, rtol=1e-14)


def test_narrow_range_in_single_precision():
    one = np.float32(1.0)
    base, quote = concentrated.holdings(one, np.float32(1.00001), np.float32(0.9999), np.float32(1.0001))
    exact = concentrated.holdings(1.0, float(np.float32(1.00001)), float(np.float32(0.9999)), float(np.float32(1.0001)))
    assert base.dtype == jnp.float32
    np.testing.assert_allclose([base, quote], exact, rtol=1e-6)


def test_capital_efficiency():
    assert concentrated.symmetric_capital_efficiency(4.0) == pytest.approx(2.0)
    assert concentrated.capital_efficiency(3.0, 3.0 / 1.1, 3.0 * 1.1) == pytest.approx(
        float(concentrated.symmetric_capital_efficiency(1.1)), rel=1e-12
    )
    assert concentrated.capital_efficiency(3.0, 1e-18, 1e18) == pytest.approx(1.0, rel=1e-6)


def test_swap_in_one_range_is_a_constant_product_swap_on_virtual_reserves():
    liquidity, price, fee = 250.0, 1.1, 0.003
    up = concentrated.swap_quote_in(liquidity, price, 3.0, fee)
    reserves = constant_product.holdings(liquidity, price)
    assert up.amount_out == pytest.approx(
        float(constant_product.amount_out(reserves.quote, reserves.base, 3.0, fee)), rel=1e-13
    )
    down = concentrated.swap_base_in(liquidity, up.price_after, up.amount_out, 0.0)
    assert down.amount_out == pytest.approx(3.0 * (1 - fee), rel=1e-12)
    assert down.price_after == pytest.approx(price, rel=1e-13)


@pytest.mark.parametrize("quote_in", [True, False])
def test_swap_across_ranges_is_the_range_by_range_walk(quote_in):
    fee, price = 0.003, 1.1
    across = concentrated.swap_quote_in_across if quote_in else concentrated.swap_base_in_across
    inside = concentrated.swap_quote_in if quote_in else concentrated.swap_base_in
    for amount in (0.5, 30.0, 70.0, 1e4):
        left, at, out, k = amount * (1 - fee), price, 0.0, 2
        while left > 1e-12 and 0 <= k < 4:
            end = BOUNDARIES[k + 1] if quote_in else BOUNDARIES[k]
            room = (
                DEPTH[k] * (np.sqrt(end) - np.sqrt(at)) if quote_in else DEPTH[k] * (1 / np.sqrt(end) - 1 / np.sqrt(at))
            )
            used = min(left, room)
            step = inside(DEPTH[k], at, used, 0.0)
            left, at, out = left - used, float(step.price_after), out + float(step.amount_out)
            k += 1 if quote_in else -1
        got = across(BOUNDARIES, DEPTH, price, amount, fee)
        np.testing.assert_allclose(got, [out, at, max(left, 0.0) / (1 - fee)], rtol=1e-12, atol=1e-11)
    many = across(BOUNDARIES, DEPTH, np.array([0.9, 1.1]), np.array([2.0, 30.0]), fee)
    np.testing.assert_allclose(many.amount_out[1], across(BOUNDARIES, DEPTH, 1.1, 30.0, fee).amount_out, rtol=1e-14)
    gradient = jax.grad(lambda a: across(BOUNDARIES, DEPTH, price, a, fee).amount_out)(30.0)
    assert gradient == pytest.approx(
        float(slope(lambda a: across(BOUNDARIES, DEPTH, price, a, fee).amount_out, 30.0)), rel=1e-7
    )


def test_swap_jumps_over_a_gap_in_liquidity():
    depth = np.array([100.0, 0.0, 250.0, 80.0])
    got = concentrated.swap_base_in_across(BOUNDARIES, depth, 1.0, 10.0, 0.0)
    alone = concentrated.swap_base_in(100.0, 0.8, 10.0, 0.0)
    np.testing.assert_allclose([got.amount_out, got.price_after], [alone.amount_out, alone.price_after], rtol=1e-13)
    gradient = jax.grad(lambda x: concentrated.swap_base_in_across(BOUNDARIES, x, 1.0, 10.0, 0.0).amount_out)(depth)
    assert np.all(np.isfinite(gradient))


def test_fee_income_and_share_in_range():
    assert concentrated.fee_income(1e6, 0.003, 5.0, 50.0) == pytest.approx(300.0)
    got = concentrated.share_in_range(
        np.array([1.0, 1.0, 1.0, 0.7, 2.0]), np.array([1.2, 1.0, 2.0, 0.6, 2.0]), 0.8, 1.25
    )
    np.testing.assert_allclose(got, [1.0, 1.0, np.log(1.25) / np.log(2.0), 0.0, 0.0], atol=1e-14)
    assert np.isfinite(jax.grad(concentrated.share_in_range, 1)(1.0, 1.0, 0.8, 1.25))
    assert fees.fee_income(1e6, 0.003, 0.1) == pytest.approx(300.0)
    assert fees.volume(1e6, np.array([-0.02]), 0.04, base=0.5, sensitivity=0.6)[0] == pytest.approx(8e5)
    assert fees.compounded(10.0, 2.0, 100.0) == pytest.approx(10.2)


def test_ticks():
    ticks = np.array([-887272, -60, -1, 0, 1, 85176, 887272])
    np.testing.assert_array_equal(concentrated.tick_at_price(concentrated.price_at_tick(ticks)), ticks)
    # Uniswap V3 Development Book: price 5000 is in tick 85176.
    assert concentrated.tick_at_price(5000.0) == 85176
    low, high = concentrated.usable_range(4545.0, 5500.0, 0.003)
    assert low <= 4545.0 and high >= 5500.0
    for end, outside in ((low, 4545.0), (high, 5500.0)):
        tick = int(concentrated.tick_at_price(end * (1 + 1e-12)))
        assert tick % 60 == 0 and abs(np.log(end / outside)) < 60 * np.log(1.0001)
    with pytest.raises(InputError, match="fee is 0.002"):
        concentrated.usable_range(1.0, 2.0, 0.002)
    with pytest.raises(InputError, match="lower < upper"):
        concentrated.usable_range(2.0, 1.0, 0.003)
    with pytest.raises(InputError, match="above 0"):
        concentrated.tick_at_price(0.0)


# Loss versus rebalancing


def test_loss_rates_are_the_general_formula():
    p = np.array([0.9, 1.0, 1.1])
    general = loss_versus_rebalancing.rate(lambda p: constant_product.holdings(3.0, p).base, p, 0.6)
    np.testing.assert_allclose(
        general, loss_versus_rebalancing.constant_product(0.6) * constant_product.value(3.0, p), rtol=1e-12
    )
    weights = np.array([0.8, 0.2])
    general = loss_versus_rebalancing.rate(
        lambda p: weighted.holdings(3.0, jnp.stack([p, jnp.ones_like(p)]), weights)[0], p, 0.6
    )
    value = weighted.value(3.0, np.stack([p, np.ones(3)]), weights)
    np.testing.assert_allclose(general, loss_versus_rebalancing.weighted(0.6, 0.8) * value, rtol=1e-12)
    general = loss_versus_rebalancing.rate(lambda p: concentrated.holdings(3.0, p, 0.95, 1.05).base, p, 0.6)
    direct = loss_versus_rebalancing.concentrated_range(3.0, p, 0.95, 1.05, 0.6)
    np.testing.assert_allclose(general, direct, rtol=1e-12)
    assert direct[0] == 0.0 and direct[1] > 0.0
    # Annual loss of a full-range share at 60 % volatility: 4.5 %.
    assert loss_versus_rebalancing.constant_product(0.6) == pytest.approx(0.045)


@pytest.mark.parametrize("pool", ["constant_product", "concentrated", "stableswap"])
def test_expected_impermanent_loss_is_the_expected_loss_versus_rebalancing(pool):
    # Same paths for both sides. The loss against holding less what was paid has mean 0 but for the trapezoid rule in
    # time, for which 0.1 % is allowed. 4.5 standard errors: false alarm 7e-6 each.
    n, steps, sigma, time = 10_000, 100, 0.5, 0.25
    z = np.random.default_rng(5).standard_normal((steps, n))
    dt = time / steps
    log_p = np.concatenate([np.zeros((1, n)), np.cumsum(sigma * np.sqrt(dt) * z - 0.5 * sigma**2 * dt, axis=0)])
    p = np.exp(log_p)

    def base(p):
        if pool == "constant_product":
            return constant_product.holdings(1.0, p).base
        if pool == "concentrated":
            return concentrated.holdings(1.0, p, 0.8, 1.3).base
        return stableswap.holdings(1.0, jnp.stack([p, jnp.ones_like(p)]), 0.6)[0]

    def value(p):
        if pool == "constant_product":
            return constant_product.value(1.0, p)
        if pool == "concentrated":
            return concentrated.value(1.0, p, 0.8, 1.3)
        return stableswap.value(1.0, jnp.stack([p, jnp.ones_like(p)]), 0.6)

    rate = np.asarray(jax.jit(lambda p: loss_versus_rebalancing.rate(base, p, sigma))(p))
    paid = dt * (0.5 * rate[0] + rate[1:-1].sum(axis=0) + 0.5 * rate[-1])
    held = np.asarray(value(np.ones(())) + base(np.ones(())) * (p[-1] - 1.0))
    difference = held - np.asarray(value(p[-1])) - paid
    assert paid.mean() > 0.001
    assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(n) + 1e-3 * paid.mean()


def test_loss_is_shared_between_arbitrageurs_and_pool():
    share = loss_versus_rebalancing.arbitrage_share_poisson(0.05, np.array([0.0, 0.003, 10.0]), 12 / 86400)
    assert share[0] == 1.0 and np.all(np.diff(share) < 0.0)
    back = loss_versus_rebalancing.recaptured(2.0, share)
    np.testing.assert_allclose(back + 2.0 * share, 2.0)
    assert loss_versus_rebalancing.carry(3.0, 2.0, 0.25) == 2.5


def test_arbitrage_share_by_simulation_of_constant_blocks():
    # Log mispricing moves by sigma_b per block and arbitrage cuts it to [-g, g]; the cut c earns c^2/2 where the loss
    # per block without fees is sigma_b^2/2. Paths are independent: 5 standard errors, false alarm below 1e-6.
    sigma_b, g, n, steps = 1.0, 3.0, 20_000, 400
    rng = np.random.default_rng(9)
    x = rng.uniform(-g, g, n)
    rent = np.zeros(n)
    for t in range(steps):
        x = x + sigma_b * rng.standard_normal(n)
        cut = np.clip(x, -g, g)
        if t >= 100:
            rent += 0.5 * (x - cut) ** 2
        x = cut
    sample = rent / (steps - 100) / (0.5 * sigma_b**2)
    expected = loss_versus_rebalancing.arbitrage_share_constant(sigma_b, g, 1.0)
    assert abs(sample.mean() - expected) < 5.0 * sample.std() / np.sqrt(n)


def test_empty_swaps_have_gradients():
    gradient = jax.grad(lambda d: weighted.swap(100.0, 50.0, 0.7, 0.3, d, 0.003).slippage)(0.0)
    expected = slope(lambda d: weighted.swap(100.0, 50.0, 0.7, 0.3, d, 0.003).slippage, 1.0, 1e-4)
    assert gradient == pytest.approx(float(expected), rel=0.05)
    assert jax.grad(lambda d: constant_product.swap(100.0, 50.0, d, 0.003).average_price)(0.0) == pytest.approx(0.02)
