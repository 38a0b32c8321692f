"""Sample arguments of every operator, for the tests that treat all operators alike (`tests/gpu/test_ops_cuda.py`).

They are made on the CPU: valid, random, small, and of more than one kind where an op has modes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tolerances import assert_close
from torch import Generator, Tensor

from specexit_kernels import DecodeState, ExitRules, Smoothing, Tree, accept, build_tree

BATCH = 3
VOCAB = 5  # few enough that random trees and targets agree
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Arguments = dict[str, Any]


def integers(rng: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Random int32 in [low, high)."""
    return torch.randint(low, high, shape, generator=rng, dtype=torch.int32)


def normal(rng: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def candidates(rng: Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, monotone scores and parents of random candidates, [B, count] each."""
    parents = torch.stack([integers(rng, -1, c, BATCH) for c in range(count)], 1)
    scores = -torch.rand(BATCH, count + 1, generator=rng)
    scores[:, 0] = 0  # the root's
    for c in range(count):
        scores[:, c + 1] += scores.gather(1, parents[:, c : c + 1].long() + 1).squeeze(1)
    return integers(rng, 0, VOCAB, BATCH, count), scores[:, 1:].contiguous(), parents


def random_tree(rng: Generator, nodes: int, root: Tensor) -> Tree:
    tokens, scores, parents = candidates(rng, 2 * nodes)
    none = torch.zeros(BATCH, dtype=torch.int32)
    return build_tree(root, tokens, scores, parents, nodes, none.unsqueeze(1), none)


def _tree_attention(rng: Generator) -> Iterator[Arguments]:
    heads, kv_heads, size, nodes, slots, page = 4, 2, 16, 70, 96, 8
    lengths = torch.tensor([0, 7, slots - nodes], dtype=torch.int32)
    tree = random_tree(rng, nodes, integers(rng, 0, VOCAB, BATCH))
    common = {
        "lengths": lengths,
        "positions": lengths.unsqueeze(1) + tree.depth,
        "visible": tree.visible,
        "scale": size**-0.5,
    }
    for dtype in DTYPES:
        q = normal(rng, BATCH, nodes, heads, size, dtype=dtype)
        k, v = (normal(rng, BATCH, kv_heads, slots, size, dtype=dtype) for _ in range(2))
        plain = {"q": q, "k": k, "v": v, **common}
        yield plain
        yield {**plain, "window": 9, "softcap": 2.0, "sinks": normal(rng, heads, dtype=dtype)}
        pages = BATCH * slots // page
        k, v = (normal(rng, pages, page, kv_heads, size, dtype=dtype) for _ in range(2))
        table = torch.randperm(pages, generator=rng).int().view(BATCH, -1)
        yield {"q": q, "k": k, "v": v, "block_table": table, **common}


def _project_features(rng: Generator) -> Iterator[Arguments]:
    for dtype in DTYPES:
        for signals in (0, 3):
            features = normal(rng, 9, 3 * 48, dtype=dtype)
            weight = normal(rng, 48 + signals, 3 * 48, dtype=dtype) / 12
            yield {"features": list(features.split(48, dim=1)), "weight": weight}


def _draft_topk(rng: Generator) -> Iterator[Arguments]:
    rows, size, vocabulary = 5, 48, 300

    def values(*shape: int, dtype: torch.dtype) -> Tensor:
        # Rounding to 16 bits would let near ties come out either way: signs and small integers leave nothing to round,
        # and make true ties.
        return normal(rng, *shape) if dtype == torch.float32 else integers(rng, -3, 4, *shape).to(dtype)

    for dtype in DTYPES:
        hidden = values(rows, size, dtype=dtype)
        common = {
            "hidden": hidden if dtype == torch.float32 else torch.where(hidden < 0, -1, 1).to(dtype),
            "norm_weight": values(size, dtype=dtype),
            "eps": 1e-5,
            "lm_head": values(vocabulary, size, dtype=dtype),
            "k": 10,
        }
        yield common
        yield {
            **common,
            "exit_weight": values(3, size, dtype=dtype),
            "exit_bias": values(3, dtype=dtype),
            "token_map": integers(rng, 0, 1000, vocabulary),
        }


def _grow_beam(rng: Generator) -> Iterator[Arguments]:
    for beams, width in ((1, 10), (10, 10)):
        yield {
            "tokens": integers(rng, 0, VOCAB, BATCH, beams, width),
            "logprobs": -torch.rand(BATCH, beams, width, generator=rng),
            "scores": -torch.rand(BATCH, beams, generator=rng),
            "beams": 10,
        }


def _grow_level(rng: Generator) -> Iterator[Arguments]:
    for dtype, beams, words in zip(DTYPES, (10, 1, 17), (1, 2, 3), strict=True):
        grown = list(_grow_beam(rng))[1]
        yield {
            **grown,
            "hidden": normal(rng, BATCH, 10, 48, dtype=dtype),
            "visible": torch.randint(-(2**63), 2**63 - 1, (BATCH, 10, words), generator=rng),
            "own": torch.randint(-(2**63), 2**63 - 1, (BATCH, beams, words), generator=rng),
            "beams": beams,
        }


def _build_tree(rng: Generator) -> Iterator[Arguments]:
    tokens, scores, parents = candidates(rng, 60)
    for nodes in (1, 40, 70):  # 70: too few candidates, and two words of bits
        yield {
            "root": integers(rng, 0, VOCAB, BATCH),
            "tokens": tokens,
            "scores": scores,
            "parents": parents,
            "nodes": nodes,
            "forced": integers(rng, 0, VOCAB, BATCH, 3),
            "n_forced": torch.tensor([0, 3, 0], dtype=torch.int32),
        }


def _sample_targets(rng: Generator) -> Iterator[Arguments]:
    rows, vocabulary = 9, 300
    for dtype in DTYPES:
        common = {
            "logits": normal(rng, rows, vocabulary, dtype=dtype),
            "positions": integers(rng, 0, 1000, rows),
            "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng),
        }
        yield common
        yield {
            **common,
            "temperature": torch.rand(rows, generator=rng) + 0.5,
            "top_k": integers(rng, 0, 40, rows),
            "top_p": 1 - 0.5 * torch.rand(rows, generator=rng),
            "min_p": 0.1 * torch.rand(rows, generator=rng),
        }


def _verify_tree(rng: Generator) -> Iterator[Arguments]:
    for nodes in (1, 30, 70):
        tree = random_tree(rng, nodes, integers(rng, 0, VOCAB, BATCH))
        yield {
            "tokens": tree.tokens,
            "parent": tree.parent,
            "visible": tree.visible,
            "targets": integers(rng, 0, VOCAB, BATCH, nodes),
            "depth": 6,
        }


def _state(rng: Generator, **sizes: int) -> DecodeState:
    """Rows that think, one of them with a forced id to come."""
    state = DecodeState.empty(BATCH, depth=6, signals=3, forced=2, **sizes)
    state.lengths.copy_(integers(rng, 10, 20, BATCH))
    state.limits.fill_(23)
    state.prompt_lengths.fill_(8)
    state.root.copy_(integers(rng, 0, VOCAB, BATCH))
    state.thinking.fill_(1)
    state.tail.copy_(integers(rng, 0, VOCAB, *state.tail.shape))
    state.forced.copy_(integers(rng, 0, VOCAB, BATCH, 2))
    state.n_forced.copy_(torch.tensor([0, 2, 0]))
    return state


def _accept(rng: Generator) -> Iterator[Arguments]:
    for nodes in (1, 30):
        state = _state(rng)
        yield {
            "tree": random_tree(rng, nodes, state.root),
            "targets": integers(rng, 0, VOCAB, BATCH, nodes),
            "stop_ids": torch.tensor([VOCAB - 1], dtype=torch.int32),
            "state": state,
        }


def _decide_exit(rng: Generator) -> Iterator[Arguments]:
    for smoothing, per_step in ((Smoothing.EWMA, False), (Smoothing.WINDOW, False), (Smoothing.EWMA, True)):
        window = 3 if smoothing == Smoothing.WINDOW else 0
        state = _state(rng, tail=1, window=window)
        targets = integers(rng, 0, VOCAB, BATCH, 30)
        accept(random_tree(rng, 30, state.root), targets, torch.empty(0, dtype=torch.int32), state)
        rules = ExitRules(
            thresholds=torch.tensor([[0.4, 0.4, 2.0]]).repeat(BATCH, 1),
            used=torch.tensor([[True, True, False]]).repeat(BATCH, 1),
            alpha=torch.full((BATCH,), 0.3),
            min_thinking=integers(rng, 0, 3, BATCH),
            budget=integers(rng, 1, 9, BATCH),
            hard_budget=torch.tensor([True, False, False]),
            boundary=torch.rand(VOCAB, generator=rng) < 0.5,
            start=integers(rng, 0, VOCAB, 2),
            end=integers(rng, 0, VOCAB, 1),
            force=integers(rng, 0, VOCAB, 2),
            smoothing=smoothing,
            window=window,
            per_step=per_step,
            has_minimum=True,
            has_budget=True,
        )
        yield {"signals": normal(rng, BATCH, state.depth + 1, 3), "rules": rules, "state": state}


def _compact_kv(rng: Generator) -> Iterator[Arguments]:
    heads, slots, size, page = 2, 48, 16, 8
    path = torch.tensor([[0, 3, 9, -1], [0, 1, 2, 11], [0, -1, -1, -1]], dtype=torch.int32)
    common = {
        "path": path,
        "n_accepted": (path >= 0).sum(1, dtype=torch.int32),
        "lengths": integers(rng, 4, 30, BATCH),
    }
    for dtype in DTYPES:
        for shape, table in (
            ((BATCH, heads, slots, size), None),
            ((BATCH * slots // page, page, heads, size), torch.randperm(BATCH * slots // page, generator=rng)),
        ):
            yield {
                **common,
                "keys": [normal(rng, *shape, dtype=dtype) for _ in range(2)],
                "values": [normal(rng, *shape, dtype=dtype) for _ in range(2)],
                "block_table": None if table is None else table.int().view(BATCH, -1),
            }


SAMPLES: dict[str, Callable[[Generator], Iterator[Arguments]]] = {
    "accept": _accept,
    "build_tree": _build_tree,
    "compact_kv": _compact_kv,
    "decide_exit": _decide_exit,
    "draft_topk": _draft_topk,
    "grow_beam": _grow_beam,
    "grow_level": _grow_level,
    "project_features": _project_features,
    "sample_targets": _sample_targets,
    "tree_attention": _tree_attention,
    "verify_tree": _verify_tree,
}


def on(device: str, value: Any) -> Any:
    """A copy of arguments, with every tensor in them on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: on(device, item) for name, item in vars(value).items()})
    if isinstance(value, dict):
        return {name: on(device, item) for name, item in value.items()}
    if isinstance(value, Tree):
        return Tree(*(on(device, item) for item in value))
    return [on(device, item) for item in value] if isinstance(value, list) else value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in results or arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def assert_same(actual: Any, expected: Any) -> None:
    """Integers are equal; floats are within the tolerance of the coarsest dtype among results and arguments."""
    floats = [t.dtype for t in tensors(expected) if t.is_floating_point()]
    coarsest = max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=None)
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if e.is_floating_point():
            assert_close(a.cpu(), e, coarsest)
        else:
            assert torch.equal(a.cpu(), e)
