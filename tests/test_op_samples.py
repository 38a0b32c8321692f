"""Every operator has sample arguments, and runs on them through the dispatcher as its twin does by name."""

from __future__ import annotations

import pytest
import torch
from op_samples import SAMPLES, on, tensors

import specexit_kernels
from specexit_kernels._op import OPS


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_runs_on_its_samples(name, rng):
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        dispatched, by_name = on("cpu", sample), on("cpu", sample)
        results = operator(**dispatched), operator(**by_name, implementation="torch")
        actual, expected = tensors([results[0], dispatched]), tensors([results[1], by_name])
        assert len(actual) == len(expected) > 0
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.nan_to_num(), e.nan_to_num())


def test_every_sample_is_of_an_op():
    assert set(SAMPLES) == set(OPS)
