"""The Triton kernels of `tree_attention` on a GPU: the interpreter's grid, on the real thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import NAMES, SIZES, Arguments, case, pick, random_case, reference
from gpu_memory import on_gpu
from op_samples import on
from tolerances import assert_close
from torch import Generator, Tensor

from specexit_kernels import bits, tree_attention
from specexit_kernels.tree_attention import OP
from specexit_kernels.triton.launch import device_of, run
from specexit_kernels.triton.tree_attention import launches
from specexit_kernels.triton.tree_attention_table import heights

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(OP.kernels["triton"].absent is not None, reason=str(OP.kernels["triton"].absent))


def check(args: Arguments, **options: Any) -> None:
    actual = tree_attention(**on_gpu(args), implementation="triton", **options)
    assert_close(actual, reference(args).to(DEVICE), args["q"].dtype)


def assert_rows_close(actual: Tensor, expected: Tensor) -> None:
    """Each query and head in bf16, relative to its own size: over a long context all entries are small."""
    error = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(error.max()) < 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), SIZES)
def test_equals_the_twin(rng: Generator, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    for _ in range(2):
        check(random_case(rng, dtype, head_dim, value_dim, 3000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 192, 256])
def test_every_line_of_the_table(rng: Generator, size: int, dtype: torch.dtype) -> None:
    device = device_of(torch.device(DEVICE))
    for config in heights(device, dtype, size):
        for splits in (1, 5):
            args = random_case(rng, dtype, size, size, 3000)
            there = on_gpu(args)
            out = torch.full((*args["q"].shape[:3], size), float("nan"), dtype=dtype, device=DEVICE)
            made = launches(*(there.get(name) for name in NAMES), out, device=device, config=config, splits=splits)
            for name in ("partial", "partial_lse"):
                if len(made) > 1:
                    made[0].arguments[name].fill_(float("nan"))
            run(made, out.device)
            assert_close(out, reference(args).to(DEVICE), dtype)


@pytest.mark.parametrize("window", [None, 500])
def test_a_graph_serves_other_lengths(rng: Generator, window: int | None) -> None:
    shape: dict[str, Any] = {"batch": 3, "slots": 9000, "scratch": 60, "queries": 60, "kv_heads": 2, "group": 4}
    shape |= {"head_dim": 128, "value_dim": 128, "dtype": torch.bfloat16}
    args = on("cuda", case(rng, **shape)) | {"window": window}
    tree_attention(**args)  # compiled now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(**args)
    for most in (0, 1, 255, 256, 300, 2000, 8940):
        fresh = case(rng, **shape)
        fresh["lengths"] = torch.randint(most // 2, most + 1, (3,), generator=rng, dtype=torch.int32)
        fresh["positions"] = fresh["lengths"][:, None] + torch.arange(60, dtype=torch.int32)
        for name in ("q", "k", "v", "lengths", "positions", "visible"):
            args[name].copy_(fresh[name])
        out.fill_(float("nan"))
        graph.replay()
        expected = reference(fresh | {"window": window}).to(DEVICE)
        seen = expected.abs().amax(-1) > 0  # the others must be zeros
        assert_rows_close(out[seen], expected[seen])
        assert not out[~seen].any()


def test_compiles_as_one_graph(rng: Generator) -> None:
    args = on("cuda", case(rng, head_dim=64, value_dim=64, dtype=torch.bfloat16))

    def attend(q: torch.Tensor) -> torch.Tensor:
        return tree_attention(**args | {"q": q * 2}) + 1

    compiled = torch.compile(attend, fullgraph=True)
    assert_close(compiled(args["q"]), attend(args["q"]), torch.bfloat16)


def test_opcheck(rng: Generator) -> None:
    for sizes in ({"value_dim": 24}, {"batch": 1, "queries": 1}, {"batch": 0}):
        args = on("cuda", case(rng, head_dim=32, **sizes))
        torch.library.opcheck(torch.ops.specexit.tree_attention.default, tuple(args.values()))


def test_a_long_context(rng: Generator) -> None:
    """131,072 slots, at addresses past 2^31 elements; an error in the mask of a few scratch slots would show."""
    slots, nodes, dtype, far = 131_072, 60, torch.bfloat16, 2**30 + 2**20
    args = case(rng, batch=3, queries=nodes, kv_heads=1, group=4, head_dim=128, slots=64, scratch=nodes, dtype=dtype)
    args["lengths"] = torch.tensor([slots - nodes, slots // 2 + 3, slots // 3], dtype=torch.int32)
    args["positions"] = args["lengths"][:, None] + torch.arange(nodes, dtype=torch.int32)
    there = on("cuda", {name: value for name, value in args.items() if name not in "kv"})
    here = torch.Generator(DEVICE).manual_seed(int(torch.randint(2**31, (), generator=rng)))
    for name in "kv":
        memory = torch.empty(2 * far + slots * 128, dtype=dtype, device=DEVICE)
        there[name] = memory.as_strided((3, 1, slots, 128), (far, slots * 128, 128, 1)).normal_(generator=here)
    for row, length in enumerate(args["lengths"].tolist()):
        there["k"][row, :, length:] *= 3  # so that these few slots have weight
    for window in (None, pick(rng, 100, 5000)):
        out = tree_attention(**there, window=window, implementation="triton")
        expected = reference(there | {"window": window})
        assert_rows_close(out, expected)
        wrong = reference(there | {"window": window, "visible": there["visible"] ^ 1})
        with pytest.raises(AssertionError):
            assert_rows_close(wrong, expected)


def test_cuda_tensors_take_it(rng: Generator) -> None:
    """Without being asked for by name; what it does not take goes to the twin."""
    assert OP.implementation("cuda").name == "triton"
    args = on("cuda", case(rng, dtype=torch.bfloat16))
    assert torch.equal(tree_attention(**args), tree_attention(**args, implementation="triton"))
    args = on("cuda", case(rng, head_dim=300))
    assert_close(tree_attention(**args), tree_attention(**args, implementation="torch"))


def test_other_streams_and_many_words(rng: Generator) -> None:
    """A chunk of a prefill with 256 queries, on a stream that is not the default one."""
    args = case(rng, batch=1, queries=256, kv_heads=2, group=4, head_dim=64, value_dim=64, slots=900, scratch=256)
    args["visible"] = bits.chain(1, 256, torch.device("cpu"))
    args["positions"] = args["lengths"][:, None] + torch.arange(256, dtype=torch.int32)
    stream = torch.cuda.Stream()
    there = on("cuda", args)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = tree_attention(**there)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(out, reference(args).to(DEVICE), torch.float32)
