"""A dealer as S's source of correlations: a session with it, on a link of its own."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from privinf.lowering.encrypted import Sealing
from privinf.lowering.joint import tables_alone
from privinf.lowering.lowered import Lowered
from privinf.server.models import ServedModel, masked_sizes
from privinf.server.sealed import SealedSetUp
from privinf.server.supply import Supply
from privinf.session.blame import as_told
from privinf.session.messages import (
    MAX_KINDS,
    Deal,
    End,
    Further,
    Mark,
    Marked,
    Needs,
    Pass,
    Prefetch,
    Prefetched,
    Register,
    Reseed,
    Session,
    SessionSeed,
    Step,
    Terms,
    WeightRecord,
    greet,
)
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.session.waiting import once_for_each_reason
from privinf.transport.connection import Connection
from privinf.transport.frames import CONTROL_LIMIT, FrameKind
from privinf.transport.hint import hint_of
from privinf.transport.listener import dial
from privinf.trust import DEALER, ENCRYPTED, ONE_HOT
from protocols.correlations import Kind, Role, on_wire
from protocols.errors import KINDS, Code, PeerUnreachableError, PrivinfError, RefusedError
from protocols.linear import Weight
from protocols.sources.dealer import Store

log = logging.getLogger("privinf.server")
LOOK_S = 3.0
"""How long a look at the dealer may take."""


def reach_dealer(service: Service, address: str, token: bytes) -> Connection:
    """A link for this session that the service has adopted; PrivinfError says that it is the server's dealer that cannot be reached."""
    try:
        limits, told = service.options, once_for_each_reason(log.info)
        link = dial(address, service.credentials, "dealer", limits.timeout, connect_s=limits.connect_s, waiting=told, hint=hint_of(token))
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


class DealerSupply(Supply):
    """Set-up sends the masked weights, and an encrypted embedding's table; a session is announced to the dealer, then to the client."""

    trust = DEALER

    def __init__(self, service: Service, dealer: str | None) -> None:
        super().__init__(service, dealer)
        self._sealed = SealedSetUp(service) if service.options.embedded == ENCRYPTED else None

    def missing(self) -> str:
        """See `Supply`: the dealer answers, be it that it is full for the moment, and this server's certificate is one that it takes."""
        assert self.dealer is not None
        try:
            with contextlib.closing(dial(self.dealer, self.service.credentials, "dealer", LOOK_S, connect_s=0.5)) as link:
                greet(link)
                link.send_control(End())
        except PrivinfError as error:
            full = error.retry_after is not None
            return "" if full else f"the dealer at {self.dealer} cannot be reached: {error.message}"
        return ""

    def set_up_bytes(self, lowered: Lowered) -> dict[str, int]:
        """See `Supply`."""
        return self._masked(lowered) | (Sealing.tables(lowered).sizes if self._sealed else {})

    def _masked(self, lowered: Lowered) -> dict[str, int]:
        """Bytes of each weight that is sent masked."""
        needless = Sealing.needless(lowered) if self._sealed else frozenset()
        return {name: size for name, size in masked_sizes(lowered).items() if name not in needless}

    def set_up(self, model: ServedModel, connection: Connection) -> None:
        """See `Supply`: the masked weights, one message each, and then what is encrypted."""
        names, turns = connection.receive_control(Needs, MAX_KINDS).names, self.service.turns
        self.wanted(model, connection, names, self._masked(model.lowered))
        with turns.turn(connection.peer_fingerprint):
            for name in names:
                data = model.masked(name)
                connection.meter.label = model.labels[name]
                with turns.between(connection.peer_fingerprint):
                    connection.send(data)
        connection.meter.label = ("", "")
        if self._sealed is not None:
            sealing = Sealing.tables(model.lowered)
            self._sealed.send(model, sealing, connection, lambda names: self.wanted(model, connection, names, sealing.sizes))

    @contextmanager
    def session(self, model: ServedModel, connection: Connection) -> Iterator[ServerSource]:
        """See `Supply`."""
        service, token = self.service, secrets.token_bytes(16)
        assert self.dealer is not None, "a server without a dealer has another supply"
        link = reach_dealer(service, self.dealer, token)
        try:
            masked, client = self._masked(model.lowered), connection.peer_fingerprint
            weights = [weight for name, weight in model.weights.items() if name in masked]
            source = DealerSource(link, token, client, model.mask_seed, weights, service.options.device, service.options.embedded)
            if self._sealed is not None:
                source.tables = tables_alone(Role.SERVER, Sealing.tables(model.lowered).opened(model.mask_seed, model.encoded))
            connection.send_control(Session(token))
            connection.establish()
            yield source
        except Exception as error:
            for each in (connection, link):  # the client before the dealer, whose end it would take for the cause
                service.tell(each, as_told(error, service.role))
            raise
        finally:
            service.retire(link)


class DealerSource(ServerSource):
    """See `ServerSource`; announces a client's session. `mask_seed` is that of the weights' masks, which the dealer expands too."""

    fills = True

    def __init__(
        self,
        link: Connection,
        token: bytes,
        client: str,
        mask_seed: bytes,
        weights: Iterable[Weight],
        device: str,
        embedding: str = ONE_HOT,
    ) -> None:
        self.link, self._embedding = link, embedding
        self._waiting: bytes | None = None  # what is foretold, while C and D may wait for each other
        records = tuple(WeightRecord(w.name, w.shape, w.bits, w.frac) for w in weights)
        link.send_control(Register(token, client, mask_seed, records), 4 * 2**20)
        self.party = Store(Role.SERVER, link.receive_control(SessionSeed).seed, device)
        link.establish()

    def ask(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`."""
        self.link.send_control(Deal(on_wire(kinds)), MAX_KINDS)

    def make(self, kinds: Sequence[Kind]) -> None:
        """See `ServerSource`: the dealer makes it."""
        self.party.begin_pass(kinds)

    def follows(self, request: Pass | Step) -> Pass | Step | None:
        """See `ServerSource`: after a token most likely another one, of each; what was dealt in vain costs the dealer alone."""
        if isinstance(request, Step):
            return request.following if request.output and any(count == 1 for _, count in request.new) else None
        return request if request.count == 1 and request.output else None

    def prefetch(self, kinds: Sequence[Kind], *, further: bool = False) -> None:
        """The sooner D has it the better; but what does not fit the sockets' buffers waits while C and D may wait for each other."""
        self._waiting = msgspec.msgpack.encode(Further() if further else Prefetch(on_wire(kinds)))
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
        self.link.send_control(Mark(model, terms, spent, index, self._embedding))
        return self.link.receive_control(Marked)

    def end(self) -> None:
        """See `ServerSource`."""
        self.link.send_control(End())
