"""What one party tells another when it gives up, and how nonsense that a peer sent becomes an error of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from privinf.transport.connection import Connection
from privinf.transport.failure import Failure
from protocols.errors import Code, ConfigError, PrivinfError, RangeError, TransportError

TELL_S = 1.0
"""The longest that a farewell may take: its receiver is perhaps the one that hangs."""
NONSENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What comes of walking a graph, or reading a message, that passed every check and makes no sense."""


def failure_for(connection: Connection, error: PrivinfError) -> Failure:
    """The error as this peer is told of it: where it concerns another peer it says which, and a relayed reason stays as it was heard."""
    about = error.peer
    if about in (f"{connection.peer_role} {connection.peer_name}", connection.peer_name):
        about = ""
    text = error.reason or error.message
    if about and not error.reason:
        text = text.replace("the peer", about, 1) if "the peer" in text else f"{about}: {text}"
    return Failure(error.code, text, about=error.fault if about and error.fault else about, retry=error.retry_after)


def as_told(error: Exception, party: str) -> PrivinfError:
    """What peers are told of it: nothing about a fault of our own but that it is one."""
    return error if isinstance(error, PrivinfError) else TransportError(f"internal error at the {party}", party=party, code=Code.INTERNAL)


def farewell(connection: Connection, error: BaseException | None) -> None:
    """Tells a peer why we give up. Nothing about a wrong input or a value out of range, which are nobody's business but their owner's."""
    if isinstance(error, PrivinfError) and not isinstance(error, ConfigError | RangeError):
        connection.timeout = min(connection.timeout, TELL_S)
        with contextlib.suppress(PrivinfError):  # it may have gone already, which may be the error itself
            connection.send_error(failure_for(connection, error))


@contextlib.contextmanager
def sane(kind: type[PrivinfError], message: str, *, party: str, peer: str = "") -> Iterator[None]:
    """Turns whatever a peer's nonsense leads to within into an error of ours."""
    try:
        yield
    except NONSENSE as error:
        what = f"{message} ({type(error).__name__})"
        raise kind(what, party=party, peer=peer, remedy="install the same release on all machines") from error
