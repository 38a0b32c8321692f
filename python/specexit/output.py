"""What `generate` returns: the sequences, and for each row how they came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass
class SignalTrace:
    """The exit signals at every thinking position that was read.

    positions  counted from the row's first prompt token, padding excluded
    signals    x: one list a position, in the order of `names`
    smoothed   e: what was compared with the thresholds
    """

    names: tuple[str, ...] = ()
    positions: list[int] = field(default_factory=list)
    signals: list[list[float]] = field(default_factory=list)
    smoothed: list[list[float]] = field(default_factory=list)


@dataclass
class RowStats:
    """How one sequence was decoded.

    steps            forwards of the base after the prompt
    accepted         tokens published by each of them
    finish_reason    "stop" (a stop id), "length" (max_new_tokens), "capacity" (the cache's hard limit) or "criteria"
    thinking_tokens  generated tokens inside the thinking text, its markers excluded
    exit_position    position of the boundary token after which thinking was cut; None without an exit
    exit_reason      "signals" or "budget"
    """

    prompt_tokens: int
    steps: int = 0
    accepted: list[int] = field(default_factory=list)
    new_tokens: int = 0
    thinking_tokens: int = 0
    finish_reason: Literal["stop", "length", "capacity", "criteria"] | None = None
    exit_position: int | None = None
    exit_reason: Literal["signals", "budget"] | None = None
    trace: SignalTrace | None = None

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.steps if self.steps else 0.0


@dataclass
class Completion:
    """One sequence of `generate_many`.

    index       of its prompt
    new_tokens  the generated ids
    """

    index: int
    new_tokens: list[int]
    stats: RowStats


@dataclass
class GenerateOutput:
    """sequences   [B, P + N] int64: `input_ids` as they were given, then the new tokens, then padding
    new_tokens  the generated ids of each row
    stats       one a row
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    stats: list[RowStats]


def join_sequences(input_ids: Tensor, new_tokens: list[list[int]], pad: int) -> Tensor:
    """[B, P] and the rows' new ids -> [B, P + longest], padded on the right."""
    width = max((len(row) for row in new_tokens), default=0)
    rows = [row + [pad] * (width - len(row)) for row in new_tokens]
    tail = torch.tensor(rows, dtype=torch.int64, device=input_ids.device).reshape(input_ids.shape[0], width)
    return torch.cat([input_ids.long(), tail], 1)
