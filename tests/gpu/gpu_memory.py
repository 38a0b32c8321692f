"""Arguments of an op, moved to the GPU."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import span


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their tensors on the GPU, with the strides that they have, and the alignment."""
    moved = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.numel() > 0:
            size, odd = span(value), value.data_ptr() % 16 // value.element_size()
            memory = torch.empty(odd + size, dtype=value.dtype, device="cuda")
            memory[odd:].copy_(value.as_strided((size,), (1,)))
            value = memory.as_strided(value.shape, value.stride(), odd)
        elif isinstance(value, torch.Tensor):
            value = value.to("cuda")
        moved[name] = value
    return moved
