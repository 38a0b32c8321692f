"""`specexit calibrate`: exit thresholds that keep a stated risk, from annotated traces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specexit.cli.console import RunFailed, note, require_files, require_writable, stderr, stdout

if TYPE_CHECKING:
    from specexit import SpecExitDecoder
    from specexit.training.calibrate import Calibration, Choice
    from specexit.training.records import Trace
    from specexit.training.signals import RecordedSignals

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def calibrate(
    model: Annotated[str, typer.Option(help="The base: a folder or a hub id.")],
    draft: Annotated[Path, typer.Option(help="The draft's folder; calibration.json is written into it.")],
    traces: Annotated[list[Path], typer.Option(help="Annotated traces of problems that nothing was trained on.")],
    max_loss: Annotated[float, typer.Option(help="Share of answers that may be lost.")] = 0.01,
    confidence_level: Annotated[float, typer.Option(help="With which the rule keeps it.")] = 0.95,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="The point estimate alone: nothing is certified.")
    ] = False,
    signals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recorded signals: read if it is there, else written.")
    ] = None,
    source: Annotated[list[str] | None, typer.Option(help="Only signals of this source: fc, output.")] = None,
    smoothing: Annotated[list[str] | None, typer.Option(help="Only none, ewma, window, momentum.")] = None,
    use: Annotated[list[str] | None, typer.Option(help="Only confidence, progress, remaining.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of texts that another engine has sampled; else the traces say it."),
    ] = None,
    min_thinking_tokens: Annotated[int, typer.Option(help="The rule ends no thinking shorter than this.")] = 0,
    name: Annotated[str | None, typer.Option(help="Of the rule, in calibration.json.")] = None,
    default: Annotated[bool, typer.Option("--default", help="Make it the draft's default rule.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing into the draft's folder.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the split into problems for choosing and for testing.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")] = None,
) -> None:
    """Choose thresholds and smoothing that cut the most thinking, and certify what they lose.

    Rules are tried on recorded traces: nothing is decoded. On two fifths of the problems a sequence of rules is chosen,
    on the others it is tested (Learn then Test), so that a certified rule loses at most `--max-loss` of the answers
    with the stated confidence. The estimated rule is the boldest that lost no more on these very problems: on others it
    may. Both are written. Where no rule can be certified, the exit status is 1.

    Examples:

        specexit calibrate --model Qwen/Qwen3-4B --draft my-draft --traces calibration.jsonl
        specexit calibrate --model base --draft my-draft --traces cal.jsonl --max-loss 0 --estimate --name no-loss
    """
    require_files(traces, "--traces")
    if not draft.is_dir():
        raise ValueError(f"--draft must be a folder, was {draft}")
    require_writable(draft / "calibration.json", "--draft")
    require_writable(signals, "--signals")
    from specexit.training import calibrate as training

    header, found = training.read_all(traces)
    sampled_at = training.temperature_of(header, temperature)
    decoder = load_for_traces(model, draft, header, device)
    result = training.calibrate(
        decoder,
        found,
        max_loss=max_loss,
        confidence_level=None if estimate else confidence_level,
        signals=lambda: recorded(decoder, found, signals),
        temperature=sampled_at,
        sources=source,
        smoothing=smoothing,
        use=use or ("confidence", "progress", "remaining"),
        min_thinking_tokens=min_thinking_tokens,
        seed=seed,
        exit=training.exit_of(header, decoder),
    )
    _print(result, stdout())
    if result.certified is None and result.estimated is None:
        raise RunFailed(f"on these problems every rule loses more than {max_loss:g}: nothing was written")
    if not dry_run:
        written = training.write(result, draft, name, default)
        note(f"{draft / 'calibration.json'}: {', '.join(written)}")
    if result.why_none is not None:
        raise RunFailed(result.why_none)


def load_for_traces(model: str, draft: Path, header: Mapping[str, Any], device: str | None) -> SpecExitDecoder:
    """The decoder for traces with this header, without the draft's own rule, which may be of another base."""
    from specexit import ExitConfig
    from specexit.cli.loading import load_decoder
    from specexit.training.calibrate import check_models

    decoder = load_decoder(model, draft, device, exit=ExitConfig.off(), calibrated=False)
    check_models(header, decoder)
    return decoder


def recorded(decoder: SpecExitDecoder, every: list[Trace], file: Path | None) -> RecordedSignals:
    """The signals of the traces without a flaw: those in the file, or else read now, and kept there."""
    from specexit.training.signals import RecordedSignals, record_signals

    traces = [trace for trace in every if trace.flaw is None]
    if file is not None and file.exists():
        return RecordedSignals.load(file)
    console = stderr()
    with Progress(*_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading signals", total=sum(len(trace.thinking) for trace in traces))
        found = record_signals(decoder, traces, progress=lambda tokens: progress.advance(task, tokens))
    if file is not None:
        found.save(file)
        note(f"signals: {file}")
    return found


def _print(result: Calibration, console: Console) -> None:
    flaws = f"; {result.left_out} traces with a flaw were left out" if result.left_out else ""
    console.print(
        f"{result.problems} problems, {result.tested_on} of them for testing{flaws};"
        f" temperature {result.temperature:g}; allowed loss {result.max_loss:.2%}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("rule", "cut", "thinking tokens", "lost", "p-value", ""):
        table.add_column(heading, overflow="fold", justify="left" if heading in ("rule", "") else "right")
    for choice in result.tested:
        if choice is not result.certified:
            passed = choice.p_value is not None and choice.p_value <= 1 - (result.confidence_level or 1)
            table.add_row(*_row(choice), "passed" if passed else "failed")
    for chosen, kind in ((result.certified, "[bold]certified[/]"), (result.estimated, "estimated")):
        if chosen is not None:
            table.add_row(*_row(chosen), kind)
    console.print(table)


def _row(choice: Choice) -> tuple[str, ...]:
    p_value = "" if choice.p_value is None else f"{choice.p_value:.3f}"
    lost = f"{choice.losses:g} of {choice.problems}"
    return _words(choice), f"{choice.cut:.1%}", f"{choice.thinking_tokens:.1f}", lost, p_value


def _words(choice: Choice) -> str:
    exit = choice.exit
    kind = {"ewma": f"ewma {exit.alpha:g}", "none": "none"}.get(exit.smoothing, f"{exit.smoothing} {exit.window}")
    parts = [
        f"{name} {sign} {value:g}"
        for name, sign, value in (
            ("confidence", ">", exit.confidence),
            ("progress", ">", exit.progress),
            ("remaining", "<", exit.remaining),
        )
        if value is not None
    ]
    return f"{', '.join(parts)}; {exit.source}, {kind}"
