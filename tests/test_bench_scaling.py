"""benchmarks/bench_scaling.py on a CPU: its report, its axes, its pictures."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from scripts import load_script, run_script

from specexit import TreeConfig


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_scaling")


@pytest.fixture(scope="module")
def cells(bench):
    return sys.modules["benchmarks.step_cells"]


def test_writes_a_report_and_a_picture_of_each_axis(bench, cells, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    few = cells.along(cells.SMALL_STEM, lengths=(160,), nodes=(1,), batches=(2,))
    monkeypatch.setattr(bench, "CPU", few)
    path, plots = tmp_path / "report.json", tmp_path / "plots" / "new"
    options = "--device=cpu", "--budget=100000", f"--json={path}", f"--plots={plots}"
    assert run_script(bench, monkeypatch, *options) == 0
    report = json.loads(path.read_text())
    assert list(report) == ["device", "dtype", "torch", "ours", "ceilings", "cells"]
    assert load_script("results_file").violations(report, "scaling") == []
    shapes = [(cell["length"], cell["nodes"], cell["batch"]) for cell in report["cells"]]
    assert shapes == [(128, 12, 1), (160, 12, 1), (128, 1, 1), (128, 12, 2)]
    for cell in report["cells"]:
        (result,) = cell["results"]
        assert result["implementation"] == "specexit"
        assert result["microseconds"] > 0
        assert 0 <= result["error"] <= 1
    printed = capsys.readouterr().out
    for axis in ("length", "nodes", "batch"):
        picture = plots / f"scaling_{axis}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"wrote {picture}" in printed


def test_says_that_pictures_need_matplotlib(bench, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit, match="--plots needs matplotlib: pip install matplotlib"):
        run_script(bench, monkeypatch, "--device=cpu", f"--plots={tmp_path}")


def test_what_time_has_not_sufficed_for_is_no_failure(bench, cells, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CPU", (cells.SMALL_STEM,))
    monkeypatch.setattr(sys.modules["benchmarks.harness"], "BEGAN", -1e9)  # long ago
    path = tmp_path / "report.json"
    assert run_script(bench, monkeypatch, "--device=cpu", f"--json={path}") == 0
    (result,) = json.loads(path.read_text())["cells"][0]["results"]
    assert result == {"implementation": "specexit", "unavailable": "the time budget was used up"}


def test_axes_start_at_the_stem_and_name_no_cell_twice(bench, cells):
    stem = cells.STEM
    along = cells.along(stem, lengths=(stem.length, 2048), nodes=(60, 1, 16), batches=(1, 2))
    assert along == (
        stem,
        replace(stem, length=2048),
        replace(stem, tree=TreeConfig.none()),
        replace(stem, tree=TreeConfig(nodes=16)),
        replace(stem, batch=2),
    )
    for listed in (bench.SUBSET, bench.ALL, bench.CPU):
        assert len(set(listed)) == len(listed)
        for cell in listed:
            differences = [cell.length != listed[0].length, cell.tree != listed[0].tree, cell.batch != listed[0].batch]
            assert sum(differences) <= 1


def cell(length: int, nodes: int, batch: int, microseconds: float | None) -> dict[str, Any]:
    result = {"implementation": "specexit", "unavailable": "no"}
    if microseconds:
        result = {"implementation": "specexit", "microseconds": microseconds}
    return {"length": length, "nodes": nodes, "batch": batch, "results": [result]}


def test_a_series_is_what_differs_in_one_axis(bench):
    found = [cell(8, 4, 1, 10.0), cell(32, 4, 1, 30.0), cell(16, 4, 1, None), cell(8, 4, 2, 40.0)]
    report = {"cells": found}
    assert [c["length"] for c in bench.series(report, "length")] == [8, 16, 32]
    assert [c["batch"] for c in bench.series(report, "batch")] == [1, 2]
    assert bench.series(report, "nodes") == []
    assert bench.series({"cells": []}, "length") == []
    points = bench.milliseconds(bench.series(report, "length"), "length")
    assert points == {"specexit": [(8, 0.01), (32, 0.03)]}
