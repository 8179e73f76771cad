"""The one tree of errors. Every message is a readable line: cause, where, remedy; never a secret value.

PrivinfError
|-- ConfigError          wrong usage, configuration or checkpoint        (exit 2)
|-- HandshakeError       the peer refused, or is not whom we expect      (exit 3)
|   `-- RefusedError     it is full, or a limit or a budget is used up   (exit 3)
|-- TransportError       the peer hung, vanished or sent nonsense       (exit 4)
|   |-- OpeningError     the same, before there was a session           (exit 3)
|   `-- PeerUnreachableError  no connection could be made               (exit 3)
|-- ProtocolDesync       the parties no longer run the same program      (exit 4)
|-- RangeError           a model's values fit no ring                    (exit 2)
|-- CorrelationError     a correlation is missing, damaged or spent      (exit 4)
|-- UnsupportedOpError   the model needs an operator that has no protocol (exit 5)
`-- DefectError          a fault of this program's in another process   (exit 1)

What programs go by is an error's `code`, never its words. The class follows from the code and from who found the error
(`kind_of`), and the exit code from the class; `privinf.transport.failure` has the record that travels.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

NAMED = 80
"""Characters of another's name, as a peer tells it, that a line has."""


class Code(StrEnum):
    """What went wrong, in one stable word, which is on the wire, in events and in metrics; any other word is `OTHER`."""

    OTHER = "other"
    CONFIG = "configuration"
    TOO_LONG = "too long"
    HANDSHAKE = "handshake"
    NO_LOGITS = "no logits"
    NOT_LISTED = "not listed"
    SILENT = "silent"
    REFUSED = "refused"
    FULL = "full"
    CLIENT_FULL = "client full"
    SERVER_FULL = "server full"
    CROWDED = "crowded"
    REVOKED = "revoked"
    REQUESTS = "requests"
    TOKENS = "tokens"
    BYTES = "bytes"
    BUDGET = "budget"
    SET_UPS = "set-ups"
    DISK = "disk"
    TRANSPORT = "transport"
    OPENING = "opening"
    INTERNAL = "internal"
    IDLE = "idle"
    ABSENT = "absent"
    STOPPING = "stopping"
    DESYNC = "desync"
    RANGE = "range"
    CORRELATION = "correlation"
    UNSUPPORTED = "unsupported"
    TEMPLATE = "template"
    GATEWAY_STOPPING = "gateway stopping"
    DEFECT = "defect"

    @classmethod
    def _missing_(cls, value: object) -> Code:
        return cls.OTHER


class Heard(StrEnum):
    """Who found an error: this party, or its peer, which told of it before there was a session or within one."""

    HERE = ""
    OPENING = "opening"
    SESSION = "session"


class PrivinfError(Exception):
    """Base of everything that this project raises on purpose.

    `exit_code` is what the command line ends with; `layer`, `party` and `peer` say where, `remedy` what to do. `code` is the class's unless
    a narrower one is given; `retry_after` are the seconds after which to ask again, 0 where nobody knows them, None where asking is no use.
    """

    exit_code: ClassVar[int] = 4
    code: Code = Code.OTHER

    def __init_subclass__(cls, *, code: Code | None = None, exit_code: int | None = None) -> None:
        """What a class does not say is as its parent's."""
        super().__init_subclass__()
        cls.code = code or cls.code
        cls.exit_code = cls.exit_code if exit_code is None else exit_code

    def __init__(
        self,
        message: str,
        *,
        layer: str = "",
        party: str = "",
        peer: str = "",
        remedy: str = "",
        code: Code | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.layer = layer
        self.party = party
        self.peer = peer
        self.remedy = remedy
        self.code = code or type(self).code
        self.retry_after = retry_after
        self.heard = Heard.HERE
        self.reason = ""
        """What other peers are told in place of the message, word for word; where this was heard, what the peer said."""
        self.fault = ""
        """Where this was heard, the party for which the peer spoke, or the peer itself; unproven."""

    def again(self, otherwise: int) -> int | None:
        """The seconds after which to ask again, `otherwise` where nobody knows them; None where asking is no use."""
        return self.retry_after or (None if self.retry_after is None else otherwise)

    def __str__(self) -> str:
        peer = f"{self.fault[:NAMED]} by way of {self.peer}" if self.fault and self.peer and self.fault != self.peer else self.peer
        where = ", ".join(f"{name} {value}" for name, value in (("layer", self.layer), ("at", self.party), ("peer", peer)) if value)
        line = self.message + (f" ({where})" if where else "")
        return line + (f"; {self.remedy}" if self.remedy else "")


class ConfigError(PrivinfError, code=Code.CONFIG, exit_code=2):
    """Wrong usage, configuration or checkpoint."""


class HandshakeError(PrivinfError, code=Code.HANDSHAKE, exit_code=3):
    """The peer refused us, or is not the party, version or model that we expect."""


class RefusedError(HandshakeError, code=Code.REFUSED):
    """The peer is well, and will not serve us now or not further: it is full, or a limit or a budget of ours is used up."""

    @classmethod
    def for_now(cls, what: str, code: Code, *, after: int = 0, party: str = "", remedy: str = "") -> RefusedError:
        """A refusal that will not last: for so many seconds, or 0 where nobody knows."""
        when = f", in {after} s" if after else ""
        return cls(f"{what}; come again later{when}", party=party, remedy=remedy, code=code, retry_after=after)


class TransportError(PrivinfError, code=Code.TRANSPORT, exit_code=4):
    """The peer could not be reached, hung, vanished or sent a frame that is not one of ours."""


class OpeningError(TransportError, code=Code.OPENING, exit_code=3):
    """The peer hung, vanished or sent a frame that is not one of ours, before there was a session."""


class PeerUnreachableError(TransportError, code=Code.ABSENT, exit_code=3):
    """No connection could be made at all."""


class ProtocolDesync(PrivinfError, code=Code.DESYNC):
    """The parties no longer run the same program."""


class RangeError(PrivinfError, code=Code.RANGE, exit_code=2):
    """A model's values are larger than any ring can hold; found when it is converted."""


class CorrelationError(PrivinfError, code=Code.CORRELATION):
    """A correlation is missing, damaged, of another kind than expected, or already spent."""


class UnsupportedOpError(PrivinfError, code=Code.UNSUPPORTED, exit_code=5):
    """The model needs an operator that has no protocol; the message lists all of them with their module paths."""


class DefectError(PrivinfError, code=Code.DEFECT, exit_code=1):
    """A fault of this program's, in a process whose traceback is not at hand."""


KINDS: dict[Code, type[PrivinfError]] = {
    Code.OTHER: PrivinfError,
    Code.CONFIG: ConfigError,
    Code.TOO_LONG: ConfigError,
    Code.HANDSHAKE: HandshakeError,
    Code.NO_LOGITS: HandshakeError,
    Code.NOT_LISTED: HandshakeError,
    Code.SILENT: HandshakeError,
    Code.REFUSED: RefusedError,
    Code.FULL: RefusedError,
    Code.CLIENT_FULL: RefusedError,
    Code.SERVER_FULL: RefusedError,
    Code.CROWDED: RefusedError,
    Code.REVOKED: RefusedError,
    Code.REQUESTS: RefusedError,
    Code.TOKENS: RefusedError,
    Code.BYTES: RefusedError,
    Code.BUDGET: RefusedError,
    Code.SET_UPS: RefusedError,
    Code.DISK: RefusedError,
    Code.TRANSPORT: TransportError,
    Code.OPENING: OpeningError,
    Code.INTERNAL: TransportError,
    Code.IDLE: TransportError,
    Code.ABSENT: PeerUnreachableError,
    Code.STOPPING: PeerUnreachableError,
    Code.DESYNC: ProtocolDesync,
    Code.RANGE: RangeError,
    Code.CORRELATION: CorrelationError,
    Code.UNSUPPORTED: UnsupportedOpError,
    Code.TEMPLATE: PrivinfError,
    Code.GATEWAY_STOPPING: PrivinfError,
    Code.DEFECT: DefectError,
}
"""The class of each code, where the error is found."""


def broke_off(error: PrivinfError) -> bool:
    """Whether what is wrong is a connection, also where the peer says so that was told nothing for too long: another one may last."""
    return isinstance(error, TransportError) or issubclass(KINDS[error.code], TransportError)


def kind_of(code: Code, heard: Heard = Heard.HERE) -> type[PrivinfError]:
    """The class of an error: a peer can refuse, be out of step with us, or not reach another; whatever else it says, it gives up."""
    own = KINDS[code]
    if heard is Heard.HERE or own is RefusedError:
        return own
    if heard is Heard.OPENING:
        return own if own is PeerUnreachableError else HandshakeError
    return own if own is ProtocolDesync else TransportError
