"""Risk limits: is a measure above its bound, and beyond its error bar?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qpo_sim.risk.summary import Measure

ERROR_BAR = 1.959963984540054
OK, WITHIN_ERROR, BREACHED = "ok", "within error", "breached"


class Verdict(NamedTuple):
    """A limit and how the run stands to it."""

    name: str
    measure: str
    limit: float
    value: float
    std_error: float
    status: str


def judge(
    measures: Sequence[Measure],
    *,
    name: str,
    measure: str,
    limit: float,
    level: float | None = None,
    account: str = "",
    horizon_days: float | None = None,
) -> Verdict:
    """Compares a measure of a run with an upper bound.

    It is breached when the whole 95 % interval of the estimate lies above the bound, "within error" when the interval
    reaches above it. A bound without an account holds for the book, or for every account where the measure exists per
    account only; the largest value counts.

    Args:
      measures: all measures of the run.
      name: what reports call the limit.
      measure: name of the measure that is bounded.
      limit: largest value allowed.
      level: confidence level, for measures that have one.
      account: account that is meant; "" is the book.
      horizon_days: horizon that is meant; None is the longest.

    Raises:
      ValueError: the run has no such measure.
    """
    horizon = max(row.horizon_days for row in measures) if horizon_days is None else horizon_days
    chosen = [
        row
        for row in measures
        if row.measure == measure
        and np.isclose(row.horizon_days, horizon)
        and (level is None or np.isclose(row.level, level))
        and account in ("", row.account)
    ]
    if not chosen and measure == "liquidation_probability" and not account:
        # A book without accounts cannot be liquidated.
        return Verdict(name, measure, limit, 0.0, 0.0, OK)
    if not chosen:
        raise ValueError(
            f"limit {name}: the run has no {measure} at level {level}, account {account!r}, {horizon:g} days."
        )
    worst = max(chosen, key=lambda row: row.value)
    bar = ERROR_BAR * worst.std_error if np.isfinite(worst.std_error) else 0.0
    status = BREACHED if worst.value - bar > limit else WITHIN_ERROR if worst.value + bar > limit else OK
    return Verdict(name, measure, limit, worst.value, worst.std_error, status)
