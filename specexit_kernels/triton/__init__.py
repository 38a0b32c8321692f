"""Triton kernels. They are imported when one is first asked for: importing Triton takes a while."""

from __future__ import annotations

import importlib.util

import torch


def absent() -> str | None:
    """Why the Triton kernels cannot be used here and how to get them; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: a CUDA build of torch brings it, or pip install triton"
    return None


def tensor_limit(name: str, tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel takes this argument of floats, whose last axis is read in blocks; None where they do."""
    if tensor.shape[-1] == 0:
        return f"{name} must have entries, was {list(tensor.shape)}"
    if tensor.dtype == torch.float64:
        return f"{name} must be float32, bfloat16 or float16, was float64"
    if tensor.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(tensor.device) < (8, 0)):
        return f"{name} must be on an NVIDIA GPU of compute capability 8.0 or above, was on {tensor.device}"
    return None
