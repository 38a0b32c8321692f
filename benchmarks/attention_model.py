"""An analytic model of tree attention on an H200: what a cell moves and computes, how it is launched, what limits it.

Nothing here is measured. It follows from shapes, from the launches that the kernel's table chooses, and from two rates
that are assumed; it says where to look, not how long a cell takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_cells import Cell
from specexit_kernels import bits

# Assumed: what an H200 reached in earlier measurements of a copy and of a bf16 product. A run measures its own.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12
LAUNCH = 3e-6  # seconds, assumed: a kernel cannot be much shorter, nor the gap before the next one in a graph vanish
ITEMSIZE = 2  # bf16

# Compute capability 9.0, from the CUDA C++ programming guide, table "technical specifications per compute capability".
MULTIPROCESSORS = 132  # of an H200
REGISTERS = 65_536  # of a multiprocessor
WARPS = 64
PROGRAMS = 32
SHARED = 228 * 1024  # bytes of a multiprocessor; each program takes 1 KB more than it asks for
SHARED_OF_PROGRAM = 227 * 1024


@dataclass(frozen=True)
class Analysis:
    """The model of one cell; times in µs under the assumed rates.

    bytes, flops    of the floor, as attention_cells.Cell defines them
    floor           max(bytes / bandwidth, flops / matrix rate)
    block_m, block_n, warps, stages, splits  as the table chooses them; `active` splits have work at this length
    tiles           of block_m query rows that a KV head's rows need
    programs        with work: B x Hkv x active splits x tiles
    resident        programs that a multiprocessor holds
    waves           programs / (multiprocessors x resident)
    busy            share of the multiprocessors' time that has work, when all programs take equally long
    padding         share of the tiles' query rows that are empty
    computed        FLOPs that are executed, with padding of query rows, head dimension and units of slots
    reread          bytes of K and V that further tiles read again, from L2 at best
    partials        bytes of partial results that splits write and the merge reads again
    limit           what limits the cell, in words
    """

    bytes: int
    flops: int
    floor: float
    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int
    active: int
    tiles: int
    programs: int
    resident: int
    waves: float
    busy: float
    padding: float
    computed: int
    reread: int
    partials: int
    limit: str


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


def analyse(cell: Cell, registers: int, shared: int) -> Analysis:
    """The model of a cell, whose kernel takes so many registers a thread and bytes of shared memory a program."""
    from specexit_kernels.triton.tree_attention import cover
    from specexit_kernels.triton.tree_attention_kernels import UNIT

    model = cell.model
    attend = _attend_launch(cell)
    block_m, block_n = attend.arguments["BLOCK_M"], attend.arguments["BLOCK_N"]
    tiles, splits = attend.arguments["tiles"], attend.arguments["splits"]

    # How the kernel shares out its units (`_share`): from the window's first on; `words` of them are scratch slots.
    first = max(0, cell.length - model.window + 1) // UNIT.value if model.window else 0
    units = -(-cell.length // UNIT.value) - first + attend.arguments["words"]
    of_tile = block_n // UNIT.value
    share = -(-max(-(-units // splits), attend.arguments["least"]) // of_tile) * of_tile
    active = math.ceil(units / share)

    programs = cell.batch * model.kv_heads * active * tiles
    resident = occupancy(registers, shared, attend.warps)
    waves = programs / (MULTIPROCESSORS * max(resident, 1))
    busy = programs / (MULTIPROCESSORS * math.ceil(programs / MULTIPROCESSORS))
    floor, limit = cell.floor(ITEMSIZE, BYTES_PER_SECOND, FLOPS_PER_SECOND)
    queries = cell.batch * cell.nodes * model.heads
    rows = cell.batch * model.kv_heads * tiles * block_m
    analysis = Analysis(
        bytes=cell.bytes(ITEMSIZE),
        flops=cell.flops,
        floor=floor * 1e6,
        block_m=block_m,
        block_n=block_n,
        warps=attend.warps,
        stages=attend.stages,
        splits=splits,
        active=active,
        tiles=tiles,
        programs=programs,
        resident=resident,
        waves=waves,
        busy=busy,
        padding=1 - queries / rows,
        computed=2 * rows * units * UNIT.value * 2 * sum(cover(model.head_dim)),
        reread=(tiles - 1) * cell.kv_values * ITEMSIZE,
        partials=2 * 4 * queries * active * (model.head_dim + 1) if active > 1 else 0,
        limit=limit,
    )
    return Analysis(**{**asdict(analysis), "limit": _limit(analysis)})


def _attend_launch(cell: Cell) -> Any:
    """The kernel's first launch for a cell, from tensors without data."""
    from specexit_kernels.triton.launch import H200
    from specexit_kernels.triton.tree_attention import launches

    model = cell.model

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q = empty(cell.batch, cell.nodes, model.heads, model.head_dim)
    cache = empty(cell.batch, model.kv_heads, cell.capacity, model.head_dim)
    lengths = empty(cell.batch, dtype=torch.int32)
    positions = empty(cell.batch, cell.nodes, dtype=torch.int32)
    visible = empty(cell.batch, cell.nodes, bits.words(cell.nodes), dtype=torch.int64)
    sinks = empty(model.heads) if model.sinks else None
    scale = model.head_dim**-0.5
    options = (scale, model.window, model.softcap, sinks, None)
    return launches(q, cache, cache, lengths, positions, visible, *options, empty(*q.shape), device=H200)[0]


def _limit(a: Analysis) -> str:
    """What limits a cell, the most important first."""
    if a.resident == 0:
        return "does not run: too many registers or too much shared memory"
    launches = 2 if a.splits > 1 else 1
    if a.floor * 1e-6 < LAUNCH * launches:
        return f"launch: the floor is below {launches} x {LAUNCH * 1e6:.0f} µs"
    words = []
    if a.busy < 0.9:
        few = f"too few programs: {a.programs} for {MULTIPROCESSORS} multiprocessors"
        words.append(few if a.programs < MULTIPROCESSORS else f"uneven waves: {a.busy:.0%} busy")
    arithmetic, memory = a.computed / FLOPS_PER_SECOND * 1e6, a.bytes / BYTES_PER_SECOND * 1e6
    if arithmetic > memory:
        idle = f", {1 - a.flops / a.computed:.0%} of it padding" if a.flops < 0.9 * a.computed else ""
        words.append(f"arithmetic: {arithmetic:.1f} µs{idle}")
    else:
        words.append(f"memory: {memory:.1f} µs")
    # At the floor's pace the multiprocessors would have to read this much a second out of L2.
    rate = (a.bytes + a.reread) / a.floor / 1e6
    if a.reread and rate > BYTES_PER_SECOND / 1e12:
        words.append(f"K and V read {a.tiles} times: {rate:.1f} TB/s out of L2 at the floor's pace")
    if a.partials:
        words.append(f"the merge: a second launch, and {a.partials / a.bytes:.0%} of the floor's bytes through L2")
    return "; ".join(words)


_COMPILED: dict[object, tuple[int, int]] = {}


def compiled(cell: Cell) -> tuple[int, int]:
    """Registers of a thread and bytes of shared memory of a program, as compiled for the H200."""
    from benchmarks.aot import build

    launch = _attend_launch(cell)
    shape = tuple((name, value) for name, value in launch.arguments.items() if name.isupper())
    key = (shape, launch.warps, launch.stages, cell.model.softcap is None, cell.model.sinks, cell.model.window is None)
    if key not in _COMPILED:
        made = build(launch, 90)
        _COMPILED[key] = (made.registers, made.shared)
    return _COMPILED[key]


def show(cells: Sequence[Cell], path: Path | None) -> None:
    """Print the model of the cells, and write it to a file where there is one."""
    print("ANALYTIC MODEL of an H200: nothing here was measured.")
    print(
        f"assumed: {BYTES_PER_SECOND / 1e12} TB/s, {FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s,"
        f" {LAUNCH * 1e6:.0f} µs a launch, {MULTIPROCESSORS} multiprocessors"
    )
    report = []
    for cell in cells:
        registers, shared = compiled(cell)
        analysis = analyse(cell, registers, shared)
        report.append({"cell": asdict(cell), "registers": registers, "shared": shared, **asdict(analysis)})
        print(f"\n{cell}\n{_lines(analysis)}")
        print(f"  compiled  {registers} registers a thread, {shared:,} bytes of shared memory a program", flush=True)
    if path:
        assumed = {"bytes_per_second": BYTES_PER_SECOND, "flops_per_second": FLOPS_PER_SECOND, "launch_seconds": LAUNCH}
        path.write_text(json.dumps({"measured": False, "assumed": assumed, "cells": report}, indent=2) + "\n")


def _lines(a: Analysis) -> str:
    return "\n".join(
        (
            f"  floor     {a.floor:.1f} µs: {a.bytes / 1e6:,.1f} MB, {a.flops / 1e9:,.1f} GFLOP",
            f"  tiles     {a.block_m} rows x {a.block_n} slots, {a.warps} warps, {a.stages} stages;"
            f" {a.tiles} a KV head, {a.padding:.0%} of the rows are padding; {a.computed / 1e9:,.1f} GFLOP executed",
            f"  programs  {a.programs:,} ({a.active} of {a.splits} splits work), {a.waves:.2f} waves of"
            f" {MULTIPROCESSORS} x {a.resident}, {a.busy:.0%} busy",
            f"  besides   {a.reread / 1e6:,.1f} MB of K and V read again from L2,"
            f" {a.partials / 1e6:,.1f} MB of partial results written and read",
            f"  limit     {a.limit}",
        )
    )
