"""The rule of the public release, statement by statement, and against a plain retelling over random runs.

The release decides once a step, over the *run*: the root and the accepted drafts, without the sampled token after them.
Its signals are the features' (its first statement concerns the draft). The numbers are those of its description.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from exit_harness import VOCAB, Settings, begin, chain_trees, ids, make_state

from specexit.exit import ExitConfig, markers_for, rules_for
from specexit.thinking import Markers
from specexit_kernels import ExitReason, ExitRules, Finish, accept, decide_exit
from specexit_kernels.state import SIGNALS

START, END, STOP, BREAK, WORD = 1, 2, 3, 4, 9
MARKERS = Markers((), (END,), (END,), (BREAK, 5))
SHARED = Settings(start=(), end=(END,), force=(END,))
GOOD, BAD = (0.9, 0.9, 10.0), (0.1, 0.1, 900.0)
Values = tuple[float, float, float]


def raw(x: Values) -> list[float]:
    return [math.log(x[0] / (1 - x[0])), math.log(x[1] / (1 - x[1])), math.log(x[2])]


class Decoding:
    """One row, stepped by hand. `prompt` ends with the first root."""

    def __init__(self, prompt: Sequence[int] = (7, START), rules: ExitRules | None = None, limit: int = 1000) -> None:
        self.rules = rules or rules_for(ExitConfig.release(), VOCAB, MARKERS, 1, signals=SIGNALS, stop_ids=[STOP])
        self.state = make_state(1, SHARED, depth=6)
        begin(self.state, [prompt], [limit], SHARED)
        self.state.thinking.fill_(1)  # as `assume_thinking` says

    def step(self, drafts: Sequence[int], sampled: int, x: Values | Sequence[Values] = BAD) -> list[int]:
        """Accept these drafts and then the sampled token; `x` are the signals of the run. Returns what is published."""
        run = [int(self.state.root), *drafts]
        targets = torch.zeros(1, 7, dtype=torch.int32)
        targets[0, : len(run)] = ids(*drafts, sampled)
        accept(chain_trees([run], 7), targets, ids(STOP), self.state)
        values = [x] * len(run) if isinstance(x[0], float) else x
        z = torch.full((1, 7, 3), 50.0)
        z[0, : len(run)] = torch.tensor([raw(v) for v in values])
        self.cut = int(decide_exit(z, self.rules, self.state))
        return self.state.output[0, : int(self.state.n_output)].tolist()

    @property
    def thinking(self) -> bool:
        return bool(self.state.thinking)

    @property
    def smoothed(self) -> list[float]:
        return self.state.smoothed[0].tolist()


def test_02_the_score_is_the_mean_over_the_run() -> None:
    row = Decoding()
    row.step([], WORD)  # the prompt's last token
    row.step([WORD, WORD], WORD, [(0.2, 0.3, 10.0), (0.4, 0.9, 20.0), (0.9, 0.6, 60.0)])
    assert row.smoothed == pytest.approx([0.5, 0.6, 30.0], rel=1e-5)


def test_03_prompt_positions_are_discarded() -> None:
    row = Decoding()
    row.step([], WORD, GOOD)
    assert row.state.seen.tolist() == [[0, 0, 0]]
    row = Decoding()
    row.step([WORD], WORD, [BAD, GOOD])  # the root is the prompt's, the draft is not
    assert row.smoothed == pytest.approx(GOOD, rel=1e-5)
    assert row.state.thinking_tokens.item() == 1


def test_04_the_average_starts_at_the_first_score() -> None:
    row = Decoding()
    row.step([], WORD)
    row.step([], WORD, (0.5, 0.2, 100.0))
    assert row.smoothed == pytest.approx([0.5, 0.2, 100.0], rel=1e-5)
    row.step([], WORD, (0.9, 0.8, 10.0))
    assert row.smoothed == pytest.approx([0.54, 0.26, 91.0], rel=1e-5)


def test_05_the_decision_uses_the_scores_of_steps_before() -> None:
    row = Decoding()
    row.step([], WORD)
    row.step([], WORD, BAD)
    row.step([BREAK], WORD, GOOD)  # good now, bad before
    assert row.thinking
    row = Decoding()
    row.step([], WORD)
    row.step([], WORD, GOOD)
    row.step([BREAK], WORD, BAD)  # bad now, good before
    assert not row.thinking


def test_06_the_first_step_never_exits_the_second_can() -> None:
    row = Decoding()
    row.step([WORD, BREAK], WORD, GOOD)
    assert row.cut == -1
    row.step([BREAK], WORD, GOOD)
    assert row.cut == 1


def test_07_only_the_first_boundary_counts_and_a_run_that_fails_is_kept() -> None:
    row = Decoding()
    row.step([WORD], WORD, GOOD)
    assert row.step([WORD, WORD], WORD, GOOD) == [WORD, WORD, WORD]  # no boundary: not asked
    assert row.step([BREAK, WORD, BREAK], WORD) == [BREAK, END]
    row = Decoding()
    row.step([WORD], WORD, BAD)
    assert row.step([BREAK, WORD, BREAK], WORD, GOOD) == [BREAK, WORD, BREAK, WORD]


@pytest.mark.parametrize("signal", range(3))
def test_08_all_three_comparisons_are_strict(signal: int) -> None:
    config = ExitConfig.release()
    assert (config.confidence, config.progress, config.remaining) == (0.8, 0.3, 200.0)
    for nudge, exits in ((0.0, False), (-1.0, True), (1.0, False)):
        row = Decoding()
        row.step([WORD], WORD, (0.85, 0.4, 150.0))
        level = row.state.smoothed[0, signal]
        towards = torch.tensor(math.inf if (nudge > 0) != (signal == 2) else -math.inf)
        row.rules.thresholds[0, signal] = torch.nextafter(level, towards) if nudge else level
        row.step([BREAK], WORD)
        assert (row.cut == 1) == exits


def test_09_the_rest_of_the_run_is_dropped_and_the_end_of_thinking_is_the_next_root() -> None:
    row = Decoding()
    row.step([WORD], WORD, GOOD)
    length = int(row.state.lengths)
    assert row.step([WORD, BREAK, 10, 11], 12) == [WORD, BREAK, END]
    state = row.state
    assert (row.cut, state.root.item(), state.lengths.item()) == (2, END, length + 3)
    assert (state.exit_position.item(), state.exit_reason.item()) == (length + 2, ExitReason.SIGNALS)
    assert (state.forced.tolist(), state.n_forced.tolist()) == ([[END]], [1])


def test_10_a_boundary_at_the_root_or_at_the_end_of_the_run() -> None:
    row = Decoding()
    row.step([WORD], BREAK, GOOD)
    length = int(row.state.lengths)
    assert row.step([10, 11], 12) == [END]  # only the root is committed
    assert row.state.lengths.item() == length + 1
    row = Decoding()
    row.step([WORD], WORD, GOOD)
    assert row.step([10, BREAK], 12) == [10, BREAK, END]  # only the sampled token is replaced


def test_11_a_boundary_that_is_sampled_is_tested_in_the_next_step() -> None:
    row = Decoding()
    row.step([WORD], WORD, GOOD)
    row.step([WORD], BREAK, GOOD)
    assert row.thinking
    row.step([WORD], WORD, GOOD)
    assert row.cut == 0


def test_12_thinking_ends_once_and_is_checked_first() -> None:
    row = Decoding(prompt=(END, 7))  # what the prompt holds does not matter
    row.step([WORD], WORD, GOOD)
    assert row.step([BREAK, END], WORD, GOOD) == [BREAK, END, WORD]  # it ends in this run: no exit before it
    assert not row.thinking
    row.step([START, BREAK], BREAK, GOOD)
    row.step([BREAK], WORD, GOOD)
    assert (row.thinking, row.cut, row.state.exit_position.item()) == (False, -1, -1)


def test_13_no_score_is_added_from_the_exit_on() -> None:
    row = Decoding()
    row.step([WORD], WORD, GOOD)
    row.step([BREAK], WORD, GOOD)
    assert row.cut == 1
    for _ in range(2):
        assert (row.state.seen.tolist(), row.smoothed) == ([[0, 0, 0]], [0.0, 0.0, 0.0])
        row.step([WORD], WORD, GOOD)


class Spelling:
    """A tokenizer that knows a few strings, the longest first."""

    unk_token_id = 0
    chat_template = None

    def __init__(self, *known: str) -> None:
        self.known = {text: n for n, text in enumerate(known, start=1)}

    def get_vocab(self) -> dict[str, int]:
        return self.known

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        found = []
        while text:
            piece = max((k for k in self.known if text.startswith(k)), key=len, default="")
            found.append(self.known.get(piece, 0))
            text = text[max(len(piece), 1) :]
        return found


def test_14_the_end_is_the_first_id_of_its_encoding_and_long_boundaries_are_ignored() -> None:
    tokenizer = Spelling("</", "think", ">", "\n\n", ".\n\n", " ", "\n", ".", "):\n\n")
    markers = markers_for(ExitConfig.release(), tokenizer)
    assert markers == Markers(
        (), (1,), (1,), (4, 5)
    )  # "\n\n\n" and " \n\n" are two tokens; "):\n\n" is not on its list


def retell(runs: list[tuple[list[int], int, list[Values]]], prompt: int, position: int) -> tuple[int, int, list[int]]:
    """The release over given runs: step and index of its cut (-1, -1 without one), and all that is published."""
    scores: list[list[float]] = []
    text: list[int] = []
    for step, (run, sampled, x) in enumerate(runs):
        if END in run:
            return -1, -1, text
        counted = [v for n, v in enumerate(x) if position + n >= prompt]
        breaks = [n for n, token in enumerate(run) if token in MARKERS.boundary and position + n >= prompt]
        if scores and breaks:
            e = scores[0]
            for score in scores[1:]:
                e = [0.1 * new + 0.9 * old for new, old in zip(score, e, strict=True)]
            if e[0] > 0.8 and e[1] > 0.3 and e[2] < 200:
                return step, breaks[0], [*text, *run[1 : breaks[0] + 1], END]
        if counted:
            scores.append([sum(v) / len(counted) for v in zip(*counted, strict=True)])
        text += [*run[1:], sampled]
        position += len(run)
    return -1, -1, text


def test_random_runs_are_cut_where_the_release_cuts_them(rng: torch.Generator) -> None:
    source = random.Random(int(torch.randint(2**40, (), generator=rng)))
    cuts = []
    for _ in range(40):
        level = source.uniform(0.7, 0.95)
        root, runs = 7, []
        for _ in range(source.randint(2, 6)):
            drafts = [
                source.choices((BREAK, 5, END, WORD, 10), (2, 1, 0.2, 6, 6))[0] for _ in range(source.randint(0, 5))
            ]
            sampled = source.choices((BREAK, END, WORD), (2, 0.2, 9))[0]
            x = [
                (min(0.99, level + source.uniform(-0.2, 0.2)), source.uniform(0.2, 0.9), source.uniform(20.0, 300.0))
                for _ in range(len(drafts) + 1)
            ]
            runs.append(([root, *drafts], sampled, x))
            root = sampled
        row = Decoding(prompt=(8, 7))
        step, index, text = retell(runs, 2, 1)
        published: list[int] = []
        for n, (run, sampled, x) in enumerate(runs):
            published += row.step(run[1:], sampled, x)
            assert row.cut == (index if n == step else -1)
            if n == step:
                break
        assert published[: len(text)] == text
        cuts.append(step >= 0)
        assert row.state.finished.item() == Finish.RUNNING
    assert 3 < sum(cuts) < 40
