"""The Triton kernels of `tree_attention` in Triton's interpreter, out-of-bounds accesses raising, against the twin in
float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    NAMES,
    NAN,
    SIZES,
    Arguments,
    case,
    draw,
    normal,
    paged,
    pick,
    random_case,
    reference,
    scratch_mask,
    strided,
)
from tolerances import assert_close
from torch import Generator, Tensor
from triton_guard import guarded

from specexit_kernels import bits, tree_attention
from specexit_kernels.tree_attention import OP
from specexit_kernels.triton.launch import H200, Device, Launch, run
from specexit_kernels.triton.tree_attention import cover, launches
from specexit_kernels.triton.tree_attention_table import Config, choose_config, choose_splits, heights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
SMALL = Config(16, 64, 4, 1, 1)


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with guarded():
        yield


def prepare(args: Arguments, config: Config | None = None, splits: int | None = None) -> tuple[Tensor, list[Launch]]:
    """Poisoned output, and the launches that fill it, their workspaces poisoned."""
    q = args["q"]
    out = torch.full((*q.shape[:3], args["v"].shape[-1]), NAN, dtype=q.dtype)
    made = launches(*(args.get(name) for name in NAMES), out, device=H200, config=config, splits=splits)
    for workspace in workspaces(made):
        workspace.fill_(NAN)
    return out, made


def workspaces(made: list[Launch]) -> list[Tensor]:
    """The parts that splits write for the merge."""
    return [made[0].arguments[name] for name in ("partial", "partial_lse") if len(made) > 1]


def attend(args: Arguments, config: Config | None = None, splits: int | None = None) -> Tensor:
    out, made = prepare(args, config, splits)
    run(made, out.device)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "value_dim"), SIZES)
def test_equals_the_twin(rng: Generator, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    for _ in range(2):
        args = random_case(rng, dtype, head_dim, value_dim)
        config = pick(rng, None, SMALL, Config(32, 32, 4, 1, 1), Config(64, 128, 4, 1, 1))
        out = attend(args, config, splits=pick(rng, None, 1, 2, draw(rng, 3, 9)))
        assert_close(out, reference(args), dtype)


@pytest.mark.parametrize("option", ["window", "softcap", "sinks", "pages"])
def test_many_words_and_many_tiles(rng: Generator, option: str) -> None:
    """A chunk of a prefill: 256 queries in a chain, several tiles of queries and words of bits, more than one split."""
    queries, length, window = 256, 130, draw(rng, 20, 300)
    args = case(rng, batch=1, queries=queries, kv_heads=1, slots=length + queries + 5, scratch=queries)
    args["lengths"] = torch.tensor([length], dtype=torch.int32)
    sees, depth = scratch_mask(rng, "chain", 1, queries)
    args["positions"] = length + depth
    if option == "window":
        args |= {"window": window}
        sees = sees.triu(1 - window)
    args["visible"] = bits.pack(sees)
    args |= {"softcap": {"softcap": 2.0}, "sinks": {"sinks": normal(rng, 2)}}.get(option, {})
    if option == "pages":
        args = paged(rng, args, 16)
    out = attend(args, Config(64, 64, 4, 1, 1), splits=3)
    assert_close(out, reference(args), torch.float32)


def test_more_words_than_queries_and_more_bits_than_slots(rng: Generator) -> None:
    """A draft's level attends the scratch slots of the levels before it; bits beyond the cache are ignored."""
    args = case(rng, queries=3, slots=200, scratch=150, density=0.3)
    assert_close(attend(args, SMALL, 2), reference(args), torch.float32)
    args = case(rng, slots=30, scratch=0)
    args |= {"visible": torch.full((2, 5, 1), -1), "lengths": torch.tensor([30, 5], dtype=torch.int32)}
    assert_close(attend(args, SMALL, 1), reference(args), torch.float32)


def test_one_query_one_slot(rng: Generator) -> None:
    args = case(rng, batch=1, queries=1, kv_heads=1, group=1, slots=1, scratch=1, density=1.0)
    args["lengths"] = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(attend(args), args["v"].view(1, 1, 1, -1))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_query_does_not_see_adds_nothing(rng: Generator, where: str, splits: int) -> None:
    """Poison one slot: those who see it turn NaN if it is one, the others do not change in one bit."""
    for options in ({}, {"window": 9, "softcap": 2.0, "sinks": normal(rng, 4)}):
        args = case(rng, queries=6, slots=600, value_dim=24) | options
        args["lengths"] = torch.tensor([draw(rng, 500, 580), 3], dtype=torch.int32)
        args["positions"] = args["lengths"][:, None] + torch.arange(6, dtype=torch.int32)
        length, clean = int(args["lengths"][0]), attend(args, SMALL, splits)
        window = options.get("window", 1000)
        for slot in (length - 4, length - 8, length, length + 13, length + 19):
            poison = pick(rng, NAN, float("inf"), -float("inf"))
            poisoned = args | {where: args[where].clone()}
            poisoned[where][0, 1, slot, 5] = poison
            out = attend(poisoned, SMALL, splits)
            assert torch.equal(out[1], clean[1])
            assert torch.equal(out[0, :, :2], clean[0, :, :2]), "the slot is in the second KV head"
            for n in range(6):
                bit = slot >= length and bool(args["visible"][0, n, 0] >> (slot - length) & 1)
                if not (bit or (slot < length and int(args["positions"][0, n]) - slot < window)):
                    assert torch.equal(out[0, n], clean[0, n])
                elif poison != poison:
                    assert out[0, n, 2:, 5 if where == "v" else slice(None)].isnan().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_a_query_that_sees_nothing_gets_zeros(rng: Generator, splits: int) -> None:
    args = case(rng, queries=4, slots=600)
    args["lengths"] = torch.tensor([0, 550], dtype=torch.int32)
    args["positions"] = torch.full((2, 4), 590, dtype=torch.int32)
    args["visible"][:, 1:3] = 0  # row 0 has no prefix; row 1 has one, but the window ends before it
    for options in ({}, {"sinks": normal(rng, 4)}, {"sinks": torch.full((4,), -float("inf"))}):
        out = attend(args | options | {"window": 30}, SMALL, splits)
        assert torch.equal(out[:, 1:3], torch.zeros(2, 2, 4, 8))
        assert_close(out, reference(args | options | {"window": 30}), torch.float32)


def test_a_launch_serves_other_lengths(rng: Generator) -> None:
    """What a CUDA graph replays: the same launches; other lengths, bits and cache contents at the same addresses."""
    for window in (None, 300):
        args = case(rng, batch=3, slots=2000, scratch=40, queries=7, group=1) | {"window": window}
        out, made = prepare(args, SMALL, splits=4)
        for most in (0, 1, 200, 255, 256, 700, 1960):
            fresh = case(rng, batch=3, slots=2000, scratch=40, queries=7, group=1)
            fresh["lengths"] = torch.randint(most // 2, most + 1, (3,), generator=rng, dtype=torch.int32)
            fresh["positions"] = fresh["lengths"][:, None] + torch.arange(7, dtype=torch.int32)
            for name in ("q", "k", "v", "lengths", "positions", "visible"):
                args[name].copy_(fresh[name])
            for poisoned in (out, *workspaces(made)):
                poisoned.fill_(NAN)
            run(made, out.device)
            assert_close(out, reference(args), torch.float32)


def test_splits_follow_the_length_on_the_device(rng: Generator) -> None:
    """Splits that have nothing to do write nothing; a single one writes the result itself, and the merge reads none."""
    args = case(rng, batch=4, slots=4000, scratch=20, queries=2)
    args["lengths"] = torch.tensor([0, 100, 1000, 3980], dtype=torch.int32)
    out, made = prepare(args, SMALL, splits=8)
    run(made, out.device)
    written = made[0].arguments["partial_lse"].isfinite().all((1, 2)).sum(-1)  # [B, splits] -> [B]
    # Units of 32: ceil(L / 32) + 2 for the word of bits, at least 8 a split.
    assert written.tolist() == [0, 0, 5, 8]
    assert_close(out, reference(args), torch.float32)


@pytest.mark.parametrize("far", ["batch", "head", "slot", "page", "slot of a page"])
def test_addresses_past_the_32_bit_range(rng: Generator, far: str) -> None:
    """In each axis of the cache, a stride below 2^31 elements of which a multiple is beyond. The memory between is not
    touched."""
    storage = torch.empty(2**31 + 2**29, dtype=torch.bfloat16)
    sizes = {"batch": 3, "kv_heads": 3, "slots": 40, "scratch": 5, "head_dim": 16, "value_dim": 16, "density": 1.0}
    small = case(rng, **sizes, dtype=torch.bfloat16)
    small["lengths"] = torch.full((3,), 35, dtype=torch.int32)  # the last slot is read
    if "page" in far:
        small = paged(rng, small, 16)
        pages = small["k"].shape[0]
        outer, slot = ((2**31 + 2**20) // (pages - 1), 48) if far == "page" else (256, (2**31 + 2**20) // 15)
        strides = (outer // 16 * 16, slot // 16 * 16, 16)
    else:
        near = small["k"].stride()
        strides = {
            "batch": (2**30 + 2**16, near[1], near[2]),
            "head": (near[0], 2**30 + 2**16, near[2]),
            "slot": (16, 48, (2**31 + 2**20) // 38 // 16 * 16),
        }[far]
        if far == "slot":
            strides = (48 * 16, 16 * 16, strides[2])
    args = dict(small)
    for offset, name in ((0, "k"), (2**14, "v")):
        args[name] = storage.as_strided(small[name].shape, (*strides, 1), offset)
        args[name].copy_(small[name])
    assert args["k"].stride()[:3] < (2**31,) * 3
    out = attend(args, SMALL, 1)
    assert torch.equal(out, attend(small, SMALL, 1))
    assert_close(out, reference(small), torch.bfloat16)


def test_strides_of_the_small_arguments(rng: Generator) -> None:
    args = strided(case(rng))
    expected = attend(args)
    args["visible"] = args["visible"][:, None].expand(-1, 2, -1, -1)[:, 1]
    args["positions"] = torch.cat([args["positions"], args["positions"]], 1)[:, :5]
    assert torch.equal(attend(args), expected)


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_nothing_to_do(rng: Generator, batch: int, queries: int) -> None:
    out = tree_attention(**case(rng, batch=batch, queries=queries, value_dim=6), implementation="triton")
    assert out.shape == (batch, queries, 4, 6)


def test_lengths_beyond_the_cache_read_nothing_beyond_it(rng: Generator) -> None:
    """A caller's mistake that the host cannot see; on a GPU it must not touch other memory."""
    args = case(rng, slots=100, scratch=5)
    args["lengths"] = torch.tensor([130, 2**31 - 1], dtype=torch.int32)
    args["positions"] = torch.full((2, 5), 99, dtype=torch.int32)
    expected = reference(args | {"lengths": torch.full((2,), 100, dtype=torch.int32)})
    for splits in (1, 2):
        assert_close(attend(args, SMALL, splits), expected, torch.float32)


def test_queries_far_apart_in_a_window(rng: Generator) -> None:
    """Of a tile's queries the first sees slots that the last does not, in tiles that only some see whole."""
    args = case(rng, batch=1, queries=64, kv_heads=1, group=1, slots=800, scratch=64, density=1.0)
    args["lengths"] = torch.tensor([640], dtype=torch.int32)
    args["positions"] = 640 + 3 * torch.arange(64, dtype=torch.int32)[None]
    for window in (150, 300, 500):
        for config in (Config(64, 64, 4, 1, 1), Config(64, 32, 4, 1, 1)):
            for splits in (1, 3):
                assert_close(attend(args | {"window": window}, config, splits), reference(args | {"window": window}))


def test_pages_that_a_window_has_left_behind_are_not_read(rng: Generator) -> None:
    """Their table entries may hold anything, also where a unit of 32 slots begins with them."""
    args = case(rng, batch=1, queries=1, slots=112, scratch=5)
    args |= {"lengths": torch.tensor([100], dtype=torch.int32), "positions": torch.tensor([[100]], dtype=torch.int32)}
    for first in (48, 80, 33):  # the first slot of the window
        windowed = args | {"window": 101 - first}
        split = paged(rng, windowed, 16)
        split["block_table"][:, : first // 16] = 2**30
        assert_close(attend(split, SMALL, 1), reference(windowed), torch.float32)


def test_positions_at_the_end_of_their_range(rng: Generator) -> None:
    args = case(rng, slots=200, queries=3)
    args["positions"] = torch.tensor([[2**31 - 1, 2**31 - 40, 5], [0, 7, 2**31 - 2]], dtype=torch.int32)
    for window in (1, 31, 2**31 - 1, 2**31 - 60):
        assert_close(attend(args | {"window": window}, SMALL, 1), reference(args | {"window": window}))


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_sinks_count_once(rng: Generator, splits: int) -> None:
    args = case(rng, slots=950, batch=1)
    args["lengths"] = torch.tensor([900], dtype=torch.int32)
    args["sinks"] = torch.tensor([9.0, -float("inf"), 0.0, -3.0])
    assert_close(attend(args, SMALL, splits), reference(args), torch.float32)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_scores_of_minus_infinity_weigh_nothing(rng: Generator, splits: int) -> None:
    """Keys of -inf in a whole tile that comes first: the others are attended as if it were not there."""
    args = case(rng, batch=1, slots=1040, scratch=4)
    args["lengths"] = torch.tensor([1030], dtype=torch.int32)
    args["q"].abs_()
    args["k"][:, :, :64] = -float("inf")
    assert_close(attend(args, SMALL, splits), reference(args), torch.float32)


def test_an_access_out_of_bounds_is_found(rng: Generator) -> None:
    """The guard of these tests: a launch that believes in more slots than there are, and one with a short output."""
    args = case(rng, slots=40, scratch=5)
    args["lengths"] = torch.tensor([35, 90], dtype=torch.int32)
    for change, message in (({"slots": 200}, "load"), ({"out": torch.empty(1)}, "store")):
        out, made = prepare(args, SMALL, 1)
        with pytest.raises(Exception, match=rf"{message} of .* out of bounds"):
            run([replace(made[0], arguments=made[0].arguments | change)], out.device)


# The launcher


def test_the_op_runs_the_kernel_by_name_and_on_cuda(rng: Generator) -> None:
    args = case(rng, dtype=torch.bfloat16)
    assert_close(tree_attention(**args, implementation="triton"), reference(args), torch.bfloat16)
    assert OP.implementation("cuda").name == "triton"
    in_order = [args.get(name) for name in (*NAMES, "mask")]
    assert torch.equal(OP._on_cuda(*in_order), tree_attention(**args, implementation="triton"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "q must be float32, bfloat16 or float16, was float64"),
        ({"head_dim": 257}, "q and v must have heads of 1 to 256"),
        ({"value_dim": 300}, "q and v must have heads of 1 to 256"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_twin(rng: Generator, change: Arguments, message: str) -> None:
    args = case(rng, **change)
    with pytest.raises(ValueError, match=message):
        tree_attention(**args, implementation="triton")
    in_order = [args.get(name) for name in (*NAMES, "mask")]
    assert torch.equal(OP._on_cuda(*in_order), tree_attention(**args, implementation="torch"))


def test_heads_of_no_size_go_to_the_twin(rng: Generator) -> None:
    args = case(rng)
    args |= {"q": args["q"][..., :0], "k": args["k"][..., :0]}
    with pytest.raises(ValueError, match="q and v must have heads of 1 to 256"):
        tree_attention(**args, implementation="triton")


def test_without_a_gpu_and_the_interpreter_it_says_so() -> None:
    script = """
import torch
from specexit_kernels import tree_attention
x, i = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, dtype=torch.int32)
tree_attention(x, x, x, i[0], i, i.long().view(1, 1, 1), scale=1.0, implementation="triton")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "ValueError: implementation='triton' needs tensors on a CUDA device, they were on cpu" in done.stderr


@pytest.mark.parametrize("size", range(1, 257))
def test_two_powers_of_two_cover_a_head(size: int) -> None:
    block, rest = cover(size)
    for power in (block, rest):
        assert power == 0 or (power >= 16 and power & (power - 1) == 0)
    assert size <= block + rest < max(17, 2 * size)
    assert rest == 0 or block < size


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_every_head_size_has_tiles(capability: int) -> None:
    for size in range(1, 257):
        line = heights(Device(capability, 132), torch.bfloat16, size)
        assert [config.block_m for config in line] == sorted({config.block_m for config in line})
        for rows in (1, 16, 17, 60, 64, 65, 240, 5000):
            config = choose_config(Device(capability, 132), torch.bfloat16, size, rows)
            assert config.block_m >= rows or config == line[-1]


def test_splits_fill_the_device() -> None:
    assert choose_splits(H200, 16, 8, 4096) == (8, 8)  # 128 of 132 multiprocessors
    assert choose_splits(H200, 16, 4, 4096) == (15, 8)  # twice as many of four warps fit: 240 of 264
    assert choose_splits(H200, 16, 8, 26) == (3, 8)  # no more than the cache has work for
    assert choose_splits(H200, 128, 8, 4096) == (1, 8)  # nearly full: not worth a merge
    assert choose_splits(H200, 132, 8, 4096) == (1, 64)
    assert choose_splits(H200, 144, 8, 4096)[0] > 1  # a second wave of 12
    assert choose_splits(H200, 144, 8, 127)[0] == 1  # which two splits of fewer units would not pay for
    assert 59 <= choose_splits(H200, 1, 8, 10**5)[0] <= 64
    assert choose_splits(H200, 10**6, 8, 10**5)[0] == 1
    for programs in range(1, 400, 7):
        times = [-(-programs * splits // 132) / splits for splits in range(1, 65)]
        assert times[choose_splits(H200, programs, 8, 10**5)[0] - 1] <= 1.1 * min(times)


def test_a_window_bounds_the_splits(rng: Generator) -> None:
    """A layer whose window is 128 never has work for more than one, whatever the cache holds."""
    args = case(rng, slots=4000, scratch=20)
    _, many = prepare(args)
    _, one = prepare(args | {"window": 128})
    assert (len(many), len(one)) == (2, 1)


# The decoder


def test_the_decoder_decodes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention of base and draft through the kernel, as on a GPU: the text stays the same."""
    from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair

    pair = bundled_pair()
    tree = TreeConfig(nodes=5, depth=2, top_k=2)
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, tree=tree)
    ids = torch.tensor([[1, 5, 9, 7]])
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.0, "exit": ExitConfig.off()}
    expected = decoder.generate(ids, **options)
    calls = []

    def kernel(*args: Any) -> Tensor:
        calls.append(args)
        return OP.kernels["triton"].function(*args)

    monkeypatch.setattr(OP, "cpu", replace(OP.cpu, name="triton", function=kernel))
    out = decoder.generate(ids, **options)
    assert len(calls) > 10
    assert out.new_tokens == expected.new_tokens
