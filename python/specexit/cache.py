"""A KV cache with fixed addresses: committed slots first, then the scratch slots of the tree in flight.

Slots [0, L) of a row are committed; a forward over T nodes writes its keys and values to [L, L + T), where L is a
device tensor that the host never reads. Rows have their own lengths, so prompts need no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, Hkv, slots, hd]; allocated by the first forward, which knows the heads."""

    is_compileable = True
    is_sliding = False  # all layers are full length; a window is applied by position, in the kernel

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, heads, self.cache.slots, key_states.shape[-1])
        self.values = value_states.new_zeros(batch, heads, self.cache.slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        index = self.cache.write_index(keys.shape[1], key_states.shape[2])
        keys.flatten(0, 2).index_copy_(0, index, key_states.reshape(-1, key_states.shape[-1]))
        values.flatten(0, 2).index_copy_(0, index, value_states.reshape(-1, value_states.shape[-1]))
        return keys, values

    def grow(self, slots: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old is not None:
                new = old.new_zeros(*old.shape[:2], slots, old.shape[-1])
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.slots, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given; nothing may ask the device for a length

    def get_max_length(self) -> int:
        return self.cache.slots


class SlotCache(Cache):
    """The cache of a whole model.

    lengths  [B] int32, on the device: committed slots of each row; the decode state's own tensor, not a copy
    slots    capacity of a row, scratch included
    """

    def __init__(self, n_layers: int, lengths: Tensor, slots: int) -> None:
        self.lengths = lengths
        self.slots = slots
        self._index: dict[tuple[int, int], Tensor] = {}
        super().__init__(layers=[SlotLayer(self) for _ in range(n_layers)])

    def begin(self) -> None:
        """Start a forward: the lengths may have changed since the last one."""
        self._index.clear()

    def write_index(self, heads: int, count: int) -> Tensor:
        """Rows of the flattened [B * heads * slots] that take `count` new slots; shared by the layers of a forward."""
        index = self._index.get((heads, count))
        if index is None:
            batch, device = self.lengths.shape[0], self.lengths.device
            first = torch.arange(0, batch * heads * self.slots, self.slots, device=device).view(batch, heads, 1)
            slot = self.lengths.view(-1, 1, 1) + torch.arange(count, device=device)
            index = self._index[heads, count] = (first + slot).flatten()
        return index

    def keys(self) -> list[Tensor]:
        """Of the layers that keep any: some models let a layer attend to another one's."""
        return [layer.keys for layer in self.layers if layer.is_initialized]

    def values(self) -> list[Tensor]:
        return [layer.values for layer in self.layers if layer.is_initialized]

    def grow(self, slots: int) -> None:
        """Move every layer to a larger allocation; the committed slots keep what they hold."""
        self.slots = slots
        for layer in self.layers:
            layer.grow(slots)
