"""The state of a decode step and the rules of the exit: structs of device tensors, the same for twins and kernels.

Nothing in them is read by the host during a step. Positions count a row's own tokens, padding excluded; `L` is the
number of committed positions: the base's KV cache holds positions [0, L), and the *root*, the last emitted token, has
position L. The draft's cache always holds one row less, [0, L - 1): its row for position p has also read token p + 1,
so the last position is read again with the root, which an exit may have replaced.

Both structs are checked once, when they are made, and frozen: an op can trust them, and the addresses that a CUDA
graph has captured cannot be replaced by mistake. To change a value, write into its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from specexit_kernels import _checks

SIGNALS = ("confidence", "progress", "remaining")  # the columns of every tensor of signals; S of them are the first S
RULES_OF_A_ROW = ("thresholds", "used", "alpha", "min_thinking", "budget", "hard_budget")  # the rest all rows share
NO_BUDGET = 2**31 - 1  # thinking tokens that no row reaches


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


class Smoothing(IntEnum):
    """How the signal values x of successive positions become the value e that is compared.

    A *missing* x (its signal is not finite) counts for nothing: it leaves e as it was.
    """

    NONE = 0  # e = x
    EWMA = 1  # e = alpha x + (1 - alpha) e; the first x starts it
    WINDOW = 2  # the mean of the last w values, of fewer before there are w
    MOMENTUM = 3  # x plus the mean of the last w - 1 differences; undecided before w values


@dataclass(frozen=True)
class DecodeState:
    """B rows of decoding state. D is the depth of the deepest tree, F the number of forced ids, S of signals.

    A step's *run* is the root it began with and the tokens it emits after it: `run[:, 0]` has position L, and the
    base's features are known for all of the run but its last token.

    Raises TypeError or ValueError, naming the field, for a wrong dtype, shape or device.
    """

    lengths: Tensor  # [B] int32: L
    limits: Tensor  # [B] int32: a token may stand at positions below the limit
    prompt_lengths: Tensor  # [B] int32
    root: Tensor  # [B] int32
    finished: Tensor  # [B] int32: Finish
    forced: Tensor  # [B, F] int32: ids to emit whatever the base says; forced[0] is the root; 0 from n_forced on
    n_forced: Tensor  # [B] int32
    run: Tensor  # [B, D + 2] int32: the old root, then the tokens that `accept` found; the rest is 0
    n_pending: Tensor  # [B] int32: tokens of the run after the old root
    thinking: Tensor  # [B] int32: 1 inside the thinking text, after the token at L - 1, or the prompt if that is longer
    thinking_tokens: Tensor  # [B] int32: generated positions read inside thinking
    tail: Tensor  # [B, M] int32: the M tokens before the root, for markers; -1: none, or before a cut; M = longest - 1
    smoothed: Tensor  # [B, S] float32: e, of the last read position; 0 while there is none
    seen: Tensor  # [B, S] int32: how many values went into it since thinking began; 0 outside thinking
    history: Tensor  # [B, S, w] float32: those values, newest last, 0 before the first (window and momentum smoothing)
    exit_position: Tensor  # [B] int32: position of the token p that the first exit kept last, -1
    exit_reason: Tensor  # [B] int32: ExitReason of the first exit
    output: Tensor  # [B, D + 1] int32: the tokens that the step publishes; the rest is 0
    n_output: Tensor  # [B] int32; also how many read positions of the run stand: L at the step's start, and on
    trace: Tensor  # [B, D + 1 or 0, 2, S] float32: x and e at each read position of the run, NaN where none

    def __post_init__(self) -> None:
        """Check every field against the sizes that the fields before it gave."""
        sizes: dict[str, int] = {}
        vector, integers = ("B",), torch.int32
        for name in ("lengths", "limits", "prompt_lengths", "root", "finished", "n_forced", "n_pending", "thinking"):
            self._check(name, vector, integers, sizes)
        for name in ("thinking_tokens", "exit_position", "exit_reason", "n_output"):
            self._check(name, vector, integers, sizes)
        self._check("forced", ("B", "F"), integers, sizes)
        self._check("run", ("B", "D + 2"), integers, sizes)
        if sizes["D + 2"] < 2:
            raise ValueError(f"state.run must have at least 2 columns, was {list(self.run.shape)}")
        self._check("output", ("B", sizes["D + 2"] - 1), integers, sizes)
        self._check("tail", ("B", "M"), integers, sizes)
        self._check("smoothed", ("B", "S"), torch.float32, sizes)
        self._check("seen", ("B", "S"), integers, sizes)
        self._check("history", ("B", "S", "w"), torch.float32, sizes)
        rows = sizes["D + 2"] - 1 if self.trace.shape[1:2] != (0,) else 0
        self._check("trace", ("B", rows, 2, "S"), torch.float32, sizes)

    def _check(self, name: str, shape: Sequence[str | int], dtype: torch.dtype, sizes: dict[str, int]) -> None:
        _checks.tensor(f"state.{name}", getattr(self, name), shape, dtype, sizes, self.lengths)

    @property
    def batch(self) -> int:
        """B."""
        return self.lengths.shape[0]

    @property
    def depth(self) -> int:
        """D."""
        return self.run.shape[1] - 2

    @property
    def signals(self) -> int:
        """S."""
        return self.smoothed.shape[1]

    def rows(self, first: int, count: int) -> DecodeState:
        """The rows [first, first + count), in the same memory."""
        return DecodeState.of([tensor[first : first + count] for tensor in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """The fields in order: how the ops take the state."""
        return [getattr(self, name) for name in _STATE]

    @staticmethod
    def of(tensors: list[Tensor]) -> DecodeState:
        """The struct of a list made by `tensors`, whose values were checked then."""
        state = object.__new__(DecodeState)
        state.__dict__.update(zip(_STATE, tensors, strict=True))
        return state

    @staticmethod
    def empty(
        batch: int,
        *,
        depth: int,
        signals: int = 0,
        forced: int = 1,
        tail: int = 0,
        window: int = 0,
        trace: bool = True,
        device: torch.device | str | None = None,
    ) -> DecodeState:
        """State of `batch` rows before their prompts: all zeros, and -1 or NaN where those mean "none".

        trace   False: the signals' values are not recorded, which spares a step their writing
        """

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
            trace=floats(depth + 1 if trace else 0, 2, signals, fill=float("nan")),
        )


@dataclass(frozen=True)
class ExitRules:
    """When thinking is cut; per-row tensors and the settings that every row shares.

    S of the signals, in the order of SIGNALS. With no `force` ids nothing is ever cut.

    Raises TypeError or ValueError, naming the field, for a wrong type, dtype, shape or device.
    """

    thresholds: Tensor  # [B, S] float32; one out of reach switches a row's exit by signals off
    used: Tensor  # [B, S] bool: False leaves a signal out of the decision
    alpha: Tensor  # [B] float32: weight of the newest value (EWMA)
    min_thinking: Tensor  # [B] int32: thinking tokens before the signals may exit
    budget: Tensor  # [B] int32: thinking tokens after which thinking is cut; NO_BUDGET where there is none
    hard_budget: Tensor  # [B] bool: True cuts at the budget, False at the next boundary
    boundary: Tensor  # [V] bool: ids that end a paragraph
    start: Tensor  # [Fs] int32: ids that start thinking; empty: it never starts again
    end: Tensor  # [Fe] int32: ids that end thinking
    force: Tensor  # [F] int32: ids emitted at an exit
    smoothing: Smoothing = Smoothing.EWMA
    window: int = 0  # w of window and momentum smoothing; 0 for the others
    per_step: bool = False  # the release's granularity: one mean value a step, decided before it is added
    has_minimum: bool = False  # False: min_thinking is 0 in every row
    has_budget: bool = False  # False: no row has a budget
    force_stops: bool = False  # force[0] is a stop id

    def __post_init__(self) -> None:
        """Check every field against the sizes that the fields before it gave."""
        sizes: dict[str, int] = {}
        for name, shape, dtype in (
            ("thresholds", ("B", "S"), torch.float32),
            ("used", ("B", "S"), torch.bool),
            ("alpha", ("B",), torch.float32),
            ("min_thinking", ("B",), torch.int32),
            ("budget", ("B",), torch.int32),
            ("hard_budget", ("B",), torch.bool),
            ("boundary", ("V",), torch.bool),
            ("start", ("Fs",), torch.int32),
            ("end", ("Fe",), torch.int32),
            ("force", ("F",), torch.int32),
        ):
            _checks.tensor(f"rules.{name}", getattr(self, name), shape, dtype, sizes, self.thresholds)
        if not isinstance(self.smoothing, Smoothing):
            raise TypeError(f"rules.smoothing must be a Smoothing, was {type(self.smoothing).__name__}")
        lowest = {Smoothing.WINDOW: 1, Smoothing.MOMENTUM: 2}.get(self.smoothing, 0)
        _checks.between("rules.window", self.window, lowest, 2**31 - 1 if lowest else 0)

    @property
    def tail(self) -> int:
        """M: how many tokens before the root the markers can reach back to."""
        return max(self.start.numel(), self.end.numel(), 1) - 1

    def rows(self, first: int, count: int) -> ExitRules:
        """The rules of the rows [first, first + count), in the same memory."""
        return replace(self, **{name: getattr(self, name)[first : first + count] for name in RULES_OF_A_ROW})

    def repeated(self, batch: int) -> ExitRules:
        """The rules of one row for `batch` rows, in memory of their own."""
        rows = {name: getattr(self, name) for name in RULES_OF_A_ROW}
        return replace(self, **{name: row.repeat(batch, *[1] * (row.dim() - 1)) for name, row in rows.items()})

    def tensors(self) -> list[Tensor]:
        """The tensor fields in order: how the op takes the rules."""
        return [getattr(self, name) for name in _RULES]

    @staticmethod
    def of(
        tensors: list[Tensor], smoothing: int, per_step: bool, has_minimum: bool, has_budget: bool, force_stops: bool
    ) -> ExitRules:
        """The struct of a list made by `tensors`, whose values were checked then; w is the state's."""
        rules = object.__new__(ExitRules)
        rules.__dict__.update(zip(_RULES, tensors, strict=True))
        rules.__dict__.update(
            smoothing=Smoothing(smoothing),
            per_step=per_step,
            has_minimum=has_minimum,
            has_budget=has_budget,
            force_stops=force_stops,
        )
        return rules


_STATE = tuple(f.name for f in fields(DecodeState))
_RULES = tuple(f.name for f in fields(ExitRules) if f.type == "Tensor")  # the rest is static
