"""One problem of the demo, told: its paragraphs, the signals at the end of each, where thinking stopped and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from specexit.bundled import Problem
from specexit.cli.comparison import Comparison, Solution
from specexit.cli.plot import SignalCurves
from specexit.exit import ExitConfig
from specexit.output import RowStats
from specexit.thinking import Markers
from specexit_kernels.state import SIGNALS


@dataclass(frozen=True)
class Paragraph:
    """tokens   thinking tokens from the start of thinking to its end
    signals  the smoothed signals there, by name
    """

    text: str
    tokens: int
    signals: Mapping[str, float]


@dataclass(frozen=True)
class Example:
    """A problem with and without exit; the two texts agree up to the exit.

    paragraphs  of the whole thinking text; those beyond `thinking` tokens were not generated with the exit
    reply       what followed the thinking that was cut
    thinking    thinking tokens with the exit, and `full_thinking` without
    reason      of the exit: "signals" or "budget"; None without one
    thresholds  of the signals that decide, by name
    """

    name: str
    question: str
    paragraphs: list[Paragraph]
    reply: str
    thinking: int
    full_thinking: int
    reason: str | None
    thresholds: Mapping[str, float]
    curves: SignalCurves


def thresholds_of(rule: ExitConfig) -> dict[str, float]:
    """Those of the signals that decide, by name."""
    values = {name: getattr(rule, name) for name in SIGNALS} if rule.enabled else {}
    return {name: value for name, value in values.items() if value is not None}


def tell_one(comparison: Comparison, problems: Sequence[Problem]) -> Example:
    """The story of one problem: of those answered right after an exit, the one that took longest to be sure."""
    solutions = comparison.modes["specexit"].solutions
    index = max(range(len(problems)), key=lambda i: (solutions[i].correct, solutions[i].exited, solutions[i].thinking))
    watched = comparison.watch(problems[index])
    return tell(
        problems[index],
        watched.new_tokens[0],
        watched.stats[0],
        solutions[index],
        comparison.tokenizer,
        comparison.markers,
        thresholds_of(comparison.exit),
    )


def tell(
    problem: Problem,
    tokens: Sequence[int],
    stats: RowStats,
    cut: Solution,
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    thresholds: Mapping[str, float],
) -> Example:
    """Combine two decodings of one problem: `tokens` and `stats` without exit, with a signal trace, and `cut` with it.

    Raises ValueError where a trace or the statistics are missing.
    """
    trace = stats.trace
    if trace is None or cut.stats is None:
        raise ValueError("stats and cut must come from a decoder that reads exit signals")
    counts = [position - stats.prompt_tokens + 1 for position in trace.positions]
    boundaries = [i for i, count in enumerate(counts) if tokens[count - 1] in markers.boundary]
    paragraphs, start = [], 0
    for index in boundaries:
        text = tokenizer.decode(tokens[start : counts[index]], skip_special_tokens=True).strip()
        signals = dict(zip(trace.names, trace.smoothed[index], strict=True))
        paragraphs.append(Paragraph(text, counts[index], signals))
        start = counts[index]
    position = cut.stats.exit_position
    title, answer = "no exit", cut.thinking + len(markers.end)
    if position is not None:
        answer = cut.thinking + len(markers.force)
        title = f"thinking stopped after {cut.thinking} of {stats.thinking_tokens} tokens"
    return Example(
        name=problem.id,
        question=problem.question,
        paragraphs=paragraphs,
        reply=tokenizer.decode(cut.tokens[answer:], skip_special_tokens=True).strip(),
        thinking=cut.thinking,
        full_thinking=stats.thinking_tokens,
        reason=cut.stats.exit_reason,
        thresholds=thresholds,
        curves=SignalCurves(
            title=f"{problem.id}: {title}",
            names=trace.names,
            thinking_tokens=counts,
            values=trace.signals,
            smoothed=trace.smoothed,
            thresholds=thresholds,
            boundaries=boundaries,
            exit=trace.positions.index(position) if position in trace.positions else None,
        ),
    )
