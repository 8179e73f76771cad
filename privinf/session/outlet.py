"""Lines that nobody may ever read: written by a thread of their own, so that a full pipe holds up nobody.

A service says little, but whoever started it may have stopped to read: then the lines that do not fit are dropped, and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TextIO, TypeVar

T = TypeVar("T")
_LINES = 1000
"""How many lines may wait."""
_FLUSH_S = 1.0
"""How long an end waits until all is written."""


class Outlet(Generic[T]):
    """Gives what is `put` to `write`, which may block, one after the other; `lost` makes the one that says how many were dropped."""

    def __init__(self, write: Callable[[T], object], lost: Callable[[int], T]) -> None:
        self._write, self._lost = write, lost
        self._waiting: queue.SimpleQueue[T | None] = queue.SimpleQueue()  # whose put may interrupt itself: in a signal handler
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Never blocks, and may be called from anywhere."""
        if self._waiting.qsize() < _LINES:
            self._waiting.put(item)
        else:
            self._dropped += 1

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # nobody is left to read: what comes is dropped
            while (item := self._waiting.get()) is not None:
                self._write(item)
                if self._dropped and self._waiting.empty():
                    count, self._dropped = self._dropped, 0
                    self._write(self._lost(count))

    def close(self) -> None:
        """Waits for a second at most until all is written."""
        self._waiting.put(None)
        self._thread.join(_FLUSH_S)

    @property
    def ended(self) -> bool:
        """Whether nothing is being written any more."""
        return not self._thread.is_alive()


class _Lines:
    """What `sys.stderr` or `sys.stdout` is while a service runs: whole pieces go to an outlet. Anything else is the stream's."""

    def __init__(self, stream: TextIO, outlet: Outlet[bytes]) -> None:
        self._stream, self._outlet, self._rest = stream, outlet, threading.local()

    def write(self, text: str) -> int:
        """A line goes out once it is whole, so that those of several threads do not mix."""
        whole, newline, self._rest.text = (getattr(self._rest, "text", "") + text).rpartition("\n")
        self._put(whole + newline)
        return len(text)

    def flush(self) -> None:
        rest, self._rest.text = getattr(self._rest, "text", ""), ""
        self._put(rest)

    def _put(self, text: str) -> None:
        if text:
            self._outlet.put(text.encode(self._stream.encoding or "utf-8", "backslashreplace"))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unblocked() -> Iterator[None]:
    """Within it nothing that this process writes to stdout or stderr by Python's own means waits for a reader."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    outlets: dict[str, Outlet[bytes]] = {}
    descriptors: list[int] = []
    for name, stream in streams.items():
        try:
            descriptor = os.dup(stream.fileno())  # the library that reads tokenizers has stderr turned elsewhere while it runs
        except (OSError, ValueError, AttributeError):
            continue  # a test's, which blocks nobody
        stream.flush()
        outlets[name] = Outlet(lambda data, to=descriptor: _write_all(to, data), _lost_line)  # type: ignore[misc]
        descriptors.append(descriptor)
        setattr(sys, name, _Lines(stream, outlets[name]))
    _log_to(streams["stderr"], sys.stderr)
    try:
        yield
    finally:
        _log_to(sys.stderr, streams["stderr"])
        for name, outlet in outlets.items():
            setattr(sys, name, streams[name])
            outlet.close()
        if all(outlet.ended for outlet in outlets.values()):  # else one waits for a reader, and ends with the process
            for descriptor in descriptors:
                os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # whoever started us made it so
            time.sleep(0.1)


def _lost_line(count: int) -> bytes:
    return f"privinf: {count} lines were dropped, because nobody read them\n".encode()


def _log_to(before: TextIO, now: TextIO) -> None:
    """What the root logger wrote to the one stream goes to the other."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.stream = now  # not setStream, which flushes, and so waits
