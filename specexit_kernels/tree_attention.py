"""Attention of a tree's nodes over the committed cache and over the tree itself, whose mask is packed bits.

    out[n] = sum_j p[n, j] v[j]        p[n] = softmax of scale * q[n] . k[j] over the slots j that query n sees

Query n of row b sees slot j < lengths[b] if its window reaches there, and scratch slot lengths[b] + m if bit m of its
words is set. The same op serves the base's tree, a draft's chain and levels, and a chunk of a prefill (chain bits).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specexit_kernels import _checks, bits, triton
from specexit_kernels._op import Op

MAX_HEAD_DIM = 256  # of the Triton kernel; the twin has no limit


def tree_attention_ref(
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
    """The meaning of `tree_attention` in plain PyTorch: test oracle, and the CPU's path where SDPA cannot serve."""
    if block_table is not None:
        k, v = _gather_pages(k, block_table), _gather_pages(v, block_table)
    batch, queries, heads, head_dim = q.shape
    _, kv_heads, slots, value_dim = v.shape
    group, rows = heads // kv_heads, batch * kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)

    # The query heads that share a KV head stand below each other: one matrix product a KV head.
    packed = q.view(batch, queries, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    packed = packed.reshape(rows, group * queries, head_dim).to(dtype)
    k = k.reshape(rows, slots, head_dim).to(dtype)
    v = v.reshape(rows, slots, value_dim).to(dtype)

    # 0 * NaN is NaN, so V must be finite in the second product. What it held goes into the scores instead, 0 or NaN a
    # slot, where the mask hides it from the queries that do not see it. Half the mean of finite values is finite.
    flaw = (v @ v.new_full((value_dim,), 0.5 / value_dim)).mul_(0).unsqueeze(1)
    scores = torch.baddbmm(flaw, packed, k.transpose(1, 2), alpha=scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)

    if mask is None:
        mask = slot_mask(lengths, positions, visible, slots, window=window, dtype=dtype)
    unseen = (mask < 0).view(batch, 1, 1, queries, slots)
    scores = scores.view(batch, kv_heads, group, queries, slots).masked_fill_(unseen, -math.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(dtype).view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, queries, -1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :slots]

    out = torch.bmm(weights.reshape(rows, group * queries, slots), v.nan_to_num(0.0, 0.0, 0.0))
    out = out.view(batch, kv_heads, group, queries, value_dim).permute(0, 3, 1, 2, 4).contiguous()
    blind = unseen.all(-1).view(batch, queries, 1, 1)  # the softmax over no slot at all is NaN
    return out.view(batch, queries, heads, value_dim).masked_fill_(blind, 0).to(q.dtype)


def _gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """[pages, page, Hkv, hd] -> [B, Hkv, slots, hd]. Entries that a row does not need may hold anything."""
    return pages[block_table.clamp(0, pages.shape[0] - 1)].flatten(1, 2).transpose(1, 2)


def slot_mask(
    lengths: Tensor,
    positions: Tensor,
    visible: Tensor,
    slots: int,
    *,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The additive mask [B, Tq, slots]: 0 where a query sees the slot, else -inf.

    What the CPU computes from the bits. A caller that attends many layers with one mask may make it once and pass it
    on; the arguments are those of `tree_attention`, and `dtype` that of its scores.
    """
    batch, queries, words = visible.shape
    scratch = words * bits.WORD
    hidden = torch.full((), -math.inf, dtype=dtype, device=visible.device)
    slot = torch.arange(slots + scratch, device=visible.device)  # with room for every bit; cut off at the end
    length = lengths.view(batch, 1, 1)
    seen = slot < length
    if window is not None:
        seen = seen & (slot > (positions - window).unsqueeze(2))
    mask = torch.where(seen, 0, hidden).expand(-1, queries, -1).contiguous()
    own = torch.where(bits.unpack(visible, scratch), 0, hidden)
    return mask.scatter_(2, (slot[:scratch] + length).expand_as(own), own)[..., :slots]


def tree_attention_sdpa(
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
    """The CPU's implementation: PyTorch's fused attention, which takes a fraction of the twin's time.

    It multiplies unseen slots by zero instead of leaving them out. A finite result proves that none of them held a NaN
    or an infinity; the twin decides the rest, and what SDPA cannot compute.
    """
    arguments = (lengths, positions, visible, scale, window, softcap, sinks, block_table, mask)
    plain = softcap is None and sinks is None and block_table is None and q.dtype == torch.float32 and q.numel() > 0
    if not plain:
        return tree_attention_ref(q, k, v, *arguments)
    batch, queries, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = heads // kv_heads
    if mask is None:
        mask = slot_mask(lengths, positions, visible, slots, window=window)
    mask = mask.unsqueeze(1)
    packed = q.transpose(1, 2)
    if group > 1:  # the query heads that share a KV head stand below each other
        packed = packed.reshape(batch, kv_heads, group * queries, head_dim)
        mask = mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    if not math.isfinite(out.sum().item()):  # reads a CPU tensor: nothing waits for a device
        return tree_attention_ref(q, k, v, *arguments)
    if group > 1:
        out = out.reshape(batch, heads, queries, -1)
    return out.transpose(1, 2).contiguous()


def _outputs(
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
    return q.new_empty(*q.shape[:3], v.shape[-1])


OP = Op(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor positions, Tensor visible, float scale,"
    " int? window=None, float? softcap=None, Tensor? sinks=None, Tensor? block_table=None,"
    " Tensor? mask=None) -> Tensor",
    tree_attention_ref,
    _outputs,
    cpu=("sdpa", tree_attention_sdpa),
)


def _triton_limit(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> str | None:
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM or v.shape[-1] > MAX_HEAD_DIM:
        return f"q and v must have heads of 1 to {MAX_HEAD_DIM}, were {list(q.shape)} and {list(v.shape)}"
    return triton.tensor_limit("q", q)


triton.register(OP, "tree_attention", _triton_limit)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    positions: Tensor,
    visible: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of each query over the committed slots of its row and the scratch slots that its bits allow.

    q            [B, Tq, Hq, hd] x (fp32, bf16 or fp16; the twin also takes fp64); Hq is a multiple of Hkv
    k            [B, Hkv, slots, hd] x, any strides but the last; or paged, [pages, page, Hkv, hd] with `block_table`
    v            as k, with hd_v in place of hd
    lengths      [B] int32: L, the committed slots of a row; the scratch slots follow them
    positions    [B, Tq] int32, not negative: the queries', which only `window` reads; committed slot j has position j
    visible      [B, Tq, W] int64: bit m of word w allows scratch slot L + 64 w + m. 64 W is at least Tq: the keys of
                 the queries are in scratch slots.
    scale        positive: factor on q . k
    window       how many positions a query attends, its own included (None: all): committed slot j is seen if
                 positions - j < window. Scratch slots are not tested; the caller clears their bits.
    softcap      None, or c > 0: a score s becomes c tanh(s / c)
    sinks        [Hq], x or fp32: one more logit a head, which takes part in the softmax and adds nothing
    block_table  [B, blocks] int32: page of slots [page * i, page * (i + 1)); slots = page * blocks. Entries that a row
                 does not need may hold anything.
    mask         None, or `slot_mask` of these arguments, [B, Tq, slots] fp32 (fp64), so that a CPU need not make it
                 for every layer; kernels read the bits
    result       [B, Tq, Hq, hd_v] x. Scores and sums are fp32 (fp64 for fp64).

    A slot that a query does not see adds exactly zero to it, whatever it holds. A NaN that it sees makes its result
    NaN, in the NaN's own column of V at least. A query that sees no slot gets zeros. Bits beyond `slots` are ignored;
    that the cache holds a row's committed and scratch slots (lengths + scratch <= slots) is the caller's care, as the
    host does not read lengths.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, stride, device or value.
    """
    arguments = (q, k, v, lengths, positions, visible, scale, window, softcap, sinks, block_table, mask)
    check_arguments(*arguments)
    return OP(*arguments, implementation=implementation)


def check_arguments(
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
) -> None:
    """What `tree_attention` asks of its arguments; raises as it says. See `specexit_kernels.unchecked`."""
    sizes: dict[str, int] = {}
    _checks.tensor("q", q, ("B", "Tq", "Hq", "hd"), _checks.FLOATS_64, sizes)
    if block_table is None:
        _checks.tensor("k", k, ("B", "Hkv", "slots", "hd"), q.dtype, sizes, q)
        _checks.tensor("v", v, ("B", "Hkv", "slots", "hd_v"), q.dtype, sizes, q)
        slots = sizes["slots"]
    else:
        _checks.tensor("k", k, ("pages", "page", "Hkv", "hd"), q.dtype, sizes, q)
        _checks.tensor("v", v, ("pages", "page", "Hkv", "hd_v"), q.dtype, sizes, q)
        _checks.tensor("block_table", block_table, ("B", "blocks"), torch.int32, sizes, q)
        _checks.unit_stride("block_table", block_table)
        slots = sizes["page"] * sizes["blocks"]
    _checks.tensor("lengths", lengths, ("B",), torch.int32, sizes, q)
    _checks.tensor("positions", positions, ("B", "Tq"), torch.int32, sizes, q)
    _checks.tensor("visible", visible, ("B", "Tq", "W"), torch.int64, sizes, q)
    if sinks is not None:
        _checks.tensor("sinks", sinks, ("Hq",), (q.dtype, torch.float32), sizes, q)
        _checks.unit_stride("sinks", sinks)
    for name, value in (("q", q), ("k", k), ("v", v), ("lengths", lengths), ("positions", positions)):
        _checks.unit_stride(name, value)
    _checks.unit_stride("visible", visible)
    if sizes["Hkv"] == 0 or sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"q must have a multiple of k's {sizes['Hkv']} heads, was {list(q.shape)}")
    queries = sizes["Tq"]
    if queries > slots:
        raise ValueError(f"k must have a slot for each of q's {queries} queries, had {slots}")
    least, most = max(1, bits.words(queries)), bits.words(slots)
    if not least <= sizes["W"] <= most:
        words = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"visible must have {words} words for {queries} queries in {slots} slots, was {list(visible.shape)}"
        )
    if mask is not None:
        _checks.tensor("mask", mask, ("B", "Tq", slots), torch.promote_types(q.dtype, torch.float32), sizes, q)
    _checks.positive("scale", scale)
    if window is not None:
        _checks.between("window", window, 1, 2**31 - 1)
    if softcap is not None:
        _checks.positive("softcap", softcap)
