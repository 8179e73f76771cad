"""The transport over real sockets and, where that is the claim, between real processes: handshakes that must fail, frames that must be
refused, peers that die or hang, deadlines, the meter, the emulated link, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privinf.transport import Connection, Credentials, Endpoint, Kind, Link, Listener, Meter, dial, keys, listener, memory_pair, tls
from privinf.transport.endpoint import one_line
from privinf.transport.frames import DESYNC, HEADER, MORE, Frame, FrameReader, flat, pack_header, parse_header
from privinf.transport.keys import init_keys, load_credentials
from privinf.transport.listener import parse_address
from privinf.transport.shaper import LINKS, parse_link
from protocols.errors import ConfigError, HandshakeError, PeerUnreachableError, PrivinfError, ProtocolDesync, TransportError

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20


@pytest.fixture(scope="module")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys") / "keys"
    init_keys(directory)
    return directory


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("other") / "keys"
    init_keys(directory)
    return directory


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@dataclass
class Pair:
    server: Connection
    client: Connection


@contextlib.contextmanager
def connected(keys_dir: Path, pool: ThreadPoolExecutor, *, established: bool = True, **options: Any) -> Iterator[Pair]:
    options = {"timeout": 20.0, **options}
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, **options) as door:
        accepted = pool.submit(accept_one, door)
        client = dial(door.address, load_credentials(keys_dir, "client"), "server", **options)
        server = accepted.result(10)
    with server, client:
        if established:
            server.establish()
            client.establish()
        yield Pair(server, client)


def accept_one(door: Listener) -> Connection:
    sock = door.accept(10)
    assert sock is not None
    return door.handshake(sock)


def together(pool: ThreadPoolExecutor, *calls: Callable[[], Any]) -> list[Any]:
    """Runs the calls at the same time, one thread each."""
    return [future.result(30) for future in [pool.submit(call) for call in calls]]


def outcome(call: Callable[[], Any]) -> PrivinfError:
    """The error that a call must end with; checks that it is one readable line."""
    with pytest.raises(PrivinfError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 700
    return caught.value


def inject(connection: Connection, raw: bytes) -> None:
    """Puts bytes into a peer's stream of frames, whatever they are, under valid TLS."""
    connection._stream.encrypt(raw)
    assert connection._stream.push()


# ---- the handshake


def refused(
    pool: ThreadPoolExecutor, server: Credentials, client: Credentials, address: str = "127.0.0.1", **dialling: Any
) -> tuple[str, str]:
    """The errors at (server, client) of a handshake that must fail; the server's may come with its first message."""
    with Listener("127.0.0.1:0", server, {"client"}, timeout=5) as door:

        def accept() -> None:
            with accept_one(door) as connection:
                connection.receive(1)

        at_server = pool.submit(outcome, accept)
        port = door.address.rpartition(":")[2]
        error = outcome(lambda: dial(f"{address}:{port}", client, "server", timeout=5, **dialling))
        for one in (error, at_server.result(10)):
            assert isinstance(one, HandshakeError) and one.exit_code == 3 and one.party
        return str(at_server.result()), str(error)


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
        assert isinstance(at_server.result(10), HandshakeError)


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
        assert "does not speak TLS 1.3" in str(at_server.result(10))


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
            at_server.result(10)
        error = at_server.result(10)
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
        answered.result(10)


def test_a_silent_client_blocks_nobody(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, handshake_s=1.0) as door:
        with socket.create_connection(parse_address(door.address)):
            silent = pool.submit(outcome, lambda: accept_one(door))
            time.sleep(0.1)
            began = time.monotonic()
            accepted = pool.submit(accept_one, door)
            with dial(door.address, load_credentials(keys_dir, "client"), "server") as client, accepted.result(10) as server:
                assert time.monotonic() - began < 0.8
                client.send(b"hello")
                assert server.receive(5) == b"hello"
            error = silent.result(10)
        assert isinstance(error, HandshakeError) and "in time" in str(error)
        assert 0.9 < time.monotonic() - began < 5


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
    with Listener(address, load_credentials(keys_dir, "server"), {"client"}) as door, accept_one(door), dialled.result(10):
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
    assert waiting.result(5) is None and door.closed and door.accept() is None
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
        with dial(door.address, load_credentials(keys_dir, "client"), "server") as client, accepted.result(10) as server:
            assert door.address.startswith("[::1]:") and server.peer_name.startswith("[::1]:")
            client.send(b"x")
            assert server.receive(1) == b"x"


# ---- frames

HEADERS = st.one_of(
    st.tuples(st.sampled_from([Kind.DATA, Kind.CONTROL]), st.binary(max_size=3000), st.sampled_from([0, MORE])),
    st.tuples(st.sampled_from([Kind.HEARTBEAT, Kind.GOODBYE]), st.just(b""), st.just(0)),
    st.tuples(st.just(Kind.ERROR), st.binary(max_size=600), st.sampled_from([0, DESYNC])),
)


def cut(stream: bytes, sizes: list[int], reader: FrameReader) -> list[Frame]:
    """Feeds a stream to a reader in pieces of the given sizes, over and over."""
    frames, at, turn = [], 0, 0
    while at < len(stream):
        target = reader.target()
        count = min(len(target), sizes[turn % len(sizes)], len(stream) - at)
        target[:count] = stream[at : at + count]
        at, turn = at + count, turn + 1
        frame = reader.advance(count)
        if frame is not None:
            frames.append(frame)
    return frames


@given(
    st.lists(st.tuples(HEADERS, st.integers(0, 2), st.integers(0, 2**31 - 1), st.integers(0, 2**64 - 1)), max_size=8),
    st.lists(st.integers(1, 4000), min_size=1, max_size=10),
)
def test_frames_survive_any_cutting(messages: list[Any], sizes: list[int]) -> None:
    stream, expected = b"", []
    for (kind, body, flags), phase, depth, stamp in messages:
        stream += pack_header(len(body), kind, flags | phase, depth, stamp) + body
        expected.append(((len(body), kind, flags | phase, depth, stamp), body))
    reader = FrameReader(lambda header: None)
    frames = cut(stream, sizes, reader)
    assert [(tuple(frame.header), bytes(frame.body)) for frame in frames] == expected
    assert not reader.mid_frame


@settings(max_examples=300)
@given(st.binary(min_size=HEADER.size, max_size=300), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_garbage_is_refused_or_read_but_never_breaks(stream: bytes, sizes: list[int]) -> None:
    asked: list[int] = []

    def admit(header: Any) -> None:
        if header.length > 200:
            raise TransportError("too large")
        asked.append(header.length)

    with contextlib.suppress(TransportError):
        cut(stream, sizes, FrameReader(admit))
    assert all(length <= 200 for length in asked)


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_headers_are_read_exactly_or_refused(raw: bytes) -> None:
    try:
        header = parse_header(raw)
    except TransportError:
        return
    assert pack_header(*header) == raw


def test_a_header_is_small() -> None:
    assert HEADER.size <= 20


def test_flat_takes_what_has_contiguous_bytes() -> None:
    assert flat(memoryview(b"abcdefgh").cast("Q")) == b"abcdefgh"
    assert len(flat(memoryview(bytearray(0)))) == 0
    with pytest.raises(TypeError):
        flat(memoryview(b"abcdef")[::2])


@pytest.mark.parametrize(
    "raw, reason",
    [
        ((2**60).to_bytes(8, "big") + b"\1" * 10, "kind"),
        (pack_header(2**28, Kind.DATA, 0, 1, 0), "claims 268435456 bytes; the limit is 67108864"),
        (pack_header(2**32 - 1, Kind.DATA, 0, 1, 0), "claims 4294967295 bytes; the limit is 67108864"),
        (pack_header(2**32 - 1, Kind.CONTROL, 0, 0, 0), "claims 4294967295 bytes"),
        (pack_header(64 * MB + 1, Kind.DATA, 0, 1, 0), "the limit is 67108864"),
        (pack_header(2**32 - 1, Kind.HEARTBEAT, 0, 0, 0), "claims"),
        (pack_header(1, Kind.GOODBYE, 0, 0, 0), "claims 1 bytes"),
        (pack_header(5000, Kind.ERROR, 0, 0, 0), "claims 5000 bytes"),
        (HEADER.pack(0, 0, 0, 0, 0), "unknown kind 0"),
        (b"\xff" * 18, "unknown kind 255"),
        (pack_header(0, Kind.DATA, 3, 0, 0), "means nothing"),
        (pack_header(0, Kind.DATA, 0x20, 0, 0), "means nothing"),
        (pack_header(0, Kind.HEARTBEAT, MORE, 0, 0), "means nothing"),
        (pack_header(0, Kind.DATA, 0, 2**31, 0), "means nothing"),
    ],
)
def test_frames_that_are_refused_before_their_body(keys_dir: Path, pool: ThreadPoolExecutor, raw: bytes, reason: str) -> None:
    import tracemalloc

    with connected(keys_dir, pool) as pair:
        inject(pair.client, raw)
        tracemalloc.start()
        error = outcome(lambda: pair.server.receive())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert type(error) is TransportError and reason in str(error) and "client" in str(error)
        assert peak < MB
        assert str(outcome(lambda: pair.server.receive())) == str(error)  # and stays so
        pair.server.send_error("bad frame")  # the other direction still works
        assert "the peer gave up: bad frame" in str(outcome(pair.client.receive))


def test_the_limit_is_lower_before_a_session(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool, established=False) as pair:
        pair.client.establish()
        pair.client.send(bytes(70_000))
        error = outcome(lambda: pair.server.receive(70_000))
        assert "the limit is 65536" in str(error) and error.exit_code == 3
    with connected(keys_dir, pool, established=False) as pair:
        pair.client.send(bytes(200_000))  # but a message may be cut
        assert len(pair.server.receive(200_000)) == 200_000


def test_messages_larger_than_a_frame(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    body = os.urandom(1_000_001)
    with connected(keys_dir, pool) as pair:
        for end in (pair.server, pair.client):
            end.max_frame = 100_000
        together(pool, lambda: pair.client.send(body))
        assert pair.server.receive(len(body)) == body
        assert pair.server.meter.total().frames == 11 and pair.server.meter.depth() == 1
        pair.client.send(body[:300_000])
        assert "expected a message of 299999 bytes and received one of 300000" in str(outcome(lambda: pair.server.receive(299_999)))
    with connected(keys_dir, pool) as pair:
        pair.client.max_frame = 100_000
        pair.client.send(body[:150_000])
        assert "expected a message of 150001 bytes and received one of 150000 bytes" in str(outcome(lambda: pair.server.receive(150_001)))


@pytest.mark.parametrize("sent, expected", [(8, 9), (9, 8), (0, 1), (1, 0), (10 * MB, 1)])
def test_a_message_of_another_size(keys_dir: Path, pool: ThreadPoolExecutor, sent: int, expected: int) -> None:
    with connected(keys_dir, pool) as pair:
        pair.server.meter.label = ("h.3", "softmax")
        sending = pool.submit(pair.client.send, bytes(sent))
        error = outcome(lambda: pair.server.receive(expected))
        assert isinstance(error, ProtocolDesync) and f"expected a message of {expected} bytes and received one of {sent} bytes" in str(
            error
        )
        assert "layer h.3.softmax" in str(error) and "at server" in str(error)
        if sent < MB:
            sending.result(10)
        pair.server.close()
        with contextlib.suppress(TransportError):
            sending.result(10)


def test_a_message_of_another_kind(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        pair.client.send_control([1, 2])
        error = outcome(lambda: pair.server.receive(3))
        assert isinstance(error, ProtocolDesync) and "expected a DATA message and received a CONTROL message" in str(error)
        pair.server.send(b"abc")
        assert "expected a CONTROL message and received a DATA message" in str(outcome(lambda: pair.client.receive_control(list)))


# ---- control messages and errors


class Offer(msgspec.Struct):
    version: int
    name: str
    shape: list[int]


def test_control_messages(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        offer = Offer(1, "aero", [2, 3])
        pair.client.send_control(offer)
        assert pair.server.receive_control(Offer) == offer
        assert pair.server.meter.depth() == 0 and pair.server.meter.total().payload_received == 0
        large = Offer(2, "x" * 300_000, [])
        assert isinstance(outcome(lambda: pair.client.send_control(large)), ConfigError)
        pair.client.send_control(large, limit=MB)
        assert pair.server.receive_control(Offer, limit=MB) == large
        pair.client.send_control(large, limit=MB)
        error = outcome(lambda: pair.server.receive_control(Offer))
        assert isinstance(error, ProtocolDesync) and "the limit is 65536" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        b"\x80",
        b"\x81\xa7version\xa3one",
        b"\xa4abc\xff",
        b"\x91" * 20_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\x08\xff",
    ],
)
def test_control_messages_that_are_none(keys_dir: Path, pool: ThreadPoolExecutor, body: bytes) -> None:
    with connected(keys_dir, pool) as pair:
        pair.client.send(body, Kind.CONTROL)
        error = outcome(lambda: pair.server.receive_control(Offer))
        assert isinstance(error, ProtocolDesync) and "not a Offer" in str(error)


@given(body=st.binary(max_size=200))
@settings(max_examples=200)
def test_any_control_message_is_decoded_or_refused(body: bytes) -> None:
    client, server = memory_pair(("client", "server"))
    client.send(body, Kind.CONTROL)
    with contextlib.suppress(ProtocolDesync):
        assert isinstance(server.receive_control(Offer), Offer)


@pytest.mark.parametrize(
    "established, desync, kind", [(False, False, HandshakeError), (True, False, TransportError), (True, True, ProtocolDesync)]
)
def test_errors_reach_the_peer(keys_dir: Path, pool: ThreadPoolExecutor, established: bool, desync: bool, kind: type[PrivinfError]) -> None:
    with connected(keys_dir, pool, established=established) as pair:
        pair.server.send_error("no\x1b[31m room\nfor\u202e you " + "x" * 9000, desync=desync)
        pair.server.close()
        error = outcome(lambda: pair.client.receive(7))
        assert type(error) is kind and "no [31m room for you xxx" in str(error) and len(error.message) < 530


def test_an_error_report_survives_a_peer_that_sends_on(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """The server gives up while the client is in the middle of a large send: the client learns why."""
    with connected(keys_dir, pool) as pair:
        sending = pool.submit(outcome, lambda: [pair.client.send(bytes(8 * MB)) for _ in range(10)])
        time.sleep(0.1)
        pair.server.send_error("out of memory")
        pair.server.close()
        assert "out of memory" in str(sending.result(10))


@given(st.text(max_size=100))
def test_one_line(text: str) -> None:
    clean = one_line(text, 50)
    assert len(clean) <= 50 and (clean.isprintable() or not clean) and "\n" not in clean


# ---- peers that vanish, hang or are slow

PEER = """
import os, signal, sys, time
from pathlib import Path
from privinf.transport import *
from privinf.transport.frames import pack_header, Kind
c = dial(sys.argv[1], load_credentials(Path(sys.argv[2]), "client"), "server", timeout=20, heartbeat_s=0.2)
c.establish()
"""


@contextlib.contextmanager
def peer_process(keys_dir: Path, script: str, **options: Any) -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
    """A client in a process of its own, and the server's connection to it."""
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, **{"timeout": 20.0, **options}) as door:
        command = [sys.executable, "-c", PEER + textwrap.dedent(script), door.address, str(keys_dir)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            with accept_one(door) as connection:
                connection.establish()
                yield connection, process
        finally:
            process.kill()
            process.wait()


def test_a_peer_killed_in_the_middle_of_a_frame(keys_dir: Path) -> None:
    script = """
    c.send(b"ready")
    c._stream.encrypt(pack_header(1000, Kind.DATA, 0, 1, 0) + b"x" * 500)
    c._stream.push()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with peer_process(keys_dir, script) as (connection, _):
        assert connection.receive(5) == b"ready"
        began = time.monotonic()
        error = outcome(lambda: connection.receive(1000))
        assert type(error) is TransportError and "the peer closed the connection in the middle of a message" in str(error)
        assert time.monotonic() - began < 3 and error.exit_code == 4


def test_a_peer_killed_while_we_send(keys_dir: Path) -> None:
    with peer_process(keys_dir, 'c.send(b"ready"); time.sleep(60)') as (connection, process):
        assert connection.receive(5) == b"ready"
        threading.Timer(0.3, process.kill).start()
        error = outcome(lambda: [connection.send(bytes(8 * MB)) for _ in range(20)])
        assert type(error) is TransportError and "closed the connection" in str(error)


@pytest.mark.parametrize("sending", [False, True])
def test_a_stopped_peer_shows_no_sign_of_life(keys_dir: Path, sending: bool) -> None:
    script = 'c.send(b"ready"); os.kill(os.getpid(), signal.SIGSTOP)'
    with peer_process(keys_dir, script, silence_s=1.0) as (connection, _):
        assert connection.receive(5) == b"ready"
        began = time.monotonic()
        error = outcome(lambda: [connection.send(bytes(8 * MB)) for _ in range(20)] if sending else connection.receive(1))
        assert type(error) is TransportError and "no sign of life from the peer" in str(error)
        assert 0.9 < time.monotonic() - began < 8


def test_a_slow_peer_is_waited_for(keys_dir: Path) -> None:
    """It computes for longer than `silence_s` without touching the connection: its heartbeat thread speaks for it."""
    script = """
    c.send(b"ready")
    end = time.monotonic() + 3.5
    while time.monotonic() < end:
        sum(range(10000))
    c.send(b"done")
    c.receive(3)
    """
    with peer_process(keys_dir, script, silence_s=1.5, heartbeat_s=0.2) as (connection, process):
        assert connection.receive(5) == b"ready"
        assert connection.receive(4) == b"done"
        connection.send(b"bye")
        assert process.wait(10) == 0


def test_heartbeats_come_while_a_large_message_waits_to_be_read(keys_dir: Path) -> None:
    """The peer computes while we are blocked in a send: its heartbeats keep us patient, and the message arrives whole."""
    script = """
    c.send(b"ready")
    time.sleep(2.5)
    assert c.receive(30_000_000) == bytes(30_000_000)
    c.send(b"done")
    """
    with peer_process(keys_dir, script, silence_s=1.5, heartbeat_s=0.2) as (connection, _):
        assert connection.receive(5) == b"ready"
        connection.send(bytes(30_000_000))
        assert connection.receive(4) == b"done"


def test_a_living_peer_that_does_not_answer(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool, heartbeat_s=0.1, silence_s=5.0) as pair:
        pair.client.timeout = 0.6
        began = time.monotonic()
        error = outcome(lambda: pair.client.receive(1))
        assert type(error) is TransportError and "lives but does not answer within 0.6 s" in str(error) and "--timeout" in str(error)
        assert 0.5 < time.monotonic() - began < 4
        pair.server.send(b"x")
        pair.client.timeout = 10
        assert pair.client.receive(1) == b"x"  # a wait that ended in time-out spoils nothing
        pair.client.timeout = 0.6
        began = time.monotonic()
        error = outcome(lambda: pair.client.send(bytes(60 * MB)))
        assert "does not take what we send within 0.6 s" in str(error) and time.monotonic() - began < 5
        assert "cut off in the middle" in str(outcome(lambda: pair.client.send(b"x")))


def test_a_dripping_peer_does_not_hold_us_for_ever(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Progress extends a wait only by what a slow line would take; heartbeats do not."""
    with connected(keys_dir, pool, timeout=0.8, silence_s=5.0) as pair:
        stop = threading.Event()

        def drip() -> None:
            inject(pair.client, pack_header(1000, Kind.DATA, 0, 1, 0))
            while not stop.wait(0.02):
                with contextlib.suppress(OSError):
                    inject(pair.client, b"x")

        dripping = pool.submit(drip)
        began = time.monotonic()
        error = outcome(lambda: pair.server.receive(1000))
        stop.set()
        dripping.result(10)
        assert "does not answer" in str(error) and time.monotonic() - began < 4


def test_end_of_file_within_a_frame_and_between_frames(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        inject(pair.client, pack_header(100, Kind.DATA, 0, 1, 0) + b"half")
        pair.client._stream.sock.shutdown(socket.SHUT_WR)
        assert "closed the connection in the middle of a message" in str(outcome(lambda: pair.server.receive(100)))
    with connected(keys_dir, pool) as pair:
        pair.client.send(b"last words")
        pair.client.close(goodbye=False)
        assert pair.server.receive(10) == b"last words"
        assert outcome(lambda: pair.server.receive(1)).message == "the peer closed the connection"
    with connected(keys_dir, pool) as pair:
        pair.client.close()
        assert "the peer ended the session" in str(outcome(lambda: pair.server.exchange(b"x", 1)))


def test_a_damaged_tls_record(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        pair.client._stream.sock.send(b"\x17\x03\x03\x00\x30" + os.urandom(48))
        error = outcome(lambda: pair.server.receive(1))
        assert type(error) is TransportError and "TLS stream is damaged" in str(error)


def test_nothing_is_lost_when_a_party_closes_right_after_its_last_message(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Also when it leaves unread bytes behind, for which the kernel would reset the connection."""
    body = os.urandom(6 * MB)
    for _ in range(5):
        with connected(keys_dir, pool) as pair:
            pair.server.send(b"never read")

            def last(end: Connection = pair.client) -> None:
                end.send(body)
                end.close()

            closing = pool.submit(last)
            time.sleep(0.05)
            assert pair.server.receive(len(body)) == body
            closing.result(10)


def test_close_from_another_thread_ends_a_wait(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        waiting = pool.submit(outcome, lambda: pair.client.receive(1))
        time.sleep(0.2)
        began = time.monotonic()
        pair.client.close()
        assert "closed at this end" in str(waiting.result(5)) and time.monotonic() - began < 2
        pair.client.close()
        assert "closed at this end" in str(outcome(lambda: pair.client.send(b"x")))


def test_an_interrupt_in_the_pump(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Ctrl-C while waiting: the exception comes out at once, and the connection can be closed, also from the signal's handler."""
    with connected(keys_dir, pool) as pair:

        def handler(*_: object) -> None:
            pair.client.close()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                pair.client.receive(1)
            assert time.monotonic() - began < 2
        finally:
            signal.signal(signal.SIGUSR1, before)
        pair.client.close()
        assert "closed the connection" in str(outcome(lambda: pair.server.receive(1)))


def test_nothing_is_left_behind(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    together(pool, *[lambda: time.sleep(0.05)] * 4)  # all threads of the pool are there
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with connected(keys_dir, pool) as pair:
            together(pool, lambda: pair.client.exchange(b"a", 1), lambda: pair.server.exchange(b"b", 1))
            assert threading.active_count() == threads + 2
        refused(pool, load_credentials(keys_dir, "server"), load_credentials(keys_dir, "dealer"))
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


# ---- both directions at once


@pytest.mark.parametrize("size", [0, 1, 100_000, 40 * MB])
def test_simultaneous_exchange(keys_dir: Path, pool: ThreadPoolExecutor, size: int) -> None:
    there, back = os.urandom(size), os.urandom(size // 2)
    with connected(keys_dir, pool) as pair:
        got = together(pool, lambda: pair.client.exchange(there, len(back)), lambda: pair.server.exchange(back, len(there)))
        assert got[0] == back and got[1] == there
        assert pair.client.meter.depth() == pair.server.meter.depth() == 1


def test_two_large_sends_do_not_block_each_other(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    there, back = os.urandom(24 * MB), os.urandom(24 * MB)
    with connected(keys_dir, pool) as pair:

        def play(end: Connection, mine: bytes, theirs: bytes) -> bool:
            end.send(mine)
            return end.receive(len(theirs)) == theirs

        assert all(together(pool, lambda: play(pair.client, there, back), lambda: play(pair.server, back, there)))


def test_many_small_messages_in_a_row(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        for number in range(500):
            pair.client.send(number.to_bytes(4, "big"))
        assert [int.from_bytes(pair.server.receive(4), "big") for _ in range(500)] == list(range(500))


# ---- the meter


def test_the_meter_adds_up_to_the_sockets(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool, heartbeat_s=0.05) as pair:

        def play(end: Connection) -> None:
            for phase in ("setup", "offline", "online"):
                end.meter.phase = phase
                for op, size in enumerate((0, 10, 70_000, 3 * MB)):
                    end.meter.label = ("h.0", f"op{op}")
                    end.exchange(bytes(size), size)
            end.meter.label = ("", "rest")
            time.sleep(0.3)  # heartbeats
            if end is pair.client:
                end.send_control({"a": 1})
            else:
                end.receive_control(dict)

        together(pool, lambda: play(pair.client), lambda: play(pair.server))
        pair.client.close()
        pair.server.close()
        for end in (pair.client, pair.server):
            total, labels = end.meter.total(), list(end.meter.labels())
            assert (total.sent, total.received) == (end.raw_sent, end.raw_received)
            assert sum(cell.sent for *_, cell in labels) == end.raw_sent
            snapshot = end.meter.snapshot()
            for name in ("sent", "received", "payload", "rounds"):
                assert sum(one[name] for one in snapshot["labels"]) == sum(
                    snapshot[phase][name] for phase in ("setup", "offline", "online")
                )
            payload = 10 + 70_000 + 3 * MB
            for phase in ("setup", "offline", "online"):
                assert snapshot[phase]["payload_sent"] == snapshot[phase]["payload_received"] == payload
                assert snapshot[phase]["rounds"] == 4 and snapshot[phase]["frames"] == 8
        assert 0 <= pair.client.raw_sent - pair.server.raw_received < 200  # farewells may cross
        assert 0 <= pair.server.raw_sent - pair.client.raw_received < 200


@pytest.mark.parametrize("carrier", ["tls", "memory"])
def test_rounds(keys_dir: Path, pool: ThreadPoolExecutor, carrier: str) -> None:
    with contextlib.ExitStack() as stack:
        client: Endpoint
        server: Endpoint
        if carrier == "tls":
            pair = stack.enter_context(connected(keys_dir, pool))
            client, server = pair.client, pair.server
        else:
            client, server = memory_pair(("client", "server"))

        def both(call: Callable[[Endpoint], Any]) -> None:
            together(pool, lambda: call(client), lambda: call(server))

        both(lambda end: setattr(end.meter, "phase", "online"))
        both(lambda end: end.exchange(b"x", 1))
        assert (client.meter.depth(), server.meter.depth()) == (1, 1)  # a simultaneous exchange is one round
        client.send(b"question")
        server.receive(8)
        server.send(b"answer")
        client.receive(6)
        assert (client.meter.depth(), server.meter.depth()) == (3, 2)  # a question and its answer are two
        for _ in range(5):
            client.send(b"one way")
            server.receive(7)
        assert client.meter.depth() == 3  # what nothing waits for counts nothing at its sender
        assert server.meter.depth() == 4  # and sent without waiting, five messages are as deep as one
        both(lambda end: end.exchange(b"x", 1))
        assert (client.meter.depth(), server.meter.depth()) == (5, 4)
        client.send_control(1)
        server.receive_control(int)
        assert (client.meter.depth(), server.meter.depth()) == (5, 4)
        both(lambda end: setattr(end.meter, "phase", "offline"))
        server.send(b"early")
        server.meter.phase = client.meter.phase = "online"
        client.receive(5)  # read in another phase than it was sent in: it counts where it belongs
        assert client.meter.depth() == 5 and client.meter.depth("offline") == 1
        assert client.meter.total("offline").payload_received == 5 and client.meter.total("online").payload_received == 8


def test_rounds_do_not_depend_on_when_a_message_arrives(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """The peer's message has come before ours leaves: still a simultaneous exchange, one round."""
    with connected(keys_dir, pool) as pair:
        first = pool.submit(pair.client.exchange, b"a", 1)
        time.sleep(0.1)
        pair.server.exchange(b"b", 1)
        first.result(5)
        assert pair.client.meter.depth() == pair.server.meter.depth() == 1


def test_meter_refuses_an_unknown_phase() -> None:
    with pytest.raises(ConfigError, match="offline"):
        Meter().phase = "lunch"


# ---- the emulated link


def test_parse_link() -> None:
    assert parse_link("lan") is LINKS["lan"] and parse_link("WAN") == Link(60, 305)
    assert parse_link("20ms:100") == Link(20, 100) and parse_link("0.5ms:1000") == parse_link("lan")
    assert str(parse_link("20ms:100")) == "20 ms, 100 Mbit/s (emulated)"
    for bad in ("", "fast", "20:100", "20ms", "20ms:0", "-1ms:5", "1e3ms:5", "20ms:100x", "nanms:1", "1" * 400 + "ms:1"):
        assert isinstance(outcome(lambda bad=bad: parse_link(bad)), ConfigError)


@pytest.mark.parametrize("carrier", ["tls", "memory"])
def test_the_emulated_link_delays(keys_dir: Path, pool: ThreadPoolExecutor, carrier: str) -> None:
    """20 ms and 100 Mbit/s: a ping-pong takes a round trip, a megabyte 80 ms more, five messages in a row one latency."""
    link = Link(20, 100)
    with contextlib.ExitStack() as stack:
        client: Endpoint
        server: Endpoint
        if carrier == "tls":
            pair = stack.enter_context(connected(keys_dir, pool, link=link))
            client, server = pair.client, pair.server
        else:
            client, server = memory_pair(("client", "server"), link=link)

        def answer() -> None:
            for _ in range(3):
                server.send(server.receive(10))
            server.receive(1_000_000)
            server.send(b"x")
            for _ in range(5):
                server.receive(10)
            server.send(b"x")

        answering = pool.submit(answer)
        times = []

        def timed(call: Callable[[], Any]) -> None:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)

        for _ in range(3):
            timed(lambda: client.exchange(b"0123456789", 10))
        timed(lambda: client.exchange(bytes(1_000_000), 1))
        timed(lambda: ([client.send(b"0123456789") for _ in range(5)], client.receive(1)))
        answering.result(10)
        assert all(one >= 0.0195 for one in times[:3]) and min(times[:3]) < 0.045
        assert 0.0995 <= times[3] < 0.4
        assert 0.0195 <= times[4] < 0.2


def test_a_slow_link_is_not_taken_for_a_slow_peer(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """A message takes 1.5 s, longer than the timeout: both the one that waits for it and the one that waits for the answer bear it."""
    with connected(keys_dir, pool, link=Link(1, 0.8), timeout=0.7, heartbeat_s=0.1) as pair:
        got = together(
            pool,
            lambda: pair.client.exchange(bytes(150_000), 1),
            lambda: (pair.server.receive(150_000), pair.server.send(b"x")),
        )
        assert got[0] == b"x"


# ---- the in-process twin


def test_memory_pair_behaves_like_a_connection(pool: ThreadPoolExecutor) -> None:
    client, server = memory_pair(("client", "server"), timeout=0.3)
    assert (client.peer_role, server.peer_role) == ("server", "client")
    body = bytearray(b"abc")
    client.send(body)
    body[:] = b"xyz"
    assert server.receive(3) == b"abc"
    assert client.meter.total().payload_sent == server.meter.total().payload_received == 3
    assert client.meter.total().sent == server.meter.total().received == 3 + HEADER.size
    assert "does not answer within 0.3 s" in str(outcome(lambda: client.receive(1)))
    client.send(b"four")
    assert isinstance(outcome(lambda: server.receive(5)), ProtocolDesync)
    server.send_error("broken", desync=True)
    assert isinstance(outcome(lambda: client.receive(5)), ProtocolDesync)

    client, server = memory_pair(("client", "server"), timeout=5, established=False)
    assert isinstance(together(pool, lambda: client.send_error("full"), lambda: outcome(lambda: server.receive(1)))[1], HandshakeError)
    waiting = pool.submit(outcome, lambda: server.receive(1))
    client.close()
    assert "ended the session" in str(waiting.result(5))
    assert "closed the connection" in str(outcome(lambda: server.send(b"x")))
    assert "closed at this end" in str(outcome(lambda: client.send(b"x")))
    client.close()
    server.close()


def test_memory_pair_carries_messages_larger_than_a_frame() -> None:
    client, server = memory_pair(("client", "server"))
    client.max_frame = server.max_frame = 1000
    body = os.urandom(4500)
    client.send(body)
    assert server.receive(4500) == body
    assert server.meter.total().frames == 5
    client.max_frame = 2000
    client.send(body)
    assert "claims 2000 bytes; the limit is 1000" in str(outcome(lambda: server.receive(4500)))
