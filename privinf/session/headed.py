"""Files of correlations begin alike: a magic line, the length of the header (4 bytes), the header (msgpack)."""

from __future__ import annotations

from typing import BinaryIO, Protocol, TypeVar

import msgspec

from privinf.version import VERSION


class Damaged(Exception):
    """A file that is not a whole one of its kind and of this release; the text says why."""


class Versioned(Protocol):
    """A header, which says of which release it is."""

    @property
    def version(self) -> str:
        """The release that wrote it."""


H = TypeVar("H", bound=Versioned)


def headed(magic: bytes, header: Versioned) -> bytes:
    """The beginning of a file."""
    encoded = msgspec.msgpack.encode(header)
    return magic + len(encoded).to_bytes(4, "big") + encoded


def read_headed(file: BinaryIO, magic: bytes, kind: type[H], most: int, what: str) -> tuple[H, int]:
    """The header, of at most so many bytes, and where the rest begins; Damaged for a file that is no such thing as `what` says."""
    fixed = len(magic) + 4
    start = file.read(fixed)
    length = int.from_bytes(start[len(magic) :], "big")
    if len(start) < fixed or not start.startswith(magic) or length > most:
        raise Damaged(f"it is no {what}")
    try:
        header = msgspec.msgpack.decode(file.read(length), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Damaged("it is damaged") from None
    if header.version != VERSION:
        raise Damaged(f"it is of release {header.version[:64]!r}, not {VERSION}")
    return header, fixed + length
