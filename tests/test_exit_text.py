"""The exit is a function of the text alone: whole texts against a token-by-token telling, however cut into steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from exit_harness import (
    KINDS,
    VOCAB,
    Settings,
    Story,
    begin,
    chain_trees,
    chance,
    ids,
    make_rules,
    make_state,
    number,
    random_row,
    scripted,
    scripted_signals,
    tell,
)
from tolerances import assert_close

from specexit.thinking import Markers, count_thinking_tokens
from specexit_kernels import DecodeState, ExitRules, Smoothing, accept, decide_exit

# start, end, stop, boundaries (4, 5), the two ids of a long marker (6, 7), plain text
WEIGHTS = [1, 3, 2, 1, 8, 4, 6, 6] + [3] * (VOCAB - 8)


@dataclass
class Decoded:
    """What a decoding through the ops has published."""

    texts: list[list[int]]
    state: DecodeState
    traces: list[dict[int, torch.Tensor]] = field(default_factory=list)  # of each row: position -> [2, S]


def decode(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    rules: ExitRules,
    shared: Settings,
    chooses: Sequence[Callable[[Sequence[int]], int]],
    signals: Sequence[Callable[[Sequence[int]], Sequence[float]]],
    accepted: Callable[[], int],
    nodes: int,
) -> Decoded:
    """Decode with chains of `nodes` whose first `accepted()` drafts are right, until every row has ended."""
    n_signals = rules.thresholds.shape[1]
    state = make_state(len(prompts), shared, depth=max(nodes - 1, 0), signals=n_signals)
    begin(state, prompts, limits, shared)
    out = Decoded([list(p) for p in prompts], state, [{} for _ in prompts])
    stop = ids(*shared.stop)
    for _ in range(400):
        chains, targets = [], torch.zeros(len(prompts), nodes, dtype=torch.int32)
        for row, text in enumerate(out.texts):
            chain, n_forced = [text[-1]], int(state.n_forced[row])
            if n_forced:
                chain = state.forced[row, : min(n_forced, nodes)].tolist()
                assert chain[0] == text[-1]
            else:
                right = accepted()
                while len(chain) < nodes:
                    token = chooses[row](text + chain[1:])
                    chain.append(token if len(chain) <= right else (token + 1) % VOCAB)
            for n in range(len(chain)):
                targets[row, n] = chooses[row](text + chain[1 : n + 1])
            chains.append(chain)
        before = state.lengths.clone()
        was_finished = state.finished.clone()
        accept(chain_trees(chains, nodes), targets, stop, state)
        z = torch.full(
            (len(prompts), nodes, n_signals), 9.0
        )  # junk where nothing is read: it would pass every threshold
        for row, text in enumerate(out.texts):
            run = state.run[row].tolist()
            for r in range(int(state.n_pending[row])):
                z[row, r] = torch.tensor(signals[row](text + run[1 : r + 2]))
        cut = decide_exit(z, rules, state)
        for row, text in enumerate(out.texts):
            n = int(state.n_output[row])
            assert n == 0 if was_finished[row] else n >= 1
            text += state.output[row, :n].tolist()
            assert state.output[row, n:].eq(0).all()
            assert text[-1] == state.root[row]
            assert len(text) == state.lengths[row] + 1
            assert (cut[row] >= 0) == (n > 0 and int(cut[row]) == n - 1)
            for r in range(state.trace.shape[1]):
                if r < n and not state.trace[row, r].isnan().all():
                    out.traces[row][int(before[row]) + r] = state.trace[row, r].clone()
                elif r >= n:
                    assert state.trace[row, r].isnan().all()
        if state.finished.all():
            return out
    raise AssertionError("a row never ended")


def check(out: Decoded, row: int, story: Story, shared: Settings, n_signals: int) -> None:
    """One row is as it was told."""
    state = out.state
    assert out.texts[row] == story.text
    assert state.exit_position[row] == story.exit_position
    assert state.exit_reason[row] == story.exit_reason
    assert state.finished[row] == story.finished
    assert state.thinking_tokens[row] == story.thinking_tokens
    if len(shared.end) == 1 and shared.force == shared.end:  # the host's count; the last token is not read
        markers = Markers(*(tuple(m) for m in (shared.start, shared.end, shared.force)), ())
        prompt, generated = story.text[: story.prompt], story.text[story.prompt : -1]
        assert count_thinking_tokens(prompt, generated, markers) == story.thinking_tokens
    told = {p: v for p, v in story.trace.items() if any(a is not None for a in v[0])} if n_signals else {}
    assert out.traces[row].keys() == told.keys()
    for position, values in told.items():
        x, e = ([math.nan if a is None else a for a in side] for side in values)
        assert_close(out.traces[row][position], torch.tensor([x, e], dtype=torch.float64), torch.float32)


MARKERS = [
    ((1,), (2,), (2,)),
    ((), (2,), (2,)),
    ((6, 7), (7, 6, 6), (7, 6, 6)),  # several ids, that overlap
    ((1,), (6, 6), (8, 6, 6, 9)),
    ((1,), (2,), (3, 2)),  # the first forced id is a stop id
    ((1,), (2,), (9, 3, 2)),  # the second is
    ((1,), (2,), ()),  # nothing to force: thinking is never cut
]


@pytest.mark.parametrize(
    ("kind", "window", "n_signals"),
    [(*kind, 3) for kind in KINDS] + [(Smoothing.EWMA, 0, 1), (Smoothing.WINDOW, 3, 1), (Smoothing.EWMA, 0, 0)],
)
def test_exit_depends_on_the_text_alone(rng: torch.Generator, kind: Smoothing, window: int, n_signals: int) -> None:
    """The same text and signals, cut into steps of any size, end as a token-by-token telling says, to the last bit."""
    told: list[Story] = []
    rounds = 0
    while rounds < (5 if n_signals == 3 else 2) or not any(story.trace for story in told):
        assert rounds < 100, "nothing was ever read"
        rounds += 1
        start, end, force = MARKERS[number(rng, 0, len(MARKERS) - 1)]
        shared = Settings(start=start, end=end, force=force, smoothing=kind, window=window)
        batch = number(rng, 1, 4)
        rows = [random_row(rng, n_signals, budgets=chance(rng, 0.5) or not n_signals) for _ in range(batch)]
        seeds = torch.randint(2**40, (batch,), generator=rng).tolist()
        words = [torch.randint(8, VOCAB, (number(rng, 1, 4),), generator=rng).tolist() for _ in rows]
        prompts = [[*some, *start] for some in words]
        limits = [len(p) + number(rng, 1, 40) for p in prompts]
        chooses = [scripted(seed, WEIGHTS) for seed in seeds]
        signals = [scripted_signals(seed, n_signals) for seed in seeds]
        stories = [tell(*a, shared, c, s) for *a, c, s in zip(prompts, limits, rows, chooses, signals, strict=True)]
        if any(margin < 1e-4 for story in stories for margin in story.margins):
            continue  # too near to call in float32
        told += stories

        rules = make_rules(rows, shared, n_signals)
        outs = []
        for nodes, right in ((1, 0), (8, 7), (5, None), (8, None)):
            accepted = (lambda n=nodes: number(rng, 0, n - 1)) if right is None else (lambda n=right: n)
            out = decode(prompts, limits, rules, shared, chooses, signals, accepted, nodes)
            for row, story in enumerate(stories):
                check(out, row, story, shared, n_signals)
            outs.append(out)
        for out in outs[1:]:
            for name in ("smoothed", "seen", "history", "tail", "thinking", "root", "lengths", "forced", "n_forced"):
                assert torch.equal(getattr(out.state, name), getattr(outs[0].state, name)), name
            for ours, first in zip(out.traces, outs[0].traces, strict=True):
                assert all(torch.equal(ours[p].nan_to_num(-1), first[p].nan_to_num(-1)) for p in first)
