"""Who is here: the peers of a service that have a thread, how far their sessions are, and whether anybody new may come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from privinf.session.board import Board, Peer
from privinf.transport.connection import Connection

T = TypeVar("T")


class Attendance:
    """Safe in threads. With a board its peers are seen by the other processes of the service, and theirs here."""

    def __init__(self, board: Board | None = None) -> None:
        self._board = board
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

    def admit(self, thread: threading.Thread, connection: Connection, why_not: Callable[[list[Peer]], T | None]) -> T | None:
        """Takes a peer in, unless there is a reason against it, seen the peers whose sessions have not ended."""
        with self._guard, self._seen() as (others, say):
            refused = why_not(self._staying() + others)
            if refused is None:
                self._threads[thread] = connection
                say(self._staying())
        return refused

    def _staying(self) -> list[Peer]:
        return [Peer(each.peer_role, each.peer_fingerprint) for each in self._threads.values() if each not in self._left]

    @contextlib.contextmanager
    def _seen(self) -> Iterator[tuple[list[Peer], Callable[[list[Peer]], None]]]:
        """The peers of other processes, and what tells them of ours."""
        if self._board is None:
            yield [], lambda peers: None
        else:
            with self._board.peers() as found:
                yield found

    def _say(self) -> None:
        with self._seen() as (_, say):
            say(self._staying())

    def dismiss(self, thread: threading.Thread) -> None:
        """Its peer is attended to no longer."""
        with self._guard:
            self._threads.pop(thread, None)
            self._say()

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
            self._say()

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
