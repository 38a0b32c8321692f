"""Speculative decoding with early exit from thinking, for any transformers model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specexit.bundled import bundled_pair, load_problems
    from specexit.config import TreeConfig
    from specexit.decoder import SpecExitDecoder
    from specexit.drafts import Draft, Eagle3Draft, load_draft, save_draft
    from specexit.exit import ExitConfig
    from specexit.output import Completion, GenerateOutput, RowStats, SignalTrace

_HOMES = {
    "Completion": "specexit.output",
    "Draft": "specexit.drafts",
    "Eagle3Draft": "specexit.drafts",
    "ExitConfig": "specexit.exit",
    "GenerateOutput": "specexit.output",
    "RowStats": "specexit.output",
    "SignalTrace": "specexit.output",
    "SpecExitDecoder": "specexit.decoder",
    "TreeConfig": "specexit.config",
    "bundled_pair": "specexit.bundled",
    "load_draft": "specexit.drafts",
    "load_problems": "specexit.bundled",
    "save_draft": "specexit.drafts",
}

__all__ = [
    "Completion",
    "Draft",
    "Eagle3Draft",
    "ExitConfig",
    "GenerateOutput",
    "RowStats",
    "SignalTrace",
    "SpecExitDecoder",
    "TreeConfig",
    "bundled_pair",
    "load_draft",
    "load_problems",
    "save_draft",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `specexit --help` must not wait for torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'specexit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
