"""The native module `specexit_kernels._C`, the home of CUDA kernels, which take addresses, sizes and a stream.

It is built when the package is installed on a machine with nvcc, with or without a GPU. It links nothing of torch,
and imports without a driver.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

from specexit_kernels._version import __version__

_GET = "install specexit-kernels from source where nvcc is found (the CUDA toolkit, or CUDACXX=/path/to/nvcc)"


HOST = "host"  # `architectures` of a module whose kernels were compiled to run on the host, as tests do
Launch = Callable[..., None]


class Native(Protocol):
    """What the module offers."""

    # Failed CUDA calls raise RuntimeError. Of a launch, the arguments are those of its struct in csrc/<op>.h, in the
    # order of csrc/bindings.cpp; a strided tensor is a tuple of its address and its strides in elements.
    __file__: str
    version: str  # of the package that it was built from
    architectures: str  # as CMake names them, between commas: "80-real,90a-real"
    cuda_version: int  # of the runtime that is linked in: 13000 for 13.0

    def driver_version(self) -> int:
        """The newest CUDA release that the driver supports, as `cuda_version` writes it; 0 without a driver."""
        ...

    def device_count(self) -> tuple[int, str]:
        """The devices that the runtime can use, and why there are none."""
        ...

    def current_device(self) -> int:
        """The device that a launch from this thread would run on: torch's current one."""
        ...

    def selected_architecture(self) -> int:
        """Architecture of the module's code for the current device: 90 for sm_90 and sm_90a."""
        ...

    max_nodes: int  # T of a tree
    max_candidates: int  # C of build_tree
    max_columns: int  # D + 1 of decide_exit
    max_vocabulary: int  # V of sample_targets
    tile: int  # tokens of a row of logits for which sample_targets has one entry of scratch
    build_tree: Launch
    sample_targets: Launch
    verify_tree: Launch
    accept: Launch
    decide_exit: Launch
    compact_kv: Launch


@functools.cache
def _find() -> tuple[Native | None, str]:
    try:
        module = importlib.import_module("specexit_kernels._C")
    except ModuleNotFoundError:
        return None, f"the native module is not built; {_GET}"
    except ImportError as error:
        return None, f"the native module does not load ({error}); {_GET}"
    if module.version != __version__:
        return None, f"the native module was built from {module.version}, this is {__version__}; {_GET}"
    return cast(Native, module), ""


def absent() -> str | None:
    """Why the native module cannot be used here and how to get it; None where it can."""
    module, reason = _find()
    return None if module else reason


def load() -> Native:
    """The native module. Raises RuntimeError where it is absent, with what `absent` says."""
    module, reason = _find()
    if module is None:
        raise RuntimeError(reason)
    return module


def describe() -> dict[str, Any]:
    """What there is, in types that JSON has, without raising: for reports.

    Example: {"present": True, "architectures": ["80-real", "90a-real"], "cuda": "13.0", "driver": "", "devices": 0,
              "reason": "no NVIDIA driver"}
    """
    if reason := absent():
        return {"present": False, "reason": reason}
    module = load()
    driver = module.driver_version()
    devices, why_none = module.device_count()
    return {
        "present": True,
        "architectures": module.architectures.split(","),
        "cuda": _release(module.cuda_version),
        "driver": _release(driver),
        "devices": devices,
        "reason": why_none if driver else "no NVIDIA driver",
    }


def _release(version: int) -> str:
    """13000 -> "13.0"; "" for 0."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""
