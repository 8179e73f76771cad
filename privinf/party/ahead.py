"""Queries prepared ahead of time: both ends of the two exchanges, one beside the other.

*Prepare*: C names what it holds, S has D take note of what is spent, hands out an index, and has D make new seeds. The passes of
the query follow as they would online, but that no query is there: S asks D for each pass, C computes and records its part, S records
what C sends ahead. C's file gets its name first, then S's.

*Spend*: C and S each say the highest index that they know to be spent, D answers the maximum of the three, and S chooses the
lowest index above it of which both have the file. C marks it as spent, then S, then D, each on its disk; only then is it used. Whoever
is cut off in between has lost that index and no other, and no state that a party is put back to makes the others use one again.

C holds its lane's lock during an exchange, so that processes which share a cache do not choose the same.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from privinf.party.marks import Lane
from privinf.party.messages import (
    MAX_HELD,
    Chosen,
    Go,
    Kept,
    Mark,
    Marked,
    Prepare,
    Reseed,
    Reserved,
    SessionSeed,
    Spend,
    Taken,
    Terms,
)
from privinf.party.prepared import Header, Prepared, Recorder
from privinf.party.stock import Shelf
from protocols.correlations import Role
from protocols.errors import ConfigError, HandshakeError, ProtocolDesync
from protocols.party import Party

if TYPE_CHECKING:
    from privinf.party.server import ServerSession
    from privinf.party.session import ClientSession

log = logging.getLogger("privinf")


# ---- the client


def _request(kind: type[Prepare] | type[Spend], shelf: Shelf, held: dict[int, bytes]) -> Prepare | Spend:
    return kind(shelf.lane.terms, shelf.spent, tuple(held.items()))


def prepare_at_client(session: ClientSession, terms: Terms) -> dict[str, Any]:
    """Prepares one query; {`seq`, `max_new_tokens`, `chunk`, `logits`, `index`, `bytes` on this party's disk}."""
    connection, link = session.connection, session.link
    assert link is not None
    lane = session.lane(terms)
    connection.meter.phase = "offline"
    with session.shelf(lane) as shelf:
        held = shelf.held()
        if len(held) >= MAX_HELD:
            raise ConfigError(f"{MAX_HELD} queries are prepared for these lengths already", remedy="use them first, or `privinf cache rm`")
        connection.send_control(_request(Prepare, shelf, held))
        reserved = connection.receive_control(Reserved)
        if reserved.index <= max(shelf.spent, *held, 0):
            raise ProtocolDesync("the server hands out an index that is in use", party="client", peer=f"server {session.client.server}")
    seed = link.receive_control(SessionSeed).seed
    header = Header(Role.CLIENT, lane.name(Role.CLIENT), reserved.index, reserved.serial, seed)
    with session.stock.writer(lane, header) as writer:
        store = Recorder(writer, session.options.device)
        sketch = session.fresh_runtime()
        passes = terms.passes
        for done, request in enumerate(passes):
            sketch = sketch.sketch(Party(Role.CLIENT, None, session.runtime.party.weights))
            inputs = [torch.empty((1, request.count), dtype=torch.int64, device="meta")]
            session.walk_offline(request, sketch, store, inputs, partial(_progress, session, done, len(passes)))
            store.end_pass()
        writer.seal()
        with session.shelf(lane) as shelf:
            shelf.add(writer)
            try:
                connection.send_control(Kept())
                connection.receive_control(Kept)
            except BaseException:
                shelf.discard(reserved.index)  # the server has none
                raise
    lengths = {"seq": terms.seq, "max_new_tokens": terms.tokens, "chunk": terms.chunk}
    return {**lengths, "logits": terms.logits, "index": reserved.index, "bytes": writer.size}


def _progress(session: ClientSession, done: int, passes: int, share: float) -> None:
    session.progress("prepare", (done + share) / passes)


def spend_at_client(session: ClientSession, terms: Terms) -> Prepared | None:
    """A prepared query that fits, spent at all three parties; None where there is none, and then the dealer deals as ever."""
    for lane in session.lanes(terms):
        session.connection.meter.phase = "offline"
        try:
            with session.shelf(lane) as shelf:
                found = _spend(session, shelf)
        except ConfigError as error:
            log.warning("going on without prepared queries: %s", error)
            return None
        if found is not None:
            return found
    return None


def _spend(session: ClientSession, shelf: Shelf) -> Prepared | None:
    connection = session.connection
    while held := shelf.held():
        request = _request(Spend, shelf, held)
        connection.send_control(request)
        chosen = connection.receive_control(Chosen)
        shelf.clear(chosen.spent)
        if not chosen.index:
            return None
        if chosen.index not in held or chosen.index <= max(chosen.spent, request.spent):
            raise ProtocolDesync("the server chose an index that is spent", party="client", peer=f"server {session.client.server}")
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


# ---- the server


def _lane(session: ServerSession, terms: Terms) -> Lane:
    server = session.server
    return Lane(server.lowered.id, session.connection.peer_fingerprint, server.fingerprint, terms)


def _marked(session: ServerSession, terms: Terms, spent: int, index: int = 0) -> Marked:
    session.link.send_control(Mark(session.server.lowered.id, terms, spent, index))
    return session.link.receive_control(Marked)


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
    session.link.send_control(Reseed())
    serial, seed = secrets.token_bytes(16), session.link.receive_control(SessionSeed).seed
    connection.send_control(Reserved(index, serial))
    header = Header(Role.SERVER, lane.name(Role.SERVER), index, serial, seed)
    with stock.writer(lane, header) as writer:
        sketch, first = session.fresh_runtime(), 1
        for each in terms.passes:
            sketch, trace = session.ask_dealer(each, sketch, first)
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


def _make_room(session: ServerSession, shelf: Shelf, request: Prepare) -> None:
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


def _candidates(shelf: Shelf, request: Spend, spent: int) -> Iterator[Prepared]:
    ours = shelf.held()
    for index, serial in sorted(request.held):
        if index > spent and ours.get(index) == serial and (prepared := shelf.load(index)) is not None:
            yield prepared


# ---- the dealer


def mark_at_dealer(shelf: Shelf, request: Mark) -> Marked:
    """What D answers, and keeps; ConfigError where its disk refuses."""
    if not request.index:
        return Marked(shelf.raise_to(request.spent), True)
    ok = request.index > request.spent and shelf.spend(request.index)
    return Marked(max(shelf.spent, request.spent), ok)
