"""Vault auctions and troves against worked cases and their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpo_sim.venue import liquity, load, vault
from qpo_sim.venue.liquity import Liquity
from qpo_sim.venue.vault import Vault

F64 = jnp.float64


def within(case, value, expected):
    t = case["tolerance"]
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=t["rel"], atol=t["abs"])


def test_lend_11_stairstep_auction(cases):
    case = cases("domain")["lend-11"]
    p, expected = case["inputs"], case["expected"]
    buf, rule = np.array(p["buf"]), dict(cut=p["cut"], step_seconds=p["step"])
    within(case, vault.seconds_to_reach(buf, **rule), expected["seconds"])
    within(case, vault.auction_price(buf * p["market"], 1000.0, **rule), expected["price_1000s"])


@settings(max_examples=100, deadline=None)
@given(st.floats(1.0, 2.0), st.floats(0.9, 0.999), st.floats(0.3, 2.5))
def test_an_auction_reaches_the_market_at_its_first_step_at_or_below_it(buf, cut, market):
    rule = dict(cut=cut, step_seconds=90.0)
    seconds = float(vault.seconds_to_reach(buf, **rule, market=market))
    assert float(vault.auction_price(buf, seconds, **rule)) <= market * (1 + 1e-6)
    if seconds > 0.0:
        assert float(vault.auction_price(buf, seconds - 1.0, **rule)) > market * (1 - 1e-6)


def test_resets_and_rewards():
    rule = dict(tail_seconds=5400.0, cusp=0.4)
    reset = vault.needs_reset(np.array([10.0, 5401.0, 10.0]), np.array([0.9, 0.9, 0.39]), 1.0, **rule)
    assert np.asarray(reset).tolist() == [False, True, True]
    assert vault.keeper_reward(113_000.0, tip=300.0, chip=0.001) == pytest.approx(413.0)


def test_lend_12_vault_liquidation(cases):
    case = cases("domain")["lend-12"]
    p, expected = case["inputs"], case["expected"]
    done = vault.auction(p["debt"], p["collateral"], np.array(p["clear"], float), chop=p["chop"])
    got = {
        "liq_price": vault.liquidation_price(p["collateral"], p["debt"], p["liq_ratio"]),
        "sold": done.sold,
        "returned": done.returned,
        "raised": done.raised,
        "shortfall_vs_tab": done.shortfall,
        "bad_debt": done.bad_debt,
        "owner_equity_before": p["collateral"] * p["fair"] - p["debt"],
        "owner_equity_after_at_2800": done.returned[0] * p["fair"],
    }
    for key, value in expected.items():
        within(case, got[key], value)
    # The account's view: values at the oracle's 2850, buyers at the market's 2800.
    params = Vault(liquidation_ratio={"ETH": p["liq_ratio"]}, chop=p["chop"]).params(["ETH"], ["DAI"], dtype=F64)
    value, debt = jnp.asarray(p["collateral"] * p["fair"]), jnp.asarray(p["debt"])
    view = vault.liquidate(params, [value], [debt], [jnp.asarray(2800.0 / 2850.0)])
    within(case, view.seized[0] / p["fair"], expected["sold"][0])
    within(case, view.repaid[0], p["debt"])
    within(case, view.protocol, expected["raised"][0] - p["debt"])
    assert float(view.liquidator) == pytest.approx(0.0, abs=1e-8)
    at_trigger = jnp.asarray(p["collateral"] * expected["liq_price"])
    assert float(vault.log_health(params, [at_trigger], [debt])) == pytest.approx(0.0, abs=1e-12)


def test_zero_bids_leave_all_debt_bad():
    """Collateral that sells for nothing, as on 2020-03-12."""
    done = vault.auction(100_000.0, 50.0, np.array([0.0, 1000.0]), chop=1.13)
    np.testing.assert_allclose(done.bad_debt, [100_000.0, 50_000.0])
    np.testing.assert_allclose(done.sold, 50.0)
    np.testing.assert_allclose(done.raised, [0.0, 50_000.0])


def test_buyers_never_pay_more_than_the_starting_price():
    params = Vault(liquidation_ratio={"ETH": 1.45}, buf=1.2).params(["ETH"], ["DAI"], dtype=F64)
    got = vault.liquidate(params, [jnp.asarray(1000.0)], [jnp.asarray(800.0)], [jnp.asarray(1.5)])
    assert float(got.seized[0]) == pytest.approx(800.0 * 1.13 / 1.2)
    assert float(got.liquidator) == pytest.approx(0.3 * 800.0 * 1.13 / 1.2)


@pytest.mark.parametrize(
    ("debt", "room", "dust", "auctioned"),
    [
        (100.0, 1e9, 10.0, 100.0),
        (100.0, 56.5, 10.0, 50.0),
        (100.0, 107.35, 10.0, 100.0),  # 95 would leave 5, less than dust: all of it
        (100.0, 5.65, 10.0, 0.0),  # a part of 5 is dust itself
        (100.0, 0.0, 10.0, 0.0),
        (5.0, 0.0, 10.0, 0.0),
        (5.0, 1.0, 10.0, 5.0),
    ],
)
def test_room_under_the_limits(debt, room, dust, auctioned):
    assert float(vault.auctioned_debt(debt, room, chop=1.13, dust=dust)) == pytest.approx(auctioned)


def test_a_part_takes_its_share_of_the_collateral_and_the_rest_waits():
    rule = Vault(liquidation_ratio={"ETH": 1.45}, hole_usd=56_500.0, dust_usd=1_000.0)
    params = rule.params(["ETH"], ["DAI"], dtype=F64)
    got = vault.liquidate(params, [jnp.asarray(140_000.0)], [jnp.asarray(100_000.0)])
    np.testing.assert_allclose([got.repaid[0], got.seized[0], got.bad_debt[0]], [50_000.0, 56_500.0, 0.0])
    # Unable to cover itself at 60 % of the price, the part loses its own share only.
    got = vault.liquidate(params, [jnp.asarray(140_000.0)], [jnp.asarray(100_000.0)], [jnp.asarray(0.6)])
    np.testing.assert_allclose([got.repaid[0], got.seized[0], got.bad_debt[0]], [42_000.0, 70_000.0, 8_000.0])


def test_queue_of_auctions():
    cycles = vault.auction_queue(np.array([40e6, 20e6, 60e6, 1e6]), 65e6, chop=1.13)
    # Tabs 45.2, 67.8, 135.6 and 136.73 million in all.
    np.testing.assert_array_equal(cycles, [0.0, 1.0, 2.0, 2.0])


def test_shipped_maker_vault_runs_about_half_an_hour():
    assert load("maker_eth_a").auction_seconds == 1710.0
    assert Vault(liquidation_ratio={"ETH": 1.45}, buf=1.3).auction_seconds == 2430.0


# Troves.


def test_v1_pool_and_redistribution_by_hand():
    """Debt 2000 against 2150 of collateral, a pool of 500: a quarter is offset."""
    done = liquity.liquidate_v1(2150.0, 2000.0, pool=500.0)
    rest = 2150.0 * 0.995
    np.testing.assert_allclose(done, [500.0, 1500.0, 0.25 * rest, 0.75 * rest, 10.75, 0.0])
    empty = liquity.liquidate_v1(2150.0, 2000.0, pool=0.0)
    np.testing.assert_allclose(empty, [0.0, 2000.0, 0.0, rest, 10.75, 0.0])


@pytest.mark.parametrize(
    ("collateral", "pool", "system_ratio", "offset", "seized"),
    [
        (1900.0, 5000.0, 1.4, 0.0, 1900.0),  # below 100 %: redistributed whole
        (2150.0, 5000.0, 1.4, 2000.0, 2150.0),  # below MCR: as usual
        (2600.0, 5000.0, 1.4, 2000.0, 2200.0),  # 130 %: loses 110 % of its debt
        (2600.0, 1999.0, 1.4, 0.0, 0.0),  # pool too small: nothing
        (1900.0, 5000.0, 1.6, 2000.0, 1900.0),  # not recovery mode
    ],
)
def test_v1_recovery_mode(collateral, pool, system_ratio, offset, seized):
    done = liquity.liquidate_v1(collateral, 2000.0, pool=pool, system_ratio=system_ratio)
    taken = done.to_pool + done.to_others + done.to_liquidator
    np.testing.assert_allclose([done.offset, taken, done.surplus], [offset, seized, collateral - seized])
    assert float(done.to_liquidator) == pytest.approx(0.005 * seized)


def test_v1_recovery_mode_moves_the_trigger():
    rule = Liquity(1, {"ETH": 1.1}, system_ratio=1.4, pool_usd=10_000.0)
    params = rule.params(["ETH"], ["LUSD"], dtype=F64)
    value = [jnp.asarray([2600.0, 2900.0])]
    assert np.sign(rule.log_health(params, value, [jnp.full(2, 2000.0)])).tolist() == [-1.0, 1.0]
    calm = params._replace(system_ratio=jnp.asarray(1.5))
    assert np.all(rule.log_health(calm, value, [jnp.full(2, 2000.0)]) > 0.0)
    # The pool does not cover the debt: MCR decides.
    small = params._replace(pool=jnp.asarray(100.0))
    assert np.all(rule.log_health(small, value, [jnp.full(2, 2000.0)]) > 0.0)
    # The state of the system may differ by path.
    rows = params._replace(system_ratio=jnp.asarray([1.4, 2.0]), pool=jnp.asarray([5000.0, 0.0]))
    got = rule.liquidate(rows, [jnp.full(2, 2600.0)], [jnp.full(2, 2000.0)])
    np.testing.assert_allclose(got.seized[0], [2200.0, 2600.0])


def test_v1_gas_deposit_is_the_borrowers_loss():
    rule = load("liquity_v1")
    params = rule.params(["ETH"], ["LUSD"], dtype=F64)
    got = rule.liquidate(params, [jnp.asarray(2150.0)], [jnp.asarray(2000.0)])
    assert float(got.credit) == -200.0
    assert float(got.liquidator) == pytest.approx(2150.0 - 2000.0 + 200.0)
    assert float(got.bad_debt[0]) == 0.0


def test_v2_penalties_by_hand():
    # All through the pool: 0.5 % of 2180 to the liquidator, 2000 x 1.05 to the pool, the rest to the owner.
    done = liquity.liquidate_v2(2180.0, 2000.0, pool=1e9, gas_cap=1e9)
    np.testing.assert_allclose(done, [2000.0, 0.0, 2100.0, 0.0, 10.9, 2180.0 - 2100.0 - 10.9])
    # All to other troves: up to 10 %, nothing for the liquidator but the deposit.
    done = liquity.liquidate_v2(2180.0, 2000.0, pool=0.0, gas_cap=1e9)
    np.testing.assert_allclose(done, [0.0, 2000.0, 0.0, 2180.0, 0.0, 0.0])
    done = liquity.liquidate_v2(2300.0, 2000.0, pool=0.0, gas_cap=1e9)
    np.testing.assert_allclose(done, [0.0, 2000.0, 0.0, 2200.0, 0.0, 100.0])
    # Half and half: what the pool's penalty leaves is taken by the other's.
    done = liquity.liquidate_v2(2180.0, 2000.0, pool=1000.0, gas_cap=1e9)
    np.testing.assert_allclose(done, [1000.0, 1000.0, 1050.0, 1100.0, 5.45, 2180.0 - 2155.45])
    # The compensation is capped.
    assert float(liquity.liquidate_v2(2180.0, 2000.0, pool=1e9, gas_cap=4.0).to_liquidator) == 4.0


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0, 5000.0), st.floats(1.0, 3000.0), st.floats(0.0, 4000.0), st.floats(1.0, 2.0))
def test_troves_keep_their_books(collateral, debt, pool, system_ratio):
    for done in (
        liquity.liquidate_v1(collateral, debt, pool=pool, system_ratio=system_ratio),
        liquity.liquidate_v2(collateral, debt, pool=pool, gas_cap=12.0),
    ):
        assert all(float(part) >= -1e-9 for part in done)
        where = done.to_pool + done.to_others + done.to_liquidator + done.surplus
        assert float(where) == pytest.approx(collateral, abs=1e-9)
        assert float(done.offset + done.redistributed) == pytest.approx(debt) or float(done.surplus) == collateral


def test_redemption_takes_the_riskiest_first():
    debts, ratio = np.array([100.0, 50.0, 80.0]), np.array([2.0, 1.2, 1.5])
    np.testing.assert_allclose(liquity.redeemed(debts, ratio, 40.0), [0.0, 40.0, 0.0])
    np.testing.assert_allclose(liquity.redeemed(debts, ratio, 110.0), [0.0, 50.0, 60.0])
    np.testing.assert_allclose(liquity.redeemed(debts, ratio, 1e9), debts)
    two = liquity.redeemed(
        np.stack([debts, debts], axis=1), np.stack([ratio, -ratio], axis=1), np.array([110.0, 110.0])
    )
    np.testing.assert_allclose(two, [[0.0, 100.0], [50.0, 0.0], [60.0, 10.0]])


def test_redemption_fee():
    assert liquity.decayed_base_rate(0.04, 24.0) == pytest.approx(0.01)
    assert float(liquity.redemption_rate(0.01, 0.02)) == pytest.approx(0.005 + 0.01 + 0.01)
    assert float(liquity.redemption_rate(0.9, 1.0)) == 1.0
