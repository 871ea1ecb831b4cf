"""The command line around a stand-in for the job: exit codes, folders, messages, devices, caches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qpo_sim import app
from qpo_sim.config.compose import user_cache_folder
from qpo_sim.config.host import use_cores
from qpo_sim.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ran(monkeypatch, tmp_path) -> list:
    """Runs in an empty folder with a stand-in for the job; holds what the job was given."""
    calls = []

    def run(config, folder, progress):
        calls.append((config, folder))
        if config.seed == 13:
            (folder / "half.csv").write_text("half")
            raise InputError("data.path: row 7, column BTC has price -1, which must be positive: mend the file")
        if config.seed == 99:
            raise ZeroDivisionError("a fault of ours")
        with progress(total=2, desc="paths") as bar:
            bar.update(2)
        (folder / "result.json").write_text("{}")
        return 3 if config.seed == 3 else 0

    jobs = ModuleType("qpo_sim.jobs")
    jobs.run = run
    monkeypatch.setitem(sys.modules, "qpo_sim.jobs", jobs)
    monkeypatch.setattr(app, "set_up_jax", lambda compute: None)
    monkeypatch.chdir(tmp_path)
    return calls


def written() -> set[str]:
    return {path.name for path in Path.cwd().rglob("*") if path.is_file()}


def test_run_writes_its_folder(ran, capfd):
    assert app.main(["simulation.n_paths=4096"]) == 0
    [(config, folder)] = ran
    assert config.simulation.n_paths == 4096
    assert folder.is_relative_to(Path.cwd() / "outputs")
    assert (folder / "result.json").exists()
    assert (folder / ".hydra" / "config.yaml").exists()
    assert capfd.readouterr().out == ""


def test_breached_limit_is_code_3(ran):
    assert app.main(["seed=3"]) == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["simulation.n_pathz=5"],
        ["risk.levels=[99]"],
        ["market=gmb"],
        ["+foo=1"],
        ["data=file"],
        ["foo"],
        ["--config-name", "nope"],
        ["--config-path", "nope"],
        ["--config-dir", "nope"],
        ["-m", "seed=1,2", "simulation.n_pathz=5"],
    ],
)
def test_bad_options_are_one_line_code_2_and_no_file(ran, capfd, argv):
    assert app.main(argv) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("qpo-sim: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert ran == []
    assert list(Path.cwd().iterdir()) == []


def test_bad_file_found_by_the_job_leaves_nothing(ran, capfd):
    assert app.main(["seed=13"]) == 2
    captured = capfd.readouterr()
    assert captured.err == (
        "qpo-sim: data.path: row 7, column BTC has price -1, which must be positive: mend the file\n"
    )
    assert len(ran) == 1
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_with_other_files_is_never_removed(ran, capfd):
    Path("kept").mkdir()
    Path("kept/mine.txt").write_text("mine")
    assert app.main(["seed=13", "hydra.run.dir=kept"]) == 2
    assert Path("kept/mine.txt").read_text() == "mine"
    assert "result.json" not in written()


def test_unwritable_folder(ran, capfd):
    Path("file").write_text("")
    assert app.main(["hydra.run.dir=file/below"]) == 2
    assert "give another as hydra.run.dir=" in capfd.readouterr().err


def test_faults_of_ours_keep_their_traceback(ran):
    with pytest.raises(ZeroDivisionError):
        app.main(["seed=99"])


def test_broken_yaml_of_the_user(ran, capfd):
    Path("my/book").mkdir(parents=True)
    Path("my/book/mine.yaml").write_text("spot: {BTC: 1\n")
    assert app.main(["--config-dir", "my", "book=mine"]) == 2
    error = capfd.readouterr().err
    assert "mine.yaml" in error and "line" in error
    assert error.count("\n") == 1


def test_multirun_runs_all_and_returns_the_worst(ran, capfd):
    assert app.main(["-m", "seed=0,3,1"]) == 3
    assert [config.seed for config, _ in ran] == [0, 3, 1]
    assert len(list(Path("multirun").rglob("result.json"))) == 3


def test_multirun_with_one_bad_job_runs_the_others(ran, capfd):
    assert app.main(["-m", "simulation.chunk_size=256,100,512"]) == 2
    assert [config.simulation.chunk_size for config, _ in ran] == [256, 512]
    assert "simulation.chunk_size=100" in capfd.readouterr().err


def test_arguments_and_environment_are_given_back(ran, monkeypatch):
    argv = list(sys.argv)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    app.main(["seed=1"])
    assert sys.argv == argv
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_version(capsys):
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qpo_sim ")


def test_cache_folder_follows_the_system(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "qpo_sim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_folder() == Path.home() / ".cache" / "qpo_sim"


def python(code: str, tmp_path: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    # Nothing that this test run has set for JAX may reach the fresh process.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_is_light(tmp_path):
    code = "import sys, qpo_sim.app; print(sorted({'jax', 'numpy', 'pandas', 'scipy'} & set(sys.modules)))"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


JOB = """
import json, sys, types
jobs = types.ModuleType("qpo_sim.jobs")
def run(config, folder, progress):
    import os, jax
    jax.jit(lambda x: x * 2.0)(1.0)
    print(json.dumps({
        "devices": len(jax.devices()), "cache": jax.config.jax_compilation_cache_dir, "flags": os.environ["XLA_FLAGS"]
    }))
    return 0
jobs.run = run
import qpo_sim.app
sys.modules["qpo_sim.jobs"] = jobs
sys.exit(qpo_sim.app.main())
"""


def outcome(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    # Quiet: JAX's start-up lines reach neither stream.
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_devices_and_cache_are_set_before_jax_starts(tmp_path):
    told = outcome(python(JOB, tmp_path, "compute.devices=3"))
    assert told["devices"] == 3
    assert told["cache"] == str(tmp_path / "cache" / "qpo_sim" / "compiled")
    assert told["flags"].split() == [
        "--xla_cpu_multi_thread_eigen=false", "--xla_backend_extra_options=-force-vector-interleave=2"
    ]  # fmt: skip
    assert any((tmp_path / "cache" / "qpo_sim" / "compiled").iterdir())


def test_the_users_environment_is_kept(tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    told = outcome(python(JOB, tmp_path, XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other")))
    assert told["devices"] == 2
    assert told["cache"] == str(tmp_path / "other")
    assert flags in told["flags"]
    own = "--xla_backend_extra_options=-force-vector-interleave=1 --xla_cpu_multi_thread_eigen=true"
    assert outcome(python(JOB, tmp_path, XLA_FLAGS=own))["flags"] == own


def test_cache_can_be_switched_off_or_moved(tmp_path):
    outcome(python(JOB, tmp_path, "compute.compilation_cache=false"))
    assert not (tmp_path / "cache").exists()
    told = outcome(python(JOB, tmp_path, f"compute.cache_dir={tmp_path / 'here'}"))
    assert told["cache"] == str(tmp_path / "here")
    # A cache that cannot be had is a warning in the log, not an end.
    (tmp_path / "file").write_text("")
    done = python(JOB, tmp_path, f"compute.cache_dir={tmp_path / 'file' / 'below'}")
    assert done.returncode == 0
    assert "compiled programs are not kept" in done.stderr


def test_devices_cannot_change_between_jobs_of_one_process(tmp_path):
    done = python(JOB, tmp_path, "-m", "compute.devices=1,2")
    assert done.returncode == 2
    assert "compute.devices=2 cannot be had" in done.stderr
    assert "Traceback" not in done.stderr


CORES = """
import sys
import qpo_sim as qpo
assert "jax" not in sys.modules
n = qpo.use_cores(3)
import jax
assert n == len(jax.devices()) == 3
assert qpo.use_cores(3) == 3  # nothing changes: a cell of a notebook may be run again
try:
    qpo.use_cores(2)
except qpo.InputError as error:
    print(error)
"""

FLAGS = "import os, qpo_sim; qpo_sim.use_cores(); print(os.environ['XLA_FLAGS'])"


def test_python_users_get_the_same_devices_and_flags(tmp_path):
    done = python(CORES, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "JAX has already started" in done.stdout
    told = python(FLAGS, tmp_path).stdout
    assert told.strip() == outcome(python(JOB, tmp_path))["flags"]


def test_a_gpus_compiler_is_left_alone(tmp_path):
    told = python(FLAGS, tmp_path, JAX_PLATFORMS="cuda")
    assert told.stdout.strip() == "--xla_cpu_multi_thread_eigen=false", told.stderr


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_impossible_numbers_of_cores(n):
    with pytest.raises(InputError, match="use_cores"):
        use_cores(n)
