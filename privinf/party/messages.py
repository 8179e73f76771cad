"""The control messages of a session, their order, and the checks of the handshake.

Client and server: Hello, Welcome, Needs(bundle), [bundle], Needs(weights), [masked weights], Session; then a Pass or Run for
each query; End. Server and dealer: Register, Seed, then a Deal for each pass. Client and dealer: Join, Seed, then a Dealt
and the payload for each pass. All of it is public or addressed to its receiver alone; no message depends on a secret.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from privinf.transport.endpoint import Endpoint
from privinf.version import PROTOCOL, VERSION
from protocols.errors import HandshakeError

MAX_BUNDLE = 64 * 2**20
MAX_KINDS = 16 * 2**20  # bytes of one pass's list
CHUNK = 2**20  # payload bytes of one of the dealer's messages, at least

Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Seed = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
Digest = Annotated[str, msgspec.Meta(max_length=64)]


class Hello(msgspec.Struct, frozen=True):
    """The first message of client and server to each other, and of either to the dealer."""

    protocol: int = PROTOCOL
    version: Annotated[str, msgspec.Meta(max_length=64)] = VERSION


class Welcome(msgspec.Struct, frozen=True):
    """S: its model and what it allows."""

    model: Digest
    bundle: Digest  # sha256 of the public bundle
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BUNDLE)]
    logits: bool


class Needs(msgspec.Struct, frozen=True):
    """C: which parts of the set-up it has not kept."""

    names: Annotated[tuple[str, ...], msgspec.Meta(max_length=1 << 16)]


class Session(msgspec.Struct, frozen=True):
    """S: the token by which the dealer pairs the two."""

    token: Token

    def __repr__(self) -> str:
        return "Session(token hidden)"


class Pass(msgspec.Struct, frozen=True, tag=True):
    """C: a pass over `count` new positions; the token alone, or rounded logits."""

    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    logits: bool = False


class Run(msgspec.Struct, frozen=True, tag=True):
    """C: a lowered module's output on C's input."""


class End(msgspec.Struct, frozen=True, tag=True):
    """C: no more queries."""


class WeightRecord(msgspec.Struct, frozen=True):
    """The public side of a weight, for the dealer's masks."""

    name: Annotated[str, msgspec.Meta(max_length=300)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=1 << 31)], ...], msgspec.Meta(max_length=8)]
    bits: Annotated[int, msgspec.Meta(ge=1, le=64)]
    frac: Annotated[int, msgspec.Meta(ge=0, le=63)]


class Register(msgspec.Struct, frozen=True, tag=True):
    """S to D: a session, the certificate that its client has, and the seed of the weight masks with their public records."""

    token: Token
    client: Digest
    mask_seed: Seed
    weights: Annotated[tuple[WeightRecord, ...], msgspec.Meta(max_length=1 << 16)]

    def __repr__(self) -> str:
        return "Register(seed and token hidden)"


class Join(msgspec.Struct, frozen=True, tag=True):
    """C to D: the session that S told it."""

    token: Token

    def __repr__(self) -> str:
        return "Join(token hidden)"


class SessionSeed(msgspec.Struct, frozen=True):
    """D to each: its own seed for this session."""

    seed: Token

    def __repr__(self) -> str:
        return "SessionSeed(hidden)"


class Deal(msgspec.Struct, frozen=True, tag=True):
    """S to D: the kinds of one pass, in order."""

    kinds: Annotated[list[list[Any]], msgspec.Meta(max_length=1 << 20)]


class Dealt(msgspec.Struct, frozen=True):
    """D to C: a digest of the kinds of one pass; their payload follows."""

    digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


def greet(connection: Endpoint) -> None:
    """Both ends say their versions at once and compare; HandshakeError names the difference."""
    connection.send_control(Hello())
    theirs = connection.receive_control(Hello)
    if theirs.protocol != PROTOCOL:
        message = f"protocol versions differ: {theirs.protocol} (privinf {theirs.version}) there, {PROTOCOL} (privinf {VERSION}) here"
        connection.send_error(message)
        raise HandshakeError(message, party=connection.party, peer=connection.peer_name, remedy="install the same release on all machines")
