"""Host copies of what the last steps have published, read when they have arrived: the host never waits for a step
that it has just launched."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

Note = TypeVar("Note")


class Ring(Generic[Note]):
    """Copies on their way from the device, in order, each with a note. On a GPU they are in pinned memory, and so
    copied while the device works on; on a CPU they are plain copies."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, Note]] = deque()
        self._free: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __len__(self) -> int:
        """How many have been pushed and not been popped."""
        return len(self._waiting)

    def push(self, source: Tensor, note: Note) -> None:
        """Copy `source` as it will be when the current stream has come so far. All sources have one shape."""
        if self._free:
            copy, event = self._free.pop()
        else:
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            event = torch.cuda.Event() if source.is_cuda else None
        copy.copy_(source, non_blocking=True)
        if event is not None:
            event.record()
        self._waiting.append((copy, event, note))

    def pop(self) -> tuple[Tensor, Note]:
        """The oldest copy, when it has arrived, and its note. The tensor is valid until the next `push`."""
        copy, event, note = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        self._free.append((copy, event))
        return copy, note
