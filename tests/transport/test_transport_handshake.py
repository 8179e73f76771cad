"""Who may speak to whom: handshakes that must fail with one clear line at both ends, strangers, addresses, accepting and dialling."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from privinf.transport import Credentials, Listener, dial, keys, listener, tls
from privinf.transport.keys import init_keys, load_credentials
from privinf.transport.listener import parse_address
from protocols.errors import ConfigError, HandshakeError, PeerUnreachableError
from tests.support.tls_pair import accept_one, connected, outcome, refused
from tests.support.tls_pair import keys_dir as keys_dir
from tests.support.tls_pair import other_ca as other_ca
from tests.support.tls_pair import pool as pool
from tests.support.waiting import PATIENCE

# ---- the handshake


def test_both_ends_know_each_other(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    shown = {info.role: info.fingerprint for info in keys.show_keys(keys_dir)}
    with connected(keys_dir, pool) as pair:
        assert pair.server.peer_role == "client" and pair.client.peer_role == "server"
        assert pair.server.peer_fingerprint == shown["client"] and pair.client.peer_fingerprint == shown["server"]
        assert pair.client.peer_name.startswith("127.0.0.1:") and pair.server.peer_name.startswith("127.0.0.1:")
        assert pair.client._stream.tls.version() == "TLSv1.3"


def test_server_of_another_ca(keys_dir: Path, other_ca: Path, pool: ThreadPoolExecutor) -> None:
    at_server, at_client = refused(pool, load_credentials(other_ca, "server"), load_credentials(keys_dir, "client"))
    assert "was not signed by our CA" in at_client
    assert "the client refused our certificate: it does not know the CA" in at_server


def test_client_of_another_ca(keys_dir: Path, other_ca: Path, pool: ThreadPoolExecutor) -> None:
    server = load_credentials(keys_dir, "server")
    mixed = replace(load_credentials(other_ca, "client"), ca=server.ca)
    at_server, at_client = refused(pool, server, mixed)
    assert "was not signed by our CA" in at_server
    assert "the server refused our certificate: it does not know the CA" in at_client


def test_client_without_a_certificate(keys_dir: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(credentials: Credentials, *, server: bool) -> ssl.SSLContext:
        if server:
            return tls.make_context(credentials, server=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(credentials.ca)
        return context

    monkeypatch.setattr(listener, "make_context", without)
    at_server, at_client = refused(pool, load_credentials(keys_dir, "server"), load_credentials(keys_dir, "client"))
    assert "sent no certificate" in at_server
    assert "asks for a certificate and we sent none" in at_client


@pytest.mark.parametrize("shift, reason", [(-398, "expired"), (2, "not yet valid")])
@pytest.mark.parametrize("bad", ["server", "client"])
def test_certificate_out_of_its_time(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, shift: int, reason: str, bad: str
) -> None:
    """An expired certificate, and one from the future, of either end; the CA is the same and valid."""
    init_keys(tmp_path / "keys")
    good = {role: load_credentials(tmp_path / "keys", role) for role in ("server", "client")}
    for role in good:
        if role != bad:  # keep it: renewal replaces all
            for name in ("cert.pem", "key.pem"):
                (tmp_path / f"{role}-{name}").write_bytes((tmp_path / "keys" / role / name).read_bytes())
            good[role] = replace(good[role], cert=tmp_path / f"{role}-cert.pem", key=tmp_path / f"{role}-key.pem")
    now = keys._now()
    monkeypatch.setattr(keys, "_now", lambda: now + datetime.timedelta(days=shift))
    keys.renew_keys(tmp_path / "keys")
    monkeypatch.undo()
    errors = dict(zip(("server", "client"), refused(pool, good["server"], good["client"]), strict=True))
    seen = errors["client" if bad == "server" else "server"]
    assert f"the peer's certificate {'has' if shift < 0 else 'is'} {reason}" in seen
    assert f"refused our certificate: {'our certificate has expired' if shift < 0 else 'it finds our certificate bad'}" in errors[bad]
    assert "by the clock here [20" in seen and "by its clock" in errors[bad] and "the clocks at both ends" in errors[bad]


def test_server_that_is_the_dealer(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    at_server, at_client = refused(pool, load_credentials(keys_dir, "dealer"), load_credentials(keys_dir, "client"))
    assert "the peer's certificate is for the role dealer, not server" in at_client
    assert "the peer refused: your certificate is for the role dealer, and a client here expects server" in at_server


def test_client_that_is_the_dealer(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    at_server, at_client = refused(pool, load_credentials(keys_dir, "server"), load_credentials(keys_dir, "dealer"))
    assert "the peer's certificate is for the role dealer, not client" in at_server
    assert "the peer refused: your certificate is for the role dealer, and a server here expects client" in at_client


def test_wrong_host_name(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    init_keys(tmp_path / "keys", ["server.example.org"])
    at_server, at_client = refused(pool, load_credentials(tmp_path / "keys", "server"), load_credentials(tmp_path / "keys", "client"))
    assert "is not for the address that we dialled" in at_client and "--host" in at_client
    assert "the client refused our certificate" in at_server
    _, at_client = refused(pool, load_credentials(tmp_path / "keys", "server"), load_credentials(tmp_path / "keys", "client"), "localhost")
    assert "is not for the host name that we dialled" in at_client


def test_a_certificate_without_a_role(keys_dir: Path, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init_keys(tmp_path / "keys")
    monkeypatch.setattr(keys, "ROLE_PREFIX", "other:")
    keys.renew_keys(tmp_path / "keys")
    monkeypatch.undo()
    bundle = tmp_path / "keys" / "client"
    nobody = Credentials("client", bundle / "cert.pem", bundle / "key.pem", bundle / "ca.pem")
    with Listener("127.0.0.1:0", replace(nobody, role="server"), {"client"}) as door:
        at_server = pool.submit(outcome, lambda: accept_one(door))
        assert "carries no single privinf role" in str(outcome(lambda: dial(door.address, nobody, "server", timeout=5)))
        assert isinstance(at_server.result(PATIENCE), HandshakeError)


def test_tls_1_2_is_refused(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    client = load_credentials(keys_dir, "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(client.ca)
    context.load_cert_chain(client.cert, client.key)
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}) as door:
        at_server = pool.submit(outcome, lambda: accept_one(door))
        with socket.create_connection(parse_address(door.address)) as raw, pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            context.wrap_socket(raw, server_hostname="127.0.0.1")
        assert "does not speak TLS 1.3" in str(at_server.result(PATIENCE))


@pytest.mark.parametrize(
    "hello, reason",
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "plain HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak TLS"),
        (b"\x00" * 4096, "TLS"),
        (bytes(range(256)) * 300, "TLS"),
        (b"\x16\x03\x01\xff\xff" + b"\x01" * 70000, "TLS"),
        (b"", "closed the connection during the TLS handshake"),
        (b"\x16\x03\x01\x02\x00\x01", "closed the connection during the TLS handshake"),
    ],
)
def test_a_client_that_speaks_something_else(keys_dir: Path, pool: ThreadPoolExecutor, hello: bytes, reason: str) -> None:
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}) as door:
        at_server = pool.submit(outcome, lambda: accept_one(door))
        with socket.create_connection(parse_address(door.address)) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(hello)
            raw.shutdown(socket.SHUT_WR)
            at_server.result(PATIENCE)
        error = at_server.result(PATIENCE)
        assert isinstance(error, HandshakeError) and (reason in str(error) or "broke" in str(error))


def test_a_server_that_speaks_something_else(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            peer = door.accept()[0]
            with peer:
                peer.sendall(b"220 mail.example.org ESMTP\r\n")
                peer.recv(4096)

        answered = pool.submit(answer)
        address = f"127.0.0.1:{door.getsockname()[1]}"
        error = outcome(lambda: dial(address, load_credentials(keys_dir, "client"), "server", timeout=5))
        assert isinstance(error, HandshakeError) and "does not speak TLS" in str(error)
        answered.result(PATIENCE)


def test_a_silent_client_blocks_nobody(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, handshake_s=8.0) as door:
        with socket.create_connection(parse_address(door.address)):
            accepted = pool.submit(accept_one, door)
            with dial(door.address, load_credentials(keys_dir, "client"), "server") as client, accepted.result(PATIENCE) as server:
                assert len(door.door) == 1  # the silent one is still there
                client.send(b"hello")
                assert server.receive(5) == b"hello"
            error = outcome(lambda: accept_one(door))
        assert isinstance(error, HandshakeError) and "in time" in str(error)


def test_a_silent_server(keys_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"127.0.0.1:{door.getsockname()[1]}"
        error = outcome(lambda: dial(address, load_credentials(keys_dir, "client"), "server", handshake_s=0.3))
        assert isinstance(error, HandshakeError) and "in time" in str(error)


def test_dialling_waits_for_a_peer_that_is_not_there_yet(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    client = load_credentials(keys_dir, "client")
    error = outcome(lambda: dial(address, client, "server", timeout=0.3))
    assert isinstance(error, PeerUnreachableError) and error.exit_code == 3 and "refused" in str(error)
    dialled = pool.submit(dial, address, client, "server", 10)
    time.sleep(0.4)
    with Listener(address, load_credentials(keys_dir, "server"), {"client"}) as door, accept_one(door), dialled.result(PATIENCE):
        pass
    assert isinstance(outcome(lambda: dial("no-such-host.invalid:1", client, "server", timeout=0.2)), PeerUnreachableError)


def test_listener_addresses_and_close(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    server = load_credentials(keys_dir, "server")
    door = Listener("127.0.0.1:0", server, {"client"})
    assert parse_address(door.address)[1] > 0
    assert door.accept(0.05) is None and not door.closed
    assert isinstance(outcome(lambda: Listener(door.address, server, {"client"})), ConfigError)
    waiting = pool.submit(door.accept)
    time.sleep(0.1)
    door.close()
    assert waiting.result(PATIENCE) is None and door.closed and door.accept() is None
    door.close()
    assert isinstance(outcome(lambda: Listener("192.0.2.1:0", server, {"client"})), ConfigError)
    assert isinstance(outcome(lambda: Listener("no-such-host.invalid:0", server, {"client"})), ConfigError)


@pytest.mark.parametrize(
    "text, expected", [("localhost:7000", ("localhost", 7000)), ("[::1]:0", ("::1", 0)), (" a.b:65535 ", ("a.b", 65535))]
)
def test_good_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":7000", "::1:7000", "host:65536", "host:-1", "host:1x", "a b:1", "[::1:1", "host:٣", "[]:1"]
)
def test_bad_addresses(text: str) -> None:
    assert isinstance(outcome(lambda: parse_address(text)), ConfigError)


def test_ipv6(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with Listener("[::1]:0", load_credentials(keys_dir, "server"), {"client"}) as door:
        accepted = pool.submit(accept_one, door)
        with dial(door.address, load_credentials(keys_dir, "client"), "server") as client, accepted.result(PATIENCE) as server:
            assert door.address.startswith("[::1]:") and server.peer_name.startswith("[::1]:")
            client.send(b"x")
            assert server.receive(1) == b"x"
