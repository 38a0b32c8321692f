"""The state of a decode step: one struct of device tensors, the same for the twins and the kernels.

Nothing in it is read by the host during a step. Positions count a row's own tokens, padding excluded; `L` is the
number of committed positions: the base's KV cache holds positions [0, L), and the *root*, the last emitted token, has
position L. The draft's cache always holds one row less, [0, L - 1): its row for position p has also read token p + 1,
so the last position is read again with the root, which an exit may have replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Tree(NamedTuple):
    """A batch of token trees, B sequences of T nodes. Node 0 is the root; `parent[n] < n`.

    An *inert* node (too few candidates) has token 0, parent 0, depth 1 and no visible bit; it is never accepted.
    """

    tokens: Tensor  # [B, T] int32
    parent: Tensor  # [B, T] int32, node 0's is 0
    depth: Tensor  # [B, T] int32
    visible: Tensor  # [B, T, W] int64: a node's ancestors and itself


class Finish(IntEnum):
    """Why a row has ended."""

    RUNNING = 0
    STOP = 1  # a stop id
    LENGTH = 2  # the row's limit


class ExitReason(IntEnum):
    """Why thinking was cut."""

    NONE = 0
    SIGNALS = 1
    BUDGET = 2


@dataclass
class DecodeState:
    """B rows of decoding state. D is the depth of the deepest tree, F the number of forced ids, S of signals.

    A step's *run* is the root it began with and the tokens it emits after it: `run[:, 0]` has position L, and the
    base's features are known for all of the run but its last token.
    """

    lengths: Tensor  # [B] int32: L
    limits: Tensor  # [B] int32: a token may stand at positions below the limit
    prompt_lengths: Tensor  # [B] int32
    root: Tensor  # [B] int32
    finished: Tensor  # [B] int32: Finish
    forced: Tensor  # [B, F] int32: ids to emit whatever the base says; forced[0] is the root
    n_forced: Tensor  # [B] int32
    run: Tensor  # [B, D + 2] int32: the old root, then the tokens that `accept` found; the rest is 0
    n_pending: Tensor  # [B] int32: tokens of the run after the old root
    thinking: Tensor  # [B] int32: 1 inside the thinking text, after the token at L - 1
    thinking_tokens: Tensor  # [B] int32: generated positions read inside thinking
    tail: Tensor  # [B, M] int32: the M tokens before the root, -1 where there are none; M = longest marker - 1
    smoothed: Tensor  # [B, S] float32: e, of the last read position
    seen: Tensor  # [B, S] int32: how many values went into it
    history: Tensor  # [B, S, w] float32: the last values, newest last (window and momentum smoothing)
    exit_position: Tensor  # [B] int32: position of the boundary token p of the first exit, -1
    exit_reason: Tensor  # [B] int32: ExitReason
    output: Tensor  # [B, D + 1] int32: the tokens that the step publishes
    n_output: Tensor  # [B] int32
    trace: Tensor  # [B, D + 1, 2, S] float32: x and e at each read position of the run, NaN where none
    n_read: Tensor  # [B] int32: read positions of the run that stand: L at the step's start, and on

    def tensors(self) -> list[Tensor]:
        """The fields in order: how the ops take the state."""
        return [getattr(self, f.name) for f in fields(self)]

    @staticmethod
    def of(tensors: list[Tensor]) -> DecodeState:
        return DecodeState(*tensors)

    @staticmethod
    def empty(
        batch: int,
        *,
        depth: int,
        signals: int = 0,
        forced: int = 1,
        tail: int = 0,
        window: int = 0,
        device: torch.device | str | None = None,
    ) -> DecodeState:
        """State of `batch` rows before their prompts: all zeros, and -1 or NaN where those mean "none"."""

        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full((batch, *shape), fill, dtype=torch.int32, device=device)

        def floats(*shape: int, fill: float = 0.0) -> Tensor:
            return torch.full((batch, *shape), fill, dtype=torch.float32, device=device)

        return DecodeState(
            lengths=integers(),
            limits=integers(),
            prompt_lengths=integers(),
            root=integers(),
            finished=integers(),
            forced=integers(forced),
            n_forced=integers(),
            run=integers(depth + 2),
            n_pending=integers(),
            thinking=integers(),
            thinking_tokens=integers(),
            tail=integers(tail, fill=-1),
            smoothed=floats(signals),
            seen=integers(signals),
            history=floats(signals, window),
            exit_position=integers(fill=-1),
            exit_reason=integers(),
            output=integers(depth + 1),
            n_output=integers(),
            trace=floats(depth + 1, 2, signals, fill=float("nan")),
            n_read=integers(),
        )


class Smoothing(IntEnum):
    """How the signal values x of successive positions become the value e that is compared."""

    NONE = 0
    EWMA = 1
    WINDOW = 2
    MOMENTUM = 3


@dataclass(frozen=True)
class ExitRules:
    """When thinking is cut; per-row tensors and the settings that every row shares (DESIGN section 6).

    Signals are in the order confidence, progress, remaining; S of them.
    """

    enabled: Tensor  # [B] int32: 0 switches the signals' exit off (a budget still holds)
    thresholds: Tensor  # [B, S] float32
    used: Tensor  # [B, S] int32: 0 leaves a signal out of the decision
    alpha: Tensor  # [B] float32: weight of the newest value (EWMA)
    min_thinking: Tensor  # [B] int32: no exit by signals before so many thinking tokens
    budget: Tensor  # [B] int32: thinking tokens after which thinking is cut, at most 2**31 - 1
    hard_budget: Tensor  # [B] int32: 1 cuts at the budget, 0 at the next boundary
    boundary: Tensor  # [V] bool: ids that end a paragraph
    start: Tensor  # [Fs] int32: ids that start thinking; empty: it never starts again
    end: Tensor  # [Fe] int32: ids that end thinking
    force: Tensor  # [F] int32: ids emitted at an exit
    stop_ids: Tensor  # [n] int32
    smoothing: Smoothing = Smoothing.EWMA
    per_step: bool = False  # the release's granularity: one mean value a step, decided before it is added

    def tensors(self) -> list[Tensor]:
        """The tensor fields in order: how the op takes the rules."""
        return [getattr(self, f.name) for f in fields(self) if f.name not in ("smoothing", "per_step")]
