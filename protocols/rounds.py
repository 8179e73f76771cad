"""Rounds: what a protocol yields, how independent ones share them, one that goes on beside others; `protocols.party` drives them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from protocols.correlations import Part, Role, pack_parts, size_of, unpack_parts
from protocols.ring import blank

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


class Stepwise:
    """A protocol that two parties run beside another on the same channel: at each `step` a round of it.

    A step takes in what the peer has sent of the round before, computes, and sends: it waits for nothing that the peer sends later
    than in its own step before. Both parties make their steps at the same places among their other messages.
    """

    def __init__(self, protocol: Protocol_[Any], role: Role, channel: Channel, device: Any) -> None:
        self._protocol, self._role, self._channel, self._device = protocol, role, channel, device
        self._due: list[tuple[Part, bool]] | None = None  # of the round under way, and what of it the peer sends
        self._held: Received | None = None  # of that round, once it has been taken in
        self.done = False

    def __repr__(self) -> str:
        return f"Stepwise(role={self._role.value}, done={self.done}, values hidden)"

    def step(self) -> None:
        """One round further, if any is left."""
        if self.done:
            return
        try:
            items = next(self._protocol) if self._due is None else self._protocol.send(self._received(self._due))
        except StopIteration:
            self.done = True
            return
        self._held = None
        peer = Role.CLIENT if self._role is Role.SERVER else Role.SERVER
        self._due = [(item.part, item.sent_by(peer)) for item in items]
        sent = [item for item in items if item.sent_by(self._role)]
        if sent:
            self._channel.exchange(pack_parts([item.value for item in sent], [item.part for item in sent]), None)

    def settle(self) -> None:
        """Takes in what the peer has sent of the round under way, so that something else may be sent and received next."""
        if not self.done and self._due is not None:
            self._held = self._received(self._due)

    def finish(self) -> None:
        """All that is left of it."""
        while not self.done:
            self.step()

    def _received(self, due: Sequence[tuple[Part, bool]]) -> Received:
        if self._held is not None:
            return self._held
        parts = [part for part, comes in due if comes]
        data = self._channel.exchange(None, size_of(parts)) if parts else None
        tensors = iter(() if data is None else unpack_parts(data, parts, self._device))
        return [next(tensors) if comes else blank(*part.shape) for part, comes in due]
