"""What server and dealer have in common: accept, a thread for each peer, one line for each failure, a clean end.

A peer counts, and has a thread, from its first message on; whoever has not come so far waits at the door, see `transport.door`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from privinf.session.blame import as_told, farewell
from privinf.session.memory import give_back
from privinf.session.options import Options
from privinf.session.report import snapshot, traffic_of
from privinf.session.sparing import WINDOW_S, Sparing
from privinf.session.turns import Turns
from privinf.transport.connection import Connection
from privinf.transport.door import TurnedAway
from privinf.transport.endpoint import OnMessage
from privinf.transport.keys import ROLES, load_credentials
from privinf.transport.listener import Listener
from privinf.transport.meter import PHASES, Cell
from protocols.errors import Code, ConfigError, HandshakeError, PeerUnreachableError, PrivinfError, RefusedError, TransportError

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
REST_S = 5.0
"""How long a drain waits for the next request of a session, at most."""


class Service:
    """Listens for peers of some roles and gives each connection a thread; one peer's fault never touches another's."""

    role = ""
    late: frozenset[str] = frozenset()
    """Roles whose connections belong to sessions that have begun, and are welcome while this service drains."""

    def __init__(
        self, *, listen: str, keys: str, allowed_roles: set[str], options: Options, link: bool = False, clients: Path | None = None
    ) -> None:
        self.options, self._keys, self._clients_file = options, keys, clients
        self._clients = None if clients is None else read_clients(clients)  # None: whoever has a certificate of the CA
        self.credentials = load_credentials(keys, self.role)
        self._log = logging.getLogger(f"privinf.{self.role}")
        self._sparing = Sparing(self._log)
        emulated, hello_s = options.emulated if link else None, min(options.timeout, HELLO_S)
        self._listener = Listener(listen, self.credentials, allowed_roles, timeout=options.timeout, hello_s=hello_s, link=emulated)
        self._attended: dict[threading.Thread, Connection] = {}  # threads of peers
        self._left: set[Connection] = set()  # of them, those whose session has ended
        self._resting: dict[Connection, float] = {}  # since when a session waits for its client's next request
        self._connections: set[Connection] = set()
        self._handed: set[Connection] = set()
        self._told: set[Connection] = set()
        self._guard = threading.Lock()
        self._accepting: threading.Thread | None = None
        self._closing = self._draining = False
        self.turns = Turns()
        self.refusals: Counter[str] = Counter()  # by reason
        self.counts: Counter[str] = Counter()  # passes, positions and correlations, for metrics
        self.watch: Callable[[Connection], OnMessage] | None = None  # `privinf.local.watch`, in local demos alone
        self._totals = {(role, phase): Cell() for role in ROLES for phase in PHASES}  # of connections that have ended, by role of the peer
        self.ended: deque[dict[str, Any]] = deque(maxlen=64)  # the last of them, see `report.snapshot`

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
        with self._guard:
            self._handed.add(connection)

    def adopt(self, connection: Connection) -> None:
        """Lets `close` end a connection, and `traffic` count it; TransportError if this service ends."""
        with self._guard:
            closing = self._closing
            if not closing:
                self._connections.add(connection)
                connection.on_message = self.watch and self.watch(connection)
        if closing:
            stopped = self._stopped()
            farewell(connection, stopped)
            connection.close()
            raise stopped

    def _stopped(self) -> PrivinfError:
        return PeerUnreachableError(f"this {self.role} is being stopped", party=self.role, code=Code.STOPPING)

    @contextlib.contextmanager
    def resting(self, connection: Connection) -> Iterator[None]:
        """A session waits for its client's next request; TransportError once that has lasted too long."""
        began = self._resting[connection] = time.monotonic()
        try:
            yield
        except TransportError as error:
            if time.monotonic() - began < self.options.idle:
                raise
            what = f"the session was unused for {self.options.idle:g} s"
            idle = TransportError(what, party=self.role, remedy="begin another one", code=Code.IDLE)
            raise self.refusal(idle) from error
        finally:
            del self._resting[connection]

    def leave(self, connection: Connection) -> None:
        """Its session has ended: its place is free, though its end is not yet confirmed."""
        with self._guard:
            self._left.add(connection)

    def tell(self, connection: Connection, error: PrivinfError) -> None:
        """Tells a peer in one line why this party gives up; only once, so that the cause comes before what it led to."""
        with self._guard:
            told = connection in self._told
            self._told.add(connection)
        if not told:
            farewell(connection, error)

    def retire(self, connection: Connection) -> None:
        """Closes a connection and keeps its counters; may be called again."""
        connection.close()
        with self._guard:
            self._handed.discard(connection)
            self._told.discard(connection)
            self._left.discard(connection)
            if connection in self._connections:
                self._connections.discard(connection)
                for phase in PHASES:
                    self._totals[connection.peer_role, phase].add(connection.meter.total(phase))
                self.ended.append(snapshot(connection.peer_role, connection))

    def cells(self) -> dict[tuple[str, str], Cell]:
        """What moved so far, by role of the peer and phase."""
        result = {place: Cell() for place in self._totals}
        with self._guard:
            parts = list(self._totals.items())
            parts += [((c.peer_role, phase), c.meter.total(phase)) for c in self._connections for phase in PHASES]
        for place, cell in parts:
            result[place].add(cell)
        return result

    def budgets(self) -> dict[str, int]:
        """Outputs that were spent of budgets, by the name of the client."""
        return {}

    @property
    def draining(self) -> bool:
        """Whether nobody new is served."""
        return self._draining or self._closing

    def refusal(self, error: PrivinfError, reason: str = "") -> PrivinfError:
        """The error, counted among the refusals, by its code unless there is another reason."""
        with self._guard:
            self.refusals[reason or error.code] += 1
        return error

    def say_of_a_session(self, line: str) -> None:
        """One is over."""
        self._log.info("%s", line)

    @property
    def peers(self) -> int:
        """Connections whose peer has shown a certificate, has said something, and is served."""
        return len(self._attended)

    def count(self, **numbers: int) -> None:
        """Adds to `counts`."""
        with self._guard:
            self.counts.update(numbers)

    def traffic(self) -> dict[str, Any]:
        """The contract's `traffic`, of all connections so far."""
        peer, dealer = {phase: Cell() for phase in PHASES}, Cell()
        for (role, phase), cell in self.cells().items():
            (dealer if "dealer" in (self.role, role) else peer[phase]).add(cell)
        return traffic_of(peer, dealer)

    # ---- certificates

    def reload(self) -> None:
        """Reads certificate, key and list of clients anew; ConfigError, and then all stays as it was.

        Sessions go on, but for those of clients that are listed no longer.
        """
        credentials = load_credentials(self._keys, self.role)
        clients = None if self._clients_file is None else read_clients(self._clients_file)
        self._listener.renew(credentials)
        with self._guard:
            self.credentials, self._clients = credentials, clients
            shut_out = [connection for connection in self._connections if not self._knows(connection)]
        for connection in shut_out:
            self._log.warning("client %s is listed no longer; its session ends", connection.peer_name)
            refusal = RefusedError("this certificate is served no longer", party=self.role, code=Code.REVOKED)
            connection.interrupt(self.refusal(refusal))  # the thread of the session tells the client

    def _knows(self, connection: Connection) -> bool:
        return connection.peer_role != "client" or self._clients is None or connection.peer_fingerprint in self._clients

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
                self._take(self._listener.accept(self._sparing.due() or WINDOW_S))
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
        with self._guard:
            refused = self._why_not(connection)
            if refused is None:
                self._attended[thread] = connection
        if refused is None:
            try:
                thread.start()
                return
            except RuntimeError:  # no more threads; others will end
                with self._guard:
                    del self._attended[thread]
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
            self._log.exception("internal error in a session: %s; start with --debug for its place", type(error).__name__)
            self.tell(connection, as_told(error, self.role))
        finally:
            with self._guard:
                self._attended.pop(threading.current_thread(), None)
            if connection not in self._handed:
                self.retire(connection)
            give_back()

    def _why_not(self, connection: Connection) -> PrivinfError | None:
        """Why a peer is not served."""
        role, options = connection.peer_role, self.options
        if self._draining and role not in self.late:
            return self._stopped()
        if not self._knows(connection):
            return HandshakeError("this certificate is not among those that are served", code=Code.NOT_LISTED)
        alike = [other for other in self._attended.values() if other.peer_role == role and other not in self._left]
        if len(alike) >= options.sessions:
            return RefusedError.for_now(f"the {self.role} serves {options.sessions} peers already", Code.FULL)
        own = sum(other.peer_fingerprint == connection.peer_fingerprint for other in alike)
        if 0 < options.sessions_each(role) <= own:
            code = Code.CLIENT_FULL if role == "client" else Code.SERVER_FULL
            return RefusedError.for_now(f"the {self.role} serves {own} sessions of this {role} already", code)
        return None

    def settle(self, seconds: float, rest_s: float | None = None) -> None:
        """Waits until every session has ended by itself, but no longer than this; ends those that ask for nothing within `rest_s`."""
        began = time.monotonic()
        while time.monotonic() < began + seconds and not self._closing:
            with self._guard:
                if not self._attended:
                    return
            for connection, since in list(self._resting.items()):
                if rest_s is not None and time.monotonic() > max(began, since) + rest_s:
                    connection.interrupt(self._stopped())
            time.sleep(0.01)

    def drain(self, seconds: float) -> None:
        """Takes nobody new, and waits until every session has ended, but no longer than this.

        A session whose client asks for nothing for half of that time, or REST_S, is idle and is ended.
        """
        with self._guard:
            self._draining = True
        if not self.late:
            self._listener.close()
        self.settle(seconds, min(seconds / 2, REST_S))

    def close(self, drain: float = 0.0) -> None:
        """Stops accepting, ends every session, and waits for the threads, a few seconds at most. May be called again.

        With `drain` sessions may end by themselves first, within so many seconds, see there.
        """
        if drain > 0:
            self.drain(drain)
        with self._guard:
            self._closing = True
            threads, connections = list(self._attended), list(self._connections)
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


def read_clients(path: Path) -> frozenset[str]:
    """Certificates' fingerprints, one a line, as `keys show` has them; what follows a # is a comment. ConfigError names the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    found = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip().lower().replace(":", "")
        if text and (len(text) != 64 or set(text) - set("0123456789abcdef")):
            raise ConfigError(
                f"{path}: line {number} is no fingerprint", remedy="copy the sha256 that `privinf keys show` has for the client"
            )
        found |= {text} if text else set()
    return frozenset(found)
