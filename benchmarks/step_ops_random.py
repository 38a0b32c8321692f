"""Random numbers behind the inputs of bench_step_ops.py: drafts, logits, signals, made on the CPU from fixed seeds."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.step_ops_cells import SIGNALS, Base, Cell, Form, Sampling
from benchmarks.step_ops_reference import draws
from specexit_kernels import ExitRules, Tree
from specexit_kernels.state import NO_BUDGET

Ids = list[list[int]]

RESERVED = 8  # ids at the vocabulary's end that no candidate has: markers, stop ids, and what the draft missed
START, END, MISSED = -3, -4, -5  # from the vocabulary's end
BOUNDARIES = 16  # one id in so many ends a paragraph
THRESHOLDS = (0.8, 0.3, 200.0)
ALPHA = 0.3


def candidates(form: Form, batch: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, scores and parents [B, C] of a draft that is fairly sure: about 70 % and 15 % for its first two."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(form.top_k)
    logprobs = torch.where(rank < 2, torch.tensor([0.7, 0.15])[rank.clamp(max=1)].log(), -2.9 - 0.2 * rank)

    def children(scores: Tensor) -> tuple[Tensor, Tensor]:  # [B, M] -> [B, M * top_k], twice
        shape = (*scores.shape, form.top_k)
        noise = torch.rand(shape, generator=generator) / 16
        first = torch.randint(vocabulary - RESERVED, (*scores.shape, 1), generator=generator)
        tokens = (first + 89 * rank) % (vocabulary - RESERVED)  # siblings differ
        return tokens.flatten(1), (scores.unsqueeze(2) + logprobs - noise).flatten(1)

    tokens, scores = children(torch.zeros(batch, 1))
    levels = [(tokens, scores, torch.full_like(tokens, -1))]
    start = 0
    for beams in form.beams:
        best_scores, best = levels[-1][1].topk(beams)
        tokens, scores = children(best_scores)
        parents = (best + start).repeat_interleave(form.top_k, 1)
        start += levels[-1][1].shape[1]
        levels.append((tokens, scores, parents))
    tokens, scores, parents = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
    return tokens.int(), scores, parents.int()


@lru_cache(maxsize=1)
def _logits(count: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Rows like a base model's: 200 tokens fall off by a power of their rank and hold nearly all of the probability,
    in a few rows one token alone; the others are normal."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(count, vocabulary, generator=generator).mul_(2.5).clamp_(max=11)
    head = min(200, vocabulary // 4)
    tokens = torch.rand(count, vocabulary, generator=generator).topk(head).indices
    fall = torch.linspace(1.3, 6, count).unsqueeze(1)
    logits.scatter_(1, tokens, 24 - fall * torch.arange(1, head + 1).log())
    return logits.to(dtype)


@lru_cache(maxsize=8)
def distinct_rows(
    count: int, vocabulary: int, dtype: torch.dtype, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, positions, seeds and targets. Rows where rounding could decide get another seed."""
    logits = _logits(count, vocabulary, dtype)
    positions = torch.arange(count, dtype=torch.int32) + 1000
    seeds = torch.arange(count) * 0x9E3779B97F4A7C1 + 12345
    targets = torch.empty(count, dtype=torch.int32)
    left = torch.arange(count)
    for _ in range(100):
        targets[left], clear = draws(logits[left], positions[left], seeds[left], sampling)
        left = left[~clear]
        if not left.numel():
            return logits, positions, seeds, targets
        seeds[left] += 1
    raise AssertionError("there are logits that no seed decides")


def agree(tree: Tree, cell: Cell) -> tuple[Tensor, Ids]:
    """Targets with which each row's path is as long as it is to be, and the paths. They do not go through node 1, so
    that every node has to move. Elsewhere the base agrees with each node's first child."""
    missed = cell.base.vocabulary + MISSED
    targets, paths = [], []
    for tokens, parent, depth, length in zip(*(x.tolist() for x in tree[:3]), cell.accepted, strict=True):
        paths_to = [[0]]
        target = [missed] * len(tokens)
        for node in range(1, len(tokens)):
            paths_to.append([*paths_to[parent[node]], node])
            if target[parent[node]] == missed:
                target[parent[node]] = tokens[node]
        path = next(path for path in paths_to if len(path) == length and path[1:2] != [1])
        for above, node in pairwise(path):
            target[above] = tokens[node]
        target[path[-1]] = missed
        assert depth[path[-1]] == length - 1
        targets.append(target)
        paths.append(path)
    return torch.tensor(targets, dtype=torch.int32), paths


def exit_rules(base: Base, batch: int, device: torch.device) -> ExitRules:
    """All three signals, smoothed token by token, at boundaries; no minimum and no budget."""

    def ids(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return ExitRules(
        thresholds=torch.tensor(THRESHOLDS, device=device).repeat(batch, 1),
        used=torch.ones(batch, SIGNALS, dtype=torch.bool, device=device),
        alpha=torch.full((batch,), ALPHA, device=device),
        min_thinking=ids(0).repeat(batch),
        budget=ids(NO_BUDGET).repeat(batch),
        hard_budget=torch.zeros(batch, dtype=torch.bool, device=device),
        boundary=torch.arange(base.vocabulary, device=device) % BOUNDARIES == 0,
        start=ids(base.vocabulary + START),
        end=ids(base.vocabulary + END),
        force=ids(base.vocabulary + END),
    )


def raw_signals(cut: Tensor, depth: int) -> Tensor:
    """Raw signals [B, D + 1, 3]: where a row is to be cut they pass, elsewhere confidence is far from passing."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(len(cut), depth + 1, SIGNALS, generator=generator) / 2
    good, bad = torch.tensor([3.0, 2.0, math.log(20)]), torch.tensor([-2.0, 0.0, math.log(300)])
    return torch.where(cut.view(-1, 1, 1), good, bad) + noise


def smooth_so_far(cut: Tensor) -> Tensor:
    """Smoothed values [B, 3] that suit them."""
    return torch.where(cut.unsqueeze(1), torch.tensor([0.9, 0.8, 40.0]), torch.tensor([0.2, 0.5, 300.0]))
