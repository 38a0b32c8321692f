"""Annotate the thinking of a base: texts, and what it would have answered at each paragraph's end.

    decoder = SpecExitDecoder.from_pretrained(base, draft)  # the draft is for speed: it changes no text
    problems = read_problems("problems.jsonl", decoder.tokenizer)
    report = annotate(decoder, problems, "traces.jsonl", extractor="last-number", samples=4, temperature=0.7)

The file grows trace by trace. A run that was killed goes on where it was, when it is started again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from specexit import checks
from specexit.decoder import SpecExitDecoder
from specexit.exit import ExitConfig
from specexit.training.annotator import Annotator
from specexit.training.answers import Extractor
from specexit.training.cost import Report, Run
from specexit.training.problems import Problem, problems_fingerprint
from specexit.training.records import TraceFile, read_traces
from specexit.training.sample import Sampling, sample
from specexit.training.texts import Text, file_fingerprint, read_texts

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
    temperature: float | None = None,
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
    texts              a file of texts that exist, to annotate instead of sampling any: see `read_texts`; `temperature`
                       says at which they were sampled, if that is known
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
        temperature=temperature or 0.0, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_new_tokens=max_new_tokens
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
        **({"sampling": {"temperature": temperature}} if texts is not None and temperature is not None else {}),
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


def _check_prompts(problems: Sequence[Problem], vocabulary: int) -> None:
    if not problems:
        raise ValueError("problems must hold at least one, was empty")
    for problem in problems:
        if not problem.prompt or not all(0 <= index < vocabulary for index in problem.prompt):
            raise ValueError(
                f"problem {problem.id!r} must have a prompt of ids in [0, {vocabulary}), the base's vocabulary,"
                f" had {min(problem.prompt, default='none')} to {max(problem.prompt, default='none')}"
            )
