"""Margin rules bound to the positions of an account: liquidation prices, initial margins, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, lending, tiered

from qpo_sim import venue
from qpo_sim.account.margin import margin
from qpo_sim.account.positions import held_of
from qpo_sim.book import build_book
from qpo_sim.book.liquidation_prices import liquidation_prices
from qpo_sim.errors import InputError
from qpo_sim.instrument import liquidation_price as closed
from qpo_sim.instrument.liquidation_price import Leg
from qpo_sim.instrument.scene import Scene
from qpo_sim.venue import TieredMargin, size_margin
from qpo_sim.venue.tiered_margin import TierSchedule

ASSETS, CAPITAL, PRICES = ("BTC", "ETH"), 4e6, {"BTC": 60_000.0, "ETH": 3_000.0}
PERPETUAL_VENUES = ("binance", "bybit", "okx", "hyperliquid", "dydx", "deribit_perpetual", "bitmex", "deribit")


def account_of(rule, balance, positions, **options):
    values = dict(assets=ASSETS, capital=CAPITAL, prices=PRICES, venue_of=venue.load, dtype=F64)
    return margin(name="x", venue=rule, balance=balance, positions=positions, **{**values, **options})


def at(account, *prices, years=0.0):
    """Distance, equity, requirement at relative prices (scalars or arrays)."""
    rows = tuple(jnp.atleast_1d(jnp.asarray(p, F64)) for p in np.broadcast_arrays(*prices))
    first = Scene(tuple(jnp.ones_like(r) for r in rows), jnp.zeros(1), {})
    scene, state = first._replace(prices=rows, years=jnp.full(1, years)), account.first(first, jnp.ones_like(rows[0]))
    return np.asarray(account.distance(state, scene)), np.asarray(account.equity(state, scene))


def crosses(account, price):
    """The distance is 0 at a relative price of the first asset and changes its sign there."""
    x, _ = at(account, price * np.array([1.0 - 1e-7, 1.0, 1.0 + 1e-7]), 1.0)
    assert abs(x[1]) < 1e-12 and x[0] * x[2] < 0.0, (price, x)


@pytest.mark.parametrize("name", PERPETUAL_VENUES)
@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("notional", [0.02, 1.5])
def test_linear_position_is_liquidated_at_the_closed_form(name, side, notional):
    rule, asset = venue.load(name), "BTC"
    entry, balance = 58_000.0, notional / 4.0
    position = dict(kind="linear", asset=asset, notional=side * notional, entry=entry)
    account = account_of(rule, {"USD": balance}, [position])
    coins = side * notional * CAPITAL / PRICES[asset]
    if name.startswith("deribit"):
        rates = rule.size_margin if name == "deribit" else rule
        price = size_margin.liquidation_price(
            rates.maintenance_rate(asset), quantity=coins, entry=entry, margin=balance * CAPITAL
        )
    else:
        schedule = rule.position_schedule(asset, coins)
        band = closed.linear_band([Leg(coins, entry, schedule)], margin=balance * CAPITAL)
        price = band.lower if side > 0 else band.upper
    crosses(account, price / PRICES[asset])


@pytest.mark.parametrize("name", ["deribit_perpetual", "bitmex", "binance", "deribit"])
@pytest.mark.parametrize("side", [1, -1])
def test_inverse_position_is_liquidated_at_the_closed_form(name, side):
    rule, asset, entry = venue.load(name), "BTC", 62_000.0
    usd, coins = side * 0.4 * CAPITAL, 0.1 * CAPITAL / PRICES["BTC"]
    account = account_of(
        rule, {"BTC": 0.1}, [dict(kind="inverse", asset=asset, contracts=usd, entry=entry)], procedure="full"
    )
    if name.startswith("deribit"):
        rates = rule.size_margin if name == "deribit" else rule
        price = size_margin.inverse_liquidation_price(
            rates.maintenance_rate(asset), notional=usd, entry=entry, margin=coins
        )
    else:
        # One tier: the position stays in it between the prices.
        rate = 0.005 if name == "bitmex" else rule.schedule(asset).rate[2]
        deduction = 0.0 if name == "bitmex" else rule.schedule(asset).deduction[2]
        # A deduction in USD is N' / P in coins, as a notional is.
        leg = Leg(usd, entry, TierSchedule(np.zeros(1), np.array([rate - deduction / abs(usd)]), np.zeros(1)))
        band = closed.inverse_band([leg], margin=coins)
        price = band.lower if side > 0 else band.upper
    crosses(account, price / PRICES[asset])


COIN_TIERS = {"default": [[0.0, 0.004, 125], [5.0, 0.005, 100], [20.0, 0.01, 50]]}


@pytest.mark.parametrize("maintenance_on", ["price", "entry"])
@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("share", [0.02, 1.5])
def test_tables_in_coin(maintenance_on, side, share):
    rule = TieredMargin(tiers=COIN_TIERS, table_unit="coin", maintenance_on=maintenance_on, name="toy")
    usd, coins, entry = side * share * CAPITAL, 0.3 * share * CAPITAL / PRICES["BTC"], 57_000.0
    account = account_of(rule, {"BTC": 0.3 * share}, [dict(kind="inverse", asset="BTC", contracts=usd, entry=entry)])
    where = "liquidation" if maintenance_on == "price" else "entry"
    band = closed.inverse_band([Leg(usd, entry, rule.schedule("BTC"))], margin=coins, maintenance_on=where)
    crosses(account, (band.lower if side > 0 else band.upper) / PRICES["BTC"])


def test_quanto_position_is_liquidated_at_the_closed_form_whatever_the_coin():
    # q coins of ETH per unit of BTC's relative price: W + q (P - E) = r |q| P, all times the price of ETH.
    rate, balance = 0.02, 0.1
    for side, quantity in ((1, 0.4), (-1, -0.4)):
        account = account_of(
            tiered(rate),
            {"ETH": balance},
            [dict(kind="quanto", asset="BTC", settlement="ETH", notional=quantity)],
            procedure="full",
        )
        price = (quantity - balance) / (quantity - abs(quantity) * rate)
        for coin in (0.5, 1.0, 3.0):
            x, _ = at(account, price * np.array([1.0 - 1e-7, 1.0, 1.0 + 1e-7]), coin)
            assert abs(x[1]) < 1e-12 and side * x[0] < 0.0 < side * x[2]


def test_portfolio_margin_of_one_future_is_its_range():
    # A linear long loses r P in the worst scenario; the contingency of the roll is 1 % of it: MM = 0.8 (r + 0.01) P.
    account = account_of("deribit_portfolio", {"USD": 0.2}, [dict(asset="BTC", notional=0.5)])
    price = (0.5 - 0.2) / (0.5 - 0.5 * 0.8 * (0.16 + 0.01))
    crosses(account, price)
    inverse = account_of("deribit_portfolio", {"BTC": 0.2}, [dict(kind="inverse", asset="BTC", notional=0.5)])
    # 1/(1 - r) - 1 of the notional in coins, priced at the unmoved price: coins P - N = 0.8 N (r/(1 - r) + 0.01).
    crosses(inverse, 0.5 * (1.0 + 0.8 * (0.16 / 0.84 + 0.01)) / 0.7)


def test_portfolio_margin_offsets_what_standard_margin_adds_up():
    positions = [
        dict(asset="BTC", notional=0.5),
        dict(kind="option", asset="BTC", notional=0.5, type="put", moneyness=0.95, days=30),
    ]
    hedged = account_of("deribit_portfolio", {"USD": 0.2}, positions)
    bare = account_of("deribit_portfolio", {"USD": 0.2}, positions[:1])

    def required(account):
        first = Scene((jnp.ones(1),) * 2, jnp.zeros(1), {})
        held = account.positions(account.first(first, jnp.ones(1)), first)
        needed = account.rule.requirements(held)
        return float(sum(needed.by_position, needed.constant)[0])

    assert required(hedged) < 0.6 * required(bare)


@pytest.mark.parametrize("settlement", ["USD", "coin"])
@pytest.mark.parametrize("kind", ["call", "put"])
def test_standard_margin_of_a_written_option(settlement, kind):
    # Balances with the premium received against MM with the mark: liquidated where b = |q| (0.075 U + mark).
    coin = settlement == "coin"
    account = account_of(
        "deribit",
        {"BTC" if coin else "USD": 0.1},
        [dict(kind="option", asset="BTC", notional=-0.4, type=kind, moneyness=1.0, days=30, settlement=settlement)],
    )
    first = Scene((jnp.ones(1),) * 2, jnp.zeros(1), {})
    mark0 = float(account.contracts[0].mark(first)[0])
    prices = np.linspace(0.5, 1.6, 4001)
    x, _ = at(account, prices, 1.0)
    scene = Scene((jnp.asarray(prices), jnp.ones(1)), jnp.zeros(1), {})
    mark = np.asarray(account.contracts[0].mark(scene))
    balance = (0.1 + 0.4 * mark0) * (prices if coin else 1.0)
    maintenance = 0.4 * 0.075 * (np.maximum(prices, mark) if kind == "put" and not coin else prices)
    if coin and kind == "put":
        maintenance = 0.4 * 0.075 * prices * np.maximum(1.0, mark / prices)
    np.testing.assert_array_equal(x <= 0.0, balance <= maintenance + 0.4 * mark)
    assert 0 < np.count_nonzero(x <= 0.0) < prices.size


def test_bought_options_are_no_collateral_under_standard_margin():
    bought = dict(kind="option", asset="BTC", notional=0.5, type="call", moneyness=0.5, days=30)
    account = account_of("deribit", {"USD": 0.3}, [bought, dict(asset="BTC", notional=0.05)])
    # The call costs half its notional, 0.25: what is left of the balance stands against the future alone.
    _, equity = at(account, 1.0, 1.0)
    assert equity[0] == pytest.approx(0.3)
    with pytest.raises(InputError, match="liquidated at once|initial margin"):
        account_of("deribit", {"USD": 0.3}, [bought, dict(asset="BTC", notional=2.6)])


@pytest.mark.slow
def test_rules_are_differentiable_and_keep_single_precision():
    positions = [
        dict(asset="BTC", notional=0.3),
        dict(kind="option", asset="ETH", notional=-0.1, type="put", moneyness=0.9, days=20),
    ]
    for rule in ("deribit", "deribit_portfolio"):
        wide = account_of(rule, {"USD": 0.4}, positions)
        narrow = account_of(rule, {"USD": 0.4}, positions, dtype=jnp.float32)
        first = Scene((jnp.ones(1, jnp.float32),) * 2, jnp.zeros(1, jnp.float32), {})
        state = narrow.first(first, jnp.ones(1, jnp.float32))
        got = narrow.distance_with_elasticity(state, first)
        assert got.x.dtype == jnp.float32
        full = wide.distance_with_elasticity(
            wide.first(jax.tree.map(lambda x: x.astype(F64), first), jnp.ones(1)),
            jax.tree.map(lambda x: x.astype(F64), first),
        )
        np.testing.assert_allclose(got.x, full.x, rtol=2e-5)
        for k in range(2):
            np.testing.assert_allclose(got.elasticity[k], full.elasticity[k], rtol=2e-4, atol=1e-6)
            moves = [np.exp(h * (np.arange(2) == k)) for h in (1e-5, -1e-5)]
            up, down = (at(wide, *move)[0][0] for move in moves)
            np.testing.assert_allclose(full.elasticity[k], (up - down) / 2e-5, rtol=1e-5, atol=1e-8)


def test_collateral_weight_counts_profit_and_loss_in_the_coin():
    rule = TieredMargin(tiers={"default": [[0.0, 0.01, 20]]}, collateral_weight={"default": 0.9}, name="toy")
    account = account_of(rule, {"BTC": 0.3}, [dict(kind="inverse", asset="BTC", notional=0.5)])
    # 0.9 (0.8 P - 0.5) = 0.01 x 0.5
    crosses(account, (0.005 / 0.9 + 0.5) / 0.8)
    with pytest.raises(InputError, match="collateral weight for ETH"):
        account_of(dataclasses.replace(rule, collateral_weight={"BTC": 0.9}), {"ETH": 0.3}, [])


@pytest.mark.parametrize(
    ("rule", "positions", "words"),
    [
        ("binance", [dict(kind="option", asset="BTC", notional=-0.1, type="call", moneyness=1, days=9)], "Option"),
        (
            "deribit_portfolio",
            [dict(kind="quanto", asset="BTC", settlement="ETH", notional=0.1)],
            "QuantoPerpetual",
        ),
        ("bitmex", [dict(kind="inverse", asset="ETH", notional=0.1)], "no tier table for ETH"),
        ("binance", [dict(asset="BTC", notional=90.0)], "leverage of 150.*must not exceed"),
        ("okx", [dict(asset="BTC", notional=55.0)], "leverage of"),
        ("deribit_perpetual", [dict(asset="BTC", notional=25.0)], "leverage of"),
    ],
)
def test_what_is_refused(rule, positions, words):
    with pytest.raises(InputError, match=words):
        account_of(rule, {"USD": 0.6}, positions)


def test_sizes_in_coins_need_prices():
    with pytest.raises(InputError, match="needs the starting price of BTC"):
        account_of("okx", {"USD": 0.1}, [dict(asset="BTC", notional=0.1)], prices={})


def test_options_of_rules_are_checked():
    tiers = {"default": [[0.0, 0.01, 20]]}
    for options, words in (
        (dict(table_unit="eth"), "table_unit is 'eth'"),
        (dict(maintenance_on="entry"), "table_unit to coin"),
        (dict(collateral_weight={"BTC": 1.2}), "collateral_weight.BTC is 1.2"),
    ):
        with pytest.raises(InputError, match=words):
            TieredMargin(tiers=tiers, name="toy", **options)
    with pytest.raises(InputError, match="which venue toy does not cover"):
        account_of(
            TieredMargin(tiers=COIN_TIERS, table_unit="coin", name="toy"),
            {"USD": 0.1},
            [dict(asset="BTC", notional=0.1)],
        )


def test_held_revalues_under_scenarios():
    account = account_of(
        "deribit", {"USD": 0.4}, [dict(kind="option", asset="BTC", notional=-0.1, type="put", moneyness=1, days=20)]
    )
    scene = Scene((jnp.full(3, 1.1), jnp.ones(3)), jnp.zeros(1), {})
    held = held_of(account.contracts[0], jnp.full(3, -0.1), scene)
    moves = jnp.asarray([0.9, 1.0, 1.2])[:, None]
    got = held.revalue(moves, held.option.volatility)
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got[1], held.mark, rtol=1e-12)


# ----------------------------------------------------------------------------- prices of a book


def test_liquidation_prices_of_a_book():
    rule = tiered(tiers=[[0.0, 0.01], [1e6, 0.02]])
    book = build_book(
        ASSETS,
        capital=CAPITAL,
        perpetuals=[dict(name="cross", venue=rule, margin=0.1, positions={"BTC": 0.3, "ETH": -0.2})],
        loans=[dict(name="loan", venue=lending(), collateral={"ETH": 0.2}, debt={"USD": 0.05, "BTC": 0.05})],
        accounts=[
            dict(kind="margin", name="inv", venue="deribit_perpetual", balance={"BTC": 0.1}, positions=[
                dict(kind="inverse", asset="BTC", notional=0.3)]),
            dict(kind="margin", name="safe", venue=rule, balance={"BTC": 0.1}, positions=[
                dict(kind="inverse", asset="BTC", notional=-0.1)]),
            dict(kind="margin", name="same", venue=rule, balance={"USD": 0.1}, positions=[
                dict(asset="BTC", notional=0.3), dict(asset="ETH", notional=-0.2)]),
            dict(kind="margin", name="written", venue="deribit", balance={"USD": 0.1}, positions=[
                dict(kind="option", asset="BTC", notional=-0.3, type="call", moneyness=1.0, days=30)]),
        ],
        prices=PRICES,
        dtype=F64,
    )  # fmt: skip
    rows = {(row.account, row.position): row for row in liquidation_prices(book, PRICES)}
    assert len(rows) == 2 + 2 + 1 + 1 + 2 + 1
    for asset in ASSETS:
        fixed, free = rows["cross", f"{asset} perpetual"], rows["same", f"{asset} perpetual"]
        assert free.price == pytest.approx(fixed.price, rel=1e-11)
        assert free.bankruptcy_price == pytest.approx(fixed.bankruptcy_price, rel=1e-11)
    coins = 0.1 * CAPITAL / PRICES["BTC"]
    exact = size_margin.inverse_liquidation_price(
        venue.load("deribit_perpetual").maintenance_rate("BTC"), notional=0.3 * CAPITAL, entry=60_000.0, margin=coins
    )
    assert rows["inv", "BTC inverse perpetual"].price == pytest.approx(exact, rel=1e-11)
    assert rows["inv", "BTC inverse perpetual"].bankruptcy_price == pytest.approx(60_000.0 * 0.3 / 0.4, rel=1e-11)
    # An inverse short of all of its margin owes nothing in coin.
    assert rows["safe", "BTC inverse perpetual"].price is None
    assert rows["written", "BTC call"].price > 60_000.0
    # Health factor 0.83 x 0.2 f = 0.1, and 0.83 x 0.2 = 0.05 + 0.05 f.
    assert rows["loan", "ETH collateral"].price == pytest.approx(3_000.0 * 0.1 / 0.166)
    assert rows["loan", "BTC debt"].price == pytest.approx(60_000.0 * (0.166 - 0.05) / 0.05)
    assert rows["loan", "BTC debt"].bankruptcy_price == pytest.approx(60_000.0 * 3.0)
    with pytest.raises(InputError, match="prices has no ETH"):
        liquidation_prices(book, {"BTC": 6e4})
