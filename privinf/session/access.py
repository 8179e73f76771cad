"""One line in the log on each session that is over: who, how much, how long, how it ended. Sizes, which are public, and no content."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

from privinf.transport.connection import Connection
from protocols.errors import PeerUnreachableError, RefusedError

SHORT = 12
"""Hex digits of a fingerprint that a line shows."""


class Tally(Counter[str]):
    """What a session was, in numbers: `prompt tokens`, `new tokens` and the like."""

    def __str__(self) -> str:
        return ", ".join(f"{number} {what}" for what, number in self.items() if number) or "nothing asked for"


def name_of(connection: Connection) -> str:
    """`client alice (0123456789ab) at 127.0.0.1:4242`"""
    subject = "".join(char for char in connection.peer_subject if char.isprintable())[:64]
    named = f" {subject.removeprefix(f'privinf {connection.peer_role}').strip()}".rstrip()
    return f"{connection.peer_role}{named} ({connection.peer_fingerprint[:SHORT]}) at {connection.peer_name}"


@contextlib.contextmanager
def one_line(say: Callable[[str], None], who: str, *connections: Callable[[], Connection | None]) -> Iterator[Tally]:
    """Says it once the block is left.

    The bytes are the payload of all these connections: those follow from public shapes, where what the socket counts holds
    heartbeats too, and with them the time.
    """
    began, tally, end = time.monotonic(), Tally(), "broke off"
    try:
        yield tally
        end = "done"
    except RefusedError:
        end = "refused"
        raise
    except PeerUnreachableError:
        end = "stopped"
        raise
    finally:
        totals = [connection.meter.total() for find in connections if (connection := find()) is not None]
        moved = sum(total.payload_sent + total.payload_received for total in totals)
        say(f"{who}: {tally}, {moved} bytes, {time.monotonic() - began:.2f} s, {end}")
