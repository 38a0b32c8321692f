"""What a right result of the draft's head is: products in float64, made slab by slab, and how far a result may be off.

An error is the largest deviation of a result over what is allowed there, so that 1 is the most that passes. What can be
exact must be: the tokens are distinct and the draft's, and a level is grown as its log-probabilities say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Unavailable

SLAB = 2**28  # bytes of a weight's rows in float64 that are made at a time
# (relative, absolute), by the inputs' dtype: log-probabilities and signals, which are fp32 sums. As in the tests, but
# for fp32, whose sums are longer here.
TOLERANCE = {torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (2e-3, 2e-3), torch.float32: (1e-4, 1e-5)}
FROBENIUS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # of hidden rows, rounded to that dtype
# A logit rounded to the dtype is off by this share of itself at most, and so is the logarithm of the sum.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@dataclass(frozen=True)
class Top:
    """What `draft_topk` returns; `rounded`: its logits were rounded to the inputs' dtype, as a library's product is."""

    tokens: Tensor
    logprobs: Tensor
    signals: Tensor
    rounded: bool = False


@dataclass(frozen=True)
class Best:
    """The float64 result for normed rows [N, H].

    logprobs    [N, k] of the k most likely tokens, descending
    normaliser  [N] log of the sum of exp(logit)
    largest     [N] the largest logit without its sign
    """

    logprobs: Tensor
    normaliser: Tensor
    largest: Tensor


def slabs(weight: Tensor, size: int = SLAB) -> Iterator[Tensor]:
    """The weight's rows in float64, so many of them at a time that they take about `size` bytes."""
    for rows in weight.split(max(1, size // (8 * weight.shape[1]))):
        yield rows.double()


def product(rows: Tensor, weight: Tensor, size: int = SLAB) -> Tensor:
    """rows [N, H] times the transposed weight [V, H], in float64."""
    return torch.cat([rows.double() @ slab.T for slab in slabs(weight, size)], 1)


def best(rows: Tensor, weight: Tensor, k: int, size: int = SLAB) -> Best:
    """The k largest log-probabilities of each row; no more than a slab's logits exist at a time."""
    rows = rows.double()
    top = rows.new_empty(len(rows), 0)
    normaliser = rows.new_full((len(rows),), -math.inf)
    largest = torch.zeros_like(normaliser)
    for slab in slabs(weight, size):
        logits = rows @ slab.T
        top = torch.cat((top, logits.topk(min(k, logits.shape[1])).values), 1)
        top = top.topk(min(k, top.shape[1])).values
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(1))
        largest = torch.maximum(largest, logits.abs().amax(1))
    return Best(top - normaliser.unsqueeze(1), normaliser, largest)


def draft_ids(tokens: Tensor, token_map: Tensor | None, vocabulary: int) -> Tensor:
    """The draft's tokens that have these target tokens, as int64; Unavailable where there is none."""
    ids = torch.arange(vocabulary, device=tokens.device)
    targets = ids if token_map is None else ids + token_map
    place = torch.searchsorted(targets, tokens.long()).clamp(max=vocabulary - 1)  # the map ascends
    if not torch.equal(targets[place], tokens.long()):
        raise Unavailable("wrong result: a token is not of the draft's vocabulary")
    return place


def top_error(result: Top, expected: Best, rows: Tensor, weight: Tensor, token_map: Tensor | None) -> float:
    """The error of k tokens and their log-probabilities. `rows`: normed, and rounded as the op rounds them.

    Each log-probability is compared with that token's, which must not be below the one of its rank: a swap of two that
    are close is right, a token that is missing is not.
    """
    if result.tokens.shape != expected.logprobs.shape or result.logprobs.shape != expected.logprobs.shape:
        raise Unavailable(f"wrong result: tokens of shape {list(result.tokens.shape)}")
    ids = draft_ids(result.tokens, token_map, len(weight))
    if not bool((ids.sort(1).values.diff(dim=1) > 0).all()):
        raise Unavailable("wrong result: a token is repeated")
    exact = torch.einsum("nh,nkh->nk", rows.double(), weight[ids].double()) - expected.normaliser.unsqueeze(1)
    rounding = 2 * ROUNDING[weight.dtype] * expected.largest.unsqueeze(1) if result.rounded else 0.0
    off = (result.logprobs.double() - exact).abs() / (allowed(exact, weight.dtype) + rounding)
    below = (expected.logprobs - exact) / (allowed(expected.logprobs, weight.dtype) + rounding)
    return passed("log-probabilities", torch.maximum(off, below))


def signals_error(signals: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The error of raw signals [N, S]."""
    if signals.shape != expected.shape:
        raise Unavailable(f"wrong result: signals of shape {list(signals.shape)}")
    return passed("signals", (signals.double() - expected).abs() / allowed(expected, dtype))


def hidden_error(hidden: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The error of hidden rows [N, H], in the Frobenius norm."""
    if hidden.shape != expected.shape:
        raise Unavailable(f"wrong result: hidden rows of shape {list(hidden.shape)}")
    return passed("hidden rows", (hidden.double() - expected).norm() / expected.norm() / FROBENIUS[dtype])


def check_grown(
    grown: tuple[Tensor, ...], top: Top, scores: Tensor, hidden: Tensor, visible: Tensor, own: Tensor
) -> None:
    """Raises Unavailable unless the level is what its own tokens and log-probabilities make it, ties in any order.

    grown  candidate scores [B, M k], beam tokens, candidates and scores [B, beams], beam hidden and visible
    """
    candidates, beam_tokens, chosen, beam_scores, beam_hidden, beam_visible = grown
    batch, parents = scores.shape
    beams, width = own.shape[1], top.tokens.shape[1]
    score = scores.unsqueeze(2)
    expected = torch.minimum(score + top.logprobs.view(batch, parents, width), score).flatten(1)
    chosen = chosen.long()
    if not torch.equal(candidates, expected):
        raise Unavailable("wrong result: candidate scores")
    if chosen.shape != (batch, beams) or not bool(((chosen >= 0) & (chosen < parents * width)).all()):
        raise Unavailable("wrong result: beam candidates")
    parent = (chosen // width).unsqueeze(2)
    for what, right in (
        ("beam candidates", bool((chosen.sort(1).values.diff(dim=1) > 0).all())),
        ("beam scores", torch.equal(beam_scores, expected.topk(beams).values)),
        ("beam candidates", torch.equal(beam_scores, expected.gather(1, chosen))),
        ("beam tokens", torch.equal(beam_tokens, top.tokens.view(batch, -1).gather(1, chosen))),
        ("beam hidden", torch.equal(beam_hidden, hidden.gather(1, parent.expand(-1, -1, hidden.shape[2])))),
        ("beam visible", torch.equal(beam_visible, visible.gather(1, parent.expand_as(own)) | own)),
    ):
        if not right:
            raise Unavailable(f"wrong result: {what}")


def allowed(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """How far an fp32 sum may be from these numbers."""
    relative, absolute = TOLERANCE[dtype]
    return relative * expected.abs() + absolute


def passed(what: str, deviation: Tensor) -> float:
    """The largest of deviations over what is allowed. Raises Unavailable where it is above 1, or NaN."""
    error = float(deviation.max()) if deviation.numel() else 0.0
    if not error <= 1:
        raise Unavailable(f"wrong result: {what} off by {error:.2g} times what is allowed")
    return error
