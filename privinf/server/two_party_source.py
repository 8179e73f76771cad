"""S's end of a source that is the two parties themselves: weights that it encrypts once for its clients, and its part of making a pass."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from privinf.lowering.encrypted import Sealing
from privinf.lowering.joint import Joint
from privinf.lowering.lowered import Lowered
from privinf.server.models import ServedModel
from privinf.server.supply import Supply
from privinf.session.blame import as_told
from privinf.session.joint import Together
from privinf.session.messages import MAX_KINDS, Key, Marked, Needs, Session, Terms
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.session.turns import InTurn
from privinf.transport.connection import Connection
from privinf.trust import TWO_PARTY
from protocols.correlations import Kind, Role
from protocols.errors import ProtocolDesync


class TwoPartySupply(Supply):
    """Set-up sends the encrypted weights, which are the same for all clients: the key is the model's own."""

    trust = TWO_PARTY

    def set_up_bytes(self, lowered: Lowered) -> dict[str, int]:
        """See `Supply`."""
        return {name: part.size for name, part in Sealing.of(lowered).parts.items()}

    def set_up(self, model: ServedModel, connection: Connection) -> None:
        """See `Supply`: the encrypted weights, in messages of a bounded size."""
        sealing, turns, client = Sealing.of(model.lowered), self.service.turns, connection.peer_fingerprint
        connection.send_control(Key(sealing.key_id(model.mask_seed)))
        names = connection.receive_control(Needs, MAX_KINDS).names
        self.wanted(model, connection, names)
        with turns.turn(client):
            for name in names:
                connection.meter.label = model.labels[sealing.parts[name].weight.name]
                for message in sealing.seal(model.mask_seed, name, model.encoded):
                    with turns.between(client):
                        connection.send(message)
        connection.meter.label = ("", "")

    @contextmanager
    def session(self, model: ServedModel, connection: Connection) -> Iterator[ServerSource]:
        """See `Supply`."""
        connection.send_control(Session(secrets.token_bytes(16)))
        connection.establish()
        try:
            yield TwoPartySource(self.service, model, connection)
        except Exception as error:
            self.service.tell(connection, as_told(error, self.service.role))
            raise


class TwoPartySource(ServerSource):
    """See `ServerSource`; nobody else is asked, so that nothing is foretold, and nothing can be prepared."""

    prepares = False

    def __init__(self, service: Service, model: ServedModel, connection: Connection) -> None:
        self._turns, self._client = service.turns, connection.peer_fingerprint
        joint = Joint(Role.SERVER, Sealing.of(model.lowered).opened(model.mask_seed, model.encoded), service.options.device)
        self._together = Together(Role.SERVER, connection, InTurn(connection, service.turns), joint)
        self.party = joint.source
        self._begun = False

    def begin(self) -> None:
        """See `ServerSource`."""
        if self._begun:
            raise ProtocolDesync("the client begins its session twice", party="server")
        self._begun = True
        with self._turns.turn(self._client):
            self._together.begin()

    def ask(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`."""
        if not self._begun:
            raise ProtocolDesync("the client asks for a pass before it has begun its session", party="server")

    def make(self) -> None:
        """See `ServerSource`."""
        with self._turns.turn(self._client):
            self._together.make()

    def prefetch(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`."""

    def flush(self) -> None:
        """See `ServerSource`."""

    def ask_prefetched(self) -> None:
        """See `ServerSource`."""

    def reseed(self) -> bytes:
        """See `ServerSource`."""
        raise NotImplementedError

    def mark(self, model: str, terms: Terms, spent: int, index: int = 0) -> Marked:
        """See `ServerSource`."""
        raise NotImplementedError

    def end(self) -> None:
        """See `ServerSource`."""
