"""C's end of a source that is the two parties themselves: what it keeps of the encrypted weights, and its part of making a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from privinf.client.lines import Lines
from privinf.client.sealed import receive_sealed
from privinf.client.stock import ClientStock
from privinf.client.supply import Supply
from privinf.lowering.encrypted import Sealing
from privinf.lowering.joint import Joint
from privinf.session.joint import Recorder, Together
from privinf.session.messages import Pass
from privinf.session.prepared import Writer
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection
from privinf.trust import TWO_PARTY
from protocols.correlations import Kind, Role
from protocols.prg import new_seed
from protocols.sources.base import PartySource


class TwoPartySupply(Supply):
    """Set-up brings the weights, encrypted under a key of the server's; kept for as long as the server has this key."""

    trust = TWO_PARTY

    def set_up(self) -> None:
        """See `Supply`."""
        self.lines.masked |= receive_sealed(self.lines, self.connection, self.lowered, Sealing.of(self.lowered))

    def source(self, token: bytes) -> ClientSource:
        """See `Supply`."""
        peers = self.lines.peers
        stock = ClientStock(peers.options, self.lowered, peers.credentials.fingerprint, self.connection)
        return TwoPartySource(self.connection, self.lines, peers.options.device, stock)


class TwoPartySource(ClientSource):
    """See `ClientSource`."""

    foresees = True

    def __init__(self, connection: Connection, lines: Lines, device: str, stock: ClientStock) -> None:
        joint = Joint(Role.CLIENT, lines.masked, device)
        joint.tables.spend = lines.spend
        self.party: PartySource = joint.source
        self.tables = joint.tables
        self._together = Together(Role.CLIENT, connection, connection, joint)
        self._stock = stock

    @contextmanager
    def making(self, party: PartySource, kinds: Callable[[], Sequence[Kind]], progress: Callable[[float], None]) -> Iterator[None]:
        """See `ClientSource`; what is left of a pass that was foreseen."""
        if self.foreseen is not None:
            self._finish()
        else:
            party.begin_pass(kinds())
            self._together.supply(party, self._stock.draw)
            progress(0.0)
            self.set_up_s += self._together.make(party)
        progress(1.0)
        yield

    def _finish(self) -> None:
        self._together.finish()
        self.foreseen = None

    def foresee(self, request: Pass, kinds: Callable[[int], Sequence[Kind]]) -> None:
        """See `ClientSource`."""
        self.foreseen, source = request, self._together.joint.source
        source.begin_pass(kinds(source.pass_name))
        self._together.supply(source, self._stock.draw)
        self._together.foresee(source)

    def drop_foreseen(self) -> None:
        """See `ClientSource`: made to its end, since transfers stand in the order of their use, and then dropped."""
        if self.foreseen is not None:
            self._finish()
            self._together.joint.source.drop()

    @property
    def meanwhile(self) -> Callable[[], None] | None:  # type: ignore[override]
        """See `ClientSource`."""
        return self._together.meanwhile

    def settle(self) -> None:
        """See `ClientSource`."""
        self._together.settle()

    def computing(self) -> AbstractContextManager[None]:
        """See `ClientSource`."""
        return self._together.computing()

    def stock(self, positions: int, progress: Callable[[float], None]) -> dict[str, Any]:
        """See `ClientSource`."""
        return self._stock.make(positions, self._together, progress)

    def reseed(self) -> bytes:
        """See `ClientSource`; nothing is expanded from it."""
        return new_seed()

    def recorder(self, writer: Writer) -> PartySource:
        """See `ClientSource`."""
        return Recorder(self._together.joint.apart(), writer.write, lambda kinds: writer.end_pass(kinds, []))
