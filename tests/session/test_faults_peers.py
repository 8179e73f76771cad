"""Peers that are not what they should be: strangers, wrong certificates, other releases, malformed and lying messages.

Each is refused in one readable line, and the services go on serving others.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from privinf.client.client import Client
from privinf.server.server import Server
from privinf.session.messages import Hello, Join, Register, SessionSeed, Welcome, greet
from privinf.session.options import Options
from privinf.transport.listener import parse_address
from privinf.version import PROTOCOL
from protocols.errors import ConfigError, HandshakeError, ProtocolDesync, TransportError, broke_off
from tests.support import trio as t
from tests.support.peers import as_client, dialled, is_well, load_fingerprint, said
from tests.support.peers import parties as parties
from tests.support.peers import quiet as quiet
from tests.support.tls_pair import inject, outcome
from tests.support.trio import Trio, trio

# ---- strangers


def tcp(address: str) -> socket.socket:
    return socket.create_connection(parse_address(address), 5)


@pytest.mark.parametrize("role", ["server", "dealer"])
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "speaks plain HTTP"),
        (b"SSH-2.0-garbage\r\n" * 50, "does not speak TLS"),
        (bytes(range(256)) * 40, "the TLS handshake failed|does not speak TLS"),
        (b"\x16\x03\x01", "closed the connection during the TLS handshake"),
    ],
)
def test_garbage(parties: Trio, caplog: pytest.LogCaptureFixture, role: str, raw: bytes, words: str) -> None:
    with tcp(getattr(parties, role).address) as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
    assert any(word in said(caplog, role) for word in words.split("|"))
    assert is_well(parties)


def test_connections_that_say_nothing_keep_nobody_out(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    doors = [service._listener.door for service in (parties.server, parties.dealer)]
    with contextlib.ExitStack() as stack:
        for service, door in zip((parties.server, parties.dealer), doors, strict=True):
            for _ in range(door.silent.most + 20):
                stack.enter_context(tcp(service.address))
        assert is_well(parties)
        t.wait_for(lambda: "1024 others are no further, and its place was needed" in caplog.text)
        t.wait_for(lambda: not any(map(len, doors)))  # the handshake's deadline


def test_a_server_and_a_dealer_that_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Something listens there, and takes the connection, and that is all."""
    with trio(cache=t.scratch() / "cache", timeout=5.0) as parties, socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        error = outcome(Client(address, dealer=address, keys=str(t.keys()), options=Options(timeout=1.0)).connect)
        assert "did not finish the TLS handshake in time" in str(error) and error.exit_code == 3
        parties.server.supply.dealer = address
        error = outcome(lambda: parties.client().connect())
        assert f"the server cannot reach its dealer at {address}: the peer did not finish" in str(error) and error.exit_code == 3
        assert "cannot reach its dealer" in said(caplog, "server")


def test_a_peer_with_a_certificate_that_says_nothing(
    parties: Trio, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("server", "dealer"):
        service = getattr(parties, role)
        monkeypatch.setattr(service._listener.door.known, "seconds", 0.6)
        with dialled(service.address, "client", role) as connection:
            connection.timeout = t.PATIENCE
            assert "0.6 s" in str(outcome(lambda: connection.receive_control(Hello)))
        assert "0.6 s" in said(caplog, role)
        assert service.counters.refusals["silent"] == 1


def test_more_peers_than_are_served(parties: Trio, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parties.server, "options", replace(parties.server.options, sessions=1))
    with as_client(parties) as first:
        first.receive_control(Welcome)
        error = outcome(lambda: list(parties.client().generate(ids=[1])))
        assert isinstance(error, HandshakeError) and "serves 1 peers already; come again later" in str(error)
    assert "come again later" in said(caplog, "server", "come again")
    t.wait_for(lambda: not parties.server.peers)
    monkeypatch.undo()
    assert is_well(parties)


# ---- certificates


def handshake(address: str, context: ssl.SSLContext) -> None:
    """A TLS client by the standard library."""
    context.check_hostname = False
    with tcp(address) as sock, context.wrap_socket(sock) as tls:
        while tls.recv(4096):
            pass


def bare(trust: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(trust / "ca.pem"))
    return context


@pytest.fixture(scope="module")
def expired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's bundle of our CA that expired yesterday."""
    import datetime
    import shutil

    from privinf.transport import keys

    directory = tmp_path_factory.mktemp("expired") / "keys"
    shutil.copytree(t.keys(), directory)
    now = keys._now()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_now", lambda: now - datetime.timedelta(days=2))
        keys.renew_keys(directory, days=1)
    return directory


@pytest.mark.parametrize("role", ["server", "dealer"])
@pytest.mark.parametrize("which", ["none", "stranger", "expired"])
def test_certificates_that_do_not_count(parties: Trio, caplog: pytest.LogCaptureFixture, expired: Path, role: str, which: str) -> None:
    context, words = bare(t.keys()), "sent no certificate"
    if which == "stranger":
        context.load_cert_chain(str(t.other_ca() / "client" / "cert.pem"), str(t.other_ca() / "client" / "key.pem"))
        words = "was not signed by our CA"
    elif which == "expired":
        context.load_cert_chain(str(expired / "client" / "cert.pem"), str(expired / "client" / "key.pem"))
        words = "has expired"
    with contextlib.suppress(OSError):
        handshake(getattr(parties, role).address, context)
    assert words in said(caplog, role)
    assert is_well(parties)


def test_a_client_of_another_ca_and_one_whose_certificate_has_expired(
    parties: Trio, expired: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = outcome(lambda: list(parties.client(keys=t.other_ca()).generate(ids=[1])))
    assert error.exit_code == 3 and "was not signed by our CA" in str(error)
    said(caplog, "server", "refused")
    error = outcome(lambda: parties.client(keys=expired))
    assert error.exit_code == 2 and "has expired on" in str(error) and "privinf keys renew" in str(error)


def test_roles_are_checked(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    """A certificate of the right CA for another role: at every door, on both sides, and when a service is started with it."""
    for role, door, expected in (("server", "server", "client"), ("dealer", "server", "client"), ("dealer", "dealer", "client or server")):
        caplog.clear()
        error = outcome(lambda role=role, door=door: dialled(getattr(parties, door).address, role, door))  # type: ignore[misc]
        assert error.exit_code == 3 and f"your certificate is for the role {role}" in str(error)
        assert f"is for the role {role}, not {expected}" in said(caplog, door)
    caplog.clear()
    crossed = Client(parties.dealer.address, dealer=parties.server.address, keys=str(t.keys()))
    error = outcome(lambda: list(crossed.generate(ids=[1])))
    assert error.exit_code == 3 and "the peer's certificate is for the role dealer, not server" in str(error)
    said(caplog, "dealer")
    for bundle in ("client", "dealer"):
        keys = str(t.keys() / bundle)
        with pytest.raises(ConfigError, match=f"is for the role {bundle}, not server"):
            Server(t.lowered(), listen="127.0.0.1:0", dealer=parties.dealer.address, keys=keys)
    assert is_well(parties)


def test_a_client_at_the_dealers_door_as_if_it_were_the_server(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    """It would learn the seed that it names, and the dealer's with it; its certificate decides, not what it says."""
    with dialled(parties.dealer.address, "client", "dealer") as connection:
        greet(connection)
        connection.send_control(Register(secrets.token_bytes(16), connection.peer_fingerprint, secrets.token_bytes(32), ()))
        error = outcome(lambda: connection.receive_control(SessionSeed))
        assert isinstance(error, HandshakeError) and "not a Join" in str(error)
    assert "not a Join" in said(caplog, "dealer") and not parties.dealer._sessions


# ---- frames


@pytest.mark.parametrize("established", [False, True], ids=["handshake", "session"])
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (struct.pack("!Q", 1 << 60) + bytes(10), "a frame of unknown kind 0"),
        (struct.pack("!IBBIQ", 0xFFFFFFFF, 2, 0, 0, 0), "claims 4294967295 bytes; the limit is"),
        (struct.pack("!IBBIQ", 100, 2, 0, 0, 0) + b"half", "closed the connection in the middle of a message"),
        (struct.pack("!IBBIQ", 4, 99, 0, 0, 0) + b"what", "a frame of unknown kind 99"),
        (struct.pack("!IBBIQ", 4, 2, 0, 0, 0) + b"\xc1\xc1\xc1\xc1", "a control message that is not a"),
        (struct.pack("!IBBIQ", 4, 1, 0, 0, 0) + b"data", "expected a CONTROL message and received a DATA message"),
    ],
)
def test_frames(parties: Trio, caplog: pytest.LogCaptureFixture, established: bool, raw: bytes, words: str) -> None:
    session = None
    if established:
        session = parties.client().connect()
        connection = session.connection
    else:
        connection = dialled(parties.server.address, "client", "server")
        greet(connection)
        connection.receive_control(Welcome)
    inject(connection, raw)
    if "middle" in words:
        connection._stream.sock.shutdown(socket.SHUT_WR)
    connection.timeout = t.PATIENCE
    error = outcome(lambda: connection.receive_control(Hello))
    assert isinstance(error, (TransportError, ProtocolDesync) if established else HandshakeError)
    connection.close(goodbye=False)
    if session is not None:
        session.close()
    assert words in said(caplog, "server")
    assert is_well(parties)


# ---- releases


def test_another_release() -> None:
    with t.services() as services:
        client = services.generate("--timeout", 10, hook=t.OtherRelease())
        assert client.wait() == 3 and client.out == ""
        (line,) = client.lines
        assert f"protocol versions differ: {PROTOCOL} (privinf " in line and f"there, {PROTOCOL + 1} (privinf 9.9.9) here" in line
        assert "install the same release on all machines" in line
        line = services.server.until_lines(2)[1]
        assert f"protocol versions differ: {PROTOCOL + 1} (privinf 9.9.9) there, {PROTOCOL} (privinf " in line


# ---- tokens


def test_session_tokens(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    def join(token: bytes, keys: Path | None = None) -> bytes:
        with dialled(parties.dealer.address, "client", "dealer", keys) as connection:
            greet(connection)
            connection.send_control(Join(token))
            return connection.receive_control(SessionSeed).seed

    token = secrets.token_bytes(16)
    refusal = "no server has announced this session for your certificate"
    error = outcome(lambda: join(token))
    assert isinstance(error, HandshakeError) and refusal in str(error) and error.exit_code == 3 and broke_off(error)
    with dialled(parties.dealer.address, "server", "dealer") as server, dialled(parties.server.address, "client", "server") as client:
        fingerprint = client._stream.tls and load_fingerprint(t.keys() / "client" / "cert.pem")
        greet(server)
        server.send_control(Register(token, fingerprint, secrets.token_bytes(32), ()))
        seed = server.receive_control(SessionSeed).seed
        assert refusal in str(outcome(lambda: join(token, t.second_client())))  # another client's certificate
        assert refusal in str(outcome(lambda: join(bytes(16))))
        assert join(token) not in (seed, token)
        assert refusal in str(outcome(lambda: join(token)))  # a second time
        with dialled(parties.dealer.address, "server", "dealer") as second:
            greet(second)
            second.send_control(Register(token, fingerprint, secrets.token_bytes(32), ()))
            assert "this session token is in use" in str(outcome(lambda: second.receive_control(SessionSeed)))
    t.wait_for(lambda: not parties.dealer._sessions)
    assert refusal in str(outcome(lambda: join(token)))
    assert caplog.text.count(refusal) == 5 and token.hex() not in caplog.text and repr(token) not in caplog.text
