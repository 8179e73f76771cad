"""How a protocol runs: generators of rounds, and the three ways to walk one and the same program.

A protocol is a generator. It yields a list of `Item`s, the messages of one round, and is resumed with what the peer
sent. `parallel` merges the rounds of independent protocols; `Party.run` drives a generator through an engine:

- `Trace` runs it on shapes alone (meta tensors) and records the correlations asked for and the cost, exactly;
- `Offline` runs it at the client before the query: what is known then (shares of linear outputs, and what is sent of
  them) is computed and sent, the rest stays shapes; the server only keeps what arrives;
- `Online` runs it.

All control flow depends on shapes alone, so that the three walks ask for the same correlations in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from protocols.correlations import Correlation, Kind, KindHash, Part, Role, Store, pack_parts, size_of, unpack_parts
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

    @property
    def part(self) -> Part:
        """Its public shape."""
        return Part(tuple(self.value.shape), self.bits)

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


@dataclass(slots=True)
class Cost:
    """What a stretch of a program costs; bytes are payload, both directions."""

    online_bytes: int = 0
    rounds: int = 0
    dealer_bytes: int = 0
    peer_offline_bytes: int = 0
    macs: int = 0

    def __iadd__(self, other: Cost) -> Cost:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class Engine(Protocol):
    """See the module's text."""

    def take(self, kind: Kind) -> Correlation:
        """The next correlation."""

    def perform(self, items: Sequence[Item]) -> Received:
        """One round."""


def _blanks(items: Sequence[Item]) -> Received:
    return [blank(*item.value.shape) for item in items]


class Trace:
    """Shapes only. `kinds` and, unless they are left out, `costs` (by label) are the result; `early` what the server will receive ahead."""

    def __init__(self, role: Role, first_name: int = 1, *, costs: bool = True) -> None:
        self.role, self._counts = role, costs
        self.kinds: list[Kind] = []
        self.costs: dict[tuple[str, str], Cost] = {}
        self.early: list[list[Part]] = []
        self.label = ("", "")
        self._first = first_name
        self._depth = (0, 0)  # of the chains of messages that end at S and at C

    @property
    def cost(self) -> Cost:
        """Of the current label."""
        found = self.costs.get(self.label)
        if found is None:
            found = self.costs[self.label] = Cost()
        return found

    def take(self, kind: Kind) -> Correlation:
        """Records it."""
        self.kinds.append(kind)
        if self._counts:
            self.cost.dealer_bytes += kind.dealer_bytes
        return Correlation(kind, self._first + len(self.kinds) - 1, self.role)

    def perform(self, items: Sequence[Item]) -> Received:
        """Records what is sent early; counts bytes, and rounds as the client sees them: the depth of the chain of dependent messages."""
        early = [item.part for item in items if item.early and item.from_client]
        if early:
            self.early.append(early)
        if self._counts:
            self._count(items, early)
        return _blanks(items)

    def _count(self, items: Sequence[Item], early: Sequence[Part]) -> None:
        size, from_server, from_client = 0, False, False
        for item in items:
            if item.from_server:
                size, from_server = size + item.part.size, True
            if item.from_client and not item.early:
                size, from_client = size + item.part.size, True
        cost, (server, client) = self.cost, self._depth
        self._depth = (max(server, client + 1) if from_client else server, max(client, server + 1) if from_server else client)
        cost.online_bytes += size
        cost.rounds += self._depth[1] - client
        cost.peer_offline_bytes += size_of(early)


class Offline:
    """The client's walk before the query. `fetch(size)` gives the dealer's next bytes, in the order of the kinds."""

    def __init__(self, weights: Mapping[str, Tensor], channel: Channel, store: Store, fetch: Callable[[int], memoryview]) -> None:
        self.weights, self.channel, self.store, self.fetch = weights, channel, store, fetch
        self.hash = KindHash()
        self._name = store.next_name

    def take(self, kind: Kind) -> Correlation:
        """Keeps the payload for the online walk; computes what the kind can compute ahead."""
        name, self._name = self._name, self._name + 1
        self.hash.update(kind)
        self.store.expect(name, kind)
        if parts := kind.shared_parts():
            self.store.put(name, self.fetch(size_of(parts)))
        prepare = getattr(kind, "prepare", None)
        if prepare is not None:
            correlation = self.store.peek(kind, name)
            correlation.shares = prepare(self.weights, correlation.own, correlation.shares)
            self.store.prepare(name, correlation.shares)
            return correlation
        # what was dealt is read in the online walk; what the client draws itself may be needed for early messages
        return self.store.drawn(kind, name) if kind.drawn_early else Correlation(kind, name, Role.CLIENT)

    def perform(self, items: Sequence[Item]) -> Received:
        """Sends the early parts."""
        early = [item for item in items if item.early and item.from_client]
        if early:
            self.channel.exchange(pack_parts([i.value for i in early], [i.part for i in early]), None)
        return _blanks(items)


class Online:
    """The real thing. `early` holds what the server received ahead, a buffer for each round that has an early part."""

    def __init__(self, role: Role, channel: Channel, store: Store, early: deque[memoryview] | None = None) -> None:
        self.role, self.channel, self.store = role, channel, store
        self.early: deque[memoryview] = early if early is not None else deque()

    def take(self, kind: Kind) -> Correlation:
        """Spends the next correlation."""
        return self.store.take(kind)

    def perform(self, items: Sequence[Item]) -> Received:
        """Sends and receives."""
        client = self.role is Role.CLIENT
        sent = [i for i in items if i.sent_by(self.role) and not (client and i.early)]
        peer = Role.SERVER if client else Role.CLIENT
        arriving = [(k, i) for k, i in enumerate(items) if i.sent_by(peer)]
        late = [(k, i) for k, i in arriving if client or not i.early]
        body = pack_parts([i.value for i in sent], [i.part for i in sent]) if sent else None
        data = self.channel.exchange(body, size_of(i.part for _, i in late) if late else None)
        received: list[Tensor | None] = [None] * len(items)
        device = self.store.device
        if late and data is not None:
            for (k, _), tensor in zip(late, unpack_parts(data, [i.part for _, i in late], device), strict=True):
                received[k] = tensor
        ahead = [(k, i) for k, i in arriving if not client and i.early]
        if ahead:
            for (k, _), tensor in zip(ahead, unpack_parts(self.early.popleft(), [i.part for _, i in ahead], device), strict=True):
                received[k] = tensor
        return [blank(*item.value.shape) if tensor is None else tensor for tensor, item in zip(received, items, strict=True)]


class Party:
    """One party of one session while it walks a program: its role, its weights (S: encoded, C: masked) and an engine."""

    def __init__(self, role: Role, engine: Engine | None = None, weights: Mapping[str, Tensor] | None = None) -> None:
        self.role = role
        self.weights: Mapping[str, Tensor] = weights if weights is not None else {}
        self.engine = engine
        self.on_label: Callable[[tuple[str, str]], None] | None = None

    def __repr__(self) -> str:
        return f"Party(role={self.role.value}, engine={type(self.engine).__name__})"

    @property
    def is_server(self) -> bool:
        """Whether this is S."""
        return self.role is Role.SERVER

    def take(self, kind: Kind) -> Correlation:
        """The next correlation, which must be of this kind."""
        assert self.engine is not None
        return self.engine.take(kind)

    def run(self, protocol: Protocol_[T]) -> T:
        """Drives a protocol to its end."""
        assert self.engine is not None
        try:
            items = next(protocol)
            while True:
                items = protocol.send(self.engine.perform(items))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    @contextmanager
    def label(self, layer: str, op: str) -> Iterator[None]:
        """Attributes what happens within to a layer and an operator."""
        if isinstance(self.engine, Trace):
            self.engine.label = (layer, op)
        if self.on_label is not None:
            self.on_label((layer, op))
        yield

    def macs(self, count: int) -> None:
        """Notes multiply-adds of one party's critical work, for the prediction."""
        if isinstance(self.engine, Trace):
            self.engine.cost.macs += count
