"""Triton kernels. They are imported when one is first asked for: importing Triton takes a while."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from specexit_kernels import _checks
from specexit_kernels._op import Op


def absent() -> str | None:
    """Why the Triton kernels cannot be used here and how to get them; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: a CUDA build of torch brings it, or pip install triton"
    return None


def register(op: Op, module: str, limit: Callable[..., str | None]) -> None:
    """Add the kernel of an op: `<op>_triton` of a module of this package."""
    op.register_module("triton", f"{__name__}.{module}", absent(), limit)


def tensor_limit(name: str, tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel takes this argument of floats, whose last axis is read in blocks; None where they do."""
    if tensor.shape[-1] == 0:
        return f"{name} must have entries, was {list(tensor.shape)}"
    return _checks.double_limit(name, tensor) or _checks.gpu_limit(name, tensor)
