"""Every operator on CUDA, by every implementation that is there, against its twin on the CPU.

None of them may wait for the device, and a CUDA graph must be able to capture each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_samples import SAMPLES, assert_same, on

import specexit_kernels
from specexit_kernels._op import OPS

# None: what the dispatcher takes
CASES = [(name, implementation) for name in sorted(OPS) for implementation in (None, "torch", *OPS[name].kernels)]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def require(name: str, implementation: str | None) -> None:
    kernel = OPS[name].kernels.get(implementation or "")
    if kernel is not None and kernel.absent is not None:
        pytest.skip(kernel.absent)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_equals_the_twin_without_a_synchronisation(name, implementation, rng):
    require(name, implementation)
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        here, there = on("cpu", sample), on("cuda", sample)
        expected = operator(**here, implementation="torch")
        with no_synchronisation():
            actual = operator(**there, implementation=implementation)
        assert_same([actual, there], [expected, here])


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_a_cuda_graph_replays_it(name, implementation, rng):
    require(name, implementation)
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        here, there = on("cpu", sample), on("cuda", sample)
        expected = operator(**here, implementation="torch")
        operator(**on("cuda", sample), implementation=implementation)  # libraries and kernels are loaded now
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = operator(**there, implementation=implementation)
        graph.replay()
        assert_same([actual, there], [expected, here])
