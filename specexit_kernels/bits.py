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
    width = words(mask.shape[-1]) * WORD
    padded = torch.nn.functional.pad(mask, (0, width - mask.shape[-1]))
    shift = torch.arange(WORD, device=mask.device)
    # The bits of a word are disjoint, so the sum is their union; bit 63 lands on the sign, as it should.
    return (padded.unflatten(-1, (-1, WORD)).to(torch.int64) << shift).sum(-1)


def unpack(visible: Tensor, slots: int) -> Tensor:
    """[..., W] int64 -> [..., slots] bool; slots past the words are not visible."""
    shift = torch.arange(WORD, device=visible.device)
    mask = ((visible.unsqueeze(-1) >> shift) & 1).flatten(-2).bool()
    return torch.nn.functional.pad(mask, (0, max(0, slots - mask.shape[-1])))[..., :slots]


def chain(batch: int, length: int, device: torch.device | str | None = None) -> Tensor:
    """Bits of a chain, [batch, length, words(length)] int64: node n sees nodes 0 to n."""
    return pack(torch.ones(length, length, dtype=torch.bool, device=device).tril()).expand(batch, -1, -1).contiguous()
