"""A dealer as C's source of correlations: a link of its own, on which its shares arrive pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from privinf.client.payload import Payload
from privinf.session.messages import Dealt, Join, SessionSeed, greet
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection
from protocols.correlations import Role
from protocols.errors import ProtocolDesync
from protocols.sources.base import PartySource
from protocols.sources.dealer import Store


class DealerSource(ClientSource):
    """See `ClientSource`; joins the session that the server has announced under this token. `peer`: what the server is called in errors."""

    def __init__(self, link: Connection, token: bytes, device: str, peer: str) -> None:
        self.link, self._peer = link, peer
        link.meter.phase = "offline"
        greet(link)
        link.send_control(Join(token))
        self.party = Store(Role.CLIENT, link.receive_control(SessionSeed).seed, device)
        link.establish()

    @contextmanager
    def making(self, party: PartySource, progress: Callable[[float], None]) -> Iterator[None]:
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
