"""Weights through the simulator: the smooth sample, its gradients, the constraints, the result on fresh paths."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference.builders import F64, assert_mc, lending, tiered

from qpo_sim import random
from qpo_sim.book import build_book
from qpo_sim.book.ledger import Conditional
from qpo_sim.compute.run import device_mesh
from qpo_sim.errors import InputError
from qpo_sim.market import gbm, model
from qpo_sim.optimize import portfolio
from qpo_sim.optimize.portfolio import Problem, ThroughSimulator, Weights, optimize_weights
from qpo_sim.simulate import Plan, record_market, simulate_paths

ASSETS = ("A", "B", "C")
STEPS = 4


def market_of(dtype=F64):
    """Two regimes, fat tails; B is twice as volatile as A, C has a drift."""
    rho = np.array([[1.0, 0.6, 0.3], [0.6, 1.0, 0.5], [0.3, 0.5, 1.0]])
    return model.Market(
        initial=jnp.asarray([0.7, 0.3], dtype),
        transition=jnp.asarray([[0.9, 0.1], [0.3, 0.7]], dtype),
        drift=jnp.asarray([[0.0, 0.0, 0.004], [0.0, 0.0, 0.004]], dtype),
        volatility=jnp.asarray([[0.03, 0.06, 0.05], [0.06, 0.12, 0.1]], dtype),
        correlation_cholesky=jnp.asarray(np.stack([np.linalg.cholesky(rho)] * 2), dtype),
        dof=jnp.asarray([5.0, 4.0], dtype),
        assets=ASSETS,
    )


def book_of(dtype=F64, *, loan=True):
    venue = tiered(0.01, funding_rate=1e-4, liquidation_fee_rate=0.01)
    account = dict(venue=venue, mode="cross")
    return build_book(
        ASSETS,
        spot={"A": 0.1, "B": 0.2, "C": 0.1},
        perpetuals=[
            account | dict(name="x", margin=0.1, positions={"A": 0.3, "B": 0.25}),
            account | dict(name="y", margin=0.05, positions={"C": -0.35}),
        ],
        loans=[dict(name="l", venue=lending(), collateral={"C": 0.3}, debt={"USD": 0.22})] if loan else [],
        dtype=dtype,
    )


def small_book_of(dtype=F64):
    """What compiles in a few seconds: two spot holdings and one account of two positions."""
    venue = tiered(0.01, funding_rate=1e-4, liquidation_fee_rate=0.01)
    return build_book(
        ASSETS,
        spot={"A": 0.2, "B": 0.3},
        perpetuals=[dict(name="x", venue=venue, mode="cross", margin=0.12, positions={"A": 0.4, "C": -0.3})],
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def market():
    return market_of()


@pytest.fixture(scope="module")
def book():
    return book_of()


@pytest.fixture(scope="module")
def small_book():
    return small_book_of()


# ----------------------------------------------------------------------------- the mixture


def test_mixture_by_hand():
    """One path, two accounts: four worlds with their probabilities and values."""
    conditional = Conditional(
        jnp.array([0.5]), jnp.array([[0.3], [0.2]]), jnp.array([[0.25 * 0.1], [0.0]]), jnp.array([[0.25], [0.4]])
    )
    equity, weight = portfolio.mixture(conditional)
    worlds = sorted(zip(np.asarray(equity).tolist(), np.asarray(weight).tolist(), strict=True))
    expected = sorted([(1.0, 0.75 * 0.6), (0.8, 0.25 * 0.6), (0.8, 0.75 * 0.4), (0.6, 0.25 * 0.4)])
    np.testing.assert_allclose(np.array(worlds), np.array(expected), atol=1e-15)


@pytest.mark.parametrize("n_accounts", [0, 1, 3, 5, 7])
def test_mixture_has_the_conditional_mean_and_unit_weight_per_path(n_accounts):
    """More accounts than are mixed exactly still keep the mean of every path."""
    g = np.random.default_rng(n_accounts)
    n = 50
    hit = g.uniform(0.0, 1.0, (n_accounts, n)) * (g.uniform(size=(n_accounts, n)) < 0.7)
    survived, after = g.normal(size=(n_accounts, n)), g.normal(size=(n_accounts, n))
    outright = g.normal(size=n)
    equity, weight = map(np.asarray, portfolio.mixture(Conditional(outright, survived, hit * after, hit)))
    assert np.all(weight >= 0.0)
    np.testing.assert_allclose(weight.reshape(-1, n).sum(axis=0), 1.0, atol=1e-12)
    expected = outright + ((1.0 - hit) * survived + hit * after).sum(axis=0)
    np.testing.assert_allclose((weight * equity).reshape(-1, n).sum(axis=0), expected, atol=1e-12)


@pytest.fixture(scope="module")
def both_branches(market):
    book = book_of(loan=False)
    return simulate_paths(market, book, 40_000, Plan(STEPS, dates=(STEPS,), attribution=False), seed=3)


def test_mixture_has_the_mean_of_the_drawn_branch(both_branches):
    outcome = both_branches
    assert outcome.is_liquidated.mean(axis=1).min() > 0.02  # else nothing is tested
    equity, weight = map(np.asarray, portfolio.mixture(outcome.conditional))
    smooth = (equity * weight).reshape(-1, 40_000).sum(axis=0)
    assert_mc(smooth - np.asarray(outcome.equity[-1]), 0.0)


def test_mixture_has_the_law_of_the_drawn_branch(both_branches):
    """Not only the mean: given the path, two accounts are liquidated independently in both."""
    outcome = both_branches
    equity, weight = map(np.asarray, portfolio.mixture(outcome.conditional))
    drawn = np.asarray(outcome.equity[-1])
    for bound in (0.75, 0.85, 0.95, 1.05):
        smooth = (weight * (equity < bound)).reshape(-1, 40_000).sum(axis=0)
        difference = smooth - (drawn < bound)
        # The value after liquidation is its mean over liquidation times: a little mass moves across a bound.
        assert abs(difference.mean()) < 4.0 * difference.std() / np.sqrt(drawn.size) + 1e-3


# ----------------------------------------------------------------------------- gradients


def through(market, book, name, penalty=0.0, *, n_paths=512, level=0.9, devices=1, monitoring="bridge"):
    """The objective and its problem as `optimize_weights` sets them up."""
    plan = Plan(STEPS, dates=(STEPS,), attribution=False, drawn=False, monitoring=monitoring)
    bounds = portfolio.bounds_of(book)
    path = jnp.arange(n_paths, dtype=jnp.uint32)
    prepared = model.prepare(market)
    problem = Problem(market, prepared, book, random.stream_keys(0), path, bounds)
    return ThroughSimulator(name, level, 0.5, penalty, plan, device_mesh(devices)), problem


# A score is static: one program per objective.
value_and_grad_of = jax.jit(lambda w, p, score: jax.value_and_grad(score)(w, p), static_argnames="score")


slow = pytest.mark.slow  # ten seconds of compilation each, and they share all but the last line with the others


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        pytest.param("cvar", 0.0, marks=slow),
        ("cvar", 0.3),
        pytest.param("sharpe", 0.0, marks=slow),
        pytest.param("mean_cvar", 0.0, marks=slow),
        pytest.param("sortino", 0.0, marks=slow),
    ],
)
def test_gradient_in_the_weights_against_finite_differences(market, small_book, name, penalty):
    score, problem = through(market, small_book, name, penalty)
    weights = portfolio.weights_of(small_book)
    gradient = value_and_grad_of(weights, problem, score=score)[1]
    flat, unflatten = ravel_pytree(weights)
    # The tail measure has kinks where sample points change order: the step must be small against their distance.
    step = 1e-7 if "cvar" in name else 1e-6
    expected = []
    for unit in np.eye(flat.size):
        ends = [
            float(value_and_grad_of(unflatten(flat + sign * step * unit), problem, score=score)[0])
            for sign in (1.0, -1.0)
        ]
        expected.append((ends[0] - ends[1]) / (2.0 * step))
    found = np.concatenate([np.asarray(x) for x in gradient])
    assert np.all(np.abs(found) > 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)


def test_penalty_adds_the_liquidation_probabilities(market, small_book):
    plain, problem = through(market, small_book, "cvar")
    priced, _ = through(market, small_book, "cvar", 0.3)
    weights = portfolio.weights_of(small_book)
    difference = (
        value_and_grad_of(weights, problem, score=priced)[0] - value_and_grad_of(weights, problem, score=plain)[0]
    )
    plan = Plan(STEPS, dates=(STEPS,), attribution=False)
    hit = simulate_paths(market, small_book, 512, plan).hit_probability[-1]
    assert float(difference) == pytest.approx(0.3 * float(jnp.sum(jnp.mean(hit, axis=1))), rel=1e-9)


def test_recorded_market_gives_the_same_objective_and_gradient(market, small_book):
    score, problem = through(market, small_book, "cvar", 0.3)
    record = jax.jit(record_market, static_argnames="plan")(
        market, problem.prepared, problem.keys, problem.path, score.plan
    )
    weights = portfolio.weights_of(small_book)
    live = value_and_grad_of(weights, problem, score=score)
    told = value_and_grad_of(weights, problem._replace(record=record), score=score)
    for a, b in zip(jax.tree.leaves(live), jax.tree.leaves(told), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


# ----------------------------------------------------------------------------- weights <-> book


def test_weights_go_in_and_come_out(book):
    weights = Weights(jnp.array([0.3, 0.05, 0.05]), jnp.array([0.1, -0.2, 0.4]))
    changed = portfolio.with_weights(book, weights)
    for a, b in zip(portfolio.weights_of(changed), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert portfolio.position_names(book) == ("A spot", "B spot", "C spot", "A x", "B x", "C y")
    assert changed.loans is book.loans and changed.cash is book.cash


def test_marked_book_has_the_same_equity_and_liquidations(market):
    """Positions opened at other prices: margin takes the unrealised profit, nothing else changes."""
    venue = tiered(0.01, funding_rate=1e-4, liquidation_fee_rate=0.01)
    account = dict(
        name="x", venue=venue, mode="cross", margin=0.03, positions={"A": 0.4, "B": -0.3}, entry={"A": 90.0, "B": 52.0}
    )
    book = build_book(ASSETS, spot={"C": 0.3}, perpetuals=[account], prices={"A": 100.0, "B": 50.0}, dtype=F64)
    assert np.all(np.abs(np.asarray(book.perpetuals[0].entry) - 1.0) > 0.03)
    moved = portfolio.marked(book)
    np.testing.assert_array_equal(moved.perpetuals[0].entry, 1.0)
    assert float(moved.perpetuals[0].margin) == pytest.approx(0.03 + 0.4 * 0.1 - 0.3 * (1.0 - 1.04))
    plan = Plan(STEPS, attribution=False)
    a, b = (simulate_paths(market, x, 2048, plan) for x in (book, moved))
    assert a.is_liquidated.mean() > 0.02
    np.testing.assert_array_equal(a.is_liquidated, b.is_liquidated)
    for name in ("equity", "hit_probability", "max_drawdown", "account_equity"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-12, err_msg=name)


def test_equal_weights_keep_budget_gross_and_signs(book):
    start = portfolio.weights_of(book)
    equal = portfolio.equal_weights(start, portfolio.bounds_of(book))
    np.testing.assert_allclose(equal.spot, 0.4 / 3, atol=1e-14)
    np.testing.assert_allclose(equal.perpetual, np.array([1.0, 1.0, -1.0]) * 0.3, atol=1e-14)
    # Within bounds: a cap on B pushes the rest to the others.
    bounds = portfolio.bounds_of(book, upper={"B spot": 0.1}, gross_leverage=0.6)
    equal = portfolio.equal_weights(start, bounds)
    np.testing.assert_allclose(equal.spot, [0.15, 0.1, 0.15], atol=1e-14)
    np.testing.assert_allclose(equal.perpetual, [0.2, 0.2, -0.2], atol=1e-14)


def test_bounds_by_asset_and_by_position(book):
    bounds = portfolio.bounds_of(book, lower={"A": 0.05}, upper={"A": 0.2, "A x": 0.1})
    np.testing.assert_allclose(bounds.lower.spot, [0.05, 0.0, 0.0])
    np.testing.assert_allclose(bounds.upper.spot, [0.2, 1.0, 1.0])
    np.testing.assert_allclose(bounds.upper.perpetual, [0.1, 1.0, 1.0])
    np.testing.assert_allclose(bounds.lower.perpetual, [-0.1, -1.0, -1.0])
    assert float(bounds.budget) == pytest.approx(0.4) and float(bounds.gross) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(lower=0.2), "lower bounds sum to 0.6, above the budget of 0.4"),
        (dict(upper=0.1), "upper bounds sum to 0.3, below the budget of 0.4"),
        (dict(lower=0.3, upper=0.2), "lower bound exceeds"),
        (dict(lower={"A": -0.1}), "spot is long-only"),
        (dict(upper={"D": 0.1}), "'D'; the weights are A spot"),
        (dict(gross_leverage=-1.0), "gross_leverage is -1"),
        (dict(upper={"A": float("nan")}), "upper"),
        (dict(upper={"A x": -0.1}), "upper"),
    ],
)
def test_constraints_that_cannot_be_met_are_refused(book, options, words):
    with pytest.raises(InputError, match=words):
        portfolio.bounds_of(book, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(objective_name="cavr"), "objective is 'cavr'"),
        (dict(level=99.0), "confidence level is 99"),
        (dict(lower=0.3), "above the budget"),
        (dict(step_hours=5.0), "must divide"),
    ],
)
def test_optimisations_that_cannot_be_are_refused(market, book, options, words):
    with pytest.raises(InputError, match=words):
        optimize_weights(market, book, n_steps=2, n_paths=256, n_test_paths=256, n_iterations=1, **options)


def test_book_without_weights_is_refused(market):
    book = build_book(
        ASSETS, loans=[dict(name="l", venue=lending(), collateral={"A": 0.5}, debt={"USD": 0.2})], dtype=F64
    )
    with pytest.raises(InputError, match="no weights to choose"):
        optimize_weights(market, book, n_steps=2)


# ----------------------------------------------------------------------------- the whole


OPTIONS = dict(
    n_steps=STEPS,
    objective_name="cvar",
    level=0.95,
    n_paths=2048,
    n_test_paths=16_384,
    n_iterations=40,
    learning_rate=0.05,
    gross_leverage=0.5,
    upper={"A": 0.35, "B": 0.4, "C": 0.3},
)


@pytest.fixture(scope="module")
def optimum():
    return optimize_weights(market_of(jnp.float32), small_book_of(jnp.float32), devices=1, **OPTIONS)


def test_optimum_is_feasible_and_better_on_fresh_paths(optimum):
    spot, perpetual = optimum.after[:2], optimum.after[2:]
    assert spot.sum() == pytest.approx(0.5, abs=1e-6)
    assert np.all(spot >= 0.0) and np.all(spot <= np.float32([0.35, 0.4]))
    assert np.abs(perpetual).sum() <= 0.5 + 1e-6
    np.testing.assert_allclose(optimum.before, [0.2, 0.3, 0.4, -0.3], atol=1e-7)
    np.testing.assert_allclose(optimum.equal, [0.25, 0.25, 0.25, -0.25], atol=1e-6)
    rows = {(row.portfolio, row.measure): row for row in optimum.comparison}
    better = rows["optimised", "conditional_value_at_risk"]
    assert better.difference + 4.0 * better.difference_std_error < 0.0
    # The objective falls by far more than rounding, and what is returned is the best of the trace.
    assert float(optimum.solution.value) == pytest.approx(float(np.min(optimum.solution.trace)), rel=1e-6)
    assert float(optimum.solution.value) < 0.8 * float(optimum.solution.trace[0])
    np.testing.assert_array_equal(
        np.concatenate([np.asarray(w) for w in portfolio.weights_of(optimum.book)]), np.float32(optimum.after)
    )


def test_spot_weights_move_to_the_calm_asset():
    """Minimum tail risk of two independent assets: nearly all in the calm one, by an amount the variances give."""
    market = gbm(("calm", "wild"), (0.3, 0.9))
    book = build_book(market.assets, spot={"calm": 0.5, "wild": 0.5})
    found = optimize_weights(
        market, book, n_steps=2, level=0.95, n_paths=8192, n_test_paths=4096, n_iterations=100, learning_rate=0.05
    )
    # Small normal returns: minimum variance weights, wild/calm = 1/9; the sample's own optimum is within a few percent.
    np.testing.assert_allclose(found.after, [0.9, 0.1], atol=0.03)


def test_comparison_has_every_measure_of_every_portfolio(optimum):
    names = [row.portfolio for row in optimum.comparison]
    assert list(dict.fromkeys(names)) == ["start", "optimised", "equal"]
    for row in optimum.comparison:
        assert np.isfinite([row.value, row.std_error, row.difference, row.difference_std_error]).all()
        assert row.std_error > 0.0
        if row.portfolio == "start":
            assert row.difference == 0.0 and row.difference_std_error == 0.0
    measures = {row.measure for row in optimum.comparison}
    assert "liquidation_probability:x" in measures


def test_two_devices_give_the_same_weights(optimum):
    both = optimize_weights(market_of(jnp.float32), small_book_of(jnp.float32), devices=2, **OPTIONS)
    # A sum in another order moves a gradient by a rounding; at a kink of the tail measure that can swap two scenarios.
    np.testing.assert_allclose(both.after, optimum.after, atol=1e-5)
    for a, b in zip(both.comparison, optimum.comparison, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-4, abs=1e-5), a.measure


def test_fresh_paths_are_neither_the_runs_nor_the_trainings():
    """Path numbers are 32 bits: three ranges that the largest sizes keep apart."""
    assert 0 < portfolio.TRAIN_FIRST < portfolio.TEST_FIRST < 2**32
    assert portfolio.TEST_FIRST - portfolio.TRAIN_FIRST >= 2**30


# ----------------------------------------------------------------------------- errors of the comparison


def paired(seed, n=1500):
    """Losses and liquidation probabilities of two correlated portfolios."""
    g = np.random.default_rng(seed)
    common = g.standard_t(5, n)
    first = 0.05 * common + 0.01 * g.standard_normal(n) - 0.01
    second = 0.04 * common + 0.01 * g.standard_normal(n) - 0.008
    hit = [1.0 / (1.0 + np.exp(-40.0 * (loss - 0.1))) for loss in (first, second)]
    return (first, hit[0][None]), (second, hit[1][None])


def test_influence_errors_of_differences_match_replication():
    """Over 400 replications the stated error of each difference is its spread (relative error of a spread: 3.5 %)."""
    differences, errors, singles, single_errors = {}, {}, {}, {}
    for seed in range(400):
        first, second = (portfolio._influences(loss, hit, ("x",), 0.95, 7.0) for loss, hit in paired(seed))
        for name in first:
            differences.setdefault(name, []).append(second[name][0] - first[name][0])
            errors.setdefault(name, []).append(portfolio._error(second[name][1] - first[name][1]))
            singles.setdefault(name, []).append(first[name][0])
            single_errors.setdefault(name, []).append(portfolio._error(first[name][1]))
    for found, stated in ((differences, errors), (singles, single_errors)):
        for name in found:
            ratio = np.mean(stated[name]) / np.std(found[name], ddof=1)
            # Fourth moments of a t5 do not converge fast: volatility and what divides by it get more room.
            room = 0.12 if name in ("mean_return", "conditional_value_at_risk", "liquidation_probability:x") else 0.25
            assert abs(ratio - 1.0) < room, (name, ratio)


@pytest.mark.parametrize("size", [1500, 1501, 4096])
def test_influences_have_mean_zero_and_the_measures_are_their_definitions(size):
    (loss, hit), _ = paired(0, size)
    found = portfolio._influences(loss, hit, ("x",), 0.95, 7.0)
    for name, (_, influence) in found.items():
        assert abs(influence.mean()) < 1e-9, name
    p, annual = -loss, np.sqrt(365.0 / 7.0)
    assert found["sharpe_ratio"][0] == pytest.approx(annual * p.mean() / p.std())
    assert found["sortino_ratio"][0] == pytest.approx(annual * p.mean() / np.sqrt(np.mean(np.minimum(p, 0.0) ** 2)))
    order = np.sort(loss)[::-1]
    k = 0.05 * size
    whole = int(k)
    cvar = (order[:whole].sum() + (k - whole) * order[whole]) / k
    assert found["conditional_value_at_risk"][0] == pytest.approx(cvar, rel=1e-12)


@pytest.mark.slow
def test_errors_of_the_comparison_match_replicated_runs():
    """200 small comparisons on disjoint fresh paths: stated errors of the differences against their spread."""
    # Tails thin enough for the errors of the volatility, which rest on fourth moments, to have settled.
    market = replace(market_of(jnp.float32), dof=jnp.float32([15.0, 15.0]))
    book = book_of(jnp.float32, loan=False)
    plan = Plan(2, dates=(2,), attribution=False)
    size = 4096
    engine = portfolio.build_engine(market, book, plan, n_paths=size)
    other = portfolio.with_weights(book, Weights(jnp.float32([0.2, 0.1, 0.1]), jnp.float32([0.2, 0.2, -0.2])))
    rows = [
        portfolio.compare(engine, {"a": book, "b": other}, level=0.95, n_paths=size, first_path=k * size)
        for k in range(200)
    ]
    for i, row in enumerate(rows[0]):
        if row.portfolio == "a":
            continue
        spread = np.std([r[i].difference for r in rows], ddof=1)
        stated = np.mean([r[i].difference_std_error for r in rows])
        assert abs(stated / spread - 1.0) < 0.2, (row.measure, stated, spread)


def test_projection_of_weights_is_per_part(book):
    bounds = portfolio.bounds_of(book, gross_leverage=0.5)
    found = portfolio.project(Weights(jnp.array([1.0, 0.2, -0.3]), jnp.array([0.9, -0.3, 0.1])), bounds)
    assert float(jnp.sum(found.spot)) == pytest.approx(0.4, abs=1e-12)
    assert float(jnp.sum(jnp.abs(found.perpetual))) == pytest.approx(0.5, abs=1e-12)
    spot_only = replace(book, perpetuals=(), perpetual_shapes=())
    empty = portfolio.project(portfolio.weights_of(spot_only), portfolio.bounds_of(spot_only))
    assert empty.perpetual.shape == (0,)
    assert portfolio.position_names(spot_only) == ("A spot", "B spot", "C spot")
