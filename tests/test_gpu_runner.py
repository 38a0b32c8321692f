"""benchmarks/gpu.py with parts that need no GPU: time limits, failures, results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script, run_script

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
IDENTITY = {"gpu": "NVIDIA H200", "driver": "0.0", "torch": "0.0.0", "triton": None, "commit": "0" * 40}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its logs and results in a folder of the test's."""
    module = load_script("gpu")
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


@pytest.fixture
def path(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the results of a GPU go that the script takes to be here; no process is asked for the environment."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "package_environment", dict)
    monkeypatch.setattr(gpu, "identity", lambda commit: IDENTITY | {"commit": commit or IDENTITY["commit"]})
    return tmp_path / "results" / "nvidia-h200.json"


def shell(gpu: ModuleType, command: str, limit: float = 20, read: object = None) -> object:
    return gpu.Part(("bash", "-c", command), limit, read)


def leaves(gpu: ModuleType, name: str, report: Any, then: str = "true", limit: float = 20) -> object:
    """A part that writes its report, and goes on."""
    command = f"echo '{json.dumps(report)}' > {gpu.LOGS}/{name}.json; {then}"
    return shell(gpu, command, limit, lambda: gpu.read_json(name))


def run_all(gpu: ModuleType, parts: dict[str, object], time_limit: float = 60) -> dict[str, Any]:
    return dict(gpu.run_all(list(parts), parts, time_limit))


def test_a_part_that_fails_does_not_stop_the_others(gpu, capfd):
    reports = run_all(gpu, {"a": shell(gpu, "echo because; exit 3"), "b": leaves(gpu, "b", [1])})
    assert reports["a"]["status"] == "failed"
    assert reports["b"] == {"status": "passed", "seconds": reports["b"]["seconds"], "result": [1]}
    assert "because" in capfd.readouterr().out


def test_a_part_past_its_limit_is_ended_with_its_children(gpu, tmp_path):
    mark = tmp_path / "mark"
    alive = f"(while sleep 0.05; do echo >> {mark}; done) & wait"
    assert run_all(gpu, {"a": shell(gpu, alive, limit=2)})["a"]["status"] == "timed out"
    written = mark.stat().st_size
    assert written > 0
    time.sleep(1)
    assert mark.stat().st_size == written


def test_all_parts_together_have_a_limit(gpu):
    reports = run_all(gpu, {"a": shell(gpu, "sleep 20"), "b": shell(gpu, "true")}, 0.5)
    assert {report["status"] for report in reports.values()} == {"timed out"}


def test_the_limits_of_the_parts_fit_in_that_of_all(gpu):
    assert sum(part.limit for part in gpu.PARTS.values()) + 3 * gpu.GRACE <= gpu.TIME_LIMIT
    assert gpu.TIME_LIMIT + 2 * gpu.GRACE <= 540
    assert list(gpu.PARTS) == ["build", *gpu.results_file.PLACES]


@pytest.mark.parametrize("name", ["tree_attention", "draft_head", "step_ops", "step", "scaling"])
def test_a_benchmark_has_time_left_beside_its_budget(gpu, name, monkeypatch):
    script = load_script(f"bench_{name}")
    monkeypatch.setattr(script.command_line, "main", lambda benchmark: benchmark.budget)
    assert script.main() + 10 <= gpu.PARTS[name].limit


def test_a_part_past_its_limit_keeps_the_result_that_it_left(gpu):
    report = run_all(gpu, {"a": leaves(gpu, "a", [1], "sleep 20", limit=2)})["a"]
    assert (report["status"], report["result"]) == ("timed out", [1])
    report = run_all(gpu, {"a": shell(gpu, "sleep 20", 0.2, lambda: gpu.read_json("a"))})["a"]
    assert report["status"] == "timed out"
    assert "result" not in report, "that of the run before"


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


@pytest.mark.parametrize("other", [[], {}, {"cells": None}, {"cells": [{"results": 5}]}])
def test_a_report_of_another_form_stops_nothing(gpu, other):
    part = leaves(gpu, "a", other)
    part = gpu.Part(part.command, part.limit, lambda: gpu.read_benchmark("a"))
    report = run_all(gpu, {"a": part})["a"]
    assert report["status"] == "failed"
    assert report["error"].startswith("no result: ")


def test_a_part_without_its_result_has_failed(gpu):
    report = run_all(gpu, {"a": shell(gpu, "true", read=lambda: gpu.read_json("a"))})["a"]
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
    results = {
        "parts": {
            "step": {"status": "failed", "seconds": 3.0, "date": "now", "error": "no result"},
            "tests": {"status": "passed", "seconds": 12.34, "date": "yesterday"},
        },
        "correctness": {"passed": 7, "failed": 0, "skipped": 1},
    }
    lines = gpu.table(results, ["step"]).splitlines()
    assert lines[1] == "tests           passed         12.3  7 passed, 0 failed, 1 skipped; ran at yesterday"
    assert lines[2] == "step            failed          3.0  no result"


def test_writes_the_results_of_the_gpu(gpu, path, monkeypatch, capsys):
    counts = {"passed": 7, "failed": 0, "skipped": 1}
    parts = {"build": shell(gpu, "true"), "tests": leaves(gpu, "tests", counts), "step": shell(gpu, "exit 3")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert run_script(gpu, monkeypatch, f"--commit={'1' * 40}") == 1
    results = json.loads(path.read_text())
    header = ["gpu", "driver", "torch", "triton", "commit", "date", "environment"]
    assert list(results) == [*header, "correctness", "parts"]
    assert {key: results[key] for key in IDENTITY} == {**IDENTITY, "commit": "1" * 40}
    assert results["correctness"] == counts
    assert {name: part["status"] for name, part in results["parts"].items()} == {
        "build": "passed",
        "tests": "passed",
        "step": "failed",
    }
    assert gpu.results_file.violations(results) == []
    assert "7 passed, 0 failed, 1 skipped" in capsys.readouterr().out


def test_names_a_result_of_another_form(gpu, path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"tests": leaves(gpu, "tests", [])})
    assert run_script(gpu, monkeypatch) == 1
    assert "against results.schema.json: $.correctness: [] is not of type 'object'" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "jsonschema", None)  # as where it is not installed
    assert run_script(gpu, monkeypatch) == 0
    assert "jsonschema is not installed" in capsys.readouterr().out


def test_parts_that_are_not_asked_for_stay_as_they_are_of_the_same_commit_alone(gpu, path, monkeypatch):
    parts = {name: leaves(gpu, name, {"memcheck": "nothing found"}) for name in ("sanitizer", "end_to_end")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "violations", lambda results: [])
    run_script(gpu, monkeypatch)
    first = json.loads(path.read_text())
    monkeypatch.setitem(parts, "sanitizer", shell(gpu, "exit 3"))
    run_script(gpu, monkeypatch, "--parts=sanitizer")
    second = json.loads(path.read_text())
    assert "sanitizer" not in second
    assert second["parts"]["sanitizer"]["status"] == "failed"
    assert second["parts"]["end_to_end"] == first["parts"]["end_to_end"]
    assert second["end_to_end"] == first["end_to_end"]
    run_script(gpu, monkeypatch, "--parts=sanitizer", f"--commit={'1' * 40}")
    third = json.loads(path.read_text())
    assert list(third["parts"]) == ["sanitizer"]
    assert "end_to_end" not in third


def test_resuming_runs_what_has_not_passed(gpu, path, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    right = tmp_path / "right"
    names = ("build", "tests", "step")
    commands = [f"echo {name} >> {ran}; [ {name} != tests ] || [ -e {right} ]" for name in names]
    monkeypatch.setattr(gpu, "PARTS", dict(zip(names, (shell(gpu, command) for command in commands), strict=True)))
    monkeypatch.setattr(gpu, "violations", lambda results: [])
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert run_script(gpu, monkeypatch) == 1
    module = tmp_path / "specexit_kernels" / "_C.any.so"
    module.parent.mkdir()
    module.touch()
    right.touch()
    assert run_script(gpu, monkeypatch, "--resume") == 0
    assert ran.read_text().split() == [*names, "tests"]
    assert run_script(gpu, monkeypatch, "--resume") == 0
    assert ran.read_text().split() == [*names, "tests"]
    module.unlink()  # another machine, which has the file but not what was built
    assert run_script(gpu, monkeypatch, "--resume") == 0
    assert ran.read_text().split() == [*names, "tests", "build"]
    assert run_script(gpu, monkeypatch, "--resume", f"--commit={'1' * 40}") == 0
    assert ran.read_text().split() == [*names, "tests", "build", *names]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_cut_off_leaves_what_is_done_and_no_process(gpu, path, monkeypatch, by):
    started = []

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout == 99:  # the second part's
                started.append(self)
                signal.raise_signal(by)
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    monkeypatch.setattr(gpu, "PARTS", {"build": shell(gpu, "true"), "tests": shell(gpu, "sleep 100", limit=99)})
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_script(gpu, monkeypatch)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(json.loads(path.read_text())["parts"]) == ["build"]
    (process,) = started
    assert process.returncode is not None


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_commit_names_the_changes_to_it(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as a hook has it
    monkeypatch.setattr(gpu, "ENVIRONMENT", environment | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    assert gpu.working_tree() is None

    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
        command = ("git", *author, *arguments)
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    kernel, page = tmp_path / "kernel", tmp_path / "benchmarks" / "RESULTS.md"
    page.parent.mkdir()
    for file in (kernel, page):
        file.write_text("a\n")
    git("init")
    git("add", ".")
    git("commit", "--message=a")
    commit = git("rev-parse", "HEAD")
    page.write_text("made by a run\n")
    assert gpu.working_tree() == commit
    found = set()
    for text in ("b\n", "c\n", "b\n"):
        kernel.write_text(text)
        found.add(gpu.working_tree())
    assert len(found) == 2
    for name in (commit, *found):
        assert gpu.results_file.COMMIT.fullmatch(name)
        assert name.startswith(commit)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--parts=tests,demo", "--parts must be of build, tests,"), ("--commit=abc", "must be 40 hex digits")],
)
def test_bad_options(gpu, monkeypatch, capsys, argument, message):
    with pytest.raises(SystemExit):
        run_script(gpu, monkeypatch, argument)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "an NVIDIA GPU is needed" in done.stderr
    assert done.stderr.count("\n") == 1
