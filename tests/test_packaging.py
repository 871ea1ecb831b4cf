"""What is shipped: the wheel carries configuration and data, the locks name no host, the versions are in one place."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "constraints").glob("py*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_lock_has_hashes_and_no_host(lock):
    text = lock.read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, flags=re.MULTILINE)
    requirements = [line for line in text.splitlines() if "==" in line]
    assert len(requirements) > 30
    for requirement in re.split(r"\n(?=\S)", text.strip()):
        assert re.match(r"[a-z0-9._-]+==\S+( ; .+)? \\\n", requirement), requirement
        assert "--hash=sha256:" in requirement


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_lock_covers_every_dependency(lock):
    locked = {line.split("==")[0] for line in lock.read_text().splitlines() if "==" in line}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["test"], *extras["dev"]]
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= locked


def test_there_is_a_lock_for_each_declared_python():
    lines = [words.rsplit(" ", 1)[1] for words in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", words)]
    assert [f"py{line.replace('.', '')}.txt" for line in lines] == [lock.name for lock in LOCKS]


def test_extras_that_are_documented_exist():
    promised = {"cuda12", "cuda13", "data", "report", "cluster", "ray", "test", "dev"}
    assert set(PROJECT["optional-dependencies"]) >= promised


@pytest.mark.slow
def test_wheel_from_the_source_distribution_carries_everything(tmp_path):
    if shutil.which("git") is None or not (ROOT / "README.md").exists():
        pytest.skip("not a checkout")
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"qpo_sim/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")}
    package = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "qpo_sim").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert conf | package <= names
    assert not [name for name in names if name.startswith(("conf/", "tests/"))]
    metadata = zipfile.ZipFile(wheel).read(f"qpo_sim-{PROJECT['version']}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"qpo_sim-{PROJECT['version']}.dist-info/licenses/LICENSE" in names
