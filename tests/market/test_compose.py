"""Markets from descriptions: every preset runs on the embedded data; a wrong description is refused with its place."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from qpo_sim import data, jobs
from qpo_sim.config import conf_folder, load
from qpo_sim.errors import InputError
from qpo_sim.market import compose
from qpo_sim.market.side import implied_volatility
from qpo_sim.market.statistics import market_statistics
from qpo_sim.simulate import Plan, market_paths

PRESETS = sorted(path.stem for path in (conf_folder() / "market").glob("*.yaml") if path.stem != "history")
ASSETS = ("BTC", "ETH", "ADA")
PEG = {"kind": "peg", "coins": ["USDC"]}


@cache
def prices():
    return data.load_prices(None, assets=ASSETS)


def built(*options):
    config = load(["calibration.n_restarts=2", *options])
    return jobs.build_market(config, prices(), data.log_returns(prices()))[1]


def statistics(n=2, labels=None):
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(400, n)) * np.array([0.03, 0.05])[:n]
    return compose.Statistics(("A", "B")[:n], 24.0, returns, np.atleast_2d(np.corrcoef(returns.T)), labels)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_finite_paths_of_plausible_size(name):
    record = market_paths(built(f"market={name}"), 512, Plan(30, dates=(30,)))
    last = np.asarray(record.log_price[-1], np.float64)
    assert np.isfinite(last).all()
    deviation = last.std(axis=1)
    # A month of BTC to ADA: between a quiet one and twice the loudest.
    assert np.all((deviation > 0.05) & (deviation < 1.2)), deviation
    assert np.atleast_2d(np.corrcoef(last))[0, 1] > 0.3


@pytest.mark.parametrize("name", ["garch_t", "heston", "merton"])
def test_user_drift_is_the_growth_of_the_expected_price(name):
    """Five standard errors for three assets: false alarm 2e-6."""
    market = built(f"market={name}", "market.drift.kind=user", "market.drift.per_year=1.0", "market.drift.shrinkage=0")
    price = np.exp(np.asarray(market_paths(market, 60_000, Plan(20)).log_price[-1], np.float64))
    error = price.std(axis=1) / np.sqrt(price.shape[1])
    assert np.all(np.abs(price.mean(axis=1) - np.exp(20.0 / 365.0)) < 5.0 * error)


def test_values_by_asset_and_from_data():
    stats = statistics()
    deviation = stats.returns.std(axis=0, ddof=1)
    np.testing.assert_allclose(compose.resolved("data.volatility", "x", stats), deviation)
    np.testing.assert_allclose(compose.resolved({"A": 1, "default": 3}, "x", stats), [1.0, 3.0])
    assert compose.resolved({"shape": [1, "data.correlation"]}, "x", stats)["shape"][1] is stats.correlation
    market = compose.compose_market(stats, volatility_per_year={"A": 0.5, "default": 1.0}, correlation=0.3)
    np.testing.assert_allclose(np.asarray(market.volatility)[0] * np.sqrt(365.0), [0.5, 1.0], rtol=1e-6)
    chol = np.asarray(market.correlation_cholesky)[0]
    np.testing.assert_allclose((chol @ chol.T)[0, 1], 0.3, rtol=1e-6)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"volatility": {"kind": "grach"}}, "did you mean garch"),
        ({"volatility": {"kind": "garch", "omega": 0.1, "alpha": 0.1}}, "market.volatility.beta is missing"),
        ({"volatility": {"kind": "garch", "omega": 0.1, "alpha": 0.1, "bta": 0.1}}, "did you mean beta"),
        ({"volatility": {"kind": "garch", "omega": 0.1, "alpha": 0.3, "beta": 0.8}}, "market.volatility: "),
        ({"volatility": {"kind": "garch", "omega": 0.1, "alpha": 0.1, "beta": 0.8, "dtype": "x"}}, "not an option"),
        ({"jumps": [{"kind": "merton", "intensity": -1.0}]}, r"market.jumps\[0\]: "),
        ({"jumps": [{"kind": "kou", "intensity": 1.0, "eta_up": 0.9}]}, r"market.jumps\[0\]: .*eta_up"),
        ({"volatility_per_year": "data.volatilty"}, "data.volatilty, which does not exist"),
        ({"volatility_per_year": [1.0, -1.0]}, "must be positive"),
        ({"volatility_per_year": {"A": 1.0}}, "not B"),
        ({"correlation": 1.5}, "positive definite"),
        ({"correlation": [[1.0, 0.2], [0.1, 1.0]]}, "symmetric"),
        ({"dof": 2.0}, "exceed 2"),
        ({"regimes": {"kind": "hidden"}}, "fitted, markov or semi_markov"),
        ({"regimes": {"kind": "fitted"}}, "needs a fit"),
        (
            {"regimes": {"kind": "markov", "volatility": [1, 2], "transition": [[0.9, 0.2], [0.1, 0.9]]}},
            r"sum of market.regimes.transition\[0\] is 1.1",
        ),
        ({"regimes": {"kind": "markov", "volatility": [1, 2], "transition": [[1.0]]}}, "2 x 2"),
        ({"regimes": {"kind": "markov", "volatility": [1, -2], "transition": np.eye(2).tolist()}}, "positive factor"),
        ({"regimes": {"kind": "semi_markov", "volatility": [1, 2], "shape": [1, 1]}}, "need mean_duration"),
        ({"regimes": {"kind": "markov", "volatility": [1.0], "transition": [[1.0]], "transitoin": 1}}, "transition"),
        (
            {"regimes": {"kind": "markov", "volatility": [1, 2], "transition": np.eye(2).tolist()}},
            "give the initial law",
        ),
        (
            {
                "regimes": {
                    "kind": "semi_markov",
                    "volatility": [1, 2],
                    "shape": [1, 1],
                    "mean_duration": [5, 5],
                    "embedded": [[0, 0.9], [1, 0]],
                }
            },
            r"market.regimes: the sum of embedded\[0\] is 0.9",
        ),
        ({"drift": "martingale"}, "market.drift.kind"),
        ({"side": [PEG, PEG]}, r"market.side\[1\] and market.side\[0\] are both named peg: .*`name: second_peg`"),
        ({"side": [{**PEG, "name": "dai"}, {"kind": "gas", "name": "dai"}]}, "both named dai"),
        ({"side": [{**PEG, "name": "my coin"}]}, r"market.side\[0\].name is 'my coin'; .* a word"),
        ({"shock": {"kind": "bootstrap", "returns": "data.returns", "regimes": "data.labels"}}, "kind: fitted"),
        (
            {"regimes": {"kind": "markov", "volatility": [1.0], "transition": [[1.0]], "drivers": {"slopes": {}}}},
            "market.regimes.drivers",
        ),
    ],
)
def test_refusals_say_where_and_how_to_mend(described, message):
    with pytest.raises(InputError, match=message):
        compose.compose_market(statistics(), **described)


def test_a_component_for_whole_steps_is_not_cut():
    market = compose.compose_market(
        statistics(), volatility={"kind": "garch", "omega": 0.1, "alpha": 0.1, "beta": 0.8, "initial_variance": 1.0}
    )
    with pytest.raises(InputError, match="whole steps of 24 hours"):
        market_paths(market, 4, Plan(4, step_hours=6.0))


def test_garch_starts_from_the_variance_the_data_end_with():
    stats = statistics()
    stats.returns[-20:] *= 4.0
    options = {"kind": "garch", "omega": 0.05, "alpha": 0.1, "beta": 0.85}
    now = compose.compose_market(stats, volatility={**options, "initial_variance": "data.filtered_variance"})
    assert np.all(np.asarray(now.volatility_model.initial_variance) > 2.0)


def test_two_stablecoins_of_one_kind_are_told_apart_by_name():
    second = {"kind": "peg", "name": "dai", "coins": ["DAI"], "deviation": 2e-3}
    follower = {"kind": "basis", "name": "venue", "follows": "second_premium"}
    funding = {"kind": "funding", "name": "second"}
    market = compose.compose_market(statistics(), side=[PEG, second, funding, follower])
    side = market_paths(market, 64, Plan(5)).side
    assert set(side) == {
        "peg", "dai_peg", "second_premium", "second_funding_rate", "second_funding_accrued",
        "venue_mark_ratio", "venue_last_ratio",
    }  # fmt: skip
    # Each has its own draws and its own parameters: the second coin's deviations are three times as wide.
    assert np.std(side["dai_peg"]) > 2.0 * np.std(side["peg"])
    assert abs(np.corrcoef(side["dai_peg"][-1, 0], side["peg"][-1, 0])[0, 1]) < 0.9
    # The first one's paths are what they are alone.
    alone = market_paths(compose.compose_market(statistics(), side=[PEG]), 64, Plan(5)).side
    np.testing.assert_array_equal(alone["peg"], side["peg"])


def test_a_named_surface_is_read_by_its_name():
    market = compose.compose_market(statistics(), side=[{"kind": "surface"}, {"kind": "surface", "name": "second"}])
    side = market_paths(market, 4, Plan(2)).side
    last = {key: rows[-1] for key, rows in side.items()}
    first, second = (implied_volatility.of_asset(last, 1, **option) for option in ({}, {"name": "second"}))
    assert set(first) == set(second) and set(side) == set(first) | {f"second_{key}" for key in first}
    np.testing.assert_array_equal(first["iv_level"], side["iv_level"][-1, 1])
    np.testing.assert_array_equal(second["iv_level"], side["second_iv_level"][-1, 1])


def test_two_stablecoins_from_the_configuration():
    both = "market.side=[{kind: peg, coins: [USDC]}, {kind: peg, name: dai, coins: [DAI]}]"
    assert set(market_paths(built("market=composed", both), 4, Plan(2)).side) == {"peg", "dai_peg"}
    with pytest.raises(InputError, match="both named peg"):
        built("market=composed", both.replace("name: dai, ", ""))


def test_a_market_made_by_hand_with_two_components_of_one_name_is_refused():
    market = compose.compose_market(statistics(), side=[PEG])
    with pytest.raises(InputError, match="both named peg"):
        market_paths(replace(market, side=market.side * 2), 4, Plan(2))


def test_factor_loadings_of_the_data_give_their_correlations():
    data_ = market_statistics(data.log_returns(prices()), step_hours=24.0)
    loadings = data_.value("loadings", "x")
    # Two factors for three assets leave nothing unexplained.
    np.testing.assert_allclose((loadings @ loadings.T)[np.triu_indices(3, 1)], data_.correlation[np.triu_indices(3, 1)],
                               atol=1e-4)  # fmt: skip
    shock = {"kind": "factor", "loadings": "data.loadings", "dof": 4.0}
    assert compose.compose_market(statistics(1), shock=shock).shock.n_factors == 1


def test_regimes_start_from_their_long_run_law_unless_told():
    options = {"kind": "markov", "volatility": [1.0, 2.0], "transition": [[0.9, 0.1], [0.3, 0.7]]}
    market = compose.compose_market(statistics(), regimes=options)
    np.testing.assert_allclose(market.initial, [0.75, 0.25], rtol=1e-6)
    market = compose.compose_market(statistics(), regimes={**options, "initial": [0.0, 1.0]})
    np.testing.assert_array_equal(market.initial, [0.0, 1.0])
    options = {"kind": "semi_markov", "volatility": [1.0, 2.0], "mean_duration": [30.0, 10.0], "shape": [2, 1]}
    market = compose.compose_market(statistics(), regimes={**options, "embedded": [[0, 1], [1, 0]]})
    np.testing.assert_allclose(market.initial, [0.375, 0.375, 0.25], rtol=1e-6)
