"""The report's figures: each function draws one table of a `RunReport` with matplotlib.

They take `is_narrow` (a phone's width) and return a matplotlib figure; matplotlib is imported only when they run.
Labels stand at what they name rather than in legends, in the colour of what they name.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pandas as pd

from qpo_sim.report import formatting as fmt
from qpo_sim.report.content import RunReport
from qpo_sim.report.svg import CYCLE, NARROW, PALETTE, WIDE, figure

_MOST_POINTS = 300  # a line in a page shows no more than this
MOST_ACCOUNTS = 6
_MOST_VALUES = 12  # print the values of a correlation matrix up to this many assets
_INK, _MUTED, _RED, _BLUE = (PALETTE[name] for name in ("ink", "muted", "red", "blue"))
_CALM_TO_TURBULENT = ("#7fb2d6", "#ecc06a", "#bf3f2b")


def regime_colours(n_regimes: int) -> list[str]:
    """Colours from calm (blue) over amber to turbulent (red)."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("regimes", _CALM_TO_TURBULENT)
    return [to_hex(scale(0.0 if n_regimes == 1 else i / (n_regimes - 1))) for i in range(n_regimes)]


def fan(report: RunReport, is_narrow: bool) -> Any:
    """Quantile bands of equity over time."""
    table = report.table("fan")
    drawing = figure(NARROW if is_narrow else WIDE, 3.3 if is_narrow else 4.2)
    axes = drawing.subplots()
    day = table["day"].to_numpy(dtype=float)
    for low, high, strength in (("q01", "q99", 0.13), ("q05", "q95", 0.2), ("q25", "q75", 0.32)):
        axes.fill_between(day, table[low], table[high], color=_BLUE, alpha=strength, linewidth=0)
    axes.axhline(1.0, color=PALETTE["stone"], linewidth=0.8)
    axes.plot(day, table["q50"], color=_BLUE, linewidth=2.0)
    axes.plot(day, table["mean"], color=_INK, linewidth=1.2, linestyle=(0, (4, 2.5)))
    _limit_x(axes, day[0], day[-1])
    axes.yaxis.set_major_formatter(_percent_axis())
    axes.set_xlabel("day")
    axes.set_title("Equity, % of the starting capital")
    names = {
        "q99": "99 % below",
        "q95": "95 % below",
        "q75": "75 % below",
        "q50": "median",
        "mean": "mean",
        "q25": "25 % below",
        "q05": "5 % below",
        "q01": "1 % below",
    }
    last = {key: float(table[key].iloc[-1]) for key in names}
    ends = [
        (last[key], f"{name} {100.0 * last[key]:.0f}", _INK if key == "mean" else _BLUE) for key, name in names.items()
    ]
    _label_ends(axes, ends, is_narrow)
    return drawing


def loss_distribution(report: RunReport, is_narrow: bool) -> Any:
    """Density of the loss above, probability of a larger loss below; VaR and CVaR with their 95 % bands."""
    table = report.table("loss_histogram")
    table = table[np.isfinite(table["left"].to_numpy(dtype=float)) & np.isfinite(table["right"].to_numpy(dtype=float))]
    drawing = figure(NARROW if is_narrow else WIDE, 5.2 if is_narrow else 5.6)
    top, bottom = drawing.subplots(2, 1, sharex=True, height_ratios=(1.15, 1.0))
    edges = np.append(table["left"].to_numpy(dtype=float), float(table["right"].iloc[-1]))
    mass = table["density"].to_numpy(dtype=float) * np.diff(edges)
    below = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
    levels = report.levels("value_at_risk")
    marks = [
        (level, report.find("value_at_risk", level=level), report.find("conditional_value_at_risk", level=level))
        for level in levels
    ]
    left = float(np.interp(0.008, below, edges))
    reach = [
        number.value for _, *pair in marks for number in pair if number is not None and math.isfinite(number.value)
    ]
    right = max([float(np.interp(0.9995, below, edges)), *reach])
    right += (0.3 if is_narrow else 0.28) * (right - left)  # room for the last label

    headline = report.headline_level
    cut = report.find("value_at_risk", level=headline) if headline is not None else None
    fixed = [0.0] + ([cut.value] if cut is not None else [])
    bins = np.unique(np.concatenate([np.linspace(left, right, 90 if is_narrow else 140), fixed]))
    density = np.diff(np.interp(bins, edges, below)) / np.diff(bins)
    middle = (bins[:-1] + bins[1:]) / 2.0
    beyond = math.inf if cut is None else max(cut.value, 0.0)
    for chosen, name, strength in (
        (middle < 0.0, "green", 0.45),
        ((middle >= 0.0) & (middle < beyond), "stone", 0.45),
        (middle >= beyond, "red", 0.75),
    ):
        top.stairs(np.where(chosen, density, 0.0), bins, fill=True, color=PALETTE[name], alpha=strength, linewidth=0)
    top.set_ylim(0.0, 1.12 * float(density.max()))
    top.set_yticks([])
    top.set_title(f"Loss after {fmt.days(report.horizon_days)}: how often")
    height = float(density.max())
    share_gain = float(np.interp(0.0, edges, below))
    top.text(
        left + 0.01 * (right - left),
        0.94 * height,
        f"gain\n{100.0 * share_gain:.0f} % of paths",
        color=PALETTE["green"],
        va="top",
    )
    for rank, (level, var, _) in enumerate(marks):
        if var is None or not math.isfinite(var.value):
            continue
        half = fmt.Z95 * var.std_error
        if math.isfinite(half):
            top.fill_between(
                [var.value - half, var.value + half], height * (0.9 - 0.2 * rank), color=_RED, alpha=0.2, linewidth=0
            )
        top.plot([var.value] * 2, [0.0, height * (0.9 - 0.2 * rank)], color=_RED, linewidth=1.0)
        top.annotate(
            f"VaR {fmt.percent(level)}",
            (var.value, height * (0.9 - 0.2 * rank)),
            (4, 0),
            textcoords="offset points",
            color=_RED,
            va="top",
        )

    grid = np.unique(np.concatenate([np.linspace(left, right, 240), edges[(edges > left) & (edges < right)][:400]]))
    exceed = 1.0 - np.interp(grid, edges, below)
    lowest = min([1.0 - level for level in levels] + [0.01]) / 4.0
    exceed = np.where(exceed > lowest / 3.0, exceed, np.nan)
    bottom.plot(grid, exceed, color=_INK, linewidth=1.4)
    bottom.set_yscale("log")
    bottom.yaxis.set_minor_locator(_nothing())
    bottom.set_ylim(lowest, 1.3)
    bottom.yaxis.set_major_formatter(_percent_axis())
    for level, var, cvar in marks:
        for number, marker, name in ((var, "o", "VaR"), (cvar, "D", "CVaR")):
            if number is None or not math.isfinite(number.value):
                continue
            bottom.errorbar(
                number.value,
                1.0 - level,
                xerr=fmt.Z95 * number.std_error,
                fmt=marker,
                color=_RED,
                capsize=2.5,
                markersize=5.0,
                elinewidth=1.2,
                markerfacecolor=_RED if name == "VaR" else PALETTE["paper"],
            )
        if var is not None and cvar is not None and math.isfinite(var.value + cvar.value):
            bottom.plot([var.value, cvar.value], [1.0 - level] * 2, color=_RED, linewidth=0.6, linestyle=":")
        if cvar is not None and math.isfinite(cvar.value):
            text = f"CVaR {fmt.percent(level)}" if is_narrow else f"CVaR {fmt.percent(level)}:  {_shown(cvar)}"
            bottom.annotate(
                text,
                (cvar.value + fmt.Z95 * np.nan_to_num(cvar.std_error), 1.0 - level),
                (7, 0),
                textcoords="offset points",
                color=_RED,
                va="center",
            )
        if var is not None and math.isfinite(var.value):
            text = "VaR" if is_narrow else f"VaR:  {_shown(var)}"
            bottom.annotate(
                text,
                (var.value - fmt.Z95 * np.nan_to_num(var.std_error), 1.0 - level),
                (-7, 0),
                textcoords="offset points",
                color=_RED,
                va="center",
                ha="right",
            )
    bottom.set_title("Probability of a larger loss (log scale)")
    bottom.set_xlim(left, right)
    bottom.xaxis.set_major_formatter(_percent_axis())
    bottom.xaxis.set_major_locator(_locator(5 if is_narrow else 8))
    bottom.set_xlabel("loss, % of the starting capital")
    return drawing


def hazard(report: RunReport, is_narrow: bool) -> Any:
    """Probability of liquidation until each day, all accounts, and on each day, one panel per account."""
    table = report.table("hazard")
    total = table.groupby("account", sort=False)["cumulative"].last()
    accounts = list(total.sort_values(ascending=False, kind="stable").index[:MOST_ACCOUNTS])
    n = len(accounts)
    if is_narrow:
        drawing = figure(NARROW, 3.0 + 0.95 * n)
        parts = drawing.add_gridspec(n + 1, 1, height_ratios=[2.8] + [0.8] * n)
        left, panels = drawing.add_subplot(parts[0]), [drawing.add_subplot(parts[i + 1]) for i in range(n)]
    else:
        drawing = figure(WIDE, max(3.6, 1.05 * n))
        parts = drawing.add_gridspec(n, 2, width_ratios=(1.15, 1.0))
        left, panels = drawing.add_subplot(parts[:, 0]), [drawing.add_subplot(parts[i, 1]) for i in range(n)]
    ends = []
    for i, (account, panel) in enumerate(zip(accounts, panels, strict=True)):
        rows, colour = table[table["account"] == account], PALETTE[CYCLE[i % len(CYCLE)]]
        name, day = _name(account or "any account", is_narrow), rows["day"].to_numpy(dtype=float)
        value, half = (
            rows["cumulative"].to_numpy(dtype=float),
            fmt.Z95 * rows["cumulative_std_error"].to_numpy(dtype=float),
        )
        left.fill_between(
            [0.0, *day], [0.0, *(value - half)], [0.0, *(value + half)], color=colour, alpha=0.25, linewidth=0
        )
        left.plot([0.0, *day], [0.0, *value], color=colour)
        ends.append(
            (float(value[-1]), f"{fmt.show(value[-1], half[-1] / fmt.Z95, scale=100.0).value} %  {name}", colour)
        )
        width = 0.78 * float(np.min(np.diff(day))) if day.size > 1 else 0.78
        panel.bar(
            day,
            rows["hazard"],
            width=width,
            color=colour,
            alpha=0.75,
            linewidth=0,
            yerr=fmt.Z95 * rows["hazard_std_error"],
            error_kw={"elinewidth": 0.7, "ecolor": _INK},
        )
        panel.yaxis.set_major_formatter(_percent_axis())
        panel.yaxis.set_major_locator(_locator(2))
        panel.set_xlim(day[0] - width, day[-1] + width)
        panel.set_ylim(bottom=0.0)
        title = f"per day: {name}" if i == 0 else name
        panel.set_title(title, color=colour, fontsize=8.5, pad=3.0)
        if i + 1 < n:
            panel.tick_params(labelbottom=False)
    panels[-1].set_xlabel("day")
    left.set_ylim(bottom=0.0)
    _limit_x(left, 0.0, float(table["day"].max()))
    left.yaxis.set_major_formatter(_percent_axis())
    left.set_xlabel("day")
    left.set_title("Liquidated by this day")
    _label_ends(left, ends, is_narrow)
    return drawing


def accounts(report: RunReport, is_narrow: bool) -> Any:
    """Margin ratio and exposure of each account over time: bands over the paths on which it is untouched."""
    table = report.table("account_fan")
    names = list(dict.fromkeys(table["account"]))
    kinds = [kind for kind in ("margin_ratio", "exposure") if kind in set(table["kind"])]
    if report.has("hazard"):
        total = report.table("hazard").groupby("account", sort=False)["cumulative"].last()
        names = sorted(names, key=lambda name: -float(total.get(name, 0.0)))
    names = names[:MOST_ACCOUNTS]
    columns = 1 if is_narrow else len(kinds)
    n = len(names) * len(kinds) if is_narrow else len(names)
    drawing = figure(NARROW if is_narrow else WIDE, 0.4 + 1.55 * n)
    panels = np.atleast_1d(drawing.subplots(n, columns, sharex=True, squeeze=False)).ravel()
    order = [(name, kind) for name in names for kind in kinds]
    for panel, (name, kind) in zip(panels, order, strict=True):
        rows = table[(table["account"] == name) & (table["kind"] == kind)]
        if rows.empty:
            panel.set_visible(False)
            continue
        colour = PALETTE[CYCLE[names.index(name) % len(CYCLE)]]
        day = rows["day"].to_numpy(dtype=float)
        bands = {q: rows[q].to_numpy(dtype=float) for q in ("q05", "q25", "q50", "q75", "q95")}
        for low, high, strength in (("q05", "q95", 0.18), ("q25", "q75", 0.34)):
            panel.fill_between(day, bands[low], bands[high], color=colour, alpha=strength, linewidth=0)
        panel.plot(day, bands["q50"], color=colour, linewidth=1.6)
        words = "margin ratio" if kind == "margin_ratio" else "exposure, % of the capital"
        panel.set_title(f"{_name(name, is_narrow)}: {words}", color=colour, fontsize=8.5, pad=3.0)
        if kind == "margin_ratio":
            panel.axhline(1.0, color=_RED, linewidth=0.8)
            # An account without anything owed is infinitely far away.
            finite = bands["q75"][np.isfinite(bands["q75"])]
            top = min(float(np.nanmax(bands["q95"])), 3.0 * float(np.max(finite)) if finite.size else 3.0, 20.0)
            panel.set_ylim(min(0.95, 0.98 * float(np.nanmin(bands["q05"]))), max(1.1, 1.04 * top))
        else:
            panel.set_ylim(bottom=0.0)
            panel.yaxis.set_major_formatter(_percent_axis())
        panel.yaxis.set_major_locator(_locator(3))
        _limit_x(panel, day[0], day[-1])
    for panel in panels[-columns:]:
        panel.set_xlabel("day")
    return drawing


def attribution(report: RunReport, is_narrow: bool) -> Any:
    """Euler components of CVaR as bars with 95 % error bars, the largest on top."""
    table = report.table("attribution")
    # What contributes nothing, for certain, is left out.
    nothing = (table["contribution"].astype(float) == 0.0) & (table["std_error"].fillna(0.0).astype(float) == 0.0)
    table = table[~nothing] if not nothing.all() else table
    table = table.sort_values("contribution", ascending=True, kind="stable").tail(20)
    drawing = figure(NARROW if is_narrow else WIDE, 0.9 + (0.36 if is_narrow else 0.3) * len(table))
    axes = drawing.subplots()
    row, value = np.arange(len(table)), table["contribution"].to_numpy(dtype=float)
    half = fmt.Z95 * np.nan_to_num(table["std_error"].to_numpy(dtype=float))
    colours = [_RED if item > 0.0 else PALETTE["green"] for item in value]
    axes.barh(
        row,
        value,
        height=0.62,
        color=colours,
        alpha=0.8,
        linewidth=0,
        xerr=half,
        error_kw={"elinewidth": 1.0, "ecolor": _INK, "capsize": 2.0},
    )
    axes.axvline(0.0, color=PALETTE["stone"], linewidth=0.8)
    for i, (item, error) in enumerate(zip(value, half, strict=True)):
        text = _shown_pair(item, error / fmt.Z95)
        # Right of the bar or of zero, where the row is empty whatever the sign.
        axes.annotate(
            text,
            (max(item + error, 0.0), i),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_MUTED,
        )
    between = "\n" if is_narrow else "  ·  "
    names = [
        between.join(_name(part, is_narrow) for part in (item.position, item.account) if isinstance(part, str) and part)
        for item in table.itertuples()
    ]
    axes.set_yticks(row, names, color=_INK, linespacing=1.05)
    axes.set_ylim(-0.7, len(table) - 0.3)
    low, high = min(0.0, float((value - half).min())), max(0.0, float((value + half).max()))
    # Room for the numbers beside the bars.
    room = (0.42 if is_narrow else 0.14) * (high - low)
    _limit_x(axes, low - 0.04 * (high - low) if low < 0.0 else 0.0, high + room)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_formatter(_percent_axis())
    axes.xaxis.set_major_locator(_locator(4 if is_narrow else 7))
    axes.set_xlabel("contribution to CVaR, % of the starting capital")
    return drawing


def weights(report: RunReport, is_narrow: bool) -> Any:
    """Weights before and after (dumbbells), equal weight as a tick."""
    table = report.table("weights")
    table = table.iloc[::-1]
    row = np.arange(len(table))
    before, after, equal = (table[name].to_numpy(dtype=float) for name in ("before", "after", "equal"))
    drawing = figure(NARROW if is_narrow else WIDE, 1.0 + 0.29 * len(table))
    axes = drawing.subplots()
    axes.hlines(row, np.fmin(before, after), np.fmax(before, after), color=PALETTE["stone"], linewidth=1.4)
    axes.plot(equal, row, "|", color=_MUTED, markersize=9.0, markeredgewidth=1.2)
    axes.plot(
        before, row, "o", color=PALETTE["stone"], markersize=6.5, markerfacecolor=PALETTE["paper"], markeredgewidth=1.5
    )
    axes.plot(after, row, "o", color=_BLUE, markersize=7.5)
    axes.axvline(0.0, color=PALETTE["stone"], linewidth=0.8)
    axes.set_yticks(row, [_name(name, is_narrow) for name in table["position"]], color=_INK)
    axes.set_ylim(-0.7, len(table) - 0.1)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_formatter(_percent_axis())
    axes.set_xlabel("weight")
    # The key stands above the plot, in the marks' own shapes.
    from matplotlib.lines import Line2D

    keys = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=PALETTE["stone"],
            markerfacecolor=PALETTE["paper"],
            markeredgewidth=1.5,
            markersize=6.5,
            label="before",
        )
    ]
    if np.isfinite(after).any():
        keys.append(Line2D([], [], marker="o", linestyle="", color=_BLUE, markersize=7.5, label="after"))
    if np.isfinite(equal).any():
        keys.append(Line2D([], [], marker="|", linestyle="", color=_MUTED, markersize=9.0, label="equal weights"))
    axes.legend(
        handles=keys,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.4,
        borderpad=0.1,
    )
    return drawing


def optimizer_trace(report: RunReport, is_narrow: bool) -> Any:
    """The objective by optimisation step."""
    table = report.table("optimizer_trace")
    drawing = figure(NARROW if is_narrow else WIDE, 2.0)
    axes = drawing.subplots()
    axes.plot(table["step"], table["objective"], color=_BLUE, linewidth=1.3)
    axes.set_title("Objective during the search, on the fixed training paths")
    if is_narrow:
        axes.set_title("Objective during the search")
    axes.set_xlabel("step")
    axes.yaxis.set_major_locator(_locator(4))
    _limit_x(axes, float(table["step"].min()), float(table["step"].max()))
    return drawing


def regimes(report: RunReport, is_narrow: bool) -> Any:
    """Price of the first asset (log scale) over the stacked smoothed probabilities of the regimes."""
    history = report.table("regime_history")
    price = cast(Any, report.price_history)
    has_price = report.has("price_history")
    drawing = figure(NARROW if is_narrow else WIDE, 4.0 if has_price else 2.2)
    colours = regime_colours(len(history.columns))
    panels = np.atleast_1d(
        drawing.subplots(2 if has_price else 1, 1, sharex=True, height_ratios=(1.5, 1.0) if has_price else None)
    )
    share = _thin(history.astype(float), "mean")
    if has_price:
        thin = _thin(price.astype(float).to_frame(), "last").iloc[:, 0]
        panels[0].plot(thin.index, thin.to_numpy(), color=_INK, linewidth=1.1)
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(_log_locator())
        panels[0].yaxis.set_major_formatter(_plain_axis())
        panels[0].yaxis.set_minor_locator(_nothing())
        panels[0].set_title(f"{price.name or 'Price'}, USD (log scale)" if price.name else "Price (log scale)")
    low = np.zeros(len(share))
    for i, name in enumerate(share.columns):
        high = low + share[name].to_numpy()
        panels[-1].fill_between(share.index, low, high, color=colours[i], linewidth=0)
        low = high
    panels[-1].set_ylim(0.0, 1.0)
    _limit_x(panels[-1], share.index[0], share.index[-1])
    panels[-1].yaxis.set_major_formatter(_percent_axis())
    panels[-1].set_yticks([0.0, 0.5, 1.0])
    panels[-1].grid(visible=False)
    if not is_narrow:
        panels[-1].set_title("Probability of each regime")
    _key(panels[-1], [fmt.shorten(str(name), 14) for name in share.columns], colours)
    if isinstance(share.index, pd.DatetimeIndex):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(minticks=3, maxticks=5 if is_narrow else 9)
        panels[-1].xaxis.set_major_locator(locator)
        panels[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return drawing


def correlations(report: RunReport, is_narrow: bool) -> Any:
    """One heat map per regime on one colour scale; values (in hundredths) for few assets."""
    from matplotlib.colors import LinearSegmentedColormap

    matrices = report.correlation
    assert matrices is not None
    n_regimes, n_assets = len(matrices), max(len(matrix) for matrix in matrices.values())
    columns = 1 if is_narrow else min(n_regimes, 3)
    rows = -(-n_regimes // columns)
    side = NARROW if is_narrow else min(WIDE / columns, 5.0)
    drawing = figure(NARROW if is_narrow else WIDE, rows * (side * 0.98) + 0.5)
    is_signed = any(float(np.nanmin(matrix.to_numpy(dtype=float))) < -0.05 for matrix in matrices.values())
    stops = ["#2a6f8f", "#f7f5f0", "#b5402c"] if is_signed else ["#f7f5f0", "#f0c987", "#c9583a", "#6d1f2b"]
    scale, low = LinearSegmentedColormap.from_list("correlation", stops), -1.0 if is_signed else 0.0
    panels = np.atleast_1d(drawing.subplots(rows, columns)).ravel()
    image = None
    for panel, (name, matrix) in zip(panels, matrices.items(), strict=False):
        values, labels = matrix.to_numpy(dtype=float), [fmt.shorten(str(label), 10) for label in matrix.columns]
        if n_assets <= 16:
            image = panel.pcolormesh(values, cmap=scale, vmin=low, vmax=1.0, edgecolors=PALETTE["paper"], linewidth=0.6)
            panel.invert_yaxis()
            shift = 0.5
        else:  # thousands of squares would weigh more than a picture of them
            image = panel.imshow(values, cmap=scale, vmin=low, vmax=1.0, interpolation="nearest", aspect="auto")
            shift = 0.0
        panel.set_aspect("equal")
        if len(labels) <= 30:
            size = 8.0 if len(labels) <= _MOST_VALUES else 6.0
            panel.set_xticks(np.arange(len(labels)) + shift, labels, rotation=90, fontsize=size)
            panel.set_yticks(np.arange(len(labels)) + shift, labels, fontsize=size)
        else:
            panel.set_xticks([])
            panel.set_yticks([])
        panel.tick_params(length=0.0)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.set_title(_name(name, is_narrow))
        if len(labels) <= _MOST_VALUES:
            for i, j in np.ndindex(values.shape):
                if i != j and math.isfinite(values[i, j]):
                    dark = values[i, j] > 0.6 or (is_signed and values[i, j] < -0.6)
                    panel.text(
                        j + 0.5,
                        i + 0.5,
                        f"{100.0 * values[i, j]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7.0 if not is_narrow else 8.0,
                        color="#ffffff" if dark else "#30241c",
                        in_layout=False,
                    )
    for panel in panels[n_regimes:]:
        panel.set_visible(False)
    bar = drawing.colorbar(
        image, ax=list(panels), orientation="horizontal", fraction=0.035, pad=0.02, aspect=40, shrink=0.5
    )
    bar.outline.set_visible(False)
    bar.set_label("correlation")
    bar.ax.tick_params(length=0.0)
    return drawing


def convergence(report: RunReport, is_narrow: bool) -> Any:
    """Each running estimate with its 95 % band against the number of paths."""
    table = report.table("convergence")
    groups = list(table.groupby(["measure", "level"], sort=False, dropna=False))[:9]
    columns = 1 if is_narrow else min(len(groups), 2 if len(groups) in (2, 4) else 3)
    rows = -(-len(groups) // columns)
    drawing = figure(NARROW if is_narrow else WIDE, (1.7 if is_narrow else 2.1) * rows + 0.2)
    panels = np.atleast_1d(drawing.subplots(rows, columns, sharex=True)).ravel()
    for panel, ((measure, level), group) in zip(panels, groups, strict=False):
        count, value = group["n_paths"].to_numpy(dtype=float), group["value"].to_numpy(dtype=float)
        half = fmt.Z95 * group["std_error"].to_numpy(dtype=float)
        panel.fill_between(count, value - half, value + half, color=_BLUE, alpha=0.22, linewidth=0)
        panel.axhline(value[-1], color=PALETTE["stone"], linewidth=0.8)
        panel.plot(count, value, color=_BLUE, linewidth=1.3)
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(_nothing())
        unit = fmt.unit_of(str(measure))
        if unit in fmt.PERCENT_UNITS:
            panel.yaxis.set_major_formatter(_percent_axis())
        panel.yaxis.set_major_locator(_locator(4))
        last = fmt.show_in_unit(float(value[-1]), float(group["std_error"].iloc[-1]), unit)
        panel.set_title(f"{fmt.label(str(measure), float(level), short=True)}:  {last}")
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for i, panel in enumerate(panels[: len(groups)]):
        if i + columns >= len(groups):
            panel.set_xlabel("paths")
            panel.tick_params(labelbottom=True)
            panel.xaxis.set_major_formatter(_count_axis())
    return drawing


def replay(report: RunReport, is_narrow: bool) -> Any:
    """One path: relative prices, equity and margin ratios by day, over the regime's colour."""
    table = report.table("replay")
    day = table.index.to_numpy(dtype=float)
    prices = [column for column in table.columns if str(column).startswith("price:")]
    ratios = [column for column in table.columns if str(column).startswith("margin_ratio:")]
    kinds = [("prices", prices), ("equity", ["equity"] if "equity" in table else []), ("ratios", ratios)]
    kinds = [(kind, columns) for kind, columns in kinds if columns]
    drawing = figure(NARROW if is_narrow else WIDE, 0.3 + (2.3 if is_narrow else 2.2) * len(kinds))
    panels = np.atleast_1d(drawing.subplots(len(kinds), 1, sharex=True))
    for panel, (kind, columns) in zip(panels, kinds, strict=True):
        ends, is_busy = [], len(columns) > len(CYCLE)
        values = {column: table[column].to_numpy(dtype=float) for column in columns}
        if kind == "prices":
            values = {column: line / line[0] for column, line in values.items()}
        order = sorted(columns, key=lambda column: -np.nan_to_num(values[column][-1]))
        for i, column in enumerate(order):
            # With many lines only the extremes and the first asset are named; the rest stays grey.
            is_named = not is_busy or i in (0, len(order) - 1) or column == columns[0]
            picks = {order[0]: "green", order[-1]: "red", columns[0]: "blue"} if is_busy else {}
            shade = PALETTE[picks.get(column, "stone") if is_busy else CYCLE[columns.index(column) % len(CYCLE)]]
            panel.plot(
                day, values[column], color=shade, linewidth=1.6 if is_named else 0.8, alpha=1.0 if is_named else 0.6
            )
            if is_named:
                known = values[column][np.isfinite(values[column])]
                if not known.size:
                    continue
                # A line that ends early is named at its last height.
                name, last = _name(str(column).split(":", 1)[-1], is_narrow), known[-1]
                ends.append((last, f"{name} {last:.2f}" if kind == "ratios" else f"{name} {100.0 * last:.0f}", shade))
        reference = 1.0
        panel.axhline(reference, color=_RED if kind == "ratios" else PALETTE["stone"], linewidth=0.8)
        titles = {
            "prices": "Prices, % of the first day",
            "equity": "Equity, % of the starting capital",
            "ratios": "Margin ratio or health factor (liquidation at 1)",
        }
        panel.set_title(titles[kind])
        if kind != "ratios":
            panel.yaxis.set_major_formatter(_percent_axis())
        panel.yaxis.set_major_locator(_locator(4))
        _limit_x(panel, day[0], day[-1])
        _shade_regimes(panel, report)
        _mark_events(panel, report)
        _label_ends(panel, ends, is_narrow)
    panels[-1].set_xlabel("day")
    return drawing


def _shade_regimes(axes: Any, report: RunReport) -> None:
    table = report.table("replay")
    if "regime" not in table:
        return
    regime, day = table["regime"].to_numpy(dtype=int), table.index.to_numpy(dtype=float)
    n_regimes = max(
        int(regime.max()) + 1, len(report.table("regime_table")) if report.table("regime_table") is not None else 0
    )
    colours = regime_colours(n_regimes)
    starts = np.flatnonzero(np.diff(regime, prepend=regime[0] - 1))
    for start, stop in zip(starts, [*starts[1:], len(day) - 1], strict=True):
        axes.axvspan(day[start], day[min(stop, len(day) - 1)], color=colours[regime[start]], alpha=0.16, linewidth=0)


def _mark_events(axes: Any, report: RunReport) -> None:
    if report.has("replay_events"):
        for day in sorted({float(day) for day in report.table("replay_events")["day"]}):
            axes.axvline(day, color=_INK, linewidth=0.7, linestyle=(0, (2, 2)))


def _name(name: Any, is_narrow: bool) -> str:
    return fmt.shorten(str(name), 16 if is_narrow else 26)


def _limit_x(axes: Any, low: Any, high: Any) -> None:
    if low < high:  # one point alone keeps matplotlib's own margins
        axes.set_xlim(low, high)


def _label_ends(axes: Any, ends: list[tuple[float, str, str]], is_narrow: bool) -> None:
    """Names at the right end of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = axes.figure.get_size_inches()[1] * 72.0 * axes.get_subplotspec().get_position(axes.figure).height
    size = 8.0 if is_narrow else 8.5
    gap = 1.25 * size / max(height * 0.85, 1.0)
    ordered = sorted(ends, key=lambda end: end[0])
    places = spread([(value - low) / (high - low) for value, _, _ in ordered], gap)
    for (_, text, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            text,
            (1.0, place),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=size,
            annotation_clip=False,
        )


def spread(places: list[float], gap: float) -> list[float]:
    """Move increasing numbers apart to at least `gap`, as little as possible, inside [0, 1] if they fit.

    Least squares by pooled adjacent violators.
    """
    # With t_i = p_i - i gap the task is isotonic regression, whose solution is the pooled means.
    pools: list[list[float]] = []  # mean, count
    for i, place in enumerate(places):
        pools.append([place - i * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            last = pools[-1]
            pools[-1] = [(last[0] * last[1] + mean * count) / (last[1] + count), last[1] + count]
    flat = [mean for mean, count in pools for _ in range(int(count))]
    room = max(1.0 - gap * (len(places) - 1), 0.0)
    return [min(max(mean, 0.0), room) + i * gap for i, mean in enumerate(flat)]


def _key(axes: Any, names: list[str], colours: list[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(names),
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.4,
        columnspacing=1.2,
        borderpad=0.1,
    )


def _thin(table: pd.DataFrame, how: str) -> pd.DataFrame:
    """At most `_MOST_POINTS` rows, each the mean (or the last) of its block."""
    step = -(-len(table) // _MOST_POINTS)
    if step == 1:
        return table
    blocks = table.groupby(np.arange(len(table)) // step)
    thin: Any = blocks.mean() if how == "mean" else blocks.last()
    thin.index = table.index[np.minimum(np.arange(len(thin)) * step + step - 1, len(table) - 1)]
    return thin


def _shown(number: Any) -> str:
    return str(fmt.show(number.value, number.std_error, scale=100.0, unit="%"))


def _shown_pair(value: float, std_error: float) -> str:
    return str(fmt.show(value, std_error, scale=100.0, unit="%")).replace("-", "−")


def _formatter(text: Any) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(text)


def _percent_axis() -> Any:
    return _formatter(lambda value, _: f"{100.0 * value:.6g} %".replace("-", "−"))


def _plain_axis() -> Any:
    return _formatter(lambda value, _: f"{value:,.10g}")


def _count_axis() -> Any:
    return _formatter(lambda value, _: f"{value:,.0f}")


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _locator(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])


def _log_locator() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(10.0, subs=(1.0, 2.0, 5.0), numticks=20)
