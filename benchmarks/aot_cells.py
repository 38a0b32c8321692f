"""What benchmarks/aot.py compiles: kernels as their launchers would launch them, on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from specexit_kernels.draft_topk import outputs as topk_outputs
from specexit_kernels.grow_beam import outputs as beam_outputs
from specexit_kernels.grow_level import outputs as level_outputs
from specexit_kernels.project_features import outputs as features_outputs
from specexit_kernels.triton import draft_topk, grow_beam, project_features, tree_attention
from specexit_kernels.triton.draft_head_table import Config as HeadConfig
from specexit_kernels.triton.draft_head_table import features_configs, head_configs
from specexit_kernels.triton.launch import Device, Launch
from specexit_kernels.triton.tree_attention_table import Config, heights

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))  # of keys and values
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"page": 16},
    {"window": 128, "sinks": True},
    {"softcap": 50.0},
    {"page": 64, "window": 4096, "softcap": 30.0, "sinks": True},
)
HEADS = (
    (4096, 32_000),
    (2560, 151_936),
    (2880, 32_000),
)  # hidden size, vocabulary; the last size is no multiple of 128


class Cell(Protocol):
    """Kernels for one architecture."""

    @property
    def name(self) -> str:
        """The line's first words."""

    @property
    def capability(self) -> int:
        """10 * major + minor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products; those in fp32 use no tensor cores, and are for tests."""

    @property
    def rows(self) -> int:
        """Of a tile of the products."""

    def launches(self) -> list[Launch]:
        """The launches, on tensors without memory."""


PRODUCTS = ("attend_kernel", "head_kernel", "features_kernel")


def tensor_core(cell: Cell, kernel: str) -> str | None:
    """The instruction that a kernel must have: wgmma and tcgen05 take 64 rows; fp32 has none that is exact."""
    if cell.dtype == torch.float32 or kernel not in PRODUCTS:
        return None
    return {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[cell.capability] if cell.rows >= 64 else "HMMA"


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(cell: Cell, *words: object) -> str:
    return " ".join([f"sm_{cell.capability}", str(cell.dtype).removeprefix("torch."), *map(str, words)])


@dataclass(frozen=True)
class AttentionCell:
    """`tree_attention` of a tree of 60 nodes in groups of 4 heads."""

    capability: int
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    config: Config
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        size = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        words = [f"{name}={value}" if value is not True else name for name, value in self.options]
        return _name(self, f"hd {size}", "x".join(map(str, self.config)), *words)

    @property
    def rows(self) -> int:
        return self.config.block_m

    def launches(self) -> list[Launch]:
        nodes, kv_heads, group, slots = 60, 8, 4, 8192
        options, dtype = dict(self.options), self.dtype
        q = _empty(1, kv_heads * group, nodes, self.head_dim, dtype=dtype).transpose(1, 2)  # as transformers gives it
        table = None
        if page := options.get("page"):
            k, v = (
                _empty(slots // page, page, kv_heads, size, dtype=dtype) for size in (self.head_dim, self.value_dim)
            )
            table = _empty(1, slots // page, dtype=torch.int32)
        else:
            k, v = (_empty(1, kv_heads, slots, size, dtype=dtype) for size in (self.head_dim, self.value_dim))
        return tree_attention.launches(
            q,
            k,
            v,
            _empty(1, dtype=torch.int32),
            _empty(1, nodes, dtype=torch.int32),
            _empty(1, nodes, 1, dtype=torch.int64),
            self.head_dim**-0.5,
            options.get("window"),
            options.get("softcap"),
            _empty(kv_heads * group, dtype=dtype) if options.get("sinks") else None,
            table,
            _empty(1, nodes, kv_heads * group, self.value_dim, dtype=dtype),
            device=Device(self.capability, 132),
            config=self.config,
            splits=8,
        )


@dataclass(frozen=True)
class HeadCell:
    """`draft_topk` of as many rows as a tile has, k 10; `signals` with a bias and a token map."""

    capability: int
    dtype: torch.dtype
    size: int
    vocab: int
    config: HeadConfig
    signals: int = 3

    @property
    def name(self) -> str:
        return _name(self, f"head {self.size}x{self.vocab}", "x".join(map(str, self.config)), f"S={self.signals}")

    @property
    def rows(self) -> int:
        return self.config.rows

    def launches(self) -> list[Launch]:
        n, dtype, signals = self.rows, self.dtype, self.signals
        arguments = (
            _empty(n, self.size, dtype=dtype),
            _empty(self.size, dtype=dtype),
            1e-6,
            _empty(self.vocab, self.size, dtype=dtype),
            10,
            _empty(signals, self.size, dtype=dtype) if signals else None,
            _empty(signals, dtype=dtype) if signals else None,
            _empty(self.vocab, dtype=torch.int32) if signals else None,
        )
        device = Device(self.capability, 132)
        return draft_topk.launches(*arguments, *topk_outputs(*arguments), device=device, config=self.config)


@dataclass(frozen=True)
class FeaturesCell:
    """`project_features` of as many rows as a tile has."""

    capability: int
    dtype: torch.dtype
    size: int
    config: HeadConfig
    signals: int = 3
    splits: int = 2

    @property
    def name(self) -> str:
        config = "x".join(map(str, self.config))
        return _name(self, f"features {self.size}", config, f"S={self.signals} splits={self.splits}")

    @property
    def rows(self) -> int:
        return self.config.rows

    def launches(self) -> list[Launch]:
        features = _empty(self.rows, 3, self.size, dtype=self.dtype).unbind(1)  # as the decoder gives them
        weight = _empty(self.size + self.signals, 3 * self.size, dtype=self.dtype)
        return project_features.launches(
            features,
            weight,
            *features_outputs(features, weight),
            device=Device(self.capability, 132),
            config=self.config,
            splits=self.splits,
        )


@dataclass(frozen=True)
class GrowCell:
    """`grow_level` of 8 sequences of `beams` beams, or `grow_beam` where there is no hidden size."""

    capability: int
    dtype: torch.dtype
    beams: int
    size: int = 0
    words: int = 1

    @property
    def name(self) -> str:
        return _name(self, f"grow {self.beams}", f"H={self.size} W={self.words}" if self.size else "scores only")

    @property
    def rows(self) -> int:
        return 1

    def launches(self) -> list[Launch]:
        batch, k = 8, self.beams

        def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return _empty(batch, *shape, dtype=dtype)

        ranked = rows(torch.int32, k, k), rows(torch.float32, k, k), rows(torch.float32, k)
        if not self.size:
            return grow_beam.launches(*ranked, k, beam_outputs(*ranked, k), None)
        level = rows(self.dtype, k, self.size), rows(torch.int64, k, self.words), rows(torch.int64, k, self.words)
        return grow_beam.launches(*ranked, k, level_outputs(*ranked, *level, k), level)


def subset() -> Iterator[Cell]:
    """Of each op every architecture and height at one size, and the widest variant of the others."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for capability in ARCHITECTURES:
        device = Device(capability, 132)
        for config in heights(device, bf16, 128):
            yield AttentionCell(capability, bf16, 128, 128, config)
        for size in (64, 256):
            yield AttentionCell(
                capability, fp16, size, size, heights(device, fp16, size)[-1], tuple(OPTIONS[-1].items())
            )
        for line in head_configs(device, bf16):
            yield HeadCell(capability, bf16, 4096, 32_000, line)
        yield HeadCell(capability, fp16, 2880, 32_000, head_configs(device, fp16)[0], signals=0)
        for line in features_configs(device, bf16):
            yield FeaturesCell(capability, bf16, 4096, line)
        yield GrowCell(capability, bf16, 10, 4096)
    yield AttentionCell(90, bf16, 192, 128, heights(Device(90, 132), bf16, 192)[-1])


def full() -> Iterator[Cell]:
    """Every line of the tables, for every size that takes it, in every variant."""
    for capability in ARCHITECTURES:
        device = Device(capability, 132)
        for dtype in DTYPES:
            for size, vocab in HEADS:
                for line in head_configs(device, dtype):
                    for signals in (3, 0):
                        yield HeadCell(capability, dtype, size, vocab, line, signals)
                for line in features_configs(device, dtype):
                    for signals, splits in ((3, 2), (3, 1), (0, 1)):
                        yield FeaturesCell(capability, dtype, size, line, signals, splits)
            for beams, words in ((10, 1), (10, 2), (32, 3), (64, 3)):
                yield GrowCell(capability, dtype, beams, 4096, words)
            yield GrowCell(capability, dtype, 10)
            for head_dim, value_dim in SIZES:
                for config in heights(device, dtype, max(head_dim, value_dim)):
                    for options in OPTIONS if dtype == torch.bfloat16 else OPTIONS[::4]:
                        yield AttentionCell(capability, dtype, head_dim, value_dim, config, tuple(options.items()))
