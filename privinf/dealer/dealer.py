"""The dealer: a process of its own that hands out correlations and sees no weight, no prompt and no opened value.

It learns the public shapes of what is asked for, and the seed of the weight masks. It is trusted only not to collude.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from privinf.dealer.making import Dealing, Maker
from privinf.session.access import SHORT, Tally, name_of, one_line
from privinf.session.blame import as_told
from privinf.session.board import Board
from privinf.session.devices import walking
from privinf.session.marks import Lane
from privinf.session.messages import (
    CHUNK,
    MAX_KINDS,
    Deal,
    Dealt,
    End,
    Further,
    Join,
    Mark,
    Marked,
    Prefetch,
    Prefetched,
    Register,
    Reseed,
    SessionSeed,
    greet,
)
from privinf.session.options import Options
from privinf.session.pool import Pool, PoolLane
from privinf.session.service import Service
from privinf.transport.connection import Connection
from privinf.transport.frames import MAX_FRAME
from privinf.transport.handing import Handed
from privinf.transport.hint import hint_of
from protocols import kinds as _kinds  # noqa: F401  (makes every kind known)
from protocols.correlations import from_wire
from protocols.errors import ConfigError, HandshakeError, OpeningError, ProtocolDesync
from protocols.kind_hash import KindHash
from protocols.linear import Weight
from protocols.prg import new_seed
from protocols.sources.dealer import ELEMENT

log = logging.getLogger("privinf.dealer")
MAX_CONTROL = 4 * 2**20
MOST_PREFETCHED = 64 * 2**20  # bytes of a pass that are kept before it is asked for; a larger one is dealt then


@dataclass
class _Session:
    client: str  # fingerprint
    seed: bytes = field(repr=False)
    joined: threading.Event = field(default_factory=threading.Event)  # it has its seed
    connection: Connection | None = None  # the client's, once it has shown the token
    tally: Tally = field(default_factory=Tally)


@dataclass
class _Prefetch:
    """A pass that was dealt before it was asked for; nobody has seen anything of it."""

    first: int  # the name of its first correlation
    correlations: int
    head: Dealt
    payload: Iterable[bytearray] = field(repr=False)  # of a large one nothing yet


class DealerService(Service):
    """`DealerService(listen="0.0.0.0:7001", keys="keys/").start()`; also a context manager."""

    role = "dealer"
    late = frozenset({"client"})

    def __init__(self, *, listen: str | Handed, keys: str, options: Options | None = None, board: Board | None = None) -> None:
        super().__init__(listen=listen, keys=keys, allowed_roles={"server", "client"}, options=options or Options(), board=board)
        self._sessions: dict[bytes, _Session] = {}
        self._maker = Maker(self.options.device, self.options.memory)
        self._pool = Pool(self.options.cache, self.role)
        self._lock = threading.Lock()

    def handle(self, connection: Connection) -> None:
        """One party's connection. The server's thread serves the session; the client's only joins it."""
        connection.meter.phase = "offline"
        greet(connection)
        if connection.peer_role == "server":
            request = connection.receive_control(Register | End, MAX_CONTROL)
            if isinstance(request, Register):  # else it only looked whether we are here
                self._serve(connection, request)
        else:
            joining = connection.receive_control(Join | End)
            if isinstance(joining, Join):  # likewise
                self._join(connection, joining)

    def _join(self, connection: Connection, join: Join) -> None:
        with self._lock:
            session = self._sessions.get(join.token)
            if session is None or session.connection is not None or session.client != connection.peer_fingerprint:
                message = "no server has announced this session for your certificate, or it has ended it"
                raise OpeningError(message, party="dealer")  # a server that waited for too long has ended it: another may do
            self.hand_over(connection)  # from now on the server's thread tells it of a failure, and closes it
            session.connection = connection
        try:
            connection.timeout = self.options.timeout
            connection.send_control(SessionSeed(session.seed))
            connection.establish()
        finally:
            session.joined.set()

    def _serve(self, connection: Connection, register: Register) -> None:
        connection.timeout = self.options.timeout
        weights = tuple(Weight(w.name, w.shape, w.bits, w.frac) for w in register.weights)
        size = sum(math.prod(w.shape) for w in weights) * ELEMENT
        if size > self.options.memory:
            what = f"the masks of the model's weights take {size} bytes, and a session may hold {self.options.memory} at this dealer"
            raise HandshakeError(what, party="dealer", remedy="start the dealer with a larger --memory")
        server_seed, session = new_seed(), _Session(register.client, new_seed())
        with self._lock:
            if register.token in self._sessions:
                raise HandshakeError("this session token is in use", party="dealer")
            self._sessions[register.token] = session
        if self.board is not None:
            self.board.named(hint_of(register.token))
        try:
            connection.send_control(SessionSeed(server_seed))
            connection.establish()
            connection.timeout = self.options.idle + self.options.timeout  # longer than a server's, which says so to its client
            who = f"{name_of(connection)} for the client {session.client[:SHORT]}"
            told = one_line(self.say_of_a_session, who, lambda: connection, lambda: session.connection)
            with told as session.tally, contextlib.ExitStack() as stack:

                def made(server: bytes, client: bytes) -> Dealing:
                    """For the seeds of a query; it ends with the session, or as another begins."""
                    stack.close()
                    dealer = self.dealing(session.client, server, client, register.mask_seed, weights)
                    stack.callback(dealer.end)
                    return dealer

                self._deal(connection, session, made, server_seed)
        except Exception as error:
            if session.connection is not None:
                self.tell(session.connection, as_told(error, self.role))
            raise
        finally:
            with self._lock:
                del self._sessions[register.token]
            if session.connection is not None:
                self.retire(session.connection)

    def _deal(self, connection: Connection, session: _Session, made: Callable[[bytes, bytes], Dealing], server_seed: bytes) -> None:
        dealer: Dealing | None = None  # made when it is first needed: a query that was prepared needs none
        prefetched: _Prefetch | None = None
        head = Dealt(bytes(32), 0)  # of the pass that was asked for last
        while True:
            request = connection.receive_control(Deal | Prefetch | Further | Prefetched | Reseed | Mark | End, MAX_KINDS)
            if isinstance(request, End):
                self.leave(connection)
                return
            if not session.joined.wait(self.options.timeout):
                raise OpeningError("the client did not join its session in time", party="dealer")
            client = session.connection
            assert client is not None
            if isinstance(request, Mark):
                connection.send_control(self._mark(connection, client, request))
                continue
            if isinstance(request, Prefetched):
                if prefetched is None:
                    raise ProtocolDesync("a pass is asked for as prefetched, and none was", party="dealer")
                self._send(session, client, prefetched.head, prefetched.payload, prefetched.correlations)
                prefetched = None
                continue
            if prefetched is not None and dealer is not None:
                dealer.rewind(prefetched.first)
                prefetched = None
            if isinstance(request, Reseed):
                server_seed, session.seed, dealer = new_seed(), new_seed(), None
                connection.send_control(SessionSeed(server_seed))
                client.send_control(SessionSeed(session.seed))
                continue
            dealer = dealer or made(server_seed, session.seed)
            first = dealer.next_name
            if isinstance(request, Further):
                count, dealt = dealer.deal_further()  # of the same digest and size as the pass before it
            else:
                count = len(request.kinds)
                head, dealt = self._read(dealer, request)
            payload: Iterable[bytearray] = self._messages(dealt)
            if isinstance(request, Prefetch | Further):
                if head.size <= MOST_PREFETCHED:
                    with self.turns.turn(session.client):
                        payload = list(payload)
                prefetched = _Prefetch(first, count, head, payload)
            else:
                self._send(session, client, head, payload, count)

    def dealing(self, client: str, server_seed: bytes, client_seed: bytes, mask_seed: bytes, weights: tuple[Weight, ...]) -> Dealing:
        """What deals for a query of this client."""
        return self._maker.dealer(server_seed, client_seed, mask_seed, weights)

    def _mark(self, server: Connection, client: Connection, request: Mark) -> Marked:
        """Keeps what is spent of the prepared queries of this pair of certificates, both of which are here."""
        lane = Lane(request.model, client.peer_fingerprint, server.peer_fingerprint, request.terms, embedding=request.embedding)
        try:
            with self._pool.open(lane, self.options.timeout, min(server.peer_until, client.peer_until)) as shelf:
                return _marked(shelf, request)
        except ConfigError as error:
            log.warning("what is spent of a client's prepared queries cannot be kept: %s", error)
            return Marked(request.spent, False)

    def _read(self, dealer: Dealing, request: Deal | Prefetch) -> tuple[Dealt, Iterator[bytes]]:
        """What its client is told of a pass, and its payloads, of which nothing is made yet: all of it is checked and bounded first."""
        kinds, digest = [from_wire(data) for data in request.kinds], KindHash(dealer.next_name)
        for kind in kinds:
            digest.update(kind)
        dealt = dealer.deal_pass(kinds, digest.digest())
        return Dealt(digest.digest(), sum(kind.shared_bytes for kind in kinds)), dealt

    def _messages(self, dealt: Iterator[bytes]) -> Iterator[bytearray]:
        """The payload of a pass, in messages; one correlation's may take several, for none is beyond what a client takes at a time."""
        waiting, ended = bytearray(), object()
        while True:
            with walking(self.options.device):
                payload = next(dealt, ended)
            if not isinstance(payload, bytes):
                break
            waiting += payload
            while len(waiting) > MAX_FRAME:
                yield waiting[:MAX_FRAME]
                del waiting[:MAX_FRAME]
            if len(waiting) >= CHUNK:
                yield waiting
                waiting = bytearray()
        if waiting:
            yield waiting

    def _send(self, session: _Session, client: Connection, head: Dealt, payload: Iterable[bytearray], correlations: int) -> None:
        """Sends a pass; what is still to be dealt is computed in turn."""
        client.send_control(head)
        with self.turns.turn(session.client):
            for message in payload:
                with self.turns.between(session.client):
                    client.send(message)
        self.counters.count(passes=1, correlations=correlations)
        session.tally["passes"] += 1
        session.tally["correlations"] += correlations


def _marked(shelf: PoolLane, request: Mark) -> Marked:
    """What D answers, and keeps; ConfigError where its disk refuses."""
    if not request.index:
        return Marked(shelf.raise_to(request.spent), True)
    ok = request.index > request.spent and shelf.spend(request.index)
    return Marked(max(shelf.spent, request.spent), ok)
