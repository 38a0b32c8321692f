"""A small reasoning model that thinks too long, its EAGLE-3 draft with exit signals, and problems for both.

Made for demos and tests: it solves one synthetic task, see MODEL_CARD.md beside this file.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple


class Pair(NamedTuple):
    """Where the pair's files are."""

    base: Path  # folder of a transformers model with its tokenizer
    draft: Path  # folder of an EAGLE-3 draft
    test: Path  # 300 problems, one JSON object a line
    calibration: Path  # 300 others, on which thresholds were chosen


class Problem(NamedTuple):
    """A question as the user writes it, and the right answer as the model writes it: two digits."""

    id: str
    question: str
    answer: str


def bundled_pair() -> Pair:
    """Paths of the installed pair. Raises RuntimeError where the package is not unpacked on a disk."""
    root = resources.files(__name__)
    if not isinstance(root, Path):  # imported from an archive: transformers can only load from a folder
        raise RuntimeError("the bundled pair needs an installation in a folder, not in an archive")
    return Pair(root / "base", root / "draft", root / "data" / "test.jsonl", root / "data" / "calibration.jsonl")


def load_problems(split: Literal["test", "calibration"] = "test") -> list[Problem]:
    """The problems of a split, in the file's order. Raises ValueError for another split."""
    if split not in ("test", "calibration"):
        raise ValueError(f"split must be 'test' or 'calibration', was {split!r}")
    lines = getattr(bundled_pair(), split).read_text(encoding="utf-8").splitlines()
    return [Problem(**json.loads(line)) for line in lines]
