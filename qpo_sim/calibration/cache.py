"""Fits remembered on disk, found again by a fingerprint of the returns and of everything that decides the fit."""

import hashlib
import inspect
import io
import json
import logging
import os
import tempfile
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qpo_sim.calibration.fit import RegimeFit
from qpo_sim.calibration.fitting import calibrate
from qpo_sim.calibration.inputs import read_returns

FORMAT = 2  # raise it whenever the fit or the file changes, so that old files are no longer found

_PLAIN = ("log_likelihood", "aic", "bic", "n_parameters", "n_observations", "n_iterations", "converged", "step_hours")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)

_log = logging.getLogger(__name__)


def cached_calibrate(returns: Any, *, cache_dir: str | os.PathLike[str] | None = None, **options: Any) -> RegimeFit:
    """`calibrate(returns, **options)`, read back from disk when the same fit was made before.

    A file that cannot be read or does not hold a fit is ignored and written anew; a folder that cannot be written only
    logs a warning.

    Args:
      returns: see `calibrate`.
      cache_dir: folder of the fits; None is `qpo_sim/fits` in the user's cache folder (`XDG_CACHE_HOME` or `~/.cache`).
      **options: see `calibrate`.

    Raises:
      InputError: see `calibrate`.
      TypeError: an option that `calibrate` does not have.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / f"{fit_key(returns, **options)}.npz"
    fit = _load(path)
    if fit is not None:
        _log.info("calibration read from %s", path)
        return fit
    fit = calibrate(returns, **options)
    try:
        _save(path, fit)
    except OSError as error:
        _log.warning("the calibration could not be kept in %s (%s)", folder, error)
    return fit


def default_cache_dir() -> Path:
    """Folder of the fits in the user's cache folder."""
    # The XDG rule: an unset, empty or relative value counts as unset.
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "qpo_sim" / "fits"


def fit_key(returns: Any, **options: Any) -> str:
    """SHA-256, in hex, of the returns, the options (defaults filled in), the versions of JAX and of this format.

    Raises:
      InputError: see `inputs.read_returns`.
      TypeError: an option that `calibrate` does not have.
    """
    bound = inspect.signature(calibrate).bind(returns, **options)
    bound.apply_defaults()
    table = read_returns(returns, bound.arguments["step_hours"])
    chosen = {name: value for name, value in bound.arguments.items() if name not in ("returns", "step_hours")}
    head = {
        "format": FORMAT,
        "jax": jax.__version__,
        "assets": table.assets,
        "step_hours": table.step_hours,
        "shape": table.values.shape,
        "options": {name: _plain(value) for name, value in sorted(chosen.items())},
    }
    # Adding 0.0 turns -0.0 into 0.0; NaN come in many bit patterns.
    values = np.where(np.isnan(table.values), np.nan, table.values + 0.0)
    digest = hashlib.sha256(json.dumps(head).encode())
    digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    # 1, 1.0 and np.float64(1.0) are the same option; what is no number is left for `calibrate` to refuse.
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return repr(float(value)) if number else repr(value)


def _save(path: Path, fit: RegimeFit) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {field.name: np.asarray(getattr(fit, field.name)) for field in fields(RegimeFit)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: Path) -> RegimeFit | None:
    """The fit in the file, None when there is none that can be read."""
    if not path.exists():
        return None
    try:
        # From memory: NumPy leaves the file open when it turns out not to be an archive.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in fields(RegimeFit)}
        plain = {name: arrays.pop(name).item() for name in _PLAIN}
        assets = tuple(str(name) for name in arrays.pop("assets"))
        fit = RegimeFit(assets=assets, **plain, **arrays)
        _check_shapes(fit)
    except _UNREADABLE as error:
        _log.warning("the kept calibration %s is not readable (%s); it is made anew", path, error)
        return None
    return fit


def _check_shapes(fit: RegimeFit) -> None:
    n_regimes, n_assets = fit.mean.shape
    expected = {
        "transition": (n_regimes, n_regimes),
        "initial": (n_regimes,),
        "start": (n_regimes,),
        "dof": (n_regimes,),
        "scale": (n_regimes, n_assets, n_assets),
        "stationary": (n_regimes,),
        "durations": (n_regimes,),
        "smoothed": fit.filtered.shape,
    }
    for name, shape in expected.items():
        array = getattr(fit, name)
        if array.shape != shape or array.dtype != np.float64 or np.isnan(array).any():
            raise ValueError(f"{name} is not a float64 array of shape {shape} without NaN")
    if len(fit.assets) != n_assets:
        raise ValueError("assets and mean disagree")
