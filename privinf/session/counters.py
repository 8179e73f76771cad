"""What a service has counted, and its connections that still count. None of it depends on what a prompt or a reply says."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

from privinf.session.report import snapshot
from privinf.transport.connection import Connection
from privinf.transport.keys import ROLES
from privinf.transport.meter import PHASES, Cell


class Counters:
    """Safe in threads."""

    def __init__(self) -> None:
        self.refusals: Counter[str] = Counter()  # by reason
        self.counts: Counter[str] = Counter()  # passes, positions and correlations
        self.ended: deque[dict[str, Any]] = deque(maxlen=64)  # the last connections, see `report.snapshot`
        self._totals = {(role, phase): Cell() for role in ROLES for phase in PHASES}  # of connections that have ended, by role of the peer
        self._open: set[Connection] = set()
        self._guard = threading.Lock()

    @property
    def connections(self) -> list[Connection]:
        """Those that have not ended."""
        with self._guard:
            return list(self._open)

    def begin(self, connection: Connection) -> None:
        """A connection counts from now on."""
        with self._guard:
            self._open.add(connection)

    def end(self, connection: Connection, *, counts: bool = True) -> None:
        """It has ended, and what it moved is kept; not of one that never counted."""
        with self._guard:
            if connection in self._open:
                self._open.discard(connection)
                if counts:
                    for phase in PHASES:
                        self._totals[connection.peer_role, phase].add(connection.meter.total(phase))
                    self.ended.append(snapshot(connection.peer_role, connection))

    def cells(self) -> dict[tuple[str, str], Cell]:
        """What moved so far, by role of the peer and phase."""
        result = {place: Cell() for place in self._totals}
        with self._guard:
            parts = list(self._totals.items())
            parts += [((c.peer_role, phase), c.meter.total(phase)) for c in self._open for phase in PHASES]
        for place, cell in parts:
            result[place].add(cell)
        return result

    def refused(self, reason: str) -> None:
        """One more peer, or request, was refused for this reason."""
        with self._guard:
            self.refusals[reason] += 1

    def count(self, **numbers: int) -> None:
        """Adds to `counts`."""
        with self._guard:
            self.counts.update(numbers)
