"""Annotate the thinking of a base: texts, and what it would have answered at each paragraph's end.

    decoder = SpecExitDecoder.from_pretrained(base, draft)  # the draft is for speed: it changes no text
    problems = read_problems("problems.jsonl", decoder.tokenizer)
    report = annotate(decoder, problems, "traces.jsonl", extractor="last-number", samples=4, temperature=0.7)

The file grows trace by trace. A run that was killed goes on where it was, when it is started again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specexit import checks
from specexit.decoder import SpecExitDecoder
from specexit.exit import ExitConfig, rules_for
from specexit.generation import ids_of
from specexit.training.answers import Extractor, Found, by_name, name_of
from specexit.training.cost import Report, Run
from specexit.training.identity import fingerprint, tokenizer_fingerprint
from specexit.training.probe import Branch, Prober
from specexit.training.problems import Problem, problems_fingerprint
from specexit.training.records import Trace, TraceFile, read_traces, sufficient_length
from specexit.training.sample import Sampling, sample
from specexit.training.texts import CUT, NO_ANSWER, Text, file_fingerprint, read_texts, reply_ids

Path = str | os.PathLike[str]


class NothingUsable(ValueError):
    """The run went well, and none of the traces can be used: says what most of them lack.

    report  as `annotate` would have returned it
    """

    def __init__(self, report: Report) -> None:
        super().__init__(report.advice())
        self.report = report


def annotate(
    decoder: SpecExitDecoder,
    problems: Sequence[Problem],
    path: Path,
    *,
    extractor: Extractor | str = "boxed",
    answer_prefix: str = "",
    max_answer_tokens: int = 64,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int = 0,
    max_new_tokens: int = 4096,
    slots: int = 32,
    texts: Path | None = None,
    exit: ExitConfig | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write traces of the problems to a file, or go on with it, and say what they cost.

    problems           all of the set, whose fingerprint the file keeps
    path               of the file; one that was made with other settings is refused
    extractor          finds the answers, by name or an object: see `answers`
    answer_prefix      text that is put behind a forced end of thinking, so that the answer follows at once
    max_answer_tokens  of a forced answer, the prefix not counted
    samples ... slots  how texts are sampled: see `Sampling` and `sample`
    texts              a file of texts that exist, to annotate instead of sampling any: see `read_texts`
    exit               names other markers and boundaries than the tokenizer's
    limit              problems to annotate, from the first on; it may grow from run to run, as `samples` may
    progress           told the number of traces done and wanted, at the start and after each

    Raises TypeError or ValueError for an argument or a file that is wrong, before anything is decoded; NothingUsable
    where in the end no trace can be used.
    """
    checks.integer("samples", samples, 1)
    checks.integer("slots", slots, 1)
    if limit is not None:
        checks.integer("limit", limit, 1)
    exit = ExitConfig() if exit is None else exit
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_new_tokens=max_new_tokens
    )
    annotator = Annotator(
        decoder, extractor, answer_prefix=answer_prefix, max_answer_tokens=max_answer_tokens, exit=exit
    )
    _check_prompts(problems, decoder.base.vocab_size)
    chosen = problems[:limit]
    given: list[Text] | None = None
    if texts is not None:
        vocabulary = decoder.base.vocab_size
        given = read_texts(texts, problems, annotator.tokenizer, annotator.markers, vocabulary, exit.assume_thinking)
        names = {problem.id for problem in chosen}
        given = [text for text in given if text.problem.id in names]
        if not given:
            raise ValueError(f"texts must have some of the first {limit} problems, had none")
    header = {
        **annotator.settings(),
        "problems": problems_fingerprint(problems),
        **({"sampling": asdict(sampling)} if texts is None else {"texts": file_fingerprint(texts)}),
    }
    todo: Iterator[Text]
    started, run = time.perf_counter(), Run()
    with TraceFile(path, header) as file:
        if given is None:
            every = [(problem, number) for problem in chosen for number in range(samples)]
            wanted = [(problem, number) for problem, number in every if (problem.id, number) not in file.done]
            total, missing = len(every), len(wanted)
            todo = sample(decoder, wanted, sampling, exit, slots)
        else:
            rest = [text for text in given if (text.problem.id, text.sample) not in file.done]
            total, missing = len(given), len(rest)
            todo = iter(rest)
        if progress is not None:
            progress(total - missing, total)
        for text in todo:
            trace = annotator.trace(text)
            file.append(trace)
            run.count(trace, text.written)
            if progress is not None:
                progress(total - missing + run.traces, total)
    run.answer_seconds = annotator.seconds
    run.text_seconds = time.perf_counter() - started - annotator.seconds
    report = Report.of(read_traces(path)[1], {problem.id: len(problem.prompt) for problem in problems}, run)
    if not report.usable:
        raise NothingUsable(report)
    return report


class Annotator:
    """Makes traces of texts, with one base and one way to find answers. The arguments are those of `annotate`.

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
            lambda tokens: self.extractor.complete(self._decode([*self.prefix, *tokens])),
        )
        self.seconds = 0.0  # that probing took so far
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
        reply = self._decode(reply_ids(text, self.markers))
        in_reply = self._find(reply)
        if text.flaw is not None:
            return _flawed(text, text.flaw)
        if text.cut and not self.extractor.complete(reply):
            return _flawed(text, CUT)
        if in_reply is None:
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
        cut = len(tokens) == self.max_answer_tokens and not self.extractor.complete(text)
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
        """What the extractor finds. Raises TypeError or ValueError where that is no place in the text."""
        found = self.extractor.find(text)
        if found is None:
            return None
        if not (isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], str)):
            raise TypeError(f"extractor must find (answer, start, end) or None, {self.extractor_name} found {found!r}")
        if not 0 <= found[1] < found[2] <= len(text):
            raise ValueError(
                f"extractor must find an answer inside a text of {len(text)} characters,"
                f" {self.extractor_name} found {found!r}"
            )
        return Found(*found)

    def _same(self, answer: str | None, other: str) -> bool:
        return answer is not None and bool(self.extractor.same(answer, other))

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


def _check_prompts(problems: Sequence[Problem], vocabulary: int) -> None:
    if not problems:
        raise ValueError("problems must hold at least one, was empty")
    for problem in problems:
        if not problem.prompt or not all(0 <= index < vocabulary for index in problem.prompt):
            raise ValueError(
                f"problem {problem.id!r} must have a prompt of ids in [0, {vocabulary}), the base's vocabulary,"
                f" had {min(problem.prompt, default='none')} to {max(problem.prompt, default='none')}"
            )
