"""Inside or outside the thinking text: the state that the last start or end marker left.

A marker is a sequence of one or several token ids, matched as a suffix of the text. If both end at one token, it is
the end that holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def thinking_states(
    tokens: Tensor, count: Tensor, read: Tensor, tail: Tensor, thinking: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Whether each token of a run stands inside the thinking text: the state before it, and, last, after the run.

    tokens    [R, B] int32
    count     [R, 1] int32: 1 .. R
    read      [R, B] bool: tokens that are not read do not count as markers; they are the last ones
    tail      [B, M] int32: the M tokens before the run; M >= longest marker - 1
    thinking  [B] int32: 1 if the run begins inside the thinking text
    start     [Fs] int32, may be empty
    end       [Fe] int32, may be empty
    returns   [R + 1, B] bool
    """
    # A marker is coded by its place, times two, plus 1 if thinking starts: the largest code so far is the last marker.
    code = count * 2
    marks = None
    if start.numel():
        marks = ends_with(tokens, tail, start) * (code + 1)
    if end.numel():
        at_end = ends_with(tokens, tail, end)
        marks = at_end * code if marks is None else torch.where(at_end, code, marks)
    before = thinking.unsqueeze(0)
    if marks is None:
        return before.bool().expand(tokens.shape[0] + 1, -1)
    return (torch.cat([before, marks.mul_(read)]).cummax(0).values & 1).bool()


def ends_with(tokens: Tensor, tail: Tensor, marker: Tensor) -> Tensor:
    """Whether the text up to each token ends with the marker: [R, B], [B, M], [k] int32 -> [R, B] bool."""
    length = marker.numel()
    if length == 1:
        return tokens == marker
    text = torch.cat([tail.t()[tail.shape[1] - (length - 1) :], tokens])
    return (text.unfold(0, length, 1) == marker).all(-1)
