"""How long one wait of a connection may last: until no byte moves, the peer shows no sign of life, or it all takes too long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from protocols.errors import TransportError

if TYPE_CHECKING:
    from privinf.transport.connection import Connection

SLOWEST = 32 * 2**10
"""Bytes a second: as long as bytes move, a wait may last the timeout and as long as this rate would take, but no longer."""


class Patience:
    """The deadlines of one wait. Times are time.monotonic() seconds."""

    def __init__(self, connection: Connection, start: float) -> None:
        self._connection = connection
        self._start = start
        self._moved_before = self._moved_last = self._moved()
        # over an emulated link the peer gets what we sent later than its kernel does: its time starts then
        shaper = connection._shaper
        self._from = self._progress = start + (max(0.0, (shaper.arrival() - time.time_ns()) / 1e9) if shaper else 0.0)
        self._rate = min(SLOWEST, shaper.link.bytes_per_s / 2) if shaper else SLOWEST

    def _moved(self) -> int:
        return self._connection._reader.body_bytes + self._connection._stream.raw_sent

    def _give_up(self) -> float:
        """A timeout after the last byte that moved, and at the latest one after the time that the slowest line takes for all that moved."""
        slowest = self._from + (self._moved_last - self._moved_before) / self._rate
        return min(self._progress, slowest) + self._connection.timeout

    def _silent_at(self) -> float:
        return max(self._connection._stream.last_received, self._start) + self._connection.silence_s

    def pause(self) -> float:
        """Seconds until something is to be done if nothing comes."""
        next_heartbeat = self._connection._stream.last_sent + self._connection.heartbeat_s
        now = time.monotonic()
        if next_heartbeat <= now:  # overdue, but the socket is blocked
            next_heartbeat = now + self._connection.heartbeat_s
        return max(0.001, min(next_heartbeat, self._give_up(), self._silent_at()) - now)

    def judge(self, now: float, *, readable: bool, sending: bool, held: bool) -> None:
        """Raises TransportError if the wait has lasted too long; not while the message is `held` by the emulated link."""
        connection, moved = self._connection, self._moved()
        if held or moved != self._moved_last:
            self._moved_last, self._progress = moved, max(now, self._progress)
            if held:
                return
        if not readable and now > self._silent_at():
            silent = now - max(connection._stream.last_received, self._start)
            raise connection._failure(
                TransportError,
                f"no sign of life from the peer for {silent:.1f} s",
                "it hangs, was stopped, or the network is cut; look at the peer",
            )
        if now > self._give_up():
            what = "does not take what we send" if sending else "lives but does not answer"
            raise connection._failure(
                TransportError,
                f"the peer {what} within {connection.timeout:g} s",
                "look at the peer, or allow more by --timeout",
            )
