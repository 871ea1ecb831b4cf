"""Bad books and venues, one at a time from the default ones: each is refused in one sentence, before a fit."""

import copy

import pytest
from omegaconf import OmegaConf

from qpo_sim import jobs
from qpo_sim.config import to_config
from qpo_sim.config.compose import compose
from qpo_sim.errors import InputError

ASSETS = ("BTC", "ETH", "BNB", "XRP", "ADA", "LINK", "AVAX", "MATIC", "ALGO", "DOGE")


@pytest.fixture(scope="module")
def default() -> dict:
    return OmegaConf.to_container(compose())


def built(default: dict, changes: dict):
    config = copy.deepcopy(default)
    for key, value in changes.items():
        node = config
        *parents, last = [int(part) if part.isdigit() else part for part in key.split("/")]
        for part in parents:
            node = node[part]
        node[last] = value
    return jobs.book_of(to_config(config), ASSETS, dict.fromkeys(ASSETS, 100.0))


def test_default_is_accepted(default):
    assert built(default, {}).account_names == ("majors_cross", "avax_isolated", "eth_loan")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("book/spot/BTC", -0.1, ["book.spot.BTC is -0.1", "use a perpetual"]),
        ("book/spot/BTC", 0.9, ["spends 1.48", "take 0.48 off"]),
        ("book/perpetuals/0/margin", -0.1, ["book.perpetuals[0] (majors_cross).margin is -0.1", "positive"]),
        ("book/perpetuals/0/margin", 0.001, ["book.perpetuals[0] (majors_cross)", "raise the margin"]),
        ("book/perpetuals/0/margin", 0.007, ["book.perpetuals[0] (majors_cross)", "initial margin of 0.0"]),
        ("book/perpetuals/0/mode", "crossed", ["book.perpetuals[0].mode", "did you mean 'cross'?"]),
        ("book/perpetuals/0/venue", "binanse", ["'binanse'", "did you mean 'binance'?"]),
        ("book/perpetuals/0/venue", "aave_v3", ["whose rule is HealthFactor", "TieredMargin"]),
        ("book/perpetuals/0/positions", {}, ["positions is empty"]),
        ("book/perpetuals/1/positions", {"BTC": 0.01, "ETH": 0.01}, ["is isolated", "exactly one"]),
        ("book/perpetuals/0/entry", {"SOL": 1.0}, ["entry names SOL"]),
        ("book/perpetuals/0/entry", {"BTC": 0.0}, ["entry.BTC is 0.0", "positive"]),
        ("book/loans/0/debt", {"USD": 0.163}, ["debt is 0.163", "0.161", "add collateral"]),
        ("book/loans/0/debt", {}, ["debt is empty"]),
        ("book/loans/0/collateral", {"ETH": -0.2}, ["collateral.ETH is -0.2"]),
        ("venue/binance/kind", "tired_margin", ["venue.binance.kind", "did you mean 'tiered_margin'?"]),
        ("venue/binance/tiers/BTC", [], ["binance", "tiers.BTC"]),
        ("venue/binance/tiers/BTC/0/0", 100, ["tiers.BTC", "starts at 100", "gap"]),
        ("venue/binance/tiers/BTC/2/0", 100, ["tiers.BTC", "tier 3 starts at 100"]),
        ("venue/binance/tiers/BTC/1/1", 0.003, ["tiers.BTC", "rate 0.003"]),
        ("venue/binance/tiers/BTC/1/2", 160, ["tiers.BTC", "160"]),
        ("venue/binance/tiers/BTC/1/2", 500, ["tiers.BTC", "500"]),
        ("venue/binance/funding/interval_hours", 0, ["venue.binance.funding.interval_hours=0 must be above 0"]),
        ("venue/binance/as_of", "2931-01", ["venue.binance.as_of is 2931-01", "future"]),
        ("venue/binance/as_of", "soon", ["venue.binance.as_of is 'soon'", "2026-09"]),
        ("venue/binance/source", "", ["venue.binance.source is missing"]),
        ("venue/aave_v3/liquidation_threshold/ETH", 0.96, ["liquidation_bonus.ETH", "0.96"]),
        ("venue/aave_v3/ltv/ETH", 0.9, ["ltv.ETH", "0.9"]),
        ("venue/aave_v3/close_factor", 0, ["close_factor is 0"]),
        ("book/accounts", [{"kind": "margins", "name": "a"}], ["book.accounts[0] (a).kind", "did you mean 'margin'?"]),
        ("book/accounts", [{"kind": "margin", "name": "a"}], ["book.accounts[0] (a).venue is missing"]),
        ("book/policies", [{"kind": "top_up", "account": "x"}], ["book.policies[0]", "missing"]),
        ("book/policies", [{"kind": "kil_switch"}], ["book.policies[0].kind", "did you mean 'kill_switch'?"]),
    ],
)
def test_refused(default, key, value, words):
    with pytest.raises(InputError) as refused:
        built(default, {key: value})
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def margin_account(**changes):
    account = {"kind": "margin", "name": "a", "venue": "binance", "balance": {"USD": 0.1}, "positions": [{}]}
    account["positions"] = [{"asset": "BTC", "notional": 0.2, **changes.pop("position", {})}]
    return [{**account, **changes}]


@pytest.mark.parametrize(
    ("account", "words"),
    [
        (margin_account(venue="aave_v3"), ["needs a margin rule"]),
        (margin_account(balance={"USD": -0.1}), ["balance.USD is -0.1", "negative"]),
        (margin_account(balance={"EUR": 0.1}), ["balance names 'EUR'"]),
        (
            margin_account(balance={"USD": 0.0001}),
            ["leverage of 2000", "initial margin of 0.00133", "raise the balance"],
        ),
        (margin_account(trigger="markt"), ["trigger is 'markt'", "mark"]),
        (margin_account(procedure="some"), ["procedure is 'some'", "partial"]),
        (margin_account(position={"asset": "BITC"}), ["'BITC'", "did you mean 'BTC'?"]),
        (margin_account(position={"kind": "liner"}), ["did you mean 'linear'?"]),
        (margin_account(position={"strike": 3}), ["no option 'strike'"]),
        (margin_account(position={"contracts": 3}), ["either notional", "not both"]),
        (margin_account(position={"kind": "future", "days": -3}), ["days is -3", "expired"]),
        (margin_account(position={"entry": 0}), ["entry is 0", "positive"]),
    ],
)
def test_refused_margin_account(default, account, words):
    with pytest.raises(InputError) as refused:
        built(default, {"book/accounts": account})
    for word in words:
        assert word in str(refused.value)
