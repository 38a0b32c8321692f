"""What the draft's head is compared with: ours, and the same pipeline in PyTorch, eager, in a CUDA graph, compiled.

The pipeline is what one would write: RMSNorm and a product by the library, log-softmax in fp32, topk, the map. Its
logits and signals are rounded to the inputs' dtype, which its check allows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.harness import Peer, Prepared
from benchmarks.head_cells import EPS, Projection, Topk
from benchmarks.head_reference import Top
from specexit_kernels import draft_topk, grow_level, project_features
from specexit_kernels._op import OPS

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def ours(implementation: str | None = None) -> Callable[[Topk | Projection], Prepared]:
    """The ops: the best implementation for the device, or the one of this name."""

    def prepare(problem: Topk | Projection) -> Prepared:
        def project(weight: Tensor) -> Any:
            assert isinstance(problem, Projection)
            return project_features(problem.features, weight, implementation=implementation)

        def top(lm_head: Tensor) -> Any:
            assert isinstance(problem, Topk)
            found = draft_topk(
                problem.hidden,
                problem.norm_weight,
                EPS,
                lm_head,
                problem.cell.k,
                exit_weight=problem.exit_weight,
                exit_bias=problem.exit_bias,
                token_map=problem.token_map,
                implementation=implementation,
            )
            return found, ()

        def level(lm_head: Tensor) -> Any:
            assert isinstance(problem, Topk)
            found, _ = top(lm_head)
            tokens, logprobs = (x.view(*problem.scores.shape, -1) for x in found[:2])
            tree = (problem.scores, problem.beams, problem.visible, problem.own, problem.cell.k)
            return found, grow_level(tokens, logprobs, *tree, implementation=implementation)

        call = {"draft_topk": top, "level": level, "project_features": project}[problem.cell.op]
        finish = _as_is if isinstance(problem, Projection) else partial(_named, rounded=False)
        note = "" if implementation else _unlike_ours(problem, problem.copies[0].device.type)
        return Prepared([partial(call, weight) for weight in problem.copies], finish, note)

    return prepare


def _unlike_ours(problem: Topk | Projection, device: str) -> str:
    """What else implements a part of the cell, where it is not what ours is named by: `draft_topk`'s for any
    arguments. Too many rows of features, or too large a k, go to the twin."""
    arguments: tuple[Any, ...]
    if isinstance(problem, Projection):
        op, arguments = "project_features", (problem.features, problem.copies[0])
    else:
        op, arguments = "draft_topk", (problem.hidden, problem.norm_weight, EPS, problem.copies[0], problem.cell.k)
    usual, name = OPS["draft_topk"].implementation(device).name, OPS[op].implementation(device, arguments).name
    notes = [] if name == usual else [f"{op}: {name}"]
    if problem.cell.op == "level" and (grown := OPS["grow_level"].implementation(device).name) != usual:
        notes.append(f"grow_level: {grown}")
    return "; ".join(notes)


def pipeline(compiled: Compile | None = None, graph: bool = True) -> Callable[[Topk | Projection], Prepared]:
    """The PyTorch pipeline, as it is or compiled; `graph`: replayed as a CUDA graph."""

    def prepare(problem: Topk | Projection) -> Prepared:
        function: Callable[..., Any] = project_torch
        arguments: tuple[Any, ...]
        if isinstance(problem, Projection):
            arguments = (problem.features,)
        else:
            arguments = (problem.hidden, problem.norm_weight, problem.cell.k, problem.token_map)
            if problem.cell.op == "level":
                function = level_torch
                arguments += (problem.scores, problem.beams, problem.visible, problem.own)
            else:
                function = topk_torch
                arguments += (problem.exit_weight, problem.exit_bias)
        if compiled is not None:
            torch._dynamo.reset()  # each shape is compiled anew, and past a few of them dynamo would run it uncompiled
            function = compiled(function)
        calls = [partial(function, weight, *arguments) for weight in problem.copies]
        if isinstance(problem, Projection):
            finish, what = _as_is, "signals"
        else:
            finish, what = partial(_named, rounded=True), "logits"
        dtype = problem.copies[0].dtype
        note = "" if dtype == torch.float32 else f"{what} rounded to {str(dtype).removeprefix('torch.')}"
        return Prepared(calls, finish, note, graph)

    return prepare


def topk_torch(
    lm_head: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    k: int,
    token_map: Tensor | None,
    exit_weight: Tensor | None,
    exit_bias: Tensor | None,
) -> Any:
    """`draft_topk` as one would write it."""
    row = F.rms_norm(hidden, hidden.shape[1:], norm_weight, EPS)
    logprobs, ids = F.linear(row, lm_head).log_softmax(-1, dtype=torch.float32).topk(k)
    tokens = (ids if token_map is None else ids + token_map[ids]).int()
    return (tokens, logprobs, row[:, :0] if exit_weight is None else F.linear(row, exit_weight, exit_bias)), ()


def level_torch(
    lm_head: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    k: int,
    token_map: Tensor | None,
    scores: Tensor,
    beams: Tensor,
    visible: Tensor,
    own: Tensor,
) -> Any:
    """A beam level as one would write it."""
    top, _ = topk_torch(lm_head, hidden, norm_weight, k, token_map, None, None)
    tokens, logprobs = (x.view(*scores.shape, k) for x in top[:2])
    score = scores.unsqueeze(2)
    candidates = torch.minimum(score + logprobs, score).flatten(1)
    beam_scores, chosen = candidates.topk(own.shape[1])
    parent = (chosen // k).unsqueeze(2)
    beam_hidden = beams.gather(1, parent.expand(-1, -1, beams.shape[2]))
    beam_visible = visible.gather(1, parent.expand_as(own)) | own
    beam_tokens = tokens.flatten(1).gather(1, chosen)
    return top, (candidates, beam_tokens, chosen.int(), beam_scores, beam_hidden, beam_visible)


def project_torch(weight: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`project_features` as one would write it."""
    result = F.linear(torch.cat(features, 1), weight)
    size = features[0].shape[1]
    return result[:, :size], result[:, size:]


def _named(result: Any, rounded: bool) -> tuple[Top, tuple[Tensor, ...]]:
    top, grown = result
    return Top(top[0], top[1], top[2], rounded), grown


def _as_is(result: Any) -> Any:
    return result


def _compile(mode: str | None) -> Compile:
    return partial(torch.compile, dynamic=False, fullgraph=True, mode=mode)


PEERS: dict[str, tuple[Peer, ...]] = {
    "eager": (Peer("eager", pipeline(graph=False)),),
    "graph": (Peer("graph", pipeline()),),
    "compiled": (Peer("compiled", pipeline(_compile(None))),),
    "autotuned": (Peer("compiled, autotuned", pipeline(_compile("max-autotune-no-cudagraphs"))),),
}
