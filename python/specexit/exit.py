"""When thinking is cut: the settings, their checks, and the rules on the device that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from specexit import checks
from specexit.drafts.base import signal_columns
from specexit.thinking import Markers, Tokenizer, paragraph_breaks, release_breaks, release_end, thinking_markers
from specexit_kernels.state import NO_BUDGET, SIGNALS, ExitRules, Smoothing

MAX_WINDOW = 1024  # every signal of every row keeps so many values
_CHOICES = {
    "smoothing": tuple(kind.name.lower() for kind in Smoothing),
    "granularity": ("token", "step"),
    "source": ("auto", "fc", "output"),
}
# Rows of a batch may differ in all but these.
_SHARED = ("smoothing", "window", "granularity", "source", "boundary_ids", "start_ids", "end_ids", "force_ids")


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """The rule by which thinking ends early.

    confidence, progress, remaining
        Thinking ends at a paragraph's end where the smoothed signals are above, above and below these, strictly.
        confidence (that the answer is known) and progress (through the thinking) are probabilities, remaining is a
        number of tokens; None leaves a signal out. The defaults are the public release's.
    smoothing, alpha, window
        How a signal's values at successive tokens become the one that is compared: "ewma" weighs the newest with
        `alpha`; "window" is the mean of the last `window` values; "momentum" adds the mean of their differences to the
        newest; "none" takes the newest. alpha 0.5 remembers some four tokens: at the end of a paragraph, little but its
        last sentence. With the release's thresholds it costs the bundled pair no answer (see its model card); noisier
        signals want less.
    granularity
        "token": the exit is decided at each token, and where it falls depends on the text alone. "step": the release's
        rule, one mean value a decoding step and a decision by the steps before it.
    source
        Which of the draft's signals are read: "fc", the rows of its feature projection; "output", its exit head, on its
        own output; "auto", the exit head where there is one.
    min_thinking_tokens
        The signals end no thinking shorter than this.
    thinking_budget, hard_budget
        Thinking of so many tokens ends at the next paragraph's end, or, if hard, at once. It holds without signals too.
    enabled
        False: the signals end nothing; a budget still does.
    boundary_ids, start_ids, end_ids, force_ids
        Ids that end a paragraph, one each; and sequences: that start thinking (empty: it starts but once), that end it,
        and that follow a cut. None: as the tokenizer says, and `force_ids` as `end_ids` where those are given.
    assume_thinking
        Whether a prompt ends inside the thinking text; None: as its last marker says.

    Raises TypeError or ValueError for a setting that cannot be, naming it.
    """

    confidence: float | None = 0.8
    progress: float | None = 0.3
    remaining: float | None = 200.0
    smoothing: Literal["ewma", "none", "window", "momentum"] = "ewma"
    alpha: float = 0.5
    window: int = 8
    granularity: Literal["token", "step"] = "token"
    source: Literal["auto", "fc", "output"] = "auto"
    min_thinking_tokens: int = 0
    thinking_budget: int | None = None
    hard_budget: bool = False
    enabled: bool = True
    boundary_ids: Sequence[int] | None = None
    start_ids: Sequence[int] | None = None
    end_ids: Sequence[int] | None = None
    force_ids: Sequence[int] | None = None
    assume_thinking: bool | None = None

    def __post_init__(self) -> None:
        for name in SIGNALS:
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), 0.0, math.inf if name == "remaining" else 1.0)
        if self.enabled and all(getattr(self, name) is None for name in SIGNALS):
            raise ValueError(
                "confidence, progress and remaining must not all be None; to read no signal, enabled=False"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, was {getattr(self, name)!r}")
        checks.number("alpha", self.alpha, 0.0, 1.0)
        if self.alpha == 0:
            raise ValueError("alpha must be above 0, was 0")
        checks.integer("window", self.window, 2 if self.smoothing == "momentum" else 1, MAX_WINDOW)
        checks.integer("min_thinking_tokens", self.min_thinking_tokens, 0)
        if self.thinking_budget is not None:
            checks.integer("thinking_budget", self.thinking_budget, 1)
        for name in ("enabled", "hard_budget"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, was {type(getattr(self, name)).__name__}")
        if self.hard_budget and self.thinking_budget is None:
            raise ValueError("hard_budget must come with a thinking_budget, was True without one")
        for name in ("boundary_ids", "start_ids", "end_ids", "force_ids"):
            if getattr(self, name) is not None:
                found = checks.ids(name, getattr(self, name))
                if not found and name != "start_ids":
                    raise ValueError(f"{name} must hold at least one id, was empty")
                object.__setattr__(self, name, found)
        if self.assume_thinking is not None and not isinstance(self.assume_thinking, bool):
            raise TypeError(f"assume_thinking must be a bool or None, was {type(self.assume_thinking).__name__}")
        if self.start_ids == () and self.assume_thinking is None:
            raise ValueError("start_ids must not be empty unless assume_thinking says whether the thinking has begun")

    @classmethod
    def off(cls) -> ExitConfig:
        """Thinking is never cut."""
        return cls(enabled=False)

    @classmethod
    def release(cls) -> ExitConfig:
        """The rule of the public release: thinking from the first token, until the first `</think>` or exit."""
        return cls(alpha=0.1, granularity="step", source="fc", start_ids=(), assume_thinking=True)

    @classmethod
    def from_draft(cls, calibration: Mapping[str, Any], rule: str | None = None) -> ExitConfig:
        """A rule that was calibrated for a draft.

        calibration  `draft.calibration`
        rule         its name; None: the draft's default

        Raises ValueError when the draft has no such rule.
        """
        rules = calibration.get("rules", {})
        name = calibration.get("default") if rule is None else rule
        if name not in rules:
            raise ValueError(f"rule must be one of {', '.join(rules) or 'none: the draft has no rule'}, was {name!r}")
        return cls(**rules[name]["exit"])

    @property
    def active(self) -> bool:
        """Whether anything can cut the thinking."""
        return self.enabled or self.thinking_budget is not None


def markers_for(config: ExitConfig, tokenizer: Tokenizer | None) -> Markers:
    """The ids of the settings, and for those that are None, of the tokenizer: with "step" as the release finds them.

    The whole vocabulary may be decoded for it: keep the result. A config that cuts nothing gets what there is, without
    boundaries.

    Raises ValueError when neither has them.
    """
    start, end, force, boundary = config.start_ids, config.end_ids, config.force_ids, config.boundary_ids
    if tokenizer is not None:
        step = config.granularity == "step"
        try:
            if end is None and step:
                end = release_end(tokenizer)
            if start is None or end is None:
                found = thinking_markers(tokenizer)
                start = found[0] if start is None else start
                if end is None:
                    end, force = found[1], found[2] if force is None else force
        except ValueError:
            if config.active:
                raise
        if boundary is None and config.active:
            boundary = (release_breaks if step else paragraph_breaks)(tokenizer)
    elif config.active and (start is None or end is None or boundary is None):
        raise ValueError(
            "tokenizer must be given for an exit, was None; or give start_ids, end_ids and boundary_ids in ExitConfig,"
            " or switch the exit off with ExitConfig.off()"
        )
    end = end or ()
    return Markers(tuple(start or ()), tuple(end), tuple(force or end), tuple(boundary or ()))


def rules_for(
    configs: ExitConfig | Sequence[ExitConfig],
    vocabulary: int,
    markers: Markers,
    batch: int,
    device: torch.device | str | None = None,
    signals: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> ExitRules:
    """The rules of a batch on its device.

    configs     one for all rows, or one a row; those that cut nothing go with any others
    vocabulary  V: ids that the base can emit
    markers     from `markers_for`
    signals     those that the draft gives, by name
    stop_ids    ids that end a sequence

    Raises ValueError when the rows' settings cannot go together, or the draft or the ids lack what they need.
    """
    rows = [configs] * batch if isinstance(configs, ExitConfig) else list(configs)
    if len(rows) != batch:
        raise ValueError(f"exit must be one ExitConfig, or one for each of {batch} prompts, was {len(rows)}")
    active = [row for row in rows if row.active]
    shared = active[0] if active else ExitConfig.off()
    for row in active:
        _check_alike(shared, row)
        missing = [n for n in SIGNALS if n not in signals and row.enabled and getattr(row, n) is not None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} must be None: of {', '.join(SIGNALS)} the draft gives "
                f"{', '.join(signals) or 'none'}; without any, set enabled=False and a thinking_budget"
            )
    _check_markers(markers, vocabulary, active)

    # A signal that is left out passes whatever it says; a row whose exit is off waits for one that cannot pass.
    names = SIGNALS[: signal_columns(signals)]
    used = [[getattr(row, name) is not None or not row.enabled for name in names] for row in rows]
    thresholds = [[(getattr(row, name) or 0.0) if row.enabled else math.inf for name in names] for row in rows]
    boundary = torch.zeros(vocabulary, dtype=torch.bool)
    boundary[[index for index in markers.boundary if index < vocabulary]] = True
    smoothing = Smoothing[shared.smoothing.upper()]

    def tensor(values: Sequence[object], dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).view(shape or (len(values),)).to(device)

    return ExitRules(
        thresholds=tensor(thresholds, torch.float32, batch, len(names)),
        used=tensor(used, torch.bool, batch, len(names)),
        alpha=tensor([row.alpha for row in rows], torch.float32),
        min_thinking=tensor([row.min_thinking_tokens for row in rows], torch.int32),
        budget=tensor([NO_BUDGET if row.thinking_budget is None else row.thinking_budget for row in rows], torch.int32),
        hard_budget=tensor([row.hard_budget for row in rows], torch.bool),
        boundary=boundary.to(device),
        start=tensor(markers.start, torch.int32),
        end=tensor(markers.end, torch.int32),
        force=tensor(markers.force if active else (), torch.int32),
        smoothing=smoothing,
        window=shared.window if smoothing in (Smoothing.WINDOW, Smoothing.MOMENTUM) else 0,
        per_step=shared.granularity == "step",
        has_minimum=any(row.min_thinking_tokens for row in rows),
        has_budget=any(row.thinking_budget is not None for row in rows),
        force_stops=bool(active) and markers.force[0] in stop_ids,
    )


def _check_alike(shared: ExitConfig, row: ExitConfig) -> None:
    """Raise ValueError where two rows differ in what a batch must share."""
    for name in _SHARED:
        ours, its = getattr(shared, name), getattr(row, name)
        if ours != its:
            raise ValueError(f"{name} must be the same in every row of a batch, was {ours!r} and {its!r}")


def _check_markers(markers: Markers, vocabulary: int, active: Sequence[ExitConfig]) -> None:
    """Raise ValueError where the ids do not allow an exit."""
    for name in ("start", "end", "force"):
        for index in getattr(markers, name):
            if not 0 <= index < vocabulary:
                raise ValueError(f"{name}_ids must be in [0, {vocabulary}), the base's vocabulary, was {index}")
    if not active:
        return
    for index in active[0].boundary_ids or ():  # a tokenizer may have ids that its model has no row for
        if index >= vocabulary:
            raise ValueError(f"boundary_ids must be in [0, {vocabulary}), the base's vocabulary, was {index}")
    start, end, force = markers.start, markers.end, markers.force
    if not end or not force:
        raise ValueError("end_ids must hold the end of thinking, was empty")
    if not markers.boundary and any(row.enabled or not row.hard_budget for row in active):
        raise ValueError(
            "boundary_ids must be given: no single token of this tokenizer ends a paragraph; the id of its line feed"
            " will do where paragraphs are lines"
        )
    if start[-len(end) :] == end:
        raise ValueError(f"start_ids must not end with end_ids, was {start} and {end}")
    if start and any(force[n : n + len(start)] == start for n in range(len(force))):
        raise ValueError(f"force_ids must not hold start_ids, was {force} and {start}")
