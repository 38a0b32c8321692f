"""Exit rules tried offline: against the same told again in plain Python."""

from __future__ import annotations

import random

import pytest
import torch
from exit_harness import activate, smooth_values
from training_traces import made_up, random_raw, signals_of

from specexit import ExitConfig
from specexit.training import rules
from specexit.training.grid import grid
from specexit.training.rules import Boundaries, Readout, SignalTable
from specexit_kernels import Smoothing
from specexit_kernels.state import SIGNALS


@pytest.fixture
def source(rng: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**31, (), generator=rng)))


def random_config(source: random.Random) -> ExitConfig:
    smoothing = source.choice(["none", "ewma", "window", "momentum"])
    used = source.sample(SIGNALS, source.randint(1, 3))
    drawn = {"confidence": source.random(), "progress": source.random(), "remaining": 4 * source.random()}
    return ExitConfig(
        **{name: drawn[name] if name in used else None for name in SIGNALS},
        smoothing=smoothing,
        alpha=source.uniform(0.05, 1),
        window=source.randint(2, 6),
        source=source.choice(["fc", "output", "auto"]),
        min_thinking_tokens=source.choice([0, 0, 7]),
        thinking_budget=source.choice([None, None, 12]),
        enabled=source.random() < 0.9,
    )


def told(config: ExitConfig, trace, raw: torch.Tensor) -> tuple[int, float]:
    """The boundary at which a trace is cut, its number, and how near a value came to its threshold."""
    values: list[list[float]] = [[], [], []]
    nearest, kind = 1.0, Smoothing[config.smoothing.upper()]
    for position, row in enumerate(raw.tolist(), 1):
        x = activate(row)
        for seen, value in zip(values, x, strict=True):
            if value is not None:
                seen.append(value)
        if position not in trace.boundaries:
            continue
        number = trace.boundaries.index(position)
        fires = config.enabled and position >= config.min_thinking_tokens
        for index, name in enumerate(SIGNALS):
            threshold = getattr(config, name)
            if threshold is None:
                continue
            e = smooth_values(values[index], kind, config.alpha, config.window)
            if x[index] is None or e is None:
                fires = False
                continue
            nearest = min(nearest, abs(e - threshold) / max(1.0, abs(threshold)))
            fires = fires and (e < threshold if name == "remaining" else e > threshold)
        if fires or (config.thinking_budget is not None and position >= config.thinking_budget):
            return number, nearest
    return -1, nearest


def test_where_a_rule_cuts(source: random.Random, rng: torch.Generator) -> None:
    traces = made_up(source, 60)
    raw = {"fc": random_raw(traces, rng), "output": random_raw(traces, rng)}
    table = SignalTable(signals_of(traces, raw), traces, Boundaries.of(traces))
    cuts = compared = 0
    for _ in range(25):
        config = random_config(source)
        first = table.first(config)
        of = raw["output" if config.source == "auto" else config.source].split([len(t.thinking) for t in traces])
        for trace, rows, found in zip(traces, of, first.tolist(), strict=True):
            expected, nearest = told(config, trace, rows)
            if nearest > 1e-5:  # nearer, float32 may see it otherwise
                assert (found if found < table.boundaries.most else -1) == expected
                cuts, compared = cuts + (expected >= 0), compared + 1
    assert compared > 1000
    assert 100 < cuts < compared


def test_values_do_not_depend_on_how_a_text_is_cut(
    source: random.Random, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = made_up(source, 9)
    signals = signals_of(traces, {"fc": random_raw(traces, rng)})
    where = Boundaries.of(traces)
    for readout in (Readout("fc", "none"), Readout("fc"), Readout("fc", "window", 0.5, 5), Readout("fc", "momentum")):
        whole = SignalTable(signals, traces, where).values(readout)
        with monkeypatch.context() as patch:
            patch.setattr(rules, "_ENTRIES", 150)
            pieces = SignalTable(signals, traces, where).values(readout)
        assert torch.equal(whole.nan_to_num(-1), pieces.nan_to_num(-1))
        assert whole[~where.valid].isnan().all()


def test_thresholds_are_strict_and_a_missing_value_does_not_pass() -> None:
    nan = torch.nan
    values = torch.tensor([[[0.5, 0.5, 2.0]], [[nan, 0.9, 1.0]], [[0.6, 0.9, 1.0]]])  # three boundaries of one trace
    allowed = torch.ones(3, 1, dtype=torch.bool)
    thresholds = torch.tensor(
        [[0.5, nan, nan], [0.49, nan, nan], [nan, nan, 2.0], [nan, nan, 2.1], [0.5, 0.9, nan], [nan, 0.8, nan]]
    )
    assert rules.first_passing(values, thresholds, allowed).flatten().tolist() == [2, 0, 1, 0, 3, 1]
    allowed[0] = False
    assert rules.first_passing(values, thresholds[1:2], allowed).item() == 2


@pytest.mark.parametrize("known", [True, False])
def test_scores(known: bool, source: random.Random) -> None:
    traces = made_up(source, 12, samples=source.randint(1, 3), known=known)
    traces = [t for t in traces if t.sample == 0 or source.random() < 0.7]  # not all problems have as many
    where = Boundaries.of(traces)
    first = torch.tensor([[source.randint(0, where.most) for _ in traces] for _ in range(5)])
    first = torch.where(torch.cat([where.valid, torch.ones(1, len(traces)).bool()]).gather(0, first), first, where.most)
    scores, losses = where.score(first), where.losses(first)
    ids = list(dict.fromkeys(t.id for t in traces))
    for rule, cuts in enumerate(first.tolist()):
        tokens, lost, right, full = ({i: [] for i in ids} for _ in range(4))
        for trace, cut in zip(traces, cuts, strict=True):
            ends = cut == where.most
            tokens[trace.id].append(len(trace.thinking) if ends else trace.boundaries[cut])
            full[trace.id].append(len(trace.thinking))
            was = trace.final_correct if known else True
            now = was if ends else (trace.correct if known else trace.agrees)[cut]
            right[trace.id].append(now)
            lost[trace.id].append(was and not now)
        mean = [
            sum(sum(values) / len(values) for values in found.values()) / len(ids)
            for found in (tokens, lost, right, full)
        ]
        assert scores.of(rule)["tokens"] == pytest.approx(mean[0])
        assert scores.of(rule)["loss"] == pytest.approx(mean[1])
        assert scores.of(rule)["accuracy"] == pytest.approx(mean[2])
        assert scores.of(rule)["cut"] == pytest.approx(1 - mean[0] / mean[3])
        assert losses[rule].tolist() == pytest.approx([sum(lost[i]) / len(lost[i]) for i in ids])
    half = torch.arange(0, len(traces), 2)
    alone = Boundaries.of([traces[i] for i in half])
    assert where.select(half).score(first[:, half]).tokens.tolist() == pytest.approx(
        alone.score(torch.where(first[:, half] == where.most, alone.most, first[:, half])).tokens.tolist()
    )


def test_rules_that_read_no_signal(source: random.Random) -> None:
    traces = made_up(source, 40)
    where = Boundaries.of(traces)
    found = {
        "oracle": rules.oracle(where),
        "third": rules.at_boundary(where, 2),
        "budget": rules.after_tokens(where, 9),
        "probe": rules.by_probability(where, torch.tensor([0.7]))[0],
    }
    for n, trace in enumerate(traces):
        count = len(trace.boundaries)
        expected = {
            "oracle": next((k for k in range(count) if all(trace.agrees[k:])), where.most),
            "third": 2 if count > 2 else where.most,
            "budget": next((k for k, b in enumerate(trace.boundaries) if b >= 9), where.most),
            "probe": next((k for k, p in enumerate(trace.probabilities) if p > 0.7), where.most),
        }
        assert {name: int(first[n]) for name, first in found.items()} == expected
        assert where.tokens[found["oracle"][n], n] == trace.sufficient


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_the_strictest_thresholds_lose_nothing(spread: float, source: random.Random, rng: torch.Generator) -> None:
    """Signals may differ in digits that a threshold does not have: it is rounded to the strict side."""
    traces = made_up(source, 30)
    total = sum(len(trace.thinking) for trace in traces)
    raw = torch.tensor([-3.0, 3.0, 4.0]) * torch.rand((), generator=rng) + spread * torch.randn(total, 3, generator=rng)
    table = SignalTable(signals_of(traces, {"fc": raw}), traces, Boundaries.of(traces))
    for name in SIGNALS:
        rules_of_one = grid(table, [Readout("fc", "none")], [name])
        assert rules_of_one.score(table).loss.min() == 0, name


def test_a_set_of_ids_leaves_boundaries_out(source: random.Random) -> None:
    traces = made_up(source, 20)
    where = Boundaries.of(traces, {3, 5})
    kept = [[b for b in trace.boundaries if trace.thinking[b - 1] in (3, 5)] for trace in traces]
    assert [where.tokens[:-1, n][where.valid[:, n]].tolist() for n in range(len(traces))] == kept
    assert not Boundaries.of(traces, set()).valid.any()


def test_no_boundary_anywhere() -> None:
    traces = made_up(random.Random(0), 3, most=0)
    where = Boundaries.of(traces)
    table = SignalTable(signals_of(traces, {"fc": torch.zeros(sum(len(t.thinking) for t in traces), 3)}), traces, where)
    assert where.most == 0
    assert where.score(table.first(ExitConfig()).unsqueeze(0)).of(0)["cut"] == 0


def test_settings_that_are_not_a_matter_of_the_text() -> None:
    traces = made_up(random.Random(0), 3)
    raw = {"fc": torch.zeros(sum(len(t.thinking) for t in traces), 3)}
    table = SignalTable(signals_of(traces, raw), traces, Boundaries.of(traces))
    with pytest.raises(ValueError, match="granularity 'token'"):
        table.first(ExitConfig.release())
    with pytest.raises(ValueError, match="source must be one of fc, was 'output'"):
        table.first(ExitConfig(source="output"))
    with pytest.raises(ValueError, match="recorded from these 2 traces, were recorded from 3 others"):
        SignalTable(table.signals, traces[:2], Boundaries.of(traces[:2]))
