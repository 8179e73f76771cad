"""Accepting and dialling: from an address to a connection whose peer is known.

`Listener.accept` gives connections whose peer has shown its certificate; who comes, and what becomes of those who say nothing or speak
another language, is `door`'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from privinf.transport.connection import HEARTBEAT_S, Connection
from privinf.transport.door import Door, TurnedAway, last_words
from privinf.transport.failure import Failure
from privinf.transport.handing import Handed
from privinf.transport.hint import PREFIX
from privinf.transport.keys import Credentials
from privinf.transport.meter import Meter
from privinf.transport.shaper import Link
from privinf.transport.tls import HANDSHAKE_S, TlsStream, make_context, tune
from protocols.errors import Code, ConfigError, HandshakeError, PeerUnreachableError, PrivinfError

TIMEOUT_S = 60.0
_BACKLOG = 4096  # as far as the system allows: what comes while the thread at the door does not run
_DIAL_HANDSHAKE_S = 10.0  # at least, though the connection may have less: a busy peer is slow to answer
_TICK_S = 1.0


Waiting = Callable[[str, float], None]
"""Told, about once a second, why a peer cannot be reached yet, and the seconds after which that is given up."""


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` -> (host without brackets, port); raises ConfigError for anything else."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host:
        colon = ""
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536) or any(c.isspace() for c in host):
        raise ConfigError(f"cannot read the address {text[:100]!r}", remedy="give HOST:PORT, for example localhost:7000 or [::1]:7000")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening(address: str, party: str) -> tuple[socket.socket, str]:
    """A socket that listens there and blocks nobody, and the actual HOST:PORT; ConfigError."""
    sock = bound(address, "--listen", _BACKLOG, party=party, before=tune)  # which accepted sockets inherit
    sock.setblocking(False)
    return sock, format_address(parse_address(address)[0], sock.getsockname()[1])


def bound(
    address: str, option: str, backlog: int = 128, *, party: str = "", before: Callable[[socket.socket], None] | None = None
) -> socket.socket:
    """A socket that listens there; ConfigError, which names the option that said where. `before`: what is done to it first."""
    host, port = parse_address(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if before is not None:
                before(sock)
            sock.bind(place)
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {address}: {reason}", party=party, remedy=f"choose another {option}") from None
    return sock


@dataclass(frozen=True)
class _Options:
    """What a connection is made with; times in seconds."""

    timeout: float
    handshake_s: float
    silence_s: float | None
    heartbeat_s: float
    link: Link | None


class Listener:
    """Listens on one address for peers of the allowed roles. `address` is the actual one, also where port 0 was asked for.

    With `hello_s` a peer is accepted once its first message has come, and has so many seconds for that.
    """

    def __init__(
        self,
        address: str | Handed,
        credentials: Credentials,
        allowed_roles: Collection[str],
        *,
        timeout: float = TIMEOUT_S,
        handshake_s: float = HANDSHAKE_S,
        hello_s: float | None = None,
        silence_s: float | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        link: Link | None = None,
    ) -> None:
        self.credentials = credentials
        self.allowed_roles = frozenset(allowed_roles)
        self._options = _Options(timeout, handshake_s, silence_s, heartbeat_s, link)
        self._context = make_context(credentials, server=True)
        self._socket: socket.socket | Handed
        if isinstance(address, Handed):
            self._socket, self.address = address, address.name
        else:
            self._socket, self.address = listening(address, credentials.role)
        self.door = Door(self._socket, credentials.role, self._stream, self._greet, handshake_s=handshake_s, hello_s=hello_s)
        self._accepting = threading.RLock()
        self._closed = False

    def renew(self, credentials: Credentials) -> None:
        """Shows this certificate from now on; connections that were made stay. ConfigError, and then the old one stays."""
        self._context, self.credentials = make_context(credentials, server=True), credentials

    def accept(self, timeout: float | None = None) -> Connection | TurnedAway | None:
        """The next peer, or the next guest that will be none; None once the listener is closed or woken, or when `timeout` seconds pass.

        Whoever is on the way to become a peer gets on only within this call: it is to be called again and again.
        """
        with self._accepting:
            until = None if timeout is None else time.monotonic() + timeout
            while not self._closed:
                if self.door.ready:
                    found = self.door.ready.popleft()
                    return found.begin() if isinstance(found, Connection) else found
                if until is not None and time.monotonic() >= until:
                    return None
                try:
                    if self.door.step(until):
                        return None
                except (OSError, ValueError):  # a signal handler within it has closed it
                    if not self._closed:
                        raise
            return None

    def _stream(self, sock: socket.socket) -> TlsStream:
        return TlsStream(sock, self._context, Meter(), server_side=True)

    def _greet(self, stream: TlsStream, peer: str) -> Connection:
        """A peer, if its role is one of those; it gets the greeting, which tells it that it is welcome."""
        connection = _introduced(stream, self.credentials.role, peer, self._options)
        connection.timeout = 0.0  # nobody is waited for at the door
        if connection.peer_role not in self.allowed_roles:
            raise _unexpected(connection, self.allowed_roles)
        connection.greet()
        connection.timeout = self._options.timeout
        return connection

    def wake(self) -> None:
        """Lets `accept` return; from any thread."""
        self.door.wake()

    @property
    def coming(self) -> bool:
        """Whether somebody is on the way to become a peer, or waits to be accepted; for whoever calls `accept`, which moves them on."""
        return bool(len(self.door) or self.door.ready or select.select([self._socket], [], [], 0)[0])

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Stops listening and wakes `accept`; connections that were made stay. May be called again, from any thread."""
        if self._closed:
            return
        self._closed = True
        self.door.wake()
        with self._accepting:  # not before `accept` has let go of the descriptors; reentrant, for a signal handler within it
            self.door.close()
            self._socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dial(
    address: str,
    credentials: Credentials,
    expected_role: str,
    timeout: float = TIMEOUT_S,
    link: Link | None = None,
    *,
    meter: Meter | None = None,
    connect_s: float | None = None,
    handshake_s: float | None = None,
    silence_s: float | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    waiting: Waiting | None = None,
    hint: str = "",
) -> Connection:
    """Connects to a peer that must have `expected_role` and a certificate for the dialled host.

    Tries again while nobody listens there, for `connect_s` seconds (default: `timeout`), then raises PeerUnreachableError. A peer that
    refuses us or is not the one that we expect raises HandshakeError at once; so does one that does not finish the handshake within
    `handshake_s` (default: `connect_s` or 10 s, the longer, and at most `timeout`). `timeout` is also the connection's longest wait.
    `hint`: see there.
    """
    host, port = parse_address(address)
    role = credentials.role
    connect_s, waiting = timeout if connect_s is None else connect_s, waiting or (lambda reason, left: None)
    handshake_s = min(timeout, max(connect_s, _DIAL_HANDSHAKE_S)) if handshake_s is None else handshake_s
    context = make_context(credentials, server=False)
    if hint:
        context.set_alpn_protocols([(PREFIX + hint.encode()).decode()])
    sock = _connect(host, port, connect_s, role, waiting)
    deadline = time.monotonic() + handshake_s
    with _closing_on_error(sock), _ticking(lambda: waiting(f"no answer yet from {address}", deadline - time.monotonic())):
        name = host.partition("%")[0]  # without the zone of a link-local address
        stream = TlsStream(sock, context, meter or Meter(), server_side=False, host=name)
        stream.handshake(deadline, party=role, peer=address)
        connection = _introduced(stream, role, address, _Options(timeout, handshake_s, silence_s, heartbeat_s, link))
        try:
            if connection.peer_role != expected_role:
                raise _unexpected(connection, {expected_role})
            connection.await_greeting()
        except HandshakeError:
            connection.close(goodbye=False)
            raise
        except PrivinfError as error:
            connection.close(goodbye=False)
            raise PeerUnreachableError(
                f"no welcome after the TLS handshake: {error.message}",
                party=role,
                peer=address,
                remedy="perhaps it refused our certificate; look at the peer's output",
            ) from None
        except BaseException:
            connection.close(goodbye=False)
            raise
        connection.timeout = timeout
        return connection.begin()


def _introduced(stream: TlsStream, party: str, peer: str, options: _Options) -> Connection:
    """The connection of a stream whose TLS handshake is done; HandshakeError if the peer's certificate has no role."""
    try:
        return Connection(
            stream,
            party=party,
            peer_name=peer,
            timeout=options.handshake_s,
            silence_s=options.silence_s,
            heartbeat_s=options.heartbeat_s,
            link=options.link,
        )
    except HandshakeError as error:
        raise HandshakeError(error.message, party=party, peer=peer, remedy=error.remedy) from None


def _unexpected(connection: Connection, allowed: Collection[str]) -> HandshakeError:
    """The error of a peer of another role, which is told of it: in TLS 1.3 it cannot see otherwise what became of its certificate."""
    expected = " or ".join(sorted(allowed))
    told = f"your certificate is for the role {connection.peer_role}, and a {connection.party} here expects {expected}"
    last_words(connection, Failure(Code.HANDSHAKE, told))
    return HandshakeError(
        f"the peer's certificate is for the role {connection.peer_role}, not {expected}",
        party=connection.party,
        peer=connection.peer_name,
        remedy="check the addresses, and which --keys bundle each party was given",
    )


def _connect(host: str, port: int, limit_s: float, party: str, waiting: Waiting) -> socket.socket:
    """A TCP connection, tried again until the limit while the name cannot be resolved or nobody listens."""
    peer, deadline = format_address(host, port), time.monotonic() + limit_s
    pause, reason = 0.02, "no time was given"
    listening = "check that the peer runs and listens there, and the firewall between"
    while True:
        try:
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            places, reason = [], f"the name {host} cannot be resolved, {_lower(str(getattr(error, 'strerror', None) or error))}"
        for number, (family, kind, protocol, _, place) in enumerate(places):
            if (left := deadline - time.monotonic()) <= 0:
                break
            sock = socket.socket(family, kind, protocol)
            try:
                tune(sock)
                _attempt(sock, place, left / (len(places) - number), lambda: waiting(f"no answer from {peer}", deadline - time.monotonic()))
                return sock
            except OSError as error:
                sock.close()
                reason = _lower(error.strerror or str(error))
            except BaseException:
                sock.close()
                raise
        left = deadline - time.monotonic()
        if left <= 0:
            raise PeerUnreachableError(
                f"could not connect within {limit_s:g} s: {reason}",
                party=party,
                peer=peer,
                remedy=listening if places else "check the name",
            )
        waiting(f"{reason}{f' at {peer}' if places else ''}, trying again", left)
        time.sleep(min(pause, left))
        pause = min(2 * pause, 0.5)


def _attempt(sock: socket.socket, place: Any, limit_s: float, tick: Callable[[], None]) -> None:
    """Connects within so many seconds; OSError."""
    deadline, poll = time.monotonic() + limit_s, select.poll()
    sock.setblocking(False)
    code = sock.connect_ex(place)
    poll.register(sock, select.POLLOUT)
    while code == errno.EINPROGRESS:
        left = deadline - time.monotonic()
        if left <= 0:
            code = errno.ETIMEDOUT
        elif poll.poll(min(left, _TICK_S) * 1000):
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            tick()
    if code:
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Calls it once a second while the block runs."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(_TICK_S):
            tick()

    thread = threading.Thread(target=run, name="privinf-dial", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def _closing_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise
