"""The server: owns a model, serves each client a session of its own, and learns nothing about prompt or answer."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from privinf.lowering.lowered import Lowered
from privinf.server.dealer_source import DealerSource, reach_dealer
from privinf.server.models import ServedModel, open_model
from privinf.server.session import ServerSession
from privinf.session.access import name_of, one_line
from privinf.session.blame import as_told
from privinf.session.messages import (
    MAX_KINDS,
    Needs,
    Session,
    Welcome,
    greet,
)
from privinf.session.options import Options
from privinf.session.service import Service
from privinf.transport.connection import Connection
from privinf.transport.frames import FrameKind
from privinf.transport.listener import parse_address
from protocols.errors import HandshakeError, RefusedError

log = logging.getLogger("privinf.server")


class Server(Service):
    """`Server("model_dir", listen="0.0.0.0:7000", dealer="dealer:7001", keys="keys/").start()`; also a context manager.

    `model` is a lowered directory, a checkpoint directory or a `Lowered`. Safe to run in a thread of a service.
    Raises ConfigError for a bad model, keys or address.
    """

    role = "server"

    def __init__(
        self,
        model: str | Path | Lowered,
        *,
        listen: str,
        dealer: str,
        keys: str,
        allow_logits: bool = False,
        clients: str | Path | None = None,
        options: Options | None = None,
    ) -> None:
        options, listed = options or Options(), None if clients is None else Path(clients)
        parse_address(dealer)  # a malformed one is noticed now
        super().__init__(listen=listen, keys=keys, allowed_roles={"client"}, options=options, link=True, clients=listed)
        try:
            lowered = model if isinstance(model, Lowered) else open_model(Path(model), options.cache)
            self.model = ServedModel(lowered, options, allow_logits=allow_logits)
        except BaseException:
            self._listener.close()
            raise
        self.dealer = dealer

    @property
    def lowered(self) -> Lowered:
        """The model that new sessions get."""
        return self.model.lowered

    def budgets(self) -> dict[str, int]:
        return {} if self.model.budget is None else dict(self.model.budget.spent)

    def handle(self, connection: Connection) -> None:
        """One client: handshake, set-up, then passes until it ends."""
        connection.meter.phase = "setup"
        greet(connection)
        connection.timeout, model = self.options.timeout, self.model
        connection.send_control(Welcome(model.lowered.id, len(model.bundle), model.allow_logits))
        if connection.receive_control(Needs).names:
            self._may_send(model, connection, len(model.bundle))
            connection.send(model.bundle, FrameKind.CONTROL)
        self._set_up(model, connection, connection.receive_control(Needs, MAX_KINDS).names)
        link = reach_dealer(self, self.dealer)
        try:
            self._serve(model, connection, link)
        except Exception as error:
            for each in (connection, link):  # the client before the dealer, whose end it would take for the cause
                self.tell(each, as_told(error, self.role))
            raise
        finally:
            self.retire(link)

    def _serve(self, model: ServedModel, connection: Connection, link: Connection) -> None:
        """A session, announced to the dealer and then to the client."""
        token, weights = secrets.token_bytes(16), model.weights.values()
        source = DealerSource(link, token, connection.peer_fingerprint, model.mask_seed, weights, self.options.device)
        connection.send_control(Session(token))
        connection.establish()
        connection.timeout = self.options.idle
        with one_line(self.say_of_a_session, name_of(connection), lambda: connection) as tally:
            ServerSession(self, model, connection, source, tally).serve()
        self.leave(connection)
        source.end()

    def _set_up(self, model: ServedModel, connection: Connection, names: tuple[str, ...]) -> None:
        """Sends the masked weights that the client has not kept, one message each."""
        connection.max_frame = 64 * 2**20
        if len(set(names)) < len(names):
            raise HandshakeError("the client asks for a weight twice", party="server")
        strange = next((name for name in names if name not in model.weights), None)
        if strange is not None:
            raise HandshakeError(f"the client asks for a weight {strange[:80]!r} that the model does not have", party="server")
        self._may_send(model, connection, sum(model.lowered.setup.items[name].size for name in names))
        with self.turns.turn(connection.peer_fingerprint):
            for name in names:
                data = model.masked(name)
                connection.meter.label = model.labels[name]
                with self.turns.between(connection.peer_fingerprint):
                    connection.send(data)
        connection.meter.label = ("", "")

    def _may_send(self, model: ServedModel, connection: Connection, size: int) -> None:
        """Counts a part of the set-up before it is sent."""
        try:
            model.set_ups.spend(connection.peer_fingerprint, size)
        except RefusedError as error:
            raise self.refusal(error) from None
