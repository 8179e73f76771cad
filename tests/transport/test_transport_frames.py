"""Frames and messages: the codec under any cutting, what is refused before it is read, control messages and error reports."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privinf.transport import Connection, FrameKind, connection, memory_pair
from privinf.transport.failure import Failure, one_line
from privinf.transport.frames import HEADER, MORE, Frame, FrameReader, flat, pack_header, parse_header
from protocols.errors import Code, ConfigError, OpeningError, ProtocolDesync, RefusedError, TransportError
from tests.support.tls_pair import MB, connected, inject, outcome, together
from tests.support.tls_pair import keys_dir as keys_dir
from tests.support.tls_pair import pool as pool
from tests.support.waiting import PATIENCE

# ---- frames

HEADERS = st.one_of(
    st.tuples(st.sampled_from([FrameKind.DATA, FrameKind.CONTROL]), st.binary(max_size=3000), st.sampled_from([0, MORE])),
    st.tuples(st.sampled_from([FrameKind.HEARTBEAT, FrameKind.GOODBYE]), st.just(b""), st.just(0)),
    st.tuples(st.just(FrameKind.ERROR), st.binary(max_size=600), st.just(0)),
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


@settings(deadline=None)
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


@settings(max_examples=300, deadline=None)
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


@settings(deadline=None)
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
        (pack_header(2**28, FrameKind.DATA, 0, 1, 0), "claims 268435456 bytes; the limit is 67108864"),
        (pack_header(2**32 - 1, FrameKind.DATA, 0, 1, 0), "claims 4294967295 bytes; the limit is 67108864"),
        (pack_header(2**32 - 1, FrameKind.CONTROL, 0, 0, 0), "claims 4294967295 bytes"),
        (pack_header(64 * MB + 1, FrameKind.DATA, 0, 1, 0), "the limit is 67108864"),
        (pack_header(2**32 - 1, FrameKind.HEARTBEAT, 0, 0, 0), "claims"),
        (pack_header(1, FrameKind.GOODBYE, 0, 0, 0), "claims 1 bytes"),
        (pack_header(5000, FrameKind.ERROR, 0, 0, 0), "claims 5000 bytes"),
        (HEADER.pack(0, 0, 0, 0, 0), "unknown kind 0"),
        (b"\xff" * 18, "unknown kind 255"),
        (pack_header(0, FrameKind.DATA, 3, 0, 0), "means nothing"),
        (pack_header(0, FrameKind.DATA, 0x20, 0, 0), "means nothing"),
        (pack_header(0, FrameKind.HEARTBEAT, MORE, 0, 0), "means nothing"),
        (pack_header(0, FrameKind.DATA, 0, 2**31, 0), "means nothing"),
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
        pair.server.send_error(Failure(Code.TRANSPORT, "bad frame"))  # the other direction still works
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


@pytest.mark.parametrize("established", [False, True])
@pytest.mark.parametrize("size", [0, 1, 2**16 - 1])
def test_parts_of_a_message_that_are_too_small(keys_dir: Path, pool: ThreadPoolExecutor, size: int, established: bool) -> None:
    """A message in parts of no bytes would have no end, and one of single bytes takes hundreds of times its size."""
    with connected(keys_dir, pool, established=established) as pair:
        for kind in (FrameKind.DATA, FrameKind.CONTROL):
            inject(pair.client, pack_header(size, kind, MORE, 1, 0) + bytes(size))
            error = outcome(lambda: pair.server.receive(10 * MB))
            assert type(error) is (
                TransportError if established else OpeningError
            ) and f"a part of a message of {size} bytes; all but the last have 65536 or more" in str(error)
    client, server = memory_pair(("client", "server"))
    client._pipe.to[1].append(pack_header(size, FrameKind.DATA, MORE, 1, 0) + bytes(size))
    assert "a part of a message" in str(outcome(lambda: server.receive(10 * MB)))


@contextlib.contextmanager
def sending_on(pool: ThreadPoolExecutor, end: Connection, frames: bytes) -> Iterator[None]:
    """Meanwhile an end sends these frames again and again, as far as its socket takes them."""
    stop = threading.Event()
    end._stop.set()  # nothing but them

    def send() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                if end._stream.push():
                    end._stream.encrypt(frames)
                else:
                    time.sleep(0.002)

    sending = pool.submit(send)
    try:
        yield
    finally:
        stop.set()
        sending.result(10)


@pytest.mark.parametrize("size", [0, 40])
def test_what_comes_while_a_send_is_blocked_is_bounded_headers_counted(
    keys_dir: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    import tracemalloc

    monkeypatch.setattr(connection, "BACKLOG", 4 * MB)
    body, frames = bytes(100 * MB), (pack_header(size, FrameKind.DATA, 0, 1, 0) + bytes(size)) * 500
    with connected(keys_dir, pool, timeout=3.0, silence_s=30.0) as pair, sending_on(pool, pair.client, frames):
        tracemalloc.start()
        error = outcome(lambda: pair.server.send(body))
        held, taken = len(pair.server._inbox), tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert "does not take what we send" in str(error)
        assert 0.9 * 4 * MB < held * (1024 + size) <= 4 * MB + 1024 + size
        assert taken < 4 * MB + MB  # what a frame is counted for is more than it takes


def test_heartbeats_without_end_keep_no_wait_alive(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    beats = pack_header(0, FrameKind.HEARTBEAT, 0, 0, 0) * 1000
    with connected(keys_dir, pool, timeout=1.0) as pair, sending_on(pool, pair.client, beats):
        began = time.monotonic()
        assert "does not answer within 1 s" in str(outcome(lambda: pair.server.receive(1)))
        pair.server.lost()  # comes back, though there is always more
        assert not pair.server._inbox and time.monotonic() - began < 30


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
            sending.result(PATIENCE)
        pair.server.close()
        with contextlib.suppress(TransportError):
            sending.result(PATIENCE)


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
        pair.client.send(body, FrameKind.CONTROL)
        error = outcome(lambda: pair.server.receive_control(Offer))
        assert isinstance(error, ProtocolDesync) and "not a Offer" in str(error)
        pair.client.send(body, FrameKind.CONTROL)
        assert isinstance(outcome(lambda: pair.server.receive_control(Offer | list)), ProtocolDesync)


@given(body=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_control_message_is_decoded_or_refused(body: bytes) -> None:
    client, server = memory_pair(("client", "server"))
    client.send(body, FrameKind.CONTROL)
    with contextlib.suppress(ProtocolDesync):
        assert isinstance(server.receive_control(Offer), Offer)


def test_an_interruption_ends_a_wait_and_leaves_time_for_a_farewell(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Another thread tells the server's why to give up; the client hears of it, and does not just find the line cut."""
    with connected(keys_dir, pool) as pair:
        waiting = pool.submit(outcome, pair.server.receive)
        time.sleep(0.1)
        reason = RefusedError("no more of this")
        pair.server.interrupt(reason)
        assert waiting.result(PATIENCE) is reason
        pair.server.send_error(Failure.of(reason))
        error = outcome(pair.client.receive)
        assert type(error) is RefusedError and "no more of this" in str(error) and error.exit_code == 3
    with connected(keys_dir, pool) as pair:
        pair.server.interrupt(reason)  # nobody waits: the next transfer raises it, and the one after does not
        assert outcome(lambda: pair.server.send(b"x")) is reason
        pair.server.send(b"y")
        assert bytes(pair.client.receive()) == b"y"


def test_an_error_report_survives_a_peer_that_sends_on(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """The server gives up while the client is in the middle of a large send: the client learns why."""
    with connected(keys_dir, pool) as pair:
        sending = pool.submit(outcome, lambda: [pair.client.send(bytes(8 * MB)) for _ in range(10)])
        time.sleep(0.1)
        pair.server.send_error(Failure(Code.TRANSPORT, "out of memory"))
        pair.server.close()
        assert "out of memory" in str(sending.result(PATIENCE))


@settings(deadline=None)
@given(st.text(max_size=100))
def test_one_line(text: str) -> None:
    clean = one_line(text, 50)
    assert len(clean) <= 50 and (clean.isprintable() or not clean) and "\n" not in clean
