"""What bench_draft_head.py measures: heads of EAGLE-3 drafts, cells, random inputs, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks import harness, timer
from benchmarks.head_reference import (
    Best,
    Top,
    best,
    check_grown,
    hidden_error,
    product,
    signals_error,
    top_error,
)

SIGNALS = 3  # confidence, progress, remaining length
WORDS = 1  # of a beam's visible scratch slots: at most 64 of them, as in a tree of depth 7 and top_k 10
EPS = 1e-6
SPREAD = 3.0  # standard deviation of the logits: a few tokens have most of the probability, as a draft's do


@dataclass(frozen=True)
class Head:
    """A draft's sizes: hidden rows, its vocabulary, and the base model's, to which a token map leads."""

    name: str
    hidden: int
    vocabulary: int
    target: int


# Sizes of the base models from their config.json on the Hugging Face hub; their EAGLE-3 drafts have 32,000 tokens.
LLAMA = Head("Llama-3.1-8B", 4096, 32000, 128256)  # meta-llama/Llama-3.1-8B-Instruct
QWEN = Head("Qwen3-4B", 2560, 32000, 151936)  # Qwen/Qwen3-4B
QWEN_FULL = Head("Qwen3-4B, all tokens", 2560, 151936, 151936)  # a draft that keeps the base's vocabulary
QWEN_32B = Head("Qwen3-32B", 5120, 32000, 151936)  # Qwen/Qwen3-32B
HEADS = (LLAMA, QWEN, QWEN_FULL, QWEN_32B)


@dataclass(frozen=True)
class Cell(harness.Cell):
    """One op on `batch` sequences of `k` rows: beams of k, or (k = 1) the ends of chains.

    op  "draft_topk", with exit signals; "level": draft_topk without them and grow_level; or "project_features"
    """

    op: str
    head: Head
    batch: int
    k: int

    def __str__(self) -> str:
        return f"{self.op}, {self.head.name}, {self.rows} rows"

    @property
    def rows(self) -> int:
        """N."""
        return self.batch * self.k

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the weight that is rotated: lm_head, or the projection with its signals."""
        size = self.head.hidden
        return (size + SIGNALS, 3 * size) if self.op == "project_features" else (self.head.vocabulary, size)

    @property
    def exit_rows(self) -> int:
        """Rows of the exit signals' own weight."""
        return SIGNALS if self.op == "draft_topk" else 0

    def bytes(self, itemsize: int) -> int:
        """Weights, inputs and results once."""
        n, size, k = self.rows, self.head.hidden, self.k
        weights = self.weight_shape[0] * self.weight_shape[1] + self.exit_rows * size
        if self.op == "project_features":
            return itemsize * (weights + 3 * n * size + n * size) + 4 * n * SIGNALS
        results = 4 * n * (k + k + self.exit_rows)  # tokens, log-probabilities, signals
        if self.op == "level":  # scores, candidates, three results a beam; hidden rows; visible, own and the results'
            results += 4 * n * (1 + k + 3) + itemsize * n * size + 8 * n * 3 * WORDS
        return itemsize * (weights + n * size) + results

    @property
    def flops(self) -> int:
        """2 N times the entries of the weights."""
        rows, columns = self.weight_shape
        return 2 * self.rows * columns * (rows + self.exit_rows)

    @property
    def heading(self) -> str:
        rows, columns = self.weight_shape
        text = f"{self.op}, {self.head.name}: {self.rows} x {columns:,} times {columns:,} x {rows:,}"
        return text if self.op == "project_features" else f"{text}, k = {self.k}"

    def keys(self) -> harness.Result:
        head = self.head
        keys = {"op": self.op, "model": head.name, "hidden": head.hidden, "vocabulary": head.vocabulary}
        return {**keys, "batch": self.batch, "k": self.k, "rows": self.rows}

    def copies(self, device: torch.device, dtype: torch.dtype) -> int:
        """How many copies of the weight leave it cold."""
        rows, columns = self.weight_shape
        return timer.copies_for_cold_cache(rows * columns * dtype.itemsize, device)

    def memory(self, device: torch.device, dtype: torch.dtype) -> int:
        """The copies of the weight, and the logits of a peer in fp32, three times."""
        rows, columns = self.weight_shape
        return self.copies(device, dtype) * rows * columns * dtype.itemsize + 3 * 4 * self.rows * rows

    def problem(self, device: torch.device, dtype: torch.dtype) -> Topk | Projection:
        make = make_projection if self.op == "project_features" else make_topk
        return make(self, device, dtype, self.copies(device, dtype))


CHAINS, BEAMS = ((1, 1), (8, 1)), ((1, 10), (8, 10), (32, 10))  # (batch, k)

# The first six carry the goals; where time runs out, the last go without peers.
SUBSET = (
    Cell("draft_topk", LLAMA, 1, 10),
    Cell("draft_topk", QWEN, 1, 10),
    Cell("level", LLAMA, 1, 10),
    Cell("level", QWEN, 1, 10),
    Cell("project_features", LLAMA, 1, 10),
    Cell("project_features", QWEN, 1, 10),
    Cell("draft_topk", LLAMA, 1, 1),
    Cell("draft_topk", LLAMA, 8, 10),
    Cell("draft_topk", LLAMA, 32, 10),
    Cell("draft_topk", QWEN_FULL, 1, 10),
    Cell("draft_topk", QWEN_32B, 1, 10),
    Cell("level", LLAMA, 32, 10),
    Cell("project_features", LLAMA, 1, 1),
    Cell("project_features", LLAMA, 32, 10),
)
# A chain has no level to grow: its one child is the next beam. Both heads of Qwen3-4B have the same projection.
ALL = (
    *(Cell("draft_topk", head, *rows) for head in HEADS for rows in CHAINS + BEAMS),
    *(Cell("level", head, *rows) for head in HEADS for rows in BEAMS),
    *(Cell("project_features", head, *rows) for head in (LLAMA, QWEN, QWEN_32B) for rows in CHAINS + BEAMS),
)
SMALL = Head("small", 256, 2000, 3000)
CPU = (  # small enough to try the script
    Cell("draft_topk", SMALL, 2, 1),
    Cell("draft_topk", replace(SMALL, name="small, all tokens", target=2000), 1, 10),
    Cell("level", SMALL, 2, 10),
    Cell("project_features", SMALL, 1, 10),
)


@dataclass
class Topk:
    """The inputs of `draft_topk` and, for a level, of `grow_level`; lm_head in as many copies as leave the caches cold.

    hidden  [N, H] x            norm_weight  [H] x          copies     of lm_head [Vd, H] x
    exit_weight  [S, H] x       exit_bias    [S] x          token_map  [Vd] int32, or None
    scores       [B, M] fp32    visible, own [B, M, W] int64
    """

    cell: Cell
    hidden: Tensor
    norm_weight: Tensor
    copies: list[Tensor]
    exit_weight: Tensor | None
    exit_bias: Tensor | None
    token_map: Tensor | None
    scores: Tensor
    visible: Tensor
    own: Tensor

    @property
    def beams(self) -> Tensor:
        """The hidden rows as [B, M, H]."""
        return self.hidden.unflatten(0, (self.cell.batch, self.cell.k))

    @cached_property
    def normed(self) -> Tensor:
        """The rows that are multiplied, rounded as the op defines it."""
        rows = F.rms_norm(self.hidden.float(), self.hidden.shape[1:], eps=EPS).to(self.hidden.dtype)
        return self.norm_weight * rows

    @cached_property
    def expected(self) -> Best:
        """The most likely tokens, in float64."""
        return best(self.normed, self.copies[0], self.cell.k)

    def check(self, result: tuple[Top, tuple[Tensor, ...]]) -> float:
        """The error of a result and of what `grow_level` returned. Raises Unavailable where it is wrong."""
        top, grown = result
        errors = [top_error(top, self.expected, self.normed, self.copies[0], self.token_map)]
        if self.exit_weight is not None and self.exit_bias is not None:
            expected = product(self.normed, self.exit_weight) + self.exit_bias
            errors.append(signals_error(top.signals, expected, self.hidden.dtype))
        if self.cell.op == "level":
            check_grown(grown, top, self.scores, self.beams, self.visible, self.own)
        return max(errors)


@dataclass
class Projection:
    """The inputs of `project_features`: three features [N, H] x, and copies of the weight [H + S, 3 H] x."""

    cell: Cell
    features: list[Tensor]
    copies: list[Tensor]

    @cached_property
    def expected(self) -> Tensor:
        """[N, H + S] float64."""
        return product(torch.cat(self.features, 1), self.copies[0])

    def check(self, result: tuple[Tensor, Tensor]) -> float:
        """The error of hidden rows and signals. Raises Unavailable where it is wrong."""
        size, dtype = self.cell.head.hidden, self.copies[0].dtype
        return max(
            hidden_error(result[0], self.expected[:, :size], dtype),
            signals_error(result[1], self.expected[:, size:], dtype),
        )


def make_topk(cell: Cell, device: torch.device, dtype: torch.dtype, copies: int, seed: int = 0) -> Topk:
    """Random inputs whose logits are normal with a spread of SPREAD, and signals with one of 1."""
    generator = torch.Generator(device).manual_seed(seed)
    head, size = cell.head, cell.head.hidden

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator).mul_(scale)

    token_map = None
    if head.target > head.vocabulary:  # sorted, as in the checkpoints
        kept = torch.randperm(head.target, device=device, generator=generator)[: head.vocabulary].sort().values
        token_map = (kept - torch.arange(head.vocabulary, device=device)).int()
    lm_head = normal(head.vocabulary, size, scale=SPREAD * size**-0.5)
    shape = (cell.batch, cell.k, WORDS)
    return Topk(
        cell,
        hidden=normal(cell.rows, size, scale=2.0),
        norm_weight=1 + normal(size, scale=0.1),
        copies=[lm_head] + [lm_head.clone() for _ in range(copies - 1)],
        exit_weight=normal(cell.exit_rows, size, scale=size**-0.5) if cell.exit_rows else None,
        exit_bias=normal(cell.exit_rows) if cell.exit_rows else None,
        token_map=token_map,
        scores=-4 * torch.rand(cell.batch, cell.k, device=device, generator=generator),
        visible=torch.randint(-(2**63), 2**63 - 1, shape, device=device, generator=generator),
        own=(1 << torch.arange(cell.k, device=device)).view(1, -1, 1).expand(shape).contiguous(),
    )


def make_projection(cell: Cell, device: torch.device, dtype: torch.dtype, copies: int, seed: int = 0) -> Projection:
    """Random inputs whose results are normal; the features lie in one tensor, as a base model's are gathered."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, columns = cell.weight_shape
    weight = torch.randn(rows, columns, dtype=dtype, device=device, generator=generator).mul_(columns**-0.5)
    features = torch.randn(cell.rows, columns, dtype=dtype, device=device, generator=generator)
    parts = list(features.view(cell.rows, 3, cell.head.hidden).unbind(1))
    return Projection(cell, parts, [weight] + [weight.clone() for _ in range(copies - 1)])
