"""Pool shares in a book: value as a function of the end prices, income, and where every unit of money goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, assert_mc
from scipy import integrate, optimize

from qpo_sim.book import build_book
from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.errors import InputError
from qpo_sim.instrument.scene import Scene
from qpo_sim.market import gbm
from qpo_sim.market.side.peg import peg
from qpo_sim.policy.orders import Order
from qpo_sim.simulate import Plan, market_paths, simulate_paths

ASSETS = ("ETH", "BTC")
VOL = np.array([0.9, 0.6])
N, T = 256, 12
KINDS = {
    "constant_product": dict(type="constant_product", coins=["ETH", "USD"]),
    "weighted": dict(type="weighted", coins=["ETH", "BTC", "USD"], weights=[0.5, 0.3, 0.2]),
    "stableswap": dict(type="stableswap", coins=["USDC", "USDe"], amplification=50.0),
    "concentrated": dict(type="concentrated", coins=["ETH", "USDC"], range=[0.8, 1.3]),
}


def _market(with_peg=False, drift=0.0, volatility=VOL, step_hours=24.0, dtype=F64):
    market = gbm(
        ASSETS, volatility, np.array([[1.0, 0.6], [0.6, 1.0]]), per_year=drift, step_hours=step_hours, dtype=dtype
    )
    if not with_peg:
        return market
    coins = peg(("USDC", "USDe"), deviation=0.01, depeg_per_year=5.0, depth=(4.0, 8.0), dtype=dtype)
    return dataclasses.replace(market, side=(coins,))


def _book(*descriptions, dtype=F64, **options):
    rows = [dict(kind="pool", name=f"pool{k}", **{"value": 0.4, "fee": 0.003, **d}) for k, d in enumerate(descriptions)]
    return build_book(ASSETS, capital=1e6, accounts=rows, dtype=dtype, **options)


def _run(market, book, n_steps=T, n=N, seed=3, **plan):
    return simulate_paths(market, book, n, Plan(n_steps, market.step_hours, **plan), seed=seed)


def _prices(market, n_steps=T, n=N, seed=3):
    record = market_paths(market, n, Plan(n_steps, market.step_hours), seed=seed)
    return np.exp(np.asarray(record.log_price)), record


def _stableswap_value(prices, amplification, n=2):
    """Value of a share of D = 1: the cheapest point of the invariant, found by a root search over the first balance."""
    alpha = amplification * n**n

    def other(x):
        # alpha (x + y) + 1 = alpha + 1 / (4 x y)
        return optimize.brentq(lambda y: alpha * (x + y) + 1.0 - alpha - 1.0 / (n**n * x * y), 1e-12, 1e3, xtol=1e-15)

    best = optimize.minimize_scalar(
        lambda x: prices[0] * x + prices[1] * other(x), bounds=(1e-6, 5.0), method="bounded", options={"xatol": 1e-10}
    )
    return best.fun


@pytest.mark.parametrize("kind", KINDS)
def test_sum_of_accounts_and_components_is_the_change_of_equity(kind):
    market = _market(with_peg=True)
    outcome = _run(market, _book(dict(**KINDS[kind], turnover_per_day=0.5)))
    gain = np.asarray(outcome.equity[-1]) - 1.0
    total = sum(np.asarray(outcome.accounts[name]) for name in ACCOUNTS)
    np.testing.assert_allclose(total, gain, atol=1e-12)
    np.testing.assert_allclose(np.asarray(outcome.components).sum(axis=0), gain, atol=1e-12)
    assert np.all(np.asarray(outcome.accounts["income"]) > 0.0)


def test_start_is_the_money_spent_for_every_curve():
    book = _book(*(dict(d, value=0.2) for d in KINDS.values()))
    assert float(book.cash) == pytest.approx(0.2, abs=1e-12)
    assert book.account_names == ()
    outcome = _run(_market(volatility=[1e-9, 1e-9]), book, n_steps=1)
    np.testing.assert_allclose(outcome.equity[-1], 1.0, atol=1e-9)


def test_share_without_fees_is_the_closed_form_of_the_end_prices():
    market = _market()
    prices, _ = _prices(market)
    eth, btc = prices[-1]
    closed = {
        "constant_product": np.sqrt(eth),
        "weighted": eth**0.5 * btc**0.3,
        "stableswap": np.ones(N),
        "concentrated": None,
    }
    lower, upper = 0.8, 1.3
    liquidity = 1.0 / ((1.0 - 1.0 / np.sqrt(upper)) + (1.0 - np.sqrt(lower)))
    inside = np.sqrt(np.clip(eth, lower, upper))
    base, quote = liquidity * (1.0 / inside - 1.0 / np.sqrt(upper)), liquidity * (inside - np.sqrt(lower))
    closed["concentrated"] = base * eth + quote
    for kind, factor in closed.items():
        outcome = _run(market, _book(dict(KINDS[kind], fee=0.0, arbitrage_share=1.0)))
        np.testing.assert_allclose(np.asarray(outcome.equity[-1]) - 0.6, 0.4 * factor, rtol=1e-12, err_msg=kind)


def test_stableswap_with_a_depegged_coin_is_the_cheapest_point_of_its_curve():
    market = _market(with_peg=True)
    _, record = _prices(market)
    pegs = np.asarray(record.side["peg"])[-1]
    assert pegs.min() < 0.9
    outcome = _run(market, _book(dict(KINDS["stableswap"], fee=0.0, arbitrage_share=1.0)))
    worth = (np.asarray(outcome.equity[-1]) - 0.6) / 0.4
    for path in np.argsort(pegs.min(axis=0))[:5]:
        assert worth[path] == pytest.approx(_stableswap_value(pegs[:, path], 50.0), rel=1e-7)


def test_impermanent_loss_is_that_of_the_coins_put_in():
    market = _market()
    prices, _ = _prices(market)
    eth = prices[-1, 0]
    book = _book(dict(KINDS["constant_product"], fee=0.0, arbitrage_share=1.0))
    outcome = _run(market, book)
    held, dollars, loss, rest = np.asarray(outcome.components)
    assert [label for label, _ in book.components] == ["ETH held", "USD held", "impermanent loss", "everything else"]
    np.testing.assert_allclose(held, 0.2 * (eth - 1.0), atol=1e-12)
    np.testing.assert_allclose(dollars, 0.0, atol=1e-15)
    np.testing.assert_allclose(loss, 0.4 * (np.sqrt(eth) - 0.5 * (1.0 + eth)), atol=1e-12)
    np.testing.assert_allclose(rest, 0.0, atol=1e-15)


def _loop(eth, volatility_step, *, fee, turnover, move_share, block_hours, compounds, step_hours=24.0):
    """One constant-product share of ETH and USD, worth 0.4 at the start, by a loop in NumPy."""
    liquidity, beside, income = np.ones_like(eth[0]), np.zeros_like(eth[0]), np.zeros_like(eth[0])
    before = np.ones_like(eth[0])
    per_block = volatility_step / np.sqrt(step_hours) * np.sqrt(block_hours)
    kept = per_block / (per_block - np.sqrt(2.0) * np.log(1.0 - fee))
    for after in eth:
        start, end = 0.4 * liquidity * np.sqrt(before), 0.4 * liquidity * np.sqrt(after)
        base = 0.2 * liquidity / np.sqrt(before)
        loss = base * (after - before) - (end - start)
        move = np.abs(np.log(after / before)) / volatility_step
        volume = turnover * step_hours / 24.0 * start * (1.0 - move_share + move_share * np.sqrt(np.pi / 2.0) * move)
        earned = fee * volume + (1.0 - kept) * loss
        income = income + earned
        if compounds:
            liquidity = liquidity * (1.0 + earned / end)
        else:
            beside = beside + earned
        before = after
    return 0.4 * liquidity * np.sqrt(before) + beside, income


@pytest.mark.parametrize("compounds", [True, False])
def test_income_against_a_loop_on_the_same_prices(compounds):
    market = _market()
    prices, _ = _prices(market)
    description = dict(
        KINDS["constant_product"], turnover_per_day=0.7, move_share=0.3, block_seconds=6.0, compounds=compounds
    )
    outcome = _run(market, _book(description))
    worth, income = _loop(
        prices[:, 0], VOL[0] * np.sqrt(24.0 / 8760.0), fee=0.003, turnover=0.7, move_share=0.3,
        block_hours=6.0 / 3600.0, compounds=compounds,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(outcome.equity[-1]) - 0.6, worth, rtol=1e-12)
    np.testing.assert_allclose(outcome.accounts["income"], income, rtol=1e-12)


@pytest.mark.parametrize("kind", ["constant_product", "concentrated"])
def test_mean_impermanent_loss_is_the_integral_of_the_lvr_rate(kind):
    """Without drift E[loss] is the time integral of E[sigma^2 P^2 |x'| / 2]; false alarm 6e-5."""
    market = _market()
    n, years = 20_000, T * 24.0 / 8760.0
    outcome = _run(market, _book(dict(KINDS[kind], fee=0.0, arbitrage_share=1.0)), n=n)
    loss = -np.asarray(outcome.components)[2]
    lower, upper = 0.8, 1.3
    if kind == "constant_product":
        # V/8 sigma^2 with E[sqrt P] = exp(-sigma^2 t / 8).
        expected = 0.4 * -np.expm1(-(VOL[0] ** 2) * years / 8.0)
    else:
        liquidity = 0.4 / ((1.0 - 1.0 / np.sqrt(upper)) + (1.0 - np.sqrt(lower)))

        def rate(z, t):
            price = np.exp(-0.5 * VOL[0] ** 2 * t + VOL[0] * np.sqrt(t) * z)
            inside = (price >= lower) & (price < upper)
            return (
                inside * 0.25 * liquidity * VOL[0] ** 2 * np.sqrt(price) * np.exp(-0.5 * z * z) / np.sqrt(2.0 * np.pi)
            )

        grid_z, grid_t = np.linspace(-8.0, 8.0, 4001), np.linspace(1e-9, years, 401)
        inner = [integrate.simpson(rate(grid_z, t), x=grid_z) for t in grid_t]
        expected = integrate.simpson(inner, x=grid_t)
    assert_mc(loss, expected)


def test_arbitrage_share_one_and_zero_bound_the_share():
    market = _market()
    kept = _run(market, _book(dict(KINDS["constant_product"], arbitrage_share=1.0))).equity[-1]
    given_back = _run(market, _book(dict(KINDS["constant_product"], arbitrage_share=0.0))).equity[-1]
    between = _run(market, _book(dict(KINDS["constant_product"]))).equity[-1]
    assert np.all(np.asarray(kept) < np.asarray(between)) and np.all(np.asarray(between) < np.asarray(given_back))


def test_concentrated_share_out_of_its_range_earns_nothing_more():
    market = _market(drift=-8.0)
    prices, _ = _prices(market, n_steps=20)
    outcome = _run(market, _book(dict(KINDS["concentrated"], turnover_per_day=1.0)), n_steps=20, attribution=True)
    shorter = _run(market, _book(dict(KINDS["concentrated"], turnover_per_day=1.0)), n_steps=14)
    left = np.all(prices[13:, 0] < 0.8, axis=0)
    assert left.sum() > 50
    np.testing.assert_allclose(
        np.asarray(outcome.accounts["income"])[left], np.asarray(shorter.accounts["income"])[left], rtol=1e-13
    )


def _account_and_state(kind, prices, **options):
    book = _book(dict(KINDS[kind], **options))
    account = book.holdings[0]
    context = type("Context", (), {"market": type("M", (), {"side": ()})()})
    scene = Scene(tuple(jnp.full(2, p) for p in prices), jnp.zeros(1), {})
    start = Scene((jnp.ones(2), jnp.ones(2)), jnp.zeros(1), {})
    state = account.init(context, start, None)
    moved = state._replace(price=account.prices(context, scene))
    return account, account._with_equity(moved), scene


@pytest.mark.parametrize("kind", ["constant_product", "weighted", "concentrated"])
def test_delta_is_the_derivative_of_the_value(kind):
    account, state, scene = _account_and_state(kind, (1.1, 0.9))
    delta = account.view(state, scene).delta
    for k, asset in enumerate(account.assets):
        h, worth = 1e-6, []
        for sign in (1.0, -1.0):
            prices = [1.1, 0.9]
            prices[asset] *= 1.0 + sign * h
            worth.append(_account_and_state(kind, prices)[1].status.equity)
        np.testing.assert_allclose(delta[k], (worth[0] - worth[1]) / (2.0 * h), rtol=1e-8)


def test_orders_move_value_between_share_and_cash_less_their_costs():
    account, state, scene = _account_and_state("concentrated", (1.1, 1.0), gas_usd=1000.0, trading_cost=0.002)
    state = account._with_equity(state._replace(collected=jnp.full(2, 0.01)))
    before = np.asarray(state.status.equity)
    for order, paid in (
        (Order(keep=jnp.array([0.25, 1.0])), None),
        (Order(transfer=jnp.array([0.1, 0.0])), np.array([0.1, 0.0])),
        (Order(transfer=jnp.array([-0.1, 0.0])), None),
        (Order(transfer=jnp.array([-9.0, 1e-5])), None),
    ):
        after, moved = account.fill(state, scene, order)
        cost = -np.asarray(after.status.booking.trading)
        np.testing.assert_allclose(np.asarray(after.status.equity) - before, np.asarray(moved) - cost, atol=1e-14)
        if paid is not None:
            np.testing.assert_allclose(moved, paid)
            np.testing.assert_allclose(cost, [0.001 + 0.0002, 0.0], atol=1e-15)
    kept, moved = account.fill(state, scene, Order(keep=jnp.array([0.25, 1.0])))
    np.testing.assert_allclose(kept.status.equity, before * [0.25, 1.0], rtol=1e-14)
    np.testing.assert_allclose(moved, [-(0.75 * before[0] * 0.998 - 0.001), 0.0], rtol=1e-13)
    gone, _ = account.fill(state, scene, Order(transfer=jnp.array([-9.0, 1e-5])))
    # All of it can be taken out, and a transfer smaller than its gas buys nothing.
    np.testing.assert_allclose(gone.status.equity, [0.0, before[1]], atol=1e-15)


def test_gradient_of_the_terminal_equity_in_the_range_against_finite_differences():
    market, plan = _market(), Plan(4)
    book = _book(dict(KINDS["concentrated"], turnover_per_day=0.5))

    def mean(lower):
        account = dataclasses.replace(book.holdings[0], lower=lower)
        return jnp.mean(simulate_paths(market, dataclasses.replace(book, holdings=(account,)), 256, plan).equity[-1])

    with jax.default_matmul_precision("highest"):
        slope = jax.grad(mean)(jnp.asarray(0.8))
        h = 1e-6
        assert float(slope) == pytest.approx(float(mean(0.8 + h) - mean(0.8 - h)) / (2.0 * h), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_agrees_with_double(kind):
    wide = _run(_market(with_peg=True), _book(dict(**KINDS[kind], turnover_per_day=0.5)))
    market, book = (
        _market(with_peg=True, dtype=jnp.float32),
        _book(dict(**KINDS[kind], turnover_per_day=0.5), dtype=jnp.float32),
    )
    np.testing.assert_allclose(_run(market, book).equity[-1], wide.equity[-1], atol=2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(type="curve"), "type is 'curve'"),
        (dict(coins=["ETH", "USDX"]), "coins\\[1\\] is 'USDX'"),
        (dict(coins=["ETH", "USD", "BTC"]), "has two coins"),
        (dict(coins=["ETH", "ETH"]), "each coin once"),
        (dict(fee=1.0), "fee is 1"),
        (dict(value=0.0), "value is 0"),
        (dict(amplification=100.0), "amplification is given"),
        (dict(type="stableswap"), "amplification is missing"),
        (dict(type="weighted", weights=[0.5, 0.6]), "weights is"),
        (dict(type="concentrated", range=[1.2, 0.8]), "range is"),
        (dict(blocks="even"), "blocks is"),
        (dict(arbitrage_share=1.5), "arbitrage_share is 1.5"),
    ],
)
def test_refuses(change, words):
    with pytest.raises(InputError, match=words):
        _book({**KINDS["constant_product"], **change})
