"""Handshake and set-up: how the client comes to a session with a server and its dealer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from privinf.client.dealer_source import DealerSource
from privinf.client.lines import Lines
from privinf.client.setup import ClientStore, parts_of, receive_bundle, receive_part
from privinf.client.tokenizer import settle
from privinf.graph.private import Runtime, weights_of
from privinf.lowering.lowered import Lowered
from privinf.session.blame import sane
from privinf.session.messages import MAX_KINDS, Needs, Session, Welcome, greet
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection
from protocols import kernels
from protocols.correlations import Role
from protocols.errors import HandshakeError
from protocols.linear import Weight
from protocols.party import Party
from protocols.ring import unpack


@dataclass(frozen=True, repr=False)
class Joined:
    """What a session begins with; `setup_s` are the seconds that it took."""

    connection: Connection
    source: ClientSource
    lowered: Lowered
    gives_logits: bool
    runtime: Runtime
    setup_s: float


def join(lines: Lines, connect_s: float | None = None) -> Joined:
    """Handshake, set-up and the dealer; tries for `connect_s` seconds to reach the server, by default as the options say."""
    began, peers, options = time.perf_counter(), lines.peers, lines.peers.options
    kernels.start(options.cache / "kernels")
    connection = lines.dial("server", options.connect_s if connect_s is None else connect_s)
    connection.meter.phase = "setup"
    with sane(HandshakeError, "the server's public bundle makes no sense", party="client", peer=peers.server):
        welcome, lowered = _model(lines, connection)
        _set_up(lines, connection, lowered)
        party = Party(Role.CLIENT, None, lines.masked)
        party.on_label = lambda label: setattr(connection.meter, "label", label)
        runtime = Runtime.of(lowered.graph, party, options.device)
        token = connection.receive_control(Session).token
    connection.establish()
    link = lines.dial("dealer", options.connect_s)
    source = DealerSource(link, token, options.device, peers.named)
    return Joined(connection, source, lowered, welcome.logits, runtime, time.perf_counter() - began)


def _model(lines: Lines, connection: Connection) -> tuple[Welcome, Lowered]:
    """Compares versions and models; the model's bundle, kept or fetched, with the tokenizer that this client uses."""
    peers = lines.peers
    greet(connection)
    welcome = connection.receive_control(Welcome)
    expect, model = peers.options.expect, welcome.model
    if expect and expect != model:
        what, remedy = f"the server has the model {model!r}, not the expected {expect!r}", "compare with what `privinf serve` prints"
        raise HandshakeError(what, party="client", peer=peers.named, remedy=remedy)
    lowered = receive_bundle(connection, welcome, ClientStore(peers.options.cache), peers.named)
    settle(lowered, peers.tokenizer, peers.options.expect_tokenizer, peers.named)
    return welcome, lowered


def _set_up(lines: Lines, connection: Connection, lowered: Lowered) -> None:
    """Takes the masked weights from the cache, and from the server what is not kept."""
    peers, model = lines.peers, lowered.id
    store, parts = ClientStore(peers.options.cache), parts_of(lowered, peers.named)

    def take(name: str, data: bytes | memoryview | None) -> bool:
        """Takes a masked weight that has been checked, if there is one."""
        if data is not None:
            weight: Weight = parts[name][0]
            lines.masked[name] = unpack(memoryview(data), weight.shape, weight.bits).to(peers.options.device)
        return data is not None

    missing = [name for name, (_, item) in parts.items() if not take(name, store.load(model, name, item))]
    store.sweep(model)
    connection.send_control(Needs(tuple(missing)), MAX_KINDS)
    connection.max_frame = 64 * 2**20
    nodes = {name: node for name, (_, node, _) in weights_of(lowered.graph).items()}
    for done, name in enumerate(missing):
        connection.meter.label = nodes[name].label
        data = receive_part(connection, name, parts[name][1], peers.named)
        store.keep(model, parts[name][1], data)
        take(name, data)
        peers.progress("set-up", (done + 1) / len(missing))
    connection.meter.label = ("", "")
