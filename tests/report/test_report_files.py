import csv
import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from qpo_sim.report import files, write_csv, write_json, write_parquet, write_report, write_text


@pytest.fixture(scope="module")
def written(full_report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "deep" / "er"
    return folder, write_report(full_report, folder)


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_paths_are_what_was_written(written):
    folder, paths = written
    assert {p.relative_to(folder).as_posix() for p in paths.values()} == set(snapshot(folder))
    assert {"result", "report", "manifest", "table:measures", "table:correlation", "figure:equity"} <= set(paths)


def test_result_is_strict_json_with_value_error_and_unit(written, full_report):
    result = strict((written[0] / "result.json").read_text())
    assert result["schema"] == 1
    assert (result["job"], result["capital"], result["n_paths"]) == ("optimize", 1e6, 1_000_000)
    assert len(result["measures"]) == len(full_report.measures)
    for name in ("measures", "limits", "comparison", "attribution", "ledger"):
        assert all("unit" in row and row["unit"] for row in result[name]), name
        assert all("std_error" in row for row in result[name]), name
    row, source = result["measures"][0], full_report.measures.iloc[0]
    assert row["value"] == source["value"]  # to the last bit
    assert next(r for r in result["measures"] if r["measure"] == "mean_return")["level"] is None
    assert result["limits"][0]["status"] == "breached"


def test_tables_read_back(written, full_report):
    _, paths = written
    pd.testing.assert_frame_equal(pd.read_csv(paths["table:hazard"]), full_report.hazard, check_dtype=False)
    with paths["table:fan"].open(newline="") as stream:
        assert [float(row["q99"]) for row in csv.DictReader(stream)] == full_report.fan[
            "q99"
        ].tolist()  # to the last bit
    history = pd.read_csv(paths["table:regime_history"], index_col="date", parse_dates=True)
    assert list(history.columns) == ["calm", "normal", "turbulent"]
    assert history.index[0] == full_report.regime_history.index[0]


def test_parquet_on_request(full_report, tmp_path):
    paths = write_report(full_report, tmp_path, parquet=True)
    assert paths["table:measures"].suffix == ".parquet"
    pd.testing.assert_frame_equal(pd.read_parquet(paths["table:fan"]), full_report.fan)


def test_manifest_keeps_the_run_and_hashes_the_files(written):
    folder, _ = written
    manifest = strict((folder / "manifest.json").read_text())
    assert manifest["seed"] == 20240101
    for path, entry in manifest["files"].items():
        data = (folder / path).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(manifest["files"]) | {"manifest.json"} == set(snapshot(folder))


def test_same_input_same_bytes(written, full_report, tmp_path):
    write_report(full_report, tmp_path)
    assert snapshot(tmp_path) == snapshot(written[0])


def test_same_bytes_in_another_process(replay_report, tmp_path):
    # Hash randomisation differs between processes; ids in the figures must not.
    write_report(replay_report, tmp_path / "here")
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import synthetic; from qpo_sim.report import write_report; write_report(synthetic.make_replay(), sys.argv[1])"
    )
    there = tmp_path / "there"
    import synthetic

    root = files.__file__.split("qpo_sim")[0]
    subprocess.run(
        [sys.executable, "-c", code, there, root, synthetic.__file__.rsplit("/", 1)[0]], check=True, timeout=120
    )
    assert snapshot(tmp_path / "here") == snapshot(there)


@pytest.mark.parametrize("broken", ["render_page", "json_bytes", "csv_bytes"])
def test_nothing_is_written_when_rendering_fails(replay_report, tmp_path, monkeypatch, broken):
    write_text(tmp_path / "result.json", "old")

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(files, broken, fail)
    with pytest.raises(RuntimeError, match="no"):
        write_report(replay_report, tmp_path)
    assert snapshot(tmp_path) == {"result.json": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_failing_disk_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")

    def full(self, data):
        if b"second" in data:
            raise OSError("disk full")
        with self.open("wb") as stream:
            return stream.write(data)

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        files.write_files({tmp_path / "a.txt": b"first", tmp_path / "new" / "b.txt": b"second"})
    monkeypatch.undo()
    assert snapshot(tmp_path) == {"a.txt": b"old"}
    assert not (tmp_path / "new").exists()


def test_single_writers(tmp_path):
    frame = pd.DataFrame({"x": [0.1, np.nan], "name": ["a", "é"]})
    assert write_text(tmp_path / "t.txt", "µ\n").read_bytes() == "µ\n".encode()
    assert write_csv(tmp_path / "t.csv", frame).read_bytes() == "x,name\n0.1,a\n,é\n".encode()
    pd.testing.assert_frame_equal(pd.read_parquet(write_parquet(tmp_path / "t.parquet", frame)), frame)
    value = {
        "nan": math.nan,
        "inf": [np.inf, -np.inf],
        "int": np.int64(3),
        "f32": np.float32(0.5),
        "flag": np.bool_(True),
        "array": np.arange(3),
        "date": pd.Timestamp("2020-01-02"),
        "path": tmp_path,
        "set": {"b", "a"},
        7: None,
        "nat": pd.NaT,
    }
    assert strict(write_json(tmp_path / "t.json", value).read_text()) == {
        "nan": None,
        "inf": [None, None],
        "int": 3,
        "f32": 0.5,
        "flag": True,
        "array": [0, 1, 2],
        "date": "2020-01-02T00:00:00",
        "path": tmp_path.as_posix(),
        "set": ["a", "b"],
        "7": None,
        "nat": None,
    }


def test_import_is_light():
    code = (
        "import sys, qpo_sim.report; print(any(m in sys.modules for m in ('matplotlib', 'jinja2', 'pyarrow.parquet')))"
    )
    root = files.__file__.split("qpo_sim")[0]
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "False"
