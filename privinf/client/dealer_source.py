"""A dealer as C's source of correlations: a link of its own, on which its shares arrive pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from privinf.client.payload import Payload
from privinf.client.sealed import receive_sealed
from privinf.client.setup import ClientStore, parts_of, receive_part
from privinf.client.supply import Supply
from privinf.files import check_room
from privinf.graph.private import weights_of
from privinf.lowering.encrypted import Sealing
from privinf.lowering.joint import tables_alone
from privinf.session.messages import MAX_KINDS, Dealt, Join, Needs, SessionSeed, greet
from privinf.session.prepared import Recorder, Writer
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection
from privinf.transport.hint import hint_of
from privinf.trust import DEALER, ENCRYPTED
from protocols.correlations import Kind, Role
from protocols.errors import ProtocolDesync
from protocols.linear import Weight
from protocols.ring import unpack
from protocols.sources.base import PartySource
from protocols.sources.dealer import Store


class DealerSupply(Supply):
    """Set-up brings the masked weights, and an encrypted embedding's table; the session with the dealer is the one that S has announced."""

    trust = DEALER

    def set_up(self) -> None:
        """See `Supply`."""
        lines, connection, lowered = self.lines, self.connection, self.lowered
        peers, model = lines.peers, lowered.id
        store, needless = ClientStore(peers.options.cache), Sealing.needless(lowered) if self.embedding == ENCRYPTED else frozenset()
        parts = {name: part for name, part in parts_of(lowered, peers.named).items() if name not in needless}

        def take(name: str, data: bytes | memoryview | None) -> bool:
            """Takes a masked weight that has been checked, if there is one."""
            if data is not None:
                weight: Weight = parts[name][0]
                lines.masked[name] = unpack(memoryview(data), weight.shape, weight.bits).to(peers.options.device, weight.dtype)
            return data is not None

        missing = [name for name, (_, item) in parts.items() if not take(name, store.load(model, name, item))]
        store.sweep(model)
        check_room(peers.options.cache, sum(parts[name][1].size for name in missing))
        connection.send_control(Needs(tuple(missing)), MAX_KINDS)
        nodes = {name: node for name, (_, node, _) in weights_of(lowered.graph).items()}
        for done, name in enumerate(missing):
            connection.meter.label = nodes[name].label
            data = receive_part(connection, name, parts[name][1], peers.named)
            store.keep(model, parts[name][1], data)
            take(name, data)
            peers.progress("set-up", (done + 1) / len(missing))
        connection.meter.label = ("", "")
        lines.share(model)
        if self.embedding == ENCRYPTED:
            lines.tables |= receive_sealed(lines, connection, lowered, Sealing.tables(lowered))

    def source(self, token: bytes) -> ClientSource:
        """See `Supply`."""
        peers = self.lines.peers
        link = self.lines.dial("dealer", peers.options.connect_s, hint_of(token))
        source = DealerSource(link, token, peers.options.device, peers.named)
        if self.embedding == ENCRYPTED:
            source.tables = tables = tables_alone(Role.CLIENT, self.lines.tables)
            tables.spend = self.lines.spend
        return source


class DealerSource(ClientSource):
    """See `ClientSource`; joins the session that the server has announced under this token. `peer`: what the server is called in errors."""

    fills = True

    def __init__(self, link: Connection, token: bytes, device: str, peer: str) -> None:
        self.link: Connection = link
        self._peer = peer
        link.meter.phase = "offline"
        greet(link)
        link.send_control(Join(token))
        self.party = Store(Role.CLIENT, link.receive_control(SessionSeed).seed, device)
        link.establish()

    @contextmanager
    def making(self, party: PartySource, kinds: Callable[[], Sequence[Kind]], progress: Callable[[float], None]) -> Iterator[None]:
        """What the dealer sends of a pass is read while the pass is walked; ProtocolDesync if it dealt other kinds than were asked for."""
        assert isinstance(party, Store)
        dealt = self.link.receive_control(Dealt)
        feed = Payload(self.link, dealt.size, progress)
        party.begin_pass(fetch=feed.take)
        yield

        if party.asked.digest() != dealt.digest or feed.left:
            remedy = "install the same release on all machines"
            raise ProtocolDesync("client and server ask for different correlations", party="client", peer=self._peer, remedy=remedy)

    def reseed(self) -> bytes:
        """See `ClientSource`."""
        return self.link.receive_control(SessionSeed).seed

    def recorder(self, writer: Writer) -> PartySource:
        """See `ClientSource`."""
        return Recorder(writer, self.party.device)
