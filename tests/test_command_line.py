"""`qpo-sim` as a user starts it: fresh processes, single precision, an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--config-dir",
    "mine",
    "book=tiny",
    "market=gbm",
    "data.assets=[BTC,ETH]",
    "simulation.n_paths=4096",
    "simulation.n_steps=4",
    "simulation.chunk_size=512",
    "risk.limits=[{name: tail, measure: conditional_value_at_risk, level: 0.99, max: 0.001}]",
]
BOOK = """
capital: 1000000
spot: {BTC: 0.3}
perpetuals:
  - {name: eth_long, mode: isolated, venue: binance, margin: 0.06, positions: {ETH: 0.9}}
loans: []
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder with a book of the user's own; caches are in it too, so that later runs start faster."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "mine" / "book").mkdir(parents=True)
    (folder / "mine" / "book" / "tiny.yaml").write_text(BOOK)
    return folder


def qpo_sim(place: Path, *argv: str, n_devices: int | None = None) -> subprocess.CompletedProcess:
    # Nothing that this test run has set for JAX may reach the fresh process.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "HYDRA_"))}
    if n_devices is not None:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_devices}"
    return subprocess.run(
        [sys.executable, "-m", "qpo_sim", *argv],
        cwd=place,
        env=env | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(place / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def breached(place):
    """A run on two devices whose limit nobody could keep."""
    return qpo_sim(place, *SMALL, "job=risk", "hydra.run.dir=run", n_devices=2), place / "run"


def test_breached_limit_is_exit_code_3_with_all_results(breached):
    done, folder = breached
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written >= {
        "result.json", "report.html", "manifest.json", "tables/measures.csv", "tables/worst_paths.csv",
        ".hydra/config.yaml", ".hydra/overrides.yaml",
    }  # fmt: skip
    assert not [name for name in written if name.endswith(".tmp")]
    result = json.loads((folder / "result.json").read_text())
    assert [row["status"] for row in result["limits"]] == ["breached"]
    assert all(row["std_error"] is not None for row in result["measures"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["devices"]) == 2
    # The verdict is on the terminal: the job's number and where the report is.
    assert "report.html" in done.stdout and 3 < done.stdout.count("\n") < 40


@pytest.fixture(scope="module")
def stories(place, breached):
    """The worst path of the run told alone, in a process with one device and in one with two."""
    worst = pd.read_csv(breached[1] / "tables" / "worst_paths.csv").iloc[0]
    told = {}
    for n in (1, 2):
        folder = f"replay{n}"
        done = qpo_sim(
            place, *SMALL, "job=replay", f"path={int(worst['path'])}", f"hydra.run.dir={folder}", n_devices=n
        )
        assert done.returncode == 0, done.stderr
        manifest = json.loads((place / folder / "manifest.json").read_text())
        assert len(manifest["devices"]) == n
        told[n] = pd.read_csv(place / folder / "tables" / "replay.csv")
    return worst, told


def test_replay_is_the_same_path_on_one_and_on_two_devices(stories):
    worst, told = stories
    pd.testing.assert_frame_equal(told[1], told[2], check_exact=True)
    assert np.float32(1.0 - told[1]["equity"].iloc[-1]) == pytest.approx(np.float32(worst["loss"]), abs=1e-7)
    assert {"price:BTC", "price:ETH", "equity", "regime", "margin_ratio:eth_long"} < set(told[1].columns)


def test_misspelt_option_is_exit_code_2_and_nothing_else(place):
    before = sorted(path.name for path in place.iterdir())
    done = qpo_sim(place, *SMALL[:-1], "simulation.n_path=10")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "did you mean 'simulation.n_paths'?" in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before


def test_bad_file_is_exit_code_2_and_leaves_no_folder(place):
    days = pd.date_range("2023-01-01", periods=40)
    pd.DataFrame({"BTC": 100.0, "ETH": -1.0}, index=days).to_csv(place / "prices.csv", index_label="date")
    before = sorted(path.name for path in place.iterdir())
    done = qpo_sim(place, *SMALL, "data=file", "data.path=prices.csv")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "row 2" in done.stderr and "ETH" in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before
