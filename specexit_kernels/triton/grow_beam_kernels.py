# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""`grow_beam` and `grow_level` in Triton, one launch: the scores of all candidates, the best of them, and what the next
level reads of the beams that they grew from."""

from __future__ import annotations

import triton
import triton.language as tl

from specexit_kernels.triton.order import HIGHEST, LOWEST, order_of, ranks_after, score_of


@triton.jit(do_not_specialize=["parents", "width", "beams"])
def grow_kernel(
    tokens,  # [B, parents, width] int32
    logprobs,  # [B, parents, width] fp32
    scores,  # [B, parents] fp32
    hidden,  # [B, parents, HIDDEN] x, or None: with `visible` and `own`
    visible,  # [B, parents, WORDS] int64
    own,  # [B, beams, WORDS] int64
    candidates,  # [B, parents * width] fp32, out
    beam_tokens,  # [B, beams] int32, out
    beam_candidates,  # [B, beams] int32, out
    beam_scores,  # [B, beams] fp32, out
    beam_hidden,  # [B, beams, HIDDEN] x, out
    beam_visible,  # [B, beams, WORDS] int64, out
    parents,
    width,
    beams,
    stride_tokens_batch,
    stride_tokens_parent,
    stride_tokens_width,
    stride_logprobs_batch,
    stride_logprobs_parent,
    stride_logprobs_width,
    stride_scores_batch,
    stride_scores_parent,
    stride_hidden_batch,
    stride_hidden_parent,
    stride_visible_batch,
    stride_visible_parent,
    stride_own_batch,
    stride_own_beam,
    HIDDEN: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,  # a power of two, at least parents * width
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One beam of one sequence. Each program scores all candidates, which are few, and goes down their ranking as far
    as its beam; so none waits for another, and the rows that are copied are spread over the device."""
    batch = (tl.program_id(0) // beams).to(tl.int64)
    beam = tl.program_id(0) % beams
    candidate = tl.arange(0, CANDIDATES)
    there = candidate < parents * width
    parent, child = (candidate // width).to(tl.int64), (candidate % width).to(tl.int64)
    place = batch * stride_logprobs_batch + parent * stride_logprobs_parent + child * stride_logprobs_width
    logprob = tl.load(logprobs + place, mask=there, other=0.0)
    score = tl.load(scores + batch * stride_scores_batch + parent * stride_scores_parent, mask=there, other=0.0)
    total = score + logprob
    total = tl.where(total > score, score, total)
    # NaN, of a score as well: a NaN score makes a NaN total.
    total = tl.where(total == total, total, float("-inf"))
    if beam == 0:
        tl.store(candidates + batch * (parents * width) + candidate, total, mask=there)

    order = tl.where(there, order_of(total), LOWEST)
    best = tl.full((), HIGHEST, tl.int32)
    chosen = tl.full((), -1, tl.int32)
    for _ in range(beam + 1):
        left = ranks_after(order, candidate, best, chosen)
        best = tl.max(tl.where(left, order, LOWEST), 0)
        chosen = tl.min(tl.where(left & (order == best), candidate, HIGHEST), 0)
    above, child = (chosen // width).to(tl.int64), (chosen % width).to(tl.int64)
    place = batch * stride_tokens_batch + above * stride_tokens_parent + child * stride_tokens_width
    row = batch * beams + beam
    tl.store(beam_tokens + row, tl.load(tokens + place))
    tl.store(beam_candidates + row, chosen)
    tl.store(beam_scores + row, score_of(best))

    if hidden is not None:
        word = tl.arange(0, BLOCK_W)
        inside = word < WORDS
        bits = tl.load(visible + batch * stride_visible_batch + above * stride_visible_parent + word, inside, other=0)
        bits |= tl.load(own + batch * stride_own_batch + beam.to(tl.int64) * stride_own_beam + word, inside, other=0)
        tl.store(beam_visible + row * WORDS + word, bits, mask=inside)
        source = hidden + batch * stride_hidden_batch + above * stride_hidden_parent
        for first in range(0, HIDDEN, BLOCK_H):
            column = first + tl.arange(0, BLOCK_H)
            x = tl.load(source + column, mask=column < HIDDEN)
            tl.store(beam_hidden + row * HIDDEN + column, x, mask=column < HIDDEN)
