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

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from privinf.session.messages import (
    MAX_HELD,
    Chosen,
    Go,
    Kept,
    Prepare,
    Reserved,
    SessionSeed,
    Spend,
    Taken,
    Terms,
)
from privinf.session.pool import PoolLane
from privinf.session.prepared import Header, Prepared, Recorder
from protocols.correlations import Role
from protocols.errors import ConfigError, ProtocolDesync
from protocols.party import Party

if TYPE_CHECKING:
    from privinf.client.session import ClientSession

log = logging.getLogger("privinf")


def _request(kind: type[Prepare] | type[Spend], shelf: PoolLane, held: dict[int, bytes]) -> Prepare | Spend:
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


def _spend(session: ClientSession, shelf: PoolLane) -> Prepared | None:
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
