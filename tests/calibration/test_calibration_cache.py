import logging
from dataclasses import fields
from functools import wraps

import numpy as np
import pandas as pd
import pytest

from qpo_sim.calibration import RegimeFit, cache, cached_calibrate
from qpo_sim.calibration.fitting import calibrate
from qpo_sim.errors import InputError

OPTIONS = {"n_regimes": 2, "n_restarts": 2}


@pytest.fixture
def calls(monkeypatch):
    """Times that a fit was made rather than read."""
    made = []

    @wraps(calibrate)
    def counted(*args, **kwargs):
        made.append(kwargs)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(cache, "calibrate", counted)
    return made


def assert_same(a, b):
    for field in fields(RegimeFit):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert type(left) is type(right), field.name
        np.testing.assert_array_equal(left, right)


def test_a_second_fit_is_read_and_equal_to_the_last_bit(record, tmp_path, calls):
    first = cached_calibrate(record, cache_dir=tmp_path, **OPTIONS)
    second = cached_calibrate(record.copy(), cache_dir=str(tmp_path), **OPTIONS)
    assert len(calls) == 1
    assert_same(first, second)
    assert_same(first, calibrate(record, **OPTIONS))
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_an_infinite_duration_survives_the_file(record, tmp_path, calls):
    first = cached_calibrate(record, cache_dir=tmp_path, n_regimes=1)
    assert_same(first, cached_calibrate(record, cache_dir=tmp_path, n_regimes=1))
    assert len(calls) == 1


def test_the_key_changes_with_everything_that_decides_the_fit(record, monkeypatch):
    days = pd.date_range("2024-01-01", periods=len(record), freq="D")
    table = pd.DataFrame(record, index=days, columns=["BTC", "ETH"])
    moved = record.copy()
    moved[5, 0] += 1e-12
    keys = [
        cache.fit_key(record),
        cache.fit_key(record, n_regimes=2),
        cache.fit_key(record, seed=1),
        cache.fit_key(record, sticky=1.0),
        cache.fit_key(record, dof=5.0),
        cache.fit_key(record, step_hours=8.0),
        cache.fit_key(moved),
        cache.fit_key(record[:-1]),
        cache.fit_key(record[:, ::-1]),
        cache.fit_key(record.reshape(-1)),
        cache.fit_key(table),
        cache.fit_key(table.rename(columns={"ETH": "SOL"})),
    ]
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    keys.append(cache.fit_key(record))
    monkeypatch.setattr(cache.jax, "__version__", "0.0.0")
    keys.append(cache.fit_key(record))
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_what_does_not_matter(record):
    same = record.copy()
    same[np.isnan(same)] = -np.nan
    same[5, 0] = 0.0
    other = same.copy()
    other[5, 0] = -0.0
    assert cache.fit_key(same) == cache.fit_key(np.asfortranarray(other), n_regimes=3, sticky=0, dof_cap=200)


@pytest.mark.parametrize("fault", ["garbage", "empty", "cut", "flipped", "pickled", "other shape", "folder"])
def test_a_damaged_file_is_ignored_and_written_anew(record, tmp_path, calls, caplog, fault):
    first = cached_calibrate(record, cache_dir=tmp_path, **OPTIONS)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    if fault == "garbage":
        path.write_bytes(b"not a fit")
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
    elif fault == "pickled":
        np.savez(path, **arrays | {"mean": np.array([{"a": 1}], dtype=object)})
    elif fault == "other shape":
        np.savez(path, **arrays | {"dof": np.ones(3)})
    else:
        path.unlink()
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert_same(first, cached_calibrate(record, cache_dir=tmp_path, **OPTIONS))
    assert len(calls) == 2
    assert "made anew" in caplog.text
    if fault != "folder":
        assert_same(first, cached_calibrate(record, cache_dir=tmp_path, **OPTIONS))
        assert len(calls) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_costs_only_the_cache(record, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        fit = cached_calibrate(record, cache_dir=tmp_path / "file" / "fits", **OPTIONS)
    assert fit.converged
    assert "could not be kept" in caplog.text


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "qpo_sim" / "fits"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_cache_dir() == tmp_path / "home" / ".cache" / "qpo_sim" / "fits"


def test_bad_input_is_refused_before_and_after_the_key(record, tmp_path):
    with pytest.raises(TypeError, match="regimes"):
        cached_calibrate(record, cache_dir=tmp_path, regimes=2)
    with pytest.raises(InputError, match="n_regimes=True"):
        cached_calibrate(record, cache_dir=tmp_path, n_regimes=True)
    with pytest.raises(InputError, match="inf"):
        cached_calibrate(np.full((50, 2), np.inf), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
