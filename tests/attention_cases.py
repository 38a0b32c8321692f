"""Arguments of `tree_attention`, for the tests of its twin, and of its kernel in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from specexit_kernels import bits
from specexit_kernels.tree_attention import tree_attention_ref

NAN = float("nan")
SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 72), (8, 8))
NAMES = ("q", "k", "v", "lengths", "positions", "visible", "scale", "window", "softcap", "sinks", "block_table")
MASKS = ("tree", "chain", "star", "sparse", "full", "empty")

Arguments = dict[str, Any]


def normal(rng: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def draw(rng: Generator, low: int, high: int) -> int:
    """A number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def pick(rng: Generator, *choices: Any) -> Any:
    return choices[draw(rng, 0, len(choices) - 1)]


def case(
    rng: Generator,
    *,
    batch: int = 2,
    queries: int = 5,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    value_dim: int = 8,
    slots: int = 90,
    scratch: int = 20,
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Random arguments. A row has up to slots - scratch committed slots; each scratch bit is set with `density`."""
    lengths = torch.randint(0, slots - scratch + 1, (batch,), generator=rng, dtype=torch.int32)
    mask = torch.rand(batch, queries, scratch, generator=rng) < density
    return {
        "q": normal(rng, batch, queries, kv_heads * group, head_dim, dtype=dtype),
        "k": normal(rng, batch, kv_heads, slots, head_dim, dtype=dtype),
        "v": normal(rng, batch, kv_heads, slots, value_dim, dtype=dtype),
        "lengths": lengths,
        "positions": lengths[:, None] + torch.randint(0, 8, (batch, queries), generator=rng, dtype=torch.int32),
        "visible": bits.pack(mask),
        "scale": head_dim**-0.5,
    }


def scratch_mask(rng: Generator, kind: str, batch: int, queries: int) -> tuple[Tensor, Tensor]:
    """Which scratch slots each query sees, [batch, queries, queries], and the depth of each, [batch, queries] int32."""
    if kind == "chain":
        parent = torch.arange(queries).sub(1).clamp(min=0).expand(batch, -1)
    elif kind == "tree":
        parent = (torch.rand(batch, queries, generator=rng) * torch.arange(queries)).long()
    else:
        parent = torch.zeros(batch, queries, dtype=torch.long)
    sees = torch.eye(queries, dtype=torch.bool).repeat(batch, 1, 1)
    for n in range(1, queries):
        sees[:, n] |= sees[torch.arange(batch), parent[:, n]]
    depth = sees.sum(-1, dtype=torch.int32) - 1
    if kind == "full":
        sees |= True
    elif kind == "empty":
        sees &= False
    elif kind == "sparse":  # a quarter of the queries see no scratch slot
        sees = (torch.rand(sees.shape, generator=rng) < 0.3) & (torch.rand(batch, queries, 1, generator=rng) > 0.25)
    return sees, depth


def random_case(rng: Generator, dtype: torch.dtype, head_dim: int, value_dim: int, most_slots: int = 500) -> Arguments:
    """Any valid arguments with these: ragged batches, every kind of mask and option, caches with NaN where nothing was
    written, strided views and shuffled pages."""
    batch, queries = draw(rng, 1, 3), pick(rng, 1, 2, draw(rng, 3, 40), draw(rng, 41, 100))
    kv_heads, group = draw(rng, 1, 2), pick(rng, 1, 2, 3, 4, 7) if queries < 20 else draw(rng, 1, 3)
    slots = draw(rng, queries, queries + most_slots)
    lengths = torch.randint(0, slots - queries + 1, (batch,), generator=rng, dtype=torch.int32)
    lengths[0] = pick(rng, 0, 1, slots - queries, int(lengths[0]))
    lengths.clamp_(max=slots - queries)
    sees, depth = scratch_mask(rng, pick(rng, *MASKS), batch, queries)
    arguments: Arguments = {
        "q": normal(rng, batch, queries, kv_heads * group, head_dim, dtype=dtype),
        "k": normal(rng, batch, kv_heads, slots, head_dim, dtype=dtype),
        "v": normal(rng, batch, kv_heads, slots, value_dim, dtype=dtype),
        "lengths": lengths,
        "positions": lengths[:, None] + depth,
        "visible": bits.pack(sees),
        "scale": head_dim**-0.5,
    }
    if draw(rng, 0, 2) == 0:  # queries far apart, and far from the committed slots
        arguments["positions"] = torch.randint(0, 2 * slots, (batch, queries), generator=rng, dtype=torch.int32)
    if draw(rng, 0, 1):
        arguments["window"] = pick(rng, 1, draw(rng, 1, 70), draw(rng, 1, slots + 9))
    slot = torch.arange(slots)
    written = (slot < lengths[:, None] + queries) & needed(arguments, slot)
    for name in ("k", "v"):
        arguments[name] = torch.where(written[:, None, :, None], arguments[name], NAN)
    if draw(rng, 0, 2) == 0:
        # A capped score is right to some 1e-7 of the cap, which in fp32 must stay within the table's tolerance.
        arguments["softcap"] = pick(rng, 0.5, 2.0, 5.0 if dtype == torch.float32 else 50.0)
    if draw(rng, 0, 2) == 0:
        arguments["sinks"] = normal(rng, kv_heads * group, dtype=pick(rng, dtype, torch.float32))
    arguments["q"] = pick(rng, arguments["q"], arguments["q"].transpose(1, 2).contiguous().transpose(1, 2))
    layout = pick(rng, "contiguous", "strided", "paged")
    if layout == "strided":
        return strided(arguments)
    return paged(rng, arguments, pick(rng, 16, 32, 64, 256, 7)) if layout == "paged" else arguments


def needed(arguments: Arguments, slot: Tensor) -> Tensor:
    """Which committed slots no window has left behind, and all others, [batch, slots]."""
    if arguments.get("window") is None:
        return torch.ones(len(arguments["lengths"]), len(slot), dtype=torch.bool)
    first = arguments["positions"].amin(1, keepdim=True) - arguments["window"] + 1
    return (slot >= first) | (slot >= arguments["lengths"][:, None])


def strided(arguments: Arguments) -> Arguments:
    """The same cache as a view of a larger one: all layers in one tensor, keys before values, other slots behind."""
    k, v = arguments["k"], arguments["v"]
    batch, heads, slots, _ = k.shape
    storage = k.new_full((batch, slots + 3, 3, heads, k.shape[-1] + v.shape[-1] + 8), NAN)
    views = storage[:, :slots, 1].transpose(1, 2).split([k.shape[-1], v.shape[-1], 8], dim=-1)
    views[0].copy_(k)
    views[1].copy_(v)
    return arguments | {"k": views[0], "v": views[1]}


def paged(rng: Generator, arguments: Arguments, page: int) -> Arguments:
    """The same cache in shuffled pages of a larger pool; table entries that no row needs hold anything."""
    batch, heads, slots, _ = arguments["k"].shape
    blocks = -(-slots // page)
    pages = batch * blocks + 2
    table = torch.randperm(pages, generator=rng)[: batch * blocks].view(batch, blocks).int()
    result = dict(arguments)
    for name in ("k", "v"):
        rows = torch.full((batch, blocks * page, heads, arguments[name].shape[-1]), NAN, dtype=arguments["q"].dtype)
        rows[:, :slots] = arguments[name].transpose(1, 2)
        pool = rows.new_full((pages, page, *rows.shape[2:]), NAN)
        pool[table.flatten().long()] = rows.view(batch * blocks, page, *rows.shape[2:])
        result[name] = pool
    slot = torch.arange(blocks * page)
    written = slot < arguments["lengths"][:, None] + arguments["visible"].shape[1]
    used = (written & needed(arguments, slot)).view(batch, blocks, page).any(2)
    garbage = torch.randint(-(2**31), 2**31 - 1, table.shape, generator=rng, dtype=torch.int32)
    result["block_table"] = torch.where(used, table, garbage)
    return result


def span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def reference(arguments: Arguments) -> Tensor:
    """The twin in float64."""
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}
    return tree_attention_ref(**exact)
