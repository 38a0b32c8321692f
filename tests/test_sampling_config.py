"""Sampling parameters and row seeds."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specexit.processors import split_warpers
from specexit.sampling import SamplingConfig, row_seeds


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
    ],
)
def test_values_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be .*, was {value}"):
        SamplingConfig(**{option: value})


def test_row_seeds_are_distinct_and_repeatable() -> None:
    seeds = row_seeds(7, 1000)
    assert len(set(seeds)) == 1000
    assert seeds == row_seeds(7, 1000)
    assert seeds[:5] == row_seeds(7, 5), "a row's seed must not depend on how many rows follow"
    assert not set(seeds) & set(row_seeds(8, 1000))
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_seed_none_follows_torch() -> None:
    torch.manual_seed(3)
    first = row_seeds(None, 4)
    torch.manual_seed(3)
    assert first == row_seeds(None, 4)
    assert first != row_seeds(None, 4)


def test_one_seed_a_row() -> None:
    assert row_seeds([1, 2**64 - 1], 2) == [1, -1]
    with pytest.raises(ValueError, match=r"seed must be one int or one a prompt \(3\), was 2"):
        row_seeds([1, 2], 3)


def test_warpers_at_the_end_become_parameters() -> None:
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    config, rest = split_warpers([penalty, *warpers], do_sample=True)
    assert config == SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
    assert list(rest) == [penalty]
    assert isinstance(rest, LogitsProcessorList)


def test_a_warper_before_another_processor_keeps_its_place() -> None:
    """What runs after it must see its result."""
    processors = [TemperatureLogitsWarper(0.7), RepetitionPenaltyLogitsProcessor(1.3), TopPLogitsWarper(0.9)]
    config, rest = split_warpers(processors, do_sample=True)
    assert config == SamplingConfig(temperature=1.0, top_p=0.9)
    assert list(rest) == processors[:2]


def test_warpers_in_another_order_stay() -> None:
    processors = [TopPLogitsWarper(0.9), TemperatureLogitsWarper(0.7)]
    config, rest = split_warpers(processors, do_sample=True)
    assert config == SamplingConfig(temperature=0.7)
    assert list(rest) == processors[:1]


def test_a_warper_that_keeps_several_tokens_stays() -> None:
    processors = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9, min_tokens_to_keep=2)]
    config, rest = split_warpers(processors, do_sample=True)
    assert config == SamplingConfig(temperature=1.0)
    assert list(rest) == processors


def test_greedy_has_no_parameters() -> None:
    config, rest = split_warpers([RepetitionPenaltyLogitsProcessor(1.3)], do_sample=False)
    assert config == SamplingConfig()
    assert len(rest) == 1
