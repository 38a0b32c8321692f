"""Recorded signals: what the decoder reads on the same texts, and where it cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training_traces import signals_of

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, load_problems
from specexit.training import signals as module
from specexit.training.records import Trace
from specexit.training.rules import Boundaries, Readout, SignalTable, smoothed_values
from specexit.training.signals import RecordedSignals, record_signals
from specexit_kernels.state import SIGNALS

CONFIGS = [
    ExitConfig(),
    ExitConfig(confidence=0.5, progress=0.98, remaining=3, alpha=0.7, source="output"),
    ExitConfig(confidence=0.8, progress=0.9, remaining=None, smoothing="window", window=6, min_thinking_tokens=150),
    ExitConfig(confidence=None, progress=0.95, remaining=9, smoothing="none", source="fc"),
    ExitConfig(confidence=0.9, progress=None, remaining=None, smoothing="momentum", window=3, thinking_budget=300),
    ExitConfig(confidence=1.0, progress=None, remaining=None, source="fc"),  # never
]


@pytest.fixture(scope="module")
def decoder() -> SpecExitDecoder:
    pair = bundled_pair()
    return SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, device="cpu")


def trace_of(name: str, prompt: list[int], thinking: list[int], reply: list[int], ids: set[int]) -> Trace:
    boundaries = [n for n, token in enumerate(thinking, 1) if token in ids]
    agrees = [True] * len(boundaries)
    return Trace(
        id=name,
        prompt=prompt,
        thinking=thinking,
        reply=reply,
        boundaries=boundaries,
        answers=["1"] * len(boundaries),
        probabilities=[1.0] * len(boundaries),
        agrees=agrees,
        final="1",
    )


def encoded(decoder: SpecExitDecoder, question: str) -> list[int]:
    chat: Any = decoder.tokenizer
    return list(
        chat.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
    )


def test_rules_cut_offline_where_they_cut_in_decoding(decoder: SpecExitDecoder, rng: torch.Generator) -> None:
    """Greedy texts, sampled problems: every exit position, and every smoothed value that the decoder compares."""
    problems = load_problems("calibration")
    prompts = [encoded(decoder, problems[i].question) for i in torch.randperm(300, generator=rng)[:4].tolist()]
    markers = decoder.planner.markers(ExitConfig())
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    full = decoder.generate(ids, mask, exit=ExitConfig.off(), tree=TreeConfig.chain(12))
    ends = [row.index(markers.end[0]) for row in full.new_tokens]
    traces = [
        trace_of(str(n), prompt, row[:end], row[end:], set(markers.boundary))
        for n, (prompt, row, end) in enumerate(zip(prompts, full.new_tokens, ends, strict=True))
    ]
    signals = record_signals(decoder, traces, batch=3)
    assert signals.sources == ("fc", "output")
    table = SignalTable(signals, traces, Boundaries.of(traces))
    where, cuts = table.boundaries, 0
    for config in CONFIGS:
        out = decoder.generate(ids, mask, exit=config, tree=TreeConfig.chain(12))
        readout, first = table.readout(config), table.first(config)
        for n, (trace, stats) in enumerate(zip(traces, out.stats, strict=True)):
            raw = signals.raw[readout.source][signals.offsets[n] : signals.offsets[n + 1]]
            seen = len(stats.trace.positions)
            assert [p - len(trace.prompt) for p in stats.trace.positions] == list(range(seen))
            expected = torch.tensor(stats.trace.smoothed)
            smoothed = smoothed_values(readout, raw.unsqueeze(1))[:seen, 0]
            torch.testing.assert_close(smoothed, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
            near = min(
                ((where_value - threshold).abs() / max(1.0, threshold)).nan_to_num(1).min().item()
                for name in SIGNALS
                if (threshold := getattr(config, name)) is not None
                for where_value in [table.values(readout)[: len(trace.boundaries), n, SIGNALS.index(name)]]
            )
            if near < 1e-5 and config.confidence != 1.0:  # either side of a threshold is right
                continue
            offline = None if first[n] == where.most else int(where.tokens[first[n], n])
            cut = None if stats.exit_position is None else stats.exit_position + 1 - len(trace.prompt)
            assert cut == offline, config
            cuts += cut is not None
    assert cuts >= 4, "too few exits to mean anything"


def random_traces(rng: torch.Generator, prompts: list[int], lengths: list[int]) -> list[Trace]:
    def draw(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=rng).tolist()

    return [
        trace_of(str(n), draw(p), draw(t), draw(1), set())
        for n, (p, t) in enumerate(zip(prompts, lengths, strict=True))
    ]


def test_how_texts_are_cut_and_batched_changes_nothing(
    decoder: SpecExitDecoder, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = random_traces(rng, [40, 3, 1, 25, 33], [1, 50, 37, 90, 8])
    alone = [record_signals(decoder, [trace]) for trace in traces]
    told: list[int] = []
    for chunk, batch, slots in ((16, 2, 1000), (256, 5, 1000), (8, 3, 90), (256, 5, 10)):
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "SLOTS", slots)
        together = record_signals(decoder, traces, batch=batch, progress=told.append)
        for source in ("fc", "output"):
            expected = torch.cat([single.raw[source] for single in alone])
            torch.testing.assert_close(together.raw[source], expected, rtol=1e-3, atol=1e-3)
    assert sum(told) == 4 * sum(len(trace.thinking) for trace in traces)


def test_batches_are_bounded_in_texts_and_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 20)
    assert list(module._batches([9, 2, 30, 7, 2, 7, 2, 2, 5], 3)) == [[1, 4, 6], [7, 8], [3, 5], [0], [2]]


def test_a_file_of_signals(decoder: SpecExitDecoder, rng: torch.Generator, tmp_path: Path) -> None:
    traces = random_traces(rng, [4, 3], [10, 12])
    recorded = record_signals(decoder, traces)
    recorded.save(tmp_path / "signals.safetensors")
    read = RecordedSignals.load(tmp_path / "signals.safetensors")
    assert all(torch.equal(read.raw[source], recorded.raw[source]) for source in recorded.sources)
    assert torch.equal(read.offsets, recorded.offsets)
    assert (read.names, read.traces) == (recorded.names, recorded.traces)
    read.check_traces(traces)
    read.check_models(decoder.base, decoder.draft)
    with pytest.raises(ValueError, match="from these 2 traces, were recorded from 2 others"):
        read.check_traces(traces[::-1])
    total = {"fc": recorded.raw["fc"]}
    with pytest.raises(ValueError, match="recorded with this base, were recorded with another"):
        signals_of(traces, total).check_models(decoder.base, decoder.draft)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        RecordedSignals.load(tmp_path / "none")
    for name, write in (
        ("text", lambda path: path.write_text("{}")),
        ("other", lambda path: save_file({"a": torch.zeros(1)}, path)),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be read as recorded signals"):
            RecordedSignals.load(tmp_path / name)


def test_what_cannot_be_recorded(decoder: SpecExitDecoder, rng: torch.Generator) -> None:
    traces = random_traces(rng, [4], [10])
    with pytest.raises(ValueError, match="decoder must have a draft"):
        record_signals(SpecExitDecoder(decoder.model), traces)
    with pytest.raises(ValueError, match="traces must hold at least one trace"):
        record_signals(decoder, [])
    traces[0].thinking[3] = 80
    with pytest.raises(ValueError, match="with ids below 80; '0' has others"):
        record_signals(decoder, traces)
    with pytest.raises(ValueError, match="batch must be at least 1, was 0"):
        record_signals(decoder, traces, batch=0)


def test_a_readout_in_words() -> None:
    assert [str(r) for r in (Readout("fc"), Readout("fc", "none"), Readout("output", "window", 0.5, 9))] == [
        "fc, ewma 0.5",
        "fc, none",
        "output, window 9",
    ]
