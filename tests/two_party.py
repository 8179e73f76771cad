"""Runs a program as server, client and dealer in one process, over the in-memory twin of the transport.

A program is `program(party)`; it runs on shapes, then at the client before the query, then at both parties, and reads
its secrets with `input_of`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from privinf.transport.memory import memory_pair
from protocols.correlations import Kind, KindHash, Part, Role, Store
from protocols.dealing import Dealer
from protocols.linear import Weight, mask_weight, weight_mask
from protocols.party import Cost, Engine, Item, Offline, Online, Party, Protocol_, Received, Trace
from protocols.prg import new_seed
from protocols.ring import decode, encode, reduce, signed
from protocols.shares import Shares, Wire

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
    known = isinstance(party.engine, Online) or (early and isinstance(party.engine, Offline))
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


@dataclass
class Session:
    """Three parties that run one pass after another; weights are (public record, encoded tensor).

    They compute on `device`, each of their steps in a context that `within` makes.
    """

    weights: dict[str, tuple[Weight, Tensor]] = field(default_factory=dict)
    weight_seed: bytes = field(default_factory=new_seed)
    device: str = "cpu"
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        seeds = {role: new_seed() for role in Role}
        with self.within():
            masks = {name: weight_mask(self.weight_seed, w, self.device) for name, (w, _) in self.weights.items()}
            encoded = {name: tensor.to(self.device) for name, (_, tensor) in self.weights.items()}
            masked = {name: mask_weight(encoded[name], self.weight_seed, w) for name, (w, _) in self.weights.items()}
        self.held = {Role.SERVER: encoded, Role.CLIENT: masked}
        self.stores = {role: Store(role, seeds[role], self.device) for role in Role}
        self.dealer = Dealer(seeds[Role.SERVER], seeds[Role.CLIENT], masks, self.device)

    def trace(self, role: Role, program: Program) -> Trace:
        """The program on shapes."""
        trace = Trace(role, self.stores[role].next_name)
        with self.within():
            program(TestParty(role, trace, self.held[role], 0))
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
            payload = b"".join(self.dealer.deal_pass(kinds))
        assert len(payload) == predicted.dealer_bytes
        splits = int(torch.randint(2**62, ()))
        channels = dict(zip((Role.SERVER, Role.CLIENT), memory_pair(), strict=True))
        results: dict[Role, Any] = {}
        received: dict[Role, Seen] = {}
        errors: list[BaseException] = []

        def walk(role: Role) -> None:
            channel, store = channels[role], self.stores[role]
            channel.meter.phase = "offline"
            early: deque[memoryview] = deque()
            if role is Role.CLIENT:
                self._offline(channel, program, payload, kinds, splits)
            for parts in traces[role].early if role is Role.SERVER else ():
                data = channel.exchange(None, sum(part.size for part in parts))
                assert data is not None
                early.append(data)
            channel.meter.phase = "online"
            engine = _Recorder(role, channel, store, early)
            party = TestParty(role, engine, self.held[role], splits)
            if observe is not None:
                observe(party)
            results[role] = program(party)
            assert not early, "the server did not read all early messages"
            received[role] = engine.seen

        def guarded(role: Role) -> None:
            try:
                with self.within():
                    walk(role)
            except BaseException as error:
                errors.append(error)
                channels[role].close()

        threads = [threading.Thread(target=guarded, args=(role,)) for role in Role]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        counted = channels[Role.CLIENT].meter.snapshot()
        return Outcome(results[Role.SERVER], results[Role.CLIENT], predicted, counted, payload, kinds, received)

    def _offline(self, channel: Any, program: Program, payload: bytes, kinds: list[Kind], splits: int) -> None:
        at = 0

        def fetch(size: int) -> memoryview:
            nonlocal at
            at += size
            return memoryview(payload)[at - size : at]

        party = TestParty(Role.CLIENT, None, self.held[Role.CLIENT], splits)  # type: ignore[arg-type]
        offline = Offline(party.weights, channel, self.stores[Role.CLIENT], fetch)
        party.engine = offline
        program(party)
        digest = KindHash()
        for kind in kinds:
            digest.update(kind)
        assert offline.hash.digest() == digest.digest() and at == len(payload)


def execute(
    program: Program, weights: dict[str, tuple[Weight, Tensor]] | None = None, observe: Callable[[Party], None] | None = None
) -> Outcome:
    """One pass of a session of its own."""
    return Session(weights or {}).run(program, observe)


def run(protocol: Callable[[Party], Protocol_[Any]], weights: dict[str, tuple[Weight, Tensor]] | None = None) -> Outcome:
    """`execute` for one protocol."""
    return execute(lambda party: party.run(protocol(party)), weights)
