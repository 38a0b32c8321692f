"""What tells one model's weights from another's, whatever dtype and device they are loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_VALUES = 64  # of a parameter of a base: another training has other values from the first on


def base_fingerprint(model: nn.Module) -> str:
    """Of a base: the names and shapes of its parameters, and the first values of each, rounded to bfloat16.

    A few kilobytes are read, so it takes no time for a model of any size.
    """
    content = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.detach().reshape(-1)[:_VALUES]
        if first.is_floating_point():  # quantised weights are integers
            first = _bits(first)
        content.update(f"{name} {list(parameter.shape)} {first.tolist()}\n".encode())
    return content.hexdigest()


def draft_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of a draft's tensors by their names in the file: every value counts, rounded to bfloat16.

    A draft may be fitted again in a few rows alone, those of its signals, so the first values would not do. Beside them
    go the sum of all values' bits, and of each times its place: integers, so no order of summing shows.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = _bits(tensor.detach().reshape(-1)).long()
        place = torch.arange(1, len(values) + 1, device=values.device)
        sums = int(values.sum()), int((values * place).sum())  # int64 wraps around, everywhere alike
        content.update(f"{name} {list(tensor.shape)} {sums} ".encode())
    return content.hexdigest()


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).contiguous().view(torch.int16)
