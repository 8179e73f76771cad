"""Runs a program as server, client and a source of correlations (a dealer) in one process, over the in-memory twin of the transport.

A program is `program(party)`; it runs on shapes, then at the client before the query, then at both parties, and reads
its secrets with `input_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.threads import at_both
from privinf.transport.memory import memory_pair
from protocols.correlations import Kind, Part, Role
from protocols.kind_hash import KindHash
from protocols.linear import Weight, weight_mask
from protocols.party import Cost, Engine, Item, Offline, Online, Party, Protocol_, Received, Tables, Trace
from protocols.prg import new_seed
from protocols.ring import decode, encode, reduce, signed
from protocols.shares import Shares, Wire
from protocols.sources.base import PartySource
from protocols.sources.dealer import Dealer, Store

Program = Callable[[Party], Any]
Seen = list[tuple[Part, Tensor]]


@dataclass
class Outcome:
    """What both parties computed, what was predicted, what was counted, and what travelled."""

    server: Any
    client: Any
    predicted: Cost
    counted: dict[str, Any]  # the client's meter
    dealt: bytes
    kinds: list[Kind]
    received: dict[Role, Seen]  # from the other party, early messages included, in the order of the program

    def value(self) -> Tensor:
        """The real value of a result that both hold as shares."""
        return decode(self.server.value + self.client.value, self.server.bits, self.server.frac)

    def ring(self) -> Tensor:
        """The ring element."""
        return reduce(self.server.value + self.client.value, self.server.bits)

    def element(self) -> Tensor:
        """The signed ring element of shares or a wire."""
        return element(self.server, self.client)


def element(server: Shares | Wire, client: Shares | Wire) -> Tensor:
    """The signed ring element that the two hold."""
    if isinstance(server, Wire):
        assert isinstance(client, Wire) and torch.equal(server.masked, client.masked) and server.name == client.name
        return signed(server.masked - server.mask - client.mask, server.bits)
    assert isinstance(client, Shares) and (server.bits, server.frac) == (client.bits, client.frac)
    return signed(server.value + client.value, server.bits)


def uniform(*shape: int, bits: int = 64) -> Tensor:
    """Signed ring elements, for inputs."""
    return signed(torch.randint(-(2**63), 2**63 - 1, shape), bits)


class TestParty(Party):
    """A party whose inputs are split at random, afresh for each pass and alike in all walks of it."""

    __test__ = False  # no test class

    def __init__(self, role: Role, engine: Engine, weights: dict[str, Tensor], splits: int) -> None:
        super().__init__(role, engine, weights)
        self._splits = torch.Generator().manual_seed(splits)

    def split(self, shape: Sequence[int]) -> Tensor:
        """The server's share of the next input."""
        return torch.randint(-(2**63), 2**63 - 1, tuple(shape), generator=self._splits)


def input_of(party: Party, x: Tensor, bits: int, frac: int, *, early: bool = False) -> Shares:
    """A shared input: reals are encoded, integers are ring elements. It is known in the online walk, and at C before it if `early`."""
    assert isinstance(party, TestParty)
    mask = party.split(x.shape)
    element = encode(x, frac) if x.is_floating_point() else x
    value = element - mask if party.is_server else mask
    known = isinstance(party.engine, Online) or (early and not party.is_server and isinstance(party.engine, Offline))
    return Shares(value if known else value.to("meta"), bits, frac, early)


def offline_walk(party: Party) -> bool:
    """Whether secrets are not known yet."""
    return not isinstance(party.engine, Online)


class _Recorder(Online):
    """Keeps what arrives."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: Seen = []

    def perform(self, items: Sequence[Item]) -> Received:
        received = super().perform(items)
        peer = Role.CLIENT if self.role is Role.SERVER else Role.SERVER
        self.seen += [(item.part, tensor) for item, tensor in zip(items, received, strict=True) if item.sent_by(peer)]
        return received


Weights = dict[str, tuple[Weight, Tensor]]


class Source(Protocol):
    """Both ends of a source of correlations, for parties in one process."""

    ends: dict[Role, PartySource]
    tables: dict[Role, Tables]  # where C holds tables encrypted; or none
    client_weights: dict[str, Tensor]  # what C holds of them

    def begin_pass(self, kinds: list[Kind]) -> bytes:
        """Both ends begin a pass; what a third party sends C for it."""

    def end_pass(self, kinds: list[Kind]) -> None:
        """The walk before the query is over at C."""


def mask_weight(encoded: Tensor, seed: bytes, weight: Weight) -> Tensor:
    """W~ = W + B, the plain twin of `masked_weight`."""
    return reduce(encoded.to(torch.int64) + weight_mask(seed, weight, encoded.device), weight.bits)


class Dealt:
    """A dealer's."""

    def __init__(self, weights: Weights, device: str) -> None:
        seeds, weight_seed = {role: new_seed() for role in Role}, new_seed()
        masks = {name: weight_mask(weight_seed, w, device) for name, (w, _) in weights.items()}
        self.client_weights = {name: mask_weight(tensor.to(device), weight_seed, w) for name, (w, tensor) in weights.items()}
        self.stores = {role: Store(role, seeds[role], device) for role in Role}
        self.ends: dict[Role, PartySource] = {**self.stores}
        self.tables: dict[Role, Tables] = {}
        self.dealer = Dealer(seeds[Role.SERVER], seeds[Role.CLIENT], masks, device)
        self._left = 0

    def begin_pass(self, kinds: list[Kind]) -> bytes:
        """See `Source`."""
        payload, at = b"".join(self.dealer.deal_pass(kinds)), 0
        self._left = len(payload)
        assert self._left == sum(kind.shared_bytes for kind in kinds)

        def fetch(size: int) -> memoryview:
            nonlocal at
            at, self._left = at + size, self._left - size
            return memoryview(payload)[at - size : at]

        self.stores[Role.SERVER].begin_pass(kinds)
        self.stores[Role.CLIENT].begin_pass(fetch=fetch)
        return payload

    def end_pass(self, kinds: list[Kind]) -> None:
        """See `Source`: C has asked for the same, and all of it was used."""
        digest = KindHash(self.stores[Role.CLIENT].next_name)
        for kind in kinds:
            digest.update(kind)
        assert self.stores[Role.CLIENT].asked.digest() == digest.digest() and self._left == 0


@dataclass
class Session:
    """Two parties and a source of correlations that run one pass after another; weights are (public record, encoded tensor).

    They compute on `device`, each of their steps in a context that `within` makes.
    """

    weights: Weights = field(default_factory=dict)
    device: str = "cpu"
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    source: Callable[[Weights, str], Source] = Dealt

    def __post_init__(self) -> None:
        with self.within():
            encoded = {name: tensor.to(self.device) for name, (_, tensor) in self.weights.items()}
            self.made = self.source(self.weights, self.device)
        self.held = {Role.SERVER: encoded, Role.CLIENT: self.made.client_weights}

    def _party(self, role: Role, engine: Engine, splits: int) -> TestParty:
        party = TestParty(role, engine, self.held[role], splits)
        party.tables = self.made.tables.get(role)
        return party

    def trace(self, role: Role, program: Program) -> Trace:
        """The program on shapes."""
        trace = Trace(role, self.made.ends[role].next_name)
        with self.within():
            program(self._party(role, trace, 0))
        return trace

    def run(self, program: Program, observe: Callable[[Party], None] | None = None) -> Outcome:
        """One pass; `observe` sees each party before its online walk."""
        traces = {role: self.trace(role, program) for role in Role}
        kinds = traces[Role.SERVER].kinds
        assert kinds == traces[Role.CLIENT].kinds
        predicted = Cost()
        for cost in traces[Role.CLIENT].costs.values():
            predicted += cost
        with self.within():
            payload = self.made.begin_pass(kinds)
        splits = int(torch.randint(2**62, ()))
        channels = dict(zip((Role.SERVER, Role.CLIENT), memory_pair(), strict=True))
        results: dict[Role, Any] = {}
        received: dict[Role, Seen] = {}

        def walk(role: Role) -> None:
            channel, source = channels[role], self.made.ends[role]
            channel.meter.phase = "offline"
            Party(role, Online(role, channel, source)).run(source.preprocess())
            offline = Offline(self.held[role], channel, source)
            program(self._party(role, offline, splits))
            if role is Role.CLIENT:
                self.made.end_pass(kinds)
            channel.meter.phase = "online"
            engine = _Recorder(role, channel, source, offline.early)
            party = self._party(role, engine, splits)
            if observe is not None:
                observe(party)
            results[role] = program(party)
            assert not offline.early, "the server did not read all early messages"
            source.end_pass()
            received[role] = engine.seen

        def within(role: Role) -> None:
            with self.within():
                walk(role)

        at_both(within, channels)
        counted = channels[Role.CLIENT].meter.snapshot()
        return Outcome(results[Role.SERVER], results[Role.CLIENT], predicted, counted, payload, kinds, received)


def execute(program: Program, weights: Weights | None = None, observe: Callable[[Party], None] | None = None) -> Outcome:
    """One pass of a session of its own."""
    return Session(weights or {}).run(program, observe)


def run(protocol: Callable[[Party], Protocol_[Any]], weights: Weights | None = None) -> Outcome:
    """`execute` for one protocol."""
    return execute(lambda party: party.run(protocol(party)), weights)
