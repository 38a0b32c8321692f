"""The parts of a decode step: how long each takes, how many operations it is, what it launches and waits for."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from statistics import median
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from specexit import engine, step
from specexit.sampling import Choose

# The order of a step. `step` is the whole of it; "other" is what no part covers.
PARTS = ("propose", "build_tree", "base", "choose", "accept", "compact_kv", "observe", "decide_exit")
VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "expand", "transpose", "permute", "slice", "select", "detach", "t"}
VIEWS |= {"alias", "flatten", "unflatten", "split", "unbind", "chunk", "as_strided", "_unsafe_view", "expand_as", "to"}
VIEWS |= {"_reshape_alias", "diagonal", "unfold", "contiguous"}

# Calls of the CUDA runtime and driver, by what their names begin with. Copies are launched too.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpy", "cuMemcpy", "cudaMemset")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
TRANSFERS = ("Memcpy", "Memset")  # on the device, where they are no kernels
RANGE, PREFIX = "specexit call", "specexit part: "
CALLER: Any = engine  # the module whose `decode_step` decoding calls


class Meter(TorchDispatchMode):
    """Time and tensor operations of each part; views, which compute nothing, are not counted.

    The device is waited for around each part, so that on a GPU the times add up to more than a step takes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.parts = ["other"]
        self.operations: Counter[str] = Counter()
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            self.operations[self.parts[-1]] += 1
        return func(*args, **(kwargs or {}))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.parts.append(part)
            self._wait()
            began = time.perf_counter()
            try:
                with self._range(part):
                    result = function(*args, **kwargs)
                    self._wait()
                return result
            finally:
                self.times[part].append(time.perf_counter() - began)
                self.parts.pop()

        return run

    def milliseconds(self, part: str) -> float | None:
        """Median; None for a part that no step has."""
        return 1000 * median(self.times[part]) if part in self.times else None

    def by_part(self) -> dict[str, float]:
        """Microseconds of each part in a step, the mean, and of what is outside all parts."""
        count = len(self.times["step"])
        parts = {part: 1e6 * sum(self.times[part]) / count for part in PARTS}
        return {**parts, "other": 1e6 * sum(self.times["step"]) / count - sum(parts.values())}

    def _range(self, part: str) -> AbstractContextManager[Any]:
        """For a profiler, which only a GPU needs: it would count as an operation."""
        return record_function(PREFIX + part) if self.device.type == "cuda" else nullcontext()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Put the meter around every part of the steps that are taken inside the block."""
    decode_step = step.decode_step

    def whole(base: Any, draft: Any, config: Any, choose: Any, rules: Any, buffers: Any) -> Any:
        if draft is not None:
            draft = _Metered(draft, meter, "propose", "observe")
        base, chosen = _Metered(base, meter, forward="base"), meter.timed("choose", choose)
        return decode_step(base, draft, config, cast(Choose, chosen), rules, buffers)

    with ExitStack() as stack:
        for part in ("accept", "compact_kv", "decide_exit", "build_tree"):
            stack.enter_context(patch.object(step, part, meter.timed(part, getattr(step, part))))
        stack.enter_context(patch.object(CALLER, "decode_step", meter.timed("step", whole)))
        yield


class _Metered:
    """An object with a meter around some of its methods; parts are named as they are, or as given."""

    def __init__(self, of: Any, meter: Meter, *methods: str, **named: str) -> None:
        self._of = of
        for method, part in {**{name: name for name in methods}, **named}.items():
            setattr(self, method, meter.timed(part, getattr(of, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class Event(NamedTuple):
    """What a profile has of one call or kernel, in microseconds."""

    name: str
    on_device: bool
    begin: float
    end: float


def profiled(call: Callable[[], object], device: torch.device) -> list[Event]:
    """What one call launches, waits for and runs on a GPU, and around it the event RANGE; of a CPU nothing."""
    if device.type != "cuda":
        return []
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        with record_function(RANGE):
            call()
        torch.cuda.synchronize(device)
    return [
        Event(event.name, event.device_type != DeviceType.CPU, event.time_range.start, event.time_range.end)
        for event in found.events()
    ]


def counted(events: Sequence[Event]) -> dict[str, Any]:
    """Of one call: what the host launches, how many kernels run, and how often the host waits. None where the profiler
    sees no launch: it has not seen the GPU."""
    calls = []
    for whole in (event for event in events if event.name == RANGE and not event.on_device):
        calls += [e.name for e in events if not e.on_device and whole.begin <= e.begin <= whole.end]
    launches = sum(name.startswith(LAUNCHES) for name in calls)
    if not launches:
        return {"launches": None, "kernels": None, "syncs": None}
    syncs = sum(name.startswith(SYNCS) for name in calls)
    return {"launches": launches, "kernels": sum(map(_is_kernel, events)), "syncs": syncs}


def kernel_times(events: Sequence[Event]) -> dict[str, float]:
    """Microseconds of the kernels of each part, and of those outside all parts, from a profile of a metered step. The
    meter waits at both ends of a part, so that its kernels run between them."""
    ranges = [(e.name.removeprefix(PREFIX), e) for e in events if e.name.startswith(PREFIX) and not e.on_device]
    kernels = list(filter(_is_kernel, events))
    if not kernels:  # the profiler has not seen the GPU
        return {}
    times = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in kernels:
        owners = (part for part, whole in ranges if part in PARTS and whole.begin <= event.begin <= whole.end)
        times[next(owners, "other")] += event.end - event.begin
    return times


def _is_kernel(event: Event) -> bool:
    return event.on_device and not event.name.startswith((RANGE, PREFIX, *TRANSFERS))
