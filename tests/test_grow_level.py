"""grow_level against grow_beam and Python's indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from draft_cases import Arguments, grow_case
from torch import Generator

from specexit_kernels import grow_beam, grow_level


def check(args: Arguments) -> None:
    grown = grow_beam(*(args[name] for name in ("tokens", "logprobs", "scores", "beams")))
    *same, hidden, visible = grow_level(**args)
    for actual, expected in zip(same, grown, strict=True):
        assert torch.equal(actual, expected)
    assert (hidden.dtype, visible.dtype) == (args["hidden"].dtype, torch.int64)
    assert hidden.is_contiguous()
    assert visible.is_contiguous()
    for b, candidates in enumerate(grown[2].tolist()):
        for i, candidate in enumerate(candidates):
            parent = candidate // args["tokens"].shape[2]
            assert torch.equal(hidden[b, i], args["hidden"][b, parent])
            assert visible[b, i].tolist() == (args["visible"][b, parent] | args["own"][b, i]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("parents", "width", "beams", "words"), [(1, 1, 1, 1), (10, 10, 10, 1), (3, 7, 1, 2), (2, 3, 6, 4)]
)
def test_gathers_what_the_beams_grew_from(
    rng: Generator, parents: int, width: int, beams: int, words: int, dtype: torch.dtype
) -> None:
    check(grow_case(rng, parents=parents, width=width, beams=beams, words=words, dtype=dtype))


def test_strided_and_expanded_inputs(rng: Generator) -> None:
    args = grow_case(rng, beams=4)
    for name in ("tokens", "logprobs"):
        args[name] = args[name].mT.contiguous().mT
    args["hidden"] = args["hidden"][:, :1].expand(-1, 4, -1)  # as of the first level, whose beams share the root's row
    args["visible"] = torch.cat([args["visible"], args["own"]], dim=2)[:, :, :2]
    args["own"] = args["own"][:1].expand(3, -1, -1)
    check(args)


def test_no_rows(rng: Generator) -> None:
    shapes = [list(x.shape) for x in grow_level(**grow_case(rng, batch=0))]
    assert shapes == [[0, 20], [0, 6], [0, 6], [0, 6], [0, 6, 7], [0, 6, 2]]


def test_opcheck(rng: Generator) -> None:
    op = torch.ops.specexit.grow_level.default
    torch.library.opcheck(op, tuple(grow_case(rng, dtype=torch.bfloat16).values()))
    torch.library.opcheck(op, tuple(grow_case(rng, batch=1, beams=20, words=1).values()))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("tokens", lambda x: x.long(), TypeError),
        ("logprobs", lambda x: x[:, :, 1:], ValueError),
        ("scores", lambda x: x.double(), TypeError),
        ("beams", lambda x: 21, ValueError),
        ("hidden", lambda x: x.int(), TypeError),
        ("hidden", lambda x: x[:, 1:], ValueError),
        ("hidden", lambda x: x.mT.contiguous().mT, ValueError),
        ("visible", lambda x: x.int(), TypeError),
        ("visible", lambda x: x[:, 1:], ValueError),
        ("visible", lambda x: x.mT.contiguous().mT, ValueError),
        ("own", lambda x: x.bool(), TypeError),
        ("own", lambda x: x[:, 1:], ValueError),
        ("own", lambda x: x[:, :, 1:], ValueError),
        ("own", lambda x: x.to("meta"), ValueError),
        ("own", lambda x: None, TypeError),
    ],
)
def test_bad_arguments_are_named(rng: Generator, name: str, change: Callable[[Any], Any], error: type) -> None:
    args = grow_case(rng)
    with pytest.raises(error, match=f"^{name} must"):
        grow_level(**(args | {name: change(args[name])}))
