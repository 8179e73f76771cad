"""The front: the process that listens. It computes nothing and knows no key: it hands connections on, watches workers, replaces them.

A worker that dies takes its own sessions with it, and another one takes its place: soon, but the more have died in the last minute the
later. On a reload a new nursery reads everything anew, the command's configuration, the keys and the model; then workers are replaced one
by one: the new one first, then the old one is handed nobody any more, and ends with its last session.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client.core import Metric

from privinf.session.metrics import counter, gauge
from privinf.transport.listener import listening
from privinf.workers.crew import Crew, Nursery, Worker
from privinf.workers.hints import Hints
from privinf.workers.porch import Porch
from privinf.workers.summed import Packed, counts, summed
from privinf.workers.worker import packed

REPLACED_S = 3600.0
"""How long the sessions of a worker that is replaced may go on."""
LOOK_S = 4.0
"""How long an answer to whoever asks for metrics waits for workers."""
GOING_S = 30.0
"""How long a nursery may take to say why it could not load."""
_STEP_S, _MINUTE_S, _SOON_S, _LATE_S = 0.25, 60.0, 0.1, 30.0


class Failed(Exception):
    """Nothing can be served; whoever could not load has said why. `code`: its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Front:
    """`words`: the command line that a nursery is started with. `looks`: whether connections have hints, see `transport.hint`.

    ConfigError if it cannot listen. Its attributes are the crew and how it is looked at, the porch, and what is about to change.
    """

    def __init__(self, words: Sequence[str], *, role: str, listen: str, workers: int, looks: bool) -> None:
        self.role, self._words = role, words
        listener, self.address = listening(listen, role)
        self.crew = Crew(workers, self.address)
        self._porch = Porch(listener, self._give, looks=looks)
        self._hints: Hints[Worker] = Hints()
        self._changes = _Changes()
        self._looks = _Looks()
        self._log = logging.getLogger(f"privinf.{role}")
        self._nursery: Nursery | None = self._start_nursery()

    # ---- from a nursery to workers that serve

    def _start_nursery(self) -> Nursery:
        nursery = Nursery(self._words)
        self._porch.watch(nursery.channel)
        return nursery

    def begin(self) -> dict[str, Any]:
        """Waits until all workers serve; what their nursery says about them. Failed if there are none."""
        while len(self.crew.serving) < self.crew.wanted:
            self.step()
            if self._nursery is None or (self._changes.deaths and not self.crew.serving):
                raise Failed(self._changes.code or 2)
        return dict(self._nursery.about or {}) if self._nursery is not None else {}

    def reload(self) -> None:
        """Workers read their keys anew now, so that who is listed no longer is served no longer; and then they are replaced."""
        self._changes.reload = True

    def step(self) -> None:
        """A round of everything."""
        if not self._changes.ending:
            self._porch.open(bool(self.crew.serving))
        for sock in self._porch.step(_STEP_S):
            for nursery in [each for each in (self._nursery, self._changes.coming) if each is not None and each.channel is sock]:
                self._hear_nursery(nursery)
            for worker in [each for each in self.crew.all if each.line.sock is sock]:
                self._hear(worker)
        if self._changes.reload:
            self._changes.reload = False
            self._begin_reload()
        if not self._changes.ending:
            self._replace()

    def _begin_reload(self) -> None:
        for worker in self.crew.all:
            worker.line.say(do="reload")
        if self._changes.coming is None:
            self._changes.coming = self._start_nursery()

    def _hear_nursery(self, nursery: Nursery) -> None:
        there = nursery.hear()
        if there and nursery is self._changes.coming:
            self._changes.coming, before = None, self._nursery
            self._nursery = nursery
            for worker in self.crew.all:
                worker.old = True
            if before is not None:
                self._end_nursery(before)
        elif not there:
            code = self._end_nursery(nursery, GOING_S)
            if nursery is self._nursery:
                self._nursery, self._changes.code = None, code
                self._changes.died()
            else:
                self._changes.coming = None
                self._log.error("nothing was read anew, and the old workers stay")

    def _end_nursery(self, nursery: Nursery, wait_s: float = 5.0) -> int:
        self._porch.forget(nursery.channel)
        return nursery.end(wait_s)

    def _replace(self) -> None:
        """Whoever is missing comes; of those that are old one at a time goes, once there is one more than is wanted."""
        crew, staying = self.crew, self.crew.staying
        old = [worker for worker in staying if worker.old]
        calm = len(crew.serving) == len(crew.all)  # nobody begins, nobody ends
        if len(staying) < crew.wanted or (old and calm and len(staying) <= crew.wanted):
            if self._changes.may_spawn():
                self._spawn()
        elif old and calm:
            self._retire(old[0], REPLACED_S)

    def _spawn(self) -> None:
        if self._nursery is None:
            if self.crew.all or self._changes.coming is None:
                self._nursery = self._start_nursery()
        elif self._nursery.about is not None and (worker := self.crew.spawn(self._nursery)) is not None:
            self._porch.watch(worker.line.sock)

    def _retire(self, worker: Worker, seconds: float) -> None:
        worker.ending = True
        worker.line.say(do="drain", seconds=seconds)

    # ---- workers

    def _hear(self, worker: Worker) -> None:
        for word in worker.line.heard():
            if "up" in word:
                worker.pid = word["up"]
            elif "hint" in word:
                self._hints.known(word["hint"], worker)
            elif "families" in word:
                worker.families, worker.ready = word["families"], word.get("ready", "it ends")
                self._looks.answer(worker, word.get("looked", 0))
                if "bye" in word:
                    worker.ending = True
                    worker.line.say(do="leave")
        if worker.line.ended:
            self._gone(worker)

    def _gone(self, worker: Worker) -> None:
        self._porch.forget(worker.line.sock)
        self.crew.bury(worker)
        self._hints.forget(worker)
        self._looks.bury(worker)
        if not worker.ending:
            self._changes.died()
            what = f"{self.role}: a worker is gone (process {worker.pid}), and its sessions with it; another one takes its place"
            self._log.error("%s", what if worker.up else f"{self.role}: a worker could not begin")

    def _give(self, sock: socket.socket, hint: str) -> None:
        """Hands a connection to the worker that has its session, or else to the least busy one."""
        found = self._hints[hint] if hint else None
        for worker in [found] if found is not None else self.crew.least_busy():
            if worker.hand(sock):
                if hint:
                    self._hints.seen(hint, worker)
                return
        sock.close()

    # ---- what is asked about them

    def families(self) -> Iterator[Metric]:
        """Of all workers, those that are gone included."""
        yield from summed(self._looks.look(self.crew.serving))
        yield gauge("privinf_workers", "Processes that serve.", len(self.crew.serving), role=self.role)
        yield counter("privinf_worker_deaths", "Workers that ended without being asked to.", self._changes.died_ever, role=self.role)

    def ready(self) -> str:
        """Why nobody new can be served now; empty where somebody can."""
        if self._changes.ending:
            return f"this {self.role} is to end"
        serving = self.crew.serving
        self._looks.look(serving)
        whys = [worker.ready for worker in serving]
        return "" if "" in whys else (whys or ["no worker is up"])[0]

    # ---- the end

    @property
    def peers(self) -> int:
        """That are served now."""
        return sum(worker.load(self.crew.board) for worker in self.crew.all)

    @contextlib.contextmanager
    def ending(self, seconds: float) -> Iterator[Callable[[], bool]]:
        """Within it nobody new is served, and what it gives makes a round until nobody is left; after it everything has ended."""
        self._changes.ending = True
        if self._porch.looks:  # second connections of sessions that have begun are still to come
            self._porch.open(bool(self.crew.serving))
        else:
            self._porch.shut()
        for worker in self.crew.staying:
            self._retire(worker, seconds)
        until = time.monotonic() + seconds
        try:
            yield lambda: self._until_gone(until)
        finally:
            self._stop()

    def _until_gone(self, until: float) -> bool:
        self.step()
        return not self.crew.all or time.monotonic() > until

    def _stop(self) -> None:
        for worker in self.crew.all:
            worker.ending = True
            worker.line.say(do="stop")
        until = time.monotonic() + 4.5
        while not self._until_gone(until):
            pass
        for worker in self.crew.all:
            worker.kill()
        for nursery in (self._nursery, self._changes.coming):
            if nursery is not None:
                nursery.end()
        self._porch.close()


class _Changes:
    """What is about to change, and how often workers died."""

    def __init__(self) -> None:
        self.reload = self.ending = False
        self.coming: Nursery | None = None
        self.code = self.died_ever = 0
        self.deaths: deque[float] = deque()  # of the last minute
        self._again = 0.0

    def died(self) -> None:
        """One more; the next one comes the later the more there were."""
        now = time.monotonic()
        self.died_ever += 1
        self.deaths.append(now)
        while self.deaths[0] < now - _MINUTE_S:
            self.deaths.popleft()
        self._again = now + min(_LATE_S, _SOON_S * 2 ** len(self.deaths))

    def may_spawn(self) -> bool:
        """Whether the next one may come."""
        return time.monotonic() >= self._again


class _Looks:
    """What workers say about themselves to whoever asks, in another thread than the one that hears them."""

    def __init__(self) -> None:
        self._past: Packed = []  # what those have counted that are gone
        self._number = 0
        self._heard = threading.Condition()

    def look(self, workers: Sequence[Worker]) -> list[Packed]:
        """Asks all of them, and waits; one that is too busy to answer counts as it did the last time."""
        with self._heard:
            self._number += 1
            number = self._number
            for worker in workers:
                worker.line.say(do="look", number=number)
            self._heard.wait_for(lambda: all(worker.looked >= number or worker.line.ended for worker in workers), LOOK_S)
            return [self._past, *(worker.families for worker in workers)]

    def answer(self, worker: Worker, number: int) -> None:
        """One has answered."""
        with self._heard:
            worker.looked = max(worker.looked, number)
            self._heard.notify_all()

    def bury(self, worker: Worker) -> None:
        """One is gone, and what it has counted last stays."""
        with self._heard:
            self._past = packed(summed([self._past, counts(worker.families)]))
            self._heard.notify_all()
