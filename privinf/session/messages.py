"""The control messages of a session, their order, and the checks of the handshake.

Client and server: Hello, Welcome, Needs(bundle), [bundle], Needs(weights), [masked weights], Session; then a Pass, Step or Run for
each query; End. Where the two are alone (`trust`), Key comes before the second Needs, whose weights are encrypted; where the embedding
alone is encrypted, Key, a third Needs and its encrypted table come after the masked weights. Server and dealer: Register, Seed, then a
Deal for each pass, or, while the one before it is computed, a Prefetch or Further, and then a Prefetched. Client and dealer: Join, Seed,
then a Dealt and the payload for each pass. All of it is public or addressed to its receiver alone; no message depends on a secret.

To prepare a query (`ahead`): Prepare, Mark and Marked between server and dealer, Reseed, Reserved, a Seed to each, the passes' Deals and
Dealts, Kept both ways. To spend one: Spend, Mark and Marked, Chosen, Taken, Mark and Marked, Go.

Where the two are alone, a Draw comes before each pass is made, and a Drawn where it asks for rows of a stock; another Draw where it was
refused. To make a stock: Stock, Reserved, what is made, Kept both ways.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from privinf.lowering.steps import steps
from privinf.transport.endpoint import Endpoint
from privinf.transport.failure import Failure
from privinf.trust import DEALER, ONE_HOT
from privinf.version import PROTOCOL, VERSION
from protocols import correlations
from protocols.errors import Code, HandshakeError

MAX_BUNDLE = 64 * 2**20
MAX_KINDS = 4 * 2**20  # bytes of one pass's list
MAX_HELD = 1024  # prepared queries of one lane
CHUNK = 2**18  # payload bytes of one of the dealer's messages, at least: the client begins with the first

SessionToken = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Seed = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
Digest = Annotated[str, msgspec.Meta(max_length=64)]
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # of a certificate; it becomes part of files' names
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Kinds = Annotated[list[msgspec.Raw], msgspec.Meta(max_length=correlations.MAX_KINDS)]  # `correlations.on_wire`
Held = Annotated[tuple[tuple[Index, SessionToken], ...], msgspec.Meta(max_length=MAX_HELD)]


class Hello(msgspec.Struct, frozen=True):
    """The first message of client and server to each other, and of either to the dealer."""

    protocol: int = PROTOCOL
    version: Annotated[str, msgspec.Meta(max_length=64)] = VERSION


class Welcome(msgspec.Struct, frozen=True):
    """S: its model and what it allows."""

    model: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # sha256 of the public bundle
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_BUNDLE)]
    logits: bool
    trust: Annotated[str, msgspec.Meta(max_length=32)] = DEALER  # who makes the correlations
    embedding: Annotated[str, msgspec.Meta(max_length=32)] = ONE_HOT  # how tokens become rows, with a dealer
    batch: Count = 1  # sequences of one session at a time


class Key(msgspec.Struct, frozen=True):
    """S, where weights are encrypted: under which key, and a digest of each as it sends it, in their order.

    What C has kept under another key, or with another digest, is of no use.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    digests: Annotated[tuple[Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)], ...], msgspec.Meta(max_length=1 << 16)]


class Needs(msgspec.Struct, frozen=True, omit_defaults=True):
    """C: which parts of the set-up it has not kept; with `looks`, in place of the first, that it begins no session."""

    names: Annotated[tuple[str, ...], msgspec.Meta(max_length=1 << 16)]
    looks: bool = False


class _WithToken(msgspec.Struct, frozen=True):
    """The token by which the dealer pairs the two."""

    token: SessionToken

    def __repr__(self) -> str:
        return f"{type(self).__name__}(token hidden)"


class Session(_WithToken, frozen=True):
    """S: the token; without a dealer, that the set-up is done."""


class Pass(msgspec.Struct, frozen=True, tag=True):
    """C: a pass over `count` new positions; the token alone, or rounded logits; without `output` neither: it fills the cache.

    `more`, where the two are alone: one over a single position may follow, with the same output, and is made while this one is computed.
    `every`: rounded logits of every new position, and not of the last alone.
    """

    count: Count
    logits: bool = False
    output: bool = True
    more: bool = False
    every: bool = False

    @property
    def following(self) -> Pass:
        """The pass that may follow one with `more`."""
        return Pass(1, self.logits)

    def same(self, other: Pass) -> bool:
        """Whether the two take the same correlations."""
        return (self.count, self.logits, self.output, self.every) == (other.count, other.logits, other.output, other.every)

    @property
    def outputs(self) -> int:
        """What it reveals something of."""
        return self.count if self.every else int(self.output)


class Step(msgspec.Struct, frozen=True, tag=True):
    """C: a pass over new positions of several sequences, by number: `new` are those that it goes on with and how many are new of each.

    A number that is not cached begins a sequence; those in `ended` are forgotten first. Logits, output and `every` as in a `Pass`, of each.
    """

    new: Annotated[tuple[tuple[Index, Count], ...], msgspec.Meta(min_length=1, max_length=correlations.MAX_SEQUENCES)]
    ended: Annotated[tuple[Index, ...], msgspec.Meta(max_length=correlations.MAX_SEQUENCES)] = ()
    logits: bool = False
    output: bool = True
    every: bool = False

    @property
    def count(self) -> int:
        """New positions of all."""
        return sum(count for _, count in self.new)

    @property
    def outputs(self) -> int:
        """What it reveals something of."""
        return self.count if self.every else len(self.new) if self.output else 0

    @property
    def following(self) -> Step:
        """One more token of each."""
        return Step(tuple([(number, 1) for number, _ in self.new]), (), self.logits)


class Run(msgspec.Struct, frozen=True, tag=True):
    """C: a lowered module's output on C's input."""


class End(msgspec.Struct, frozen=True, tag=True):
    """C: no more queries."""


class Terms(msgspec.Struct, frozen=True):
    """What a query is for: a prompt of `seq` tokens, at most `tokens` new ones, and whether logits are revealed.

    The prompt goes through passes of at most `chunk` positions; 0, and never more than needed: one pass.
    """

    seq: Count
    tokens: Count
    logits: bool = False
    chunk: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0

    @property
    def prefill(self) -> list[Pass]:
        """Those over the prompt; the last alone has an output."""
        return [Pass(count, self.logits and output, output) for count, output in steps(self.seq, 1, self.chunk)]

    @property
    def passes(self) -> list[Pass]:
        """All of them: over the prompt, then one for each new token but the last."""
        return [*self.prefill, *[Pass(1, self.logits)] * (self.tokens - 1)]


class _OfLane(msgspec.Struct, frozen=True):
    """C: what a query is for; its highest spent index of the lane, and the indices and serials that it holds."""

    terms: Terms
    spent: Index
    held: Held


class Prepare(_OfLane, frozen=True, tag=True):
    """C: asks for such a query to be prepared."""


class Reserved(msgspec.Struct, frozen=True):
    """S: the index and the serial that the prepared query will have."""

    index: Index
    serial: SessionToken


class Kept(msgspec.Struct, frozen=True):
    """C, then S: the prepared query is on the disk."""


class Spend(_OfLane, frozen=True, tag=True):
    """C: would use such a prepared query for what follows."""


class Chosen(msgspec.Struct, frozen=True):
    """S: the highest index that any of the three has marked as spent, and the one to be used; 0 for none."""

    spent: Index
    index: Index


class Taken(msgspec.Struct, frozen=True):
    """C: it has marked this index as spent; 0 where it could not."""

    index: Index


class Go(msgspec.Struct, frozen=True):
    """S: whether S and D have marked it too."""

    ok: bool


class Stock(msgspec.Struct, frozen=True, tag=True):
    """C: asks for a stock of rows for so many positions to be made; its highest spent index of the lane, and of a stock that it holds."""

    positions: Count
    spent: Index
    held: Index


class Draw(msgspec.Struct, frozen=True):
    """C: the pass that is made next takes its rows from a stock, from this index on, which C has marked as spent; 0: from none."""

    index: Index = 0
    count: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    serial: SessionToken = bytes(16)


class Drawn(msgspec.Struct, frozen=True):
    """S: whether it has marked them too, the highest index that it has marked, and whether it has that stock at all."""

    ok: bool
    spent: Index
    known: bool = True


class Mark(msgspec.Struct, frozen=True, tag=True):
    """S to D: what S knows to be spent of a lane, and if not 0 the index that is to be spent now."""

    model: Digest
    terms: Terms
    spent: Index
    index: Index = 0
    embedding: Annotated[str, msgspec.Meta(max_length=32)] = ONE_HOT  # as S has it: what was prepared for the one is nothing to the other


class Marked(msgspec.Struct, frozen=True):
    """D: the highest spent index of the lane now; not `ok` where D could not do what was asked."""

    spent: Index
    ok: bool


class Reseed(msgspec.Struct, frozen=True, tag=True):
    """S to D: new seeds for both, for a query that is prepared; D sends each its own."""


class WeightRecord(msgspec.Struct, frozen=True):
    """The public side of a weight, for the dealer's masks."""

    name: Annotated[str, msgspec.Meta(max_length=300)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=1 << 31)], ...], msgspec.Meta(max_length=8)]
    bits: Annotated[int, msgspec.Meta(ge=1, le=64)]
    frac: Annotated[int, msgspec.Meta(ge=0, le=63)]


class Register(msgspec.Struct, frozen=True, tag=True):
    """S to D: a session, the certificate that its client has, and the seed of the weight masks with their public records."""

    token: SessionToken
    client: Fingerprint
    mask_seed: Seed
    weights: Annotated[tuple[WeightRecord, ...], msgspec.Meta(max_length=1 << 16)]

    def __repr__(self) -> str:
        return "Register(seed and token hidden)"


class Join(_WithToken, frozen=True, tag=True):
    """C to D: the session that S told it."""


class SessionSeed(msgspec.Struct, frozen=True):
    """D to each: its own seed for this session."""

    seed: SessionToken

    def __repr__(self) -> str:
        return "SessionSeed(hidden)"


class Deal(msgspec.Struct, frozen=True, tag=True):
    """S to D: the kinds of one pass, in order."""

    kinds: Kinds


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """S to D: the kinds of the pass that will most likely follow; D deals it and keeps what it dealt."""

    kinds: Kinds


class Prefetched(msgspec.Struct, frozen=True, tag=True):
    """S to D: that pass follows. Any other request drops what was dealt for it, of which nobody has seen anything."""


class Further(msgspec.Struct, frozen=True, tag=True):
    """S to D: as Prefetch, of the kinds of the pass that was asked for last, moved on by a position (`protocols.kind_hash.moved_on`)."""


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
        connection.send_error(Failure(Code.HANDSHAKE, message))
        raise HandshakeError(message, party=connection.party, peer=connection.peer_name, remedy="install the same release on all machines")
