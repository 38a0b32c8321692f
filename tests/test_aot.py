"""The Triton kernels compiled ahead of time for GPUs that need not be here: nothing spills, tensor cores are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "aot.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.timeout(600)
def test_the_named_subset_compiles_without_problems(tmp_path: Path) -> None:
    path = tmp_path / "aot.json"
    done = python(str(SCRIPT), "--jobs=2", f"--json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert all(made["registers"] > 0 and not made["problems"] for made in report)
    for architecture, opcode in (("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")):
        for kernel, count in (("attend_kernel", 6), ("head_kernel", 5), ("features_kernel", 4)):
            made = [x for x in report if x["cell"].startswith(architecture + " ") and x["kernel"] == kernel]
            assert len(made) >= count
            assert any(opcode in x["opcodes"] for x in made)


def test_problems_are_found() -> None:
    """Tiles that are far too large: the check sees the spills, the shared memory and the missing instruction."""
    script = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent.parent)!r})
from dataclasses import replace
import torch
from benchmarks.aot import Build, build_cell
from benchmarks.aot_cells import AttentionCell, Config
cell = AttentionCell(90, torch.bfloat16, 256, 256, Config(128, 128, 8, 2, 2))
made = build_cell(cell)[0]
print(made.problems(cell))
made = Build("attend_kernel", 255, 0, 0, {{"HMMA": 3}})
print(made.problems(cell))
print(replace(made, opcodes={{"HGMMA": 3}}).problems(cell))
"""
    done = python("-c", script)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "stack of" in lines[0]
    assert "STL" in lines[0]
    assert "bytes of shared memory" in lines[0]
    assert lines[1] == "['no HGMMA']"
    assert lines[2] == "[]"
