"""The front's view of its workers and of the nursery that forks them: who is there, how busy each is, and who is to come next."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from privinf.forking import ask, started
from privinf.session.board import Board
from privinf.transport.handing import channel, hand
from privinf.workers.summed import Packed
from privinf.workers.words import Line

RECENT_S = 1.0
"""How long a connection that was handed over counts, before it is seen among the peers of its worker."""


class Nursery:
    """One that was started: the same command again, with a channel to us. `about`: what it says once it has loaded."""

    def __init__(self, words: Sequence[str]) -> None:
        self._process, self.channel = started(["-m", "privinf", *words], os.environ)
        self.about: dict[str, Any] | None = None

    def hear(self) -> bool:
        """Takes in what it says; False once it is gone."""
        data = b""
        with contextlib.suppress(OSError):
            data = self.channel.recv(1 << 16)
        if data:
            self.about = json.loads(data)["loaded"]
        return bool(data)

    def fork(self, worker_ends: Sequence[int], **order: Any) -> bool:
        """Asks for a worker; False where nobody is there."""
        try:
            ask(self.channel, worker_ends, **order)
        except OSError:
            return False
        return True

    def end(self, wait_s: float = 5.0) -> int:
        """Its workers stay; its exit code, waited for so long."""
        self.channel.close()
        try:
            return self._process.wait(wait_s)
        except subprocess.TimeoutExpired:  # it loads a model
            self._process.kill()
            return self._process.wait()


class Worker:
    """One that was asked for. `old`: it is to be replaced; `ending`: it is handed nobody any more."""

    def __init__(self, part: int, line: Line, end: socket.socket) -> None:
        self.part, self.line, self._end = part, line, end
        self.pid = 0
        self.old = self.ending = False
        self.looked, self.ready = 0, "it has just begun"
        self.families: Packed = []
        self._handed: deque[float] = deque()

    @property
    def up(self) -> bool:
        """Whether it serves."""
        return self.pid > 0

    def load(self, board: Board) -> int:
        """Peers that it has, or is about to."""
        while self._handed and self._handed[0] < time.monotonic() - RECENT_S:
            self._handed.popleft()
        return board.served(self.part) + len(self._handed)

    def hand(self, sock: socket.socket) -> bool:
        """See `transport.handing`."""
        if not hand(self._end, sock):
            return False
        self._handed.append(time.monotonic())
        return True

    def kill(self) -> None:
        """What does not end by itself."""
        if self.pid:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Our ends: it has gone."""
        self.line.close()
        self._end.close()


class Crew:
    """All workers, each with a part of the board."""

    def __init__(self, workers: int, address: str) -> None:
        self.wanted, self.address = workers, address
        parts = 2 * workers + 2  # while they are replaced there is one more than is wanted, and those that end
        self._board_file = Board.make(parts)
        self.board = Board(self._board_file, parts - 1, workers)
        self._free = list(range(parts - 1))
        self.all: list[Worker] = []

    @property
    def serving(self) -> list[Worker]:
        """Those that are handed connections."""
        return [worker for worker in self.all if worker.up and not worker.ending]

    @property
    def staying(self) -> list[Worker]:
        """Those that do not end, begun or not."""
        return [worker for worker in self.all if not worker.ending]

    def spawn(self, nursery: Nursery) -> Worker | None:
        """Asks for one more; None where that is not possible now."""
        if not self._free:
            return None
        part = self._free[0]
        self.board.wipe(part)
        ours, theirs = socket.socketpair()
        ours.settimeout(1.0)  # one that hangs holds up nobody
        end, taken = channel()
        keep = end.dup()
        ends = (theirs.fileno(), taken.fileno(), keep.fileno(), self._board_file)
        asked = nursery.fork(ends, part=part, workers=self.wanted, address=self.address)
        for sock in (theirs, taken, keep):
            sock.close()
        if not asked:
            ours.close()
            end.close()
            return None
        self._free.remove(part)
        self.all.append(Worker(part, Line(ours), end))
        return self.all[-1]

    def bury(self, worker: Worker) -> None:
        """It has gone: so have its sessions."""
        self.all.remove(worker)
        worker.close()
        self.board.wipe(worker.part)
        self._free.append(worker.part)

    def least_busy(self) -> list[Worker]:
        """Those that serve, the least busy first; where all end, those."""
        return sorted(self.serving or [worker for worker in self.all if worker.up], key=lambda worker: worker.load(self.board))
