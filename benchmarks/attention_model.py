"""An analytic model of tree attention on an H200: what a cell moves and computes, how it is launched, what limits it.

Nothing here is measured. It follows from shapes, from the launches that the kernel's table chooses, and from two rates
that are assumed; it says where to look, not how long a cell takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import h200
from benchmarks.attention_cells import Cell
from benchmarks.h200 import BYTES_PER_SECOND, FLOPS_PER_SECOND, ITEMSIZE, LAUNCH, MULTIPROCESSORS, occupancy
from specexit_kernels import bits


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


def compiled(cell: Cell) -> tuple[int, int]:
    """Registers of a thread and bytes of shared memory of a program, as compiled for the H200."""
    return h200.compiled(_attend_launch(cell))


def show(cells: Sequence[Cell], path: Path | None) -> None:
    """Print the model of the cells, and write it to a file where there is one."""
    h200.show(map(_described, cells), path)


def _described(cell: Cell) -> tuple[dict[str, Any], str]:
    registers, shared = compiled(cell)
    analysis = analyse(cell, registers, shared)
    found = {"cell": asdict(cell), "registers": registers, "shared": shared, **asdict(analysis)}
    usage = f"  compiled  {registers} registers a thread, {shared:,} bytes of shared memory a program"
    return found, f"{cell}\n{_lines(analysis)}\n{usage}"


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
