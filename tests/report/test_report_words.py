import dataclasses

import numpy as np
import pandas as pd
import pytest

from qpo_sim.errors import InputError
from qpo_sim.report import RunReport, terminal_summary, verdict

COLUMNS = ["measure", "account", "horizon_days", "level", "value", "std_error", "unit"]


def small(rows, **more):
    measures = pd.DataFrame([(m, a, 30.0, lv, v, se, "") for m, a, lv, v, se in rows], columns=COLUMNS)
    return RunReport("risk", "small", 1e6, 30.0, 1_000_000, measures=measures, **more)


def test_the_whole_verdict(full_report):
    text = verdict(full_report)
    assert text[0].startswith("Limit breached: CVaR 99 % over 30 days is ")
    assert "beyond its limit of 45 %" in text[0]
    joined = " ".join(text)
    assert (
        "The isolated DOGE account is liquidated with probability 12.04 % (± 0.06 %), most likely around day 8"
        in joined
    )
    assert "SOL perpetual (29 %), DOGE perpetual (24 %) and ETH perpetual (17 %) drive most of the tail loss" in joined
    assert "LTC spot relieves it" in joined
    assert "percentage points): clearly better." in joined
    assert "too close to its limit of 13.9 % to call" in text[-1]
    assert "nan" not in joined.lower()


def test_loss_sentence_has_money_odds_and_error():
    text = verdict(small([("value_at_risk", "", 0.99, 0.3124, 0.0015)]))
    assert text == [
        "Over 30 days the book loses more than 31.2 % of its capital (312,000 USD) in one case out of 100 (± 0.3 %)."
    ]


def test_gain_even_in_the_tail():
    rows = [("value_at_risk", "", 0.95, -0.02, 0.001), ("conditional_value_at_risk", "", 0.95, -0.01, 0.001)]
    text = verdict(small(rows))
    assert "gains at least 2.0 % of its capital in all but one case out of 20" in text[0]
    assert "is a gain of 1.0 ± 0.2 % (10,000 USD)" in text[1]


def test_odds_that_are_not_one_in_a_whole_number():
    assert "in 3 % of cases" in verdict(small([("value_at_risk", "", 0.97, 0.3, 0.001)]))[0]


def test_zero_probability_says_what_the_paths_exclude():
    text = verdict(small([("liquidation_probability", "loan", np.nan, 0.0, 1e-6)]))
    assert text == [
        "The loan account was not liquidated on any of 1,000,000 paths; "
        "with 95 % confidence the probability is below 0.0003 %."
    ]
    two = [("liquidation_probability", name, np.nan, 0.0, 0.0) for name in ("loan", "cross")]
    assert verdict(small(two))[0].startswith("The loan and cross accounts were not liquidated")
    assert verdict(small([("liquidation_probability", "", np.nan, 0.0, 0.0)]))[0].startswith(
        "No account was liquidated"
    )


def test_one_account_has_no_at_least_one():
    rows = [("liquidation_probability", name, np.nan, 0.1234, 0.0008) for name in ("", "cross")]
    assert verdict(small(rows)) == ["The cross account is liquidated with probability 12.34 % (± 0.16 %)."]


def test_unknown_errors_leave_no_brackets():
    text = " ".join(
        verdict(
            small([("value_at_risk", "", 0.99, 0.3124, np.nan), ("liquidation_probability", "x", np.nan, 0.1, np.nan)])
        )
    )
    assert "±" not in text
    assert "nan" not in text
    assert "31.2 %" in text


def hazard(values, error):
    day = np.arange(1, len(values) + 1)
    frame = {"account": "x", "day": day, "hazard": values, "hazard_std_error": error}
    return pd.DataFrame({**frame, "cumulative": np.cumsum(values), "cumulative_std_error": error})


def test_the_peak_must_stand_out_of_its_noise():
    rows = [("liquidation_probability", "x", np.nan, 0.1, 0.001)]
    values = np.array([0.01, 0.04, 0.02, 0.01])
    assert "most likely around day 2" in verdict(small(rows, hazard=hazard(values, 0.001)))[0]
    assert "about equally likely on every day" in verdict(small(rows, hazard=hazard(values, 0.02)))[0]


def comparison(difference, error, measure="conditional_value_at_risk"):
    return pd.DataFrame(
        [
            ("start", measure, 0.4, 0.001, np.nan, np.nan),
            ("optimised", measure, 0.4 + difference, 0.001, difference, error),
        ],
        columns=["portfolio", "measure", "value", "std_error", "difference", "difference_std_error"],
    )


@pytest.mark.parametrize(
    ("difference", "error", "measure", "words"),
    [
        (-0.1, 0.001, "conditional_value_at_risk", "clearly better"),
        (0.1, 0.001, "conditional_value_at_risk", "clearly worse"),
        (0.1, 0.001, "sharpe_ratio", "clearly better"),
        (-0.0025, 0.001, "conditional_value_at_risk", "probably better"),
        (-0.001, 0.001, "conditional_value_at_risk", "found no weights"),
        (-0.001, np.nan, "conditional_value_at_risk", "error unknown"),
    ],
)
def test_the_optimum_against_its_error(difference, error, measure, words):
    report = RunReport("optimize", "x", 1e6, 30.0, comparison=comparison(difference, error, measure))
    assert words in verdict(report)[0]


def test_no_optimisation_says_nothing_of_it(make_report):
    assert not any("optimis" in sentence for sentence in verdict(make_report(comparison=None)))


def limits(*statuses):
    rows = [(f"L{i}", "conditional_value_at_risk", 0.3, 0.31, 0.001, status) for i, status in enumerate(statuses)]
    return pd.DataFrame(rows, columns=["name", "measure", "limit", "value", "std_error", "status"])


def test_limits():
    rows = [("value_at_risk", "", 0.99, 0.3, 0.001)]
    assert (
        verdict(small(rows, limits=limits("breached")))[0]
        == "Limit breached: L0 is 31.0 ± 0.2 %, beyond its limit of 30 %."
    )
    assert verdict(small(rows, limits=limits("ok", "ok")))[-1] == "All 2 limits hold."
    assert verdict(small(rows, limits=limits("ok")))[-1] == "The configured limit holds."
    assert "more paths would decide" in verdict(small(rows, limits=limits("ok", "within error")))[-1]
    with pytest.raises(InputError, match="limits.status"):
        small(rows, limits=limits("fine"))


def test_calibration_and_replay_have_their_own_verdict(full_report, replay_report):
    alone = RunReport(
        "calibrate", "x", 1e6, 30.0, regime_table=full_report.regime_table, regime_history=full_report.regime_history
    )
    assert verdict(alone)[0].startswith("The fitted market has 3 regimes: calm (37 % of the time")
    assert "On the last day it is" in verdict(alone)[1]
    assert "On this path the book ends at" in verdict(replay_report)[0]
    assert verdict(RunReport("risk", "empty", 1.0, 1.0)) == []


def test_terminal_summary_is_short_plain_and_aligned(full_report):
    lines = terminal_summary(full_report, {"report": "out/report.html"}).splitlines()
    assert 8 <= len(lines) <= 13
    assert lines[-1] == "Report       out/report.html"
    assert {line[:13].rstrip() for line in lines} >= {"Run", "VaR", "CVaR", "Liquidation", "Optimum", "Limits"}
    assert all(line[12] == " " and line[13] != " " for line in lines)
    assert "\x1b" not in "".join(lines)


def test_bad_reports_are_refused():
    with pytest.raises(InputError, match="capital"):
        RunReport("risk", "x", 0.0, 30.0)
    with pytest.raises(InputError, match="fan lacks the column 'mean'"):
        RunReport("risk", "x", 1.0, 30.0, fan=pd.DataFrame({"day": [1]}))


def test_the_record_is_frozen(full_report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        full_report.job = "x"
