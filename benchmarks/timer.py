"""The timer of all benchmarks: the time of one call on a device, and the two ceilings it is compared with.

On a GPU, CUDA events around many calls, which a CUDA graph replays where it can: a decode step is a graph too, and
launching from Python would take longer than a small kernel runs. On a CPU, the clock, behind the same interface.

Caches are cold when the caller passes one call for each of several copies of the inputs, which together exceed twice
the L2 cache (`copies_for_cold_cache`): they are called in turn, so each finds the others' data in the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import torch

Call = Callable[[], object]

SAMPLE = 1e-3  # seconds that one sample should last: an event is exact to about half a microsecond
MAX_SAMPLES = 50
GRAPH_CALLS = 64, 256  # of a graph: enough that starting it does not count, few enough to record it quickly
SMALL = 5e-3  # seconds: a call that takes longer gains nothing from a graph, which would keep its buffers


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    microseconds  median over the samples
    spread        20th and 80th percentile, µs
    samples       how many were taken
    calls         of a sample, which is their mean
    method        "graph" (replays of a CUDA graph), "events" (launched from Python) or "clock" (a CPU)
    note          why there is no graph although one was wanted; else empty
    """

    microseconds: float
    spread: tuple[float, float]
    samples: int
    calls: int
    method: str
    note: str = ""


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured: the denominators of "fraction of the floor".

    bytes_per_second  read and written by a large copy
    flops_per_second  of a large matrix product of random numbers (zeros would draw less power and clock higher)
    """

    bytes_per_second: float
    flops_per_second: float


def measure(
    calls: Sequence[Call], device: torch.device | str, *, graph: bool = True, seconds: float = 0.1, warm_up: int = 1
) -> Timing:
    """The time of one of `calls`, which do the same on copies of the inputs.

    graph    record the calls as a CUDA graph and replay it; where that fails they are launched one by one
    seconds  about how long to measure; a call that takes longer is timed once
    warm_up  rounds over all calls before that; the first compiles what is compiled on first use
    """
    if not calls:
        raise ValueError("calls must have at least one call, was empty")
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _measure_cuda(calls, graph, seconds, warm_up)
    for _ in range(warm_up):
        _all(calls)
    return _sampled(lambda: _all(calls), len(calls), _clock, "clock", "", seconds)


def _measure_cuda(calls: Sequence[Call], graph: bool, seconds: float, warm_up: int) -> Timing:
    # A graph is not recorded on the default stream. Everything runs on the stream that records, because libraries set
    # up a workspace for each stream, and that must not happen while it records.
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    note = ""
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            _all(calls)
        estimate = _events(lambda: _all(calls), 1)[0] / len(calls)
        if graph and estimate < SMALL:
            rounds = _rounds(estimate, len(calls))
            recorded, note = _record(calls, rounds, stream)
            if recorded is not None:
                try:
                    recorded.replay()  # the first uploads the graph
                    return _sampled(recorded.replay, rounds * len(calls), _events, "graph", "", seconds)
                finally:
                    stream.synchronize()
                    recorded.reset()
        return _sampled(lambda: _all(calls), len(calls), _events, "events", note, seconds)


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _rounds(estimate: float, calls: int) -> int:
    """How often a graph goes through the calls. `estimate`, the seconds of a call, is too high where launching takes
    longer than running; so small calls get a number of them, and larger ones the time of a sample, or some of them."""
    estimate = max(estimate, 1e-7)
    few, many = GRAPH_CALLS
    wanted = min(max(SAMPLE / estimate, few), 20 * SAMPLE / estimate, many)
    return max(1, math.ceil(wanted / calls))


def _record(calls: Sequence[Call], rounds: int, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """The calls as a graph, or why they cannot be one."""
    stream.synchronize()
    # The buffers that the warm-up left in the allocator would otherwise stay beside the graph's own.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(rounds):
                _all(calls)
        except BaseException:
            with suppress(RuntimeError):  # the capture is void already, and ending it says so once more
                graph.capture_end()
            raise
        graph.capture_end()
    except Exception as error:  # whatever a peer does that a capture forbids
        return None, f"no graph: {first_line(error)}"
    return graph, ""


def _sampled(
    run: Call, calls: int, timed: Callable[[Call, int], list[float]], method: str, note: str, seconds: float
) -> Timing:
    """Samples of `run`, which makes `calls` calls. `timed(run, n)` gives the seconds of n runs one after the other."""
    once = timed(run, 1)[0]
    if once >= seconds:
        samples, repeats = [once], 1
    else:
        repeats = max(1, math.ceil(SAMPLE / max(once, 1e-7))) if method != "graph" else 1
        count = max(3, min(MAX_SAMPLES, int(seconds / max(once * repeats, 1e-7))))

        def repeated() -> None:
            for _ in range(repeats):
                run()

        samples = timed(repeated, count)
    samples = sorted(sample * 1e6 / (repeats * calls) for sample in samples)

    def percentile(fraction: float) -> float:
        return samples[round(fraction * (len(samples) - 1))]

    return Timing(percentile(0.5), (percentile(0.2), percentile(0.8)), len(samples), repeats * calls, method, note)


def _events(run: Call, count: int) -> list[float]:
    """Seconds of each of `count` runs on the current stream. They are queued without waiting, so that the GPU does not
    idle between two of them as long as launching is quicker than running."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairwise(events)]


def _clock(run: Call, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def copies_for_cold_cache(size: int, device: torch.device | str) -> int:
    """How many copies of inputs of `size` bytes exceed twice the device's L2 cache together; 1 on a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
    return 2 * cache // max(size, 1) + 1


def ceilings(device: torch.device | str) -> Ceilings:
    """Measure the device's memory bandwidth (a copy of 2 GiB) and matrix rate (an 8192³ product in bf16).

    On a CPU, 64 MiB and a 512³ product in fp32: enough to try the benchmarks, no statement about the CPU.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    return Ceilings(_bandwidth(2**31 if gpu else 2**26, device), _matrix_rate(side, dtype, device))


def _bandwidth(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, graph=False, seconds=0.2, warm_up=2)
    return 2 * size / copy.microseconds * 1e6


def _matrix_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = measure([lambda: torch.mm(a, b, out=out)], device, graph=False, seconds=0.2, warm_up=3)
    return 2 * side**3 / product.microseconds * 1e6


def first_line(error: BaseException, limit: int = 160) -> str:
    """What went wrong, in a line of a table."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:limit]
