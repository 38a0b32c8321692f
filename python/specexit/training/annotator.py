"""From a text to a trace: the answer of its reply, and those that are forced at the ends of its paragraphs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specexit import checks
from specexit.decoder import SpecExitDecoder
from specexit.exit import ExitConfig, rules_for
from specexit.generation import ids_of
from specexit.identity import fingerprint, tokenizer_fingerprint
from specexit.training.answers import Extractor, Found, by_name, name_of
from specexit.training.probe import Branch, Prober
from specexit.training.records import Trace, sufficient_length
from specexit.training.texts import CUT, NO_ANSWER, Text, reply_ids


class Annotator:
    """Makes traces of texts. The arguments are those of `annotate`.

    seconds  that it has taken so far

    Raises ValueError where there is no tokenizer, or it has no markers or paragraph ends.
    """

    def __init__(
        self,
        decoder: SpecExitDecoder,
        extractor: Extractor | str = "boxed",
        *,
        answer_prefix: str = "",
        max_answer_tokens: int = 64,
        exit: ExitConfig | None = None,
    ) -> None:
        if decoder.tokenizer is None:
            raise ValueError("decoder must have a tokenizer, had none: without it there is no text to find answers in")
        checks.integer("max_answer_tokens", max_answer_tokens, 1)
        self.decoder = decoder
        self.tokenizer: PreTrainedTokenizerBase = decoder.tokenizer
        self.extractor = by_name(extractor) if isinstance(extractor, str) else extractor
        self.extractor_name = name_of(extractor)
        exit = ExitConfig() if exit is None else exit
        self.markers = decoder.planner.markers(exit)
        budget = replace(exit, enabled=False, thinking_budget=1)  # an exit that needs no signals: to check the ids
        rules_for(budget, decoder.base.vocab_size, self.markers, 1)
        self.answer_prefix = answer_prefix
        self.prefix: list[int] = self.tokenizer.encode(answer_prefix, add_special_tokens=False) if answer_prefix else []
        if getattr(self.tokenizer, "unk_token_id", None) in self.prefix:
            raise ValueError(f"answer_prefix must be a text that the tokenizer knows, was {answer_prefix!r}")
        self.max_answer_tokens = max_answer_tokens
        self.prober = Prober(
            decoder.base,
            [*self.markers.force, *self.prefix],
            ids_of(decoder.model.generation_config.eos_token_id),
            max_answer_tokens,
            lambda tokens: self._complete(self._decode([*self.prefix, *tokens])),
        )
        self.seconds = 0.0
        self._boundary = frozenset(self.markers.boundary)
        self._answer = lru_cache(4096)(self._read_answer)  # most branches of a text say the same

    def settings(self) -> dict[str, Any]:
        """What traces are made with, for the header of their file."""
        model = self.decoder.model
        return {
            "base": fingerprint(model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "dtype": str(self.decoder.base.dtype).removeprefix("torch."),
            "generation_config": _generation(model),
            "markers": asdict(self.markers),
            "extractor": self.extractor_name,
            "answer_prefix": self.answer_prefix,
            "max_answer_tokens": self.max_answer_tokens,
        }

    def trace(self, text: Text) -> Trace:
        """The text, and what is answered at the ends of its paragraphs; with a flaw where it cannot be used."""
        if text.flaw is not None:
            return _flawed(text, text.flaw)
        reply = self._decode(reply_ids(text, self.markers))
        if text.cut and not self._complete(reply):
            return _flawed(text, CUT)
        if (in_reply := self._find(reply)) is None:
            return _flawed(text, NO_ANSWER)
        final = in_reply.answer

        started = time.perf_counter()
        boundaries = [n for n, token in enumerate(text.thinking, 1) if token in self._boundary]
        before = len(text.prompt)
        branches = self.prober.answer([*text.prompt, *text.thinking], [before + n for n in boundaries])
        found = [self._answer(tuple(branch.tokens)) for branch in branches]
        answers = [None if answer is None else answer.text for answer in found]
        agrees = [self._same(answer, final) for answer in answers]
        right = text.problem.answer
        trace = Trace(
            id=text.problem.id,
            sample=text.sample,
            prompt=text.prompt,
            thinking=text.thinking,
            reply=text.reply,
            boundaries=boundaries,
            answers=answers,
            probabilities=[_probability(branch, answer) for branch, answer in zip(branches, found, strict=True)],
            agrees=agrees,
            correct=None if right is None else [self._same(answer, right) for answer in answers],
            final=final,
            final_correct=None if right is None else self._same(final, right),
            sufficient=sufficient_length(boundaries, agrees, len(text.thinking)),
            generated=text.written + sum(branch.generated for branch in branches),
        )
        self.seconds += time.perf_counter() - started
        return trace

    def _read_answer(self, tokens: tuple[int, ...]) -> _Answer | None:
        """The answer that a branch's tokens spell out behind the prefix, and which of them do; None: they hold none.

        An answer that the limit of tokens may have cut in two is none.
        """
        ids = [*self.prefix, *tokens]
        text = self._decode(ids)
        found = self._find(text)
        if found is None or not tokens:
            return None
        cut = len(tokens) == self.max_answer_tokens and not self._complete(text)
        if cut and found.end == len(text.rstrip()):
            return None
        ends = [_agreement(self._decode(ids[:n]), text) for n in range(len(ids) + 1)]
        spelling = [
            n - len(self.prefix)
            for n, (start, end) in enumerate(pairwise(ends))
            if start < found.end and max(end, start + 1) > found.start and n >= len(self.prefix)
        ]
        return _Answer(found.answer, spelling) if spelling else None

    def _find(self, text: str) -> Found | None:
        """What the extractor finds. Raises ValueError where that is no place in the text."""
        found = self._ask(self.extractor.find, text)
        if found is None:
            return None
        if not (isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], str)):
            raise ValueError(f"extractor must find (answer, start, end) or None, {self.extractor_name} found {found!r}")
        if not 0 <= found[1] < found[2] <= len(text):
            raise ValueError(
                f"extractor must find an answer inside a text of {len(text)} characters,"
                f" {self.extractor_name} found {found!r}"
            )
        return Found(*found)

    def _same(self, answer: str | None, other: str) -> bool:
        return answer is not None and bool(self._ask(self.extractor.same, answer, other))

    def _complete(self, text: str) -> bool:
        return bool(self._ask(self.extractor.complete, text))

    def _ask(self, method: Callable[..., Any], *texts: str) -> Any:
        """What a method of the extractor says. Raises ValueError where it fails: it may be the user's own."""
        try:
            return method(*texts)
        except Exception as error:
            shown = ", ".join(repr(text if len(text) <= 60 else f"...{text[-60:]}") for text in texts)
            raise ValueError(
                f"extractor {self.extractor_name} must not fail, {getattr(method, '__name__', 'it')}({shown}) raised"
                f" {type(error).__name__}: {error}"
            ) from error

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class _Answer(NamedTuple):
    """text    of the answer
    tokens  indices of those that spell it out
    """

    text: str
    tokens: list[int]


def _agreement(start: str, text: str) -> int:
    """How many characters of a text its first tokens spell; part of one, or a space that is taken back, is not any."""
    return next((n for n, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), min(len(start), len(text)))


def _probability(branch: Branch, answer: _Answer | None) -> float:
    """The geometric mean of the probabilities of the answer's tokens."""
    if answer is None:
        return 0.0
    mean = sum(branch.log_probabilities[n] for n in answer.tokens) / len(answer.tokens)
    return round(math.exp(min(mean, 0.0)), 6)


def _flawed(text: Text, flaw: str) -> Trace:
    return Trace(
        id=text.problem.id,
        sample=text.sample,
        prompt=text.prompt,
        thinking=text.thinking,
        reply=text.reply,
        boundaries=[],
        answers=[],
        probabilities=[],
        agrees=[],
        generated=text.written,
        flaw=flaw,
    )


def _generation(model: PreTrainedModel) -> dict[str, Any]:
    """What the model's generation_config adds to the sampling, and where it stops a text."""
    config = model.generation_config.to_diff_dict()
    config.pop("transformers_version", None)
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain
