"""Accepted scratch rows of the KV cache become committed rows, in place, for all layers.

    slot base + i  takes  slot base + path[i]        for 0 < i < n_accepted, base = lengths - n_accepted

The keys of a tree lie in node order behind the committed slots, so an accepted path has gaps. Its root needs no move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, cuda
from specexit_kernels._op import Op


def compact_kv_ref(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    path: Tensor,
    n_accepted: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """The meaning of `compact_kv` in plain PyTorch: CPU path and test oracle."""
    if path.shape[1] == 1:  # no node below the root
        return
    # Nodes that do not move copy the root's slot onto itself: shapes must not depend on how many were accepted.
    node = torch.arange(1, path.shape[1], device=path.device)
    moves = node < n_accepted.unsqueeze(1)
    base = (lengths - n_accepted).unsqueeze(1)
    source, target = base + path[:, 1:] * moves, base + node * moves  # [B, D]
    if block_table is None:
        source, target = source.long()[:, None, :, None], target[:, None, :, None]
        for cache in (*keys, *values):
            kv_heads, head_dim = cache.shape[1], cache.shape[3]
            rows = cache.gather(2, source.expand(-1, kv_heads, -1, head_dim))
            cache.scatter_(2, target.expand(-1, kv_heads, -1, head_dim), rows)
    elif keys:
        page = keys[0].shape[1]
        from_page, from_slot = block_table.gather(1, source.long() // page), source % page
        to_page, to_slot = block_table.gather(1, target // page), target % page
        for cache in (*keys, *values):
            cache[to_page, to_slot] = cache[from_page, from_slot]  # [B, D, Hkv, hd], read before it is written


def _outputs(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    path: Tensor,
    n_accepted: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
) -> None:
    return None


_OP = Op(
    "compact_kv(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor path, Tensor n_accepted, Tensor lengths,"
    " Tensor? block_table=None) -> ()",
    compact_kv_ref,
    _outputs,
)


def _cuda_limit(keys: Sequence[Tensor], values: Sequence[Tensor], path: Tensor, *arguments: Any) -> str | None:
    return cuda.device_limit("path", path)


cuda.register(_OP, _cuda_limit)


def compact_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    path: Tensor,
    n_accepted: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Move the keys and values of the accepted nodes, in place, to where the committed slots end.

    keys         a tensor a layer, changed: [B, Hkv, slots, hd] x, any strides but the last; or paged,
                 [pages, page, Hkv, hd] with `block_table`. Layers may differ in all sizes but B and page.
    values       as keys; as many
    path         [B, D + 1] int32: the accepted nodes, ascending, root (node 0) first; from n_accepted on, anything
    n_accepted   [B] int32, 0 to D + 1, the root included; a row with 0 does not change
    lengths      [B] int32: the committed slots, accepted nodes included
    block_table  [B, blocks] int32: page of slots [page * i, page * (i + 1)); rows share no page that they write to

    Slot lengths - n_accepted + i takes slot lengths - n_accepted + path[i]; a row is read before it is written. Slots
    beyond `lengths` keep what they held. That the cache holds a row's scratch slots is the caller's care, as the host
    does not read lengths.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong number, shape, stride or device.
    """
    sizes: dict[str, int] = {}
    _checks.tensor("path", path, ("B", "D + 1"), torch.int32, sizes)
    _checks.tensor("n_accepted", n_accepted, ("B",), torch.int32, sizes, path)
    _checks.tensor("lengths", lengths, ("B",), torch.int32, sizes, path)
    for name, value in (("path", path), ("n_accepted", n_accepted), ("lengths", lengths)):
        _checks.unit_stride(name, value)
    if path.shape[1] == 0:
        raise ValueError(f"path must have a column for the root, was {list(path.shape)}")
    if block_table is None:
        shape, shared = ("B", "Hkv", "slots", "hd"), "B"
    else:
        shape, shared = ("pages", "page", "Hkv", "hd"), "page"
        _checks.tensor("block_table", block_table, ("B", "blocks"), torch.int32, sizes, path)
        _checks.unit_stride("block_table", block_table)
    for name, caches in (("keys", keys), ("values", values)):
        if not isinstance(caches, Sequence):
            raise TypeError(f"{name} must be a list of tensors, was {type(caches).__name__}")
        for i, cache in enumerate(caches):
            layer = {shared: sizes[shared]} if shared in sizes else {}  # the other sizes are the layer's own
            _checks.tensor(f"{name}[{i}]", cache, shape, _checks.FLOATS_64, layer, path)
            _checks.unit_stride(f"{name}[{i}]", cache)
            sizes[shared] = layer[shared]
    if len(keys) != len(values):
        raise ValueError(f"values must be as many as keys, {len(keys)}, was {len(values)}")
    _OP(list(keys), list(values), path, n_accepted, lengths, block_table, implementation=implementation)
