"""What the benchmarks of operators share: cells and peers, the check before the time, the report.

A benchmark brings cells, which make their inputs and know a right result, and peers, which compute it. Every result is
checked first; a wrong one has no speed. The first peer is ours.
"""

from __future__ import annotations

import gc
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import results_file, timer

Result = dict[str, Any]

BEGAN = time.monotonic()
OUT_OF_TIME = "the time budget was used up"


class Unavailable(Exception):
    """This implementation cannot do this cell, or not here, or does it wrong; the message says why."""


class Problem(Protocol):
    """The inputs of a cell, in as many copies as leave the caches cold, and what a right result is."""

    def check(self, result: Any) -> float:
        """The error of a result. Raises Unavailable where it is wrong."""
        ...


class Cell(ABC):
    """One measured shape; a frozen dataclass. Its text names it in lists."""

    @abstractmethod
    def bytes(self, itemsize: int) -> int:
        """The least that must move, for inputs of so many bytes an entry."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """What must be computed."""

    @property
    @abstractmethod
    def heading(self) -> str:
        """Its shape, for people."""

    @abstractmethod
    def keys(self) -> Result:
        """Its shape, as the JSON has it."""

    @abstractmethod
    def memory(self, device: torch.device, dtype: torch.dtype) -> int:
        """Bytes of the inputs in all their copies."""

    @abstractmethod
    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """Random inputs."""

    def floor(self, itemsize: int, bytes_per_second: float, flops_per_second: float) -> tuple[float, str]:
        """Seconds that no implementation can beat on a device with these rates, and which of them sets it."""
        memory, arithmetic = self.bytes(itemsize) / bytes_per_second, self.flops / flops_per_second
        return max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"

    def work(self, implementation: str) -> Cell:
        """The cell whose bytes, FLOPs and floor a call of this implementation has: this one, unless it does less."""
        return self

    def figures(self, result: Result, own: Result) -> Result:
        """Further keys of a result that has a time; `own` is ours."""
        return {}

    def remarks(self, results: Sequence[Result]) -> list[str]:
        """Further lines below the cell's table."""
        return []


@dataclass(frozen=True)
class Prepared:
    """calls   one for each copy of the inputs
    finish  takes a call's result to what the problem checks; not timed
    note    what else is to be said
    graph   whether the calls may be replayed as a CUDA graph; else they are launched from Python
    within  makes what the calls and `finish` are inside of; entered more than once
    more    finds further keys of the result, inside of it too; asked when all times are taken (`more_of`)
    close   gives back what was prepared
    """

    calls: Sequence[Callable[[], Any]]
    finish: Callable[[Any], Any]
    note: str = ""
    graph: bool = True
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    more: Callable[[], Result] = dict
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Peer:
    """An implementation by name; `prepare` takes a problem, and raises where it cannot do the cell. Ours is not
    `optional`: it is measured although time has run out. `cells` says which cells it belongs to; None: to all.
    `seconds` is how long preparing it may take: where less is left of the budget it is not begun. `profiled`: it is
    asked for `more` when all times are taken, as a profiler may slow down what is launched after it."""

    name: str
    prepare: Callable[[Any], Prepared]
    optional: bool = True
    cells: Callable[[Any], bool] | None = None
    seconds: float = 0
    profiled: bool = False


def attempt(peer: Peer, problem: Problem, device: torch.device) -> Result:
    """Check and time one implementation; whatever goes wrong is its result and stops nothing."""
    try:
        prepared = peer.prepare(problem)
        try:
            with prepared.within():
                result = prepared.finish(prepared.calls[0]())
            error = problem.check(result)
            with prepared.within():
                timing = timer.measure(prepared.calls, device, graph=prepared.graph)
        finally:
            prepared.close()
    except Unavailable as error:
        return {"implementation": peer.name, "unavailable": str(error)}
    except Exception as error:
        return {"implementation": peer.name, "unavailable": timer.first_line(error)}
    note = "; ".join(filter(None, (prepared.note, timing.note)))
    return {"implementation": peer.name, **asdict(timing), "note": note, "error": error}


def more_of(peer: Peer, problem: Problem) -> Result:
    """What else is to be said of an implementation; nothing where it cannot be found out."""
    try:
        prepared = peer.prepare(problem)
        try:
            with prepared.within():
                prepared.calls[0]()
                return prepared.more()
        finally:
            prepared.close()
    except Exception as error:
        print(f"{peer.name} could not be profiled: {timer.first_line(error)}", file=sys.stderr)
        return {}


def rated(cell: Cell, results: Sequence[Result], itemsize: int, ceilings: timer.Ceilings) -> Result:
    """A cell of the report: its shape, its floor, and the results with their rates. The first one is ours."""
    floor, limit = cell.floor(itemsize, ceilings.bytes_per_second, ceilings.flops_per_second)
    own = results[0].get("microseconds")
    lines = []
    for result in results:
        if microseconds := result.get("microseconds"):
            work = cell.work(result["implementation"])
            least, _ = work.floor(itemsize, ceilings.bytes_per_second, ceilings.flops_per_second)
            result = {
                **result,
                "bytes_per_second": work.bytes(itemsize) / microseconds * 1e6,
                "flops_per_second": work.flops / microseconds * 1e6,
                "fraction_of_floor": least * 1e6 / microseconds,
                "times_ours": microseconds / own if own else None,
                **cell.figures(result, results[0]),
            }
        lines.append(result)
    return {
        **cell.keys(),
        "bytes": cell.bytes(itemsize),
        "flops": cell.flops,
        "floor_microseconds": floor * 1e6,
        "limit": limit,
        "results": lines,
    }


def table(heading: str, cell: Result) -> str:
    """The lines of one cell of the report."""
    lines = [
        f"\n{heading}: {_number(cell['bytes'] / 1e6)} MB,"
        f" {cell['flops'] / 1e9:,.1f} GFLOP, floor {_number(cell['floor_microseconds'])} µs ({cell['limit']})",
        f"  {'':20}{'µs':>10}{'20 to 80 %':>24}{'TB/s':>8}{'TFLOP/s':>9}{'of floor':>10}{'x ours':>8}",
    ]
    for result in cell["results"]:
        if "unavailable" in result:
            lines.append(f"  {result['implementation']:20}unavailable: {result['unavailable']}")
            continue
        spread = "{:,.1f} to {:,.1f}".format(*result["spread"])
        ratio = f"{result['times_ours']:7.2f}x" if result["times_ours"] else f"{'':8}"
        note = "; ".join(filter(None, (result["note"], "" if result["method"] == "graph" else result["method"])))
        lines.append(
            f"  {result['implementation']:20}{result['microseconds']:10,.1f}{spread:>24}"
            f"{result['bytes_per_second'] / 1e12:8.3f}{result['flops_per_second'] / 1e12:9.2f}"
            f"{result['fraction_of_floor']:9.1%} {ratio}  {note}".rstrip()
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.1 else f"{value:.1g}"


def fits(cell: Cell, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the inputs and 2 GiB besides fit in the GPU's memory."""
    return device.type != "cuda" or cell.memory(device, dtype) + 2**31 < torch.cuda.mem_get_info(device)[0]


def run_cell(
    cell: Cell, peers: Sequence[Peer], device: torch.device, dtype: torch.dtype, deadline: float
) -> list[Result]:
    """The results of the peers, in their order; `deadline` is a time of the monotonic clock."""
    problem, reason = None, ""
    results: list[Result] = []
    for peer in peers:
        if peer.cells and not peer.cells(cell):
            continue
        if peer.optional and time.monotonic() + peer.seconds > deadline:
            results.append({"implementation": peer.name, "unavailable": OUT_OF_TIME})
            continue
        print(f"{time.monotonic() - BEGAN:6.1f} s  {cell}: {peer.name}", file=sys.stderr, flush=True)
        if problem is None and not reason:
            try:
                problem = cell.problem(device, dtype)
            except Exception as error:
                reason = f"no inputs: {timer.first_line(error)}"
        if problem is None:
            results.append({"implementation": peer.name, "unavailable": reason})
            continue
        results.append(attempt(peer, problem, device))
        if "unavailable" in results[-1] and device.type == "cuda":
            gc.collect()  # it may have run out of memory, and what it made refer to itself
            with suppress(RuntimeError):  # or the GPU itself has failed; that is the next peers' reason then
                torch.cuda.empty_cache()
    return results


def run(
    cells: Sequence[Cell],
    rounds: Sequence[Sequence[Peer]],
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    goals: int,
    save: Callable[[Result], None],
) -> Result:
    """The report. Each round takes its peers through the first `goals` cells, then through the others; `save` gets the
    report after each cell."""
    ceilings = timer.ceilings(device)
    report: Result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "ours": rounds[0][0].name,
        "ceilings": asdict(ceilings),
        "cells": [],
    }
    print("{device}, {dtype}, torch {torch}; ours is {ours}".format(**report))
    print(
        f"measured: {ceilings.bytes_per_second / 1e12:.3f} TB/s (a copy),"
        f" {ceilings.flops_per_second / 1e12:.2f} TFLOP/s (a matrix product)"
    )
    results: dict[Cell, list[Result]] = {cell: [] for cell in cells}

    def keep() -> None:
        report["cells"] = [rated(c, found, dtype.itemsize, ceilings) for c, found in results.items() if found]
        save(report)

    order = [(peers, cell) for part in (cells[:goals], cells[goals:]) for peers in rounds for cell in part]
    for peers, cell in order:
        results[cell] += run_cell(cell, peers, device, dtype, BEGAN + budget)
        keep()
        if peers is rounds[-1]:
            print(table(cell.heading, rated(cell, results[cell], dtype.itemsize, ceilings)), flush=True)
    profiled = {peer.name: peer for peers in rounds for peer in peers if peer.profiled}
    for cell in cells:
        timed = [found for found in results[cell] if found["implementation"] in profiled and "microseconds" in found]
        if not timed:
            continue
        if time.monotonic() < BEGAN + budget:
            with suppress(RuntimeError):  # the GPU's memory, or the GPU; the times are kept
                problem = cell.problem(device, dtype)
                for result in timed:
                    result.update(more_of(profiled[result["implementation"]], problem))
                del problem
            keep()
        found = rated(cell, results[cell], dtype.itemsize, ceilings)["results"]
        print("\n".join([f"\n{cell.heading}", *cell.remarks(found)]), flush=True)
    return report


def measure(
    cells: Sequence[Cell],
    rounds: Sequence[Sequence[Peer]],
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    goals: int,
    path: Path | None,
) -> tuple[int, Result]:
    """`run` for the cells that fit in memory, its report written to `path`. Returns the exit status of a benchmark (0,
    or 1 where ours has a cell without a time although there was time for it) and the report."""
    for cell in (large := [cell for cell in cells if not fits(cell, device, dtype)]):
        print(f"left out, as it does not fit in memory: {cell}")
    cells = tuple(cell for cell in cells if cell not in large)

    def save(report: Result) -> None:
        if path:
            results_file.write(report, path)  # whoever ends this script finds whole results

    # Not the default stream, on which no graph can be recorded: so that all memory belongs to one stream.
    stream: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with torch.no_grad(), stream:
        report = run(cells, rounds, device, dtype, budget, goals, save)
    own = [found["results"][0].get("unavailable", OUT_OF_TIME) for found in report["cells"]]
    failed = [cell for cell, reason in zip(cells, own, strict=True) if reason != OUT_OF_TIME]
    for cell in failed:
        print(f"{report['ours']} has no result for {cell}", file=sys.stderr)
    return int(bool(failed)), report
