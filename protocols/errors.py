"""The one tree of errors. Every message is a readable line: cause, where, remedy; never a secret value.

PrivinfError
|-- ConfigError          wrong usage, configuration or checkpoint        (exit 2)
|-- HandshakeError       the peer refused, or is not whom we expect      (exit 3)
|   `-- RefusedError     it is full, or a limit or a budget is used up   (exit 3)
|-- TransportError       the peer could not be reached, hung or vanished (exit 3 before a session, 4 within)
|-- ProtocolDesync       the parties no longer run the same program      (exit 4)
|-- RangeError           a model's values fit no ring                    (exit 2)
|-- CorrelationError     a correlation is missing, damaged or spent      (exit 4)
`-- UnsupportedOpError   the model needs an operator that has no protocol (exit 5)
"""

from __future__ import annotations


class PrivinfError(Exception):
    """Base of everything that this project raises on purpose.

    `exit_code` is what the command line ends with; `layer`, `party` and `peer` say where, `remedy` what to do.
    """

    exit_code = 4

    def __init__(self, message: str, *, layer: str = "", party: str = "", peer: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.layer = layer
        self.party = party
        self.peer = peer
        self.remedy = remedy

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in (("layer", self.layer), ("at", self.party), ("peer", self.peer)) if value)
        line = self.message + (f" ({where})" if where else "")
        return line + (f"; {self.remedy}" if self.remedy else "")


class ConfigError(PrivinfError):
    """Wrong usage, configuration or checkpoint."""

    exit_code = 2


class HandshakeError(PrivinfError):
    """The peer refused us, or is not the party, version or model that we expect."""

    exit_code = 3


class RefusedError(HandshakeError):
    """The peer is well, and will not serve us now or not further: it is full, or a limit or a budget of ours is used up."""


class TransportError(PrivinfError):
    """The peer could not be reached, hung, vanished or sent a frame that is not one of ours."""

    exit_code = 4


class PeerUnreachableError(TransportError):
    """No connection could be made at all."""

    exit_code = 3


class ProtocolDesync(PrivinfError):
    """The parties no longer run the same program."""


class RangeError(PrivinfError):
    """A model's values are larger than any ring can hold; found when it is converted."""

    exit_code = 2


class CorrelationError(PrivinfError):
    """A correlation is missing, damaged, of another kind than expected, or already spent."""


class UnsupportedOpError(PrivinfError):
    """The model needs an operator that has no protocol; the message lists all of them with their module paths."""

    exit_code = 5
