"""What the analytic models share: an H200's sizes, the rates that are assumed of it, and kernels compiled for it.

Nothing here is measured. A model follows from shapes, from the launches that the tables choose, and from these rates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

# Assumed: what an H200 reached in earlier measurements of a copy and of a bf16 product. A run measures its own.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12
L2_BYTES_PER_SECOND = 5.5e12  # assumed, of all multiprocessors together
LAUNCH = 3e-6  # seconds, assumed: a kernel cannot be much shorter, nor the gap before the next one in a graph vanish
ITEMSIZE = 2  # bf16

# Compute capability 9.0, from the CUDA C++ programming guide, table "technical specifications per compute capability".
MULTIPROCESSORS = 132  # of an H200
REGISTERS = 65_536  # of a multiprocessor
WARPS = 64
PROGRAMS = 32
SHARED = 228 * 1024  # bytes of a multiprocessor; each program takes 1 KB more than it asks for
SHARED_OF_PROGRAM = 227 * 1024


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor of compute capability 9.0 holds at a time; 0 if it cannot hold one.

    registers  of a thread
    shared     bytes of a program, static and dynamic
    warps      of a program
    """
    if registers > 255 or shared > SHARED_OF_PROGRAM or warps > 32:
        return 0
    # A warp's registers come in units of 256, from its quarter of the multiprocessor's.
    of_warp = 256 * math.ceil(max(registers, 1) * 32 / 256)
    by_registers = 4 * (REGISTERS // 4 // of_warp) // warps
    by_shared = SHARED // (128 * math.ceil(shared / 128) + 1024)
    return min(PROGRAMS, WARPS // warps, by_registers, by_shared)


_COMPILED: dict[object, tuple[int, int]] = {}


def compiled(launch: Any) -> tuple[int, int]:
    """Registers of a thread and bytes of shared memory of a program, of a `triton.launch.Launch` compiled for sm_90."""
    from benchmarks.aot import build

    arguments = ((name, _specialised(name, value)) for name, value in launch.arguments.items())
    key = (launch.kernel.__name__, *arguments, launch.warps, launch.stages)
    if key not in _COMPILED:
        made = build(launch, 90)
        _COMPILED[key] = (made.registers, made.shared)
    return _COMPILED[key]


def _specialised(name: str, value: Any) -> object:
    """What the compiler sees of an argument: constants whole; of an int whether it is 1, and whether 16 divides it."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, int) and not name.isupper():
        return value == 1, value % 16 == 0
    return value if name.isupper() else type(value)


def show(described: Iterable[tuple[dict[str, Any], str]], path: Path | None, **besides: float) -> None:
    """Print a model, and write it to a file where there is one. Each cell comes as the file has it, and as lines;
    `besides`: what else is assumed."""
    print("ANALYTIC MODEL of an H200: nothing here was measured.")
    print(
        f"assumed: {BYTES_PER_SECOND / 1e12} TB/s, {L2_BYTES_PER_SECOND / 1e12} out of L2,"
        f" {FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s, {LAUNCH * 1e6:.0f} µs a launch, {MULTIPROCESSORS} multiprocessors"
        + "".join(f", {name} {value:g}" for name, value in besides.items())
    )
    report = []
    for found, lines in described:
        report.append(found)
        print(f"\n{lines}", flush=True)
    if path:
        rates = {"bytes_per_second": BYTES_PER_SECOND, "l2_bytes_per_second": L2_BYTES_PER_SECOND}
        assumed = {**rates, "flops_per_second": FLOPS_PER_SECOND, "launch_seconds": LAUNCH}
        document = {"measured": False, "assumed": {**assumed, **besides}, "cells": report}
        path.write_text(json.dumps(document, indent=2) + "\n")
