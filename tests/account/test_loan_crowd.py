"""A crowd of loans: each loan is the account of one loan, sums are sums, and what tables can get wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, lending

from qpo_sim.account.lending_crowd import loan_crowd
from qpo_sim.book import build_book
from qpo_sim.compute.loan_crowd import simulate_crowd
from qpo_sim.errors import InputError
from qpo_sim.market import gbm
from qpo_sim.simulate import Plan, simulate_paths
from qpo_sim.venue import load

ASSETS = ("ETH", "BTC")
POOL = lending(
    liquidation_threshold={"ETH": 0.83, "BTC": 0.78},
    liquidation_bonus={"ETH": 0.05, "BTC": 0.08},
    ltv={"ETH": 0.8, "BTC": 0.73},
    liquidation_protocol_fee={"default": 0.1},
    borrow_rate_per_year=0.3,
)
CAPITAL, N = 1e4, 512
PLAN = Plan(20, monitoring="step")


def market(dtype=F64):
    return gbm(ASSETS, [1.2, 1.0], [[1.0, 0.5], [0.5, 1.0]], drift="historical", mean_per_year=-2.0, dtype=dtype)


def table(n=100, seed=0):
    """Loans of one to two collaterals and debts, of 100 to 1 000 000 USD, some of them without debt."""
    rng = np.random.default_rng(seed)
    size, share = 10.0 ** rng.uniform(2.0, 6.0, n), rng.choice([0.0, 1.0, 0.4], n)
    collateral = {"ETH": size * share, "BTC": size * (1.0 - share)}
    limit = 0.83 * collateral["ETH"] + 0.78 * collateral["BTC"]
    debt = limit / rng.uniform(1.01, 2.0, n) * (rng.uniform(size=n) > 0.1)
    in_btc = rng.choice([0.0, 0.3], n)
    return collateral, {"USD": debt * (1.0 - in_btc), "BTC": debt * in_btc}


@pytest.mark.parametrize(
    ("collateral", "debt", "gas_usd"),
    [
        ({"ETH": 6000.0}, {"USD": 4400.0}, 0.0),
        ({"ETH": 3000.0}, {"BTC": 2000.0}, 0.0),
        ({"BTC": 2100.0}, {"USD": 1500.0}, 0.0),
        ({"ETH": 6000.0}, {"USD": 4400.0}, 150.0),
    ],
)
def test_a_loan_of_the_crowd_is_the_account_of_one_loan(collateral, debt, gas_usd):
    """Path by path, to rounding: half and whole liquidations, small positions, dust, interest, gas that is too dear."""
    account = dict(kind="lending", name="loan", venue=POOL, liquidation_gas_usd=gas_usd)
    account |= {"collateral": {k: v / CAPITAL for k, v in collateral.items()}}
    account |= {"debt": {k: v / CAPITAL for k, v in debt.items()}}
    book = build_book(ASSETS, capital=CAPITAL, accounts=[account], dtype=F64)
    alone = simulate_paths(market(), book, N, PLAN, seed=7)
    columns = ({k: [v] for k, v in side.items()} for side in (collateral, debt))
    crowd = loan_crowd(POOL, *columns, assets=ASSETS, liquidation_gas_usd=gas_usd, dtype=F64)
    result = simulate_crowd(market(), crowd, PLAN, N, seed=7, chunk=200)
    hits = np.asarray(alone.is_liquidated[0], float)
    assert 0.05 < hits.mean() < 0.95
    assert result.probability.value[0] == pytest.approx(hits.mean(), abs=1e-12)
    np.testing.assert_array_equal(result.repaid > 0.0, hits > 0.0)
    # What is seized beyond what is repaid, less bad debt, is the cost to the holder.
    accounts = {name: np.asarray(row) * CAPITAL for name, row in alone.accounts.items()}
    np.testing.assert_allclose(
        result.lost - (result.seized - result.repaid), accounts["liquidation"] + accounts["fees"], atol=1e-8
    )
    assert result.bad_debt.value[0] == pytest.approx(result.lost.mean(), rel=1e-12)
    assert result.bad_debt.std_error[0] == pytest.approx(result.lost.std(ddof=1) / np.sqrt(N), rel=1e-9)


@pytest.mark.slow
def test_a_crowd_is_the_sum_of_its_loans_in_any_order_and_chunk():
    collateral, debt = table()
    whole = simulate_crowd(market(), loan_crowd(POOL, collateral, debt, assets=ASSETS, dtype=F64), PLAN, N, seed=3)
    assert 0.1 < whole.probability.value.mean() < 0.9 and whole.lost.max() > 0.0
    assert not whole.probability.value[sum(debt.values()) == 0.0].any()
    assert whole.bad_debt.value.sum() == pytest.approx(whole.lost.mean(), rel=1e-12)
    parts = []
    for rows in (np.arange(60)[::-1], np.arange(60, 100)):
        sides = ({k: v[rows] for k, v in side.items()} for side in (collateral, debt))
        crowd = loan_crowd(POOL, *sides, assets=ASSETS, dtype=F64)
        parts.append(simulate_crowd(market(), crowd, PLAN, N, seed=3, chunk=100))
    a, b = parts
    for key in ("repaid", "seized", "lost"):
        np.testing.assert_allclose(getattr(a, key) + getattr(b, key), getattr(whole, key), rtol=1e-9, atol=1e-6)
    for key in ("probability", "bad_debt"):
        for k in (0, 1):
            joined = np.concatenate([getattr(a, key)[k][::-1], getattr(b, key)[k]])
            np.testing.assert_allclose(joined, getattr(whole, key)[k], rtol=1e-9, atol=1e-9)


def test_single_precision_is_the_same_crowd():
    collateral, debt = table(seed=1)
    single, double = (
        simulate_crowd(market(dtype), loan_crowd(POOL, collateral, debt, assets=ASSETS, dtype=dtype), PLAN, N, seed=2)
        for dtype in (jnp.float32, F64)
    )
    # A health within rounding of 1 falls on the other side on a few of 512 paths at most.
    np.testing.assert_allclose(single.probability.value, double.probability.value, atol=2.5 / N)
    for key in ("repaid", "seized", "lost"):
        one, other = getattr(single, key), getattr(double, key)
        assert np.quantile(np.abs(one - other), 0.98) < 1e-4 * other.max()


def test_coins_and_a_data_frame():
    pandas = pytest.importorskip("pandas")
    values = loan_crowd(POOL, {"ETH": [4000.0]}, {"USD": [2500.0]}, assets=ASSETS, dtype=F64)
    coins = loan_crowd(
        POOL,
        pandas.DataFrame({"ETH": [2.0]}),
        pandas.DataFrame({"USDC": [2500.0]}),
        assets=ASSETS,
        prices={"ETH": 2000.0},
        in_coins=True,
        dtype=F64,
    )
    np.testing.assert_array_equal(coins.collateral, values.collateral)
    np.testing.assert_array_equal(coins.debt, values.debt)


@pytest.mark.parametrize(
    ("collateral", "debt", "options", "words"),
    [
        ({}, {"USD": [1.0]}, {}, "collateral is empty"),
        ({"ETC": [1.0]}, {"USD": [1.0]}, {}, "did you mean 'ETH'"),
        ({"ETH": [1.0, 2.0]}, {"USD": [1.0]}, {}, "2 loans and debt 1"),
        ({"ETH": [1.0, 2.0], "BTC": [1.0]}, {"USD": [1.0]}, {}, "one number per loan"),
        ({"ETH": [1.0, -2.0]}, {"USD": [1.0, 1.0]}, {}, r"collateral.ETH\[1\] is -2"),
        ({"USD": [1.0]}, {"USD": [1.0]}, {}, "collateral is in USD"),
        ({"ETH": [1.0]}, {"USD": [1.0]}, {"in_coins": True}, "starting price of ETH"),
        ({"ETH": [1.0]}, {"USD": [1.0]}, {"emode": "eth"}, "no e-mode"),
        ({"ETH": [1.0]}, {"USD": [1.0]}, {"venue": load("maker_eth_a")}, "health-factor rule"),
    ],
)
def test_refused_tables(collateral, debt, options, words):
    venue = options.pop("venue", POOL)
    with pytest.raises(InputError, match=words):
        loan_crowd(venue, collateral, debt, assets=ASSETS, **options)


def test_refused_runs():
    crowd = loan_crowd(POOL, {"ETH": [2.0]}, {"USD": [1.0]}, assets=ASSETS, dtype=F64)
    with pytest.raises(InputError, match="monitoring"):
        simulate_crowd(market(), crowd, Plan(4), 100)
    with pytest.raises(InputError, match="the market has X"):
        simulate_crowd(gbm(["X"], [0.5], dtype=F64), crowd, PLAN, 100)
    with pytest.raises(InputError, match="at least 2 paths"):
        simulate_crowd(market(), crowd, PLAN, 1)
