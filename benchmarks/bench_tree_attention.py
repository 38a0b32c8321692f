"""Tree attention against SDPA, FlexAttention and FlashInfer, in one run: microseconds, and the fraction of the floor.

    python benchmarks/bench_tree_attention.py                    # a dozen cells, under a minute on a GPU
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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from benchmarks import attention_model, command_line
from benchmarks.attention_cells import ALL, CPU, GOALS, SUBSET
from benchmarks.attention_peers import PEERS, ours
from benchmarks.harness import Peer


def main() -> int:
    """Exit status: 0, or 1 where ours has a cell without a time."""
    return command_line.main(
        command_line.Benchmark(
            description=__doc__,
            op="tree_attention",
            ours=ours(),
            peers=PEERS,
            usual=("sdpa", "flex"),
            full=("sdpa", "flex", "flashinfer"),
            apart=("flex",),
            cpu_peers=(Peer("torch twin", ours("torch")), PEERS["sdpa"][0]),
            tuning="benchmarks.attention_tuning",
            subset=SUBSET,
            all=ALL,
            cpu=CPU,
            goals=GOALS,
            budget=43,
            show=attention_model.show,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
