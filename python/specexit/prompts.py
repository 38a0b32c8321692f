"""Prompts as the decoder needs them: every row at the left, its length beside it.

Padding on either side is only the caller's rectangle. Rows are moved to the left, and what lies beyond a row's length
is never visible and is overwritten by the tokens it generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specexit import checks


@dataclass(frozen=True)
class Prompts:
    """B prompts without padding.

    tokens   [B, P] int32, left-aligned; junk beyond a row's length
    lengths  tokens of each row, at least 1
    """

    tokens: Tensor
    lengths: list[int]

    def row(self, index: int) -> list[int]:
        tokens: list[int] = self.tokens[index, : self.lengths[index]].tolist()
        return tokens


def prompt_ids(prompt: Sequence[int] | Tensor, name: str, vocab_size: int) -> Tensor:
    """One prompt as ids [1, P] int64 on the host. Raises TypeError or ValueError, naming it, for what is none."""
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 and not (prompt.dim() == 2 and prompt.shape[0] == 1):
            raise ValueError(f"{name} must be [P] or [1, P], was {list(prompt.shape)}")
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, was {prompt.dtype}")
        ids = prompt.detach().cpu().long().view(1, -1)
    elif isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise TypeError(f"{name} must be ids or a tensor of them, was {type(prompt).__name__}")
    else:
        checked = checks.ids(name, prompt)
        if max(checked, default=0) >= vocab_size:
            raise ValueError(f"{name} must be in [0, {vocab_size}), the base's vocabulary, was {max(checked)}")
        ids = torch.tensor([checked], dtype=torch.int64)
    pack_prompts(ids, None, vocab_size, name)  # which checks them
    return ids


def pack_prompts(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, name: str = "input_ids") -> Prompts:
    """Check `input_ids` and `attention_mask`, both [B, P] integers, and move every row to the left. `name` is what
    errors call the ids.

    Raises TypeError or ValueError for another shape or type, an empty prompt, a hole in the mask, or an id outside the
    vocabulary.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"{name} must be a tensor, was {type(input_ids).__name__}")
    if input_ids.dim() != 2:
        raise ValueError(f"{name} must be [B, P], was {list(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, was {input_ids.dtype}")
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask must be a tensor, was {type(attention_mask).__name__}")
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be {list(input_ids.shape)} like {name}, was {list(attention_mask.shape)}"
            )
        mask = attention_mask.to(input_ids.device) != 0
    lengths: list[int] = mask.sum(1).tolist()
    if not lengths:
        return Prompts(input_ids.int(), lengths)
    if 0 in lengths:
        raise ValueError(f"{name} must hold at least one token a prompt, row {lengths.index(0)} was empty")
    first = mask.int().argmax(1, keepdim=True)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    within = (columns >= first) & (columns < first + mask.sum(1, keepdim=True))
    if not torch.equal(within, mask):
        raise ValueError("attention_mask must be padding on the left or on the right of each row, had a hole inside")
    outside = mask & ((input_ids < 0) | (input_ids >= vocab_size))
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be in [0, {vocab_size}), the base's vocabulary, was {int(input_ids[row, column])} "
            f"at [{row}, {column}]"
        )
    source = (columns + first).clamp(max=max(input_ids.shape[1] - 1, 0))
    left = input_ids.gather(1, source).where(columns < mask.sum(1, keepdim=True), 0)
    return Prompts(left.int(), lengths)


def left_padded(prompts: Prompts, pad: int) -> tuple[Tensor, Tensor]:
    """The prompts as transformers wants a batch: ids and mask, [B, P] int64, padding on the left."""
    width = max(prompts.lengths, default=0)
    tokens = prompts.tokens[:, :width].long()
    columns = torch.arange(width, device=tokens.device)
    lengths = torch.tensor(prompts.lengths, device=tokens.device).unsqueeze(1)
    shift = width - lengths
    ids = tokens.gather(1, (columns - shift).clamp(min=0))
    mask = columns >= shift
    return ids.where(mask, pad), mask.long()
