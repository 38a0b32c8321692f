"""draft_topk against the formulas in float64, and its ranking against Python's sort."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from draft_cases import normed, one_hot
from tolerances import assert_close
from torch import Tensor

from specexit_kernels.draft_topk import draft_topk, draft_topk_ref

NAN, INF = float("nan"), float("inf")


def case(
    rng: torch.Generator,
    rows: int,
    hidden: int,
    vocab: int,
    k: int,
    signals: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(rows, hidden) * 3,
        "norm_weight": normal(hidden),
        "eps": 0.05,
        "lm_head": normal(vocab, hidden) / hidden**0.5,
        "k": k,
        "exit_weight": normal(signals, hidden) / hidden**0.5 if signals else None,
        "exit_bias": normal(signals) if signals else None,
        "token_map": (torch.randperm(3 * vocab, generator=rng)[:vocab] - torch.arange(vocab)).int(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_oracle(rng: torch.Generator, dtype: torch.dtype) -> None:
    accumulated = torch.promote_types(dtype, torch.float32)
    for rows, hidden, vocab, k, signals in ((1, 1, 1, 1, 1), (5, 12, 7, 7, 0), (10, 64, 301, 10, 3), (3, 33, 80, 1, 2)):
        args = case(rng, rows, hidden, vocab, k, signals, dtype)
        tokens, logprobs, z = draft_topk(**args)
        assert (tokens.shape, tokens.dtype) == ((rows, k), torch.int32)
        assert (logprobs.shape, logprobs.dtype) == ((rows, k), accumulated)
        assert (z.shape, z.dtype) == ((rows, signals), accumulated)
        row = normed(args)
        expected = (row @ args["lm_head"].double().T).log_softmax(1)
        assert_close(logprobs, expected.sort(1, descending=True).values[:, :k], dtype)
        # And they belong to the tokens: the oracle gives each token the same one.
        draft_id = {v + difference: v for v, difference in enumerate(args["token_map"].tolist())}
        draft_ids = torch.tensor([[draft_id[t] for t in ids] for ids in tokens.tolist()])
        assert_close(logprobs, expected.gather(1, draft_ids), dtype)
        if signals:
            assert_close(z, row @ args["exit_weight"].double().T + args["exit_bias"].double(), dtype)
        for out in (tokens, logprobs, z):
            assert out.is_contiguous()


def test_ranking_is_exact(rng: torch.Generator) -> None:
    """Logits of few values, hence many ties, against Python's stable sort."""
    for _ in range(20):
        values = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.5, 3.0])
        logits = values[torch.randint(0, 6, (4, 37), generator=rng)].tolist()
        k = int(torch.randint(1, 38, (), generator=rng))
        tokens, logprobs, _ = draft_topk(**one_hot(torch.tensor(logits)) | {"k": k})
        for n, row in enumerate(logits):
            expected = sorted(range(37), key=lambda v, row=row: (-row[v], v))[:k]
            assert tokens[n].tolist() == expected
            total = math.log(sum(math.exp(x) for x in row))
            assert_close(
                logprobs[n], torch.tensor([row[v] - total for v in expected], dtype=torch.float64), torch.float32
            )


def test_ties_across_a_large_vocabulary(rng: torch.Generator) -> None:
    logits = torch.zeros(2, 40_000)
    logits[:, torch.randperm(40_000, generator=rng)[:3]] = 1.0
    tokens, _, _ = draft_topk(**one_hot(logits) | {"k": 8})
    first = logits[0].nonzero().flatten().tolist()
    expected = first + [v for v in range(12) if v not in first][:5]
    assert tokens.tolist() == [expected, expected]


def test_nan_counts_as_minus_infinity() -> None:
    args = one_hot(torch.tensor([[0.0, 1.0, 2.0, 1.0]] * 2)) | {"k": 4}
    args["lm_head"][2, 5] = NAN  # a token whose logit is NaN in every row
    tokens, logprobs, _ = draft_topk(**args)
    assert tokens.tolist() == [[1, 3, 0, 2]] * 2
    assert logprobs[:, 3].tolist() == [-INF, -INF]
    assert_close(logprobs[0, :3], torch.tensor([1.0, 1.0, 0.0]).log_softmax(0), torch.float32)
    args["hidden"][1, 3] = NAN  # a row of NaN: no logit is left
    tokens, logprobs, _ = draft_topk(**args)
    assert tokens.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert logprobs[1].tolist() == [-INF] * 4


def test_a_row_without_a_softmax() -> None:
    args = {"hidden": torch.ones(1, 1), "norm_weight": torch.ones(1), "eps": 1e-30}
    for logits, ranking in (([0.0, INF, 2.0], [1, 2, 0]), ([-INF] * 3, [0, 1, 2])):
        tokens, logprobs, _ = draft_topk(**args, lm_head=torch.tensor(logits)[:, None], k=3)
        assert tokens.tolist() == [ranking]
        assert logprobs.tolist() == [[-INF] * 3]


def test_token_map_holds_differences(rng: torch.Generator) -> None:
    args = case(rng, 4, 16, 50, 9)
    mapped = draft_topk(**args)[0]
    draft_ids = draft_topk(**(args | {"token_map": None}))[0]
    assert mapped.tolist() == [[v + int(args["token_map"][v]) for v in ids] for ids in draft_ids.tolist()]


def test_signals_leave_the_tokens_alone(rng: torch.Generator) -> None:
    args = case(rng, 4, 16, 50, 9, signals=3)
    tokens, logprobs, z = draft_topk(**args)
    plain = draft_topk(**(args | {"exit_weight": None, "exit_bias": None}))
    assert torch.equal(plain[0], tokens)
    assert torch.equal(plain[1], logprobs)
    assert plain[2].shape == (4, 0)
    unbiased = draft_topk(**(args | {"exit_bias": None}))[2]
    assert_close(unbiased + args["exit_bias"], z)


def test_the_norm_is_llamas(rng: torch.Generator) -> None:
    """Bit for bit transformers' LlamaRMSNorm, seen through an exit weight that picks the columns."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        args = case(rng, 5, 3, 20, 1, signals=3, dtype=dtype)
        norm = LlamaRMSNorm(3, eps=args["eps"]).to(dtype)
        norm.weight.data.copy_(args["norm_weight"])
        args |= {"exit_weight": torch.eye(3, dtype=dtype), "exit_bias": None}
        assert torch.equal(draft_topk(**args)[2], norm(args["hidden"]).float())


def test_rows_of_a_wider_tensor(rng: torch.Generator) -> None:
    args = case(rng, 4, 16, 50, 9, signals=3)
    expected = draft_topk(**args)
    for name in ("hidden", "lm_head", "exit_weight"):
        args[name] = torch.cat([args[name], torch.full_like(args[name], NAN)], dim=1)[:, :16]
    for actual, wanted in zip(draft_topk(**args), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_no_rows(rng: torch.Generator) -> None:
    assert [list(x.shape) for x in draft_topk(**case(rng, 0, 8, 20, 5, signals=3))] == [[0, 5], [0, 5], [0, 3]]


def test_opcheck(rng: torch.Generator) -> None:
    op = torch.ops.specexit.draft_topk.default
    torch.library.opcheck(op, tuple(case(rng, 5, 8, 20, 4, signals=3, dtype=torch.bfloat16).values()))
    torch.library.opcheck(op, tuple(case(rng, 1, 8, 20, 20).values())[:5])


def test_the_twin_can_be_asked_for(rng: torch.Generator) -> None:
    args = case(rng, 3, 8, 20, 4, signals=1)
    for actual, wanted in zip(draft_topk(**args, implementation="torch"), draft_topk_ref(**args), strict=True):
        assert torch.equal(actual, wanted)
    with pytest.raises(ValueError, match="implementation"):
        draft_topk(**args, implementation="fortran")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("hidden", lambda x: x.int(), TypeError),
        ("hidden", lambda x: x[0], ValueError),
        ("hidden", lambda x: x.t().contiguous().t(), ValueError),
        ("norm_weight", lambda x: x.double(), TypeError),
        ("norm_weight", lambda x: x[:7], ValueError),
        ("norm_weight", lambda x: x.repeat(2)[::2], ValueError),
        ("eps", lambda x: "small", TypeError),
        ("eps", lambda x: 0.0, ValueError),
        ("lm_head", lambda x: x.tolist(), TypeError),
        ("lm_head", lambda x: x.bfloat16(), TypeError),
        ("lm_head", lambda x: x[:, :7], ValueError),
        ("lm_head", lambda x: x.t().contiguous().t(), ValueError),
        ("lm_head", lambda x: x.to("meta"), ValueError),
        ("k", lambda x: 2.0, TypeError),
        ("k", lambda x: 0, ValueError),
        ("k", lambda x: 21, ValueError),
        ("exit_weight", lambda x: x.double(), TypeError),
        ("exit_weight", lambda x: x[:, :7], ValueError),
        ("exit_weight", lambda x: x.t().contiguous().t(), ValueError),
        (r"exit_weight.shape\[0\]", lambda x: torch.cat([x, x]), ValueError),
        ("exit_bias", lambda x: x.double(), TypeError),
        ("exit_bias", lambda x: x[:2], ValueError),
        ("exit_bias", lambda x: x.repeat(2)[::2], ValueError),
        ("token_map", lambda x: x.long(), TypeError),
        ("token_map", lambda x: x[:10], ValueError),
        ("token_map", lambda x: x.repeat(2)[::2], ValueError),
    ],
)
def test_bad_arguments(rng: torch.Generator, name: str, change: Callable[[Any], Any], error: type[Exception]) -> None:
    args = case(rng, 4, 8, 20, 5, signals=3)
    argument = name.partition(".")[0]
    with pytest.raises(error, match=rf"^{name} must"):
        draft_topk(**(args | {argument: change(args[argument])}))


def test_a_bias_needs_a_weight(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="exit_bias must be None"):
        draft_topk(**(case(rng, 4, 8, 20, 5, signals=3) | {"exit_weight": None}))
