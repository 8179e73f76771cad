"""Files that belong to one user alone and exist whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from protocols.errors import ConfigError

PART = ".part-"
STALE_S = 3600.0
LOCK_POLL_S = 0.02


def make_private(directory: Path) -> None:
    """Makes a directory of mode 0700 and whatever is missing above it; OSError."""
    for missing in [path for path in (directory, *directory.parents) if not path.exists()][::-1]:
        with contextlib.suppress(FileExistsError):  # by another process
            missing.mkdir(mode=0o700)


def check_private(path: Path, otherwise: str = "") -> None:
    """ConfigError if other users of this machine can read or write a secret file; `otherwise`: the remedy if someone has read it."""
    if path.stat().st_mode & 0o077:
        remedy = f"run `chmod 600 {path}`" + (f" if nobody has read it; otherwise {otherwise}" if otherwise else "")
        raise ConfigError(f"{path} can be read or written by other users of this machine", remedy=remedy)


def check_room(directory: Path, size: int) -> None:
    """ConfigError unless the disk of a directory, which may still be made, has room for so many bytes more."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ConfigError(
            f"{size} bytes are to be kept in {directory}, and its disk has {free} left", remedy="make room, or choose another --cache"
        )


def sync(path: Path) -> None:
    """Makes durable what a file holds, or what was renamed or removed in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(part: Path, path: Path) -> None:
    """Gives a written and synchronised file its name, durably."""
    os.replace(part, path)
    sync(path.parent)


@contextlib.contextmanager
def part_file(directory: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file of mode 0600 to write to; removed at the end of the block unless it was moved meanwhile. OSError."""
    make_private(directory)
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=PART)
    file = os.fdopen(descriptor, "wb")
    try:
        yield file, Path(name)
    finally:
        for end in (file.close, lambda: os.unlink(name)):  # what a full disk says to the first has been said before
            with contextlib.suppress(OSError):
                end()


def finish(file: BinaryIO) -> None:
    """Makes a file's content durable."""
    file.flush()
    os.fsync(file.fileno())


def write_private(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file of mode 0600 whole or not at all, durably; OSError."""
    with part_file(path.parent) as (file, part):
        for each in parts:
            file.write(each)
        finish(file)
        move_into_place(part, path)


def sweep(directory: Path) -> None:
    """Removes what processes that were killed while they wrote have left."""
    for path in directory.glob(f"{PART}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turns what a disk says into a ConfigError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write {path}: {reason}", remedy="free space or choose another --cache") from None


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Holds a lock file, made where there is none, against other threads and processes; ConfigError if it cannot be had in time."""
    deadline = time.monotonic() + wait_s
    with refusals(path):
        make_private(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            with refusals(path), contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise ConfigError(f"{path} is held by another process for more than {wait_s:g} s", remedy="look for one that hangs")
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
