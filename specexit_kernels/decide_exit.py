"""The exit decision: raw signals -> smoothed values -> thresholds at boundaries -> the cut; then publication.

    x = (sigmoid, sigmoid, exp)(z)      e = smooth(x)
    exit at p:  p is a boundary inside thinking, e.confidence > t_c, e.progress > t_g, e.remaining < t_r

SpecExit, arXiv 2509.24248. By default the decision is taken at each token, so that where thinking ends depends on the
text alone, and not on how many tokens a step happened to accept. `per_step` is the rule of the public release.

In the twin rows come first, [R, B] and [R, B, S] with R = D + 1, so that what a sequence has one of broadcasts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specexit_kernels import _checks, cuda, native
from specexit_kernels._op import Op
from specexit_kernels.markers import thinking_states
from specexit_kernels.signals import activate_signals
from specexit_kernels.smoothing import smooth, values_needed
from specexit_kernels.state import DecodeState, ExitReason, ExitRules, Finish


def decide_exit_ref(
    signals: Tensor,
    rules: list[Tensor],
    smoothing: int,
    per_step: bool,
    has_minimum: bool,
    has_budget: bool,
    force_stops: bool,
    state: list[Tensor],
) -> Tensor:
    """The meaning of `decide_exit` in plain PyTorch: CPU path and test oracle."""
    r = ExitRules.of(rules, smoothing, per_step, has_minimum, has_budget, force_stops)
    s = DecodeState.of(state)
    if signals.shape[2] < s.smoothed.shape[1]:  # nothing was read: all are missing
        signals = s.smoothed.new_full((*signals.shape[:2], s.smoothed.shape[1]), torch.nan)
    rows = s.run.shape[1] - 1
    run = s.run.t()
    count = torch.arange(1, rows + 1, dtype=torch.int32, device=run.device).unsqueeze(1)  # tokens up to each row
    tokens = run[:rows]
    s.lengths.sub_(s.n_pending)  # L at the step's start, until the cut is known
    unread = count > s.n_pending
    live = (count > s.prompt_lengths - s.lengths).masked_fill_(unread, False)  # read and generated
    inside = thinking_states(tokens, live.logical_not(), s.tail, s.thinking, r.start, r.end)
    before, after = inside[:rows], inside[1:]
    s.thinking.copy_(after[-1])
    counts = (before & after).logical_and_(live)

    by_signals = by_budget = None  # [B] int32: tokens of the run up to its first row that may be cut, R + 1 for none
    x = e = missing = None
    if signals.shape[2] or has_budget:
        boundary = r.boundary[tokens].logical_and_(counts)
    if has_minimum or has_budget:
        total = counts.cumsum(0, dtype=torch.int32).add_(s.thinking_tokens)
    if signals.shape[2]:
        x, missing = _activate(signals.transpose(0, 1), counts)
        e, fires = (_step_fires if per_step else _token_fires)(x, missing, before, after, boundary, r, s)
        if has_minimum:
            fires.logical_and_(total >= r.min_thinking)
        by_signals = count.masked_fill(fires.logical_not_(), rows + 1).amin(0)
    if has_budget:
        over = (boundary | r.hard_budget).logical_and_(counts).logical_and_(total >= r.budget)
        by_budget = count.masked_fill(over.logical_not_(), rows + 1).amin(0)

    output = run[1:]  # 0 past the tokens that are pending
    if r.force.numel() and (signals.shape[2] or has_budget):
        forced = r.force[0]
        end = _cut(by_signals, by_budget, forced, r, s)
        unread = count > s.n_output
        output = torch.where(count == end, forced, output).masked_fill_(unread, 0)
        counts.masked_fill_(unread, False)
    else:
        end = torch.zeros_like(s.n_pending)
        s.n_output.copy_(s.n_pending)
    s.lengths.add_(s.n_output)
    s.output.copy_(output.t())
    s.thinking_tokens.add_(counts.sum(0, dtype=torch.int32))
    if s.tail.shape[1]:
        recent = torch.arange(s.tail.shape[1], dtype=torch.int32, device=run.device) + s.n_output.unsqueeze(1)
        s.tail.copy_(torch.cat([s.tail, s.run], 1).gather(1, recent)).masked_fill_((end > 0).unsqueeze(1), -1)
    if signals.shape[2]:  # a cut has set `seen` to 0
        s.smoothed.masked_fill_(s.seen < values_needed(r.smoothing, s.history.shape[2]), 0)
        if s.history.shape[2]:
            s.history.masked_fill_((s.seen == 0).unsqueeze(2), 0)
    if x is not None and e is not None and missing is not None and s.trace.shape[1]:
        trace = s.trace.transpose(0, 1)
        torch.stack([x, e.expand_as(x)], 2, out=trace)
        trace.masked_fill_(missing.logical_or_(unread.unsqueeze(2)).unsqueeze(2), torch.nan)
    return end - 1


def _activate(signals: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Signal values x [R, B, S], and where there is none and x is 0: the row does not count or x is not finite."""
    x = activate_signals(signals)
    missing = (x < torch.inf).logical_and_(counts.unsqueeze(2)).logical_not_()  # x >= 0; NaN compares false
    return x.masked_fill_(missing, 0), missing


def _token_fires(
    x: Tensor, missing: Tensor, before: Tensor, after: Tensor, boundary: Tensor, r: ExitRules, s: DecodeState
) -> tuple[Tensor, Tensor]:
    """Smoothed values [R, B, S] after each row, and the rows [R, B] at which they allow an exit."""
    e = _smooth(x, missing, after if r.start.numel() or r.end.numel() else None, r, s)
    passed = _passes(e, r).masked_fill_(missing, False)
    return e, _all_used(passed, r).logical_and_(boundary)


def _step_fires(
    x: Tensor, missing: Tensor, before: Tensor, after: Tensor, boundary: Tensor, r: ExitRules, s: DecodeState
) -> tuple[Tensor, Tensor]:
    """The release's rule: the values before this step, [1, B, S], decide at the first boundary of the run."""
    undecided = s.seen < values_needed(r.smoothing, s.history.shape[2])
    e = s.smoothed.masked_fill(undecided, torch.nan).unsqueeze(0)
    stays = (before <= after).all(0, keepdim=True)  # thinking does not end in this run by itself
    first = (boundary.cumsum(0) == 1).logical_and_(boundary)
    fires = first.logical_and_(_all_used(_passes(e, r), r)).logical_and_(stays)

    n_values = missing.logical_not().sum(0, keepdim=True)
    mean = (x.sum(0, keepdim=True, dtype=torch.float64) / n_values.clamp(min=1)).float()
    none = (n_values == 0).logical_or_(stays.logical_not().unsqueeze(2))
    _smooth(mean.masked_fill_(none, 0), none, stays, r, s)
    return e, fires


def _smooth(x: Tensor, missing: Tensor, inside: Tensor | None, r: ExitRules, s: DecodeState) -> Tensor:
    """e of each row, [R, B, S]; the state takes what the last row leaves."""
    e, seen, history = smooth(r.smoothing, x, missing, inside, r.alpha, s.smoothed, s.seen, s.history)
    s.smoothed.copy_(e[-1])
    s.seen.copy_(seen[-1])
    if s.history.shape[2]:
        s.history.copy_(history)
    return e


def _passes(e: Tensor, r: ExitRules) -> Tensor:
    """Whether each value passes its threshold: [R, B, S]. NaN does not."""
    margin = e - r.thresholds
    if e.shape[2] == 3:
        margin[..., 2].neg_()  # remaining must lie below
    return margin > 0


def _all_used(passed: Tensor, r: ExitRules) -> Tensor:
    """Whether all that are used have passed: [R, B, S] -> [R, B]."""
    return (r.used <= passed).all(-1)


def _cut(by_signals: Tensor | None, by_budget: Tensor | None, forced: Tensor, r: ExitRules, s: DecodeState) -> Tensor:
    """End thinking where signals or budget first allow it: the tokens of the run up to there, [B] int32, 0 for none.

    forced   the first forced id
    Of the state, what is smoothed and what is published is the caller's, and `lengths` still is L at the step's start.
    """
    if by_signals is None or by_budget is None:
        first = by_budget if by_signals is None else by_signals
    else:
        first = torch.minimum(by_signals, by_budget)
    assert first is not None
    is_cut = (first <= s.n_pending).logical_and_(s.n_forced.logical_not())
    end = first.masked_fill(is_cut.logical_not(), 0)
    torch.where(is_cut, first, s.n_pending, out=s.n_output)
    torch.where(is_cut, forced, s.root, out=s.root)
    of_row, width = is_cut.unsqueeze(1), r.force.numel()
    queue = s.forced[:, :width]
    torch.where(of_row, r.force, queue, out=queue)
    s.n_forced.masked_fill_(is_cut, width)

    # A finish past the cut is undone; the forced id, or its place, may be another.
    place = s.lengths + end
    if r.force_stops:
        s.finished.masked_fill_(is_cut, Finish.STOP)
    else:
        s.finished.masked_fill_(is_cut, Finish.RUNNING)
        s.finished.masked_fill_((s.limits - place == 1).logical_and_(is_cut), Finish.LENGTH)

    is_first = s.exit_reason.logical_not().logical_and_(is_cut)
    torch.where(is_first, place - 1, s.exit_position, out=s.exit_position)
    s.exit_reason.masked_fill_(is_first, ExitReason.BUDGET if by_signals is None else ExitReason.SIGNALS)
    if by_signals is not None and by_budget is not None:
        s.exit_reason.masked_fill_((by_budget < by_signals).logical_and_(is_first), ExitReason.BUDGET)
    s.thinking.masked_fill_(is_cut, 0)
    s.seen.masked_fill_(of_row, 0)
    return end


def outputs(
    signals: Tensor,
    rules: list[Tensor],
    smoothing: int,
    per_step: bool,
    has_minimum: bool,
    has_budget: bool,
    force_stops: bool,
    state: list[Tensor],
) -> Tensor:
    """The op's results, empty: what a launch fills, and all that a fake has."""
    return signals.new_empty(signals.shape[0], dtype=torch.int32)


_OP = Op(
    "decide_exit(Tensor signals, Tensor[] rules, int smoothing, bool per_step, bool has_minimum, bool has_budget,"
    " bool force_stops, Tensor(a!)[] state) -> Tensor",
    decide_exit_ref,
    outputs,
)


def _cuda_limit(signals: Tensor, rules: list[Tensor], *arguments: Any) -> str | None:
    *_, state = arguments
    most, columns = native.load().max_columns, signals.shape[1]
    if columns > most:
        return f"signals must have at most {most} rows a sequence, had {columns}"
    return (
        cuda.dense_limit("rules", ExitRules, rules)
        or cuda.dense_limit("state", DecodeState, state)
        or cuda.device_limit("signals", signals)
    )


cuda.register(_OP, _cuda_limit)


def decide_exit(signals: Tensor, rules: ExitRules, state: DecodeState, *, implementation: str | None = None) -> Tensor:
    """Decide whether thinking ends in this step's run, cut the run there, and publish what stands.

    signals  [B, D + 1, S] float32, any strides: raw logits; row r is of position L + r, of the token `state.run[:, r]`,
             with L the length before this step's `accept`. Rows from `state.n_pending` on are not read. With no columns
             at all, every signal of the step is missing
    rules    when to cut
    state    after this step's `accept`; changed in place, see below
    cut      [B] int32: the row of the token that stays last, -1 where thinking goes on

    Whether a row stands inside thinking follows from `state.thinking` and the markers among the generated tokens before
    it. A row counts if it is read, generated, and inside before and after its token. Row r may be cut if it counts and,
    by its signals, is a boundary at which all used values pass their thresholds (confidence and progress above,
    remaining below, strictly), or, by its budget, is a boundary (any row, if the budget is hard) with enough thinking
    tokens behind it; the first such row is cut. A missing (not finite) value leaves e as it was, and does not pass.
    When thinking is over, values and counts of values start afresh; thinking tokens are counted on.
    `per_step`: e is that of the steps before, the run's only chance is its first boundary, and there is none if
    thinking ends in the run by itself; then the mean of the rows that count is the step's value.

    The cut at row r: the tokens after it are dropped, the forced ids follow, thinking is over, and nothing that was
    found past r leaves a mark in the state, a finish included. Rows with forced ids pending are not cut. Of the state,
    `output` becomes the tokens of the run that stand and follow the old root, with the first forced id after a cut.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape or device, or rules of other sizes than the
    state's.
    """
    if not isinstance(state, DecodeState):
        raise TypeError(f"state must be a DecodeState, was {type(state).__name__}")
    if not isinstance(rules, ExitRules):
        raise TypeError(f"rules must be ExitRules, was {type(rules).__name__}")
    like = state.lengths
    sizes = {"B": state.batch, "D + 1": state.depth + 1, "S": state.signals}
    _checks.tensor("rules.thresholds", rules.thresholds, ("B", "S"), torch.float32, sizes, like)
    if isinstance(signals, Tensor) and signals.dim() == 3 and signals.shape[2] == 0:
        sizes["S"] = 0
    _checks.tensor("signals", signals, ("B", "D + 1", "S"), torch.float32, sizes, like)
    if state.tail.shape[1] < rules.tail:
        raise ValueError(f"state.tail must have {rules.tail} columns for these rules, was {list(state.tail.shape)}")
    if state.forced.shape[1] < rules.force.numel():
        raise ValueError(
            f"state.forced must have {rules.force.numel()} columns for these rules, was {list(state.forced.shape)}"
        )
    if state.history.shape[2] != rules.window:
        raise ValueError(
            f"state.history must hold {rules.window} values for these rules, was {list(state.history.shape)}"
        )
    cut: Tensor = _OP(
        signals,
        rules.tensors(),
        int(rules.smoothing),
        rules.per_step,
        rules.has_minimum,
        rules.has_budget,
        rules.force_stops,
        state.tensors(),
        implementation=implementation,
    )
    return cut
