"""Random traces, and files of them, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import VOCAB
from torch import nn

from specexit.identity import fingerprint
from specexit.training.records import Trace, TraceFile, sufficient_length


def random_trace(
    rng: torch.Generator,
    *,
    name: str = "p",
    sample: int = 0,
    prompt: int | None = None,
    thinking: int | None = None,
    boundaries: list[int] | None = None,
    ends_at_boundary: bool = True,
    flaw: str | None = None,
) -> Trace:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=rng).tolist()

    count = thinking or integer(8, 30)
    if boundaries is None:
        chosen = torch.randperm(count, generator=rng)[: integer(1, min(5, count))] + 1
        boundaries = sorted({*chosen.tolist(), count} if ends_at_boundary else {*chosen.tolist()} - {count} or {1})
    agrees = [bool(integer(0, 1)) for _ in boundaries]
    return Trace(
        id=name,
        sample=sample,
        prompt=tokens(prompt or integer(2, 8)),
        thinking=tokens(count),
        reply=tokens(integer(1, 6)),
        boundaries=boundaries,
        answers=["1" if yes else "2" for yes in agrees],
        probabilities=torch.rand(len(boundaries), generator=rng).tolist(),
        agrees=agrees,
        final="1",
        sufficient=sufficient_length(boundaries, agrees, count),
        flaw=flaw,
    )


def write_traces(path: Path, model: nn.Module, traces: Sequence[Trace]) -> Path:
    with TraceFile(path, {"base": fingerprint(model)}) as file:
        for trace in traces:
            file.append(trace)
    return path
