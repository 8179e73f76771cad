"""What the processes of one service know of each other: a piece of shared memory, with a part for each of them and one for all.

In its part a process says who its peers are and what its sessions hold, so that limits are of all processes together. The part of one
that died is wiped by who started it. The lock is the kernel's, which takes it back from whoever dies with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from protocols.errors import DefectError

PART, COMMON = 2**20, 8 * 2**20
"""Bytes of a process's part, and of what is common; of both only what is used takes memory."""
_HEAD = 4
PEERS = 13_000
"""Of one process that its part has room for: 74 bytes each."""


class Peer(NamedTuple):
    """One that is served; the names are those of a connection."""

    peer_role: str
    peer_fingerprint: str


class _Part(msgspec.Struct):
    peers: list[tuple[str, str]] = []
    held: int = 0


Sent = dict[str, tuple[float, int]]
"""Since when, time.monotonic(), and how many bytes, by certificate."""


class Board:
    """`workers` share it. Safe in threads; one object for each process, made after it began. Not for secrets, and there are none."""

    def __init__(self, descriptor: int, part: int, workers: int, named: Callable[[str], object] = lambda hint: None) -> None:
        """`named` is told the hint of a session that one of its own peers has begun, see `transport.hint`."""
        self.workers, self.named = workers, named
        self._file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)  # a lock of our own, which one inherited were not
        self._map = mmap.mmap(self._file, 0)
        self._own, self._parts = part, (len(self._map) - COMMON) // PART
        self._guard = threading.Lock()

    @staticmethod
    def make(parts: int) -> int:
        """A new one, as a descriptor that is to be handed to the processes."""
        descriptor = os.memfd_create("privinf-board")
        os.ftruncate(descriptor, COMMON + parts * PART)
        return descriptor

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._guard:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _bytes(self, at: int, most: int) -> bytes:
        size = int.from_bytes(self._map[at : at + _HEAD])
        return bytes(self._map[at + _HEAD : at + _HEAD + size]) if size <= most - _HEAD else b""

    def _put(self, at: int, most: int, data: bytes) -> None:
        if len(data) > most - _HEAD:
            raise DefectError(f"what processes tell each other takes {len(data)} bytes, and there is room for {most - _HEAD}")
        self._map[at : at + _HEAD + len(data)] = len(data).to_bytes(_HEAD) + data

    def _part(self, number: int) -> _Part:
        data = self._bytes(COMMON + number * PART, PART)
        try:
            return msgspec.msgpack.decode(data, type=_Part) if data else _Part()
        except (msgspec.MsgspecError, ValueError):  # of one that died while it wrote
            return _Part()

    def _write(self, part: _Part) -> None:
        self._put(COMMON + self._own * PART, PART, msgspec.msgpack.encode(part))

    def wipe(self, number: int) -> None:
        """A process is gone, or is to come."""
        with self._locked():
            self._put(COMMON + number * PART, PART, b"")

    def served(self, number: int) -> int:
        """Peers of one process."""
        with self._locked():
            return len(self._part(number).peers)

    @contextlib.contextmanager
    def peers(self) -> Iterator[tuple[list[Peer], Callable[[list[Peer]], None]]]:
        """Those of all other processes, while nobody changes anything; and what says which ours are now."""
        with self._locked():
            others = [Peer(*peer) for number in range(self._parts) if number != self._own for peer in self._part(number).peers]
            yield others, self._ours

    def _ours(self, peers: list[Peer]) -> None:
        part = self._part(self._own)
        part.peers = [(peer.peer_role, peer.peer_fingerprint) for peer in peers]
        self._write(part)

    def claim(self, size: int, most: int) -> bool:
        """So many bytes more for our sessions, if all processes' hold no more than `most` with them."""
        with self._locked():
            if most and sum(self._part(number).held for number in range(self._parts)) + size > most:
                return False
            self._hold(size)
            return True

    def release(self, size: int) -> None:
        """So many bytes less; or more, whatever the others hold, where they are fewer than none."""
        with self._locked():
            self._hold(-size)

    def _hold(self, size: int) -> None:
        part = self._part(self._own)
        part.held += size
        self._write(part)

    @contextlib.contextmanager
    def sent(self) -> Iterator[Sent]:
        """What set-ups were sent, to be changed within the block."""
        with self._locked():
            data = self._bytes(0, COMMON)
            try:
                found = msgspec.msgpack.decode(data, type=Sent) if data else {}
            except (msgspec.MsgspecError, ValueError):
                found = {}
            yield found
            data = msgspec.msgpack.encode(found)
            while len(data) > COMMON - _HEAD:  # a hundred thousand certificates: the oldest half is forgotten
                for client in sorted(found, key=lambda each: found[each][0])[: len(found) // 2 + 1]:
                    del found[client]
                data = msgspec.msgpack.encode(found)
            self._put(0, COMMON, data)
