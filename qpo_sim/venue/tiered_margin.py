r"""Tiered maintenance margin of perpetual venues, and how a venue liquidates.

In most venues maintenance margin is a marginal ("tax bracket") function of the notional V: $MM(V) = r_n V - c_n$ in
tier n with $c_0 = 0$, $c_n = c_{n-1} + f_n (r_n - r_{n-1})$ (f: lower bound of the tier), which makes it continuous.
They publish it in different ways, see `TieredMargin.convention`: Binance USDT-M futures by lower bounds, Bybit by upper
limits, with c as the maintenance margin deduction; Hyperliquid by maximum leverages, $r = 1/(2\,\text{max leverage})$.

Elsewhere one rate holds for the whole notional: at OKX and BitMEX it depends on the size of the position in coins
(tiers of contracts), so that it does not move with the price; dYdX has one rate per market.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.numerics import rounded
from qpo_sim.types import Array, Held, Positions, Requirements

# Contracts of the rules for perpetuals and futures, by class.
FUTURES = ("LinearPerpetual", "InversePerpetual", "QuantoPerpetual", "DatedFuture")
# Tiers that start beyond this multiple of the capital, or of the position if that is more, are not carried along paths.
_TIER_REACH = 100.0

CONVENTIONS = ("floor", "upper", "leverage", "size", "fraction")


class TierSchedule(NamedTuple):
    """Tiers of one contract: lower bounds of the notional, maintenance rates and deductions.

    Tiers by size have lower bounds in coins and no deductions.
    """

    floor: Float[Array, " tiers"]
    rate: Float[Array, " tiers"]
    deduction: Float[Array, " tiers"]


class PriceBand(NamedTuple):
    """Prices between which an account is safe: it is liquidated at `lower` and below, at `upper` and above.

    Without a liquidation price on a side: 0 and infinity. An account that no price saves: infinity and 0.
    """

    lower: float
    upper: float


def tier_schedule(tiers: Sequence[Sequence[float]], *, name: str = "tiers", flat: bool = False) -> TierSchedule:
    """Schedule from rows (notional floor, maintenance margin rate, ...); further columns are ignored.

    Args:
      tiers: the rows.
      name: of the table, for messages.
      flat: the rate of its tier holds for a whole position, so that there are no deductions.

    Raises:
      InputError: first floor not 0, floors not increasing, rates not increasing or outside (0, 1).
    """
    if len(tiers) == 0 or any(len(row) < 2 for row in tiers):
        raise InputError(f"{name} must be a list of [notional floor, maintenance margin rate, max leverage] rows.")
    floor = np.array([row[0] for row in tiers], np.float64)
    rate = np.array([row[1] for row in tiers], np.float64)
    if floor[0] != 0.0:
        raise InputError(
            f"{name}: the first tier starts at {floor[0]:g}, it must start at 0 so that no notional is in a gap."
        )
    for n in range(1, floor.size):
        if not floor[n] > floor[n - 1]:
            raise InputError(
                f"{name}: tier {n + 1} starts at {floor[n]:g}, it must start above tier {n} ({floor[n - 1]:g})."
            )
        if not rate[n] > rate[n - 1]:
            raise InputError(
                f"{name}: tier {n + 1} has rate {rate[n]:g}, it must exceed that of tier {n} ({rate[n - 1]:g})."
            )
    if not (rate[0] > 0.0 and rate[-1] < 1.0):
        raise InputError(f"{name}: maintenance margin rates must lie in (0, 1), got {rate.tolist()}.")
    if flat:
        return TierSchedule(floor, rate, np.zeros_like(rate))
    deduction = np.concatenate([[0.0], np.cumsum(floor[1:] * np.diff(rate))])
    return TierSchedule(floor, rate, deduction)


def one_rate(rate: float) -> TierSchedule:
    """Schedule of one tier."""
    return TierSchedule(np.zeros(1), np.full(1, rate, np.float64), np.zeros(1))


def floors_from_upper_limits(rows: Sequence[Sequence[float]], *, name: str = "tiers") -> list[list[float]]:
    """Rows by lower bounds from rows (upper limit, maintenance rate, max leverage[, published deduction]).

    The last upper limit, the largest position the venue accepts, is dropped: its tier has no end.

    Raises:
      InputError: a published deduction that the recursion does not reproduce within 1 (venues round it).
    """
    if any(len(row) < 3 for row in rows):
        raise InputError(f"{name} must be rows of [upper limit, maintenance margin rate, max leverage].")
    floors = [0.0, *(float(row[0]) for row in rows[:-1])]
    schedule = tier_schedule([[f, row[1]] for f, row in zip(floors, rows, strict=True)], name=name)
    for n, (row, deduction) in enumerate(zip(rows, schedule.deduction, strict=True)):
        if len(row) > 3 and abs(row[3] - deduction) > 1.0:
            raise InputError(
                f"{name}: tier {n + 1} has a deduction of {row[3]:g}, but the limits and rates above it give "
                f"{deduction:g}: one of them is mistyped."
            )
    return [[f, float(row[1]), float(row[2])] for f, row in zip(floors, rows, strict=True)]


def floors_from_leverage(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows by lower bounds from rows (lower bound, max leverage): the rate is half the initial margin rate, 1/(2 l).

    Source: Hyperliquid documentation, "Margin tiers".
    """
    return [[float(floor), 0.5 / float(leverage), float(leverage)] for floor, leverage in rows]


def continued_tiers(rows: Sequence[Sequence[float]], *, step: float, width: float) -> list[list[float]]:
    """Rows (size floor, maintenance rate, initial rate) continued beyond the table until the initial rate reaches 1.

    Each further tier is `width` coins wide and raises both rates by `step`. The last row's tier is `width` wide too.
    Source: OKX, "Tiered maintenance margin ratio rules"; BitMEX, "Risk limits".
    """
    table = [[float(x) for x in row[:3]] for row in rows]
    floor, rate, initial = table[-1]
    n = 1
    while initial + n * step <= 1.0 + 1e-12:
        table.append([floor + n * width, rate + n * step, min(initial + n * step, 1.0)])
        n += 1
    return table


def open_interest_rate(base: Array, open_interest: Array, lower_cap: Array, upper_cap: Array) -> Array:
    """Initial margin rate that rises linearly from `base` to 1 as open interest goes from the lower to the upper cap.

    The maintenance rate stays a fraction of the base. Plain numbers or NumPy arrays, open interest and caps in USD.
    Source: dYdX v4 protocol, perpetuals module, liquidity tiers.
    """
    share = (open_interest - lower_cap) / (upper_cap - lower_cap)
    return base + (1.0 - base) * np.clip(share, 0.0, 1.0)


def active_tier(schedule: TierSchedule, notional: Array) -> tuple[Array, Array]:
    """Rate and deduction of the tier that holds the notional (>= 0); leading axis of the schedule is the tier.

    For tiers by size, `notional` is the size in coins. A sum over tiers instead of a search: no gather, vectorises over
    paths. Gradient of both: zero.
    """
    rate, deduction = schedule.rate[0], schedule.deduction[0]
    for n in range(1, schedule.rate.shape[0]):
        above = (notional > schedule.floor[n]) * 1.0
        rate = rate + above * (schedule.rate[n] - schedule.rate[n - 1])
        deduction = deduction + above * (schedule.deduction[n] - schedule.deduction[n - 1])
    return rate, deduction


def maintenance_margin(schedule: TierSchedule, notional: Array) -> Array:
    """Maintenance margin of a notional (sign ignored), same currency as the schedule; for tiers by notional."""
    size = abs(notional)
    rate, deduction = active_tier(schedule, size)
    return rate * size - deduction


def price_band(
    legs: Sequence[tuple[float, TierSchedule]], *, constant: float, liquidation_fee_rate: float = 0.0
) -> PriceBand:
    r"""Where equity stays above maintenance for legs whose values all move with one price P.

    The set of $P > 0$ with $a + \sum_j q_j P > \sum_j [MM_j(|q_j| P) + f |q_j| P]$. Every MM is convex, so the excess
    is concave in P and the set is an interval: exact roots, segment by segment between the tier edges.

    Args:
      legs: (signed quantity, schedule by notional) each; two of opposite signs make a hedge-mode position.
      constant: a, the equity at P = 0 less the maintenance that does not move: wallet - sum q_j entry_j + ...
      liquidation_fee_rate: f, a fee on the notional that counts as maintenance (OKX).
    """
    legs = [(float(q), schedule) for q, schedule in legs if q != 0.0]
    edges = np.unique(np.concatenate([[0.0], *(np.asarray(s.floor) / abs(q) for q, s in legs)]))

    def excess(price: float) -> float:
        required = sum(float(maintenance_margin(s, q * price)) for q, s in legs)
        return constant + sum((q - abs(q) * liquidation_fee_rate) * price for q, _ in legs) - required

    # Slopes from the rates: a difference of excesses would lose the digits of the last, open segment.
    slopes = [
        sum(q - abs(q) * (liquidation_fee_rate + float(active_tier(s, abs(q) * middle)[0])) for q, s in legs)
        for middle in [*(0.5 * (edges[1:] + edges[:-1])), 2.0 * edges[-1] + 1.0]
    ]
    values = [excess(edge) for edge in edges]
    lower, upper = (0.0, inf) if values[0] >= 0.0 else (inf, inf)
    for n, (edge, value, slope) in enumerate(zip(edges, values, slopes, strict=True)):
        end = values[n + 1] if n + 1 < len(values) else inf * slope if slope != 0.0 else value
        root = float(edge) - value / slope if slope != 0.0 else inf
        if value < 0.0 <= end:
            lower = root
        if end < 0.0 <= value:
            upper = root
    return PriceBand(lower, upper) if lower < inf else PriceBand(inf, 0.0)


def liquidation_price(
    schedule: TierSchedule,
    *,
    quantity: float,
    entry: float,
    margin: float,
    other_maintenance: float = 0.0,
    other_profit: float = 0.0,
    liquidation_fee_rate: float = 0.0,
) -> float | None:
    """Price at which a linear position is liquidated, the others of its account held fixed; None if there is none.

    The root of margin + quantity (P - entry) + other_profit = MM(|quantity| P) + other_maintenance. Maintenance is
    continuous with slope below one, so the root is unique and lies in the tier that contains it.

    Args:
      schedule: tiers by notional in the margin currency.
      quantity: contracts in coins, negative for a short.
      entry: entry price.
      margin: wallet balance of the account (cross) or isolated margin.
      other_maintenance: maintenance margin of the account's other positions, and any fixed amount that counts as
        maintenance, such as the fee to close at the bankruptcy price (Bybit).
      other_profit: unrealised profit of the account's other positions.
      liquidation_fee_rate: fee on the notional at the liquidation price that counts as maintenance (OKX).

    Source: Binance support, "How to calculate liquidation price of USDT-M futures contracts".
    """
    constant = margin - other_maintenance + other_profit - quantity * entry
    band = price_band([(quantity, schedule)], constant=constant, liquidation_fee_rate=liquidation_fee_rate)
    price = band.lower if quantity > 0.0 else band.upper
    return float(price) if 0.0 < price < inf else None


def bankruptcy_price(*, quantity: float, entry: float, margin: float, taker_fee_rate: float = 0.0) -> float:
    """Price at which an isolated position closes with nothing left, after the taker fee on its value.

    entry - margin / quantity without the fee (quantity signed).
    """
    if taker_fee_rate == 0.0:
        return entry - margin / quantity
    return (quantity * entry - margin) / (quantity - taker_fee_rate * abs(quantity))


@dataclass(frozen=True)
class LiquidationProcess:
    """What a venue does with an account that is below its maintenance margin.

    Attributes:
      process: `full`: the positions are closed into the book, what is left after fee and slippage stays with the user;
        `partial`: only as much as `partial` says; `takeover`: the fund takes positions and margin, the user keeps
        nothing.
      partial: `compliant`: until equity covers `target` times the maintenance margin (Binance, Deribit); `share`: the
        fixed `share` of positions above `share_above_usd`, smaller ones whole (Hyperliquid); `tiers`: down by
        `tiers_down` tiers of size (OKX).
      share: share that the first order closes, in (0, 1].
      share_above_usd: notional above which only that share is closed first.
      cooldown_seconds: after a partial closing, orders are for the whole position for this long.
      tiers_down: tiers that one partial liquidation goes down.
      target: equity over maintenance margin after a partial liquidation, at least 1.
      backstop: the fund takes an account over whose equity is below this multiple of its maintenance margin; 0: never.
      insurance_fund_usd: fund that bears losses beyond the margin before others do.
      liquidate_on: price that the test uses: `mark`, `index` or `last`.
    """

    process: str = "full"
    partial: str = "compliant"
    share: float = 0.2
    share_above_usd: float = 100_000.0
    cooldown_seconds: float = 30.0
    tiers_down: int = 2
    target: float = 1.0
    backstop: float = 0.0
    insurance_fund_usd: float = inf
    liquidate_on: str = "mark"

    def __post_init__(self) -> None:
        """Checks every field."""
        for key, options in (
            ("process", ("full", "partial", "takeover")),
            ("partial", ("compliant", "share", "tiers")),
            ("liquidate_on", ("mark", "index", "last")),
        ):
            if getattr(self, key) not in options:
                raise InputError(
                    f"liquidation.{key} is {getattr(self, key)!r}; it must be one of {', '.join(options)}."
                )
        rules = {
            "share": (0.0 < self.share <= 1.0, "in (0, 1], such as 0.2"),
            "share_above_usd": (self.share_above_usd >= 0.0, "at least 0"),
            "cooldown_seconds": (self.cooldown_seconds >= 0.0, "at least 0"),
            "tiers_down": (self.tiers_down >= 1 and int(self.tiers_down) == self.tiers_down, "a whole number above 0"),
            "target": (1.0 <= self.target < inf, "at least 1, or the account would be liquidated again"),
            "backstop": (0.0 <= self.backstop <= 1.0, "in [0, 1], such as 0.6667"),
            "insurance_fund_usd": (self.insurance_fund_usd >= 0.0, "at least 0, .inf for a fund that bears all"),
        }
        for key, (is_kept, rule) in rules.items():
            if not is_kept:
                raise InputError(f"liquidation.{key} is {getattr(self, key)}; it must be {rule}.")


def liquidation_process(config: Mapping[str, Any], *, name: str = "venue") -> LiquidationProcess:
    """Process from the mapping of a venue's YAML; what it leaves out takes its default.

    Raises:
      InputError: an unknown key, or a value that a field refuses.
    """
    known = [f.name for f in fields(LiquidationProcess)]
    for key in config:
        if key not in known:
            raise InputError(f"venue {name}: liquidation.{key} is not an option: {did_you_mean(str(key), known)}")
    try:
        return LiquidationProcess(**config)
    except InputError as error:
        raise InputError(f"venue {name}: {error}") from error


def _numbers(rows: Any, place: str) -> list[list[float]]:
    try:
        return [[float(value) for value in row] for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(f"{place} must be a list of rows of numbers, got {rows!r}.") from error


def _check_leverages(rows: Sequence[Sequence[float]], place: str) -> None:
    leverages = [(n, row[1], row[2]) for n, row in enumerate(rows, start=1) if len(row) > 2]
    for n, rate, leverage in leverages:
        if not 1.0 - 1e-12 <= leverage <= (1.0 + 1e-12) / rate:
            raise InputError(
                f"{place}: tier {n} has maximum leverage {leverage:g}, which must be from 1 to {1.0 / rate:g}: beyond, "
                f"the initial margin would be below the maintenance margin rate {rate:g}."
            )
    for (_, _, before), (n, _, leverage) in zip(leverages, leverages[1:], strict=False):
        if leverage > before:
            raise InputError(
                f"{place}: tier {n} has maximum leverage {leverage:g}, above {before:g} of the tier before: it must "
                "not increase."
            )


@dataclass(frozen=True)
class TieredMargin:
    """A perpetual venue: tiers per asset, liquidation costs and process, and funding.

    Attributes:
      tiers: rows per asset, as the convention reads them; `default` serves the others.
      convention: what the rows are. `floor`: [notional floor, maintenance margin rate, max leverage] in USD (Binance);
        `upper`: [notional upper limit, maintenance margin rate, max leverage, deduction as published, optional]
        (Bybit); `leverage`: [notional floor, max leverage], maintenance half of the initial margin (Hyperliquid);
        `size`: [floor of the size in coins, maintenance margin rate, initial margin rate], each for the whole position
        (OKX, BitMEX); `fraction`: one row [initial margin rate, maintenance as a fraction of it], with the optional
        caps of the open interest in USD between which the initial rate rises to 1 (dYdX).
      tier_step: in `size` tables, what each tier beyond the table adds to both rates; 0: the last row holds for all.
      liquidation_fee_rate: clearance fee on the closed notional.
      liquidation_slippage: share of the notional lost when the position is closed into the book.
      fee_in_maintenance: the account is liquidated when equity is at most maintenance margin plus that fee (OKX).
      table_unit: of the notionals in `floor`, `upper` and `leverage` tables: `usd`, or `coin` for contracts settled in
        their coin (Binance COIN-M), whose notional in coins moves with the price.
      maintenance_on: `price`: maintenance margin is of the value at the present price; `entry`: of inverse contracts it
        is that of the value at entry and stands still in coins (Bybit inverse); needs `table_unit: coin`.
      collateral_weight: share of a coin's value that counts as margin, by coin; `default` serves the others. Empty: 1.
      liquidation: mapping of `LiquidationProcess` fields.
      funding_rate: paid by longs per interval on the mark notional.
      funding_interval_hours: hours between funding stamps.
      taker_fee_rate: fee on traded notional.
      name: for messages and reports.
      source: where the table comes from.
      as_of: date of the table.
    """

    tiers: Mapping[str, Sequence[Sequence[float]]]
    convention: str = "floor"
    tier_step: float = 0.0
    liquidation_fee_rate: float = 0.0
    liquidation_slippage: float = 0.0
    fee_in_maintenance: bool = False
    table_unit: str = "usd"
    maintenance_on: str = "price"
    collateral_weight: Mapping[str, float] = field(default_factory=dict)
    liquidation: Mapping[str, Any] = field(default_factory=dict)
    funding_rate: float = 0.0
    funding_interval_hours: float = 8.0
    taker_fee_rate: float = 0.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""
    rows: dict[str, list[list[float]]] = field(init=False, repr=False, compare=False, default_factory=dict)
    schedules: dict[str, TierSchedule] = field(init=False, repr=False, compare=False, default_factory=dict)
    process: LiquidationProcess = field(init=False, compare=False, default=LiquidationProcess())

    def __post_init__(self) -> None:
        """Checks every table once and puts it into rows by lower bounds."""
        if self.convention not in CONVENTIONS:
            raise InputError(
                f"venue {self.name}: convention is {self.convention!r}; it must be one of {', '.join(CONVENTIONS)}."
            )
        for asset, rows in self.tiers.items():
            place = f"venue {self.name}: tiers.{asset}"
            self.rows[asset] = self._rows(_numbers(rows, place), place)
            self.schedules[asset] = tier_schedule(self.rows[asset], name=place, flat=self.is_by_size)
            _check_leverages(self.rows[asset], place)
        for key in ("liquidation_fee_rate", "liquidation_slippage"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise InputError(f"venue {self.name}: {key} is {value}, it must lie in [0, 1).")
        self._check_units()
        if not -0.1 <= self.taker_fee_rate <= 0.1:
            raise InputError(
                f"venue {self.name}: taker_fee_rate is {self.taker_fee_rate}, it must lie in [-0.1, 0.1]: 0.0005 is "
                "0.05 %."
            )
        if not self.funding_interval_hours > 0.0:
            raise InputError(
                f"venue {self.name}: funding_interval_hours is {self.funding_interval_hours}, it must be positive."
            )
        object.__setattr__(self, "process", liquidation_process(self.liquidation, name=self.name))

    def _check_units(self) -> None:
        for key, options in (("table_unit", ("usd", "coin")), ("maintenance_on", ("price", "entry"))):
            if getattr(self, key) not in options:
                raise InputError(
                    f"venue {self.name}: {key} is {getattr(self, key)!r}; it must be {' or '.join(options)}."
                )
        if self.maintenance_on == "entry" and self.table_unit != "coin":
            raise InputError(
                f"venue {self.name}: maintenance_on is entry with table_unit {self.table_unit}; the value at entry is "
                "in coins, so set table_unit to coin."
            )
        for coin, weight in self.collateral_weight.items():
            if not 0.0 <= weight <= 1.0:
                raise InputError(f"venue {self.name}: collateral_weight.{coin} is {weight}; it must lie in [0, 1].")

    @property
    def is_by_size(self) -> bool:
        """Whether tiers are of the size in coins, with one rate for the whole position."""
        return self.convention == "size"

    def _rows(self, rows: list[list[float]], place: str) -> list[list[float]]:
        """Rows [floor, maintenance margin rate, max leverage]."""
        if self.convention == "floor" or len(rows) == 0:
            return rows
        if self.convention == "upper":
            return floors_from_upper_limits(rows, name=place)
        if self.convention == "leverage":
            if any(len(row) != 2 or not row[1] >= 1.0 for row in rows):
                raise InputError(f"{place} must be rows of [notional floor, max leverage], the leverage at least 1.")
            return floors_from_leverage(rows)
        if self.convention == "size":
            return self._size_rows(rows, place)
        if len(rows) != 1 or len(rows[0]) not in (2, 4):
            raise InputError(
                f"{place} must be one row [initial margin rate, maintenance fraction], with the lower and the upper "
                "cap of the open interest behind them where there are any."
            )
        initial, fraction, *caps = map(float, rows[0])
        if not (0.0 < initial <= 1.0 and 0.0 < fraction < 1.0):
            raise InputError(
                f"{place} has initial margin rate {initial:g} and maintenance fraction {fraction:g}; they must lie in "
                "(0, 1] and (0, 1)."
            )
        if caps and not 0.0 <= caps[0] < caps[1]:
            raise InputError(
                f"{place} has open interest caps {caps[0]:g} and {caps[1]:g}; the second must be above the first."
            )
        return [[0.0, initial * fraction, 1.0 / initial, *caps]]

    def _size_rows(self, rows: Sequence[Sequence[float]], place: str) -> list[list[float]]:
        if any(len(row) < 3 or not row[1] < row[2] <= 1.0 for row in rows):
            raise InputError(
                f"{place} must be rows of [size floor, maintenance margin rate, initial margin rate], the initial rate "
                "above the maintenance rate and at most 1."
            )
        if self.tier_step < 0.0 or self.tier_step > 0.1 or (self.tier_step > 0.0 and len(rows) < 2):
            raise InputError(
                f"venue {self.name}: tier_step is {self.tier_step}; it must be in [0, 0.1], such as 0.005, and above 0 "
                f"only where {place} has two rows or more, whose last two floors give the width of further tiers."
            )
        if self.tier_step > 0.0:
            rows = continued_tiers(rows, step=self.tier_step, width=float(rows[-1][0]) - float(rows[-2][0]))
        return [[float(floor), float(rate), 1.0 / float(initial)] for floor, rate, initial, *_ in rows]

    def _of(self, table: Mapping[str, Any], asset: str) -> Any:
        if asset in table:
            return table[asset]
        if "default" in table:
            return table["default"]
        raise InputError(
            f"venue {self.name} has no tier table for {asset} and no default; it lists {', '.join(self.schedules)}."
        )

    def schedule(self, asset: str) -> TierSchedule:
        """Tier schedule of an asset by notional.

        Raises:
          InputError: neither the asset nor `default` has a table, or its tiers are by size.
        """
        if self.is_by_size:
            raise InputError(
                f"venue {self.name} has tiers by size in coins; this account needs tiers by notional, so take another "
                "venue or an account that knows its size."
            )
        return self._of(self.schedules, asset)

    def size_schedule(self, asset: str) -> TierSchedule:
        """Tier schedule of an asset by size in coins, for `active_tier` of the size.

        Raises:
          InputError: neither the asset nor `default` has a table, or its tiers are by notional.
        """
        if not self.is_by_size:
            raise InputError(f"venue {self.name} has tiers by notional, not by size.")
        return self._of(self.schedules, asset)

    def position_schedule(self, asset: str, size: float) -> TierSchedule:
        """Schedule by notional for a position of a fixed size in coins (sign ignored), whatever the convention.

        Where the fee counts as maintenance it is in the rates.
        """
        schedule = self._of(self.schedules, asset)
        if self.is_by_size:
            schedule = one_rate(float(active_tier(schedule, abs(size))[0]))
        if self.fee_in_maintenance:
            return schedule._replace(rate=schedule.rate + self.liquidation_fee_rate)
        return schedule

    def max_leverage(self, asset: str, notional: float, *, open_interest: float = 0.0) -> float | None:
        """Leverage the venue allows at this notional (size in coins where tiers are by size).

        None when the table does not say. `open_interest` (USD) counts in the convention `fraction`.
        """
        rows = self.rows.get(asset, self.rows.get("default", ()))
        allowed = [row for row in rows if row[0] <= abs(notional)]
        if not allowed or len(allowed[-1]) < 3:
            return None
        leverage = float(allowed[-1][2])
        if self.convention == "fraction" and len(allowed[-1]) == 5:
            return 1.0 / float(open_interest_rate(1.0 / leverage, open_interest, *allowed[-1][3:]))
        return leverage

    def initial_margin(self, asset: str, notional: float, *, size: float = 0.0, open_interest: float = 0.0) -> float:
        """Initial margin of a position at the highest leverage, notional / max leverage.

        Args:
          asset: its name.
          notional: value of the position, sign ignored.
          size: in coins, read where tiers are by size.
          open_interest: in USD, read in the convention `fraction`.

        Raises:
          InputError: the table does not give a leverage.
        """
        leverage = self.max_leverage(asset, size if self.is_by_size else notional, open_interest=open_interest)
        if leverage is None:
            raise InputError(f"venue {self.name} has no maximum leverage for {asset}: add it to the rows of its table.")
        return abs(notional) / leverage

    def bind(self, positions: Positions, *, capital: float, prices: Mapping[str, float], dtype: Any) -> "BoundTiers":
        """The rule for the positions of one account, in units of its capital.

        Args:
          positions: their entry prices, read where `maintenance_on` is entry, stay whatever is traded later.
          capital: USD.
          prices: starting prices in USD, needed for tables in coins.
          dtype: precision of the paths.

        Raises:
          InputError: an asset without a table, a kind of contract that the rule does not cover, a missing price.
        """
        assets = positions.assets
        is_in_coin = self.table_unit == "coin" and not self.is_by_size
        check_kinds(self.name, positions.kinds, ("InversePerpetual",) if is_in_coin else FUTURES)
        reads_coins = self.is_by_size or is_in_coin
        coins = coins_per_unit(self.name, assets, capital, prices) if reads_coins else np.ones(len(assets))
        unit = capital if not reads_coins else 1.0
        columns = []
        for asset, units, per_unit in zip(assets, positions.quantity, coins, strict=True):
            schedule = self._of(self.schedules, asset)
            # Of a unit with a price of 1.
            size = max(abs(float(units)), 1.0) * (per_unit if reads_coins else capital)
            n = max(1, int(np.sum(schedule.floor <= _TIER_REACH * size)))
            leverage = [row[2] if len(row) > 2 else inf for row in self._of(self.rows, asset)]
            columns.append([schedule.floor[:n] / unit, schedule.rate[:n], schedule.deduction[:n] / unit, leverage[:n]])
        n_tiers = max((len(column[0]) for column in columns), default=1)

        def table(k: int, pad: float | None) -> Array:
            rows = [np.asarray(column[k], np.float64) for column in columns]
            padded = [np.pad(r, (0, n_tiers - r.size), constant_values=r[-1] if pad is None else pad) for r in rows]
            return np.stack(padded, axis=1) if padded else np.zeros((1, 0))

        fee = self.liquidation_fee_rate if self.fee_in_maintenance else 0.0
        return BoundTiers(
            schedule=TierSchedule(
                rounded(table(0, 1e30), dtype), rounded(table(1, None), dtype), rounded(table(2, None), dtype)
            ),
            initial_rate=rounded(1.0 / table(3, None), dtype),
            coins=rounded(coins, dtype),
            entry=rounded(positions.entry, dtype),
            fee=rounded(fee, dtype),
            is_by_size=self.is_by_size,
            is_in_coin=is_in_coin,
            is_on_entry=self.maintenance_on == "entry",
            tiers_down=self.process.tiers_down,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundTiers:
    """Tiers of the positions of one account; money in units of its capital.

    Attributes:
      schedule: tier axis first, positions second.
      initial_rate: initial margin rate of each tier, 0 where the table does not say.
      coins: coins (of inverse contracts: at the starting price) that one unit stands for, 1 where tables are in USD.
      entry: entry price over the starting price.
      fee: liquidation fee that counts as maintenance, on the notional.
      is_by_size: see `TieredMargin.is_by_size` (static).
      is_in_coin: tables are by the notional in coins (static).
      is_on_entry: maintenance is that of the value at entry (static).
      tiers_down: see `LiquidationProcess` (static).
    """

    schedule: TierSchedule
    initial_rate: Float[Array, "tiers positions"]
    coins: Float[Array, " positions"]
    entry: Float[Array, " positions"]
    fee: Float[Array, ""]
    is_by_size: bool = field(metadata={"static": True})
    is_in_coin: bool = field(metadata={"static": True})
    is_on_entry: bool = field(metadata={"static": True})
    tiers_down: int = field(metadata={"static": True})

    def _of(self, i: int) -> TierSchedule:
        return TierSchedule(*(column[:, i] for column in self.schedule))

    def _size(self, i: int, position: Held) -> Array:
        # What the table of a position is read with.
        units = jnp.abs(position.quantity)
        if not (self.is_by_size or self.is_in_coin):
            return units * position.notional
        coins = units * self.coins[i]
        if position.kind != "InversePerpetual":
            return coins
        return coins / (self.entry[i] if self.is_on_entry else position.price)

    def requirements(self, held: tuple[Held, ...]) -> Requirements:
        """Maintenance margin of the positions, with the liquidation fee where it counts.

        Pathwise gradient: prices and quantities within a tier.
        """
        by_position, constant = [], 0.0
        for i, position in enumerate(held):
            rate, deduction = active_tier(self._of(i), self._size(i, position))
            notional = jnp.abs(position.quantity) * position.notional
            needed = (rate + self.fee) * notional
            if self.is_on_entry:
                needed = rate * notional * position.price / self.entry[i] + self.fee * notional
            if self.is_in_coin:
                needed = needed - deduction / self.coins[i] * position.price
            elif not self.is_by_size:
                constant = constant - deduction
            by_position.append(needed)
        return Requirements(tuple(by_position), constant)

    def initial_margin(self, held: tuple[Held, ...]) -> tuple[Array, ...]:
        """Initial margin of each position, notional over the largest leverage of its tier."""
        rows = []
        for i, position in enumerate(held):
            # Rates as those of the maintenance: picked by tier.
            rate, _ = active_tier(self._of(i)._replace(rate=self.initial_rate[:, i]), self._size(i, position))
            rows.append(rate * jnp.abs(position.quantity) * position.notional)
        return tuple(rows)

    def close_shares(self, held: tuple[Held, ...], equity: Array, share: Any) -> tuple[Array, ...]:
        """Share of each position that a liquidation by tiers closes.

        Of the equity a position has what the maintenance margin of the others leaves. `share` is the function
        `execution.liquidation.tier_close_share`.
        """
        needed = self.requirements(held)
        total = sum(needed.by_position, 0.0)
        return tuple(
            share(
                self._of(i),
                self._size(i, position),
                tiers_down=self.tiers_down,
                equity=equity - (total - own),
                value=jnp.abs(position.quantity) * position.notional,
                fee_rate=self.fee,
            )
            for i, (position, own) in enumerate(zip(held, needed.by_position, strict=True))
        )


def check_kinds(name: str, kinds: Sequence[str], taken: Sequence[str]) -> None:
    """Refuses contracts that a rule does not cover.

    Raises:
      InputError: a class of contract that is not among `taken`.
    """
    for k, kind in enumerate(kinds):
        if kind not in taken:
            raise InputError(
                f"positions[{k}] is of kind {kind}, which venue {name} does not cover; its rule takes "
                f"{', '.join(taken)}."
            )


def coins_per_unit(
    name: str, assets: Sequence[str], capital: float, prices: Mapping[str, float]
) -> Float[np.ndarray, " positions"]:
    """Coins that one unit (the capital's worth at the starting price) of each asset stands for.

    Raises:
      InputError: the starting price of an asset is not known.
    """
    for asset in assets:
        if asset not in prices:
            raise InputError(
                f"venue {name} has margins by size in coins, so the account needs the starting price of {asset} in "
                "USD, which is not known here: give prices."
            )
    return np.array([capital / float(prices[asset]) for asset in assets], np.float64)
