"""The server: owns a model, serves each client a session of its own, and learns nothing about prompt or answer."""

from __future__ import annotations

import logging
from pathlib import Path

from privinf.lowering.lowered import Lowered
from privinf.server.dealer_source import DealerSupply
from privinf.server.models import Loaded, ServedModel, open_model
from privinf.server.session import ServerSession
from privinf.server.supply import Supply
from privinf.server.two_party_source import TwoPartySupply
from privinf.session.access import name_of, one_line
from privinf.session.board import Board
from privinf.session.messages import Needs, Welcome, greet
from privinf.session.options import Options, with_trust
from privinf.session.service import Service
from privinf.transport.connection import Connection
from privinf.transport.frames import MAX_FRAME, FrameKind
from privinf.transport.handing import Handed
from privinf.transport.listener import parse_address
from privinf.trust import DEALER, TWO_PARTY
from protocols.errors import ConfigError

log = logging.getLogger("privinf.server")
SUPPLIES: dict[str, type[Supply]] = {supply.trust: supply for supply in (DealerSupply, TwoPartySupply)}
"""By trust model."""


def check_dealer(dealer: str | None, options: Options) -> None:
    """ConfigError where one is needed and not given, or is malformed, which is noticed now."""
    if dealer is not None:
        parse_address(dealer)
    elif options.trusted == DEALER:
        raise ConfigError("no dealer was given", remedy=f"give a dealer's address, or the trust model {TWO_PARTY}")


class Server(Service):
    """`Server("model_dir", listen="0.0.0.0:7000", dealer="dealer:7001", keys="keys/").start()`; also a context manager.

    `model` is a lowered directory, a checkpoint directory or a `Lowered`. With `trust="two-party"` it needs no dealer, and makes the
    correlations with its clients; with `embedding="encrypted"` clients keep the table of tokens encrypted where there is a dealer too.
    Safe to run in a thread of a service. Raises ConfigError for a bad model, keys or address.
    """

    role = "server"

    def __init__(
        self,
        model: str | Path | Lowered | Loaded,
        *,
        listen: str | Handed,
        dealer: str | None = None,
        keys: str,
        trust: str | None = None,
        embedding: str | None = None,
        allow_logits: bool = False,
        clients: str | Path | None = None,
        options: Options | None = None,
        board: Board | None = None,
    ) -> None:
        options, listed = with_trust(options, trust, embedding), None if clients is None else Path(clients)
        check_dealer(dealer, options)
        super().__init__(listen=listen, keys=keys, allowed_roles={"client"}, options=options, link=True, clients=listed, board=board)
        try:
            lowered = model if isinstance(model, Lowered | Loaded) else open_model(Path(model), options.cache)
            self.supply = SUPPLIES[options.trusted](self, dealer)
            self.model = ServedModel(lowered, options, allow_logits=allow_logits, sizes=self.supply.set_up_bytes, board=board)
        except BaseException:
            self._listener.close()
            raise

    @property
    def lowered(self) -> Lowered:
        """The model that new sessions get."""
        return self.model.lowered

    def missing(self) -> str:
        return self.supply.missing()

    def budgets(self) -> dict[str, int]:
        return {} if self.model.budget is None else dict(self.model.budget.spent)

    def handle(self, connection: Connection) -> None:
        """One client: handshake, set-up, then passes until it ends."""
        connection.meter.phase = "setup"
        greet(connection)
        connection.timeout, model = self.options.timeout, self.model
        trust, options = self.supply.trust, self.options
        connection.send_control(Welcome(model.lowered.id, len(model.bundle), model.allow_logits, trust, options.embedded, options.batch))
        needs = connection.receive_control(Needs)
        if needs.looks:
            return
        if needs.names:
            self.supply.may_send(model, connection, len(model.bundle))
            connection.send(model.bundle, FrameKind.CONTROL)
        connection.max_frame = MAX_FRAME
        self.supply.set_up(model, connection)
        with self.supply.session(model, connection) as source:
            connection.timeout = self.options.idle
            with one_line(self.say_of_a_session, name_of(connection), lambda: connection) as tally:
                ServerSession(self, model, connection, source, tally).serve()
            self.leave(connection)
            source.end()
