"""A whole decode step at the shapes of real models, with random weights, against plain decoding and the public release.

    python benchmarks/bench_step.py                    # some cells, about a minute on a GPU
    python benchmarks/bench_step.py --all              # every cell that fits in memory: many minutes
    python benchmarks/bench_step.py --peers static --cells 1 --budget 200   # generate's token compiled
    python benchmarks/bench_step.py --accepted 3       # tokens that a step is taken to publish
    python benchmarks/bench_step.py --bundled          # the bundled pair instead: milliseconds and operations by part
    python benchmarks/bench_step.py --device cpu       # the bundled pair, and tiny cells: to try the script anywhere

A step: the draft grows a tree, the base verifies it, tokens are published, the exit is decided. Weights are random, and
so is the text before it where that is long. Such a draft is hardly ever right, which changes nothing of what a step
takes; how many tokens it publishes is an assumption, printed beside the results. A step whose tokens are not the base's
own best ones, by transformers' forward, has no speed. Times are compared with

    floor = sum over the passes of max(bytes / measured bandwidth, FLOPs / measured matrix rate)
    passes = the base over the tree, the draft over the accepted rows, the draft over each level

The first cell is the one that the goals name: Qwen3-4B, one sequence, 1k tokens, 60 nodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

import torch

from benchmarks import command_line, step_bundled
from benchmarks.step_cells import ACCEPTED, ALL, CPU, SUBSET, Cell
from benchmarks.step_ours import ours
from benchmarks.step_peers import CPU_PEERS, PEERS


class Options(command_line.Options):
    """Of bench_step.py."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--accepted",
            type=at_least_one,
            default=ACCEPTED,
            help="tokens that a step is taken to publish, for tokens a second; default: %(default)s, an assumption",
        )
        parser.add_argument("--bundled", action="store_true", help="take a step of the bundled pair apart instead")
        parser.add_argument(
            "--problems", type=command_line.positive, default=2, help="of the bundled pair; default: %(default)s"
        )

    def instead(self, arguments: argparse.Namespace, device: torch.device) -> bool:
        if arguments.bundled or device.type == "cpu":
            step_bundled.report(device, arguments.problems)
        return bool(arguments.bundled)

    def cells(self, cells: Sequence[Cell], arguments: argparse.Namespace) -> Sequence[Cell]:
        return [replace(cell, accepted=arguments.accepted) for cell in cells]


def at_least_one(text: str) -> float:
    """An argument that is a number of at least 1."""
    value = float(text)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, was {text}")
    return value


def main() -> int:
    """Exit status: 0, or 1 where ours has a cell without a time."""
    return command_line.main(
        command_line.Benchmark(
            description=__doc__,
            name="specexit",
            ours=ours(),
            peers=PEERS,
            usual=("release", "generate", "eager"),  # `static` compiles for a minute or so
            full=("release", "generate", "eager", "static"),
            apart=("static",),
            together=True,
            profiled=True,
            cpu_peers=CPU_PEERS,
            subset=SUBSET,
            all=ALL,
            cpu=CPU,
            goals=len(SUBSET),
            budget=48,
            options=Options(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
