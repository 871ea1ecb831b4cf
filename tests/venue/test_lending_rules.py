"""Lending rules and their interest and oracles against worked cases, definitions and the books of every party."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpo_sim.errors import InputError
from qpo_sim.instrument import interest, oracle
from qpo_sim.venue import compound, health_factor, load, morpho, vault
from qpo_sim.venue.compound import Compound
from qpo_sim.venue.health_factor import HealthFactor
from qpo_sim.venue.liquity import Liquity
from qpo_sim.venue.morpho import Morpho
from qpo_sim.venue.vault import Vault

F64 = jnp.float64
AAVE_CLOSE = dict(close_factor=0.5, full_close_health=0.95, small_position=2000.0)


def within(case, value, expected):
    t = case["tolerance"]
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=t["rel"], atol=t["abs"])


def pool(**changes):
    values = dict(
        liquidation_threshold={"ETH": 0.83, "BTC": 0.78},
        liquidation_bonus={"ETH": 0.055, "BTC": 0.05},
        ltv={"ETH": 0.805, "BTC": 0.73},
        liquidation_protocol_fee={"default": 0.1},
        emodes={
            "eth": dict(
                ltv=0.93, liquidation_threshold=0.95, liquidation_bonus=0.01, collateral=["ETH", "wstETH"], debt=["ETH"]
            )
        },
        name="pool",
    )
    return HealthFactor(**{**values, **changes})


# Aave.


def test_lend_01_account_of_two_collaterals(cases):
    case = cases("domain")["lend-01"]
    p, expected = case["inputs"], case["expected"]
    values = [float(c["amount"] * c["price"]) for c in p["collateral"]]
    threshold, ltv = ([c[key] for c in p["collateral"]] for key in ("lt", "ltv"))
    weighted = health_factor.weighted_sum(threshold, values)
    eth = p["collateral"][0]
    price = health_factor.liquidation_price(
        eth["amount"], eth["lt"], p["debt_usd"], other_weighted=values[1] * threshold[1]
    )
    got = {
        "collateral_usd": health_factor.total(values),
        "avg_ltv": health_factor.average(ltv, values),
        "avg_lt": health_factor.average(threshold, values),
        "health_factor": health_factor.health_factor(weighted, p["debt_usd"]),
        "available_borrow": health_factor.available_borrow(ltv, values, p["debt_usd"]),
        "eth_liq_price": price,
        "joint_drop": health_factor.joint_drop(weighted, p["debt_usd"]),
    }
    for key, value in expected.items():
        within(case, got[key], value)
    params = pool(ltv=dict(zip(("ETH", "BTC"), ltv, strict=True))).params(["ETH", "BTC"], ["USD"], dtype=F64)
    rows = [jnp.asarray(v) for v in values]
    debt = [jnp.asarray(p["debt_usd"])]
    assert float(health_factor.log_health(params, rows, debt)) == pytest.approx(np.log(expected["health_factor"]))
    # Both triggers by their definition.
    at_price = [rows[0] * price / eth["price"], rows[1]]
    assert float(health_factor.log_health(params, at_price, debt)) == pytest.approx(0.0, abs=1e-12)
    fallen = [row * (1.0 - got["joint_drop"]) for row in rows]
    assert float(health_factor.log_health(params, fallen, debt)) == pytest.approx(0.0, abs=1e-12)


def test_lend_03_exhausted_collateral(cases):
    case = cases("domain")["lend-03"]
    p, expected = case["inputs"], case["expected"]
    value, debt, bonus = float(p["collateral"] * p["price"]), p["debt"], p["bonus"] - 1.0
    health = value * p["lt"] / debt
    most = health_factor.max_repay(value, debt, debt, health, **AAVE_CLOSE)
    call = health_factor.liquidate_pair(
        value, debt, most, bonus=bonus, protocol_fee=p["protocol_fee"], min_leftover=1000.0
    )
    rule = pool(liquidation_threshold={"ETH": p["lt"]}, liquidation_bonus={"ETH": bonus}, ltv={"ETH": 0.8})
    params = rule.params(["ETH"], ["USD"], dtype=F64)
    whole = health_factor.liquidate(params, [jnp.asarray(value)], [jnp.asarray(debt)])
    got = {
        "health_factor": health,
        "max_liquidatable_debt": most,
        "debt_repaid": call.repaid,
        "collateral_to_liquidator": (call.seized - call.protocol_fee) / p["price"],
        "protocol_fee": call.protocol_fee / p["price"],
        "collateral_left": (value - call.seized) / p["price"],
        "debt_left": debt - whole.repaid[0] - whole.bad_debt[0],
        "bad_debt": whole.bad_debt[0],
        "liquidator_gross_profit": whole.liquidator,
    }
    for key, number in expected.items():
        if number is not None:
            within(case, got[key], number)
    assert float(whole.protocol) == pytest.approx(expected["protocol_fee"] * p["price"])


def test_half_of_a_large_position_by_hand():
    """10 ETH at 2000 against 17 000: HF 0.9765, so 8500 repaid for 8967.5, of which 46.75 is the protocol's."""
    params = pool().params(["ETH"], ["USD"], dtype=F64)
    got = health_factor.liquidate(params, [jnp.asarray(20_000.0)], [jnp.asarray(17_000.0)])
    np.testing.assert_allclose([got.repaid[0], got.seized[0], got.bad_debt[0]], [8500.0, 8967.5, 0.0])
    np.testing.assert_allclose([got.protocol, got.liquidator], [46.75, 420.75])
    after = health_factor.health_after(0.83 * 20_000.0, 17_000.0, 0.83, got.seized[0], got.repaid[0])
    assert float(after) == pytest.approx(0.83 * 11_032.5 / 8500.0)
    assert float(after) > 0.83 * 20.0 / 17.0  # HF above LT x (1 + bonus) = 0.8757


@pytest.mark.parametrize(
    ("collateral", "debt", "total", "health", "most"),
    [
        (10_000.0, 8_000.0, 8_000.0, 0.97, 4_000.0),
        (10_000.0, 8_000.0, 8_000.0, 0.95, 8_000.0),  # not above 0.95
        (1_999.0, 1_700.0, 1_700.0, 0.97, 1_700.0),  # small
        (2_500.0, 1_999.0, 1_999.0, 0.97, 1_999.0),  # small debt
        (2_500.0, 2_000.0, 2_000.0, 0.97, 1_000.0),  # the border is large
        (10_000.0, 3_000.0, 8_000.0, 0.97, 3_000.0),  # half of all debts covers this one
        (10_000.0, 5_000.0, 8_000.0, 0.97, 4_000.0),
        (1_500.0, 5_000.0, 8_000.0, 0.97, 5_000.0),  # small collateral of a large account
    ],
)
def test_close_factor_is_of_the_total_debt_and_small_pairs_are_closed(collateral, debt, total, health, most):
    assert float(health_factor.max_repay(collateral, debt, total, health, **AAVE_CLOSE)) == most


def test_lend_05_leftover_rule(cases):
    case = cases("domain")["lend-05"]
    p = case["inputs"]
    repay = np.array(p["repay"], float)
    allowed = health_factor.leaves_no_dust(
        p["collateral"], p["debt"], 1.05 * repay, repay, min_leftover=p["min_leftover"]
    )
    assert np.asarray(allowed).tolist() == case["expected"]["allowed"]
    # The largest allowed call up to each limit is allowed itself.
    call = health_factor.liquidate_pair(
        p["collateral"], p["debt"], jnp.asarray(repay), bonus=0.05, min_leftover=p["min_leftover"]
    )
    np.testing.assert_allclose(call.repaid, [300.0, 400.0, 400.0, 400.0, 400.0, 900.0])


@settings(max_examples=200, deadline=None)
@given(*[st.floats(100.0, 20_000.0)] * 2, st.floats(0.1, 1.0), st.floats(0.0, 0.15))
def test_largest_call_is_allowed_and_none_larger_is(collateral, debt, share, bonus):
    # A repayment that leaves a rounding of the debt is no case of the rule.
    repay = debt if share > 1.0 - 1e-9 else share * debt
    call = health_factor.liquidate_pair(collateral, debt, repay, bonus=bonus, min_leftover=1000.0)
    repaid = float(call.repaid)

    def allowed(x):
        # A call that clears the collateral up to rounding clears it.
        seized = min(x * (1 + bonus) * (1 + 1e-12), collateral)
        return bool(health_factor.leaves_no_dust(collateral, debt, seized, x, min_leftover=1000.0 - 1e-6))

    assert repaid <= repay * (1 + 1e-12) and repaid * (1 + bonus) <= collateral * (1 + 1e-12)
    if repaid > 0.0:
        assert allowed(repaid)
    most = min(repay, collateral / (1 + bonus))
    for x in np.linspace(repaid, most, 7)[1:]:
        assert x <= repaid * (1 + 1e-9) or not allowed(x)


def test_lend_18_insolvency_gap(cases):
    case = cases("domain")["lend-18"]
    lt, bonus = (np.array(case["inputs"][key]) for key in ("lt", "bonus"))
    gap = health_factor.insolvency_gap(lt, bonus)
    within(case, gap, case["expected"]["gap"])
    # By liquidation: a position at its trigger falls by a little less and a little more than the gap.
    for sign, solvent in ((1.0 - 1e-6, True), (1.0 + 1e-6, False)):
        value = (1.0 - gap * sign) / lt
        call = health_factor.liquidate_pair(value, np.ones(3), np.ones(3), bonus=bonus)
        assert np.all((np.asarray(call.repaid) > 1.0 - 1e-9) == solvent)


def test_partial_liquidation_helps_only_above_the_toxic_health_factor():
    threshold, bonus, debt = 0.8, 0.1, 1000.0
    health = np.array([0.8, 0.87, 0.88, 0.89, 0.99])
    value = health * debt / threshold
    after = health_factor.health_after(threshold * value, debt, threshold, 110.0, 100.0)
    np.testing.assert_array_equal(after < health - 1e-12, health_factor.is_toxic(health, threshold, bonus - 1e-9))
    assert after[2] == pytest.approx(0.88)


def test_emode_replaces_the_values_of_its_collaterals_only():
    rule = pool()
    params = rule.params(["ETH", "BTC"], ["ETH"], emode="eth", dtype=F64)
    np.testing.assert_allclose(params.threshold, [0.95, 0.78])
    np.testing.assert_allclose(params.bonus, [0.01, 0.05])
    np.testing.assert_allclose(params.ltv, [0.93, 0.73])
    isolated = pool(emodes={"eth": {**rule.emodes["eth"], "isolated": True}})
    params = isolated.params(["ETH", "BTC"], ["ETH"], emode="eth", dtype=F64)
    np.testing.assert_allclose(params.ltv, [0.93, 0.0])
    np.testing.assert_allclose(params.threshold, [0.95, 0.78])
    with pytest.raises(InputError, match="does not lend USD"):
        rule.params(["ETH"], ["USD"], emode="eth")
    with pytest.raises(InputError, match="did you mean 'eth'"):
        rule.params(["ETH"], ["ETH"], emode="et")
    with pytest.raises(InputError, match="does not accept DOGE"):
        rule.params(["DOGE"], ["USD"])


def test_the_liquidator_takes_the_pair_that_pays_most():
    params = pool(liquidation_protocol_fee={"default": 0.0}).params(["ETH", "BTC"], ["USD", "ETH"], dtype=F64)
    collateral, debt = [jnp.asarray(5_000.0), jnp.asarray(50_000.0)], [jnp.asarray(20_000.0), jnp.asarray(23_500.0)]
    got = health_factor.liquidate(params, collateral, debt)
    # 21 750 (half of all) of the larger debt against BTC pays 1087.5; ETH would be exhausted and pay 260.66.
    np.testing.assert_allclose(got.repaid, [0.0, 21_750.0])
    np.testing.assert_allclose(got.seized, [0.0, 21_750.0 * 1.05])
    assert float(got.liquidator) == pytest.approx(1087.5)
    # A market 6 % below the oracle makes BTC a loss, and the other pair the choice.
    got = health_factor.liquidate(params, collateral, debt, [jnp.asarray(1.0), jnp.asarray(0.94)])
    np.testing.assert_allclose(got.seized, [5_000.0, 0.0])
    assert np.all(np.asarray(got.bad_debt) == 0.0)  # collateral is left


def test_bad_debt_is_all_that_is_left_of_all_debts():
    params = pool().params(["ETH", "BTC"], ["USD", "ETH"], dtype=F64)
    got = health_factor.liquidate(
        params, [jnp.asarray(10_000.0), jnp.asarray(0.0)], [jnp.asarray(9_000.0), jnp.asarray(7_000.0)]
    )
    repaid = 9_000.0
    np.testing.assert_allclose(got.repaid, [repaid, 0.0])
    assert float(sum(got.bad_debt)) == 0.0  # 9000 x 1.055 < 10 000: some collateral is left
    got = health_factor.liquidate(
        params, [jnp.asarray(9_000.0), jnp.asarray(0.0)], [jnp.asarray(9_000.0), jnp.asarray(7_000.0)]
    )
    np.testing.assert_allclose(got.bad_debt, [9_000.0 - 9_000.0 / 1.055, 7_000.0])


def test_an_account_without_debt_is_far_from_liquidation():
    params = pool().params(["ETH"], ["USD"])
    zero = jnp.zeros((), jnp.float32)
    assert float(health_factor.log_health(params, [zero], [zero])) > 20.0
    assert float(health_factor.log_health(params, [zero], [zero + 1e-6])) < 0.0


# Compound, Morpho.


def test_lend_09_absorb(cases):
    case = cases("domain")["lend-09"]
    p = case["inputs"]
    factors = dict(borrow=0.8, liquidate=p["liquidate_cf"], liquidation_factor=p["liquidation_factor"])
    rule = Compound(base="USD", factors={"ETH": factors}, store_front=p["store_front"])
    params = rule.params(["ETH"], ["USD"], dtype=F64)
    for name in ("a", "b"):
        price, debt = float(p[name]["price"]), float(p[name]["debt"])
        values = [jnp.asarray(p["collateral"] * price)]
        books = compound.absorb(
            values, debt, liquidation_factor=[p["liquidation_factor"]], store_front=p["store_front"]
        )
        limit = compound.liquidation_limit([p["liquidate_cf"]], values)
        got = {
            "liquidatable": bool(limit < debt),
            "user_credit": books.user_credit,
            "reserve_loss_at_absorb": books.reserve_loss,
            "discounted_price": compound.discounted_price(price, p["liquidation_factor"], p["store_front"]),
            "sale_proceeds": books.sale_proceeds,
            "protocol_pnl": books.protocol_pnl,
        }
        for key, value in case["expected"][name].items():
            within(case, got[key], value)
        # The account's view of the same absorption.
        x = compound.log_health(params, values, [jnp.asarray(debt)])
        assert (float(x) < 0.0) == case["expected"][name]["liquidatable"]
        view = compound.liquidate(params, values, [jnp.asarray(debt)])
        within(case, view.credit, books.user_credit)
        within(case, view.bad_debt[0], books.reserve_loss)
        within(case, view.protocol - view.bad_debt[0], books.protocol_pnl)


def test_compound_limits_sum_over_the_collaterals():
    values = [jnp.asarray([100.0, 200.0]), jnp.asarray([50.0, 0.0])]
    np.testing.assert_allclose(compound.borrow_limit([0.8, 0.7], values), [115.0, 160.0])
    np.testing.assert_allclose(compound.liquidation_limit([0.9, 0.8], values), [130.0, 180.0])


def test_compound_buyers_leave_what_is_dearer_than_the_market():
    params = load("compound_v3").params(["ETH"], ["USDC"], dtype=F64)
    got = compound.liquidate(params, [jnp.asarray(1000.0)], [jnp.asarray(900.0)], [jnp.asarray(0.9)])
    assert float(got.liquidator) == 0.0
    assert float(got.protocol) == pytest.approx(900.0 - 950.0)  # worth 900 at the market, credited 950


@pytest.mark.parametrize(
    ("lltv", "incentive"),
    [(0.385, 1.15), (0.625, 1 / 0.8875), (0.77, 1 / 0.931), (0.86, 1 / 0.958), (0.945, 1 / 0.9835), (0.98, 1 / 0.994)],
)
def test_morpho_incentive_factor(lltv, incentive):
    assert float(morpho.incentive_factor(lltv)) == pytest.approx(incentive, rel=1e-12)
    assert float(morpho.break_even_ltv(lltv)) == pytest.approx(1.0 / incentive, rel=1e-12)


def test_morpho_liquidation_and_write_off():
    rule = Morpho(lltv={"ETH/USD": 0.86})
    params = rule.params(["ETH"], ["USD"], dtype=F64)
    lif = 1.0 / 0.958
    assert float(morpho.liquidation_price(10.0, 0.86, 17_200.0)) == pytest.approx(2000.0)
    debt = jnp.asarray([17_200.0, 19_500.0])
    x = morpho.log_health(params, [jnp.asarray(20_000.0)], [debt[:1]])
    assert float(x[0]) == pytest.approx(0.0, abs=1e-12)
    got = morpho.liquidate(params, [jnp.full(2, 20_000.0)], [debt])
    np.testing.assert_allclose(got.repaid[0], [17_200.0, 20_000.0 / lif])
    np.testing.assert_allclose(got.seized[0], [17_200.0 * lif, 20_000.0])
    np.testing.assert_allclose(got.bad_debt[0], [0.0, 19_500.0 - 19_160.0], atol=1e-9)
    np.testing.assert_allclose(got.liquidator, np.asarray(got.seized[0]) - np.asarray(got.repaid[0]))


# Every rule.

RULES = {
    "aave": (pool(), ["ETH", "BTC"], ["USD", "ETH"]),
    "compound": (
        Compound(
            base="USD",
            factors={"ETH": dict(borrow=0.8, liquidate=0.9, liquidation_factor=0.95),
                     "BTC": dict(borrow=0.7, liquidate=0.77, liquidation_factor=0.9)},
            store_front=0.6,
        ),
        ["ETH", "BTC"],
        ["USD"],
    ),
    "morpho": (Morpho(lltv={"default": 0.86}), ["ETH"], ["USD"]),
    "vault": (
        Vault(liquidation_ratio={"default": 1.45}, tip=30.0, chip=0.001, hole_usd=6_000.0, dust_usd=1_000.0,
              buyer_margin=0.01),
        ["ETH"],
        ["DAI"],
    ),
    "liquity_v1": (Liquity(1, {"default": 1.1}, gas_deposit_usd=200.0, pool_usd=4_000.0), ["ETH"], ["LUSD"]),
    "recovery": (
        Liquity(1, {"default": 1.1}, gas_deposit_usd=200.0, pool_usd=7_000.0, system_ratio=1.4), ["ETH"], ["LUSD"]
    ),
    "liquity_v2": (
        Liquity(2, {"default": 1.1}, gas_deposit_usd=100.0, pool_usd=4_000.0, gas_cap_usd=20.0, debt="BOLD"),
        ["ETH"],
        ["BOLD"],
    ),
}  # fmt: skip


def _account(n_collaterals, n_debts, n=400, seed=1):
    rng = np.random.default_rng(seed)
    collateral = [jnp.asarray(rng.uniform(0.0, 6_000.0, n) * (rng.random(n) > 0.1)) for _ in range(n_collaterals)]
    debts = [jnp.asarray(rng.uniform(0.0, 8_000.0, n)) for _ in range(n_debts)]
    markets = [[jnp.asarray(rng.uniform(0.7, 1.2, n)) for _ in range(m)] for m in (n_collaterals, n_debts)]
    return collateral, debts, *markets


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_created_or_destroyed(name):
    """Borrower, liquidators, protocol and lenders together gain nothing, at any market price."""
    rule, assets, borrowed = RULES[name]
    collateral, debts, held, owed = _account(len(assets), len(borrowed))
    got = rule.liquidate(rule.params(assets, borrowed, dtype=F64), collateral, debts, held, owed)
    for repaid, bad, debt in zip(got.repaid, got.bad_debt, debts, strict=True):
        assert np.all(repaid >= 0.0) and np.all(bad >= 0.0) and np.all(repaid + bad <= debt * (1 + 1e-12) + 1e-9)
    for seized, value in zip(got.seized, collateral, strict=True):
        assert np.all(seized >= 0.0) and np.all(seized <= value * (1 + 1e-12))
    removed = [repaid + bad for repaid, bad in zip(got.repaid, got.bad_debt, strict=True)]
    borrower = sum(w * r for w, r in zip(owed, removed, strict=True)) + got.credit
    borrower = borrower - sum(m * s for m, s in zip(held, got.seized, strict=True))
    lenders = -sum(w * b for w, b in zip(owed, got.bad_debt, strict=True))
    np.testing.assert_allclose(borrower + got.liquidator + got.protocol + lenders, 0.0, atol=1e-8)
    assert np.std(np.asarray(borrower)) > 1.0


@pytest.mark.parametrize("name", RULES)
def test_values_scale_and_single_precision_agrees(name):
    """Outcomes are homogeneous in values and money limits; float32 on values of order 1 agrees with float64."""
    rule, assets, borrowed = RULES[name]
    collateral, debts, *_ = _account(len(assets), len(borrowed))
    # Off the edges of the rules, where rounding picks the side.
    full = rule.liquidate(rule.params(assets, borrowed, dtype=F64), collateral, debts)
    single = lambda rows: [jnp.asarray(np.asarray(row) / 5e3, jnp.float32) for row in rows]  # noqa: E731
    params = rule.params(assets, borrowed, capital=5e3)
    part = rule.liquidate(params, single(collateral), single(debts))
    x = rule.log_health(params, single(collateral), single(debts))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((part, x)))
    off = [np.abs(5e3 * np.asarray(b, np.float64) - np.asarray(a)) > 0.05
           for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(part), strict=True)]  # fmt: skip
    assert np.mean(np.any(off, axis=0)) <= 0.005


@pytest.mark.parametrize("name", RULES)
def test_health_falls_with_debt_and_rises_with_collateral(name):
    rule, assets, borrowed = RULES[name]
    collateral, debts, *_ = _account(len(assets), len(borrowed))
    params = rule.params(assets, borrowed, dtype=F64)
    if name == "recovery":
        # A debt that outgrows the pool leaves the rule of recovery mode.
        params = params._replace(pool=jnp.asarray(1e9))
    x = rule.log_health(params, collateral, debts)
    assert np.all(rule.log_health(params, [1.1 * c for c in collateral], debts) >= x)
    assert np.all(rule.log_health(params, collateral, [1.1 * d for d in debts]) <= x)


@pytest.mark.parametrize("name", RULES)
def test_gradients_against_finite_differences(name):
    rule, assets, borrowed = RULES[name]
    params = rule.params(assets, borrowed, dtype=F64)
    start = jnp.asarray([3_000.0, 2_500.0][: len(assets)])
    debts = [jnp.asarray(d) for d in (2_750.0, 1_900.0)[: len(borrowed)]]

    def borrower(values):
        got = rule.liquidate(params, list(values), debts)
        gain = sum(got.repaid) + sum(got.bad_debt) + got.credit - sum(got.seized)
        return gain + 100.0 * rule.log_health(params, list(values), debts) + got.liquidator

    gradient = jax.grad(borrower)(start)
    for i in range(len(assets)):
        step = jnp.zeros_like(start).at[i].set(0.01)
        slope = (borrower(start + step) - borrower(start - step)) / 0.02
        assert float(gradient[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)
    zero = jax.grad(lambda v: sum(rule.liquidate(params, list(v), debts).seized))(0.0 * start)
    assert np.all(np.isfinite(zero))


@pytest.mark.parametrize("name", ["aave", "morpho"])
def test_a_liquidation_pays_exactly_the_bonus(name):
    rule, assets, borrowed = RULES[name]
    collateral, debts, *_ = _account(len(assets), len(borrowed))
    params = rule.params(assets, borrowed, dtype=F64)
    got = rule.liquidate(params, collateral, debts)
    seized, repaid = sum(got.seized), sum(got.repaid)
    assert np.all(seized <= repaid * 1.0551 + 1e-9)
    np.testing.assert_allclose(got.liquidator + got.protocol, seized - repaid, atol=1e-9)
    emptied = np.asarray(sum(collateral) - seized) < 1e-9
    assert emptied.any()
    np.testing.assert_allclose(np.asarray(sum(debts) - repaid - sum(got.bad_debt))[emptied], 0.0, atol=1e-8)


# Interest.


def test_lend_07_aave_rates(cases):
    case = cases("domain")["lend-07"]
    p, expected = case["inputs"], case["expected"]
    u = jnp.asarray(p["utilisation"], F64)
    rate = interest.kinked_rate(u, p["base"], p["slope1"], p["slope2"], p["optimal"])
    within(case, rate, expected["borrow_apr"])
    within(case, interest.supplied_rate(rate, u, p["reserve_factor"]), expected["supply_apr"])
    whole = 1e6
    supply = interest.supply_rate(rate, whole * u, whole * (1 - u), reserve_factor=p["reserve_factor"])
    within(case, supply, expected["supply_apr"])
    within(case, interest.annual_yield(rate), expected["borrow_apy"])
    np.testing.assert_allclose(interest.utilisation(whole * u, whole * (1 - u)), u)
    assert float(interest.utilisation(0.0, 0.0)) == 0.0


def test_uncovered_deficit_lowers_what_suppliers_get():
    rate = interest.supply_rate(0.1, 80.0, 10.0, reserve_factor=0.1, unbacked=6.0, deficit=4.0)
    assert float(rate) == pytest.approx(0.1 * 0.8 * 0.9)


def test_growth_of_debt_and_supply():
    year = 365 * 86_400.0
    assert float(interest.compound_growth(0.1, year)) == pytest.approx(1.0 + float(interest.annual_yield(0.1)))
    assert float(interest.annual_yield(0.1, periods=12.0)) == pytest.approx((1 + 0.1 / 12) ** 12 - 1)
    assert float(interest.linear_growth(0.1, year / 2)) == pytest.approx(1.05)
    # Binomial and Taylor leave out the fourth order.
    month = year / 12
    exact = float(interest.compound_growth(0.6, month))
    for growth in (interest.binomial_growth, interest.taylor_growth):
        assert 0.0 < exact - float(growth(0.6, month)) < 1.2 * 0.05**4 / 24
    assert float(interest.binomial_growth(0.6, 2.0)) == pytest.approx((1 + 0.6 / year) ** 2, rel=1e-15)
    assert float(interest.continuous_growth(0.6, month)) == pytest.approx(exact, rel=1e-8)


def test_compound_slopes_are_per_unit_of_utilisation():
    """Mainnet USDC: 1.5 % + 3.5 % x 0.8 at the kink, plus 25 % x 0.2 when all is lent."""
    rate = interest.per_unit_rate([0.0, 0.4, 0.8, 1.0], base=0.015, low=0.035, high=0.25, kink=0.8)
    np.testing.assert_allclose(rate, [0.015, 0.029, 0.043, 0.093])


def test_morpho_adaptive_curve():
    rate = interest.adaptive_curve_rate([0.0, 0.45, 0.9, 0.95, 1.0], 0.04)
    np.testing.assert_allclose(rate, [0.01, 0.025, 0.04, 0.1, 0.16])
    # Full for the time in which the rate doubles: 50 a year.
    years = np.log(2.0) / 50.0
    assert float(interest.adapted_rate_at_target(0.04, 1.0, years)) == pytest.approx(0.08)
    assert float(interest.adapted_rate_at_target(0.04, 0.9, 1.0)) == pytest.approx(0.04)
    assert float(interest.adapted_rate_at_target(0.04, 1.0, 10.0)) == 2.0
    assert float(interest.adapted_rate_at_target(0.04, 0.0, 10.0)) == 0.001
    mean = 0.04 * (1.0 + 2.0 + 2.0 * 2.0**0.5) / 4.0
    assert float(interest.mean_adaptive_rate(1.0, 0.04, years)) == pytest.approx(4.0 * mean)
    # The trapezoid rule against the integral, (2 - 1) / log 2.
    assert mean == pytest.approx(0.04 / np.log(2.0), rel=0.011)


# Oracles.


def test_lend_14_push_oracle(cases):
    case = cases("domain")["lend-14"]
    p, expected = case["inputs"], case["expected"]
    got = oracle.reported(
        jnp.asarray(p["prices"], F64),
        threshold=p["threshold"],
        heartbeat_seconds=p["heartbeat_s"],
        step_seconds=p["dt_s"],
    )
    within(case, got.price, expected["oracle"])
    # The case counts the report over the price.
    error = oracle.relative_error(got.price, np.asarray(p["prices"]))
    within(case, np.max(np.abs(error)), expected["max_abs_error"])
    assert float(got.updates) == expected["updates"]


def test_heartbeat_latency_and_paths():
    prices = np.stack([np.full(9, 100.0), np.r_[np.full(4, 100.0), np.full(5, 101.0)]], axis=1)
    prices[1:, 0] += 0.01 * np.arange(8)
    rule = dict(threshold=0.005, heartbeat_seconds=180.0, step_seconds=60.0)
    got = oracle.reported(prices, **rule)
    # Every third step by the heartbeat; on the second path the move of 1 % comes one step after a heartbeat.
    np.testing.assert_allclose(got.price[:, 0], prices[[0, 0, 0, 3, 3, 3, 6, 6, 6], 0])
    np.testing.assert_allclose(got.price[:, 1], prices[:, 1])
    np.testing.assert_array_equal(got.updates, [2.0, 3.0])
    late = oracle.reported(prices, **rule, latency_steps=2)
    np.testing.assert_allclose(late.price[2:, 1], got.price[:-2, 1])
    np.testing.assert_allclose(late.price[:2, 1], 100.0)


def test_capped_ratio():
    np.testing.assert_allclose(
        oracle.capped_ratio(np.array([1.02, 1.2]), start=1.0, growth_per_year=0.1, years=0.5), [1.02, 1.05]
    )


# What the border refuses.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pool(liquidation_protocol_fee={"default": 1.5}), "liquidation_protocol_fee.default"),
        (lambda: pool(min_leftover_usd=1500.0), "min_leftover_usd"),
        (lambda: pool(rate_curve={"ETH": dict(optimal=0.9, base=0.0, slope1=0.1)}), "rate_curve.ETH.slope2 is missing"),
        (lambda: pool(rate_curve={"ETH": dict(optimal=1.9, base=0.0, slope1=0.1, slope2=1.0)}), "rate_curve.ETH.opt"),
        (lambda: pool(emodes={"a": dict(ltv=0.9)}), "emodes.a.liquidation_threshold is missing"),
        (
            lambda: pool(
                emodes={"a": dict(ltv=0.9, liquidation_threshold=0.95, liquidation_bonus=0.06, collateral=[], debt=[])}
            ),
            "threshold x",
        ),
        (lambda: Compound(base="USD", factors={"ETH": dict(borrow=0.8)}, store_front=0.5), "liquidate is missing"),
        (
            lambda: Compound(
                base="USD", factors={"ETH": dict(borrow=0.9, liquidate=0.8, liquidation_factor=0.9)}, store_front=0.5
            ),
            "must be below liquidate",
        ),
        (lambda: RULES["compound"][0].params(["ETH"], ["DAI"]), "lends USD only"),
        (lambda: RULES["compound"][0].params(["SOL"], ["USD"]), "does not accept SOL"),
        (lambda: Morpho(lltv={"default": 0.8}), "markets can only be made"),
        (lambda: Morpho(lltv={"ETH": 0.86}), "must be named collateral/debt"),
        (lambda: RULES["morpho"][0].params(["ETH", "BTC"], ["USD"]), "exactly one"),
        (lambda: Morpho(lltv={"ETH/USD": 0.86}).params(["BTC"], ["USD"]), "has no market BTC/USD"),
        (lambda: Vault(liquidation_ratio={"ETH": 1.1}), "at least chop"),
        (lambda: Vault(liquidation_ratio={"ETH": 1.5}, cut=1.0), "cut"),
        (lambda: Vault(liquidation_ratio={"ETH": 1.5}, hole_usd=0.0), "hole_usd"),
        (lambda: Vault(liquidation_ratio={"ETH": 1.5}).params(["BTC"], ["DAI"]), "no vault for BTC"),
        (lambda: Vault(liquidation_ratio={"ETH": 1.5}).params(["ETH"], ["LUSD"]), "lends DAI only"),
        (lambda: Liquity(3, {"ETH": 1.1}), "must be 1 or 2"),
        (lambda: Liquity(1, {"ETH": 1.6}), "critical_ratio"),
        (lambda: Liquity(1, {"ETH": 1.1}, pool_usd=-1.0), "pool_usd"),
        (lambda: Liquity(1, {"ETH": 1.1}).params(["BTC"], ["LUSD"]), "does not accept BTC"),
    ],
)
def test_broken_rules_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


# Shipped venues.


def test_shipped_aave_is_the_snapshot(shared):
    rows = [line.split(",") for line in (shared / "data" / "aave_v3_reserves_20231031.csv").read_text().splitlines()]
    table = {(r[0], r[1]): dict(zip(rows[0], r, strict=True)) for r in rows[1:]}
    rule = load("aave_v3")
    names = {"ETH": "WETH", "BTC": "WBTC"}
    for asset in ("ETH", "BTC", "LINK", "USDC", "USDT", "DAI", "wstETH"):
        row = table["Ethereum", names.get(asset, asset)]
        for key, column in (
            ("ltv", "ltv"),
            ("liquidation_threshold", "liquidation_threshold"),
            ("liquidation_bonus", "liquidation_bonus"),
            ("liquidation_protocol_fee", "liq_protocol_fee"),
            ("reserve_factor", "reserve_factor"),
        ):
            assert rule.value(key, asset) == float(row[column]), (asset, key)
        curve = dict(optimal="optimal_usage", base="base_rate", slope1="slope1", slope2="slope2")
        assert rule.rate_curve[asset] == {key: float(row[column]) for key, column in curve.items()}
    emode = rule.emodes["eth_correlated"]
    line = next(
        line for line in (shared / "data" / "aave_v3_emodes_20231031.csv").read_text().splitlines()
        if line.startswith("Ethereum,1,")
    )  # fmt: skip
    assert [emode[k] for k in ("ltv", "liquidation_threshold", "liquidation_bonus")] == [
        float(x) for x in line.split(",")[3:]
    ]


@pytest.mark.parametrize(
    ("name", "collateral", "debt"),
    [
        ("aave_v3", ["ETH", "BTC"], ["USDC", "ETH"]),
        ("compound_v3", ["ETH", "BTC"], ["USDC"]),
        ("morpho_blue", ["wstETH"], ["USDC"]),
        ("maker_eth_a", ["ETH"], ["DAI"]),
        ("liquity_v1", ["ETH"], ["LUSD"]),
        ("liquity_v2", ["wstETH"], ["BOLD"]),
    ],
)
def test_shipped_rules_give_parameters_and_liquidate(name, collateral, debt):
    rule = load(name)
    params = rule.params(collateral, debt, capital=1e6)
    values, debts = ([jnp.ones((2,), jnp.float32)] * len(x) for x in (collateral, debt))
    scale = 2.0 / len(debt)
    got = rule.liquidate(params, values, [scale * d for d in debts])
    assert np.all(np.asarray(rule.log_health(params, values, [scale * d for d in debts])) < 0.0)
    assert np.all(np.asarray(sum(got.seized)) > 0.0)
    assert rule.source and rule.as_of


def test_vault_module_shares_the_interface():
    assert Vault.liquidate is vault.liquidate and HealthFactor.log_health is health_factor.log_health
