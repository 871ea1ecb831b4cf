"""Looking at an account within steps: against exact laws, a fine clock, and inside composed markets."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from account.test_margin import ASSETS, RHO, assert_conserved, book_of, market_of
from reference.builders import F64, assert_mc, tiered
from scipy import stats

from qpo_sim import venue
from qpo_sim.market import gbm
from qpo_sim.market.volatility.heston import example as heston
from qpo_sim.simulate import Plan, simulate_paths


def probabilities(market, book, n, plan, seed):
    return np.asarray(simulate_paths(market, book, n, plan, seed=seed).hit_probability[-1, 0], np.float64)


def straddle(n_points, *, rule="deribit", balance=0.2, days=7.0):
    legs = [
        dict(kind="option", asset="BTC", notional=-0.5, type=kind, moneyness=1.0, days=days, volatility=0.9)
        for kind in ("call", "put")
    ]
    return book_of(dict(venue=rule, balance={"USD": balance}, positions=legs, procedure="full", n_points=n_points))


def assert_same_mean(a, b, n_sigma=4.5):
    error = np.hypot(*(x.std(ddof=1) / np.sqrt(x.size) for x in (a, b)))
    assert abs(a.mean() - b.mean()) < n_sigma * error, (a.mean(), b.mean(), error)


@pytest.mark.parametrize("n_points", [1, 8])
def test_one_linear_position_is_exact_whatever_the_points(n_points):
    # 4.5 standard errors, false alarm 7e-6.
    market = gbm(ASSETS, [0.9, 1.2], RHO, step_hours=120.0, drift="user", per_year=0.1, dtype=F64)
    account = dict(
        venue=tiered(0.01), balance={"USD": 0.2}, positions=[dict(asset="BTC", notional=1.0)], n_points=n_points
    )
    f = probabilities(market, book_of(account), 1 << 15, Plan(4, step_hours=120.0, attribution=False), 1)
    years, b = 20.0 / 365.0, np.log(0.8 / 0.99)
    sd, nu = 0.9 * np.sqrt(years), 0.1 - 0.405
    exact = stats.norm.cdf((b - nu * years) / sd) + np.exp(2 * nu * b / 0.81) * stats.norm.cdf((b + nu * years) / sd)
    assert_mc(f, exact, 4.5)


@pytest.mark.parametrize(
    ("rule", "balance", "n_fine", "per_day"),
    [("deribit", 0.16, 1 << 13, 64), pytest.param("deribit_portfolio", 0.2, 1 << 11, 24, marks=pytest.mark.slow)],
)
def test_straddle_against_a_fine_clock(rule, balance, n_fine, per_day):
    """Eight points a day agree with looking 64 times a day, within 4.5 standard errors (independent paths).

    Bias of one point a day under standard margin, see `test_bias_of_one_point`.
    """
    market = market_of(scale=2.0)
    coarse = probabilities(market, straddle(8, rule=rule, balance=balance), n_fine, Plan(4, attribution=False), 2)
    plan = Plan(4 * per_day, step_hours=24.0 / per_day, attribution=False)
    fine = probabilities(market, straddle(1, rule=rule, balance=balance), n_fine, plan, 3)
    assert 0.05 < fine.mean() < 0.9
    assert_same_mean(coarse, fine)


@pytest.mark.slow
def test_bias_of_one_point():
    """Relative bias of looking at a short straddle once a day, against 64 times a day on 2^15 paths.

    Measured: one point +1.1 %, eight points -0.4 %, standard error 1.4 %."""
    market, n = market_of(scale=2.0), 1 << 15
    fine = probabilities(market, straddle(1, balance=0.16), n, Plan(256, step_hours=0.375, attribution=False), 5)
    rows = {k: probabilities(market, straddle(k, balance=0.16), n, Plan(4, attribution=False), 6) for k in (1, 8)}
    error = fine.std() / np.sqrt(n) / fine.mean()
    bias = {k: row.mean() / fine.mean() - 1.0 for k, row in rows.items()}
    print(f"fine {fine.mean():.4f} +- {100 * error:.1f} %, one point {bias[1]:+.3f}, eight {bias[8]:+.3f}")
    assert abs(bias[8]) < 4.5 * np.sqrt(2.0) * error


def two_perpetuals(n_points, balance):
    positions = [dict(asset="BTC", notional=0.9), dict(asset="ETH", notional=-0.6)]
    return book_of(dict(venue=tiered(0.01), balance={"USD": balance}, positions=positions, n_points=n_points))


@pytest.mark.parametrize("kind", [pytest.param("all", marks=pytest.mark.slow), "heston"])
def test_inside_composed_markets_and_with_sub_steps(kind):
    # Jumps, side processes and stochastic volatility: the drawn liquidations have the mean of their probabilities,
    # bookings conserve, and one point and four agree where steps are short (4.5 standard errors each).
    market = market_of("all")
    if kind == "heston":
        market = dataclasses.replace(market_of(), volatility_model=heston(2, F64))
    plan = Plan(30, step_hours=4.0)
    rows = []
    for n_points in (1, 4):
        outcome = simulate_paths(
            market, two_perpetuals(n_points, 0.2 if kind == "all" else 0.07), 1 << 13, plan, seed=7
        )
        f, hit = np.asarray(outcome.hit_probability[-1, 0]), np.asarray(outcome.is_liquidated[0], float)
        assert hit.mean() > 0.005
        assert_mc(f - hit, 0.0, 4.5)
        assert_conserved(outcome, 1e-10)
        rows.append(f)
    assert_mc(rows[0] - rows[1], 0.0, 4.5)


@pytest.mark.slow
def test_positions_on_the_way_use_all_of_a_steps_variance():
    # A straddle looked at 1, 2, ..., 16 times a day: more points never leave the neighbourhood of the last.
    market = market_of(scale=2.0)
    rows = [probabilities(market, straddle(k, balance=0.16), 1 << 12, Plan(4, attribution=False), 8) for k in (4, 16)]
    assert_mc(rows[0] - rows[1], 0.0, 4.5)


def test_refinement_keeps_single_precision():
    book = book_of(
        dict(
            venue=venue.load("deribit"),
            balance={"USD": 0.2},
            positions=[dict(kind="option", asset="BTC", notional=-0.5, type="put", moneyness=1.0, days=7)],
        ),
        dtype=jnp.float32,
    )
    outcome = simulate_paths(market_of("gbm", jnp.float32, 2.0), book, 2048, Plan(4), seed=9)
    assert outcome.equity.dtype == jnp.float32 and bool(jnp.all(outcome.is_finite))
    assert_conserved(outcome, 3e-6)
