"""Bands, leverage targets, repayments and the kill switch against reference cases, simulation and brute force."""

import jax
import numpy as np
import pytest
from scipy import optimize

from qpo_sim.errors import InputError
from qpo_sim.policy import band, kill_switch


def test_amm_13_no_trade_half_width(cases):
    case = cases("domain")["amm-13"]
    rows = case["inputs"]["rows"]
    weight, risk_aversion, cost = (np.array([r[k] for r in rows]) for k in ("weight", "risk_aversion", "cost"))
    kwargs = {"rtol": case["tolerance"]["rel"], "atol": case["tolerance"]["abs"]}
    expected = case["expected"]["half_width"]
    np.testing.assert_allclose(band.half_width(weight, risk_aversion, cost), expected, **kwargs)
    np.testing.assert_allclose(band.half_width_of_spread(weight, risk_aversion, 2.0 * cost), expected, **kwargs)


def test_amm_15_kill_switch(cases):
    case = cases("domain")["amm-15"]
    i = case["inputs"]
    switch = kill_switch.thresholds(drawdown=i["drawdown"], cooldown=i["cooldown"], recovery=i["recovery"])
    state, on, fired = kill_switch.init(float(i["equity"][0])), [], []
    for equity in i["equity"]:
        state, decision = kill_switch.step(switch, state, float(equity))
        on.append(bool(state.on))
        fired.append(bool(decision.fires))
    assert on == case["expected"]["on"]
    assert [k for k, f in enumerate(fired) if f] == [k for k in range(1, len(on)) if on[k - 1] and not on[k]]


# Bands


def test_widths_minimise_the_loss_they_are_derived_from():
    for pi, r, sigma, cost, fixed in (
        (0.5, 1.0, 0.6, 1e-3, 0.0),
        (0.3, 3.0, 0.8, 5e-4, 1e-5),
        (1.5, 2.0, 0.7, 2e-3, 1e-4),
    ):
        factor = (sigma * pi * (1.0 - pi)) ** 2

        def edge(log_h, pi=pi, r=r, sigma=sigma, cost=cost):
            h = np.exp(log_h)
            return float(band.tracking_loss(r, sigma, h) + cost * band.turnover(pi, sigma, h))

        def target(log_h, r=r, sigma=sigma, cost=cost, fixed=fixed, factor=factor):
            h = np.exp(log_h)
            return 0.5 * r * sigma**2 * h * h / 6.0 + (fixed + cost * h) * factor / h**2

        options = {"bounds": (-9.0, 1.0), "method": "bounded", "options": {"xatol": 1e-10}}
        best = optimize.minimize_scalar(edge, **options)
        assert band.half_width(pi, r, cost) == pytest.approx(np.exp(best.x), rel=1e-5)
        assert band.liquidity_premium(r, sigma, band.half_width(pi, r, cost)) == pytest.approx(best.fun, rel=1e-9)
        best = optimize.minimize_scalar(target, **options)
        assert band.half_width_to_target(pi, r, cost, fixed) == pytest.approx(np.exp(best.x), rel=1e-5)
    assert band.half_width_to_target(0.5, 2.0, 0.0, 1e-4) == pytest.approx(
        float(band.fixed_cost_half_width(0.5, 2.0, 1e-4))
    )
    assert band.half_width_to_target(0.5, 2.0, 1e-3) == pytest.approx((6 * 0.0625 * 1e-3 / 2.0) ** (1 / 3), rel=1e-12)


def test_a_third_of_the_loss_is_tracking_and_two_thirds_are_costs():
    h = band.half_width(0.4, 2.0, 1e-3)
    premium = float(band.liquidity_premium(2.0, 0.7, h))
    assert band.tracking_loss(2.0, 0.7, h) == pytest.approx(premium / 3.0)
    assert 1e-3 * band.turnover(0.4, 0.7, h) == pytest.approx(2.0 * premium / 3.0, rel=1e-12)


def test_fixed_cost_scaling():
    ratio = band.fixed_cost_half_width(0.5, 1.0, 16e-6) / band.fixed_cost_half_width(0.5, 1.0, 1e-6)
    assert ratio == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("landing", [0.0, 1.0])
def test_turnover_and_deviation_by_simulation(landing):
    # Reflected or reset Brownian motion of the weight; the discrete look lets it leave the band by about 0.58 of a
    # step (Broadie, Glasserman & Kou 1997), so the band is narrowed by that. Tolerance: 5 standard errors over paths
    # plus 1 % for what is left of the step; false alarm below 1e-6.
    pi, sigma, h, n, steps, dt = 0.5, 0.6, 0.05, 4000, 3000, 1e-4
    step = sigma * pi * (1.0 - pi) * np.sqrt(dt)
    width = h - 0.5826 * step
    rng = np.random.default_rng(3)
    x = rng.uniform(-h, h, n) if landing else h * (rng.random(n) - rng.random(n))
    traded, square = np.zeros(n), np.zeros(n)
    for _ in range(steps):
        x = x + step * rng.standard_normal(n)
        deviation = x
        trade = -np.sign(x) * np.maximum(np.abs(x) - width, 0.0) if landing else np.where(np.abs(x) > width, -x, 0.0)
        x = x + trade
        traded += np.abs(trade)
        square += deviation**2
    years = steps * dt
    expected = float(band.turnover(pi, sigma, h)) * (1.0 if landing else 2.0)
    assert abs(np.mean(traded) / years - expected) < 5.0 * np.std(traded) / years / np.sqrt(n) + 0.01 * expected
    expected = h * h / (3.0 if landing else 6.0)
    assert abs(np.mean(square) / steps - expected) < 5.0 * np.std(square) / steps / np.sqrt(n) + 0.01 * expected


def test_trades():
    w = np.array([0.30, 0.46, 0.50, 0.54, 0.70])
    np.testing.assert_allclose(band.trade_to_edge(w, 0.5, 0.05), [0.15, 0.0, 0.0, 0.0, -0.15], atol=1e-15)
    np.testing.assert_allclose(band.trade_to_target(w, 0.5, 0.05), [0.2, 0.0, 0.0, 0.0, -0.2], atol=1e-15)
    np.testing.assert_allclose(band.trade_towards(w, 0.5, 0.05, 0.5), [0.175, 0.0, 0.0, 0.0, -0.175], atol=1e-15)
    np.testing.assert_allclose(band.trade_towards(w, 0.5, 0.05, 1.0), band.trade_to_edge(w, 0.5, 0.05), atol=1e-15)
    np.testing.assert_allclose(band.soft_threshold(np.array([-3.0, 0.5, 2.0]), 1.0), [-2.0, 0.0, 1.0])
    assert jax.grad(band.trade_to_edge, 2)(0.7, 0.5, 0.05) == pytest.approx(1.0)
    assert jax.grad(band.trade_to_edge)(0.7, 0.5, 0.05) == pytest.approx(-1.0)
    assert jax.grad(band.trade_to_edge)(0.52, 0.5, 0.05) == 0.0
    np.testing.assert_array_equal(band.is_due(np.arange(1, 8), 3), [False, False, True, False, False, True, False])


def test_width_gradients():
    for k, x in enumerate((0.3, 2.0, 1e-3, 1e-5)):
        arguments = [0.3, 2.0, 1e-3, 1e-5]

        def f(v, k=k, arguments=arguments):
            return band.half_width_to_target(*[v if j == k else a for j, a in enumerate(arguments)])

        fd = (f(x * 1.0001) - f(x * 0.9999)) / (0.0002 * x)
        assert jax.grad(f)(x) == pytest.approx(float(fd), rel=1e-6)
    assert band.half_width(0.5, 1.0, 0.0) == 0.0 and jax.grad(band.half_width, 2)(0.5, 1.0, 0.0) == 0.0
    assert band.half_width_to_target(0.5, 1.0, 0.0) == 0.0
    assert np.isfinite(jax.grad(band.half_width_to_target, 2)(0.5, 1.0, 0.0))
    small = band.half_width_to_target(np.float32(0.01), np.float32(5.0), np.float32(0.0), np.float32(1e-12))
    assert small == pytest.approx(float(band.fixed_cost_half_width(0.01, 5.0, 1e-12)), rel=1e-5)


# Leverage and repayment


def test_leverage_trade_restores_leverage():
    equity, leverage, r = 100.0, 3.0, -0.07
    exposure = leverage * equity * (1.0 + r)
    after = equity * (1.0 + leverage * r)
    trade = band.leverage_trade(after, exposure, leverage)
    assert trade == pytest.approx(float(band.leverage_drift_trade(equity, leverage, r)))
    for sign in (1.0, -1.0):
        trade = band.leverage_trade(100.0, 300.0 + 40.0 * sign, 3.0, cost=0.002)
        left = 100.0 - 0.002 * abs(float(trade))
        assert (300.0 + 40.0 * sign + float(trade)) / left == pytest.approx(3.0, rel=1e-13)
    # A short: exposure and leverage negative.
    trade = band.leverage_trade(100.0, -150.0, -2.0, cost=0.002)
    assert (-150.0 + float(trade)) / (100.0 - 0.002 * abs(float(trade))) == pytest.approx(-2.0, rel=1e-13)


def test_repayments_reach_the_target_health():
    c, d, lt, h = 1000.0, 800.0, 0.8, 1.5
    sale = float(kill_switch.sale_to_health(c, d, lt, h))
    assert sale == pytest.approx((h * d - lt * c) / (h - lt))
    assert lt * (c - sale) / (d - sale) == pytest.approx(h)
    sale = float(kill_switch.sale_to_health(c, d, lt, h, cost=0.02))
    assert lt * (c - sale) / (d - sale * 0.98) == pytest.approx(h)
    paid = float(kill_switch.repayment_to_health(c, d, lt, h))
    assert lt * c / (d - paid) == pytest.approx(h)
    added = float(kill_switch.top_up_to_health(c, d, lt, h))
    assert lt * (c + added) / d == pytest.approx(h)
    healthy = (c, 100.0, lt, h)
    for action in (kill_switch.sale_to_health, kill_switch.repayment_to_health, kill_switch.top_up_to_health):
        assert action(*healthy) == 0.0
    # Under water: all collateral goes.
    assert kill_switch.sale_to_health(500.0, 800.0, lt, h) == 500.0
    fd = (kill_switch.sale_to_health(c + 0.01, d, lt, h) - kill_switch.sale_to_health(c - 0.01, d, lt, h)) / 0.02
    assert jax.grad(kill_switch.sale_to_health)(c, d, lt, h) == pytest.approx(float(fd), rel=1e-6)
    assert kill_switch.reduction_to_margin_ratio(0.8, 0.6) == pytest.approx(0.25)
    assert kill_switch.reduction_to_margin_ratio(0.5, 0.6) == 0.0


# Kill switch


def run(switch, equity, **signals):
    state, on, decisions = kill_switch.init(equity[0]), [], []
    for t in range(len(equity)):
        state, decision = kill_switch.step(switch, state, equity[t], **{k: v[t] for k, v in signals.items()})
        on.append(np.asarray(state.on))
        decisions.append(decision)
    return np.array(on), decisions


def test_kill_switch_is_the_plain_loop_on_random_paths():
    rng = np.random.default_rng(4)
    equity = 100.0 * np.exp(np.cumsum(0.06 * rng.standard_normal((120, 50)), axis=0))
    switch = kill_switch.thresholds(drawdown=0.15, cooldown=4, recovery=0.1)
    got, _ = run(switch, equity)
    for k in range(50):
        on, peak, low, since = True, equity[0, k], 0.0, 0
        for t in range(120):
            e = equity[t, k]
            if on:
                peak = max(peak, e)
                if e <= peak * (1.0 - 0.15):
                    on, low, since = False, e, 0
            else:
                low, since = min(low, e), since + 1
                if since >= 4 and e >= low * 1.1:
                    on, peak = True, e
            assert got[t, k] == float(on)
    assert 0.2 < got.mean() < 0.95


def test_other_signals_fire_and_hold():
    equity = np.full((6, 1), 100.0)
    health = np.array([[2.0], [1.2], [1.2], [1.4], [1.4], [1.4]])
    switch = kill_switch.thresholds(health_min=1.25, cooldown=1)
    on, decisions = run(switch, equity, health=health)
    np.testing.assert_array_equal(on[:, 0], [1, 0, 0, 1, 1, 1])
    assert decisions[1].by_health[0] == 1.0 and decisions[1].by_drawdown[0] == 0.0 and decisions[3].resumes[0] == 1.0
    ratio = np.array([[0.2], [0.7], [0.1], [0.1], [0.69], [0.8]])
    on, decisions = run(kill_switch.thresholds(margin_ratio_max=0.7, cooldown=2), equity, margin_ratio=ratio)
    np.testing.assert_array_equal(on[:, 0], [1, 0, 0, 1, 1, 0])
    assert decisions[1].by_margin[0] == 1.0
    on, _ = run(kill_switch.thresholds(), 100.0 * np.linspace(1.0, 0.01, 6)[:, None], health=health, margin_ratio=ratio)
    assert np.all(on == 1.0)


def test_reported_drawdown_is_that_of_the_decision():
    _, decisions = run(kill_switch.thresholds(drawdown=0.2), np.array([[100.0], [125.0], [90.0]]))
    assert decisions[2].fires[0] == 1.0 and decisions[2].drawdown[0] == pytest.approx(0.28)


@pytest.mark.parametrize(
    "field, value",
    [("drawdown", 0.0), ("drawdown", 1.5), ("cooldown", -1), ("cooldown", 1.5), ("recovery", -0.1),
     ("recovery", float("nan")), ("health_min", -1.0), ("margin_ratio_max", 0.0)],
)  # fmt: skip
def test_thresholds_are_checked(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}"):
        kill_switch.thresholds(**{field: value})
