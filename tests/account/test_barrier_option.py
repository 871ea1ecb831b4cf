"""Barrier options in a book: fair on average, knocked along the path, and every unit of money accounted for."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, assert_mc

from qpo_sim.account.barrier_option import barrier_option
from qpo_sim.book import build_book
from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.errors import InputError
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import gbm
from qpo_sim.policy.orders import Order
from qpo_sim.simulate import Plan, market_paths, simulate_paths

VOLATILITY, N, PLAN = 0.8, 256, Plan(20)
CALL = dict(kind="barrier_option", name="knock", asset="A", type="call", knock="out", moneyness=1.0, barrier=1.25,
            days=20.0, premium=0.3, volatility=VOLATILITY)  # fmt: skip
KINDS = [
    dict(CALL),
    dict(CALL, knock="in"),
    dict(CALL, type="put", barrier=0.85),
    dict(CALL, type="put", knock="in", barrier=0.85, moneyness=1.05),
]


def _run(description, *, n=N, plan=PLAN, policies=(), dtype=F64):
    market = gbm(("A",), [VOLATILITY], dtype=dtype)
    book = build_book(("A",), accounts=[description], policies=list(policies), dtype=dtype)
    return simulate_paths(market, book, n, plan, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("description", KINDS)
def test_fair_premium_and_conservation(description):
    """Prices without drift: the mean of the terminal equity is 1 at any step; false alarm 6e-5 each."""
    outcome = _run(description, n=20_000)
    gain = np.asarray(outcome.equity[-1]) - 1.0
    assert_mc(gain, 0.0)
    np.testing.assert_allclose(sum(np.asarray(outcome.accounts[a]) for a in ACCOUNTS), gain, atol=1e-12)
    np.testing.assert_allclose(np.asarray(outcome.components).sum(axis=0), gain, atol=1e-12)
    # Fair at every date between as well, which ties the mark to the draws.
    assert_mc(np.asarray(outcome.equity[9]) - 1.0, 0.0)


def test_payoffs_at_step_ends_against_the_prices():
    plan = Plan(20, monitoring="step")
    prices = np.exp(np.asarray(market_paths(gbm(("A",), [VOLATILITY], dtype=F64), N, plan, seed=2).log_price))[:, 0]
    touched = np.any(prices >= 1.25, axis=0)
    assert 20 < touched.sum() < N - 20
    payoff = np.maximum(prices[-1] - 1.0, 0.0)
    by_kind = []
    for knock in ("out", "in"):
        outcome = _run(dict(CALL, knock=knock), plan=plan)
        paid = np.asarray(outcome.equity[-1]) - 0.7
        lives = touched if knock == "in" else ~touched
        np.testing.assert_array_equal(paid > 1e-12, lives & (payoff > 0.0))
        by_kind.append(paid / np.where(payoff > 0.0, payoff, 1.0))
        units = by_kind[-1][lives & (payoff > 0.0)]
        np.testing.assert_allclose(units, units[0], rtol=1e-10)


@pytest.mark.slow
def test_in_and_out_together_are_the_option_without_barrier():
    units = {}
    for knock in ("out", "in"):
        known = {key: value for key, value in dict(CALL, knock=knock).items() if key != "kind"}
        account = barrier_option(**known, assets=("A",), prices={}, dtype=F64)
        scene = Scene((jnp.ones(1),), jnp.zeros(1), {})
        units[knock] = float(account.init(None, scene, None).units[0])
    out, knocked_in = (
        (np.asarray(_run(dict(CALL, knock=knock)).equity[-1]) - 0.7) / units[knock] for knock in ("out", "in")
    )
    prices = np.exp(np.asarray(market_paths(gbm(("A",), [VOLATILITY], dtype=F64), N, PLAN, seed=2).log_price))
    np.testing.assert_allclose(out + knocked_in, np.maximum(prices[-1, 0] - 1.0, 0.0), atol=1e-12)


def test_orders_and_delta():
    known = {key: value for key, value in dict(CALL, trading_cost=0.01).items() if key != "kind"}
    account = barrier_option(**known, assets=("A",), prices={}, dtype=F64)
    one = jnp.ones(3)
    scene = Scene((jnp.array([0.9, 1.1, 1.1]),), jnp.full(1, 5.0 / 365.0), {})
    state = account.init(None, Scene((one,), jnp.zeros(1), {}), None)
    state = state._replace(is_untouched=jnp.array([1.0, 1.0, 0.0]), cash=0.1 * one)
    state, _ = account.fill(state, scene, Order())
    before = np.asarray(state.status.equity)
    for order in (Order(keep=0.3 * one), Order(transfer=0.2 * one), Order(transfer=-0.05 * one)):
        after, moved = account.fill(state, scene, order)
        change = np.asarray(after.status.equity) - before
        np.testing.assert_allclose(change, np.asarray(moved + after.status.booking.trading), atol=1e-15)
    # One that has been knocked out is not bought.
    assert float(account.fill(state, scene, Order(transfer=0.2 * one))[1][2]) == 0.0
    delta, h = np.asarray(account.view(state, scene).delta[0]), 1e-6
    up, down = (
        np.asarray(state.units * account.mark(scene._replace(prices=(scene.prices[0] * f,)), state.is_untouched))
        for f in (1.0 + h, 1.0 - h)
    )
    np.testing.assert_allclose(delta, (up - down) / (2.0 * h), rtol=1e-6, atol=1e-9)


def test_kill_switch_closes_it():
    switch = dict(kind="kill_switch", drawdown=0.05)
    equity = np.asarray(_run(dict(CALL), policies=[switch]).equity)
    assert np.mean(np.diff(equity, axis=0)[-1] == 0.0) > 0.5


@pytest.mark.slow
def test_single_precision_agrees_with_double():
    narrow, wide = _run(KINDS[3], dtype=jnp.float32), _run(KINDS[3])
    np.testing.assert_allclose(narrow.equity[-1], wide.equity[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(asset="B"), "asset is 'B'"),
        (dict(type="calls"), "type is 'calls'"),
        (dict(knock="up"), "knock is 'up'"),
        (dict(strike=5.0), "either strike in USD or moneyness"),
        (dict(moneyness=None, strike=5.0), "needs the starting price"),
        (dict(barrier=1.0), "touched at once"),
        (dict(barrier=1.2, moneyness=1.3), "too little to be bought"),
        (dict(days=0.0), "days is 0"),
        (dict(premium=-0.1), "premium is -0.1"),
        (dict(trading_cost=1.0), "trading_cost is 1"),
    ],
)
def test_refuses(change, words):
    with pytest.raises(InputError, match=words):
        _run({**CALL, **change})
