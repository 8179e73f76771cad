"""The processes of a local session are forked by one that has loaded the libraries: a third of the processor time until all are ready.

Loading takes some two seconds of a core, most of it torch's, and the three parties load the same. That one, `python -m privinf
_parties`, has one thread and has drawn nothing when it forks; what is random comes from the operating system, and OpenSSL and Python
draw anew after a fork. A party gets its standard input, output and error with the order, and is from then on what `_party ROLE` is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from privinf.forking import MOST, ask, fork, started, taken

CLOSES_S = 2.0


class Born:
    """Of `subprocess.Popen` what a local session uses of a party; its exit code comes from the one that forked it."""

    def __init__(self, forks: Forks) -> None:
        self._forks, self._named, self._ended = forks, threading.Event(), threading.Event()
        self._pid, self.returncode, self.born = 0, 0, 0.0  # when it was forked, by the monotonic clock
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Once it has been forked; 0 if that will not be."""
        self._named.wait()
        return self._pid

    def named(self, pid: int) -> None:
        """It lives."""
        self._pid, self.born = pid, time.monotonic()
        self._named.set()

    def ended(self, code: int) -> None:
        """It has ended, or never lived; negative: by a signal."""
        if not self._ended.is_set():
            self.returncode = code
            self._ended.set()
            self._named.set()

    def wait(self, timeout: float | None = None) -> int:
        """See `Popen.wait`."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a local party", timeout or 0.0)
        return self.returncode

    def poll(self) -> int | None:
        """See `Popen.poll`."""
        return self.returncode if self._ended.is_set() else None

    def kill(self) -> None:
        """By force; before it lives, all that are to come."""
        if not self._named.is_set():
            self._forks.process.kill()
        elif self._pid and self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


class Forks:
    """This end of it. OSError where no process can be started."""

    def __init__(self, environment: Mapping[str, str], stderr: IO[bytes] | None) -> None:
        self._children: list[Born] = []
        words = ["-P", "-m", "privinf", "_parties"]  # -P: not whatever lies in the directory where the caller happens to be
        self.process, self._sock = started(
            words, environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )  # a session of its own: Ctrl-C reaches the one who started us, who then ends us
        threading.Thread(target=self._read, name="privinf-forks", daemon=True).start()

    def bear(self, role: str, stderr: IO[bytes] | None) -> Born:
        """A party, which lives as soon as the libraries are there."""
        child = Born(self)
        (theirs_in, own_in), (own_out, theirs_out) = os.pipe(), os.pipe()
        child.stdin, child.stdout = os.fdopen(own_in, "wb"), os.fdopen(own_out, "rb")
        self._children.append(child)
        streams = [theirs_in, theirs_out, 2 if stderr is None else stderr.fileno()]
        try:
            ask(self._sock, streams, number=len(self._children) - 1, role=role)
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        return child

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sock.recv(MOST):
                told = json.loads(data)
                child = self._children[told["number"]]
                if "pid" in told:
                    child.named(told["pid"])
                else:
                    child.ended(told["code"])
        code = self.process.wait()
        for child in self._children:  # nobody is left to say how they end
            child.kill()
            child.ended(code)

    def close(self) -> None:
        """Ends it; its parties have ended."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSES_S)
        self.process.kill()
        self.process.wait()
        self._sock.close()


# ---- the process


def main() -> str:
    """Forks parties until its channel ends; returns only in a party, whose role it is."""
    from privinf.session.memory import few_arenas, rare_collections

    few_arenas()
    rare_collections()
    for role in ("client", "server", "dealer"):
        importlib.import_module(f"privinf.{role}.{role}")
    with contextlib.suppress(Exception):  # where Numba does not load, each party says so for itself
        importlib.import_module("protocols.kernels.build")
    gc.freeze()  # or the first collection in each party would copy what they share
    return _forking(taken())


def _forking(sock: socket.socket) -> str:
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    numbers: dict[int, int] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(sock, selectors.EVENT_READ)
        ready.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is woken:
                    woken.recv(MOST)
                    _reap(sock, numbers)
                    continue
                found = fork(sock, woken, wakes)
                if found is None:
                    sys.exit(0)
                if not found.pid:
                    return _become(found.order["role"], found.descriptors)
                numbers[found.pid] = found.order["number"]
                sock.send(json.dumps({"number": found.order["number"], "pid": found.pid}).encode())


def _become(role: str, descriptors: list[int]) -> str:
    """A forked process becomes a party: its name, a session of its own, its standard streams."""
    os.setsid()
    with contextlib.suppress(OSError):  # where there is a /proc: what `ps` and `top` call it
        Path("/proc/self/comm").write_text(f"privinf-{role}")
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        if descriptor > 2:
            os.close(descriptor)
    return role


def _reap(sock: socket.socket, numbers: dict[int, int]) -> None:
    """Tells of those that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            code = os.waitstatus_to_exitcode(status)
            if pid in numbers:
                sock.send(json.dumps({"number": numbers.pop(pid), "code": code}).encode())
