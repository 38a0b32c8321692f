"""What the launchers of the Triton kernels share: a launch as a value, and the device that it is made for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Device:
    """What a launcher adapts to.

    capability       10 * major + minor: 90 for an H200
    multiprocessors  each runs one or more programs at a time
    """

    capability: int
    multiprocessors: int


# What launches are chosen for on a CPU, where they only run in Triton's interpreter or are compiled ahead of time.
H200 = Device(capability=90, multiprocessors=132)


def device_of(device: torch.device) -> Device:
    """The device's properties, which torch caches; nothing waits for it."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: run by `run`, and compiled for other devices by `benchmarks/aot.py`.

    kernel     the jitted function
    programs   size of the one-dimensional grid
    arguments  by name; None where an option is off, which Triton compiles in
    warps, stages  Triton's num_warps and num_stages
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Launch on torch's current stream of `device`.

    Raises ValueError for tensors that are not on a GPU, except in Triton's interpreter (TRITON_INTERPRET=1).
    """
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"implementation='triton' needs tensors on a CUDA device, they were on {device}")
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        for launch in launches:
            launch.kernel[(launch.programs,)](**launch.arguments, num_warps=launch.warps, num_stages=launch.stages)
