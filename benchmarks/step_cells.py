"""What bench_step.py and bench_scaling.py measure: a model, a batch, a length and a tree, with the least that a step of
them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks import harness
from benchmarks.harness import Result
from benchmarks.step_models import LLAMA_8B, MODELS, QWEN3_4B, SMALL_LLAMA, SMALL_QWEN, Model
from specexit import TreeConfig

if TYPE_CHECKING:
    from benchmarks.step_problem import Problem

# Tokens that a step is taken to publish, for tokens a second. Random weights accept nothing, so this is no result: it
# is an assumption, in the range that EAGLE-3 reports for its own drafts (arXiv 2503.01840); --accepted gives another.
ACCEPTED = 4.0
PER_TOKEN = ("generate", "static")  # peers that publish one token a call, by one forward of the base


class Pass(NamedTuple):
    """One pass over weights and cache. It needs what the pass before it has found, so they follow one another."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Cell(harness.Cell):
    """A decode step.

    length    committed slots of each row
    tree      what the draft grows and the base verifies
    accepted  tokens that a step is taken to publish, for each row
    drafted   a draft reads signals and grows the tree; False: the base alone
    """

    model: Model
    batch: int
    length: int
    tree: TreeConfig = TreeConfig()  # noqa: RUF009
    accepted: float = field(default=ACCEPTED, compare=False)
    drafted: bool = True

    def __str__(self) -> str:
        tree = f"{self.tree.nodes} nodes" if self.tree.nodes > 1 else "1 node"
        return f"{self.model}, B = {self.batch}, L = {self.length:,}, {tree}"

    @property
    def heading(self) -> str:
        return f"{self}, depth {self.tree.max_depth}, top {self.tree.top_k}"

    def keys(self) -> Result:
        tree = {"nodes": self.tree.nodes, "depth": self.tree.max_depth, "top_k": self.tree.top_k}
        keys = {"model": self.model.name, "batch": self.batch, "length": self.length}
        return {**keys, **tree, "accepted": self.accepted}

    @property
    def published(self) -> float:
        """Tokens that a step is taken to publish for each row: the accepted ones, as far as the tree is that deep."""
        return min(self.accepted, self.tree.max_depth + 1)

    def passes(self, itemsize: int) -> list[Pass]:
        """The base over the tree; the draft over the accepted rows, which are padded to depth + 2, and over each level
        of its beam."""
        m, depth, k = self.model, self.tree.max_depth, self.tree.top_k
        base = self._pass(itemsize, m.matrices, m.heads * m.head_dim * m.layers, m.slot, self.tree.nodes)
        if not self.drafted:
            return [base]
        layer, width = m.draft_layer + m.draft_head, m.heads * m.head_dim
        observe = self._pass(itemsize, m.draft_projection + layer, width, m.draft_slot, depth + 2)
        levels = [self._pass(itemsize, layer, width, m.draft_slot, k, before * k) for before in range(depth - 1)]
        return [base, observe, *levels]

    def _pass(self, itemsize: int, weights: int, width: int, slot: int, rows: int, before: int = 0) -> Pass:
        """Bytes: weights once; the slots of the cache that are read, and those that are written; the rows' embeddings.
        FLOPs: a product of each row with the weights, and with the keys and values that it attends.

        width   entries of a row's query, of all heads and layers
        rows    of each sequence; `before`: rows of it that an earlier pass has left behind the committed ones
        """
        attended = self.length + before + rows
        read = weights + self.batch * (attended * slot + rows * self.model.hidden)
        return Pass(itemsize * read, 2 * self.batch * rows * (weights + 2 * width * attended))

    def bytes(self, itemsize: int) -> int:
        return sum(part.bytes for part in self.passes(itemsize))

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.passes(1))

    def floor(self, itemsize: int, bytes_per_second: float, flops_per_second: float) -> tuple[float, str]:
        """The sum over the passes of what limits each; `limit` is what limits the base's, the longest. All rows count
        as attending the whole tree, padded ones too: a little more arithmetic than must be."""
        passes = self.passes(itemsize)
        times = [(part.bytes / bytes_per_second, part.flops / flops_per_second) for part in passes]
        memory, arithmetic = times[0]
        return sum(map(max, times)), "memory" if memory > arithmetic else "arithmetic"

    def work(self, implementation: str) -> harness.Cell:
        """A token of plain decoding is a forward of the base over one node."""
        return replace(self, tree=TreeConfig.none(), drafted=False) if implementation in PER_TOKEN else self

    def figures(self, result: Result, own: Result) -> Result:
        """Tokens a second of all rows; for a peer that publishes a token a call, how many a step of ours must publish
        for each row to be as fast."""
        per_token = result["implementation"] in PER_TOKEN
        tokens = self.batch * (1 if per_token else self.published)
        microseconds, ours = result["microseconds"], own.get("microseconds")
        figures = {
            "tokens_per_second": tokens / microseconds * 1e6,
            "break_even": ours / microseconds if ours and per_token else None,
        }
        # A token is no step: its time over ours would say nothing.
        return {**figures, "times_ours": None} if per_token else figures

    def remarks(self, results: Sequence[Result]) -> list[str]:
        """Milliseconds, launches and syncs of each, and the parts of ours."""
        lines = [f"  at {self.published:g} tokens a step, which is assumed:"]
        for result in results:
            if "microseconds" not in result:
                continue
            line = f"  {result['implementation']:20}{result['microseconds'] / 1e3:10.3f} ms"
            line += f"{result['tokens_per_second']:12,.0f} tokens/s"
            if result["break_even"] is not None:
                line += f", break-even at {result['break_even']:.2f} tokens a step"
            if result.get("launches") is not None:
                line += f", {result['launches']:,} launches, {result['kernels']:,} kernels, {result['syncs']:,} syncs"
            lines.append(line)
        for result in results:
            if parts := result.get("parts"):
                shares = ", ".join(f"{name} {microseconds / 1e3:.3f}" for name, microseconds in parts.items())
                lines.append(f"  {result['implementation']}, ms: {shares}")
        return lines

    def memory(self, device: torch.device, dtype: torch.dtype) -> int:
        """Weights, the cache twice (a peer copies it as it grows) and a layer's in each query head, and logits."""
        m = self.model
        weights = m.parameters + m.draft_projection + m.draft_layer + m.draft_head
        of_heads = 2 * m.heads * m.head_dim
        slots = self.batch * (self.length + 2 * self.tree.nodes) * (2 * m.slot + m.draft_slot + of_heads)
        logits = 3 * self.batch * self.tree.nodes * m.vocabulary
        return (weights + slots + logits) * dtype.itemsize

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        from benchmarks.step_problem import Problem

        return Problem(self, device, dtype)


def trees(batch: int) -> tuple[TreeConfig, ...]:
    """What the decoder takes on a GPU for so many sequences, and what it takes for one."""
    device = torch.device("cuda")
    return tuple(dict.fromkeys((TreeConfig.suited_to(device, batch), TreeConfig.suited_to(device))))


BATCHES, LENGTHS = (1, 8, 32), (1024, 8192, 32_768)
GOAL = Cell(QWEN3_4B, 1, 1024)  # the goals' cell
SUBSET = (
    GOAL,
    Cell(QWEN3_4B, 8, 1024, trees(8)[0]),
    Cell(QWEN3_4B, 1, 8192),
    Cell(LLAMA_8B, 1, 1024),
)
ALL = tuple(
    Cell(model, batch, length, tree)
    for model in MODELS
    for length in LENGTHS
    for batch in BATCHES
    for tree in trees(batch)
)
SMALL_TREE = TreeConfig(nodes=12, depth=3, top_k=4)
CPU = (  # small enough to try the script
    Cell(SMALL_QWEN, 1, 64, SMALL_TREE),
    Cell(SMALL_LLAMA, 3, 1536, SMALL_TREE),
)

# What bench_scaling.py measures: each axis from the cell that all share.
STEM, SMALL_STEM = GOAL, Cell(SMALL_QWEN, 1, 128, SMALL_TREE)


def along(stem: Cell, lengths: Sequence[int], nodes: Sequence[int], batches: Sequence[int]) -> tuple[Cell, ...]:
    """Cells that differ from `stem` in one of the three, the stem first."""
    cells = [stem, *(replace(stem, length=length) for length in lengths)]
    cells += [replace(stem, tree=resized(stem.tree, count)) for count in nodes]
    cells += [replace(stem, batch=batch) for batch in batches]
    return tuple(dict.fromkeys(cells))


def resized(tree: TreeConfig, nodes: int) -> TreeConfig:
    """The same tree with another number of nodes."""
    return TreeConfig.none() if nodes == 1 else replace(tree, nodes=nodes)
