r"""Better weights for a book, found by gradient descent through the simulator and checked on fresh paths.

**What is chosen.** Spot holdings (long-only, within bounds, their sum kept, so the cash stays) and perpetual notionals
(within bounds, either sign, gross sum capped). Margins, loans and cash stay as they are.

**What the gradient sees.** The survival branch: per path and account the probability F of liquidation and the values
with and without it. The book's outcome given the path's step ends is then a mixture over which accounts were liquidated
(2^J combinations for J accounts); the objective is taken on this weighted sample, which is smooth in the weights and
has no drawn event in it. The value after a liquidation is its mean over the liquidation times of the path, and a loan
is liquidated at most once; the check on fresh paths uses the drawn branch, without either simplification.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.book.ledger import Book, Conditional
from qpo_sim.compute.run import Engine, build_engine
from qpo_sim.errors import InputError, check_level
from qpo_sim.market.line import MarketRecord
from qpo_sim.market.model import Market
from qpo_sim.optimize import constraints, objective, solve
from qpo_sim.optimize.linear import prices_prepared
from qpo_sim.optimize.solve import Solution
from qpo_sim.simulate import Plan, check_fit, record_bytes, record_market, simulate_prepared
from qpo_sim.types import DAYS_PER_YEAR, Array

# Path numbers of a run start at 0; training and test paths lie far beyond, so all three are different paths.
TRAIN_FIRST, TEST_FIRST = 1 << 30, 1 << 31

# Accounts whose liquidation enters the mixture exactly; further ones enter with their mean over liquidation.
_MIXED_ACCOUNTS = 5


class Weights(NamedTuple):
    """Decision: spot holdings and perpetual notionals, as fractions of the capital."""

    spot: Float[Array, " holdings"]
    perpetual: Float[Array, " positions"]


class Bounds(NamedTuple):
    """Feasible set of `Weights`."""

    lower: Weights
    upper: Weights
    budget: Array
    gross: Array


@dataclass(frozen=True)
class Optimum:
    """Result of `optimize_weights`.

    Attributes:
      book: the book with the new weights.
      positions: name of each weight, spot first.
      before: weights at the start.
      after: weights found.
      equal: equal weights that meet the same budget and gross (signs of the start).
      solution: in-sample objective and its trace.
      comparison: measures of start, optimum and equal weights on fresh paths, paired.
    """

    book: Book
    positions: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray
    equal: np.ndarray
    solution: Solution
    comparison: list["Comparison"]


class Comparison(NamedTuple):
    """A measure of one portfolio on the fresh paths and its difference to the starting weights on the same paths."""

    portfolio: str
    measure: str
    value: float
    std_error: float
    difference: float
    difference_std_error: float


# ----------------------------------------------------------------------------- decision <-> book


def marked(book: Book) -> Book:
    """The same book with every position entered at the starting price; margins absorb the unrealised profit.

    Exact for linear contracts, whose equity depends on margin - quantity x entry only.
    """
    # In NumPy, as all that is done once and is small: each operation of JAX outside a program is a program to compile.
    accounts = []
    for account in book.perpetuals:
        margin, quantity, entry = (np.asarray(x) for x in (account.margin, account.quantity, account.entry))
        accounts.append(account._replace(margin=margin + np.sum(quantity * (1.0 - entry)), entry=np.ones_like(entry)))
    return replace(book, perpetuals=tuple(accounts))


def weights_of(book: Book) -> Weights:
    """Present weights of a book."""
    empty = np.zeros(0, book.spot.dtype)
    return Weights(np.asarray(book.spot), np.concatenate([empty, *(account.quantity for account in book.perpetuals)]))


def with_weights(book: Book, weights: Weights) -> Book:
    """The book with other weights; differentiable."""
    accounts, start = [], 0
    for account in book.perpetuals:
        n = account.quantity.shape[0]
        accounts.append(account._replace(quantity=weights.perpetual[start : start + n]))
        start += n
    return replace(book, spot=weights.spot, perpetuals=tuple(accounts))


def position_names(book: Book) -> tuple[str, ...]:
    """Names of the weights, spot first."""
    spot = [f"{book.assets[i]} spot" for i in book.spot_assets]
    return tuple(spot + [f"{book.assets[i]} {shape.name}" for shape in book.perpetual_shapes for i in shape.assets])


def bounds_of(
    book: Book,
    *,
    lower: float | Mapping[str, float] = 0.0,
    upper: float | Mapping[str, float] = 1.0,
    gross_leverage: float | None = None,
) -> Bounds:
    """Feasible set around a book: spot within [lower, upper] with its sum kept, perpetuals within [-upper, upper].

    Args:
      book: the starting book.
      lower: smallest spot weight, one number or one per asset or position name.
      upper: largest absolute weight, likewise.
      gross_leverage: cap on the sum of absolute perpetual notionals; the start's when omitted.

    Raises:
      InputError: the start violates no rule of its own, but bounds and budget admit no weights at all.
    """
    names = position_names(book)
    n_spot = len(book.spot_assets)
    start = weights_of(book)

    def table(value: float | Mapping[str, float], default: float, key: str) -> np.ndarray:
        if not isinstance(value, Mapping):
            return np.full(len(names), float(value))
        known = {n for n in names} | {n.split(" ")[0] for n in names}
        for name in value:
            if name not in known:
                raise InputError(f"optimizer.{key} names {name!r}; the weights are {', '.join(names)}.")
        return np.array([float(value.get(n, value.get(n.split(" ")[0], default))) for n in names])

    low, high = table(lower, 0.0, "lower"), table(upper, 1.0, "upper")
    if np.any(low[:n_spot] < 0.0):
        raise InputError(
            "optimizer.lower is negative for a spot weight; spot is long-only, use a perpetual to be short."
        )
    for name, value in zip(names[n_spot:], high[n_spot:], strict=True):
        if value < 0.0:
            raise InputError(
                f"optimizer.upper is {value:g} for {name}; it bounds the absolute weight, so take 0 or more."
            )
    dtype = book.spot.dtype
    budget = float(np.sum(start.spot))
    if n_spot:
        constraints.check_budget(budget, low[:n_spot], high[:n_spot], name="optimizer: spot weights")
    gross = float(np.sum(np.abs(start.perpetual))) if gross_leverage is None else float(gross_leverage)
    if gross < 0.0:
        raise InputError(f"optimizer.gross_leverage is {gross}; it must not be negative.")
    reach = np.minimum(high[n_spot:], 1e6)
    return Bounds(
        Weights(low[:n_spot].astype(dtype), -reach.astype(dtype)),
        Weights(high[:n_spot].astype(dtype), reach.astype(dtype)),
        np.asarray(budget, dtype),
        np.asarray(gross, dtype),
    )


def project(weights: Weights, bounds: Bounds) -> Weights:
    """Nearest feasible weights."""
    spot, perpetual = weights
    if spot.shape[0]:
        spot = constraints.project_budget(spot, budget=bounds.budget, lower=bounds.lower.spot, upper=bounds.upper.spot)
    if perpetual.shape[0]:
        perpetual = constraints.project_gross(
            perpetual, gross=bounds.gross, lower=bounds.lower.perpetual, upper=bounds.upper.perpetual
        )
    return Weights(spot, perpetual)


_project = jax.jit(project)


def equal_weights(start: Weights, bounds: Bounds) -> Weights:
    """Spot shared equally; perpetual gross of the start shared equally with the start's signs; then made feasible."""
    n_spot, n_perpetual = start.spot.shape[0], start.perpetual.shape[0]
    spot = np.full_like(start.spot, np.sum(start.spot) / max(n_spot, 1))
    perpetual = np.sign(start.perpetual) * (np.sum(np.abs(start.perpetual)) / max(n_perpetual, 1))
    return _project(Weights(spot, perpetual), bounds)


# ----------------------------------------------------------------------------- objective through the simulator


def mixture(conditional: Conditional) -> tuple[Float[Array, " sample"], Float[Array, " sample"]]:
    """Weighted sample of terminal equity: every combination of liquidated and surviving accounts of every path.

    Returns:
      Equity and weight; the weights of a path sum to 1.
    """
    outright, survived, liquidated, hit = conditional
    n_accounts = survived.shape[0]
    exact = min(n_accounts, _MIXED_ACCOUNTS)
    for j in range(exact, n_accounts):
        outright = outright + (1.0 - hit[j]) * survived[j] + liquidated[j]
    occurs = hit > 1e-9
    after = jnp.where(occurs, liquidated / jnp.where(occurs, hit, 1.0), 0.0)
    equity, weight = [], []
    for combination in product((False, True), repeat=exact):
        value, chance = outright, jnp.ones_like(outright)
        for j, is_hit in enumerate(combination):
            value = value + (after[j] if is_hit else survived[j])
            chance = chance * (hit[j] if is_hit else 1.0 - hit[j])
        equity.append(value)
        weight.append(chance)
    return jnp.concatenate(equity), jnp.concatenate(weight)


class Problem(NamedTuple):
    """Everything the objective reads besides the weights."""

    market: Market
    prepared: Any
    book: Book
    keys: Any
    path: Array
    bounds: Bounds
    record: MarketRecord | None = None
    prices: Array | None = None


@dataclass(frozen=True)
class ThroughSimulator:
    """Objective of the weights, by simulating the book; hashable, so that one compiled loop serves equal problems.

    Pathwise gradient: weights (and any leaf of market and book that has one), through survival weights.
    """

    name: str
    level: float
    risk_aversion: float
    liquidation_penalty: float
    plan: Plan
    mesh: Mesh

    def __call__(self, weights: Weights, problem: Problem) -> Array:
        """Objective plus the penalty times the summed liquidation probabilities."""
        book = with_weights(problem.book, weights)

        def on_device(prepared, book, keys, path, record):
            return simulate_prepared(problem.market, prepared, book, keys, path, self.plan, record).conditional

        # Explicitly per device: the backward loop then keeps its sums over paths local and adds them over devices once,
        # where automatic partitioning would do so for every parameter and step.
        conditional = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(
                Spec(),
                Spec(),
                Spec(),
                Spec("paths"),
                jax.tree.map(lambda x: Spec(*[None] * (x.ndim - 1), "paths"), problem.record),
            ),
            out_specs=Conditional(Spec("paths"), *[Spec(None, "paths")] * 3),
            check_vma=False,
        )(problem.prepared, book, problem.keys, problem.path, problem.record)
        equity, weight = mixture(conditional)
        score = objective.bind(self.name, level=self.level, risk_aversion=self.risk_aversion)
        value = score(1.0 - equity, weight)
        if self.liquidation_penalty and book.n_accounts:
            value = value + self.liquidation_penalty * jnp.sum(jnp.mean(conditional.hit_probability, axis=1))
        return value


@dataclass(frozen=True)
class OnPrices:
    """Objective of the weights of a book without accounts, on the matrix `Problem.prices` of its spot assets.

    Such a book is worth its cash plus a product of weights and terminal prices, whatever happens on the way.

    Pathwise gradient: weights.
    """

    name: str
    level: float
    risk_aversion: float

    def __call__(self, weights: Weights, problem: Problem) -> Array:
        """Objective of the terminal values, all of one weight."""
        assert problem.prices is not None
        value = lax.dot_general(weights.spot, problem.prices, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        loss = 1.0 - (problem.book.cash + value)
        return objective.bind(self.name, level=self.level, risk_aversion=self.risk_aversion)(loss, jnp.ones_like(loss))


def _project_problem(weights: Weights, problem: Problem) -> Weights:
    return project(weights, problem.bounds)


def _tangent_problem(gradient: Weights, weights: Weights, problem: Problem) -> Weights:
    spot, perpetual = gradient
    bounds = problem.bounds
    if spot.shape[0]:
        spot = constraints.tangent_budget(spot, weights.spot, lower=bounds.lower.spot, upper=bounds.upper.spot)
    if perpetual.shape[0]:
        perpetual = constraints.tangent_gross(perpetual, weights.perpetual, gross=bounds.gross)
    return Weights(spot, perpetual)


# The market's paths do not depend on the weights: up to this many bytes they are made once and every gradient step sees
# them; beyond it each step makes them again.
RECORD_BYTES = 1 << 29


@partial(jax.jit, static_argnames=("score", "optimizer", "n_iterations", "keeps_paths"))
def descend(
    start: Weights, problem: Problem, *, score: ThroughSimulator, optimizer: Any, n_iterations: int, keeps_paths: bool
) -> Solution:
    """The whole optimisation as one program: market paths, then projected gradient steps through the ledger.

    A book without accounts needs the terminal prices only, and its steps no simulation.
    """
    objective_of: ThroughSimulator | OnPrices = score
    if not problem.book.n_accounts:
        problem = problem._replace(prices=spot_prices(problem, score))
        objective_of = OnPrices(score.name, score.level, score.risk_aversion)
    elif keeps_paths:
        record = record_market(problem.market, problem.prepared, problem.keys, problem.path, score.plan)
        problem = problem._replace(record=record)
    start = project(start, problem.bounds)
    return solve.minimize(
        objective_of,
        start,
        problem,
        project=_project_problem,
        tangent=_tangent_problem,
        optimizer=optimizer,
        n_steps=n_iterations,
    )


def spot_prices(problem: Problem, score: ThroughSimulator) -> Float[Array, "holdings paths"]:
    """Terminal prices of the assets that a book holds, over those at the start; traceable."""

    def on_device(prepared, keys, path):
        return prices_prepared(problem.market, prepared, keys, path, score.plan)

    prices = jax.shard_map(
        on_device,
        mesh=score.mesh,
        in_specs=(Spec(), Spec(), Spec("paths")),
        out_specs=Spec(None, "paths"),
        check_vma=False,
    )(problem.prepared, problem.keys, problem.path)
    return prices[np.asarray(problem.book.spot_assets)]


def optimize_weights(
    market: Market,
    book: Book,
    *,
    n_steps: int,
    step_hours: float | None = None,
    monitoring: str = "bridge",
    objective_name: str = "cvar",
    level: float = 0.99,
    risk_aversion: float = 1.0,
    liquidation_penalty: float = 0.0,
    lower: float | Mapping[str, float] = 0.0,
    upper: float | Mapping[str, float] = 1.0,
    gross_leverage: float | None = None,
    learning_rate: float = 0.02,
    n_iterations: int = 150,
    n_paths: int = 8192,
    n_test_paths: int = 131_072,
    seed: int = 0,
    devices: int | None = None,
    engine: Engine | None = None,
) -> Optimum:
    """Minimises a tail measure (or maximises a ratio) of a book over its weights.

    Args:
      market: see `market`.
      book: starting book.
      n_steps: simulation steps.
      step_hours: length of a step, the market's base step when omitted.
      monitoring: "bridge" (smooth; recommended) or "step".
      objective_name: "cvar", "mean_cvar", "sharpe" or "sortino".
      level: CVaR level.
      risk_aversion: weight of CVaR in "mean_cvar".
      liquidation_penalty: added per unit of liquidation probability, summed over accounts.
      lower: smallest spot weight.
      upper: largest absolute weight.
      gross_leverage: cap on the gross perpetual notional, the start's when omitted.
      learning_rate: Adam's first step length, in units of the capital.
      n_iterations: gradient steps.
      n_paths: fixed training paths (common random numbers over the iterations).
      n_test_paths: fresh paths for the comparison.
      seed: 64-bit seed.
      devices: devices the paths are split over, all when omitted.
      engine: compiled batch of a run of this market and shape of book, to be used again for the comparison; its
        devices are used then.

    Raises:
      InputError: an unknown objective, an impossible level, or constraints that no weights meet.
    """
    if objective_name not in objective.OBJECTIVES:
        raise InputError(
            f"optimizer.objective is {objective_name!r}; it must be one of {', '.join(objective.OBJECTIVES)}."
        )
    check_level(level)
    if book.policies:
        raise InputError(
            "job=optimize chooses weights that stay what they are, and this book has policies that change them: use "
            "job=risk, or book.policies=[]."
        )
    plan = Plan(
        n_steps,
        step_hours=market.step_hours if step_hours is None else step_hours,
        monitoring=monitoring,
        dates=(n_steps,),
        attribution=False,
    )
    smooth = replace(plan, drawn=False, remat="auto")
    check_fit(market, book, plan)
    book = marked(book)
    start = weights_of(book)
    if start.spot.shape[0] + start.perpetual.shape[0] == 0:
        raise InputError("the book has neither spot nor perpetual positions, so there are no weights to choose.")
    bounds = bounds_of(book, lower=lower, upper=upper, gross_leverage=gross_leverage)
    engine = engine or build_engine(market, book, plan, n_paths=n_test_paths, seed=seed, devices=devices)
    mesh = engine.mesh
    keys = random.stream_keys(seed)
    n_paths = _per_device(n_paths, mesh.devices.size)
    path = np.arange(TRAIN_FIRST, TRAIN_FIRST + n_paths, dtype=np.uint32)
    path = jax.device_put(path, NamedSharding(mesh, Spec("paths")))
    problem = Problem(market, engine.prepared, book, keys, path, bounds)
    solution = descend(
        start,
        problem,
        score=ThroughSimulator(objective_name, level, risk_aversion, liquidation_penalty, smooth, mesh),
        optimizer=_adam(learning_rate, n_iterations),
        n_iterations=n_iterations,
        keeps_paths=record_bytes(market, plan, n_paths) <= RECORD_BYTES,
    )
    best, equal = jax.device_get((solution.point, equal_weights(start, bounds)))
    portfolios = {"start": start, "optimised": best, "equal": equal}
    books = {name: with_weights(book, w) for name, w in portfolios.items()}
    comparison = compare(engine, books, level=level, n_paths=n_test_paths)
    flat = lambda w: np.concatenate([np.asarray(w.spot, np.float64), np.asarray(w.perpetual, np.float64)])  # noqa: E731
    return Optimum(
        books["optimised"],
        position_names(book),
        flat(start),
        flat(best),
        flat(equal),
        solution,
        comparison,
    )


def _per_device(n_paths: int, n_devices: int) -> int:
    return -(-n_paths // n_devices) * n_devices


# One transformation object per setting: `minimize` looks it up by identity.
_ADAM: dict[tuple[float, int], Any] = {}


def _adam(learning_rate: float, n_steps: int) -> Any:
    return _ADAM.setdefault((learning_rate, n_steps), solve.adam(learning_rate, n_steps))


# ----------------------------------------------------------------------------- comparison on fresh paths


def compare(
    engine: Engine, books: Mapping[str, Book], *, level: float, n_paths: int, first_path: int = TEST_FIRST
) -> list[Comparison]:
    """Measures of several books on the same fresh paths, with paired errors of their differences to the first.

    The drawn branch is used: what an investor would have. Differences use the per-path influence functions of each
    measure, so common random numbers shrink their errors.

    Args:
      engine: compiled batch for the books' common shape.
      books: by name; the first is the reference.
      level: CVaR level.
      n_paths: paths.
      first_path: number of the first path.
    """
    losses: dict[str, list[np.ndarray]] = {name: [] for name in books}
    hits: dict[str, list[np.ndarray]] = {name: [] for name in books}
    for start in range(0, n_paths, engine.size):
        size = min(engine.size, n_paths - start)
        batches = {name: engine.batch(book, first_path + start) for name, book in books.items()}
        for name, arrays in batches.items():
            equity, hit = (np.asarray(x, np.float64)[..., :size] for x in _at_end(arrays))
            losses[name].append(1.0 - equity)
            hits[name].append(hit)
    accounts = next(iter(books.values())).account_names
    days = engine.plan.n_steps * engine.plan.step_hours / 24.0
    rows: list[Comparison] = []
    reference: dict[str, tuple[float, np.ndarray]] = {}
    for name in books:
        values = _influences(np.concatenate(losses[name]), np.concatenate(hits[name], axis=1), accounts, level, days)
        for measure, (value, influence) in values.items():
            base_value, base = reference.setdefault(measure, (value, influence))
            error = _error(influence)
            rows.append(Comparison(name, measure, value, error, value - base_value, _error(influence - base)))
    return rows


@jax.jit
def _at_end(arrays: dict[str, Any]) -> tuple[Array, Array]:
    """Equity and probabilities of liquidation at the last date, so that the other dates need not be fetched."""
    return arrays["equity"][-1], arrays["hit_probability"][-1]


def _error(influence: np.ndarray) -> float:
    return float(np.std(influence) / np.sqrt(influence.size))


def _influences(
    loss: np.ndarray, hit: np.ndarray, accounts: tuple[str, ...], level: float, horizon_days: float
) -> dict[str, tuple[float, np.ndarray]]:
    """Value and influence function per path of each measure (first-order terms; their mean is 0)."""
    n = loss.size
    value = -loss
    mean, sd = value.mean(), value.std()
    q = np.partition(loss, int(np.ceil(n * level)) - 1)[int(np.ceil(n * level)) - 1]
    excess = np.maximum(loss - q, 0.0) / (1.0 - level)
    cvar = q + excess.mean()
    downside = np.minimum(value, 0.0)
    down = np.sqrt(np.mean(downside**2))
    z, d = (value - mean) / max(sd, 1e-300), downside / max(down, 1e-300)
    sharpe, sortino = mean / max(sd, 1e-300), mean / max(down, 1e-300)
    annual = np.sqrt(DAYS_PER_YEAR / horizon_days)
    result = {
        "conditional_value_at_risk": (cvar, q + excess - cvar),
        "mean_return": (mean, value - mean),
        "volatility": (sd, 0.5 * sd * (z**2 - 1.0)),
        "sharpe_ratio": (annual * sharpe, annual * (z - 0.5 * sharpe * (z**2 - 1.0))),
        "sortino_ratio": (
            annual * sortino,
            annual * ((value - mean) / max(down, 1e-300) - 0.5 * sortino * (d**2 - 1.0)),
        ),
    }
    for j, account in enumerate(accounts):
        result[f"liquidation_probability:{account}"] = (float(hit[j].mean()), hit[j] - hit[j].mean())
    return {name: (float(v), influence) for name, (v, influence) in result.items()}
