"""`specexit demo`: the bundled reasoner solves its test problems three ways, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specexit.cli import report
from specexit.cli.console import STANDARD_OUTPUT, RunFailed, note, require_writable, stderr, stdout, write_whole
from specexit.cli.plot import draw_signals, require_plottable

if TYPE_CHECKING:
    from specexit.bundled import Problem
    from specexit.cli.comparison import Comparison

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
DEFAULT_PROBLEMS = 24  # about a minute on two CPU cores


def demo(
    problems: Annotated[
        int, typer.Option(min=1, help="How many of the 300 bundled test problems to solve, from the first on.")
    ] = DEFAULT_PROBLEMS,
    batch_size: Annotated[int, typer.Option(min=1, help="Problems decoded together, in all modes.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... The GPU where there is one.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the numbers as JSON. Without FILE: to stdout, and the rest to stderr."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw one problem's exit signals: .png, .svg or .pdf. Needs matplotlib."),
    ] = None,
) -> None:
    """Solve bundled problems three ways and compare: accuracy, thinking tokens, speed.

    The modes are transformers' own `generate`, lossless speculation, and speculation that ends the thinking when
    the draft's exit signals say that the answer is known. All are greedy, in float32, in one process; each is warmed
    up first, and they take turns on every batch. No network is needed. On a CPU one thread computes: more do not help
    so small a model; OMP_NUM_THREADS sets another number.

    In the JSON, accuracy is a fraction; thinking_tokens, new_tokens, steps and seconds are totals over the problems,
    and a step is one forward of the base for one problem. identical_text says whether speculation left every token as
    `generate` had it; if not, the exit status is 1.

    Examples:

        specexit demo
        specexit demo --problems 300 --json results.json
        specexit demo --problems 8 --plot signals.png
    """
    # Whatever can be wrong with the request is found before the long run.
    require_writable(json_file, "--json")
    require_writable(plot, "--plot")
    require_plottable(plot)
    from specexit.bundled import load_problems
    from specexit.cli.comparison import Comparison
    from specexit.cli.example import tell_one

    everything = load_problems("test")
    if problems > len(everything):
        raise ValueError(f"--problems must be at most {len(everything)}, was {problems}")
    chosen = everything[:problems]
    comparison = Comparison.of_bundled_pair(device)
    note(f"test problems: {problems}, in three modes; batch size: {batch_size}; device: {comparison.decoder.device}")
    _solve_all(comparison, chosen, batch_size)

    mismatches = comparison.mismatches()
    console = stderr() if json_file == STANDARD_OUTPUT else stdout()
    report.print_table(comparison.modes, console)
    console.print()
    report.print_identity(problems, mismatches, console)
    example = tell_one(comparison, chosen)
    console.print()
    report.print_example(example, console)
    if plot is not None:
        write_whole(plot, draw_signals(example.curves, plot.suffix.lstrip(".").lower()))
        note(f"picture: {plot}")
    if json_file is not None:
        result = report.as_json(comparison.modes, mismatches, comparison.setting(batch_size))
        write_whole(json_file, (json.dumps(result, indent=2) + "\n").encode())
    if mismatches:
        first = mismatches[0]
        raise RunFailed(f"the speculative text is not generate's: {comparison.first_difference(first, chosen[first])}")


def _solve_all(comparison: Comparison, problems: Sequence[Problem], batch_size: int) -> None:
    console = stderr()
    with Progress(*_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("warming up", total=len(problems))
        comparison.warm_up(problems[:batch_size])
        progress.update(task, description="solving")
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            comparison.solve(batch)
            progress.advance(task, len(batch))
