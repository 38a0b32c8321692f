"""What a report of a bug or of a measurement needs to say of the machine: versions, devices, implementations."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from specexit_kernels import native
from specexit_kernels._op import implementations
from specexit_kernels._version import __version__

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """The environment in types that JSON has; nothing is imported for it, and no GPU is needed.

    package          version of specexit-kernels
    python, system   "3.12.3", "Linux-6.8.0-x86_64-with-glibc2.39"
    versions         of the packages that it works with; None: not installed
    cuda             the CUDA release that torch was built with; None for a CPU build
    devices          name, capability ("9.0") and memory in bytes of each CUDA device that torch sees
    native           `specexit_kernels.native.describe()`
    implementations  of each op, for a CPU and for a CUDA tensor: `specexit_kernels.implementations()`
    """
    return {
        "package": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "native": native.describe(),
        "implementations": implementations(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }
