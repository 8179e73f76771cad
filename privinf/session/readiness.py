"""Whether others are there whom a service needs: asked by probes that come every few seconds, each of which must not cause a connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

READY_S, MISSING_S = 10.0, 2.0
"""How long an answer holds: that all are there, or that somebody is missing."""


class Readiness:
    """Safe in threads: one asks, and the others wait for its answer."""

    def __init__(self) -> None:
        self._why, self._until = "", 0.0
        self._asking = threading.Lock()

    def why(self, missing: Callable[[], str]) -> str:
        """What `missing` says, now or a few seconds ago."""
        with self._asking:
            if time.monotonic() >= self._until:
                self._why = missing()
                self._until = time.monotonic() + (MISSING_S if self._why else READY_S)
            return self._why
