"""Whom a client speaks to, and the connections of one of its sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from privinf.client.tokenizer import Own
from privinf.session.blame import farewell
from privinf.session.options import Options
from privinf.session.replays import Tapes
from privinf.transport.connection import Connection
from privinf.transport.keys import Credentials
from privinf.transport.listener import Waiting, dial
from protocols.party import Party

SMALL = 64 * 2**20  # bytes of a model's masked weights that a client holds between sessions
_taped: dict[str, tuple[Tapes, dict[str, Any]]] = {}
"""By model, of the last that this process used: tapes, and the masked weights that they were written with, if these are small."""
_guard = threading.Lock()
Progress = Callable[[str, float], None]  # (phase, share done)


@dataclass
class Peers:
    """A client's peers, as whom it speaks to them, and what it tells meanwhile; shared by its sessions."""

    server: str
    dealer: str | None  # none is needed where server and client are alone
    credentials: Credentials
    options: Options
    tokenizer: Own | None
    progress: Progress
    waiting: Waiting
    probe: Callable[[Party], Any] | None = None  # `privinf.local.probe` or `clock`, in local sessions alone
    encrypted: WeakValueDictionary[str, Any] = field(default_factory=WeakValueDictionary)
    """Encrypted weights that some session holds, for others of the same server's key: they are most of a session's memory."""

    @property
    def named(self) -> str:
        """The server, as errors name it."""
        return f"server {self.server}"


class Lines:
    """The connections of one session, from before the first is made; and what is freed with them. Ended from any thread."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.dialled: list[Connection] = []
        """To the server, and once that was reached to the dealer, where there is one."""
        self.masked: dict[str, Any] = {}
        """What set-up brought of the weights, by name: masked, or encrypted in each of its forms."""
        self.tables: dict[str, Any] = {}
        """And of its tables, where these alone are encrypted."""
        self.spend: Callable[[int], None] = lambda count: None
        """Counts rows of those tables before they are taken, see `privinf.client.taken`."""
        self.tapes = Tapes()
        self._closed = threading.Event()

    def share(self, model: str) -> None:
        """Masked weights that are small, and tapes with them, serve all sessions of a model in this process; its id stands for them."""
        if str(self.peers.options.device) != "cpu" or sum(x.nbytes for x in self.masked.values()) > SMALL:
            return
        with _guard:
            found = _taped.get(model)
            if found is not None and found[1].keys() == self.masked.keys():
                self.tapes = found[0]
                self.masked.update(found[1])
            else:
                _taped.clear()
                _taped[model] = self.tapes, dict(self.masked)

    @property
    def closed(self) -> bool:
        """Whether it was closed at this end."""
        return self._closed.is_set()

    def lost(self) -> bool:
        """Whether one of them has ended, see `Connection.lost`: the session, which lies unused, can then not go on."""
        return any(connection.lost() for connection in self.dialled)

    def dial(self, role: str, connect_s: float, hint: str = "") -> Connection:
        """Connects to the peer of this role, within so many seconds; PrivinfError. `hint`: see `transport.hint`."""
        peers, server = self.peers, role == "server"
        assert server or peers.dealer is not None
        address, emulated = (peers.server, peers.options.emulated) if server else (str(peers.dealer), None)
        patience, tell = peers.options.timeout, peers.waiting
        connection = dial(address, peers.credentials, role, patience, emulated, connect_s=connect_s, waiting=tell, hint=hint)
        self.dialled.append(connection)
        if self.closed:  # meanwhile, by another thread
            connection.close()
        return connection

    def close(self, error: BaseException | None = None) -> None:
        """Closes all; a peer that still listens is told why."""
        self._closed.set()
        try:
            for connection in self.dialled:
                farewell(connection, error)
        finally:
            for connection in self.dialled:
                connection.close()
        self.tables.clear()
        self.masked.clear()  # at once, not when the collector finds the cycle: they may be most of the memory
