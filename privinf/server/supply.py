"""How a server's sessions come to a source of correlations: what set-up sends a client for it, and the source of a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from privinf.lowering.lowered import Lowered
from privinf.server.models import ServedModel
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.transport.connection import Connection
from protocols.errors import HandshakeError, RefusedError


class Supply(ABC):
    """Of one server, for a trust model of that name; `dealer` is where one listens, if one was given."""

    trust: ClassVar[str]

    def __init__(self, service: Service, dealer: str | None) -> None:
        self.service, self.dealer = service, dealer

    def missing(self) -> str:
        """Why a session could not begin now, for want of somebody beside the two; empty: nothing."""
        return ""

    @abstractmethod
    def set_up_bytes(self, lowered: Lowered) -> dict[str, int]:
        """What set-up sends of each weight, bytes."""

    @abstractmethod
    def set_up(self, model: ServedModel, connection: Connection) -> None:
        """Sends what the client has not kept of the model."""

    @abstractmethod
    def session(self, model: ServedModel, connection: Connection) -> AbstractContextManager[ServerSource]:
        """The source of a client's session, whose set-up is done; and what it stands on ends with the block."""

    def wanted(self, model: ServedModel, connection: Connection, names: tuple[str, ...], sizes: Mapping[str, int]) -> None:
        """Checks the names of the weights that a client asks for, of those of these sizes, and counts them before anything is sent."""
        if len(set(names)) < len(names):
            raise HandshakeError("the client asks for a weight twice", party="server")
        strange = next((name for name in names if name not in sizes), None)
        if strange is not None:
            raise HandshakeError(f"the client asks for a weight {strange[:80]!r} that the model does not have", party="server")
        self.may_send(model, connection, sum(sizes[name] for name in names))

    def may_send(self, model: ServedModel, connection: Connection, size: int) -> None:
        """Counts a part of the set-up before it is sent."""
        try:
            model.set_ups.spend(connection.peer_fingerprint, size)
        except RefusedError as error:
            raise self.service.refusal(error) from None
