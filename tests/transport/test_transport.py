"""Connections over real sockets and, where that is the claim, between real processes: peers that die or hang, deadlines, both
directions at once, and that nothing is lost or left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from privinf.transport import Connection, FrameKind, Listener
from privinf.transport.frames import pack_header
from privinf.transport.keys import load_credentials
from protocols.errors import TransportError
from tests.support.tls_pair import MB, accept_one, connected, inject, outcome, refused, together
from tests.support.tls_pair import keys_dir as keys_dir
from tests.support.tls_pair import pool as pool
from tests.support.waiting import PATIENCE, wait_for

# ---- peers that vanish, hang or are slow

ROOT = Path(__file__).resolve().parents[2]
PEER = """
import os, signal, sys, time
from pathlib import Path
from privinf.transport import *
from privinf.transport.frames import FrameKind, pack_header
c = dial(sys.argv[1], load_credentials(Path(sys.argv[2]), "client"), "server", timeout=90, heartbeat_s=0.2)
c.establish()
"""


@contextlib.contextmanager
def peer_process(keys_dir: Path, script: str, **options: Any) -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
    """A client in a process of its own, and the server's connection to it."""
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, **{"timeout": PATIENCE, **options}) as door:
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
    c._stream.encrypt(pack_header(1000, FrameKind.DATA, 0, 1, 0) + b"x" * 500)
    c._stream.push()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with peer_process(keys_dir, script) as (connection, _):
        assert connection.receive(5) == b"ready"
        error = outcome(lambda: connection.receive(1000))
        assert type(error) is TransportError and "the peer closed the connection in the middle of a message" in str(error)
        assert error.exit_code == 4


def test_a_peer_killed_while_we_send(keys_dir: Path) -> None:
    with peer_process(keys_dir, 'c.send(b"ready"); time.sleep(60)') as (connection, process):
        assert connection.receive(5) == b"ready"
        threading.Timer(0.3, process.kill).start()
        error = outcome(lambda: [connection.send(bytes(8 * MB)) for _ in range(20)])
        assert type(error) is TransportError and "closed the connection" in str(error)


@pytest.mark.parametrize("sending", [False, True])
def test_a_stopped_peer_shows_no_sign_of_life(keys_dir: Path, sending: bool) -> None:
    script = 'c.send(b"ready"); os.kill(os.getpid(), signal.SIGSTOP)'
    with peer_process(keys_dir, script, silence_s=2.0) as (connection, _):
        assert connection.receive(5) == b"ready"
        began = time.monotonic()
        error = outcome(lambda: [connection.send(bytes(8 * MB)) for _ in range(20)] if sending else connection.receive(1))
        assert type(error) is TransportError and "no sign of life from the peer" in str(error)
        assert time.monotonic() - began > 1.9


def test_a_slow_peer_is_waited_for(keys_dir: Path) -> None:
    """It computes for longer than `silence_s` without touching the connection: its heartbeat thread speaks for it."""
    script = """
    c.send(b"ready")
    end = time.monotonic() + 8.5
    while time.monotonic() < end:
        sum(range(10000))
    c.send(b"done")
    c.receive(3)
    """
    with peer_process(keys_dir, script, silence_s=4.0, heartbeat_s=0.2) as (connection, process):
        assert connection.receive(5) == b"ready"
        assert connection.receive(4) == b"done"
        connection.send(b"bye")
        assert process.wait(PATIENCE) == 0


@pytest.mark.slow
def test_heartbeats_come_while_a_large_message_waits_to_be_read(keys_dir: Path) -> None:
    """The peer computes while we are blocked in a send: its heartbeats keep us patient, and the message arrives whole."""
    script = """
    c.send(b"ready")
    time.sleep(8.5)
    assert c.receive(30_000_000) == bytes(30_000_000)
    c.send(b"done")
    """
    with peer_process(keys_dir, script, silence_s=4.0, heartbeat_s=0.2) as (connection, _):
        assert connection.receive(5) == b"ready"
        connection.send(bytes(30_000_000))
        assert connection.receive(4) == b"done"


def test_a_living_peer_that_does_not_answer(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool, heartbeat_s=0.1, silence_s=PATIENCE) as pair:
        pair.client.timeout = 0.6
        began = time.monotonic()
        error = outcome(lambda: pair.client.receive(1))
        assert type(error) is TransportError and "lives but does not answer within 0.6 s" in str(error) and "--timeout" in str(error)
        assert time.monotonic() - began > 0.5
        pair.server.send(b"x")
        pair.client.timeout = PATIENCE
        assert pair.client.receive(1) == b"x"  # a wait that ended in time-out spoils nothing
        pair.client.timeout = 0.6
        began = time.monotonic()
        error = outcome(lambda: pair.client.send(bytes(60 * MB)))
        assert "does not take what we send within 0.6 s" in str(error)
        assert "cut off in the middle" in str(outcome(lambda: pair.client.send(b"x")))


def test_a_dripping_peer_does_not_hold_us_for_ever(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Progress extends a wait only by what a slow line would take; heartbeats do not."""
    with connected(keys_dir, pool, timeout=0.8, silence_s=PATIENCE) as pair:
        stop = threading.Event()

        def drip() -> None:
            inject(pair.client, pack_header(1000, FrameKind.DATA, 0, 1, 0))
            while not stop.wait(0.02):
                with contextlib.suppress(OSError):
                    inject(pair.client, b"x")

        dripping = pool.submit(drip)
        error = outcome(lambda: pair.server.receive(1000))
        stop.set()
        dripping.result(PATIENCE)
        assert "does not answer" in str(error)


def test_end_of_file_within_a_frame_and_between_frames(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        inject(pair.client, pack_header(100, FrameKind.DATA, 0, 1, 0) + b"half")
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
            closing.result(PATIENCE)


def test_close_from_another_thread_ends_a_wait(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        waiting = pool.submit(outcome, lambda: pair.client.receive(1))
        time.sleep(0.2)
        pair.client.close()
        assert "closed at this end" in str(waiting.result(PATIENCE))
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
            with pytest.raises(KeyboardInterrupt):
                pair.client.receive(1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        pair.client.close()
        assert "closed the connection" in str(outcome(lambda: pair.server.receive(1)))


def test_nothing_is_left_behind(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    together(pool, *[threading.Barrier(4).wait] * 4)  # all threads of the pool are there
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with connected(keys_dir, pool) as pair:
            together(pool, lambda: pair.client.exchange(b"a", 1), lambda: pair.server.exchange(b"b", 1))
            assert threading.active_count() <= threads + 2
        refused(pool, load_credentials(keys_dir, "server"), load_credentials(keys_dir, "dealer"))
    # fewer, where something of the tests before has only now ended
    wait_for(lambda: threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= files)


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
