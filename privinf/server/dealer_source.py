"""A dealer as S's source of correlations: a session with it, on a link of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import msgspec

from privinf.session.messages import (
    MAX_KINDS,
    Deal,
    End,
    Mark,
    Marked,
    Prefetch,
    Prefetched,
    Register,
    Reseed,
    SessionSeed,
    Terms,
    WeightRecord,
    greet,
)
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.session.waiting import once_for_each_reason
from privinf.transport.connection import Connection
from privinf.transport.frames import CONTROL_LIMIT, FrameKind
from privinf.transport.listener import dial
from protocols.correlations import Kind, Role, on_wire
from protocols.errors import KINDS, Code, PeerUnreachableError, PrivinfError, RefusedError
from protocols.linear import Weight
from protocols.sources.dealer import Store

log = logging.getLogger("privinf.server")


def reach_dealer(service: Service, address: str) -> Connection:
    """A link that the service has adopted; PrivinfError says that it is the server's dealer that cannot be reached."""
    try:
        limits, told = service.options, once_for_each_reason(log.info)
        link = dial(address, service.credentials, "dealer", limits.timeout, connect_s=limits.connect_s, waiting=told)
        try:
            service.adopt(link)
            link.meter.phase = "offline"
            greet(link)
        except BaseException:
            service.retire(link)
            raise
        return link
    except PrivinfError as error:
        where = f"the server cannot reach its dealer at {address}"
        code = error.code if isinstance(error, PeerUnreachableError | RefusedError) else Code.HANDSHAKE
        again, what = error.retry_after, f"{where}: {error.message}"
        wrapped = KINDS[code](what, party="server", peer=f"dealer {address}", remedy=error.remedy, code=code, retry_after=again)
        wrapped.reason, wrapped.fault = what, error.fault
        raise wrapped from None


class DealerSource(ServerSource):
    """See `ServerSource`; announces a client's session. `mask_seed` is that of the weights' masks, which the dealer expands too."""

    def __init__(self, link: Connection, token: bytes, client: str, mask_seed: bytes, weights: Iterable[Weight], device: str) -> None:
        self.link = link
        self._waiting: bytes | None = None  # what is foretold, while C and D may wait for each other
        records = tuple(WeightRecord(w.name, w.shape, w.bits, w.frac) for w in weights)
        link.send_control(Register(token, client, mask_seed, records), 4 * 2**20)
        self.party = Store(Role.SERVER, link.receive_control(SessionSeed).seed, device)
        link.establish()

    def ask(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`."""
        self.link.send_control(Deal(on_wire(kinds)), MAX_KINDS)

    def prefetch(self, kinds: Sequence[Kind]) -> None:
        """The sooner D has it the better; but what does not fit the sockets' buffers waits while C and D may wait for each other."""
        self._waiting = msgspec.msgpack.encode(Prefetch(on_wire(kinds)))
        if len(self._waiting) <= CONTROL_LIMIT:
            self.flush()

    def flush(self) -> None:
        """See `ServerSource`."""
        if self._waiting is not None:
            self.link.send(self._waiting, FrameKind.CONTROL)
            self._waiting = None

    def ask_prefetched(self) -> None:
        """See `ServerSource`."""
        self.link.send_control(Prefetched())

    def reseed(self) -> bytes:
        """See `ServerSource`; C is sent a seed of its own."""
        self.link.send_control(Reseed())
        return self.link.receive_control(SessionSeed).seed

    def mark(self, model: str, terms: Terms, spent: int, index: int = 0) -> Marked:
        """See `ServerSource`: on the dealer's disk."""
        self.link.send_control(Mark(model, terms, spent, index))
        return self.link.receive_control(Marked)

    def end(self) -> None:
        """See `ServerSource`."""
        self.link.send_control(End())
