"""The two files of a job: requests, read twice, and replies, each whole and durable before it counts."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import functools
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from privinf.jobs.request import MOST_LINE, Request
from protocols.errors import ConfigError

STANDARD_INPUT = Path("-")
MOST_PIPE = 1 << 30
"""Bytes of requests that come through a pipe: they are read once, and kept in memory, for they are read twice."""


@dataclass(frozen=True)
class Requests:
    """A file of requests, one a line; one that ends in .txt has plain prompts. Lines that are empty are left out, and count.

    `-` is standard input. What begins with a byte order mark, as some systems' files do, begins after it.
    """

    path: Path

    @property
    def text(self) -> bool:
        """Whether lines are prompts as they stand."""
        return self.path.suffix == ".txt"

    def lines(self) -> Iterator[tuple[int, str]]:
        """(number from 1 on, line); ConfigError for a file or a line that cannot be read."""
        try:
            with self._open() as file:
                number = 0
                while line := file.readline(MOST_LINE + 1):
                    number += 1
                    if len(line) > MOST_LINE:
                        raise ConfigError(f"{self.path}: line {number} is longer than {MOST_LINE} bytes")
                    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if line.strip():
                        yield number, line.decode("utf-8").rstrip("\r\n")
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}", remedy="give a file of requests, one a line") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{self.path}: line {number} is no UTF-8 text") from None

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._piped is None else io.BytesIO(self._piped)

    @functools.cached_property
    def _piped(self) -> bytes | None:
        """All of what can be read but once; None of a file. OSError, ConfigError where it is too much."""
        if self.path == STANDARD_INPUT:
            data = sys.stdin.buffer.read(MOST_PIPE + 1)
        elif stat.S_ISFIFO(mode := self.path.stat().st_mode) or stat.S_ISCHR(mode):
            with self.path.open("rb") as file:
                data = file.read(MOST_PIPE + 1)
        else:
            return None
        if len(data) > MOST_PIPE:
            raise ConfigError(f"more than {MOST_PIPE} bytes of requests come through {self.path}", remedy="give a file")
        return data

    def read(self) -> Iterator[tuple[int, str, Request]]:
        """Every request with its line; ConfigError names the file."""
        for number, line in self.lines():
            try:
                yield number, line, Request.read(number, line, text=self.text)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {error.message}", remedy=error.remedy) from None

    def check(self) -> dict[str, str]:
        """All of it, before anything is asked: {custom_id: id}; ConfigError for the first line that is none, and for a name used twice."""
        found: dict[str, str] = {}
        for number, _, request in self.read():
            if request.custom_id in found:
                raise ConfigError(f"{self.path}: line {number} has a custom_id that an earlier line has", remedy="give each its own")
            found[request.custom_id] = request.id
        if not found:
            raise ConfigError(f"{self.path} has no request", remedy="give a file of requests, one a line")
        return found


@dataclass
class Replies:
    """The file of replies, for one job at a time. What an end by force left of a last line is cut off, and asked for again."""

    path: Path
    wanted: dict[str, str]  # {custom_id: id} of the job
    done: set[str] = field(default_factory=set)
    failed: int = 0
    model: str | None = None  # of the replies that are there
    _file: BinaryIO | None = None
    _end: int = 0  # of the last whole line

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a device, or a pipe: nothing there could be gone on with
            os.close(descriptor)
            raise ConfigError(f"cannot write {self.path}: it is no file", remedy="give a file, which the job can go on with")
        self._file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_in()
        except BlockingIOError:
            self.close()
            raise ConfigError(f"another job writes {self.path}", remedy="wait for it, or give another output file") from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file to others; may be called again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _take_in(self) -> None:
        """What is there already; ConfigError if it is of another job."""
        assert self._file is not None
        self._end = 0
        for number, line in enumerate(iter(lambda: self._file.readline(), b""), 1):  # type: ignore[union-attr]
            whole = line.endswith(b"\n")
            if not whole and self._begins(line):
                break
            try:
                found = json.loads(line)
                name, id_, response = found["custom_id"], found["id"], found["response"]
                body = response["body"]
                known = whole and self.wanted.get(name) == id_ and name not in self.done
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                known = False
            if not known:
                remedy = "give this job a file of its own, or the requests that this file's replies are of"
                raise ConfigError(f"{self.path}: line {number} is no reply to one of these requests", remedy=remedy)
            self.done.add(name)
            if response["status_code"] == 200:
                self.model = self.model or body.get("model")
            else:
                self.failed += 1
            self._end += len(line)
        os.ftruncate(self._file.fileno(), self._end)

    def _begins(self, line: bytes) -> bool:
        """Whether the last line, which does not end, is the beginning of a reply that is not there; after a loss of power zeros follow."""
        rest = line.rstrip(b"\0")
        heads = (_head(self.wanted[name], name).encode() for name in self.wanted if name not in self.done)
        return any(rest[: len(head)] == head[: len(rest)] for head in heads)

    def add(self, name: str, status: int, body: dict[str, Any]) -> None:
        """A request's reply or failure, durably. ConfigError where the disk is full; the file then ends before it."""
        assert self._file is not None and name not in self.done
        response = {"status_code": status, "request_id": self.wanted[name], "body": body}
        line = json.dumps({"id": self.wanted[name], "custom_id": name, "response": response, "error": None}, ensure_ascii=False)
        data, at, file = memoryview(line.encode() + b"\n"), self._end, self._file.fileno()
        try:
            while data:  # no buffer: what it held of a line that does not fit would be written when it is closed
                written = os.pwrite(file, data, at)
                data, at = data[written:], at + written
            os.fsync(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, self._end)
            text = f"cannot write {self.path}: {error.strerror}"
            raise ConfigError(text, remedy="what is in it is whole; make room, and run the same command again") from None
        self._end = at
        self.done.add(name)
        self.failed += status != 200


def _head(id_: str, name: str) -> str:
    """What a request's reply begins with."""
    return json.dumps({"id": id_, "custom_id": name}, ensure_ascii=False)[:-1]
