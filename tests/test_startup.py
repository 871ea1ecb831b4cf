"""What a user waits for before the first path: imports and compilations, counted and bounded."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOOK = """
capital: 1000000
spot: {BTC: 0.3, ETH: 0.2}
perpetuals:
  - {name: cross, mode: cross, venue: binance, margin: 0.15, positions: {BTC: 0.5, ETH: -0.2}}
loans:
  - {name: loan, venue: aave_v3, collateral: {ETH: 0.2}, debt: {USD: 0.1}}
"""


def python(code: str, tmp_path: Path, **more: str) -> subprocess.CompletedProcess:
    # Nothing that this test run has set for JAX may reach the fresh process.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")} | more,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


# ----------------------------------------------------------------------------- imports


def test_import_is_light_and_quick(tmp_path):
    """Measured 0.03 s for the process with the import, 0.02 s without; the bound is for a busy machine."""
    code = "import sys, qpo_sim; print(sorted({'jax', 'numpy', 'pandas', 'scipy', 'optax'} & set(sys.modules)))"
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        assert python(code, tmp_path).stdout.strip() == "[]"
        seconds.append(time.perf_counter() - clock)
    assert min(seconds) < 1.0


def test_every_public_name_is_found(tmp_path):
    code = "import qpo_sim; print([name for name in qpo_sim.__all__ if getattr(qpo_sim, name) is None])"
    assert python(code, tmp_path).stdout.strip() == "[]"


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["seed=x"], ["market=gmb"], ["simulation.n_path=3"]])
def test_help_and_bad_options_do_not_wait_for_jax(argv, tmp_path):
    code = f"""
import sys
from qpo_sim.app import main
try:
    main({argv})
except SystemExit:
    pass
print(sorted({{'jax', 'pandas', 'scipy', 'optax'}} & set(sys.modules)))
"""
    assert python(code, tmp_path).stdout.splitlines()[-1] == "[]"


def test_only_a_job_that_optimises_imports_optax(tmp_path):
    assert python("import sys, qpo_sim.jobs; print('optax' in sys.modules)", tmp_path).stdout.strip() == "False"


# ----------------------------------------------------------------------------- compilations

# A process of its own: what other tests have compiled must not count. Each job prints the programs that it made.
JOBS = """
import json, sys
from functools import partial
from pathlib import Path

import jax
from tqdm import tqdm

from qpo_sim import jobs
from qpo_sim.config import load
from qpo_sim.config.host import use_cores

use_cores(2)
programs = []

def note(event, duration, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        programs.append(about.get("fun_name", "?"))

jax.monitoring.register_event_duration_secs_listener(note)

def run(*overrides):
    options = [
        "book=tiny", "data.assets=[BTC,ETH]", "calibration.n_regimes=2", "calibration.n_restarts=2",
        "calibration.cache=false", "simulation.n_paths=2048", "simulation.n_steps=3", "simulation.chunk_size=512",
        "risk.limits=[]", "optimizer.n_steps=3", "optimizer.n_paths=512", "optimizer.n_test_paths=2048",
        "report.html=false", *overrides,
    ]
    jobs.run(load(options, config_dir="mine"), Path("out"), partial(tqdm, disable=True))
    print("programs", json.dumps(programs))
    programs.clear()

run("job=risk")
run("job=optimize")
run(
    "job=optimize", "seed=7", "calibration.sticky=20", "market.drift.kind=historical", "book.spot.BTC=0.25",
    "book.perpetuals.0.margin=0.2", "book.perpetuals.0.positions.ETH=0.1", "book.loans.0.debt.USD=0.08",
)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> list[list[str]]:
    """Programs compiled, or read from the compilation cache, by three jobs in one process."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "mine" / "book").mkdir(parents=True)
    (folder / "mine" / "book" / "tiny.yaml").write_text(BOOK)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    lines = python(JOBS, folder, **cache).stdout.splitlines()
    return [json.loads(line.removeprefix("programs ")) for line in lines if line.startswith("programs ")]


def test_risk_compiles_the_fit_the_markets_constants_the_batch_and_the_recorded_paths(programs):
    """The rest are roundings of single arrays of the market and the book, 10 ms each."""
    assert len(programs[0]) <= 4, programs[0]


def test_optimising_compiles_its_loop_a_projection_and_the_last_date_besides(programs):
    assert len(programs[1]) <= 3, programs[1]


def test_other_seeds_weights_and_markets_compile_nothing_new(programs):
    assert programs[2] == []
