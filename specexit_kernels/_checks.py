"""Argument checks of the public functions. Each names the argument, what it must be and what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_64 = (*FLOATS, torch.float64)  # the twins also run in float64, as a reference for the error tables


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(
    name: str,
    value: object,
    shape: Sequence[str | int],
    dtype: torch.dtype | Sequence[torch.dtype],
    sizes: dict[str, int],
    like: Tensor | None = None,
) -> Tensor:
    """Check one tensor and return it.

    shape   one entry an axis: a number is that size; a name is bound to the size seen first in `sizes`, and must
            agree afterwards
    dtype   the dtype, or those allowed
    like    the tensor whose device it must share
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    """
    # On a CPU these checks run dozens of times a decode step, so what is right must pass quickly.
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, was {type(value).__name__}")
    if value.dtype is not dtype and (isinstance(dtype, torch.dtype) or value.dtype not in dtype):
        wanted = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        raise TypeError(f"{name} must be {_names(wanted)}, was {_names((value.dtype,))}")
    found = value.shape
    if len(found) != len(shape):
        raise ValueError(f"{name} must be {_shape(shape, sizes)}, was {list(found)}")
    for want, size in zip(shape, found, strict=True):
        if size != want and (isinstance(want, int) or sizes.setdefault(want, size) != size):
            raise ValueError(f"{name} must be {_shape(shape, sizes)}, was {list(found)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, was on {value.device}")
    return value


def _shape(shape: Sequence[str | int], sizes: Mapping[str, int]) -> str:
    """[B=2, T=12, 3]: names with the sizes that other arguments gave them."""
    axes = [f"{a}={sizes[a]}" if isinstance(a, str) and a in sizes else str(a) for a in shape]
    return f"[{', '.join(axes)}]"


def unit_stride(name: str, value: Tensor) -> None:
    """The last axis must be dense: kernels load it in vectors, and nothing is copied silently."""
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 in its last axis, was {value.stride(-1)}; call .contiguous()")


def between(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, was {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, was {value}")


def positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, was {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, was {value}")


def gpu_limit(name: str, value: Tensor) -> str | None:
    """Why no kernel runs on the GPU that holds a tensor; None where they do."""
    if value.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(value.device) < (8, 0)):
        return f"{name} must be on an NVIDIA GPU of compute capability 8.0 or above, was on {value.device}"
    return None


def double_limit(name: str, value: Tensor) -> str | None:
    """Why no kernel takes a tensor in float64, which is for the twins; None of another dtype."""
    return f"{name} must be float32, bfloat16 or float16, was float64" if value.dtype == torch.float64 else None
