"""Checkpoints of a run of training: written whole or not at all, and gone on with only by the run they are of."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specexit.files import naming

VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.pt")


def checkpoints(output: Path) -> list[Path]:
    """Those in the folder of a run, the oldest first."""
    found = [path for path in (output / FOLDER).glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))  # type: ignore[index]


def save_checkpoint(output: Path, step: int, content: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step`, and remove all but the last `keep`. A kill at any time leaves a whole one."""
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = folder / f".{path.name}"
    packed = io.BytesIO()  # torch.save into a full disk is a RuntimeError that names neither
    torch.save({"version": VERSION, "step": step, **content}, packed)
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(packed.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in checkpoints(output)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint. Raises ValueError where it is damaged, or was made with other settings."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of training: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"{path} must be a checkpoint of version {VERSION}")
    check_settings(content["settings"], settings, path)
    return content


def check_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, which names the setting, where a run was started with another one."""
    # What follows from the settings, whose names have spaces, comes last: the seed is named, not the weights it gives.
    for key in sorted({*found, *wanted}, key=lambda key: (" " in key, key)):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} was made with another {key}: {found.get(key)!r}, now {wanted.get(key)!r}; "
                "give another output folder, or the settings that it was made with"
            )


def remove_checkpoints(output: Path) -> None:
    """Remove all of a run's, the newest last: what is left after a kill is still whole."""
    for path in checkpoints(output):
        path.unlink()
    folder = output / FOLDER
    if folder.is_dir():
        for path in folder.glob(".step-*.pt"):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
