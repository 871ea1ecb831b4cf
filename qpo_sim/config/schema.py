"""The options of a run, as plain typed Python.

One dataclass per section of the configuration; the values live in `conf/`, so a field without a default must be given
there. Where a section comes in kinds (markets), its class here is a base and `kind` picks the subclass: a new kind is
a new subclass.

Units: money in USD; positions, margins and weights as fractions of the capital; rates per year (365 days) unless the
name says otherwise; levels are confidence levels in (0, 1); losses are positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Job = Literal["risk", "optimize", "calibrate", "replay", "bench"]

Measure = Literal[
    "value_at_risk",
    "conditional_value_at_risk",
    "expected_max_drawdown",
    "max_drawdown_quantile",
    "liquidation_probability",
    "probability_of_loss",
    "volatility",
]
"""Measures that a limit can bound: those where more is worse."""

MEASURES_WITH_LEVEL = ("value_at_risk", "conditional_value_at_risk", "max_drawdown_quantile")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which prices are read.

    Attributes:
      path: file with prices (CSV, gzipped CSV or Parquet); None reads the daily closes inside the package.
      assets: columns to keep, in this order; None keeps all.
      exclude: columns to leave out.
      start: first date kept, e.g. "2021-01-01"; None keeps all.
      end: last date kept.
      missing: what a hole inside an asset's listing means: "error", or "allow" (it is masked in the fit).
    """

    path: str | None = None
    assets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    start: str | None = None
    end: str | None = None
    missing: Literal["error", "allow"] = "error"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the regime market is fitted.

    Attributes:
      n_regimes: number of regimes.
      n_restarts: random starts of the fit, of which the likeliest result is kept.
      sticky: prior count of steps that stay in their regime; 0 is plain maximum likelihood.
      dof_floor: lower bound of the Student-t degrees of freedom, above 2 so that the variance exists.
      cache: keep the fit on disk by its fingerprint and read it back next time.
      cache_dir: folder of that cache; None is the user's cache folder.
    """

    n_regimes: int
    n_restarts: int
    sticky: float
    dof_floor: float
    cache: bool
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Expected returns of the simulated market.

    Attributes:
      kind: "historical" (as fitted), "shrunk" (fitted, pulled towards zero), "risk_neutral" (the expected price grows
        at `rate_per_year`) or "user" (`per_year`).
      shrinkage: for "shrunk": 0 keeps the fitted drift, 1 is zero drift.
      per_year: for "user": expected return per year, one number for all assets or one per asset.
      rate_per_year: for "risk_neutral": growth rate per year.
    """

    kind: Literal["historical", "shrunk", "risk_neutral", "user"]
    shrinkage: float = 1.0
    per_year: float | dict[str, float] | None = None
    rate_per_year: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MarketConfig:
    """What prices do; `kind` picks the subclass.

    Attributes:
      kind: name of the market.
      drift: expected returns.
    """

    kind: str
    drift: DriftConfig


@dataclass(frozen=True, kw_only=True)
class RegimeStudentTMarket(MarketConfig):
    """Markov regimes, each with multivariate Student-t log-returns.

    Attributes:
      kind: "regime_student_t".
      mixing_cut: probability beyond which the Student-t mixing variable is cut off, so that expected prices exist.
    """

    kind: Literal["regime_student_t"] = "regime_student_t"
    mixing_cut: float = 1.0e-4


@dataclass(frozen=True, kw_only=True)
class GbmMarket(MarketConfig):
    """Correlated geometric Brownian motion, with volatilities and correlation from the data: the control model.

    Attributes:
      kind: "gbm".
    """

    kind: Literal["gbm"] = "gbm"


@dataclass(frozen=True, kw_only=True)
class ComposedMarket(MarketConfig):
    """A market put together from named components (see `market.compose`), with numbers given or taken from the data.

    Attributes:
      kind: "composed".
      name: what reports call it.
      volatility_per_year: level by asset, "data.volatility_per_year", or null when the volatility model has its own.
      correlation: a matrix, one number for all pairs, "data.correlation", or a list of these by regime.
      dof: degrees of freedom of the elliptical shock, null for Gaussian.
      regimes: kind fitted, markov or semi_markov and its options; null for one regime.
      volatility: a volatility model, `kind` and its options; null for constant volatility in each regime.
      shock: a dependence model, `kind` and its options; null for the elliptical shock.
      jumps: jump models.
      side: side processes, each of which sees those before it.
      mixing_cut: probability beyond which the Student-t mixing variable is cut off, so that expected prices exist.
    """

    kind: Literal["composed"] = "composed"
    name: str = "Composed market"
    volatility_per_year: Any = "data.volatility_per_year"
    correlation: Any = "data.correlation"
    dof: Any = None
    regimes: dict[str, Any] | None = None
    volatility: dict[str, Any] | None = None
    shock: dict[str, Any] | None = None
    jumps: tuple[dict[str, Any], ...] = ()
    side: tuple[dict[str, Any], ...] = ()
    mixing_cut: float = 1.0e-4


@dataclass(frozen=True, kw_only=True)
class HistoryMarket(MarketConfig):
    """The data themselves as one path, from the first row to the last (job=replay).

    Attributes:
      kind: "history".
      intrabar: what is seen of a bar: "close", or "low_high": its open, its extremes (the low first in a bar that
        rises, the high first in one that falls) and its close; needs a long file with open, high, low and close.
      drift: unused.
    """

    kind: Literal["history"] = "history"
    intrabar: Literal["close", "low_high"] = "close"
    drift: DriftConfig = field(default_factory=lambda: DriftConfig(kind="historical"))


@dataclass(frozen=True, kw_only=True)
class PerpetualAccount:
    """Linear perpetual futures behind one margin balance.

    Attributes:
      name: what reports call the account.
      mode: "cross" (all positions share the margin) or "isolated" (one position).
      margin: balance put in, fraction of the capital.
      positions: signed notional by asset, fraction of the capital; short is negative.
      venue: name of the venue whose margin rules hold.
      entry: price at which a position was opened, by asset; without it, the last price in the data.
    """

    name: str
    mode: Literal["cross", "isolated"]
    margin: float
    positions: dict[str, float]
    venue: str = "binance"
    entry: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoanAccount:
    """A loan against collateral.

    Attributes:
      name: what reports call the account.
      collateral: value put in by asset, fraction of the capital.
      debt: value borrowed by asset or "USD", fraction of the capital; a borrowed asset is sold for cash at the start.
      venue: name of the venue whose lending rules hold.
    """

    name: str
    collateral: dict[str, float]
    debt: dict[str, float]
    venue: str = "aave_v3"


@dataclass(frozen=True, kw_only=True)
class BookConfig:
    """What is held at the start.

    Attributes:
      capital: equity at the start, USD.
      spot: value held by asset, fraction of the capital.
      perpetuals: futures accounts.
      loans: loan accounts.
      accounts: accounts of other kinds, each a mapping with `kind`, `name` and what the kind takes.
      policies: what trades after each step, each a mapping with `kind` and what the kind takes.
      trading_costs: of a policy's outright trades: fee and slippage on the value, gas_usd per holding traded.
    """

    capital: float
    spot: dict[str, float] = field(default_factory=dict)
    perpetuals: tuple[PerpetualAccount, ...] = ()
    loans: tuple[LoanAccount, ...] = ()
    accounts: tuple[dict[str, Any], ...] = ()
    policies: tuple[dict[str, Any], ...] = ()
    trading_costs: dict[str, float] = field(default_factory=dict)

    @property
    def account_names(self) -> tuple[str, ...]:
        """Names of all accounts: perpetuals, loans, then the others."""
        others = (str(account.get("name")) for account in self.accounts)
        return (*(account.name for account in (*self.perpetuals, *self.loans)), *others)

    @property
    def assets(self) -> tuple[str, ...]:
        """Every asset the book holds, owes or trades, in order of first mention; "USD" is not one."""
        names = list(self.spot)
        for account in self.perpetuals:
            names += account.positions
        for loan in self.loans:
            names += [*loan.collateral, *loan.debt]
        return tuple(dict.fromkeys(name for name in names if name != "USD"))


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """How much is simulated.

    Attributes:
      n_paths: number of paths.
      horizon_days: simulated time.
      n_steps: simulated time as a number of steps; when given, it is used and `horizon_days` is not.
      step_hours: length of a step, which must divide the data's; None takes the data's.
      chunk_size: paths in one compiled call, a power of two.
      monitoring: liquidations between steps: "bridge" (Brownian-bridge crossing) or "step" (only at steps).
      kernel: what runs the time loop: "scan", "fused" (one GPU kernel) or "auto" (fused on a GPU where it can be).
    """

    n_paths: int
    horizon_days: float
    n_steps: int | None = None
    step_hours: float | None = None
    chunk_size: int
    monitoring: Literal["bridge", "step"]
    kernel: Literal["auto", "scan", "fused"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """A bound that the run is held to; breached when the value is above it by more than its error bar.

    Attributes:
      name: what reports call the limit.
      measure: what is bounded.
      max: largest value allowed, in the unit of the measure.
      level: confidence level, one of `risk.levels`, for measures that have one.
      account: account that is meant; "" is the whole book.
      horizon_days: horizon that is meant; None is the whole simulated time.
    """

    name: str
    measure: Measure
    max: float
    level: float | None = None
    account: str = ""
    horizon_days: float | None = None


@dataclass(frozen=True, kw_only=True)
class RiskConfig:
    """What is measured.

    Attributes:
      levels: confidence levels of value at risk, conditional value at risk and drawdown quantiles.
      horizons_days: horizons at which losses are measured; None is 1 day, 7 days and the whole simulated time.
      attribution_level: level of the conditional value at risk that is split over the positions.
      limits: bounds that decide the exit code.
      liquidation_at_risk: probabilities of liquidation within the simulated time for which the margin or collateral
        that each account needs is sought; empty for none, as it takes several runs of the book.
    """

    levels: tuple[float, ...]
    horizons_days: tuple[float, ...] | None = None
    attribution_level: float
    limits: tuple[LimitConfig, ...] = ()
    liquidation_at_risk: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How better weights are sought.

    Attributes:
      objective: what is made best: "cvar" (least), "mean_cvar" (most mean - risk_aversion * cvar), "sharpe" or
        "sortino" (most).
      level: level of the conditional value at risk.
      risk_aversion: weight of the conditional value at risk in "mean_cvar".
      liquidation_penalty: added to the objective per unit of liquidation probability.
      learning_rate: step length of the optimiser.
      n_steps: number of its steps.
      n_paths: paths per step.
      n_test_paths: fresh paths on which the result is compared.
      lower: smallest spot weight, one number or one per asset or position.
      upper: largest absolute weight, one number or one per asset or position.
      gross_leverage: largest sum of absolute perpetual notionals; None keeps that of the start.
    """

    objective: Literal["cvar", "mean_cvar", "sharpe", "sortino"]
    level: float
    risk_aversion: float
    liquidation_penalty: float
    learning_rate: float
    n_steps: int
    n_paths: int
    n_test_paths: int
    lower: float | dict[str, float]
    upper: float | dict[str, float]
    gross_leverage: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where it is computed.

    Attributes:
      devices: number of devices; None uses every core, or every accelerator.
      compilation_cache: keep compiled programs on disk.
      cache_dir: folder of that cache; None is the user's cache folder.
    """

    devices: int | None = None
    compilation_cache: bool = True
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReference:
    """Ratios as measured before; more is better. None: shown, not judged.

    Attributes:
      paths: NumPy's cost over ours, 10 assets.
      paths_100_assets: the same, 100 assets.
      book: cost of the 10-asset paths over that of the book's paths.
      reduction: cost of the book's paths over that of reducing them.
      gradient: cost of the objective over that of the objective and its gradient.
      sketch: cost of sorting losses over that of counting them.
    """

    paths: float | None = None
    paths_100_assets: float | None = None
    book: float | None = None
    reduction: float | None = None
    gradient: float | None = None
    sketch: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How speed is measured and what it is held against (job=bench).

    Attributes:
      repetitions: timed rounds; the smallest time counts.
      tolerance: share by which a ratio may fall below its reference.
      reference: ratios as measured before.
    """

    repetitions: int = 5
    tolerance: float = 0.2
    reference: BenchReference = field(default_factory=BenchReference)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is written.

    Attributes:
      html: write report.html.
      parquet: tables as Parquet (needs pyarrow) instead of CSV.
    """

    html: bool = True
    parquet: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run needs to know.

    Attributes:
      job: what is done.
      seed: seed of all random numbers.
      path: number of the path that job=replay tells the story of.
      data: which prices are read.
      calibration: how the regime market is fitted.
      market: what prices do.
      book: what is held.
      venue: rules of the venues by name; `kind` names the rule, the rest are its parameters (see `qpo_sim.venue`).
      simulation: how much is simulated.
      risk: what is measured.
      optimizer: how better weights are sought.
      compute: where it is computed.
      bench: how speed is measured.
      report: what is written.
    """

    job: Job
    seed: int
    path: int = 0
    data: DataConfig
    calibration: CalibrationConfig
    market: MarketConfig
    book: BookConfig
    venue: dict[str, dict[str, Any]]
    simulation: SimulationConfig
    risk: RiskConfig
    optimizer: OptimizerConfig
    compute: ComputeConfig
    bench: BenchConfig
    report: ReportConfig
