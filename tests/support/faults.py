"""Faults between real processes: a relay in the middle of a link ends TLS on both sides, counts the frames and strikes at one."""

from __future__ import annotations

import contextlib
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from privinf.transport.frames import CONTROL, DATA, FrameReader, Header, pack_header
from privinf.transport.keys import load_credentials
from privinf.transport.listener import parse_address
from privinf.transport.meter import Meter
from privinf.transport.tls import TlsStream, make_context
from protocols.errors import PrivinfError
from tests.support.between import Between
from tests.support.waiting import PATIENCE

DIALS = ("client", "server", "dealer")
"""Each dials those after it."""


class Victim(Protocol):
    def send(self, number: int) -> None: ...


@dataclass(frozen=True)
class Fault:
    """A signal to a party at the `number`-th frame of messages, either way, on its link with a peer in a phase, before that is passed on.

    `where` is `PEER:PHASE`, say `server:online`; whoever starts the party says so by `victim`.
    """

    role: str
    where: str
    number: int
    signal: int = signal.SIGKILL
    victim: Future[Victim] = field(default_factory=Future)

    @property
    def link(self) -> tuple[str, str]:
        """Who dials, and whom."""
        first, second = sorted((self.role, self.where.partition(":")[0]), key=DIALS.index)
        return first, second


class Relay(Between):
    """Stands in for a service, at an address of its own, to whoever dials it in a role; frames count from when `fault` is set."""

    def __init__(self, address: str, link: tuple[str, str], keys: Path, fault: Fault | None = None) -> None:
        self._target, (dials, listens) = parse_address(address), link
        self._contexts = (
            make_context(load_credentials(keys, listens), server=True),
            make_context(load_credentials(keys, dials), server=False),
        )
        self._guard = threading.Lock()
        self.fault = fault
        super().__init__()

    @property
    def fault(self) -> Fault | None:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        with self._guard:
            self._fault, self._seen = fault, 0

    def carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError, PrivinfError), socket.create_connection(self._target, PATIENCE) as far:
            ends = [
                TlsStream(near, self._contexts[0], Meter(), server_side=True),
                TlsStream(far, self._contexts[1], Meter(), server_side=False, host=self._target[0]),
            ]
            for end in ends:
                end.handshake(time.monotonic() + PATIENCE, party="relay", peer="")
            ways = [_Way(ends[0], ends[1]), _Way(ends[1], ends[0])]
            while not all(way.over for way in ways):
                poll = select.poll()
                for end in ends:
                    wanted = (0 if end.ended else select.POLLIN) | (select.POLLOUT if end.unsent else 0)
                    if wanted:
                        poll.register(end.sock, wanted)
                poll.poll()
                for way in ways:
                    way.move(self._count)

    def _count(self, header: Header) -> None:
        with self._guard:
            fault = self._fault
            if fault is None or header.kind not in (CONTROL, DATA) or header.phase != fault.where.partition(":")[2]:
                return
            self._seen += 1
            if self._seen == fault.number:
                fault.victim.result(PATIENCE).send(fault.signal)


Count = Callable[[Header], None]


@dataclass(frozen=True)
class SmallFiles:
    """A hook that lets no file of a process grow beyond some bytes, as a full disk would."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class _Way:
    """One direction of a relayed connection."""

    def __init__(self, source: TlsStream, target: TlsStream) -> None:
        self.source, self.target, self.over = source, target, False
        self._reader = FrameReader(lambda header: None)

    def move(self, seen: Count) -> None:
        """What has come, frame by frame; the end too, once all before it is out."""
        if self.over:
            return
        with contextlib.suppress(ConnectionError):  # whoever was killed cannot take it any more, and what it has sent still goes on
            self._move(seen)
            return
        self.source.ended = True
        self._end()

    def _move(self, seen: Count) -> None:
        if not self.source.ended:
            self.source.pull()
        while count := self.source.read_into(self._reader.target()):
            if frame := self._reader.advance(count):
                seen(frame.header)
                self.target.encrypt(pack_header(*frame.header) + bytes(frame.body))
        if self.target.push() and self.source.ended:
            self._end()

    def _end(self) -> None:
        self.over = True
        with contextlib.suppress(OSError):
            self.target.sock.shutdown(socket.SHUT_WR)
