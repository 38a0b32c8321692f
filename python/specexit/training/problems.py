"""Problems to think about: a JSON object a line, with an id, what is asked, and perhaps the right answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specexit.training.records import parse_object

_ASKED = ("question", "prompt", "messages")


@dataclass(frozen=True)
class Problem:
    """What the base is asked.

    prompt  ids, the chat template's included
    answer  the right one; None: it is not known
    """

    id: str
    prompt: tuple[int, ...]
    answer: str | None = None


def read_problems(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Problem]:
    """The problems of a file, the first `limit` of them.

    A line has `id`; one of `question`, which becomes a message in the chat template, `messages`, which are a chat, and
    `prompt`, which is a text as it is; and `answer` where it is known. What else it has is left alone.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    problems: dict[str, Problem] = {}
    for at, content in read_lines(path):
        try:
            problem = _problem(content, tokenizer)
            if problem.id in problems:
                raise ValueError(f"id must be unique, {problem.id!r} was there before")
        except ValueError as error:
            raise ValueError(f"{path}, line {at}: {error}") from error
        problems[problem.id] = problem
        if limit is not None and len(problems) == limit:
            break
    if not problems:
        raise ValueError(f"{path} must hold problems, was empty")
    return list(problems.values())


def problems_fingerprint(problems: Sequence[Problem]) -> str:
    """Of what is asked and what is right."""
    content = [[problem.id, problem.prompt, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file that has one a line, each with its line's number; empty lines are left out.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    with open(path, "rb") as file:
        for at, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield at, parse_object(line, Path(path), at)


def id_of(content: dict[str, Any]) -> str:
    """Raises ValueError where there is none."""
    found = content.get("id")
    if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
        raise ValueError(f"id must be a text or an int, was {found!r}")
    return str(found)


def _problem(content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Problem:
    given = [name for name in _ASKED if content.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"one of {', '.join(_ASKED)} must be given, was {' and '.join(given) or 'none'}")
    answer = content.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float, type(None))):
        raise ValueError(f"answer must be a text or a number, was {type(answer).__name__}")
    ids = _encode(given[0], content[given[0]], tokenizer)
    if not ids:
        raise ValueError(f"{given[0]} must hold tokens, was {content[given[0]]!r}")
    return Problem(id_of(content), tuple(ids), None if answer is None else str(answer))


def _encode(name: str, asked: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if name == "messages":
        if not isinstance(asked, list) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            for message in asked
        ):
            raise ValueError("messages must be a list of objects with role and content")
    elif not isinstance(asked, str):
        raise ValueError(f"{name} must be a text, was {type(asked).__name__}")
    if name == "prompt":
        return list(tokenizer(asked)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError(f"{name} needs a tokenizer with a chat template, this one has none: give prompt")
    messages = [{"role": "user", "content": asked}] if name == "question" else asked
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(chat["input_ids"])
