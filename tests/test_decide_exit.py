"""The exit decision in single steps: every rule by itself, the step granularity, and bad arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from exit_harness import (
    KINDS,
    Row,
    Settings,
    activate,
    begin,
    chain_trees,
    chance,
    ids,
    make_rules,
    make_state,
    number,
    passes,
    random_row,
    smooth_values,
)
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from specexit_kernels import DecodeState, ExitReason, ExitRules, Finish, Smoothing, accept, decide_exit
from specexit_kernels.decide_exit import decide_exit_ref

NAN = math.nan


class Steps:
    """One row that stands inside its thinking text after a prompt of 5, the root included, and takes given runs."""

    def __init__(
        self, row: Row | None = None, shared: Settings | None = None, *, depth: int = 5, limit: int = 99
    ) -> None:
        self.row, self.shared = row or Row(), shared or Settings()
        self.rules = make_rules([self.row], self.shared)
        self.state = make_state(1, self.shared, depth=depth)
        begin(self.state, [[8, 8, 8, *(self.shared.start or (8,)), 8]], [limit], self.shared)
        self.state.thinking.fill_(1)

    def step(self, drafts: Sequence[int], sampled: int, x: Sequence[Sequence[float]] | float = 0.0) -> int:
        """Accept these drafts and the sampled token; `x` are raw signals of the run, or one number for all that agrees
        (above 0) or disagrees (below) with every threshold. Returns the row of the cut."""
        run = [int(self.state.root), *drafts]
        nodes = self.state.depth + 1
        targets = torch.zeros(1, nodes, dtype=torch.int32)
        targets[0, : len(run)] = ids(*drafts, sampled)
        accept(chain_trees([run], nodes), targets, ids(*self.shared.stop), self.state)
        z = torch.full((1, nodes, 3), NAN)  # junk past the run
        z[0, : len(run)] = torch.tensor([(x, x, -x)] * len(run) if isinstance(x, float) else x)
        return int(decide_exit(z, self.rules, self.state))

    @property
    def output(self) -> list[int]:
        return self.state.output[0, : int(self.state.n_output)].tolist()


GOOD, BAD = 5.0, -5.0


def test_a_finish_found_past_the_cut_is_undone() -> None:
    row = Steps()
    row.step([], 9, GOOD)
    assert row.step([4, 9], 3, GOOD) == 1  # the sampled token was a stop id
    assert (row.output, row.state.finished.item()) == ([4, 2], Finish.RUNNING)
    row = Steps(limit=9)
    row.step([], 9, GOOD)
    assert row.step([4, 9], 9, GOOD) == 1  # the run reached the limit
    assert (row.output, row.state.finished.item(), row.state.lengths.item()) == ([4, 2], Finish.RUNNING, 7)
    row = Steps(limit=9)
    row.step([], 9, BAD)
    assert row.step([4, 9], 9, BAD) == -1
    assert (row.output, row.state.finished.item()) == ([4, 9, 9], Finish.LENGTH)


def test_an_exit_at_the_last_allowed_token_is_a_length_stop() -> None:
    row = Steps(limit=8)
    row.step([], 9, GOOD)
    assert row.step([4], 9, GOOD) == 1
    assert (row.output, row.state.finished.item(), row.state.exit_position.item()) == ([4, 2], Finish.LENGTH, 6)


def test_a_first_forced_id_that_is_a_stop_id_ends_the_row() -> None:
    row = Steps(shared=Settings(force=(3, 2)))
    row.step([], 9, GOOD)
    assert row.step([4, 9], 9, GOOD) == 1
    assert (row.output, row.state.finished.item()) == ([4, 3], Finish.STOP)


def test_a_finished_row_is_inert() -> None:
    row = Steps()
    row.step([], 3, GOOD)
    assert row.state.finished.item() == Finish.STOP
    before = [x.clone() for x in row.state.tensors()]
    assert row.step([4, 4], 4, GOOD) == -1
    changed = {"run", "n_pending", "output", "n_output", "trace"}
    for name, old in zip(DecodeState.__dataclass_fields__, before, strict=True):
        if name not in changed:
            assert torch.equal(getattr(row.state, name), old), name
    assert (row.output, row.state.output.any(), row.state.trace.isnan().all()) == ([], False, True)


def test_a_row_with_forced_ids_pending_is_not_cut() -> None:
    row = Steps(Row(budget=1, hard=True), Settings(force=(9, 9, 9)), depth=1)
    row.state.forced.copy_(ids(8, 9, 9).view(1, 3))
    row.state.n_forced.fill_(3)
    assert row.step([], 9, GOOD) == -1
    assert row.step([], 9, GOOD) == -1
    assert row.state.n_forced.item() == 1
    assert row.step([], 9, GOOD) == 0


def test_a_missing_value_leaves_the_average_and_does_not_pass() -> None:
    row = Steps(Row(alpha=0.5))
    row.step([], 9, GOOD)  # the prompt's last token
    row.step([9], 9, [(0.0, 0.0, 0.0), (NAN, 1.0, 99.0)])  # exp(99) is not finite
    assert row.state.seen.tolist() == [[1, 2, 1]]
    half = 1 / (1 + math.exp(-1.0))
    assert row.state.smoothed[0].tolist() == pytest.approx([0.5, (0.5 + half) / 2, 1.0], rel=1e-6)
    for index in range(3):
        at_break = [GOOD, GOOD, -GOOD]
        at_break[index] = NAN
        for used in (True, False):
            row = Steps(Row(used=[used or n != index for n in range(3)]))
            row.step([9, 9], 9, GOOD)
            assert row.step([4], 9, [(GOOD, GOOD, -GOOD), at_break]) == (-1 if used else 1)


def test_comparisons_are_strict() -> None:
    for at, exits in (
        ((0.5, 0.4, 2.0), False),
        ((0.4, 0.5, 2.0), False),
        ((0.4, 0.4, 1.0), False),
        ((0.4, 0.4, 2.0), True),
    ):
        row = Steps(Row(thresholds=at))
        row.step([], 9, 0.0)
        assert row.step([4], 9, 0.0) == (1 if exits else -1)  # x is 1/2, 1/2, 1


def test_min_thinking_tokens() -> None:
    for least, cut in ((1, 0), (3, 0), (4, 3), (7, -1)):
        row = Steps(Row(min_thinking=least))
        row.step([9, 9], 4, GOOD)  # 2 thinking tokens: the root is the prompt's
        assert row.step([9, 9, 5], 9, GOOD) == cut


@pytest.mark.parametrize("signals", [GOOD, BAD])
def test_budgets(signals: float) -> None:
    for budget, hard, cut in ((3, False, 2), (3, True, 0), (5, True, 2), (6, True, 3), (8, False, -1)):
        row = Steps(Row(budget=budget, hard=hard, min_thinking=99))  # the signals would not be asked
        row.step([9, 9], 9, signals)
        assert row.step([9, 4, 9], 9, signals) == cut
        assert row.state.exit_reason.item() == (ExitReason.BUDGET if cut >= 0 else ExitReason.NONE)
    row = Steps(Row(budget=3))
    row.step([9, 9], 9, GOOD)
    row.step([4], 9, GOOD)
    assert row.state.exit_reason.item() == ExitReason.SIGNALS  # both at one token


def test_thinking_that_starts_again_starts_afresh() -> None:
    row = Steps(Row(alpha=0.5))
    row.step([9, 9, 2, 1], 9, BAD)  # ends by itself, begins again
    row.step([9, 4], 9, 5.0)
    assert row.state.exit_position.item() == 11  # the bad values of the first thinking do not weigh
    assert (row.output, row.state.thinking.item(), row.state.thinking_tokens.item()) == ([9, 4, 2], 0, 5)
    row.step([], 1)
    row.step([9], 4, GOOD)
    assert row.step([], 9, GOOD) == 0  # a second exit
    assert row.state.exit_position.item() == 11  # the first is reported


def test_what_a_prompt_leaves_is_not_asked_again() -> None:
    """The first root is the prompt's last token: with `assume_thinking`, a marker there has no say."""
    for last, thinking in ((1, 0), (2, 1)):
        row = Steps()
        begin(row.state, [[8, 8, last]], [99], row.shared)
        row.state.thinking.fill_(thinking)
        row.step([9], 9)
        assert (row.state.thinking.item(), row.state.thinking_tokens.item()) == (thinking, thinking)


def test_a_marker_does_not_reach_back_over_a_cut() -> None:
    row = Steps(Row(budget=1, hard=True), Settings(start=(6, 7), end=(7, 7), force=(7, 7)))
    row.step([], 6)
    assert row.step([], 9) == 0  # after 6 comes the forced 7
    assert row.output == [7]
    assert row.step([7], 9) == -1
    assert row.state.thinking.item() == 0


def test_step_granularity_with_every_smoothing(rng: torch.Generator) -> None:
    """One mean value a run, and a decision by those before it, over random runs."""
    fired = 0
    for case in range(60):
        kind, window = KINDS[case % len(KINDS)]
        shared = Settings(smoothing=kind, window=window, per_step=True)
        row = random_row(rng, 3, budgets=chance(rng, 0.3))
        steps, values, total = Steps(row, shared), [[], [], []], 0
        for n in range(6):
            drafts = [[9, 4, 10, 5, 9][number(rng, 0, 4)] for _ in range(number(rng, 0, 5))]
            run = [int(steps.state.root), *drafts]
            z = [torch.randn(3, generator=rng).tolist() for _ in run]
            if chance(rng, 0.3):
                z[-1][number(rng, 0, 2)] = NAN
            read = list(zip(run, [activate(v) for v in z], strict=True))[0 if n else 1 :]
            e = [smooth_values(v, kind, row.alpha, window) for v in values]
            margins: list[float] = []
            want, by = -1, ExitReason.NONE
            breaks = [i for i, token in enumerate(run) if token in shared.boundary and (n or i)]
            counts = [total + i + (1 if n else 0) for i in range(len(run))]
            if breaks and passes(e, [True] * 3, row, margins) and counts[breaks[0]] >= row.min_thinking:
                want, by = breaks[0], ExitReason.SIGNALS
            over = [i for i in range(0 if n else 1, len(run)) if (i in breaks or row.hard) and counts[i] >= row.budget]
            if over and (want < 0 or over[0] < want):
                want, by = over[0], ExitReason.BUDGET
            if any(margin < 1e-4 for margin in margins):
                break
            assert steps.step(drafts, 9, z) == want
            assert steps.state.exit_reason.item() == by
            if want >= 0:
                fired += by == ExitReason.SIGNALS
                break
            total += len(read)
            for signal, seen in enumerate(values):
                known = [x[signal] for _, x in read if x[signal] is not None]
                if known:
                    seen.append(sum(known) / len(known))
            e = [smooth_values(v, kind, row.alpha, window) for v in values]
            assert steps.state.seen[0].tolist() == [len(v) for v in values]
            assert_close(steps.state.smoothed[0], torch.tensor([0.0 if v is None else v for v in e]), torch.float32)
    assert fired


def test_a_step_without_signals_leaves_them_as_they_were() -> None:
    row = Steps(Row(budget=2))
    row.step([9], 9, GOOD)
    before = row.state.smoothed.clone()
    accept(chain_trees([[9, 4]], 6), ids(4, 9, 0, 0, 0, 0).view(1, 6), ids(3), row.state)
    assert decide_exit(torch.zeros(1, 6, 0), row.rules, row.state).item() == 1  # the budget holds
    assert row.state.trace.isnan().all()
    row = Steps()
    row.step([9], 9, GOOD)
    accept(chain_trees([[9, 4]], 6), ids(4, 9, 0, 0, 0, 0).view(1, 6), ids(3), row.state)
    assert decide_exit(torch.zeros(1, 6, 0), row.rules, row.state).item() == -1
    assert torch.equal(row.state.smoothed, before)
    accept(chain_trees([[9, 2, 9]], 6), ids(2, 9, 9, 0, 0, 0).view(1, 6), ids(3), row.state)
    decide_exit(torch.zeros(1, 6, 0), row.rules, row.state)
    assert not row.state.seen.any()  # thinking has ended


def test_no_rows() -> None:
    for row, signals in ((Row(), 3), (Row(budget=2), 0)):
        for kind, window in KINDS:
            for per_step in (False, True):
                shared = Settings(smoothing=kind, window=window, per_step=per_step, start=(6, 7))
                rules = make_rules([row], shared, signals)
                empty = {n: getattr(rules, n)[:0] for n in ("thresholds", "used", "alpha", "min_thinking", "budget")}
                rules = dataclasses.replace(rules, **empty, hard_budget=rules.hard_budget[:0])
                state = make_state(0, shared, depth=3, signals=signals)
                assert decide_exit(torch.zeros(0, 4, signals), rules, state).shape == (0,)


def random_step(
    rng: torch.Generator, shared: Settings, batch: int = 3, depth: int = 4
) -> tuple[ExitRules, DecodeState]:
    """Rules, and a state after `accept`, in the middle of thinking."""
    rules = make_rules([random_row(rng, 3, budgets=True) for _ in range(batch)], shared)
    state = make_state(batch, shared, depth=depth)
    begin(state, [[8, 9, 1, 9]] * batch, [40] * batch, shared)
    for _ in range(2):
        chains = [[int(t), 9, 10, 4, 9] for t in state.root]
        accept(chain_trees(chains, depth + 1), ids(9, 10, 4, 9, 9).repeat(batch, 1), ids(3), state)
        if not state.seen.any():
            decide_exit(torch.randn(batch, depth + 1, 3, generator=rng), rules, state)
    return rules, state


def test_signals_of_any_strides_and_a_state_without_trace(rng: torch.Generator) -> None:
    rules, state = random_step(rng, Settings())
    wide = torch.randn(3, 6, 5, generator=rng)
    view = wide[:, 1:, 1:4]
    other = dataclasses.replace(DecodeState.of([x.clone() for x in state.tensors()]), trace=torch.zeros(3, 0, 2, 3))
    third = DecodeState.of([x.clone() for x in state.tensors()])
    cut = decide_exit(view.contiguous(), rules, state)
    assert torch.equal(decide_exit(view, rules, third), cut)
    assert torch.equal(decide_exit(view, rules, other), cut)
    assert torch.equal(wide, wide.clone())
    for name, a, b, c in zip(
        DecodeState.__dataclass_fields__, state.tensors(), other.tensors(), third.tensors(), strict=True
    ):
        assert torch.equal(a.nan_to_num(-1), c.nan_to_num(-1)), name
        assert name == "trace" or torch.equal(a, b), name


@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("per_step", [False, True])
def test_no_value_is_asked_for(rng: torch.Generator, kind: Smoothing, window: int, per_step: bool) -> None:
    """Fake tensors have no values: a read of one, which on a GPU waits for it, would raise."""
    shared = Settings(smoothing=kind, window=window, per_step=per_step, start=(6, 7))
    rules, state = random_step(rng, shared)
    static = (int(rules.smoothing), rules.per_step, rules.has_minimum, rules.has_budget, rules.force_stops)
    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(x) for x in each.tensors()] for each in (rules, state)]
        cut = decide_exit_ref(mode.from_tensor(torch.zeros(3, 5, 3)), fake[0], *static, fake[1])
    assert (cut.shape, cut.dtype) == ((3,), torch.int32)


@pytest.mark.parametrize(
    ("kind", "window", "per_step"),
    [(Smoothing.EWMA, 0, False), (Smoothing.MOMENTUM, 3, False), (Smoothing.WINDOW, 3, True)],
)
def test_opcheck(rng: torch.Generator, kind: Smoothing, window: int, per_step: bool) -> None:
    shared = Settings(smoothing=kind, window=window, per_step=per_step, start=(6, 7))
    rules, state = random_step(rng, shared)
    static = (int(rules.smoothing), rules.per_step, rules.has_minimum, rules.has_budget, rules.force_stops)
    args = (torch.randn(3, 5, 3, generator=rng), rules.tensors(), *static, state.tensors())
    torch.library.opcheck(torch.ops.specexit.decide_exit.default, args)


def test_bad_arguments(rng: torch.Generator) -> None:
    rules, state = random_step(rng, Settings())
    signals = torch.zeros(3, 5, 3)
    long_markers, _ = random_step(rng, Settings(end=(2, 9)))
    long_force, _ = random_step(rng, Settings(force=(2, 9)))
    windowed, _ = random_step(rng, Settings(smoothing=Smoothing.WINDOW, window=4))
    fewer = make_rules([Row()] * 2, Settings())
    cases = [
        ({"signals": signals.double()}, TypeError, "signals must be float32, was float64"),
        ({"signals": signals[0]}, ValueError, r"signals must be \[B=3, D \+ 1=5, S=3\], was \[5, 3\]"),
        ({"signals": signals[:, :4]}, ValueError, "signals must be"),
        ({"signals": signals[..., :1]}, ValueError, "signals must be"),
        ({"signals": signals.tolist()}, TypeError, "signals must be a tensor, was list"),
        ({"rules": None}, TypeError, "rules must be ExitRules, was NoneType"),
        ({"state": state.tensors()}, TypeError, "state must be a DecodeState, was list"),
        ({"rules": fewer}, ValueError, r"rules.thresholds must be \[B=3, S=3\], was \[2, 3\]"),
        ({"rules": long_markers}, ValueError, r"state.tail must have 1 columns for these rules, was \[3, 0\]"),
        ({"rules": long_force}, ValueError, r"state.forced must have 2 columns for these rules, was \[3, 1\]"),
        ({"rules": windowed}, ValueError, r"state.history must hold 4 values for these rules, was \[3, 3, 0\]"),
        ({"implementation": "triton"}, ValueError, "implementation: decide_exit has torch"),
    ]
    for change, error, words in cases:
        with pytest.raises(error, match=words):
            decide_exit(**({"signals": signals, "rules": rules, "state": state} | change))


def test_bad_states_and_rules(rng: torch.Generator) -> None:
    rules, state = random_step(rng, Settings())
    for name in DecodeState.__dataclass_fields__:
        value = getattr(state, name)
        with pytest.raises(TypeError, match=f"state.{name} must be"):
            dataclasses.replace(state, **{name: value.double()})
        with pytest.raises(ValueError, match=f"state.{name} must be"):
            dataclasses.replace(state, **{name: value.unsqueeze(0)})
    with pytest.raises(ValueError, match=r"state.run must have at least 2 columns"):
        dataclasses.replace(state, run=state.run[:, :1])
    with pytest.raises(ValueError, match=r"state.output must be \[B=3, 5\], was \[3, 4\]"):
        dataclasses.replace(state, output=state.output[:, 1:])
    with pytest.raises(ValueError, match=r"state.trace must be \[B=3, 5, 2, S=3\], was \[3, 4, 2, 3\]"):
        dataclasses.replace(state, trace=state.trace[:, 1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.root = state.root.clone()  # type: ignore[misc]
    for name, value in zip(ExitRules.__dataclass_fields__, rules.tensors(), strict=False):
        with pytest.raises(TypeError, match=f"rules.{name} must be"):
            dataclasses.replace(rules, **{name: value.double()})
        with pytest.raises(ValueError, match=f"rules.{name} must be"):
            dataclasses.replace(rules, **{name: value.unsqueeze(0)})
    for kind, window, least in ((Smoothing.WINDOW, 0, 1), (Smoothing.MOMENTUM, 1, 2), (Smoothing.EWMA, 3, 0)):
        with pytest.raises(ValueError, match=f"rules.window must be between {least} and"):
            dataclasses.replace(rules, smoothing=kind, window=window)
    with pytest.raises(TypeError, match=r"rules.smoothing must be a Smoothing, was int"):
        dataclasses.replace(rules, smoothing=1)
