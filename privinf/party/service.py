"""What server and dealer have in common: accept, a thread for each connection, one line for each failure, a clean end."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from typing import Any, Self

from privinf.party.options import Options
from privinf.transport.connection import Connection
from privinf.transport.keys import load_credentials
from privinf.transport.listener import Listener
from privinf.transport.meter import PHASES, Cell
from protocols.errors import PrivinfError

MAX_CONNECTIONS = 64
CLOSE_S = 5.0


class Service:
    """Listens for peers of some roles and gives each connection a thread; one peer's fault never touches another's."""

    role = ""

    def __init__(self, *, listen: str, keys: str, allowed_roles: set[str], options: Options, link: bool = False) -> None:
        self.options = options
        self.credentials = load_credentials(keys, self.role)
        self._log = logging.getLogger(f"privinf.{self.role}")
        emulated = options.emulated if link else None
        self._listener = Listener(listen, self.credentials, allowed_roles, timeout=options.timeout, link=emulated)
        self._connections: set[Connection] = set()
        self._handed: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._guard = threading.Lock()
        self._accepting: threading.Thread | None = None
        self._totals = {phase: Cell() for phase in PHASES}  # of connections that have ended
        self.ended: deque[dict[str, Any]] = deque(maxlen=64)  # the last of them: role of the peer, and the meter's snapshot

    @property
    def address(self) -> str:
        """The actual HOST:PORT."""
        return self._listener.address

    def handle(self, connection: Connection) -> None:
        """One peer, from the end of TLS to the end of its session."""
        raise NotImplementedError

    def hand_over(self, connection: Connection) -> None:
        """Lets a handler return without closing this connection; whoever took it ends it with `retire`."""
        with self._guard:
            self._handed.add(connection)

    def adopt(self, connection: Connection) -> None:
        """Lets `close` end a connection, and `traffic` count it."""
        with self._guard:
            self._connections.add(connection)

    def retire(self, connection: Connection) -> None:
        """Closes a connection and keeps its counters; may be called again."""
        connection.close()
        with self._guard:
            self._handed.discard(connection)
            if connection in self._connections:
                self._connections.discard(connection)
                for phase, total in self._totals.items():
                    total.add(connection.meter.total(phase))
                self.ended.append({"peer": connection.peer_role, **connection.meter.snapshot()})

    def traffic(self) -> dict[str, Cell]:
        """Counters by phase, of all connections so far."""
        with self._guard:
            sums = {phase: Cell() for phase in PHASES}
            for phase, total in sums.items():
                total.add(self._totals[phase])
                for connection in self._connections:
                    total.add(connection.meter.total(phase))
        return sums

    def start(self) -> Self:
        """Serves in the background."""
        self._accepting = threading.Thread(target=self.serve_forever, name=f"privinf-{self.role}", daemon=True)
        self._accepting.start()
        return self

    def serve_forever(self) -> None:
        """Serves until `close`."""
        while not self._listener.closed:
            sock = self._listener.accept()
            if sock is None:
                continue
            with self._guard:
                self._threads = {t for t in self._threads if t.is_alive()}
                full = len(self._threads) >= MAX_CONNECTIONS
                if not full:
                    thread = threading.Thread(target=self._attend, args=(sock,), name=f"privinf-{self.role}-peer", daemon=True)
                    self._threads.add(thread)
            if full:
                self._log.warning("too many connections; one was turned away")
                sock.close()
                continue
            thread.start()

    def _attend(self, sock: socket.socket) -> None:
        connection: Connection | None = None
        try:
            connection = self._listener.handshake(sock)
            self.adopt(connection)
            self.handle(connection)
        except PrivinfError as error:
            self._log.warning("%s", error)
            if connection is not None:
                with contextlib.suppress(PrivinfError):
                    connection.send_error(error.message)
        except Exception as error:
            # a fault of ours: the peer gets one line, the log the place, and the others go on
            self._log.exception("internal error in a session: %s", type(error).__name__)
            if connection is not None:
                with contextlib.suppress(PrivinfError):
                    connection.send_error(f"internal error at the {self.role}")
        finally:
            if connection is not None and connection not in self._handed:
                self.retire(connection)

    def close(self) -> None:
        """Stops accepting, ends every session, and waits for the threads for a few seconds."""
        self._listener.close()
        with self._guard:
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            connection.close()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(CLOSE_S / max(1, len(threads)))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
