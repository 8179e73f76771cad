"""Turns: at most so many sessions of a party compute at a time, client after client.

A pass is hundreds of short computations with a wait for the peer between them. A session gives its turn back before each wait, so that
a peer which is slow, or stops in the middle of a pass, holds up nobody; and it asks anew after the wait. Clients that wait get their turns
in the order in which they asked, and each of them one before any gets another, however many sessions it has.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Turns:
    """`places` at a time; by default as many as there are cores for this process. A client is whatever names it."""

    def __init__(self, places: int | None = None) -> None:
        self.places = places or cores()
        self._free = self.places
        self._queues: dict[str, deque[threading.Lock]] = {}  # of clients, in the order in which they are due
        self._since: dict[str, int] = {}  # how many turns had been given when a client began to wait for its next one
        self._guard = threading.Lock()
        self.given = 0
        """Turns so far."""
        self.passed = 0
        """The most of them that others were given while a client waited for one: at most one for each other client."""

    @property
    def waiting(self) -> int:
        """Sessions that wait for their turn."""
        with self._guard:
            return sum(len(queue) for queue in self._queues.values())

    def take(self, client: str) -> None:
        """Waits for a turn."""
        with self._guard:
            if self._free:
                self._free -= 1
                self.given += 1
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._queues.setdefault(client, deque()).append(ticket)
            self._since.setdefault(client, self.given)
        ticket.acquire()

    def give(self) -> None:
        """Gives it to the client that has waited longest."""
        with self._guard:
            if not self._queues:
                self._free += 1
                return
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            self.passed = max(self.passed, self.given - self._since.pop(client))
            self.given += 1
            queue.popleft().release()
            if queue:  # behind all others
                self._queues[client], self._since[client] = queue, self.given

    @contextlib.contextmanager
    def turn(self, client: str) -> Iterator[None]:
        """Computes in turn."""
        self.take(client)
        try:
            yield
        finally:
            self.give()

    @contextlib.contextmanager
    def between(self, client: str) -> Iterator[None]:
        """Waits for a peer, within a turn, and lets others compute meanwhile."""
        self.give()
        try:
            yield
        finally:
            self.take(client)


class InTurn:
    """A channel whose party computes in turn, for the client at its other end."""

    def __init__(self, channel: Any, turns: Turns) -> None:
        self.channel, self.meter, self._turns = channel, channel.meter, turns

    def exchange(self, body: Any, expect: int | None) -> memoryview | None:
        """See `Channel`."""
        with self._turns.between(self.channel.peer_fingerprint):
            received: memoryview | None = self.channel.exchange(body, expect)
        return received
