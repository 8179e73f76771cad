"""A hint by which two connections that belong together reach the same process, where several listen behind one address.

Who dials puts it into the first words of TLS, as the name of an application protocol (ALPN), which no peer of ours chooses among: so
whoever accepts may read it before it knows who will serve the connection. It is a digest of the session's token, which the peers get
encrypted, and opens nothing. Who listens on the wire learns by it which connections belong to one session, as their times tell it too.
"""

from __future__ import annotations

import hashlib
import struct

PREFIX = b"privinf/"
HELLO = 8192
"""Bytes of first words that are looked at; more has no hint."""
_RECORD, _HELLO, _ALPN = 22, 1, 16


def hint_of(token: bytes) -> str:
    """Of a session, from its token: 32 hexadecimal digits."""
    return hashlib.sha256(b"privinf session\0" + token).hexdigest()[:32]


def read_hint(data: bytes) -> str | None:
    """What the first words of a connection hint at: empty where there is none, or these are no words of TLS; None: more is to come."""
    if len(data) < 5:
        return None if not data or data[0] == _RECORD else ""
    size = 5 + int.from_bytes(data[3:5])
    if data[0] != _RECORD or size > HELLO:
        return ""
    if len(data) < size:
        return None
    try:
        return _read(data[5:size])
    except (struct.error, IndexError, UnicodeDecodeError):
        return ""


def _read(hello: bytes) -> str:
    """From a ClientHello (RFC 8446, 4.1.2)."""
    if hello[0] != _HELLO:
        return ""
    at = 4 + 2 + 32  # its header, version and random
    at += 1 + hello[at]
    at += 2 + struct.unpack_from(">H", hello, at)[0]
    at += 1 + hello[at]
    at, end = at + 2, at + 2 + struct.unpack_from(">H", hello, at)[0]
    while at + 4 <= min(end, len(hello)):
        kind, size = struct.unpack_from(">HH", hello, at)
        if kind == _ALPN:
            name = hello[at + 7 : at + 7 + hello[at + 6]]
            text = name.removeprefix(PREFIX).decode("ascii")
            return text if name.startswith(PREFIX) and len(text) == 32 else ""
        at += 4 + size
    return ""
