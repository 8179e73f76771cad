"""The door: one thread's loop over all who have come and are not served yet.

A guest is silent until its first byte, a speaker until TLS has shown its certificate, and then a known one, until its first message. Each
state has a room of its own, bounded in number and time, where those make way first who come from the address, or have the certificate,
of the most. So those who say nothing keep nobody out who does, as long as a room holds more than come while a handshake lasts. Who is
turned away is told why, and stays in a fourth room until its kernel has the last bytes. Nothing here waits for any one of them, and a
silent one costs a socket and a few hundred bytes.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from privinf.transport.connection import Connection
from privinf.transport.crowd import Crowd
from privinf.transport.failure import Failure
from privinf.transport.handing import Handed
from privinf.transport.tls import TlsStream, late, unacknowledged
from protocols.errors import Code, HandshakeError, PrivinfError, RefusedError, TransportError

_ROOM = 1024
"""Guests in one room, where the process may have enough open files."""
KNOWN, KNOWN_EACH = 256, 64
"""Those with a certificate that say nothing, and how many of them may have the same."""
_PART_S = 1.0
"""How long one that was turned away may take to hear of it."""
_PAUSE_S = 0.1
"""How long nobody is let in where others hold all files."""
_BATCH = 256
_ROUND_S = 0.05
"""How long one round gives newcomers the first words of TLS."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TurnedAway(NamedTuple):
    """A guest that will not be served, and the certificate that it has shown: empty of a stranger."""

    error: PrivinfError
    fingerprint: str


class _Guest:
    __slots__ = ("connection", "name", "place", "room", "sock", "stream")

    def __init__(self, sock: socket.socket, name: str, place: str) -> None:
        self.sock, self.name, self.place = sock, name, place
        self.stream: TlsStream | None = None
        self.connection: Connection | None = None
        self.room: Crowd[_Guest] | None = None


class Door:
    """Takes guests in from a listening socket. `make` builds their streams, `greet` makes a connection of a stream whose handshake is done.

    `hello_s` is how long a known one may be silent; None: it is served before it says anything. Not locked.
    Its attributes are four crowds of guests with their ways in, and one selector over all of them, which a step moves on.
    """

    def __init__(
        self,
        sock: socket.socket | Handed,
        party: str,
        make: Callable[[socket.socket], TlsStream],
        greet: Callable[[TlsStream, str], Connection],
        *,
        handshake_s: float,
        hello_s: float | None,
    ) -> None:
        self._sock, self._party, self._make, self._greet, self._hello = sock, party, make, greet, hello_s is not None
        most = _room()
        self.silent: Crowd[_Guest] = Crowd(most, handshake_s)
        self.speaking: Crowd[_Guest] = Crowd(most // 2, handshake_s)
        self.known: Crowd[_Guest] = Crowd(min(most, KNOWN), hello_s or 0.0, KNOWN_EACH)
        self.leaving: Crowd[_Guest] = Crowd(most // 4, _PART_S)
        self._rooms = (self.silent, self.speaking, self.known, self.leaving)
        self.ready: deque[Connection | TurnedAway] = deque()
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._resumes: float | None = None  # when it takes guests again after it ran out of files
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)

    def __len__(self) -> int:
        """Guests that are neither served nor turned away yet."""
        return len(self.silent) + len(self.speaking) + len(self.known)

    def wake(self) -> None:
        """Ends a `step` that waits, or else the next one; from any thread."""
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def close(self) -> None:
        """Sends all of them home, without a word."""
        found = [each for each in self.ready if isinstance(each, Connection)]
        for sock in [guest.sock for room in self._rooms for guest in room] + [connection.leave() for connection in found]:
            sock.close()
        self.ready.clear()
        self._selector.close()
        for sock in (self._waker, self._woken):
            sock.close()

    def step(self, until: float | None) -> bool:
        """One round: serves whoever can get on, lets in who has come, and turns away whose time is over; waits for that till `until`.

        Whether somebody has woken it.
        """
        due = [time for time in (until, self._resumes, *(room.due() for room in self._rooms)) if time is not None]
        ready = self._selector.select(max(0.0, min(due) - time.monotonic()) if due else None)
        knocked = any(key.fileobj is self._sock for key, _ in ready)
        self._get_on([key.data for key, _ in ready if key.data is not None])
        if self._resumes is not None and self._resumes <= time.monotonic():
            self._resumes = None
            self._selector.register(self._sock, selectors.EVENT_READ)
            knocked = True
        if knocked:
            self._let_in()
        for room in self._rooms:
            for guest in room.overdue():
                self._out_of_time(guest, room)
        woken = any(key.fileobj is self._woken for key, _ in ready)
        return woken and bool(self._woken.recv(_BATCH))

    # ---- coming in

    def _let_in(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    continue  # it went away before we took it
                for room in (self.leaving, self.silent, self.speaking):
                    if (guest := room.crowded_out()) is not None:
                        self._crowded_out(guest, room)
                        break
                else:  # others hold all files: a connection that is not taken would wake us again and again
                    self._selector.unregister(self._sock)
                    self._resumes = time.monotonic() + _PAUSE_S
                    return
                continue
            sock.setblocking(False)
            guest = _Guest(sock, *_named(address))
            self._selector.register(sock, selectors.EVENT_READ, guest)
            self._enter(self.silent, guest)

    def _enter(self, room: Crowd[_Guest], guest: _Guest) -> None:
        """Moves a guest there; whoever has to make room for it is turned away."""
        if guest.room is not None:
            guest.room.discard(guest)
        guest.room = room
        known = guest.connection if room is self.known else None
        displaced = room.add(guest, known.peer_fingerprint if known else guest.place)
        if displaced is not None:
            self._crowded_out(displaced, room)

    def _get_on(self, ready: list[_Guest]) -> None:
        """Serves those of whom there is something to read: who is nearest to its goal first, and of newcomers who has the fewest beside it.

        A newcomer's first words cost a signature: where more come than the processor can answer, the others wait for the next round.
        """
        order = {self.known: 0, self.speaking: 1, self.leaving: 2, self.silent: 3}
        ready.sort(key=lambda guest: (order[guest.room], guest.room.beside(guest)) if guest.room is not None else (0, 0))
        ends = time.monotonic() + _ROUND_S
        for guest in ready:
            if guest.room is not self.silent or time.monotonic() < ends:
                self._attend(guest)

    def _attend(self, guest: _Guest) -> None:
        try:
            if guest.room is self.leaving:
                self._see_off(guest)
            elif guest.room is not None:  # else it was sent away in this round
                if guest.connection is None:
                    self._shake(guest)
                if guest.connection is not None and (not self._hello or guest.connection.heard()):
                    self._hand_over(guest, guest.connection)
        except PrivinfError as error:
            self._turn_away(guest, error)
        except OSError as error:
            why = f"the connection broke: {error.strerror or error}"
            self._turn_away(guest, TransportError(why, party=self._party, peer=guest.name))
        except Exception as error:  # a fault of ours, or a certificate that nothing here can read: it must not keep the others out
            why = f"internal error at the door ({type(error).__name__})"
            self._turn_away(guest, TransportError(why, party=self._party, peer=guest.name, code=Code.INTERNAL))

    def _shake(self, guest: _Guest) -> None:
        if guest.stream is None:
            guest.stream = self._make(guest.sock)
            self._enter(self.speaking, guest)
        if guest.stream.shake(party=self._party, peer=guest.name):
            guest.connection = self._greet(guest.stream, guest.name)
            self._enter(self.known, guest)

    def _hand_over(self, guest: _Guest, connection: Connection) -> None:
        self._forget(guest)
        self._selector.unregister(guest.sock)
        self.ready.append(connection)

    # ---- going away

    def turn_away(self, connection: Connection) -> None:
        """One that was handed over, and was told that it is not served: it ends without anybody waiting for its kernel."""
        guest = _Guest(connection.leave(), connection.peer_name, connection.peer_fingerprint)
        self._selector.register(guest.sock, selectors.EVENT_READ, guest)
        self._part(guest)

    def _out_of_time(self, guest: _Guest, room: Crowd[_Guest]) -> None:
        if room is self.leaving:
            self._drop(guest)
        elif guest.connection is not None:
            why = f"the peer sent no message within {room.seconds:g} s"
            self._turn_away(
                guest, HandshakeError(why, party=self._party, peer=_of(guest.connection), remedy="look at the peer", code=Code.SILENT)
            )
        else:
            self._turn_away(guest, late(self._party, guest.name))

    def _crowded_out(self, guest: _Guest, room: Crowd[_Guest]) -> None:
        if room is self.leaving:
            self._drop(guest)
        elif guest.connection is not None:
            why = "the peer sent no message before its place was needed for others"
            remedy = "look at who holds its key"
            self._turn_away(guest, RefusedError(why, party=self._party, peer=_of(guest.connection), remedy=remedy, code=Code.CROWDED))
        else:
            why = f"{room.most} others are no further, and its place was needed"
            self._turn_away(guest, late(self._party, guest.name, why))

    def _turn_away(self, guest: _Guest, error: PrivinfError) -> None:
        connection = guest.connection
        self.ready.append(TurnedAway(error, "" if connection is None else connection.peer_fingerprint))
        if guest.stream is None:
            self._drop(guest)  # it has said nothing, and is told nothing
            return
        if connection is not None:
            last_words(connection, Failure(error.code, error.message))
            connection.leave()
        self._part(guest)

    def _part(self, guest: _Guest) -> None:
        """What it was told is on its way. Closing a socket that holds unread bytes would make the kernel throw that away."""
        with contextlib.suppress(OSError):
            guest.sock.shutdown(socket.SHUT_WR)
        self._enter(self.leaving, guest)
        self._see_off(guest)

    def _see_off(self, guest: _Guest) -> None:
        try:
            if guest.sock.recv(65536):
                return
        except BlockingIOError:
            if unacknowledged(guest.sock):
                return
        except OSError:
            pass
        self._drop(guest)

    def _drop(self, guest: _Guest) -> None:
        self._forget(guest)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(guest.sock)
        guest.sock.close()

    @staticmethod
    def _forget(guest: _Guest) -> None:
        if guest.room is not None:
            guest.room.discard(guest)
            guest.room = None


def last_words(connection: Connection, failure: Failure) -> None:
    """Tells a peer why it is not served, as far as our kernel takes it at once."""
    connection.timeout = 0.0
    with contextlib.suppress(PrivinfError):
        connection.send_error(failure)


def _of(connection: Connection) -> str:
    return f"{connection.peer_role} {connection.peer_name}"


def _named(address: object) -> tuple[str, str]:
    """The name of a peer, and the place that it counts for: an IPv4 address, or of IPv6 the half that a site has."""
    if not isinstance(address, tuple):
        return "local", "local"
    host, port = str(address[0]), int(address[1])
    if ":" not in host:
        return f"{host}:{port}", host
    number = ipaddress.IPv6Address(host.partition("%")[0])
    return f"[{host}]:{port}", str(number.ipv4_mapped or int(number) >> 64)


def _room() -> int:
    """How many guests one room holds: half of the files that this process may open, of which it asks for enough, are left to others."""
    wanted = 6 * _ROOM
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < min(wanted, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            soft = min(wanted, hard)
    return max(64, min(_ROOM, soft // 6))
