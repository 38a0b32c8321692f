"""Exit rules tried on recorded traces: where each would have cut, what is left, what it costs. Nothing is decoded.

A trace says what the base answers at each of its boundaries, so a rule is known by the first boundary at which it cuts.
The signals are smoothed by the decoder's own `smooth`, and compared with float32 thresholds as it compares them:
strictly, and a value that is missing (NaN) does not pass.

Axes: K boundaries (the most of any trace), N traces, R rules. Row K of a table stands for "not cut".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specexit.exit import ExitConfig
from specexit.training.records import Trace
from specexit.training.signals import RecordedSignals
from specexit_kernels import activate_signals
from specexit_kernels.smoothing import smooth
from specexit_kernels.state import SIGNALS, Smoothing

_ENTRIES = 1 << 22  # of a temporary tensor: tens of megabytes


class Readout(NamedTuple):
    """How raw signals become the values that a rule compares: fields of `ExitConfig`."""

    source: str
    smoothing: str = "ewma"
    alpha: float = ExitConfig.alpha
    window: int = ExitConfig.window

    @property
    def fields(self) -> dict[str, Any]:
        """Those of `ExitConfig` that matter to it."""
        own: dict[str, Any] = {"ewma": {"alpha": self.alpha}, "none": {}}.get(self.smoothing, {"window": self.window})
        return {"source": self.source, "smoothing": self.smoothing, **own}

    def __str__(self) -> str:
        own = {"ewma": f" {self.alpha:g}", "none": ""}.get(self.smoothing, f" {self.window}")
        return f"{self.source}, {self.smoothing}{own}"


@dataclass(frozen=True)
class Scores:
    """What R rules make of N traces. Every problem counts the same, however many samples it has.

    tokens    [R] float64: thinking tokens that are left
    cut       [R]: share of the thinking tokens that is not generated
    loss      [R]: share of answers that are lost: the full thinking's was right (or, where no right answers are known,
              was whatever it was), the exit's is wrong (another). It is at least the accuracy that is lost
    accuracy  [R]: share of right answers (of answers that agree with the full thinking's)
    exits     [R]: share of traces that are cut
    """

    tokens: Tensor
    cut: Tensor
    loss: Tensor
    accuracy: Tensor
    exits: Tensor

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        names = ("tokens", "cut", "loss", "accuracy", "exits")
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def of(self, rule: int) -> dict[str, float]:
        """Of one rule, for a table or JSON."""
        return {name: float(getattr(self, name)[rule]) for name in ("tokens", "cut", "loss", "accuracy", "exits")}


@dataclass(frozen=True)
class Boundaries:
    """The boundaries of N traces, and what a cut at each of them gives.

    tokens       [K + 1, N] int64: thinking tokens up to there; in row K, and where there is none, of all the thinking
    valid        [K, N] bool: there is such a boundary
    lost         [K + 1, N] bool: to cut there loses the answer
    right        [K + 1, N] bool: the answer there is right, or, without right answers, is the final one
    agrees       [K, N] bool: the answer there is the final one
    probability  [K, N] float32: of the answer there, NaN where there is no boundary
    problem      [N] int64: which problem each trace is of, counted in the order in which they first appear
    """

    tokens: Tensor
    valid: Tensor
    lost: Tensor
    right: Tensor
    agrees: Tensor
    probability: Tensor
    problem: Tensor

    @staticmethod
    def of(traces: Sequence[Trace], ids: Collection[int] | None = None) -> Boundaries:
        """Of traces without a flaw.

        ids   a cut is allowed behind these tokens only; None: at every boundary of the traces. Answers are known at
              those alone, so `ids` can only leave boundaries out

        Right answers count where all traces have them, else agreement with the full thinking.
        """
        known = all(trace.correct is not None for trace in traces)
        numbers: dict[str, int] = {}
        columns: list[list[Any]] = []
        fulls = []
        for trace in traces:
            numbers.setdefault(trace.id, len(numbers))
            kept = [i for i, b in enumerate(trace.boundaries) if ids is None or trace.thinking[b - 1] in ids]
            right = trace.correct if known and trace.correct is not None else trace.agrees
            full = bool(trace.final_correct) if known else True
            fulls.append(full)
            columns.append(
                [
                    [trace.boundaries[i] for i in kept],
                    [full and not right[i] for i in kept],
                    [right[i] for i in kept],
                    [trace.agrees[i] for i in kept],
                    [trace.probabilities[i] for i in kept],
                ]
            )
        most, whole = max((len(column[0]) for column in columns), default=0), [len(t.thinking) for t in traces]

        def table(field: int, none: Sequence[float], rows: int, dtype: torch.dtype) -> Tensor:
            padded = [c[field] + [n] * (rows - len(c[field])) for c, n in zip(columns, none, strict=True)]
            return torch.tensor(padded, dtype=dtype).view(len(traces), rows).t().contiguous()

        never = [False] * len(traces)
        counts = torch.tensor([len(column[0]) for column in columns], dtype=torch.int64)
        return Boundaries(
            tokens=table(0, whole, most + 1, torch.int64),
            valid=torch.arange(most).unsqueeze(1) < counts,
            lost=table(1, never, most + 1, torch.bool),
            right=table(2, fulls, most + 1, torch.bool),
            agrees=table(3, never, most, torch.bool),
            probability=table(4, [float("nan")] * len(traces), most, torch.float32),
            problem=torch.tensor([numbers[trace.id] for trace in traces], dtype=torch.int64),
        )

    @property
    def most(self) -> int:
        """K."""
        return self.valid.shape[0]

    @property
    def problems(self) -> int:
        return int(self.problem.max()) + 1 if len(self.problem) else 0

    @property
    def single(self) -> bool:
        """Whether every problem has one trace, so that it is lost or not."""
        return self.problems == len(self.problem)

    def select(self, traces: Tensor) -> Boundaries:
        """Those of some traces, [n] int64; their problems are counted anew."""
        picked = {name: getattr(self, name)[:, traces] for name in ("tokens", "valid", "lost", "right", "agrees")}
        problem = self.problem[traces].unique(return_inverse=True)[1]
        return replace(self, **picked, probability=self.probability[:, traces], problem=problem)

    def score(self, first: Tensor) -> Scores:
        """first [R, N]: the boundary at which each rule cuts each trace, K where it does not."""
        index = first.long()
        share = self._share()
        tokens = self.tokens.gather(0, index).double() @ share
        full = float(self.tokens[-1].double() @ share)
        return Scores(
            tokens=tokens,
            cut=(1 - tokens / full).clamp(min=0),  # all of the tokens may come to a little more than all
            loss=self.lost.gather(0, index).double() @ share,
            accuracy=self.right.gather(0, index).double() @ share,
            exits=(index < self.most).double() @ share,
        )

    def losses(self, first: Tensor) -> Tensor:
        """The loss of each problem, the mean of its samples' losses: [R, N] -> [R, problems] float64."""
        lost = self.lost.gather(0, first.long()).double()
        sums = lost.new_zeros(len(first), self.problems).index_add_(1, self.problem, lost)
        return sums / torch.bincount(self.problem, minlength=self.problems)

    def _share(self) -> Tensor:
        """What each trace counts, [N] float64, 1 in all."""
        samples = torch.bincount(self.problem, minlength=1).double()
        return 1 / (samples[self.problem] * max(self.problems, 1))


class SignalTable:
    """The signals of N traces at their boundaries, smoothed in any way; what was smoothed once is kept."""

    def __init__(self, signals: RecordedSignals, traces: Sequence[Trace], boundaries: Boundaries) -> None:
        signals.check_traces(traces)
        self.signals = signals
        self.boundaries = boundaries
        self._kept: dict[Readout, Tensor] = {}

    def values(self, readout: Readout) -> Tensor:
        """[K, N, 3] float32: the smoothed signals at each boundary, NaN where there is none."""
        if readout not in self._kept:
            self._kept[readout] = self._smoothed(readout)
        return self._kept[readout]

    def readout(self, config: ExitConfig) -> Readout:
        """Of an exit's settings; "auto" is the exit head where there is one."""
        source = ("output" if "output" in self.signals.raw else "fc") if config.source == "auto" else config.source
        if source not in self.signals.raw:
            raise ValueError(f"source must be one of {', '.join(self.signals.sources)}, was {config.source!r}")
        return Readout(source, config.smoothing, config.alpha, config.window)

    def first(self, config: ExitConfig) -> Tensor:
        """Where the decoder cuts each trace with these settings: [N] int64, K where it does not."""
        if config.granularity != "token" or config.hard_budget:
            raise ValueError(
                "config must cut at boundaries, by what the text alone says: granularity 'token', no hard_budget"
            )
        tokens, none = self.boundaries.tokens[:-1], self.boundaries.most
        found = torch.full((tokens.shape[1],), none)
        if config.enabled:
            thresholds = torch.tensor([[_number(getattr(config, name)) for name in SIGNALS]])
            allowed = self.boundaries.valid & (tokens >= config.min_thinking_tokens)
            found = first_passing(self.values(self.readout(config)), thresholds, allowed)[0].long()
        if config.thinking_budget is not None:
            found = torch.minimum(found, after_tokens(self.boundaries, config.thinking_budget))
        return found

    def score(self, readout: Readout, thresholds: Tensor, minimum: int = 0, traces: Tensor | None = None) -> Scores:
        """What rules [R, 3] of one readout make of the traces, or of some of them, [n] int64."""
        where, values = self.boundaries, self.values(readout)
        if traces is not None:
            where, values = where.select(traces), values[:, traces]
        allowed = where.valid & (where.tokens[:-1] >= minimum)
        step = max(1, _ENTRIES // max(values.shape[1], 1))
        return Scores.joined([where.score(first_passing(values, t, allowed)) for t in thresholds.split(step)])

    def _smoothed(self, readout: Readout) -> Tensor:
        signals, where = self.signals, self.boundaries
        raw = signals.raw[readout.source]
        lengths = signals.offsets.diff()
        out = torch.full((where.most, len(lengths), len(SIGNALS)), torch.nan)
        longest = int(lengths.max()) if len(lengths) else 0
        step = max(1, _ENTRIES // max(longest, 1))
        for begin in range(0, len(lengths), step):
            rows = slice(begin, begin + step)
            parts = raw[signals.offsets[begin] : signals.offsets[min(begin + step, len(lengths))]]
            x = torch.nn.utils.rnn.pad_sequence(parts.split(lengths[rows].tolist()), padding_value=torch.nan)
            position = (where.tokens[:-1, rows] - 1).unsqueeze(2).expand(-1, -1, raw.shape[1])
            values = smoothed_values(readout, x).gather(0, position)
            out[:, rows, : raw.shape[1]] = values.masked_fill(~where.valid[:, rows].unsqueeze(2), torch.nan)
        return out


def smoothed_values(readout: Readout, raw: Tensor) -> Tensor:
    """Raw signals [T, B, S] of successive tokens, NaN past the end of a text -> what is compared, [T, B, S], NaN where
    there is no value. In pieces: how a text is cut changes no value."""
    kind = Smoothing[readout.smoothing.upper()]
    batch, count = raw.shape[1:]
    window = readout.window if kind in (Smoothing.WINDOW, Smoothing.MOMENTUM) else 0
    state = (
        raw.new_zeros(batch, count),
        torch.zeros(batch, count, dtype=torch.int32),
        raw.new_zeros(batch, count, window),
    )
    alpha = torch.full((batch,), readout.alpha)
    pieces = []
    for piece in raw.split(max(1, _ENTRIES // max(batch * count * max(window, 1), 1))):
        x = activate_signals(piece)
        missing = (x < torch.inf).logical_not()
        e, seen, history = smooth(kind, x.masked_fill(missing, 0), missing, None, alpha, *state)
        state = e[-1], seen[-1], history
        pieces.append(e.masked_fill(missing, torch.nan))
    return torch.cat(pieces)


def first_passing(values: Tensor, thresholds: Tensor, allowed: Tensor) -> Tensor:
    """The first boundary at which each rule cuts each trace: [R, N] int32, K where none.

    values      [K, N, S] float32, of confidence, progress, remaining as far as S goes
    thresholds  [R, S] float32: above, above, and below it; NaN leaves a signal out
    allowed     [K, N] bool: there may be a cut
    """
    most, _, count = values.shape
    levels, rows = zip(*(thresholds[:, s].unique(return_inverse=True) for s in range(count)), strict=True)
    first = torch.full((len(thresholds), allowed.shape[1]), most, dtype=torch.int32)
    for k in reversed(range(most)):
        passes = allowed[k]
        for s in range(count):
            value, level = values[k, :, s], levels[s].unsqueeze(1)
            passed = value < level if s == 2 else value > level
            passes = passes & (passed | level.isnan())[rows[s]]
        first.masked_fill_(passes, k)
    return first


def after_tokens(boundaries: Boundaries, budget: int) -> Tensor:
    """The first boundary with at least `budget` thinking tokens behind it, [N] int64: `ExitConfig.thinking_budget`."""
    return _first(boundaries.valid & (boundaries.tokens[:-1] >= budget))


def at_boundary(boundaries: Boundaries, number: int) -> Tensor:
    """The boundary of this number, from 0 on, [N] int64; a trace with fewer is not cut."""
    return torch.where(boundaries.valid.sum(0) > number, number, boundaries.most)


def oracle(boundaries: Boundaries) -> Tensor:
    """The first boundary from which on every answer is the final one, [N] int64: no rule that keeps every answer for
    good can cut earlier."""
    stays = (boundaries.agrees | ~boundaries.valid).flip(0).int().cummin(0).values.flip(0).bool()
    return _first(stays & boundaries.valid)


def by_probability(boundaries: Boundaries, thresholds: Tensor) -> Tensor:
    """Where the base's own forced answer is first given a probability above each threshold: [R] -> [R, N] int32."""
    return first_passing(boundaries.probability.unsqueeze(2), thresholds.unsqueeze(1), boundaries.valid)


def _first(where: Tensor) -> Tensor:
    """[K, N] bool -> [N] int64: the first that is true, K where none is."""
    most = where.shape[0]
    place = torch.arange(most).unsqueeze(1).expand_as(where)
    return torch.cat([place.masked_fill(~where, most), torch.full((1, where.shape[1]), most)]).amin(0)


def _number(threshold: float | None) -> float:
    return torch.nan if threshold is None else threshold
