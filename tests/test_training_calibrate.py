"""Calibrations and ablations from made-up traces of the bundled pair's tokens, and their commands."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_files import largest_file
from training_traces import own_draft, signals_of

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, load_draft
from specexit.cli import main
from specexit.drafts.calibration import FIELDS, read_calibration, write_calibration
from specexit.thinking import Markers
from specexit.training.ablate import ablate
from specexit.training.auroc import auroc
from specexit.training.calibrate import (
    Calibration,
    _certify,
    calibrate,
    default_name,
    read_all,
    signal_table,
    temperature_of,
    write,
)
from specexit.training.grid import Rules, grid
from specexit.training.learn_then_test import binomial_tail, hoeffding_bentkus, split
from specexit.training.records import Trace, TraceFile, sufficient_length
from specexit.training.report import draw, markdown
from specexit.training.rules import Boundaries, Readout, SignalTable
from specexit.training.signals import RecordedSignals, record_signals


@pytest.fixture(scope="module")
def decoder() -> SpecExitDecoder:
    pair = bundled_pair()
    return SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, device="cpu")


def random_traces(
    decoder: SpecExitDecoder, source: random.Random, name: str, count: int, samples: int = 1
) -> list[Trace]:
    """Short texts of random tokens; their answers turn right at a random place, and mostly stay so."""
    breaks = decoder.planner.markers(ExitConfig()).boundary
    traces = []
    for number in range(count):
        for sample in range(samples):
            thinking: list[int] = []
            for _ in range(source.randint(1, 4)):
                thinking += [source.randint(20, 60) for _ in range(source.randint(1, 4))] + [source.choice(breaks)]
            boundaries = [n for n, token in enumerate(thinking, 1) if token in breaks]
            turn = source.randint(0, len(boundaries))
            agrees = [k >= turn or source.random() < 0.1 for k in range(len(boundaries))]
            traces.append(
                Trace(
                    id=f"{name}{number}",
                    sample=sample,
                    prompt=[source.randint(20, 60) for _ in range(3)],
                    thinking=thinking,
                    reply=[5],
                    boundaries=boundaries,
                    answers=["1" if a else "2" for a in agrees],
                    probabilities=[source.random() for _ in agrees],
                    agrees=agrees,
                    correct=agrees,
                    final="1",
                    final_correct=True,
                    sufficient=sufficient_length(boundaries, agrees, len(thinking)),
                )
            )
    return traces


@pytest.fixture
def source(rng: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**31, (), generator=rng)))


def telling(decoder: SpecExitDecoder, traces: list[Trace], rng: torch.Generator, noise: float) -> RecordedSignals:
    """Signals of these traces that say, but for the noise, whether the answer is there."""
    recorded = record_signals(decoder, traces)
    known = torch.cat(
        [
            torch.tensor(
                [
                    4.0 if position >= t.sufficient and t.agrees[-1] else -4.0
                    for position in range(1, len(t.thinking) + 1)
                ]
            )
            for t in traces
        ]
    )
    sign = torch.tensor([1.0, 1.0, -1.0])
    raw = {s: known.unsqueeze(1) * sign + noise * torch.randn(len(known), 3, generator=rng) for s in ("fc", "output")}
    return RecordedSignals(raw, recorded.names, recorded.offsets, recorded.traces, recorded.base, recorded.draft)


QUICK: dict[str, Any] = {"sources": ["output"], "smoothing": ["none", "ewma"], "use": ["confidence", "remaining"]}


def test_a_rule_is_certified_on_the_problems_it_was_not_chosen_on(
    decoder: SpecExitDecoder, source: random.Random, rng: torch.Generator
) -> None:
    traces = random_traces(decoder, source, "p", 150)
    signals = telling(decoder, traces, rng, 0.5)
    result = calibrate(decoder, traces, signals=signals, max_loss=0.1, confidence_level=0.9, seed=3, **QUICK)
    assert result.certified is not None
    assert (result.problems, result.tested_on, result.needed, result.why_none) == (150, 90, None, None)
    _, table = signal_table(decoder, traces, signals)
    where = table.boundaries
    for choice in result.tested:
        lost = where.losses(table.first(choice.exit).unsqueeze(0))[0][~split(150, 0.4, 3)]
        assert (choice.problems, choice.losses) == (90, float(lost.sum()))
        assert choice.p_value == pytest.approx(binomial_tail(int(lost.sum()), 90, 0.1))
    passed = [choice for choice in result.tested if (choice.p_value or 0) <= 0.1]
    assert passed == list(result.tested[: len(passed)])
    assert result.certified.cut == max(choice.cut for choice in passed)
    assert result.estimated is not None
    scores = where.score(table.first(result.estimated.exit).unsqueeze(0)).of(0)
    assert scores["loss"] <= 0.1 + 1e-9
    assert (scores["tokens"], scores["cut"]) == (result.estimated.thinking_tokens, result.estimated.cut)
    # The signals tell nearly all, so nearly all is cut that can be.
    assert scores["cut"] > 0.8 * (1 - sum(t.sufficient for t in traces) / sum(len(t.thinking) for t in traces))
    assert result.estimated.p_value is None


def uninformed(problems: int, rng: torch.Generator) -> SignalTable:
    """Problems with one place to cut, where a fifth lose their answer, and signals that are uniform in (0, 1) and know
    nothing of it: the risk of a rule is a fifth of the share that it cuts."""
    x = torch.rand(problems, 3, generator=rng).clamp(1e-6, 1 - 1e-6)
    traces = [
        Trace(
            id=str(n),
            prompt=[1],
            thinking=[2, 3],
            reply=[4],
            boundaries=[1],
            answers=["1"],
            probabilities=[1.0],
            agrees=[kept],
            final="1",
        )
        for n, kept in enumerate((torch.rand(problems, generator=rng) >= 0.2).tolist())
    ]
    raw = torch.full((problems, 2, 3), torch.nan)
    raw[:, 0] = torch.cat([x[:, :2].logit(), x[:, 2:].log()], 1)
    return SignalTable(signals_of(traces, {"output": raw.flatten(0, 1)}), traces, Boundaries.of(traces))


def test_calibrations_keep_their_promise(rng: torch.Generator) -> None:
    """200 calibrations, each with thousands of rules to choose from, of which one in ten may break its promise.

    By chance alone 52 or more of them would with a probability below 1e-9. Rules that are tested on the problems on
    which they were chosen break it in nearly half.
    """
    assert 1 - binomial_tail(51, 200, 0.1) < 1e-9
    broken = certified = 0
    for seed in range(200):
        table = uninformed(150, rng)

        def rules(chosen: torch.Tensor, table: SignalTable = table) -> Rules:
            return grid(table, [Readout("output", "none")], traces=chosen)

        tested, best = _certify(table, rules, split(150, 0.4, seed), max_loss=0.05, delta=0.1)
        passed = [choice.exit for choice in tested if choice.p_value is not None and choice.p_value <= 0.1]
        cut = [
            (1 - (e.confidence or 0)) * (1 - (e.progress or 0)) * (1 if e.remaining is None else min(e.remaining, 1))
            for e in passed
        ]
        broken += any(0.2 * share > 0.05 for share in cut)
        certified += best is not None
    assert broken < 52
    assert certified > 100


def test_samples_of_a_problem_count_as_one(
    decoder: SpecExitDecoder, source: random.Random, rng: torch.Generator
) -> None:
    traces = random_traces(decoder, source, "p", 70, samples=2)
    result = calibrate(
        decoder, traces, signals=telling(decoder, traces, rng, 2.0), max_loss=0.2, confidence_level=0.8, **QUICK
    )
    assert (result.problems, result.tested_on) == (70, 42)
    assert all(choice.problems == 42 for choice in result.tested)
    for choice in result.tested:  # each may be lost in part
        assert choice.p_value == pytest.approx(hoeffding_bentkus(choice.loss, 42, 0.2))


def test_too_few_problems_are_said_to_be_too_few(
    decoder: SpecExitDecoder, source: random.Random, rng: torch.Generator
) -> None:
    traces = random_traces(decoder, source, "p", 20)
    result = calibrate(decoder, traces, signals=telling(decoder, traces, rng, 0.1), **QUICK)
    assert (result.certified, result.tested, result.needed) == (None, (), 499)
    assert result.estimated is not None
    assert "takes about 499 problems, there were 20 problems, 12 of them for testing" in (result.why_none or "")


def test_signals_that_tell_nothing_certify_nothing_bold(
    decoder: SpecExitDecoder, source: random.Random, rng: torch.Generator
) -> None:
    traces = random_traces(decoder, source, "p", 60)
    for trace in traces:  # whatever is cut, is lost
        trace.agrees[:] = trace.correct[:] = [False] * len(trace.agrees)  # type: ignore[index]
    result = calibrate(
        decoder, traces, signals=telling(decoder, traces, rng, 9.0), max_loss=0.1, confidence_level=0.9, **QUICK
    )
    for choice in (*result.tested, result.estimated):
        assert choice is None or choice.losses > 0 or abs(choice.cut) < 1e-9


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_loss": 0.0}, ValueError, "max_loss and confidence_level must lie between 0 and 1 to be certified"),
        ({"confidence_level": 1.0}, ValueError, "must lie between 0 and 1 to be certified"),
        ({"max_loss": 1.5}, ValueError, "max_loss must be between 0 and 1, was 1.5"),
        ({"use": []}, ValueError, "use must be some of confidence, progress, remaining, was"),
        ({"smoothing": ["ema"]}, ValueError, "smoothing must be some of none, ewma, window, momentum"),
        ({"sources": ["head"]}, ValueError, "sources must be some of fc, output"),
        ({"min_thinking_tokens": -1}, ValueError, "min_thinking_tokens must be at least 0"),
    ],
)
def test_settings_that_cannot_be(
    changes: dict[str, Any], error: type[Exception], message: str, decoder: SpecExitDecoder
) -> None:
    traces = random_traces(decoder, random.Random(0), "p", 2)
    with pytest.raises(error, match=message):
        calibrate(decoder, traces, **changes)


def test_traces_that_cannot_be_used(decoder: SpecExitDecoder) -> None:
    with pytest.raises(ValueError, match="traces must hold at least one trace, were none"):
        calibrate(decoder, [])
    flawed = random_traces(decoder, random.Random(0), "p", 2)
    for trace in flawed:
        object.__setattr__(trace, "flaw", "no end of thinking")
    with pytest.raises(ValueError, match="none of 2 can: no end of thinking"):
        calibrate(decoder, flawed)
    partly = random_traces(decoder, random.Random(0), "p", 2)
    del partly[0].boundaries[-1]
    for name in ("answers", "probabilities", "agrees"):
        del getattr(partly[0], name)[-1]
    with pytest.raises(ValueError, match="annotated at every paragraph's end that the decoder cuts at: 'p0'"):
        calibrate(decoder, partly)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return own_draft(tmp_path)


def test_rules_are_written_beside_others(
    folder: Path, decoder: SpecExitDecoder, source: random.Random, rng: torch.Generator
) -> None:
    traces = random_traces(decoder, source, "p", 120)
    signals = telling(decoder, traces, rng, 0.3)

    def run(level: float | None) -> Calibration:
        return calibrate(decoder, traces, signals=signals, max_loss=0.1, confidence_level=level, **QUICK)

    def read() -> Any:
        return load_draft(folder, embedding=decoder.model.get_input_embeddings()).calibration

    result = run(0.9)
    assert result.certified is not None
    assert write(result, folder) == ["10-percent", "10-percent-estimated"]
    assert (read()["default"], read()["rules"]["10-percent"]["confidence_level"]) == ("10-percent", 0.9)
    assert ExitConfig.from_draft(read()) == result.certified.exit
    assert sorted(read()["rules"]["10-percent"]["exit"]) == sorted(FIELDS)
    assert write(run(None), folder, "mine") == ["mine"]
    assert (list(read()["rules"]), read()["default"]) == (["10-percent", "10-percent-estimated", "mine"], "10-percent")
    assert write(run(None), folder, "mine", default=True) == ["mine"]
    assert (read()["default"], read()["rules"]["mine"]["kind"]) == ("mine", "estimated")
    used = SpecExitDecoder.from_pretrained(bundled_pair().base, folder, dtype=torch.float32, device="cpu")
    assert used.exit == run(None).estimated.exit  # type: ignore[union-attr]
    assert (default_name(0.01, 0.0), default_name(0.005, 0.7)) == ("1-percent", "0.5-percent-at-0.7")


GREEDY = {"sampling": {"temperature": 0.0}}


def save(path: Path, traces: list[Trace], **header: Any) -> Path:
    with TraceFile(path, header) as file:
        for trace in traces:
            file.append(trace)
    return path


def test_files_of_traces_must_go_together(tmp_path: Path, decoder: SpecExitDecoder) -> None:
    traces = random_traces(decoder, random.Random(0), "p", 2)
    one = save(tmp_path / "one", traces[:1], base="a", sampling={"temperature": 0.0, "seed": 1})
    two = save(tmp_path / "two", traces[1:], base="a", sampling={"temperature": 0.0, "seed": 2})
    header, every = read_all([one, two])
    assert (header["base"], every) == ("a", traces)
    with pytest.raises(ValueError, match=r"traces must be of one temperature, were of 0.0 and 0.7"):
        read_all([one, save(tmp_path / "hot", traces[1:], base="a", sampling={"temperature": 0.7})])
    assert (temperature_of(header), temperature_of({}, 0.6), temperature_of(header, 0.0)) == (0.0, 0.6, 0.0)
    with pytest.raises(ValueError, match="temperature must be given for traces of texts from elsewhere"):
        temperature_of({})
    with pytest.raises(ValueError, match=r"temperature must be that of the traces, 0, was 0.6"):
        temperature_of(header, 0.6)
    with pytest.raises(ValueError, match=r"traces must be of one base, were of 'a' and 'b'"):
        read_all([one, save(tmp_path / "other", traces[1:], base="b", sampling={"temperature": 0.0})])


def test_command(
    folder: Path, tmp_path: Path, decoder: SpecExitDecoder, source: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = save(tmp_path / "cal.jsonl", random_traces(decoder, source, "p", 24))
    common = ["calibrate", "--model", str(bundled_pair().base), "--draft", str(folder), "--device", "cpu"]
    own = [*common, "--traces", str(traces), "--smoothing", "ewma", "--source", "output"]
    assert main([*own, "--estimate"]) == 2
    assert "temperature must be given" in capsys.readouterr().err
    own += ["--temperature", "0"]
    assert main([*own, "--signals", str(tmp_path / "s"), "--max-loss", "0.9", "--confidence-level", "0.5"]) == 0
    assert "certified" in capsys.readouterr().out
    assert (tmp_path / "s").is_file()
    written = (folder / "calibration.json").read_text()
    assert main([*own, "--signals", str(tmp_path / "s"), "--dry-run"]) == 1
    assert "takes about 499 problems" in capsys.readouterr().err
    assert (folder / "calibration.json").read_text() == written
    assert main([*own, "--max-loss", "0.5", "--estimate", "--name", "guess", "--default"]) == 0
    assert json.loads((folder / "calibration.json").read_text())["default"] == "guess"
    other = save(tmp_path / "other.jsonl", random_traces(decoder, source, "q", 2), base="0")
    for wrong, message in (
        ([*common, "--traces", str(tmp_path / "none")], "there is no file"),
        ([*common, "--traces", str(other), "--temperature", "0"], "is of another base"),
        ([*common[:3], "--draft", str(traces), "--traces", str(traces)], "--draft must be a folder"),
        ([*common, "--traces", str(other), "--signals", str(tmp_path)], "--signals must be a file"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "training": {"base": "0" * 64}}))
    assert main(own) == 2
    assert "the draft is of another base" in capsys.readouterr().err


def test_ablation(
    tmp_path: Path,
    decoder: SpecExitDecoder,
    source: random.Random,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration = random_traces(decoder, source, "c", 30)
    test = random_traces(decoder, source, "t", 25)
    signals = telling(decoder, calibration, rng, 1.0), telling(decoder, test, rng, 1.0)
    monkeypatch.setattr(decoder, "tree", TreeConfig.chain(3))
    result = ablate(decoder, calibration, test, signals=signals, losses=(0.1,), timed=2)
    result = json.loads(json.dumps(result))
    rows = {(row["part"], row["name"]): row for row in result["rules"]}
    whole, best = rows["reference", "full thinking"]["test"], rows["reference", "oracle"]["test"]
    lengths = sum(len(t.thinking) for t in test) / 25, sum(t.sufficient for t in test) / 25
    assert (whole["tokens"], best["tokens"]) == (pytest.approx(lengths[0]), pytest.approx(lengths[1]))
    assert (whole["accuracy"], best["loss"]) == (1.0, 0.0)
    assert sum(part == "signals" for part, _ in rows) == 7
    assert {name for part, name in rows if part == "smoothing"} == {"none", "ewma", "window", "momentum"}
    assert {name for part, name in rows if part == "placement"} == {"fc", "output"}
    everything = rows["everything", "best of all"]
    for (part, _), row in rows.items():  # what is chosen among more cuts no less, where it was chosen
        if row["exit"] is not None and row["allowed_loss"] is not None:
            assert row["calibration"]["loss"] <= 0.1 + 1e-9
            if part != "everything":
                assert row["calibration"]["tokens"] >= everything["calibration"]["tokens"] - 1e-9
    _, table = signal_table(decoder, test, signals[1])
    config = ExitConfig(**everything["exit"])
    assert everything["test"] == table.boundaries.score(table.first(config).unsqueeze(0)).of(0)
    assert result["sensitivity"][0]["tokens"] == everything["test"]["tokens"]
    assert len(result["auroc"]) == table.boundaries.most
    assert {row["way"] for row in result["wall_clock"]} >= {"full thinking", "exit without speculation"}
    assert rows["boundaries", "ends of sentences"]["test"] is None
    text = markdown(result)
    assert all(name in text for _, name in rows)
    assert draw(result).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="both hold 'c0'"):
        ablate(decoder, calibration, calibration, signals=signals)


def test_ablation_command(
    folder: Path, tmp_path: Path, decoder: SpecExitDecoder, source: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [save(tmp_path / name, random_traces(decoder, source, name, 6)) for name in ("c", "t")]
    own = ["train", "ablate", "--model", str(bundled_pair().base), "--draft", str(folder), "--device", "cpu"]
    own += [
        "--calibration",
        str(files[0]),
        "--test",
        str(files[1]),
        "--temperature",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*own, "--max-loss", "1", "--keep-signals"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"ablation.json", "ablation.md", "test.safetensors"}
    assert "## Signals" in capsys.readouterr().out
    assert main([*own[:-1], str(files[0])]) == 2
    assert "--output must be a folder" in capsys.readouterr().err


def test_auroc(rng: torch.Generator) -> None:
    for _ in range(20):
        scores = torch.randint(0, 6, (30,), generator=rng).float()
        positive = torch.rand(30, generator=rng) < 0.4
        if positive.all() or not positive.any():
            continue
        pairs = scores[positive][:, None] - scores[~positive]
        expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
        assert auroc(scores, positive) == pytest.approx(expected)
    assert auroc(torch.ones(3), torch.ones(3).bool()) is None
    assert auroc(torch.zeros(0), torch.zeros(0).bool()) is None


def test_boundaries_and_markers_of_the_users_own_reach_the_decoder(
    folder: Path, tmp_path: Path, decoder: SpecExitDecoder, source: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    """Traces that were annotated with ids that the tokenizer does not name are calibrated and ablated with those, and
    so is decoded by default."""
    known = decoder.planner.markers(ExitConfig())
    own = {"start": known.start, "end": [61], "force": [62, 61], "boundary": [63]}
    traces = random_traces(decoder, source, "p", 16)
    for trace in traces:
        trace.thinking[:] = [63 if token in known.boundary else token for token in trace.thinking]
    header = {"markers": own, "sampling": {"temperature": 0.0}}
    half = [save(tmp_path / name, part, **header) for name, part in (("c", traces[:8]), ("t", traces[8:]))]
    pair = ["--model", str(bundled_pair().base), "--draft", str(folder), "--device", "cpu"]
    rest = ["--max-loss", "0.9", "--confidence-level", "0.5", "--smoothing", "none", "--source", "output"]
    assert main(["calibrate", *pair, "--traces", str(half[0]), *rest]) == 0, capsys.readouterr().err
    found = SpecExitDecoder.from_pretrained(bundled_pair().base, folder, dtype=torch.float32, device="cpu")
    assert isinstance(found.exit, ExitConfig)
    assert found.planner.markers(found.exit) == Markers(known.start, (61,), (62, 61), (63,))
    sets = ["--calibration", str(half[0]), "--test", str(half[1]), "--max-loss", "0.5", "--timed", "1"]
    assert main(["train", "ablate", *pair, *sets, "--output", str(tmp_path / "tables")]) == 0

    # Of other boundaries alone, the rule names those alone.
    traces = save(tmp_path / "b", traces, **header | {"markers": {**vars(known), "boundary": [63]}})
    assert main(["calibrate", *pair, "--traces", str(traces), *rest, "--name", "b"]) in (0, 1)
    written = json.loads((folder / "calibration.json").read_text())["rules"]["b"]["exit"]
    assert [name for name in written if name.endswith("_ids") and written[name] is not None] == ["boundary_ids"]


def test_no_rule_is_lost_to_a_run_that_certifies_none(
    folder: Path, decoder: SpecExitDecoder, source: random.Random, rng: torch.Generator
) -> None:
    traces = random_traces(decoder, source, "p", 120)
    signals = telling(decoder, traces, rng, 0.3)

    def run(level: float | None) -> Calibration:
        return calibrate(decoder, traces, signals=signals, max_loss=0.1, confidence_level=level, **QUICK)

    assert write(run(0.9), folder, "mine") == ["mine", "mine-estimated"]
    first = read_calibration(folder)
    assert first is not None
    too_much = run(1 - 1e-9)
    assert too_much.certified is None
    for result in (too_much, run(None)):
        assert write(result, folder, "mine", default=False) == ["mine-estimated"]
        now = read_calibration(folder)
        assert now is not None
        assert (now["default"], now["rules"]["mine"]) == ("mine", first["rules"]["mine"])


def test_rules_that_are_written_at_once_are_all_there(
    folder: Path, decoder: SpecExitDecoder, source: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = calibrate(decoder, random_traces(decoder, source, "p", 12), confidence_level=None, max_loss=0.9, **QUICK)
    slowly = write_calibration

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)
        slowly(*arguments)

    monkeypatch.setattr("specexit.training.calibrate.write_calibration", slow)
    names = [f"rule{n}" for n in range(6)]
    threads = [Thread(target=write, args=(result, folder, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_calibration(folder)
    assert found is not None
    assert sorted(found["rules"]) == names


def test_a_draft_with_new_weights_is_calibrated_again(
    folder: Path, tmp_path: Path, decoder: SpecExitDecoder, source: random.Random
) -> None:
    """Rules of the old ones are in the way of decoding, which says so: calibrate again."""
    traces = save(tmp_path / "cal.jsonl", random_traces(decoder, source, "p", 12), **GREEDY)
    command = ["calibrate", "--model", str(bundled_pair().base), "--draft", str(folder), "--device", "cpu"]
    command += ["--traces", str(traces), "--estimate", "--max-loss", "0.9", "--smoothing", "none"]
    assert main(command) == 0
    tensors = load_file(folder / "model.safetensors")
    save_file({name: -x if x.is_floating_point() else x for name, x in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="belongs to other weights of the draft: calibrate again"):
        SpecExitDecoder.from_pretrained(bundled_pair().base, folder, device="cpu")
    assert main(command) == 0
    SpecExitDecoder.from_pretrained(bundled_pair().base, folder, device="cpu")


def test_what_cannot_be_is_said_before_signals_are_read(
    folder: Path,
    tmp_path: Path,
    decoder: SpecExitDecoder,
    source: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it took a long time")

    monkeypatch.setattr("specexit.training.signals.record_signals", never)
    traces = random_traces(decoder, source, "p", 4)
    files = [str(save(tmp_path / name, part, **GREEDY)) for name, part in (("a", traces[:2]), ("b", traces[2:]))]
    pair = ["--model", str(bundled_pair().base), "--draft", str(folder), "--device", "cpu"]
    for changes, message in (
        (["--max-loss", "2"], "max_loss must be between 0 and 1, was 2"),
        (["--smoothing", "rough"], "smoothing must be some of none, ewma"),
        (["--source", "head"], "sources must be some of fc, output"),
        (["--use", "luck"], "use must be some of confidence"),
        (["--seed", str(10**20)], "seed must be below 2**31 - 1"),
        (["--traces", files[0]], "sample 0 of 'p0' was there before"),
    ):
        assert main(["calibrate", *pair, "--traces", files[0], *changes]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    ablating = ["train", "ablate", *pair, "--calibration", files[0], "--output", str(tmp_path / "tables")]
    for test, changes, message in (
        (files[1], ["--timed", "3"], "timed must be between 0 and 2, was 3"),
        (files[1], ["--max-loss", "-1"], "losses must be between 0 and 1"),
    ):
        assert main([*ablating, "--test", test, *changes]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "tables" / "ablation.md").mkdir()
    assert main([*ablating, "--test", files[1]]) == 2
    assert "--output must be a file" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_ends_a_calibration_as_a_failed_run(
    folder: Path, tmp_path: Path, decoder: SpecExitDecoder, source: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = save(tmp_path / "cal.jsonl", random_traces(decoder, source, "p", 12), **GREEDY)
    command = ["calibrate", "--model", str(bundled_pair().base), "--draft", str(folder), "--device", "cpu"]
    command += ["--traces", str(traces), "--estimate", "--max-loss", "0.9", "--smoothing", "none"]
    assert main(command) == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with largest_file(100):
        assert main([*command, "--name", "more"]) == 1
    assert str(folder / "calibration.json") in "".join(capsys.readouterr().err.split())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
