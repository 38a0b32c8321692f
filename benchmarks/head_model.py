"""An analytic model of the draft's head on an H200: what a cell moves and computes, its launches, what limits it.

Nothing here is measured. It follows from shapes, from the launches that the kernels' tables choose, and from rates that
are assumed (benchmarks/h200.py); it says where to look, not how long a cell takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import h200
from benchmarks.h200 import (
    BYTES_PER_SECOND,
    FLOPS_PER_SECOND,
    ITEMSIZE,
    L2_BYTES_PER_SECOND,
    LAUNCH,
    MULTIPROCESSORS,
)
from benchmarks.head_cells import EPS, WORDS, Cell
from specexit_kernels.draft_topk import outputs as topk_outputs
from specexit_kernels.grow_level import outputs as level_outputs
from specexit_kernels.project_features import MAX_ROWS
from specexit_kernels.project_features import outputs as features_outputs

LATENCY = 0.8e-6  # seconds that a load from memory takes under load; assumed
# Seconds of one step of the selection: a load out of L2 that the step before it decides on, and four maxima; assumed.
SELECTION = 0.35e-6
# Bytes that a multiprocessor must have asked for at any time, so that all of them together reach the bandwidth.
IN_FLIGHT = BYTES_PER_SECOND * LATENCY / MULTIPROCESSORS

Compiled = Callable[[Any], tuple[int, int]]  # a launch to registers of a thread and bytes of shared memory


@dataclass(frozen=True)
class Step:
    """One launch.

    registers, shared  of a thread, and bytes of a program, as compiled for sm_90
    resident           programs that a multiprocessor holds
    waves              programs / (multiprocessors x resident)
    """

    kernel: str
    programs: int
    warps: int
    stages: int
    registers: int
    shared: int
    resident: int
    waves: float


@dataclass(frozen=True)
class Analysis:
    """The model of one cell; times in µs under the assumed rates.

    bytes, flops  of the floor, as head_cells.Cell defines them
    floor         max(bytes / bandwidth, flops / matrix rate)
    rows, block_v, block_h  the product's tile, as the table chooses it
    padding       share of the tiles' rows that are empty
    computed      FLOPs that the products execute, with padding of rows, of the vocabulary and of H
    steps         the launches in their order
    busy          share of the multiprocessors' time that has work in the products, when all programs take as long
    in_flight     bytes of tiles that a multiprocessor asks for at a time, on average: programs that it holds x stages
                  for which there is shared memory x bytes of a tile
    through_l2    bytes that the products' programs read, out of L2 at best: the weight once a tile of rows, the rows
                  once a tile of the weight, and once more where each program norms them
    serial        µs in which little or nothing is read from memory: norming rows in the product, and the k steps of the
                  selection, each of which waits for the one before
    workspace     bytes that launches write for each other: fp32 logits, sums of tiles or splits, normed rows
    limit         what limits the cell, in words
    """

    bytes: int
    flops: int
    floor: float
    rows: int
    block_v: int
    block_h: int
    padding: float
    computed: int
    steps: tuple[Step, ...]
    busy: float
    in_flight: int
    through_l2: int
    serial: float
    workspace: int
    limit: str


def launches(cell: Cell) -> tuple[list[Any], int]:
    """The launches of a cell, from tensors without data, and the bytes of their workspaces."""
    made, given = _made(cell)
    known = {id(tensor) for tensor in given}
    buffers: dict[int, Tensor] = {}
    for launch in made:
        for value in launch.arguments.values():
            if isinstance(value, Tensor):
                whole = value if value._base is None else value._base
                if id(whole) not in known:
                    buffers[id(whole)] = whole
    return made, sum(buffer.nbytes for buffer in buffers.values())


def _made(cell: Cell) -> tuple[list[Any], list[Tensor]]:
    """The launches, and the tensors that are the op's arguments and results."""
    from specexit_kernels.triton import draft_topk, grow_beam, project_features
    from specexit_kernels.triton.launch import H200

    given: list[Tensor] = []

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        given.append(torch.empty(*shape, dtype=dtype, device="meta"))
        return given[-1]

    n, size, k = cell.rows, cell.head.hidden, cell.k
    if cell.op == "project_features":
        features, weight = empty(n, 3 * size).view(n, 3, size).unbind(1), empty(*cell.weight_shape)
        projected = features_outputs(features, weight)
        return project_features.launches(features, weight, *projected, device=H200), [*given, *projected]

    exit_weight = empty(cell.exit_rows, size) if cell.exit_rows else None
    exit_bias = empty(cell.exit_rows) if cell.exit_rows else None
    token_map = empty(cell.head.vocabulary, dtype=torch.int32) if cell.head.target > cell.head.vocabulary else None
    hidden, lm_head = empty(n, size), empty(*cell.weight_shape)
    arguments = (hidden, empty(size), EPS, lm_head, k, exit_weight, exit_bias, token_map)
    results = topk_outputs(*arguments)
    given += results
    made = draft_topk.launches(*arguments, *results, device=H200)
    if cell.op == "level":
        batch = cell.batch
        tokens, logprobs = (x.view(batch, k, k) for x in results[:2])
        ranked = tokens, logprobs, empty(batch, k, dtype=torch.float32)
        visible, own = (empty(batch, k, WORDS, dtype=torch.int64) for _ in range(2))
        level = (hidden.view(batch, k, size), visible, own)
        grown = level_outputs(*ranked, *level, k)
        given += grown
        made = made + grow_beam.launches(*ranked, k, grown, level)
    return made, given


def analyse(cell: Cell, compiled: Compiled) -> Analysis:
    """The model of a cell, whose launches compile to what `compiled` says."""
    made, workspace = launches(cell)
    steps = tuple(_step(launch, *compiled(launch)) for launch in made)
    products = [i for i, launch in enumerate(made) if "BLOCK_V" in launch.arguments and "ROWS" in launch.arguments]
    first, step = made[products[0]], steps[products[0]]
    rows, block_v, block_h = (first.arguments[name] for name in ("ROWS", "BLOCK_V", "BLOCK_H"))
    executed = sum(made[i].arguments["row_tiles"] * rows for i in products)  # one launch for each slab of rows
    vocabulary, columns = cell.weight_shape
    blocks = 3 * math.ceil(cell.head.hidden / block_h) if cell.op == "project_features" else columns / block_h
    padded = math.ceil(vocabulary / block_v) * block_v, math.ceil(blocks) * block_h
    programs = sum(steps[i].programs for i in products)
    turns = sum(math.ceil(steps[i].programs / MULTIPROCESSORS) for i in products)
    floor, limit = cell.floor(ITEMSIZE, BYTES_PER_SECOND, FLOPS_PER_SECOND)
    norming = cell.rows * columns * ITEMSIZE if first.arguments.get("norm_weight") is not None else 0
    tiles = padded[0] // block_v
    at_first = min(programs, MULTIPROCESSORS * max(step.resident, 1))
    selecting = SELECTION * 1e6 * cell.k if cell.op != "project_features" else 0.0
    analysis = Analysis(
        bytes=cell.bytes(ITEMSIZE),
        flops=cell.flops,
        floor=floor * 1e6,
        rows=rows,
        block_v=block_v,
        block_h=block_h,
        padding=1 - cell.rows / executed,
        computed=2 * executed * padded[0] * padded[1],
        steps=steps,
        busy=programs / (MULTIPROCESSORS * turns),
        in_flight=in_flight(step, (rows + block_v) * block_h * ITEMSIZE),
        through_l2=(executed // rows * vocabulary + cell.rows * tiles) * columns * ITEMSIZE + norming * tiles,
        serial=at_first * norming / L2_BYTES_PER_SECOND * 1e6 + selecting,
        workspace=workspace,
        limit=limit,
    )
    return Analysis(**{**asdict(analysis), "steps": steps, "limit": _limit(analysis)})


def in_flight(step: Step, tile: int) -> int:
    """Bytes that a multiprocessor asks for at a time, on average, of a launch whose program loads tiles of so many."""
    held = min(step.programs / MULTIPROCESSORS, step.resident)
    return int(held * min(step.stages, step.shared // tile) * tile)


def _step(launch: Any, registers: int, shared: int) -> Step:
    resident = h200.occupancy(registers, shared, launch.warps)
    waves = launch.programs / (MULTIPROCESSORS * max(resident, 1))
    shape = (launch.programs, launch.warps, launch.stages)
    return Step(launch.kernel.__name__, *shape, registers, shared, resident, waves)


def _limit(a: Analysis) -> str:
    """What limits a cell, the most important first."""
    if any(step.resident == 0 for step in a.steps):
        return "does not run: too many registers or too much shared memory"
    if a.floor * 1e-6 < LAUNCH * len(a.steps):
        return f"launches: the floor is below {len(a.steps)} x {LAUNCH * 1e6:.0f} µs"
    words = []
    arithmetic, memory = a.computed / FLOPS_PER_SECOND * 1e6, a.bytes / BYTES_PER_SECOND * 1e6
    through_l2 = a.through_l2 / L2_BYTES_PER_SECOND * 1e6
    if arithmetic > memory:
        idle = f", {1 - a.flops / a.computed:.0%} of it padding" if a.flops < 0.9 * a.computed else ""
        words.append(f"arithmetic: {arithmetic:.1f} µs{idle}")
        if a.busy < 0.9:
            words.insert(0, f"uneven programs: {a.busy:.0%} busy")
    else:
        words.append(f"memory: {memory:.1f} µs")
        if a.in_flight < IN_FLIGHT:
            words.append(f"latency: {a.in_flight / 1024:.0f} KB in flight, of {IN_FLIGHT / 1024:.0f} that are needed")
    if through_l2 > max(arithmetic, memory):
        words.insert(0, f"L2: {a.through_l2 / 1e6:,.0f} MB out of it, {through_l2:.1f} µs")
    if a.serial > 0.02 * a.floor:
        words.append(f"what waits: {a.serial:.1f} µs of norming and selecting, {a.serial / a.floor:.0%} of the floor")
    if a.workspace > 0.1 * a.bytes:
        words.append(f"the workspace: {a.workspace / a.bytes:.0%} of the floor's bytes written, through L2 at best")
    if len(a.steps) > 1:
        share = LAUNCH * 1e6 * len(a.steps) / a.floor
        words.append(f"{len(a.steps)} launches: {share:.0%} of the floor")
    return "; ".join(words)


def show(cells: Sequence[Cell], path: Path | None) -> None:
    """Print the model of the cells, and write it to a file where there is one."""
    h200.show(map(_described, cells), path, latency_seconds=LATENCY, selection_seconds=SELECTION)


def _described(cell: Cell) -> tuple[dict[str, Any], str]:
    if cell.op == "project_features" and cell.rows > MAX_ROWS:
        floor, limit = cell.floor(ITEMSIZE, BYTES_PER_SECOND, FLOPS_PER_SECOND)
        by = f"{limit}; above {MAX_ROWS} rows cuBLAS computes it, which is not modelled"
        found = {"cell": cell.keys(), "bytes": cell.bytes(ITEMSIZE), "flops": cell.flops, "floor": floor * 1e6}
        return {**found, "limit": by}, f"{cell.heading}\n  floor     {floor * 1e6:.1f} µs\n  limit     {by}"
    analysis = analyse(cell, h200.compiled)
    return {"cell": cell.keys(), **asdict(analysis)}, f"{cell.heading}\n{_lines(analysis)}"


def _lines(a: Analysis) -> str:
    lines = [
        f"  floor     {a.floor:.1f} µs: {a.bytes / 1e6:,.1f} MB, {a.flops / 1e9:,.1f} GFLOP",
        f"  tiles     {a.rows} rows x {a.block_v} of the weight x {a.block_h} columns; {a.padding:.0%} of the rows are"
        f" padding; {a.computed / 1e9:,.1f} GFLOP executed",
    ]
    lines += [
        f"  {step.kernel:16}{step.programs:7,} programs of {step.warps} warps, {step.stages} stages,"
        f" {step.registers} registers, {step.shared:,} bytes: {step.waves:.2f} waves of"
        f" {MULTIPROCESSORS} x {step.resident}"
        for step in a.steps
    ]
    lines += [
        f"  besides   {a.busy:.0%} busy, {a.in_flight / 1024:.0f} KB in flight a multiprocessor,"
        f" {a.through_l2 / 1e6:,.1f} MB out of L2, {a.workspace / 1e6:,.1f} MB of workspace written,"
        f" {a.serial:.1f} µs serial",
        f"  limit     {a.limit}",
    ]
    return "\n".join(lines)
