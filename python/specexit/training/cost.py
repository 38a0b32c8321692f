"""What annotated traces hold, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specexit.training import texts
from specexit.training.records import Trace, usable

# What to change where most traces have a flaw.
_ADVICE = {
    texts.UNBEGUN: "a prompt that asks for thinking, or the markers that this base uses",
    texts.UNENDED: "more max_new_tokens",
    texts.STOPPED: "another base: this one stops inside its thinking",
    texts.EMPTY: "a prompt that asks for thinking",
    texts.CUT: "more max_new_tokens",
    texts.NO_ANSWER: "another extractor",
}


@dataclass
class Run:
    """What one run did: it sampled texts, and decoded the answers that were forced in them."""

    traces: int = 0
    text_tokens: int = 0
    answer_tokens: int = 0
    text_seconds: float = 0.0
    answer_seconds: float = 0.0

    def count(self, trace: Trace, text_tokens: int) -> None:
        self.traces += 1
        self.text_tokens += text_tokens
        self.answer_tokens += trace.generated - text_tokens


@dataclass(frozen=True)
class Report:
    """Of a file of traces, and of the run that has just gone on with it. Means are over the usable traces.

    traces             in the file
    usable             of them: without a flaw, and with a place to cut
    flaws              how many have which
    without_boundary   without a flaw, but no paragraph ends in their thinking
    accuracy           of the final answers; None where the right ones are not known
    thinking_tokens    mean
    sufficient_tokens  mean minimal sufficient length
    boundaries         mean number of places to cut
    text_tokens        mean tokens that the text of a trace took, over all traces
    answer_tokens      mean tokens that its forced answers took
    run                what this run alone took
    """

    traces: int
    usable: int
    flaws: dict[str, int]
    without_boundary: int
    accuracy: float | None
    thinking_tokens: float | None
    sufficient_tokens: float | None
    boundaries: float | None
    text_tokens: float | None
    answer_tokens: float | None
    run: Run

    @classmethod
    def of(cls, traces: Sequence[Trace], prompts: Mapping[str, int], run: Run) -> Report:
        """prompts: tokens of each problem's prompt, by id"""
        good = usable(traces)
        judged = [trace.final_correct for trace in good if trace.final_correct is not None]
        text = [len(trace.tokens) - prompts[trace.id] for trace in traces]
        return cls(
            traces=len(traces),
            usable=len(good),
            flaws=dict(Counter(trace.flaw for trace in traces if trace.flaw is not None).most_common()),
            without_boundary=sum(trace.flaw is None and not trace.boundaries for trace in traces),
            accuracy=_mean(judged),
            thinking_tokens=_mean(len(trace.thinking) for trace in good),
            sufficient_tokens=_mean(trace.sufficient for trace in good),
            boundaries=_mean(len(trace.boundaries) for trace in good),
            text_tokens=_mean(text),
            answer_tokens=_mean(trace.generated - size for trace, size in zip(traces, text, strict=True)),
            run=run,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def advice(self) -> str:
        """Why no trace can be used, and what would help most."""
        lacks = {**self.flaws, "no paragraph ends in the thinking": self.without_boundary}
        most = max(lacks, key=lambda flaw: lacks[flaw])
        helps = _ADVICE.get(most, "other boundary_ids: those of the line feed, where paragraphs are lines")
        return f"none of {self.traces} traces can be used; of {lacks[most]}, {most}: what would help is {helps}"


def _mean(values: Iterable[float]) -> float | None:
    every = list(values)
    return sum(every) / len(every) if every else None
