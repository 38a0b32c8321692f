"""Every operator on CUDA, by every implementation that is there, against its twin on the CPU.

None of them may wait for the device, and a CUDA graph must be able to capture each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_samples import SAMPLES, on, tensors
from tolerances import assert_close

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


def compare(actual: Any, expected: Any, name: str) -> None:
    lowest = min((t.dtype for t in tensors(expected) if t.is_floating_point()), key=lambda d: d.itemsize, default=None)
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        if e.is_floating_point():
            assert_close(a.cpu(), e, lowest)  # fp32 results of 16-bit inputs: the inputs set what is exact
        else:
            assert torch.equal(a.cpu(), e), name


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_equals_the_twin_without_a_synchronisation(name, implementation, rng):
    require(name, implementation)
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        here, there = on("cpu", sample), on("cuda", sample)
        expected = operator(**here, implementation="torch")
        with no_synchronisation():
            actual = operator(**there, implementation=implementation)
        compare([actual, there], [expected, here], name)


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
        compare([actual, there], [expected, here], name)
