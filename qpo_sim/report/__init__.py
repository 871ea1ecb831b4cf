"""Figures and words out: a `RunReport` in, a run's folder and a few lines for the terminal out."""

from qpo_sim.report.content import Number, RunReport
from qpo_sim.report.files import write_csv, write_json, write_parquet, write_report, write_text
from qpo_sim.report.words import terminal_summary, verdict

__all__ = [
    "Number",
    "RunReport",
    "terminal_summary",
    "verdict",
    "write_csv",
    "write_json",
    "write_parquet",
    "write_report",
    "write_text",
]
