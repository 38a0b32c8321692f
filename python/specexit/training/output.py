"""What training leaves in its folder: the draft, and the log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from specexit.drafts import Eagle3Draft, save_draft
from specexit.files import naming
from specexit.training.checkpoint import check_settings, checkpoints

LOG = "training.jsonl"
PROVENANCE = "training"  # the key of it in the draft's config.json


def finished(output: Path, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """The held-out measurements of the run that has filled the folder; None where there is none, or one under way.

    Raises ValueError where the folder holds something else.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, {output} is a file")
    if checkpoints(output):
        return None
    path = output / "config.json"
    if not path.exists():
        if (output / "model.safetensors").exists():
            raise ValueError(f"output must be a new folder, {output} holds a model")
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[PROVENANCE]
        held_out = found.pop("held_out")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"output must be a new folder, {output} holds another model") from None
    check_settings(_flat(found), _flat(json.loads(json.dumps(provenance))), path)
    return dict(held_out)


def _flat(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Its settings beside the rest, so that one which differs is named alone."""
    return {**{key: value for key, value in provenance.items() if key != "settings"}, **provenance.get("settings", {})}


def write_draft(draft: Eagle3Draft, output: Path, provenance: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write the draft in `dtype`, which it has from then on. A kill leaves no config.json of half a draft."""
    draft.config = replace(draft.config, extra={**draft.config.extra, PROVENANCE: dict(provenance)})
    temporary = output / ".draft"
    save_draft(draft.to(dtype), temporary)
    shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # safetensors writes for its owner only
    for name in ("model.safetensors", "config.json"):
        (temporary / name).replace(output / name)
    shutil.rmtree(temporary)


class Log:
    """training.jsonl: a JSON object a line. A run that goes on drops the lines behind the step that it goes on from.

    tell  is given each line too; None: neither written nor told, by a process that is not the first

    While it is open no other run can write to the folder: ValueError.
    """

    def __init__(self, output: Path, step: int, tell: Callable[[Mapping[str, Any]], None] | None) -> None:
        self._path = output / LOG
        self._step = step
        self._tell = tell

    def __enter__(self) -> Log:
        if self._tell is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            try:
                with naming(self._path):
                    self._file.truncate(self._kept())
            except BaseException:
                self._file.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._tell is not None:
            with nullcontext() if kind is None else suppress(OSError):  # of a full disk: the first error says it
                self._file.close()

    def _kept(self) -> int:
        """Bytes of the lines up to the step that the run goes on from."""
        self._file.seek(0)
        size = 0
        for line in self._file if self._step else ():
            if not line.endswith(b"\n") or json.loads(line)["step"] > self._step:
                break
            size += len(line)
        return size

    def write(self, line: Mapping[str, Any], again: bool = False) -> None:
        """Add a line; `again`: it is there already, and only told."""
        if self._tell is None:
            return
        if not again:
            with naming(self._path):
                self._file.write(json.dumps(line).encode() + b"\n")
                self._file.flush()
        self._tell(line)
