"""How a client's sessions come to a source of correlations: what it takes of the model for it, and the source of a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from privinf.client.lines import Lines
from privinf.lowering.lowered import Lowered
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection


class Supply(ABC):
    """Of one session, for a trust model of that name; `embedding`: how the server says that tokens become rows of its table."""

    trust: ClassVar[str]

    def __init__(self, lines: Lines, connection: Connection, lowered: Lowered, embedding: str) -> None:
        self.lines, self.connection, self.lowered, self.embedding = lines, connection, lowered, embedding

    @abstractmethod
    def set_up(self) -> None:
        """Takes what is kept of the model, and from the server what is not."""

    @abstractmethod
    def source(self, token: bytes) -> ClientSource:
        """The source of the session that the server has given this token, which is established."""
