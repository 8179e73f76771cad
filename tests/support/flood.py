"""Crowds before a door: `python -m tests.support.flood ADDRESS RATE SECONDS SOURCES SAYS` opens connections; and a relay that is slow.

SOURCES is how many addresses of 127.1.0.0/16 they come from, 0 for 127.0.0.1 alone; SAYS is what each of them sends, in hexadecimal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from privinf.transport.listener import parse_address
from tests.support.between import Between, both_ways

ROOT = Path(__file__).resolve().parents[2]
HELD = 6000
"""Connections that the crowd holds at a time, at most."""


def flood(address: str, rate: float, seconds: float, sources: int, says: bytes) -> int:
    """How many connections were begun."""
    place, held, count, began = parse_address(address), deque[socket.socket](), 0, time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        while count < rate * now:
            sock = socket.socket()
            if sources:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
                sock.bind((f"127.1.{count % sources // 250}.{count % sources % 250 + 1}", 0))
            sock.setblocking(False)
            if sock.connect_ex(place) not in (0, errno.EINPROGRESS):
                sock.close()
                time.sleep(0.01)
                continue
            if says:
                with contextlib.suppress(OSError):
                    sock.send(says)  # on loopback the connection is there at once
            held.append(sock)
            count += 1
            if len(held) > HELD:
                held.popleft().close()
        time.sleep(0.002)
    return count


@contextlib.contextmanager
def flooding(address: str, rate: float, seconds: float, sources: int = 0, says: bytes = b"") -> Iterator[subprocess.Popen[str]]:
    """The same in a process of its own, which is there once it has begun; it prints the number in the end."""
    words = [sys.executable, "-m", "tests.support.flood", address, str(rate), str(seconds), str(sources), says.hex()]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        yield process
    finally:
        process.kill()
        process.communicate()


class Relay(Between):
    """Connects whoever comes to an address at once, and then takes `delay` seconds for each byte, each way: a network far away."""

    def __init__(self, address: str, delay: float) -> None:
        self._place, self._delay = parse_address(address), delay
        super().__init__()

    def carry(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._place, 10)
        except OSError:
            near.close()
            return
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        both_ways(near, far, self._delay)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(HELD + 200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    address, rate, seconds, sources, says = sys.argv[1:]
    print("begins", flush=True)
    print(flood(address, float(rate), float(seconds), int(sources), bytes.fromhex(says)), flush=True)


if __name__ == "__main__":
    main()
