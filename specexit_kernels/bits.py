"""Packed visibility: bit m of word w says that a query may attend scratch slot 64 w + m.

The packed mask is the only mask that exists: a tree of 60 nodes costs 8 bytes a query instead of a dense row.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64


def words(slots: int) -> int:
    """How many int64 words hold one bit for each of `slots` scratch slots (at least one)."""
    return max(1, -(-slots // WORD))


def pack(mask: Tensor) -> Tensor:
    """[..., M] bool -> [..., words(M)] int64."""
    slots = mask.shape[-1]
    word = min(max(slots, 1), WORD)  # a single word needs no padding
    missing = words(slots) * word - slots
    padded = torch.nn.functional.pad(mask, (0, missing)) if missing else mask
    shift = torch.arange(word, device=mask.device)
    # The bits of a word are disjoint, so the sum is their union; bit 63 lands on the sign, as it should.
    return (padded.unflatten(-1, (-1, word)).to(torch.int64) << shift).sum(-1)


def unpack(visible: Tensor, slots: int) -> Tensor:
    """[..., W] int64 -> [..., slots] bool; slots past the words are not visible."""
    shift = torch.arange(WORD, device=visible.device)
    mask = ((visible.unsqueeze(-1) >> shift) & 1).flatten(-2).bool()
    missing = slots - mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, missing)) if missing > 0 else mask[..., :slots]


def chain(batch: int, length: int, device: torch.device | str | None = None) -> Tensor:
    """Bits of a chain, [batch, length, words(length)] int64: node n sees nodes 0 to n."""
    return pack(torch.ones(length, length, dtype=torch.bool, device=device).tril()).expand(batch, -1, -1).contiguous()
