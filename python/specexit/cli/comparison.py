"""The demo's measurement: the bundled problems solved three ways, under the same conditions."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specexit import ExitConfig, SpecExitDecoder, TreeConfig
from specexit.bundled import Problem, bundled_pair
from specexit.cli.loading import draft_rule, load_bundled, watching
from specexit.loading import load_base
from specexit.output import GenerateOutput, RowStats
from specexit.pool import batch_bucket
from specexit.thinking import count_thinking_tokens

MODES = ("autoregressive", "speculative", "specexit")
_WARM_UP_TOKENS = 64


@dataclass
class Solution:
    """One problem solved in one mode.

    tokens    the generated ids, the end of sequence included
    thinking  how many of them are thinking text, its markers excluded
    steps     forwards of the base after the prompt
    stats     the decoder's; None for transformers' own generate
    """

    tokens: list[int]
    thinking: int
    steps: int
    correct: bool
    stats: RowStats | None = None

    @property
    def exited(self) -> bool:
        return self.stats is not None and self.stats.exit_position is not None


@dataclass
class Mode:
    """All problems solved in one mode; `seconds` is the time of the generate calls alone."""

    solutions: list[Solution] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return sum(s.correct for s in self.solutions) / len(self.solutions)

    @property
    def thinking_tokens(self) -> int:
        return sum(s.thinking for s in self.solutions)

    @property
    def new_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.solutions)

    @property
    def steps(self) -> int:
        return sum(s.steps for s in self.solutions)

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.steps if self.steps else 0.0

    def summary(self) -> dict[str, float | int]:
        """For JSON. Counts and seconds are totals over the problems, accuracy is a fraction."""
        return {
            "accuracy": self.accuracy,
            "thinking_tokens": self.thinking_tokens,
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "seconds": self.seconds,
        }


def is_correct(text: str, answer: str) -> bool:
    """Whether the last "answer is NN" in `text` is `answer`; thinking that never came to an answer is wrong."""
    found = re.findall(r"answer is (\d+)", text)
    return bool(found) and found[-1] == answer


def until_end(tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """`tokens` up to and including the first of `end_ids`: what a row of a padded batch generated."""
    for index, token in enumerate(tokens):
        if token in end_ids:
            return list(tokens[: index + 1])
    return list(tokens)


class Batch(NamedTuple):
    """Prompts padded on the left, both [B, P] int64."""

    input_ids: Tensor
    attention_mask: Tensor


class Comparison:
    """Solves batches of problems with `generate`, with speculation, and with speculation and exit.

    model    the base, driven by transformers' own `generate` with its default cache
    decoder  ours, over its own copy of the same base
    exit     the rule of the third mode; the second has none
    """

    def __init__(self, model: PreTrainedModel, decoder: SpecExitDecoder, exit: ExitConfig) -> None:
        if decoder.tokenizer is None:
            raise ValueError("decoder must have a tokenizer")
        self.model = model
        self.decoder = decoder
        self.exit = exit
        self.tokenizer = decoder.tokenizer
        self.markers = decoder.planner.markers(exit)
        self.modes = {name: Mode() for name in MODES}
        end: int | list[int] = model.generation_config.eos_token_id
        self._end_ids = [end] if isinstance(end, int) else end

    @classmethod
    def of_bundled_pair(cls, device: str | None = None) -> Comparison:
        """Over the bundled pair in float32, with the exit rule that was calibrated for it."""
        decoder = load_bundled(device, dtype=torch.float32)
        if decoder.device.type == "cpu":
            decoder.tree = TreeConfig.chain(12)  # this draft is right nine times out of ten, so a long chain pays
        model = load_base(bundled_pair().base, torch.float32, decoder.device)
        return cls(model, decoder, draft_rule(decoder))

    def warm_up(self, problems: Sequence[Problem]) -> None:
        """Run every mode briefly on a batch of the real size, so that no mode pays for first calls."""
        inputs = self._encode(problems)
        for name in MODES:
            self._generate(name, inputs, _WARM_UP_TOKENS)

    def solve(self, problems: Sequence[Problem]) -> None:
        """Solve one batch in every mode in turn, so that a machine that slows down slows all three."""
        inputs = self._encode(problems)
        for name, mode in self.modes.items():
            self._synchronize()
            start = time.perf_counter()
            rows, stats = self._generate(name, inputs, None)
            self._synchronize()
            mode.seconds += time.perf_counter() - start
            prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs, strict=True)]
            for prompt, tokens, row_stats, problem in zip(prompts, rows, stats, problems, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                mode.solutions.append(
                    Solution(
                        tokens=tokens,
                        thinking=count_thinking_tokens(prompt, tokens, self.markers),
                        steps=len(tokens) if row_stats is None else row_stats.steps,
                        correct=is_correct(text, problem.answer),
                        stats=row_stats,
                    )
                )

    def mismatches(self) -> list[int]:
        """The problems whose speculative tokens are not those of `generate`."""
        plain, speculative = (self.modes[name].solutions for name in MODES[:2])
        return [i for i, (a, b) in enumerate(zip(plain, speculative, strict=True)) if a.tokens != b.tokens]

    def setting(self, batch_size: int) -> dict[str, Any]:
        """What a reader of the numbers needs to know of how they were measured."""
        slots = batch_bucket(batch_size, self.decoder.device)
        return {
            "device": str(self.decoder.device),
            "threads": torch.get_num_threads(),
            "tree": asdict(self.decoder.tree_for(slots)),
            "batch_size": batch_size,
            "exit": {name: value for name, value in asdict(self.exit).items() if value is not None},
        }

    def watch(self, problem: Problem) -> GenerateOutput:
        """Solve one problem to the end of its thinking, with the signals read all the way. Not timed."""
        return self.decoder.generate(*self._encode([problem]), temperature=0.0, exit=watching(self.exit))

    def first_difference(self, index: int, problem: Problem) -> str:
        """Where a mismatch begins, and how close the base's two best tokens are there: a near tie is rounding."""
        plain, speculative = (self.modes[name].solutions[index].tokens for name in MODES[:2])
        pairs = itertools.zip_longest(plain, speculative)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        prompt = self._encode([problem]).input_ids
        ids = torch.cat([prompt, prompt.new_tensor([plain[:at]])], 1)
        with torch.no_grad():
            best, second = self.model(ids).logits[0, -1].topk(2).values.tolist()
        return f"{problem.id} differs at token {at}, where the base's two best logits are {best - second:.1e} apart"

    def _generate(
        self, mode: str, inputs: Batch, max_new_tokens: int | None
    ) -> tuple[list[list[int]], Sequence[RowStats | None]]:
        """New tokens of each row, greedily, as many as the model's generation config allows by default."""
        if mode == "autoregressive":
            limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
            output = self.model.generate(**inputs._asdict(), do_sample=False, **limit)
            rows = output[:, inputs.input_ids.shape[1] :].tolist()
            return [until_end(row, self._end_ids) for row in rows], [None] * len(rows)
        rule = self.exit if mode == "specexit" else ExitConfig.off()
        out = self.decoder.generate(*inputs, max_new_tokens=max_new_tokens, temperature=0.0, exit=rule)
        return out.new_tokens, out.stats

    def _encode(self, problems: Sequence[Problem]) -> Batch:
        """The problems as chat prompts."""
        batch = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": problem.question}] for problem in problems],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_dict=True,
            return_tensors="pt",
        )
        return Batch(batch["input_ids"].to(self.model.device), batch["attention_mask"].to(self.model.device))

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
