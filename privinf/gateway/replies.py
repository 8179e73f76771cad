"""What a gateway counts of its replies, and how long the recent ones took."""

from __future__ import annotations

import threading

from privinf.client.reply import Reply
from privinf.transport.meter import PHASES

_COUNTED = ("prompt_tokens", "cached_tokens", "tokens")


class ReplyCounts:
    """Counts by name, seconds by phase. Safe in threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.counts = dict.fromkeys((*_COUNTED, "replies", "cancelled", "failed", "prepared", "shared"), 0)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.mean_s = 1.0
        """Of recent replies."""

    def opened(self, setup_s: float) -> None:
        """A session that took so long to open."""
        with self._guard:
            self.seconds["setup"] += setup_s

    def whole(self, reply: Reply, *, shared: bool) -> None:
        """A reply that came to its end, in a session that callers shared or in one of its own."""
        with self._guard:
            self.counts["shared"] += shared
            self.counts["prepared"] += reply.sessions[-1].prepared is not None
            self.seconds["offline"] += reply.timing.offline_s
            self.seconds["online"] += sum(reply.timing.tokens_s)

    def ended(self, end: str, took_s: float, counted: object) -> None:
        """A reply that has ended in this way; its tokens are attributes of what is counted."""
        with self._guard:
            self.mean_s += 0.2 * (took_s - self.mean_s)
            self.counts[end] += 1
            for name in _COUNTED:
                self.counts[name] += getattr(counted, name)
