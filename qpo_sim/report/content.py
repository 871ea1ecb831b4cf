"""What a run has to tell: one frozen record of tidy tables, filled by a job and read by everything in `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qpo_sim.errors import InputError

# The columns that each table must have; more are allowed and ignored.
COLUMNS: dict[str, tuple[str, ...]] = {
    "measures": ("measure", "account", "horizon_days", "level", "value", "std_error", "unit"),
    "fan": ("day", "mean", "q01", "q05", "q25", "q50", "q75", "q95", "q99"),
    "loss_histogram": ("left", "right", "density"),
    "hazard": ("account", "day", "hazard", "hazard_std_error", "cumulative", "cumulative_std_error"),
    "regime_history": (),
    "regime_table": ("regime", "share", "mean_duration_days", "dof", "mean_volatility_per_year", "mean_correlation"),
    "weights": ("position", "before", "after", "equal"),
    "comparison": ("portfolio", "measure", "value", "std_error", "difference", "difference_std_error"),
    "attribution": ("position", "account", "contribution", "std_error", "share"),
    "ledger": ("account", "mean", "std_error", "tail_mean"),
    "convergence": ("n_paths", "measure", "level", "value", "std_error"),
    "optimizer_trace": ("step", "objective"),
    "liquidation_by_regime": ("account", "regime", "probability", "std_error"),
    "account_fan": ("account", "kind", "day", "q05", "q25", "q50", "q75", "q95"),
    "liquidation_at_risk": ("account", "level", "now", "needed", "std_error"),
    "worst_paths": ("path", "loss", "max_drawdown", "liquidated"),
    "replay": (),
    "replay_events": ("day", "event"),
    "limits": ("name", "measure", "limit", "value", "std_error", "status"),
}
LIMIT_STATUS = ("ok", "within error", "breached")
UNITS = ("fraction of capital", "fraction of peak", "probability", "per year ratio", "days", "USD")


class Number(NamedTuple):
    """An estimate as the report prints it; `std_error` is NaN where there is none."""

    value: float
    std_error: float


@dataclass(frozen=True, eq=False)
class RunReport:
    """Everything that a run wants to show; a table that is None (or empty) leaves its section out.

    Losses are positive and, like P&L and equity, fractions of the starting capital. `account` is "" for the whole
    book and `level` is NaN for measures that have none.

    Attributes:
        job: the job that ran, e.g. "risk".
        title: what the run is about, one line.
        capital: starting capital in USD, positive.
        horizon_days: the horizon in days, positive.
        n_paths: number of simulated paths.
        n_steps: number of steps per path.
        step_hours: length of one step in hours.
        assets: asset names.
        measures: risk measures, one row each; `unit` is one of `UNITS`.
        fan: mean and quantiles of equity / starting capital by day.
        loss_histogram: density of the loss at the horizon; bins touch each other and increase.
        hazard: by account and day, the probability that the first liquidation falls on that day (not conditional on
            survival until then) and its running sum, `cumulative`.
        liquidation_by_regime: probability of being liquidated in a step of each regime, by account.
        account_fan: by account and day, quantiles of the margin ratio (liquidation at one) and of the exposure (gross,
            over the starting capital) over the paths on which it is untouched; `kind` is "margin_ratio" or "exposure".
        liquidation_at_risk: margin or collateral `needed` for a probability of liquidation of `level`, and `now`.
        n_recorded: paths behind `liquidation_by_regime` and `account_fan`.
        n_liquidation_paths: paths behind the measures of bad debt, cost and needless liquidation.
        account_venues: venue by account.
        regime_history: smoothed probability of each regime, columns from calm to turbulent, index of dates.
        price_history: price of the first asset on the same index; its name is the asset's.
        regime_table: one row per regime, from calm to turbulent.
        correlation: per regime label, an assets x assets frame.
        weights: by position; `after` and `equal` are NaN when nothing was optimised.
        comparison: measures of several portfolios on the same fresh paths; `difference` is to the starting weights.
            The optimised portfolio's name starts with "optim" or is "after". A `level` column is optional.
        attribution: Euler components of CVaR at `attribution_level`; their sum is CVaR, `share` sums to one.
        attribution_level: confidence level of the attribution.
        ledger: P&L by ledger account (gains positive); `tail_mean` is the mean over the CVaR tail.
        convergence: running estimates against the number of paths.
        optimizer_trace: objective by optimisation step.
        worst_paths: the worst paths; `liquidated` joins the accounts' names by commas.
        replay: one path, index of days; columns `price:<ASSET>`, `equity` (over starting capital), `regime`,
            `margin_ratio:<account>` (liquidation at one).
        replay_events: what happened on that path.
        limits: configured limits and their `status`, one of `LIMIT_STATUS`.
        notes: what a reader of this run's numbers must know of its market or its approximations, one sentence each.
        manifest: versions, seed, devices, timings, fingerprints, configuration: anything JSON can hold.

    Raises:
        InputError: a table lacks a column, or capital or horizon is not positive.
    """

    job: str
    title: str
    capital: float
    horizon_days: float
    n_paths: int = 0
    n_steps: int = 0
    step_hours: float = 24.0
    assets: tuple[str, ...] = ()
    measures: pd.DataFrame | None = None
    fan: pd.DataFrame | None = None
    loss_histogram: pd.DataFrame | None = None
    hazard: pd.DataFrame | None = None
    liquidation_by_regime: pd.DataFrame | None = None
    account_fan: pd.DataFrame | None = None
    liquidation_at_risk: pd.DataFrame | None = None
    n_recorded: int = 0
    n_liquidation_paths: int = 0
    account_venues: dict[str, str] = field(default_factory=dict)
    regime_history: pd.DataFrame | None = None
    price_history: pd.Series | None = None
    regime_table: pd.DataFrame | None = None
    correlation: dict[str, pd.DataFrame] | None = None
    weights: pd.DataFrame | None = None
    comparison: pd.DataFrame | None = None
    attribution: pd.DataFrame | None = None
    attribution_level: float | None = None
    ledger: pd.DataFrame | None = None
    convergence: pd.DataFrame | None = None
    optimizer_trace: pd.DataFrame | None = None
    worst_paths: pd.DataFrame | None = None
    replay: pd.DataFrame | None = None
    replay_events: pd.DataFrame | None = None
    limits: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Check what the rest of `report` relies on."""
        for name in ("capital", "horizon_days"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0.0):
                raise InputError(f"RunReport.{name} must be a positive number, got {value!r}; pass the run's own.")
        for name, columns in COLUMNS.items():
            table: Any = getattr(self, name)
            if table is None:
                continue
            missing = [column for column in columns if column not in table.columns]
            if missing:
                raise InputError(
                    f"RunReport.{name} lacks the column {missing[0]!r}; it needs {', '.join(columns)}, "
                    f"got {', '.join(map(str, table.columns))}."
                )
        if self.limits is not None:
            unknown = [status for status in self.limits["status"] if status not in LIMIT_STATUS]
            if unknown:
                raise InputError(
                    f"RunReport.limits.status must be one of {', '.join(LIMIT_STATUS)}, got {unknown[0]!r}."
                )

    def has(self, *names: str) -> bool:
        """Whether every one of these tables is there and has rows."""
        return all(getattr(self, name) is not None and len(getattr(self, name)) > 0 for name in names)

    def table(self, name: str) -> Any:
        """The table of this name as a DataFrame; an empty one if the run has none.

        Typed `Any` because pandas' own annotations call every column, row and selection a union of all three.
        """
        found = getattr(self, name)
        return pd.DataFrame(columns=list(COLUMNS[name])) if found is None else found

    def find(
        self, measure: str, *, account: str = "", level: float | None = None, horizon_days: float | None = None
    ) -> Number | None:
        """The estimate of a measure (at the run's horizon unless told), or None if the run has none."""
        if self.measures is None:
            return None
        table = self.table("measures")
        horizon = self.horizon_days if horizon_days is None else horizon_days
        chosen = (table["measure"] == measure) & (table["account"].fillna("") == account)
        chosen &= np.isclose(table["horizon_days"].astype(float), horizon)
        if level is not None:
            chosen &= np.isclose(table["level"].astype(float), level, rtol=0.0, atol=1e-9)
        rows = table[chosen]
        if rows.empty:
            return None
        return Number(float(rows["value"].iloc[0]), float(rows["std_error"].iloc[0]))

    def levels(self, measure: str) -> list[float]:
        """The confidence levels at which the whole book has this measure at the run's horizon, increasing."""
        if self.measures is None:
            return []
        table = self.table("measures")
        chosen = (table["measure"] == measure) & (table["account"].fillna("") == "")
        chosen &= np.isclose(table["horizon_days"].astype(float), self.horizon_days)
        return sorted({float(level) for level in table.loc[chosen, "level"] if np.isfinite(float(level))})

    def accounts(self, measure: str = "liquidation_probability") -> list[str]:
        """The accounts (without the whole book) that have this measure, in the order of the table."""
        if self.measures is None:
            return []
        table = self.table("measures")
        names = table.loc[table["measure"] == measure, "account"].fillna("")
        return [str(name) for name in dict.fromkeys(names) if name != ""]

    @property
    def headline_level(self) -> float | None:
        """The level that the verdict speaks of: the one nearest to 99 %."""
        levels = self.levels("value_at_risk") or self.levels("conditional_value_at_risk")
        return min(levels, key=lambda level: abs(level - 0.99)) if levels else None
