"""Files of correlations begin alike: a magic line, the length of the header (4 bytes), the header (msgpack)."""

from __future__ import annotations

from typing import Annotated, BinaryIO, TypeVar

import msgspec

from privinf.session.messages import Index, SessionToken
from privinf.version import VERSION


class Damaged(Exception):
    """A file that is not a whole one of its kind and of this release; the text says why."""


class Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """Of which release a file is."""

    version: Annotated[str, msgspec.Meta(max_length=64)] = VERSION


class Placed(Versioned, frozen=True):
    """And whose it is. `serial` is the same in both parties' files of one prepared query or stock."""

    role: Annotated[str, msgspec.Meta(max_length=16)]
    lane: Annotated[str, msgspec.Meta(max_length=200)]
    index: Index
    serial: SessionToken


H = TypeVar("H", bound=Placed)


def headed(magic: bytes, header: Placed) -> bytes:
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
