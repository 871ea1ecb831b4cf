"""What is told of liquidations: costs, what others bear, needless ones, times, regimes, and the margin needed.

Monte Carlo comparisons with closed forms allow 4.5 standard errors: a false alarm of 7e-6 each.
"""

import dataclasses
import math

import numpy as np
import pytest
from reference.builders import F64, lending, single_market, tiered, touch_book
from scipy import stats

from qpo_sim.book import build_book
from qpo_sim.compute import partial
from qpo_sim.errors import InputError
from qpo_sim.risk import liquidation, summary
from qpo_sim.risk.liquidation_at_risk import margin_needed
from qpo_sim.simulate import Plan, simulate_again, simulate_paths
from qpo_sim.types import Estimate

N, T = 20_000, 8
SIGMAS = 4.5


def outcome_of(market, book, n=N, **options):
    found = simulate_paths(market, book, n, Plan(T, **options), seed=3)
    return {
        key: {name: np.asarray(rows) for name, rows in value.items()} if isinstance(value, dict) else value
        for key, value in found._asdict().items()
    }


@pytest.fixture(scope="module")
def market():
    return single_market(volatility=0.04)


@pytest.fixture(scope="module")
def two_regimes():
    return single_market(
        drift=[0.0, -0.01], volatility=[0.03, 0.08], transition=[[0.8, 0.2], [0.3, 0.7]], initial=[0.6, 0.4]
    )


# ----------------------------------------------------------------------------- amounts of a path


@pytest.mark.parametrize(("fee", "slippage"), [(0.01, 0.002), (0.001, 0.0), (0.0, 0.0)])
def test_at_the_barrier_cost_and_bad_debt_are_known(market, fee, slippage):
    """A bridge closes an isolated position at its barrier: all liquidated paths pay and owe the same."""
    barrier, rate = 0.9, 0.004
    book = touch_book(
        market, barrier, rate=rate, liquidation_fee_rate=fee, liquidation_slippage=slippage, funding_rate=0.0
    )
    capital = float(np.asarray(book.perpetuals[0].margin))
    quantity = abs(float(book.perpetuals[0].quantity[0]))
    found = outcome_of(market, book)
    hit = np.asarray(found["is_liquidated"][0])
    cost = (fee + slippage) * quantity * barrier
    left = rate * quantity * barrier - cost
    assert 0.05 < hit.mean() < 0.95 and capital > 0.0
    np.testing.assert_allclose(found["liquidations"]["cost"][0], np.where(hit, cost, 0.0), atol=1e-12)
    np.testing.assert_allclose(found["liquidations"]["bad_debt"][0], np.where(hit, max(-left, 0.0), 0.0), atol=1e-12)


@pytest.mark.parametrize("monitoring", ["bridge", "step"])
def test_amounts_add_up_to_what_is_booked(two_regimes, monitoring):
    """Bad debt less cost is what fees and liquidations booked, by account; nothing is negative."""
    book = build_book(
        ("X",),
        perpetuals=[
            dict(name="long", venue=tiered(0.01, liquidation_fee_rate=0.02), margin=0.1, positions={"X": 0.8}),
            dict(name="short", venue=tiered(0.01, liquidation_slippage=0.01), margin=0.1, positions={"X": -0.7}),
        ],
        loans=[dict(name="loan", venue=lending(), collateral={"X": 0.4}, debt={"USD": 0.31})],
        dtype=F64,
    )
    found = outcome_of(two_regimes, book, monitoring=monitoring)
    rows = found["liquidations"]
    booked = found["accounts"]["fees"] + found["accounts"]["liquidation"]
    np.testing.assert_allclose((rows["bad_debt"] - rows["cost"]).sum(axis=0), booked, atol=1e-12)
    assert (rows["bad_debt"] >= 0.0).all() and (rows["cost"] >= -1e-15).all()
    hit = np.asarray(found["is_liquidated"])
    assert not rows["cost"][~hit].any() and not rows["bad_debt"][~hit].any()
    if monitoring == "step":
        assert (rows["bad_debt"].sum(axis=1) > 0.0).all(), "gaps leave a hole in each of them"
    # Every account of the test stands at the venue "toy".
    assert book.venues == ("toy",) and book.account_venues == ("toy",) * 3
    np.testing.assert_allclose(rows["venue_cost"][0], rows["cost"].sum(axis=0), atol=1e-15)
    np.testing.assert_allclose(rows["venue_bad_debt"][0], rows["bad_debt"].sum(axis=0), atol=1e-15)
    np.testing.assert_array_equal(rows["venue_liquidated"][0], hit.any(axis=0))


def test_nothing_is_kept_without_attribution(market):
    found = simulate_paths(market, touch_book(market, 0.9), 256, Plan(T, attribution=False))
    assert found.liquidations is None


# ----------------------------------------------------------------------------- needless liquidations, regimes


def test_needless_liquidations_follow_the_reflection_principle(market):
    """Of the log-prices without drift that touch the barrier, half end above it: P = Phi(log b / (sigma sqrt T))."""
    barrier = 0.9
    rows = outcome_of(market, touch_book(market, barrier, funding_rate=0.0))["liquidations"]["needless"][0]
    exact = stats.norm.cdf(math.log(barrier) / (0.04 * math.sqrt(T)))
    assert abs(rows.mean() - exact) < SIGMAS * rows.std() / math.sqrt(N)
    assert rows.std() > 0.0


def test_parts_by_regime_add_up(two_regimes):
    book = touch_book(two_regimes, 0.85)
    found = simulate_paths(two_regimes, book, 2048, Plan(T, record_paths=True))
    parts = np.asarray(found.record.hit_by_regime)
    assert parts.shape == (2, 1, 2048) and (parts.mean(axis=2) > 0.0).all()
    np.testing.assert_allclose(parts.sum(axis=0), np.asarray(found.hit_probability)[-1], atol=1e-12)


def test_exposure_ends_with_the_account(two_regimes):
    book = touch_book(two_regimes, 0.85)
    found = simulate_paths(two_regimes, book, 2048, Plan(T, record_paths=True))
    closed = np.asarray(found.record.is_liquidated) > 0.5
    exposure = np.asarray(found.record.exposure)
    assert closed[-1].any() and not exposure[closed].any() and (exposure[~closed] > 0.0).all()


# ----------------------------------------------------------------------------- sums and measures


def test_sums_are_the_same_whoever_merges(two_regimes):
    book = touch_book(two_regimes, 0.85, liquidation_fee_rate=0.02)
    found = outcome_of(two_regimes, book, 2 * partial.PATH_BLOCK)
    found = {key: value for key, value in found.items() if key not in ("record", "conditional", "account_equity")}

    def part(chosen):
        take = lambda x: None if x is None else np.asarray(x)[..., chosen]  # noqa: E731
        return {
            key: {name: take(rows) for name, rows in value.items()} if isinstance(value, dict) else take(value)
            for key, value in found.items()
        }

    half = partial.PATH_BLOCK
    whole = partial.partial_of(part(slice(None)), 0, horizons=(T - 1,), keep=8)
    first = partial.partial_of(part(slice(0, half)), 0, horizons=(T - 1,), keep=8)
    second = partial.partial_of(part(slice(half, None)), half, horizons=(T - 1,), keep=8)
    merged = second.merge(first)
    for name in ("bad_debt", "bad_debt_square", "cost", "cost_square", "needless", "venue_cost", "venue_liquidated"):
        np.testing.assert_array_equal(merged.sums[name], whole.sums[name])
        assert whole.total(name).shape == (1,)
    measures = {row.measure: row for row in summary.liquidation_measures(whole, book, 8.0)}
    cost, hit = found["liquidations"]["cost"][0], np.asarray(found["is_liquidated"][0])
    given = measures["liquidation_cost_if_liquidated"]
    assert given.value == pytest.approx(cost[hit].mean(), rel=1e-12)
    assert given.std_error == pytest.approx(cost[hit].std() / math.sqrt(hit.sum()), rel=1e-6)
    overall = measures["venue_expected_liquidation_cost"]
    assert (overall.value, overall.account) == (pytest.approx(cost.mean(), rel=1e-12), "toy")
    assert measures["venue_liquidation_probability"].value == hit.mean()
    assert measures["needless_liquidation_probability"].std_error > 0.0


def test_error_of_a_conditional_mean_covers():
    """Over 400 samples the ratio scatters as its error says; the ratio of the two is within 4.5 / sqrt(800)."""
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(400):
        hit = rng.random(500) < 0.2
        amount = np.where(hit, rng.exponential(size=500), 0.0)
        found = liquidation.given_liquidation(amount.sum(), (amount**2).sum(), hit.sum())
        values.append(float(found.value))
        errors.append(float(found.std_error))
    assert np.std(values) / np.mean(errors) == pytest.approx(1.0, abs=SIGMAS / math.sqrt(800.0))


def test_no_liquidation_has_no_mean():
    found = liquidation.given_liquidation(np.zeros(2), np.zeros(2), np.array([0.0, 1.0]))
    assert np.isnan(found.value[0]) and found.value[1] == 0.0 and np.isnan(found.std_error).all()


def test_time_quantile_of_a_straight_curve():
    """F rises evenly to 0.4 on day 10: half of it by day 5, with a slope of 0.04 a day."""
    days = np.arange(1.0, 11.0)
    found = liquidation.time_quantile(days, 0.04 * days, 0.5, 1e4)
    assert found.value == pytest.approx(5.0)
    assert found.std_error == pytest.approx(math.sqrt(0.25 * 0.4 / 1e4) / 0.04)
    assert np.isnan(liquidation.time_quantile(days, 0.0 * days, 0.5, 1e4).value)


# ----------------------------------------------------------------------------- liquidation at risk


def test_margin_needed_of_a_known_curve():
    """P = exp(-3 m): the root is -log(x) / 3 and the slope -3 x, whichever side the search starts from."""
    curve = lambda m: Estimate(math.exp(-3.0 * m), 1e-3)  # noqa: E731
    for level in (0.5, 0.01):
        found = margin_needed(curve, level, tolerance=1e-6)
        assert found.multiple.value == pytest.approx(-math.log(level) / 3.0, rel=1e-5)
        assert found.slope == pytest.approx(-3.0 * level, rel=1e-2)
        assert found.multiple.std_error == pytest.approx(1e-3 / (3.0 * level), rel=1e-2)


def test_margin_that_is_out_of_reach():
    assert math.isnan(margin_needed(lambda m: Estimate(0.3, 0.01), 0.01).multiple.value)
    with pytest.raises(InputError, match="risk.liquidation_at_risk"):
        margin_needed(lambda m: Estimate(0.3, 0.01), 1.5, place="risk.liquidation_at_risk[0]")


def test_margin_of_a_first_passage(market):
    """An isolated long in a Brownian log-price touches its barrier with probability 2 Phi(log b / (sigma sqrt T))."""
    book, level, rate = touch_book(market, 0.9, rate=0.004, funding_rate=0.0), 0.1, 0.004
    start = float(np.asarray(book.perpetuals[0].margin))
    quantity = float(book.perpetuals[0].quantity[0])

    def probability(multiple):
        account = book.perpetuals[0]
        account = account._replace(margin=account.margin * multiple)
        changed = dataclasses.replace(book, perpetuals=(account,))
        plan = Plan(T, dates=(T,), attribution=False, drawn=False)
        hit = np.asarray(simulate_again(market, changed, N, plan, seed=3).conditional.hit_probability[0])
        return liquidation.liquidation_probability(hit.sum(), np.square(hit).sum(), float(N))

    found = margin_needed(probability, level, tolerance=1e-4).multiple
    barrier = math.exp(stats.norm.ppf(level / 2.0) * 0.04 * math.sqrt(T))
    # Margin m: m + q (b - 1) = rate q b.
    exact = quantity * (1.0 - barrier * (1.0 - rate)) / start
    assert abs(found.value - exact) < SIGMAS * found.std_error + 1e-4 * exact
    assert found.std_error < 0.05 * exact
