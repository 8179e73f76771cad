"""How a protocol runs: generators of rounds, and the three ways to walk one and the same program.

A protocol is a generator. It yields a list of `Item`s, the messages of one round, and is resumed with what the peer
sent. `parallel` merges the rounds of independent protocols; `Party.run` drives a generator through an engine:

- `Trace` runs it on shapes alone (meta tensors) and records the correlations asked for and the cost, exactly;
- `Offline` runs it before the query: at the client what is known then (shares of linear outputs, and what is sent of
  them) is computed and sent, the rest stays shapes; the server keeps what arrives;
- `Online` runs it.

All control flow depends on shapes alone, so that the three walks ask for the same correlations in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from protocols.correlations import Correlation, Kind, OfRole, Part, Role, pack_parts, size_of, unpack_parts
from protocols.ring import blank
from protocols.rounds import Channel, Item, Protocol_, Received, parallel
from protocols.sources.base import PartySource

T = TypeVar("T")

__all__ = ["Channel", "Cost", "Engine", "Item", "Offline", "Online", "Party", "Protocol_", "Received", "Tables", "Trace", "parallel"]


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
        self.first = first_name
        self._depth = (0, 0)  # of the chains of messages that end at S and at C

    def of_others(self, kinds: list[Kind], first_name: int) -> Trace:
        """Of a walk that differs in what its kinds name alone."""
        found = Trace(self.role, first_name, costs=self._counts)
        found.kinds, found.costs, found.early = kinds, self.costs, self.early
        return found

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
            self.cost.dealer_bytes += kind.shared_bytes
        return Correlation(kind, self.first + len(self.kinds) - 1, self.role)

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
    """A party's walk before the query, after its source's `begin_pass`. At S, `early` is what arrived in it."""

    def __init__(self, weights: Mapping[str, Tensor], channel: Channel, source: PartySource) -> None:
        self.weights, self.channel, self.source = weights, channel, source
        self.early: deque[memoryview] = deque()

    def take(self, kind: Kind) -> Correlation:
        """What of the next correlation may be used before the query."""
        return self.source.ahead(kind, self.weights)

    def perform(self, items: Sequence[Item]) -> Received:
        """C sends the early parts, S receives them."""
        early = [item for item in items if item.early and item.from_client]
        if early:
            parts = [item.part for item in early]
            if self.source.role is Role.CLIENT:
                self.channel.exchange(pack_parts([item.value for item in early], parts), None)
            elif (data := self.channel.exchange(None, size_of(parts))) is not None:
                self.early.append(data)
        return _blanks(items)


class Online:
    """The real thing. `early` holds what the server received ahead, a buffer for each round that has an early part.

    `meanwhile` is called in each round between what is sent and what is received, while the peer's part is on its way.
    """

    def __init__(
        self,
        role: Role,
        channel: Channel,
        source: PartySource,
        early: deque[memoryview] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        self.role, self.channel, self.source, self.meanwhile = role, channel, source, meanwhile
        self.early: deque[memoryview] = early if early is not None else deque()

    def take(self, kind: Kind) -> Correlation:
        """Spends the next correlation."""
        return self.source.take(kind)

    def perform(self, items: Sequence[Item]) -> Received:
        """Sends and receives."""
        client = self.role is Role.CLIENT
        sent: list[Item] = []
        late: list[int] = []  # of what arrives, that which was not sent ahead of the query
        ahead: list[int] = []
        for place, item in enumerate(items):
            if item.sent_by(self.role) and not (client and item.early):
                sent.append(item)
            if item.from_server if client else item.from_client:
                (late if client or not item.early else ahead).append(place)
        body = pack_parts([item.value for item in sent], [item.part for item in sent]) if sent else None
        parts = [items[place].part for place in late]
        expect = size_of(parts) if late else None
        if self.meanwhile is not None:
            if body is not None:
                self.channel.exchange(body, None)
            self.meanwhile()
            body = None
        data = self.channel.exchange(body, expect)
        received: list[Tensor | None] = [None] * len(items)
        if late and data is not None:
            for place, tensor in zip(late, unpack_parts(data, parts, self.source.device), strict=True):
                received[place] = tensor
        if ahead:
            parts = [items[place].part for place in ahead]
            for place, tensor in zip(ahead, unpack_parts(self.early.popleft(), parts, self.source.device), strict=True):
                received[place] = tensor
        return [blank(*item.value.shape) if tensor is None else tensor for tensor, item in zip(received, items, strict=True)]


class Tables(Protocol):
    """S's tables as C holds them encrypted, where there is no dealer, or where one is not asked for them: see `protocols.linear.lookup`."""

    def lookup(self, table: str, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """Shares of rows (count, out) of a table of `size`, modulo 2^bits: ids (count,) at C, a blank at S and ahead of the query."""


class Recording(Protocol):
    """While a walk is written down (`protocols.sources.tape`): what is another's when it is done again, a position further each time."""

    def varying(self, make: Callable[[int], Tensor], key: Hashable = None) -> Tensor:
        """`make(0)`, and then `make(n)`, n positions further; of one key, unless it is None, the same each time in a walk."""

    def windowed(self, weight: Tensor, window: tuple[int, ...]) -> Tensor:
        """A weight of which what lies in a window of its second axis is read, and then what lies n positions further."""

    def extended(self, key: tuple[str, str], before: Any, wire: Any, columns: int) -> Any:
        """See `protocols.product.Cached.extended`."""

    def put(self, key: tuple[str, str], before: Any, wire: Any, places: Sequence[int], into: Any) -> Any:
        """See `protocols.sequences.put`; `into`: the stack without values."""


class Party(OfRole):
    """One party of one session while it walks a program: its role, its weights (S: encoded, C: masked) and an engine.

    `tables`, where rows of S's tables are taken from ciphertexts; else a row is a product with a one-hot.
    """

    def __init__(self, role: Role, engine: Engine | None = None, weights: Mapping[str, Tensor] | None = None) -> None:
        self.role = role
        self.weights: Mapping[str, Tensor] = weights if weights is not None else {}
        self.engine = engine
        self.tables: Tables | None = None
        self.recording: Recording | None = None
        self.on_label: Callable[[tuple[str, str]], None] | None = None

    def __repr__(self) -> str:
        return f"Party(role={self.role.value}, engine={type(self.engine).__name__})"

    def take(self, kind: Kind) -> Correlation:
        """The next correlation, which must be of this kind."""
        assert self.engine is not None
        return self.engine.take(kind)

    def varying(self, make: Callable[[int], Tensor], key: Hashable = None) -> Tensor:
        """A public value, or one of this party's own, that hangs on how many positions there are: `make(0)`, see `Recording`.

        What has a key is only read, and the same wherever this walk asks for it.
        """
        return make(0) if self.recording is None else self.recording.varying(make, key)

    def run(self, protocol: Protocol_[T]) -> T:
        """Drives a protocol to its end."""
        assert self.engine is not None
        try:
            items = next(protocol)
            while True:
                received, items = self.engine.perform(items), []  # what was sent is not held while the next round is computed
                items = protocol.send(received)
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
