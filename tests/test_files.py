"""Files that are written whole or not at all, and locks."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from specexit.files import locked, naming, write_whole


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """In here no file can grow beyond so many bytes: as a full disk, but without its privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_whole_or_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, b"old")
    with largest_file(1000), pytest.raises(OSError, match=str(file)) as caught:
        write_whole(file, b"new" * 1000)
    assert caught.value.errno == errno.EFBIG
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("file", b"old")]
    write_whole(file, b"new" * 1000)
    assert file.read_bytes() == b"new" * 1000


def test_an_error_keeps_the_name_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="inner"), naming(tmp_path / "outer"):
        (tmp_path / "inner").read_bytes()
    with pytest.raises(OSError, match="of no number"), naming(tmp_path / "outer"):
        raise OSError("of no number")


@pytest.mark.parametrize("folder", [True, False])
def test_one_has_the_lock(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir() if folder else path.touch()
    said = []

    def wait() -> None:
        with locked(path):
            said.append(True)

    with locked(path):
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            raise AssertionError("both have it")
        waits = Thread(target=wait, daemon=True)
        waits.start()
        waits.join(0.05)
        assert not said
    waits.join(60)
    assert said
    with locked(path, wait=False):
        pass
