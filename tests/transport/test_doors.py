"""Crowds at the door: connections that say nothing, or too little, from anywhere, keep nobody out and cost next to nothing.

Dealers are real processes, the crowds come from a process of their own, and the honest dial through a relay that takes 50 ms each way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privinf.session.messages import greet
from privinf.transport import Listener, TurnedAway, door
from privinf.transport.crowd import Crowd
from privinf.transport.frames import FrameKind, pack_header
from privinf.transport.keys import load_credentials
from privinf.transport.listener import dial, parse_address
from protocols.errors import PrivinfError
from tests.support import trio as t
from tests.support.flood import Relay, flooding
from tests.support.peers import dialled, is_well
from tests.support.tls_pair import accept_one
from tests.support.tls_pair import keys_dir as keys_dir
from tests.support.tls_pair import pool as pool
from tests.support.trio import trio

HEARTBEAT = pack_header(0, FrameKind.HEARTBEAT, 0, 0, 0)
ROOT = Path(__file__).resolve().parents[2]


def resident(pid: int) -> tuple[int, float]:
    """A process's threads, and its MiB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["Threads"]), int(fields["VmRSS"].split()[0]) / 1024


def served(address: str) -> bool:
    """Whether a client gets through the handshake with a dealer, and an answer."""
    try:
        with dial(address, load_credentials(t.keys(), "client"), "dealer", 20.0, handshake_s=10.0) as connection:
            greet(connection)
            return True
    except PrivinfError:
        return False


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    back, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(back, out).do_handshake()
    return out.read()


@pytest.fixture(scope="module")
def dealer() -> Iterator[t.Process]:
    process, process.address = t.start_dealer()  # type: ignore[attr-defined]
    with process:
        yield process


@pytest.mark.parametrize(
    ("rate", "sources", "says"),
    [
        pytest.param(600, 0, lambda: b"", id="600-from-our-address"),
        pytest.param(1500, 250, lambda: b"", id="1500-from-others"),
        pytest.param(600, 0, lambda: b"\x16", id="600-that-say-a-byte"),
        pytest.param(60, 0, client_hello, id="60-that-begin-TLS"),  # each costs a signature
    ],
)
def test_an_honest_client_is_served_among_a_crowd(dealer: t.Process, rate: int, sources: int, says: Callable[[], bytes]) -> None:
    """And the crowd leaves a line or two in the log, however many they are."""
    address, lines = dealer.address, len(dealer.lines)  # type: ignore[attr-defined]
    with Relay(address, 0.05) as far:
        assert served(far.address)
        before = resident(dealer.pid)
        with flooding(address, rate, 60, sources, says()):
            time.sleep(1.0)
            assert sum(served(far.address) for _ in range(5)) >= 4
            after = resident(dealer.pid)
    assert after[0] <= before[0] + 2 and after[1] < before[1] + 150
    strangers = [line for line in dealer.lines[lines:] if "ended the session" not in line]
    assert len(strangers) <= 4, strangers


def test_a_log_that_nobody_reads_blocks_nothing() -> None:
    command = [sys.executable, "-m", "privinf", "dealer", "--listen", "127.0.0.1:0", "--keys", str(t.keys()), "--json", "--debug"]
    reader, writer = os.pipe()
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split('"address": "')[1].split('"')[0]
        os.set_blocking(writer, False)  # of the pipe, and so of the dealer's end too
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 512)
        os.set_blocking(writer, True)
        before = resident(process.pid)
        with flooding(address, 600, 60):
            for _ in range(20):
                assert served(address)
                time.sleep(0.1)
            after = resident(process.pid)
        assert after[0] <= before[0] + 4 and after[1] < before[1] + 150
        process.send_signal(signal.SIGTERM)
        assert process.wait(t.PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


# ---- out of files


def test_a_process_without_files_serves_whoever_says_something(tmp_path: Path) -> None:
    """With few files at all: the silent are dropped for those who come."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80)); from privinf.cli.app import main; main({!r})"
    words = ["dealer", "--listen", "127.0.0.1:0", "--keys", str(t.keys()), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split('"address": "')[1].split('"')[0]
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(parse_address(address), 10))
            assert served(address)
    finally:
        process.kill()
        process.communicate()


def test_a_door_that_can_open_no_files_waits_and_goes_on(keys_dir: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}) as listener:
        taken, rounds = listener.door._sock, []

        class Full:
            """A listening socket of a process whose files are all in use by others."""

            def accept(self) -> Any:
                rounds.append(time.monotonic())
                raise OSError(errno.EMFILE, "Too many open files")

            def fileno(self) -> int:
                return taken.fileno()

        monkeypatch.setattr(listener.door, "_sock", Full())
        listener.door._selector.unregister(taken)
        listener.door._selector.register(listener.door._sock, 1)
        dialling = pool.submit(dial, listener.address, load_credentials(keys_dir, "client"), "server", 20)
        assert listener.accept(1.0) is None
        assert 2 <= len(rounds) <= 12  # neither for ever asleep nor awake
        listener.door._sock = taken
        with accept_one(listener), dialling.result(t.PATIENCE):
            pass


def test_a_door_asks_for_the_files_that_it_needs() -> None:
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (200, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
        "from privinf.transport.door import _room; print(_room(), r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(out[1]) == (6144 if hard == resource.RLIM_INFINITY else min(6144, hard)) and int(out[0]) == min(1024, int(out[1]) // 6)


# ---- peers with a certificate that say nothing


@pytest.mark.parametrize("role", ["server", "dealer"])
def test_silent_peers_of_one_certificate_hold_up_nobody_else(tmp_path: Path, role: str) -> None:
    """As many as there are places, and again as many: they take no place, no thread, and of each other's time alone."""
    with trio(cache=tmp_path) as parties, contextlib.ExitStack() as stack:
        assert is_well(parties)
        service, threads = getattr(parties, role), threading.active_count()
        service._listener.door.known.seconds = t.PATIENCE  # nobody leaves by himself while this lasts
        for _ in range(service.options.sessions + 16):
            connection = dialled(service.address, "client", role, t.second_client())
            stack.callback(connection.close, goodbye=False)
            connection._stop.set()  # without the thread of its heartbeat: only the service's threads are to be seen
        t.wait_for(lambda: threading.active_count() <= threads + 2, about=lambda: str(threading.enumerate()))
        assert service.peers <= 1 and len(service._listener.door.known) == door.KNOWN_EACH
        assert is_well(parties)
        assert service.counters.refusals["silent"] == 16


def test_one_certificate_has_half_of_the_places_at_a_server_and_a_dealer(tmp_path: Path) -> None:
    with trio(cache=tmp_path, sessions=4) as parties, contextlib.ExitStack() as stack:
        for role, own, most in (("server", "client", 2), ("dealer", "client", 2), ("dealer", "server", 3)):
            service = getattr(parties, role)
            for _ in range(most):
                held = stack.enter_context(dialled(service.address, own, role))
                greet(held)
            with dialled(service.address, own, role) as more, pytest.raises(PrivinfError, match=f"{most} sessions of this {own} already"):
                greet(more)
            assert service.counters.refusals[f"{own} full"] == 1
            with dialled(service.address, own, role, t.second_client()) as other:
                greet(other)


def test_a_peer_that_sends_on_without_a_message_is_sent_away(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Heartbeats, say: each is read, and none is a message."""
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, hello_s=20.0) as listener:
        turned = pool.submit(listener.accept, 20.0)
        with dial(listener.address, load_credentials(keys_dir, "client"), "server", 20) as client:
            client._stream.encrypt(HEARTBEAT * 8000)
            with contextlib.suppress(OSError):
                client._stream.push()
            found = turned.result(20)
            assert isinstance(found, TurnedAway) and found.fingerprint and "no message" in str(found.error)


# ---- who makes way


class _Naive:
    """The same by looking at everybody."""

    def __init__(self, most: int, each: int) -> None:
        self.most, self.each, self.there = most, each, OrderedDict[int, str]()

    def add(self, one: int, place: str) -> set[int | None]:
        """Who may have to leave."""
        self.there[one] = place
        counts = {name: list(self.there.values()).count(name) for name in self.there.values()}
        if counts[place] > self.each:
            names = {place}
        elif len(self.there) > self.most:
            names = {name for name, count in counts.items() if count == max(counts.values())}
        else:
            return {None}
        return {next(each for each, name in self.there.items() if name == found) for found in names}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=60), st.integers(1, 8), st.integers(1, 8))
def test_the_oldest_of_a_place_with_the_most_makes_way(steps: list[tuple[str, bool]], most: int, each: int) -> None:
    crowd, naive = Crowd[int](most, 1.0, each), _Naive(most, each)
    for number, (place, leaves) in enumerate(steps):
        if leaves and naive.there:
            gone: int | None = next(iter(naive.there))
            crowd.discard(gone)  # type: ignore[arg-type]
        else:
            candidates = naive.add(number, place)
            gone = crowd.add(number, place)
            assert gone in candidates
        if gone is not None:
            del naive.there[gone]
        assert list(crowd) == list(naive.there) and len(crowd) <= most
        assert all(crowd.beside(one) == list(naive.there.values()).count(name) for one, name in naive.there.items())
