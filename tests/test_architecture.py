"""What a module may know of the others, read from its imports; and what the package promises never to do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpo_sim import venue
from qpo_sim.config import conf_folder, load

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qpo_sim"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts)

# part -> the parts it may import besides itself. Every part may use `types` and `errors`.
BASE = {"types", "errors"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "numerics": set(),
    "random": {"numerics"},
    "market": {"numerics", "random"},
    "venue": {"numerics"},
    "execution": {"numerics", "venue", "instrument"},
    "policy": {"numerics"},
    "instrument": {"numerics", "random", "market", "venue"},
    "account": {"numerics", "random", "market", "venue", "instrument", "execution", "policy"},
    "book": {"numerics", "random", "market", "venue", "instrument", "policy", "account"},
    "simulate": {"numerics", "random", "market", "instrument", "book"},
    "compute": {"numerics", "random", "market", "account", "book", "simulate"},
    "risk": {"numerics", "compute"},
    "sensitivity": {"random", "market", "book", "simulate"},
    "optimize": {"numerics", "random", "market", "book", "simulate", "compute", "risk"},
    "calibration": {"numerics", "random"},
    "data": set(),
    "validation": set(),
    "report": set(),
    "config": {"venue"},
    "bench": {"random", "market", "venue", "book", "simulate", "compute", "optimize"},
    "jobs": {
        "bench",
        "market", "venue", "instrument", "book", "simulate", "compute", "risk", "optimize", "calibration", "data",
        "report", "config",
    },
    "app": {"config", "jobs"},
    "__main__": {"app"},
    "__init__": set(),
}  # fmt: skip
PANDAS = {"data", "report", "jobs"}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Dotted names that a module imports; with `at_import` only those that run when it is imported.

    `from a.b import c` counts as a.b and a.b.c, as c may be a module.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_type_checking(node):
            return
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import hides where it goes"
            found.update([node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def parts_imported(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("qpo_sim.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()}


def outside(path: Path, *, at_import: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, at_import=at_import)}


def test_every_part_has_its_row():
    assert {part_of(path) for path in MODULES} == set(ALLOWED)


def test_the_rows_have_no_circle():
    """Each part can be put below all that it may import."""
    left = {part: set(may) for part, may in ALLOWED.items()}
    while left:
        free = {part for part, may in left.items() if not may & set(left)}
        assert free, f"these import each other: {sorted(left)}"
        left = {part: may for part, may in left.items() if part not in free}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path):
    part = part_of(path)
    above = parts_imported(path) - ALLOWED[part] - BASE - {part}
    assert not above, f"{name_of(path)} may not import {sorted(above)}"


def test_the_reader_of_imports_sees_what_it_should(tmp_path):
    """The guard itself: nested, aliased and module-valued imports are all seen; type-checking ones are not."""
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport pandas as pd\nfrom qpo_sim import book\nif TYPE_CHECKING:\n"
        "    import torch\ndef f():\n    from qpo_sim.risk import tail\n    import scipy.stats\n"
    )
    assert imports(file) >= {"pandas", "qpo_sim.book", "qpo_sim.risk", "qpo_sim.risk.tail", "scipy.stats"}
    assert "torch" not in imports(file)
    assert not imports(file, at_import=True) & {"qpo_sim.risk", "scipy.stats"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_pandas_stays_at_the_border(path):
    if part_of(path) not in PANDAS:
        assert "pandas" not in outside(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_hydra_stays_in_the_command_line(path):
    if part_of(path) not in ("config", "app"):
        assert not outside(path) & {"hydra", "omegaconf"}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) in ("app", "config", "errors", "__init__", "__main__")], ids=name_of
)
def test_the_command_line_imports_nothing_heavy(path):
    heavy = {"jax", "jaxlib", "numpy", "pandas", "scipy", "optax", "matplotlib", "jaxtyping"}
    assert not outside(path, at_import=True) & heavy


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) in ("data", "report")], ids=name_of)
def test_tables_and_reports_know_nothing_of_kernels(path):
    assert not outside(path) & {"jax", "optax"}


@pytest.mark.parametrize("module", ["qpo_sim", "qpo_sim.app", "qpo_sim.config"])
def test_import_loads_neither_jax_nor_pandas(module, tmp_path):
    code = f"import sys, {module}; print(sorted({{'jax', 'numpy', 'pandas', 'scipy', 'hydra'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stderr


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_pickle_no_eval(path):
    """Files are data: nothing that is read can run. (`x.compile()` of JAX is a method and fine.)"""
    assert not outside(path) & FORBIDDEN_MODULES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("unsafe_load", "full_load", "read_pickle", "to_pickle"), (
                f"{name_of(path)}:{node.lineno}"
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_import_has_no_side_effects_on_jax_or_logging(path):
    """No flag, no device and no log handler is touched by importing a module."""
    calls = (
        "jax.config.update",
        "logging.basicConfig",
        "warnings.filterwarnings",
        "warnings.simplefilter",
        "jax.devices",
    )
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or is_type_checking(node):
            continue
        for call in ast.walk(node):
            if isinstance(call, ast.Call):
                assert ast.unparse(call.func) not in calls, f"{name_of(path)}:{call.lineno}"


VENUES = sorted((conf_folder() / "venue").glob("*.yaml"))
EXPERIMENTS = sorted((conf_folder() / "experiment").glob("*.yaml"))


def test_there_are_venues_and_experiments():
    assert VENUES and EXPERIMENTS


@pytest.mark.parametrize("path", VENUES, ids=lambda path: path.stem)
def test_every_venue_loads(path):
    assert venue.load(path.stem).name == path.stem


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_composes_and_passes_the_checks(path):
    config = load([f"+experiment={path.stem}"])
    assert config != load(), "an experiment that changes nothing"
