"""The step's small ops against the public releases' pipeline and against PyTorch, in one run: microseconds.

    python benchmarks/bench_step_ops.py                    # some cells, under a minute on a GPU
    python benchmarks/bench_step_ops.py --all              # every cell that fits in memory: many minutes
    python benchmarks/bench_step_ops.py --device cpu       # tiny cells, to try the script anywhere

`build_tree`, `sample_targets`, `accept` (with verification), `decide_exit`, `compact_kv`, and what comes after the
base's forward: `accept`, `compact_kv` and `decide_exit`, one after the other. Every result is first compared with one
that was found without these ops; a wrong one has no speed. Times are medians of replayed CUDA graphs
(benchmarks/timer.py), but for the releases' pipeline, which asks the device for values. They are compared with

    floor = bytes / measured bandwidth
    bytes = inputs, results, and the state that is read and written, once

which limits `sample_targets` and `compact_kv`; the other ops have so few bytes that launches set their time.

Goals, for an H200 and a model of 36 layers with 151,936 tokens; none is a result:

    after the forward     15 µs for one sequence, twice the floor for 32
    sample_targets        1.5 times the floor where every row is greedy, 4 times with top-p
    build_tree            8 µs for up to 32 sequences
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from benchmarks import command_line
from benchmarks.step_ops_cells import ALL, CPU, SUBSET
from benchmarks.step_ops_peers import PEERS, ours


def main() -> int:
    """Exit status: 0, or 1 where ours has a cell without a time."""
    return command_line.main(
        command_line.Benchmark(
            description=__doc__,
            op="accept",
            ours=ours(),
            peers=PEERS,
            usual=("release", "compiled"),
            full=("release", "twin", "compiled"),
            cpu_peers=PEERS["release"],
            subset=SUBSET,
            all=ALL,
            cpu=CPU,
            goals=len(SUBSET),  # all cells have the quick peers before any is compiled
            budget=18,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
