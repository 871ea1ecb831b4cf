"""The verdict in plain sentences and the terminal's ten lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from qpo_sim.report import formatting as fmt
from qpo_sim.report.content import Number, RunReport

_CLEAR, _LIKELY = 3.0, 1.96  # in standard errors of the difference


def verdict(report: RunReport) -> list[str]:
    """The run in plain sentences, the most important first; each number with its 95 % half-width."""
    breached, other_limits = _limits(report)
    makers = (_losses, _liquidations, _costs, _margins, _drivers, _optimum, _replay)
    body = [sentence for make in makers for sentence in make(report)]
    if not body:
        body = _regimes(report)
    # A breach is the news; limits that hold only confirm what was said before.
    return breached + body + other_limits


def _money(report: RunReport, number: Number) -> str:
    shown = fmt.show(number.value * report.capital, number.std_error * report.capital, whole=True)
    return f"{shown.value} USD"


def _error(shown: fmt.Shown) -> str:
    """The error in brackets, with a leading space; empty if unknown."""
    if not shown.half_width:
        return ""
    return f" (± {shown.half_width}{' ' + shown.unit if shown.unit else ''})"


def _share(number: Number) -> fmt.Shown:
    return fmt.show(number.value, number.std_error, scale=100.0, unit="%")


def one_in(level: float) -> str:
    """How often a loss beyond the level happens: 0.99 -> `one case out of 100`."""
    cases = 1.0 / (1.0 - level)
    if math.isclose(cases, round(cases), rel_tol=1e-6):
        return f"one case out of {round(cases):,}"
    return f"{fmt.percent(1.0 - level)} of cases"


def _losses(report: RunReport) -> list[str]:
    level = report.headline_level
    if level is None:
        return []
    sentences = []
    span = f"Over {fmt.days(report.horizon_days)}"
    var = report.find("value_at_risk", level=level)
    cvar = report.find("conditional_value_at_risk", level=level)
    if var is not None and math.isfinite(var.value):
        if var.value > 0.0:
            shown = _share(var)
            sentences.append(
                f"{span} the book loses more than {shown.value} % of its capital ({_money(report, var)}) "
                f"in {one_in(level)}{_error(shown)}."
            )
        else:
            shown = _share(Number(-var.value, var.std_error))
            sentences.append(
                f"{span} the book gains at least {shown.value} % of its capital in all but "
                f"{one_in(level)}{_error(shown)}."
            )
    if cvar is not None and math.isfinite(cvar.value):
        shown, what = _share(cvar), f"average over the worst {fmt.percent(1.0 - level)} of cases"
        kind = "loss" if cvar.value > 0.0 else "gain"
        money = _money(report, Number(abs(cvar.value), cvar.std_error))
        sentences.append(f"The {what} is a {kind} of {str(shown).lstrip('-')} ({money}).")
    return sentences


def _liquidations(report: RunReport) -> list[str]:
    accounts = report.accounts()
    found = {name: report.find("liquidation_probability", account=name) for name in (accounts or [""])}
    known = {name: number for name, number in found.items() if number is not None and math.isfinite(number.value)}
    hit = sorted((name for name in known if known[name].value > 0.0), key=lambda name: -known[name].value)
    untouched = [name for name in known if known[name].value == 0.0]
    sentences, parts = [], []
    any_account = report.find("liquidation_probability")
    if len(accounts) > 1 and hit and any_account is not None and math.isfinite(any_account.value):
        sentences.append(f"At least one account is liquidated with probability {_with_error(any_account)}.")
    for rank, name in enumerate(hit):
        odds = f"{_with_error(known[name])}{_when(report, name, is_first=rank == 0)}"
        who = "The book" if name == "" else f"The {name} account"
        parts.append(f"{who} is liquidated with probability {odds}" if rank == 0 else f"{name} with {odds}")
    if parts:
        sentences.append("; ".join(parts) + ".")
    if untouched:
        sentences.append(_never(untouched, report.n_paths))
    return sentences


def _costs(report: RunReport) -> list[str]:
    """What the costliest account's liquidations cost, and what others bear of all accounts."""
    found = {
        name: number
        for name in report.accounts("expected_liquidation_cost")
        if (number := report.find("expected_liquidation_cost", account=name)) is not None and number.value > 0.0
    }
    sentences = []
    if found:
        name = max(found, key=lambda each: found[each].value)
        given = report.find("liquidation_cost_if_liquidated", account=name)
        needless = report.find("needless_liquidation_probability", account=name)
        if given is not None and math.isfinite(given.value):
            sentence = (
                f"Fees, slippage and bonuses take {_with_error(given)} of the capital when {name} is liquidated, "
                f"{_with_error(found[name])} on average over all paths"
            )
            if needless is not None and needless.value > 0.0:
                sentence += (
                    f"; with probability {_with_error(needless)} it is liquidated although, left alone, it would have "
                    "ended above its maintenance margin"
                )
            sentences.append(f"{sentence}.")
    borne = {
        name: number
        for name in report.accounts("expected_bad_debt")
        if (number := report.find("expected_bad_debt", account=name)) is not None
        and number.value * report.capital > 0.5
    }
    if borne:
        parts = [
            f"{_money(report, number)}{_error(fmt.show(*(x * report.capital for x in number), whole=True))} of {name}"
            for name, number in borne.items()
        ]
        sentences.append(f"Others (insurance funds, lenders) bear on average {fmt.join(parts)}.")
    return sentences


def _margins(report: RunReport) -> list[str]:
    """What margin each account needs."""
    sentences = []
    for row in report.table("liquidation_at_risk").itertuples():
        odds = fmt.percent(float(row.level))
        if not math.isfinite(float(row.needed)):
            sentences.append(f"No margin within reach brings {row.account} to a liquidation probability of {odds}.")
            continue
        needed = fmt.show(float(row.needed) * report.capital, float(row.std_error) * report.capital, whole=True)
        now = _money(report, Number(float(row.now), math.nan))
        sentences.append(
            f"To be liquidated with probability {odds} only, {row.account} needs {needed.value} USD{_error(needed)} "
            f"where it has {now}."
        )
    return sentences


def _with_error(number: Number) -> str:
    shown = _share(number)
    return f"{shown.value} %{_error(shown)}"


def _never(accounts: list[str], n_paths: int) -> str:
    """No liquidation on any path, and what that many paths can exclude."""
    if accounts == [""]:
        who, verb = "No account", "was"
    else:
        who = f"The {fmt.join(accounts)} account{'' if len(accounts) == 1 else 's'}"
        verb = "was not" if len(accounts) == 1 else "were not"
    if n_paths <= 0:
        return f"{who} {verb} liquidated on any path."
    # No event in n trials: the exact 95 % upper bound is 1 - 0.05^(1/n), about 3/n.
    bound = fmt.significant(300.0 / n_paths, 1)
    return (
        f"{who} {verb} liquidated on any of {fmt.plural(n_paths, 'path')}; with 95 % confidence the probability is "
        f"below {bound} %."
    )


def _when(report: RunReport, account: str, *, is_first: bool) -> str:
    """Around which day, if the hazard's peak stands out of its own noise."""
    if not report.has("hazard"):
        return ""
    rows = report.table("hazard")[report.table("hazard")["account"].fillna("") == account]
    if len(rows) < 2 or not (rows["hazard"] > 0.0).any():
        return ""
    peak = rows.loc[rows["hazard"].idxmax()]
    error = float(peak["hazard_std_error"])
    if not (float(peak["hazard"]) - float(rows["hazard"].mean()) > _CLEAR * error):
        return ", about equally likely on every day" if is_first else ""
    return f", {'most likely ' if is_first else ''}around day {float(peak['day']):g}"


def _drivers(report: RunReport) -> list[str]:
    if not report.has("attribution"):
        return []
    table = report.table("attribution").sort_values("contribution", ascending=False, kind="stable")
    top = table[table["contribution"] > 0.0].head(3)
    if top.empty:
        return []
    level = f" at {fmt.percent(report.attribution_level)}" if report.attribution_level is not None else ""
    # A position whose name another account has too is told with its account.
    names = list(table["position"])

    def told(row: Any) -> str:
        is_unique = names.count(row.position) == 1 and row.position != "everything else"
        return str(row.position) if is_unique else f"{row.position} of {row.account}"

    parts = [f"{told(row)} ({fmt.number(100.0 * float(row.share), 0)} %)" for row in top.itertuples()]
    verb = "drives" if len(parts) == 1 else "drive"
    sentence = f"{fmt.join(parts)} {verb} most of the tail loss{level}"
    relief = table[table["contribution"] + fmt.Z95 * table["std_error"] < 0.0].tail(1)
    if not relief.empty:
        sentence += f"; {told(next(relief.itertuples()))} relieves it"
    return [sentence + "."]


def optimised_rows(report: RunReport) -> pd.DataFrame | None:
    """The rows of `comparison` that belong to the optimised portfolio, or None."""
    if not report.has("comparison"):
        return None
    names = report.table("comparison")["portfolio"].astype(str).str.lower()
    rows = report.table("comparison")[names.str.startswith("optim") | (names == "after")]
    return None if rows.empty else rows


def significance(measure: str, difference: float, std_error: float) -> str:
    """A paired difference in words: better, worse, or not beyond its error."""
    if not math.isfinite(difference):
        return "reference"
    if difference == 0.0:
        return "the same"
    if not (math.isfinite(std_error) and std_error > 0.0):
        return "error unknown"
    size = abs(difference) / std_error
    if size < _LIKELY:
        return "no difference beyond the error"
    is_better = (difference > 0.0) == (fmt.base(measure) in fmt.HIGHER_IS_BETTER)
    return f"{'clearly' if size >= _CLEAR else 'probably'} {'better' if is_better else 'worse'}"


def row_level(row: pd.Series) -> float:
    """The level of a comparison row; NaN if the table has no such column."""
    level = row.get("level", math.nan)
    return math.nan if level is None else float(level)


def row_unit(row: pd.Series) -> str:
    """The unit of a comparison row, by its measure if the table has no such column."""
    return str(row.get("unit", fmt.unit_of(str(row["measure"]))))


def _optimum(report: RunReport) -> list[str]:
    rows = optimised_rows(report)
    if rows is None:
        return []
    # What was optimised for comes first in the table.
    row = rows.iloc[0]
    measure, difference = str(row["measure"]), float(row["difference"])
    now = fmt.show_in_unit(float(row["value"]), float(row["std_error"]), row_unit(row))
    before = fmt.show_in_unit(float(row["value"]) - difference, float(row["std_error"]), row_unit(row))
    change = fmt.show_in_unit(difference, float(row["difference_std_error"]), row_unit(row))
    name = fmt.label(measure, row_level(row), short=True)
    # A difference of percentages is in percentage points.
    change = change._replace(unit="percentage points") if change.unit == "%" else change
    name = name if name.isupper() or name[1:2].isupper() or "aR" in name else name[0].lower() + name[1:]
    words = significance(measure, difference, float(row["difference_std_error"]))
    if words == "no difference beyond the error":
        return [
            f"The optimiser found no weights whose {name} differs from that of the starting weights beyond the error "
            f"(change {change} on the same fresh paths)."
        ]
    return [
        f"The optimised weights move {name} from {before.value} to {now.value}{' ' + now.unit if now.unit else ''} "
        f"on fresh paths (change {change}): {words}."
    ]


def _replay(report: RunReport) -> list[str]:
    if not report.has("replay") or "equity" not in report.table("replay"):
        return []
    equity = report.table("replay")["equity"].to_numpy(dtype=float)
    drawdown = float((1.0 - equity / pd.Series(equity).cummax().to_numpy()).max())
    sentences = [
        f"On this path the book ends at {fmt.significant(100.0 * float(equity[-1]))} % of its starting capital; "
        f"its largest fall from a peak is {fmt.significant(100.0 * drawdown)} %."
    ]
    if report.has("replay_events"):
        events = report.table("replay_events")
        if "account" in events and (events["account"] != "").any():
            hits = events[events["account"] != ""]
            return sentences + [f"{_timed(row)}." for _, row in hits.iterrows()]
        first = events.iloc[0]
        sentences.append(f"{fmt.plural(len(events), 'event')}, first on day {float(first['day']):g}: {first['event']}.")
    return sentences


def _timed(event: Any) -> str:
    # Events of history carry their time already.
    text = str(event["event"])
    return text if "time" in event.index else f"Day {float(event['day']):.4g}: {text}"


def _regimes(report: RunReport) -> list[str]:
    sentences = []
    if report.has("regime_table"):
        table = report.table("regime_table")
        parts = [
            f"{row.regime} ({fmt.number(100.0 * float(row.share), 0)} % of the time, "
            f"{fmt.number(100.0 * float(row.mean_volatility_per_year), 0)} % volatility a year)"
            for row in table.itertuples()
        ]
        sentences.append(f"The fitted market has {fmt.plural(len(table), 'regime')}: {fmt.join(parts)}.")
    if report.has("regime_history"):
        last = report.table("regime_history").iloc[-1].astype(float)
        share = fmt.number(100.0 * float(last.max()), 0)
        sentences.append(f"On the last day it is {last.idxmax()} with probability {share} %.")
    return sentences


def _limits(report: RunReport) -> tuple[list[str], list[str]]:
    """Sentences on breached limits, and on the others."""
    if not report.has("limits"):
        return [], []
    table, bad, rest = report.table("limits"), [], []
    breached = table[table["status"] == "breached"]
    close = table[table["status"] == "within error"]
    for row in breached.itertuples():
        value, limit = limit_numbers(row)
        bad.append(f"Limit breached: {row.name} is {value}, beyond its limit of {limit}.")
    for row in close.itertuples():
        value, limit = limit_numbers(row)
        rest.append(f"{row.name} is {value}, too close to its limit of {limit} to call; more paths would decide.")
    if breached.empty and close.empty:
        rest.append("The configured limit holds." if len(table) == 1 else f"All {len(table)} limits hold.")
    return bad, rest


def limit_numbers(row) -> tuple[str, str]:
    """Value with error, and limit, of a row of `limits`, in the measure's unit."""
    unit = fmt.unit_of(str(row.measure))
    value = fmt.show_in_unit(float(row.value), float(row.std_error), unit)
    scale = 100.0 if unit in fmt.PERCENT_UNITS else 1.0
    return str(
        value
    ), f"{fmt.number(float(row.limit) * scale, 6).rstrip('0').rstrip('.')}{' ' + value.unit if value.unit else ''}"


def terminal_summary(report: RunReport, paths: Mapping[str, Path | str] | None = None) -> str:
    """About ten aligned lines of plain text for the end of a run.

    Args:
        report: what to tell.
        paths: what `write_report` returned; its `report` is printed last.
    """
    lines = [("Run", _run_line(report))]
    for measure in ("value_at_risk", "conditional_value_at_risk"):
        levels = report.levels(measure)
        if levels:
            numbers = [_share(found) for level in levels if (found := report.find(measure, level=level))]
            text = ", ".join(f"{fmt.percent(level)}: {shown}" for level, shown in zip(levels, numbers, strict=True))
            lines.append((fmt.SHORT_LABELS[measure], text))
    lines += _pair_line(report, "Drawdown", "expected_max_drawdown")
    lines += _pair_line(report, "Return", "mean_return", "volatility", "sharpe_ratio")
    liquidation = [
        f"{account or 'any'} {_share(number)}"
        for account in ["", *report.accounts()]
        if (number := report.find("liquidation_probability", account=account)) is not None
    ]
    if liquidation:
        lines.append(("Liquidation", ", ".join(liquidation)))
    for head, sentences in (
        ("Cost", _costs(report)),
        ("Margin", _margins(report)),
        ("Tail", _drivers(report)),
        ("Optimum", _optimum(report)),
        ("Replay", _replay(report)),
    ):
        lines += [(head if i == 0 else "", sentence) for i, sentence in enumerate(sentences)]
    if len(lines) == 1:
        lines += [("Market" if i == 0 else "", sentence) for i, sentence in enumerate(_regimes(report))]
    lines += [("Note" if i == 0 else "", sentence) for i, sentence in enumerate(report.notes)]
    lines += [("Limits" if i == 0 else "", sentence) for i, sentence in enumerate(sum(_limits(report), []))]
    if paths and "report" in paths:
        lines.append(("Report", str(paths["report"])))
    width = max(len(head) for head, _ in lines) + 2
    return "\n".join(f"{head:<{width}}{text}" for head, text in lines)


def _run_line(report: RunReport) -> str:
    parts = [f"{report.job}: {report.title}"]
    if report.n_paths:
        parts.append(f"{fmt.plural(report.n_paths, 'path')} of {fmt.days(report.horizon_days)}")
    if report.assets:
        parts.append(fmt.plural(len(report.assets), "asset"))
    parts.append(f"capital {fmt.number(report.capital, 0)} USD")
    return ", ".join(parts)


def _pair_line(report: RunReport, head: str, *measures: str) -> list[tuple[str, str]]:
    parts = []
    for measure in measures:
        number = report.find(measure)
        if number is not None:
            unit = fmt.unit_of(measure)
            parts.append(f"{fmt.SHORT_LABELS[measure].lower()} {fmt.show_in_unit(*number, unit)}")
    return [(head, ", ".join(parts))] if parts else []
