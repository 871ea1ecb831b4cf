"""The benchmark scripts run and say what they promise."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _quick(*arguments: str, script: str = "benchmark_paths.py") -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), "--quick", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _rows(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]


def test_quick_benchmark_prints_its_tables(tmp_path):
    output = _quick("--baselines", str(tmp_path))
    assert "NumPy is the only baseline" in output
    rows = _rows(output)
    speed = {row[0]: row[1:] for row in rows if row[0] in ("qpo_sim", "NumPy") and len(row) == len(rows[0])}
    assert set(speed) == {"qpo_sim", "NumPy"}
    for cells in speed.values():
        throughput, median_cpu, least_cpu, median_wall, least_wall = map(float, cells[:5])
        assert 0.0 < least_cpu <= median_cpu and 0.0 < least_wall <= median_wall
        assert throughput == pytest.approx(1e3 / least_wall, rel=0.1)
    assert float(speed["qpo_sim"][6]) > 0.0  # it was compiled
    book = rows[-1]
    assert book[0] == "2048 x 3 x 10" and float(book[6]) > 0.0
    names = [row[0] for row in rows]
    assert names.count("NumPy") == 2 and "| implementation | VaR95 | VaR99 | liquidated |" in output


def test_quick_benchmark_with_the_reference_baselines(shared):
    folder = shared / "bench" / "perf"
    if not (folder / "baselines.py").is_file():
        pytest.skip("no reference baselines")
    output = _quick("--baselines", str(folder), "--book-paths", "0")
    names = {row[0] for row in _rows(output)}
    assert {"qpo_sim", "NumPy", "NumPy (reference)"} <= names
    if importlib.util.find_spec("numba") is None:
        assert "numba cannot be imported" in output
    else:
        assert {"numba (reference)", "numba SIMD (reference)"} <= names


def test_quick_reduction_benchmark_prints_its_tables():
    rows = _rows(_quick("--devices", "1", script="benchmark_reduction.py"))
    costs = {row[0]: [float(cell) for cell in row[1:]] for row in rows if len(row) == 3 and row[1][:1].isdigit()}
    assert {"whole reduction", "exact sums", "np.sort", "jnp.sort", "histogram with sums"} <= set(costs)
    assert len(costs) == 10 and costs["whole reduction"][1] == costs["np.sort"][1] == 1.0
    assert all(cost > 0.0 for cost, _ in costs.values())
    errors = {row[0]: [abs(float(cell)) for cell in row[1:]] for row in rows if len(row) == 7 and "e" in row[1]}
    assert len(errors) == 5 and "leveraged book, 30 days" in errors
    for of_law in errors.values():
        assert max(of_law[::2]) < 5e-4 and max(of_law[1::2]) < 1e-5


@pytest.mark.slow
def test_quick_loan_benchmark_prints_its_table():
    rows = _rows(_quick(script="benchmark_loans.py"))
    assert len(rows) > 2 and all(float(cell) > 0.0 for cell in rows[-1][1:])
