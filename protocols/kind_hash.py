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


def moved_on(kinds: Sequence[Kind], first: int) -> list[Kind] | None:
    """The kinds of the pass after this one, if it does the same, a position further; None where these do not tell.

    `first` is the name of this pass's first correlation. What names others of its own pass names those of the next; a cache's rows, by
    name, are one more, this pass's own; what a kind replaces is what it left itself. Whether the next pass does the same, and what an
    operator keeps goes by these rules, is for whoever walks to find out. `relative` makes the same of both.
    """
    found, count = [], len(kinds)
    for place, kind in enumerate(kinds):
        fields: dict[str, Any] = {}
        for field in kind.refers:
            name = getattr(kind, field)
            if isinstance(name, tuple):
                if min(name) >= first:
                    fields[field] = tuple([each + count for each in name])
                elif name[-1] >= first and max(name[:-1]) < first:
                    fields[field] = (*name, name[-1] + count)
                else:
                    return None
            elif name >= first:
                fields[field] = name + count
            elif name:
                if kind.replaces() != (name,):
                    return None
                fields[field] = first + place
        for field in kind.moves:
            if places := getattr(kind, field):
                fields[field] = tuple([each + 1 for each in places])
        found.append(msgspec.structs.replace(kind, **fields) if fields else kind)
    return found


def hangs_on_position(kind: Kind, first: int) -> bool:
    """Whether it names what earlier passes left, or says which positions: what `moved_on` does not only give other names of the pass."""
    names = [getattr(kind, field) for field in kind.refers]
    earlier = any(min(name) < first if isinstance(name, tuple) else 0 < name < first for name in names)
    return earlier or any(getattr(kind, field) for field in kind.moves)


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
