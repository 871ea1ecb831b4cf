"""The synthetic run as fixtures; `synthetic.py` is also a script that writes its page."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import synthetic  # noqa: E402


@pytest.fixture(scope="session")
def make_report():
    return synthetic.make_report


@pytest.fixture(scope="session")
def full_report():
    return synthetic.make_report()


@pytest.fixture(scope="session")
def replay_report():
    return synthetic.make_replay()


@pytest.fixture(scope="session")
def page(full_report):
    from qpo_sim.report.page import render_page

    return render_page(full_report)[0]
