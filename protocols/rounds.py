"""Rounds: what a protocol yields, and how independent protocols share them; `protocols.party` drives them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from protocols.correlations import Part, Role

T = TypeVar("T")


class Channel(Protocol):
    """One party's end of the link to the other; see `privinf.transport` and its in-memory twin."""

    def exchange(self, body: Any, expect: int | None) -> memoryview | None:
        """Sends a body (None: nothing) and receives one of exactly `expect` bytes (None: nothing), at the same time."""


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor of a round. `value` is what this party sends of it (its shape counts even where it sends nothing)."""

    value: Tensor = field(repr=False)
    bits: int
    from_server: bool = True
    from_client: bool = True
    early: bool = False  # the client's part leaves before the query
    modulus: int = 0  # see `Part`

    @property
    def part(self) -> Part:
        """Its public shape."""
        return Part(tuple(self.value.shape), self.bits, modulus=self.modulus)

    def sent_by(self, role: Role) -> bool:
        """Whether this party's part exists."""
        return self.from_server if role is Role.SERVER else self.from_client


Received = list[Tensor]
Protocol_ = Generator[list[Item], Received, T]


def parallel(*protocols: Protocol_[Any]) -> Protocol_[list[Any]]:
    """Runs independent protocols side by side: their k-th rounds travel as one message."""
    results: list[Any] = [None] * len(protocols)
    running: dict[int, list[Item]] = {}

    def advance(index: int, received: Received | None) -> None:
        try:
            running[index] = next(protocols[index]) if received is None else protocols[index].send(received)
        except StopIteration as stop:
            running.pop(index, None)
            results[index] = stop.value

    for index in range(len(protocols)):
        advance(index, None)
    while running:
        order = sorted(running)
        received = yield [item for index in order for item in running[index]]
        at = 0
        for index in order:
            count = len(running[index])
            advance(index, received[at : at + count])
            at += count
    return results
