"""Rows of S's tables that C takes from ciphertexts, at the query: the one thing that no correlation makes cheaper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from protocols.correlations import Role
from protocols.ring import blank, known
from protocols.rounds import Protocol_
from protocols.sources.two_party.pair import LatticeEnd


class SealedTables:
    """See `protocols.party.Tables`. `held`: what this party has of each table; nothing is needed on shapes."""

    def __init__(self, role: Role, lattice: LatticeEnd, held: Mapping[str, Any]) -> None:
        self._role, self._lattice, self._held = role, lattice, held
        self.spend: Callable[[int], None] = lambda count: None
        """At C, before rows are taken: their flood is good for `security.TAKEN` of them."""

    def __repr__(self) -> str:
        return f"SealedTables(role={self._role.value}, values hidden)"

    def lookup(self, table: str, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """See `Tables`. Rounds: 1 message C -> S. Learns: S an answer that a flood makes look like any other; C nothing."""
        server = self._role is Role.SERVER
        held = self._held.get(table) if server or known(ids) else None
        if not server and known(ids):
            self.spend(len(ids))
        protocol = self._lattice.lookup(held, ids.cpu() if known(ids) else ids, out, bits, size)
        received = yield next(protocol)
        if server and not known(*received):  # a walk on shapes
            return blank(ids.shape[0], out)
        device = received[0].device if server else ids.device  # ciphertexts are the processor's, whatever the party computes on
        try:
            protocol.send([value.cpu() for value in received] if server else received)
        except StopIteration as stop:
            found: Tensor = stop.value
            return found.to(device)
        raise AssertionError("a look-up is one message")
