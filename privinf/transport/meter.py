"""The meter: every byte of a connection, by phase and by label, and the number of rounds.

*Wire bytes* are counted at the socket, TLS and its handshake included, and go to the phase and label that are set when they move.
*Payload* is the bodies of DATA frames; it goes to the phase of the frame, so that both ends agree whenever they read it, and to the
reader's label.

*Rounds* are the depth of the chain of dependent messages. Each end keeps a depth per phase; a message carries its sender's depth plus
one, and its receiver's depth becomes the larger of its own and the message's. So a simultaneous exchange counts 1, a question and its
answer 2, and a message that nothing waits for 0 at its sender. Both steps happen in program order, never on arrival, so the count
does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from privinf.transport.frames import PHASES as PHASES
from protocols.errors import ConfigError

Label = tuple[str, str]


@dataclass(slots=True)
class Cell:
    """Counters of one phase and label: bytes, frames of DATA both ways, rounds, and seconds spent waiting for the socket."""

    sent: int = 0
    received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    rounds: int = 0
    frames: int = 0
    seconds: float = 0.0

    def add(self, other: Cell) -> None:
        """Adds another cell's counts."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, frames, rounds."""
        return {
            "sent": self.sent,
            "received": self.received,
            "payload": self.payload_sent + self.payload_received,
            "payload_sent": self.payload_sent,
            "payload_received": self.payload_received,
            "rounds": self.rounds,
            "frames": self.frames,
            "seconds": self.seconds,
        }


class Meter:
    """Counts for one connection. The caller sets `phase` and `label`; the connection counts."""

    def __init__(self) -> None:
        self._phase = "setup"
        self._label: Label = ("", "")
        self._cells: dict[tuple[str, str, str], Cell] = {}
        self._depth = dict.fromkeys(PHASES, 0)
        self.current = self._cell("setup")

    @property
    def phase(self) -> str:
        """`setup`, `offline` or `online`; `setup` at the start."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase not in PHASES:
            raise ConfigError(f"there is no phase {phase!r}", remedy=f"use one of {', '.join(PHASES)}")
        self._phase = phase
        self.current = self._cell(phase)

    @property
    def label(self) -> Label:
        """(layer, operator) that what moves from now on belongs to; empty strings at the start."""
        return self._label

    @label.setter
    def label(self, label: Label) -> None:
        self._label = label
        self.current = self._cell(self._phase)

    def _cell(self, phase: str) -> Cell:
        return self._cells.setdefault((phase, *self._label), Cell())

    @property
    def phase_index(self) -> int:
        """The phase's place in PHASES."""
        return PHASES.index(self._phase)

    def depth(self, phase: str | None = None) -> int:
        """Rounds so far, of the current phase if none is named."""
        return self._depth[phase or self._phase]

    def data_sent(self, size: int, frames: int) -> None:
        """Counts payload that goes out, bytes, in so many frames."""
        cell = self.current
        cell.payload_sent += size
        cell.frames += frames

    def data_received(self, phase: str, depth: int, size: int, frames: int) -> None:
        """Counts payload that came in, bytes, and the rounds that it is deeper than what was seen."""
        cell = self.current if phase == self._phase else self._cell(phase)
        cell.payload_received += size
        cell.frames += frames
        gain = depth - self._depth[phase]
        if gain > 0:
            self._depth[phase] = depth
            cell.rounds += gain

    def labels(self) -> Iterator[tuple[str, str, str, Cell]]:
        """(phase, layer, operator, counters), in the order of first use; cells without any count are left out."""
        for (phase, layer, op), cell in list(self._cells.items()):
            if cell != Cell():
                yield phase, layer, op, cell

    def total(self, phase: str | None = None) -> Cell:
        """The sum over labels, of one phase or of all."""
        total = Cell()
        for (cell_phase, _, _), cell in list(self._cells.items()):
            if phase is None or cell_phase == phase:
                total.add(cell)
        return total

    def snapshot(self) -> dict[str, Any]:
        """{`setup`, `offline`, `online`: counters of the phase; `labels`: [{`phase`, `layer`, `op`, counters}]}, plain values only."""
        result: dict[str, Any] = {phase: self.total(phase).as_dict() for phase in PHASES}
        result["labels"] = [{"phase": phase, "layer": layer, "op": op, **cell.as_dict()} for phase, layer, op, cell in self.labels()]
        return result
