"""The scripts of `benchmarks/` as modules, for their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load_script(name: str) -> ModuleType:
    """benchmarks/<name>.py, executed anew; it may put the package `benchmarks` on the path."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Its exit status, with these arguments on its command line."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    return int(module.main())
