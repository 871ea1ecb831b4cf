"""All measures of a finished run as one tidy list."""

from typing import Any, NamedTuple

import numpy as np

from qpo_sim.compute.histogram import LogHistogram, edges
from qpo_sim.compute.run import Run
from qpo_sim.risk import liquidation, moments, tail
from qpo_sim.risk.moments import ReturnSums
from qpo_sim.risk.tail import TailSample
from qpo_sim.types import Estimate

# Shares of the liquidations within the horizon whose days are told.
TIME_SHARES = (0.1, 0.5, 0.9)
FRACTION, OF_PEAK, PROBABILITY, RATIO = "fraction of capital", "fraction of peak", "probability", "per year ratio"


class Measure(NamedTuple):
    """One number of a run; `account` is "" for the whole book, `level` NaN where there is none."""

    measure: str
    account: str
    horizon_days: float
    level: float
    value: float
    std_error: float
    unit: str


def tail_sample(partial: Any, horizon: int, level: float) -> TailSample:
    """Worst paths of a horizon that reach beyond the level with room for the error.

    Exact while the run kept enough worst paths; else the bins of the fine histogram as weighted points (mean loss of
    the bin, exact sums), which moves VaR by at most 0.05 % and CVaR by less.
    """
    worst = partial.tails[horizon]
    n = float(partial.n_used)
    needed = n * (1.0 - level) + 3.0 * np.sqrt(n * level * (1.0 - level)) + 1.0
    if worst.loss.size >= min(needed, n):
        loss = worst.loss.astype(np.float64)
        return TailSample(loss, np.ones_like(loss), np.ones_like(loss), n, n)
    return _from_histogram(partial.losses, horizon, n)


def _from_histogram(losses: LogHistogram, row: int, n: float) -> TailSample:
    assert losses.sums is not None  # the fine histograms always carry them
    counts = losses.counts[row]
    used = np.flatnonzero(counts)[::-1]
    weight = counts[used].astype(np.float64)
    return TailSample(losses.sums[row, used] / weight, weight, weight, n, n)


def return_sums(partial: Any, horizon: int) -> ReturnSums:
    """Moment sums of the book's return over a horizon."""
    names = ReturnSums._fields[1:]
    return ReturnSums(float(partial.n_used), *(partial.total(name)[horizon] for name in names))


def tail_measures(partial: Any, horizon: int, level: float) -> tuple[Estimate, Estimate]:
    """VaR and CVaR of the loss over a horizon."""
    sample = tail_sample(partial, horizon, level)
    return tail.value_at_risk(sample, level=level), tail.conditional_value_at_risk(sample, level=level)


def liquidation_curve(partial: Any) -> Estimate:
    """Probability of having been liquidated by each date, per account (dates, accounts)."""
    return liquidation.liquidation_probability(partial.total("hit"), partial.total("hit_square"), float(partial.n_used))


def measures(run: Run) -> list[Measure]:
    """Every measure of a run with its standard error."""
    partial, n = run.partial, float(run.partial.n_used)
    rows: list[Measure] = []

    def add(name: str, estimate: Estimate, unit: str, days: float, level: float = np.nan, account: str = "") -> None:
        rows.append(Measure(name, account, days, level, float(estimate.value), float(estimate.std_error), unit))

    for h, days in enumerate(run.horizon_days):
        for level in run.levels:
            var, cvar = tail_measures(partial, h, level)
            add("value_at_risk", var, FRACTION, days, level)
            add("conditional_value_at_risk", cvar, FRACTION, days, level)
        sums = return_sums(partial, h)
        add("mean_return", moments.mean(sums.r1, sums.r2, n), FRACTION, days)
        add("volatility", moments.volatility(sums), FRACTION, days)
        add("sharpe_ratio", moments.sharpe_ratio(sums, horizon_days=days), RATIO, days)
        add("sortino_ratio", moments.sortino_ratio(sums, horizon_days=days), RATIO, days)
        add("probability_of_loss", moments.probability(sums.losses, n), PROBABILITY, days)

    end = run.horizon_days[-1]
    drawdown = moments.mean(partial.total("drawdown"), partial.total("drawdown_square"), n)
    add("expected_max_drawdown", drawdown, OF_PEAK, end)
    drawdowns = _from_histogram(partial.losses, len(run.horizons), n)
    for level in (0.5, *run.levels):
        add("max_drawdown_quantile", tail.value_at_risk(drawdowns, level=level), OF_PEAK, end, level)
    if run.book.n_accounts:
        curve = liquidation_curve(partial)
        for j, account in enumerate(run.book.account_names):
            for days, step in zip(run.horizon_days, run.horizons, strict=True):
                d = run.plan.dates.index(step)
                by_then = Estimate(curve.value[d, j], curve.std_error[d, j])
                add("liquidation_probability", by_then, PROBABILITY, days, account=account)
            add("expected_time_to_liquidation", _time_to_liquidation(run, j), "days", end, account=account)
            days = np.asarray(run.plan.dates) * run.plan.step_hours / 24.0
            for share in TIME_SHARES:
                when = liquidation.time_quantile(days, curve.value[:, j], share, n)
                add("time_to_liquidation_quantile", when, "days", end, share, account)
    return rows


def liquidation_measures(partial: Any, book: Any, horizon_days: float) -> list[Measure]:
    """What liquidations cost and whom, by account, then by venue (measures `venue_...`, `account` is the venue's name).

    `expected_bad_debt` is what others bear, `expected_liquidation_cost` fees, slippage and bonuses, both over all
    paths; with `_if_liquidated` they are over the paths on which the account, or any of the venue, is liquidated.
    `needless_liquidation_probability` is that of being liquidated although the account, left alone, would end above its
    maintenance margin; accounts whose positions change have none.

    Args:
      partial: sums with those of `Outcome.liquidations`.
      book: the simulated book.
      horizon_days: simulated time.
    """
    n, rows = float(partial.n_used), []

    def add(name: str, who: str, estimate: Estimate, k: int, unit: str) -> None:
        rows.append(
            Measure(name, who, horizon_days, np.nan, float(estimate.value[k]), float(estimate.std_error[k]), unit)
        )

    def sums(name: str) -> tuple[np.ndarray, np.ndarray]:
        return partial.total(name), partial.total(f"{name}_square")

    def amounts(names: tuple[str, ...], prefix: str, count: np.ndarray) -> None:
        for measure, key in (("bad_debt", "bad_debt"), ("liquidation_cost", "cost")):
            total, square = sums(prefix + key)
            overall = moments.mean(total, square, n)
            given = liquidation.given_liquidation(total, square, count)
            for k, name in enumerate(names):
                add(f"{prefix}expected_{measure}", name, overall, k, FRACTION)
                add(f"{prefix}{measure}_if_liquidated", name, given, k, FRACTION)

    amounts(book.account_names, "", partial.total("liquidated"))
    needless = liquidation.liquidation_probability(*sums("needless"), n)
    for k, name in enumerate(book.account_names[: book.n_fixed]):
        add("needless_liquidation_probability", name, needless, k, PROBABILITY)
    any_of = moments.probability(partial.total("venue_liquidated"), n)
    for k, name in enumerate(book.venues):
        add("venue_liquidation_probability", name, any_of, k, PROBABILITY)
    amounts(book.venues, "venue_", partial.total("venue_liquidated"))
    return rows


def _time_to_liquidation(run: Run, account: int) -> Estimate:
    # Mean of the liquidation day given liquidation within the horizon: a ratio of means, delta method with the
    # increments of F as weights. The middle of each interval stands for the moment inside it.
    partial, n = run.partial, float(run.partial.n_used)
    step_days = run.plan.step_hours / 24.0
    dates = np.asarray(run.plan.dates) * step_days
    middle = (dates + np.concatenate([[0.0], dates[:-1]])) / 2.0
    weight = partial.total("hazard")[:, account] / n
    square = partial.total("hazard_square")[:, account] / n
    probability = weight.sum()
    if probability <= 0.0:
        return Estimate(np.nan, np.nan)
    value = float(middle @ weight / probability)
    # Increments of different dates are nearly exclusive, so their cross terms are dropped: they are negative, and the
    # error stated is on the safe side.
    error = np.sqrt(((middle - value) ** 2 @ square) / n) / probability
    return Estimate(value, error)


def attribution(run: Run, level: float) -> tuple[list[tuple[str, str]], Estimate]:
    """Euler components of CVaR at the end of the run by position; they sum to CVaR.

    Raises:
      ValueError: the level lies beyond the exactly kept tail (use a higher level or fewer paths).
    """
    worst = run.partial.tails[-1]
    n = float(run.partial.n_used)
    if worst.loss.size < min(n, n * (1.0 - level) + 3.0 * np.sqrt(n * level * (1.0 - level)) + 1.0):
        raise ValueError(f"attribution at level {level} needs more worst paths than the {worst.loss.size} kept.")
    sample = tail_sample(run.partial, len(run.horizons) - 1, level)
    estimate, _ = tail.component_cvar(sample, worst.extra["components"].astype(np.float64), level=level)
    return list(run.book.components), estimate


def loss_density(run: Run, n_bins: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Edges and density of the loss at the end of the run, on an even grid from the 0.05 % to the 99.95 % quantile."""
    losses = run.partial.losses
    row = len(run.horizons) - 1
    low, high = losses.quantile(row, 0.0005), losses.quantile(row, 0.9995)
    grid = np.linspace(low, max(high, low + 1e-9), n_bins + 1)
    bin_edges = edges(losses.bits, np.arange(losses.counts.shape[1] + 1))
    cumulative = np.concatenate([[0], np.cumsum(losses.counts[row])]) / losses.counts[row].sum()
    usable = np.isfinite(bin_edges)
    at = np.interp(grid, bin_edges[usable], cumulative[usable])
    return grid, np.diff(at) / np.diff(grid)


def fan(run: Run, probabilities: tuple[float, ...]) -> np.ndarray:
    """Quantiles of equity over starting capital (dates, probabilities)."""
    histogram = run.partial.equity
    return np.array([[1.0 + histogram.quantile(d, p) for p in probabilities] for d in range(len(run.plan.dates))])
