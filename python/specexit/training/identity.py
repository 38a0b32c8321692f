"""What tells one base, and one tokenizer, from another: traces, drafts and thresholds belong to one of each.

A fingerprint is short enough for a file's header and takes a moment to compute: it reads a few values of every weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from specexit.thinking import Tokenizer

VALUES = 64  # of every parameter: a training step changes them all


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: their names, shapes and first values, tied ones once.

    Values are rounded to bfloat16, so that a checkpoint has one fingerprint in whatever precision it is loaded.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.detach().reshape(-1)[:VALUES]
        if first.is_floating_point():
            first = first.bfloat16().view(torch.int16)
        digest.update(f"{name} {list(parameter.shape)} {first.tolist()}\n".encode())
    return digest.hexdigest()


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


def check_header(header: Mapping[str, Any], model: nn.Module, tokenizer: Tokenizer, path: object) -> None:
    """Raise ValueError where a file of traces was made with another base or tokenizer. `header`: the file's."""
    check_base(str(header.get("base")), model, str(path))
    check_tokenizer(str(header.get("tokenizer")), tokenizer, str(path))


def _check(recorded: str, found: str, what: str, kind: str) -> None:
    if recorded != found:
        raise ValueError(f"{what} is of another {kind}: made with {recorded[:12]}, this one is {found[:12]}")
