"""The demo's results as a table, as a told example, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from specexit.cli.comparison import Mode
    from specexit.cli.example import Example

_TITLES = {
    "autoregressive": "generate",
    "speculative": "speculative",
    "specexit": "speculative + exit",
}


def as_json(modes: Mapping[str, Mode], mismatches: Sequence[int], setting: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's JSON. `setting`: device and whatever else says how it was measured."""
    problems = len(modes["autoregressive"].solutions)
    summaries = {name: mode.summary() for name, mode in modes.items()}
    return {"problems": problems, **setting, "identical_text": not mismatches, "modes": summaries}


def print_table(modes: Mapping[str, Mode], console: Console) -> None:
    """A row for each mode; thinking tokens are means over the problems."""
    plain = modes["autoregressive"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("mode", no_wrap=True)
    for heading in ("accuracy", "thinking tokens", "tokens a step", "seconds", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, mode in modes.items():
        cut = 1 - mode.thinking_tokens / plain.thinking_tokens if plain.thinking_tokens else 0.0
        table.add_row(
            _TITLES[name],
            f"{mode.accuracy:.1%}",
            f"{mode.thinking_tokens / len(mode.solutions):.1f}" + (f" (-{cut:.0%})" if cut >= 0.005 else ""),
            f"{mode.tokens_per_step:.2f}",
            f"{mode.seconds:.2f}",
            f"{plain.seconds / mode.seconds:.1f}x",
            style="bold" if name == "specexit" else None,
        )
    console.print(table)


def print_identity(problems: int, mismatches: Sequence[int], console: Console) -> None:
    """Whether speculation changed the text."""
    if mismatches:
        line = f"The speculative text differs from generate's in {len(mismatches)} of {problems} problems."
        console.print(line, style="bold red")
    else:
        console.print(f"The speculative text is identical to generate's, token for token ({problems} problems).")


def print_example(example: Example, console: Console) -> None:
    """The problem, its paragraphs with the signals at the end of each, the exit, and what was not generated."""
    console.print(Text.assemble((example.name, "bold"), "  ", example.question), soft_wrap=True)
    generated = [p for p in example.paragraphs if p.tokens <= example.thinking]
    spared = example.paragraphs[len(generated) :]

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("paragraph", ratio=1)
    for name in example.curves.names:
        table.add_column(name, justify="right", no_wrap=True)
    for paragraph in generated:
        values = [_signal(name, value, example.thresholds) for name, value in paragraph.signals.items()]
        table.add_row(str(paragraph.tokens), paragraph.text, *values)
    console.print(table)

    if example.reason is None:
        console.print("No exit: the model ended its thinking itself.")
    else:
        why = why_exit(example.reason, generated[-1].signals, example.thresholds)
        console.print(Text(f"Exit after {example.thinking} thinking tokens: {why}.", style="bold yellow"))
    console.print(Text(example.reply, style="bold"))
    if spared:
        count = example.full_thinking - example.thinking
        console.print(
            Text(f"Not generated: {count} tokens in {len(spared)} more paragraphs. The last: {spared[-1].text}"),
            style="dim",
        )


def why_exit(reason: str, signals: Mapping[str, float], thresholds: Mapping[str, float]) -> str:
    """The signals beside their thresholds: confidence 0.931 > 0.5, remaining 1.70 < 3; or that a budget is spent."""
    if reason == "budget":
        return "the thinking budget is spent"
    return ", ".join(
        f"{name} {number(signals[name])} {'<' if name == 'remaining' else '>'} {threshold:g}"
        for name, threshold in thresholds.items()
        if name in signals  # the release's rule may cut where nothing is read: it decides by earlier steps
    )


def passes(name: str, value: float, threshold: float) -> bool:
    """Whether a signal lets an exit happen. NaN never does."""
    return value < threshold if name == "remaining" else value > threshold


def number(value: float) -> str:
    """Enough digits to compare with a threshold: 0.713, 2.98, 73.1, 1240."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _signal(name: str, value: float, thresholds: Mapping[str, float]) -> Text:
    passed = name in thresholds and passes(name, value, thresholds[name])
    return Text(number(value), style="green" if passed else "dim")
