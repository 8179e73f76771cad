"""A job's workers as actors on a Ray cluster: what a lost node was answering, others answer.

The cluster is the client's, as its memory is: its nodes learn prompts and replies, see `privinf.session.cluster`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from privinf.jobs.worker import Crew, Reply, Terms
from privinf.session.cluster import Fleet, Remote, connect

Line = tuple[int, str]


class Actors:
    """`replies` yields as they come, whatever becomes of single workers; fewer of them than asked for go on alone.

    `count` prompts are answered at a time, spread over `workers` actors: without it as many as the cluster has processors now. Those of
    an actor share its session where they may, as `Threads` do.
    """

    def __init__(
        self, terms: Terms, count: int, *, together: bool = False, workers: int | None = None, address: str = "auto", cpus: float = 1.0
    ) -> None:
        ray = connect(address, terms.options.connect_s)
        actors = min(count, workers or max(1, int(ray.cluster_resources().get("CPU", 0) // cpus)))
        each = -(-count // actors)
        given = terms, each, together
        self._fleet = Fleet[Line, Reply](ray, lambda: Remote(ray, Crew, given, cpus, each), actors, terms.patience, each)

    def replies(self, pending: Iterator[Line]) -> Generator[Reply, None, None]:
        """The replies to these lines, in the order in which they end; raises what a worker raises."""
        yield from self._fleet.do(pending, lambda worker, line: worker.begin("answer", *line), lambda worker, line, reply: reply)
