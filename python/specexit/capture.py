"""A function of fixed tensors as a CUDA graph: recorded once, then replayed without Python or launches of its own."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
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

    Raises whatever the function raises, or RuntimeError where it does what a capture forbids; nothing is held then.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._stream = torch.cuda.current_stream()
        self._stream.synchronize()
        # A graph that is collected, or memory that is given back, while another is captured would void it.
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: a consumer of a stream, a data loader.
        self._graph.capture_begin(capture_error_mode="thread_local")
        try:
            function()
        except BaseException:
            with suppress(RuntimeError):  # the capture is void already, and ending it says so once more
                self._graph.capture_end()
            raise
        self._graph.capture_end()
        self.nbytes = torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._stream.synchronize()  # it may be running
        self._graph.reset()


def recorder(device: torch.device) -> Recorder | None:
    """What records a step on this device; None: nothing does, and the function is called each time."""
    return CudaGraph if device.type == "cuda" else None


class Replayed:
    """Calls a function: once as it is, which sets up whatever is set up on first use; from then on its recording.

    A function that cannot be recorded is called as it is each time, and a warning says why.
    """

    def __init__(self, function: Callable[[], None], record: Recorder | None) -> None:
        self._function = function
        self._record = record
        self._warm = False
        self.recording: Recording | None = None

    def __call__(self) -> None:
        if self.recording is None and self._warm and self._record is not None:
            self.recording = self._recorded(self._record)
        if self.recording is not None:
            self.recording.replay()
        else:
            self._function()
            self._warm = True

    def reset(self) -> None:
        """Forget the recording: addresses are about to change."""
        if self.recording is not None:
            self.recording.reset()
        self.recording, self._warm = None, False

    def _recorded(self, record: Recorder) -> Recording | None:
        try:
            return record(self._function)
        except torch.OutOfMemoryError as error:
            reason = f"its memory does not fit beside what is there ({_first_line(error)})"
        except RuntimeError as error:
            reason = _first_line(error)
        self._record = None
        warn_uncaptured(reason)
        return None


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
        if self._here(given) and (waits(func, args) or self._moves(func, args, given, made)):
            self.found.add(str(func))
        return out

    def _here(self, tensors: Iterable[Tensor]) -> bool:
        return any(tensor.device.type == self.device_type for tensor in tensors)

    def _moves(self, func: Any, args: tuple[Any, ...], given: list[Tensor], made: list[Tensor]) -> bool:
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
