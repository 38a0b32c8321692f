"""How the time of a decode step grows with the text, with the tree and with the batch, beside the floor: microseconds.

    python benchmarks/bench_scaling.py                      # some cells, under half a minute on a GPU
    python benchmarks/bench_scaling.py --plots FOLDER       # with a PNG of each axis (needs matplotlib)
    python benchmarks/bench_scaling.py --all                # every cell that fits in memory
    python benchmarks/bench_scaling.py --peers eager        # without the CUDA graph, too
    python benchmarks/bench_scaling.py --device cpu         # tiny cells, to try the script anywhere

The step of bench_step.py, of Qwen3-4B with random weights: of its committed slots L, its nodes T and its batch B one is
changed at a time, from L = 1k, T = 60, B = 1. Steps are checked as there, and the floor is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

import torch

from benchmarks import command_line
from benchmarks.harness import Result
from benchmarks.step_cells import SMALL_STEM, STEM, along
from benchmarks.step_ours import ours
from benchmarks.step_peers import EAGER

AXES = {"length": "L, committed slots", "nodes": "T, nodes of the tree", "batch": "B, sequences"}
OURS, FLOOR, PEER = "#2563a8", "#b0392f", "#8a94a0"

SUBSET = along(STEM, lengths=(8192, 32_768), nodes=(16, 128), batches=(4, 16))
ALL = along(
    STEM,
    lengths=(2048, 4096, 8192, 16_384, 32_768),
    nodes=(1, 8, 16, 32, 64, 96, 128, 192, 256),
    batches=(2, 4, 8, 16, 32, 64),
)
CPU = along(SMALL_STEM, lengths=(256, 512), nodes=(1, 24), batches=(2, 4))


class Options(command_line.Options):
    """Of bench_scaling.py."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the axes there as PNG; needs matplotlib")

    def instead(self, arguments: argparse.Namespace, device: torch.device) -> bool:
        if arguments.plots and importlib.util.find_spec("matplotlib") is None:
            raise SystemExit("--plots needs matplotlib: pip install matplotlib")
        return False

    def finish(self, report: Result, arguments: argparse.Namespace) -> None:
        if not arguments.plots:
            return
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for axis in AXES:
            if points := series(report, axis):
                path = arguments.plots / f"scaling_{axis}.png"
                path.write_bytes(draw(report, axis, points))
                print(f"wrote {path}")


def series(report: Result, axis: str) -> list[Result]:
    """The cells that differ from the first one in nothing but `axis`, in its order; none where there is no other."""
    stem = report["cells"][0] if report["cells"] else {}
    others = [name for name in AXES if name != axis]
    cells = [cell for cell in report["cells"] if all(cell[name] == stem[name] for name in others)]
    return sorted(cells, key=lambda cell: cell[axis]) if len(cells) > 1 else []


def draw(report: Result, axis: str, cells: Sequence[Result]) -> bytes:
    """A PNG: milliseconds of each implementation, and the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in milliseconds(cells, axis).items():
        colour = OURS if name == report["ours"] else PEER
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
    floor = [(cell[axis], cell["floor_microseconds"] / 1e3) for cell in cells]
    axes.plot(*zip(*floor, strict=True), color=FLOOR, linestyle=(0, (4, 3)), linewidth=1.0, label="floor")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [cell[axis] for cell in cells], [f"{tick:,}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("ms a step")
    axes.grid(axis="y", color="#d5dae0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    fixed = ", ".join(f"{AXES[name][0]} = {cells[0][name]:,}" for name in AXES if name != axis)
    axes.set_title(f"{cells[0]['model']}, {report['dtype']}, {report['device']}: {fixed}", fontsize=9, loc="left")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def milliseconds(cells: Sequence[Result], axis: str) -> dict[str, list[tuple[int, float]]]:
    """Of each implementation the points that have a time."""
    found: dict[str, list[tuple[int, float]]] = {}
    for cell in cells:
        for result in cell["results"]:
            if "microseconds" in result:
                found.setdefault(result["implementation"], []).append((cell[axis], result["microseconds"] / 1e3))
    return found


def main() -> int:
    """Exit status: 0, or 1 where ours has a cell without a time although there was time for it."""
    options: dict[str, Any] = {"usual": (), "full": (), "peers": {"eager": (EAGER,)}, "cpu_peers": ()}
    return command_line.main(
        command_line.Benchmark(
            description=__doc__,
            name="specexit",
            ours=ours(),
            **options,
            subset=SUBSET,
            all=ALL,
            cpu=CPU,
            goals=len(SUBSET),
            budget=28,
            ends=True,
            profiled=True,
            options=Options(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
