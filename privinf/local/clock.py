"""How long each operator took at this party: a probe for measurements, which only local sessions of a benchmark set.

Seconds are between the moment at which an operator begins and the one at which the next begins. Of them, `wait` is what this
party slept until the socket had something, `wire` the rest of its time in the transport (TLS, frames, copies, the kernel), and
what is left it computed; `cpu` is what this thread ran all the while, `peak` this process's peak of resident memory so far.
Nothing extra crosses the sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from privinf.session.report import peak_rss_bytes
from protocols.party import Party

Label = tuple[str, str]
FIELDS = ("seconds", "cpu", "wait", "wire", "peak")


class _Timed:
    """A channel that keeps the time spent in it."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.inside = self.waited = 0.0

    def exchange(self, body: Any, expect: int | None) -> memoryview | None:
        cell, began = self.channel.meter.current, time.perf_counter()
        before = cell.seconds
        received: memoryview | None = self.channel.exchange(body, expect)
        self.inside += time.perf_counter() - began
        self.waited += cell.seconds - before
        return received


class Clock:
    """Seconds by pass, layer and operator, of one session at a time. `begin` is what `probe` of a server or client takes."""

    def __init__(self) -> None:
        self.passes: list[dict[Label, list[float]]] = []
        self._label: Label | None = None
        self._before: list[float] = []

    def begin(self, party: Party) -> None:
        """A new pass begins; it ends where the label is empty again."""
        self.passes.append({})
        self._label = None
        told: Callable[[Label], None] | None = party.on_label
        timed = _Timed(party.engine.channel)  # type: ignore[union-attr]
        party.engine.channel = timed  # type: ignore[union-attr]

        def on_label(label: Label) -> None:
            self._to(label, timed)
            if told is not None:
                told(label)
            if not any(label):
                party.on_label = told

        party.on_label = on_label

    def _to(self, label: Label, timed: _Timed) -> None:
        now = [time.perf_counter(), time.thread_time(), timed.waited, timed.inside - timed.waited]
        if self._label is not None:
            cell = self.passes[-1].setdefault(self._label, [0.0] * len(FIELDS))
            for place, (after, before) in enumerate(zip(now, self._before, strict=True)):
                cell[place] += after - before
            cell[-1] = peak_rss_bytes()
        self._label, self._before = label if any(label) else None, now

    def report(self) -> list[list[dict[str, Any]]]:
        """[[{`layer`, `op`, `seconds`, `cpu`, `wait`, `wire`, `peak`}]], a list for each pass."""
        return [
            [{"layer": layer, "op": op, **dict(zip(FIELDS, cell, strict=True))} for (layer, op), cell in p.items()] for p in self.passes
        ]
