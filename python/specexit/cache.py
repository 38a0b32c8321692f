"""A KV cache with fixed addresses: committed slots first, then the scratch slots of the tree in flight.

Slots [0, L) of a row are committed; a forward over T nodes writes its keys and values to [L, L + T), where L is a
device tensor that the host never reads. Rows have their own lengths, so prompts need no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class LayerForm(NamedTuple):
    """What a layer keeps of a position."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


class _Shared:
    """What the layers of a cache have in common; they do not know the cache, so that nothing keeps its memory alive."""

    def __init__(self, lengths: Tensor, slots: int) -> None:
        self.lengths = lengths
        self.slots = slots
        self.index: dict[tuple[int, int, int], Tensor] = {}

    def write_index(self, heads: int, count: int, slots: int) -> Tensor:
        """Rows of the flattened [B * heads * slots] that take `count` new slots; made once for a forward."""
        key = heads, count, slots
        if key not in self.index:
            batch, device = self.lengths.shape[0], self.lengths.device
            first = torch.arange(0, batch * heads * slots, slots, device=device).view(batch, heads, 1)
            slot = self.lengths.view(-1, 1, 1) + torch.arange(count, device=device)
            self.index[key] = (first + slot).flatten()
        return self.index[key]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, Hkv, slots, hd]."""

    is_compileable = True
    is_sliding = False  # all layers are full length; a window is applied by position, in the kernel

    def __init__(self, shared: _Shared) -> None:
        super().__init__()
        self.shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As the first forward shows it, where it was not known before."""
        sizes = key_states.shape[-1], value_states.shape[-1]
        self.allocate(LayerForm(key_states.shape[1], *sizes, key_states.dtype))

    def allocate(self, form: LayerForm) -> None:
        # Zeros, and not what the memory held: a slot that was never written is not seen, but may be multiplied.
        shape, device = (self.shared.lengths.shape[0], form.heads, self.shared.slots), self.shared.lengths.device
        self.hold(*(torch.zeros(*shape, n, dtype=form.dtype, device=device) for n in (form.key_size, form.value_size)))

    def hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def form(self) -> LayerForm | None:
        """None where no forward has written anything: some models let a layer attend to another one's slots."""
        if not self.is_initialized:
            return None
        keys, values = self._held()
        return LayerForm(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._held()
        index = self.shared.write_index(keys.shape[1], key_states.shape[2], keys.shape[2])
        keys.flatten(0, 2).index_copy_(0, index, key_states.reshape(-1, key_states.shape[-1]))
        values.flatten(0, 2).index_copy_(0, index, value_states.reshape(-1, value_states.shape[-1]))
        return keys, values

    def grow(self, slots: int) -> None:
        if self.is_initialized:
            keys, values = self._held()
            if keys.shape[2] < slots:
                self.keys, self.values = grown(keys, slots), grown(values, slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared.slots, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given; nothing may ask the device for a length

    def get_max_length(self) -> int:
        return self.shared.slots


class SlotCache(Cache):
    """The cache of a whole model.

    forms    what each layer keeps; None: not known, or nothing
    lengths  [B] int32, on the device: committed slots of each row; the decode state's own tensor, not a copy
    slots    capacity of a row, scratch included
    """

    def __init__(self, forms: Sequence[LayerForm | None], lengths: Tensor, slots: int) -> None:
        self._shared = _Shared(lengths, slots)
        super().__init__(layers=[SlotLayer(self._shared) for _ in forms])
        for layer, form in zip(self.layers, forms, strict=True):
            if form is not None:
                layer.allocate(form)

    @property
    def lengths(self) -> Tensor:
        return self._shared.lengths

    @property
    def slots(self) -> int:
        return self._shared.slots

    def forms(self) -> list[LayerForm | None]:
        return [layer.form for layer in self.layers]

    def rows(self, first: int, count: int) -> SlotCache:
        """The rows [first, first + count) in the same memory, until the cache grows."""
        rows = slice(first, first + count)
        part = SlotCache([None] * len(self.layers), self.lengths[rows], self.slots)
        for layer, whole in zip(part.layers, self.layers, strict=True):
            if whole.is_initialized:
                layer.hold(whole.keys[rows], whole.values[rows])
        return part

    def begin(self) -> None:
        """Start a forward: the lengths may have changed since the last one."""
        self._shared.index.clear()

    def keys(self) -> list[Tensor]:
        """Of the layers that keep any: some models let a layer attend to another one's."""
        return [layer.keys for layer in self.layers if layer.is_initialized]

    def values(self) -> list[Tensor]:
        return [layer.values for layer in self.layers if layer.is_initialized]

    def grow(self, slots: int) -> None:
        """Move every layer to a larger allocation; the committed slots keep what they hold. Where memory ends before
        all have moved, nothing is lost: a layer may have more slots than the others."""
        for layer in self.layers:
            layer.grow(slots)
        self._shared.slots = slots


def grown(old: Tensor, slots: int) -> Tensor:
    """A larger allocation [B, Hkv, slots, hd] that begins with what the old one holds."""
    new = old.new_zeros(*old.shape[:2], slots, old.shape[-1])
    new[:, :, : old.shape[2]] = old
    return new
