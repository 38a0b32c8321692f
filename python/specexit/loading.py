"""The base and its tokenizer from a path or a hub id."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_base(
    name: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    dtype         None: as the checkpoint stores it on a GPU, float32 on a CPU (where bfloat16 is slow)
    device        None: the GPU if there is one
    allow_pickle  accept weights that are not stored as safetensors

    Raises OSError where there is no such model, ValueError for a damaged file.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = dtype or (torch.float32 if place.type == "cpu" else "auto")
    safetensors = None if allow_pickle else True
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, use_safetensors=safetensors)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(name)} cannot be read: {error}") from error
    except OSError as error:
        if not allow_pickle and "safetensors" in str(error):
            raise OSError(f"{error} A pickle is read with allow_pickle=True.") from error
        raise
    loaded: PreTrainedModel = model.to(place).eval()
    return loaded


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the base, or None where there is none: ids can be decoded without."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None
    return tokenizer
