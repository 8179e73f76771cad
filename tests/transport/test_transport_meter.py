"""The meter, the emulated link, and the in-process twin, which counts the same."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from privinf.transport import Connection, Endpoint, Link, Meter, memory_pair
from privinf.transport.failure import Failure
from privinf.transport.frames import HEADER
from privinf.transport.shaper import LINKS, parse_link
from protocols.errors import Code, ConfigError, HandshakeError, ProtocolDesync
from tests.support.tls_pair import MB, connected, outcome, together
from tests.support.tls_pair import keys_dir as keys_dir
from tests.support.tls_pair import pool as pool
from tests.support.waiting import PATIENCE

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
        first.result(PATIENCE)
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
        answering.result(PATIENCE)
        # not less than the link takes; more is the machine's
        assert all(one >= least for one, least in zip(times, (0.0195, 0.0195, 0.0195, 0.0995, 0.0195), strict=True))


def test_a_slow_link_is_not_taken_for_a_slow_peer(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """A message takes 3 s, longer than the timeout: both the one that waits for it and the one that waits for the answer bear it."""
    with connected(keys_dir, pool, link=Link(1, 0.8), timeout=2.0, heartbeat_s=0.1) as pair:
        got = together(
            pool,
            lambda: pair.client.exchange(bytes(300_000), 1),
            lambda: (pair.server.receive(300_000), pair.server.send(b"x")),
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
    server.send_error(Failure(Code.DESYNC, "broken"))
    assert isinstance(outcome(lambda: client.receive(5)), ProtocolDesync)

    client, server = memory_pair(("client", "server"), timeout=5, established=False)
    assert isinstance(
        together(pool, lambda: client.send_error(Failure(Code.OTHER, "full")), lambda: outcome(lambda: server.receive(1)))[1],
        HandshakeError,
    )
    waiting = pool.submit(outcome, lambda: server.receive(1))
    client.close()
    assert "ended the session" in str(waiting.result(PATIENCE))
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
