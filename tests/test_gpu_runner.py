"""benchmarks/gpu.py with parts that need no GPU: time limits, failures, results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its logs and results in a folder of the test's."""
    module = load_script("gpu")
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def shell(gpu: ModuleType, command: str, limit: float = 20, read: object = None) -> object:
    return gpu.Part(("bash", "-c", command), limit, read)


def test_a_part_that_fails_does_not_stop_the_others(gpu, capfd):
    parts = {
        "a": shell(gpu, "echo because; exit 3"),
        "b": shell(gpu, f"echo '[1]' > {gpu.LOGS}/demo.json", read=gpu.read_demo),
    }
    reports = gpu.run_all(["a", "b"], parts, 60)
    assert reports["a"]["status"] == "failed"
    assert reports["b"] == {"status": "passed", "seconds": reports["b"]["seconds"], "result": [1]}
    assert "because" in capfd.readouterr().out


def test_a_part_past_its_limit_is_ended_with_its_children(gpu, tmp_path):
    mark = tmp_path / "mark"
    alive = f"(while sleep 0.05; do echo >> {mark}; done) & wait"
    report = gpu.run_all(["a"], {"a": shell(gpu, alive, limit=2)}, 60)["a"]
    assert report["status"] == "timed out"
    written = mark.stat().st_size
    assert written > 0
    time.sleep(1)
    assert mark.stat().st_size == written


def test_all_parts_together_have_a_limit(gpu):
    reports = gpu.run_all(["a", "b"], {"a": shell(gpu, "sleep 20"), "b": shell(gpu, "true")}, 0.5)
    assert {report["status"] for report in reports.values()} == {"timed out"}


def test_the_limits_of_the_parts_fit_in_that_of_all(gpu):
    assert sum(part.limit for part in gpu.PARTS.values()) <= gpu.TIME_LIMIT
    assert gpu.TIME_LIMIT + gpu.GRACE < 540


def test_a_part_past_its_limit_keeps_the_result_that_it_left(gpu):
    parts = {"demo": shell(gpu, f"echo '[1]' > {gpu.LOGS}/demo.json; sleep 20", limit=2, read=gpu.read_demo)}
    report = gpu.run_all(["demo"], parts, 60)["demo"]
    assert (report["status"], report["result"]) == ("timed out", [1])
    report = gpu.run_all(["demo"], {"demo": shell(gpu, "sleep 20", limit=0.2, read=gpu.read_demo)}, 60)["demo"]
    assert report["status"] == "timed out"
    assert "result" not in report


@pytest.mark.parametrize("name", ["tree_attention", "draft_head", "step_ops"])
def test_a_benchmark_without_a_time_of_ours_has_failed(gpu, name):
    gpu.LOGS.mkdir()
    path = gpu.LOGS / f"{name}.json"
    read = gpu.PARTS[name].read
    timed, untimed = {"microseconds": 9.0}, {"unavailable": "wrong result"}
    report = {"cells": [{"results": [untimed, timed]}, {"results": [timed]}]}
    path.write_text(json.dumps(report))
    assert read() == report
    path.write_text(json.dumps({"cells": report["cells"][:1]}))
    with pytest.raises(ValueError, match="no cell has a time"):
        read()


def test_a_part_without_its_result_has_failed(gpu):
    report = gpu.run_all(["a"], {"a": shell(gpu, "true", read=gpu.read_demo)}, 60)["a"]
    assert report["status"] == "failed"
    assert "no result" in report["error"]


@pytest.mark.parametrize(
    ("suite", "counts"),
    [
        ('tests="5" failures="1" errors="1" skipped="1"', {"passed": 2, "failed": 2, "skipped": 1}),
        ('tests="5" failures="0" errors="0" skipped="5"', None),
    ],
)
def test_counts_tests_and_takes_all_skipped_for_a_failure(gpu, suite, counts):
    gpu.LOGS.mkdir()
    (gpu.LOGS / "tests.xml").write_text(f"<testsuites><testsuite {suite}/></testsuites>")
    if counts:
        assert gpu.count_tests() == counts
    else:
        with pytest.raises(ValueError, match="no test passed"):
            gpu.count_tests()


def test_table_has_a_line_a_part(gpu):
    reports = {
        "build": {"status": "failed", "seconds": 3.0},
        "tests": {"status": "passed", "seconds": 12.34, "result": {"passed": 7, "failed": 0, "skipped": 1}},
    }
    lines = gpu.table(reports).splitlines()
    assert lines[1].split() == ["build", "failed", "3.0"]
    assert lines[2].split() == ["tests", "passed", "12.3", "7", "passed,", "0", "failed,", "1", "skipped"]


def test_writes_the_results_of_the_gpu(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "PARTS", {"demo": shell(gpu, f"echo '[]' > {gpu.LOGS}/demo.json", read=gpu.read_demo)})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "demo", "--commit", "abc"])
    assert gpu.main() == 0
    results = json.loads((tmp_path / "results" / "nvidia-h200.json").read_text())
    assert list(results) == ["gpu", "driver", "commit", "date", "environment", "parts"]
    assert results["commit"] == "abc"
    assert results["environment"]["versions"]["torch"]
    assert results["parts"]["demo"]["result"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "an NVIDIA GPU is needed" in done.stderr
    assert done.stderr.count("\n") == 1
