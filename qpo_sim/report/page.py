"""The report as one HTML page: what each section says, in the order a risk manager reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpo_sim.errors import InputError
from qpo_sim.report import figures, words
from qpo_sim.report import formatting as fmt
from qpo_sim.report.content import RunReport
from qpo_sim.report.svg import PALETTE, Picture, missing, picture

_MOST_ROWS = 40
# Measure, level and unit of the columns of the table by account behind the probability.
_LIQUIDATION_COLUMNS: tuple[tuple[str, float | None, str], ...] = (
    ("expected_time_to_liquidation", None, "days"),
    ("liquidation_cost_if_liquidated", None, "fraction of capital"),
    ("expected_bad_debt", None, "fraction of capital"),
    ("needless_liquidation_probability", None, "probability"),
)
_CHIPS = {
    "ok": ("good", "✓ within limit"),
    "breached": ("bad", "✕ breached"),
    "within error": ("near", "≈ within error"),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: text with a quiet addition (an error), or a chip, or a bar between 0 and 100 %."""

    text: str = ""
    note: str = ""
    chip: str = ""
    bar: dict[str, float] | None = None
    is_head: bool = False


@dataclass(frozen=True)
class Table:
    """A table: caption, columns (header, kind) and groups of rows, each under its own heading.

    A column's kind is "text", "number", "estimate" (a number followed by its error) or "bar".
    """

    caption: str
    columns: list[tuple[str, str]]
    groups: list[tuple[str, list[list[Cell]]]]


@dataclass(frozen=True)
class Section:
    """A heading, the sentence that says what to see, then pictures and tables."""

    id: str
    title: str
    lead: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: str = ""  # preformatted text, folded away


def render_page(report: RunReport) -> tuple[str, list[Picture]]:
    """The page's HTML and the pictures in it.

    Raises:
        InputError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise InputError(missing("jinja2")) from error
    sections = build_sections(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qpo_sim.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        report=report,
        sections=sections,
        verdict=[unbroken(sentence) for sentence in words.verdict(report)],
        status=_status(report),
        cards=_cards(report),
        limits=_limits(report),
        facts=_facts(report),
        palette=PALETTE,
        unbroken=unbroken,
    )
    return html, [drawn for section in sections for drawn in section.pictures]


def build_sections(report: RunReport) -> list[Section]:
    """The sections that have data, in reading order."""
    makers: list[tuple[tuple[str, ...], Callable[[RunReport], Section]]] = [
        (("replay",), _replay),
        (("measures",), _numbers),
        (("fan",), _fan),
        (("loss_histogram",), _losses),
        (("hazard", "measures"), _hazard),
        (("account_fan",), _accounts),
        (("attribution",), _attribution),
        (("ledger",), _ledger),
        (("weights",), _weights),
        (("comparison",), _comparison),
        (("regime_history", "regime_table"), _regimes),
        (("correlation",), _correlations),
        (("convergence",), _convergence),
        (("worst_paths",), _worst),
    ]
    made = [make(report) for names, make in makers if any(report.has(name) for name in names)]
    found = [section for section in made if section.pictures or section.tables]
    return [*found, _made(report)]


def unbroken(text: str) -> str:
    """Text whose numbers are not torn from their units or errors at a line's end."""
    text = re.sub(r"(?<=[\d)]) (?=(%|±|USD|days?\b|points|percentage))", "\u00a0", text)
    return text.replace("± ", "±\u00a0")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _number(value: float, std_error: float, unit: str) -> Cell:
    """A cell with the value, its error as the quiet part."""
    if not math.isfinite(value):
        return Cell("–")
    shown = fmt.show_in_unit(value, std_error, unit)
    text = f"{shown.value}{' ' + shown.unit if shown.unit else ''}"
    return Cell(_minus(text), f"± {shown.half_width}" if shown.half_width else "")


def _money(value: float, std_error: float) -> Cell:
    shown = fmt.show(value, std_error, whole=True)
    return Cell(_minus(shown.value), f"± {shown.half_width}" if shown.half_width else "")


def _name(text: Any) -> Cell:
    return Cell(str(text), is_head=True)


def _words(text: Any) -> Cell:
    return Cell(str(text))


def _percent(value: float) -> Cell:
    return Cell("–" if not math.isfinite(value) else _minus(f"{fmt.number(100.0 * value, 1)} %"))


def _status(report: RunReport) -> tuple[str, str]:
    if not report.has("limits"):
        return "none", ""
    statuses = list(report.table("limits")["status"])
    if "breached" in statuses:
        return "bad", f"✕ {fmt.plural(statuses.count('breached'), 'limit')} breached"
    if "within error" in statuses:
        return "near", "≈ too close to a limit to call"
    return "good", "✓ all limits hold"


def _limits(report: RunReport) -> Table | None:
    if not report.has("limits"):
        return None
    rows = []
    for row in report.table("limits").itertuples():
        unit = fmt.unit_of(str(row.measure))
        _, limit = words.limit_numbers(row)
        kind, text = _CHIPS[str(row.status)]
        rows.append(
            [
                _name(row.name),
                _number(float(row.value), float(row.std_error), unit),
                Cell(_minus(limit)),
                Cell(text, chip=kind),
            ]
        )
    return Table(
        "Configured limits",
        [("Limit", "text"), ("Now", "estimate"), ("Allowed", "number"), ("Status", "text")],
        [("", rows)],
    )


def _cards(report: RunReport) -> list[dict[str, str]]:
    """The few numbers that stand on top."""
    cards, level = [], report.headline_level
    wanted: list[tuple[str, float | None, str]] = [
        ("value_at_risk", level, "fraction of capital"),
        ("conditional_value_at_risk", level, "fraction of capital"),
        ("liquidation_probability", None, "probability"),
        ("expected_max_drawdown", None, "fraction of peak"),
        ("sharpe_ratio", None, "per year ratio"),
    ]
    for measure, at, unit in wanted:
        number = report.find(measure, level=at)
        if number is None or not math.isfinite(number.value):
            continue
        cell = _number(*number, unit)
        name = fmt.label(measure, math.nan if at is None else at, short=True)
        money = f"{_money(number.value * report.capital, number.std_error * report.capital).text} USD"
        cards.append(
            {"name": name, "text": cell.text, "note": cell.note, "sub": money if unit == "fraction of capital" else ""}
        )
    return cards


def _facts(report: RunReport) -> list[tuple[str, str]]:
    facts = [
        ("Job", report.job),
        ("Horizon", fmt.days(report.horizon_days)),
        ("Capital", f"{fmt.number(report.capital, 0)} USD"),
    ]
    if report.n_paths:
        facts.append(("Paths", f"{report.n_paths:,}"))
    if report.n_steps:
        facts.append(("Steps", f"{report.n_steps:,} of {report.step_hours:g} h"))
    if report.assets:
        facts.append(("Assets", f"{len(report.assets)}"))
    if "seed" in report.manifest:
        facts.append(("Seed", str(report.manifest["seed"])))
    return facts


def _numbers(report: RunReport) -> Section:
    table, groups = report.table("measures"), []
    is_fraction = table["unit"] == "fraction of capital"
    top = float(np.nanmax(np.abs(table.loc[is_fraction, "value"].astype(float)))) if is_fraction.any() else 1.0
    horizons = sorted({float(h) for h in table["horizon_days"]}, key=lambda h: (abs(h - report.horizon_days) > 1e-9, h))
    for horizon in horizons:
        rows = []
        part = table[np.isclose(table["horizon_days"].astype(float), horizon)]
        # What belongs to one account stands in the section on liquidation.
        ordered = sorted((row for row in part.to_dict("records") if not _account(row)), key=_rank)
        for row in ordered:
            value, error, unit = float(row["value"]), float(row["std_error"]), str(row["unit"])
            name = fmt.label(str(row["measure"]), float(row["level"]) if row["level"] is not None else math.nan)
            has_money = unit == "fraction of capital"
            bar = _bar(value, error, top if has_money else 1.0) if unit in fmt.PERCENT_UNITS else None
            rows.append(
                [
                    _name(name),
                    _number(value, error, unit),
                    _money(value * report.capital, error * report.capital) if has_money else Cell(),
                    Cell(bar=bar),
                ]
            )
        if rows:
            groups.append((f"Over {fmt.days(horizon)}", rows))
    columns = [("Measure", "text"), ("Value", "estimate"), ("USD", "estimate"), ("", "bar")]
    lead = (
        "Every number with its 95 % error (± 1.96 standard errors), the dark tip of its bar; losses are positive and "
        "in per cent of the starting capital."
    )
    return Section(
        "numbers", "Key numbers", lead, tables=[Table("Risk measures with 95 % half-widths", columns, groups)]
    )


def _rank(row: dict) -> tuple:
    order = list(fmt.LABELS)
    measure = str(row["measure"])
    place = order.index(measure) if measure in order else len(order)
    level = float(row["level"]) if row["level"] is not None else math.nan
    return place, 0.0 if math.isnan(level) else level


def _account(row: dict) -> str:
    return row["account"] if isinstance(row["account"], str) else ""


def _bar(value: float, std_error: float, top: float) -> dict[str, float] | None:
    if not (math.isfinite(value) and top > 0.0):
        return None
    size = min(abs(value) / top, 1.0)
    half = fmt.Z95 * std_error / top if math.isfinite(std_error) else 0.0
    return {
        "width": round(100.0 * size, 2),
        "low": round(100.0 * max(size - half, 0.0), 2),
        "error": round(200.0 * min(half, 0.5), 2),
    }


def _draw(name: str, description: str, report: RunReport, maker: Callable[[RunReport, bool], Any]) -> list[Picture]:
    return [picture(name, description, lambda is_narrow: maker(report, is_narrow))]


def _fan(report: RunReport) -> Section:
    last = report.table("fan").iloc[-1]
    q = {name: f"{100.0 * float(last[name]):.0f} %" for name in ("q01", "q25", "q50", "q75", "q99")}
    lead = (
        f"After {fmt.days(float(last['day']))} half of all paths hold between {q['q25']} and {q['q75']} of the "
        f"starting capital (median {q['q50']}); the bands contain 50, 90 and 98 % of the paths on each day."
    )
    alt = f"Fan chart of equity: on the last day 1 % of paths are below {q['q01']}, 1 % above {q['q99']}."
    return Section("equity", "Equity over time", lead, _draw("equity", alt, report, figures.fan))


def _losses(report: RunReport) -> Section:
    level = report.headline_level
    number = None if level is None else report.find("value_at_risk", level=level)
    start = "The upper plot shows how often each loss happens"
    if level is not None and number is not None:
        start += f" (red: the worst {fmt.percent(1.0 - level)}, beyond VaR at {figures._shown(number)})"
    lead = (
        f"{start}, the lower one the probability of losing more; dots are VaR, open diamonds CVaR, "
        "whiskers and shaded bands their 95 % error."
    )
    return Section("losses", "Loss distribution", lead, _draw("losses", lead, report, figures.loss_distribution))


def _hazard(report: RunReport) -> Section:
    drawn, notes = [], []
    lead = "How likely each account is to be liquidated within the horizon."
    if report.has("hazard"):
        table = report.table("hazard")
        assert table is not None
        last = table.groupby("account", sort=False).last().sort_values("cumulative", ascending=False, kind="stable")
        account, row = str(last.index[0]), last.iloc[0]
        shown = fmt.show(float(row["cumulative"]), float(row["cumulative_std_error"]), scale=100.0, unit="%")
        who = f"The {account} account" if account else "The book"
        lead = (
            f"{who} is the most fragile: it is liquidated on {shown} of paths; lines add up the probability to each "
            "day, bars (each on its own scale) give that of each single day, both with 95 % error."
        )
        if len(last) > figures.MOST_ACCOUNTS:
            notes.append(f"The {figures.MOST_ACCOUNTS} accounts with the highest probability of {len(last)} are drawn.")
        drawn = _draw("liquidation", lead, report, figures.hazard)
    tables_ = [
        table
        for table in (_by_account(report), _by_venue(report), _by_regime(report), _margin_needed(report))
        if table is not None
    ]
    if report.accounts("expected_liquidation_cost"):
        notes.append(
            "Cost: fees, slippage and bonuses of the liquidation, and margin that a venue keeps. Borne by others: what "
            "an insurance fund or lenders pay where an account ends below zero. Needless: the account, left alone, "
            "would have ended the run above its maintenance margin."
        )
    fewer = [
        what
        for what, n_paths in (
            ("costs, what others bear, needless liquidations and totals by venue", report.n_liquidation_paths),
            ("liquidations by regime", report.n_recorded if report.has("liquidation_by_regime") else report.n_paths),
        )
        if 0 < n_paths < report.n_paths
    ]
    if fewer:
        notes.append(f"From the first {fmt.plural(report.n_recorded, 'path')}: {fmt.join(fewer)}.")
    if report.has("liquidation_at_risk"):
        notes.append(
            "Margin needed: equity at the start of a margin account, value of a loan's collateral; all else stays as "
            "it is, and the paths are the same for every margin."
        )
    return Section("liquidation", "Liquidation", lead, drawn, tables_, notes)


def _by_account(report: RunReport) -> Table | None:
    rows = []
    for account in ["", *report.accounts()]:
        chance = report.find("liquidation_probability", account=account)
        if chance is None:
            continue
        cells = [_name(account or "at least one"), _number(*chance, "probability")]
        for measure, level, unit in _LIQUIDATION_COLUMNS:
            found = report.find(measure, account=account, level=level)
            cells.append(Cell("–") if found is None else _number(*found, unit))
        rows.append(cells)
    columns = [
        ("Account", "text"),
        ("Liquidated", "estimate"),
        ("Mean time to it", "estimate"),
        ("Cost if liquidated", "estimate"),
        ("Borne by others", "estimate"),
        ("Needless", "estimate"),
    ]
    if rows and not report.accounts("expected_liquidation_cost"):
        columns, rows = columns[:3], [row[:3] for row in rows]
    return Table("Liquidation by account", columns, [("", rows)]) if rows else None


def _by_venue(report: RunReport) -> Table | None:
    rows = []
    for venue in report.accounts("venue_liquidation_probability"):
        own = [account for account, at in report.account_venues.items() if at == venue]
        cells = [_name(venue), _words(", ".join(own))]
        for measure, unit in (
            ("venue_liquidation_probability", "probability"),
            ("venue_expected_liquidation_cost", "fraction of capital"),
            ("venue_expected_bad_debt", "fraction of capital"),
        ):
            found = report.find(measure, account=venue)
            cells.append(Cell("–") if found is None else _number(*found, unit))
        rows.append(cells)
    columns = [
        ("Venue", "text"),
        ("Accounts", "text"),
        ("Any liquidated", "estimate"),
        ("Mean cost", "estimate"),
        ("Borne by others", "estimate"),
    ]
    return Table("Liquidation by venue", columns, [("", rows)]) if rows else None


def _by_regime(report: RunReport) -> Table | None:
    if not report.has("liquidation_by_regime"):
        return None
    table = report.table("liquidation_by_regime")
    regimes = list(dict.fromkeys(table["regime"]))
    rows = []
    for account, own in table.groupby("account", sort=False):
        by = own.set_index("regime")
        cells = [_number(float(by["probability"][r]), float(by["std_error"][r]), "probability") for r in regimes]
        rows.append([_name(account), *cells])
    columns = [("Account", "text"), *((f"Liquidated in {regime}", "estimate") for regime in regimes)]
    return Table("Liquidation by the regime in which it happens", columns, [("", rows)])


def _margin_needed(report: RunReport) -> Table | None:
    if not report.has("liquidation_at_risk"):
        return None
    rows = []
    for row in report.table("liquidation_at_risk").itertuples():
        needed, error = float(row.needed), float(row.std_error)
        rows.append(
            [
                _name(row.account),
                Cell(fmt.percent(float(row.level))),
                _money(float(row.now) * report.capital, math.nan),
                _money(needed * report.capital, error * report.capital) if math.isfinite(needed) else Cell("–"),
                Cell(f"{needed / float(row.now):.3g} ×" if math.isfinite(needed) else "out of reach"),
            ]
        )
    columns = [
        ("Account", "text"),
        ("Liquidated with probability", "number"),
        ("Margin now, USD", "number"),
        ("Margin needed, USD", "estimate"),
        ("Ratio", "number"),
    ]
    return Table("Liquidation-at-Risk: the margin or collateral an account needs", columns, [("", rows)])


def _accounts(report: RunReport) -> Section:
    kinds = set(report.table("account_fan")["kind"])
    lead = (
        "How close each account is to liquidation (1 is liquidation)"
        f"{' and how much it holds, in % of the starting capital,' if 'exposure' in kinds else ''} over the paths on "
        "which it has not been liquidated: median, and bands with 50 and 90 % of them."
    )
    notes = [
        f"From the first {fmt.plural(report.n_recorded, 'path')}. The margin ratio is what the account has over what "
        "it owes and must keep: of one position price over liquidation price, of a loan the health factor."
    ]
    return Section("accounts", "Accounts over time", lead, _draw("accounts", lead, report, figures.accounts), [], notes)


def _attribution(report: RunReport) -> Section:
    table = report.table("attribution")
    top = table.sort_values("contribution", ascending=False, kind="stable").iloc[0]
    total = float(table["contribution"].sum())
    level = "" if report.attribution_level is None else f" {fmt.percent(report.attribution_level)}"
    lead = (
        f"{top['position']} causes {fmt.number(100.0 * float(top['share']), 0)} % of CVaR{level}; the bars add up to "
        f"CVaR ({_minus(fmt.number(100.0 * total, 1))} % of capital), and a bar to the left of zero lowers it."
    )
    notes = [
        "Euler components: the mean loss of each position over the paths of the tail; it says what a small change of "
        "the position would do, not what removing it would."
    ]
    if len(table) > 20:
        notes.append(f"The 20 largest of {len(table)} positions are drawn.")
    return Section(
        "attribution",
        "What drives the tail",
        lead,
        _draw("attribution", lead, report, figures.attribution),
        notes=notes,
    )


def _ledger(report: RunReport) -> Section:
    table = report.table("ledger")
    rows = [
        [
            _name(str(row.account).capitalize()),
            _number(float(row.mean), float(row.std_error), "fraction of capital"),
            _money(float(row.mean) * report.capital, float(row.std_error) * report.capital),
            _percent(float(row.tail_mean)),
        ]
        for row in table.itertuples()
        # What never happened needs no line.
        if row.account == "total" or abs(float(row.mean)) + float(row.std_error) + abs(float(row.tail_mean)) > 0.0
    ]
    lead = (
        "Where profit and loss come from, on average over all paths and over the tail; gains are positive here, "
        "and the accounts add up to the change of equity."
    )
    columns = [("Account", "text"), ("Mean", "estimate"), ("Mean, USD", "estimate"), ("Mean in the tail", "number")]
    return Section("ledger", "Ledger", lead, tables=[Table("Profit and loss by ledger account", columns, [("", rows)])])


def _weights(report: RunReport) -> Section:
    table = report.table("weights")
    change = (table["after"].astype(float) - table["before"].astype(float)).to_numpy()
    if np.isfinite(change).any():
        up, down = int(np.nanargmax(change)), int(np.nanargmin(change))
        lead = (
            f"The optimiser adds most to {table['position'].iloc[up]} ({_points(change[up])}) and takes most from "
            f"{table['position'].iloc[down]} ({_points(change[down])}); a line leads from the old weight to the new."
        )
    else:
        lead = "The weight of each position in the book as it stands."
    drawn = _draw("weights", lead, report, figures.weights)
    if report.has("optimizer_trace"):
        alt = "Line of the optimiser's objective by step."
        drawn += _draw("trace", alt, report, figures.optimizer_trace)
    return Section("weights", "Weights", lead, drawn)


def _points(change: float) -> str:
    return f"{'+' if change >= 0.0 else '−'}{abs(100.0 * change):.1f} percentage points"


def _comparison(report: RunReport) -> Section:
    table, groups = report.table("comparison"), []
    keys = list(dict.fromkeys((str(row["measure"]), words.row_level(row)) for _, row in table.iterrows()))
    seen: list[tuple[str, float]] = []
    for measure, level in keys:
        # NaN is not equal to itself: compare the printed names instead.
        name = fmt.label(measure, level)
        if name in [fmt.label(*key) for key in seen]:
            continue
        seen.append((measure, level))
        rows = []
        for _, row in table.iterrows():
            if fmt.label(str(row["measure"]), words.row_level(row)) != name:
                continue
            unit, difference, error = words.row_unit(row), float(row["difference"]), float(row["difference_std_error"])
            text = words.significance(measure, difference, error)
            kind = (
                "none"
                if "ly " not in text
                else "near"
                if "worse" in text and "probably" in text
                else "bad"
                if "worse" in text
                else "good"
            )
            rows.append(
                [
                    _name(row["portfolio"]),
                    _number(float(row["value"]), float(row["std_error"]), unit),
                    _number(difference, error, unit),
                    Cell(text, chip=kind),
                ]
            )
        groups.append((name, rows))
    lead = (
        "All portfolios on the same fresh paths, which the optimiser never saw; because the paths are shared, a "
        "difference is known much better than the two values."
    )
    columns = [("Portfolio", "text"), ("Value", "estimate"), ("Difference to start", "estimate"), ("In words", "text")]
    notes = ["Clearly: more than 3 standard errors of the paired difference; probably: more than 1.96."]
    return Section(
        "comparison", "Before and after", lead, tables=[Table("Portfolios compared", columns, groups)], notes=notes
    )


def _regimes(report: RunReport) -> Section:
    drawn, tables_, lead = [], [], "What the fitted regimes are like, from calm to turbulent."
    if report.has("regime_history"):
        last = report.table("regime_history").iloc[-1].astype(float)
        lead = (
            f"The market was {last.idxmax()} on the last day of the data (probability "
            f"{fmt.number(100.0 * float(last.max()), 0)} %); the colours show how likely each regime was."
        )
        drawn = _draw("regimes", lead, report, figures.regimes)
    if report.has("regime_table"):
        rows = [
            [
                _name(row.regime),
                _percent(float(row.share)),
                Cell(f"{fmt.significant(float(row.mean_duration_days))} days"),
                _percent(float(row.mean_volatility_per_year)),
                Cell(f"{float(row.mean_correlation):.2f}"),
                Cell(f"{float(row.dof):.1f}"),
            ]
            for row in report.table("regime_table").itertuples()
        ]
        columns = [
            ("Regime", "text"),
            ("Share of time", "number"),
            ("Mean stay", "number"),
            ("Volatility a year", "number"),
            ("Mean correlation", "number"),
            ("Tail (dof)", "number"),
        ]
        tables_ = [Table("Regimes", columns, [("", rows)])]
    notes = ["Fewer degrees of freedom (dof) mean fatter tails."] if tables_ else []
    return Section("regimes", "Market regimes", lead, drawn, tables_, notes)


def _correlations(report: RunReport) -> Section:
    means = []
    for name, matrix in (report.correlation or {}).items():
        values = matrix.to_numpy(dtype=float)
        off = values[~np.eye(len(values), dtype=bool)]
        means.append(f"{name} {np.nanmean(off):.2f}" if off.size else str(name))
    lead = (
        f"How strongly the assets move together in each regime (mean: {', '.join(means)}); darker is stronger, "
        "all maps share one colour scale, numbers are hundredths."
    )
    return Section(
        "correlation", "Correlation by regime", lead, _draw("correlation", lead, report, figures.correlations)
    )


def _convergence(report: RunReport) -> Section:
    lead = (
        "The estimates as paths come in, with their 95 % band: the line should wander inside the band and settle; "
        "the band halves with four times the paths."
    )
    # One point is no line.
    has_lines = report.table("convergence")["n_paths"].nunique() > 1
    drawn = _draw("convergence", lead, report, figures.convergence) if has_lines else []
    return Section("convergence", "Convergence", lead, drawn)


def _worst(report: RunReport) -> Section:
    table = report.table("worst_paths")
    rows = [
        [
            Cell(f"{int(row.path):,}", is_head=True),
            _percent(float(row.loss)),
            _percent(float(row.max_drawdown)),
            _words(row.liquidated if isinstance(row.liquidated, str) and row.liquidated else "none"),
        ]
        for row in table.head(_MOST_ROWS).itertuples()
    ]
    columns = [("Path", "text"), ("Loss", "number"), ("Max drawdown", "number"), ("Liquidated", "text")]
    lead = "The paths that lose most; any of them can be replayed step by step with job=replay and its number."
    return Section("worst", "Worst paths", lead, tables=[Table("Worst paths", columns, [("", rows)])])


def _replay(report: RunReport) -> Section:
    regime = (
        "; the background is the regime, from calm (blue) to turbulent (red)"
        if "regime" in report.table("replay")
        else ""
    )
    lead = (
        f"One path, day by day: prices, what they do to the equity, how close each account is to liquidation{regime}."
    )
    tables = []
    if report.has("replay_events"):
        rows = [
            [Cell(f"{float(row.day):.4g}", is_head=True), _words(row.event)]
            for row in report.table("replay_events").itertuples()
        ]
        tables = [Table("What happened", [("Day", "text"), ("Event", "text")], [("", rows)])]
        lead += " Dashed lines mark the events of the table."
    return Section("replay", "The path", lead, _draw("replay", lead, report, figures.replay), tables)


def _made(report: RunReport) -> Section:
    manifest = {key: value for key, value in report.manifest.items() if key != "config"}
    rows = []
    for key, value in _flatten(manifest):
        rows.append([_name(key), _words(value)])
    tables = [Table("Manifest", [("Item", "text"), ("Value", "text")], [("", rows)])] if rows else []
    config = report.manifest.get("config")
    notes = [
        *report.notes,
        "Standard errors cover Monte Carlo error only: what more paths would remove. They do not cover the error of "
        "the model, of its fitted parameters, or of a market that changes.",
        "The 95 % half-width is 1.96 standard errors. Values at risk are quantiles of the simulated loss, CVaR the "
        "mean loss beyond them; both at the end of the horizon, while drawdown and liquidation look at the whole path.",
        "Liquidation follows the venues' published rules at simulated prices; outages, order-book gaps and the failure "
        "of a venue are not simulated unless the run says so.",
    ]
    lead = "What this run was made of, what its numbers mean and what they do not."
    source = "" if config is None else json.dumps(config, indent=2, default=str, ensure_ascii=False)
    return Section("made", "How it was made", lead, tables=tables, notes=notes, source=source)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as names and text: a mapping or list of plain values stays on one line."""
    if isinstance(value, dict) and prefix and not any(isinstance(item, (dict, list, tuple)) for item in value.values()):
        return [(prefix, ", ".join(f"{key} {_plain(item)}" for key, item in value.items()))]
    if isinstance(value, dict):
        return [
            pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, dict) for item in value):
            return [pair for i, item in enumerate(value) for pair in _flatten(item, f"{prefix}[{i}]")]
        return [(prefix, ", ".join(map(_plain, value)))]
    return [(prefix, _plain(value))]


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
