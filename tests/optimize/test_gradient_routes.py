"""Every route to a gradient against central differences under common random numbers, and against the other routes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference.builders import F64, tiered

from qpo_sim import random, simulate
from qpo_sim.book import build_book
from qpo_sim.compute.run import device_mesh
from qpo_sim.errors import InputError
from qpo_sim.market import model
from qpo_sim.optimize import linear, objective, portfolio, rebalanced_wealth, terminal_prices
from qpo_sim.optimize.portfolio import OnPrices, Problem, ThroughSimulator
from qpo_sim.simulate import Plan, context_of, market_paths, residual_bytes, simulate_paths, stage_line

ASSETS = ("A", "B")
# Blocks of the two-level plan do not divide it: the last one is padded.
STEPS = 7
PATHS = 512


def market_of(dtype=F64):
    rho = np.linalg.cholesky(np.array([[1.0, 0.6], [0.6, 1.0]]))
    return model.Market(
        initial=jnp.asarray([0.7, 0.3], dtype),
        transition=jnp.asarray([[0.9, 0.1], [0.3, 0.7]], dtype),
        drift=jnp.asarray([[0.0, 0.002], [0.0, 0.004]], dtype),
        volatility=jnp.asarray([[0.03, 0.05], [0.06, 0.1]], dtype),
        correlation_cholesky=jnp.asarray(np.stack([rho, rho]), dtype),
        dof=jnp.asarray([5.0, 4.0], dtype),
        assets=ASSETS,
    )


def cvar(loss, weight=None):
    return objective.cvar(loss, jnp.ones_like(loss) if weight is None else weight, level=0.9)


def central(function, point, step=1e-7):
    """Central differences; the steps are small against the distance of the kinks of the tail measure."""
    flat, unflatten = ravel_pytree(point)
    ends = [[float(function(unflatten(flat + s * step * e))) for s in (1.0, -1.0)] for e in np.eye(flat.size)]
    return np.array([(up - down) / (2.0 * step) for up, down in ends])


@pytest.fixture(scope="module")
def market():
    return market_of()


@pytest.fixture(scope="module")
def record(market):
    return market_paths(market, PATHS, Plan(STEPS))


# ----------------------------------------------------------------------------- rebalanced


def test_rebalanced_wealth_is_the_product_of_its_growth(market, record):
    weights, leverage = np.array([0.7, -0.4]), 1.5
    log_price = np.asarray(record.log_price)
    returns = np.expm1(np.diff(log_price, axis=0, prepend=0.0))
    expected = np.prod(1.0 + leverage * np.einsum("i,tin->tn", weights, returns), axis=0)
    found = rebalanced_wealth(market, weights, leverage, PATHS, Plan(STEPS))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_rebalanced_gradient_against_central_differences(market):
    @jax.jit
    def value(point):
        return cvar(1.0 - rebalanced_wealth(market, point[0], point[1], PATHS, Plan(STEPS)))

    point = (jnp.array([0.6, 0.5]), jnp.array(1.5))
    found = ravel_pytree(jax.jit(jax.grad(value))(point))[0]
    np.testing.assert_allclose(found, central(value, point), rtol=1e-6)
    forward = ravel_pytree(jax.jit(jax.jacfwd(value))(point))[0]
    np.testing.assert_allclose(forward, found, rtol=1e-12)


def test_rebalanced_gradient_is_zero_once_all_is_lost(market):
    """At a leverage that some step wipes out: the wealth is 0 there, and so are finite gradients."""
    weights = jnp.array([0.5, 0.5])
    wealth = lambda x: rebalanced_wealth(market, x, 6.0, PATHS, Plan(STEPS))  # noqa: E731
    lost = np.asarray(wealth(weights)) == 0.0
    assert 0 < lost.sum() < PATHS
    slopes = np.asarray(jax.jit(jax.jacfwd(wealth))(weights))
    assert np.all(np.isfinite(slopes))
    assert np.all(slopes[lost] == 0.0) and np.all(slopes[~lost] != 0.0)


def test_rebalanced_weights_are_one_per_asset(market):
    with pytest.raises(InputError, match="one entry for each"):
        rebalanced_wealth(market, np.ones(3), 1.0, 8, Plan(2))
    with pytest.raises(InputError, match="must divide"):
        rebalanced_wealth(market, np.ones(2), 1.0, 8, Plan(2, step_hours=5.0))


# ----------------------------------------------------------------------------- bought and held


def test_terminal_prices_are_the_recorded_ones(market, record):
    found = terminal_prices(market, PATHS, Plan(STEPS))
    np.testing.assert_allclose(found, np.exp(np.asarray(record.log_price[-1])), rtol=1e-13)
    # A path is the same path whichever others are asked for.
    other = np.arange(PATHS)[::-1]
    np.testing.assert_array_equal(terminal_prices(market, other, Plan(STEPS)), found[:, other])


def spot_problem(market, n_devices=1):
    """A book that holds its assets in another order than the market, with cash."""
    book = build_book(ASSETS, spot={"B": 0.5, "A": 0.3}, dtype=market.drift.dtype)
    path = jnp.arange(PATHS, dtype=jnp.uint32)
    prepared = model.prepare(market)
    problem = Problem(market, prepared, book, random.stream_keys(0), path, portfolio.bounds_of(book))
    plan = Plan(STEPS, dates=(STEPS,), attribution=False, drawn=False)
    return ThroughSimulator("cvar", 0.9, 0.5, 0.0, plan, device_mesh(n_devices)), problem


@pytest.mark.slow
def test_gradient_on_the_matrix_against_central_differences(market):
    score, problem = spot_problem(market)
    problem = problem._replace(prices=portfolio.spot_prices(problem, score))
    weights = portfolio.weights_of(problem.book)
    on_prices = jax.jit(OnPrices("cvar", 0.9, 0.5))
    found = jax.jit(jax.grad(OnPrices("cvar", 0.9, 0.5)))(weights, problem)
    np.testing.assert_allclose(found.spot, central(lambda w: on_prices(w, problem), weights), rtol=1e-6)


def test_spot_books_are_optimised_on_the_matrix_with_the_result_of_the_simulator(market):
    score, problem = spot_problem(market)
    optimizer, start = portfolio.solve.adam(0.05, 30), portfolio.weights_of(problem.book)
    found = portfolio.descend(start, problem, score=score, optimizer=optimizer, n_iterations=30, keeps_paths=True)
    expected = portfolio.solve.minimize(
        score,
        portfolio.project(start, problem.bounds),
        problem,
        project=portfolio._project_problem,
        tangent=portfolio._tangent_problem,
        optimizer=optimizer,
        n_steps=30,
    )
    np.testing.assert_allclose(found.trace, expected.trace, rtol=1e-10)
    np.testing.assert_allclose(found.point.spot, expected.point.spot, rtol=1e-9)
    assert float(found.value) < float(found.trace[0])


# ----------------------------------------------------------------------------- all parameters, by memory


def account_book():
    venue = tiered(0.01, funding_rate=1e-4, liquidation_fee_rate=0.01)
    account = dict(name="x", venue=venue, mode="cross", margin=0.12, positions={"A": 0.5, "B": -0.3})
    return build_book(ASSETS, spot={"A": 0.3}, perpetuals=[account], dtype=F64)


PARAMETERS = ("drift", "volatility", "correlation_cholesky", "dof")


def value_of(remat):
    """CVaR plus liquidation probability as a function of the market's parameters and the weights."""
    plan = Plan(STEPS, dates=(STEPS,), attribution=False, drawn=False, remat=remat)

    def value(point):
        parameters, weights = point
        market = replace(market_of(), **parameters)
        conditional = simulate_paths(market, portfolio.with_weights(account_book(), weights), PATHS, plan).conditional
        equity, weight = portfolio.mixture(conditional)
        return cvar(1.0 - equity, weight) + jnp.mean(conditional.hit_probability)

    market = market_of()
    return value, ({name: getattr(market, name) for name in PARAMETERS}, portfolio.weights_of(account_book()))


@pytest.fixture(scope="module")
def gradients():
    found = {}
    for remat in ("store", "step", "two-level"):
        value, point = value_of(remat)
        found[remat] = jax.jit(jax.value_and_grad(value))(point)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["step", "two-level"])
def test_memory_plans_agree(gradients, remat):
    for a, b in zip(jax.tree.leaves(gradients[remat]), jax.tree.leaves(gradients["store"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)


def test_gradient_of_all_parameters_against_central_differences(gradients):
    value, point = value_of("store")
    call = jax.jit(value)
    found = ravel_pytree(gradients["two-level"][1])[0]
    expected = central(call, point, step=1e-6)
    # The entries above the diagonal of the factors are not read.
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    assert np.sum(np.abs(found) > 1e-5) >= 16


def line_of(n_steps):
    market, book = market_of(), account_book()
    plan = Plan(n_steps, attribution=False, drawn=False)
    path = jnp.arange(PATHS, dtype=jnp.uint32)
    return stage_line(market, book, plan), context_of(
        market, model.prepare(market), book, random.stream_keys(0), path, plan
    )


def sizes_of(n_steps):
    return {remat: residual_bytes(*line_of(n_steps), remat) for remat in ("store", "step", "two-level")}


def test_memory_grows_with_the_steps_or_their_root():
    few, many = sizes_of(25), sizes_of(400)
    for sizes in (few, many):
        assert sizes["store"] > sizes["step"] > sizes["two-level"]
    assert 14.0 < many["step"] / few["step"] < 17.0
    assert many["two-level"] / few["two-level"] < 4.5


@pytest.mark.parametrize(("budget", "expected"), [(3, "store"), (2, "step"), (1, "two-level"), (0, "two-level")])
def test_auto_is_the_first_plan_that_fits(monkeypatch, budget, expected):
    sizes, used = {"store": 3, "step": 2, "two-level": 1}, []
    monkeypatch.setattr(simulate, "GRADIENT_BYTES", budget)
    monkeypatch.setattr(simulate, "residual_bytes", lambda stages, context, remat: sizes[remat])
    monkeypatch.setattr(simulate, "_scan", lambda *arguments: ([], used.append(arguments[-1])))
    simulate.run_line(*line_of(2), "auto")
    assert used == [expected]


def test_unknown_memory_plan_is_refused():
    with pytest.raises(InputError, match="remat is 'all'"):
        Plan(3, remat="all")


def test_blocks_cover_all_steps_with_little_waste():
    for n in [*range(1, 200), 365, 8760]:
        length = simulate._block_length(n)
        assert 0 <= -(-n // length) * length - n < length
        assert length + -(-n // length) <= 2.3 * n**0.5 + 2


def test_sums_of_the_wealth_stage_are_carried_only_for_a_gradient(market):
    assert (
        linear.wealth_stage(2, with_sums=False)
        .init(
            context_of(market, model.prepare(market), None, None, jnp.arange(4, dtype=jnp.uint32), Plan(1))._replace(
                book=jnp.ones(2)
            )
        )
        .sums
        == ()
    )
