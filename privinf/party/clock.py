"""How long each operator took at this party: a probe for measurements, which only local sessions of a benchmark set.

Seconds are between the moment at which an operator begins and the one at which the next begins, so they hold its waiting for
the peer; `cpu` is what this thread computed meanwhile. Nothing extra crosses the sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from protocols.party import Party

Label = tuple[str, str]


class Clock:
    """Seconds by pass, layer and operator, of one session at a time. `begin` is what `probe` of a server or client takes."""

    def __init__(self) -> None:
        self.passes: list[dict[Label, list[float]]] = []
        self._label: Label | None = None
        self._wall = self._cpu = 0.0

    def begin(self, party: Party) -> None:
        """A new pass begins; it ends where the label is empty again."""
        self.passes.append({})
        self._label = None
        told: Callable[[Label], None] | None = party.on_label

        def on_label(label: Label) -> None:
            self._to(label)
            if told is not None:
                told(label)

        party.on_label = on_label

    def _to(self, label: Label) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        if self._label is not None:
            cell = self.passes[-1].setdefault(self._label, [0.0, 0.0])
            cell[0] += wall - self._wall
            cell[1] += cpu - self._cpu
        self._label, self._wall, self._cpu = label if any(label) else None, wall, cpu

    def report(self) -> list[list[dict[str, Any]]]:
        """[[{`layer`, `op`, `seconds`, `cpu`}]], a list for each pass."""
        return [
            [{"layer": layer, "op": op, "seconds": wall, "cpu": cpu} for (layer, op), (wall, cpu) in cells.items()] for cells in self.passes
        ]
