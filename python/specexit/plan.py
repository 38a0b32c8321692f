"""From exit settings to what a batch needs on its device: rules, ids, and which prompts end inside the thinking."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specexit.drafts.base import Draft
from specexit.exit import ExitConfig, markers_for, rules_for
from specexit.identity import fingerprint
from specexit.thinking import Markers, Tokenizer, count_thinking_tokens, is_thinking
from specexit_kernels import ExitRules
from specexit_kernels.state import SIGNALS

Exit = ExitConfig | Sequence[ExitConfig]


@dataclass(frozen=True)
class ExitPlan:
    """The exit of one call, which has one row of settings a prompt, or one for all.

    source   where the draft's signals are read; None: they are not
    markers  of the rows whose thinking can be cut
    counted  those by which thinking is counted, per row
    assume   what the settings say of whether a prompt ends inside the thinking text, per row
    """

    rules: ExitRules
    source: str | None
    markers: Markers
    counted: list[Markers]
    assume: list[bool | None]

    @property
    def shared(self) -> tuple[object, ...]:
        """What all rows share, and so is fixed in a captured step; two plans that agree in it have the same."""
        rules = self.rules
        flags = (rules.per_step, rules.has_minimum, rules.has_budget, rules.force_stops)
        return (self.markers, self.source, rules.thresholds.shape[1], rules.smoothing, rules.window, *flags)

    def is_thinking(self, prompt: Sequence[int], row: int) -> bool:
        """Whether a prompt ends inside the thinking text."""
        return is_thinking(prompt, self.counted[row], self.assume[row])

    def count_thinking(self, prompt: Sequence[int], generated: Sequence[int], row: int) -> int:
        """Generated tokens inside the thinking text."""
        return count_thinking_tokens(prompt, generated, self.counted[row], self.assume[row])


def check_exit(exit: object) -> None:
    """Raise TypeError for what is neither an ExitConfig nor a sequence of them."""
    for config in exit if isinstance(exit, (list, tuple)) else [exit]:
        if not isinstance(config, ExitConfig):
            raise TypeError(f"exit must be an ExitConfig, or one for each prompt, was {type(config).__name__}")


class ExitPlanner:
    """Makes plans for one decoder; what a tokenizer says of markers and boundaries is looked up once.

    lock  held while the draft selects a source
    """

    def __init__(
        self,
        draft: Draft | None,
        tokenizer: Tokenizer | None,
        vocabulary: int,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._lock = lock or nullcontext()
        self.draft = draft
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._markers: dict[object, Markers] = {}

    def plan(self, exit: Exit, batch: int, stop_ids: Sequence[int], device: torch.device) -> ExitPlan:
        """Check the settings of `batch` rows against draft and tokenizer, and let the draft read what they ask for.

        Raises TypeError for what is no ExitConfig, ValueError where the draft or the ids lack what the settings need.
        """
        check_exit(exit)
        configs = [exit] * batch if isinstance(exit, ExitConfig) else list(exit)
        lead = next((config for config in configs if config.active), configs[0] if configs else ExitConfig.off())
        signals: Sequence[str] = ()
        source = lead.source if any(config.enabled for config in configs) else None
        if self.draft is not None:
            with self._lock:
                self.draft.select_source(source)
                signals = self.draft.signals
        markers = self.markers(lead)
        return ExitPlan(
            rules=rules_for(exit, self.vocabulary, markers, batch, device, signals, stop_ids),
            source=source,
            markers=markers,
            counted=[markers if config.active else self.markers(config) for config in configs[:batch]],
            assume=[config.assume_thinking for config in configs[:batch]],
        )

    def markers(self, config: ExitConfig) -> Markers:
        """The ids by the settings and the tokenizer."""
        key = (
            config.start_ids,
            config.end_ids,
            config.force_ids,
            config.boundary_ids,
            config.granularity,
            config.active,
        )
        if key not in self._markers:
            self._markers[key] = markers_for(config, self.tokenizer)
        return self._markers[key]

    def default(self, base: nn.Module | None = None) -> ExitConfig:
        """The rule that was calibrated for the draft, or the default thresholds of the signals it has; no exit where
        there are no signals, or no tokenizer that knows the markers of thinking. The draft selects its best signals.

        base   what is decoded with. Raises ValueError where the rule was calibrated with another
        """
        if self.draft is None or self.tokenizer is None:
            return ExitConfig.off()
        self.draft.select_source("auto")
        if not self.draft.signals:
            return ExitConfig.off()
        calibration = self.draft.calibration
        if calibration.get("rules"):
            made_with = calibration.get("base")
            if base is not None and made_with is not None and made_with != fingerprint(base):
                raise ValueError(
                    "the draft's calibration.json was made with another base than this one: calibrate for this base,"
                    " or give a rule of your own as exit="
                )
            config = ExitConfig.from_draft(calibration)
            self.draft.select_source(config.source)
        else:
            absent: dict[str, Any] = dict.fromkeys(set(SIGNALS) - set(self.draft.signals))
            config = ExitConfig(**absent)
        try:
            rules_for(config, self.vocabulary, self.markers(config), 1, signals=self.draft.signals)
        except ValueError:
            return ExitConfig.off()
        return config
