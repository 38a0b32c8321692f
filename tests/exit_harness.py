"""Rules, states and chain trees for the tests of acceptance and exit, and both told again in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from specexit_kernels import bits
from specexit_kernels.state import NO_BUDGET, DecodeState, ExitReason, ExitRules, Finish, Smoothing, Tree

VOCAB = 16
SIGNS = (1.0, 1.0, -1.0)  # remaining must lie below its threshold
KINDS = [
    (Smoothing.NONE, 0),
    (Smoothing.EWMA, 0),
    (Smoothing.WINDOW, 1),
    (Smoothing.WINDOW, 4),
    (Smoothing.MOMENTUM, 2),
    (Smoothing.MOMENTUM, 5),
]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Row:
    """The settings of one row; those that differ from row to row."""

    thresholds: Sequence[float] = (0.5, 0.5, 1.0)
    used: Sequence[bool] = (True, True, True)
    alpha: float = 0.5
    min_thinking: int = 0
    budget: int = NO_BUDGET
    hard: bool = False


@dataclass
class Settings:
    """The settings that the rows share."""

    start: Sequence[int] = (1,)
    end: Sequence[int] = (2,)
    force: Sequence[int] = (2,)
    stop: Sequence[int] = (3,)
    boundary: Sequence[int] = (4, 5)
    smoothing: Smoothing = Smoothing.EWMA
    window: int = 0
    per_step: bool = False

    @property
    def needed(self) -> int:
        return self.window if self.smoothing is Smoothing.MOMENTUM else 1


def make_rules(rows: Sequence[Row], shared: Settings, signals: int = 3) -> ExitRules:
    boundary = torch.zeros(VOCAB, dtype=torch.bool)
    boundary[list(shared.boundary)] = True
    return ExitRules(
        thresholds=torch.tensor([r.thresholds[:signals] for r in rows], dtype=torch.float32).view(len(rows), signals),
        used=torch.tensor([r.used[:signals] for r in rows], dtype=torch.bool).view(len(rows), signals),
        alpha=torch.tensor([r.alpha for r in rows], dtype=torch.float32),
        min_thinking=ids(*(r.min_thinking for r in rows)),
        budget=ids(*(r.budget for r in rows)),
        hard_budget=torch.tensor([r.hard for r in rows], dtype=torch.bool),
        boundary=boundary,
        start=ids(*shared.start),
        end=ids(*shared.end),
        force=ids(*shared.force),
        smoothing=shared.smoothing,
        window=shared.window,
        per_step=shared.per_step,
        has_minimum=any(r.min_thinking for r in rows),
        has_budget=any(r.budget != NO_BUDGET for r in rows),
        force_stops=bool(shared.force) and shared.force[0] in shared.stop,
    )


def make_state(batch: int, shared: Settings, *, depth: int, signals: int = 3, trace: bool = True) -> DecodeState:
    tail = max(len(shared.start), len(shared.end), 1) - 1
    return DecodeState.empty(
        batch,
        depth=depth,
        signals=signals,
        forced=len(shared.force),
        tail=tail,
        window=shared.window,
        trace=trace,
    )


def begin(state: DecodeState, prompts: Sequence[Sequence[int]], limits: Sequence[int], shared: Settings) -> None:
    """Commit all but the last token of each prompt, which becomes the root."""
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        state.prompt_lengths[row] = len(prompt)
        state.lengths[row] = len(prompt) - 1
        state.limits[row] = limit
        state.root[row] = prompt[-1]
        state.thinking[row] = int(thinking_after(prompt, shared))
        width = state.tail.shape[1]
        before = ([-1] * width + list(prompt[:-1]))[len(prompt) - 1 :]
        state.tail[row] = torch.tensor(before, dtype=torch.int32)


def ends_with(text: Sequence[int], marker: Sequence[int]) -> bool:
    return len(marker) > 0 and list(text[-len(marker) :]) == list(marker)


def thinking_after(text: Sequence[int], shared: Settings, thinking: bool = False) -> bool:
    for n in range(1, len(text) + 1):
        if ends_with(text[:n], shared.end):
            thinking = False
        elif ends_with(text[:n], shared.start):
            thinking = True
    return thinking


def chain_trees(chains: Sequence[Sequence[int]], nodes: int) -> Tree:
    """A chain of tokens a row, the root first, then inert nodes."""
    batch = len(chains)
    tokens, parent, depth = (torch.zeros(batch, nodes, dtype=torch.int32) for _ in range(3))
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    depth[:, 1:] = 1
    for row, chain in enumerate(chains):
        for n, token in enumerate(chain):
            tokens[row, n], parent[row, n], depth[row, n] = token, max(n - 1, 0), n
            mask[row, n, : n + 1] = True
    return Tree(tokens, parent, depth, bits.pack(mask))


def activate(z: Sequence[float]) -> list[float | None]:
    """x of one position; None where it is missing."""
    values: list[float | None] = []
    for index, value in enumerate(z):
        if math.isnan(value):
            values.append(None)
        elif index < 2:
            values.append(1 / (1 + math.exp(-value)) if value > -700 else 0.0)
        else:
            x = math.exp(value) if value < 88.7 else math.inf
            values.append(x if math.isfinite(x) else None)
    return values


def smooth_values(values: Sequence[float], kind: Smoothing, alpha: float, window: int) -> float | None:
    """e after these values, oldest first; None while undecided."""
    if not values:
        return None
    if kind is Smoothing.NONE:
        return values[-1]
    if kind is Smoothing.WINDOW:
        last = values[-window:]
        return sum(last) / len(last)
    if kind is Smoothing.MOMENTUM:
        if len(values) < window:
            return None
        last = values[-window:]
        return last[-1] + sum(b - a for a, b in pairwise(last)) / (window - 1)
    e = values[0]
    for x in values[1:]:
        e = alpha * x + (1 - alpha) * e
    return e


def passes(e: Sequence[float | None], present: Sequence[bool], row: Row, margins: list[float]) -> bool:
    """Whether every used value passes; the distances to the thresholds are added to `margins`."""
    ok = True
    for index, value in enumerate(e):
        if row.used[index]:
            if value is None or not present[index]:
                ok = False
                continue
            margin = SIGNS[index] * (value - row.thresholds[index])
            margins.append(abs(margin))
            ok = ok and margin > 0
    return ok


@dataclass
class Story:
    """One sequence, told token by token: where each rule of the exit falls, whatever the steps."""

    text: list[int]
    prompt: int
    exit_position: int = -1
    exit_reason: ExitReason = ExitReason.NONE
    exits: int = 0
    finished: Finish = Finish.RUNNING
    thinking_tokens: int = 0
    trace: dict[int, tuple[list[float | None], list[float | None]]] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)


def tell(
    prompt: Sequence[int],
    limit: int,
    row: Row,
    shared: Settings,
    choose: Callable[[Sequence[int]], int],
    signals: Callable[[Sequence[int]], Sequence[float]],
) -> Story:
    """Token-by-token decoding with an exit; `signals` is given the text up to the token after the position it is of."""
    story = Story(list(prompt), len(prompt))
    text, forced, origin = story.text, [], 0  # a marker does not reach back over a cut
    thinking, values = thinking_after(text, shared), [[] for _ in signals(text)]
    while not story.finished:
        p = len(text) - 1
        before = thinking
        if p >= story.prompt and ends_with(text[origin:], shared.end):
            thinking = False
        elif p >= story.prompt and ends_with(text[origin:], shared.start):
            thinking = True
        pending = len(forced) > 0
        text.append(forced.pop(0) if forced else choose(text))
        if text[-1] in shared.stop:
            story.finished = Finish.STOP
        elif len(text) == limit:
            story.finished = Finish.LENGTH
        if not thinking:
            values = [[] for _ in values]
        if not (before and thinking and p >= story.prompt):
            continue
        story.thinking_tokens += 1
        x = activate(signals(text))
        for seen, value in zip(values, x, strict=True):
            if value is not None:
                seen.append(value)
        e = [smooth_values(v, shared.smoothing, row.alpha, shared.window) for v in values]
        story.trace[p] = (x, [b if a is not None else None for a, b in zip(x, e, strict=True)])
        at_boundary = text[p] in shared.boundary
        fires = at_boundary and len(x) > 0 and story.thinking_tokens >= row.min_thinking
        fires = fires and passes(e, [a is not None for a in x], row, story.margins)
        over = (at_boundary or row.hard) and story.thinking_tokens >= row.budget
        if (fires or over) and shared.force and not pending:
            text[p + 1 :], forced, origin = [shared.force[0]], list(shared.force[1:]), p + 1
            story.finished = Finish.RUNNING
            if text[-1] in shared.stop:
                story.finished = Finish.STOP
            elif len(text) == limit:
                story.finished = Finish.LENGTH
            if story.exit_position < 0:
                story.exit_position = p
                story.exit_reason = ExitReason.SIGNALS if fires else ExitReason.BUDGET
            story.exits += 1
            thinking, values = False, [[] for _ in values]
    return story


def scripted(seed: int, weights: Sequence[int]) -> Callable[[Sequence[int]], int]:
    """A base that chooses by the whole text before it, as a model does; `weights` are those of the ids."""

    def choose(text: Sequence[int]) -> int:
        return random.Random(hash((seed, tuple(text)))).choices(range(len(weights)), weights)[0]

    return choose


def scripted_signals(seed: int, count: int, missing: float = 0.1) -> Callable[[Sequence[int]], list[float]]:
    """Raw signals of the last position but one, that depend on the text up to the last; some are not finite."""

    def signals(text: Sequence[int]) -> list[float]:
        source = random.Random(hash((seed, 1, tuple(text))))
        z = []
        for _ in range(count):
            value = struct_float(source.gauss(0.0, 1.5))
            z.append(
                source.choice([math.nan, 200.0 if len(z) == 2 else math.nan]) if source.random() < missing else value
            )
        return z

    return signals


def struct_float(value: float) -> float:
    """The nearest float32, so that both sides read the same number."""
    return torch.tensor(value, dtype=torch.float32).item()


def number(rng: torch.Generator, low: int, high: int) -> int:
    """In [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def chance(rng: torch.Generator, probability: float) -> bool:
    return bool(torch.rand((), generator=rng) < probability)


def random_row(rng: torch.Generator, n_signals: int, budgets: bool) -> Row:
    a, b, c = torch.rand(3, generator=rng).tolist()
    used = [chance(rng, 0.8) for _ in range(3)]
    if n_signals and not any(used[:n_signals]):
        used[0] = True
    return Row(
        thresholds=(0.4 + 0.3 * a, 0.3 + 0.3 * b, 0.5 + 3 * c),
        used=used,
        alpha=0.05 + 0.95 * a,
        min_thinking=number(rng, 0, 6) if chance(rng, 0.3) else 0,
        budget=number(rng, 1, 20) if budgets and chance(rng, 0.7) else NO_BUDGET,
        hard=chance(rng, 0.5),
    )
