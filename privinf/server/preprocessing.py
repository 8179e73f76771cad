"""Queries prepared ahead of time: the server's end of the two exchanges, which `privinf.client.preprocessing` describes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager

from privinf.session.marks import Lane
from privinf.session.messages import (
    Chosen,
    Go,
    Kept,
    Marked,
    Prepare,
    Reserved,
    Spend,
    Taken,
    Terms,
)
from privinf.session.options import Options
from privinf.session.pool import Pool, PoolLane
from privinf.session.prepared import Header, Prepared
from privinf.session.source import ServerSource
from privinf.transport.connection import Connection
from protocols.correlations import Role
from protocols.errors import ConfigError, HandshakeError
from protocols.party import Trace

log = logging.getLogger("privinf")


Pieces = tuple[Trace, Iterator[bytes | memoryview], Iterator[memoryview]]
"""Of a pass: what it needs, what of it is kept here, and then what the client sends ahead of it."""


class Preprocessing:
    """The prepared queries of one session."""

    def __init__(self, options: Options, model: str, fingerprint: str, connection: Connection, source: ServerSource) -> None:
        self._options, self._connection, self._source = options, connection, source
        self._parties = model, connection.peer_fingerprint, fingerprint
        self._pool = Pool(options.cache, Role.SERVER)
        self.prepares = False
        """Whether it has prepared a query."""

    def _open(self, terms: Terms) -> AbstractContextManager[PoolLane]:
        """The lane of these terms, see `Pool.open`."""
        return self._pool.open(self._lane(terms), self._options.timeout, self._connection.peer_until)

    def _lane(self, terms: Terms) -> Lane:
        return Lane(*self._parties, terms, self._options.trusted, self._options.embedded)

    def _marked(self, terms: Terms, spent: int, index: int = 0) -> Marked:
        return self._source.mark(self._parties[0], terms, spent, index)

    def prepare(self, request: Prepare, dealt: Iterator[Pieces]) -> None:
        """Prepares one query, whose passes are dealt as this asks for them.

        HandshakeError where this server keeps no more, or its disk or the dealer refuses.
        """
        self.prepares = True
        try:
            self._prepare(request, dealt)
        except ConfigError as error:  # the client is told that, and not where on our disk
            log.warning("a query cannot be prepared for client %s: %s", self._connection.peer_name, error)
            what, remedy = "the server cannot keep a prepared query", "look at the server's output"
            raise HandshakeError(what, party="server", remedy=remedy) from error

    def _prepare(self, request: Prepare, dealt: Iterator[Pieces]) -> None:
        connection, terms = self._connection, request.terms
        connection.meter.phase = "offline"
        with self._open(terms) as shelf:
            spent = shelf.raise_to(request.spent)
        marked = self._marked(terms, spent)
        if not marked.ok:
            raise HandshakeError("the dealer cannot keep what is spent", party="server", remedy="look at the dealer's output")
        with self._open(terms) as shelf:
            self._make_room(shelf, request)
            index = shelf.reserve(max(marked.spent, *(index for index, _ in request.held), 0))
        serial, seed = secrets.token_bytes(16), self._source.reseed()
        connection.send_control(Reserved(index, serial))
        lane = self._lane(terms)
        with self._pool.writer(lane, Header(Role.SERVER, lane.name(Role.SERVER), index, serial, seed, lane.trust)) as writer:
            for trace, kept, early in dealt:
                sizes = []
                for piece in kept:
                    writer.write(piece)
                for data in early:
                    writer.write(data)
                    sizes.append(len(data))
                writer.end_pass(trace.kinds, sizes)
                self._check_room(writer.size)
            writer.seal()
            connection.receive_control(Kept)
            with self._open(terms) as shelf:
                shelf.add(writer.part, writer.header.index)
        connection.send_control(Kept())

    def _check_room(self, new: int) -> None:
        options = self._options
        count, size = self._pool.kept(self._connection.peer_fingerprint)
        if count >= options.keep_queries or size + new > options.keep_bytes:
            what = f"this server keeps at most {options.keep_queries} prepared queries and {options.keep_bytes} bytes of them for a client"
            raise HandshakeError(what, party="server", remedy="use what is prepared first")

    def _make_room(self, shelf: PoolLane, request: Prepare) -> None:
        """Where no room is left, prepared queries of this lane that the client has lost make some."""
        try:
            self._check_room(0)
        except HandshakeError:
            theirs = set(request.held)
            for pair in shelf.held().items():
                if pair not in theirs:
                    shelf.discard(pair[0])
            self._check_room(0)

    def spend(self, request: Spend) -> Prepared | None:
        """Chooses a prepared query, and marks it as spent here and at D once C has; None where there is none."""
        connection, terms = self._connection, request.terms
        prepared: Prepared | None = None
        connection.meter.phase = "offline"
        highest = request.spent
        if not self._pool.holds(self._lane(terms)):
            connection.send_control(Chosen(highest, 0))
            return None
        try:
            with self._open(terms) as shelf:
                highest = max(highest, shelf.spent)
            marked = self._marked(terms, highest)
            highest = max(highest, marked.spent)
            with self._open(terms) as shelf:
                shelf.clear(highest)
                if marked.ok:
                    prepared = next(_candidates(shelf, request, highest), None)
        except ConfigError as error:
            log.warning("a prepared query of client %s cannot be used: %s", connection.peer_name, error)
            prepared = None
        connection.send_control(Chosen(highest, prepared.header.index if prepared else 0))
        if prepared is None or connection.receive_control(Taken).index != prepared.header.index:
            return None
        done = False
        try:
            with self._open(terms) as shelf:
                done = shelf.spend(prepared.header.index)
        except ConfigError as error:
            log.warning("a prepared query of client %s cannot be used: %s", connection.peer_name, error)
        done = done and self._marked(terms, highest, prepared.header.index).ok
        connection.send_control(Go(done))
        return prepared if done else None


def _candidates(shelf: PoolLane, request: Spend, spent: int) -> Iterator[Prepared]:
    ours = shelf.held()
    for index, serial in sorted(request.held):
        if index > spent and ours.get(index) == serial and (prepared := shelf.load(index)) is not None:
            yield prepared
