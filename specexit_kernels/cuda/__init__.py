"""CUDA kernels of the native module, as implementations of the ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, native
from specexit_kernels._op import Op


def register(op: Op, limit: Callable[..., str | None] | None = None) -> None:
    """Add the kernel of an op: `<op>_cuda` of the module `<op>` of this package."""
    op.register_module("cuda", f"{__name__}.{op.name}", native.absent(), limit)


def tree_limit(name: str, nodes: int) -> str | None:
    """Why no kernel takes trees of so many nodes; None where they do."""
    most = native.load().max_nodes
    return f"{name} must have at most {most} nodes, had {nodes}" if nodes > most else None


def dense_limit(name: str, struct: type[Any], tensors: list[Tensor]) -> str | None:
    """Why no kernel takes these tensors, the first fields of a struct; None where they do."""
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            field = fields(struct)[index].name
            return f"{name}.{field} must be contiguous, had strides {list(tensor.stride())}"
    return None


def device_limit(name: str, tensor: Tensor) -> str | None:
    """Why no kernel runs where this tensor is; None where they do."""
    if reason := _checks.gpu_limit(name, tensor):
        return reason
    if tensor.is_cuda and (reason := _no_code(tensor.device)):
        return f"{name} is on {tensor.device}, for which the native module has no code ({reason})"
    return None


@functools.cache
def _no_code(device: torch.device) -> str | None:
    """Why the module, which may have been built for few architectures, cannot run on a GPU; None where it can."""
    try:
        with torch.cuda.device(device):
            native.load().selected_architecture()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        return str(error)
    return None
