"""benchmarks/sanitize.py and what compute-sanitizer may say. The tool needs a GPU; a script stands in for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script, run_script


@pytest.fixture
def sanitize() -> ModuleType:
    return load_script("sanitize")


def run(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> tuple[int, dict[str, str]]:
    """Its exit status and report, with `script` as the tool; $2 is what `--tool` names."""
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    status = run_script(sanitize, monkeypatch, f"--json={folder / 'said.json'}")
    return status, json.loads((folder / "said.json").read_text())


def test_runs_every_tool_on_the_reduced_set(sanitize, monkeypatch, tmp_path):
    status, said = run(sanitize, monkeypatch, tmp_path, f'echo "$@" >> {tmp_path}/calls')
    assert status == 0
    assert said == dict.fromkeys(("memcheck", "racecheck", "synccheck", "initcheck"), "nothing found")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(call.split()[1] for call in calls) == sorted(sanitize.TOOLS)
    assert all("tests/gpu/test_step_ops_cuda.py -k sanitizer" in call for call in calls)


@pytest.mark.parametrize(
    ("script", "verdict", "fails"),
    [
        ('test "$2" != racecheck || { echo "hazard in x"; exit 9; }', "found something", True),
        ('test "$2" != racecheck || exit 1', "failed", True),
        (
            'test "$2" != racecheck || { echo "Error: Device not supported"; exit 1; }',
            "unavailable: device not supported",
            False,
        ),
    ],
)
def test_says_what_a_tool_found(sanitize, monkeypatch, tmp_path, capsys, script, verdict, fails):
    status, said = run(sanitize, monkeypatch, tmp_path, script)
    assert (status, said["racecheck"], said["memcheck"]) == (int(fails), verdict, "nothing found")
    assert ("hazard in x" in capsys.readouterr().out) == ("hazard" in script)


def test_says_that_the_tool_is_not_installed(sanitize, monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize, "executable", lambda: None)
    path = tmp_path / "said.json"
    assert run_script(sanitize, monkeypatch, f"--json={path}") == 0
    assert set(json.loads(path.read_text()).values()) == {"unavailable: compute-sanitizer is not installed"}


def test_the_reduced_set_has_every_kernel():
    """One test an op, under the name that the script selects by."""
    text = (Path(__file__).parent / "gpu" / "test_step_ops_cuda.py").read_text()
    assert '@pytest.mark.parametrize("name", CASES)\ndef test_sanitizer(' in text
