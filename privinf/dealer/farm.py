"""A dealer whose dealing is done by workers on a Ray cluster: this process has the links, the seeds and the marks, and hands out work.

Each query is dealt by one worker, whichever has the fewest, from the seeds of its session: what comes is, bit for bit, what one process
would deal. Where a worker is lost, another begins with the same seeds, goes through the passes that stand, and goes on at the byte up to
which the client was sent the present one. So nothing is dealt twice that differs, and nobody sees that a worker was lost.

The cluster's machines are the dealer: each knows both parties' seeds of the queries that it deals for, and of the weights' masks.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from privinf.dealer.dealer import DealerService
from privinf.dealer.making import Dealing, Maker
from privinf.session.cluster import MOST_LOST, Lost, Remote, Work, connect, same_version
from privinf.session.devices import walking
from privinf.session.options import Options
from privinf.session.turns import Turns
from privinf.transport.handing import Handed
from protocols import kernels
from protocols import kinds as _kinds  # noqa: F401  (makes every kind known)
from protocols.correlations import Kind, from_wire, on_wire
from protocols.errors import ConfigError, TransportError
from protocols.linear import Weight
from protocols.sources.fitting import Asked, further

PIECE = 2**20
"""Bytes of what a worker sends at a time, at least."""
AT_A_TIME = 64
"""Sessions that one worker serves at a time; it computes for one."""
HISTORY = 64 * 2**20
"""Bytes, packed, of the passes of one query that another worker could begin anew from."""


@dataclass(frozen=True, repr=False)
class Query:
    """Whose query is dealt, and from what."""

    client: str
    server_seed: bytes
    client_seed: bytes
    mask_seed: bytes
    weights: tuple[Weight, ...]


@dataclass
class _Held:
    """A query at a worker: its dealer, and the pass that was asked for."""

    client: str
    dealer: Dealing
    dealt: Iterator[bytes]


class Machine(Work):
    """A worker: queries by number, each pass `read` and then dealt as `pieces`."""

    def __init__(self, options: Options) -> None:
        self._maker, self._turns = Maker(options.device, options.memory), Turns(1)
        self._device = options.device
        self._queries: dict[int, _Held] = {}
        kernels.start(options.cache / "kernels")

    def begin(self, number: int, query: Query) -> None:
        """A query from its first pass on."""
        dealer = self._maker.dealer(query.server_seed, query.client_seed, query.mask_seed, query.weights)
        self._queries[number] = _Held(query.client, dealer, iter(()))

    def read(self, number: int, kinds: Sequence[bytes], digest: bytes) -> None:
        """What a pass takes, checked and bounded: CorrelationError."""
        held = self._queries[number]
        held.dealt = held.dealer.deal_pass([from_wire(data) for data in kinds], digest)

    def pieces(self, number: int) -> Iterator[bytes]:
        """The payload of the pass that was read last."""
        held, ended, waiting = self._queries[number], object(), bytearray()
        while True:
            with self._turns.turn(held.client), walking(self._device):
                piece = next(held.dealt, ended)
            if not isinstance(piece, bytes):
                break
            waiting += piece
            if len(waiting) >= PIECE:
                yield bytes(waiting)
                waiting.clear()
        if waiting:
            yield bytes(waiting)

    def again(self, number: int, kinds: Sequence[bytes], digest: bytes) -> None:
        """A pass that was dealt by another worker, for what later ones refer to."""
        self.read(number, kinds, digest)
        for _ in self.pieces(number):
            pass

    def rewind(self, number: int, name: int) -> None:
        """Takes back a pass that has ended."""
        self._queries[number].dealer.rewind(name)

    def end(self, number: int) -> None:
        """The query is over."""
        if (held := self._queries.pop(number, None)) is not None:
            held.dealer.end()

    def close(self) -> None:
        """Ends all."""
        for number in list(self._queries):
            self.end(number)


@dataclass(eq=False)
class _Place:
    """A worker, and how many queries it has."""

    worker: Remote
    version: Any
    ready: bool = False
    queries: int = 0


@dataclass
class Farm:
    """The workers: lost ones are replaced, and meanwhile the others have their queries."""

    ray: Any
    make: Callable[[], Remote]
    count: int
    patience: float
    _places: list[_Place] = field(default_factory=list)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _lost: int = 0

    def begin(self) -> None:
        """Starts the workers, and waits for the first."""
        for _ in range(self.count):
            self._start()
        self.leave(self.take())

    def _start(self) -> None:
        worker = self.make()
        self._places.append(_Place(worker, worker.begin("version")))

    def take(self) -> _Place:
        """The worker with the fewest queries, which has one more now; TransportError where none comes for as long as patience lasts."""
        while True:
            with self._guard:
                waiting = [place for place in self._places if not place.ready]
                for place in waiting:
                    if self.ray.wait([place.version], num_returns=1, timeout=0)[0]:
                        self._look(place)
                found = min((place for place in self._places if place.ready), key=lambda place: place.queries, default=None)
                if found is not None:
                    found.queries += 1
                    return found
            if not self.ray.wait([place.version for place in waiting], num_returns=1, timeout=self.patience)[0]:
                raise TransportError(
                    "no machine of the cluster deals", party="dealer", remedy="look at `ray status`, or give more --timeout"
                )

    def _look(self, place: _Place) -> None:
        try:
            same_version(place.worker.take(place.version))
            place.ready = True
        except Lost:
            self._replace(place)

    def _replace(self, place: _Place) -> None:
        if place in self._places:
            self._places.remove(place)
            self._lost += 1
            if self._lost > MOST_LOST:
                raise TransportError(f"{MOST_LOST} workers of the cluster were lost", party="dealer", remedy="look at its nodes")
            self._start()

    def lost(self, place: _Place) -> None:
        """It is no more."""
        with self._guard:
            self._replace(place)

    def leave(self, place: _Place) -> None:
        """It has one query less."""
        with self._guard:
            place.queries -= 1

    def end(self) -> None:
        """Of all of them, by force."""
        for place in self._places:
            place.worker.end()


class FarmDealer:
    """`Dealing` for one query, by a worker of the farm, or by one after the other."""

    def __init__(self, farm: Farm, number: int, query: Query) -> None:
        self.next_name = 1
        self._farm, self._number, self._query = farm, number, query
        self._passes: list[tuple[int, bytes]] = []  # those that stand: the first name, and what was asked for, packed
        self._kept = 0
        self._place: _Place | None = None
        self._last: Asked | None = None

    def __repr__(self) -> str:
        return f"FarmDealer(next_name={self.next_name}, seeds hidden)"

    def _ask(self, method: str, *given: Any) -> None:
        """Of the worker that has the query, or of another one, once that is as far."""
        while True:
            try:
                place = self._place or self._begun()
                place.worker.ask(method, self._number, *given)
                return
            except Lost:
                self._move()

    def _begun(self) -> _Place:
        place = self._place = self._farm.take()
        place.worker.ask("begin", self._number, self._query)
        if self._kept > HISTORY:
            raise TransportError(
                "the machine that dealt for this session was lost", party="dealer", remedy="begin the reply anew (--retry)"
            )
        for _, packed in self._passes:
            place.worker.ask("again", self._number, *_unpacked(packed))
        return place

    def _move(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            self._farm.lost(place)

    def deal_pass(self, kinds: Sequence[Kind], digest: bytes = b"") -> Iterator[bytes]:
        """See `Dealing`."""
        wire = [bytes(data) for data in on_wire(kinds)]
        self._ask("read", wire, digest)
        self._last = Asked(kinds, self.next_name, digest)
        return self._dealt(wire, digest)

    def deal_further(self) -> tuple[int, Iterator[bytes]]:
        """See `Dealing`; a worker is told what that takes."""
        last, self._last = self._last, None
        kinds = further(last, self.next_name)
        assert last is not None, "or nothing tells"
        return len(kinds), self.deal_pass(kinds, last.digest)

    def _dealt(self, wire: list[bytes], digest: bytes) -> Iterator[bytes]:
        sent = 0
        while True:
            there = sent  # bytes that the client has of it
            try:
                assert self._place is not None, "the pass was read"
                for piece in self._place.worker.stream("pieces", self._number):
                    if there >= len(piece):
                        there -= len(piece)
                        continue
                    rest, there = piece[there:], 0
                    sent += len(rest)
                    yield rest
                break
            except Lost:
                self._move()
                self._ask("read", wire, digest)
        packed = _packed(wire, digest)
        if self._kept <= HISTORY:
            self._kept += len(packed)
            self._passes.append((self.next_name, packed))
        self.next_name += len(wire)

    def rewind(self, name: int) -> None:
        """See `Dealing`."""
        if name != self.next_name:
            self._passes = [(first, packed) for first, packed in self._passes if first < name]
            self.next_name, self._last = name, None
            self._ask("rewind", name)

    def end(self) -> None:
        """See `Dealing`."""
        place, self._place = self._place, None
        if place is not None:
            place.worker.begin("end", self._number)
            self._farm.leave(place)


def _packed(wire: Sequence[bytes], digest: bytes) -> bytes:
    """Kinds repeat each other, and passes of further tokens too."""
    sizes = b"".join(len(data).to_bytes(4, "big") for data in (digest, *wire))
    return zlib.compress(len(wire).to_bytes(4, "big") + sizes + digest + b"".join(wire), 1)


def _unpacked(packed: bytes) -> tuple[list[bytes], bytes]:
    data = memoryview(zlib.decompress(packed))
    count, at, found = 1 + int.from_bytes(data[:4], "big"), 4, []
    start = at + 4 * count
    for place in range(count):
        size = int.from_bytes(data[at + 4 * place : at + 4 * place + 4], "big")
        found.append(bytes(data[start : start + size]))
        start += size
    digest, *wire = found
    return wire, digest


class FarmedDealer(DealerService):
    """`FarmedDealer(listen="0.0.0.0:7001", keys="keys/", workers=8).start()`; ConfigError where there is no cluster."""

    def __init__(
        self, *, listen: str | Handed, keys: str, options: Options | None = None, workers: int = 1, ray_address: str = "auto"
    ) -> None:
        super().__init__(listen=listen, keys=keys, options=options)
        self._farm: Farm | None = None
        self._numbers = itertools.count(1)
        try:
            if self.options.device != "cpu":
                raise ConfigError("a cluster's workers deal in main memory alone", remedy="leave --engine or --device out")
            ray = connect(ray_address, self.options.connect_s)
            make = partial(Remote, ray, Machine, (self.options,), at_a_time=AT_A_TIME)
            self._farm = Farm(ray, make, workers, self.options.timeout)
            self._farm.begin()
        except BaseException:
            self.close()
            raise
        self.turns = Turns(1 << 16)  # what is waited for is computed elsewhere

    def dealing(self, client: str, server_seed: bytes, client_seed: bytes, mask_seed: bytes, weights: tuple[Weight, ...]) -> Dealing:
        """See `DealerService`: on the cluster."""
        assert self._farm is not None, "it was begun"
        return FarmDealer(self._farm, next(self._numbers), Query(client, server_seed, client_seed, mask_seed, weights))

    def close(self, drain: float = 0.0) -> None:
        """See `Service`; the workers end."""
        super().close(drain)
        if self._farm is not None:
            self._farm.end()
