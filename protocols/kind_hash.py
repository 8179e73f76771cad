"""A digest of what two parties asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from protocols.correlations import Kind, parts_of


def relative(kind: Kind, first: int) -> Kind:
    """The same in a pass whose first correlation has the name 1, and which begins at position 0.

    What an earlier pass left is then called 0, as nothing is. So two passes of one shape have the same kinds, whenever they take place and
    whatever was kept before them.
    """
    fields: dict[str, Any] = {}
    for field in kind.refers:
        name = getattr(kind, field)
        if isinstance(name, tuple):
            found = [each - first + 1 for each in name if each >= first]
            fields[field] = (0, *found) if len(found) < len(name) else tuple(found)
        else:
            fields[field] = max(0, name - first + 1)
    for field in kind.moves:
        if places := getattr(kind, field):
            fields[field] = tuple([place - places[0] for place in places])
    return msgspec.structs.replace(kind, **fields) if fields else kind


def way(kinds: Sequence[Kind]) -> tuple[tuple[type[Kind], int, int, int], ...]:
    """Which way a walk goes that asks for these: which kinds, of how many parts each, whatever their sizes."""
    each = [(type(kind), parts_of(kind)) for kind in kinds]
    return tuple([(kind, len(parts.server), len(parts.client), len(parts.shared)) for kind, parts in each])


class KindHash:
    """A running digest of the kinds asked for, so that two parties can tell that they asked for the same."""

    def __init__(self, first: int = 1) -> None:
        self._hash, self._first = hashlib.sha256(), first

    def update(self, kind: Kind) -> None:
        """Adds a kind, as it is in a pass that begins with the first name."""
        self._hash.update(msgspec.msgpack.encode(relative(kind, self._first)))

    def digest(self) -> bytes:
        """Of all so far."""
        return self._hash.digest()


class KnownHash:
    """The digest of a pass whose kinds were added before."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def digest(self) -> bytes:
        """See `KindHash`."""
        return self._digest
