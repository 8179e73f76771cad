"""What the processes of one service say to each other: lines of JSON over a pair of sockets, short ones and without secrets."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from typing import Any

MOST = 2**26
"""Bytes of a line, beyond what any count of clients makes of metrics."""


class Line:
    """One end. `say` may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ended = False
        self._bytes = bytearray()
        self._saying = threading.Lock()

    def say(self, **words: Any) -> bool:
        """False if nobody is there to hear it."""
        with self._saying, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(words).encode() + b"\n")
            return True
        return False

    def heard(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """What was said meanwhile, waited for so long at most; `ended` once the other end is gone."""
        if not select.select([self.sock], [], [], wait_s)[0]:
            return []
        try:
            data = self.sock.recv(1 << 16)
        except OSError:
            data = b""
        self.ended = self.ended or not data or len(self._bytes) > MOST
        self._bytes += data
        *lines, rest = self._bytes.split(b"\n")
        self._bytes = bytearray(rest)
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """May be called again."""
        self.sock.close()
