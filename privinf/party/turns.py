"""Turns: at most so many sessions of a party compute at a time, in the order in which they ask.

A pass is hundreds of short computations with a wait for the peer between them. A session gives its turn back before each wait, so that
a peer which is slow, or stops in the middle of a pass, holds up nobody; and it asks anew after the wait, behind those who asked
before, so that no session is passed over, however many there are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any


class Turns:
    """First come, first served, `places` at a time; by default as many as there are cores for this process."""

    def __init__(self, places: int | None = None) -> None:
        self.places = places or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._free = self.places
        self._queue: deque[tuple[threading.Lock, int]] = deque()  # and how many turns had been given when it was asked
        self._guard = threading.Lock()
        self.given = 0
        """Turns so far."""
        self.passed = 0
        """The most of them that others were given while one waited: at most one for each other session."""

    @property
    def waiting(self) -> int:
        """Sessions that wait for their turn."""
        return len(self._queue)

    def take(self) -> None:
        """Waits for a turn."""
        with self._guard:
            if self._free:
                self._free -= 1
                self.given += 1
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._queue.append((ticket, self.given))
        ticket.acquire()

    def give(self) -> None:
        """Gives it to whoever has waited longest."""
        with self._guard:
            if not self._queue:
                self._free += 1
                return
            ticket, before = self._queue.popleft()
            self.passed = max(self.passed, self.given - before)
            self.given += 1
            ticket.release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Computes in turn."""
        self.take()
        try:
            yield
        finally:
            self.give()

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """Waits for a peer, within a turn, and lets others compute meanwhile."""
        self.give()
        try:
            yield
        finally:
            self.take()


class InTurn:
    """A channel whose party computes in turn."""

    def __init__(self, channel: Any, turns: Turns) -> None:
        self.channel, self.meter, self._turns = channel, channel.meter, turns

    def exchange(self, body: Any, expect: int | None) -> memoryview | None:
        """See `Channel`."""
        with self._turns.between():
            received: memoryview | None = self.channel.exchange(body, expect)
        return received
