"""The launch of csrc/compact_kv.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from specexit_kernels.cuda.launch import stream, view

VECTOR = 16  # bytes that a thread moves at once, if they divide all addresses, strides and heads


class Shape(NamedTuple):
    """Shape and strides of a layer's keys or values, in bytes or in vectors. The order is the binding's."""

    stride_block: int  # of a row of the batch, or a page
    stride_slot: int
    stride_head: int
    blocks: int
    heads: int
    head: int  # size of one
    slots: int  # of a block

    @staticmethod
    def of(cache: Tensor, paged: bool) -> Shape:
        """In bytes. An axis of one entry has no stride that counts."""
        slot, head = (1, 2) if paged else (2, 1)
        item = cache.element_size()
        block_stride, slot_stride, head_stride = (
            cache.stride(axis) * item if cache.shape[axis] > 1 else 0 for axis in (0, slot, head)
        )
        blocks, heads, size, slots = (cache.shape[axis] for axis in (0, head, 3, slot))
        return Shape(block_stride, slot_stride, head_stride, blocks, heads, size * item, slots)

    def in_vectors(self, vector: int) -> Shape:
        """In vectors of so many bytes, which divide all."""
        return self._replace(
            stride_block=self.stride_block // vector,
            stride_slot=self.stride_slot // vector,
            stride_head=self.stride_head // vector,
            head=self.head // vector,
        )


def compact_kv_cuda(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    path: Tensor,
    n_accepted: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """The op `compact_kv` on a GPU."""
    paged = block_table is not None
    alike: dict[object, list[Tensor]] = {}  # most models have one shape in all layers
    for cache in (*keys, *values):
        alike.setdefault((cache.shape, cache.stride(), cache.dtype), []).append(cache)
    groups = [(Shape.of(caches[0], paged), [cache.data_ptr() for cache in caches]) for caches in alike.values()]
    sizes = (size for shape, addresses in groups for size in (*shape[:3], shape.head, *addresses))
    vector = math.gcd(VECTOR, *sizes)
    with stream(path.device) as (module, queue):
        module.compact_kv(
            [(shape.in_vectors(vector), addresses) for shape, addresses in groups],
            vector,
            view(path, 2),
            view(n_accepted, 1),
            view(lengths, 1),
            view(block_table, 2),
            paged,
            *path.shape,
            0 if block_table is None else block_table.shape[1],
            queue,
        )
