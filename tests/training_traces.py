"""Traces and signals made up for the tests of rules and calibration."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

from specexit import bundled_pair
from specexit.training.records import Trace, sufficient_length
from specexit.training.signals import RecordedSignals, trace_fingerprint


def made_up(
    source: random.Random, count: int, samples: int = 1, known: bool = True, longest: int = 40, most: int = 6
) -> list[Trace]:
    """Random traces, some without a boundary, some of one token."""
    traces = []
    for number in range(count):
        for sample in range(samples):
            length = source.randint(1, longest)
            boundaries = sorted(source.sample(range(1, length + 1), source.randint(0, min(most, length))))
            answers = [source.choice("ab") for _ in boundaries]
            agrees = [answer == "a" for answer in answers]
            right = source.choice("aab")
            traces.append(
                Trace(
                    id=f"p{number}",
                    sample=sample,
                    prompt=[1, 2],
                    thinking=[source.randint(3, 8) for _ in range(length)],
                    reply=[2],
                    boundaries=boundaries,
                    answers=list(answers),
                    probabilities=[source.random() for _ in boundaries],
                    agrees=agrees,
                    correct=[answer == right for answer in answers] if known else None,
                    final="a",
                    final_correct=right == "a" if known else None,
                    sufficient=sufficient_length(boundaries, agrees, length),
                )
            )
    return traces


def signals_of(traces: list[Trace], raw: dict[str, torch.Tensor]) -> RecordedSignals:
    """Raw signals [thinking tokens, S] by source, as recorded from these traces."""
    names = {source: ("confidence", "progress", "remaining")[: value.shape[1]] for source, value in raw.items()}
    offsets = torch.tensor([0, *(len(trace.thinking) for trace in traces)]).cumsum(0)
    return RecordedSignals(raw, names, offsets, trace_fingerprint(traces), "base", "draft")


def random_raw(traces: list[Trace], rng: torch.Generator, missing: float = 0.1) -> torch.Tensor:
    """Normal numbers, some of them not finite, or too large to be once they are exponents."""
    total = sum(len(trace.thinking) for trace in traces)
    raw = 1.5 * torch.randn(total, 3, generator=rng)
    odd = torch.tensor([torch.nan, torch.inf, 200.0])[torch.randint(3, (total, 3), generator=rng)]
    return torch.where(torch.rand(total, 3, generator=rng) < missing, odd, raw)


def own_draft(parent: Path) -> Path:
    """The folder of a copy of the bundled draft, without a calibration, that a test may write to."""
    target = parent / "draft"
    shutil.copytree(bundled_pair().draft, target)
    for file in target.iterdir():
        file.chmod(0o644)
    (target / "calibration.json").unlink(missing_ok=True)
    return target
