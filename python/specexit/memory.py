"""Bytes: what a decoder holds, what is free, and what to say where that is too little."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a decoder holds on its device. Between calls nothing of it grows, and in a call only the caches do.

    base     the model's weights
    draft    the draft's weights, the embedding that it shares with the base excluded
    cache    the base's keys and values
    drafts_cache  the draft's, with its buffers
    buffers  the state of decoding
    graph    what the captured step computes on the way
    slots    positions that the caches have room for
    """

    base: int
    draft: int
    cache: int
    drafts_cache: int
    buffers: int
    graph: int
    slots: int = 0

    @property
    def total(self) -> int:
        return self.base + self.draft + self.cache + self.drafts_cache + self.buffers + self.graph

    def __str__(self) -> str:
        parts = {
            "base": self.base,
            "draft": self.draft,
            f"cache of {self.slots:,} slots": self.cache,
            "draft's cache": self.drafts_cache,
            "buffers": self.buffers,
            "graph": self.graph,
        }
        return ", ".join(f"{name} {readable(size)}" for name, size in parts.items()) + f"; {readable(self.total)}"


def readable(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def held(*values: object) -> int:
    """Bytes of the distinct storages of all tensors in `values`: tensors, or structures and objects that hold them."""
    storages = {}
    for tensor in tensors_in(values):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in a structure, and in the fields of dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def weights_of(*modules: object) -> list[Tensor]:
    """Parameters and buffers of those that are modules."""
    found = [module for module in modules if isinstance(module, nn.Module)]
    return [tensor for module in found for tensor in (*module.parameters(), *module.buffers())]


def available(device: torch.device) -> float:
    """Bytes that can still be allocated; infinity where nothing tells."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def out_of_memory(error: BaseException, batch: int, slots: int, slot_bytes: int, free: float) -> torch.OutOfMemoryError:
    """The error of an allocation of `batch` rows of `slots` cache slots, in words that help.

    slot_bytes  of a slot in all layers of the base
    free        bytes that there were
    """
    text = f"a cache of {batch} x {slots:,} slots takes {readable(batch * slots * slot_bytes)}, besides the draft's"
    if math.isfinite(free):
        text += f", and {readable(free)} were free"
        most, rows = int(free // max(slot_bytes * batch, 1)), int(free // max(slot_bytes * slots, 1))
        fits = [f"{batch} x {most:,} slots (capacity={most})"] if most else []
        fits += [f"{rows} x {slots:,} slots (fewer prompts at a time)"] if rows else []
        text += f"; what would fit: less than {' or '.join(fits) or 'one slot'}"
    return torch.OutOfMemoryError(f"{text}. {error}")
