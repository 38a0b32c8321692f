"""The settings of `fit`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from specexit import checks
from specexit.training.drafting import Placement

_FREE = ("checkpoint_every", "keep", "cache_gib")  # what a run may be gone on with although it differs


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a draft is fitted.

    steps, batch_size   updates, and traces in each of them and each process
    optimizer, lr       "muon": Muon for the layer's matrices, AdamW for the rest. lr None: 3e-3 at a hidden size of
                        128, and in inverse proportion to it
    depth, decay        steps of the unroll, of which step j weighs decay ** j. At least the depth of the trees that are
                        to be decoded with
    placement           where signals are trained: "output" on the layer's output, "fc" in rows of the feature
                        projection, "both"
    signals_only        with `init`: the token part stays, to the bit, as it is
    init                folder or hub id of a draft to start from; None: random weights
    draft_vocab         ids that a new draft can propose; None: all, or the 32000 most frequent of more
    max_length          tokens of a text that are read
    held_out            share of the problems that is only measured on
    boundary_weight     of a label at a paragraph's end; elsewhere it is 1
    signal_share        norm of each signal's gradient as a share of the tokens', see losses.py
    clip                largest norm of a gradient
    seed                of the weights and of the order of the data
    save_dtype          of the written draft: "bfloat16", "float16" or "float32"; None: bfloat16, or with signals_only
                        the narrowest that holds what was there
    checkpoint_every    steps; 0: none but the last
    keep                checkpoints that are kept while it runs
    cache_gib           of the host's memory for what the base says of traces, which so it need not say each epoch

    Raises TypeError or ValueError for a setting that cannot be, naming it.
    """

    steps: int = 1000
    batch_size: int = 8
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float | None = None
    depth: int = 6
    decay: float = 0.85
    placement: Placement = "output"
    signals_only: bool = False
    init: str | os.PathLike[str] | None = None
    draft_vocab: int | None = None
    max_length: int = 2048
    held_out: float = 0.05
    boundary_weight: float = 4.0
    signal_share: float = 0.5
    clip: float = 1.0
    seed: int = 0
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    checkpoint_every: int = 200
    keep: int = 2
    cache_gib: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("depth", 1), ("max_length", 3), ("seed", 0)):
            checks.integer(name, getattr(self, name), low)
        checks.integer("checkpoint_every", self.checkpoint_every, 0)
        checks.integer("keep", self.keep, 1)
        for name in ("decay", "held_out"):
            checks.number(name, getattr(self, name), 0.0, 1.0)
        for name in ("boundary_weight", "signal_share", "clip", "cache_gib"):
            checks.number(name, getattr(self, name), 0.0)
        if self.lr is not None:
            checks.number("lr", self.lr, 0.0)
        if self.draft_vocab is not None:
            checks.integer("draft_vocab", self.draft_vocab, 1)
        for name, choices in (
            ("optimizer", ("muon", "adamw")),
            ("placement", ("output", "fc", "both")),
            ("save_dtype", (None, "bfloat16", "float16", "float32")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, was {getattr(self, name)!r}")
        if self.signals_only and self.init is None:
            raise ValueError("signals_only must come with init, the draft whose token part stays")
        if self.init is not None and self.draft_vocab is not None:
            raise ValueError("draft_vocab must be None with init, which has its own vocabulary")

    def identity(self) -> dict[str, Any]:
        """What the weights depend on, as JSON."""
        found = {key: value for key, value in asdict(self).items() if key not in _FREE}
        return found | {"init": None if self.init is None else os.fspath(self.init)}
