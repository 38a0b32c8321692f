"""The CUDA kernels of a decode step's ops on token ids on a GPU: the host's random cases, graphs, streams and devices.

Under a sanitizer (memcheck, racecheck, synccheck, initcheck), with allocations that it can tell apart, a few of them:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python -P -m pytest -p no:cacheprovider tests/gpu/test_step_ops_cuda.py -k sanitizer
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_samples import SAMPLES, on, tensors
from step_cases import CASES, EDGES, Source, accept_case, build_tree_case, sample_targets_case, verify_tree_case
from step_checks import Count, assert_same_memory, check, compare, copied, cuda_of, kernel_of
from torch import Generator

import specexit_kernels
from specexit_kernels import native

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(native.absent() is not None, reason=str(native.absent()))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin(rng: Generator, name: str) -> None:
    for _ in range(100):
        check(name, CASES[name](Source(rng)), DEVICE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin_in_thousands_of_cases(rng: Generator, name: str) -> None:
    for _ in range(10_000):
        check(name, CASES[name](Source(rng)), DEVICE)


@pytest.mark.parametrize("name", CASES)
def test_sanitizer(rng: Generator, name: str) -> None:
    """Without poisoned results: the sanitizer sees what is not written."""
    for _ in range(8):
        check(name, CASES[name](Source(rng)), DEVICE, operator=cuda_of(name))


@pytest.mark.parametrize("nodes", EDGES)
def test_sizes_at_the_edge_of_a_word_or_a_block(rng: Generator, nodes: int) -> None:
    source = Source(rng)
    check("build_tree", build_tree_case(source, nodes), DEVICE)
    check("verify_tree", verify_tree_case(source, nodes), DEVICE)
    check("accept", accept_case(source, nodes), DEVICE)


@pytest.mark.parametrize("count", [1024, 1025, 4096])
def test_many_candidates(rng: Generator, count: int) -> None:
    check("build_tree", build_tree_case(Source(rng), 256, count), DEVICE)


@pytest.mark.parametrize("vocab", [1, 1024, 2049, 4097, 32_001, 151_936, 262_144])
def test_vocabularies(rng: Generator, vocab: int) -> None:
    for _ in range(3):
        check("sample_targets", sample_targets_case(Source(rng), vocab), DEVICE)


def samples(rng: Generator, name: str) -> list[dict[str, Any]]:
    """Arguments whose shapes and settings are the same in every call."""
    return list(SAMPLES[name](rng))


@pytest.mark.parametrize("name", CASES)
def test_a_graph_serves_other_inputs(rng: Generator, name: str) -> None:
    for index, sample in enumerate(samples(rng, name)):
        fixed = on(DEVICE, sample)
        kernel_of(name)(**on(DEVICE, sample))  # libraries and kernels are loaded now
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = kernel_of(name)(**fixed)
        for _ in range(3):
            fresh = samples(rng, name)[index]
            for there, new in zip(tensors(fixed), tensors(fresh), strict=True):
                there.copy_(new)
            graph.replay()
            compare(name, fresh, fixed, actual, Count())


@pytest.mark.parametrize("name", CASES)
def test_two_streams_do_not_disturb_each_other(rng: Generator, name: str) -> None:
    """Launches that overlap, each with its own arguments, leave the bits that launches one by one do."""
    cases = [samples(rng, name)[-1] for _ in range(40)]
    serial, overlapping = ([on(DEVICE, case) for case in cases] for _ in range(2))
    expected = [kernel_of(name)(**arguments) for arguments in serial]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    actual = []
    for n, arguments in enumerate(overlapping):
        with torch.cuda.stream(streams[n % 2]):
            actual.append(kernel_of(name)(**arguments))
    torch.cuda.synchronize()
    assert_same_memory([actual, overlapping], [expected, serial], name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("name", CASES)
def test_tensors_on_another_device_than_the_current_one(rng: Generator, name: str) -> None:
    assert torch.cuda.current_device() == 0
    for _ in range(10):
        check(name, CASES[name](Source(rng)), "cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", CASES)
def test_on_the_stream_that_is_current(rng: Generator, name: str) -> None:
    """What was queued before on the stream is done before: the arguments are written there, after a long wait."""
    case = samples(rng, name)[-1]
    there = on(DEVICE, case)
    junk = [torch.zeros_like(x) for x in tensors(there)]
    right = [x.clone() for x in tensors(there)]
    for x, zeros in zip(tensors(there), junk, strict=True):
        x.copy_(zeros)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for x, value in zip(tensors(there), right, strict=True):
            x.copy_(value)
        actual = kernel_of(name)(**there)
    stream.synchronize()
    compare(name, case, there, actual, Count())


@pytest.mark.parametrize("name", CASES)
def test_cuda_tensors_take_the_kernel(rng: Generator, name: str) -> None:
    """Without being asked for by name: the same bits."""
    case = samples(rng, name)[-1]
    asked, usual = (copied(case, DEVICE) for _ in range(2))
    expected = cuda_of(name)(**asked)
    assert_same_memory([getattr(specexit_kernels, name)(**usual), usual], [expected, asked], name)
