"""The base's own choice after every node: the most likely token, or one drawn from the warped distribution.

    target = argmax over kept tokens v of  logits[v] / temperature + g(seed, position, v)

With standard Gumbel noise g (`philox.py`) that is a draw from the softmax of logits / temperature over the kept tokens
(the Gumbel-max trick; Maddison, Tarlow and Minka, "A* sampling", 2014, arXiv 1411.0030). The noise depends on (seed,
position, token) alone: a node's target is what plain decoding would draw there, whatever tree the node stands in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, cuda, native
from specexit_kernels._op import Op
from specexit_kernels.philox import gumbel_noise

CHUNK = 2**18  # logits that the twin draws from at once: the int64 temporaries of Philox stay small


def sample_targets_ref(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The meaning of `sample_targets` in plain PyTorch: CPU path and test oracle."""
    greedy = logits.argmax(1)
    if temperature is None:
        return greedy.int()
    count, vocab = logits.shape
    step = max(1, CHUNK // vocab)

    def draw(rows: slice) -> Tensor:
        warpers = [None if x is None else x[rows] for x in (top_k, top_p, min_p)]
        noise = gumbel_noise(seeds[rows], positions[rows], vocab)
        return (warp(logits[rows], temperature[rows], *warpers) + noise).argmax(1)

    drawn = torch.cat([draw(slice(start, start + step)) for start in range(0, max(count, 1), step)])
    return torch.where(temperature > 0, drawn, greedy).int()


def warp(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """logits / temperature, -inf for tokens that the warpers remove: [N, V] in fp32, or in float64 where logits are.

    The arguments are those of `sample_targets`. NaN becomes -inf, and infinity the largest finite number. The best
    token is always kept.
    """
    divisor = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    z = (logits / divisor).nan_to_num_(-math.inf, None, -math.inf)
    ranked = top_k is not None or top_p is not None
    if ranked:
        z, token = z.sort(dim=1, descending=True, stable=True)  # by (logit down, id up)
    if top_k is not None:
        vocab = z.shape[1]
        last = (top_k.long().clamp(0, vocab) - 1) % vocab  # 0 is off: the last of all
        z = z.masked_fill(z < z.gather(1, last.unsqueeze(1)), -math.inf)
    if top_p is not None or min_p is not None:
        best = z[:, :1] if ranked else z.amax(1, keepdim=True)
        weight = (z - best).exp_()  # proportional to the probability, 1 for the best token
    if top_p is not None:
        cumulative = weight.cumsum(1)
        limit = torch.where(top_p < 1, top_p, math.inf).unsqueeze(1) * cumulative[:, -1:]
        outside = cumulative - weight >= limit
        outside[:, 0].fill_(False)
        z = z.masked_fill(outside, -math.inf)
    if min_p is not None:
        z = z.masked_fill(weight < min_p.clamp(max=1.0).unsqueeze(1), -math.inf)
    return torch.empty_like(z).scatter_(1, token, z) if ranked else z


def outputs(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The op's results, empty: what a launch fills, and all that a fake has."""
    return logits.new_empty(logits.shape[0], dtype=torch.int32)


_OP = Op(
    "sample_targets(Tensor logits, Tensor positions, Tensor seeds, Tensor? temperature=None, Tensor? top_k=None,"
    " Tensor? top_p=None, Tensor? min_p=None) -> Tensor",
    sample_targets_ref,
    outputs,
)


def _cuda_limit(logits: Tensor, *arguments: Any) -> str | None:
    if (vocabulary := logits.shape[1]) > (most := native.load().max_vocabulary):
        return f"logits must have at most {most} columns, had {vocabulary}"
    return _checks.double_limit("logits", logits) or cuda.device_limit("logits", logits)


cuda.register(_OP, _cuda_limit)


def sample_targets(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """The token that the base chooses in each row.

    logits       [N, V] fp16, bf16, fp32 or float64, last stride 1
    positions    [N] int32: the position that the token will have
    seeds        [N] int64: rows of equal seed and position see the same noise
    temperature  [N] fp32, or None: every row is greedy. A row whose temperature is not above 0 is greedy
    top_k        [N] int32, or None: keep the k best tokens, and those equal to the k-th; off at 0
    top_p        [N] fp32, or None: keep a token while those that rank before it, by (logit down, id up), hold less than
                 this probability together; off at 1
    min_p        [N] fp32, or None: keep tokens of at least this fraction of the best one's probability; off at 0
    targets      [N] int32

    The warpers are those of transformers, in its order: temperature, top-k, top-p, min-p, each on what the last left.
    They always keep the best token. Ties go to the lower id. Logits are divided, and probabilities added up, in fp32
    (float64 where the logits are); the noise is fp32.
    A greedy row is `torch.argmax`, to which NaN is the largest value. In a drawn row NaN is -inf, which is never drawn
    unless there is nothing else; the token is 0 then.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or layout.
    """
    sizes: dict[str, int] = {}
    _checks.tensor("logits", logits, ("N", "V"), _checks.FLOATS_64, sizes)
    _checks.unit_stride("logits", logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one column, was {list(logits.shape)}")
    _checks.tensor("positions", positions, ("N",), torch.int32, sizes, logits)
    _checks.tensor("seeds", seeds, ("N",), torch.int64, sizes, logits)
    for name, value, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        if value is not None:
            _checks.tensor(name, value, ("N",), dtype, sizes, logits)
    targets: Tensor = _OP(logits, positions, seeds, temperature, top_k, top_p, min_p, implementation=implementation)
    return targets
