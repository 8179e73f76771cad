"""Memory of a server without a dealer: its sessions hold so many bytes at a time, all of them together, and wait for room.

What a session holds is computed from public shapes: what a session needs at all, what stays for tokens to come, and what a pass takes
while it is made and taken. Who waits gets room in the order of asking; who waits too long is told to come again later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from privinf.session.board import Board
from privinf.session.joint import PATIENCE
from privinf.session.memory import give_back
from privinf.session.service import Service
from protocols.errors import Code, RefusedError

SESSION = 128 * 2**20
"""Bytes of a session that does nothing: what transfers are expanded in, both directions, its thread, its frames."""

MUCH = 64 * 2**20
_POLL_S = 0.05


class Room:
    """`most` bytes; 0: no bound. With a board the sessions of all its processes hold them, and order is kept within each."""

    def __init__(self, most: int, board: Board | None = None) -> None:
        self.most, self.held, self._board = most, 0, board
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    def take(self, size: int, what: str, wait_s: float, own: int = 0) -> None:
        """Waits for so many bytes more, beside one's own; RefusedError where there is never room for them, or none came in that time."""
        if 0 < self.most < own + size:
            text = f"{what} takes about {size} bytes, and all sessions of this server hold at most {self.most}"
            raise RefusedError(text, party="server", remedy="take in the prompt in pieces (--chunk)", code=Code.BYTES)
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                if not self._wait(lambda: self._queue[0] is ticket and self._fits(size), wait_s):
                    text = f"the sessions of this server hold {self.held} of {self.most} bytes, and {what} takes about {size}"
                    raise RefusedError.for_now(text, Code.FULL, party="server")
                self.held += size
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], wait_s: float) -> bool:
        """Another process wakes nobody here: then it is asked again and again."""
        until = time.monotonic() + wait_s
        while not self._changed.wait_for(ready, wait_s if self._board is None else min(wait_s, _POLL_S)):
            if time.monotonic() >= until:
                return False
        return True

    def _fits(self, size: int) -> bool:
        """Whether there is room; and with a board it is taken there at once."""
        if self._board is not None:
            return self._board.claim(size, self.most)
        return not self.most or self.held + size <= self.most

    def give(self, size: int) -> None:
        """Gives so many bytes back; takes them, without waiting, where they are fewer than none."""
        with self._changed:
            self.held -= size
            if self._board is not None:
                self._board.release(size)
            self._changed.notify_all()


class Place:
    """What one session of a service holds of it. `ahead`: of that, a pass that is foretold."""

    def __init__(self, room: Room, service: Service) -> None:
        self._room, self._service = room, service
        self.size = self.ahead = 0
        self._take(SESSION, "a session", service.options.timeout / 2)

    def _take(self, size: int, what: str, wait_s: float) -> None:
        try:
            self._room.take(size, what, wait_s, self.size)
        except RefusedError as error:
            raise self._service.refusal(error) from None
        self.size += size

    def grow(self, size: int) -> None:
        """Waits for so many bytes more, for a pass; RefusedError as of `Room.take`."""
        self._take(size, "this pass", PATIENCE / 2 * self._service.options.timeout)

    def settle(self, size: int) -> None:
        """From now on it is so much beside what every session is, whatever it was; if that is much less, the system has it back."""
        freed, self.size = self.size - SESSION - size - self.ahead, SESSION + size + self.ahead
        if freed > MUCH:
            give_back()
        self._room.give(freed)

    def leave(self) -> None:
        """The session has ended."""
        self._room.give(self.size)
        self.size = 0
