"""Contract maths, funding payments, mark prices and liquidation prices of perpetuals and dated futures."""

from math import exp, inf, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qpo_sim.errors import InputError
from qpo_sim.instrument import future, premium
from qpo_sim.instrument.liquidation_price import (
    Leg,
    inverse_band,
    inverse_bankruptcy,
    joint_factor_band,
    linear_band,
    linear_bankruptcy,
    log_distance,
    price_from_mark,
)
from qpo_sim.venue.tiered_margin import (
    PriceBand,
    active_tier,
    bankruptcy_price,
    floors_from_leverage,
    liquidation_price,
    maintenance_margin,
    one_rate,
    tier_schedule,
)

BTC = tier_schedule([[0, 0.004], [3e5, 0.005], [8e5, 0.0065], [3e6, 0.01], [12e6, 0.02], [70e6, 0.025], [1e8, 0.05]])


def test_perp_07_inverse_cross_with_closing_fee(cases):
    case = cases("domain")["perp-07"]
    p, expected = case["inputs"], case["expected"]
    leg = Leg(p["side"] * p["contracts_usd"], p["entry"], one_rate(p["mmr"]))
    bankruptcy = inverse_bankruptcy(leg, margin=p["balance_coin"], taker_fee_rate=p["taker"])
    band = inverse_band([leg], margin=p["balance_coin"], maintenance_on="entry", taker_fee_rate=p["taker"])
    assert bankruptcy == pytest.approx(expected["bankruptcy_price"], abs=case["tolerance"]["abs"])
    assert band.lower == pytest.approx(expected["liq_price"], abs=case["tolerance"]["abs"])
    assert band.upper == inf


def test_perp_09_inverse_with_maintenance_at_the_liquidation_price(cases):
    case = cases("domain")["perp-09"]
    p, expected = case["inputs"], case["expected"]
    for side, key in ((1, "liq_long"), (-1, "liq_short")):
        leg = Leg(side * p["contracts"] * p["multiplier"], p["entry"], one_rate(p["mmr"]))
        band = inverse_band([leg], margin=p["wallet_coin"])
        assert (band.lower if side > 0 else band.upper) == pytest.approx(expected[key], rel=1e-9)


def test_perp_11_premium_funding_and_payment(cases):
    case = cases("domain")["perp-11"]
    p, expected = case["inputs"], case["expected"]
    index = [premium.premium_index(s["impact_bid"], s["impact_ask"], s["index"]) for s in p["samples"]]
    np.testing.assert_allclose(index, expected["premium_index"], rtol=1e-9, atol=1e-12)
    average = premium.weighted_premium(np.array(p["premium_series"]))
    assert float(average) == pytest.approx(expected["weighted_premium"], rel=1e-9)
    rate = premium.funding_rate(average, p["interest"], 5e-4, 3e-3)
    assert float(rate) == pytest.approx(expected["funding"], rel=1e-9)
    paid = premium.linear_payment(p["qty"], p["mark"], rate)
    assert float(paid) == pytest.approx(expected["long_pays_usdt"], rel=1e-9)


def test_bybit_inverse_isolated_is_its_published_form():
    notional, entry, leverage, rate, deduction = 30_000.0, 12_000.0, 20.0, 0.01, 0.0
    value = notional / entry
    initial, maintenance = value / leverage, value * rate - deduction
    for side, expected in (
        (1, notional / (value + (initial - maintenance))),
        (-1, notional / (value - (initial - maintenance))),
    ):
        band = inverse_band([Leg(side * notional, entry, one_rate(rate))], margin=initial, maintenance_on="entry")
        assert (band.lower if side > 0 else band.upper) == pytest.approx(expected, rel=1e-12)


def test_inverse_deduction_enters_as_published():
    schedule = tier_schedule([[0.0, 0.004], [5.0, 0.01]])
    notional, entry, margin = 600_000.0, 50_000.0, 1.5
    for side in (1.0, -1.0):
        band = inverse_band([Leg(side * notional, entry, schedule)], margin=margin)
        expected = notional * (0.01 + side) / (margin + schedule.deduction[1] + side * notional / entry)
        assert (band.lower if side > 0 else band.upper) == pytest.approx(expected, rel=1e-12)
        assert notional / expected > 5.0


SIDES = st.sampled_from([-1.0, 1.0])
SIZES = st.floats(0.01, 3000.0)
MARGINS = st.floats(0.03, 0.9)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIZES, MARGINS, st.sampled_from([0.0, 0.0005, 0.01]), st.sampled_from([0.0, 0.00075]))
def test_linear_liquidation_is_where_equity_is_maintenance(side, size, share, fee, taker):
    quantity, entry = side * size, 1e5
    margin = share * size * entry
    leg = Leg(quantity, entry, BTC)
    closing = taker * size * linear_bankruptcy(leg, margin=margin, taker_fee_rate=taker) if taker else 0.0
    required = lambda p: float(maintenance_margin(BTC, quantity * p)) + fee * size * p + closing  # noqa: E731
    assume(margin > required(entry))
    band = linear_band([leg], margin=margin, liquidation_fee_rate=fee, taker_fee_rate=taker)
    price = band.lower if side > 0 else band.upper
    assert 0.0 < price < inf and (band.upper == inf if side > 0 else band.lower == 0.0)
    assert (price < entry) == (side > 0)
    equity = margin + float(future.linear_profit(quantity, entry, price))
    assert equity == pytest.approx(required(price), rel=1e-9, abs=1e-9 * size * entry)
    same = liquidation_price(
        BTC, quantity=quantity, entry=entry, margin=margin, other_maintenance=closing, liquidation_fee_rate=fee
    )
    assert same == pytest.approx(price, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIZES, MARGINS, st.sampled_from(["liquidation", "entry"]), st.sampled_from([0.0, 0.00075]))
def test_inverse_liquidation_is_where_equity_is_maintenance(side, coins, share, maintenance_on, taker):
    schedule, entry = tier_schedule([[0.0, 0.004], [5.0, 0.005], [20.0, 0.01], [250.0, 0.02]]), 5e4
    notional, margin = side * coins * entry, share * coins
    leg = Leg(notional, entry, schedule)
    closing = taker * coins * entry / inverse_bankruptcy(leg, margin=margin, taker_fee_rate=taker) if taker else 0.0

    def required(price):
        value = notional / (price if maintenance_on == "liquidation" else entry)
        return float(maintenance_margin(schedule, value)) + closing

    assume(margin > required(entry))
    band = inverse_band([leg], margin=margin, maintenance_on=maintenance_on, taker_fee_rate=taker)
    price = band.lower if side > 0 else band.upper
    assert 0.0 < price < inf and (price < entry) == (side > 0)
    equity = margin + float(future.inverse_profit(notional, entry, price))
    assert equity == pytest.approx(required(price), rel=1e-9, abs=1e-9 * coins)
    if taker == 0.0:
        bankrupt = inverse_bankruptcy(leg, margin=margin)
        assert margin + float(future.inverse_profit(notional, entry, bankrupt)) == pytest.approx(0.0, abs=1e-9 * coins)
        assert (bankrupt < price) == (side > 0)


@given(st.floats(1.0, 5.0), st.sampled_from(["liquidation", "entry"]))
@settings(max_examples=30, deadline=None)
def test_inverse_short_with_its_value_as_margin_is_never_liquidated(share, maintenance_on):
    leg = Leg(-1e5, 5e4, one_rate(0.004))
    margin = share * 2.0
    if maintenance_on == "liquidation":
        assert inverse_band([leg], margin=margin) == PriceBand(0.0, inf)
    assert inverse_bankruptcy(leg, margin=margin) == inf
    # Its value in USD does not move at all at one times its margin.
    value = future.inverse_equity(2.0, -1e5, 5e4, jnp.array([1e3, 5e4, 1e6]), coin_price=jnp.array([1e3, 5e4, 1e6]))
    np.testing.assert_allclose(value, 1e5, rtol=1e-12)


def test_other_positions_move_the_price_as_published():
    """Binance's formula with other positions, in its own symbols."""
    wallet, other_mm, other_profit, quantity, entry = 50_000.0, 1_200.0, -3_000.0, -2.0, 1e5
    band = linear_band(
        [Leg(quantity, entry, BTC)], margin=wallet, other_maintenance=other_mm, other_profit=other_profit
    )
    side, size, rate, deduction = -1.0, 2.0, 0.004, 0.0
    expected = (wallet - other_mm + other_profit + deduction - side * size * entry) / (size * rate - side * size)
    assert band.upper == pytest.approx(expected, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, st.floats(0.8, 1.2), MARGINS)
def test_hedge_mode_has_the_ends_of_both_legs_together(long, short, entry, share):
    legs = [Leg(long, entry * 1e5, BTC), Leg(-short, 1e5, BTC)]
    margin = share * (long + short) * 1e5

    def excess(price):
        profit = sum(float(future.linear_profit(leg.size, leg.entry, price)) for leg in legs)
        return margin + profit - sum(float(maintenance_margin(BTC, leg.size * price)) for leg in legs)

    band = linear_band(legs, margin=margin)
    for end in band:
        if 0.0 < end < inf:
            assert excess(end) == pytest.approx(0.0, abs=1e-9 * (long + short) * max(end, 1e5))
    if band.lower < band.upper:
        low, high = band.lower, min(band.upper, 1e3 * max(band.lower, 1e5))
        assert excess(0.5 * (low + high)) >= -1e-6 * (long + short)
        if band.lower > 0.0:
            assert excess(0.9 * band.lower) < 0.0
        if band.upper < inf:
            assert excess(1.1 * band.upper) < 0.0
    else:
        assert max(excess(p) for p in np.geomspace(1e2, 1e8, 200)) < 0.0


@settings(max_examples=50, deadline=None)
@given(SIZES, st.floats(0.0, 1.0), st.floats(0.5, 2.0))
def test_equal_legs_are_liquidated_by_nothing_but_their_own_maintenance(size, share, entry):
    margin = (0.1 + share + max(entry - 1.0, 0.0)) * size * 1e5
    free = [Leg(size, entry * 1e5, one_rate(0.0)), Leg(-size, 1e5, one_rate(0.0))]
    assert linear_band(free, margin=margin) == PriceBand(0.0, inf)
    # With maintenance on both legs no fall hurts; a rise does once the requirement has grown to the equity.
    band = linear_band([leg._replace(schedule=one_rate(0.004)) for leg in free], margin=margin)
    assert band.lower == 0.0
    assert band.upper == pytest.approx((margin - size * (entry - 1.0) * 1e5) / (2.0 * 0.004 * size), rel=1e-9)


def test_an_account_that_no_price_saves():
    leg = Leg(-1.0, 100.0, one_rate(0.01))
    assert linear_band([leg], margin=-200.0) == PriceBand(inf, 0.0)
    assert liquidation_price(one_rate(0.01), quantity=-1.0, entry=100.0, margin=-200.0) is None
    assert inverse_band([Leg(100.0, 100.0, one_rate(0.01))], margin=-2.0) == PriceBand(inf, 0.0)
    assert linear_band([Leg(1.0, 100.0, one_rate(0.01))], margin=150.0) == PriceBand(0.0, inf)


def test_a_fee_at_the_bankruptcy_price_needs_one_leg():
    legs = [Leg(1.0, 100.0, BTC), Leg(-1.0, 100.0, BTC)]
    for band in (linear_band, inverse_band):
        with pytest.raises(InputError, match="2 legs"):
            band(legs, margin=1.0, taker_fee_rate=0.001)
    with pytest.raises(InputError, match="maintenance_on is 'mark'"):
        inverse_band(legs, margin=1.0, maintenance_on="mark")


@settings(max_examples=100, deadline=None)
@given(SIDES, SIZES, MARGINS, st.floats(0.95, 1.05))
def test_the_form_from_the_current_price_has_the_same_root(side, size, share, move):
    rate, deduction = 0.0125, 0.0
    schedule = tier_schedule(floors_from_leverage([[0, 40], [150e6, 20]]))
    entry = 1e4
    margin, price = share * size * entry, move * entry
    available = margin + side * size * (price - entry) - (rate * size * price - deduction)
    seen = price_from_mark(price, side=side, size=size, margin_available=available, rate=rate)
    band = linear_band([Leg(side * size, entry, schedule)], margin=margin)
    expected = band.lower if side > 0 else band.upper
    assume(size * max(expected, price) < 150e6)
    assert seen == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("leverage", [1.5, 5.0, 20.0])
def test_log_distance_is_that_to_the_liquidation_price(side, leverage):
    rate = 0.005
    band = linear_band([Leg(side * 1.0, 1.0, one_rate(rate))], margin=1.0 / leverage)
    price = band.lower if side > 0 else band.upper
    assert log_distance(leverage, rate, side) == pytest.approx(abs(log(price)), rel=1e-12)
    assert log_distance(1.0, rate, 1) == inf


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(SIDES, st.floats(0.1, 50.0), st.floats(0.8, 1.25)), min_size=1, max_size=4), MARGINS)
def test_joint_factor_is_where_equity_is_maintenance(positions, share):
    prices = [1e5, 4e3, 150.0, 0.5]
    legs = [Leg(s * 1e5 * n / p, e * p, BTC) for (s, n, e), p in zip(positions, prices, strict=False)]
    prices = prices[: len(legs)]
    margin = share * sum(abs(leg.size) * p for leg, p in zip(legs, prices, strict=True))

    def excess(factor):
        profit = sum(leg.size * (factor * p - leg.entry) for leg, p in zip(legs, prices, strict=True))
        required = sum(
            float(maintenance_margin(BTC, leg.size * factor * p)) for leg, p in zip(legs, prices, strict=True)
        )
        return margin + profit - required

    band = joint_factor_band(legs, prices, margin=margin)
    scale = sum(abs(leg.size) * p for leg, p in zip(legs, prices, strict=True))
    for end in band:
        if 0.0 < end < inf:
            assert excess(end) == pytest.approx(0.0, abs=1e-9 * scale * max(end, 1.0))
    if excess(1.0) > 1e-9 * scale:
        assert band.lower < 1.0 < band.upper


def test_bankruptcy_prices():
    assert linear_bankruptcy(Leg(10.0, 1e5, BTC), margin=5e4) == 95_000.0
    assert bankruptcy_price(quantity=10.0, entry=1e5, margin=5e4) == 95_000.0
    for leg in (Leg(10.0, 1e5, BTC), Leg(-10.0, 1e5, BTC)):
        price = linear_bankruptcy(leg, margin=5e4, taker_fee_rate=0.00075)
        assert 5e4 + leg.size * (price - 1e5) - 0.00075 * 10.0 * price == pytest.approx(0.0, abs=1e-6)
        assert price == bankruptcy_price(quantity=leg.size, entry=1e5, margin=5e4, taker_fee_rate=0.00075)
    assert linear_bankruptcy(Leg(1.0, 100.0, BTC), margin=150.0) == 0.0


PRICES = jnp.array([800.0, 1000.0, 1300.0])


@pytest.mark.parametrize(
    ("profit", "delta"),
    [
        (lambda p: future.linear_profit(-3.0, 900.0, p), lambda p: -3.0 + 0.0 * p),
        (lambda p: future.inverse_profit(5e4, 900.0, p), lambda p: future.inverse_delta(5e4, p)),
        (
            lambda p: future.quanto_profit(4.0, 900.0, p, multiplier=1e-6) * 3e4,
            lambda p: future.quanto_delta(4.0, 900.0, p, 3e4 + 0.0 * p, multiplier=1e-6).underlying + 0.0 * p,
        ),
        (
            lambda p: future.linear_profit(2.0, 900.0, future.forward_price(p, 0.1, 0.25)),
            lambda p: future.dated_delta(2.0, 0.1, 0.25) + 0.0 * p,
        ),
    ],
    ids=["linear", "inverse", "quanto", "dated"],
)
def test_delta_is_the_slope_of_the_profit(profit, delta):
    h = 1e-3
    slope = (profit(PRICES + h) - profit(PRICES - h)) / (2.0 * h)
    np.testing.assert_allclose(delta(PRICES), slope, rtol=1e-7)
    np.testing.assert_allclose(delta(PRICES), jax.vmap(jax.grad(profit))(PRICES), rtol=1e-12)


def test_unit_values_add_up_to_wallet_and_profit():
    """Balance with the entries plus quantity times unit value is the equity, for every contract."""
    wallet, price, coin = 2.5, PRICES, jnp.array([2e4, 3e4, 5e4])
    linear = (wallet - -3.0 * 900.0) + -3.0 * future.linear_unit_value(price)
    np.testing.assert_allclose(linear, wallet + future.linear_profit(-3.0, 900.0, price), rtol=1e-12)
    inverse = (wallet + 5e4 / 900.0) * price + 5e4 * future.inverse_unit_value(price, price)
    np.testing.assert_allclose(inverse, future.inverse_equity(wallet, 5e4, 900.0, price, coin_price=price), rtol=1e-12)
    np.testing.assert_allclose(future.inverse_unit_value(price, price), -1.0)
    # An inverse future whose price is not the coin's.
    forward = future.forward_price(price, 0.1, 0.25)
    dated = (wallet + 5e4 / 900.0) * price + 5e4 * future.inverse_unit_value(forward, price)
    np.testing.assert_allclose(dated, future.inverse_equity(wallet, 5e4, 900.0, forward, coin_price=price), rtol=1e-12)
    quanto = (wallet - 1e-6 * 4.0 * 900.0) * coin + 4.0 * future.quanto_unit_value(price, coin, multiplier=1e-6)
    expected = (wallet + future.quanto_profit(4.0, 900.0, price, multiplier=1e-6)) * coin
    np.testing.assert_allclose(quanto, expected, rtol=1e-12)


def test_quanto_delta_to_the_settlement_coin_is_its_profit():
    delta = future.quanto_delta(4.0, 900.0, 1000.0, 3e4, multiplier=1e-6)
    slope = jax.grad(lambda s: future.quanto_profit(4.0, 900.0, 1000.0, multiplier=1e-6) * s)(3e4)
    assert float(delta.settlement) == pytest.approx(float(slope), rel=1e-12)
    assert float(future.quanto_notional(-4.0, 1000.0, multiplier=1e-6)) == pytest.approx(0.004)


def test_notionals_and_entries():
    assert float(future.linear_notional(-3.0, 1000.0)) == 3000.0
    assert float(future.inverse_notional(-5e4, 1000.0)) == 50.0
    entry = future.average_entry(2.0, 100.0, 1.0, 130.0)
    assert entry == pytest.approx(110.0)
    both = future.linear_profit(2.0, 100.0, 150.0) + future.linear_profit(1.0, 130.0, 150.0)
    assert future.linear_profit(3.0, entry, 150.0) == pytest.approx(both)
    entry = future.inverse_average_entry(2e4, 100.0, 1e4, 130.0)
    both = future.inverse_profit(2e4, 100.0, 150.0) + future.inverse_profit(1e4, 130.0, 150.0)
    assert future.inverse_profit(3e4, entry, 150.0) == pytest.approx(both)


def test_forward_and_carry():
    forward = future.forward_price(100.0, 0.1, 0.5)
    assert float(forward) == pytest.approx(100.0 * exp(0.05))
    assert float(future.implied_carry(100.0, forward, 0.5)) == pytest.approx(0.1)
    assert float(future.forward_price(100.0, 0.1, -1.0)) == 100.0


def test_funding_conventions():
    assert premium.annual_rate(1e-4) == pytest.approx(0.1095)
    assert premium.funding_cap(0.004) == pytest.approx(0.003)
    assert premium.funding_clamp(0.02, 0.012) == pytest.approx(0.048)
    assert premium.impact_notional(200.0, 1.0 / 150.0) == pytest.approx(30_000.0)
    # Hyperliquid pays an eighth every hour, at most 4 %.
    assert float(premium.interval_rate(8e-4, interval_hours=1.0, cap=0.04)) == pytest.approx(1e-4)
    assert float(premium.interval_rate(-0.5, interval_hours=1.0, cap=0.04)) == -0.04
    # Deribit's dead band is the clamp without interest.
    np.testing.assert_allclose(
        premium.funding_rate(jnp.array([1e-4, 4e-4, -4e-4, 0.02]), 0.0, 2.5e-4, 5e-3), [0.0, 1.5e-4, -1.5e-4, 5e-3],
        rtol=1e-9, atol=1e-18,
    )  # fmt: skip
    # The rate is pinned while the premium is in [-0.04 %, 0.06 %].
    np.testing.assert_allclose(premium.funding_rate(jnp.array([-4e-4, 0.0, 6e-4]), 1e-4, 5e-4, 3e-3), 1e-4, rtol=1e-9)
    assert premium.inverse_payment(-6e4, 6e4, 1e-4) == pytest.approx(-1e-4)
    # Both pay the same money for the same value.
    assert premium.inverse_payment(1.2e5, 6e4, 1e-4) * 6e4 == pytest.approx(premium.linear_payment(2.0, 6e4, 1e-4))


@given(st.tuples(*[st.floats(-1e6, 1e6, allow_subnormal=False)] * 3))
@settings(max_examples=60, deadline=None)
def test_median_of_three(values):
    assert float(premium.median(*values)) == float(np.median(values))


def test_mark_prices():
    binance = premium.median_mark_price(1e4, rate=1e-3, time_share=0.5, average_basis=-20.0, last=1.1e4)
    assert float(binance) == pytest.approx(1e4 * (1.0 + 5e-4))
    hyperliquid = premium.hyperliquid_mark_price(
        1e4, average_basis=10.0, best_bid=9_990.0, best_ask=9_995.0, last=9_900.0, elsewhere=1.2e4
    )
    assert float(hyperliquid) == 10_010.0
    assert float(premium.deribit_mark_price(1e4, average_basis=200.0, band=0.01)) == 10_100.0
    assert float(premium.deribit_mark_price(1e4, average_basis=-50.0)) == 9_950.0
    assert premium.basis_mark_price(1e4, 0.001) == pytest.approx(10_010.0)
    # An average takes the same time in two steps as in one, and forgets where it was.
    once = premium.ema(1.0, 0.0, seconds=60.0, time_constant=30.0)
    twice = premium.ema(premium.ema(1.0, 0.0, seconds=20.0, time_constant=30.0), 0.0, seconds=40.0, time_constant=30.0)
    assert float(once) == pytest.approx(float(twice)) == pytest.approx(exp(-2.0))
    assert premium.trigger_price("last", index=1.0, mark=2.0, last=3.0) == 3.0
    with pytest.raises(InputError, match="liquidate_on is 'oracle'"):
        premium.trigger_price("oracle", index=1.0, mark=2.0, last=3.0)


def test_single_precision_agrees():
    rng = np.random.default_rng(5)
    price = rng.uniform(0.5, 2.0, 1000)
    single = price.astype(np.float32)
    for f in (
        lambda p: future.inverse_profit(p.dtype.type(0.7), p.dtype.type(1.1), p),
        lambda p: future.inverse_equity(p.dtype.type(0.9), p.dtype.type(0.7), p.dtype.type(1.1), p, coin_price=p),
        lambda p: premium.inverse_payment(p.dtype.type(0.7), p, p.dtype.type(1e-4)),
    ):
        got = f(jnp.asarray(single))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, f(jnp.asarray(single.astype(np.float64))), rtol=2e-5, atol=1e-6)


def test_active_tier_agrees_with_the_liquidation_price():
    price = linear_band([Leg(10.0, 1e5, BTC)], margin=5e4).lower
    rate, deduction = active_tier(BTC, 10.0 * price)
    assert (float(rate), float(deduction)) == pytest.approx((0.0065, 1500.0))
