"""grow_beam against Python's own sort."""

import math

import numpy as np
import pytest
import torch

from specexit_kernels.grow_beam import grow_beam, grow_beam_ref

INF = math.inf


def oracle(
    tokens: torch.Tensor, logprobs: torch.Tensor, scores: torch.Tensor, beams: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One candidate at a time, in IEEE single precision."""
    batch, parents, width = tokens.shape
    out: tuple[list, list, list, list] = ([], [], [], [])
    for b in range(batch):
        candidates = []
        for m in range(parents):
            score = np.float32(scores[b, m].item())
            for j in range(width):
                with np.errstate(invalid="ignore", over="ignore"):
                    total = score + np.float32(logprobs[b, m, j].item())
                nan = np.isnan(total) or np.isnan(score)
                candidates.append(-INF if nan else float(min(total, score)))
        best = sorted(range(len(candidates)), key=lambda c: (-candidates[c], c))[:beams]
        flat = tokens[b].flatten().tolist()
        for part, row in zip(
            out, (candidates, [flat[c] for c in best], best, [candidates[c] for c in best]), strict=True
        ):
            part.append(row)
    dtypes = (torch.float32, torch.int32, torch.int32, torch.float32)
    widths = (parents * width, beams, beams, beams)
    a, b, c, d = (
        torch.tensor(rows, dtype=dtype).reshape(batch, n) for rows, dtype, n in zip(out, dtypes, widths, strict=True)
    )
    return a, b, c, d


def check(tokens: torch.Tensor, logprobs: torch.Tensor, scores: torch.Tensor, beams: int) -> None:
    for got, want in zip(
        grow_beam(tokens, logprobs, scores, beams), oracle(tokens, logprobs, scores, beams), strict=True
    ):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
        assert got.is_contiguous()


def random_inputs(
    rng: torch.Generator, batch: int, parents: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 150_000, (batch, parents, width), generator=rng, dtype=torch.int32)
    logprobs = -torch.rand(batch, parents, width, generator=rng) * 5
    scores = -torch.rand(batch, parents, generator=rng) * 5
    return tokens, logprobs, scores


@pytest.mark.parametrize(("parents", "width"), [(1, 1), (1, 10), (3, 3), (10, 10), (7, 13), (20, 1), (33, 31)])
def test_equals_the_sort(rng: torch.Generator, parents: int, width: int) -> None:
    tokens, logprobs, scores = random_inputs(rng, 3, parents, width)
    for beams in {1, min(10, parents * width), parents * width}:
        check(tokens, logprobs, scores, beams)


def test_ties_go_to_the_lower_index(rng: torch.Generator) -> None:
    tokens, logprobs, scores = random_inputs(rng, 20, 10, 10)
    check(tokens, logprobs.round(), scores.round(), 17)
    _, _, candidates, _ = grow_beam(tokens, torch.zeros_like(logprobs), torch.zeros_like(scores), 17)
    assert torch.equal(candidates, torch.arange(17, dtype=torch.int32).expand(20, -1))


def test_values_that_are_no_numbers(rng: torch.Generator) -> None:
    tokens, logprobs, scores = random_inputs(rng, 40, 4, 5)
    strange = torch.tensor([math.nan, -INF, INF, 0.0, -0.0, 1e-7, 3e38, -3e38])
    for x, rate in ((logprobs, 0.5), (scores, 0.3)):
        pick = strange[torch.randint(0, len(strange), x.shape, generator=rng)]
        x.copy_(torch.where(torch.rand(x.shape, generator=rng) < rate, pick, x))
    check(tokens, logprobs, scores, 13)
    candidates, *_ = grow_beam(tokens, torch.full_like(logprobs, math.nan), scores, 3)
    assert candidates.eq(-INF).all()


def test_no_child_outranks_its_parent(rng: torch.Generator) -> None:
    tokens, logprobs, scores = random_inputs(rng, 5, 4, 6)
    candidates, *_ = grow_beam(tokens, logprobs.abs() * 1e-7, scores, 3)  # log-probabilities that rounding let pass 0
    assert torch.equal(candidates.view(5, 4, 6), scores[..., None].expand(-1, -1, 6))


def test_strided_and_empty_inputs(rng: torch.Generator) -> None:
    tokens, logprobs, scores = random_inputs(rng, 4, 3, 5)
    args = tokens.mT.contiguous().mT, logprobs.mT.contiguous().mT, scores.T.contiguous().T
    for got, want in zip(grow_beam(*args, 4), grow_beam_ref(tokens, logprobs, scores, 4), strict=True):
        assert torch.equal(got, want)
    shapes = [tuple(x.shape) for x in grow_beam(tokens[:0], logprobs[:0], scores[:0], 4)]
    assert shapes == [(0, 15), (0, 4), (0, 4), (0, 4)]


@pytest.mark.parametrize(("batch", "beams"), [(2, 4), (1, 4), (2, 15)])
def test_opcheck(rng: torch.Generator, batch: int, beams: int) -> None:
    args = (*random_inputs(rng, batch, 3, 5), beams)
    torch.library.opcheck(torch.ops.specexit.grow_beam.default, args)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokens", torch.zeros(2, 3, 5, dtype=torch.int64), TypeError),
        ("tokens", torch.zeros(2, 15, dtype=torch.int32), ValueError),
        ("tokens", None, TypeError),
        ("logprobs", torch.zeros(2, 3, 5, dtype=torch.float64), TypeError),
        ("logprobs", torch.zeros(2, 3, 4), ValueError),
        ("logprobs", torch.zeros(2, 3, 5, device="meta"), ValueError),
        ("scores", torch.zeros(2, 3, dtype=torch.bfloat16), TypeError),
        ("scores", torch.zeros(2, 5), ValueError),
        ("beams", 0, ValueError),
        ("beams", 16, ValueError),
        ("beams", 2.0, TypeError),
        ("implementation", "fortran", ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    valid = {
        "tokens": torch.zeros(2, 3, 5, dtype=torch.int32),
        "logprobs": torch.zeros(2, 3, 5),
        "scores": torch.zeros(2, 3),
        "beams": 4,
    }
    with pytest.raises(error, match=name):
        grow_beam(**{**valid, name: value})  # type: ignore[arg-type]
