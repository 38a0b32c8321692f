"""The exit rules that are tried: ways of smoothing, and for each a grid of thresholds that its own values suggest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specexit.exit import ExitConfig
from specexit.training.rules import Boundaries, Readout, Scores, SignalTable
from specexit_kernels.state import SIGNALS

SMOOTHINGS = {
    "none": (("none", 0.5, 8),),
    "ewma": tuple(("ewma", alpha, 8) for alpha in (0.1, 0.2, 0.3, 0.5, 0.7)),
    "window": tuple(("window", 0.5, window) for window in (4, 8, 16, 32)),
    "momentum": tuple(("momentum", 0.5, window) for window in (2, 4, 8)),
}
# Thresholds shut out these shares of the boundaries at which a cut would lose the answer,
_SHUT_OUT = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
_TIGHTER = (0.1, 0.25, 0.4, 0.6)  # or, to be strict, these shares of the others.


@dataclass(frozen=True)
class Rules:
    """Rules by readout: [R_i, 3] float32 thresholds each, NaN where a signal is left out; numbered one after the other.

    minimum   thinking tokens that none of them ends a shorter thinking than
    ids       markers and boundaries that are not the tokenizer's, as `ExitConfig` names them
    """

    readouts: tuple[Readout, ...]
    thresholds: tuple[Tensor, ...]
    minimum: int = 0
    ids: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(thresholds) for thresholds in self.thresholds)

    def score(self, table: SignalTable, traces: Tensor | None = None) -> Scores:
        """What all of them make of the traces, or of some, [n] int64."""
        pairs = zip(self.readouts, self.thresholds, strict=True)
        return Scores.joined([table.score(readout, t, self.minimum, traces) for readout, t in pairs])

    def config(self, rule: int) -> ExitConfig:
        """As the decoder takes it."""
        readout, thresholds = self._at(rule)
        numbers = [None if t.isnan() else _shortest(t) for t in thresholds]
        named: dict[str, Any] = dict(zip(SIGNALS, numbers, strict=True))
        return ExitConfig(**named, **readout.fields, **self.ids, min_thinking_tokens=self.minimum)

    def stricter(self, rule: int) -> Tensor:
        """[R] bool: rules with the same readout, and thresholds that are nowhere looser."""
        readout, thresholds = self._at(rule)
        found = []
        for other, grid in zip(self.readouts, self.thresholds, strict=True):
            found.append((_strictness(grid) >= _strictness(thresholds)).all(1) & (other == readout))
        return torch.cat(found)

    def strictness(self) -> Tensor:
        """[R] float64: how high the thresholds of a rule stand among those of its readout, from 0 to 3."""
        found = []
        for grid in self.thresholds:
            ranks = [column.unique(return_inverse=True)[1].double() for column in _strictness(grid).unbind(1)]
            found.append(torch.stack([rank / max(len(rank.unique()) - 1, 1) for rank in ranks]).sum(0))
        return torch.cat(found)

    def _at(self, rule: int) -> tuple[Readout, Tensor]:
        for readout, thresholds in zip(self.readouts, self.thresholds, strict=True):
            if rule < len(thresholds):
                return readout, thresholds[rule]
            rule -= len(thresholds)
        raise IndexError(rule)


def readouts(sources: Sequence[str], smoothings: Sequence[str] = tuple(SMOOTHINGS)) -> list[Readout]:
    """Every way of reading these sources with these kinds of smoothing."""
    return [Readout(source, *own) for source in sources for kind in smoothings for own in SMOOTHINGS[kind]]


def grid(
    table: SignalTable,
    readouts: Sequence[Readout],
    signals: Sequence[str] = SIGNALS,
    minimum: int = 0,
    traces: Tensor | None = None,
    ids: Mapping[str, Any] | None = None,
) -> Rules:
    """Every combination of thresholds of `signals`, each of which may also be left out, for each readout.

    traces   [n] int64: those whose values the thresholds are taken from; None: all
    ids      markers and boundaries that the rules name
    """
    where = table.boundaries if traces is None else table.boundaries.select(traces)
    found = []
    for readout in readouts:
        values = table.values(readout) if traces is None else table.values(readout)[:, traces]
        levels = [
            _levels(values[..., i], where, below=name == "remaining") if name in signals else torch.tensor([torch.nan])
            for i, name in enumerate(SIGNALS)
        ]
        found.append(torch.cartesian_prod(*levels)[1:])  # the first leaves out all
    return Rules(tuple(readouts), tuple(found), minimum, ids or {})


def _levels(values: Tensor, where: Boundaries, below: bool) -> Tensor:
    """Thresholds of one signal, NaN first, which leaves it out: [K, N] -> [n]."""
    known = where.valid & ~values.isnan()
    sign = -1 if below else 1
    parts = []
    for chosen, shares in ((known & where.lost[:-1], _SHUT_OUT), (known & ~where.lost[:-1], _TIGHTER)):
        ranked = (sign * values[chosen]).sort().values
        if len(ranked):
            place = (torch.tensor(shares, dtype=torch.float64) * (len(ranked) - 1)).round().long()
            parts.append(sign * ranked[place])
    # Momentum carries a probability past 1, and a length below 0; a threshold stays between.
    within = (value.clamp(0, None if below else 1) for part in parts for value in part)
    rounded = sorted({_rounded(float(value), below) for value in within})
    return torch.tensor([torch.nan, *rounded])


def _rounded(value: float, below: bool) -> float:
    """A few digits, to be read and copied: of a probability those of its distance to the nearer end. Never looser: what
    the value shuts out stays out."""
    if below or value < 0.5:
        return _digits(value, 3, math.floor if below else math.ceil)
    return round(1 - _digits(1 - value, 2, math.floor), 12)


def _digits(value: float, count: int, whole: Callable[[float], int]) -> float:
    """`count` significant ones, the last as `whole` rounds it."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log10(value)) - count + 1
    return float(f"{whole(value / 10.0**exponent)}e{exponent}")


def _shortest(value: Tensor) -> float:
    """A float32 value in the fewest digits that give it back."""
    candidates = (float(f"{float(value):.{digits}g}") for digits in range(1, 10))
    return next(c for c in candidates if torch.tensor(c, dtype=torch.float32) == value)


def _strictness(thresholds: Tensor) -> Tensor:
    """[..., 3]: the larger, the stricter; a signal that is left out is least strict."""
    return torch.where(thresholds.isnan(), -torch.inf, thresholds * torch.tensor([1.0, 1.0, -1.0]))
