"""Arguments of the ops of a draft's head, and what their results must be, for the tests of their kernels in the
interpreter and on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from attention_cases import draw, normal, pick
from tolerances import assert_close
from torch import Generator, Tensor

NAN = math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_NAMES = ("hidden", "norm_weight", "eps", "lm_head", "k", "exit_weight", "exit_bias", "token_map")
BEAM_NAMES = ("tokens", "logprobs", "scores", "beams")

Arguments = dict[str, Any]


def head_case(
    rng: Generator, rows: int, size: int, vocab: int, k: int, *, signals: int = 0, dtype: torch.dtype = torch.float32
) -> Arguments:
    return {
        "hidden": normal(rng, rows, size, dtype=dtype) * 3,
        "norm_weight": normal(rng, size, dtype=dtype),
        "eps": 0.05,
        "lm_head": (normal(rng, vocab, size) / size**0.5).to(dtype),
        "k": k,
        "exit_weight": (normal(rng, signals, size) / size**0.5).to(dtype) if signals else None,
        "exit_bias": normal(rng, signals, dtype=dtype) if signals and draw(rng, 0, 1) else None,
        "token_map": torch.randint(0, 150_000, (vocab,), generator=rng, dtype=torch.int32) if draw(rng, 0, 1) else None,
    }


def one_hot(logits: Tensor, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments, but for `k`, with these very logits [N, Vd]: row n of `hidden` is axis n of 16, along which lm_head
    holds row n's logits. The norm makes it 4 long; powers of two do not round."""
    weights = torch.zeros(logits.shape[1], 16)
    weights[:, : len(logits)] = logits.T / 4
    hidden = torch.eye(16)[: len(logits)]
    return {
        "hidden": hidden.to(dtype),
        "norm_weight": torch.ones(16, dtype=dtype),
        "eps": 1e-30,
        "lm_head": weights.to(dtype),
        "k": 0,
        "exit_weight": None,
        "exit_bias": None,
        "token_map": None,
    }


def normed(args: Arguments) -> Tensor:
    """The normed rows in float64, rounded to x where Llama's RMSNorm rounds."""
    x = args["hidden"].double()
    x = x / (x.pow(2).mean(1, keepdim=True) + args["eps"]).sqrt()
    dtype = args["hidden"].dtype
    return (args["norm_weight"].double() * x.to(dtype).double()).to(dtype).double()


def exact(args: Arguments, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, Vd] and signals [N, S] in float64, of the row that is rounded where the op rounds it."""
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in args.items()}
    row = normed(there)
    signals = row.new_empty(len(row), 0)
    if there["exit_weight"] is not None:
        signals = row @ there["exit_weight"].double().T
    if there["exit_bias"] is not None:
        signals = signals + there["exit_bias"].double()
    return (row @ there["lm_head"].double().T).log_softmax(1), signals


def summed(expected: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """How far an fp32 sum of products of `dtype`, of some 1 in all, may be: fp32 ones are rounded to the nearest, in
    any order. Tensor cores cut off what does not fit, 16 products at a time: an error that grows with each."""
    steps = 0 if dtype == torch.float32 else terms / 16
    return 2e-5 + steps * 2**-23 * expected.abs().clamp(min=1)


def check_head(args: Arguments, result: tuple[Tensor, ...]) -> None:
    """A result of `draft_topk` without a token map, against float64 on its device: the k values are the k largest, in
    order, each that of its token, and the signals are right."""
    draft_ids, logprobs, signals = result
    expected, expected_signals = exact(args, logprobs.device)
    dtype, size = args["hidden"].dtype, args["hidden"].shape[1]
    ids = draft_ids.long()
    assert ((ids >= 0) & (ids < expected.shape[1])).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert_close(logprobs, expected.gather(1, ids), dtype)
    assert_close(logprobs, expected.topk(args["k"]).values, dtype)
    assert (logprobs.diff(dim=1) <= 0).all()
    # Rows are rounded alike, so little but the sums is left, whatever the dtype; now and then an entry is rounded to
    # its other neighbour.
    flips = 0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for actual, wanted in ((logprobs, expected.gather(1, ids)), (signals, expected_signals)):
        assert ((actual - wanted).abs() <= summed(wanted, size, dtype) + flips).all()


def features_case(
    rng: Generator, rows: int, size: int, signals: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    weight = (normal(rng, size + signals, 3 * size) / (3 * size) ** 0.5).to(dtype)
    layout = draw(rng, 0, 2)
    if layout == 0:  # apart, each with its own stride
        return [normal(rng, rows, size + more, dtype=dtype)[:, :size] for more in (0, 3, 16)], weight
    whole = normal(rng, rows, 3 * size, dtype=dtype)
    if layout == 1:
        return list(whole.split(size, 1)), weight
    wide = torch.full((rows, 3, size + 5), NAN, dtype=dtype)
    wide[..., :size] = whole.view(rows, 3, size)
    storage = torch.full((size + signals, 3 * size + 8), NAN, dtype=dtype)
    storage[:, : 3 * size] = weight
    return list(wide[..., :size].unbind(1)), storage[:, : 3 * size]


def check_features(features: list[Tensor], weight: Tensor, result: tuple[Tensor, Tensor]) -> None:
    """A result of `project_features` against float64."""
    hidden, signals = result
    dtype, size = weight.dtype, features[0].shape[1]
    assert hidden.dtype == dtype
    x, w = (tensor.to(hidden.device).double() for tensor in (torch.cat(features, 1), weight))
    expected = x @ w.T
    allowed = summed(expected, 3 * size, dtype)
    assert ((signals - expected[:, size:]).abs() <= allowed[:, size:]).all()
    # Hidden rows are those sums rounded once, and no more.
    expected, allowed = expected[:, :size], allowed[:, :size]
    assert ((hidden.double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps + allowed).all()


def grow_case(
    rng: Generator,
    batch: int = 3,
    parents: int = 4,
    width: int = 5,
    beams: int = 6,
    hidden: int = 7,
    words: int = 2,
    dtype: torch.dtype | None = None,
) -> Arguments:
    dtype = dtype or pick(rng, *DTYPES)

    def bits(count: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (batch, count, words), generator=rng)

    return {
        "tokens": torch.randint(0, 150_000, (batch, parents, width), generator=rng, dtype=torch.int32),
        "logprobs": -torch.rand(batch, parents, width, generator=rng) * 5,
        "scores": -torch.rand(batch, parents, generator=rng) * 5,
        "hidden": torch.randn(batch, parents, hidden, generator=rng).to(dtype),
        "visible": bits(parents),
        "own": bits(beams),
        "beams": beams,
    }
