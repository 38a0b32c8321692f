"""A function of fixed tensors as a CUDA graph: recorded once, then replayed without Python or launches of its own."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that need a value on the host, or whose output's shape depends on one.
WAITING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "argwhere",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",  # torch.tensor of host data
    "lift_fresh_copy",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = ("index.", "index_put", "_unsafe_index", "_index_put")


class Recording(Protocol):
    """What a recorder makes of a function: the function again, on the same tensors."""

    def replay(self) -> None: ...

    def reset(self) -> None:
        """Give back what it holds. It is not replayed again."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps for the function's intermediate results."""
        ...


Recorder = Callable[[Callable[[], None]], Recording]


class CudaGraph:
    """A function captured on the current stream, which must not be the default one. It is not executed.

    Raises whatever the function raises, or RuntimeError where it does what a capture forbids.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._stream = torch.cuda.current_stream()
        self._stream.synchronize()
        torch.cuda.empty_cache()  # what a warm-up has left there would stay beside the graph's own memory
        before = torch.cuda.memory_reserved()
        # The workspace that cuBLAS keeps for the stream must be the graph's own too: others may give that one back.
        torch._C._cuda_clearCublasWorkspaces()
        collecting = gc.isenabled()
        gc.disable()  # a graph or memory that is collected meanwhile would void the capture
        try:
            self._graph = _captured(function)
        finally:
            if collecting:
                gc.enable()
            torch._C._cuda_clearCublasWorkspaces()
        self.nbytes = torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._stream.synchronize()  # it may be running
        self._graph.reset()


def _captured(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.inference_mode(False):  # random generators get a state that other captures must be able to write
        # Other threads may use the GPU meanwhile: a consumer of a stream, a data loader.
        graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        function()
        graph.capture_end()
    except BaseException:
        _abandon(graph, pool)
        raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a capture that has failed. Where it is void, `capture_end` raises before it has ended torch's part of it (as
    the sources of torch 2.11 have it): the allocator and the random generators would stay in it."""
    with suppress(RuntimeError):
        graph.capture_end()
        return
    for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):
            end(torch.cuda.current_device(), pool)
    _ABANDONED.append(graph)
    with suppress(RuntimeError):  # a capture that succeeds ends it for the generators
        empty = torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()


_ABANDONED: list[torch.cuda.CUDAGraph] = []  # the allocator may point into them as long as the process lives


def recorder(device: torch.device) -> Recorder | None:
    """What records a step on this device; None: nothing does, and the function is called each time."""
    return CudaGraph if device.type == "cuda" else None


@contextmanager
def noting_waits() -> Iterator[list[str]]:
    """Collects what torch says of operations in the block that wait for a GPU; those inside operators too."""
    found: list[str] = []
    if not torch.cuda.is_initialized():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            found.append(f"{text.strip()} ({warning.filename}:{warning.lineno})")
        elif "debug mode" not in text:  # of the mode itself
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Replayed:
    """Calls a function as it is at first, which sets up whatever is set up on first use; then records it, and from then
    on replays that.

    A function that cannot be recorded is called each time, and a warning says why.

    record  None: nothing does
    watch   notes what waits for the device in a call; a first call may, but not the second
    """

    def __init__(
        self,
        record: Recorder | None,
        watch: Callable[[], AbstractContextManager[list[str]]] = noting_waits,
    ) -> None:
        self._record = record
        self._watch = watch
        self._warm: int | None = None  # the thread of the last call, as libraries set up something for each thread
        self._waited = False
        self.recording: Recording | None = None
        self.refused = False  # it was tried in vain

    def __call__(self, function: Callable[[], None]) -> None:
        if self.recording is None and self._record is not None:
            if self._warm != threading.get_ident():
                self._warm_up(function)
                return
            self.recording = self._recorded(self._record, function)
        if self.recording is not None:
            self.recording.replay()
        else:
            function()

    @property
    def records(self) -> bool:
        """Whether there is a recording, or may yet be one."""
        return self._record is not None

    def reset(self) -> None:
        """Forget the recording: what it reads or writes is about to move."""
        if self.recording is not None:
            self.recording.reset()
        self.recording, self._warm = None, None

    def _warm_up(self, function: Callable[[], None]) -> None:
        with self._watch() as waits:
            function()
        if not waits:
            self._warm = threading.get_ident()
        elif self._waited:
            self._refuse(f"it waits for the device: {waits[0]}")
        self._waited = bool(waits)

    def _recorded(self, record: Recorder, function: Callable[[], None]) -> Recording | None:
        try:
            return record(function)
        except torch.OutOfMemoryError as error:
            self._refuse(f"its memory does not fit beside what is there ({_first_line(error)})")
        except RuntimeError as error:
            self._refuse(_first_line(error))
        return None

    def _refuse(self, reason: str) -> None:
        self._record, self.refused = None, True
        warn_uncaptured(reason)


def warn_uncaptured(reason: str) -> None:
    """Say that steps are launched from Python, and why."""
    warnings.warn(f"the decode step is not captured in a CUDA graph, which makes it slower: {reason}", stacklevel=2)


class Waits(TorchDispatchMode):
    """Watches for operations on `device_type` that wait for the device, which a graph cannot hold.

    found  the names of those that ran
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self._here(given) and (waits(func, args) or self._moves(func, given, made)):
            self.found.add(str(func))
        return out

    def _here(self, tensors: Iterable[Tensor]) -> bool:
        return any(tensor.device.type == self.device_type for tensor in tensors)

    def _moves(self, func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether it copies between host and device."""
        name = func.overloadpacket.__name__
        if name == "copy_":
            return len({tensor.device.type for tensor in given}) > 1
        return name == "_to_copy" and given[0].device.type != made[0].device.type


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation as a dispatch mode sees it, `aten.name.overload`, waits for the device that its tensors are
    on."""
    namespace, _, name = str(func).partition(".")
    if namespace != "aten":
        return False
    if name in WAITING or name.partition(".")[0] in WAITING:
        return True
    if name.startswith(_INDEXING):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
