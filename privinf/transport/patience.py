"""How long one wait of a connection may last: until no byte moves, the peer shows no sign of life, or it all takes too long."""

from __future__ import annotations

import time
from typing import Protocol

from privinf.transport.frames import FrameReader
from privinf.transport.shaper import Shaper
from privinf.transport.tls import TlsStream
from protocols.errors import PrivinfError, TransportError

SLOWEST = 32 * 2**10
"""Bytes a second: as long as bytes move, a wait may last the timeout and as long as this rate would take, but no longer."""


MISSED = 2.5
"""Heartbeats that did not come: whoever is given up then is not said to live."""


class Waiter(Protocol):
    """Who waits: its limits in seconds, of which `timeout` may change during a wait, and how it words a failure."""

    timeout: float
    heartbeat_s: float

    @property
    def silence_s(self) -> float:
        """How long the peer may show no sign of life."""

    def failure(self, kind: type[PrivinfError], what: str, remedy: str = "") -> PrivinfError:
        """An error that names the two ends."""


class Patience:
    """The deadlines of one wait. Times are time.monotonic() seconds."""

    def __init__(self, waiter: Waiter, stream: TlsStream, reader: FrameReader, shaper: Shaper | None, start: float) -> None:
        self._waiter, self._stream, self._reader, self._start = waiter, stream, reader, start
        self._moved_before = self._moved_last = self._moved()
        # over an emulated link the peer gets what we sent later than its kernel does: its time starts then
        self._from = self._progress = start + (max(0.0, (shaper.arrival() - time.time_ns()) / 1e9) if shaper else 0.0)
        self._rate = min(SLOWEST, shaper.link.bytes_per_s / 2) if shaper else SLOWEST

    def _moved(self) -> int:
        return self._reader.body_bytes + self._stream.raw_sent

    def _give_up(self) -> float:
        """A timeout after the last byte that moved, and at the latest one after the time that the slowest line takes for all that moved."""
        slowest = self._from + (self._moved_last - self._moved_before) / self._rate
        return min(self._progress, slowest) + self._waiter.timeout

    def _silent_at(self) -> float:
        return max(self._stream.last_received, self._start) + self._waiter.silence_s

    def pause(self) -> float:
        """Seconds until something is to be done if nothing comes."""
        next_heartbeat = self._stream.last_sent + self._waiter.heartbeat_s
        now = time.monotonic()
        if next_heartbeat <= now:  # overdue, but the socket is blocked
            next_heartbeat = now + self._waiter.heartbeat_s
        return max(0.001, min(next_heartbeat, self._give_up(), self._silent_at()) - now)

    def judge(self, now: float, *, readable: bool, sending: bool, held: bool) -> None:
        """Raises TransportError if the wait has lasted too long; not while the message is `held` by the emulated link."""
        waiter, moved = self._waiter, self._moved()
        if held or moved != self._moved_last:
            self._moved_last, self._progress = moved, max(now, self._progress)
            if held:
                return
        silent = now - max(self._stream.last_received, self._start)
        late = now > self._give_up()
        if not readable and (now > self._silent_at() or (late and not sending and silent > MISSED * waiter.heartbeat_s)):
            raise waiter.failure(
                TransportError,
                f"no sign of life from the peer for {silent:.1f} s",
                "it hangs, was stopped, or the network is cut; look at the peer",
            )
        if late:
            what = "does not take what we send" if sending else "lives but does not answer"
            raise waiter.failure(
                TransportError,
                f"the peer {what} within {waiter.timeout:g} s",
                "look at the peer, or allow more by --timeout",
            )
