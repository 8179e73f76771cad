"""A job's workers as threads of this process, with sessions that they share or each its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from privinf.client.shared import Shared
from privinf.jobs.worker import Reply, Terms, Worker

Line = tuple[int, str]


class Threads:
    """`replies` yields as they come; closing it ends what is being answered. `first` knows whether workers may share sessions."""

    def __init__(self, terms: Terms, count: int, first: Worker) -> None:
        self.workers = [first, *(Worker(terms) for _ in range(count - 1))]
        if count > 1 and first.shareable:
            shared = Shared(first.client, count)
            for worker in self.workers:
                worker.shared = shared
        self._lock = threading.Lock()
        self._over = threading.Event()

    def replies(self, pending: Iterator[Line]) -> Iterator[Reply]:
        """The replies to these lines, in the order in which they end; raises what a worker raises."""
        found: queue.Queue[Reply | BaseException | None] = queue.Queue()
        threads = [
            threading.Thread(target=self._work, args=(worker, pending, found), name="privinf-job", daemon=True) for worker in self.workers
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
            for worker in self.workers:
                worker.close()
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
