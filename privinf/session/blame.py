"""What one party tells another when it gives up, and how nonsense that a peer sent becomes an error of ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from privinf.transport.connection import Connection
from privinf.transport.frames import ABSENT, DESYNC, REFUSED
from protocols.errors import (
    ConfigError,
    PeerUnreachableError,
    PrivinfError,
    ProtocolDesync,
    RangeError,
    RefusedError,
    TransportError,
)

TELL_S = 1.0
"""The longest that a farewell may take: its receiver is perhaps the one that hangs."""
_RELAYED = ("the peer gave up: ", "the peer refused: ")
_FLAGS: dict[type[PrivinfError], int] = {ProtocolDesync: DESYNC, RefusedError: REFUSED, PeerUnreachableError: ABSENT}
AGAIN = "come again later"
"""In a refusal that will not last; `again_after` reads it."""
_AGAIN = re.compile(rf"{AGAIN}(?:, in (\d+) s)?")
NONSENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What comes of walking a graph, or reading a message, that passed every check and makes no sense."""


def reason_for(connection: Connection, error: PrivinfError) -> str:
    """The error in one line for this peer: where it concerns another peer it says which, and a relayed reason is not wrapped twice."""
    message = error.message
    while prefix := next((p for p in _RELAYED if message.startswith(p)), ""):
        message = message.removeprefix(prefix)
    about = error.peer
    if about in ("", f"{connection.peer_role} {connection.peer_name}", connection.peer_name) or message != error.message:
        return message
    if about.rpartition(" ")[2] in message:
        return message
    return message.replace("the peer", about, 1) if "the peer" in message else f"{about}: {message}"


def as_told(error: Exception, party: str) -> PrivinfError:
    """What peers are told of it: nothing about a fault of our own but that it is one."""
    return error if isinstance(error, PrivinfError) else TransportError(f"internal error at the {party}", party=party)


def farewell(connection: Connection, error: BaseException | None) -> None:
    """Tells a peer why we give up. Nothing about a wrong input or a value out of range, which are nobody's business but their owner's."""
    if isinstance(error, PrivinfError) and not isinstance(error, ConfigError | RangeError):
        connection.timeout = min(connection.timeout, TELL_S)
        with contextlib.suppress(PrivinfError):  # it may have gone already, which may be the error itself
            connection.send_error(reason_for(connection, error), _FLAGS.get(type(error), 0))


def again_after(error: BaseException, otherwise: int) -> int | None:
    """The seconds after which a party that refused may be asked again, `otherwise` where it does not say; None for any other error."""
    found = _AGAIN.search(error.message) if isinstance(error, PrivinfError) else None
    return None if found is None else int(found[1] or otherwise)


@contextlib.contextmanager
def sane(kind: type[PrivinfError], message: str, *, party: str, peer: str = "") -> Iterator[None]:
    """Turns whatever a peer's nonsense leads to within into an error of ours."""
    try:
        yield
    except NONSENSE as error:
        what = f"{message} ({type(error).__name__})"
        raise kind(what, party=party, peer=peer, remedy="install the same release on all machines") from error
