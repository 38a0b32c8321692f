"""The command line that the benchmarks of operators share."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Cell, Peer, Prepared, Result, measure
from specexit_kernels import implementations


class Options:
    """What a script adds to the command line: nothing."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Its own options."""

    def instead(self, arguments: argparse.Namespace, device: torch.device) -> bool:
        """What comes before all cells. Returns whether it was asked for instead of them."""
        return False

    def cells(self, cells: Sequence[Any], arguments: argparse.Namespace) -> Sequence[Any]:
        """The cells as its options want them."""
        return cells

    def finish(self, report: Result, arguments: argparse.Namespace) -> None:
        """What else is made of the report."""


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark brings.

    description  of the script; its first line names it
    op           whose implementation gives ours its name; or `name` is that name
    ours         prepares ours
    peers        by the names that `--peers` takes
    usual, full  the names that are measured without it, the latter with `--all`
    apart        names whose peers go through all cells one after the other, because each compiles for seconds
    profiled     ours is asked for `more`, when all times are taken
    together     the peers of the other names go through all cells at once, because a cell's inputs take seconds
    cpu_peers    what is measured beside ours on a CPU
    subset, all, cpu  the cells without `--all`, with it, and on a CPU
    goals        how many of the first cells get all their peers before the others do
    budget       seconds after which peers are left out without `--all`; with `ends` ours as well
    tuning       the module with other configurations of ours, TUNING, where there is one; it needs Triton
    show         prints the analytic model of cells, where there is one, and writes it to a file
    options      the script's own
    """

    description: str | None
    ours: Callable[[Any], Prepared]
    peers: dict[str, tuple[Peer, ...]]
    usual: tuple[str, ...]
    full: tuple[str, ...]
    cpu_peers: tuple[Peer, ...]
    subset: Sequence[Any]
    all: Sequence[Any]
    cpu: Sequence[Any]
    goals: int
    budget: int
    op: str = ""
    name: str = ""
    ends: bool = False
    tuning: str | None = None
    show: Callable[[Sequence[Any], Path | None], None] | None = None
    apart: Collection[str] = ()
    together: bool = False
    profiled: bool = False
    options: Options = Options()  # noqa: RUF009


def main(benchmark: Benchmark) -> int:
    """Run the script. Exit status: 0, or 1 where ours has a cell without a time."""
    known = [*benchmark.peers, *(["tune"] if benchmark.tuning else [])]
    parser = _parser(benchmark, known)
    arguments = parser.parse_args()
    cells: Sequence[Cell] = (benchmark.all if arguments.all else benchmark.subset)[: arguments.cells]
    if benchmark.show and arguments.model:
        benchmark.show(cells, arguments.json)
        return 0

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU")
    usual = benchmark.full if arguments.all else benchmark.usual
    chosen = usual if arguments.peers is None else arguments.peers.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--peers must be of {', '.join(known)}, was {', '.join(map(repr, unknown))}")
    if benchmark.options.instead(arguments, device):
        return 0
    peers = dict(benchmark.peers)
    if benchmark.tuning and "tune" in chosen:
        peers["tune"] = importlib.import_module(benchmark.tuning).TUNING
    name = benchmark.name or implementations()[benchmark.op][device.type]
    own = Peer(name, benchmark.ours, optional=benchmark.ends, profiled=benchmark.profiled)
    rounds: list[list[Peer]] = [[own]]  # ours first, while there is time
    if benchmark.together:
        rounds.append([peer for name in chosen if name not in benchmark.apart for peer in peers[name]])
        chosen = [name for name in chosen if name in benchmark.apart]
    for name in chosen:
        rounds += [[peer] for peer in peers[name]] if name in benchmark.apart else [list(peers[name])]
    dtype = torch.bfloat16
    if device.type != "cuda":
        print("CPU: tiny cells in fp32, to try the script; these times say nothing of a GPU")
        cells, dtype = benchmark.cpu, torch.float32
        rounds = [[own, *benchmark.cpu_peers]]
    elif arguments.all:  # each cell with its peers: hours apart, the clocks may differ
        rounds = [[peer for peers in rounds for peer in peers]]
    budget = arguments.budget or (float("inf") if arguments.all else benchmark.budget)
    cells = benchmark.options.cells(cells, arguments)
    status, report = measure(cells, rounds, device, dtype, budget, benchmark.goals, arguments.json)
    benchmark.options.finish(report, arguments)
    return status


def _parser(benchmark: Benchmark, known: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--all", action="store_true", help="every cell that fits in memory")
    parser.add_argument("--cells", type=positive, help="only the first ones, the most important")
    parser.add_argument(
        "--peers",
        help=f"comma-separated, of {', '.join(known)}{' (other tiles of ours)' if benchmark.tuning else ''};"
        f" default: {','.join(benchmark.usual)}; {','.join(benchmark.full)} with --all",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        help=f"seconds after which peers are left out; default: {benchmark.budget}, none with --all",
    )
    parser.add_argument("--json", type=new_file, help="write the results to this file (benchmarks/README.md)")
    benchmark.options.add(parser)
    if benchmark.show:
        parser.add_argument("--model", action="store_true", help="the analytic model of the cells; nothing is measured")
    return parser


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
