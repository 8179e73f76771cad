"""Both ends of the client's walk before a pass: the dealer's payload as it reads it, and what it sends ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from privinf.transport.connection import Connection
from protocols.errors import ProtocolDesync


class Payload:
    """The dealer's payload of one pass, cut into correlations as they are asked for."""

    def __init__(self, link: Connection, size: int, progress: Callable[[float], None]) -> None:
        self._link, self._total, self.left, self._progress = link, size, size, progress
        self._buffer = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        parts = []
        while size > len(self._buffer):
            if len(self._buffer):
                parts.append(self._buffer)
                size -= len(self._buffer)
            if self.left <= 0:
                raise ProtocolDesync("the dealer sent fewer correlations than are needed", party="client")
            self._buffer = self._link.receive()
            if not self._buffer:
                raise ProtocolDesync("the dealer sent an empty message", party="client")
            self.left -= len(self._buffer)
            self._progress(1 - max(self.left, 0) / max(self._total, 1))
        last, self._buffer = self._buffer[:size], self._buffer[size:]
        return memoryview(b"".join([*parts, last])) if parts else last


class OneWay:
    """A channel whose messages may wait for each other, for there is no answer to them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def exchange(self, body: Any, expect: int | None) -> None:
        """See `Channel`."""
        assert expect is None
        self._connection.post(body)
