"""Texts sampled from the base: many at a time, and each the same whichever others are decoded beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specexit import checks
from specexit.decoder import SpecExitDecoder
from specexit.exit import ExitConfig
from specexit.training.problems import Problem
from specexit.training.texts import Text, part


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How texts are drawn; None: as the model's generation_config says.

    temperature     0 is greedy
    seed            of all texts: each has a seed of its own, made of this one, the problem's id and the sample
    max_new_tokens  of a text
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 4096

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, 0.0)  # the decoder checks the rest
        checks.integer("seed", self.seed, 0)
        checks.integer("max_new_tokens", self.max_new_tokens, 1)


def sample(
    decoder: SpecExitDecoder,
    wanted: Sequence[tuple[Problem, int]],
    sampling: Sampling,
    exit: ExitConfig,
    slots: int,
) -> Iterator[Text]:
    """The texts of problems and their samples, as they end: thought to the end, whatever the draft's signals say.

    exit   names the markers of thinking
    slots  texts that are decoded at a time
    """
    markers = decoder.planner.markers(exit)
    completions = decoder.generate_many(
        [problem.prompt for problem, _ in wanted],
        slots=max(1, min(slots, len(wanted))),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=[seed_of(sampling.seed, problem.id, number) for problem, number in wanted],
        exit=ExitConfig.off(),
    )
    for completion in completions:
        problem, number = wanted[completion.index]
        cut = completion.stats.finish_reason in ("length", "capacity")
        yield part(problem, number, completion.new_tokens, markers, cut, exit.assume_thinking)


def seed_of(seed: int, id: str, sample: int) -> int:
    """The seed of one text: 62 bits that depend on nothing but these three."""
    digest = hashlib.sha256(f"{seed} {sample} {id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
