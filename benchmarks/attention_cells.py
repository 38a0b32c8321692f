"""What bench_tree_attention.py measures: models, cells, random inputs, and the reference that a result must match."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks import harness, timer
from specexit_kernels import bits
from specexit_kernels.tree_attention import slot_mask, tree_attention_ref

# Relative Frobenius error above which a result is wrong. Rounding of the inputs' products to bf16 leaves a few 1e-3.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
REFERENCE = 2**30  # bytes of float64 scores; a larger result is compared on its first and last row and KV head
NODES, BATCHES, LENGTHS = (1, 8, 27, 60, 128), (1, 8, 32), (1024, 8192, 32768, 131072)


@dataclass(frozen=True)
class Model:
    """Attention of a model: query and KV heads, head dimension, and what its softmax does besides."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None


# From the config.json of each on the Hugging Face hub. Gemma 2 and GPT-OSS have every other layer in a window.
QWEN = Model("Qwen3-4B", 32, 8, 128)  # Qwen/Qwen3-4B
DISTILL = Model("DeepSeek-R1-Distill-Qwen-1.5B", 12, 2, 128)  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
GPT_OSS = Model("GPT-OSS-20B", 64, 8, 64, sinks=True)  # openai/gpt-oss-20b
GEMMA = Model("Gemma-2-9B", 16, 8, 256, softcap=50.0)  # google/gemma-2-9b
MODELS = (QWEN, DISTILL, GPT_OSS, GEMMA)
WINDOWED = (
    Model("GPT-OSS-20B, window", 64, 8, 64, sinks=True, window=128),
    Model("Gemma-2-9B, window", 16, 8, 256, softcap=50.0, window=4096),
)


@dataclass(frozen=True)
class Cell(harness.Cell):
    """One tree in each row: `nodes` queries over `length` committed slots and over themselves."""

    model: Model
    nodes: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.model.name}, {self.nodes} nodes, batch {self.batch}, {self.length:,} slots"

    @property
    def attended(self) -> int:
        """Slots that must be read: L + T, or those in the root's window and T."""
        window = self.model.window
        return (self.length if window is None else min(self.length, window - 1)) + self.nodes

    @property
    def capacity(self) -> int:
        """Slots of the cache: some more than L + T."""
        return 64 * (-(-(self.length + self.nodes) // 64) + 1)

    @property
    def kv_values(self) -> int:
        return 2 * self.batch * self.model.kv_heads * self.attended * self.model.head_dim

    @property
    def rows(self) -> int:
        """Query rows of a KV head: its group's heads x nodes."""
        return self.nodes * self.model.heads // self.model.kv_heads

    def bytes(self, itemsize: int) -> int:
        """The least that must move: K and V of the attended slots once, q and the result once."""
        queries = 2 * self.batch * self.nodes * self.model.heads * self.model.head_dim
        return itemsize * (self.kv_values + queries)

    @property
    def flops(self) -> int:
        """2 B Hq T (L + T) (hd + hd_v): all attended slots for every node, whatever the tree's mask leaves out."""
        return 2 * self.batch * self.model.heads * self.nodes * self.attended * 2 * self.model.head_dim

    @property
    def heading(self) -> str:
        model = self.model
        heads = f"{model.heads}/{model.kv_heads} heads of {model.head_dim}"
        return f"{model.name} ({heads}), {self.nodes} nodes, batch {self.batch}, {self.length:,} slots"

    def keys(self) -> harness.Result:
        model = asdict(self.model)
        return {"model": model.pop("name"), **model, "nodes": self.nodes, "batch": self.batch, "length": self.length}

    def copies(self, device: torch.device, dtype: torch.dtype) -> int:
        """How many copies of the cache leave it cold."""
        return timer.copies_for_cold_cache(self.kv_values * dtype.itemsize, device)

    def memory(self, device: torch.device, dtype: torch.dtype) -> int:
        """The copies of the cache, and the masks."""
        cache = self.kv_values * dtype.itemsize * self.capacity // self.attended
        return self.copies(device, dtype) * cache + 8 * self.batch * self.nodes * self.capacity

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        return make_problem(self, device, dtype, self.copies(device, dtype))


# A dozen, the most important first: where time runs out, the last go without peers. The first ones carry the goals.
GOALS = 4
SUBSET = (
    Cell(QWEN, 60, 1, 8192),
    Cell(QWEN, 60, 1, 32768),
    Cell(QWEN, 60, 8, 8192),
    Cell(QWEN, 60, 1, 1024),
    Cell(QWEN, 60, 1, 131072),
    Cell(GPT_OSS, 60, 1, 8192),
    Cell(DISTILL, 60, 1, 8192),
    Cell(GEMMA, 60, 1, 8192),
    Cell(QWEN, 1, 1, 8192),
    Cell(QWEN, 8, 32, 1024),
    Cell(QWEN, 27, 8, 8192),
    Cell(QWEN, 128, 1, 8192),
)
ALL = tuple(Cell(m, t, b, n) for m in MODELS for t in NODES for b in BATCHES for n in LENGTHS) + tuple(
    Cell(m, 60, b, n) for m in WINDOWED for b in BATCHES for n in LENGTHS
)
CPU = (Cell(QWEN, 8, 1, 256), Cell(QWEN, 27, 2, 256), Cell(GPT_OSS, 8, 1, 256))  # small enough to try the script


@dataclass
class Problem:
    """The inputs of a cell, in as many copies as leave the caches cold. All hold the same numbers.

    copies     q [B, T, Hq, hd], k and v [B, Hkv, capacity, hd]; slots from L + T on, which nobody may see, hold NaN (on
               a CPU a large number: NaN would send its implementation to the twin, which is not its usual time)
    lengths    [B] int32, all L          positions  [B, T] int32: L + depth of the node
    visible    [B, T, W] int64           sinks      [Hq], or None
    """

    cell: Cell
    copies: list[tuple[Tensor, Tensor, Tensor]]
    lengths: Tensor
    positions: Tensor
    visible: Tensor
    sinks: Tensor | None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.cell.model.head_dim)

    @property
    def slots(self) -> int:
        """L + T: what a peer without lengths is given of the cache."""
        return self.cell.length + self.cell.nodes

    @cached_property
    def seen(self) -> Tensor:
        """[B, T, L + T] bool: the dense mask that most peers need."""
        window = self.cell.model.window
        return slot_mask(self.lengths, self.positions, self.visible, self.slots, window=window) == 0

    @cached_property
    def bias(self) -> Tensor:
        """[B, 1, T, L + T] x: the dense mask as SDPA adds it, its rows aligned as its kernels want them."""
        batch, nodes, slots = self.seen.shape
        bias = self.copies[0][0].new_empty(batch, 1, nodes, -(-slots // 64) * 64)[..., :slots]
        return bias.copy_(torch.where(self.seen.unsqueeze(1), 0.0, -math.inf))

    @cached_property
    def expected(self) -> tuple[list[int], list[int], Tensor]:
        """Rows and KV heads that are compared, and the twin's result there in float64."""
        model, batch = self.cell.model, self.cell.batch
        group = model.heads // model.kv_heads
        whole = 8 * batch * model.heads * self.cell.nodes * self.cell.capacity <= REFERENCE
        rows = list(range(batch)) if whole else sorted({0, batch - 1})
        kv_heads = list(range(model.kv_heads)) if whole else sorted({0, model.kv_heads - 1})
        heads = [head * group + i for head in kv_heads for i in range(group)]
        q, k, v = self.copies[0]
        expected = tree_attention_ref(
            q[rows][:, :, heads].double(),
            k[rows][:, kv_heads].double(),
            v[rows][:, kv_heads].double(),
            self.lengths[rows],
            self.positions[rows],
            self.visible[rows],
            self.scale,
            model.window,
            model.softcap,
            None if self.sinks is None else self.sinks[heads],
        )
        return rows, heads, expected

    def error(self, result: Tensor) -> float:
        """Relative Frobenius error of a result [B, T, Hq, hd]; NaN for another shape, and for any entry not finite."""
        if result.shape != self.copies[0][0].shape or not bool(result.isfinite().all()):
            return math.nan
        rows, heads, expected = self.expected
        return float((result[rows][:, :, heads].double() - expected).norm() / expected.norm())

    def check(self, result: Tensor) -> float:
        """The error of a result. Raises Unavailable where it is above the tolerance."""
        error = self.error(result)
        if not error <= TOLERANCE[self.copies[0][0].dtype]:  # NaN is not, either
            raise harness.Unavailable(f"wrong result: relative error {error:.1e}")
        return error


def random_tree(batch: int, nodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits [B, T, W] and depths [B, T] int32 of trees whose parents are uniform among the nodes before."""
    seen = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    row = torch.arange(batch)
    for node in range(1, nodes):
        parent = torch.randint(0, node, (batch,), generator=generator)
        seen[row, node] |= seen[row, parent]
    return bits.pack(seen), (seen.sum(-1) - 1).int()


def make_problem(cell: Cell, device: torch.device, dtype: torch.dtype, copies: int, seed: int = 0) -> Problem:
    """Random inputs of a cell: normal q, k, v, so that the attention is spread over many slots.

    What an implementation may get wrong must show in the error of a long cell, too: the tree's keys are longer than the
    others, so that its few slots have weight; the scores of a model with a softcap come near it; a sink weighs as much
    as the slots do.
    """
    model = cell.model
    generator = torch.Generator(device).manual_seed(seed)
    visible, depth = random_tree(cell.batch, cell.nodes, torch.Generator().manual_seed(seed))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    q = normal(cell.batch, cell.nodes, model.heads, model.head_dim)
    k, v = (normal(cell.batch, model.kv_heads, cell.capacity, model.head_dim) for _ in "kv")
    if model.softcap:
        q *= 4
    k[:, :, cell.length :] *= 3
    for cache in (k, v):
        cache[:, :, cell.length + cell.nodes :] = 1e4 if device.type == "cpu" else math.nan
    return Problem(
        cell,
        [(q, k, v)] + [(q.clone(), k.clone(), v.clone()) for _ in range(copies - 1)],
        torch.full((cell.batch,), cell.length, dtype=torch.int32, device=device),
        (cell.length + depth).to(device),
        visible.to(device),
        normal(model.heads) + math.log(cell.attended) if model.sinks else None,
    )
