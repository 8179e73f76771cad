"""A job's workers as actors on a Ray cluster: what a lost node was answering, others answer.

The cluster is the client's, as its memory is: its nodes learn prompts and replies, see `privinf.session.cluster`.
"""

from __future__ import annotations

from collections.abc import Iterator

from privinf.jobs.worker import Reply, Terms, Worker
from privinf.session.cluster import Fleet, Remote, connect

Line = tuple[int, str]


class Actors:
    """`replies` yields as they come, whatever becomes of single workers; fewer of them than asked for go on alone."""

    def __init__(self, terms: Terms, count: int, address: str = "auto", cpus: float = 1.0) -> None:
        ray = connect(address, terms.options.connect_s)
        self._fleet = Fleet[Line, Reply](ray, lambda: Remote(ray, Worker, (terms,), cpus), count, terms.patience)

    def replies(self, pending: Iterator[Line]) -> Iterator[Reply]:
        """The replies to these lines, in the order in which they end; raises what a worker raises."""
        yield from self._fleet.do(pending, lambda worker, line: worker.begin("answer", *line), lambda worker, line, reply: reply)
