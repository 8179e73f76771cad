"""Queries prepared ahead of time: the client's end of the two exchanges.

*Prepare*: C names what it holds, S has D take note of what is spent, hands out an index, and has D make new seeds. The passes of
the query follow as they would online, but that no query is there: S asks D for each pass, C computes and records its part, S records
what C sends ahead. C's file gets its name first, then S's.

*Spend*: C and S each say the highest index that they know to be spent, D answers the maximum of the three, and S chooses the
lowest index above it of which both have the file. C marks it as spent, then S, then D, each on its disk; only then is it used. Whoever
is cut off in between has lost that index and no other, and no state that a party is put back to makes the others use one again.

C holds its lane's lock during an exchange, so that processes which share a cache do not choose the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privinf.client.joining import Joined
from privinf.client.lines import Peers
from privinf.graph.private import Runtime
from privinf.session.marks import Lane
from privinf.session.messages import (
    MAX_HELD,
    Chosen,
    Go,
    Kept,
    Pass,
    Prepare,
    Reserved,
    Run,
    Spend,
    Taken,
    Terms,
)
from privinf.session.pool import Pool, PoolLane
from privinf.session.prepared import Header, Prepared, Writer
from protocols.correlations import Role
from protocols.errors import ConfigError, ProtocolDesync
from protocols.party import Party
from protocols.sources.base import PartySource

log = logging.getLogger("privinf")
Walk = Callable[[Pass | Run, Runtime, PartySource, list[Tensor], Callable[[float], None]], object]
"""What a session does offline for a pass: the request, its runtime, where correlations go, inputs on shapes, who is told the share done."""


@dataclass(frozen=True)
class Shelf:
    """What whoever keeps a lane's files knows of it: the highest spent index, and index and serial of each query that may be used."""

    spent: int
    held: tuple[tuple[int, bytes], ...]


def told(lane: Lane, index: int, size: int) -> dict[str, Any]:
    """What is said of a prepared query."""
    terms = lane.terms
    lengths = {"seq": terms.seq, "max_new_tokens": terms.tokens, "chunk": terms.chunk}
    return {**lengths, "logits": terms.logits, "index": index, "bytes": size}


@dataclass(frozen=True, repr=False)
class Shelves:
    """Where the queries lie that are prepared for sessions with one server; outlives the session in which it was found."""

    pool: Pool
    model: str
    client: str
    server: str
    trust: str
    embedding: str

    @classmethod
    def of(cls, peers: Peers, found: Joined) -> Shelves:
        """By the certificates and the model of a session."""
        ends = peers.credentials.fingerprint, found.connection.peer_fingerprint
        return cls(Pool(peers.options.cache, Role.CLIENT), found.lowered.id, *ends, found.trust, found.embedding)

    def lane(self, terms: Terms) -> Lane:
        """Where queries of these terms lie."""
        return Lane(self.model, self.client, self.server, terms, self.trust, self.embedding)

    def have(self, terms: Terms) -> bool:
        """Whether there is one that will do, as far as a look tells: another process may take it."""
        return any(self.pool.any_of(lane) for lane in self.pool.lanes(self.lane(terms)))


class Preprocessing:
    """The prepared queries of one session."""

    def __init__(self, peers: Peers, found: Joined) -> None:
        self._peers, self._found = peers, found
        self.shelves = Shelves.of(peers, found)
        self._pool = self.shelves.pool

    def _open(self, lane: Lane) -> AbstractContextManager[PoolLane]:
        """A lane of this session's, see `Pool.open`."""
        return self._pool.open(lane, self._peers.options.timeout, self._found.connection.peer_until)

    def lane(self, terms: Terms) -> Lane:
        """Where queries of these terms lie."""
        return self.shelves.lane(terms)

    def prepare(self, terms: Terms, walk: Walk) -> dict[str, Any]:
        """Prepares one query; {`seq`, `max_new_tokens`, `chunk`, `logits`, `index`, `bytes` on this party's disk}."""
        lane = self.lane(terms)
        with self._open(lane) as shelf:
            reserved = self._reserve(lane, shelf.spent, shelf.held())
        with self._written(self._pool, lane, reserved, walk) as writer, self._open(lane) as shelf:
            shelf.add(writer.part, writer.header.index)
            try:
                self._agree()
            except BaseException:
                shelf.discard(reserved.index)  # the server has none
                raise
        return told(lane, reserved.index, writer.size)

    @contextlib.contextmanager
    def for_another(self, terms: Terms, walk: Walk, shelf: Shelf, scratch: Path) -> Iterator[Writer]:
        """Prepares one whose file another process keeps, in a lane as it is on `shelf`; that must have been done at the end of the block.

        The file is in `scratch` until then, without a name.
        """
        lane = self.lane(terms)
        reserved = self._reserve(lane, shelf.spent, dict(shelf.held))
        with self._written(Pool(scratch, Role.CLIENT), lane, reserved, walk) as writer:
            yield writer
            self._agree()

    def _reserve(self, lane: Lane, spent: int, held: dict[int, bytes]) -> Reserved:
        """Tells S what is spent and held here, and is told the new query's index."""
        connection = self._found.connection
        connection.meter.phase = "offline"
        if len(held) >= MAX_HELD:
            what = f"{MAX_HELD} queries are prepared for these lengths already"
            raise ConfigError(what, remedy="use them first, or `privinf cache rm`")
        connection.send_control(Prepare(lane.terms, spent, tuple(held.items())))
        reserved = connection.receive_control(Reserved)
        if reserved.index <= max(spent, *held, 0):
            raise ProtocolDesync("the server hands out an index that is in use", party="client", peer=self._peers.named)
        return reserved

    @contextlib.contextmanager
    def _written(self, pool: Pool, lane: Lane, reserved: Reserved, walk: Walk) -> Iterator[Writer]:
        """The whole file, which has no name yet."""
        source = self._found.source
        header = Header(Role.CLIENT, lane.name(Role.CLIENT), reserved.index, reserved.serial, source.reseed(), lane.trust)
        with pool.writer(lane, header) as writer:
            self._record(lane.terms, source.recorder(writer), walk)
            writer.seal()
            yield writer

    def _agree(self) -> None:
        """This party's file has its name; now S's gets it."""
        self._found.connection.send_control(Kept())
        self._found.connection.receive_control(Kept)

    def _record(self, terms: Terms, store: PartySource, walk: Walk) -> None:
        """Computes and records this party's part of every pass, from an empty context on."""
        weights, passes = self._found.runtime.party.weights, terms.passes
        party = Party(Role.CLIENT)
        party.tables = self._found.source.tables
        sketch = Runtime.of(self._found.lowered.graph, party, self._peers.options.device, fills=self._found.runtime.fills)
        for done, request in enumerate(passes):

            def progress(share: float, done: int = done) -> None:
                self._peers.progress("prepare", (done + share) / len(passes))

            sketch = sketch.sketch(Party(Role.CLIENT, None, weights))
            walk(request, sketch, store, [torch.empty((1, request.count), dtype=torch.int64, device="meta")], progress)
            store.end_pass()

    def spend(self, terms: Terms) -> Prepared | None:
        """A prepared query that fits, spent at all three parties; None where there is none, and then the dealer deals as ever."""
        for lane in self._pool.lanes(self.lane(terms)):
            self._found.connection.meter.phase = "offline"
            try:
                with self._open(lane) as shelf:
                    found = self._spend(shelf)
            except ConfigError as error:
                log.warning("going on without prepared queries: %s", error)
                return None
            if found is not None:
                return found
        return None

    def _spend(self, shelf: PoolLane) -> Prepared | None:
        connection = self._found.connection
        while held := shelf.held():
            request = Spend(shelf.lane.terms, shelf.spent, tuple(held.items()))
            connection.send_control(request)
            chosen = connection.receive_control(Chosen)
            shelf.clear(chosen.spent)
            if not chosen.index:
                return None
            if chosen.index not in held or chosen.index <= max(chosen.spent, request.spent):
                raise ProtocolDesync("the server chose an index that is spent", party="client", peer=self._peers.named)
            prepared, taken, refused = shelf.load(chosen.index), 0, ""
            try:
                if prepared is not None and shelf.spend(chosen.index):
                    taken = chosen.index
            except ConfigError as error:
                refused = str(error)
            connection.send_control(Taken(taken))
            if taken:
                return prepared if connection.receive_control(Go).ok else None
            if refused:
                log.warning("going on without prepared queries: %s", refused)
                return None
        return None
