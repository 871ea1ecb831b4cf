"""Margin and health-factor rules against published tables and worked cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpo_sim import venue
from qpo_sim.errors import InputError
from qpo_sim.venue import HealthFactor, TieredMargin
from qpo_sim.venue.health_factor import health_factor, liquidate_pro_rata
from qpo_sim.venue.tiered_margin import (
    TierSchedule,
    active_tier,
    bankruptcy_price,
    liquidation_price,
    maintenance_margin,
    tier_schedule,
)


def _binance(case) -> TierSchedule:
    return tier_schedule([[row["floor"], row["mmr"], row["max_leverage"]] for row in case["inputs"]["brackets"]])


def test_binance_deductions(cases):
    case = cases("domain")["perp-01"]
    np.testing.assert_allclose(_binance(case).deduction, case["expected"]["cum"], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", ["perp-03", "perp-05"])
def test_isolated_liquidation_price(cases, name):
    case = cases("domain")[name]
    p, expected = case["inputs"], case["expected"]
    schedule, quantity = _binance(case), p["side"] * p["qty"]
    price = liquidation_price(schedule, quantity=quantity, entry=p["entry"], margin=p["margin"])
    assert price == pytest.approx(expected["liq_price"], rel=1e-9)
    assert int(np.searchsorted(schedule.floor, abs(quantity) * price, side="right")) == expected["tier"]
    mm = float(maintenance_margin(schedule, quantity * price))
    assert p["margin"] + quantity * (price - p["entry"]) == pytest.approx(mm, rel=1e-9)
    if "bankruptcy_price" in expected:
        assert bankruptcy_price(quantity=quantity, entry=p["entry"], margin=p["margin"]) == pytest.approx(
            expected["bankruptcy_price"]
        )
        assert mm == pytest.approx(expected["maintenance_at_liq"], rel=1e-9)


def test_hyperliquid_tiers(cases):
    case = cases("domain")["perp-13"]
    schedule = tier_schedule([[t["lower"], 0.5 / t["max_leverage"]] for t in case["inputs"]["tiers"]])
    np.testing.assert_allclose(schedule.rate, case["expected"]["mmr"])
    np.testing.assert_allclose(schedule.deduction, case["expected"]["deduction"], rtol=1e-9)
    assert float(maintenance_margin(schedule, case["inputs"]["notional"])) == pytest.approx(
        case["expected"]["maintenance"]
    )


def test_bybit_deductions(cases):
    case = cases("domain")["perp-18"]
    tiers = case["inputs"]["tiers"]
    floors = [0.0, *(t["upper"] for t in tiers[:-1])]
    schedule = tier_schedule([[f, t["mmr"], t["max_leverage"]] for f, t in zip(floors, tiers, strict=True)])
    np.testing.assert_allclose(schedule.deduction, case["expected"]["deduction"], rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(
        maintenance_margin(schedule, np.array(case["inputs"]["notional"])), case["expected"]["maintenance"], rtol=1e-9
    )


def test_no_liquidation_price_without_leverage():
    schedule = tier_schedule([[0.0, 0.01], [1e5, 0.05]])
    assert liquidation_price(schedule, quantity=1.0, entry=100.0, margin=150.0) is None
    assert liquidation_price(schedule, quantity=-1.0, entry=100.0, margin=150.0) == pytest.approx(250.0 / 1.01)


TABLES = st.lists(st.tuples(st.floats(1e3, 1e6), st.floats(1e-3, 0.05)), min_size=1, max_size=6).map(
    lambda rows: [
        [float(f), float(r)]
        for f, r in zip(
            np.concatenate([[0.0], np.cumsum([row[0] for row in rows])[:-1]]),
            np.cumsum([row[1] for row in rows]),
            strict=True,
        )
    ]
)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.lists(st.floats(0.0, 5e6), min_size=3, max_size=3))
def test_maintenance_margin_is_continuous_convex_and_the_integral_of_the_rate(table, points):
    schedule = tier_schedule(table)
    for floor in schedule.floor[1:]:
        below, above = (float(maintenance_margin(schedule, floor * (1.0 + e))) for e in (-1e-12, 1e-12))
        assert above == pytest.approx(below, rel=1e-9)
    a, b, c = sorted(points)
    mm = [float(maintenance_margin(schedule, x)) for x in (a, b, c)]
    if c > a:
        share = (b - a) / (c - a)
        assert mm[1] <= (1.0 - share) * mm[0] + share * mm[2] + 1e-6
    # tax brackets: the integral of the marginal rate
    edges = [*schedule.floor, np.inf]
    brackets = sum(
        r * max(min(c, hi) - lo, 0.0) for r, lo, hi in zip(schedule.rate, edges[:-1], edges[1:], strict=True)
    )
    assert mm[2] == pytest.approx(brackets, rel=1e-9, abs=1e-6)
    assert float(maintenance_margin(schedule, -c)) == mm[2]


@settings(max_examples=60, deadline=None)
@given(TABLES, st.floats(0.02, 0.9), st.sampled_from([-1.0, 1.0]), st.floats(1e4, 3e6))
def test_liquidation_price_is_the_root_of_its_definition(table, share, side, notional):
    schedule = tier_schedule(table)
    margin = share * notional
    price = liquidation_price(schedule, quantity=side * notional, entry=1.0, margin=margin)
    equity = lambda p: margin + side * notional * (p - 1.0)  # noqa: E731
    assert price is not None
    assert equity(price) == pytest.approx(
        float(maintenance_margin(schedule, notional * price)), rel=1e-7, abs=1e-7 * notional
    )


def test_active_tier_on_arrays_and_its_zero_gradient():
    schedule = TierSchedule(*map(jnp.asarray, tier_schedule([[0.0, 0.01], [100.0, 0.02], [300.0, 0.05]])))
    notional = jnp.asarray([0.0, 100.0, 100.1, 300.1, 1e9])
    rate, deduction = active_tier(schedule, notional)
    np.testing.assert_allclose(rate, [0.01, 0.01, 0.02, 0.05, 0.05])
    np.testing.assert_allclose(deduction, [0.0, 0.0, 1.0, 10.0, 10.0])
    slope = jax.vmap(jax.grad(lambda v: maintenance_margin(schedule, v)))(notional[1:])
    np.testing.assert_allclose(slope, rate[1:])


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ([[1.0, 0.01]], "start at 0"),
        ([[0.0, 0.01], [0.0, 0.02]], "must start above"),
        ([[0.0, 0.01], [5.0, 0.01]], "must exceed"),
        ([[0.0, 0.01], [5.0, 0.02], [3.0, 0.03]], "must start above"),
        ([[0.0, 0.5], [5.0, 1.0]], "must lie in"),
        ([[0.0, 0.0]], "must lie in"),
        ([[0.0, 0.01], [float("nan"), 0.02]], "must start above"),
        ([[0.0, 0.01], [5.0, float("nan")]], "must exceed"),
        ([], "list"),
        ([[0.0]], "list"),
    ],
)
def test_broken_tier_tables_are_refused(tiers, words):
    with pytest.raises(InputError, match=words):
        TieredMargin(tiers={"BTC": tiers}, name="broken")


def test_health_factor_case(cases):
    case = cases("domain")["lend-01"]
    p, expected = case["inputs"], case["expected"]
    value = np.array([c["amount"] * c["price"] for c in p["collateral"]])
    threshold = np.array([c["lt"] for c in p["collateral"]])
    hf = health_factor(value @ threshold, p["debt_usd"])
    assert hf == pytest.approx(expected["health_factor"], rel=1e-9)
    eth = (p["debt_usd"] - value[1] * threshold[1]) / (p["collateral"][0]["amount"] * threshold[0])
    assert eth == pytest.approx(expected["eth_liq_price"], rel=1e-9)
    # The ledger's log distance is zero at that price, and the joint drop is its exponential.
    from qpo_sim.instrument import loan as loans

    one = jnp.asarray(1.0)
    loan = loans.Loan(
        jnp.asarray(value),
        jnp.asarray(threshold),
        jnp.zeros(2),
        jnp.asarray(p["debt_usd"]),
        jnp.zeros(0),
        *[one * 0.5] * 4,
    )
    shape = loans.LoanShape("loan", (0, 1), (), "aave_v3")
    assert float(loans.distance(loan, shape, one, (one, one)).x) == pytest.approx(
        np.log(expected["health_factor"]), rel=1e-9
    )
    assert float(loans.distance(loan, shape, one, (one * eth / 3000.0, one)).x) == pytest.approx(0.0, abs=1e-9)
    assert 1.0 - np.exp(-np.log(hf)) == pytest.approx(expected["joint_drop"], rel=1e-9)


@pytest.mark.parametrize("xp", [np, jnp])
def test_liquidation_with_exhausted_collateral(cases, xp):
    case = cases("domain")["lend-03"]
    p, expected = case["inputs"], case["expected"]
    collateral, debt = p["collateral"] * p["price"], p["debt"]
    hf = collateral * p["lt"] / debt
    assert hf == pytest.approx(expected["health_factor"])
    values = (xp.asarray(float(v)) for v in (collateral, debt, hf))
    rule = dict(close_factor=0.5, full_close_health=0.95, small_position=2000.0)
    result = liquidate_pro_rata(*values, bonus=p["bonus"] - 1.0, **rule)
    assert float(result.repaid) == pytest.approx(expected["debt_repaid"], rel=1e-9)
    assert float(result.bad_debt) == pytest.approx(expected["bad_debt"], rel=1e-9)
    assert float(result.seized) == pytest.approx(collateral, rel=1e-12)
    assert float(debt - result.repaid - result.bad_debt) == pytest.approx(expected["debt_left"], abs=1e-9)


@pytest.mark.parametrize(
    ("collateral", "debt", "health", "share"),
    [(10_000.0, 8_000.0, 0.97, 0.5), (10_000.0, 8_000.0, 0.95, 1.0), (10_000.0, 8_000.0, 0.94, 1.0),
     (2_500.0, 1_900.0, 0.99, 1.0), (1_999.0, 1_500.0, 0.99, 1.0), (2_600.0, 2_000.0, 0.99, 0.5)],
)  # fmt: skip
def test_close_factor_rule(collateral, debt, health, share):
    result = liquidate_pro_rata(
        *map(np.float64, (collateral, debt, health)),
        bonus=0.05,
        close_factor=0.5,
        full_close_health=0.95,
        small_position=2000.0,
    )
    assert result.repaid == pytest.approx(share * debt)
    assert result.seized == pytest.approx(share * debt * 1.05)
    assert result.bad_debt == 0.0


@settings(max_examples=100, deadline=None)
@given(st.floats(100.0, 1e6), st.floats(0.3, 1.5), st.floats(0.5, 1.0), st.floats(0.0, 0.15))
def test_liquidation_never_takes_more_than_there_is(collateral, leverage, health, bonus):
    debt = leverage * collateral
    r = liquidate_pro_rata(
        *map(np.float64, (collateral, debt, health)),
        bonus=bonus,
        close_factor=0.5,
        full_close_health=0.95,
        small_position=2000.0,
    )
    assert 0.0 <= r.seized <= collateral * (1 + 1e-12) and r.repaid >= 0.0 and r.bad_debt >= -1e-9 * debt
    assert r.repaid + r.bad_debt <= debt * (1.0 + 1e-12)
    assert r.seized == pytest.approx(r.repaid * (1.0 + bonus), rel=1e-9)
    if r.bad_debt > 1e-9 * debt:
        assert r.seized == pytest.approx(collateral)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(liquidation_threshold={"default": 1.2}), "liquidation_threshold.default"),
        (dict(liquidation_bonus={"default": 0.3}), "threshold x"),
        (dict(liquidation_bonus={"default": -0.1}), "liquidation_bonus"),
        (dict(close_factor=0.0), "close_factor"),
        (dict(ltv={"default": float("nan")}), "ltv"),
        (dict(ltv={"ETH": 0.9, "default": 0.7}), r"ltv.ETH is 0.9.*\(0.8\)"),
        (dict(liquidation_threshold={"ETH": 0.6, "default": 0.8}), r"ltv.ETH is 0.7.*\(0.6\)"),
    ],
)
def test_broken_lending_venues_are_refused(change, words):
    values = dict(
        liquidation_threshold={"default": 0.8}, liquidation_bonus={"default": 0.05}, ltv={"default": 0.7}, name="pool"
    )
    HealthFactor(**values)
    with pytest.raises(InputError, match=words):
        HealthFactor(**{**values, **change})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(kind="tierd_margin", tiers={}), "kind is 'tierd_margin'"),
        (dict(kind="tiered_margin", tiers={"default": [[0, 0.01]]}, fee=1), "mine.fee is not an option"),
        (dict(kind="tiered_margin", tiers={"default": [[0, 0.01]]}, liquidation_fee_rate=1.5), "liquidation_fee_rate"),
        (
            dict(
                kind="tiered_margin",
                tiers={"default": [[0, 0.01]]},
                funding={"rate_per_8h": 0.0001, "interval_hours": 0},
            ),
            "interval_hours=0 must be above 0",
        ),
        (
            dict(kind="tiered_margin", tiers={"default": [[0, 0.01]]}, funding={"interval_hours": 8}),
            "rate_per_8h is missing",
        ),
    ],
)
def test_bad_venue_configurations_are_refused(config, words):
    with pytest.raises(InputError, match=words):
        venue.from_config(dict(source="a table", as_of="2026-01-31") | config, name="mine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(source=""), "source is missing"),
        (dict(as_of=None), "as_of is missing"),
        (dict(as_of="soon"), "as_of is 'soon'"),
        (dict(as_of="2026-02"), "a table from the future"),
    ],
)
def test_a_venue_says_where_its_numbers_come_from_and_when_they_held(change, words):
    config = dict(kind="tiered_margin", tiers={"default": [[0, 0.01]]}, source="a table", as_of="2026-01-31")
    assert venue.from_config(config, today="2026-01-31").as_of == "2026-01-31"
    with pytest.raises(InputError, match=words):
        venue.from_config(config | change, name="mine", today="2026-01-31")


def test_every_shipped_venue_loads_and_every_rule_is_found():
    files = sorted(p.stem for p in venue.folder().glob("*.yaml"))
    assert files
    used = {type(venue.load(name)) for name in files}
    assert {TieredMargin, HealthFactor} <= used
    assert {"tiered_margin", "health_factor"} <= set(venue.kinds())
    with pytest.raises(InputError, match="available are"):
        venue.load("nowhere")


def test_shipped_binance_table_is_the_published_one(cases):
    case = cases("domain")["perp-01"]
    schedule = venue.load("binance").schedule("BTC")
    np.testing.assert_allclose(schedule.deduction, case["expected"]["cum"], rtol=1e-9, atol=1e-6)
