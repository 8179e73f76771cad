"""Ctrl-C and SIGTERM: the running verb unwinds, so that its children end with it, and after a grace period the process ends anyway."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time

GRACE_S = 5.0
"""How long a verb may take to unwind. Well below the 10 seconds in which a party must end."""
_drain_s = 0.0


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end: SIGTERM unwinds just as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that a signal ended."""
        return 128 + self.number


def allow(seconds: float) -> None:
    """Lets a verb take this much longer, for what is on its way when a signal comes."""
    global _drain_s
    _drain_s = seconds


def install() -> None:
    """Raises Stopped in the main thread on the first signal.

    Further ones are ignored while it unwinds, for GRACE_S seconds at most, and what was allowed beyond; unless the verb asks for
    the second one by `listen_again`.

    The watch is a thread on the wake-up descriptor, because Python runs a handler only when the main thread is back from
    native code, and a large matrix product or a blocked call may keep it there.
    """
    waker, woken = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    listen_again()
    threading.Thread(target=_watch, args=(woken, waker), name="signals", daemon=True).start()


def listen_again() -> None:
    """The next signal raises Stopped: a second one ends what the first one lets go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _watch(woken: socket.socket, waker: socket.socket) -> None:
    with waker, contextlib.suppress(OSError):
        number, end = 0, None
        while select.select([woken], [], [], None if end is None else max(0.0, end - time.monotonic()))[0]:
            found = woken.recv(1)[0]
            if found in (signal.SIGINT, signal.SIGTERM):
                number, end = found, time.monotonic() + GRACE_S + (0.0 if number else _drain_s)
        if select.select([], [2], [], 0)[1]:  # a pipe that nobody reads must not keep us
            os.write(2, b"privinf: interrupted\n" if number == signal.SIGINT else b"privinf: terminated\n")
        os._exit(128 + number)
