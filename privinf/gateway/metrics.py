"""What `/metrics` of the gateway says: counts, bytes, rounds and seconds; no label depends on a prompt or a reply."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from privinf.gateway.engine import Engine
from privinf.session.metrics import counter, gauge, traffic_families

KNOWN = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/page/reply", "/healthz", "/readyz", "/metrics", "/")


class Requests:
    """Answers by path and status, and the requests that are being answered; those with a key are the ones that a stop waits for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}
        self.draining = False
        """Whether no further one is let in."""
        self.inside = 0

    @contextlib.contextmanager
    def one_inside(self, *, counts: bool) -> Iterator[None]:
        """While one is answered, in the event loop's thread."""
        self.inside += counts
        try:
            yield
        finally:
            self.inside -= counts

    def count(self, path: str, status: int) -> None:
        """One answer; paths that are none of ours count together, so that a stranger cannot make labels."""
        place = (path if path in KNOWN else "other", str(status))
        with self._guard:
            self._counts[place] = self._counts.get(place, 0) + 1

    def family(self) -> Metric:
        """For Prometheus: a counter for each path and status."""
        family = CounterMetricFamily("privinf_requests", "Answers over HTTP.", labels=["path", "status"])
        with self._guard:
            for place, count in self._counts.items():
                family.add_metric(list(place), count)
        return family


def families(engine: Engine, requests: Requests) -> Iterable[Metric]:
    """Everything, as it is now."""
    yield requests.family()
    yield from traffic_families("client", engine.conversations.cells())
    counts = engine.replies.counts
    yield counter("privinf_prompt_tokens", "Tokens of prompts.", counts["prompt_tokens"])
    yield counter("privinf_cached_tokens", "Of them, those that a kept conversation had already.", counts["cached_tokens"])
    yield counter("privinf_tokens", "New tokens.", counts["tokens"])
    replies = CounterMetricFamily("privinf_replies", "Replies by how they ended.", labels=["end"])
    for end, name in (("done", "replies"), ("cancelled", "cancelled"), ("failed", "failed")):
        replies.add_metric([end], counts[name])
    yield replies
    seconds = CounterMetricFamily("privinf_seconds", "Seconds of sessions by phase.", labels=["phase"])
    for phase, value in engine.replies.seconds.items():
        seconds.add_metric([phase], value)
    yield seconds
    yield counter("privinf_correlations", "Correlations that were spent, each once.", engine.conversations.spent())
    yield counter("privinf_prepared_queries", "Queries that were prepared ahead, and used.", counts["prepared"])
    yield counter("privinf_shared_replies", "Whole replies that ended in a session for several callers.", counts["shared"])
    yield gauge("privinf_active_replies", "Replies that are being made.", engine.active)
    yield gauge("privinf_active_replies_limit", "Replies that are made at a time.", engine.limits.active)
    yield gauge("privinf_waiting_replies", "Callers that wait for their turn.", engine.waiting)
    yield gauge("privinf_waiting_replies_limit", "Callers that may wait.", engine.limits.waiting)
    yield gauge("privinf_requests_inside", "Requests that are being read or answered.", requests.inside)
    yield gauge("privinf_kept_conversations", "Idle conversations that a next turn may go on from.", len(engine.conversations.idle))
