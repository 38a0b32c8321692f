"""The draft's head: RMSNorm, projection, log-softmax and the top k of each row; exit signals of the same normed row.

    row = norm_weight * (x / sqrt(mean x^2 + eps))        logits = lm_head . row        signals = exit_weight . row

The logits do not leave the op: only k of them are used, and the vocabulary is large.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specexit_kernels import _checks, triton
from specexit_kernels._op import Op
from specexit_kernels.grow_beam import rank

MAX_K = 32  # of the Triton kernels; the twin has no limit


def draft_topk_ref(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    k: int,
    exit_weight: Tensor | None = None,
    exit_bias: Tensor | None = None,
    token_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of `draft_topk` in plain PyTorch: CPU path and test oracle."""
    row = F.rms_norm(_wide(hidden), hidden.shape[1:], eps=eps)
    row = _wide(norm_weight * row.to(hidden.dtype))  # rounded where Llama's RMSNorm rounds

    logits = F.linear(row, _wide(lm_head)).nan_to_num_(-math.inf, math.inf, -math.inf)
    draft_ids = rank(logits, k)
    # NaN: no finite logit in the row, or an infinite one.
    logprobs = logits.log_softmax(1).gather(1, draft_ids).nan_to_num_(-math.inf, neginf=-math.inf)
    tokens = draft_ids.int()
    if token_map is not None:
        tokens = tokens + token_map[draft_ids]

    if exit_weight is None:
        return tokens, logprobs, row[:, :0]
    return tokens, logprobs, F.linear(row, _wide(exit_weight), None if exit_bias is None else _wide(exit_bias))


def _wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 as it was."""
    return x if x.dtype is torch.float64 else x.float()


def outputs(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    k: int,
    exit_weight: Tensor | None = None,
    exit_bias: Tensor | None = None,
    token_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's results, empty."""
    rows, signals = hidden.shape[0], 0 if exit_weight is None else exit_weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(rows, k, dtype=torch.int32),
        hidden.new_empty(rows, k, dtype=dtype),
        hidden.new_empty(rows, signals, dtype=dtype),
    )


OP = Op(
    "draft_topk(Tensor hidden, Tensor norm_weight, float eps, Tensor lm_head, int k, Tensor? exit_weight=None,"
    " Tensor? exit_bias=None, Tensor? token_map=None) -> (Tensor, Tensor, Tensor)",
    draft_topk_ref,
    outputs,
)


def _triton_limit(
    hidden: Tensor, norm_weight: Tensor, eps: float, lm_head: Tensor, k: int, *arguments: Any
) -> str | None:
    if k > MAX_K:
        return f"k must be at most {MAX_K}, was {k}"
    return triton.tensor_limit("hidden", hidden)


triton.register(OP, "draft_topk", _triton_limit)


def draft_topk(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    k: int,
    *,
    exit_weight: Tensor | None = None,
    exit_bias: Tensor | None = None,
    token_map: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely draft tokens of each hidden row, and the row's raw exit signals.

    hidden       [N, H] x (fp32, bf16 or fp16; the twin also takes fp64), last stride 1
    norm_weight  [H] x, of the RMSNorm
    eps          positive, of the RMSNorm
    lm_head      [Vd, H] x, last stride 1
    k            from 1 to Vd
    exit_weight  [S, H] x, S from 1 to 3: it reads the normed row; None: no signals
    exit_bias    [S] x, only with `exit_weight`
    token_map    [Vd] int32, EAGLE-3's `d2t`: the target token of draft token v is v + token_map[v]; None: v itself
    tokens       [N, k] int32, after the map; by logit down, ties by draft token up
    logprobs     [N, k] fp32 (fp64 for fp64): log-probabilities over the draft's vocabulary
    signals      [N, S] like logprobs: raw, before sigmoid and exp

    The norm is computed in fp32 and rounded to x, as in Llama; the logits are fp32. A logit that is NaN counts as -inf.
    A row without a softmax (all logits -inf or NaN, or one inf) has log-probability -inf throughout: where the first of
    a row is -inf, its hidden state or the weights are broken. (A NaN among finite logits shows in no result: that token
    is not proposed.) Equal arguments give equal bits.

    On a GPU the logits lie in a workspace of torch's allocator, fp32, in slabs of rows of some 256 MiB; float64 and k
    above 32 go to the twin. Rows that do not begin at multiples of 16 entries are read slowly.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, stride, device or value.
    """
    arguments = (hidden, norm_weight, eps, lm_head, k, exit_weight, exit_bias, token_map)
    check_arguments(*arguments)
    tokens, logprobs, signals = OP(*arguments, implementation=implementation)
    return tokens, logprobs, signals


def check_arguments(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    k: int,
    exit_weight: Tensor | None = None,
    exit_bias: Tensor | None = None,
    token_map: Tensor | None = None,
) -> None:
    """What `draft_topk` asks of its arguments; raises as it says. See `specexit_kernels.unchecked`."""
    sizes: dict[str, int] = {}
    _checks.tensor("hidden", hidden, ("N", "H"), _checks.FLOATS_64, sizes)
    _checks.tensor("norm_weight", norm_weight, ("H",), hidden.dtype, sizes, hidden)
    _checks.tensor("lm_head", lm_head, ("Vd", "H"), hidden.dtype, sizes, hidden)
    for name, value in (("hidden", hidden), ("norm_weight", norm_weight), ("lm_head", lm_head)):
        _checks.unit_stride(name, value)
    _checks.positive("eps", eps)
    _checks.between("k", k, 1, sizes["Vd"])
    if exit_weight is not None:
        _checks.tensor("exit_weight", exit_weight, ("S", "H"), hidden.dtype, sizes, hidden)
        _checks.unit_stride("exit_weight", exit_weight)
        _checks.between("exit_weight.shape[0]", sizes["S"], 1, 3)
    if exit_bias is not None:
        if exit_weight is None:
            raise ValueError("exit_bias must be None without exit_weight")
        _checks.tensor("exit_bias", exit_bias, ("S",), hidden.dtype, sizes, hidden)
        _checks.unit_stride("exit_bias", exit_bias)
    if token_map is not None:
        _checks.tensor("token_map", token_map, ("Vd",), torch.int32, sizes, hidden)
        _checks.unit_stride("token_map", token_map)
