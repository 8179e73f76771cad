"""An in-process twin of a connection, for tests: the same messages, limits, rounds and errors, without TLS, sockets or heartbeats."""

from __future__ import annotations

import threading
import time
from collections import deque

from privinf.transport.endpoint import Endpoint, Want
from privinf.transport.frames import HEADER, MAX_FRAME, Frame, FrameKind, FrameReader, pack_header
from privinf.transport.meter import Meter
from privinf.transport.shaper import Link
from protocols.errors import TransportError

_PERIOD_S = 0.5


class _Pipe:
    """What two ends share: one lock, and the bytes under way to each of them, one frame an item."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.to: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        self.closed = [False, False]


class MemoryConnection(Endpoint):
    """One end of a pair; to be used from a thread of its own. Wire bytes are those of frames, header included, since there is no TLS."""

    def __init__(self, pipe: _Pipe, side: int, *, party: str, peer: str, timeout: float, link: Link | None, meter: Meter | None) -> None:
        super().__init__(
            party=party, peer_role=peer, peer_fingerprint="", peer_name="memory", timeout=timeout, silence_s=None, link=link, meter=meter
        )
        self._pipe = pipe
        self._side = side
        self._reader = FrameReader(self._admit)

    def _transfer(self, frames: list[tuple[bytes, memoryview]], want: Want | None) -> memoryview | None:
        pipe, mine, theirs = self._pipe, self._side, 1 - self._side
        deadline = time.monotonic() + self.timeout
        with pipe.changed:
            self._want = want
            try:
                if error := self._interrupted():
                    raise error
                if pipe.closed[mine]:
                    raise self.failure(TransportError, "this connection was closed at this end")
                if frames and pipe.closed[theirs]:
                    self._read_all()
                    self._raise_reported()
                    raise self.failure(TransportError, "the peer closed the connection")
                for header, body in frames:
                    pipe.to[theirs].append(header + bytes(body))  # a copy: the caller may reuse its buffer
                    self.meter.current.sent += len(header) + len(body)
                pipe.changed.notify_all()
                while want is not None:
                    self._read_all()
                    message = self._take(want)
                    if message is not None:
                        return message
                    if pipe.to[mine] and not self._inbox:
                        continue  # the first frames of a message; more have come
                    held = self._held_for()
                    if error := self._interrupted():
                        raise error
                    if pipe.closed[mine]:
                        raise self.failure(TransportError, "this connection was closed at this end")
                    if pipe.closed[theirs] and held is None:
                        raise self.failure(TransportError, "the peer closed the connection")
                    left = deadline - time.monotonic()
                    if left <= 0 and held is None:
                        raise self.failure(TransportError, f"the peer does not answer within {self.timeout:g} s")
                    began = time.perf_counter()
                    pipe.changed.wait(min(left, _PERIOD_S) if held is None else held)
                    self.meter.current.seconds += time.perf_counter() - began
            finally:
                self._want = None
        return None

    def _read_all(self) -> None:
        """Reads frames as far as somebody waits for them, through the same reader as a socket's."""
        incoming = self._pipe.to[self._side]
        while incoming and not (self._inbox and self._want):
            raw = memoryview(incoming.popleft())
            self.meter.current.received += len(raw)
            while raw:
                target = self._reader.target()
                count = min(len(target), len(raw))
                target[:count] = raw[:count]
                raw = raw[count:]
                frame: Frame | None = self._reader.advance(count)
                if frame is not None:
                    self._arrived(frame)

    def _wake(self) -> None:
        with self._pipe.changed:
            self._pipe.changed.notify_all()

    def close(self, goodbye: bool = True) -> None:
        with self._pipe.changed:
            if self._pipe.closed[self._side]:
                return
            if goodbye and not self._pipe.closed[1 - self._side]:
                self._pipe.to[1 - self._side].append(pack_header(0, FrameKind.GOODBYE, 0, 0, 0))
                self.meter.current.sent += HEADER.size
            self._pipe.closed[self._side] = True
            self._pipe.changed.notify_all()


def memory_pair(
    roles: tuple[str, str] = ("server", "client"),
    *,
    timeout: float = 30.0,
    link: Link | None = None,
    meters: tuple[Meter | None, Meter | None] = (None, None),
    established: bool = True,
) -> tuple[MemoryConnection, MemoryConnection]:
    """Two ends that talk to each other, the first for `roles[0]`; each is to be used from a thread of its own.

    Nothing blocks a sender, so one thread may also play both parts as long as it sends before it receives.
    """
    pipe = _Pipe()
    first = MemoryConnection(pipe, 0, party=roles[0], peer=roles[1], timeout=timeout, link=link, meter=meters[0])
    second = MemoryConnection(pipe, 1, party=roles[1], peer=roles[0], timeout=timeout, link=link, meter=meters[1])
    if established:
        for end in (first, second):
            end.establish(MAX_FRAME)
    return first, second
