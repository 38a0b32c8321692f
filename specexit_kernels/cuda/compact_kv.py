"""The launch of csrc/compact_kv.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from specexit_kernels.cuda.launch import stream, view

VECTOR = 16  # bytes that a thread moves at once, if they divide all addresses, strides and heads


class Cache(NamedTuple):
    """A layer's keys or values; strides and sizes in bytes, or in vectors. The order is the binding's."""

    address: int
    stride_block: int  # of a row of the batch, or a page
    stride_slot: int
    stride_head: int
    blocks: int
    heads: int
    head: int  # size of one
    slots: int  # of a block

    @staticmethod
    def of(cache: Tensor, paged: bool) -> Cache:
        """In bytes. An axis of one entry has no stride that counts."""
        slot, head = (1, 2) if paged else (2, 1)
        item = cache.element_size()
        block_stride, slot_stride, head_stride = (
            cache.stride(axis) * item if cache.shape[axis] > 1 else 0 for axis in (0, slot, head)
        )
        blocks, heads, size, slots = (cache.shape[axis] for axis in (0, head, 3, slot))
        return Cache(cache.data_ptr(), block_stride, slot_stride, head_stride, blocks, heads, size * item, slots)

    def in_vectors(self, vector: int) -> Cache:
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
    caches = [Cache.of(cache, block_table is not None) for cache in (*keys, *values)]
    vector = math.gcd(VECTOR, *(size for c in caches for size in (*c[:4], c.head)))
    with stream(path.device) as (module, queue):
        module.compact_kv(
            [cache.in_vectors(vector) for cache in caches],
            vector,
            view(path, 2),
            view(n_accepted, 1),
            view(lengths, 1),
            view(block_table, 2),
            *path.shape,
            0 if block_table is None else block_table.shape[1],
            queue,
        )
