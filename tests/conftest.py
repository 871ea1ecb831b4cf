"""Settings and fixtures every test shares."""

import json
import sys
from pathlib import Path

import jax
import pytest
from absl import logging as absl_logging

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# absl (which optax imports) keeps the stderr of its import, here one of pytest's captures, and closes it when Hydra
# sets up logging: pytest would die of that. The process's own stderr it leaves open.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# Two host devices so that one-device and two-device runs can be compared; double precision so that references can be
# met to their own accuracy (kernels choose their precision explicitly, single by default).
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference data beside the project; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared reference data beside the project")
    return SHARED


@pytest.fixture(scope="session")
def cases(shared: Path):
    """`cases("models")["A38"]`: the reference case whose id starts with that prefix."""

    def load(name: str) -> dict:
        rows = json.loads((shared / "cases" / f"{name}.json").read_text())
        return {
            ("-".join(row["id"].split("-")[:2]) if name == "domain" else row["id"].split("-")[0]): row for row in rows
        }

    return load
