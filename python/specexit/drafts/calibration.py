"""Exit rules that were calibrated for a draft: calibration.json beside its weights.

    {"version": 1,
     "default": "1-percent",
     "rules": {"1-percent": {"exit": {"confidence": 0.5, "progress": 0.8, "remaining": 10, "source": "output"},
                             "kind": "certified", "temperature": 0.0, "max_loss": 0.01, "confidence_level": 0.95,
                             "evidence": {"problems": 1400, "losses": 5, "p_value": 0.013, ...}}},
     "base": "...", "draft": "..."}

`exit` holds fields of `ExitConfig`; one that is left out has its default. A "certified" rule keeps its promise with
the stated confidence; an "estimated" one kept it on the problems it was chosen on. `base` and `draft` are fingerprints
of what it was calibrated with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specexit.files import write_whole

CALIBRATION = "calibration.json"
VERSION = 1
KINDS = ("certified", "estimated")
IDS = ("boundary_ids", "start_ids", "end_ids", "force_ids")  # in a rule where they are not the tokenizer's
FIELDS = (  # of an exit rule; the others are the caller's
    "confidence",
    "progress",
    "remaining",
    "smoothing",
    "alpha",
    "window",
    "source",
    "min_thinking_tokens",
    *IDS,
)


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """What calibration.json of a draft's folder holds, checked; None where there is none.

    Raises ValueError, naming the file, for one that is broken.
    """
    file = folder / CALIBRATION
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _check(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is broken: {error}") from error
    found: dict[str, Any] = content
    return found


def write_calibration(folder: Path, content: Mapping[str, Any]) -> None:
    """Write calibration.json of a draft's folder, whole or not at all."""
    _check(content)
    write_whole(folder / CALIBRATION, (json.dumps(content, indent=2) + "\n").encode())


def from_thresholds(exit_head: Mapping[str, Any]) -> dict[str, Any]:
    """The rules of an older draft, `exit_head.thresholds_from_calibration` of its config.json, in the form of today.

    exit_head  {"thresholds_from_calibration": {"no_loss": {"conf", "prog", "remain", "alpha"}, ...}}, or without them

    Empty where it has none. Nothing is known of the evidence.
    """
    rules = {}
    for name, old in exit_head.get("thresholds_from_calibration", {}).items():
        exit = {"confidence": old.get("conf"), "progress": old.get("prog"), "remaining": old.get("remain")}
        if "alpha" in old:
            exit["alpha"] = old["alpha"]
        rules[name] = {"exit": {**exit, "source": "output"}, "kind": "estimated", "evidence": {}}
    if not rules:
        return {}
    return {"version": VERSION, "default": "no_loss" if "no_loss" in rules else next(iter(rules)), "rules": rules}


def _check(content: Any) -> None:
    from specexit.exit import ExitConfig  # which knows a draft's signals, and so imports this package

    if not isinstance(content, Mapping):
        raise ValueError(f"it must hold a JSON object, was {type(content).__name__}")
    if content.get("version") != VERSION:
        raise ValueError(f"version must be {VERSION}, was {content.get('version')!r}")
    for key in ("base", "draft"):
        if not isinstance(content.get(key), str):
            raise ValueError(f"{key} must be a fingerprint, was {content.get(key)!r}")
    rules = content.get("rules")
    if not isinstance(rules, Mapping) or not rules:
        raise ValueError(f"rules must be an object with at least one rule, was {rules!r}")
    if content.get("default") not in rules:
        raise ValueError(f"default must be one of {', '.join(rules)}, was {content.get('default')!r}")
    for name, rule in rules.items():
        exit = rule.get("exit") if isinstance(rule, Mapping) else None
        if not isinstance(exit, Mapping):
            raise ValueError(f"rules.{name} must be an object with an exit, was {rule!r}")
        if rule.get("kind") not in KINDS:
            raise ValueError(f"rules.{name}.kind must be one of {', '.join(KINDS)}, was {rule.get('kind')!r}")
        if unknown := sorted(exit.keys() - set(FIELDS)):
            raise ValueError(f"rules.{name}.exit must hold {', '.join(FIELDS)}, held {', '.join(unknown)}")
        try:
            ExitConfig(**exit)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rules.{name}.exit: {error}") from error
