"""The draft's head against PyTorch, in one run: microseconds, and the fraction of the floor.

    python benchmarks/bench_draft_head.py                    # a dozen cells, under a minute on a GPU
    python benchmarks/bench_draft_head.py --all              # every cell, compiled with autotuning too: hours
    python benchmarks/bench_draft_head.py --device cpu       # tiny cells, to try the script anywhere
    python benchmarks/bench_draft_head.py --model            # arithmetic only: no GPU, nothing measured

Three things of one level of the draft: `draft_topk`; the level of a beam, which is that and `grow_level`; and
`project_features`. Every result is compared with products in float64 first; a wrong one has no speed. Times are medians
with cold caches (benchmarks/timer.py), of replayed CUDA graphs but for the eager pipeline. They are compared with

    floor = max(bytes / measured bandwidth, FLOPs / measured matrix rate)
    bytes = weights, inputs and results once
    FLOPs = 2 N times the entries of the weights
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from benchmarks import command_line, head_model
from benchmarks.head_cells import ALL, CPU, SUBSET
from benchmarks.head_peers import PEERS, ours


def main() -> int:
    """Exit status: 0, or 1 where ours has a cell without a time."""
    return command_line.main(
        command_line.Benchmark(
            description=__doc__,
            op="draft_topk",
            ours=ours(),
            peers=PEERS,
            usual=("eager", "graph", "compiled"),
            full=("eager", "graph", "compiled", "autotuned"),
            cpu_peers=PEERS["eager"],
            tuning="benchmarks.head_tuning",
            subset=SUBSET,
            all=ALL,
            cpu=CPU,
            goals=len(SUBSET),  # all cells have the quick peers before any is compiled
            budget=28,
            show=head_model.show,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
