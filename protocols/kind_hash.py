"""A digest of what two parties asked for."""

from __future__ import annotations

import hashlib

import msgspec

from protocols.correlations import Kind


class KindHash:
    """A running digest of the kinds asked for, so that two parties can tell that they asked for the same."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, kind: Kind) -> None:
        """Adds a kind."""
        self._hash.update(msgspec.msgpack.encode(kind))

    def digest(self) -> bytes:
        """Of all so far."""
        return self._hash.digest()
