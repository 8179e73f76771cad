"""S's end of a source that is the two parties themselves: weights that it encrypts once for its clients, and its part of making a pass."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from privinf.lowering.encrypted import Sealing
from privinf.lowering.joint import Forecast, Joint
from privinf.lowering.lowered import Lowered
from privinf.server.models import ServedModel
from privinf.server.room import Place, Room
from privinf.server.sealed import SealedSetUp
from privinf.server.stock import ServerStock
from privinf.server.supply import Supply
from privinf.session.blame import as_told, sane
from privinf.session.joint import Recorder, Together
from privinf.session.messages import Marked, Pass, Session, Step, Stock, Terms
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.session.turns import InTurn
from privinf.transport.connection import Connection
from privinf.trust import TWO_PARTY
from protocols.correlations import Kind, Role
from protocols.errors import ProtocolDesync
from protocols.prg import new_seed
from protocols.rounds import Protocol_
from protocols.sources.base import PartySource


class TwoPartySupply(Supply):
    """Set-up sends the encrypted weights, which are the same for all clients: the key is the model's own."""

    trust = TWO_PARTY

    def __init__(self, service: Service, dealer: str | None) -> None:
        super().__init__(service, dealer)
        self._sealed, self._room = SealedSetUp(service), Room(service.options.hold, service.board)

    def set_up_bytes(self, lowered: Lowered) -> dict[str, int]:
        """See `Supply`."""
        return Sealing.of(lowered).sizes

    def set_up(self, model: ServedModel, connection: Connection) -> None:
        """See `Supply`: the encrypted weights."""
        sealing = Sealing.of(model.lowered)
        self._sealed.send(model, sealing, connection, lambda names: self.wanted(model, connection, names, sealing.sizes))

    @contextmanager
    def session(self, model: ServedModel, connection: Connection) -> Iterator[ServerSource]:
        """See `Supply`."""
        place = Place(self._room, self.service)
        try:
            connection.send_control(Session(secrets.token_bytes(16)))
            connection.establish()
            yield TwoPartySource(self.service, model, connection, place)
        except Exception as error:
            self.service.tell(connection, as_told(error, self.service.role))
            raise
        finally:
            place.leave()


class TwoPartySource(ServerSource):
    """See `ServerSource`; nobody else is asked. What is spent, the two parties' own marks say."""

    def __init__(self, service: Service, model: ServedModel, connection: Connection, place: Place) -> None:
        self._place = place
        self._turns, self._client = service.turns, connection.peer_fingerprint
        self._peer = f"client {connection.peer_name}"
        joint = Joint(Role.SERVER, Sealing.of(model.lowered).opened(model.mask_seed, model.encoded), service.options.device)
        self._together = Together(Role.SERVER, connection, InTurn(connection, service.turns), joint)
        self.party, self.tables = joint.source, joint.tables
        self._stock = ServerStock(service.options, model, service.credentials.fingerprint, connection)
        self._recorded: deque[bytes] = deque()
        self._recorder: Recorder | None = None  # of the query that is prepared
        self._forecast: Forecast | None = None
        self._foretold = False  # a pass, whose making has not begun

    def cost(self, kinds: Sequence[Kind]) -> int:
        """See `ServerSource`."""
        self._forecast = self._forecast or Forecast()
        before = self._forecast.made.online_bytes
        with self._turns.turn(self._client):
            self._forecast.make(kinds)
        return self._forecast.made.online_bytes - before

    def ask(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`."""

    def make(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`; what is left of a pass that was foretold."""
        if self._together.foresees:
            self._finish()
        else:
            self._place.grow(self._together.joint.source.room(kinds))
            self.party.begin_pass(kinds)
            self._make(self.party)

    def taken(self) -> None:
        """See `ServerSource`."""
        self._place.settle(self._together.joint.resting)

    def _make(self, source: PartySource) -> None:
        self._together.supply(source, self._stock.draw)
        with self._turns.turn(self._client), self._sane():
            self._together.make(source)

    def _finish(self) -> None:
        with self._turns.turn(self._client), self._sane():
            self._together.finish()
        self._place.ahead = 0

    def _sane(self) -> AbstractContextManager[None]:
        return sane(ProtocolDesync, "the client's part of making correlations makes no sense", party="server", peer=self._peer)

    def stock(self, request: Stock, afford: Callable[[int], None]) -> None:
        """See `ServerSource`."""

        def run(protocol: Protocol_[Any]) -> None:
            with self._turns.turn(self._client), self._sane():
                self._together.run(protocol)

        self._stock.make(request, afford, run)

    def record(self, kinds: Sequence[Kind]) -> Iterable[bytes]:
        """See `ServerSource`."""
        assert self._recorder is not None, "a prepared query begins with a seed"
        self._place.grow(self._recorder.room(kinds))
        self._recorder.begin_pass(kinds)
        self._make(self._recorder)
        self._recorder.end_pass()
        self.taken()
        while self._recorded:
            yield self._recorded.popleft()

    def follows(self, request: Pass | Step) -> Pass | Step | None:
        """See `ServerSource`: the client says so, who must do the same; of a batch nobody knows who goes on."""
        return request.following if isinstance(request, Pass) and request.more else None

    def prefetch(self, kinds: Sequence[Kind], *, further: bool = False) -> None:
        """See `ServerSource`."""
        self._place.ahead = self._together.joint.source.room(kinds)  # one position's: too little to wait for
        self.party.begin_pass(kinds)
        self._foretold = True

    def flush(self) -> None:
        """See `ServerSource`: only then the client says from where the pass that was foretold takes its rows."""
        if self._foretold:
            self._foretold = False
            self._together.supply(self.party, self._stock.draw)
            self._together.foresee(self.party)

    def ask_prefetched(self) -> None:
        """See `ServerSource`."""

    def drop_prefetched(self) -> None:
        """See `ServerSource`: made to its end, since transfers stand in the order of their use, and then dropped."""
        self._finish()
        self._together.joint.source.drop()

    @property
    def meanwhile(self) -> Callable[[], None] | None:  # type: ignore[override]
        """See `ServerSource`."""
        return self._step if self._foretold or self._together.foresees else None

    def _step(self) -> None:
        step = self._together.meanwhile
        assert step is not None
        with self._sane():
            step()

    def settle(self) -> None:
        """See `ServerSource`."""
        with self._sane():
            self._together.settle()

    def computing(self) -> AbstractContextManager[None]:
        """See `ServerSource`."""
        return self._together.computing()

    def reseed(self) -> bytes:
        """See `ServerSource`; nothing is expanded from it."""
        self._recorder = Recorder(self._together.joint.apart(), self._recorded.append, lambda kinds: None)
        return new_seed()

    def mark(self, model: str, terms: Terms, spent: int, index: int = 0) -> Marked:
        """See `ServerSource`: there is nobody beside the two."""
        return Marked(spent, True)

    def end(self) -> None:
        """See `ServerSource`."""
