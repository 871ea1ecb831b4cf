"""Bad options, one at a time from the default ones: each is refused in one sentence with its key and how to mend it."""

import copy
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qpo_sim.config import Config, check_assets, load, timeline, to_config
from qpo_sim.config.compose import compose
from qpo_sim.errors import InputError


@pytest.fixture(scope="module")
def default() -> dict:
    return OmegaConf.to_container(compose())


def changed(default: dict, key: str, value: object) -> dict:
    config = copy.deepcopy(default)
    node = config
    *parents, last = [int(part) if part.isdigit() else part for part in key.split("/")]
    for part in parents:
        node = node[part]
    node[last] = value
    return config


def test_default_is_accepted(default):
    assert isinstance(to_config(default), Config)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", -1, ["seed=-1", "from 0 to 4294967295"]),
        ("job", "optimise", ["job='optimise'", "did you mean 'optimize'?"]),
        ("foo", 1, ["foo is not an option"]),
        ("marketing", 1, ["marketing is not an option", "did you mean 'market'?"]),
        ("data/assets", ["BTC", "BTC"], ["data.assets has 'BTC' more than once"]),
        ("data/assets", [], ["data.assets leaves no asset"]),
        ("data/assets", ["BTC"], ["book.spot names 'ETH'", "BTC"]),
        ("data/start", "2025-01-01", []),
        ("calibration/n_regimes", 0, ["calibration.n_regimes=0", "from 1"]),
        ("calibration/dof_floor", 2.0, ["calibration.dof_floor=2", "above 2"]),
        ("market/kind", "gmb", ["market.kind='gmb'", "did you mean 'gbm'?"]),
        ("market/mixing_cut", 0.5, ["market.mixing_cut=0.5", "1e-5"]),
        ("market/drift/shrinkage", 1.2, ["market.drift.shrinkage=1.2", "from 0 to 1"]),
        ("market/drift/kind", "user", ["market.drift.per_year is null"]),
        ("market/drift/per_year", 0.1, ["market.drift.kind=shrunk does not read it"]),
        ("book/capital", 0, ["book.capital=0 must be above 0"]),
        ("book/spot/BITC", 0.01, ["book.spot names 'BITC'", "did you mean 'BTC'?"]),
        ("book/perpetuals/0/name", "a,b", ["book.perpetuals[0].name='a,b'", "letters"]),
        ("book/perpetuals/0/name", "eth_loan", ["'eth_loan' more than once"]),
        ("book/loans/0/debt", {"EUR": 0.1}, ["book.loans[0].debt names 'EUR'"]),
        ("simulation/n_paths", 1.5, ["simulation.n_paths must be a whole number, got 1.5"]),
        ("simulation/n_paths", 1, ["simulation.n_paths=1 must be from 2"]),
        ("simulation/horizon_days", 0.7, ["simulation.horizon_days=0.7", "24 hours", "nearest is 1 days"]),
        ("simulation/horizon_days", -1, ["simulation.horizon_days=-1"]),
        ("simulation/step_hours", 5, ["simulation.step_hours=5 must divide", "24"]),
        ("simulation/step_hours", 48, ["simulation.step_hours=48 must divide"]),
        ("simulation/chunk_size", 1000, ["simulation.chunk_size=1000", "power of two", "8192"]),
        ("simulation/monitoring", "brige", ["did you mean 'bridge'?"]),
        ("risk/levels", [99], ["risk.levels[0]=99", "such as 0.99"]),
        ("risk/levels", [0.9, 1.0], ["risk.levels[1]=1", "between 0 and 1"]),
        ("risk/levels", [], ["risk.levels is empty"]),
        ("risk/horizons_days", [1, 60], ["risk.horizons_days has 60", "simulated 30 days"]),
        ("risk/horizons_days", [1.5], ["risk.horizons_days=1.5", "whole steps"]),
        ("risk/limits/0/measure", "cvar", ["risk.limits[0].measure='cvar'", "conditional_value_at_risk"]),
        ("risk/limits/0/level", 0.5, ["risk.limits[0].level=0.5 is not measured", "0.95, 0.99, 0.999"]),
        ("risk/limits/0/level", None, ["risk.limits[0].level is missing"]),
        ("risk/limits/1/level", 0.99, ["risk.limits[1].level=0.99 has no meaning"]),
        ("risk/limits/1/account", "loan", ["risk.limits[1].account=loan", "did you mean 'eth_loan'?"]),
        ("risk/limits/0/account", "eth_loan", ["risk.limits[0].account=eth_loan has no meaning"]),
        ("risk/limits/0/horizon_days", 2, ["risk.limits[0].horizon_days=2", "1, 7, 30"]),
        ("optimizer/level", 0, ["optimizer.level=0", "confidence level"]),
        ("optimizer/lower", 2.0, ["optimizer.lower=2 is above optimizer.upper=1"]),
        ("optimizer/gross_leverage", -0.5, ["optimizer.gross_leverage=-0.5"]),
        ("compute/devices", 0, ["compute.devices=0", "from 1"]),
        ("report/parquet", "yes", ["report.parquet must be true or false, got 'yes'"]),
    ],
)
def test_refused(default, key, value, words):
    config = changed(default, key, value)
    if not words:
        to_config(config)
        return
    with pytest.raises(InputError) as refused:
        to_config(config)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_replay_needs_a_path_of_the_run():
    assert load(["job=replay", "path=999_999"]).path == 999_999
    with pytest.raises(InputError, match="path=1000000 must be from 0 to 999999"):
        load(["job=replay", "path=1_000_000"])


def test_start_after_end():
    with pytest.raises(InputError, match=r"data\.start=2022-01-01 must not come after data\.end=2021-01-01"):
        load(["data.start=2022-01-01", "data.end=2021-01-01"])


def test_book_names_its_accounts_and_assets():
    book = load().book
    assert book.account_names == ("majors_cross", "avax_isolated", "eth_loan")
    assert set(book.assets) == {"BTC", "ETH", "BNB", "XRP", "ADA", "LINK", "AVAX", "MATIC", "ALGO", "DOGE"}


@pytest.mark.parametrize(
    ("overrides", "step", "expected"),
    [
        ([], 24.0, (24.0, 30, (1.0, 7.0, 30.0), (1, 7, 30))),
        (["simulation.n_steps=5"], 24.0, (24.0, 5, (1.0, 5.0), (1, 5))),
        (["simulation.step_hours=6", "simulation.horizon_days=7"], 24.0, (6.0, 28, (1.0, 7.0), (4, 28))),
        (["data.path=x.csv", "simulation.horizon_days=0.5"], 1.0, (1.0, 12, (0.5,), (12,))),
        (["data.path=x.csv", "simulation.horizon_days=30"], 72.0, (72.0, 10, (30.0,), (10,))),
        (["simulation.step_hours=0.1", "simulation.horizon_days=0.7"], 24.0, (0.1, 168, (0.7,), (168,))),
        (["risk.horizons_days=[30,1]"], 24.0, (24.0, 30, (1.0, 30.0), (1, 30))),
    ],
)
def test_timeline(overrides, step, expected):
    laid = timeline(load(overrides), step)
    assert (laid.step_hours, laid.n_steps, laid.horizons_days, laid.horizon_steps) == expected
    assert laid.horizon_days == pytest.approx(laid.horizons_days[-1])


def test_assets_of_the_data_are_checked_once_they_are_known():
    config = load(["data=file", "data.path=x.csv", "market.drift.kind=user", "+market.drift.per_year={BTC: 0.1}"])
    check_assets(config, ["BTC", *config.book.assets])
    with pytest.raises(InputError, match=r"book\.spot names 'ETH', which is not among the assets"):
        check_assets(config, ["BTC", "SOL"])


def paths(node: object, prefix: tuple = ()) -> list[tuple]:
    """Every place in nested plain values."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for name, value in items for place in [(*prefix, name), *paths(value, (*prefix, name))]]


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**64, 10**400, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, 24.0]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["BTC", "USD", "default", "gbm", "binance", "aave_v3", "tiered_margin", "2021-01-01"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_values_give_input_errors_and_nothing_else(default, data):
    config = copy.deepcopy(default)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths(config)))
        node = config
        for part in parents:
            node = node[part]
        action = data.draw(st.sampled_from(["set", "set", "drop", "add"]))
        if action == "set":
            node[last] = data.draw(values)
        elif action == "drop":
            del node[last]
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=6))] = data.draw(values)
        if not paths(config):
            break
    try:
        built = to_config(config)
        timeline(built, 24.0)
        check_assets(built, ["BTC", "ETH"])
    except InputError as error:
        assert str(error)
        assert "\n" not in str(error)
