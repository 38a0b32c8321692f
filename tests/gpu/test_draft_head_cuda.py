"""The Triton kernels of a draft's head on a GPU: the interpreter's grids, on the real thing."""

from __future__ import annotations

import pytest
import torch
from attention_cases import draw, pick
from draft_cases import (
    BEAM_NAMES,
    DTYPES,
    HEAD_NAMES,
    NAN,
    Arguments,
    check_features,
    check_head,
    features_case,
    grow_case,
    head_case,
    one_hot,
)
from gpu_memory import on_gpu
from torch import Generator, Tensor

from specexit_kernels import draft_topk, grow_beam, grow_level, project_features
from specexit_kernels.draft_topk import OP, draft_topk_ref
from specexit_kernels.grow_beam import grow_beam_ref
from specexit_kernels.grow_level import grow_level_ref
from specexit_kernels.triton import draft_head_table as table
from specexit_kernels.triton import draft_topk as head
from specexit_kernels.triton import project_features as features
from specexit_kernels.triton.launch import device_of, run

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(OP.kernels["triton"].absent is not None, reason=str(OP.kernels["triton"].absent))


def top(args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """`draft_topk` on the GPU."""
    there = on_gpu(args)
    positional = [there.pop(name) for name in HEAD_NAMES[:5]]
    return draft_topk(*positional, **there, implementation="triton")


def features_on_gpu(x: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """The arguments of `project_features`, moved."""
    *moved, weight = on_gpu(dict(zip("123w", [*x, weight], strict=True))).values()
    return moved, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 10, 16, 17, 80, 320, 600])
def test_head(rng: Generator, rows: int, dtype: torch.dtype) -> None:
    for _ in range(2):
        vocab = pick(rng, draw(rng, 1, 40), draw(rng, 100, 3000), 31_999)
        size = pick(rng, 64, 2048, 2880, draw(rng, 1, 300)) if vocab < 3000 else draw(rng, 1, 300)
        k, signals = draw(rng, 1, min(vocab, 32)), draw(rng, 0, 3)
        args = head_case(rng, rows, size, vocab, k, signals=signals, dtype=dtype) | {"token_map": None}
        check_head(args, top(args))


@pytest.mark.parametrize(("size", "vocab"), [(4096, 32_000), (2560, 151_936), (5120, 32_000)])
@pytest.mark.parametrize("rows", [10, 80])
def test_sizes_of_real_heads(rng: Generator, rows: int, size: int, vocab: int) -> None:
    args = on_gpu(head_case(rng, rows, size, 64, 10, signals=3, dtype=torch.bfloat16)) | {"token_map": None}
    here = torch.Generator(DEVICE).manual_seed(draw(rng, 0, 2**30))
    args["lm_head"] = torch.randn(vocab, size, device=DEVICE, dtype=torch.bfloat16, generator=here) / size**0.5
    check_head(args, OP(*(args[name] for name in HEAD_NAMES), implementation="triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_line_of_the_tables(rng: Generator, dtype: torch.dtype) -> None:
    device = device_of(torch.device(DEVICE))
    for config in table.head_configs(device, dtype):
        for size in (2048, 2880):
            args = head_case(rng, 2 * config.rows - 3, size, 1000, 10, signals=3, dtype=dtype) | {"token_map": None}
            there, n = on_gpu(args), 2 * config.rows - 3
            outputs = (
                torch.full((n, 10), -1, dtype=torch.int32, device=DEVICE),
                torch.full((n, 10), NAN, device=DEVICE),
                torch.full((n, 3), NAN, device=DEVICE),
            )
            made = head.launches(*(there[name] for name in HEAD_NAMES), *outputs, device=device, config=config)
            for name in ("logits", "peaks", "totals"):
                made[-1].arguments[name].fill_(NAN)
            run(made, outputs[0].device)
            check_head(args, outputs)
    for config in table.features_configs(device, dtype):
        for splits in (1, 3):
            x, weight = features_case(rng, 2 * config.rows - 3, pick(rng, 1024, 2880), 3, dtype)
            there_x, there_weight = features_on_gpu(x, weight)
            hidden = torch.full((len(x[0]), x[0].shape[1]), NAN, dtype=dtype, device=DEVICE)
            signals = torch.full((len(x[0]), 3), NAN, device=DEVICE)
            launches = features.launches(
                there_x, there_weight, hidden, signals, device=device, config=config, splits=splits
            )
            if splits > 1:
                launches[0].arguments["partial"].fill_(NAN)
            run(launches, hidden.device)
            check_features(x, weight, (hidden, signals))


@pytest.mark.parametrize("dtype", DTYPES)
def test_features(rng: Generator, dtype: torch.dtype) -> None:
    for rows in (1, 10, 16, 17, 80, 128):
        x, weight = features_case(rng, rows, pick(rng, 64, 2560, draw(rng, 1, 700)), draw(rng, 0, 3), dtype)
        check_features(x, weight, project_features(*features_on_gpu(x, weight), implementation="triton"))


def test_ties_and_values_that_are_no_numbers(rng: Generator) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.5, 3.0])
    for dtype in DTYPES:
        args = one_hot(values[torch.randint(0, 6, (5, 700), generator=rng)], dtype) | {"k": 32}
        tokens, logprobs, _ = top(args)
        expected, expected_logprobs, _ = draft_topk_ref(**args)
        assert torch.equal(tokens.cpu(), expected)
        torch.testing.assert_close(logprobs.cpu(), expected_logprobs, rtol=1e-5, atol=2e-6)
    args = head_case(rng, 20, 64, 500, 5, signals=2, dtype=torch.bfloat16)
    clean = top(args)
    args["hidden"][2, 3] = pick(rng, NAN, float("inf"))
    others = [n for n in range(20) if n != 2]
    result = top(args)
    assert result[1][2].eq(-float("inf")).all()
    assert result[2][2].isnan().all()
    for actual, wanted in zip(result, clean, strict=True):
        assert torch.equal(actual[others], wanted[others])


def test_grow(rng: Generator) -> None:
    for batch, parents, width, beams in (
        (1, 10, 10, 10),
        (32, 10, 10, 10),
        (3, 1, 7, 4),
        (2, 33, 31, 20),
        (1, 64, 64, 9),
    ):
        args = grow_case(rng, batch, parents, width, beams, pick(rng, 4096, draw(rng, 1, 3000)), draw(rng, 1, 3))
        there = on_gpu(args)
        for actual, wanted in zip(grow_level(**there, implementation="triton"), grow_level_ref(**args), strict=True):
            assert torch.equal(actual.cpu(), wanted)
        args = {name: args[name] for name in BEAM_NAMES}
        there = {name: there[name] for name in BEAM_NAMES}
        for actual, wanted in zip(grow_beam(**there, implementation="triton"), grow_beam_ref(**args), strict=True):
            assert torch.equal(actual.cpu(), wanted)


def test_a_level_is_one_graph(rng: Generator) -> None:
    """Head and growth, captured once, give new inputs their results, bit for bit those of a plain call."""

    def arguments() -> tuple[Arguments, Arguments]:
        made = head_case(rng, 20, 256, 3000, 10, dtype=torch.bfloat16) | {"token_map": None}
        return on_gpu(made), on_gpu(grow_case(rng, 2, 10, 10, 10, hidden=256))

    def level(made: Arguments, grown: Arguments) -> tuple[Tensor, ...]:
        tokens, logprobs, _ = OP(*(made[name] for name in HEAD_NAMES))
        rows = {"tokens": tokens.view(2, 10, 10), "logprobs": logprobs.view(2, 10, 10)}
        return grow_level(**grown | rows | {"hidden": made["hidden"].view(2, 10, 256)})

    fixed = arguments()
    level(*fixed)  # compiled now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = level(*fixed)
    for _ in range(3):
        fresh = arguments()
        for there, new in zip(fixed, fresh, strict=True):
            for name, value in there.items():
                if isinstance(value, Tensor):
                    value.copy_(new[name])
        graph.replay()
        for actual, wanted in zip(out, level(*fresh), strict=True):
            assert torch.equal(actual, wanted)


def test_cuda_tensors_take_them(rng: Generator) -> None:
    """Without being asked for by name; what they do not take goes to the twin."""
    args = on_gpu(head_case(rng, 9, 64, 100, 33, signals=3))
    for k, name in ((33, "torch"), (32, "triton")):
        positional = [(args | {"k": k})[n] for n in HEAD_NAMES[:5]]
        options = {n: args[n] for n in HEAD_NAMES[5:]}
        expected = draft_topk(*positional, **options, implementation=name)
        for actual, wanted in zip(draft_topk(*positional, **options), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_opcheck_and_compile(rng: Generator) -> None:
    args = on_gpu(head_case(rng, 5, 64, 100, 5, signals=3, dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.specexit.draft_topk.default, tuple(args.values()))

    def best(hidden: Tensor) -> Tensor:
        return OP(hidden * 2, *list(args.values())[1:])[1] + 1

    compiled = torch.compile(best, fullgraph=True)
    torch.testing.assert_close(compiled(args["hidden"]), best(args["hidden"]))
    torch.library.opcheck(torch.ops.specexit.grow_level.default, tuple(on_gpu(grow_case(rng, 2, 4, 5, 6)).values()))
