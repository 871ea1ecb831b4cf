"""The command line: compose the options, prepare JAX, run the job, turn its outcome into an exit code.

Nothing heavy is imported at module level, so that `--help`, `--cfg job`, completion and bad options answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpo_sim.config.compose import conf_folder, explain, hydra_main_options, offer_venues, to_config, user_cache_folder
from qpo_sim.config.host import use_cores
from qpo_sim.errors import InputError

if TYPE_CHECKING:
    from qpo_sim.config.schema import ComputeConfig

OK, BAD_INPUT, LIMIT_BREACHED, INTERRUPTED = 0, 2, 3, 130

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; None takes those of the process.

    Returns:
      0 when all is well, 2 for bad input, 3 when a risk limit is breached beyond its error bar; with several jobs
      (`-m`), the greatest.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--version" in arguments:
        print(_versions())
        return OK

    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from qpo_sim.config.callback import RejectedError

    has_own_traceback = bool(os.environ.get("HYDRA_FULL_ERROR"))
    has_started = False
    codes: list[int] = []

    def task(composed: Any) -> int:
        nonlocal has_started
        has_started = True
        code = run_job(composed)
        codes.append(code)
        return code

    try:
        offer_venues(_config_dir(arguments))
        with _hydra_arguments(arguments):
            hydra.main(config_path=str(conf_folder()), config_name="config", **hydra_main_options())(task)()
    except (InputError, RejectedError) as error:
        return _reject(str(error))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        # Before the job has started these come from options that Hydra cannot compose; later they are faults of ours.
        if has_started or has_own_traceback:
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            return _reject(f"the run's folder cannot be made: {error}; give another as hydra.run.dir=...")
        return _reject(explain(error))
    except KeyboardInterrupt:
        print("qpo-sim: interrupted", file=sys.stderr)
        return INTERRUPTED
    return max(codes, default=OK)


def _reject(message: str) -> int:
    print(f"qpo-sim: {message}", file=sys.stderr)
    return BAD_INPUT


def run_job(composed: Any) -> int:
    """Runs one job in the folder that Hydra made for it.

    Args:
      composed: the job's options as Hydra composed them.

    Returns:
      The job's exit code.

    Raises:
      RejectedError: the options or the files they name are not good; a folder made for this run is taken away again.
      InputError: the same, where this is one job of several.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from qpo_sim.config.callback import RejectedError

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_new = {entry.name for entry in folder.iterdir()} <= {hydra_config.output_subdir}
    try:
        config = to_config(composed)
        progress = _progress_bar()
        # JAX and pandas take a second to import, longer from a cold disk.
        with progress(desc="starting", bar_format="{desc}", leave=False):
            if config.job == "bench":
                # Read when numpy is imported: a second BLAS thread would only spin and be counted as NumPy's work.
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
                os.environ.setdefault("MKL_NUM_THREADS", "1")
            set_up_jax(config.compute)
            from qpo_sim.jobs import run

        return run(config, folder, progress)
    except InputError as error:
        if hydra_config.mode != RunMode.RUN:
            # Of several jobs the others go on, and each keeps its folder: its log says why it has no result.
            log.error("%s", error)
            raise
        log.info("no result: %s", error)
        if is_new:
            _discard(folder)
        raise RejectedError(str(error)) from error


def set_up_jax(compute: ComputeConfig) -> None:
    """Sets devices, compilation cache and log level; devices only count before JAX has started.

    What the user's environment sets (XLA_FLAGS, JAX_COMPILATION_CACHE_DIR) is kept unless an option contradicts it.

    Raises:
      InputError: more devices are asked for than JAX, already started by an earlier job, has.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        use_cores(compute.devices)
    except InputError as error:
        import jax

        # An earlier job of this process has started JAX; what it has may be enough.
        available = len(jax.devices())
        if compute.devices is not None and compute.devices > available:
            raise InputError(
                f"compute.devices={compute.devices} cannot be had: JAX has started with {available} in this "
                "process, so run it on its own, or with hydra/launcher=joblib"
            ) from error
    _set_up_compilation_cache(compute)


def _set_up_compilation_cache(compute: ComputeConfig) -> None:
    import jax

    jax.config.update("jax_enable_compilation_cache", compute.compilation_cache)
    if not compute.compilation_cache:
        return
    folder = (
        compute.cache_dir or jax.config.values["jax_compilation_cache_dir"] or str(user_cache_folder() / "compiled")
    )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # By default only programs that took over a second are kept: most of ours do not.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _progress_bar() -> Any:
    """Maker of progress bars, `progress(total=..., desc=...)`, silent where there is no terminal."""
    from tqdm import tqdm

    return partial(tqdm, disable=None, dynamic_ncols=True, unit_scale=True)


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    def of(part: str) -> str:
        try:
            return f"{part} {version(part)}"
        except PackageNotFoundError:  # run from a checkout that is not installed
            return f"{part} (not installed)"

    return ", ".join(map(of, ("qpo_sim", "jax", "hydra-core")))


def _config_dir(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    return parser.parse_known_args(arguments)[0].config_dir


@contextmanager
def _hydra_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Lets Hydra see these arguments and raise its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["qpo-sim", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _discard(folder: Path) -> None:
    """Takes a run's folder away, its open log first, and then the parents that are left empty."""
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(folder):
            logging.getLogger().removeHandler(handler)
            handler.close()
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()):
            return
        try:
            parent.rmdir()
        except OSError:
            return


if __name__ == "__main__":
    sys.exit(main())
