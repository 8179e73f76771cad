"""The processes of a local session are forked by one that has loaded the libraries: a third of the processor time until all are ready.

Loading takes some two seconds of a core, most of it torch's, and the three parties load the same. That one, `python -m privinf
_parties FD`, has one thread and has drawn nothing when it forks; what is random comes from the operating system, and OpenSSL and Python
draw anew after a fork. A party gets its standard input, output and error over the socket FD, and is from then on what `_party ROLE` is.
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

MOST = 4096  # bytes of a message
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
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._children: list[Born] = []
        with theirs:
            # -P: not whatever lies in the directory where the caller happens to be
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "privinf", "_parties", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C reaches the one who started us, who then ends us
            )
        threading.Thread(target=self._read, name="privinf-forks", daemon=True).start()

    def bear(self, role: str, stderr: IO[bytes] | None) -> Born:
        """A party, which lives as soon as the libraries are there."""
        child = Born(self)
        (theirs_in, own_in), (own_out, theirs_out) = os.pipe(), os.pipe()
        child.stdin, child.stdout = os.fdopen(own_in, "wb"), os.fdopen(own_out, "rb")
        self._children.append(child)
        message = json.dumps({"number": len(self._children) - 1, "role": role}).encode()
        try:
            socket.send_fds(self._sock, [message], [theirs_in, theirs_out, 2 if stderr is None else stderr.fileno()])
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


def main(descriptor: int) -> str:
    """Forks parties until its socket ends; returns only in a party, whose role it is."""
    from privinf.session.memory import few_arenas, rare_collections

    few_arenas()
    rare_collections()
    for role in ("client", "server", "dealer"):
        importlib.import_module(f"privinf.{role}.{role}")
    with contextlib.suppress(Exception):  # where Numba does not load, each party says so for itself
        importlib.import_module("protocols.kernels.build")
    gc.freeze()  # or the first collection in each party would copy what they share
    return _forking(socket.socket(fileno=descriptor))


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
                data, descriptors, *_ = socket.recv_fds(sock, MOST, 3)
                if not data:
                    sys.exit(0)
                asked = json.loads(data)
                pid = os.fork()
                if not pid:
                    break
                for each in descriptors:
                    os.close(each)
                numbers[pid] = asked["number"]
                sock.send(json.dumps({"number": asked["number"], "pid": pid}).encode())
            else:
                continue
            break
    role = str(asked["role"])
    _become(role, descriptors, (sock, woken, wakes))
    return role


def _become(role: str, descriptors: list[int], inherited: tuple[socket.socket, ...]) -> None:
    """A forked process becomes a party: its name, a session of its own, its standard streams, and nothing of the one that forked it."""
    os.setsid()
    with contextlib.suppress(OSError):  # where there is a /proc: what `ps` and `top` call it
        Path("/proc/self/comm").write_text(f"privinf-{role}")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for end in inherited:
        end.close()
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        if descriptor > 2:
            os.close(descriptor)


def _reap(sock: socket.socket, numbers: dict[int, int]) -> None:
    """Tells of those that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            code = os.waitstatus_to_exitcode(status)
            if pid in numbers:
                sock.send(json.dumps({"number": numbers.pop(pid), "code": code}).encode())
