"""Queries prepared ahead of time: the server's end of the two exchanges, which `privinf.client.preprocessing` describes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
from privinf.session.pool import PoolLane
from privinf.session.prepared import Header, Prepared
from protocols.correlations import Role
from protocols.errors import ConfigError, HandshakeError

if TYPE_CHECKING:
    from privinf.server.server import ServerSession

log = logging.getLogger("privinf")


def _lane(session: ServerSession, terms: Terms) -> Lane:
    server = session.server
    return Lane(server.lowered.id, session.connection.peer_fingerprint, server.fingerprint, terms)


def _marked(session: ServerSession, terms: Terms, spent: int, index: int = 0) -> Marked:
    return session.source.mark(session.server.lowered.id, terms, spent, index)


def prepare_at_server(session: ServerSession, request: Prepare) -> None:
    """Prepares one query; HandshakeError where this server keeps no more, or its disk or the dealer refuses."""
    try:
        _prepare(session, request)
    except ConfigError as error:  # the client is told that, and not where on our disk
        log.warning("a query cannot be prepared for client %s: %s", session.connection.peer_name, error)
        raise HandshakeError("the server cannot keep a prepared query", party="server", remedy="look at the server's output") from error


def _prepare(session: ServerSession, request: Prepare) -> None:
    server, connection, terms = session.server, session.connection, request.terms
    stock, lane = server.stock, _lane(session, terms)
    connection.meter.phase = "offline"
    with session.shelf(lane) as shelf:
        spent = shelf.raise_to(request.spent)
    marked = _marked(session, terms, spent)
    if not marked.ok:
        raise HandshakeError("the dealer cannot keep what is spent", party="server", remedy="look at the dealer's output")
    with session.shelf(lane) as shelf:
        _make_room(session, shelf, request)
        index = shelf.reserve(max(marked.spent, *(index for index, _ in request.held), 0))
    serial, seed = secrets.token_bytes(16), session.source.reseed()
    connection.send_control(Reserved(index, serial))
    header = Header(Role.SERVER, lane.name(Role.SERVER), index, serial, seed)
    with stock.writer(lane, header) as writer:
        sketch, first = session.fresh_runtime(), 1
        for each in terms.passes:
            sketch, trace = session.ask(each, sketch, first)
            first += len(trace.kinds)
            sizes = []
            for data in session.receive_early(trace):
                writer.write(data)
                sizes.append(len(data))
            writer.end_pass(trace.kinds, sizes)
            _check_room(session, writer.size)
        writer.seal()
        connection.receive_control(Kept)
        with session.shelf(lane) as shelf:
            shelf.add(writer)
    connection.send_control(Kept())


def _check_room(session: ServerSession, new: int) -> None:
    options = session.server.options
    count, size = session.server.stock.kept(session.connection.peer_fingerprint)
    if count >= options.keep_queries or size + new > options.keep_bytes:
        what = f"this server keeps at most {options.keep_queries} prepared queries and {options.keep_bytes} bytes of them for a client"
        raise HandshakeError(what, party="server", remedy="use what is prepared first")


def _make_room(session: ServerSession, shelf: PoolLane, request: Prepare) -> None:
    """Where no room is left, prepared queries of this lane that the client has lost make some."""
    try:
        _check_room(session, 0)
    except HandshakeError:
        theirs = set(request.held)
        for pair in shelf.held().items():
            if pair not in theirs:
                shelf.discard(pair[0])
        _check_room(session, 0)


def spend_at_server(session: ServerSession, request: Spend) -> Prepared | None:
    """Chooses a prepared query, and marks it as spent here and at D once C has; None where there is none."""
    connection, lane = session.connection, _lane(session, request.terms)
    prepared: Prepared | None = None
    connection.meter.phase = "offline"
    highest = request.spent
    if not session.server.stock.holds(lane):
        connection.send_control(Chosen(highest, 0))
        return None
    try:
        with session.shelf(lane) as shelf:
            highest = max(highest, shelf.spent)
        marked = _marked(session, request.terms, highest)
        highest = max(highest, marked.spent)
        with session.shelf(lane) as shelf:
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
        with session.shelf(lane) as shelf:
            done = shelf.spend(prepared.header.index)
    except ConfigError as error:
        log.warning("a prepared query of client %s cannot be used: %s", connection.peer_name, error)
    done = done and _marked(session, request.terms, highest, prepared.header.index).ok
    connection.send_control(Go(done))
    return prepared if done else None


def _candidates(shelf: PoolLane, request: Spend, spent: int) -> Iterator[Prepared]:
    ours = shelf.held()
    for index, serial in sorted(request.held):
        if index > spent and ours.get(index) == serial and (prepared := shelf.load(index)) is not None:
            yield prepared
