"""The frame: what every message is cut into, and the incremental reader that puts frames together again.

A frame is an 18-byte header in network order and a body:

    length u32 | kind u8 | flags u8 | depth u32 | stamp u64 | body (length bytes)

`flags` holds the phase (bits 0 and 1) and MORE (bit 7: the message goes on in the next frame); the body of an ERROR frame is a
`failure.Failure`. `depth` is the position in the chain of dependent messages (see `meter`); `stamp` is the sender's clock in nanoseconds
since the epoch, which only the emulated link reads. Nothing here touches a socket, so that the codec can be tested by itself.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from protocols.errors import TransportError

HEADER = struct.Struct("!IBBIQ")
MAX_FRAME = 64 * 2**20
"""Largest body of one frame within a session, bytes."""
JOINED = 32 * 2**10
"""Up to here header and body go into one TLS record: cheaper than a record of its own."""
HANDSHAKE_MAX_FRAME = 64 * 2**10
"""Largest body of one frame before a session is established, bytes: a stranger must not make us allocate more."""
CONTROL_LIMIT = 64 * 2**10
"""Largest control message unless the caller allows more, bytes."""
ERROR_LIMIT = 4 * 2**10
"""Largest body of an ERROR frame, bytes."""
FRAME_COST = 2**10
"""What a frame that waits is counted for beside its body, bytes: above what its header and our objects for it take."""
MAX_DEPTH = 2**31
PHASES = ("setup", "offline", "online")
MORE = 0x80
_PHASE_MASK = 0x03

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    """What a frame is for. Values are on the wire."""

    DATA = 1
    CONTROL = 2
    HEARTBEAT = 3
    ERROR = 4
    GOODBYE = 5


DATA, CONTROL, HEARTBEAT, ERROR, GOODBYE = FrameKind
_KINDS = {int(kind): kind for kind in FrameKind}
_MAY_HAVE = {  # the flag bits, apart from the phase, that each kind may carry
    FrameKind.DATA: MORE,
    FrameKind.CONTROL: MORE,
    FrameKind.HEARTBEAT: 0,
    FrameKind.ERROR: 0,
    FrameKind.GOODBYE: 0,
}


class Header(NamedTuple):
    """A parsed header; `length` is in bytes, `stamp` in nanoseconds since the epoch."""

    length: int
    kind: FrameKind
    flags: int
    depth: int
    stamp: int

    @property
    def more(self) -> bool:
        """Whether the message goes on in the next frame."""
        return bool(self.flags & MORE)

    @property
    def phase(self) -> str:
        """The sender's phase."""
        return PHASES[self.flags & _PHASE_MASK]


@dataclass(slots=True)
class Frame:
    """A whole frame; `release` is the time (ns since the epoch) before which an emulated link does not deliver it."""

    header: Header
    body: memoryview
    release: int = 0


def pack_header(length: int, kind: FrameKind, flags: int, depth: int, stamp: int) -> bytes:
    """A header's bytes: body's length, kind, flags with the phase, depth in rounds, stamp of the emulated link."""
    return HEADER.pack(length, kind, flags, depth, stamp)


def parse_header(raw: Buffer) -> Header:
    """Reads a header; raises TransportError for anything that this version does not send."""
    length, kind_code, flags, depth, stamp = HEADER.unpack(raw)
    kind = _KINDS.get(kind_code)
    if kind is None:
        raise TransportError(f"received a frame of unknown kind {kind_code}", remedy="check that both ends run the same version of privinf")
    if flags & ~(_PHASE_MASK | _MAY_HAVE[kind]) or flags & _PHASE_MASK >= len(PHASES) or depth >= MAX_DEPTH:
        raise TransportError(
            f"received a {kind.name} frame with a header that means nothing (flags {flags:#04x}, depth {depth})",
            remedy="check that both ends run the same version of privinf",
        )
    if (kind in (FrameKind.HEARTBEAT, FrameKind.GOODBYE) and length) or (kind is FrameKind.ERROR and length > ERROR_LIMIT):
        raise TransportError(
            f"received a {kind.name} frame that claims {length} bytes", remedy="check that both ends run the same version of privinf"
        )
    return Header(length, kind, flags, depth, stamp)


def flat(body: Buffer) -> memoryview:
    """The bytes of a contiguous buffer without a copy; also takes what exports the buffer protocol, as a NumPy array."""
    view = memoryview(body)
    if not view.c_contiguous:
        raise TypeError("a message must be contiguous in memory")
    if view.nbytes == 0:
        return memoryview(b"")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class FrameReader:
    """Cuts a byte stream into frames, in whatever pieces it comes, straight into the final buffers.

    The owner asks `target()` for the memory to fill, fills some of it, and says how much by `advance(n)`, which returns a frame when
    one is complete. `admit(header)` is called before the body is allocated and refuses by raising.
    """

    def __init__(self, admit: Callable[[Header], None]) -> None:
        self._admit = admit
        self._head = memoryview(bytearray(HEADER.size))
        self._header: Header | None = None
        self._target = self._head
        self._have = 0
        self.body_bytes = 0
        """Bytes of bodies so far: how a waiting caller sees progress, which heartbeats are not."""

    def target(self) -> memoryview:
        """What to fill next, at least one byte."""
        return self._target[self._have :] if self._have else self._target

    @property
    def mid_frame(self) -> bool:
        """True when part of a frame has come and the rest has not."""
        return self._have > 0 or self._header is not None

    def advance(self, count: int) -> Frame | None:
        """Takes note of `count` bytes written to the target."""
        self._have += count
        if self._header is not None:
            self.body_bytes += count
        if self._have < len(self._target):
            return None
        if self._header is None:
            header = parse_header(self._head)
            self._admit(header)
            if header.length:
                self._header, self._target, self._have = header, memoryview(bytearray(header.length)), 0
                return None
            self._have = 0
            return Frame(header, memoryview(b""))
        frame = Frame(self._header, self._target)
        self._header, self._target, self._have = None, self._head, 0
        return frame


def pieces(frames: list[tuple[bytes, memoryview]]) -> deque[memoryview]:
    """What is encrypted at a time of frames, each a header and a body."""
    out: deque[memoryview] = deque()
    for header, body in frames:
        if len(body) <= JOINED:
            out.append(memoryview(header + bytes(body) if body else header))
        else:
            out.extend((memoryview(header), body))
    return out
