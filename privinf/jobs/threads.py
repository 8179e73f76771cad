"""A job's workers as threads of this process, with sessions that they share or each its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator

from privinf.jobs.worker import Crew, Reply, Terms, Worker

Line = tuple[int, str]


class Threads:
    """`replies` yields as they come; closing it ends what is being answered. `first` knows whether workers may share sessions."""

    def __init__(self, terms: Terms, count: int, first: Worker) -> None:
        self.crew = Crew(terms, count, first.shareable, first)
        self._lock = threading.Lock()
        self._over = threading.Event()

    def replies(self, pending: Iterator[Line]) -> Generator[Reply, None, None]:
        """The replies to these lines, in the order in which they end; raises what a worker raises."""
        found: queue.Queue[Reply | BaseException | None] = queue.Queue()
        threads = [
            threading.Thread(target=self._work, args=(worker, pending, found), name="privinf-job", daemon=True)
            for worker in self.crew.workers
        ]
        for thread in threads:
            thread.start()
        at_work = len(threads)
        try:
            while at_work:
                item = found.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    at_work -= 1
                else:
                    yield item
        finally:
            self._over.set()
            self.crew.close()
            for thread in threads:
                thread.join()

    def _work(self, worker: Worker, pending: Iterator[Line], found: queue.Queue[Reply | BaseException | None]) -> None:
        try:
            while not self._over.is_set():
                with self._lock:
                    line = next(pending, None)
                if line is None:
                    break
                found.put(worker.answer(*line))
        except BaseException as error:
            found.put(error)
        else:
            found.put(None)
