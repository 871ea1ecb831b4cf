"""Margin tables of perpetual venues in every convention, and the fields of their liquidation processes."""

from datetime import date
from math import inf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qpo_sim import venue
from qpo_sim.errors import InputError
from qpo_sim.instrument.liquidation_price import Leg, inverse_band, linear_band
from qpo_sim.venue import size_margin
from qpo_sim.venue.size_margin import SizeMargin, SizeRate
from qpo_sim.venue.tiered_margin import (
    LiquidationProcess,
    TieredMargin,
    TierSchedule,
    active_tier,
    bankruptcy_price,
    continued_tiers,
    floors_from_leverage,
    floors_from_upper_limits,
    liquidation_price,
    maintenance_margin,
    open_interest_rate,
    tier_schedule,
)

VENUES = ("binance", "bybit", "okx", "hyperliquid", "dydx", "deribit_perpetual", "bitmex")
MARGINAL = ("binance", "bybit", "hyperliquid", "dydx")


def test_perp_01_deductions_from_lower_bounds(cases):
    case = cases("domain")["perp-01"]
    rows = [[b["floor"], b["mmr"], b["max_leverage"]] for b in case["inputs"]["brackets"]]
    schedule = TieredMargin(tiers={"BTC": rows}).schedule("BTC")
    np.testing.assert_allclose(schedule.deduction, case["expected"]["cum"], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", ["perp-03", "perp-05"])
def test_isolated_linear_liquidation(cases, name):
    case = cases("domain")[name]
    p, expected = case["inputs"], case["expected"]
    rule = TieredMargin(tiers={"BTC": [[b["floor"], b["mmr"], b["max_leverage"]] for b in p["brackets"]]})
    schedule = rule.position_schedule("BTC", p["qty"])
    band = linear_band([Leg(p["side"] * p["qty"], p["entry"], schedule)], margin=p["margin"])
    price = band.lower if p["side"] > 0 else band.upper
    assert price == pytest.approx(expected["liq_price"], rel=1e-9)
    assert int(np.sum(p["qty"] * price > schedule.floor)) == expected["tier"]
    if "bankruptcy_price" in expected:
        found = bankruptcy_price(quantity=p["side"] * p["qty"], entry=p["entry"], margin=p["margin"])
        assert found == pytest.approx(expected["bankruptcy_price"], rel=1e-9)
        mm = float(maintenance_margin(schedule, p["qty"] * price))
        assert mm == pytest.approx(expected["maintenance_at_liq"], rel=1e-9)


def test_perp_13_tiers_by_leverage(cases):
    case = cases("domain")["perp-13"]
    tiers = [[t["lower"], t["max_leverage"]] for t in case["inputs"]["tiers"]]
    for rule in (TieredMargin(tiers={"BTC": tiers}, convention="leverage"), venue.load("hyperliquid")):
        schedule = rule.schedule("BTC")
        np.testing.assert_allclose(schedule.rate, case["expected"]["mmr"], rtol=1e-9)
        np.testing.assert_allclose(schedule.deduction, case["expected"]["deduction"], rtol=1e-9)
        assert float(maintenance_margin(schedule, case["inputs"]["notional"])) == pytest.approx(
            case["expected"]["maintenance"], rel=1e-9
        )


def test_perp_18_tiers_by_upper_limits(cases):
    case = cases("domain")["perp-18"]
    tiers = [[t["upper"], t["mmr"], t["max_leverage"]] for t in case["inputs"]["tiers"]]
    for rule in (TieredMargin(tiers={"BTC": tiers}, convention="upper"), venue.load("bybit")):
        schedule = rule.schedule("BTC")
        np.testing.assert_allclose(schedule.deduction, case["expected"]["deduction"], rtol=1e-9, atol=1e-6)
        found = maintenance_margin(schedule, np.array(case["inputs"]["notional"]))
        np.testing.assert_allclose(found, case["expected"]["maintenance"], rtol=1e-9)


@pytest.mark.parametrize("name", VENUES)
def test_shipped_venues_are_dated_and_sourced(name):
    rule = venue.load(name)
    assert rule.source and str(rule.as_of)
    assert int(str(rule.as_of)[:4]) <= date.today().year
    assert isinstance(rule.process, LiquidationProcess)


@pytest.mark.parametrize("name", MARGINAL)
def test_maintenance_is_continuous_and_increases_at_every_edge(name):
    rule = venue.load(name)
    for asset, schedule in rule.schedules.items():
        for floor in schedule.floor[1:]:
            below, above = (float(maintenance_margin(schedule, floor * (1.0 + e))) for e in (-1e-12, 1e-12))
            assert above == pytest.approx(below, rel=1e-9), asset
        notional = np.geomspace(1.0, 3e9, 400)
        margin = maintenance_margin(schedule, notional)
        assert np.all(np.diff(margin) > 0.0) and np.all(np.diff(margin) < np.diff(notional))
        initial = [rule.initial_margin(asset, v) for v in (1e3, 1e6, 1e8)]
        assert all(
            m > mm for m, mm in zip(initial, maintenance_margin(schedule, np.array([1e3, 1e6, 1e8])), strict=True)
        )


@pytest.mark.parametrize(("name", "asset"), [("okx", "BTC"), ("okx", "AAVE"), ("okx", "ADA"), ("bitmex", "BTC")])
def test_rates_by_size_rise_and_hold_for_the_whole_position(name, asset):
    rule = venue.load(name)
    schedule = rule.size_schedule(asset)
    assert np.all(schedule.deduction == 0.0)
    assert np.all(np.diff(schedule.rate) > 0.0)
    # Initial margin exceeds maintenance in every tier and reaches the whole value.
    initial = np.array([1.0 / row[2] for row in rule.rows[asset]])
    assert np.all(initial > schedule.rate) and initial[-1] > 0.99
    size = 1.5 * float(schedule.floor[1])
    fee = rule.liquidation_fee_rate if rule.fee_in_maintenance else 0.0
    one = rule.position_schedule(asset, -size)
    assert float(maintenance_margin(one, 1e6)) == pytest.approx((float(schedule.rate[1]) + fee) * 1e6, rel=1e-12)


def test_published_okx_tiers_and_the_rule_beyond_them():
    rule = venue.load("okx")
    schedule = rule.size_schedule("AAVE")
    for contracts, rate, initial in ((1_000, 0.0065, 0.02), (3_000, 0.01, 0.025), (8_000, 0.015, 0.05)):
        size = contracts * 0.1
        assert float(active_tier(schedule, size)[0]) == pytest.approx(rate)
        assert rule.max_leverage("AAVE", size * 0.999) == pytest.approx(1.0 / initial)
    # Each further 8 000 contracts half a point.
    for extra in (1, 2, 10):
        assert float(active_tier(schedule, 800.0 * extra + 1.0)[0]) == pytest.approx(0.015 + 0.005 * extra)


def test_published_bitmex_steps():
    """0.5 % below 200 XBT, then half a point per 150 XBT."""
    schedule = venue.load("bitmex").size_schedule("BTC")
    for size, rate in ((180.0, 0.005), (230.0, 0.01), (499.0, 0.015), (640.0, 0.02)):
        assert float(active_tier(schedule, size)[0]) == pytest.approx(rate)


def test_liquidation_ratio_of_okx_is_one_at_the_price():
    """Equity over maintenance margin and fee is 1 at the liquidation price."""
    rule = venue.load("okx")
    size, entry, margin = 500.0, 80.0, 4_000.0
    price = linear_band([Leg(size, entry, rule.position_schedule("AAVE", size))], margin=margin).lower
    equity, value = margin + size * (price - entry), size * price
    assert equity / (value * 0.015 + value * rule.liquidation_fee_rate) == pytest.approx(1.0, rel=1e-9)


def test_dydx_tiers_and_open_interest():
    rule = venue.load("dydx")
    assert float(rule.schedule("BTC").rate[0]) == pytest.approx(0.012)
    assert rule.max_leverage("BTC", 1e7, open_interest=1e9) == pytest.approx(50.0)
    assert rule.max_leverage("SOL", 1e6, open_interest=30e6) == pytest.approx(20.0)
    assert rule.max_leverage("SOL", 1e6, open_interest=70e6) == pytest.approx(1.0 / 0.525)
    assert rule.max_leverage("SOL", 1e6, open_interest=200e6) == pytest.approx(1.0)
    # Maintenance stays a fraction of the base.
    assert float(rule.schedule("SOL").rate[0]) == pytest.approx(0.03)
    rate = open_interest_rate(0.05, np.array([0.0, 0.5e6, 0.75e6, 1e6, 9e6]), 0.5e6, 1e6)
    np.testing.assert_allclose(rate, [0.05, 0.05, 0.525, 1.0, 1.0])


def test_published_deribit_margins():
    """Linear perpetual, BTC at 100 000 USDC and SOL at 200 USDC: the examples of the margin page."""
    rule = venue.load("deribit_perpetual")
    for asset, size, price, initial, maintenance in (
        ("BTC", 25.0, 1e5, 53_125.0, 28_125.0),
        ("BTC", 350.0, 1e5, 1_312_500.0, 962_500.0),
        ("SOL", 25.0, 200.0, 200.625, 100.625),
        ("SOL", 6_000.0, 200.0, 84_000.0, 60_000.0),
    ):
        assert float(size_margin.margin(rule.initial_rate(asset), -size, price)) == pytest.approx(initial, rel=1e-12)
        assert float(size_margin.margin(rule.maintenance_rate(asset), size, price)) == pytest.approx(maintenance)
    assert rule.max_leverage("BTC", 0.0) == pytest.approx(50.0)
    assert (rule.fee_rate("BTC"), rule.fee_rate("SOL")) == (0.0075, 0.009)


RATES = st.tuples(st.floats(0.005, 0.05), st.floats(0.0, 2e-4)).map(lambda pair: SizeRate(*pair))
SIDES = st.sampled_from([-1.0, 1.0])


@settings(max_examples=100, deadline=None)
@given(RATES, SIDES, st.floats(0.1, 1000.0), st.floats(0.02, 0.9))
def test_size_margin_liquidation_price(rate, side, size, share):
    quantity, entry = side * size, 1e5
    margin = share * size * entry
    assume(margin > float(size_margin.margin(rate, size, entry)))
    price = size_margin.liquidation_price(rate, quantity=quantity, entry=entry, margin=margin)
    assert price is not None and (price < entry) == (side > 0)
    equity = margin + quantity * (price - entry)
    assert equity == pytest.approx(float(size_margin.margin(rate, size, price)), rel=1e-9, abs=1e-9 * size * entry)


@settings(max_examples=100, deadline=None)
@given(RATES, SIDES, st.floats(0.1, 1000.0), st.floats(0.02, 0.9))
def test_size_margin_inverse_liquidation_price(rate, side, coins, share):
    entry = 5e4
    notional, margin = side * coins * entry, share * coins
    assume(margin > float(size_margin.margin(rate, coins, 1.0)))
    price = size_margin.inverse_liquidation_price(rate, notional=notional, entry=entry, margin=margin)
    assert price is not None and (price < entry) == (side > 0)
    value = abs(notional) / price
    equity = margin + notional * (1.0 / entry - 1.0 / price)
    assert equity == pytest.approx(float(size_margin.margin(rate, value, 1.0)), rel=1e-9, abs=1e-9 * coins)
    flat = size_margin.inverse_liquidation_price(
        SizeRate(rate.base, 0.0), notional=notional, entry=entry, margin=margin
    )
    band = inverse_band([Leg(notional, entry, tier_schedule([[0.0, rate.base]]))], margin=margin)
    assert flat == pytest.approx(band.lower if side > 0 else band.upper, rel=1e-12)


def test_size_margin_without_liquidation_price():
    rate = SizeRate(0.01, 5e-5)
    assert size_margin.inverse_liquidation_price(rate, notional=-1e5, entry=5e4, margin=2.0) is None
    assert size_margin.liquidation_price(rate, quantity=1.0, entry=100.0, margin=150.0) is None


def test_size_margin_gradient_and_arrays():
    rate = SizeRate(0.01, 5e-5)
    size = jnp.array([-3.0, 1.0, 200.0])
    slope = jax.vmap(jax.grad(lambda q: size_margin.margin(rate, q, 1e5)))(size)
    np.testing.assert_allclose(slope, np.sign(size) * (0.01 + 1e-4 * np.abs(size)) * 1e5, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(convention="lower"), "convention is 'lower'"),
        (dict(tiers={"A": [[0.0, "1 %", 20.0]]}), "rows of numbers"),
        (dict(tiers={"A": 0.01}), "rows of numbers"),
        (dict(tiers={"A": [[0.0, 0.01, 150.0]]}), "from 1 to 100"),
        (dict(tiers={"A": [[0.0, 0.01, 0.5]]}), "from 1 to 100"),
        (dict(tiers={"A": [[0.0, 0.01, 20.0], [5.0, 0.02, 25.0]]}), "must not increase"),
        (dict(taker_fee_rate=0.5), "taker_fee_rate"),
        (dict(convention="upper", tiers={"A": [[10.0, 0.01, 20.0, 0.0], [20.0, 0.02, 10.0, 5.0]]}), "mistyped"),
        (dict(convention="upper", tiers={"A": [[10.0, 0.01]]}), "upper limit"),
        (dict(convention="leverage", tiers={"A": [[0.0, 0.5]]}), "at least 1"),
        (dict(convention="leverage", tiers={"A": [[0.0, 20.0], [5.0, 20.0]]}), "must exceed"),
        (dict(convention="size", tiers={"A": [[0.0, 0.02, 0.01]]}), "above the maintenance rate"),
        (dict(convention="size", tiers={"A": [[0.0, 0.01, 0.02]]}, tier_step=0.005), "two rows"),
        (dict(convention="size", tiers={"A": [[0.0, 0.01, 0.02], [1.0, 0.02, 0.03]]}, tier_step=-1.0), "tier_step"),
        (dict(convention="fraction", tiers={"A": [[0.02, 1.2]]}), "maintenance fraction"),
        (dict(convention="fraction", tiers={"A": [[0.02, 0.6, 5.0]]}), "one row"),
        (dict(convention="fraction", tiers={"A": [[0.02, 0.6, 5.0, 5.0]]}), "open interest caps"),
        (dict(liquidation={"proces": "full"}), "did you mean 'process'"),
        (dict(liquidation={"process": "slow"}), "venue mine: liquidation.process is 'slow'"),
        (dict(liquidation={"process": "partial", "partial": "some"}), "liquidation.partial"),
        (dict(liquidation={"share": 0.0}), "liquidation.share"),
        (dict(liquidation={"target": 0.9}), "liquidated again"),
        (dict(liquidation={"backstop": float("nan")}), "liquidation.backstop"),
        (dict(liquidation={"insurance_fund_usd": -1.0}), "liquidation.insurance_fund_usd"),
        (dict(liquidation={"tiers_down": 0}), "liquidation.tiers_down"),
        (dict(liquidation={"liquidate_on": "oracle"}), "liquidation.liquidate_on"),
    ],
)
def test_broken_tables_and_processes_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        TieredMargin(**{"tiers": {"A": [[0.0, 0.01, 20.0]]}, "name": "mine", **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(maintenance={"BTC": [0.0, 1e-5]}), "maintenance.BTC"),
        (dict(maintenance={"ETH": [0.01, 1e-5]}), "same assets"),
        (dict(maintenance={"BTC": [0.03, 1e-5]}), "exceed the maintenance rate"),
        (dict(liquidation_fee_rate={"BTC": 1.0}), "liquidation_fee_rate"),
        (dict(liquidation_slippage=-0.1), "liquidation_slippage"),
        (dict(funding_interval_hours=0.0), "funding_interval_hours"),
        (dict(liquidation={"process": "slow"}), "venue mine: liquidation.process"),
    ],
)
def test_broken_size_margins_are_refused(change, words):
    values = {"maintenance": {"BTC": [0.01, 1e-5]}, "initial": {"BTC": [0.02, 1e-5]}, "name": "mine"}
    SizeMargin(**values)
    with pytest.raises(InputError, match=words):
        SizeMargin(**{**values, **change})


def test_unlisted_assets_are_named():
    with pytest.raises(InputError, match="no margin for XRP"):
        venue.load("deribit_perpetual").maintenance_rate("XRP")
    with pytest.raises(InputError, match="no tier table for XRP"):
        venue.load("okx").size_schedule("XRP")
    with pytest.raises(InputError, match="tiers by size"):
        venue.load("okx").schedule("BTC")
    with pytest.raises(InputError, match="by notional"):
        venue.load("binance").size_schedule("BTC")
    with pytest.raises(InputError, match="no maximum leverage"):
        TieredMargin(tiers={"A": [[0.0, 0.01]]}).initial_margin("A", 100.0)


def test_tables_are_converted_as_published():
    assert floors_from_upper_limits([[10.0, 0.01, 20.0, 0.0], [30.0, 0.02, 10.0, 0.1]]) == [
        [0.0, 0.01, 20.0],
        [10.0, 0.02, 10.0],
    ]
    assert floors_from_leverage([[0, 40], [5, 3]]) == [[0.0, 0.0125, 40.0], [5.0, 1.0 / 6.0, 3.0]]
    table = continued_tiers([[0.0, 0.01, 0.02], [10.0, 0.3, 0.5]], step=0.25, width=10.0)
    np.testing.assert_allclose(table, [[0, 0.01, 0.02], [10, 0.3, 0.5], [20, 0.55, 0.75], [30, 0.8, 1.0]])


def test_a_rule_without_process_closes_whole_and_has_a_fund_without_end():
    process = TieredMargin(tiers={"A": [[0.0, 0.01, 20.0]]}).process
    assert process == LiquidationProcess()
    assert (process.process, process.backstop, process.insurance_fund_usd) == ("full", 0.0, inf)
    assert venue.load("hyperliquid").process == LiquidationProcess(
        process="partial", partial="share", share=0.2, share_above_usd=100_000, backstop=2.0 / 3.0
    )


def test_schedules_work_inside_a_traced_program_in_single_precision():
    schedule = TierSchedule(*(jnp.asarray(x, jnp.float32) for x in venue.load("binance").schedule("BTC")))
    notional = jnp.asarray(np.geomspace(1e3, 1e9, 50), jnp.float32)
    got = jax.jit(maintenance_margin)(schedule, notional)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, maintenance_margin(venue.load("binance").schedule("BTC"), np.asarray(notional, np.float64)), rtol=2e-5
    )


def test_fixed_amounts_and_fees_count_as_maintenance():
    schedule = tier_schedule([[0.0, 0.005]])
    price = liquidation_price(
        schedule, quantity=1.0, entry=100.0, margin=10.0, other_maintenance=0.5, liquidation_fee_rate=0.001
    )
    assert price is not None
    assert 10.0 + price - 100.0 == pytest.approx(0.006 * price + 0.5, rel=1e-12)
