"""What the launchers of the CUDA kernels share: how a tensor is handed over, and on which stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from specexit_kernels import native

View = tuple[int, ...]  # the address, and the stride of each axis in elements

NOTHING = {axes: (0,) * (axes + 1) for axes in (1, 2, 3)}  # a tensor that is not given


def view(tensor: Tensor | None, axes: int) -> View:
    """A tensor of `axes` axes, or what stands for none."""
    return NOTHING[axes] if tensor is None else (tensor.data_ptr(), *tensor.stride())


@contextmanager
def stream(device: torch.device) -> Iterator[tuple[native.Native, int]]:
    """The native module, and torch's current stream of `device`, which is the current device meanwhile.

    Raises ValueError for tensors that are not on a GPU; kernels that were built to run on the host take those.
    """
    module = native.load()
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield module, torch.cuda.current_stream(device).cuda_stream
        return
    if module.architectures != native.HOST:
        raise ValueError(f"implementation='cuda' needs tensors on a CUDA device, they were on {device}")
    yield module, 0
