"""Staked tokens in a book: rewards, discounts and trades."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64

from qpo_sim.account.staked import staked
from qpo_sim.book import build_book
from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.errors import InputError
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import gbm
from qpo_sim.market.side import gas
from qpo_sim.market.side.peg import peg
from qpo_sim.policy.orders import Order
from qpo_sim.simulate import Plan, market_paths, simulate_paths

STETH = dict(kind="staked", name="stake", asset="ETH", token="stETH", value=0.5, reward_per_year=0.04)
POOL = dict(kind="pool", name="lp", coins=["ETH", "USD"], value=0.5, fee=0.003)
N, PLAN = 64, Plan(10)


def _market(*side):
    return dataclasses.replace(gbm(("ETH",), [0.8], dtype=F64), side=side)


def _book(**change):
    return build_book(("ETH",), capital=1e6, accounts=[{**STETH, **change}], dtype=F64)


def test_without_a_market_for_the_token_it_is_the_asset_and_its_rewards():
    market = _market()
    outcome = simulate_paths(market, _book(), N, PLAN)
    price = np.exp(np.asarray(market_paths(market, N, PLAN).log_price))[-1, 0]
    grown = 1.04 ** (10.0 / 365.0)
    np.testing.assert_allclose(outcome.equity[-1], 0.5 + 0.5 * grown * price, rtol=1e-13)


def test_discount_goes_to_price_and_rewards_to_income():
    market = _market(peg(("stETH",), deviation=0.01, depeg_per_year=10.0, dtype=F64))
    record = market_paths(market, N, PLAN)
    price = np.vstack([np.ones(N), np.exp(np.asarray(record.log_price))[:, 0]])
    discount = np.vstack([np.ones(N), np.asarray(record.side["peg"])[:, 0]])
    amount = 0.5 * 1.04 ** (np.arange(11) / 365.0)[:, None]
    book = _book()
    outcome = simulate_paths(market, book, N, PLAN)
    np.testing.assert_allclose(outcome.equity[-1], 0.5 + (amount * price * discount)[-1], rtol=1e-13)
    income = np.sum(np.diff(amount, axis=0) * (price * discount)[1:], axis=0)
    np.testing.assert_allclose(outcome.accounts["income"], income, rtol=1e-12)
    asset, depeg, rest = np.asarray(outcome.components)
    assert [label for label, _ in book.components] == ["ETH staked", "stETH discount", "everything else"]
    np.testing.assert_allclose(depeg, np.sum(amount[:-1] * price[1:] * np.diff(discount, axis=0), axis=0), atol=1e-14)
    np.testing.assert_allclose(rest, income, rtol=1e-12)
    gain = np.asarray(outcome.equity[-1]) - 1.0
    np.testing.assert_allclose(asset + depeg + rest, gain, atol=1e-14)
    np.testing.assert_allclose(sum(np.asarray(outcome.accounts[a]) for a in ACCOUNTS), gain, atol=1e-14)


def _state(gas_now):
    account = staked(
        name="s", asset="ETH", token="stETH", value=0.5, gas_usd=500.0, trading_cost=0.001, assets=("ETH",),
        capital=1e6, dtype=F64,
    )  # fmt: skip
    context = type("Context", (), {"market": type("M", (), {"side": ()})()})
    scene = Scene((jnp.ones(2),), jnp.zeros(1), {"gas": jnp.full(2, 3.0)})
    state = account.init(context, scene, None)
    return account, state._replace(price=jnp.full(2, 1.5), underlying=jnp.full(2, 1.6), gas=jnp.full(2, gas_now)), scene


def test_orders_trade_at_the_discounted_price_with_gas_and_costs():
    account, state, scene = _state(2.0)
    state, _ = account.fill(state, scene, Order())
    before = np.asarray(state.status.equity)
    np.testing.assert_allclose(before, 0.75)
    sold, moved = account.fill(state, scene, Order(keep=jnp.array([0.2, 1.0])))
    np.testing.assert_allclose(moved, [-(0.6 - 0.001 - 0.0006), 0.0], atol=1e-15)
    np.testing.assert_allclose(sold.amount, [0.1, 0.5], rtol=1e-14)
    for amount in ([0.3, 0.0], [-0.3, -5.0], [0.0005, -1e-4]):
        after, moved = account.fill(state, scene, Order(transfer=jnp.array(amount)))
        change = np.asarray(after.status.equity) - before
        np.testing.assert_allclose(change, np.asarray(moved + after.status.booking.trading), atol=1e-15)
        assert np.all(np.asarray(after.amount) >= 0.0)


def test_a_policy_without_anything_to_do_costs_no_gas():
    market = _market(gas.example(1, dtype=F64))
    description = dict(kind="top_up", account="stake", trigger=0.9, target=0.5)
    book = build_book(("ETH",), capital=1e6, accounts=[dict(STETH, gas_usd=100.0)], policies=[description], dtype=F64)
    still = simulate_paths(market, _book(), N, PLAN)
    np.testing.assert_allclose(simulate_paths(market, book, N, PLAN).equity, still.equity, atol=1e-14)


@pytest.mark.parametrize("described", [STETH, dict(POOL, type="weighted", weights=[0.3, 0.7])])
def test_gas_of_the_market_scales_what_a_trade_costs(described):
    """A kill switch closes the account once: its gas is that of the step over that of the start."""
    market = _market(gas.example(1, dtype=F64))
    switch = dict(kind="kill_switch", drawdown=0.01)
    accounts = [dict(described, gas_usd=1000.0)]
    outcome = simulate_paths(
        market, build_book(("ETH",), capital=1e6, accounts=accounts, policies=[switch], dtype=F64), N, PLAN
    )
    level = np.asarray(market_paths(market, N, PLAN).side["gas"]).reshape(10, N)
    start = np.exp(float(market.side[0].initial[0]))
    equity = np.vstack([np.ones(N), np.asarray(outcome.equity)])
    trading = np.asarray(outcome.accounts["trading"])
    closed = np.flatnonzero(trading < 0.0)
    assert closed.size > N / 2
    last = np.array([np.flatnonzero(np.diff(equity[:, path]) != 0.0)[-1] for path in closed])
    np.testing.assert_allclose(trading[closed], -1e-3 * level[last, closed] / start, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(asset="BTC"), "asset is 'BTC'"),
        (dict(token="ETH"), "hold it as spot"),
        (dict(value=-0.1), "value is -0.1"),
        (dict(reward_per_year=-1.0), "reward_per_year is -1"),
        (dict(gas_usd=-1.0), "gas_usd is -1"),
        (dict(trading_cost=1.0), "trading_cost is 1"),
    ],
)
def test_refuses(change, words):
    with pytest.raises(InputError, match=words):
        _book(**change)
