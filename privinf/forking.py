"""A process that forks others as it is asked to: it has loaded what they share, and has one thread, so that what it forks is whole.

Orders reach it over a pair of sockets, as JSON with descriptors beside it. Both ends are here, that of who starts it and its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHANNEL = "PRIVINF_CHANNEL"
"""An environment variable: the descriptor on which a process that was started to fork others is asked to."""
MOST = 4096
"""Bytes of a message."""
_DESCRIPTORS = 4


def started(words: Sequence[str], environment: Mapping[str, str], **how: Any) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Python with these words and a channel, as `Popen` has the rest; the channel's other end. OSError where no process can be started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        told = {**environment, CHANNEL: str(theirs.fileno())}
        process = subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, env=told, pass_fds=[theirs.fileno()], **how)
    return process, ours


def ask(channel: socket.socket, descriptors: Sequence[int], **order: Any) -> None:
    """Asks it for a process that gets these. OSError where it is gone."""
    socket.send_fds(channel, [json.dumps(order).encode()], list(descriptors))


# ---- the process


def taken() -> socket.socket:
    """Its end of the channel, which it has from who started it; no process after it finds one."""
    return socket.socket(fileno=int(os.environ.pop(CHANNEL)))


@dataclass(frozen=True)
class Fork:
    """What came of an order. `pid` 0: this is the process that was asked for, and the descriptors are its own."""

    pid: int
    order: dict[str, Any]
    descriptors: list[int]


def fork(channel: socket.socket, *inherited: socket.socket) -> Fork | None:
    """Waits for an order and forks; None where nobody asks any more. What is forked keeps neither the channel nor what it inherited."""
    try:
        data, descriptors, *_ = socket.recv_fds(channel, MOST, _DESCRIPTORS)
    except OSError:
        return None
    if not data:
        return None
    sys.stderr.flush()
    found = Fork(os.fork(), json.loads(data), descriptors)
    if found.pid:
        for each in descriptors:
            os.close(each)
        return found
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for end in (channel, *inherited):
        end.close()
    return found
