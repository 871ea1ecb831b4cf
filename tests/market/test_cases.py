"""Reference cases of the plain diffusion that no other file runs. Errors are four standard errors, as the cases say."""

import jax.numpy as jnp
import numpy as np
from scipy import stats

from qpo_sim.market import presets
from qpo_sim.numerics import bridge_crossing
from qpo_sim.simulate import Plan, market_paths

F64 = jnp.float64


def diffusion(assets, sigma, growth, correlation=None, *, step_years):
    return presets.gbm(
        assets, sigma, correlation, step_hours=step_years * 8760.0, drift="user", per_year=growth, dtype=F64
    )


def log_paths(market, n_paths, n_steps, seed=0):
    return np.asarray(market_paths(market, n_paths, Plan(n_steps, step_hours=market.step_hours), seed=seed).log_price)


def assert_mean(sample, expected, n_errors=4.0):
    error = sample.std(axis=-1) / np.sqrt(sample.shape[-1])
    assert np.all(np.abs(sample.mean(axis=-1) - expected) < n_errors * error), (sample.mean(axis=-1), expected, error)


def test_european_calls_of_case_a03(cases):
    case = cases("models")["A03"]
    given = case["inputs"]
    market = diffusion(("A",), [given["sigma"]], given["r"], step_years=given["T"])
    price = given["S0"] * np.exp(log_paths(market, 2**20, 1)[0, 0])
    for strike, expected in case["expected"]["call"].items():
        payoff = np.exp(-given["r"] * given["T"]) * np.maximum(price - float(strike), 0.0)
        assert_mean(payoff, expected)


def test_discretely_monitored_barriers_of_case_b03(cases):
    """Down-and-out calls watched at fifty dates; and with the bridge between them, at all times."""
    case = cases("models")["B03"]
    given = case["inputs"]
    steps, n_paths = given["m"], 2**17
    dt = given["T"] / steps
    market = diffusion(("A",), [given["sigma"]], given["r"], step_years=dt)
    x = log_paths(market, n_paths, steps)[:, 0]
    before = np.concatenate([np.zeros((1, n_paths)), x[:-1]])
    payoff = np.exp(-given["r"] * given["T"]) * np.maximum(given["S0"] * np.exp(x[-1]) - given["K"], 0.0)
    for barrier, expected in case["expected"].items():
        level = np.log(float(barrier) / given["S0"])
        assert_mean(payoff * np.all(x > level, axis=0), expected["exact_discrete"])
        crossed = np.asarray(bridge_crossing(before - level, x - level, given["sigma"] ** 2 * dt))
        assert_mean(payoff * np.prod(1.0 - crossed, axis=0), expected["continuous"])


def test_basket_shortfall_of_case_b10(cases):
    case = cases("models")["B10"]
    given = case["inputs"]
    rho = given["rho"]
    market = diffusion(
        ("A", "B"),
        given["sigma"],
        dict(zip("AB", given["mu"], strict=True)),
        [[1.0, rho], [rho, 1.0]],
        step_years=given["T"],
    )
    value = np.asarray(given["values"]) @ np.exp(log_paths(market, 2**20, 1)[0])
    for debt, expected in case["expected"].items():
        assert_mean((value <= float(debt)).astype(float), expected)


def test_hitting_times_of_case_b15(cases):
    """The law of the time to a barrier at its quantiles, by conditional crossing between monthly dates."""
    case = cases("models")["B15"]
    given, expected = case["inputs"], case["expected"]
    quantiles = {float(p): t for p, t in expected["quantiles"].items()}
    for p, horizon in quantiles.items():
        n_steps = max(1, round(12 * horizon))
        dt = horizon / n_steps
        # The case's m is the drift of the log-price.
        growth = given["m"] + 0.5 * given["s"] ** 2
        x = log_paths(diffusion(("A",), [given["s"]], growth, step_years=dt), 2**15, n_steps)[:, 0]
        before = np.concatenate([np.zeros((1, x.shape[1])), x[:-1]])
        crossed = np.asarray(bridge_crossing(before - given["b"], x - given["b"], given["s"] ** 2 * dt))
        assert_mean(1.0 - np.prod(1.0 - crossed, axis=0), p)
    law = stats.invgauss(given["s"] ** 2 / (abs(given["m"]) * abs(given["b"])), scale=given["b"] ** 2 / given["s"] ** 2)
    assert abs(law.mean() - expected["mean"]) < 1e-9
