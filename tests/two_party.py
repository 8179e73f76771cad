"""Runs a program as server, client and dealer in one process, over the in-memory twin of the transport."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privinf.transport.memory import memory_pair
from protocols.correlations import Dealer, KindHash, Role, Store
from protocols.linear import Weight, mask_weight, weight_mask
from protocols.party import Cost, Offline, Online, Party, Trace
from protocols.prg import new_seed
from protocols.ring import decode, encode, reduce
from protocols.shares import Shares

Program = Callable[[Party], Any]


@dataclass
class Outcome:
    """What both parties computed, what was predicted, and what was counted."""

    server: Any
    client: Any
    predicted: Cost
    counted: dict[str, Any]  # the client's meter
    dealt: bytes
    kinds: list[Any]

    def value(self) -> Tensor:
        """The real value of a result that both hold as shares."""
        x, y = self.server, self.client
        return decode(x.value + y.value, x.bits, x.frac)

    def ring(self) -> Tensor:
        """The ring element."""
        return reduce(self.server.value + self.client.value, self.server.bits)


def share(x: Tensor, bits: int, frac: int, role: Role) -> Shares:
    """A test's own sharing: uniform, the same in all three walks of one process-wide seed."""
    generator = torch.Generator().manual_seed(x.numel() * 7 + bits)
    mask = torch.randint(-(2**63), 2**63 - 1, x.shape, generator=generator)
    return Shares(mask if role is Role.SERVER else encode(x, frac) - mask, bits, frac)


def share_ring(x: Tensor, bits: int, frac: int, role: Role) -> Shares:
    """The same for ring elements, freshly random each time it is first asked for."""
    key = (id(x), bits)
    if key not in _SPLITS:
        _SPLITS[key] = torch.randint(-(2**63), 2**63 - 1, x.shape)
    mask = _SPLITS[key]
    return Shares(mask if role is Role.SERVER else x - mask, bits, frac)


_SPLITS: dict[Any, Tensor] = {}


def hidden(x: Shares) -> Shares:
    """The shape alone, for the walks before the query."""
    return Shares(x.value.to("meta"), x.bits, x.frac, x.early)


def execute(program: Program, weights: dict[str, tuple[Weight, Tensor]] | None = None, observe: Any = None) -> Outcome:
    """`program(party)` runs at both; weights are (public record, encoded tensor)."""
    weights = weights or {}
    seed, seeds = new_seed(), {Role.SERVER: new_seed(), Role.CLIENT: new_seed()}
    masks = {name: weight_mask(seed, w) for name, (w, _) in weights.items()}
    held = {
        Role.SERVER: {name: encoded for name, (_, encoded) in weights.items()},
        Role.CLIENT: {name: mask_weight(encoded, seed, w) for name, (w, encoded) in weights.items()},
    }
    traces = {}
    for role in Role:
        trace = Trace(role)
        program(Party(role, trace, held[role]))
        traces[role] = trace
    kinds = traces[Role.SERVER].kinds
    assert kinds == traces[Role.CLIENT].kinds
    predicted = Cost()
    for cost in traces[Role.CLIENT].costs.values():
        predicted += cost
    dealer = Dealer(seeds[Role.SERVER], seeds[Role.CLIENT], masks)
    payload = b"".join(dealer.deal(kind) for kind in kinds)
    assert len(payload) == predicted.dealer_bytes
    channels = dict(zip((Role.SERVER, Role.CLIENT), memory_pair(), strict=True))
    results: dict[Role, Any] = {}
    errors: list[BaseException] = []

    def run(role: Role) -> None:
        try:
            channel, party, store = channels[role], Party(role, None, held[role]), Store(role, seeds[role])
            channel.meter.phase = "offline"
            early: deque[memoryview] = deque()
            if role is Role.CLIENT:
                at = 0

                def fetch(size: int) -> memoryview:
                    nonlocal at
                    at += size
                    return memoryview(payload)[at - size : at]

                offline = Offline(party, channel, store, fetch)
                party.engine = offline
                program(party)
                digest = KindHash()
                for kind in kinds:
                    digest.update(kind)
                assert offline.hash.digest() == digest.digest()
            else:
                for parts in traces[role].early:
                    data = channel.exchange(None, sum(part.size for part in parts))
                    assert data is not None
                    early.append(data)
            channel.meter.phase = "online"
            party.engine = Online(role, channel, store, early)
            if observe is not None:
                observe(party)
            results[role] = program(party)
        except BaseException as error:
            errors.append(error)
            channels[role].close()

    threads = [threading.Thread(target=run, args=(role,)) for role in Role]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Outcome(results[Role.SERVER], results[Role.CLIENT], predicted, channels[Role.CLIENT].meter.snapshot(), payload, kinds)


def offline_walk(party: Party) -> bool:
    """Whether secrets are not known yet."""
    return not isinstance(party.engine, Online)


def input_of(party: Party, x: Tensor, bits: int, frac: int) -> Shares:
    """A shared input, known in the online walk alone."""
    shares = share_ring(encode(x, frac), bits, frac, party.role) if False else share(x, bits, frac, party.role)
    return hidden(shares) if offline_walk(party) else shares
