"""`specexit train annotate`: traces of a base's thinking, with what it would have answered at each paragraph's end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specexit.cli.console import (
    STANDARD_OUTPUT,
    RunFailed,
    note,
    require_files,
    require_writable,
    stderr,
    stdout,
    write_whole,
)
from specexit.cli.generate import given

if TYPE_CHECKING:
    from specexit.training.cost import Report

_MODEL, _TEXTS, _ANSWERS, _IDS, _OUTPUT = "Model", "Texts", "Answers", "Markers, in token ids", "Output"
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def annotate(
    problems: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A JSON object a line: id; question, messages or prompt; answer, if the right one is known.",
            rich_help_panel=_TEXTS,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The traces. One that was begun is gone on with.", rich_help_panel=_OUTPUT),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB-ID", help="The base model; the bundled pair if not given.", rich_help_panel=_MODEL
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB-ID", help="An EAGLE-3 draft of it: faster, the same texts.", rich_help_panel=_MODEL
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="float32 on a CPU, the checkpoint's on a GPU if not given.", rich_help_panel=_MODEL),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Accept weights stored as a pickle.", rich_help_panel=_MODEL)
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many problems, from the first on.", rich_help_panel=_TEXTS)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts of each problem.", rich_help_panel=_TEXTS)] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0, if not given: greedy.", rich_help_panel=_TEXTS)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this.", rich_help_panel=_TEXTS),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Keep so many tokens; 0: all.", rich_help_panel=_TEXTS)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Drop tokens below this share of the best one's probability.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.", rich_help_panel=_TEXTS)] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a text.", rich_help_panel=_TEXTS)] = 4096,
    slots: Annotated[int, typer.Option(min=1, help="Texts decoded at a time.", rich_help_panel=_TEXTS)] = 32,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Annotate these instead: a JSON object a line, id of a problem, completion or completion_ids, sample "
            "(0, 1 ...) where it has several. --temperature is the one they were sampled at.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Finds the answer: boxed, last-number, regex:PATTERN, text, math-verify or package.module:name.",
            rich_help_panel=_ANSWERS,
        ),
    ] = "boxed",
    answer_prefix: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Put behind a forced end of thinking.", rich_help_panel=_ANSWERS),
    ] = "",
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Of a forced answer.", rich_help_panel=_ANSWERS)] = 64,
    boundary_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Ends a paragraph; may be repeated, and is the tokenizer's if not given.", rich_help_panel=_IDS
        ),
    ] = None,
    start_id: Annotated[
        list[int] | None, typer.Option(help="Starts thinking; several in their order.", rich_help_panel=_IDS)
    ] = None,
    end_id: Annotated[
        list[int] | None, typer.Option(help="Ends thinking; several in their order.", rich_help_panel=_IDS)
    ] = None,
    force_id: Annotated[
        list[int] | None, typer.Option(help="Follows a cut; if not given, what ends thinking.", rich_help_panel=_IDS)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what it took as JSON.", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Sample a base's thinking and find, at each paragraph's end, what it would answer if it stopped there.

    The traces are what `specexit train fit` and `specexit calibrate` read. A run that was killed goes on where it was
    when the same command is given again; texts depend on the seed, the problem's id and the sample alone. Forced
    answers are decoded greedily. Without --model the bundled pair is annotated.

    Examples:

        specexit train annotate --problems problems.jsonl --output traces.jsonl --extractor last-number --limit 8
        specexit train annotate --model Qwen/Qwen3-4B --problems math.jsonl --output traces.jsonl
            --temperature 0.6 --top-p 0.95 --samples 4 --max-new-tokens 16384 --answer-prefix 'Answer: \\boxed{'
        specexit train annotate --model ./base --problems math.jsonl --texts from-vllm.jsonl --output traces.jsonl
    """
    require_files([problems], "--problems")
    require_files([] if texts is None else [texts], "--texts")
    if output == STANDARD_OUTPUT:
        raise ValueError("--output must be a file: a run that was killed goes on with it")
    require_writable(output, "--output")
    require_writable(report, "--report")
    if draft is not None and model is None:
        raise ValueError("--draft needs --model: the bundled base has a draft of its own")

    import torch

    from specexit import ExitConfig
    from specexit.cli.continuation import require_model
    from specexit.cli.loading import load_bundled, load_decoder
    from specexit.training.annotate import NothingUsable
    from specexit.training.annotate import annotate as run
    from specexit.training.answers import by_name
    from specexit.training.problems import read_problems

    ids = given(boundary_ids=boundary_id, start_ids=start_id, end_ids=end_id, force_ids=force_id)
    options: dict[str, Any] = {
        "extractor": extractor,
        "answer_prefix": answer_prefix,
        "max_answer_tokens": max_answer_tokens,
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "slots": slots,
        "texts": texts,
        "limit": limit,
        "exit": ExitConfig(**ids),
    }
    try:
        by_name(extractor)  # what is wrong with it is found before a model is loaded
    except TypeError as error:
        raise ValueError(str(error)) from error
    loading = given(dtype=getattr(torch, dtype) if dtype else None, allow_pickle=allow_pickle or None)
    if model is None:
        decoder = load_bundled(device, **loading)
    else:
        require_model(model)
        decoder = load_decoder(model, draft, device, **loading)
    if decoder.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer")
    asked = read_problems(problems, decoder.tokenizer)

    console = stderr()
    with Progress(*_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("annotating", total=None)

        def advance(done: int, total: int) -> None:
            if bar.tasks[0].total is None and done:
                note(f"{output} has {done} of {total} traces already")
            bar.update(task, completed=done, total=total)

        try:
            result = run(decoder, asked, output, progress=advance, **options)
        except NothingUsable as error:
            _write(error.report, report)
            raise RunFailed(str(error)) from error
    _write(result, report)
    for line in summary(result):
        stdout().print(line, markup=False, soft_wrap=True)


def summary(report: Report) -> list[str]:
    """What a person wants to know of a file of traces."""
    run = report.run
    lines = [f"traces: {report.traces}, usable: {report.usable}"]
    lines += [f"  {count} left out: {flaw}" for flaw, count in report.flaws.items()]
    if report.without_boundary:
        lines.append(f"  {report.without_boundary} left out: no paragraph ends in the thinking")
    if report.thinking_tokens is not None and report.sufficient_tokens is not None:
        cut = 1 - report.sufficient_tokens / report.thinking_tokens
        lines.append(
            f"thinking: {report.thinking_tokens:.1f} tokens in {report.boundaries:.1f} paragraphs;"
            f" {report.sufficient_tokens:.1f} would have been enough ({cut:.1%} less)"
        )
    if report.accuracy is not None:
        lines.append(f"right answers: {report.accuracy:.1%}")
    if report.text_tokens is not None:
        lines.append(
            f"cost of a trace: {report.text_tokens:.1f} tokens of text, {report.answer_tokens:.1f} of forced answers"
        )
    if run.traces:
        seconds = run.text_seconds + run.answer_seconds
        lines.append(
            f"this run: {run.traces} traces in {seconds:.1f} s; texts {_rate(run.text_tokens, run.text_seconds)},"
            f" answers {_rate(run.answer_tokens, run.answer_seconds)}"
        )
    return lines


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f}/s)" if seconds else f"{tokens} tokens"


def _write(result: Report, path: Path | None) -> None:
    if path is not None:
        write_whole(path, (json.dumps(result.as_json(), indent=2) + "\n").encode())
