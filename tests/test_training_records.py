"""Traces and their file: what a trace must be, appending, going on after a kill, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specexit.training.records import Trace, TraceFile, read_traces, sufficient_length, usable

HEADER = {"base": "b", "seed": 1, "markers": {"end": (6,)}}


def make(rng: torch.Generator, id: str = "p", sample: int = 0) -> Trace:
    """A trace of random sizes."""
    size = int(torch.randint(1, 30, (), generator=rng))
    boundaries = [n for n in range(1, size + 1) if torch.rand((), generator=rng) < 0.3]
    agrees = [bool(torch.rand((), generator=rng) < 0.5) for _ in boundaries]
    return Trace(
        id=id,
        sample=sample,
        prompt=[1, 2],
        thinking=torch.randint(0, 99, (size,), generator=rng).tolist(),
        reply=[6, 3],
        boundaries=boundaries,
        answers=["é" if agree else None for agree in agrees],
        probabilities=[float(torch.rand((), generator=rng)) for _ in boundaries],
        agrees=agrees,
        correct=agrees,
        final="é",
        final_correct=True,
        sufficient=sufficient_length(boundaries, agrees, size),
        generated=size + 2,
    )


def flawed(id: str) -> Trace:
    return Trace(
        id=id, prompt=[], thinking=[], reply=[], boundaries=[], answers=[], probabilities=[], agrees=[], flaw="empty"
    )


def write(path: Path, traces: list[Trace]) -> None:
    with TraceFile(path, HEADER) as file:
        for trace in traces:
            file.append(trace)


def test_what_was_written_is_read(tmp_path: Path, rng: torch.Generator) -> None:
    traces = [make(rng, str(n), n % 2) for n in range(9)] + [flawed("x")]
    write(tmp_path / "t", traces)
    header, found = read_traces(tmp_path / "t")
    assert found == traces
    assert header == {"format": "specexit-traces", "version": 1, "base": "b", "seed": 1, "markers": {"end": [6]}}
    assert usable(found) == [trace for trace in traces if trace.boundaries]


def test_a_file_cut_anywhere_loses_the_line_it_is_cut_in_and_goes_on(tmp_path: Path, rng: torch.Generator) -> None:
    """At every byte, the header's among them."""
    path, traces = tmp_path / "t", [make(rng, "ä"), flawed("b")]
    write(path, traces)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        with TraceFile(path, HEADER) as file:
            assert file.done == {(trace.id, trace.sample) for trace in traces[: max(kept - 1, 0)]}
            assert path.read_bytes() == b"".join(lines[: max(kept, 1)])
            for trace in traces:
                if (trace.id, trace.sample) not in file.done:
                    file.append(trace)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert read_traces(path)[1] == traces[:1]


def test_each_trace_is_there_when_append_returns(tmp_path: Path, rng: torch.Generator) -> None:
    with TraceFile(tmp_path / "t", HEADER) as file:
        for n in range(3):
            file.append(make(rng, str(n)))
            assert len(read_traces(tmp_path / "t")[1]) == n + 1


def test_a_trace_is_not_written_twice(tmp_path: Path, rng: torch.Generator) -> None:
    write(tmp_path / "t", [make(rng, "a", 1)])
    with TraceFile(tmp_path / "t", HEADER) as file:
        file.append(make(rng, "a", 2))
        with pytest.raises(ValueError, match="has sample 1 of problem 'a' already"):
            file.append(make(rng, "a", 1))


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path, rng: torch.Generator) -> None:
    path = tmp_path / "t"
    write(path, [make(rng)])
    before = path.read_bytes()
    for changes, message in (
        ({"seed": 2}, "made with another seed: 1, now 2"),
        ({"base": "c"}, "made with another base: 'b', now 'c'"),
        ({"more": 1}, "made with another more: None, now 1"),
    ):
        with pytest.raises(ValueError, match=message), TraceFile(path, {**HEADER, **changes}):
            pass
    assert path.read_bytes() == before


def test_another_process_may_not_write_at_the_same_time(tmp_path: Path) -> None:
    with (
        TraceFile(tmp_path / "t", HEADER),
        pytest.raises(ValueError, match="is being written by another"),
        TraceFile(tmp_path / "t", HEADER),
    ):
        pass
    with TraceFile(tmp_path / "t", HEADER):  # nor does the lock outlive the file
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes that end with no line feed", "must be a file of traces, began with 'notes that"),
        (b"{}\n", "must begin with the header of a file of traces"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
        (b'{"format": "specexit-traces", "version": 2}\n', "must be of version 1, was 2"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message), TraceFile(path, HEADER):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 3 is not JSON"),
        ("[]", r"line 3 must be a JSON object, was '\[\]'"),
        ('{"id": "q"}', "line 3 is not a trace: .*prompt"),
        ('{"id": "q", "colour": 1}', "line 3 has what no trace has: colour"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, rng: torch.Generator, line: str, message: str) -> None:
    write(tmp_path / "t", [make(rng)])
    with open(tmp_path / "t", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_traces(tmp_path / "t")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "t").touch()
    with pytest.raises(ValueError, match="was empty"):
        read_traces(tmp_path / "t")
    with pytest.raises(FileNotFoundError):
        read_traces(tmp_path / "none")


GOOD = Trace(
    id="p",
    prompt=[1],
    thinking=[5, 7, 5, 7],
    reply=[6],
    boundaries=[2, 4],
    answers=["a", "b"],
    probabilities=[0.5, 1.0],
    agrees=[False, True],
    final="b",
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ["a"]}, "answers must have one entry for each of 2 boundaries, had 1"),
        ({"correct": [True]}, "correct must have one entry"),
        ({"boundaries": [4, 2]}, "boundaries must ascend from 1 on"),
        ({"boundaries": [0, 2]}, "boundaries must ascend from 1 on"),
        ({"boundaries": [2, 5]}, "boundaries must lie in the thinking of 4 tokens"),
        ({"reply": []}, "prompt, thinking and reply must hold tokens"),
        ({"final": None}, "final must be the final answer"),
        ({"final_correct": True}, "correct and final_correct must both be given"),
        ({"probabilities": [0.5, float("nan")]}, "probabilities must be between 0 and 1"),
        ({"probabilities": [0.5, 1.1]}, "probabilities must be between 0 and 1"),
    ],
)
def test_what_a_trace_must_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **changes)
    replace(GOOD, flaw="empty", **changes)  # nothing is asked of one that is not used
    json.dumps(asdict(GOOD))


def test_sufficient_length_is_the_first_place_after_which_all_agree(rng: torch.Generator) -> None:
    for _ in range(200):
        trace = make(rng)
        expected = len(trace.thinking)
        for n, boundary in enumerate(trace.boundaries):
            if all(trace.agrees[n:]):
                expected = boundary
                break
        assert sufficient_length(trace.boundaries, trace.agrees, len(trace.thinking)) == expected
    assert sufficient_length([], [], 7) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [1.5]}, "prompt must be a list of ints, was \\[1.5\\]"),
        ({"thinking": "1234"}, "thinking must be a list of ints, was '1234'"),
        ({"reply": [-1]}, "reply must hold no number below 0, held -1"),
        ({"boundaries": [True, 2]}, "boundaries must be a list of ints"),
        ({"agrees": None}, "agrees must be a list of bools, was None"),
        ({"agrees": ["yes", "no"]}, "agrees must be a list of bools"),
        ({"correct": [1, 0]}, "correct must be a list of bools"),
        ({"id": 5}, "id must be a text, was 5"),
    ],
)
@pytest.mark.parametrize("flaw", [None, "empty"])
def test_what_the_fields_of_any_trace_must_be(changes: dict[str, Any], message: str, flaw: str | None) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GOOD, flaw=flaw, **changes)
