"""Inside or outside the thinking text: the state that the last start or end marker left.

A marker is a sequence of one or several token ids, matched as a suffix of the text. If both end at one token, it is
the end that holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def thinking_states(
    tokens: Tensor, ignored: Tensor, tail: Tensor, thinking: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Whether each token of a run stands inside the thinking text: the state before it, and, last, after the run.

    tokens    [R, B] int32
    ignored   [R, B] bool: tokens at which no marker counts
    tail      [B, M] int32: the M tokens before the run; M >= longest marker - 1
    thinking  [B] int32: 1 if the run begins inside the thinking text
    start     [Fs] int32, may be empty
    end       [Fe] int32, may be empty
    returns   [R + 1, B] bool
    """
    rows = tokens.shape[0]
    before = thinking.unsqueeze(0)
    # A marker at token r is coded 2 (r + 1), plus 1 if thinking starts: the largest code so far is the last marker.
    marks = None
    if start.numel():
        codes = torch.arange(3, 2 * rows + 3, 2, dtype=torch.int32, device=tokens.device).unsqueeze(1)
        marks = codes.masked_fill(_misses(tokens, tail, start), 0)
    if end.numel():
        codes = torch.arange(2, 2 * rows + 2, 2, dtype=torch.int32, device=tokens.device).unsqueeze(1)
        misses = _misses(tokens, tail, end)
        marks = codes.masked_fill(misses, 0) if marks is None else torch.where(misses, marks, codes)
    if marks is None:
        return before.bool().expand(rows + 1, -1)
    return (torch.cat([before, marks.masked_fill_(ignored, 0)]).cummax(0).values & 1).bool()


def _misses(tokens: Tensor, tail: Tensor, marker: Tensor) -> Tensor:
    """Whether the text up to each token does not end with the marker: [R, B], [B, M], [k] int32 -> [R, B] bool."""
    length = marker.numel()
    if length == 1:
        return tokens != marker
    text = torch.cat([tail.t()[tail.shape[1] - (length - 1) :], tokens])
    return (text.unfold(0, length, 1) != marker).any(-1)
