"""What bench_step_ops.py measures: shapes of trees and models, samplers, and cells with the bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks import harness, timer
from benchmarks.h200 import LAUNCH
from specexit_kernels import bits

if TYPE_CHECKING:
    from benchmarks.step_ops_inputs import Build, Sample, Step

SIGNALS = 3  # confidence, progress, remaining length
DISTINCT = 60  # rows of logits that differ; the sequences of a batch hold copies of them
ACCEPTED = (4, 2, 6, 3, 5, 1, 7, 3)  # nodes of a row's accepted path, by row: 3.9 in the mean, 4 where there is one row
WINDOW = 64  # slots that a copy of the inputs has in the cache: a tree's scratch, aligned
COPIES = 64  # of a state that steps advance: they are restored together, so a call has a small part of that
AFTER = "after the forward"  # accept, compact_kv, decide_exit, in the order of a step
STATEFUL = ("accept", "decide_exit", AFTER)
CACHED = ("compact_kv", AFTER)


@dataclass(frozen=True)
class Base:
    """A base model's sizes: the KV cache of one slot, and its vocabulary."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def slot(self) -> int:
        """Entries of one slot of the cache, keys and values of all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Form:
    """How a draft grows: top_k candidates below the root, then as many below each beam of every further level."""

    nodes: int
    top_k: int
    beams: tuple[int, ...]

    @property
    def candidates(self) -> int:
        """C."""
        return self.top_k * (1 + sum(self.beams))

    @property
    def depth(self) -> int:
        """D."""
        return 1 + len(self.beams)


@dataclass(frozen=True)
class Sampling:
    """How the base's tokens are drawn; None leaves a warper out, and without a temperature every row is greedy."""

    name: str
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def given(self) -> int:
        """How many of its parameters a row has."""
        return sum(x is not None for x in (self.temperature, self.top_k, self.top_p, self.min_p))


GREEDY = Sampling("greedy")
TEMPERATURE = Sampling("temperature", 0.6)
TOP_P = Sampling("top_p", 0.6, top_p=0.95)
QWEN3 = Sampling("top_k, top_p", 0.6, 20, 0.95)  # what Qwen3's model cards recommend for thinking
MIN_P = Sampling("min_p", 0.6, min_p=0.05)
TOP_K = Sampling("top_k", 1.0, 50)  # what generate() in transformers does unless it is told otherwise
WIDE = Sampling("top_p, hot", 2.0, top_p=0.99)  # of very many tokens
SAMPLINGS = (GREEDY, TEMPERATURE, TOP_P, QWEN3, MIN_P)


@dataclass(frozen=True)
class Cell(harness.Cell):
    """One op, or the three after the forward, on a batch of trees."""

    op: str
    base: Base
    form: Form
    batch: int
    sampling: Sampling | None = None

    def __str__(self) -> str:
        words = [self.op, f"B = {self.batch}", *([self.sampling.name] if self.sampling else [])]
        return ", ".join(words) + (f", {self.form.nodes} nodes" if self.form.nodes > DISTINCT else "")

    @property
    def rows(self) -> int:
        """N: nodes of the batch."""
        return self.batch * self.form.nodes

    @property
    def accepted(self) -> list[int]:
        """How many nodes each row's path has, the root included. None of the others is in its place already."""
        return [min(ACCEPTED[row % len(ACCEPTED)], self.form.depth + 1) for row in range(self.batch)]

    @property
    def moved(self) -> int:
        """Slots that change their place, of all rows."""
        return sum(self.accepted) - self.batch

    def bytes(self, itemsize: int) -> int:
        """Inputs and results once; of the state, what the op reads and what it writes."""
        if self.op == AFTER:
            return self._accept() + self._decide_exit() + self._compact_kv(itemsize)
        if self.op == "build_tree":
            # Three results a node and its bits; three inputs a candidate; root and forced ids.
            return self.rows * (12 + 8 * bits.words(self.form.nodes)) + self.batch * (12 * self.form.candidates + 12)
        if self.op == "sample_targets":
            assert self.sampling is not None
            drawn = 12 + 4 * self.sampling.given if self.sampling.given else 0  # positions, seeds, parameters
            return self.rows * (itemsize * self.base.vocabulary + drawn + 4)
        if self.op == "compact_kv":
            return self._compact_kv(itemsize)
        return self._accept() if self.op == "accept" else self._decide_exit()

    def _accept(self) -> int:
        # A node's token, parent, target and bits; path, count and next token; of the state the run, six numbers that
        # are read and four that are written.
        columns = self.form.depth + 1
        nodes = self.rows * (12 + 8 * bits.words(self.form.nodes))
        return nodes + 4 * self.batch * (columns + 2 + columns + 1 + 6 + 4)

    def _decide_exit(self) -> int:
        # Each column: its signals and their two values in the trace, its token as read and as published, and whether
        # that is a boundary; smoothed values and their counts twice; thresholds, and which are used; the cut, alpha,
        # seven numbers of the state that are read and five that are written.
        columns = self.form.depth + 1
        row = columns * (4 * (3 * SIGNALS + 2) + 1) + 4 * 4 * SIGNALS + 5 * SIGNALS + 4 * (2 + 7 + 5)
        return self.batch * row

    def _compact_kv(self, itemsize: int) -> int:
        """Each slot that moves is read and written; path, count and length of each row are read."""
        return 2 * self.moved * self.base.slot * itemsize + 4 * self.batch * (self.form.depth + 3)

    @property
    def flops(self) -> int:
        """None to speak of."""
        return 0

    def floor(self, itemsize: int, bytes_per_second: float, flops_per_second: float) -> tuple[float, str]:
        """As of every cell; "launches" where moving the bytes takes less than starting a kernel."""
        memory, _ = super().floor(itemsize, bytes_per_second, flops_per_second)
        return memory, "memory" if memory > LAUNCH else "launches"

    @property
    def heading(self) -> str:
        if self.op == "build_tree":
            return f"{self}: {self.form.nodes} nodes of {self.form.candidates:,} candidates"
        if self.op == "sample_targets":
            return f"{self}: {self.rows:,} rows of {self.base.vocabulary:,}"
        if self.op in CACHED:
            return f"{self}: {self.moved:,} slots of {self.base.layers} layers move"
        return str(self)

    def keys(self) -> harness.Result:
        keys = {"op": self.op, "model": self.base.name, "batch": self.batch, "nodes": self.form.nodes}
        sampling = self.sampling.name if self.sampling else None
        return {**keys, "candidates": self.form.candidates, "depth": self.form.depth, "sampling": sampling}

    def copies(self, device: torch.device, dtype: torch.dtype) -> int:
        """How many copies of the inputs are used in turn."""
        if self.op == "sample_targets":
            return timer.copies_for_cold_cache(self.rows * self.base.vocabulary * dtype.itemsize, device)
        if device.type != "cuda":
            return 2
        if self.op in CACHED:  # each has its own slots, and eight share the time of restoring well enough
            return max(8, timer.copies_for_cold_cache(self._compact_kv(dtype.itemsize), device))
        return COPIES

    def memory(self, device: torch.device, dtype: torch.dtype) -> int:
        """The logits in all copies, and one more as they are made; or the cache, and a layer as it is checked."""
        if self.op == "sample_targets":
            logits = self.rows * self.base.vocabulary * dtype.itemsize
            return (self.copies(device, dtype) + 1) * logits
        if self.op in CACHED:
            slots = self.batch * WINDOW * self.copies(device, dtype)
            return slots * (self.base.slot + 4 * self.base.kv_heads * self.base.head_dim) * dtype.itemsize
        return 4 * COPIES * self.batch * (64 * 20 + 12 * self.form.candidates + 8 * self.form.nodes)

    def problem(self, device: torch.device, dtype: torch.dtype) -> Build | Sample | Step:
        from benchmarks.step_ops_inputs import make

        return make(self, device, dtype, self.copies(device, dtype))


QWEN = Base("Qwen3-4B", 36, 8, 128, 151936)  # its config.json on the Hugging Face hub
MISTRAL = Base("Mistral-7B", 32, 8, 128, 32000)  # few tiles of logits, for many of the best tokens
TREE = Form(60, 10, (10,) * 5)  # as a beam of 10 leaves five levels of it: 510 candidates
LARGE = Form(256, 32, (32, 32, 32, 31))  # 4,096 candidates
BATCHES = (1, 8, 32, 128, 512)


def _cell(op: str, batch: int, sampling: Sampling | None = None, form: Form = TREE) -> Cell:
    return Cell(op, QWEN, form, batch, sampling)


# The first six carry the goals; where time runs out, the last go without peers.
SUBSET = (
    _cell(AFTER, 1),
    _cell(AFTER, 32),
    _cell("sample_targets", 1, GREEDY),
    _cell("sample_targets", 1, TOP_P),
    _cell("build_tree", 1),
    _cell("build_tree", 32),
    _cell("accept", 1),
    _cell("decide_exit", 1),
    _cell("compact_kv", 1),
    _cell("sample_targets", 1, QWEN3),
    _cell("sample_targets", 1, TEMPERATURE),
    _cell("sample_targets", 1, MIN_P),
    _cell("accept", 32),
    _cell("decide_exit", 32),
    _cell("compact_kv", 32),
    _cell("sample_targets", 8, QWEN3),
    _cell("build_tree", 8, form=LARGE),
    _cell("build_tree", 512),
)
ALL = (
    *(_cell(op, batch) for op in (AFTER, "accept", "decide_exit", "compact_kv", "build_tree") for batch in BATCHES),
    *(_cell("build_tree", batch, form=LARGE) for batch in (1, 8, 32)),
    *(_cell("sample_targets", batch, sampling) for sampling in SAMPLINGS for batch in BATCHES),
    Cell("sample_targets", MISTRAL, TREE, 1, TOP_K),
    _cell("sample_targets", 1, WIDE),
)
SMALL, SMALL_TREE = Base("small", 2, 2, 16, 2000), Form(16, 4, (3, 3))
CPU = (  # small enough to try the script
    *(Cell("sample_targets", SMALL, SMALL_TREE, 2, sampling) for sampling in SAMPLINGS),
    *(Cell(op, SMALL, SMALL_TREE, 3) for op in ("build_tree", "accept", "decide_exit", "compact_kv", AFTER)),
)
