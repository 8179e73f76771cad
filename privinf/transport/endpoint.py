"""What a connection is to its caller, whatever carries it: messages, their limits, their accounting and their errors.

`Connection` (TLS over TCP) and `MemoryConnection` (two threads of one process) add `_transfer`, which moves frames, and `close`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Any, NamedTuple, Self, TypeVar, overload

import msgspec

from privinf.transport.failure import Failure, one_line
from privinf.transport.frames import (
    CONTROL_LIMIT,
    FRAME_COST,
    HANDSHAKE_MAX_FRAME,
    MAX_FRAME,
    MORE,
    Buffer,
    Frame,
    FrameKind,
    Header,
    flat,
    pack_header,
)
from privinf.transport.meter import Meter
from privinf.transport.shaper import Link, Shaper
from protocols.errors import (
    ConfigError,
    OpeningError,
    PrivinfError,
    ProtocolDesync,
    TransportError,
)

T = TypeVar("T")
OnMessage = Callable[[FrameKind, memoryview], None]
POSTED = 64 * 2**10  # bytes that wait for each other at most
SILENCE_S = 10.0
"""Longest time without any sign of life from the peer, seconds, unless the timeout is shorter."""


class Want(NamedTuple):
    """What a caller waits for: a message of `kind`, of exactly `expect` bytes, or if that is None of at most `limit` bytes."""

    kind: FrameKind
    expect: int | None
    limit: int


class Endpoint(ABC):
    """One end of a connection between two parties; full duplex, one caller at a time (a second one waits for the first).

    Messages come in the order in which the other end sent them. Waiting raises TransportError when the peer has vanished, shows no
    sign of life for `silence_s` seconds, or lives but does not answer within `timeout` seconds (plus the time that moving the bytes takes).

    Its attributes are who the two ends are, the limits of a wait, and what has come and was not asked for yet; all but the last are public.
    """

    def __init__(
        self,
        *,
        party: str,
        peer_role: str,
        peer_fingerprint: str,
        peer_name: str,
        timeout: float,
        silence_s: float | None,
        link: Link | None,
        meter: Meter | None,
    ) -> None:
        self.party = party
        self.peer_role = peer_role
        self.peer_fingerprint = peer_fingerprint
        self.peer_name = peer_name
        self.peer_subject = ""
        """The common name in the peer's certificate, which a renewed one keeps."""
        self.peer_until = 0.0
        """When the peer's certificate expires, seconds since the epoch; 0 where it has none."""
        self.timeout = timeout
        """Longest wait for the peer's next message, seconds; may be set at any time."""
        self.meter = meter or Meter()
        self.max_frame = HANDSHAKE_MAX_FRAME
        """Largest body of one frame, bytes, sent or accepted; `establish` raises it. Both ends should have the same."""
        self._silence_s = silence_s
        self._established = False
        self._shaper = Shaper(link) if link else None
        self._inbox: deque[Frame] = deque()
        self._backlog = 0  # what the inbox takes, bytes
        self._parts: list[memoryview] = []  # frames of a message whose last frame has not come
        self._joined = 0  # their bytes
        self._want: Want | None = None
        self._posted = bytearray()  # frames that wait to be sent
        self._interruption: PrivinfError | None = None
        self.on_message: OnMessage | None = None
        """Sees every message that is received, its caller before it; for what shows a party's own view."""

    # ---- what callers use

    @property
    def silence_s(self) -> float:
        """How long a peer may show no sign of life while we wait, seconds."""
        return min(self.timeout, SILENCE_S) if self._silence_s is None else self._silence_s

    @contextmanager
    def at_work(self, times: float) -> Iterator[None]:
        """Within it both ends compute for long between their messages: a wait may last, and the peer be silent, so many times as long."""
        timeout, silence = self.timeout, self._silence_s
        self.timeout, self._silence_s = times * timeout, times * self.silence_s
        try:
            yield
        finally:
            self.timeout, self._silence_s = timeout, silence

    @property
    def established(self) -> bool:
        """Whether both ends have agreed on a session."""
        return self._established

    def establish(self, max_frame: int = MAX_FRAME) -> None:
        """The two ends agreed on a session: large frames are allowed, and what fails from now on is no longer a HandshakeError."""
        self._established = True
        self.max_frame = max_frame

    def send(self, body: Buffer, kind: FrameKind = FrameKind.DATA) -> None:
        """Sends one message and returns when the kernel has taken all of it; `body` may be reused then."""
        self._transfer(self._frames_of(kind, body), None)

    def post(self, body: Buffer) -> None:
        """As `send`, but small messages wait for each other, and for `flush`, which is to come before anything else is sent."""
        if len(body) >= POSTED:
            self.flush()
            self.send(body)
            return
        for header, part in self._frames_of(FrameKind.DATA, body):
            self._posted += header
            self._posted += part
        if len(self._posted) >= POSTED:
            self.flush()

    def flush(self) -> None:
        """Sends what was posted."""
        if self._posted:
            frames, self._posted = bytes(self._posted), bytearray()
            self._transfer([(frames, memoryview(b""))], None)

    def receive(self, expect: int | None = None, kind: FrameKind = FrameKind.DATA) -> memoryview:
        """The next message, which must be of this kind and, if given, of exactly `expect` bytes: anything else is a ProtocolDesync."""
        message = self._transfer([], Want(kind, expect, self.max_frame))
        assert message is not None
        return message

    def exchange(self, body: Buffer | None, expect: int | None) -> memoryview | None:
        """Sends `body` (unless None) and receives a message of `expect` bytes (unless None) at the same time: one round."""
        frames = [] if body is None else self._frames_of(FrameKind.DATA, body)
        return self._transfer(frames, None if expect is None else Want(FrameKind.DATA, expect, expect))

    def send_control(self, message: Any, limit: int = CONTROL_LIMIT) -> None:
        """Sends a msgspec struct (or plain values) of at most `limit` bytes when encoded."""
        body = msgspec.msgpack.encode(message)
        if len(body) > limit:
            raise self.failure(
                ConfigError, f"a control message of {len(body)} bytes is larger than {limit} allow", "this is a fault of this program"
            )
        self.send(body, FrameKind.CONTROL)

    @overload
    def receive_control(self, type: type[T], limit: int = ...) -> T: ...

    @overload
    def receive_control(self, type: UnionType, limit: int = ...) -> Any: ...

    def receive_control(self, type: Any, limit: int = CONTROL_LIMIT) -> Any:
        """The next message, which must be a control message of this type and at most `limit` bytes; ProtocolDesync otherwise.

        A union of structs needs tags, by which msgspec tells them apart.
        """
        body = self._transfer([], Want(FrameKind.CONTROL, None, limit))
        assert body is not None
        try:
            return msgspec.msgpack.decode(body, type=type)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            wanted = " or ".join([each.__name__ for each in (type.__args__ if isinstance(type, UnionType) else (type,))])
            raise self.failure(
                ProtocolDesync,
                f"received a control message that is not a {wanted}: {one_line(str(error), 200)}",
                "check that both ends run the same version of privinf",
            ) from None

    def send_error(self, failure: Failure) -> None:
        """Tells the peer in one line why we give up; its next wait raises it. Never put a secret in."""
        self._interrupted()  # whoever gives up need not be told to
        self._transfer(self._frames_of(FrameKind.ERROR, failure.for_peer()), None)

    def interrupt(self, error: PrivinfError) -> None:
        """Makes the present wait of whoever uses this end, or else the next transfer, raise this error, once; from any thread.

        What is sent afterwards, a farewell say, still goes out.
        """
        self._interruption = error
        self._wake()

    @abstractmethod
    def close(self, goodbye: bool = True) -> None:
        """Ends the connection; may be called again, from any thread, also while another one waits. Never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- for the carriers

    @abstractmethod
    def _wake(self) -> None:
        """Ends a wait in another thread, which then looks for an interruption."""

    def _interrupted(self) -> PrivinfError | None:
        """The interruption, if there is one, which is then taken note of."""
        error, self._interruption = self._interruption, None
        return error

    @abstractmethod
    def _transfer(self, frames: list[tuple[bytes, memoryview]], want: Want | None) -> memoryview | None:
        """Sends the frames and returns the wanted message (None if nothing is wanted), both at the same time."""

    def failure(self, kind: type[PrivinfError], message: str, remedy: str = "") -> PrivinfError:
        """An error of this kind that says where and with whom, to be raised; before a session a TransportError exits with 3."""
        if kind is TransportError and not self._established:
            kind = OpeningError
        party, peer, layer = self._place
        return kind(message, layer=layer, party=party, peer=peer, remedy=remedy)

    @property
    def _place(self) -> tuple[str, str, str]:
        """This party, its peer, and what runs between them."""
        return self.party, f"{self.peer_role} {self.peer_name}".strip(), ".".join(part for part in self.meter.label if part)

    def _frames_of(self, kind: FrameKind, body: Buffer) -> list[tuple[bytes, memoryview]]:
        view = flat(body)
        size, meter = len(view), self.meter
        flags = meter.phase_index
        depth = meter.depth() + 1 if kind is FrameKind.DATA else 0
        stamp = time.time_ns() if self._shaper else 0  # our clock is the peer's business only where a link is emulated
        starts = range(0, size, self.max_frame) if size > self.max_frame else (0,)
        frames = []
        for start in starts:
            part = view[start : start + self.max_frame]
            more = MORE if start + len(part) < size else 0
            frames.append((pack_header(len(part), kind, flags | more, depth, stamp), part))
        if kind is FrameKind.DATA:
            meter.data_sent(size, len(frames))
        if self._shaper:
            self._shaper.sent(stamp, size)
        return frames

    def _admit(self, header: Header) -> None:
        """Refuses a frame by its header, before its body is allocated."""
        limit = self.max_frame
        if header.length > limit:
            raise self.failure(
                TransportError,
                f"received a frame that claims {header.length} bytes; the limit is {limit}",
                "check that both ends run the same version of privinf",
            )
        least = min(limit, HANDSHAKE_MAX_FRAME)  # as long as any sender may make them: so the parts of a message are few
        if header.more and header.length < least:
            raise self.failure(
                TransportError,
                f"received a part of a message of {header.length} bytes; all but the last have {least} or more",
                "check that both ends run the same version of privinf",
            )
        if self._want is not None and not self._inbox:
            self._check(self._want, header)

    def _check(self, want: Want, header: Header) -> None:
        """Refuses a frame that cannot be (part of) what the caller waits for."""
        if header.kind not in (FrameKind.DATA, FrameKind.CONTROL):
            return
        if header.kind is not want.kind:
            raise self.failure(
                ProtocolDesync,
                f"expected a {want.kind.name} message and received a {header.kind.name} message of {header.length} bytes",
                "check that both ends run the same version of privinf",
            )
        total = self._joined + header.length
        if want.expect is None:
            if total > want.limit:
                raise self.failure(
                    ProtocolDesync, f"received a {want.kind.name} message of {total} bytes or more; the limit is {want.limit}"
                )
        elif total > want.expect or (total != want.expect and not header.more):
            size = f"{total} bytes or more" if header.more else f"{total} bytes"
            raise self.failure(
                ProtocolDesync,
                f"expected a message of {want.expect} bytes and received one of {size}",
                "check that both ends run the same program on the same shapes",
            )

    def _arrived(self, frame: Frame) -> bool:
        """Takes in a whole frame; False if it is a heartbeat that nobody waits for."""
        if frame.header.kind is FrameKind.HEARTBEAT:
            if self._want is None or self._want.kind is not FrameKind.HEARTBEAT:
                return False
        elif self._shaper:
            frame.release = self._shaper.release(frame.header.stamp, len(frame.body), time.time_ns())
        self._inbox.append(frame)
        self._backlog += len(frame.body) + FRAME_COST
        return True

    def _held_for(self) -> float | None:
        """Seconds until the emulated link delivers the next frame that has come; None if there is none."""
        if not self._shaper or not self._inbox:
            return None
        return max(0.0, (self._inbox[0].release - time.time_ns()) / 1e9)

    def _take(self, want: Want) -> memoryview | None:
        """The wanted message if all of it has come (and the emulated link lets it through), else None."""
        while self._inbox and (not self._shaper or self._inbox[0].release <= time.time_ns()):
            frame = self._inbox.popleft()
            self._backlog -= len(frame.body) + FRAME_COST
            header = frame.header
            if header.kind is FrameKind.ERROR:
                raise self._reported(frame)
            if header.kind is FrameKind.GOODBYE:
                raise self.failure(TransportError, "the peer ended the session", "look at the peer's output for the reason")
            if header.kind is FrameKind.HEARTBEAT:
                if want.kind is FrameKind.HEARTBEAT:
                    return frame.body
                continue
            self._check(want, header)
            if header.more:
                self._parts.append(frame.body)
                self._joined += len(frame.body)
                continue
            message, count = frame.body, 1
            if self._parts:
                message = memoryview(bytearray().join([*self._parts, frame.body]))
                count += len(self._parts)
                self._parts, self._joined = [], 0
            if header.kind is FrameKind.DATA:
                self.meter.data_received(header.phase, header.depth, len(message), count)
            if self.on_message is not None:
                self.on_message(header.kind, message)
            return message
        return None

    def _reported(self, frame: Frame) -> PrivinfError:
        """The error that the peer sent us."""
        return Failure.from_peer(frame.body).heard_by(*self._place, established=self._established).error()

    def _raise_reported(self) -> None:
        """Raises an ERROR frame that waits in the inbox, if there is one: the reason of a failure that we see only from outside."""
        for frame in self._inbox:
            if frame.header.kind is FrameKind.ERROR:
                raise self._reported(frame)
