"""Every operator on CUDA, by every implementation that is there, against its twin on the CPU.

None of them may wait for the device, and a CUDA graph must be able to capture each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_samples import SAMPLES, assert_same, on
from step_checks import Count, compare

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


def assert_right(name: str, sample: dict[str, Any], there: dict[str, Any], actual: Any) -> None:
    """`actual` is the op's result of copies of `sample`, which are `there` now."""
    if name in ("sample_targets", "decide_exit"):  # where a rounding may decide
        compare(name, sample, there, actual, Count())
        return
    here = on("cpu", sample)
    expected = getattr(specexit_kernels, name)(**here, implementation="torch")
    assert_same([actual, there], [expected, here])


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_equals_the_twin_without_a_synchronisation(name, implementation, rng):
    require(name, implementation)
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        there = on("cuda", sample)
        with no_synchronisation():
            actual = operator(**there, implementation=implementation)
        assert_right(name, sample, there, actual)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_a_cuda_graph_replays_it(name, implementation, rng):
    require(name, implementation)
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        there = on("cuda", sample)
        operator(**on("cuda", sample), implementation=implementation)  # libraries and kernels are loaded now
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = operator(**there, implementation=implementation)
        graph.replay()
        assert_right(name, sample, there, actual)
