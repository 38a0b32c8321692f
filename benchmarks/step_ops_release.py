"""The same step in the shape of the public releases of EAGLE and SpecExit: PyTorch, the host in between, one sequence.

Trees are built on the CPU: parents come to the host as a list, ancestors go into a dense mask row by row, the paths to
the leaves are lists. The longest path that agrees is sought among all of them, and the host reads its length; every
tensor of the cache is indexed and copied on its own; signals are smoothed in Python. That is one sequence at a time, so
a batch is a loop. The warpers of a sampler are transformers', over all rows at once.

It is launched from Python, on the first copy of the inputs alone, whose data its caches then hold. Its own state is
Python's, so nothing is restored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.harness import Prepared
from benchmarks.step_ops_cells import AFTER, Sampling
from benchmarks.step_ops_inputs import STOP, Build, Sample, Step
from benchmarks.step_ops_random import ALPHA, BOUNDARIES, END, THRESHOLDS, Ids
from benchmarks.step_ops_reference import Result
from specexit_kernels import bits
from specexit_kernels.philox import gumbel_noise


def release(problem: Build | Sample | Step) -> Prepared:
    """One call, on the first copy."""
    if isinstance(problem, Build):
        return Prepared([lambda: _build(problem)], _trees, graph=False)
    if isinstance(problem, Sample):
        return _sampler(problem)
    decode = Decode(problem)
    return Prepared([decode.step], decode.results, graph=False)


def _build(problem: Build) -> list[Any]:
    root, tokens, scores, parents, nodes, *_ = problem.arguments
    return [grow(*row, nodes) for row in zip(root.unsqueeze(1), tokens, scores, parents, strict=True)]


def grow(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """One tree: tokens, dense mask, depths and paths to the leaves on the device, parents on the host."""
    chosen = scores.topk(nodes - 1).indices.sort().values
    above = torch.searchsorted(chosen, parents[chosen].long(), right=True)
    parent = [0, *above.tolist()]
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        mask[node] |= mask[parent[node]]
    depth = mask.sum(1) - 1
    device = tokens.device
    paths = torch.tensor(leaf_paths(parent, depth.tolist()), device=device)
    node_tokens = torch.cat([root, tokens[chosen]])
    return node_tokens, mask.float()[None, None].to(device), depth.to(device), paths, parent


def leaf_paths(parent: list[int], depth: list[int]) -> Ids:
    """The nodes from the root to each leaf, then -1."""
    inner = set(parent[1:])
    paths = []
    for leaf in range(len(parent)):
        if leaf in inner:
            continue
        path = [-1] * (max(depth) + 1)
        node = leaf
        for place in reversed(range(depth[leaf] + 1)):
            path[place] = node
            node = parent[node]
        paths.append(path)
    return paths


def follow(leaves: Tensor, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
    """The longest of a tree's paths that the base agrees with, the tokens on it, and the base's next one."""
    candidates = F.pad(tokens, (0, 1), value=-1)[leaves]
    chosen = targets[leaves]
    agreed = (candidates[:, 1:] == chosen[:, :-1]).int().cumprod(1).sum(1)
    length = int(agreed.max())
    best = 0 if length == 0 else int(agreed.argmax())
    return leaves[best, : length + 1], candidates[best, : length + 1], int(chosen[best, length])


def keep(caches: list[Tensor], path: Tensor, start: int) -> None:
    """Move the slots `path` of a sequence's caches [Hkv, slots, hd] to `start` and on."""
    for cache in caches:
        kept = cache[:, path]
        cache[:, start : start + len(path), :].copy_(kept, non_blocking=True)


def smooth(raw: list[float], values: list[float]) -> list[float]:
    """The smoothed signals with those of one more token."""
    x = 1 / (1 + math.exp(-raw[0])), 1 / (1 + math.exp(-raw[1])), math.exp(raw[2])
    return [ALPHA * new + (1 - ALPHA) * old for new, old in zip(x, values, strict=True)]


def _trees(found: list[Any]) -> Result:
    tokens, masks, depths, _, parents = zip(*found, strict=True)
    return {
        "tokens": torch.stack(tokens),
        "parent": torch.tensor(parents),
        "depth": torch.stack(depths),
        "visible": bits.pack(torch.cat(masks)[:, 0].bool()),
    }


def _sampler(problem: Sample) -> Prepared:
    """Its noise is given and not timed: with random numbers of its own it would draw other tokens."""
    sampling = problem.cell.sampling
    assert sampling is not None
    noise = None
    if sampling.temperature is not None:
        positions, seeds = (x[: problem.distinct] for x in problem.arguments[:2] if x is not None)
        noise = gumbel_noise(seeds, positions, problem.cell.base.vocabulary)
        noise = noise[torch.arange(problem.cell.rows, device=noise.device) % problem.distinct]
    note = "" if noise is None else "its noise is given"

    def call() -> list[int]:
        tokens: list[int] = draw(problem.copies[0], sampling, noise).tolist()
        return tokens

    return Prepared([call], lambda targets: {"targets": torch.tensor(targets)}, note, graph=False)


def draw(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Tokens [N] by transformers' warpers, each over all of the vocabulary."""
    if sampling.temperature is None or noise is None:
        return logits.argmax(1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p is not None:
        ranked, token = scores.sort(descending=True, stable=True)
        p = ranked.softmax(1)
        removed = p.cumsum(1) - p >= sampling.top_p
        scores = scores.masked_fill(removed.scatter(1, token, removed), -torch.inf)
    if sampling.min_p is not None:
        p = scores.softmax(1)
        scores = scores.masked_fill(p < sampling.min_p * p.amax(1, keepdim=True), -torch.inf)
    return (scores + noise).argmax(1)


class Decode:
    """A problem as the release keeps it: for each sequence tensors of its own, and Python's numbers."""

    def __init__(self, problem: Step) -> None:
        self.problem = problem
        self.op = problem.cell.op
        vocabulary = problem.cell.base.vocabulary
        self.stops = {vocabulary + i for i in STOP}
        self.end = vocabulary + END
        tree, device = problem.tree, problem.targets.device
        self.rows = range(problem.cell.batch)
        self.leaves = [
            torch.tensor(leaf_paths(*row), device=device)
            for row in zip(tree.parent.tolist(), tree.depth.tolist(), strict=True)
        ]
        self.text = [root.view(1) for root in tree.tokens[:, 0]]  # what has been decoded: the end of it
        problem.fill()
        problem.restore()
        state = problem.states[0]
        self.smoothed: list[list[float]] = state.smoothed.tolist()
        self.runs: Ids = [run[: n + 1] for run, n in zip(state.run.tolist(), state.n_pending.tolist(), strict=True)]

    def step(self) -> list[Any]:
        """For each sequence what it accepted, and whether it was cut."""
        found = []
        for row in self.rows:
            path, run, kept = None, self.runs[row], None
            if self.op in ("accept", AFTER):
                path, run = self.accept(row)
            if self.op == AFTER:
                assert path is not None
                self.compact(row, path)
            elif self.op == "compact_kv":
                length = len(self.problem.accepted[row])
                self.compact(row, self.problem.paths[0][row, :length])
            if self.op in ("decide_exit", AFTER):
                kept = self.decide(row, run)
            found.append((path, run, kept))
        return found

    def accept(self, row: int) -> tuple[Tensor, list[int]]:
        """The longest path that the base agrees with, and the root and the tokens that follow it."""
        path, kept, last = follow(self.leaves[row], self.problem.tree.tokens[row], self.problem.targets[row])
        run = [*kept.tolist(), last]
        if self.stops.intersection(run[1:]):
            raise AssertionError("no base of this benchmark stops")
        torch.cat([self.text[row], kept])
        return path, run

    def compact(self, row: int, path: Tensor) -> None:
        """Keys and values of the path to where the committed ones end, at slot 0, tensor by tensor."""
        keep([cache[row] for cache in (*self.problem.keys, *self.problem.values)], path, 0)

    def decide(self, row: int, run: list[int]) -> int:
        """The row of the run that stays last, -1 where thinking goes on."""
        raw = self.problem.signals[row, : len(run) - 1].tolist()
        values = self.smoothed[row]
        for place, (z, token) in enumerate(zip(raw, run, strict=False)):
            values = smooth(z, values)
            passed = values[0] > THRESHOLDS[0] and values[1] > THRESHOLDS[1] and values[2] < THRESHOLDS[2]
            if passed and token % BOUNDARIES == 0:
                return place
        return -1

    def results(self, found: list[Any]) -> Result:
        """Results by name, as the ops give them; the cache alone has none."""
        columns = self.problem.cell.form.depth + 1

        def padded(lists: Ids, fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (columns - len(row)) for row in lists])

        results = {}
        paths, runs, cuts = zip(*found, strict=True)
        if self.op in ("accept", AFTER):
            results["path"] = padded([path.tolist() for path in paths], -1)
            results["n_accepted"] = torch.tensor([len(path) for path in paths])
            results["next_token"] = torch.tensor([run[-1] for run in runs])
        if self.op in ("decide_exit", AFTER):
            kept = [run[1:] if cut < 0 else [*run[1 : cut + 1], self.end] for run, cut in zip(runs, cuts, strict=True)]
            results["cut"] = torch.tensor(cuts)
            results["output"] = padded(kept, 0)
            results["n_output"] = torch.tensor([len(row) for row in kept])
        return results
