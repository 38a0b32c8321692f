"""The Triton kernel of `grow_beam` and `grow_level` in Triton's interpreter, where accesses out of bounds raise: its
results are the twins', bit for bit."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from attention_cases import draw, pick
from draft_cases import BEAM_NAMES, Arguments, grow_case
from torch import Generator, Tensor
from triton_guard import guarded

from specexit_kernels import grow_beam, grow_level
from specexit_kernels.grow_beam import grow_beam_ref
from specexit_kernels.grow_level import grow_level_ref
from specexit_kernels.triton.grow_beam import launches
from specexit_kernels.triton.launch import run

NO_RESERVE = 0x4000  # Linux: more than there is memory may be mapped
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with guarded():
        yield


def grow(args: Arguments, *, level: bool) -> list[Tensor]:
    """The kernel's results, in memory that held what no result can be."""
    expected = grow_level_ref(**args) if level else grow_beam_ref(*(args[name] for name in BEAM_NAMES))
    outputs = [torch.full_like(x, math.nan if x.is_floating_point() else -7) for x in expected]
    rows = (args["hidden"], args["visible"], args["own"]) if level else None
    made = launches(*(args[name] for name in BEAM_NAMES), tuple(outputs), rows)
    run(made, torch.device("cpu"))
    return outputs


def check(args: Arguments) -> None:
    for level, expected in (
        (True, grow_level_ref(**args)),
        (False, grow_beam_ref(*(args[name] for name in BEAM_NAMES))),
    ):
        for actual, wanted in zip(grow(args, level=level), expected, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("parents", "width"), [(1, 1), (1, 10), (3, 3), (10, 10), (7, 13), (20, 1), (33, 31)])
def test_equals_the_twin(rng: Generator, parents: int, width: int) -> None:
    most = parents * width
    for beams in {1, draw(rng, 1, min(10, most)), min(most, 20)}:
        check(
            grow_case(
                rng, draw(rng, 1, 3), parents, width, beams, pick(rng, 1, 16, draw(rng, 1, 3000)), draw(rng, 1, 5)
            )
        )


def test_ties_go_to_the_lower_index(rng: Generator) -> None:
    args = grow_case(rng, 6, 10, 10, 17)
    args |= {"logprobs": args["logprobs"].round(), "scores": args["scores"].round()}
    check(args)
    args |= {"logprobs": torch.zeros(6, 10, 10), "scores": pick(rng, -1.0, 1.0) * torch.zeros(6, 10)}
    check(args)
    assert torch.equal(grow(args, level=False)[2], torch.arange(17, dtype=torch.int32).expand(6, -1))


def test_zeros_of_both_signs_are_equal(rng: Generator) -> None:
    args = grow_case(rng, 1, 1, 4, 4)
    args |= {"logprobs": torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]]), "scores": torch.tensor([[-0.0]])}
    assert grow(args, level=False)[2].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["tokens", "logprobs", "scores", "hidden", "visible", "own"])
def test_strides_beyond_32_bits(rng: Generator, name: str) -> None:
    """Addresses are 64 bits wide: rows 2**30 entries apart, in memory that is mapped and hardly touched."""
    args = grow_case(rng, 1, 3, 2, 3)
    axis = args[name].dim() - 1 if name == "scores" else 1
    strides = list(args[name].stride())
    strides[axis] = 2**30
    size = (2**31 + 2**16) * args[name].element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    far = torch.frombuffer(memory, dtype=args[name].dtype).as_strided(args[name].shape, strides)
    check(args | {name: far.copy_(args[name])})


def test_values_that_are_no_numbers(rng: Generator) -> None:
    strange = torch.tensor([math.nan, -math.inf, math.inf, 0.0, -0.0, 1e-7, 3e38, -3e38, 1e-45])
    for _ in range(4):
        args = grow_case(rng, 6, 4, 5, 13)
        for name, rate in (("logprobs", 0.5), ("scores", 0.3)):
            x = args[name]
            values = strange[torch.randint(0, len(strange), x.shape, generator=rng)]
            args[name] = torch.where(torch.rand(x.shape, generator=rng) < rate, values, x)
        check(args)
    args["logprobs"].fill_(math.nan)
    check(args)


def test_strided_and_expanded_inputs(rng: Generator) -> None:
    args = grow_case(rng, 3, 4, 6, 8, hidden=9, words=2)
    for name in ("tokens", "logprobs"):
        args[name] = args[name].mT.contiguous().mT
    args["scores"] = args["scores"].T.contiguous().T
    args["hidden"] = torch.cat([args["hidden"][:, :1], torch.full((3, 1, 9), math.nan)], 2)[:, :, :9].expand(-1, 4, -1)
    args["visible"] = torch.cat([args["visible"]] * 2, 2)[:, :, 1:3]
    args["own"] = args["own"][:1].expand(3, -1, -1)
    check(args)


def test_the_ops_run_the_kernel_by_name(rng: Generator) -> None:
    args = grow_case(rng, 2, 4, 5, 6)
    for actual, wanted in zip(grow_level(**args, implementation="triton"), grow_level_ref(**args), strict=True):
        assert torch.equal(actual, wanted)
    args = {name: args[name] for name in BEAM_NAMES}
    for actual, wanted in zip(grow_beam(**args, implementation="triton"), grow_beam_ref(**args), strict=True):
        assert torch.equal(actual, wanted)
    empty = grow_case(rng, 0, 4, 5, 6)
    assert [len(x) for x in grow_level(**empty, implementation="triton")] == [0] * 6
    most = grow_case(rng, 1, 64, 64, 2)
    for actual, wanted in zip(grow_level(**most, implementation="triton"), grow_level_ref(**most), strict=True):
        assert torch.equal(actual, wanted)
    with pytest.raises(ValueError, match="grow_level: visible must have words"):
        grow_level(**grow_case(rng, words=0), implementation="triton")
    with pytest.raises(ValueError, match="grow_level: hidden must have entries"):
        grow_level(**grow_case(rng, hidden=0), implementation="triton")
    many = grow_case(rng, 1, 64, 65, 1)
    with pytest.raises(ValueError, match="grow_level: tokens must be at most 4096 a sequence, were 4160"):
        grow_level(**many, implementation="triton")


def test_any_bits_sort_as_floats(rng: Generator) -> None:
    """4,096 candidates, of which many are equal: as integers they keep the order of (score, index)."""
    bits = np.random.default_rng(int(rng.initial_seed())).integers(0, 2**32, 4096, dtype=np.uint32)
    scores = torch.from_numpy(bits.view(np.float32).copy())
    scores = torch.where(scores.isnan(), -math.inf, scores)
    scores[torch.randint(0, 4096, (2000,), generator=rng)] = pick(rng, 0.0, -0.0, math.inf, -math.inf, 1e-45)
    args = {
        "tokens": torch.arange(4096, dtype=torch.int32).view(1, 1, 4096),
        "logprobs": scores.view(1, 1, 4096),
        "scores": torch.full((1, 1), 0.0),
        "beams": 40,
    }
    for actual, wanted in zip(grow(args, level=False), grow_beam_ref(**args), strict=True):
        assert torch.equal(actual, wanted)
