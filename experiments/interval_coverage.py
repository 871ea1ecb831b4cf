r"""Do the 95 % intervals cover? Repeated small runs on markets whose risk is known exactly.

Every run goes the way a real one does: paths, partial result, estimate with standard error. The truths are

* `gbm spot`: one holding under geometric Brownian motion, a lognormal loss (VaR and CVaR in closed form);
* `gbm perpetual`: an isolated long on the same market. Its distance to liquidation is a Brownian motion with drift, so
  the liquidation probability within T is that of its minimum (reflection principle, $b<0$ the log liquidation price),
  $\Phi\big(\frac{b-mT}{\sigma\sqrt T}\big) + e^{2mb/\sigma^2}\,\Phi\big(\frac{b+mT}{\sigma\sqrt T}\big)$;
  it is estimated twice, by survival weights and by counting drawn liquidations;
* `student-t spot`, `student-t short`: one step of a Student-t market with the mixing scale cut as in the simulator.
  Given the normal score the loss is lognormal; the score is integrated out by quadrature. The short has the heavy tail
  of $e^X$ on its losing side.

A run's size is set by its tail. The error of VaR is read from order statistics and CVaR is a mean over a skewed tail,
so both intervals need some hundred paths beyond the level: 24 576 paths leave 246 beyond 99 %. With 50 the intervals
are visibly lopsided, and with thousands nothing is tested that larger runs need.

Run k is made of the paths k n .. (k + 1) n - 1 of one seed. Draws are addressed by path, so the runs are independent
and need one compilation in all.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special, stats

from qpo_sim.book import build_book
from qpo_sim.book.ledger import Book
from qpo_sim.compute import partial as partials
from qpo_sim.compute.partial import Partial
from qpo_sim.compute.run import kept
from qpo_sim.market import presets
from qpo_sim.market.model import Market
from qpo_sim.risk import moments, summary
from qpo_sim.simulate import Plan, simulate_paths
from qpo_sim.types import Estimate
from qpo_sim.venue import TieredMargin

LEVEL = 0.99
N_RUNS, N_PATHS = 400, 24_576
PATHS_AT_ONCE = 400_000

VOLATILITY, GROWTH, DAYS, N_STEPS = 0.8, 0.1, 30.0, 10
MARGIN, MAINTENANCE_RATE = 0.35, 0.02
DOF, STEP_VOLATILITY, SHORT = 3.0, 0.05, -0.1


class Case(NamedTuple):
    """A book on a market, and its estimators with the true values."""

    name: str
    market: Market
    book: Book
    plan: Plan
    estimators: dict[str, tuple[Callable[[Partial], Estimate], float]]


class Coverage(NamedTuple):
    """How the intervals of one estimator behaved over the runs.

    Attributes:
      case: name of the case.
      measure: name of the estimator.
      truth: true value.
      share: share of runs whose 95 % interval holds the truth.
      missed_low: share of runs whose interval lies below the truth.
      missed_high: share of runs whose interval lies above the truth.
      error_ratio: mean standard error over the standard deviation of the estimates; 1 when errors are right.
      bias: mean of the estimates minus the truth, in standard deviations of one estimate.
    """

    case: str
    measure: str
    truth: float
    share: float
    missed_low: float
    missed_high: float
    error_ratio: float
    bias: float


# ----------------------------------------------------------------------------- truths


def lognormal_mixture_tail(
    exposure: float, mean: float, deviation: np.ndarray, weight: np.ndarray, *, level: float
) -> tuple[float, float]:
    r"""VaR and CVaR of the loss $w(1-e^X)$, X normal with a random standard deviation.

    Args:
      exposure: w, value held at the start; negative for a short.
      mean: mean of X.
      deviation: possible standard deviations of X.
      weight: their probabilities.
      level: confidence.
    """
    side = math.copysign(1.0, exposure)

    def beyond(log_price: float) -> np.ndarray:
        return special.ndtr(side * (log_price - mean) / deviation)

    # The losing side of a long is the lower tail of X, that of a short the upper one.
    k = optimize.brentq(lambda x: weight @ beyond(x) - (1.0 - level), mean - 10.0, mean + 10.0, xtol=1e-14)
    growth = np.exp(mean + 0.5 * deviation**2) * special.ndtr(side * ((k - mean) / deviation - deviation))
    return -exposure * math.expm1(k), exposure * float(weight @ (beyond(k) - growth)) / (1.0 - level)


def student_t_deviations(dof: float, cut: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the mixing scale H of `qpo_sim.market.shock`: an atom at the cut, the rest above it."""
    floor = stats.norm.ppf(cut)
    node, node_weight = np.polynomial.legendre.leggauss(400)
    half = (8.5 - floor) / 2.0
    score = np.append(floor, floor + half * (node + 1.0))
    weight = np.append(cut, half * node_weight * stats.norm.pdf(score[1:]))
    chi2 = np.where(score < 0.0, stats.chi2.ppf(special.ndtr(score), dof), stats.chi2.isf(special.ndtr(-score), dof))
    return np.sqrt((dof - 2.0) / chi2), weight


def hitting_probability(barrier: float, drift: float, volatility: float, time: float) -> float:
    """Probability that a Brownian motion started at 0 goes below `barrier` < 0 within `time` (reflection principle)."""
    spread = volatility * math.sqrt(time)
    tilt = math.exp(2.0 * drift * barrier / volatility**2)
    return stats.norm.cdf((barrier - drift * time) / spread) + tilt * stats.norm.cdf((barrier + drift * time) / spread)


# ----------------------------------------------------------------------------- cases


def _tail_estimators(truth: tuple[float, float]) -> dict[str, tuple[Callable[[Partial], Estimate], float]]:
    percent = f"{100.0 * LEVEL:g}"
    return {
        f"VaR{percent}": (lambda partial: summary.tail_measures(partial, 0, LEVEL)[0], truth[0]),
        f"CVaR{percent}": (lambda partial: summary.tail_measures(partial, 0, LEVEL)[1], truth[1]),
    }


def _perpetual(market: Market, margin: float, notional: float) -> Book:
    venue = TieredMargin(tiers={"default": [[0, MAINTENANCE_RATE, 50]]})
    account = {"name": "account", "venue": venue, "mode": "isolated", "margin": margin, "positions": {"X": notional}}
    return build_book(market.assets, perpetuals=[account])


def gbm_cases() -> list[Case]:
    """A holding and an isolated perpetual over 30 days of geometric Brownian motion."""
    market = presets.gbm(["X"], [VOLATILITY], step_hours=24.0 * DAYS / N_STEPS, per_year=GROWTH)
    plan = Plan(N_STEPS, step_hours=market.step_hours, dates=(N_STEPS,), attribution=False)
    years, drift = DAYS / 365.0, GROWTH - 0.5 * VOLATILITY**2
    tail = lognormal_mixture_tail(
        1.0, drift * years, np.array([VOLATILITY * math.sqrt(years)]), np.ones(1), level=LEVEL
    )
    # Liquidated when margin + (P - 1) = rate P, for a notional of 1.
    liquidation_price = (1.0 - MARGIN) / (1.0 - MAINTENANCE_RATE)
    probability = hitting_probability(math.log(liquidation_price), drift, VOLATILITY, years)
    liquidation = {
        "liquidation probability": (lambda p: Estimate(*(x[-1, 0] for x in summary.liquidation_curve(p))), probability),
        "liquidation probability, counted": (
            lambda p: moments.probability(p.total("liquidated")[0], float(p.n_used)),
            probability,
        ),
    }
    return [
        Case("gbm spot", market, build_book(market.assets, spot={"X": 1.0}), plan, _tail_estimators(tail)),
        Case("gbm perpetual", market, _perpetual(market, MARGIN, 1.0), plan, liquidation),
    ]


def student_t_cases() -> list[Case]:
    """A holding and a short perpetual over one step of a Student-t market."""
    market = Market(
        initial=jnp.ones(1, jnp.float32),
        transition=jnp.ones((1, 1), jnp.float32),
        drift=jnp.zeros((1, 1), jnp.float32),
        volatility=jnp.full((1, 1), STEP_VOLATILITY, jnp.float32),
        correlation_cholesky=jnp.ones((1, 1, 1), jnp.float32),
        dof=jnp.full(1, DOF, jnp.float32),
        assets=("X",),
    )
    plan = Plan(1, monitoring="step", attribution=False)
    scale, weight = student_t_deviations(DOF, market.mixing_cut)

    def truth(exposure: float) -> tuple[float, float]:
        return lognormal_mixture_tail(exposure, 0.0, STEP_VOLATILITY * scale, weight, level=LEVEL)

    # The margin of the short covers a tenfold price: its liquidation (once in 10^7 paths) does not touch the truth.
    spot, short = build_book(market.assets, spot={"X": 1.0}), _perpetual(market, 1.0, SHORT)
    return [
        Case("student-t spot", market, spot, plan, _tail_estimators(truth(1.0))),
        Case("student-t short", market, short, plan, _tail_estimators(truth(SHORT))),
    ]


def cases() -> list[Case]:
    """All cases."""
    return [*gbm_cases(), *student_t_cases()]


# ----------------------------------------------------------------------------- runs


def runs(case: Case, *, n_runs: int, n_paths: int, seed: int) -> Iterator[Partial]:
    """Partial results of independent runs."""
    keep = partials.tail_size(n_paths, LEVEL)
    at_once = max(1, min(n_runs, PATHS_AT_ONCE // n_paths))
    for first_run in range(0, n_runs, at_once):
        first = first_run * n_paths
        # The last batch may hold more runs than are left: its shape stays the compiled one.
        path = np.arange(first, first + at_once * n_paths, dtype=np.uint32)
        outcome = simulate_paths(case.market, case.book, path, case.plan, seed=seed)
        arrays = jax.tree.map(np.asarray, kept(outcome))
        for k in range(min(at_once, n_runs - first_run)):
            own = slice(k * n_paths, (k + 1) * n_paths)
            batch = jax.tree.map(lambda x, own=own: x[..., own], arrays)
            yield partials.partial_of(batch, first + own.start, horizons=(0,), keep=keep)


def coverage(case: Case, *, n_runs: int = N_RUNS, n_paths: int = N_PATHS, seed: int = 0) -> list[Coverage]:
    """Coverage of the 95 % interval of every estimator of a case.

    Args:
      case: see `cases`.
      n_runs: independent runs.
      n_paths: paths of each.
      seed: seed of the paths.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in case.estimators}
    for partial in runs(case, n_runs=n_runs, n_paths=n_paths, seed=seed):
        for name, (estimator, _) in case.estimators.items():
            estimate = estimator(partial)
            found[name].append((float(estimate.value), float(estimate.std_error)))
    rows = []
    for name, (_, truth) in case.estimators.items():
        value, error = np.array(found[name]).T
        low, high = Estimate(value, error).interval()
        is_low, is_high = high < truth, low > truth
        spread = value.std(ddof=1)
        rows.append(
            Coverage(
                case.name,
                name,
                truth,
                float(np.mean(~is_low & ~is_high)),
                float(np.mean(is_low)),
                float(np.mean(is_high)),
                float(error.mean() / spread),
                float((value.mean() - truth) / spread),
            )
        )
    return rows


def markdown(rows: list[Coverage]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | measure | truth | covered | interval too low | too high | error / spread | bias (sd) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.case} | {r.measure} | {r.truth:.6f} | {r.share:.2%} | {r.missed_low:.2%} | {r.missed_high:.2%} "
            f"| {r.error_ratio:.3f} | {r.bias:+.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Any:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=N_RUNS, help="independent runs per case (default %(default)s)")
    parser.add_argument("--paths", type=int, default=N_PATHS, help="paths per run (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the paths (default %(default)s)")
    options = parser.parse_args(arguments)
    if not (options.runs >= 2 and options.paths >= 1000 and options.runs * options.paths <= 2**32):
        parser.error("--runs must be at least 2, --paths at least 1000, and their product at most 2^32")
    rows = [
        row for case in cases() for row in coverage(case, n_runs=options.runs, n_paths=options.paths, seed=options.seed)
    ]
    print(f"{options.runs} runs of {options.paths} paths; one standard deviation of a coverage of 95 % is "
          f"{math.sqrt(0.95 * 0.05 / options.runs):.2%}.\n")  # fmt: skip
    print(markdown(rows))


if __name__ == "__main__":
    main()
