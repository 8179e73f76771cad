"""Whose is what of a pass's making: bytes and transfers by kind of correlation, which add up to all that is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from protocols.ot.pool import Extending
from protocols.rounds import Item, Protocol_, Received
from protocols.sources.two_party.schedule import _Fork, _Request

TRANSFERS = "transfers"
"""The row of what makes the transfers themselves, whoever uses them."""


@dataclass
class Row:
    """Of one kind: correlations, payload bytes of both directions, transfers that they used up."""

    count: int = 0
    bytes: int = 0
    transfers: int = 0


class Ledger:
    """Notes, while a pass is made on shapes, which kinds its messages are of; `spent`: the transfers that were used so far.

    What several kinds ask for in one step and of one sort travels together: it is split by the elements that each asked for, which are
    alike in all that a batch costs, and what does not divide evenly falls to the first.
    """

    def __init__(self, spent: Callable[[], int]) -> None:
        self._spent = spent
        self.rows: dict[str, Row] = {}

    def _row(self, kind: str) -> Row:
        return self.rows.setdefault(kind, Row())

    def task(self, kind: str, protocol: Protocol_[Any]) -> Protocol_[Any]:
        """The making of one correlation of this kind."""
        self._row(kind).count += 1
        return self._watched(protocol, {kind: 1})

    def batch(self, protocol: Protocol_[Any], asked: Sequence[tuple[str, int]]) -> Protocol_[Any]:
        """What several ask for at once: their kinds, and the elements that each wants."""
        shares: dict[str, int] = {}
        for kind, count in asked:
            shares[kind] = shares.get(kind, 0) + count
        return self._watched(protocol, shares)

    def _watched(self, protocol: Protocol_[Any], shares: Mapping[str, int]) -> Protocol_[Any]:
        received: Received | None = None
        while True:
            before = self._spent()
            try:
                items = next(protocol) if received is None else protocol.send(received)
            except StopIteration as stop:
                self._note(shares, (), self._spent() - before)
                return stop.value
            self._note(shares, items, self._spent() - before)
            received = yield self._owned(items, next(iter(shares)))

    def _owned(self, items: list[Item], kind: str) -> list[Item]:
        """The same, of which requests and protocols beside each other say whose they are."""
        if not any(isinstance(item, _Request | _Fork) for item in items):
            return items
        found = []
        for item in items:
            if isinstance(item, _Request):
                item = replace(item, owner=kind)
            elif isinstance(item, _Fork):
                item = replace(item, protocols=tuple(self._watched(each, {kind: 1}) for each in item.protocols))
            found.append(item)
        return found

    def _note(self, shares: Mapping[str, int], items: Sequence[Item], transfers: int) -> None:
        size = 0
        for item in items:
            if isinstance(item, _Request | _Fork):
                continue
            moved = item.part.size * (item.from_server + item.from_client)
            if isinstance(item, Extending):
                self._row(TRANSFERS).bytes += moved
            else:
                size += moved
        for kind, (part, used) in zip(shares, zip(_split(size, shares), _split(transfers, shares), strict=True), strict=True):
            self._row(kind).bytes += part
            self._row(kind).transfers += used

    def record(self) -> list[dict[str, Any]]:
        """Each row, the dearest first: {`kind`, `count`, `offline_bytes`, `transfers`}."""
        rows = sorted(self.rows.items(), key=lambda row: -row[1].bytes)
        return [{"kind": kind, "count": row.count, "offline_bytes": row.bytes, "transfers": row.transfers} for kind, row in rows]


def _split(total: int, shares: Mapping[str, int]) -> list[int]:
    """In proportion, whole numbers that add up to the total."""
    whole = sum(shares.values()) or 1
    parts = [total * share // whole for share in shares.values()]
    parts[0] += total - sum(parts)
    return parts
