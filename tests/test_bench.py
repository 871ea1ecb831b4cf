"""Speed as ratios: the measuring, the judging, and the job around them."""

import csv
import time

import numpy as np
import pytest

from qpo_sim.bench import ratios, workload
from qpo_sim.config import load
from qpo_sim.jobs import run as run_job
from qpo_sim.simulate import Plan, simulate_paths


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_interleaved_gives_the_smallest_time_of_functions_that_take_turns():
    calls = []

    def part(name, costs):
        def call(repetition):
            calls.append((name, repetition))
            burn(costs[repetition])

        return call

    ticks = []
    best = ratios.interleaved(
        {"a": part("a", [0.001, 0.05, 0.02]), "b": part("b", [0.2, 0.06, 0.08])}, 2, lambda: ticks.append(1)
    )
    assert calls == [(name, r) for r in range(3) for name in "ab"] and len(ticks) == len(calls)
    assert 0.02 <= best["a"] < 0.05 and 0.06 <= best["b"] < 0.08  # the first round, a warm-up, does not count


@pytest.mark.parametrize(
    ("ratio", "reference", "verdict"),
    [(0.81, 1.0, "holds"), (0.79, 1.0, ratios.SLOWER), (5.0, 1.0, "holds"), (0.1, None, "not judged")],
)
def test_a_ratio_may_fall_by_the_tolerance(ratio, reference, verdict):
    assert ratios.judge(ratio, reference, 0.2) == verdict


@pytest.mark.parametrize(
    ("n_assets", "market_of", "numpy_paths"),
    [(3, workload.market_of, workload.numpy_paths), (1, workload.garch_market_of, workload.numpy_garch_paths)],
    ids=["regimes", "garch"],
)
def test_the_numpy_program_and_the_kernel_simulate_one_model(n_assets, market_of, numpy_paths):
    # Difference of two independent means and probabilities within five standard errors: false alarm 3e-6.
    model = workload.parameters(n_assets)
    assets = workload.names(model)
    n, steps = 8192, 40
    outcome = simulate_paths(
        market_of(model, assets), workload.book_of(model, assets), n,
        Plan(steps, monitoring="step", attribution=False, dates=(steps,)), seed=3,
    )  # fmt: skip
    profit, liquidated, drawdown = numpy_paths(model, n, steps, seed=3)
    assert outcome.equity is not None and outcome.is_liquidated is not None
    ours = np.asarray(outcome.equity[-1], np.float64) - 1.0, np.asarray(outcome.max_drawdown, np.float64)
    for a, b in zip((*ours, np.asarray(outcome.is_liquidated[0], float)), (profit, drawdown, liquidated), strict=True):
        a, b = np.minimum(a, 3.0), np.minimum(b.astype(np.float64), 3.0)
        assert abs(a.mean() - b.mean()) < 5.0 * np.sqrt((a.var() + b.var()) / n) + 1e-12


def measured(ratio: float) -> list[ratios.Measured]:
    return [ratios.Measured("paths", ratio, "NumPy", "W1", 20.0, 20.0 / ratio, "ns per path-step-asset")]


class NoBar:
    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n=1):
        pass


@pytest.mark.parametrize(("ratio", "code", "verdict"), [(4.0, 0, "holds"), (3.0, 3, "slower")])
def test_the_job_writes_the_table_and_ends_with_3_when_a_ratio_has_fallen(
    tmp_path, monkeypatch, capsys, ratio, code, verdict
):
    monkeypatch.setattr(ratios, "measure", lambda *_, **__: measured(ratio))
    config = load(["job=bench", "market=gbm", "bench.reference.paths=4.5"])
    assert run_job(config, tmp_path / "run", NoBar) == code
    assert f"{verdict} (reference 4.50)" in capsys.readouterr().out
    with (tmp_path / "run" / "bench.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == "paths" and row["verdict"] == verdict and float(row["ratio"]) == ratio


@pytest.mark.slow
def test_every_ratio_has_a_reference_and_is_measured():
    config = load(["job=bench"])
    model = workload.parameters(4)
    assets = workload.names(model)
    ticks = []
    rows = ratios.measure(
        workload.market_of(model, assets), workload.book_of(model, assets), n_steps=5, step_hours=24.0,
        monitoring="bridge", repetitions=1, n_paths=8192, tick=lambda: ticks.append(1),
    )  # fmt: skip
    assert [row.name for row in rows] == list(vars(config.bench.reference))
    assert all(np.isfinite(row.ratio) and row.ratio > 0.0 for row in rows)
    assert len(ticks) == ratios.n_calls(1)
