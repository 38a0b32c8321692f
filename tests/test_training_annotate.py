"""Annotating: traces against plain decoding, runs that are killed and gone on with, flaws, and the command."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_files import largest_file
from training_cases import fresh_model, write_texts

from specexit import ExitConfig, SpecExitDecoder, bundled_pair
from specexit.cli import main
from specexit.identity import fingerprint
from specexit.training.annotate import NothingUsable, annotate
from specexit.training.annotator import Annotator
from specexit.training.answers import Found
from specexit.training.calibrate import temperature_of
from specexit.training.problems import Problem, read_problems
from specexit.training.records import Trace, read_traces
from specexit.training.sample import seed_of
from specexit.training.texts import CUT, NO_ANSWER, STOPPED, UNENDED, Text, part

NUMBERS: dict[str, Any] = {"extractor": "last-number", "max_answer_tokens": 12}


@pytest.fixture(scope="module")
def decoder() -> SpecExitDecoder:
    """The bundled pair: a base that thinks, and is right."""
    torch.set_num_threads(1)
    pair = bundled_pair()
    return SpecExitDecoder.from_pretrained(pair.base, pair.draft)


@pytest.fixture(scope="module")
def everything(decoder: SpecExitDecoder) -> list[Problem]:
    """The shortest ones first: they have two steps."""
    assert decoder.tokenizer is not None
    found = read_problems(bundled_pair().test, decoder.tokenizer)
    return sorted(found, key=lambda problem: len(problem.prompt))[:60]


@pytest.fixture
def problems(everything: list[Problem], rng: torch.Generator) -> list[Problem]:
    """Three of them, others every time."""
    return [everything[n] for n in torch.randperm(len(everything), generator=rng)[:3].tolist()]


@pytest.fixture(scope="module")
def sampled(decoder: SpecExitDecoder, everything: list[Problem], tmp_path_factory: Any) -> list[Trace]:
    """Traces of a few random problems."""
    path = tmp_path_factory.mktemp("sampled") / "t.jsonl"
    annotate(decoder, random.sample(everything, 4), path, **NUMBERS)
    return read_traces(path)[1]


def as_set(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The header and the lines of a file; a line that is there twice is an error."""
    header, traces = read_traces(path)
    found = [json.dumps(asdict(trace)) for trace in traces]
    assert len(set(found)) == len({(trace.id, trace.sample) for trace in traces}) == len(found)
    return header, set(found)


def text_of(trace: Trace, problems: list[Problem], decoder: SpecExitDecoder, **changes: Any) -> Text:
    problem = next(problem for problem in problems if problem.id == trace.id)
    return part(replace(problem, **changes), 0, [*trace.thinking, *trace.reply], decoder.planner.markers(ExitConfig()))


def digit_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)}


# --- traces


def test_every_answer_is_what_plain_decoding_gives_and_as_likely(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace]
) -> None:
    tokenizer: Any = decoder.tokenizer
    digits = digit_ids(tokenizer)
    markers, stop = decoder.planner.markers(ExitConfig()), tokenizer.eos_token_id
    (end,) = markers.end
    for trace in sampled:
        problem = next(problem for problem in everything if problem.id == trace.id)
        assert trace.flaw is None
        assert trace.prompt == list(problem.prompt)
        assert trace.thinking.count(end) == 0
        assert trace.reply[0] == end
        assert trace.boundaries == [
            n for n in range(1, len(trace.thinking) + 1) if trace.thinking[n - 1] in markers.boundary
        ]
        generated = len(trace.thinking) + len(trace.reply)
        for n, answer, probability in zip(trace.boundaries, trace.answers, trace.probabilities, strict=True):
            prompt = [*trace.prompt, *trace.thinking[:n], end]
            out = decoder.generate(torch.tensor([prompt]), max_new_tokens=12, exit=ExitConfig.off())
            tokens = out.new_tokens[0]
            assert tokens[-1] == stop
            generated += len(tokens)
            at = [index for index, token in enumerate(tokens) if token in digits]
            assert answer == "".join(tokenizer.convert_ids_to_tokens(tokens[index]) for index in at)
            assert len(at) == 2
            with torch.no_grad():
                logits = decoder.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
            likely = [logits.softmax(-1)[index, tokens[index]].item() for index in at]
            assert probability == pytest.approx(math.sqrt(math.prod(likely)), abs=1e-4)
        assert trace.generated == generated
        if trace.boundaries[-1] == len(trace.thinking):  # cut where it ended by itself
            assert trace.final == trace.answers[-1]
        assert trace.agrees == [answer == trace.final for answer in trace.answers]
        assert trace.correct == [answer == problem.answer for answer in trace.answers]
        assert trace.final_correct == (trace.final == problem.answer)
        first = next((n for n in range(len(trace.agrees)) if all(trace.agrees[n:])), None)
        assert trace.sufficient == (len(trace.thinking) if first is None else trace.boundaries[first])


def test_only_what_is_generated_counts_behind_a_prefix(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace]
) -> None:
    """The prefix holds the answer's first digit: the second alone is the base's."""
    tokenizer: Any = decoder.tokenizer
    trace = sampled[0]
    (end,) = decoder.planner.markers(ExitConfig()).end
    first = next(n for n, token in enumerate(trace.reply) if token in digit_ids(tokenizer))
    prefix = tokenizer.decode(trace.reply[1 : first + 1])
    assert tokenizer.encode(prefix, add_special_tokens=False) == trace.reply[1 : first + 1]
    annotator = Annotator(decoder, "last-number", answer_prefix=prefix, max_answer_tokens=6)
    found = annotator.trace(text_of(trace, everything, decoder))
    n, answer, probability = found.boundaries[-1], found.answers[-1], found.probabilities[-1]
    known = [*trace.prompt, *trace.thinking[:n], end, *trace.reply[1 : first + 1]]
    with torch.no_grad():
        best = decoder.model(torch.tensor([known])).logits[0, -1].softmax(-1).max(-1)
    assert answer == tokenizer.decode(trace.reply[first]) + tokenizer.convert_ids_to_tokens(int(best.indices))
    assert probability == pytest.approx(best.values.item(), abs=1e-4)
    assert found.final == trace.final


def test_an_answer_that_the_limit_may_have_cut_is_none(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace]
) -> None:
    """Of a reply like "The answer is 0 7 .", cut before its first digit, behind it, behind its last, and one later."""
    trace, digits = sampled[0], digit_ids(decoder.tokenizer)
    last = max(n for n, token in enumerate(trace.reply) if token in digits)  # tokens up to it, the marker left out
    for limit, there in ((last - 2, False), (last - 1, False), (last, False), (last + 1, True)):
        found = Annotator(decoder, "last-number", max_answer_tokens=limit).trace(text_of(trace, everything, decoder))
        assert found.flaw is None
        assert (found.answers[-1] is not None) == (found.probabilities[-1] > 0) == there
        if not there:
            assert found.sufficient == len(trace.thinking)


class TwoDigits:
    """Knows when it has seen enough."""

    def find(self, text: str) -> Found | None:
        found = re.search("[0-9]{2}", text)
        return found and Found(found.group(), *found.span())

    def same(self, a: str, b: str) -> bool:
        return a == b

    def complete(self, text: str) -> bool:
        return self.find(text) is not None


def test_answers_end_where_the_extractor_has_seen_enough(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace]
) -> None:
    trace, digits = sampled[0], digit_ids(decoder.tokenizer)
    last = max(n for n, token in enumerate(trace.reply) if token in digits)
    text = text_of(trace, everything, decoder)
    found = Annotator(decoder, TwoDigits(), max_answer_tokens=last).trace(text)
    assert found.answers[-1] == trace.answers[-1]  # though the limit ends it right behind the answer
    assert Annotator(decoder, TwoDigits(), max_answer_tokens=99).trace(text).generated < trace.generated


def test_the_tokens_of_an_answer_are_those_that_spell_it(decoder: SpecExitDecoder, rng: torch.Generator) -> None:
    """Tokens that are bytes: an answer's are its bytes that are generated, whatever characters stand around it."""
    annotator = Annotator(decoder, "regex:<(.*?)>")
    annotator._decode = lambda ids: bytes(ids).decode(errors="replace")  # type: ignore[method-assign]
    for _ in range(50):
        a, b, c = (
            "".join("aé中😀"[n] for n in torch.randint(0, 4, (size,), generator=rng).tolist())
            for size in torch.randint(1, 6, (3,), generator=rng).tolist()
        )
        before, inside = f"{a}<".encode(), b.encode()
        found = annotator._read_answer((*before, *inside, *f">{c}".encode()))
        assert found is not None
        assert found.text == b
        assert found.tokens == list(range(len(before), len(before) + len(inside)))
        # With a prefix that reaches into the answer, or up to its end: then none of it is generated.
        for known in range(len(inside) + 1):
            annotator.prefix = [*before, *inside[:known]]
            found = annotator._read_answer((*inside[known:], *f">{c}".encode()))
            assert (None if found is None else found.tokens) == (list(range(len(inside) - known)) or None)
        annotator.prefix = []


def test_texts_do_not_depend_on_the_draft_the_slots_the_order_or_the_run(
    decoder: SpecExitDecoder, problems: list[Problem], tmp_path: Path
) -> None:
    """Sampled ones; the second run is made of two, of other samples and in another order."""
    options: dict[str, Any] = {**NUMBERS, "temperature": 0.8, "seed": 5, "max_new_tokens": 400}
    problems = problems[:2]
    annotate(decoder, problems, tmp_path / "one", samples=2, slots=4, **options)
    plain = SpecExitDecoder(decoder.model, tokenizer=decoder.tokenizer)
    annotate(plain, problems, tmp_path / "two", samples=1, slots=1, limit=1, **options)
    report = annotate(plain, problems, tmp_path / "two", samples=2, slots=3, **options)
    assert as_set(tmp_path / "one") == as_set(tmp_path / "two")
    assert report.traces == 4
    assert report.run.traces == 3


def test_each_text_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, id, sample) for seed in range(5) for id in ("a", "b", "1 a") for sample in range(5)}
    assert len(seeds) == 75
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert seed_of(1, "a", 2) == seed_of(1, "a", 2)


def test_texts_that_exist_are_annotated_as_sampled_ones(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace], tmp_path: Path
) -> None:
    tokenizer: Any = decoder.tokenizer
    with open(tmp_path / "texts", "w") as file:
        for n, trace in enumerate(sampled):
            ids = [*trace.thinking, *trace.reply]
            written = {"completion_ids": ids} if n % 2 else {"completion": tokenizer.decode(ids)}
            file.write(json.dumps({"id": trace.id, **written}) + "\n")
    report = annotate(decoder, everything, tmp_path / "t", texts=tmp_path / "texts", **NUMBERS)
    header, found = read_traces(tmp_path / "t")
    assert found == sampled
    assert "sampling" not in header  # nobody said how they were sampled
    assert report.run.traces == len(sampled)
    again = annotate(decoder, everything, tmp_path / "t", texts=tmp_path / "texts", **NUMBERS)
    assert again.run.traces == 0
    assert again.traces == len(sampled)


def test_the_report_counts_what_the_traces_hold(
    decoder: SpecExitDecoder, problems: list[Problem], tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    report = annotate(
        decoder, problems, tmp_path / "t", progress=lambda done, total: told.append((done, total)), **NUMBERS
    )
    header, traces = read_traces(tmp_path / "t")
    assert told == [(n, 3) for n in range(4)]
    assert header["base"] == fingerprint(decoder.model)
    assert report.traces == report.usable == 3
    assert report.flaws == {}
    assert report.accuracy == sum(bool(trace.final_correct) for trace in traces) / 3
    assert report.thinking_tokens == pytest.approx(sum(len(trace.thinking) for trace in traces) / 3)
    assert report.sufficient_tokens == pytest.approx(sum(trace.sufficient for trace in traces) / 3)
    assert report.run.text_tokens == sum(len(trace.thinking) + len(trace.reply) for trace in traces)
    assert report.run.text_tokens + report.run.answer_tokens == sum(trace.generated for trace in traces)
    assert report.text_tokens == pytest.approx(report.run.text_tokens / 3)
    assert report.answer_tokens == pytest.approx(report.run.answer_tokens / 3)


# --- flaws


def test_texts_that_do_not_end_are_kept_and_counted(
    decoder: SpecExitDecoder, problems: list[Problem], sampled: list[Trace], tmp_path: Path
) -> None:
    with pytest.raises(NothingUsable, match=f"none of 3 traces can be used; of 3, {UNENDED}: .* more max_new_tokens"):
        annotate(decoder, problems, tmp_path / "t", **NUMBERS, max_new_tokens=20)
    _, traces = read_traces(tmp_path / "t")
    assert [trace.flaw for trace in traces] == [UNENDED] * 3
    assert all(len(trace.thinking) == trace.generated == 20 for trace in traces)
    with pytest.raises(NothingUsable):  # nothing is sampled again
        annotate(decoder, problems, tmp_path / "t", **NUMBERS, max_new_tokens=20)
    assert read_traces(tmp_path / "t")[1] == traces


def test_a_reply_that_is_cut_is_a_flaw_unless_its_answer_is_complete(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace]
) -> None:
    text = text_of(sampled[0], everything, decoder)
    numbers, own = (Annotator(decoder, extractor, max_answer_tokens=12) for extractor in ("last-number", TwoDigits()))
    assert numbers.trace(text).flaw is None
    cut = replace(text, cut=True)
    assert numbers.trace(cut).flaw == CUT
    assert own.trace(cut).flaw is None
    assert own.trace(replace(cut, reply=cut.reply[:2])).flaw == CUT
    assert own.trace(replace(text, reply=text.reply[:2])).flaw == NO_ANSWER
    inside = part(text.problem, 0, text.thinking, decoder.planner.markers(ExitConfig()))
    assert own.trace(inside).flaw == STOPPED


def test_an_extractor_that_finds_nothing(decoder: SpecExitDecoder, problems: list[Problem], tmp_path: Path) -> None:
    with pytest.raises(NothingUsable, match=f"of 3, {NO_ANSWER}: what would help is another extractor") as raised:
        annotate(decoder, problems, tmp_path / "t", extractor="boxed")
    assert raised.value.report.flaws == {NO_ANSWER: 3}


def test_a_text_without_paragraphs(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace], tmp_path: Path
) -> None:
    ids = [*sampled[0].thinking, *sampled[0].reply]
    (tmp_path / "texts").write_text(json.dumps({"id": sampled[0].id, "completion_ids": ids}) + "\n")
    assert decoder.tokenizer is not None
    rule = ExitConfig(boundary_ids=[decoder.tokenizer.pad_token_id])
    with pytest.raises(NothingUsable, match=r"of 1, no paragraph ends in the thinking: .* other boundary_ids"):
        annotate(decoder, everything, tmp_path / "t", exit=rule, texts=tmp_path / "texts", **NUMBERS)
    (trace,) = read_traces(tmp_path / "t")[1]
    assert trace.flaw is None
    assert trace.sufficient == len(trace.thinking)


# --- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, was 0"),
        ({"slots": 0}, "slots must be at least 1, was 0"),
        ({"limit": 0}, "limit must be at least 1, was 0"),
        ({"seed": -1}, "seed must be at least 0, was -1"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, was -1"),
        ({"top_p": 2.0}, "top_p must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, was 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens must be at least 1, was 0"),
        ({"extractor": "box"}, "extractor must be one of boxed"),
        ({"answer_prefix": "unheard of"}, "answer_prefix must be a text that the tokenizer knows, was 'unheard of'"),
        ({"exit": ExitConfig(boundary_ids=[9999])}, r"boundary_ids must be in \[0, "),
    ],
)
def test_wrong_settings_are_named_before_anything_is_decoded(
    decoder: SpecExitDecoder, problems: list[Problem], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    def none(done: int, total: int) -> None:
        assert not done

    with pytest.raises(ValueError, match=message):
        annotate(decoder, problems, tmp_path / "t", progress=none, **{"extractor": "last-number", **options})


def test_wrong_problems_and_decoders(decoder: SpecExitDecoder, problems: list[Problem], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="problems must hold at least one, was empty"):
        annotate(decoder, [], tmp_path / "t")
    for prompt in ((1, decoder.base.vocab_size), ()):
        with pytest.raises(ValueError, match=r"problem 'x' must have a prompt of ids in \[0, "):
            annotate(decoder, [*problems, Problem("x", prompt)], tmp_path / "t")
    with pytest.raises(ValueError, match="decoder must have a tokenizer"):
        annotate(SpecExitDecoder(decoder.model), problems, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_file_made_with_other_settings_is_refused(
    decoder: SpecExitDecoder, problems: list[Problem], tmp_path: Path
) -> None:
    path = tmp_path / "t"
    with pytest.raises(NothingUsable):
        annotate(decoder, problems, path, max_new_tokens=2, **NUMBERS)
    before = path.read_bytes()
    other: dict[str, dict[str, Any]] = {
        "sampling": {"max_new_tokens": 3},
        "extractor": {"extractor": "text"},
        "answer_prefix": {"answer_prefix": "The"},
        "max_answer_tokens": {"max_answer_tokens": 3},
        "markers": {"exit": ExitConfig(boundary_ids=[8])},
    }
    for name, changes in other.items():
        with pytest.raises(ValueError, match=f"was made with another {name}:"):
            annotate(decoder, problems, path, **{**NUMBERS, "max_new_tokens": 2, **changes})
    with pytest.raises(ValueError, match="was made with another problems:"):
        annotate(decoder, problems[:2], path, max_new_tokens=2, **NUMBERS)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ("a", ValueError, r"extractor must find \(answer, start, end\) or None, .*\.Wrong found 'a'"),
        (("a", 3, 3), ValueError, "extractor must find an answer inside a text of"),
        (("a", 0, 9999), ValueError, "extractor must find an answer inside a text of"),
    ],
)
def test_an_extractor_of_your_own_that_is_wrong(
    decoder: SpecExitDecoder, everything: list[Problem], sampled: list[Trace], found: Any, error: Any, message: str
) -> None:
    class Wrong(TwoDigits):
        def find(self, text: str) -> Any:
            return found

    with pytest.raises(error, match=message):
        Annotator(decoder, Wrong()).trace(text_of(sampled[0], everything, decoder))


class Failing(TwoDigits):
    def find(self, text: str) -> Found | None:
        raise ZeroDivisionError("in mine")


class NeedsMore(TwoDigits):
    def __init__(self, more: int) -> None:
        raise AssertionError


NUMBER = 5


# --- the command


def command(*arguments: object) -> list[str]:
    return ["train", "annotate", *map(str, arguments)]


def test_a_killed_run_goes_on_and_nothing_is_lost_or_doubled(
    decoder: SpecExitDecoder, everything: list[Problem], tmp_path: Path
) -> None:
    """SIGKILL to a real process in the middle of its work; the file is then that of a run that was left alone."""
    ids = {problem.id for problem in random.sample(everything[:20], 4)}
    chosen = [line for line in bundled_pair().test.read_text().splitlines() if json.loads(line)["id"] in ids]
    (tmp_path / "p").write_text("\n".join(chosen))
    output = tmp_path / "killed"
    arguments = command(
        "--problems", tmp_path / "p", "--output", output, "--extractor", "last-number", "--max-answer-tokens", 12,
        "--temperature", 0.7, "--max-new-tokens", 400, "--slots", 3, "--seed", 3,
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "specexit", *arguments], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    process.kill()  # SIGKILL
    process.communicate()
    kept = output.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") >= 2
    assert main(arguments) == 0
    assert output.read_bytes().startswith(kept)

    assert decoder.tokenizer is not None
    asked = read_problems(tmp_path / "p", decoder.tokenizer)
    annotate(decoder, asked, tmp_path / "whole", temperature=0.7, max_new_tokens=400, seed=3, **NUMBERS)
    assert as_set(output) == as_set(tmp_path / "whole")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: Any) -> Path:
    return fresh_model(tmp_path_factory.mktemp("fresh"))


def test_a_fresh_model_from_the_command_line(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It never ends its thinking by itself; texts are given, longer than its window."""
    write_texts(tmp_path / "p", tmp_path / "texts", range(3))
    arguments = command(
        "--model", fresh, "--problems", tmp_path / "p", "--texts", tmp_path / "texts", "--output", tmp_path / "t",
        "--report", tmp_path / "r", "--extractor", "regex:v\\d+", "--max-answer-tokens", 4, "--answer-prefix", "v10 .",
        "--temperature", 0.7,
    )  # fmt: skip
    assert main(arguments) == 0
    header, traces = read_traces(tmp_path / "t")
    assert header["answer_prefix"] == "v10 ."
    assert temperature_of(header) == 0.7  # at which the texts were sampled, elsewhere
    assert all(len(trace.boundaries) == 12 and trace.final == "v30" for trace in traces)
    # The last match lies in the generated part, or, if that holds none, in the prefix, where it is no answer.
    for trace in traces:
        assert [answer is None for answer in trace.answers] == [p == 0 for p in trace.probabilities]
    report = json.loads((tmp_path / "r").read_text())
    assert (report["traces"], report["usable"], report["accuracy"]) == (3, 3, 1.0)
    printed = capsys.readouterr().out
    assert "traces: 3, usable: 3" in printed
    assert "right answers: 100.0%" in printed

    # Sampled, its texts have no end; the report is written all the same.
    sampling = command(
        "--model", fresh, "--problems", tmp_path / "p", "--output", tmp_path / "u", "--report", tmp_path / "r",
        "--max-new-tokens", 5, "--temperature", 1, "--samples", 2,
    )  # fmt: skip
    assert main(sampling) == 1
    assert "none of 6 traces can be used" in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "r").read_text())["flaws"] == {UNENDED: 6}
    assert main(sampling) == 1
    assert "has 6 of 6 traces already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--problems", "no.jsonl"], "--problems: there is no file no.jsonl"),
        (["--texts", "no.jsonl"], "--texts: there is no file no.jsonl"),
        (["--output", "no/such/t"], "--output: there is no directory no/such"),
        (["--output", "-"], "--output must be a file"),
        (["--report", "."], "--report must be a file"),
        (["--draft", "d"], "--draft needs --model"),
        (["--model", "./none"], "there is no folder ./none"),
        (["--extractor", "box"], "extractor must be one of"),
        (["--samples", "0"], "--samples"),
        (["--device", "gpu"], "--device must be cpu"),
    ],
)
def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str) -> None:
    arguments = command("--problems", bundled_pair().test, "--output", tmp_path / "t", *changes)
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Failing", "Failing must not fail, find('"),
        ("Failing", "raised ZeroDivisionError: in mine"),
        ("NeedsMore", "cannot be made: TypeError"),
        ("NUMBER", "has no find"),
        ("nothing", "must name something in test_training_annotate, which has no nothing"),
    ],
)
def test_an_extractor_of_your_own_fails_in_one_line(
    name: str, message: str, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").write_text('{"id": 1, "prompt": "v20 <think>"}\n')
    (tmp_path / "texts").write_text('{"id": 1, "completion": "v21 \\n\\n </think> v30"}\n')
    files = ["--problems", tmp_path / "p", "--texts", tmp_path / "texts", "--output", tmp_path / "t"]
    assert main(command("--model", fresh, *files, "--extractor", f"{__name__}:{name}")) == 2
    assert message in capsys.readouterr().err


def test_a_module_that_does_not_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "its_syntax_is_wrong.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "p").touch()
    files = ["--problems", tmp_path / "p", "--output", tmp_path / "t"]
    assert main(command(*files, "--extractor", "its_syntax_is_wrong:f")) == 2
    assert "cannot be imported: SyntaxError" in capsys.readouterr().err


def test_a_full_disk_loses_one_trace_at_most(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p").write_text("".join(f'{{"id": {n}, "prompt": "v20 <think>"}}\n' for n in range(4)))
    line = '{{"id": {}, "completion": "v21 v{} \\n\\n v30 \\n\\n </think> v30"}}\n'
    (tmp_path / "texts").write_text("".join(line.format(n, 40 + n) for n in range(4)))
    arguments = command("--model", fresh, "--problems", tmp_path / "p", "--texts", tmp_path / "texts")
    arguments += ["--extractor", "text", "--max-answer-tokens", "2", "--output"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    with largest_file((tmp_path / "whole").stat().st_size - 100):
        assert main([*arguments, str(tmp_path / "t")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and str(tmp_path / "t") in told[-1], told  # noqa: PT018
    assert main([*arguments, str(tmp_path / "t")]) == 0
    assert "has 3 of 4 traces already" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "t").read_bytes() == (tmp_path / "whole").read_bytes()


def test_help_needs_no_torch() -> None:
    code = """
import sys
from specexit.cli import main
assert main(["train", "annotate", "--help"]) == main(["train", "--help"]) == 0
assert main(["train", "annotate"]) == 2
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--answer-prefix" in done.stdout
