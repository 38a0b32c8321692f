"""activate_signals against the formulas, in Python's floats."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close
from torch import Generator

from specexit_kernels import activate_signals


@pytest.mark.parametrize("signals", [0, 1, 2, 3])
def test_sigmoid_sigmoid_exp(rng: Generator, signals: int) -> None:
    raw = torch.randn(5, 4, signals, generator=rng) * 8
    before = raw.clone()
    values = activate_signals(raw)
    assert torch.equal(raw, before)
    for place in torch.cartesian_prod(torch.arange(5), torch.arange(4)).tolist():
        for s, z in enumerate(raw[tuple(place)].tolist()):
            wanted = math.exp(z) if s == 2 else 1 / (1 + math.exp(-z))
            assert_close(values[(*place, s)], torch.tensor(wanted, dtype=torch.float64), torch.float32)


def test_ends_and_nan() -> None:
    infinity, nan = math.inf, math.nan
    raw = torch.tensor([[-infinity, infinity, -infinity], [200.0, -200.0, 200.0], [nan, nan, nan]])
    values = activate_signals(raw)
    assert values[:2].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, infinity]]
    assert values[2].isnan().all()


def test_the_same_bits_anywhere(rng: Generator) -> None:
    """An exit must not depend on where in a batch a row stands."""
    raw = torch.randn(37, 3, generator=rng) * 5
    values = activate_signals(raw)
    for n in range(37):
        assert torch.equal(activate_signals(raw[n : n + 1]), values[n : n + 1])
