"""The launch of the Triton kernel that `grow_beam` and `grow_level` share."""

from __future__ import annotations

import triton
from torch import Tensor

from specexit_kernels.grow_beam import outputs as beam_outputs
from specexit_kernels.grow_level import outputs as level_outputs
from specexit_kernels.triton.grow_beam_kernels import grow_kernel
from specexit_kernels.triton.launch import Launch, run

# Provisional: candidates that one warp ranks, whose maxima need no barrier (more take more warps), and entries of a
# hidden row that it copies at a time.
RANKED, COPIED = 1024, 2048

Level = tuple[Tensor, Tensor, Tensor]


def launches(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, beams: int, outputs: tuple[Tensor, ...], level: Level | None
) -> list[Launch]:
    """The launch that writes `outputs`: the four of `grow_beam`, or the six of `grow_level`, whose `hidden`, `visible`
    and `own` are `level`."""
    batch, parents, width = tokens.shape
    hidden, visible, own = level or (None, None, None)
    beam_hidden, beam_visible = outputs[4:] or (None, None)
    size = 1 if hidden is None else hidden.shape[2]
    words = 1 if visible is None else visible.shape[2]
    arguments = {
        "tokens": tokens,
        "logprobs": logprobs,
        "scores": scores,
        "hidden": hidden,
        "visible": visible,
        "own": own,
        "candidates": outputs[0],
        "beam_tokens": outputs[1],
        "beam_candidates": outputs[2],
        "beam_scores": outputs[3],
        "beam_hidden": beam_hidden,
        "beam_visible": beam_visible,
        "parents": parents,
        "width": width,
        "beams": beams,
        "stride_tokens_batch": tokens.stride(0),
        "stride_tokens_parent": tokens.stride(1),
        "stride_tokens_width": tokens.stride(2),
        "stride_logprobs_batch": logprobs.stride(0),
        "stride_logprobs_parent": logprobs.stride(1),
        "stride_logprobs_width": logprobs.stride(2),
        "stride_scores_batch": scores.stride(0),
        "stride_scores_parent": scores.stride(1),
        "stride_hidden_batch": 0 if hidden is None else hidden.stride(0),
        "stride_hidden_parent": 0 if hidden is None else hidden.stride(1),
        "stride_visible_batch": 0 if visible is None else visible.stride(0),
        "stride_visible_parent": 0 if visible is None else visible.stride(1),
        "stride_own_batch": 0 if own is None else own.stride(0),
        "stride_own_beam": 0 if own is None else own.stride(1),
        "HIDDEN": size,
        "WORDS": words,
        "CANDIDATES": triton.next_power_of_2(parents * width),
        "BLOCK_H": min(COPIED, triton.next_power_of_2(size)),
        "BLOCK_W": triton.next_power_of_2(words),
    }
    warps = max(1, arguments["CANDIDATES"] // RANKED)
    return [Launch(grow_kernel, batch * beams, arguments, warps, stages=1)]


def grow_beam_triton(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, beams: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `grow_beam` on a GPU."""
    made = beam_outputs(tokens, logprobs, scores, beams)
    if len(tokens):
        run(launches(tokens, logprobs, scores, beams, made, None), tokens.device)
    return made


def grow_level_triton(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, hidden: Tensor, visible: Tensor, own: Tensor, beams: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `grow_level` on a GPU."""
    made = level_outputs(tokens, logprobs, scores, hidden, visible, own, beams)
    if len(tokens):
        run(launches(tokens, logprobs, scores, beams, made, (hidden, visible, own)), tokens.device)
    return made
