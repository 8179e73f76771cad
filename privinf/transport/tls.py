"""Mutual TLS 1.3: who may speak to whom, and the byte stream between socket and TLS.

Both ends present a certificate of the one private CA. The role that a certificate carries (`privinf:server` and so on, a URI among its
alternative names) is checked by every accept and connect, the host name by every connect. TLS runs over memory buffers
(`ssl.MemoryBIO`) and a non-blocking socket, so that what crosses the wire is counted exactly, at `send` and `recv`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import re
import select
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any, cast

from privinf.transport.frames import Buffer
from privinf.transport.keys import ROLE_PREFIX, Credentials
from privinf.transport.meter import Meter
from protocols.errors import ConfigError, HandshakeError, PeerUnreachableError, PrivinfError

READ_CHUNK = 256 * 2**10
WRITE_CHUNK = 256 * 2**10  # a multiple of TLS's 16 KiB records, small enough to stay in the cache
_SOCKET_BUFFER = 4 * 2**20
HANDSHAKE_S = 5.0
_HANDSHAKE_BYTES = 256 * 2**10
"""What a peer may send before the TLS handshake is done; certificates take a few KiB."""
_ANSWERS = 2**20
"""What TLS itself may have to say to a peer that takes nothing: answers to its key updates."""

_ALERTS = {  # OpenSSL's name of an alert that the peer sent -> what it means to the reader
    "UNKNOWN_CA": "it does not know the CA that signed our certificate",
    "CERTIFICATE_EXPIRED": "our certificate has expired by its clock",
    "CERTIFICATE_REVOKED": "our certificate was revoked",
    "BAD_CERTIFICATE": "it finds our certificate bad (another host name than it asked for, or not yet valid by its clock)",
    "CERTIFICATE_UNKNOWN": "it cannot accept our certificate",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not made for this purpose",
    "CERTIFICATE_REQUIRED": "it asks for a certificate and we sent none",
    "ACCESS_DENIED": "it denies access",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "BAD_RECORD_MAC": "what it received was damaged on the way",
    "DECODE_ERROR": "what it received was damaged on the way",
    "ILLEGAL_PARAMETER": "what it received was damaged on the way",
    "UNEXPECTED_MESSAGE": "what it received was damaged on the way",
    "HANDSHAKE_FAILURE": "the two ends have no TLS parameters in common",
    "DECRYPT_ERROR": "our certificate's signature does not hold (made by another CA of the same name, or another key)",
}
_VERIFY = {  # X509_V_ERR_* of our own verification
    9: ("is not yet valid by the clock here", "set the clock that is wrong, here or where it was issued"),
    10: (
        "has expired by the clock here",
        "set the clock if it is wrong; else run `privinf keys renew` where the CA is, and carry the new bundle over",
    ),
    62: ("is not for the host name that we dialled", "issue it with `--host NAME`, or dial a name that `privinf keys show` lists"),
    64: ("is not for the address that we dialled", "issue it with `--host ADDRESS`, or dial a name that `privinf keys show` lists"),
}
_LOCAL = {  # OpenSSL's reasons for a handshake that fails at our end
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": ("the peer sent no certificate", "dial with a `--keys` bundle of the same CA"),
    "UNSUPPORTED_PROTOCOL": ("the peer does not speak TLS 1.3", ""),
    "NO_PROTOCOLS_AVAILABLE": ("the peer does not speak TLS 1.3", ""),
    "WRONG_VERSION_NUMBER": ("the peer does not speak TLS", "check the port: something else may be listening or dialling there"),
    "HTTP_REQUEST": ("the peer speaks plain HTTP", "this port is for privinf's own clients"),
    "HTTPS_PROXY_REQUEST": ("the peer speaks HTTP to a proxy", "this port is for privinf's own clients"),
}


def _load_pair(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Certificate and key are two files: while `keys renew` writes them they may for a moment not belong together."""
    for left in reversed(range(10)):
        try:
            context.load_cert_chain(str(credentials.cert), str(credentials.key), password="")  # never ask on the terminal
            return
        except ssl.SSLError as error:
            if not left or error.reason != "KEY_VALUES_MISMATCH":
                raise
            time.sleep(0.05)


def make_context(credentials: Credentials, *, server: bool) -> ssl.SSLContext:
    """A context for accepting (`server`) or for dialling: TLS 1.3 only, certificates required of both sides."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = not server
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if server:
        context.num_tickets = 0  # sessions are never resumed: every connection proves its certificates anew
    try:
        context.load_verify_locations(cafile=str(credentials.ca))
        _load_pair(context, credentials)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot load the certificate or key in {Path(credentials.cert).parent}: {error}", remedy="run `privinf keys renew`"
        ) from None
    return context


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate in DER form, in hexadecimal."""
    return hashlib.sha256(certificate).hexdigest()


def role_of(certificate: dict[str, Any] | None) -> str:
    """The role in a verified certificate (as `getpeercert()` gives it); raises HandshakeError unless there is exactly one."""
    names = (certificate or {}).get("subjectAltName", ())
    roles = [value.removeprefix(ROLE_PREFIX) for kind, value in names if kind == "URI" and value.startswith(ROLE_PREFIX)]
    if len(roles) != 1:
        raise HandshakeError("the peer's certificate carries no single privinf role", remedy="issue it with `privinf keys init`")
    return str(roles[0])


def subject_of(certificate: dict[str, Any] | None) -> str:
    """The common name in a verified certificate; empty if it has none."""
    parts = (part for name in (certificate or {}).get("subject", ()) for part in name)
    return next((str(value) for kind, value in parts if kind == "commonName"), "")


def expiry_of(certificate: dict[str, Any] | None) -> float:
    """When a verified certificate expires, seconds since the epoch; 0 where there is none."""
    return float(ssl.cert_time_to_seconds(certificate["notAfter"])) if certificate else 0.0


def reason_of(error: ssl.SSLError) -> str:
    """OpenSSL's reason in words, without its source lines."""
    text = (error.reason or str(error)).lower().replace("_", " ")
    return re.sub(r"\[ssl.*?\] ?| ?\( ?ssl\.c:\d+\)", "", text)


def tls_failure(error: ssl.SSLError, *, party: str, peer: str, dialled: bool) -> HandshakeError:
    """One clear line for what OpenSSL reports while two ends get to know each other."""
    them = "the server" if dialled else "the client"
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        what, remedy = _VERIFY.get(error.verify_code, ("was not signed by our CA", "use bundles that one `privinf keys init` made"))
        now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        detail = now if error.verify_code in (9, 10) else error.verify_message.rstrip(".")
        return HandshakeError(f"the peer's certificate {what} [{detail}]", party=party, peer=peer, remedy=remedy)
    if "_ALERT_" in reason:
        alert = reason.split("_ALERT_", 1)[1]
        why = _ALERTS.get(alert, alert.lower().replace("_", " "))
        about = "our certificate" if "CERTIFICATE" in alert or alert in ("UNKNOWN_CA", "DECRYPT_ERROR") else "the connection"
        clocks = " and the clocks" if alert in ("CERTIFICATE_EXPIRED", "BAD_CERTIFICATE") else ""
        remedy = f"compare `privinf keys show`{clocks} at both ends"
        return HandshakeError(f"{them} refused {about}: {why}", party=party, peer=peer, remedy=remedy)
    what, remedy = _LOCAL.get(reason, ("", ""))
    what = what or f"the TLS handshake failed: {reason_of(error)}"
    return HandshakeError(what, party=party, peer=peer, remedy=remedy or "check that both ends run privinf")


def tune(sock: socket.socket) -> None:
    """No delay for small messages; large buffers, but only where the kernel grants them: asking for less than it tunes itself does harm."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        try:
            granted = int(Path("/proc/sys/net/core", limit).read_text())
        except (OSError, ValueError):
            continue
        if granted >= _SOCKET_BUFFER:
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)


class _Scratch(threading.local):
    """Where a thread receives what it gives to TLS at once: one for all its streams, of which a door has thousands."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_CHUNK))


_SCRATCH = _Scratch()


class TlsStream:
    """TLS over a non-blocking socket by memory buffers. Not locked: its owner does that."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, meter: Meter, *, server_side: bool, host: str | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.meter = meter
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=host)
        self._cipher = memoryview(b"")  # encrypted, not yet sent
        self.raw_sent = 0
        self.raw_received = 0
        self.ended = False
        """True once the peer will send no more: TCP's end of file, or TLS's close_notify."""
        self.last_sent = self.last_received = time.monotonic()

    def encrypt(self, plain: Buffer) -> None:
        """Encrypts all of it; `push` sends."""
        self.tls.write(plain)  # a memory BIO takes everything

    @property
    def unsent(self) -> bool:
        """Whether encrypted bytes wait for the socket."""
        return bool(self._cipher) or self._out.pending > 0

    def push(self) -> bool:
        """Sends what is encrypted; False if the socket would block. Raises OSError when the peer has gone."""
        while self.unsent:
            if not self._cipher:
                self._cipher = memoryview(self._out.read())
            try:
                count = self.sock.send(self._cipher)
            except (BlockingIOError, InterruptedError):
                return False
            self._cipher = self._cipher[count:]
            self.raw_sent += count
            self.meter.current.sent += count
            self.last_sent = time.monotonic()
        return True

    def pull(self, limit: int = READ_CHUNK) -> int:
        """Takes in what the socket has, one chunk of `limit` bytes at most; 0 if nothing is there or the stream ended. Raises OSError."""
        if self._out.pending > WRITE_CHUNK + _ANSWERS:
            raise ConnectionAbortedError("the peer takes none of the answers that it asks for")
        scratch = _SCRATCH.view
        try:
            count = self.sock.recv_into(scratch, limit)
        except (BlockingIOError, InterruptedError):
            return 0
        if count == 0:
            self.ended = True
            self._in.write_eof()
            return 0
        self._in.write(scratch[:count])
        self.raw_received += count
        self.meter.current.received += count
        self.last_received = time.monotonic()
        return count

    @property
    def buffered(self) -> bool:
        """True if bytes came that were not read: perhaps part of a record."""
        return self._in.pending > 0 or self.tls.pending() > 0

    def read_into(self, target: memoryview) -> int:
        """Decrypts into the target; 0 if no record is complete. Raises ssl.SSLError for an alert or a damaged record."""
        try:
            # at most one record a call; the length is explicit since the type stub knows only bytearray as a buffer
            return cast(int, self.tls.read(len(target), cast(bytearray, target)))
        except ssl.SSLWantReadError:
            return 0
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self.ended = True
            return 0

    def handshake(self, deadline: float, *, party: str, peer: str) -> None:
        """Runs the TLS handshake until `deadline` (time.monotonic()); HandshakeError, or PeerUnreachableError if whom we dialled goes."""
        poll = select.poll()
        try:
            while not self.shake(party=party, peer=peer):
                poll.register(self.sock, select.POLLIN | select.POLLOUT if self.unsent else select.POLLIN)
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    raise late(party, peer)
        except PrivinfError:
            with contextlib.suppress(OSError):  # an alert tells the peer why
                self.sock.shutdown(socket.SHUT_WR)
                linger(self.sock, 0.5)
            raise

    def shake(self, *, party: str, peer: str) -> bool:
        """Gets on with the TLS handshake by what has come, without waiting; True once it is done. Raises as `handshake` does."""
        dialled = not self.tls.server_side
        broken = PeerUnreachableError if dialled else HandshakeError
        try:
            while True:
                try:
                    self.tls.do_handshake()
                    done = True
                except ssl.SSLWantReadError:
                    done = False
                except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                    raise broken(
                        "the peer closed the connection during the TLS handshake",
                        party=party,
                        peer=peer,
                        remedy="look at the peer's output",
                    ) from None
                except ssl.SSLError as error:
                    with contextlib.suppress(OSError):
                        self.push()  # the alert
                    raise tls_failure(error, party=party, peer=peer, dialled=dialled) from None
                flushed = self.push()
                if done:
                    return flushed
                if self.raw_received > _HANDSHAKE_BYTES:
                    raise HandshakeError(
                        "the peer sends without end in the TLS handshake", party=party, peer=peer, remedy="look at the peer"
                    )
                if not self.pull() and not self.ended:
                    return False
        except OSError as error:
            raise broken(
                f"the connection broke during the TLS handshake: {error.strerror or error}",
                party=party,
                peer=peer,
                remedy="look at the peer's output",
            ) from None


def late(party: str, peer: str, why: str = "") -> HandshakeError:
    """A peer that is not through with the TLS handshake when its time is over."""
    return HandshakeError(
        f"the peer did not finish the TLS handshake in time{why and f': {why}'}",
        party=party,
        peer=peer,
        remedy="check that it is a privinf party, and the network between",
    )


def linger(sock: socket.socket, limit_s: float) -> int:
    """Waits until the peer's kernel has all that we sent, or `limit_s` seconds, and drops what comes meanwhile; returns its bytes.

    Closing a socket that holds unread bytes makes the kernel reset the connection and throw away what it has not yet sent, an error
    message or the last answer, say. So the caller shuts down its sending side, calls this, and then closes.
    """
    deadline = time.monotonic() + limit_s
    poll, dropped = select.poll(), 0
    poll.register(sock, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:  # also of a peer that sends on and on
            return dropped
        try:
            chunk = sock.recv(65536)
            if not chunk:
                return dropped
            dropped += len(chunk)
            continue
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            return dropped
        if not unacknowledged(sock):
            return dropped
        poll.poll(min(left, 0.005) * 1000)


def unacknowledged(sock: socket.socket) -> bool:
    """True while the peer's kernel has not confirmed all that we sent; also where that cannot be asked."""
    try:
        import fcntl
        import termios

        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"), "little") > 0
    except (ImportError, OSError):
        return True
