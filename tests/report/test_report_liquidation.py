"""The section on liquidation, the accounts over time, and what is said of both."""

import numpy as np
import pandas as pd
import pytest
from report.synthetic import ACCOUNTS, HORIZON, make_report

from qpo_sim.report import terminal_summary, write_report
from qpo_sim.report.page import build_sections
from qpo_sim.report.words import verdict

FRACTION, PROBABILITY = "fraction of capital", "probability"


def _more_measures(base: pd.DataFrame, *, bad_debt: float = 0.0004) -> pd.DataFrame:
    rows = []
    for k, account in enumerate(ACCOUNTS):
        for name, value, error, unit in (
            ("expected_liquidation_cost", 0.001 * (k + 1), 1e-5, FRACTION),
            ("liquidation_cost_if_liquidated", 0.01 * (k + 1), 1e-4, FRACTION),
            ("expected_bad_debt", bad_debt if k == 1 else 0.0, 1e-5, FRACTION),
            ("needless_liquidation_probability", 0.011, 1e-4, PROBABILITY),
        ):
            rows.append((name, account, 30.0, np.nan, value, error, unit))
    for name, value, unit in (
        ("venue_liquidation_probability", 0.2, PROBABILITY),
        ("venue_expected_liquidation_cost", 0.01, FRACTION),
        ("venue_expected_bad_debt", bad_debt, FRACTION),
    ):
        rows.append((name, "binance", 30.0, np.nan, value, 1e-4, unit))
    return pd.concat([base, pd.DataFrame(rows, columns=base.columns)], ignore_index=True)


def _fan() -> pd.DataFrame:
    day = np.arange(1.0, HORIZON + 1.0)
    parts = []
    for k, account in enumerate(ACCOUNTS):
        for kind, level in (("margin_ratio", 1.5 + 0.2 * k), ("exposure", 0.3 * (k + 1))):
            if (k, kind) == (3, "exposure"):
                continue  # an account that does not say
            spread = 0.02 * np.sqrt(day)
            parts.append(
                pd.DataFrame(
                    {"account": account, "kind": kind, "day": day, "q05": level - 2.0 * spread, "q25": level - spread,
                     "q50": level, "q75": level + spread, "q95": level + 2.0 * spread}
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def report():
    base = make_report()
    needed = pd.DataFrame(
        {"account": ACCOUNTS[:2], "level": 0.01, "now": 0.1, "needed": [0.25, np.nan], "std_error": [0.002, np.nan]}
    )
    regimes = pd.DataFrame(
        [(account, regime, 0.01, 0.001) for account in ACCOUNTS for regime in ("calm", "turbulent")],
        columns=["account", "regime", "probability", "std_error"],
    )
    return make_report(
        measures=_more_measures(base.measures),
        liquidation_at_risk=needed,
        liquidation_by_regime=regimes,
        account_fan=_fan(),
        n_recorded=8192,
        n_liquidation_paths=8192,
        account_venues=dict.fromkeys(ACCOUNTS, "binance"),
    )


def _section(report, name):
    return next(section for section in build_sections(report) if section.id == name)


def _rows(table):
    return {row[0].text: [cell.text for cell in row[1:]] for _, rows in table.groups for row in rows}


def test_tables_of_the_section(report):
    section = _section(report, "liquidation")
    by_account, by_venue, by_regime, needed = section.tables
    assert [name for name, _ in by_account.columns] == [
        "Account", "Liquidated", "Mean time to it", "Cost if liquidated", "Borne by others", "Needless",
    ]  # fmt: skip
    rows = _rows(by_account)
    assert list(rows) == ["at least one", *ACCOUNTS]
    assert rows[ACCOUNTS[1]][2:] == ["2.00 %", "0.040 %", "1.10 %"]
    assert rows["at least one"][2:] == ["–"] * 3
    assert _rows(by_venue) == {"binance": [", ".join(ACCOUNTS), "20.00 %", "1.00 %", "0.04 %"]}
    assert all(len(cells) == 2 for cells in _rows(by_regime).values())
    assert _rows(needed)[ACCOUNTS[0]] == ["1 %", "100,000", "250,000", "2.5 ×"]
    assert _rows(needed)[ACCOUNTS[1]] == ["1 %", "100,000", "–", "out of reach"]
    assert any("first 8,192 paths" in note for note in section.notes)


def test_a_report_without_costs_keeps_its_three_columns():
    (table,) = _section(make_report(), "liquidation").tables
    assert len(table.columns) == 3 and all(len(row) == 3 for _, rows in table.groups for row in rows)


def test_words_on_costs_and_margins(report):
    text = " ".join(verdict(report))
    # The Aave loan has the largest mean cost.
    assert "take 4.00 % (± 0.02 %) of the capital when Aave loan is liquidated" in text
    assert "with probability 1.10 % (± 0.02 %) it is liquidated although, left alone" in text
    assert f"bear on average 400 USD (± 20) of {ACCOUNTS[1]}." in text
    assert f"{ACCOUNTS[0]} needs 250,000 USD (± 4,000) where it has 100,000 USD." in text
    assert f"No margin within reach brings {ACCOUNTS[1]} to a liquidation probability of 1 %." in text
    lines = terminal_summary(report).splitlines()
    assert any(line.startswith("Cost ") for line in lines) and any(line.startswith("Margin ") for line in lines)


def test_cents_that_others_bear_are_not_told():
    base = make_report()
    text = " ".join(verdict(make_report(measures=_more_measures(base.measures, bad_debt=1e-7))))
    assert "bear on average" not in text


def test_accounts_over_time_and_files(report, tmp_path):
    assert len(_section(report, "accounts").pictures) == 1
    paths = write_report(report, tmp_path / "run")
    for name in ("table:account_fan", "table:liquidation_by_regime", "table:liquidation_at_risk", "figure:accounts"):
        assert paths[name].is_file(), name


@pytest.mark.slow
def test_causes_that_never_happened_have_no_line():
    base = make_report()
    never = pd.DataFrame({"account": ["income"], "mean": [0.0], "std_error": [0.0], "tail_mean": [0.0]})
    with_none = make_report(ledger=pd.concat([never, base.ledger], ignore_index=True))
    rows = lambda report: list(_rows(_section(report, "ledger").tables[0]))  # noqa: E731
    assert rows(with_none) == rows(base) and "Total" in rows(base)


@pytest.mark.slow
def test_one_point_is_no_convergence():
    base = make_report()
    one = base.convergence[base.convergence["n_paths"] == base.convergence["n_paths"].max()]
    assert "convergence" in [section.id for section in build_sections(base)]
    assert "convergence" not in [section.id for section in build_sections(make_report(convergence=one))]
