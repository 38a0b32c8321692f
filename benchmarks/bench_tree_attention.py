"""Tree attention against SDPA, FlexAttention and FlashInfer, in one run: microseconds, and the fraction of the floor.

    python benchmarks/bench_tree_attention.py                    # a dozen cells, under 90 seconds on a GPU
    python benchmarks/bench_tree_attention.py --all              # every cell that fits in memory: hours
    python benchmarks/bench_tree_attention.py --device cpu       # tiny cells, to try the script anywhere
    python benchmarks/bench_tree_attention.py --model            # arithmetic only: no GPU, nothing measured

Every result is compared with the twin in float64 first; a wrong one has no speed. Times are medians of replayed CUDA
graphs with cold caches (benchmarks/timer.py). They are compared with

    floor = max(bytes / measured bandwidth, FLOPs / measured matrix rate)
    bytes = K and V of the L + T attended slots once, q and the result once
    FLOPs = 2 B Hq T (L + T) (hd + hd_v)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

import torch

from benchmarks import attention_model, timer
from benchmarks.attention_cells import ALL, CPU, GOALS, SUBSET, TOLERANCE, Cell, Problem, make_problem
from benchmarks.attention_peers import PEERS, Peer, Unavailable, ours
from specexit_kernels import implementations

Result = dict[str, Any]

BEGAN = time.monotonic()


def attempt(peer: Peer, problem: Problem, device: torch.device) -> Result:
    """Check and time one implementation; whatever goes wrong is its result and stops nothing."""
    try:
        prepared = peer.prepare(problem)
        error = problem.error(prepared.finish(prepared.calls[0]()))
        if not error <= TOLERANCE[problem.copies[0][0].dtype]:  # NaN is not, either
            raise Unavailable(f"wrong result: relative error {error:.1e}")
        timing = timer.measure(prepared.calls, device)
    except Unavailable as error:
        return {"implementation": peer.name, "unavailable": str(error)}
    except Exception as error:
        return {"implementation": peer.name, "unavailable": timer.first_line(error)}
    note = "; ".join(filter(None, (prepared.note, timing.note)))
    return {"implementation": peer.name, **asdict(timing), "note": note, "error": error}


def rated(cell: Cell, results: Sequence[Result], itemsize: int, ceilings: timer.Ceilings) -> Result:
    """A cell of the report: its shape, its floor, and the results with their rates. The first one is ours."""
    floor, limit = cell.floor(itemsize, ceilings.bytes_per_second, ceilings.flops_per_second)
    own = results[0].get("microseconds")
    lines = []
    for result in results:
        if microseconds := result.get("microseconds"):
            result = {
                **result,
                "bytes_per_second": cell.bytes(itemsize) / microseconds * 1e6,
                "flops_per_second": cell.flops / microseconds * 1e6,
                "fraction_of_floor": floor * 1e6 / microseconds,
                "times_ours": microseconds / own if own else None,
            }
        lines.append(result)
    return {
        **cell_keys(cell),
        "bytes": cell.bytes(itemsize),
        "flops": cell.flops,
        "floor_microseconds": floor * 1e6,
        "limit": limit,
        "results": lines,
    }


def cell_keys(cell: Cell) -> Result:
    """The shape of a cell, as the JSON has it."""
    model = asdict(cell.model)
    return {"model": model.pop("name"), **model, "nodes": cell.nodes, "batch": cell.batch, "length": cell.length}


def table(cell: Result) -> str:
    """The lines of one cell."""
    lines = [
        f"\n{cell['model']} ({cell['heads']}/{cell['kv_heads']} heads of {cell['head_dim']}), {cell['nodes']} nodes,"
        f" batch {cell['batch']}, {cell['length']:,} slots: {cell['bytes'] / 1e6:,.1f} MB,"
        f" {cell['flops'] / 1e9:,.1f} GFLOP, floor {cell['floor_microseconds']:,.1f} µs ({cell['limit']})",
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


def fits(cell: Cell, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the copies of a cell's cache, its masks and 2 GiB besides fit in the GPU's memory."""
    if device.type != "cuda":
        return True
    cache = cell.kv_values * dtype.itemsize * cell.capacity // cell.attended
    masks = 8 * cell.batch * cell.nodes * cell.capacity
    return copies(cell, dtype, device) * cache + masks + 2**31 < torch.cuda.mem_get_info(device)[0]


def copies(cell: Cell, dtype: torch.dtype, device: torch.device) -> int:
    """How many copies of the cache leave it cold."""
    return timer.copies_for_cold_cache(cell.kv_values * dtype.itemsize, device)


def run_cell(
    cell: Cell, peers: Sequence[Peer], device: torch.device, dtype: torch.dtype, deadline: float
) -> list[Result]:
    """The results of the peers, in their order; `deadline` is a time of the monotonic clock."""
    problem, reason = None, ""
    results: list[Result] = []
    for peer in peers:
        if peer.optional and time.monotonic() > deadline:
            results.append({"implementation": peer.name, "unavailable": "the time budget was used up"})
            continue
        print(f"{time.monotonic() - BEGAN:6.1f} s  {cell}: {peer.name}", file=sys.stderr, flush=True)
        if problem is None and not reason:
            try:
                problem = make_problem(cell, device, dtype, copies(cell, dtype, device))
            except Exception as error:
                reason = f"no inputs: {timer.first_line(error)}"
        if problem is None:
            results.append({"implementation": peer.name, "unavailable": reason})
            continue
        results.append(attempt(peer, problem, device))
        if "unavailable" in results[-1] and device.type == "cuda":
            with suppress(RuntimeError):  # the GPU itself may have failed; that is the next peers' reason then
                torch.cuda.empty_cache()  # or it has run out of memory
    return results


def run(
    cells: Sequence[Cell],
    rounds: Sequence[Sequence[Peer]],
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    save: Callable[[Result], None],
) -> Result:
    """The report. Each round takes its peers through the cells of the goals, then through the others; `save` gets the
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
    order = [(peers, cell) for part in (cells[:GOALS], cells[GOALS:]) for peers in rounds for cell in part]
    for peers, cell in order:
        results[cell] += run_cell(cell, peers, device, dtype, BEGAN + budget)
        report["cells"] = [rated(c, found, dtype.itemsize, ceilings) for c, found in results.items() if found]
        save(report)
        if peers is rounds[-1]:
            print(table(rated(cell, results[cell], dtype.itemsize, ceilings)), flush=True)
    return report


def positive(text: str) -> int:
    """An argument that is an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, was {value}")
    return value


def new_file(text: str) -> Path:
    """An argument that names a file in a folder that exists: hours are lost where it does not."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, was {text!r}")
    return path


def main() -> int:
    """Exit status: 0, or 1 where ours has a cell without a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--all", action="store_true", help="every cell that fits in memory")
    parser.add_argument("--cells", type=positive, help="only the first ones, the most important")
    parser.add_argument(
        "--peers",
        help=f"comma-separated, of {', '.join(PEERS)}, tune (other tiles of ours); default: sdpa,flex; all with --all",
    )
    parser.add_argument(
        "--budget", type=positive, help="seconds after which peers are left out; default: 65, none with --all"
    )
    parser.add_argument("--json", type=new_file, help="write the results to this file (benchmarks/README.md)")
    parser.add_argument("--model", action="store_true", help="the analytic model of the cells; nothing is measured")
    arguments = parser.parse_args()
    if arguments.model:
        cells = (ALL if arguments.all else SUBSET)[: arguments.cells]
        attention_model.show(cells, arguments.json)
        return 0

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU")
    usual = "sdpa,flex,flashinfer" if arguments.all else "sdpa,flex"
    chosen = (usual if arguments.peers is None else arguments.peers).split(",")
    peers = dict(PEERS)
    if "tune" in chosen:  # it needs Triton
        from benchmarks.attention_tuning import TUNING

        peers["tune"] = TUNING
    if unknown := [name for name in chosen if name not in peers]:
        parser.error(f"--peers must be of {', '.join(PEERS)}, tune, was {', '.join(map(repr, unknown))}")
    own = Peer(implementations()["tree_attention"][device.type], ours(), optional=False)
    rounds: list[list[Peer]] = [[own]]  # ours first, while there is time
    for name in chosen:  # Flex compiles for seconds: the first of its peers goes through all cells before the second
        rounds += [[peer] for peer in peers[name]] if name == "flex" else [list(peers[name])]
    cells, dtype = (ALL if arguments.all else SUBSET)[: arguments.cells], torch.bfloat16
    if device.type != "cuda":
        print("CPU: tiny cells in fp32, to try the script; these times say nothing of a GPU")
        cells, dtype = CPU, torch.float32
        rounds = [[own, Peer("torch twin", ours("torch")), PEERS["sdpa"][0]]]
    elif arguments.all:  # each cell with its peers: hours apart, the clocks may differ
        rounds = [[peer for peers in rounds for peer in peers]]
    budget = arguments.budget or (float("inf") if arguments.all else 65.0)
    for cell in (large := [cell for cell in cells if not fits(cell, dtype, device)]):
        print(f"left out, as it does not fit in memory: {cell}")
    cells = tuple(cell for cell in cells if cell not in large)

    def save(report: Result) -> None:
        if arguments.json:
            part = arguments.json.with_name(arguments.json.name + ".part")
            part.write_text(json.dumps(report, indent=2) + "\n")
            part.replace(arguments.json)  # whoever ends this script finds whole results

    # Not the default stream, on which no graph can be recorded: so that all memory belongs to one stream.
    stream: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with torch.no_grad(), stream:
        report = run(cells, rounds, device, dtype, budget, save)
    failed = [cell for cell in report["cells"] if "unavailable" in cell["results"][0]]
    for cell in failed:
        shape = "{model}, {nodes} nodes, batch {batch}, {length:,} slots".format(**cell)
        print(f"{report['ours']} has no result for {shape}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
