"""Every operator has sample arguments, and what the CPU runs for them agrees with the twin."""

from __future__ import annotations

import pytest
from op_samples import SAMPLES, assert_same, on

import specexit_kernels
from specexit_kernels._op import OPS


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_equals_its_twin(name, rng):
    operator = getattr(specexit_kernels, name)
    for sample in SAMPLES[name](rng):
        here, there = on("cpu", sample), on("cpu", sample)
        actual, expected = operator(**here), operator(**there, implementation="torch")
        assert_same([actual, here], [expected, there])


def test_every_sample_is_of_an_op():
    assert set(SAMPLES) == set(OPS)
