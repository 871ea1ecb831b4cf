"""The ledger against a plain loop on the same draws, closed forms of first passage, and its own bookkeeping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import ledger_loop
from reference.builders import F64, assert_frequency, assert_mc, lending, prices, single_market, tiered, touch_book
from scipy import stats

from qpo_sim import random
from qpo_sim.book import build_book
from qpo_sim.book.ledger import ACCOUNTS
from qpo_sim.market import gbm, shock
from qpo_sim.random import Stream
from qpo_sim.simulate import Plan, simulate_paths
from qpo_sim.venue.tiered_margin import liquidation_price

CAPITAL = 1_000_000.0
TIERS = [[0.0, 0.01], [250_000.0, 0.02], [600_000.0, 0.05], [2_000_000.0, 0.1]]
RHO = np.array([[1.0, 0.6, 0.3], [0.6, 1.0, 0.5], [0.3, 0.5, 1.0]])
VOL = np.array([1.6, 1.9, 1.3])
N, T = 300, 16


def _mixed_book(dtype=F64):
    """Isolated long and short, a cross account with three positions, a loan with two collaterals and two debts."""
    perp = tiered(tiers=TIERS, funding_rate=0.0004, liquidation_fee_rate=0.012, liquidation_slippage=0.004)
    pool = lending(
        liquidation_threshold={"A": 0.8, "B": 0.7}, liquidation_bonus={"A": 0.05, "B": 0.08}, ltv={"default": 0.69},
        borrow_rate_per_year=0.3, small_position_usd=40_000.0,
    )  # fmt: skip
    return build_book(
        ("A", "B", "C"),
        capital=CAPITAL,
        spot={"C": 0.1},
        perpetuals=[
            dict(name="long", venue=perp, mode="isolated", margin=0.2, positions={"A": 0.7}, entry={"A": 105.0}),
            dict(name="short", venue=perp, mode="isolated", margin=0.2, positions={"B": -0.5}),
            dict(name="cross", venue=perp, mode="cross", margin=0.2, positions={"A": 0.6, "B": -0.3, "C": 0.25}),
        ],
        loans=[dict(name="loan", venue=pool, collateral={"A": 0.3, "B": 0.2}, debt={"USD": 0.15, "C": 0.15})],
        prices={"A": 100.0},
        dtype=dtype,
    )


def _references(book):
    rows = [(f / CAPITAL, r) for f, r in TIERS]
    common = dict(tiers=rows, funding_rate=0.0004, fee=0.012, slippage=0.004)
    perpetuals = [
        (ledger_loop.PerpetualAccount(0.2, np.array([0.7]), np.array([1.05]), **common), [0]),
        (ledger_loop.PerpetualAccount(0.2, np.array([-0.5]), np.array([1.0]), **common), [1]),
        (ledger_loop.PerpetualAccount(0.2, np.array([0.6, -0.3, 0.25]), np.ones(3), **common), [0, 1, 2]),
    ]
    loan = ledger_loop.LoanAccount(
        np.array([0.3, 0.2]), np.array([0.8, 0.7]), np.array([0.05, 0.08]), 0.15, np.array([0.15]),
        rate_per_hour=0.3 / 8760.0, small=40_000.0 / CAPITAL,
    )  # fmt: skip
    return perpetuals, loan


def _market(dtype=F64):
    return gbm(("A", "B", "C"), VOL, RHO, drift="historical", mean_per_year=[-1.0, 0.5, 0.8], dtype=dtype)


def _liquidation_uniforms(seed: int, n_paths: int, n_steps: int, n_accounts: int) -> np.ndarray:
    key, path = random.stream_keys(seed)[Stream.LIQUIDATION], jnp.arange(n_paths, dtype=jnp.uint32)
    out = np.zeros((n_steps, n_accounts, n_paths))
    for t in range(n_steps):
        for j in range(n_accounts):
            out[t, j] = random.uniform(random.bits(key, path, jnp.int32(t), j // 2)[j % 2])
    return out


@pytest.mark.parametrize(
    ("step_hours", "monitoring"),
    [
        (24.0, "bridge"),
        pytest.param(24.0, "step", marks=pytest.mark.slow),
        pytest.param(6.0, "bridge", marks=pytest.mark.slow),
    ],
)
def test_ledger_reproduces_a_plain_loop(step_hours, monitoring):
    market, book, bridge = _market(), _mixed_book(), monitoring == "bridge"
    plan = Plan(T, step_hours=step_hours, monitoring=monitoring)
    outcome = simulate_paths(market, book, N, plan, seed=5)
    p = np.concatenate([np.ones((1, 3, N)), prices(market, N, T, step_hours=step_hours, seed=5)])
    u = _liquidation_uniforms(5, N, T, 4)
    covariance = np.broadcast_to(RHO * np.outer(VOL, VOL) * step_hours / 8760.0, (T, 3, 3))
    perpetuals, loan = _references(book)
    order = [0, 1, 2]  # collateral A, B then debt C: already the assets' order
    equity = np.zeros((T, N))
    accounts = {name: np.zeros(N) for name in ACCOUNTS}
    for path in range(N):
        stories = [
            ledger_loop.perpetual_path(
                a, p[:, i, path], covariance[:, i][:, :, i], u[:, j, path], step_hours=step_hours, bridge=bridge
            )
            for j, (a, i) in enumerate(perpetuals)
        ]
        stories.append(
            ledger_loop.loan_path(
                loan,
                p[:, :2, path],
                p[:, 2:, path],
                covariance[:, order][:, :, order],
                u[:, 3, path],
                step_hours=step_hours,
                bridge=bridge,
            )  # fmt: skip
        )
        for j, story in enumerate(stories):
            assert bool(outcome.is_liquidated[j, path]) == story.liquidated, (j, path)
            np.testing.assert_allclose(outcome.account_equity[j, path], story.equity[-1], atol=1e-11)
            np.testing.assert_allclose(outcome.hit_probability[:, j, path], story.hit_probability, atol=1e-11)
            for name in ACCOUNTS:
                accounts[name][path] += story.accounts[name]
        components = [0.1 * (p[-1, 2, path] - 1.0)]
        for story in stories:
            a = story.accounts
            components += [*story.components, a["funding"] + a["fees"] + a["liquidation"] + a["interest"]]
        np.testing.assert_allclose(outcome.components[:, path], components, atol=1e-11)
        equity[:, path] = np.sum([s.equity for s in stories], axis=0)
    cash = 1.0 - 0.1 - 0.2 - 0.2 - 0.2 - 0.2 + 0.7 * 0.05
    np.testing.assert_allclose(outcome.equity, equity + cash + 0.1 * p[1:, 2], atol=1e-11)
    accounts["price"] += 0.1 * (p[-1, 2] - 1.0)
    for name in ACCOUNTS:
        np.testing.assert_allclose(outcome.accounts[name], accounts[name], atol=1e-11, err_msg=name)
    peak = np.maximum.accumulate(np.concatenate([np.ones((1, N)), outcome.equity]), axis=0)[1:]
    np.testing.assert_allclose(outcome.max_drawdown, np.max(1.0 - outcome.equity / peak, axis=0), atol=1e-12)
    # The comparison means something only if every account is liquidated on some paths and survives on others.
    share = np.asarray(outcome.is_liquidated).mean(axis=1)
    assert np.all((share > 0.0) & (share < 0.95)), share


def test_ledger_reproduces_a_plain_loop_in_a_student_t_market():
    market = single_market(drift=0.001, volatility=0.05, dof=3.0)
    book = touch_book(market, 0.8, rate=0.01, funding_rate=0.001, liquidation_fee_rate=0.01)
    outcome = simulate_paths(market, book, N, Plan(T), seed=8)
    p = np.concatenate([np.ones((1, 1, N)), prices(market, N, T, seed=8)])
    u = _liquidation_uniforms(8, N, T, 1)
    key, path = random.stream_keys(8)[Stream.REGIME], jnp.arange(N, dtype=jnp.uint32)
    floor = jnp.asarray(shock.score_floor(shock.MIXING_CUT))
    # Compiled, as the kernel's is: its float32 polynomial rounds otherwise operation by operation.
    score = jax.jit(random.normal_score)
    h = np.stack([
        shock.mixing_scale(
            score(random.bits(key, path, jnp.int32(t), 0)[1]).astype(F64),
            (),
            shock.mixing_coefficients(market.dof),
            floor,
        )
        for t in range(T)
    ])  # fmt: skip
    margin = float(book.perpetuals[0].margin)
    account = ledger_loop.PerpetualAccount(
        margin, np.array([1.0]), np.ones(1), [(0.0, 0.01)], funding_rate=0.001, fee=0.01
    )
    for k in range(N):
        covariance = ((0.05 * h[:, k]) ** 2)[:, None, None]
        story = ledger_loop.perpetual_path(account, p[:, :, k], covariance, u[:, 0, k], step_hours=24.0, bridge=True)
        assert bool(outcome.is_liquidated[0, k]) == story.liquidated
        np.testing.assert_allclose(outcome.hit_probability[:, 0, k], story.hit_probability, atol=1e-9)
        np.testing.assert_allclose(outcome.account_equity[0, k], story.equity[-1], atol=1e-9)


@pytest.mark.parametrize(("step_hours", "per_step"), [(1.0, None), (8.0, 1), (24.0, 3), (12.0, None), (4.0, None)])
def test_funding_stamps(step_hours, per_step):
    market = single_market(volatility=0.01)
    venue = tiered(0.004, funding_rate=0.001)
    book = build_book(("X",), perpetuals=[dict(name="p", venue=venue, margin=0.9, positions={"X": 0.5})], dtype=F64)
    n_steps = 26 if step_hours < 8 else 5
    outcome = simulate_paths(market, book, 16, Plan(n_steps, step_hours=step_hours), seed=1)
    p = prices(market, 16, n_steps, step_hours=step_hours, seed=1)[:, 0]
    paid = np.array(ledger_loop.stamps(step_hours, 8.0, n_steps))
    if per_step:
        assert np.all(paid == per_step)
    assert paid.sum() == int(n_steps * step_hours / 8.0)
    np.testing.assert_allclose(outcome.accounts["funding"], -(0.001 * 0.5 * paid[:, None] * p).sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("monitoring", ["bridge", "step"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (jnp.float32, 1.5e-6)])
def test_accounts_and_components_sum_to_the_change_of_equity(dtype, tolerance, monitoring):
    outcome = simulate_paths(_market(dtype), _mixed_book(dtype), 4096, Plan(T, monitoring=monitoring), seed=2)
    assert outcome.equity.dtype == dtype
    change = np.asarray(outcome.equity[-1], np.float64) - 1.0
    total = sum(np.asarray(row, np.float64) for row in outcome.accounts.values())
    np.testing.assert_allclose(total, change, atol=tolerance)
    np.testing.assert_allclose(np.asarray(outcome.components, np.float64).sum(axis=0), change, atol=tolerance)
    assert outcome.components.shape[0] == len(_mixed_book().components)
    assert bool(jnp.all(outcome.is_finite))


# ----------------------------------------------------------------------------- first passage against closed forms


def _touch(sigma, days, mu, barrier, n, *, steps=None, monitoring="bridge", seed=0):
    steps = steps or max(1, round(days))
    hours = 24.0 * days / steps
    market = gbm(("X",), [sigma], step_hours=hours, drift="user", per_year=mu, dtype=F64)
    plan = Plan(steps, step_hours=hours, monitoring=monitoring, dates=(steps,), attribution=False)
    return np.asarray(simulate_paths(market, touch_book(market, barrier), n, plan, seed=seed).hit_probability[-1, 0])


def test_touch_probability_of_gbm(cases):
    # Four steps whatever the horizon: the bridge is exact at any step. All five cases share one program.
    for row in cases("models")["B01"]["expected"].values():
        p = row["inputs"]
        f = _touch(p["sigma"], p["days"], p["mu"], p["barrier"], 1 << 17, steps=4)
        assert_mc(f, row["prob_hit"])


@pytest.mark.slow
def test_touch_probability_by_monitoring(cases):
    case = cases("domain")["perp-15"]
    for k, barrier in enumerate(case["inputs"]["barriers"]):
        n = 1 << 17
        assert_mc(_touch(0.6, 30, 0.0, barrier, n), case["expected"]["continuous"][k])
        daily = _touch(0.6, 30, 0.0, barrier, n, monitoring="step", seed=1)
        assert_frequency(daily.sum(), n, case["expected"]["daily"][k])


@pytest.mark.slow
def test_touch_probability_by_hourly_monitoring(cases):
    case = cases("domain")["perp-15"]
    for k, barrier in enumerate(case["inputs"]["barriers"]):
        n = 1 << 14
        hourly = _touch(0.6, 30, 0.0, barrier, n, steps=720, monitoring="step", seed=2)
        assert_frequency(hourly.sum(), n, case["expected"]["hourly"][k])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("a", marks=pytest.mark.slow), "b", pytest.param("c", marks=pytest.mark.slow)]
)
def test_derivatives_of_the_touch_probability(cases, name):
    # Pathwise through the survival weight, within 4 standard errors; margin moves the barrier, dH = -dM / (1 - rate).
    rate, n = 0.004, 1 << 15
    row = cases("models")["F03"]["expected"][name]
    p = row["inputs"]
    steps = 6
    hours = p["T"] * 8760.0 / steps
    market = gbm(("X",), [p["sigma"]], step_hours=hours, drift="user", per_year=p["mu"], dtype=F64)
    book = touch_book(market, p["H"], rate=rate)
    plan = Plan(steps, step_hours=hours, dates=(steps,), attribution=False)
    years = p["T"] / steps

    def hit(shift, path, market=market, book=book, plan=plan, years=years, p=p):
        mu, sigma, margin = p["mu"] + shift[0], p["sigma"] + shift[1], book.perpetuals[0].margin + shift[2]
        moved = dataclasses.replace(
            market,
            drift=jnp.full((1, 1), (mu - 0.5 * sigma**2) * years),
            volatility=jnp.full((1, 1), sigma * np.sqrt(years)),
        )
        changed = dataclasses.replace(book, perpetuals=(book.perpetuals[0]._replace(margin=margin),))
        return simulate_paths(moved, changed, path, plan, seed=4).hit_probability[-1, 0]

    # One tangent per parameter gives the derivative of every path at once, hence its standard error.
    path = jnp.arange(n, dtype=jnp.uint32)
    values = hit(jnp.zeros(3), path)
    tangents = [np.asarray(jax.jvp(lambda s: hit(s, path), (jnp.zeros(3),), (e,))[1]) for e in jnp.eye(3)]
    assert_mc(values, row["P"])
    assert_mc(tangents[0], row["dP_dmu"])
    assert_mc(tangents[1], row["dP_dsigma"])
    # margin = 1 - H + rate H
    assert_mc(-tangents[2] * (1.0 - rate), row["dP_dH"])
    if name == "b":
        reverse = jax.grad(lambda s: jnp.mean(hit(s, path)))(jnp.zeros(3))
        np.testing.assert_allclose(reverse, [t.mean() for t in tangents], rtol=1e-9)


def test_loan_with_asset_debt_hits_when_the_ratio_does():
    sigma, rho, mu, days, steps = np.array([0.9, 0.6]), 0.4, np.array([0.1, 0.5]), 60.0, 5
    hours = days * 24.0 / steps
    market = gbm(("A", "B"), sigma, [[1.0, rho], [rho, 1.0]], step_hours=hours, drift="user", per_year=mu, dtype=F64)
    book = build_book(
        ("A", "B"), loans=[dict(name="l", venue=lending(), collateral={"A": 1.0}, debt={"B": 0.6})], dtype=F64
    )
    plan = Plan(steps, step_hours=hours, dates=(steps,), attribution=False)
    f = simulate_paths(market, book, 1 << 17, plan).hit_probability[-1, 0]
    s = np.sqrt(sigma[0] ** 2 + sigma[1] ** 2 - 2 * rho * sigma.prod())
    years = days / 365.0
    nu, b, sd = (mu - 0.5 * sigma**2) @ [1.0, -1.0], -np.log(0.83 / 0.6), s * np.sqrt(years)
    exact = stats.norm.cdf((b - nu * years) / sd) + np.exp(2 * nu * b / s**2) * stats.norm.cdf((b + nu * years) / sd)
    assert_mc(f, exact)


def test_touch_probability_across_a_margin_tier():
    # The barrier lies in a lower tier than the start, just below the tier's floor (rates 5 % and 10 %).
    tiers = [[0.0, 0.05], [850_000.0, 0.1]]
    venue = tiered(tiers=tiers)
    market = gbm(("X",), [0.6], drift="user", per_year=0.0, dtype=F64)
    book = build_book(
        ("X",),
        capital=CAPITAL,
        perpetuals=[dict(name="x", venue=venue, mode="isolated", margin=0.2, positions={"X": 1.0})],
        dtype=F64,
    )
    barrier = liquidation_price(venue.schedule("X"), quantity=CAPITAL, entry=1.0, margin=0.2 * CAPITAL)
    assert barrier == pytest.approx(0.8 / 0.95) and barrier < 0.85
    f = simulate_paths(market, book, 1 << 17, Plan(30, dates=(30,), attribution=False)).hit_probability[-1, 0]
    sd, b, nu = 0.6 * np.sqrt(30 / 365.0), np.log(barrier), -0.5 * 0.36
    years = 30 / 365.0
    exact = stats.norm.cdf((b - nu * years) / sd) + np.exp(2 * nu * b / 0.36) * stats.norm.cdf((b + nu * years) / sd)
    assert_mc(f, exact)


# ----------------------------------------------------------------------------- the two branches


@pytest.mark.parametrize("monitoring", ["bridge", "step"])
def test_survival_branch_has_the_mean_of_the_drawn_branch(monitoring):
    # Perpetual accounts with costs and funding: paired differences of probability and equity, 4 standard errors.
    venue = tiered(0.01, funding_rate=0.0004, liquidation_fee_rate=0.012, liquidation_slippage=0.004)
    book = build_book(
        ("A", "B", "C"),
        spot={"B": 0.2},
        perpetuals=[
            dict(name="long", venue=venue, mode="isolated", margin=0.2, positions={"A": 0.7}),
            dict(name="cross", venue=venue, margin=0.3, positions={"A": 0.6, "B": -0.5, "C": 0.3}),
        ],
        dtype=F64,
    )
    outcome = simulate_paths(_market(), book, 1 << 15, Plan(T, monitoring=monitoring, attribution=False), seed=3)
    c = outcome.conditional
    drawn = np.asarray(outcome.is_liquidated, np.float64)
    np.testing.assert_array_equal(c.hit_probability, outcome.hit_probability[-1])
    conditional_equity = c.outright + np.sum((1.0 - c.hit_probability) * c.survived + c.liquidated, axis=0)
    if monitoring == "step":
        np.testing.assert_array_equal(drawn, c.hit_probability)
        np.testing.assert_allclose(conditional_equity, outcome.equity[-1], atol=1e-12)
        return
    for j in range(2):
        assert_mc(drawn[j] - c.hit_probability[j], 0.0)
        assert np.var(c.hit_probability[j]) < np.var(drawn[j])
        value = (1.0 - c.hit_probability[j]) * c.survived[j] + c.liquidated[j]
        assert_mc(outcome.account_equity[j] - value, 0.0)
    assert_mc(outcome.equity[-1] - conditional_equity, 0.0)


def test_survival_branch_of_a_loan_until_its_first_liquidation():
    # The survival branch stops at the first liquidation; a loan that is closed whole by it has no second one.
    pool = lending(small_position_usd=1e9)
    book = build_book(
        ("A", "B", "C"),
        loans=[dict(name="l", venue=pool, collateral={"A": 1.0}, debt={"USD": 0.3, "C": 0.2})],
        dtype=F64,
    )
    outcome = simulate_paths(_market(), book, 1 << 15, Plan(T, attribution=False), seed=6)
    c = outcome.conditional
    assert_mc(np.asarray(outcome.is_liquidated[0], np.float64) - c.hit_probability[0], 0.0)
    value = c.outright + (1.0 - c.hit_probability[0]) * c.survived[0] + c.liquidated[0]
    assert_mc(outcome.equity[-1] - value, 0.0)


def test_hit_probability_is_a_distribution_function():
    outcome = simulate_paths(_market(jnp.float32), _mixed_book(jnp.float32), 4096, Plan(T), seed=2)
    f = np.asarray(outcome.hit_probability)
    assert np.all(np.diff(f, axis=0) >= 0.0) and f.min() >= 0.0 and f.max() <= 1.0


def test_liquidated_perpetual_is_closed_for_good():
    market = single_market(drift=0.0, volatility=0.08)
    book = touch_book(market, 0.9, liquidation_fee_rate=0.01)
    outcome = simulate_paths(market, book, 2000, Plan(20), seed=1)
    dead = np.asarray(outcome.is_liquidated[0])
    final = np.asarray(outcome.account_equity[0])
    # Closed at the liquidation price 0.9: margin - 0.1 - fee, which is maintenance minus fee.
    np.testing.assert_allclose(final[dead], max(0.004 * 0.9 - 0.01 * 0.9, 0.0), atol=1e-12)
    assert np.all(final[~dead] > 0.0)
    equity = np.asarray(outcome.equity)
    closed_early = equity[9] == equity[10]
    np.testing.assert_array_equal(
        equity[10:, closed_early], np.broadcast_to(equity[9, closed_early], (10, closed_early.sum()))
    )


@pytest.mark.slow
def test_first_order_bias_of_the_bridge_for_a_cross_account():
    # One step a day against 64 a day on independent seeds. The bridge of a basket is first order in the step: its bias
    # must stay below 1 % of the probability beyond 4 standard errors (measured on more paths: -0.3 % +- 0.8 %).
    venue = tiered(0.01)
    market = _market()
    book = build_book(
        ("A", "B", "C"),
        perpetuals=[dict(name="x", venue=venue, margin=0.3, positions={"A": 0.9, "B": -0.6, "C": 0.5})],
        dtype=F64,
    )
    rows = []
    for sub, n, seed in ((1, 1 << 17, 1), (64, 1 << 15, 2)):
        plan = Plan(8 * sub, step_hours=24.0 / sub, dates=(8 * sub,), attribution=False)
        f = np.asarray(simulate_paths(market, book, n, plan, seed=seed).hit_probability[-1, 0])
        rows.append((f.mean(), f.std() / np.sqrt(n)))
    (coarse, a), (fine, b) = rows
    assert 0.05 < fine < 0.6
    assert abs(coarse - fine) < 4.0 * np.hypot(a, b) + 0.01 * fine, (coarse, fine, a, b)
