"""A demo on one machine: server and dealer, if there is one, as processes of their own, and what they receive, for the page."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Any

from privinf.local.session import LocalSession
from privinf.session.options import Options

KEPT = 2000


class Demo(LocalSession):
    """Starts server and dealer; `addresses` and `keys` are what a client needs. It is the page's `Watch`."""

    def __init__(self, model: Path, options: Options) -> None:
        super().__init__(model, options, watch=self._received)
        self._view = threading.Lock()
        self._messages: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT)
        self._number = 0
        self._traffic: dict[str, Any] = {}

    def _received(self, role: str, event: dict[str, Any]) -> None:
        with self._view:
            self._traffic[role] = event["traffic"]
            for message in event["messages"]:
                self._number += 1
                self._messages.append((self._number, {"party": role, **message}))

    def since(self, number: int) -> tuple[int, list[dict[str, Any]]]:
        """See `page.Watch`."""
        with self._view:
            return self._number, [message for place, message in self._messages if place > number]

    @property
    def seen_traffic(self) -> dict[str, Any]:
        """{role: its `traffic`}, as it told last."""
        with self._view:
            return dict(self._traffic)
