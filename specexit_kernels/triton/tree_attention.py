"""The launches of `tree_attention`'s Triton kernels."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from specexit_kernels.triton.launch import Device, Launch, device_of, run
from specexit_kernels.triton.tree_attention_kernels import UNIT, attend_kernel, merge_kernel
from specexit_kernels.triton.tree_attention_table import Config, choose_config, choose_splits

# What a program of the merge reads at a time: 32 fp32 vectors, which its warps hold in registers. Provisional.
MERGED_ROWS, MERGED_SPLITS, MERGE_WARPS = 4, 8, 8


def cover(size: int) -> tuple[int, int]:
    """Two powers of two, the second perhaps 0, whose sum is at least `size`: 80 is 64 + 16, where 128 would waste a
    third of the arithmetic. A matrix product needs at least 16."""
    block = max(16, 1 << (size.bit_length() - 1))
    return block, max(16, triton.next_power_of_2(size - block)) if size > block else 0


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    positions: Tensor,
    visible: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    out: Tensor,
    *,
    device: Device,
    config: Config | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """The launches that write `out` on `device`, for arguments of the op: attend, and merge where there are splits.

    The table chooses tiles and splits that are not given.
    """
    batch, queries, heads, head_dim = q.shape
    value_dim = v.shape[-1]
    visible = visible.view(torch.int32)
    paged = block_table is not None
    slot_axis, head_axis = (1, 2) if paged else (2, 1)
    kv_heads = k.shape[head_axis]
    slots = k.shape[1] * block_table.shape[1] if block_table is not None else k.shape[2]
    if config is None:
        config = choose_config(device, q.dtype, max(head_dim, value_dim), queries * (heads // kv_heads))
    tiles = triton.cdiv(queries * (heads // kv_heads), config.block_m)
    units = visible.shape[2] + triton.cdiv(slots if window is None else min(slots, window), UNIT.value)
    chosen, least = choose_splits(device, batch * kv_heads * tiles, config.warps, units)
    splits = splits or chosen
    partial = partial_lse = None
    if splits > 1:
        partial = q.new_empty(batch, queries, heads, splits, value_dim, dtype=torch.float32)
        partial_lse = q.new_empty(batch, queries, heads, splits, dtype=torch.float32)
    align = math.gcd(16, *k.stride()[:3], *v.stride()[:3])
    head_block, head_rest = cover(head_dim)
    value_block, value_rest = cover(value_dim)
    shared = {
        "lengths": lengths,
        "positions": positions,
        "sinks": sinks,
        "out": out,
        "partial": partial,
        "partial_lse": partial_lse,
        "window": window,
        "queries": queries,
        "words": visible.shape[2],
        "slots": slots,
        "splits": splits,
        "least": least,
        "stride_positions_batch": positions.stride(0),
        "VALUE": value_dim,
        "QUERIES": 1 if window is None else triton.next_power_of_2(queries),
    }
    attend = {
        **shared,
        "q": q,
        "k": k,
        "v": v,
        "visible": visible,
        "table": block_table,
        "scale": scale,
        "softcap": softcap,
        "kv_heads": kv_heads,
        "tiles": tiles,
        "stride_q_batch": q.stride(0),
        "stride_q_query": q.stride(1),
        "stride_q_head": q.stride(2),
        "stride_k_batch": k.stride(0) // align,
        "stride_k_head": k.stride(head_axis) // align,
        "stride_k_slot": k.stride(slot_axis) // align,
        "stride_v_batch": v.stride(0) // align,
        "stride_v_head": v.stride(head_axis) // align,
        "stride_v_slot": v.stride(slot_axis) // align,
        "stride_visible_batch": visible.stride(0),
        "stride_visible_query": visible.stride(1),
        "stride_table_batch": block_table.stride(0) if block_table is not None else 0,
        "GROUP": heads // kv_heads,
        "HEAD": head_dim,
        "HEAD_BLOCK": head_block,
        "HEAD_REST": head_rest,
        "VALUE_BLOCK": value_block,
        "VALUE_REST": value_rest,
        "PAGE": k.shape[1] if paged else 1,
        "ALIGN": align,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MASKED_STAGES": config.masked_stages,
    }
    grid = batch * kv_heads * splits * tiles
    first = Launch(attend_kernel, grid, attend, config.warps, config.stages)
    if splits == 1:
        return [first]
    merge = {
        **shared,
        "heads": heads,
        "COLUMNS": triton.next_power_of_2(value_dim),
        "BLOCK_UNITS": config.block_n // UNIT.value,
        "BLOCK_ROWS": MERGED_ROWS,
        "BLOCK_SPLITS": MERGED_SPLITS,
    }
    grid = batch * triton.cdiv(queries * heads, MERGED_ROWS)
    return [first, Launch(merge_kernel, grid, merge, warps=MERGE_WARPS, stages=1)]


def tree_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    positions: Tensor,
    visible: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The op `tree_attention` on a GPU. It reads the bits; a `mask`, which holds the same, is not looked at."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    if out.numel() == 0:
        return out
    arguments = (q, k, v, lengths, positions, visible, scale, window, softcap, sinks, block_table)
    run(launches(*arguments, out, device=device_of(q.device)), q.device)
    return out
