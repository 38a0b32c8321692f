"""Arguments of a decode step's ops on token ids, random in structure and in values, for the tests of their kernels.

A case is made by choices. `Source` makes them from a torch generator; `test_step_ops.py` lets hypothesis make
them, which then finds the smallest case that fails. `step_checks.py` says what the results must be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from op_samples import integers
from torch import Generator, Tensor

from specexit_kernels import DecodeState, ExitRules, Smoothing, Tree, bits, grow_beam
from specexit_kernels.philox import gumbel_noise
from specexit_kernels.smoothing import values_needed
from specexit_kernels.state import NO_BUDGET

NAN, INF = math.nan, math.inf
EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256)  # of words, warps and blocks
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST, LARGEST = -(2**31), 2**31 - 1  # int32
HUGE = torch.finfo(torch.float32).max

Arguments = dict[str, Any]


class Source:
    """Where a case takes its choices from, and, in bulk, its values: `rng`."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng

    def number(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.rng))

    def pick(self, *choices: Any) -> Any:
        return choices[self.number(0, len(choices) - 1)]

    def chance(self, percent: int) -> bool:
        return self.number(0, 99) >= 100 - percent

    def size(self, low: int, high: int, edges: tuple[int, ...] = (), percent: int = 30) -> int:
        """From low to high, or one of the edges."""
        return self.pick(*edges) if edges and self.chance(percent) else self.number(low, high)

    def flags(self, percent: int, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng) < percent / 100

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Random int32 from low to high, both included."""
        return integers(self.rng, low, high + 1, *shape)

    def among(self, values: list[float], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Each entry one of the values."""
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=self.rng)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng)


Make = Callable[[Source], Arguments]


def laid_out(s: Source, value: Tensor, *, dense: int = 0) -> Tensor:
    """The same values in other memory: at an odd address, with gaps, every second one, transposed, or as they are.

    dense   1: the last axis has stride 1; 2: the tensor is contiguous
    """
    if value.dim() == 0 or value.numel() == 0:
        return value
    kinds = ("as it is", "as it is", "odd", "gaps", "second", "transposed")
    kind = s.pick(*kinds[: (6, 4, 3)[dense]])
    if kind == "as it is":
        return value
    *front, last = value.shape
    if kind == "transposed":
        return value.movedim(-1, 0).contiguous().movedim(0, -1)
    wide = last * 2 if kind == "second" else last + (s.number(1, 9) if kind == "gaps" else 0)
    offset = s.number(1, 7)
    junk = NAN if value.is_floating_point() else 77
    memory = torch.full((offset + math.prod(front) * wide,), junk, dtype=torch.float64).to(value.dtype)
    view = memory[offset:].view(*front, wide)
    view = view[..., ::2] if kind == "second" else view[..., :last]
    view.copy_(value)
    return view


def batch_of(s: Source) -> int:
    return s.pick(1, 2, 3, 5, 0)


# Trees


def build_tree_case(s: Source, nodes: int | None = None, count: int | None = None) -> Arguments:
    """Candidates of a beam, or of a random forest: ties, signed zeros, NaN and scores that are not monotone."""
    batch = batch_of(s)
    nodes = nodes or s.size(1, 40, EDGES)
    if count is None and s.chance(40):
        tokens, scores, parents = beam_candidates(s, batch)
    else:
        count = s.size(0, 120, (0, 1, 255, 256, 257, 700)) if count is None else count
        tokens, scores, parents = forest_candidates(s, batch, count)
    width = s.size(1, 5, (nodes - 1, nodes, nodes + 3)) or 1
    forced = s.integers(0, 1000, batch, width)
    n_forced = s.integers(0, width, batch).mul_(s.flags(s.pick(0, 30), batch))
    return {
        "root": laid_out(s, s.integers(0, LARGEST, batch)),
        "tokens": laid_out(s, tokens),
        "scores": laid_out(s, scores),
        "parents": laid_out(s, parents),
        "nodes": nodes,
        "forced": laid_out(s, forced),
        "n_forced": laid_out(s, n_forced),
    }


def beam_candidates(s: Source, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a draft whose log-probabilities rounding may let pass 0: children then tie with their parents."""
    width, levels = s.number(1, 10), s.number(1, 7)
    about_zero = s.chance(50)
    scores, base, count = torch.zeros(batch, 1), torch.full((batch, 1), -1, dtype=torch.int32), 0
    grown: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(levels):
        beams = scores.shape[1]
        tokens = s.integers(0, 150_000, batch, beams, width)
        logprobs = torch.rand(batch, beams, width, generator=s.rng)
        logprobs = (logprobs - 0.5) * 4e-7 if about_zero else logprobs * -5
        candidates, _, kept, scores = grow_beam(tokens, logprobs, scores, width)
        grown.append((tokens.flatten(1), candidates, base.repeat_interleave(width, 1)))
        base, count = kept + count, count + beams * width
    tokens, candidates, parents = (torch.cat(x, 1) for x in zip(*grown, strict=True))
    return tokens, candidates, parents


def forest_candidates(s: Source, batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    near = s.pick(count, 1, 3)  # chains, narrow trees, and any
    parents = torch.arange(count, dtype=torch.int32) - 1 - s.integers(0, max(0, near - 1), batch, count)
    parents.clamp_(min=-1)
    if s.chance(20):  # in no order: a node may lose its parent
        scores = s.normal(batch, count).mul_(2).round_()
    else:
        steps = s.among([0.0, -0.5, -1.0], batch, count) if s.chance(50) else -torch.rand(batch, count, generator=s.rng)
        scores = torch.zeros(batch, count + 1)
        for c in range(count):
            scores[:, c + 1] = scores.gather(1, parents[:, c : c + 1].long() + 1).squeeze(1) + steps[:, c]
        scores = scores[:, 1:].contiguous()
    if s.chance(50):
        scores[(scores == 0) & s.flags(50, batch, count)] = -0.0
    if s.chance(30):
        bad = s.flags(s.pick(5, 60, 100), batch, count)
        scores[bad] = s.among([NAN, -INF, -INF, INF, HUGE], batch, count)[bad]
    return s.integers(SMALLEST, LARGEST, batch, count), scores, parents


def random_tree(s: Source, batch: int, nodes: int, vocab: int, chain: int, inert: int) -> Tree:
    """`chain` percent of the nodes hang from the one before them; `inert` percent are inert, and have no children."""
    parent = torch.zeros(batch, nodes, dtype=torch.int32)
    tokens = s.integers(0, vocab - 1, batch, nodes)
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    mask[:, 0, 0] = True
    row, live = torch.arange(batch), torch.ones(batch, nodes, dtype=torch.bool)
    live[:, 1:] = ~s.flags(inert, batch, nodes - 1)
    last, follow = torch.zeros(batch, dtype=torch.long), s.flags(chain, batch, nodes)
    chosen = torch.rand(batch, nodes, generator=s.rng)
    for n in range(1, nodes):
        any_above = (chosen[:, n] * n).long()
        above = torch.where(follow[:, n] | ~live[row, any_above], last, any_above)
        is_live = live[:, n]
        parent[:, n] = above * is_live
        mask[:, n] = mask[row, above]
        mask[:, n, n] = True
        mask[:, n] &= is_live.unsqueeze(1)
        last = torch.where(is_live, n, last)
    depth = mask.sum(2, dtype=torch.int32).sub_(1)
    return Tree(tokens.mul_(live), parent, depth.masked_fill_(~live, 1), bits.pack(mask))


def tree_and_targets(s: Source, batch: int, nodes: int, vocab: int) -> tuple[Tree, Tensor]:
    """Trees, and a base that agrees with the last child of many nodes and says anything after the others."""
    tree = random_tree(s, batch, nodes, vocab, s.pick(0, 70, 95, 100), s.pick(0, 0, 10, 50))
    targets = s.integers(0, vocab - 1, batch, nodes)
    live, agrees = (tree.visible != 0).any(-1), s.flags(s.pick(0, 80, 97, 100), batch, nodes)
    for n in range(1, nodes):
        above = tree.parent[:, n : n + 1].long()
        wanted = torch.where(live[:, n] & agrees[:, n], tree.tokens[:, n], targets.gather(1, above).squeeze(1))
        targets.scatter_(1, above, wanted.unsqueeze(1))
    return tree, targets


def verify_tree_case(s: Source, nodes: int | None = None) -> Arguments:
    nodes = nodes or s.size(1, 40, EDGES)
    tree, targets = tree_and_targets(s, batch_of(s), nodes, s.number(1, 3))
    named = {"tokens": tree.tokens, "parent": tree.parent, "visible": tree.visible, "targets": targets}
    depth = s.pick(int(tree.depth.max()) if len(targets) else 0, s.size(0, 12, (0, nodes - 1, nodes, nodes + 2, 300)))
    return {name: laid_out(s, x) for name, x in named.items()} | {"depth": depth}


# State


def random_state(s: Source, batch: int, vocab: int, **sizes: Any) -> DecodeState:
    """Rows in the middle of a text, some of them finished or about to be; junk where an op writes before it reads."""
    state = DecodeState.empty(batch, **sizes)
    state.lengths.copy_(s.integers(0, 60, batch))
    state.limits.copy_(state.lengths + s.integers(1, s.pick(3, 12, 90), batch))
    if s.chance(5):
        state.limits.fill_(LARGEST)
    state.prompt_lengths.copy_(torch.where(s.flags(50, batch), state.lengths + 1, state.lengths // 2))
    state.root.copy_(s.integers(0, vocab - 1, batch))
    state.finished.copy_(s.integers(1, 2, batch) * s.flags(s.pick(0, 0, 30), batch))
    state.thinking.copy_(s.flags(75, batch))
    state.thinking_tokens.copy_(s.integers(0, 9, batch))
    state.tail.copy_(s.integers(-1, vocab - 1, *state.tail.shape))
    state.exit_reason.copy_(s.integers(1, 2, batch) * s.flags(20, batch))
    state.exit_position.copy_(torch.where(state.exit_reason > 0, state.lengths - 1, -1))
    width = state.forced.shape[1]
    if width and s.chance(50):
        state.n_forced.copy_(s.integers(0, width, batch) * s.flags(50, batch))
        due = torch.arange(width) < state.n_forced.unsqueeze(1)
        state.forced.copy_(s.integers(0, vocab - 1, batch, width) * due)
        state.root.copy_(torch.where(state.n_forced > 0, state.forced[:, 0], state.root))
    for junk in (state.run, state.n_pending, state.output, state.n_output):
        junk.copy_(s.integers(0, vocab - 1, *junk.shape))
    return state


def accept_case(s: Source, nodes: int | None = None) -> Arguments:
    """Forced ids of width 0 to 5, trees deeper than the state's columns, no stop id or hundreds."""
    nodes, vocab = nodes or s.size(1, 30, EDGES), s.number(1, 6)
    tree, targets = tree_and_targets(s, batch_of(s), nodes, vocab)
    depth = s.size(0, 12, (0, nodes - 1, nodes, nodes + 1, 31, 32, 70))
    sizes = {"signals": s.number(0, 3), "forced": s.number(0, 5), "tail": s.number(0, 2), "window": s.pick(0, 3)}
    state = random_state(s, len(targets), vocab, depth=depth, trace=s.chance(70), **sizes)
    stops = s.size(0, 3, (0, 33, 300))
    stop_ids = s.integers(0, vocab - 1, stops) if s.chance(50) else s.integers(vocab - 1, LARGEST, stops)
    return {
        "tree": Tree(*(laid_out(s, x) for x in tree)),
        "targets": laid_out(s, targets),
        "stop_ids": laid_out(s, stop_ids),
        "state": state,
    }


# Sampling

WARPERS = {
    "temperature": [0.0, -1.0, NAN, 1e-30, 1e-41, INF, 100.0, 1.0, 1.0, 0.7, 0.7, 0.3, 1.9],
    "top_k": [0.0, 1.0, HUGE, 4999.0, 5000.0, -3.0, 0.0, 2.0, 3.0, 10.0, 50.0],
    "top_p": [0.0, -1.0, 1.0, 1.0, 1.5, NAN, 1 - 2**-23, 1e-30, 0.25, 0.5, 0.5, 0.8, 0.9, 0.95],
    "min_p": [0.0, NAN, 2.0, 1.0, -1.0, 1e-30, 0.0, 1e-5, 0.001, 0.05, 0.3],
}
LOGITS = ("normal", "flat", "ties", "equal", "sparse", "holes", "certain", "close", "rising", "wide")


def sample_targets_case(s: Source, vocab: int | None = None) -> Arguments:
    """Every kind of row in one batch, and every value of a parameter that has a meaning of its own."""
    vocab = vocab or s.size(1, 70, (1, 7, 255, 256, 257, 500, 1023, 1025, 2047, 2050, 3001, 5000), percent=50)
    count = s.pick(*range(1, 9), 0) if vocab < 9000 else s.number(1, 3)
    args: Arguments = {
        "logits": torch.stack([logits_row(s, s.pick(*LOGITS), vocab) for _ in range(count)] or [torch.ones(vocab)]),
        "positions": s.integers(*s.pick((0, 9), (0, LARGEST), (SMALLEST, -1)), count),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (count,), generator=s.rng),
    }
    args["logits"] = args["logits"][:count].to(s.pick(*FLOATS))
    usual = s.chance(50)  # values as people set them
    for name, values in WARPERS.items():
        at = (name, values[-5:] if usual else values)
        args[name] = s.among(at[1], count) if s.chance(85 if name == "temperature" else 60) else None
    if s.chance(50) and args["temperature"] is not None:
        s.pick(contest, contest_top_p, contest_min_p)(s, args)
    if args["top_k"] is not None:
        args["top_k"] = torch.where(args["top_k"] > HUGE / 2, LARGEST, args["top_k"].clamp(-9, vocab + 1)).int()
    return {name: layout(s, name, value) for name, value in args.items()}


def layout(s: Source, name: str, value: Tensor | None) -> Tensor | None:
    if value is None or name != "logits" or s.chance(80):
        return None if value is None else laid_out(s, value, dense=int(name == "logits"))
    count, vocab = value.shape
    if s.chance(50) or count == 0 or vocab == 1:
        return value[:1].expand(count, -1)  # one row in the memory
    return value.flatten()[: vocab + count - 1].contiguous().as_strided((count, vocab), (1, 1))  # rows overlap


def logits_row(s: Source, kind: str, vocab: int) -> Tensor:
    normal = s.normal(vocab)
    if kind == "flat":
        return normal * 0.05
    if kind == "ties":
        return normal.round()
    if kind == "equal":  # lists of the best overflow
        return torch.full((vocab,), s.pick(0.0, -0.0, 1.5, -INF, INF, NAN, 6e4))
    if kind == "sparse":  # little is left
        return torch.where(s.flags(s.pick(0, 2, 20), vocab), normal * 3, -INF)
    if kind == "holes":
        return torch.where(s.flags(20, vocab), s.among([NAN, -INF], vocab), normal * 3)
    if kind == "certain":
        return torch.where(s.flags(3, vocab), s.among([INF, INF, HUGE], vocab), normal)
    if kind == "close":  # apart by roundings
        return 1 + normal * 1e-6
    if kind == "rising":
        return normal.mul(3).sort(descending=s.chance(50)).values
    if kind == "wide":  # most weights are zero, and some logits beyond half precision
        return normal * s.pick(40.0, 1000.0, 60_000.0)
    return normal * 3


def contest(s: Source, args: Arguments) -> None:
    """Logits that make up for the noise: all scores nearly tie, and the least likely token may be drawn."""
    count, vocab = args["logits"].shape
    if s.chance(60):  # nothing else, or one thing, narrows the row
        only = s.pick("", "top_k", "top_p", "min_p")
        args.update({name: None for name in ("top_k", "top_p", "min_p") if name != only})
    noise = gumbel_noise(args["seeds"], args["positions"], vocab)
    logits = (s.normal(count, vocab) * s.pick(1e-3, 1e-2) - noise) * args["temperature"].nan_to_num(1.0, 1.0).unsqueeze(
        1
    )
    args["logits"] = logits.to(args["logits"].dtype)


def contest_top_p(s: Source, args: Arguments) -> None:
    """A limit just above or below what the tokens before the one that wins hold together."""
    weight, winner = ranked_weights(args)
    before = (weight.cumsum(1) - weight) / weight.sum(1, keepdim=True)
    args["top_p"] = just_beside(s, before.gather(1, winner))
    if s.chance(60):
        args["top_k"] = None  # which would leave other sums


def contest_min_p(s: Source, args: Arguments) -> None:
    """A limit just above or below the weight of the token that wins."""
    weight, winner = ranked_weights(args)
    args["min_p"] = just_beside(s, weight.gather(1, winner))


def ranked_weights(args: Arguments) -> tuple[Tensor, Tensor]:
    """Weights [N, V] of all tokens, best first, in float64, and the rank [N, 1] of the one that is drawn among all."""
    temperature = args["temperature"]
    z = args["logits"].float() / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    z = z.nan_to_num(-INF, None, -INF)
    drawn = (z + gumbel_noise(args["seeds"], args["positions"], z.shape[1])).argmax(1, keepdim=True)
    z, order = z.double().sort(dim=1, descending=True, stable=True)
    return (z - z[:, :1]).exp(), (order == drawn).int().argmax(1, keepdim=True)


def just_beside(s: Source, limits: Tensor) -> Tensor:
    """Limits moved by three times the tolerance."""
    return (limits.squeeze(1) * s.among([1 - 3e-5, 1 + 3e-5], len(limits))).float()


# Exits


@dataclasses.dataclass(frozen=True)
class Steps:
    """A state, rules, and what the draft, the base and the exit head say in each of several steps.

    tokens   [B, D + 1] of each step: the chain that is drafted, the root's place unused
    agreed   [B]: how many of them the base agrees with
    sampled  [B]: what it says then
    signals  [B, D + 1, S or 0]
    """

    state: DecodeState
    rules: ExitRules
    stop_ids: Tensor
    tokens: list[Tensor]
    agreed: list[Tensor]
    sampled: list[Tensor]
    signals: list[Tensor]


KINDS = (
    (Smoothing.EWMA, 0),
    (Smoothing.WINDOW, 1),
    (Smoothing.WINDOW, 1),
    (Smoothing.MOMENTUM, 2),
    (Smoothing.NONE, 0),
)


def exit_case(s: Source, rows: int | None = None) -> Steps:
    """Exits by signals and budgets in a few ids, so that boundaries and markers are met; `rows` is D + 1."""
    restless = s.chance(40)  # thinking ends and begins again, often within a step
    batch, vocab = batch_of(s), 4 if restless else s.number(3, 9)
    rows = rows or s.size(1, 8, (1, 2, 31, 32))
    signals = s.pick(3, 3, 0, 1, 2)
    smoothing, window = s.pick(*KINDS)
    if window:
        window = s.size(window, 6, (window, 33, 64))
    start, end = (s.integers(0, vocab - 1, s.pick(1, 1, 0, 2, 3)) for _ in range(2))
    force = s.integers(0, vocab - 1, s.number(0, 5))
    if restless:
        start, end = s.integers(0, 0, 1), s.integers(1, 1, 1)
    stop_ids = s.integers(0, vocab - 1, s.pick(0, 0, 1, 2))
    rules = exit_rules(s, batch, signals, vocab, smoothing, window, start, end, force, stop_ids)
    state = random_state(
        s,
        batch,
        vocab,
        depth=rows - 1,
        signals=signals,
        forced=force.numel() + s.pick(0, 0, 1, 3),
        tail=rules.tail + s.pick(0, 0, 1, 4),
        window=window,
        trace=s.chance(70),
    )
    if s.chance(50):
        remember(s, state, smoothing)
    count = s.number(1, 4)
    return Steps(
        state,
        rules,
        stop_ids,
        tokens=[s.integers(0, vocab - 1, batch, rows) for _ in range(count)],
        agreed=[s.integers(0, rows - 1, batch) for _ in range(count)],
        sampled=[s.integers(0, vocab - 1, batch) for _ in range(count)],
        signals=[exit_signals(s, batch, rows, 0 if s.chance(15) else signals) for _ in range(count)],
    )


def exit_rules(
    s: Source,
    batch: int,
    signals: int,
    vocab: int,
    smoothing: Smoothing,
    window: int,
    start: Tensor,
    end: Tensor,
    force: Tensor,
    stop_ids: Tensor,
) -> ExitRules:
    around = torch.tensor(s.pick([0.4, 0.4, 2.0], [0.4, 0.4, 2.0], [0.1, 0.1, 9.0]))
    thresholds = around[:signals] + s.normal(batch, signals) * 0.2
    odd = s.flags(s.pick(0, 0, 15), batch, signals)
    thresholds = torch.where(odd, s.among([NAN, INF, -INF, 0.0, 1.0], batch, signals), thresholds)
    has_minimum, has_budget = s.chance(40), s.chance(40)
    minimum = s.integers(0, 12, batch) if has_minimum else torch.zeros(batch, dtype=torch.int32)
    budget = torch.where(s.flags(75, batch), s.integers(0, 25, batch), NO_BUDGET)
    return ExitRules(
        thresholds=laid_out(s, thresholds, dense=2),
        used=laid_out(s, s.flags(s.pick(75, 100, 0), batch, signals), dense=2),
        alpha=laid_out(s, s.among([0.1, 0.3, 0.5, 0.7, 1.0, 0.0], batch), dense=2),
        min_thinking=laid_out(s, minimum, dense=2),
        budget=laid_out(s, budget if has_budget else torch.full_like(budget, NO_BUDGET), dense=2),
        hard_budget=laid_out(s, s.flags(50, batch), dense=2),
        boundary=laid_out(s, s.flags(s.pick(30, 60, 100, 0), vocab), dense=2),
        start=laid_out(s, start, dense=2),
        end=laid_out(s, end, dense=2),
        force=laid_out(s, force, dense=2),
        smoothing=smoothing,
        window=window,
        per_step=s.chance(40),
        has_minimum=has_minimum,
        has_budget=has_budget,
        force_stops=bool(force.numel()) and bool((stop_ids == force[0]).any()),
    )


def exit_signals(s: Source, batch: int, rows: int, signals: int) -> Tensor:
    """Some are missing; none so large that a rounding of one outweighs the others."""
    z = s.normal(batch, rows, signals) * 1.5
    odd = s.flags(s.pick(0, 10, 50), batch, rows, signals)
    z = torch.where(odd, s.among([NAN, INF, -INF, 200.0, -200.0, 0.0], batch, rows, signals), z)
    if signals and s.chance(20):
        return torch.cat([z, torch.full_like(z, NAN)], 2)[..., :signals]
    return laid_out(s, z)


def remember(s: Source, state: DecodeState, smoothing: Smoothing) -> None:
    """Values seen before, and what they make; none outside thinking."""
    window = state.history.shape[2]
    state.seen.copy_(s.integers(0, window + 2, *state.seen.shape) * state.thinking.unsqueeze(1))
    smoothed = torch.rand(state.smoothed.shape, generator=s.rng)
    if window:
        filled = torch.arange(window) >= window - state.seen.unsqueeze(2)
        state.history.copy_(torch.rand(state.history.shape, generator=s.rng) * filled)
        newest = state.history[..., -1]
        if smoothing is Smoothing.WINDOW:
            smoothed = state.history.sum(2) / state.seen.clamp(1, window)
        else:
            smoothed = newest + (newest - state.history[..., 0]) / (window - 1)
    state.smoothed.copy_(smoothed.masked_fill(state.seen < values_needed(smoothing, window), 0))


# Caches


def compact_kv_case(s: Source) -> Arguments:
    """Layers of any number, dtype and shape, in contiguous slots or in pages; memory that two of them share."""
    batch, nodes = batch_of(s), s.size(1, 20, (1, 64, 65, 256), percent=15)
    columns = s.size(1, 12, (1, nodes, nodes + 2, 33, 70))
    n_accepted = s.integers(0, min(columns, nodes), batch) * s.flags(85, batch)
    path = s.integers(SMALLEST, LARGEST, batch, columns)
    for row, n in enumerate(n_accepted.tolist()):
        if n:
            below = torch.randperm(nodes - 1, generator=s.rng)[: n - 1].sort().values.int() + 1
            if s.chance(20):  # in place already
                below = torch.arange(1, n, dtype=torch.int32)
            path[row, :n] = torch.cat([below.new_zeros(1), below])
    base = s.integers(0, 30, batch)
    slots = 30 + nodes + s.pick(0, 5)
    base.clamp_(max=slots - nodes)
    if batch and s.chance(30):
        base[0] = slots - nodes  # full to the last slot
    layers = s.size(0, 3, (33, 70), percent=10)
    small = layers > 3
    page = 0 if s.chance(50) else s.pick(1, 7, 16, 32)
    blocks = -(-slots // page) if page else 0
    pages = batch * blocks + s.number(0, 3)
    caches = []
    for _ in range(layers):
        heads, size = (1, s.pick(1, 4)) if small else (s.number(1, 4), s.pick(1, 3, 5, 8, 16, 33, 64, 80, 128))
        dtype = s.pick(*FLOATS, torch.float64)
        shape = (pages, page, heads, size) if page else (batch, heads, slots + s.pick(0, 3), size)
        caches.append(key_and_value(s, shape, dtype))
    args: Arguments = {
        "keys": [key for key, _ in caches],
        "values": [value for _, value in caches],
        "path": laid_out(s, path, dense=1),
        "n_accepted": n_accepted,
        "lengths": base + n_accepted,
    }
    if page:
        table = torch.randperm(pages, generator=s.rng)[: batch * blocks].view(batch, blocks).int()
        first, last = base // page, (base + nodes - 1) // page
        block = torch.arange(blocks)
        unused = (block < first.unsqueeze(1)) | (block > last.unsqueeze(1))
        table = torch.where(unused, s.integers(SMALLEST, LARGEST, batch, blocks), table)
        args["block_table"] = laid_out(s, table, dense=1)
    return args


def key_and_value(s: Source, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's caches: apart, of different head sizes, side by side in one memory, or with slots before heads."""

    def filled(*shape: int) -> Tensor:
        values = s.normal(*shape).to(dtype)
        values[s.flags(2, *shape)] = NAN
        return values

    kind = s.pick("apart", "apart", "beside", "slots first", "odd")
    if kind == "beside":
        both = filled(*shape[:-1], 2 * shape[-1] + 1)
        return both[..., : shape[-1]], both[..., shape[-1] : -1]
    if kind == "slots first":
        swapped = (shape[0], shape[2], shape[1], shape[3])
        return filled(*swapped).transpose(1, 2), filled(*swapped).transpose(1, 2)
    if kind == "odd":
        size = 1 + math.prod(shape)
        return filled(size)[1:].view(shape), filled(size)[1:].view(shape)
    return filled(*shape), filled(*shape[:-1], s.pick(shape[-1], 1, 24))


CASES: dict[str, Callable[[Source], Any]] = {
    "build_tree": build_tree_case,
    "verify_tree": verify_tree_case,
    "accept": accept_case,
    "sample_targets": sample_targets_case,
    "decide_exit": exit_case,
    "compact_kv": compact_kv_case,
}
