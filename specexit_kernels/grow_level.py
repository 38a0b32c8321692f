"""One level of a draft tree as `grow_beam` grows it, and what the next level reads of the beams that it grew from.

    beam hidden[i] = hidden[m]        beam visible[i] = visible[m] | own[i]        m: the beam that beam i grew from

A beam token's input is the hidden row that predicted it. It sees what that row saw, and itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, triton
from specexit_kernels._op import Op
from specexit_kernels.grow_beam import check_arguments as check_beam
from specexit_kernels.grow_beam import grow_beam_ref, triton_limit
from specexit_kernels.grow_beam import outputs as beam_outputs

_Grown = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def grow_level_ref(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, hidden: Tensor, visible: Tensor, own: Tensor, beams: int
) -> _Grown:
    """The meaning of `grow_level` in plain PyTorch: CPU path and test oracle."""
    candidates, beam_tokens, chosen, beam_scores = grow_beam_ref(tokens, logprobs, scores, beams)
    parent = chosen.div(tokens.shape[2], rounding_mode="floor").long().unsqueeze(2)
    beam_hidden = hidden.gather(1, parent.expand(-1, -1, hidden.shape[2]))
    beam_visible = visible.gather(1, parent.expand_as(own)) | own
    return candidates, beam_tokens, chosen, beam_scores, beam_hidden, beam_visible


def outputs(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, hidden: Tensor, visible: Tensor, own: Tensor, beams: int
) -> _Grown:
    """The op's results, empty."""
    batch, _, size = hidden.shape
    rows = hidden.new_empty(batch, beams, size), visible.new_empty(batch, beams, visible.shape[2])
    return *beam_outputs(tokens, logprobs, scores, beams), *rows


_OP = Op(
    "grow_level(Tensor tokens, Tensor logprobs, Tensor scores, Tensor hidden, Tensor visible, Tensor own, int beams)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    grow_level_ref,
    outputs,
)


def _triton_limit(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, hidden: Tensor, visible: Tensor, *arguments: Any
) -> str | None:
    if visible.shape[2] == 0:
        return f"visible must have words, was {list(visible.shape)}"
    return triton_limit(tokens, logprobs, scores) or triton.tensor_limit("hidden", hidden)


triton.register(_OP, "grow_beam", _triton_limit)


def grow_level(
    tokens: Tensor,
    logprobs: Tensor,
    scores: Tensor,
    hidden: Tensor,
    visible: Tensor,
    own: Tensor,
    beams: int,
    *,
    implementation: str | None = None,
) -> _Grown:
    """Grow a level of M beams as `grow_beam` does, and gather what the next level reads; on a GPU in one launch.

    tokens, logprobs, scores, beams  as for `grow_beam`
    hidden        [B, M, H] x (fp32, bf16, fp16 or fp64), last stride 1: the beams' hidden rows
    visible       [B, M, W] int64, last stride 1: the scratch slots that each beam sees, packed
    own           [B, beams, W] int64, last stride 1: bits that the next beams see besides, their own
    candidate scores, beam tokens, beam candidates, beam scores  as of `grow_beam`
    beam hidden   [B, beams, H] x: of the beam that each grew from
    beam visible  [B, beams, W] int64

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, stride, device or number of beams.
    """
    sizes: dict[str, int] = {}
    check_beam(tokens, logprobs, scores, beams, sizes)
    _checks.tensor("hidden", hidden, ("B", "M", "H"), _checks.FLOATS_64, sizes, tokens)
    _checks.tensor("visible", visible, ("B", "M", "W"), torch.int64, sizes, tokens)
    _checks.tensor("own", own, ("B", beams, "W"), torch.int64, sizes, tokens)
    for name, value in (("hidden", hidden), ("visible", visible), ("own", own)):
        _checks.unit_stride(name, value)
    arguments = (tokens, logprobs, scores, hidden, visible, own, beams)
    candidates, beam_tokens, chosen, beam_scores, beam_hidden, beam_visible = _OP(
        *arguments, implementation=implementation
    )
    return candidates, beam_tokens, chosen, beam_scores, beam_hidden, beam_visible
