"""Annotated traces of thinking, and the file they are kept in: one JSON object a line, the first of them a header.

A file is only ever appended to, line by line, so a run that is killed loses the trace it was at, and no other: the next
run with the same settings reads what is there, drops a line that was cut off, and goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from specexit.files import naming

FORMAT = "specexit-traces"
VERSION = 1


_LISTS: tuple[tuple[str, type, str], ...] = (
    *((name, int, "ints") for name in ("prompt", "thinking", "reply", "boundaries")),
    *((name, bool, "bools") for name in ("agrees", "correct")),
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One text of a base, and what the base answers when its thinking is ended at each paragraph.

    id, sample      of the problem, and which of its samples this is
    prompt          ids before the thinking: they end inside it, behind the start marker
    thinking        ids of the thinking, its end marker not among them
    reply           ids from the end marker on
    boundaries      thinking tokens up to and including each paragraph's end, ascending: the places where it can be cut
    answers         the answer at each of them; None: the extractor finds none there
    probabilities   geometric mean of the probabilities of that answer's tokens; 0 where there is none
    agrees          whether it is the final answer
    correct         whether it is right; None where the right answer is not known
    final           the answer after the whole thinking
    final_correct   whether that is right; None where the right answer is not known
    sufficient      thinking tokens up to the first boundary from which on every answer is the final one; all of them,
                    where there is none
    generated       tokens that this trace cost: the text, and the answers at its boundaries
    flaw            why the trace cannot be used (then only the ids and `generated` mean anything); None: it can be
    """

    id: str
    sample: int = 0
    prompt: list[int]
    thinking: list[int]
    reply: list[int]
    boundaries: list[int]
    answers: list[str | None]
    probabilities: list[float]
    agrees: list[bool]
    correct: list[bool] | None = None
    final: str | None = None
    final_correct: bool | None = None
    sufficient: int = 0
    generated: int = 0
    flaw: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise ValueError(f"id must be a text, was {self.id!r}")
        for name, kind, many in _LISTS:
            values = getattr(self, name)
            if values is None and name == "correct":
                continue
            if not isinstance(values, list) or set(map(type, values)) - {kind}:
                raise ValueError(f"{name} must be a list of {many}, was {_shorten(values)}")
            if kind is int and min(values, default=0) < 0:
                raise ValueError(f"{name} must hold no number below 0, held {min(values)}")
        if self.flaw is not None:
            return
        count = len(self.boundaries)
        for name in ("answers", "probabilities", "agrees", "correct"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"{name} must have one entry for each of {count} boundaries, had {len(values)}")
        if any(not a < b for a, b in zip([0, *self.boundaries], self.boundaries, strict=False)):
            raise ValueError(f"boundaries must ascend from 1 on, were {self.boundaries}")
        if self.boundaries and self.boundaries[-1] > len(self.thinking):
            raise ValueError(
                f"boundaries must lie in the thinking of {len(self.thinking)} tokens, were {self.boundaries}"
            )
        if not self.prompt or not self.thinking or not self.reply:
            raise ValueError("prompt, thinking and reply must hold tokens, one was empty")
        if self.final is None:
            raise ValueError("final must be the final answer, was None")
        if (self.correct is None) != (self.final_correct is None):
            raise ValueError("correct and final_correct must both be given or both be None")
        if not all(math.isfinite(p) and 0 <= p <= 1 for p in self.probabilities):
            raise ValueError("probabilities must be between 0 and 1")

    @property
    def tokens(self) -> list[int]:
        """The whole text."""
        return [*self.prompt, *self.thinking, *self.reply]


def sufficient_length(boundaries: list[int], agrees: list[bool], thinking: int) -> int:
    """Thinking tokens up to the first boundary from which on every answer is the final one; all where there is none."""
    first = len(agrees)
    while first and agrees[first - 1]:
        first -= 1
    return boundaries[first] if first < len(boundaries) else thinking


class TraceFile:
    """A file of traces that is made, or gone on with: `with TraceFile(path, header) as file: file.append(trace)`.

    header  what the traces are made with, as JSON: a file that was made with something else is refused
    done    (id, sample) of the traces that the file holds

    While it is open no other process can append to it. Raises ValueError where the file is something else, was made
    with something else, or is open elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **header}))
        self.done: set[tuple[str, int]] = set()

    def __enter__(self) -> TraceFile:
        self._file = open(self.path, "a+b")
        try:
            _lock(self._file, self.path)
            self._file.seek(0)
            content = self._file.read()
            whole = _whole_lines(content)  # a line without its end was cut off by a kill
            if whole:
                header, traces = _parse(whole, self.path)
                _check_header(header, self.header, self.path)
                self.done = {(trace.id, trace.sample) for trace in traces}
            elif not _line(self.header).startswith(content):
                raise ValueError(f"{self.path} must be a file of traces, began with {_shown(content)}")
            self._file.truncate(len(whole))
            if not whole:
                self._write(self.header)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with nullcontext() if kind is None else suppress(OSError):  # of a full disk: the first error says it
            self._file.close()

    def append(self, trace: Trace) -> None:
        """Write a trace; when this returns, a kill of the process cannot lose it."""
        if (trace.id, trace.sample) in self.done:
            raise ValueError(f"{self.path} has sample {trace.sample} of problem {trace.id!r} already")
        self._write(asdict(trace))
        self.done.add((trace.id, trace.sample))

    def _write(self, content: Mapping[str, Any]) -> None:
        with naming(self.path):
            self._file.write(_line(content))
            self._file.flush()


def read_traces(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Trace]]:
    """The header and the traces of a file, those with a flaw too; a last line that was cut off is left out.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    return _parse(_whole_lines(Path(path).read_bytes()), Path(path))


def read_trace_files(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[dict[str, Any]], list[Trace]]:
    """The headers of several files, and their traces in turn. Raises ValueError where there are no files."""
    if not paths:
        raise ValueError("traces must be one file or several, were none")
    files = [read_traces(path) for path in paths]
    return [header for header, _ in files], [trace for _, traces in files for trace in traces]


def require_alike(headers: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Raise ValueError where the headers of files differ in one of `keys`."""
    for key in keys:
        found = dict.fromkeys(_shorten(header.get(key)) for header in headers)
        if len(found) > 1:
            raise ValueError(f"traces must be of one {key.replace('_', ' ')}, were of {' and '.join(found)}")


def usable(traces: Iterable[Trace]) -> list[Trace]:
    """Those without a flaw that can be cut somewhere."""
    return [trace for trace in traces if trace.flaw is None and trace.boundaries]


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _parse(content: bytes, path: Path) -> tuple[dict[str, Any], list[Trace]]:
    lines = content.split(b"\n")[:-1]
    if not lines:
        raise ValueError(f"{path} must begin with the header of a file of traces, was empty")
    header = parse_object(lines[0], path, 1)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} must begin with the header of a file of traces, began with {_shown(lines[0])}")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} must be of version {VERSION}, was {header.get('version')!r}")
    return header, [_trace(parse_object(line, path, at), path, at) for at, line in enumerate(lines[1:], 2)]


def parse_object(line: bytes, path: Path, at: int) -> dict[str, Any]:
    """The JSON object in a line of a file. Raises ValueError that names the file and the line where it is none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {at} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}, line {at} must be a JSON object, was {_shown(line.strip())}")
    return content


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def _trace(content: dict[str, Any], path: Path, at: int) -> Trace:
    known = {field.name for field in fields(Trace)}
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"{path}, line {at} has what no trace has: {', '.join(unknown)}")
    try:
        return Trace(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {at} is not a trace: {error}") from error


def _check_header(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where a file was made with something else."""
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} was made with another {key}: {_shorten(found.get(key))}, now {_shorten(wanted.get(key))};"
                " give another file, or the settings that it was made with"
            )


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."  # a tokenizer may have hundreds of boundary ids


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes from appending while `file` is open. Where the system has no such lock, nothing is kept."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another process") from None
    except OSError:  # a file system without locks
        return
