"""What server and dealer have in common: accept, a thread for each peer, one line for each failure, a clean end.

A peer counts, and has a thread, from its first message on; whoever has not come so far waits at the door, see `transport.door`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from privinf.session.attendance import Attendance
from privinf.session.blame import as_told, farewell
from privinf.session.board import Board, Peer
from privinf.session.counters import Counters
from privinf.session.devices import falls_back
from privinf.session.memory import give_back
from privinf.session.options import Options
from privinf.session.papers import Papers
from privinf.session.readiness import Readiness
from privinf.session.report import traffic_of
from privinf.session.sparing import WINDOW_S, Sparing
from privinf.session.turns import Turns, cores
from privinf.transport.connection import Connection
from privinf.transport.door import TurnedAway
from privinf.transport.endpoint import OnMessage
from privinf.transport.handing import Handed
from privinf.transport.keys import Credentials
from privinf.transport.listener import Listener
from privinf.transport.meter import PHASES, Cell
from protocols import kernels
from protocols.errors import Code, HandshakeError, PeerUnreachableError, PrivinfError, RefusedError, TransportError

HELLO_S = 15.0
"""The longest wait for a peer's first message, once it has shown its certificate."""
CLOSE_S = 4.0
LINES = 60
"""How many lines a minute refusals and failures of one certificate may cause in the log."""
REASONS = (
    "no handshake",
    "silent",
    "not listed",
    "revoked",
    "full",
    "client full",
    "server full",
    "stopping",
    "idle",
    "tokens",
    "bytes",
    "budget",
    "set-ups",
    "disk",
)
"""Why peers, or requests of theirs, are refused."""
TICK_S = 0.05
REST_S = 5.0
"""How long a drain waits for the next request of a session, at most."""


class Service:
    """Listens for peers of some roles and gives each connection a thread; one peer's fault never touches another's.

    Its attributes are what it was started with, the door, and who does one thing each for all sessions.
    """

    role = ""
    late: frozenset[str] = frozenset()
    """Roles whose connections belong to sessions that have begun, and are welcome while this service drains."""

    def __init__(
        self,
        *,
        listen: str | Handed,
        keys: str,
        allowed_roles: set[str],
        options: Options,
        link: bool = False,
        clients: Path | None = None,
        board: Board | None = None,
    ) -> None:
        """`listen` is an address, or where another process hands connections over; with a `board` this is one process of several."""
        self.options, self.papers = options, Papers(keys, self.role, clients)
        self._log = logging.getLogger(f"privinf.{self.role}")
        self._sparing = Sparing(self._log)
        emulated, hello_s = options.emulated if link else None, min(options.timeout, HELLO_S)
        self._listener = Listener(listen, self.credentials, allowed_roles, timeout=options.timeout, hello_s=hello_s, link=emulated)
        self.board, self._here, self.counters = board, Attendance(board), Counters()
        self.turns = Turns(None if board is None else math.ceil(cores() / board.workers))
        self._accepting: threading.Thread | None = None
        self._others = Readiness()
        kernels.start(options.cache / "kernels")
        if otherwise := falls_back(options.device):
            self._log.info("%s", otherwise)
        self._called = threading.Event()  # the last call
        self.watch: Callable[[Connection], OnMessage] | None = None  # `privinf.local.watch`, in local demos alone

    @property
    def credentials(self) -> Credentials:
        """Of new connections."""
        return self.papers.credentials

    @property
    def address(self) -> str:
        """The actual HOST:PORT."""
        return self._listener.address

    def handle(self, connection: Connection) -> None:
        """One peer, from the end of TLS to the end of its session."""
        raise NotImplementedError

    # ---- connections

    def hand_over(self, connection: Connection) -> None:
        """Lets a handler return without closing this connection; whoever took it ends it with `retire`."""
        self._here.hand_over(connection)

    def adopt(self, connection: Connection) -> None:
        """Lets `close` end a connection, and `traffic` count it; TransportError if this service ends."""
        self.counters.begin(connection)  # before the look at `closing`, so that `close` sees it or it sees `close`
        if self._here.closing:
            self.counters.end(connection, counts=False)
            stopped = self._stopped()
            farewell(connection, stopped)
            connection.close()
            raise stopped
        if not self.papers.knows(connection):  # the list was read anew meanwhile: `reload` ends those that it finds
            self.counters.end(connection, counts=False)
            raise self.refusal(self._revoked())
        connection.on_message = self.watch and self.watch(connection)

    def _revoked(self) -> PrivinfError:
        return RefusedError("this certificate is served no longer", party=self.role, code=Code.REVOKED)

    def _stopped(self) -> PrivinfError:
        return PeerUnreachableError(f"this {self.role} is being stopped", party=self.role, code=Code.STOPPING)

    @contextlib.contextmanager
    def resting(self, connection: Connection) -> Iterator[None]:
        """A session waits for its client's next request; TransportError once that has lasted too long."""
        with self._here.resting(connection) as began:
            try:
                yield
            except TransportError as error:
                if time.monotonic() - began < self.options.idle:
                    raise
                what = f"the session was unused for {self.options.idle:g} s"
                idle = TransportError(what, party=self.role, remedy="begin another one", code=Code.IDLE)
                raise self.refusal(idle) from error

    def leave(self, connection: Connection) -> None:
        """Its session has ended: its place is free, though its end is not yet confirmed."""
        self._here.leave(connection)

    def tell(self, connection: Connection, error: PrivinfError) -> None:
        """Tells a peer in one line why this party gives up; only once, so that the cause comes before what it led to."""
        if self._here.first_told(connection):
            farewell(connection, error)

    def retire(self, connection: Connection) -> None:
        """Closes a connection and keeps its counters; may be called again."""
        connection.close()
        self._here.forget(connection)
        self.counters.end(connection)

    def budgets(self) -> dict[str, int]:
        """Outputs that were spent of budgets, by the name of the client."""
        return {}

    def missing(self) -> str:
        """Why a session could not begin now, for want of somebody beside its two parties; empty: nothing."""
        return ""

    def ready(self) -> str:
        """Why nobody new can be served now; empty where somebody can. See `Readiness`."""
        if self.draining:
            return f"this {self.role} is to end"
        return self._others.why(self.missing)

    @property
    def draining(self) -> bool:
        """Whether nobody new is served."""
        return self._here.draining or self._here.closing

    def refusal(self, error: PrivinfError, reason: str = "") -> PrivinfError:
        """The error, counted among the refusals, by its code unless there is another reason."""
        self.counters.refused(reason or error.code)
        return error

    def say_of_a_session(self, line: str) -> None:
        """One is over."""
        self._log.info("%s", line)

    @property
    def peers(self) -> int:
        """Connections whose peer has shown a certificate, has said something, and is served."""
        return len(self._here)

    def traffic(self) -> dict[str, Any]:
        """The contract's `traffic`, of all connections so far."""
        peer, dealer = {phase: Cell() for phase in PHASES}, Cell()
        for (role, phase), cell in self.counters.cells().items():
            (dealer if "dealer" in (self.role, role) else peer[phase]).add(cell)
        return traffic_of(peer, dealer)

    # ---- certificates

    def reload(self) -> None:
        """Reads certificate, key and list of clients anew; ConfigError, and then all stays as it was.

        Sessions go on, but for those of clients that are listed no longer.
        """
        papers = self.papers.renewed()
        self._listener.renew(papers.credentials)
        self.papers = papers
        for connection in self.counters.connections:
            if not papers.knows(connection):
                self._log.warning("client %s is listed no longer; its session ends", connection.peer_name)
                connection.interrupt(self.refusal(self._revoked()))  # the thread of the session tells the client

    # ---- life

    def start(self) -> Self:
        """Serves in the background."""
        self._accepting = threading.Thread(target=self.serve_forever, name=f"privinf-{self.role}", daemon=True)
        self._accepting.start()
        return self

    def serve_forever(self) -> None:
        """Serves until `close`."""
        while not self._listener.closed:
            try:
                rest = self._sparing.due() or WINDOW_S
                if self._called.is_set():
                    rest = min(rest, TICK_S)
                    if not self._listener.coming:
                        self._here.draining = True
                self._take(self._listener.accept(rest))
            except Exception as error:  # a fault of ours: whoever comes next is served all the same
                self._sparing.say("door", f"internal error at the door: {type(error).__name__}: {error}")
                time.sleep(0.01)

    def _take(self, found: Connection | TurnedAway | None) -> None:
        """Apart from the loop, which would hold on to it until the next one comes."""
        if isinstance(found, TurnedAway):
            self._turned_away(found)
        elif found is not None:
            self._admit(found)

    def _turned_away(self, found: TurnedAway) -> None:
        """Somebody came and did not become a peer: of strangers one line a minute for each way in which they fail."""
        self.refusal(found.error, "silent" if found.fingerprint else "no handshake")
        if found.fingerprint:
            self._report(found.fingerprint, found.error)
        else:
            self._sparing.say(found.error.message.partition(":")[0], str(found.error))

    def _report(self, fingerprint: str, error: PrivinfError) -> None:
        self._sparing.say(fingerprint, str(error), LINES, logging.INFO if self.draining else logging.WARNING)

    def _admit(self, connection: Connection) -> None:
        """Gives a peer that has spoken its thread, if there is room for one more."""
        connection.timeout = min(self.options.timeout, HELLO_S)
        thread = threading.Thread(target=self._attend, args=(connection,), name=f"privinf-{self.role}-peer", daemon=True)
        refused = self._here.admit(thread, connection, lambda others: self._why_not(connection, others))
        if refused is None:
            try:
                thread.start()
                return
            except RuntimeError:  # no more threads; others will end
                self._here.dismiss(thread)
                refused = RefusedError.for_now(f"the {self.role} can start no more threads", Code.FULL)
        refused.party, refused.peer = self.role, connection.peer_name
        self._report(connection.peer_fingerprint, self.refusal(refused))
        connection.timeout = 0.0  # nobody is waited for at the door
        farewell(connection, refused)
        self._listener.door.turn_away(connection)

    def _attend(self, connection: Connection) -> None:
        try:
            self.adopt(connection)
            self.handle(connection)
        except PrivinfError as error:
            if not error.peer:
                error.peer = f"{connection.peer_role} {connection.peer_name}"
            self._report(connection.peer_fingerprint, error)
            self.tell(connection, error)
        except Exception as error:
            # a fault of ours: the peer gets one line, the log the place, and the others go on
            name = type(error).__name__
            line = f"internal error in a session: {name}; start with --debug for its place"
            self._sparing.say(f"internal {name}", line, level=logging.ERROR, fault=error)
            self.tell(connection, as_told(error, self.role))
        finally:
            self._here.dismiss(threading.current_thread())
            if not self._here.handed(connection):
                self.retire(connection)
            give_back()

    def _why_not(self, connection: Connection, others: list[Peer]) -> PrivinfError | None:
        """Why a peer is not served."""
        role, options = connection.peer_role, self.options
        if self._here.draining and role not in self.late:
            return self._stopped()
        if not self.papers.knows(connection):
            return HandshakeError("this certificate is not among those that are served", code=Code.NOT_LISTED)
        alike = [other for other in others if other.peer_role == role]
        if len(alike) >= options.sessions:
            return RefusedError.for_now(f"the {self.role} serves {options.sessions} peers already", Code.FULL)
        own = sum(other.peer_fingerprint == connection.peer_fingerprint for other in alike)
        if 0 < options.sessions_each(role) <= own:
            code = Code.CLIENT_FULL if role == "client" else Code.SERVER_FULL
            return RefusedError.for_now(f"the {self.role} serves {own} sessions of this {role} already", code)
        return None

    def last_call(self, seconds: float) -> None:
        """Waits until whoever is at the door is in or turned away, but no longer than this; from then on nobody new is served.

        The thread that serves finds out: any other could look while it has somebody in its hands, between the door and a place.
        """
        until = time.monotonic() + seconds
        self._called.set()
        self._listener.wake()
        while not self.draining and time.monotonic() < until:
            time.sleep(TICK_S)
        self._here.draining = True

    def settle(self, seconds: float, rest_s: float | None = None) -> None:
        """Waits until every session has ended by itself, but no longer than this; ends those that ask for nothing within `rest_s`."""
        began = time.monotonic()
        while time.monotonic() < began + seconds and not self._here.closing:
            if not self._here.threads:
                return
            for connection, since in self._here.at_rest():
                if rest_s is not None and time.monotonic() > max(began, since) + rest_s:
                    connection.interrupt(self._stopped())
            time.sleep(0.01)

    def drain(self, seconds: float) -> None:
        """Takes nobody new, and waits until every session has ended, but no longer than this.

        A session whose client asks for nothing for half of that time, or REST_S, is idle and is ended.
        """
        self._here.draining = True
        if not self.late:
            self._listener.close()
        self.settle(seconds, min(seconds / 2, REST_S))

    def close(self, drain: float = 0.0) -> None:
        """Stops accepting, ends every session, and waits for the threads, a few seconds at most. May be called again.

        With `drain` sessions may end by themselves first, within so many seconds, see there.
        """
        if drain > 0:
            self.drain(drain)
        self._here.closing = True
        threads, connections = self._here.threads, self.counters.connections
        self._listener.close()
        self._sparing.due(at_once=True)
        deadline = time.monotonic() + CLOSE_S
        for connection in connections:
            connection.interrupt(self._stopped())  # its thread tells the peer
        _join(threads, deadline - CLOSE_S / 2)
        # what is left, side by side: each may wait for a second until its peer's kernel has the last bytes
        closers = [threading.Thread(target=self.retire, args=(connection,), daemon=True) for connection in connections]
        for thread in closers:
            thread.start()
        _join([*closers, *threads], deadline)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def _join(threads: list[threading.Thread], deadline: float) -> None:
    """Waits for them, no longer than until then, time.monotonic()."""
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))
