"""Who is here: the peers of a service that have a thread, how far their sessions are, and whether anybody new may come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from privinf.transport.connection import Connection

T = TypeVar("T")


class Attendance:
    """Safe in threads."""

    def __init__(self) -> None:
        self.draining = self.closing = False  # nobody new is served; everything ends
        self._threads: dict[threading.Thread, Connection] = {}
        self._left: set[Connection] = set()  # of them, those whose session has ended
        self._resting: dict[Connection, float] = {}  # since when a session waits for its client's next request
        self._handed: set[Connection] = set()  # those that another thread ends
        self._told: set[Connection] = set()  # those that know why it ends
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._threads)

    @property
    def threads(self) -> list[threading.Thread]:
        """Of the peers that are here."""
        with self._guard:
            return list(self._threads)

    def admit(self, thread: threading.Thread, connection: Connection, why_not: Callable[[list[Connection]], T | None]) -> T | None:
        """Takes a peer in, unless there is a reason against it, seen the peers whose sessions have not ended."""
        with self._guard:
            refused = why_not([other for other in self._threads.values() if other not in self._left])
            if refused is None:
                self._threads[thread] = connection
        return refused

    def dismiss(self, thread: threading.Thread) -> None:
        """Its peer is attended to no longer."""
        with self._guard:
            self._threads.pop(thread, None)

    def hand_over(self, connection: Connection) -> None:
        """Whoever took it ends it."""
        with self._guard:
            self._handed.add(connection)

    def handed(self, connection: Connection) -> bool:
        """Whether somebody else ends it."""
        return connection in self._handed

    def leave(self, connection: Connection) -> None:
        """Its session has ended: its place is free, though its end is not yet confirmed."""
        with self._guard:
            self._left.add(connection)

    def first_told(self, connection: Connection) -> bool:
        """Whether this is the first time that it is told why it ends."""
        with self._guard:
            told = connection in self._told
            self._told.add(connection)
        return not told

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        with self._guard:
            for group in (self._handed, self._told, self._left):
                group.discard(connection)

    @contextlib.contextmanager
    def resting(self, connection: Connection) -> Iterator[float]:
        """Its session waits for the client's next request, since then, time.monotonic()."""
        began = self._resting[connection] = time.monotonic()
        try:
            yield began
        finally:
            del self._resting[connection]

    def at_rest(self) -> list[tuple[Connection, float]]:
        """The sessions that wait, and since when."""
        return list(self._resting.items())
