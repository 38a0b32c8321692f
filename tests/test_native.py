"""The native module: why it is absent, and that it needs neither torch nor a driver where it is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

import pytest
import torch

import specexit_kernels
from specexit_kernels import _op, native


@pytest.fixture
def look_again() -> Iterator[None]:
    """Forget what was found, before and after."""
    native._find.cache_clear()
    yield
    native._find.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(sys.modules, "specexit_kernels._C", module)


@pytest.mark.usefixtures("look_again")
def test_says_how_to_get_a_module_that_is_not_built(monkeypatch):
    stand_in(monkeypatch, None)  # the import system's mark for "there is no such module"
    assert "not built" in native.absent()
    assert "nvcc" in native.absent()
    with pytest.raises(RuntimeError, match="not built"):
        native.load()
    assert native.describe() == {"present": False, "reason": native.absent()}


@pytest.mark.usefixtures("look_again")
def test_refuses_a_module_of_another_version(monkeypatch):
    module = ModuleType("specexit_kernels._C")
    module.version = "0.0.1"
    stand_in(monkeypatch, module)
    assert "built from 0.0.1" in native.absent()


@pytest.mark.usefixtures("look_again")
def test_reports_a_module_that_does_not_load(monkeypatch):
    def broken(name: str) -> ModuleType:
        raise ImportError("libsomething.so.1: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    assert "libsomething.so.1" in native.absent()


@pytest.mark.usefixtures("look_again")
def test_describes_the_module(monkeypatch):
    module = ModuleType("specexit_kernels._C")
    module.version = specexit_kernels.__version__
    module.architectures = "80-real,90a-real"
    module.cuda_version = 13010
    module.driver_version = lambda: 12080
    module.device_count = lambda: (0, "no CUDA-capable device is detected")
    stand_in(monkeypatch, module)
    assert native.absent() is None
    assert native.describe() == {
        "present": True,
        "architectures": ["80-real", "90a-real"],
        "cuda": "13.1",
        "driver": "12.8",
        "devices": 0,
        "reason": "no CUDA-capable device is detected",
    }
    module.driver_version = lambda: 0
    assert native.describe()["driver"] == ""
    assert native.describe()["reason"] == "no NVIDIA driver"


@pytest.mark.skipif(native.absent() is not None, reason=str(native.absent()))
def test_imports_without_torch_or_device():
    """Loaded by its path, alone: what it links is in it or in the system."""
    program = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    error = str(module.current_device())
except RuntimeError as raised:
    error = str(raised)
print(json.dumps([module.version, module.device_count(), error, "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, native.load().__file__],
        env={"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    version, (count, reason), error, has_torch = json.loads(done.stdout)
    assert version == specexit_kernels.__version__
    assert count == 0
    assert reason  # "CUDA driver version is insufficient" without a driver, "no CUDA-capable device" with one
    assert error == f"current_device: {reason}"
    assert not has_torch


def test_environment_is_complete_and_fit_for_json():
    environment = specexit_kernels.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["package"] == specexit_kernels.__version__
    assert environment["versions"]["torch"] == metadata.version("torch")
    assert len(environment["devices"]) == torch.cuda.device_count()
    assert environment["native"] == native.describe()
    assert set(environment["implementations"]) == set(_op.OPS)


def test_environment_reports_a_package_that_is_not_installed(monkeypatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert set(specexit_kernels.environment()["versions"].values()) == {None}
