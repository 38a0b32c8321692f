"""Texts of a base: what it was asked, its thinking and its reply, as it sampled them or as a file has them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specexit import checks
from specexit.thinking import Markers, is_thinking
from specexit.training.problems import Problem, id_of, read_lines

# Why a text cannot be annotated.
UNBEGUN = "the thinking did not begin"
UNENDED = "the thinking did not end within max_new_tokens"
STOPPED = "the text ended inside the thinking"
EMPTY = "the thinking is empty"
CUT = "the reply did not end within max_new_tokens"
NO_ANSWER = "the reply holds no answer that the extractor finds"


@dataclass(frozen=True)
class Text:
    """A prompt and what the base made of it, in ids, parted as a `Trace` is.

    sample    which of the problem's samples this is
    prompt    up to the thinking; more than the problem's where the base began the thinking itself
    thinking  without its end marker
    reply     from the end marker on
    written   tokens that the base wrote
    cut       whether it would have gone on
    flaw      why it cannot be annotated; None: it can, as far as its markers say
    """

    problem: Problem
    sample: int
    prompt: list[int]
    thinking: list[int]
    reply: list[int]
    written: int
    cut: bool = False
    flaw: str | None = None


def part(
    problem: Problem,
    sample: int,
    completion: Sequence[int],
    markers: Markers,
    cut: bool = False,
    assume: bool | None = None,
) -> Text:
    """Part a completion at its markers: the first thinking counts, and everything behind it is the reply.

    cut     whether the base would have gone on
    assume  whether the prompt ends inside the thinking; None: its last marker says
    """
    ids = [*problem.prompt, *completion]
    start: int | None = len(problem.prompt)
    if not is_thinking(problem.prompt, markers, assume):
        # The marker may reach back into the prompt; one that lies in it has been followed by an end.
        start = _behind(ids, markers.start, max(len(problem.prompt) - len(markers.start) + 1, 0))
    if start is None:
        flaw = UNENDED if cut else UNBEGUN
        return Text(problem, sample, list(problem.prompt), list(completion), [], len(completion), cut, flaw)
    behind = _behind(ids, markers.end, start)
    end = len(ids) if behind is None else behind - len(markers.end)
    text = Text(problem, sample, ids[:start], ids[start:end], ids[end:], len(completion), cut)
    if behind is None:
        return replace(text, flaw=UNENDED if cut else STOPPED)
    return replace(text, flaw=EMPTY) if end == start else text


def reply_ids(text: Text, markers: Markers) -> list[int]:
    """The reply without what leads to it: the end of thinking, and what else the base puts before an answer."""
    for marker in (markers.force, markers.end):
        if tuple(text.reply[: len(marker)]) == marker:
            return text.reply[len(marker) :]
    return text.reply


def read_texts(
    path: str | os.PathLike[str],
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    vocabulary: int,
    assume: bool | None = None,
) -> list[Text]:
    """Texts that exist: lines with the `id` of a problem, `completion` (a text) or `completion_ids`, and `sample` where
    a problem has several.

    vocabulary  V: ids that the base has
    assume      as for `part`

    Raises FileNotFoundError, or ValueError that names the file, the line and what is missing.
    """
    known = {problem.id: problem for problem in problems}
    texts: dict[tuple[str, int], Text] = {}
    for at, content in read_lines(path):
        try:
            text = _text(content, known, tokenizer, markers, vocabulary, assume)
            key = text.problem.id, text.sample
            if key in texts:
                raise ValueError(f"sample {text.sample} of {text.problem.id!r} was there before")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {at}: {error}") from error
        texts[key] = text
    if not texts:
        raise ValueError(f"{path} must hold texts, was empty")
    return list(texts.values())


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _text(
    content: dict[str, Any],
    problems: dict[str, Problem],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    vocabulary: int,
    assume: bool | None,
) -> Text:
    name = id_of(content)
    if name not in problems:
        raise ValueError(f"id must be that of a problem, was {name!r}")
    sample = content.get("sample", 0)
    checks.integer("sample", sample, 0)
    written, ids = content.get("completion"), content.get("completion_ids")
    if (written is None) == (ids is None):
        raise ValueError("completion or completion_ids must be given, and not both")
    if ids is None:
        if not isinstance(written, str):
            raise TypeError(f"completion must be a text, was {type(written).__name__}")
        ids = tokenizer.encode(written, add_special_tokens=False)
    checks.ids("completion_ids", ids)
    if max(ids, default=0) >= vocabulary:
        raise ValueError(
            f"completion_ids must be in [0, {vocabulary}), the base's vocabulary, was {max(ids)}:"
            " are they of another tokenizer?"
        )
    text = part(problems[name], sample, ids, markers, assume=assume)
    if text.flaw in (UNBEGUN, STOPPED):
        marker, what = (markers.start, "start") if text.flaw == UNBEGUN else (markers.end, "end")
        spelt = tokenizer.decode(list(marker))
        raise ValueError(
            f"the text must have {'a' if what == 'start' else 'an'} {what} of thinking, had none: "
            + (
                f"it holds {spelt!r}, but its ids do not hold {list(marker)}: is it of another tokenizer?"
                if isinstance(written, str) and spelt.strip() in written
                else f"no {spelt.strip()!r} (ids {list(marker)})"
            )
        )
    return text


def _behind(ids: list[int], marker: tuple[int, ...], start: int) -> int | None:
    """Behind the first marker that begins at `start` or later; None: there is none."""
    size = len(marker)
    for at in range(start, len(ids) - size + 1 if size else 0):
        if tuple(ids[at : at + size]) == marker:
            return at + size
    return None
