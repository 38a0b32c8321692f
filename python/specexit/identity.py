"""What tells one base, one draft and one tokenizer from another: traces, drafts and thresholds belong to one of each.

A fingerprint is short enough for a file's header, and the same in whatever precision and on whatever device the weights
are: values are rounded to bfloat16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specexit.thinking import Tokenizer

VALUES = 64  # of every parameter of a base: a training step changes them all
BLOCK = 2**24  # values of a draft that are summed at a time, in eight times the bytes


def fingerprint(model: nn.Module) -> str:
    """Of a base's weights: their names, shapes and first values, tied ones once. A few kilobytes are read."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.detach().reshape(-1)[:VALUES]
        if first.is_floating_point():  # quantised weights are integers
            first = _bits(first)
        digest.update(f"{name} {list(parameter.shape)} {first.tolist()}\n".encode())
    return digest.hexdigest()


def draft_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of a draft's tensors by their names in the file: every value counts, rounded to bfloat16.

    A draft may be fitted again in a few rows alone, those of its signals, so the first values would not do. Beside them
    go the sum of all values' bits, and of each times its place: integers, so no order of summing shows.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        sums = torch.zeros(2, dtype=torch.int64, device=flat.device)  # int64 wraps around, everywhere alike
        for start in range(0, len(flat), BLOCK):
            values = _bits(flat[start : start + BLOCK]).long()
            place = torch.arange(start + 1, start + 1 + len(values), device=flat.device)
            sums += torch.stack((values.sum(), (values * place).sum()))
        content.update(f"{name} {list(tensor.shape)} {tuple(sums.tolist())} ".encode())
    return content.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Of a tokenizer's vocabulary: which text each id stands for."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_base(recorded: str, model: nn.Module, what: str) -> None:
    """Raise ValueError where `what` was made with another base than this one.

    recorded  the fingerprint of the base that it was made with
    what      names it, as in "the draft in ./draft"
    """
    _check(recorded, fingerprint(model), what, "base")


def check_tokenizer(recorded: str, tokenizer: Tokenizer, what: str) -> None:
    """Raise ValueError where `what` was made with another tokenizer than this one; arguments as in `check_base`."""
    _check(recorded, tokenizer_fingerprint(tokenizer), what, "tokenizer")


def _check(recorded: str, found: str, what: str, kind: str) -> None:
    if recorded != found:
        raise ValueError(f"{what} is of another {kind}: made with {recorded[:12]}, this one is {found[:12]}")


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).contiguous().view(torch.int16)
