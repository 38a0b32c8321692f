"""What the commands share: the two consoles, one-line errors, and files that are written whole or not at all."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from specexit import files

STANDARD_OUTPUT = Path("-")


class RunFailed(Exception):
    """The input was fine, and the run did not succeed: exit status 1."""


def open_stdio() -> None:
    """Characters that the terminal's encoding lacks are replaced: a run must not die of a tick mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def stdout() -> Console:
    return Console(highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def report_error(message: object, status: int, hint: bool = False) -> int:
    """One line on stderr, whatever the exception's text looks like. Returns `status`."""
    line = " ".join(str(message).split()) or type(message).__name__
    console = stderr()
    console.print("[bold red]error:[/]", end=" ", soft_wrap=True)
    console.print(line, markup=False, soft_wrap=True)
    if hint:
        console.print(
            "[dim]specexit --help lists the commands, specexit COMMAND --help the options.[/]", soft_wrap=True
        )
    return status


def note(message: str) -> None:
    """A remark on stderr, which keeps stdout for the result."""
    stderr().print(message, style="dim", markup=False, soft_wrap=True)


def require_files(paths: Iterable[Path], option: str) -> None:
    """Raise ValueError for one that is not there."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{option}: there is no file {path}")


def require_writable(path: Path | None, option: str) -> None:
    """Raise ValueError now, not after a long run, if `path` could not be written. None and "-" pass."""
    if path is None or path == STANDARD_OUTPUT:
        return
    target = path.resolve()
    if target.is_dir():
        raise ValueError(f"{option} must be a file, {path} is a directory")
    if not target.parent.is_dir():
        raise ValueError(f"{option}: there is no directory {path.parent}")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part; "-" is stdout."""
    if path == STANDARD_OUTPUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():  # a pipe or a device: replacing it would destroy it
            target.write_bytes(data)
            return
        files.write_whole(target, data)
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror}") from error
