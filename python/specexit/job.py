"""One prompt on its way: what was asked of it, and what has come of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from specexit.output import RowStats, SignalTrace
from specexit.publication import Published
from specexit_kernels import ExitReason, ExitRules, Finish
from specexit_kernels.state import SIGNALS


@dataclass(eq=False)
class Job:
    """A prompt to decode.

    index       of the prompt among all
    prompt      its ids, without padding
    prefix      its ids as transformers would pass them to a criterion, padding included; grows with the text
    limit       its tokens stand at positions below it
    wanted      the same, had the cache no hard capacity
    seed        of its noise
    rules       of its exit; of their rows, `rule` is its own
    thinking    whether the prompt ends inside the thinking text
    processors  that run on the host, on what the base says after the accepted tokens
    """

    index: int
    prompt: list[int]
    prefix: list[int]
    limit: int
    wanted: int
    seed: int
    rules: ExitRules
    rule: int
    thinking: bool
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    device: torch.device  # where transformers' criteria expect ids

    def __post_init__(self) -> None:
        self.stats = RowStats(prompt_tokens=len(self.prompt))
        self._padding = len(self.prefix) - len(self.prompt)

    @property
    def ended(self) -> bool:
        return self.stats.finish_reason is not None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the text so far."""
        return self.stats.prompt_tokens + self.stats.new_tokens

    @property
    def new_tokens(self) -> list[int]:
        return self.prefix[self._padding + len(self.prompt) :]

    def take(self, published: Published) -> None:
        """Add what a step has published: to the text, the statistics, the streamer; and ask the criteria."""
        stats = self.stats
        tokens = self._offer(published.tokens)
        self._extend_trace(published.trace[: len(tokens)])
        stats.steps += 1
        stats.accepted.append(len(tokens))
        stats.new_tokens += len(tokens)
        if stats.finish_reason is None and published.finish != Finish.RUNNING:
            cut_short = published.finish == Finish.LENGTH and self.limit < self.wanted
            stats.finish_reason = "capacity" if cut_short else published.finish.name.lower()  # type: ignore[assignment]
        # An exit whose end of thinking a criterion has cut off, in the same step, did not happen.
        if published.exit_reason != ExitReason.NONE and published.exit_position + 1 < self.length:
            stats.exit_position = published.exit_position
            stats.exit_reason = "signals" if published.exit_reason == ExitReason.SIGNALS else "budget"

    def _offer(self, tokens: list[int]) -> list[int]:
        """Hand tokens to the streamer and the criteria one by one, as plain decoding would; stop where one does."""
        if not self.criteria and self.streamer is None:
            self.prefix.extend(tokens)
            return tokens
        for count, token in enumerate(tokens, 1):
            self.prefix.append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self.criteria:
                ids = torch.tensor([self.prefix], dtype=torch.int64, device=self.device)
                if bool(self.criteria(ids, None).all()):
                    self.stats.finish_reason = "criteria"
                    return tokens[:count]
        return tokens

    def _extend_trace(self, steps: list[list[list[float]]]) -> None:
        """Add the read positions of one step; `steps` is [n][x, e][S], NaN where nothing was read."""
        if not steps:
            return
        if self.stats.trace is None:
            self.stats.trace = SignalTrace(names=SIGNALS[: len(steps[0][0])])
        first = self.length - 1  # the step's root
        for offset, (signals, smoothed) in enumerate(steps):
            if any(value == value for value in signals):
                self.stats.trace.positions.append(first + offset)
                self.stats.trace.signals.append(signals)
                self.stats.trace.smoothed.append(smoothed)
