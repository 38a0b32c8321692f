"""tree_attention against attention written out for one query at a time, in float64, over the slots it sees."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import case, draw, normal
from tolerances import assert_close
from torch import Tensor

from specexit_kernels import bits
from specexit_kernels.tree_attention import slot_mask, tree_attention, tree_attention_ref

NAN, INF = float("nan"), float("inf")


def sees(args: dict[str, Any], b: int, n: int) -> list[int]:
    """The slots that query n of row b sees."""
    length, position = int(args["lengths"][b]), int(args["positions"][b, n])
    window, slots = args.get("window"), args["k"].shape[2]
    seen = [j for j in range(length) if window is None or position - j < window]
    for w, word in enumerate(args["visible"][b, n].tolist()):
        seen += [length + 64 * w + m for m in range(64) if word >> m & 1]
    return [j for j in seen if j < slots]


def oracle(args: dict[str, Any]) -> Tensor:
    q, k, v = (args[name].double() for name in "qkv")
    batch, queries, heads, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, queries, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for n in range(queries):
            slots = sees(args, b, n)
            for h in range(heads) if slots else ():
                scores = k[b, h // group, slots] @ q[b, n, h] * args["scale"]
                if args.get("softcap") is not None:
                    scores = args["softcap"] * torch.tanh(scores / args["softcap"])
                logits = scores if args.get("sinks") is None else torch.cat([scores, args["sinks"][h : h + 1].double()])
                weights = (logits - logits.max()).exp()
                out[b, n, h] = (weights / weights.sum())[: len(slots)] @ v[b, h // group, slots]
    return out


def check(args: dict[str, Any]) -> Tensor:
    out = tree_attention(**args)
    assert out.dtype == args["q"].dtype
    assert out.is_contiguous()
    assert_close(out, oracle(args), args["q"].dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_equals_the_oracle(rng: torch.Generator, dtype: torch.dtype, kv_heads: int, group: int) -> None:
    for options in ({}, {"window": draw(rng, 1, 40)}, {"softcap": 1.5}, {"sinks": normal(rng, kv_heads * group)}):
        args = case(rng, batch=draw(rng, 1, 3), queries=draw(rng, 1, 9), kv_heads=kv_heads, group=group, dtype=dtype)
        check(args | options)


@pytest.mark.parametrize("scratch", [1, 63, 64, 65, 130, 200])
def test_words_and_odd_sizes(rng: torch.Generator, scratch: int) -> None:
    """Several words; more scratch slots than queries; other head sizes; everything at once."""
    for density in (0.05, 1.0):
        args = case(rng, queries=3, head_dim=7, value_dim=13, slots=scratch + 37, scratch=scratch, density=density)
        check(args | {"window": 11, "softcap": 3.0, "sinks": normal(rng, 4)})


def test_one_query_one_slot(rng: torch.Generator) -> None:
    args = case(rng, batch=1, queries=1, kv_heads=1, group=1, slots=1, scratch=1, density=1.0)
    assert torch.equal(check(args), args["v"].view(1, 1, 1, -1))


def test_a_chain_is_causal_attention(rng: torch.Generator) -> None:
    """A chunk of a prefill: 256 queries, 4 words of bits; and with the window that transformers would cut."""
    length, chunk = 100, 256
    args = case(rng, batch=1, queries=chunk, kv_heads=1, slots=length + chunk + 9, scratch=chunk)
    args["lengths"] = torch.tensor([length], dtype=torch.int32)
    args["positions"] = length + torch.arange(chunk, dtype=torch.int32)[None]
    q, k, v = (args[name].double() for name in "qkv")
    p, j = args["positions"].view(-1, 1), torch.arange(length + chunk)
    for window in (None, 30, 150):
        chain = torch.ones(chunk, chunk, dtype=torch.bool).tril()
        seen = j <= p
        if window is not None:
            chain, seen = chain.triu(1 - window), seen & (j > p - window)  # masking_utils' sliding_window_overlay
        args["visible"] = bits.pack(chain)[None]
        assert args["visible"].shape[-1] == 4
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k[:, :, : length + chunk].expand(-1, 2, -1, -1),
            v[:, :, : length + chunk].expand(-1, 2, -1, -1),
            attn_mask=seen,
            scale=args["scale"],
        )
        assert_close(tree_attention(**args, window=window), expected.transpose(1, 2), torch.float32)


def test_bits_past_the_cache_are_ignored(rng: torch.Generator) -> None:
    args = case(rng, slots=30, scratch=0)
    args["visible"] = torch.full((2, 5, 1), -1)
    args["lengths"] = torch.tensor([30, 5], dtype=torch.int32)
    check(args)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_query_does_not_see_adds_nothing(rng: torch.Generator, where: str, poison: float) -> None:
    """Poison one slot: those who see it turn NaN (if it is NaN), the others do not change in one bit."""
    for options in ({}, {"window": 9, "softcap": 2.0, "sinks": normal(rng, 4)}):
        args = case(rng, queries=12) | options
        check(args)
        clean = tree_attention(**args, implementation="torch")
        # A committed slot at the window's edge, scratch slots, and slots that no bit can reach.
        for slot in (int(args["lengths"][0]) - 4, *range(int(args["lengths"][0]), 90, 13)):
            if slot < 0:
                continue
            poisoned = args | {where: args[where].clone()}
            poisoned[where][0, 1, slot, 3] = poison
            out = tree_attention(**poisoned, implementation="torch")
            assert_close(tree_attention(**poisoned), out)  # whatever a CPU runs hides it as well
            assert torch.equal(out[1], clean[1])
            assert torch.equal(out[0, :, :2], clean[0, :, :2]), "the slot is in the second KV head"
            for n in range(12):
                if slot not in sees(args, 0, n):
                    assert torch.equal(out[0, n], clean[0, n])
                elif math.isnan(poison):
                    assert out[0, n, 2:, 3].isnan().all()


def test_a_query_that_sees_nothing_gets_zeros(rng: torch.Generator) -> None:
    args = case(rng, queries=4)
    args["lengths"] = torch.tensor([0, 50], dtype=torch.int32)
    args["positions"] = torch.full((2, 4), 80, dtype=torch.int32)
    args["visible"][:, 1:3] = 0  # row 0 has no prefix; row 1 has one, but the window ends before it
    for options in ({}, {"sinks": normal(rng, 4)}, {"sinks": torch.full((4,), -INF)}):
        for k in (args["k"], torch.full_like(args["k"], NAN)):
            out = tree_attention(**(args | options | {"k": k, "window": 20}))
            assert torch.equal(out[:, 1:3], torch.zeros(2, 2, 4, 8))
            assert out[:, 0].isnan().all() == k.isnan().all()


def test_large_values_are_not_taken_for_flaws(rng: torch.Generator) -> None:
    largest = torch.finfo(torch.float32).max
    args = case(rng, batch=1, queries=2, kv_heads=1, group=1, slots=2, scratch=1, density=1.0)
    args["lengths"] = torch.tensor([1], dtype=torch.int32)
    args["q"].fill_(1)
    args["k"][..., 0, :], args["k"][..., 1, :] = 1, -1  # weights far apart: nothing cancels
    args["v"][..., 0, :] = largest
    args["v"][..., 1, :] = -largest
    assert check(args).isfinite().all()


@pytest.mark.parametrize("page", [1, 7, 16])
def test_pages(rng: torch.Generator, page: int) -> None:
    """The same slots in shuffled pages of a larger pool give the same result."""
    args = case(rng, batch=3, slots=112, scratch=30, value_dim=5)
    expected, blocks = tree_attention(**args, implementation="torch"), 112 // page
    table = torch.randperm(3 * blocks + 4, generator=rng)[: 3 * blocks].view(3, blocks).int()
    paged = dict(args, block_table=table)
    for name in ("k", "v"):
        slots = args[name].transpose(1, 2)  # [B, slots, Hkv, hd]
        pool = torch.full((3 * blocks + 4, page, 2, slots.shape[-1]), NAN)
        pool[table.flatten().long()] = slots.reshape(3 * blocks, page, 2, -1)
        paged[name] = pool
    assert torch.equal(tree_attention(**paged), expected)
    # What a table holds behind a row's last slot does not matter.
    used = -(-(args["lengths"][:, None] + 30) // page)
    unused = torch.arange(blocks) >= used
    garbage = torch.randint(-(2**31), 2**31 - 1, table.shape, generator=rng, dtype=torch.int32)
    paged["block_table"] = torch.where(unused, garbage, table)
    assert torch.equal(tree_attention(**paged), expected)


def test_strides(rng: torch.Generator) -> None:
    """Views as callers have them: heads before queries, all layers in one tensor, slots of a larger cache."""
    args = case(rng)
    expected = tree_attention(**args)
    args["q"] = args["q"].transpose(1, 2).contiguous().transpose(1, 2)
    storage = torch.full((2, 3, 2, 2, 140, 8), NAN)  # [B, layers, K or V, Hkv, slots, hd]
    for i, name in enumerate(("k", "v")):
        storage[:, 1, i, :, :90] = args[name]
        args[name] = storage[:, 1, i, :, :90]
    args["visible"] = args["visible"][:, None].expand(-1, 2, -1, -1)[:, 1]
    args["positions"] = torch.cat([args["positions"], args["positions"]], 1)[:, :5]
    before = storage.clone()
    assert torch.equal(tree_attention(**args), expected)
    assert torch.equal(storage.isnan(), before.isnan())
    assert torch.equal(storage.nan_to_num(), before.nan_to_num()), "the cache is only read"


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_nothing_to_do(rng: torch.Generator, batch: int, queries: int) -> None:
    out = tree_attention(**case(rng, batch=batch, queries=queries, value_dim=6))
    assert out.shape == (batch, queries, 4, 6)


def test_other_default_dtype(rng: torch.Generator) -> None:
    args = case(rng)
    expected = tree_attention(**args)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            out = tree_attention(**args)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(out, expected)


def test_opcheck(rng: torch.Generator) -> None:
    options = (7, 2.0, normal(rng, 4))
    for sizes, extra in (({"value_dim": 6}, options), ({"batch": 1, "queries": 1}, ()), ({"batch": 0}, ())):
        args = case(rng, **sizes)
        torch.library.opcheck(torch.ops.specexit.tree_attention.default, (*args.values(), *extra))
    args = case(rng)
    pages = normal(rng, 9, 10, 2, 8)
    paged = tuple((args | {"k": pages, "v": pages}).values())
    table = torch.randint(0, 9, (2, 9), generator=rng, dtype=torch.int32)
    torch.library.opcheck(torch.ops.specexit.tree_attention.default, (*paged, None, None, None, table))


@pytest.mark.parametrize("window", [None, 3])
def test_mask_may_be_made_once_for_many_layers(rng: torch.Generator, window: int | None) -> None:
    args = case(rng)
    mask = slot_mask(args["lengths"], args["positions"], args["visible"], args["k"].shape[2], window=window)
    for implementation in ("torch", "sdpa"):
        options = {"window": window, "implementation": implementation}
        expected = tree_attention(**args, **options)
        assert torch.equal(tree_attention(**args, **options, mask=mask), expected)
        assert not tree_attention(**args, **options, mask=torch.full_like(mask, -INF)).any()
    with pytest.raises(ValueError, match="mask must be"):
        tree_attention(**args, mask=mask[:, :, 1:])
    with pytest.raises(TypeError, match="mask must be float32"):
        tree_attention(**args, mask=mask.double())


def test_the_twin_can_be_asked_for(rng: torch.Generator) -> None:
    args = case(rng)
    expected = tree_attention_ref(**args)
    assert torch.equal(tree_attention(**args, implementation="torch"), expected)
    assert_close(tree_attention(**args, implementation="sdpa"), expected)
    with pytest.raises(ValueError, match="implementation"):
        tree_attention(**args, implementation="fortran")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("q", lambda x: x.int(), TypeError),
        ("q", lambda x: x.numpy(), TypeError),
        ("q", lambda x: x[0], ValueError),
        ("q", lambda x: x[:, :, :3], ValueError),  # 3 query heads on 2 KV heads
        ("q", lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), ValueError),
        ("k", lambda x: x.double(), TypeError),
        ("k", lambda x: x[..., :7], ValueError),
        ("k", lambda x: x[:1], ValueError),
        ("k", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), ValueError),
        ("v", lambda x: x.bfloat16(), TypeError),
        ("v", lambda x: x[:, :1], ValueError),
        ("v", lambda x: x[:, :, :40], ValueError),
        ("v", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), ValueError),
        ("lengths", lambda x: x.long(), TypeError),
        ("lengths", lambda x: x[:1], ValueError),
        ("lengths", lambda x: x[:1].expand(2), ValueError),
        ("positions", lambda x: x.long(), TypeError),
        ("positions", lambda x: x[:, :3], ValueError),
        ("positions", lambda x: x.t().contiguous().t(), ValueError),
        ("visible", lambda x: x.int(), TypeError),
        ("visible", lambda x: x[..., 0], ValueError),
        ("visible", lambda x: x[..., :0], ValueError),
        ("visible", lambda x: x.expand(-1, -1, 3), ValueError),  # 90 slots need 2 words at most
        ("scale", lambda x: "1", TypeError),
        ("scale", lambda x: INF, ValueError),
        ("window", lambda x: 1.5, TypeError),
        ("window", lambda x: 0, ValueError),
        ("softcap", lambda x: "1", TypeError),
        ("softcap", lambda x: 0.0, ValueError),
        ("sinks", lambda x: torch.zeros(4, dtype=torch.int32), TypeError),
        ("sinks", lambda x: torch.zeros(3), ValueError),
        ("block_table", lambda x: torch.zeros(2, 9), TypeError),
        ("block_table", lambda x: torch.zeros(3, 9, dtype=torch.int32), ValueError),
    ],
)
def test_bad_arguments(rng: torch.Generator, name: str, change: Callable[[Any], Any], error: type[Exception]) -> None:
    args = case(rng)
    if name == "block_table":
        args |= {"k": normal(rng, 9, 10, 2, 8), "v": normal(rng, 9, 10, 2, 8)}
    with pytest.raises(error, match=rf"^{name} must"):
        tree_attention(**(args | {name: change(args.get(name))}))


def test_more_queries_than_words_or_slots(rng: torch.Generator) -> None:
    args = case(rng, queries=70, slots=90)
    with pytest.raises(ValueError, match=r"^visible must have 2 words for 70 queries in 90 slots, was \[2, 70, 1\]"):
        tree_attention(**args)
    with pytest.raises(ValueError, match=r"^k must have a slot for each of q's 70 queries, had 40$"):
        tree_attention(**(args | {name: args[name][:, :, :40] for name in "kv"}))


def test_another_device(rng: torch.Generator) -> None:
    args = case(rng)
    for name in ("k", "v", "lengths", "positions", "visible"):
        with pytest.raises(ValueError, match=rf"^{name} must be on cpu, was on meta"):
            tree_attention(**(args | {name: args[name].to("meta")}))
