"""One level of a draft tree: the scores of the candidates that a beam proposes, and the next beam.

    candidate[m, j] = min(score[m] + logprob[m, j], score[m])

A candidate's score is the log-probability of its path. Rounding may let a log-probability pass 0; the minimum keeps a
child from outranking its parent, so that no selection by (score down, index up) holds a node without its parent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, triton
from specexit_kernels._op import Op

MAX_CANDIDATES = 4096  # of a sequence, in the Triton kernel; the twin has no limit


def rank(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] int64 of the best k of scores [B, C] without NaN, by (score down, index up)."""
    if k == 1:
        return scores.argmax(1, keepdim=True)  # the first of equals
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # topk leaves the order of ties open


def grow_beam_ref(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, beams: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The meaning of `grow_beam` in plain PyTorch: CPU path and test oracle."""
    score = scores.unsqueeze(2)
    candidates = torch.minimum(score + logprobs, score).nan_to_num_(-math.inf, math.inf, -math.inf).flatten(1)
    best = rank(candidates, beams)
    return candidates, tokens.flatten(1).gather(1, best), best.int(), candidates.gather(1, best)


def outputs(tokens: Tensor, logprobs: Tensor, scores: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's results, empty."""
    batch, parents, width = tokens.shape
    return (
        scores.new_empty(batch, parents * width),
        tokens.new_empty(batch, beams),
        tokens.new_empty(batch, beams),
        scores.new_empty(batch, beams),
    )


_OP = Op(
    "grow_beam(Tensor tokens, Tensor logprobs, Tensor scores, int beams) -> (Tensor, Tensor, Tensor, Tensor)",
    grow_beam_ref,
    outputs,
)


def triton_limit(tokens: Tensor, logprobs: Tensor, scores: Tensor, *arguments: Any) -> str | None:
    """What the Triton kernel cannot take of these arguments, in words."""
    candidates = tokens.shape[1] * tokens.shape[2]
    if candidates > MAX_CANDIDATES:
        return f"tokens must be at most {MAX_CANDIDATES} a sequence, were {candidates}"
    return triton.tensor_limit("scores", scores)


triton.register(_OP, "grow_beam", triton_limit)


def grow_beam(
    tokens: Tensor, logprobs: Tensor, scores: Tensor, beams: int, *, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the k continuations of each of M beams, and keep the best `beams` of them.

    tokens            [B, M, k] int32: the continuations of each beam
    logprobs          [B, M, k] fp32: their log-probabilities
    scores            [B, M] fp32: the scores of the beams; 0 for a root
    beams             1 to M * k
    candidate scores  [B, M * k] fp32: of m * k + j, min(scores[m] + logprobs[m, j], scores[m]); NaN is -inf
    beam tokens       [B, beams] int32: the next beam, by (score down, index up)
    beam candidates   [B, beams] int32: which candidate each of them is; // k is the beam that it grew from
    beam scores       [B, beams] fp32

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or number of beams.
    """
    check_arguments(tokens, logprobs, scores, beams, {})
    candidates, beam_tokens, beam_candidates, beam_scores = _OP(
        tokens, logprobs, scores, beams, implementation=implementation
    )
    return candidates, beam_tokens, beam_candidates, beam_scores


def check_arguments(tokens: Tensor, logprobs: Tensor, scores: Tensor, beams: int, sizes: dict[str, int]) -> None:
    """What `grow_beam` asks of its arguments; raises as it says. Leaves B, M and k in `sizes`."""
    _checks.tensor("tokens", tokens, ("B", "M", "k"), torch.int32, sizes)
    _checks.tensor("logprobs", logprobs, ("B", "M", "k"), torch.float32, sizes, tokens)
    _checks.tensor("scores", scores, ("B", "M"), torch.float32, sizes, tokens)
    _checks.between("beams", beams, 1, sizes["M"] * sizes["k"])
