"""The dealer's payload of a pass, as the client reads it."""

from __future__ import annotations

from collections.abc import Callable

from privinf.transport.connection import Connection
from protocols.errors import ProtocolDesync


class Feed:
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
