"""Handshake and set-up: how the client comes to a session with a server, and to its source of correlations."""

from __future__ import annotations

import time
from dataclasses import dataclass

from privinf.client.dealer_source import DealerSupply
from privinf.client.lines import Lines
from privinf.client.setup import ClientStore, receive_bundle
from privinf.client.supply import Supply
from privinf.client.tokenizer import settle
from privinf.client.two_party_source import TwoPartySupply
from privinf.graph.private import Runtime
from privinf.lowering.lowered import Lowered
from privinf.session.blame import sane
from privinf.session.messages import Session, Welcome, greet
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection
from privinf.transport.frames import MAX_FRAME
from privinf.trust import DEALER, EMBEDDINGS
from protocols import kernels
from protocols.correlations import Role
from protocols.errors import HandshakeError
from protocols.party import Party

SUPPLIES: dict[str, type[Supply]] = {supply.trust: supply for supply in (DealerSupply, TwoPartySupply)}
"""By trust model."""


@dataclass(frozen=True, repr=False)
class Joined:
    """What a session begins with; `setup_s` are the seconds that it took."""

    connection: Connection
    source: ClientSource
    lowered: Lowered
    trust: str
    embedding: str
    gives_logits: bool
    runtime: Runtime
    setup_s: float
    batch: int = 1


def join(lines: Lines, connect_s: float | None = None) -> Joined:
    """Handshake, set-up and the source; tries for `connect_s` seconds to reach the server, by default as the options say."""
    began, peers, options = time.perf_counter(), lines.peers, lines.peers.options
    kernels.start(options.cache / "kernels")
    connection = lines.dial("server", options.connect_s if connect_s is None else connect_s)
    connection.meter.phase = "setup"
    with sane(HandshakeError, "the server's public bundle makes no sense", party="client", peer=peers.server):
        welcome, lowered = _model(lines, connection)
        connection.max_frame = MAX_FRAME
        supply = SUPPLIES[welcome.trust](lines, connection, lowered, welcome.embedding)
        supply.set_up()
        party = Party(Role.CLIENT, None, lines.masked)
        party.on_label = lambda label: setattr(connection.meter, "label", label)
        token = connection.receive_control(Session).token
    connection.establish()
    source = supply.source(token)
    runtime = Runtime.of(lowered.graph, party, options.device, fills=lowered.info.n_positions if source.fills else 0)
    party.tables = source.tables
    took = time.perf_counter() - began
    return Joined(connection, source, lowered, welcome.trust, welcome.embedding, welcome.logits, runtime, took, welcome.batch)


def _model(lines: Lines, connection: Connection) -> tuple[Welcome, Lowered]:
    """Compares versions and models; the model's bundle, kept or fetched, with the tokenizer that this client uses."""
    peers = lines.peers
    greet(connection)
    welcome = connection.receive_control(Welcome)
    expect, model = peers.options.expect, welcome.model
    if expect and expect != model:
        what, remedy = f"the server has the model {model!r}, not the expected {expect!r}", "compare with what `privinf serve` prints"
        raise HandshakeError(what, party="client", peer=peers.named, remedy=remedy)
    _agree(lines, welcome.trust, welcome.embedding)
    lowered = receive_bundle(connection, welcome, ClientStore(peers.options.cache), peers.named)
    settle(lowered, peers.tokenizer, peers.options.expect_tokenizer, peers.named)
    return welcome, lowered


def _agree(lines: Lines, trust: str, embedding: str) -> None:
    """HandshakeError unless the server's trust model is one that this client would have, and knows; and it knows its embedding."""
    peers = lines.peers
    if peers.options.trust not in (None, trust):
        what, remedy = (
            f"the server has the trust model {trust!r}, not the expected {peers.options.trust!r}",
            "start both with the same --trust",
        )
    elif trust not in SUPPLIES:
        what, remedy = (
            f"the server has the trust model {trust!r}, which is none of this release",
            "install the same release on all machines",
        )
    elif embedding not in EMBEDDINGS:
        what, remedy = (
            f"the server has the embedding {embedding!r}, which is none of this release",
            "install the same release on all machines",
        )
    elif trust == DEALER and peers.dealer is None:
        what, remedy = "the server takes its correlations from a dealer, and none was given", "give --dealer HOST:PORT"
    else:
        return
    raise HandshakeError(what, party="client", peer=peers.named, remedy=remedy)
