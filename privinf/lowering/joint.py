"""What S and C make by themselves before a pass, where there is no dealer: each one's source, and what it will move.

What it moves follows from the kinds that a pass takes, which are public: `Forecast` runs the same protocols on shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from protocols.correlations import Kind, Part, Role
from protocols.lattice.lattice import Lattice
from protocols.ot.transfers import Transfers
from protocols.party import Cost, Party, Protocol_, Trace
from protocols.ring import blank
from protocols.rounds import Item
from protocols.sources.two_party.ledger import Ledger
from protocols.sources.two_party.source import TwoPartySource
from protocols.sources.two_party.tables import SealedTables

BEGIN, PREPROCESS = ("", "begin"), ("", "preprocess")
"""What moves for a session's beginning, and ahead of a pass, as it is counted: of no operator."""


class Joint:
    """One party's end. `weights`: at S the encoded tensors, at C what set-up brought of them (`encrypted`); on shapes none are needed."""

    def __init__(self, role: Role, weights: Mapping[str, Any], device: torch.device | str = "cpu", *, traced: bool = False) -> None:
        self._transfers = Transfers(role, traced)
        self._lattice = Lattice(role, self._transfers, traced)
        self._role, self._weights, self._device = role, weights, device
        self.source = TwoPartySource(role, self._transfers, self._lattice, weights, traced=traced, device=device)
        self.tables = SealedTables(role, self._lattice, weights)

    def apart(self) -> TwoPartySource:
        """A source of its own on the same transfers and keys, whose passes are handed over: those of a query that is prepared.

        Its masks have the names of every such source's, so that no ciphertexts that another has left are its own.
        """
        return TwoPartySource(self._role, self._transfers, self._lattice.apart(), self._weights, device=self._device)

    def spent(self) -> int:
        """Transfers that were used so far."""
        return getattr(self._transfers, "spent", 0)

    @property
    def resting(self) -> int:
        """Bytes that stay between passes, for tokens to come."""
        return self.source.resting + self._lattice.resting

    def begin(self) -> Protocol_[None]:
        """Once a session, before anything else: what transfers and encryption stand on."""
        yield from self._transfers.start()
        yield from self._lattice.start()


def tables_alone(role: Role, held: Mapping[str, Any], *, traced: bool = False) -> SealedTables:
    """One party's end of an encrypted embedding beside a dealer's correlations: a look-up needs no transfers, and nothing to begin with."""
    return SealedTables(role, Lattice(role, Transfers(role, traced), traced), held)


class Forecast:
    """What moves between the two before the passes of one session, in payload and in rounds as the client counts them."""

    def __init__(self, *, by_kind: bool = False) -> None:
        self._joint, self._trace = Joint(Role.CLIENT, {}, traced=True), Trace(Role.CLIENT)
        self._by_kind = by_kind
        self.tables = self._joint.tables
        began = Trace(Role.CLIENT)
        Party(Role.CLIENT, began).run(self._joint.begin())
        self.begun = began.cost
        """The session's beginning."""
        self._begin_ledger()

    def _begin_ledger(self) -> None:
        if self._by_kind:
            self._joint.source.ledger = Ledger(self._joint.spent)

    @property
    def kinds(self) -> list[dict[str, Any]]:
        """Of what the passes take, by kind: {`kind`, `count`, `offline_bytes`, `transfers`}; the bytes are all but what C sends ahead."""
        ledger = self._joint.source.ledger
        return ledger.record() if ledger is not None else []

    def make(self, kinds: Sequence[Kind], early: Sequence[Sequence[Part]] = (), supplied: Iterable[int] = ()) -> None:
        """A pass that takes these, and what C sends ahead of it; `supplied`: places of those that are there from a stock."""
        self._joint.source.predict(kinds, self._trace, supplied)
        for parts in early:
            self._trace.perform([Item(blank(*part.shape), part.bits, from_server=False, modulus=part.modulus) for part in parts])

    def forget(self) -> None:
        """The passes so far are there already, and only those to come count."""
        self._trace = Trace(Role.CLIENT)
        self._begin_ledger()

    @property
    def made(self) -> Cost:
        """All passes; `online_bytes` and `rounds` are those before the query, what C sends ahead included."""
        return self._trace.cost
