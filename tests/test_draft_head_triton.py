"""The Triton kernels of `draft_topk` and `project_features` in Triton's interpreter, out-of-bounds accesses raising,
against the twins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import draw, pick
from draft_cases import (
    DTYPES,
    HEAD_NAMES,
    NAN,
    Arguments,
    check_features,
    check_head,
    exact,
    features_case,
    head_case,
    normed,
    one_hot,
)
from tolerances import assert_close
from torch import Generator, Tensor
from triton_guard import guarded

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair
from specexit_kernels import draft_topk, implementations, project_features
from specexit_kernels._op import OPS
from specexit_kernels.draft_topk import draft_topk_ref
from specexit_kernels.triton import draft_head_table as table
from specexit_kernels.triton import draft_topk as head
from specexit_kernels.triton import project_features as features
from specexit_kernels.triton.launch import H200, Device, Launch, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

Config = table.Config
INF = float("inf")
SMALL = Config(16, 16, 16, 4, 1)  # many tiles of few entries


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with guarded():
        yield


def poisoned(made: list[Launch], *outputs: Tensor) -> list[Launch]:
    """The launches, after filling the outputs and every workspace with what no result can be."""
    for launch in made:
        for name in ("logits", "peaks", "totals", "partial"):
            if launch.arguments.get(name) is not None:
                launch.arguments[name].fill_(NAN)
    for output in outputs:
        output.fill_(NAN if output.is_floating_point() else -1)
    return made


def top(args: Arguments, config: Config | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`draft_topk` by the kernels, as the op launches it but with poisoned memory."""
    rows, k = len(args["hidden"]), args["k"]
    signals = 0 if args["exit_weight"] is None else len(args["exit_weight"])
    outputs = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k), torch.empty(rows, signals)
    run(poisoned(head.launches(*args.values(), *outputs, device=H200, config=config), *outputs), torch.device("cpu"))
    return outputs


def check_top(args: Arguments, config: Config | None = None) -> Tensor:
    """Compare with float64. Returns the ids [N, k], before the map: two may be mapped to one token."""
    result = top(args | {"token_map": None}, config)
    check_head(args, result)
    return result[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 10, 16, 17, 40])
def test_head_equals_the_twin(rng: Generator, rows: int, dtype: torch.dtype) -> None:
    for config, most, columns in ((None, 700, 130), (SMALL, 100, 40), (Config(32, 64, 32, 4, 1), 400, 130)):
        vocab = pick(rng, draw(rng, 1, 40), draw(rng, 41, most), 64)
        k = draw(rng, 1, min(vocab, 32 if rows <= 10 else 5))
        size = pick(rng, 32, draw(rng, 1, columns))
        args = head_case(rng, rows, size, vocab, k, signals=draw(rng, 0, 3), dtype=dtype)
        draft_ids = check_top(args, config)
        if args["token_map"] is not None:
            assert torch.equal(top(args, config)[0], draft_ids + args["token_map"][draft_ids.long()])


@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (3, 3), (4, 3), (11, 10), (31_999, 10), (32, 32), (15_000, 32), (151_936, 5)]
)
def test_vocabularies_and_their_tails(rng: Generator, vocab: int, k: int) -> None:
    """One tile and many, filled and not; k of all there are, and more than there are tiles."""
    config = pick(rng, Config(16, 512, 32, 4, 1), Config(16, 1024, 32, 4, 1))
    check_top(head_case(rng, 3, 24, vocab, k, dtype=pick(rng, *DTYPES)), config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranking_is_exact(rng: Generator, dtype: torch.dtype) -> None:
    """Logits of few values, hence ties inside tiles and across them, against the twin, bit for bit."""
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.5, 3.0])
    for width in (7, 16, 37, 200):
        logits = values[torch.randint(0, pick(rng, 2, 6), (5, width), generator=rng)]
        args = one_hot(logits, dtype) | {"k": draw(rng, 1, min(width, 32))}
        tokens, logprobs, _ = top(args, SMALL)
        expected, expected_logprobs, _ = draft_topk_ref(**args)
        assert torch.equal(tokens, expected)
        assert_close(logprobs, expected_logprobs, torch.float32)


def test_equal_logits_keep_the_order_of_ids(rng: Generator) -> None:
    tokens, logprobs, _ = top(one_hot(torch.zeros(2, 100)) | {"k": 32}, SMALL)
    assert tokens.tolist() == [list(range(32))] * 2
    assert_close(logprobs, torch.full((2, 32), 0.01).log(), torch.float32)


def test_values_that_are_no_numbers(rng: Generator) -> None:
    """NaN is -inf; a row without a softmax is -inf throughout, which a caller can read; others are not touched."""
    for _ in range(6):
        strange = torch.tensor([NAN, -INF, -INF, 0.0, 1.0, 2.0])
        logits = strange[torch.randint(0, 6, (4, 60), generator=rng)]
        k = draw(rng, 1, 32)
        args = one_hot(logits.nan_to_num(0.0, 0.0, 0.0)) | {"k": k}
        # A NaN or an infinity in one row's weights would be in all: so one row a time.
        for n in range(4):
            one = args | {"hidden": args["hidden"][:1], "lm_head": torch.zeros(60, 16)}
            one["lm_head"][:, 0] = logits[n]
            one["lm_head"][:, 1:] = torch.where(logits[n].isfinite()[:, None], 0.0, logits[n][:, None])
            # The other axes of the row are 0, and 0 times an infinity is NaN, which counts as -inf as well.
            for actual, expected in zip(top(one, SMALL)[:2], draft_topk_ref(**one)[:2], strict=True):
                assert_close(actual.double(), expected.double(), torch.float32)
    one = {"hidden": torch.ones(1, 1), "norm_weight": torch.ones(1), "eps": 1e-30, "exit_weight": None}
    for row in ([0.0, INF, 2.0, INF], [-INF] * 3, [NAN, NAN], [NAN, -INF, 1.0], [INF], [NAN] * 40):
        args = one | {"lm_head": torch.tensor(row)[:, None], "k": len(row[:32]), "exit_bias": None, "token_map": None}
        args = {name: args[name] for name in HEAD_NAMES}
        for actual, expected in zip(top(args, SMALL)[:2], draft_topk_ref(**args)[:2], strict=True):
            assert torch.equal(actual, expected)


def test_a_tile_of_minus_infinity(rng: Generator) -> None:
    """Which adds nothing to the sum, and is taken last."""
    logits = torch.full((1, 40), 1.0)
    logits[:, 16:32] = -INF
    args = one_hot(logits.nan_to_num(neginf=0.0)) | {"k": 32}
    args["lm_head"][16:32, :1] = -INF
    args = args | {"hidden": torch.ones(1, 1), "norm_weight": torch.ones(1), "lm_head": args["lm_head"][:, :1].clone()}
    tokens, logprobs, _ = top(args, SMALL)
    assert tokens.tolist() == [[*range(16), *range(32, 40), *range(16, 24)]]
    assert_close(logprobs[0, :24], torch.full((24,), 1 / 24).log(), torch.float32)
    assert logprobs[0, 24:].eq(-INF).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(16, 3), (40, 5), (2, 4100), (17, 2049)])
def test_the_norm_rounds_as_llamas(rng: Generator, rows: int, size: int, dtype: torch.dtype) -> None:
    """Seen through exit weights that pick columns; at more columns than are normed at a time, too."""
    args = head_case(rng, rows, size, 20, 1, signals=3, dtype=dtype) | {"exit_bias": None, "token_map": None}
    columns = torch.randperm(size, generator=rng)[:3]
    args["exit_weight"] = torch.nn.functional.one_hot(columns, size).to(dtype)
    expected = normed(args)[:, columns]
    signals = top(args, Config(16, 32, 256, 4, 1))[2]
    assert_close(signals, expected, dtype)
    # fp32 and fp64 are rounded apart now and then; with one rounding less a quarter would be.
    if dtype != torch.float32:
        assert signals.ne(expected.float()).sum() <= max(1, signals.numel() // 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_fp32(rng: Generator, dtype: torch.dtype) -> None:
    """Rows of signs are their own norm, so that nothing is rounded but the sums, over many blocks."""
    args = head_case(rng, 5, 200, 60, 5, signals=3, dtype=dtype) | {"token_map": None, "eps": 1e-30}
    args |= {"hidden": args["hidden"].sign(), "norm_weight": torch.ones(200, dtype=dtype)}
    draft_ids, logprobs, signals = top(args, SMALL)
    expected, expected_signals = exact(args, torch.device("cpu"))
    assert (logprobs - expected.gather(1, draft_ids.long())).abs().max() < 1e-5
    assert (signals - expected_signals).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [4, 20])
def test_a_broken_row_breaks_no_other(rng: Generator, rows: int) -> None:
    args = head_case(rng, rows, 24, 100, 5, signals=2)
    clean = top(args, SMALL)
    args["hidden"][2, 3] = pick(rng, NAN, INF, -INF)
    tokens, logprobs, signals = top(args, SMALL)
    assert tokens[2].tolist() == [0, 1, 2, 3, 4] if args["token_map"] is None else True
    assert logprobs[2].eq(-INF).all()
    assert signals[2].isnan().all()
    others = [n for n in range(rows) if n != 2]
    for actual, expected in zip((tokens, logprobs, signals), clean, strict=True):
        assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("rows", [5, 20])
def test_rows_of_wider_tensors(rng: Generator, rows: int) -> None:
    """Strides are followed, and what lies between the rows is not read: the guard raises there, or NaN would show."""
    args = head_case(rng, rows, 20, 50, 5, signals=3)
    expected = top(args, SMALL)
    for name in ("hidden", "lm_head", "exit_weight"):
        args[name] = torch.cat([args[name], torch.full_like(args[name], NAN)], dim=1)[:, :20]
    for actual, wanted in zip(top(args, SMALL), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_slabs_give_the_same(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    args = head_case(rng, 70, 12, 50, 3, signals=3, dtype=torch.bfloat16)
    expected = top(args, SMALL)
    monkeypatch.setattr(table, "WORKSPACE", 4 * 64 * 40)  # 40 rows: slabs of 32, 32 and 6
    made = head.launches(*args.values(), *expected, device=H200, config=SMALL)
    assert [launch.programs for launch in made[2::2]] == [32, 32, 6]
    assert made[1].arguments["logits"].shape == (32, 64)
    for actual, wanted in zip(top(args, SMALL), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_few_rows_are_normed_in_the_product(rng: Generator) -> None:
    def kernels(rows: int) -> list[str]:
        args = head_case(rng, rows, 24, 100, 6)
        outputs = torch.empty(rows, 6, dtype=torch.int32), torch.empty(rows, 6), torch.empty(rows, 0)
        return [launch.kernel.__name__ for launch in head.launches(*args.values(), *outputs, device=H200)]

    assert kernels(16) == ["head_kernel", "select_kernel"]
    assert kernels(17) == ["norm_kernel", "head_kernel", "select_kernel"]


def project(
    x: list[Tensor], weight: Tensor, config: Config | None = None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    rows, size = x[0].shape
    outputs = torch.empty(rows, size, dtype=weight.dtype), torch.empty(rows, len(weight) - size)
    made = features.launches(x, weight, *outputs, device=H200, config=config, splits=splits)
    run(poisoned(made, *outputs), torch.device("cpu"))
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 10, 16, 37])
def test_features_equal_the_twin(rng: Generator, rows: int, dtype: torch.dtype) -> None:
    for config in (None, SMALL, Config(32, 64, 32, 4, 1)):
        x, weight = features_case(rng, rows, pick(rng, 32, 48, draw(rng, 1, 130)), draw(rng, 0, 3), dtype)
        check_features(x, weight, project(x, weight, config, splits=pick(rng, None, 1, 2, 3, draw(rng, 4, 40))))


def test_nan_of_features_stays_in_its_row(rng: Generator) -> None:
    x, weight = features_case(rng, 20, 24, 3, torch.bfloat16)
    clean = project(x, weight, SMALL, 2)
    x[1][7, 3] = NAN
    for actual, expected in zip(project(x, weight, SMALL, 2), clean, strict=True):
        assert actual[7].isnan().all()
        assert torch.equal(actual[[n for n in range(20) if n != 7]], expected[[n for n in range(20) if n != 7]])


def test_no_rows() -> None:
    args = head_case(torch.Generator(), 0, 8, 20, 5, signals=3)
    hidden = args.pop("hidden"), args.pop("norm_weight"), args.pop("eps"), args.pop("lm_head"), args.pop("k")
    results = draft_topk(*hidden, **args, implementation="triton")
    assert [list(x.shape) for x in results] == [[0, 5], [0, 5], [0, 3]]
    results = project_features([torch.empty(0, 8)] * 3, torch.empty(11, 24), implementation="triton")
    assert [list(x.shape) for x in results] == [[0, 8], [0, 3]]


def test_by_name_they_take_their_limits(rng: Generator) -> None:
    args = head_case(rng, 1, 8, 40, 32) | {"token_map": None}
    positional = [args.pop(name) for name in HEAD_NAMES[:5]]
    result = draft_topk(*positional, **args, implementation="triton")
    check_head(dict(zip(HEAD_NAMES[:5], positional, strict=True)) | args, result)
    x, weight = features_case(rng, 128, 8, 1, torch.float32)
    check_features(x, weight, project_features(x, weight, implementation="triton"))


def test_by_name_they_say_what_they_cannot_take(rng: Generator) -> None:
    args = head_case(rng, 2, 8, 50, 33)
    positional = [args.pop(name) for name in ("hidden", "norm_weight", "eps", "lm_head", "k")]
    with pytest.raises(ValueError, match="draft_topk: k must be at most 32, was 33"):
        draft_topk(*positional, **args, implementation="triton")
    with pytest.raises(ValueError, match="project_features: features must have at most 128 rows, had 129"):
        project_features([torch.zeros(129, 8)] * 3, torch.zeros(8, 24), implementation="triton")
    double = [x.double() if isinstance(x, Tensor) else x for x in positional[:4]]
    with pytest.raises(ValueError, match="hidden must be float32, bfloat16 or float16, was float64"):
        draft_topk(*double, 2, implementation="triton")
    with pytest.raises(ValueError, match=r"features\[0\] must be float32, bfloat16 or float16, was float64"):
        project_features([torch.zeros(2, 8).double()] * 3, torch.zeros(8, 24).double(), implementation="triton")
    with pytest.raises(ValueError, match=r"features\[0\] must have entries, was \[2, 0\]"):
        project_features([torch.zeros(2, 0)] * 3, torch.zeros(1, 0), implementation="triton")


def test_a_gpu_gets_the_kernels() -> None:
    for name in ("draft_topk", "project_features", "grow_beam", "grow_level"):
        assert implementations()[name]["cuda"] == "triton"


def test_the_tables_choice() -> None:
    line = table.head_configs(H200, torch.bfloat16)
    rows = [table.choose_config(line, n).rows for n in (1, 16, 17, 64, 65, 128, 129, 512)]
    assert rows == [16, 16, 32, 64, 128, 128, 128, 128]
    assert table.head_configs(Device(80, 108), torch.float16) != line
    assert table.head_configs(Device(120, 170), torch.float16) == table.head_configs(Device(80, 108), torch.float16)
    assert table.choose_config(table.head_configs(H200, torch.float32), 500).rows == 16
    # 32 tiles on 132 multiprocessors: four splits; 81 tiles need none; a split takes 8 blocks at least.
    assert table.choose_splits(H200, 32, 96) == 4
    assert table.choose_splits(H200, 81, 96) == 1
    assert table.choose_splits(H200, 1, 20) == 2
    assert table.choose_splits(H200, 1, 3) == 1
    assert table.slab_rows(10, 32_000, 16) == 10
    assert table.slab_rows(512, 151_936, 128) == 256  # 441 rows would fit
    assert table.slab_rows(512, 1_000_000, 64) == 64


@pytest.mark.parametrize("source", ["fc", "output"])
def test_the_decoder_drafts_with_them(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op of a draft's head through its kernel, as on a GPU: the text, the signals and the tokens accepted in each
    step, which wrong drafts would change, stay the same."""
    pair = bundled_pair()
    tree = TreeConfig(nodes=7, depth=3, top_k=3)
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, tree=tree)
    ids = torch.tensor([[1, 5, 9, 7], [1, 4, 8, 2]])
    exit = ExitConfig(source=source, assume_thinking=True)
    options: dict[str, Any] = {"max_new_tokens": 7, "temperature": 0.0, "exit": exit}
    expected = decoder.generate(ids, **options)
    calls: dict[str, int] = {}
    for name in ("draft_topk", "project_features", "grow_beam", "grow_level"):

        def kernel(*args: Any, name: str = name) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return OPS[name].kernels["triton"].function(*args)

        monkeypatch.setattr(OPS[name], "cpu", replace(OPS[name].cpu, name="triton", function=kernel))
    out = decoder.generate(ids, **options)
    assert len(calls) == 4
    assert out.new_tokens == expected.new_tokens
    for row, wanted in zip(out.stats, expected.stats, strict=True):
        assert row.accepted == wanted.accepted
        assert row.trace is not None
        assert wanted.trace is not None
        assert len(row.trace.signals) > 0
        assert_close(torch.tensor(row.trace.signals), torch.tensor(wanted.trace.signals))
