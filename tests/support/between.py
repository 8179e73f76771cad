"""What stands between two parties on a network: it listens at an address of its own, and carries each connection in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self


class Between:
    """`carry` is what it does with a connection. Ends with a block; connections that were made stay."""

    def __init__(self) -> None:
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._accept, name="between", daemon=True).start()

    def carry(self, near: socket.socket) -> None:
        raise NotImplementedError

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end of the block
            while True:
                near = self._door.accept()[0]
                threading.Thread(target=self.carry, args=(near,), name="carried", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


def both_ways(near: socket.socket, far: socket.socket, delay: float = 0.0) -> None:
    """Copies bytes, each piece after so many seconds, until an end closes; then both do."""
    threading.Thread(target=_copy, args=(far, near, delay), daemon=True).start()
    _copy(near, far, delay)


def _copy(source: socket.socket, target: socket.socket, delay: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            time.sleep(delay)
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
