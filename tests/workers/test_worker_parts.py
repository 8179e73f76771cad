"""What the processes of one service have in common: hints before TLS ends, limits of all together, metrics as one."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from pathlib import Path

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from privinf.server.budget import SetUps
from privinf.server.room import Room
from privinf.session.board import PEERS, Board, Peer
from privinf.session.options import Options
from privinf.session.readiness import Readiness
from privinf.session.service import Service
from privinf.transport import Connection, dial, load_credentials
from privinf.transport.handing import Handed, channel, hand
from privinf.transport.hint import PREFIX, hint_of, read_hint
from privinf.workers.hints import Hints
from privinf.workers.porch import Porch
from privinf.workers.summed import counts, summed
from privinf.workers.worker import packed
from protocols.errors import DefectError, RefusedError
from tests.support.tls_pair import keys_dir, pool
from tests.support.waiting import PATIENCE, wait_for

__all__ = ["keys_dir", "pool"]


def hello(hint: str = "", others: tuple[str, ...] = (), host: str = "dealer.example.org") -> bytes:
    """The first words of TLS, as OpenSSL writes them."""
    context = ssl.create_default_context()
    names = [(PREFIX + hint.encode()).decode()] if hint else []
    if names or others:
        context.set_alpn_protocols([*names, *others])
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=host).do_handshake()
    return out.read()


def test_a_hint_is_read_from_the_first_words_and_from_nothing_else() -> None:
    token = os.urandom(16)
    hint = hint_of(token)
    assert len(hint) == 32 and hint != hint_of(os.urandom(16)) and token.hex() not in hint
    first = hello(hint)
    assert read_hint(first) == read_hint(first + b"more") == hint
    assert {read_hint(first[:cut]) for cut in range(len(first))} == {None}
    assert read_hint(hello()) == read_hint(hello(others=("h2", "http/1.1"))) == read_hint(b"GET / HTTP/1.1\r\n") == ""
    for at in range(5, len(first)):  # damaged at each place: never an error, whatever is made of it
        found = read_hint(first[:at] + bytes([first[at] ^ 0xFF]) + first[at + 1 :])
        assert found is not None and len(found) in (0, 32)
    assert read_hint(b"\x16\x03\x01\xff\xff" + bytes(20000)) == ""


@pytest.fixture
def board() -> Iterator[int]:
    descriptor = Board.make(3)
    yield descriptor
    os.close(descriptor)


def test_limits_are_of_all_processes(board: int) -> None:
    one, two = Board(board, 0, 2), Board(board, 1, 2)
    alice, bob = Peer("client", "a" * 64), Peer("client", "b" * 64)
    with one.peers() as (others, say):
        assert others == []
        say([alice, bob])
    with two.peers() as (others, say):
        assert others == [alice, bob]
        say([alice])
    assert (one.served(0), one.served(1)) == (2, 1)
    assert one.claim(60, 100) and not two.claim(50, 100) and two.claim(40, 100)
    one.release(30)
    assert two.claim(30, 100) and not two.claim(1, 100) and two.claim(1, 0)
    one.wipe(1)  # the second has died
    assert one.served(1) == 0 and one.claim(70, 100)


def test_a_part_of_which_half_was_written_counts_as_empty(board: int) -> None:
    one, two = Board(board, 0, 2), Board(board, 1, 2)
    with one.peers() as (_, say):
        say([Peer("client", "a" * 64)] * 5)
    two._map[8 * 2**20 + 8 : 8 * 2**20 + 40] = b"\xc1" * 32
    with two.peers() as (others, _):
        assert others == []


def test_set_ups_of_all_processes_count_together(board: int) -> None:
    each = [SetUps(100, "so much", 1.0, board=Board(board, part, 2)) for part in (0, 1)]
    each[0].spend("alice", 60)
    each[1].spend("bob", 60)
    with pytest.raises(RefusedError, match=r"so much in 1 hour[;,]"):
        each[1].spend("alice", 60)
    each[1].spend("alice", 40)


def test_what_has_no_room_on_the_board_is_an_error(board: int) -> None:
    """And not forgotten: the limits of all would count too little. As many as `--sessions` may say have room."""
    one, two = Board(board, 0, 2), Board(board, 1, 2)
    peers = [Peer("server", f"{n:064x}") for n in range(PEERS)]
    with one.peers() as (_, say):
        say(peers)
        with pytest.raises(DefectError, match="there is room for"):
            say(peers * 2)
    with two.peers() as (others, _):
        assert others == peers


def test_strangers_push_out_no_hint_of_a_session() -> None:
    hints: Hints[str] = Hints(3)
    hints.seen("session", "one")
    hints.known("session", "one")
    for number in range(10):
        hints.seen(f"made up {number}", "two")
    hints.seen("session", "two")  # which a stranger who heard it on the wire says too
    assert hints["session"] == "one" and hints["made up 6"] is None and hints["made up 7"] == "two"
    hints.forget("two")
    assert hints["made up 9"] is None
    for number in range(3):  # sessions alone push out sessions
        hints.known(str(number), "two")
    assert hints["session"] is None and [hints[str(number)] for number in range(3)] == ["two"] * 3


def test_room_that_another_process_gives_back_is_taken(board: int) -> None:
    """Nobody wakes a waiter of another process, which looks by itself."""
    one, two = Room(100, Board(board, 0, 2)), Room(100, Board(board, 1, 2))
    one.take(80, "a session", PATIENCE)
    with pytest.raises(RefusedError, match="come again later"):
        two.take(30, "a session", 0.1)
    waiter = threading.Thread(target=lambda: two.take(30, "a session", PATIENCE))
    waiter.start()
    one.give(60)
    waiter.join(PATIENCE)
    assert two.held == 30 and one.held == 20


def test_a_connection_changes_hands_with_what_was_said_on_it() -> None:
    ours, theirs = channel()
    taken = Handed(theirs, "127.0.0.1:1", ours.dup())
    with pytest.raises(BlockingIOError):
        taken.accept()
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as caller:
        caller.sendall(b"first words")
        accepted, address = door.accept()
        assert hand(ours, accepted) and accepted.fileno() == -1
        sock, peer = taken.accept()
        with sock:
            assert peer == address and sock.recv(100) == b"first words"
    ours.close()
    with pytest.raises(BlockingIOError):  # nobody hands anything over any more, and that wakes nobody
        taken.accept()
    taken.close()


def test_the_porch_looks_and_reads_nothing() -> None:
    given: list[tuple[socket.socket, str]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    porch, hint = Porch(listener, lambda sock, found: given.append((sock, found)), looks=True), hint_of(b"1")
    porch.open(True)
    with socket.create_connection(listener.getsockname()) as halves, socket.create_connection(listener.getsockname()) as plain:
        first = hello(hint)
        halves.sendall(first[:100])
        plain.sendall(b"GET / HTTP/1.1\r\n")
        wait_for(lambda: porch.step(0.05) or given)
        assert [found for _, found in given] == [""]
        halves.sendall(first[100:])
        wait_for(lambda: porch.step(0.05) or len(given) == 2)
        assert given[1][1] == hint and given[1][0].recv(len(first), socket.MSG_WAITALL) == first
    porch.close()
    for sock, _ in given:
        sock.close()


def test_metrics_of_several_processes_are_those_of_one() -> None:
    def part(passes: int, peers: int, draining: int) -> list[list[object]]:
        counter = CounterMetricFamily("privinf_passes", "Passes.", labels=["role"])
        counter.add_metric(["server"], passes)
        gauges = [GaugeMetricFamily(name, name, value=value) for name, value in (("privinf_peers", peers), ("privinf_peers_limit", 8))]
        return packed([counter, *gauges, GaugeMetricFamily("privinf_draining", "x", value=draining)])

    gone = counts(part(100, 3, 1))
    values = {sample.name: sample.value for family in summed([gone, part(5, 1, 0), part(7, 2, 1)]) for sample in family.samples}
    assert values == {"privinf_passes_total": 112, "privinf_peers": 3, "privinf_peers_limit": 8, "privinf_draining": 0}


def test_who_is_missing_is_not_asked_for_at_each_probe() -> None:
    asked, answers = Readiness(), iter(["", "nobody"])
    assert [asked.why(lambda: next(answers)) for _ in range(5)] == [""] * 5
    assert next(answers) == "nobody"


def test_a_board_is_no_file(board: int) -> None:
    assert "memfd" in str(Path(f"/proc/self/fd/{board}").readlink())


class Slow(Service):
    """Answers whoever asks, and is slow at its door: between having somebody there and giving it a place."""

    role = "server"

    def __init__(self, keys: Path) -> None:
        super().__init__(listen="127.0.0.1:0", keys=str(keys), allowed_roles={"client"}, options=Options())
        self.at_door, self.go_on = threading.Event(), threading.Event()

    def _admit(self, connection: Connection) -> None:
        self.at_door.set()
        assert self.go_on.wait(PATIENCE)
        super()._admit(connection)

    def handle(self, connection: Connection) -> None:
        connection.send(bytes(connection.receive()))


def test_a_last_call_is_for_those_too_whom_the_door_has_in_its_hands(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with Slow(keys_dir) as service, dial(service.address, load_credentials(keys_dir, "client"), "server", PATIENCE) as guest:
        guest.send(b"?")
        assert service.at_door.wait(PATIENCE)
        called = pool.submit(service.last_call, PATIENCE)
        with pytest.raises(FuturesTimeout):
            called.result(0.3)
        assert not service.draining
        service.go_on.set()
        assert bytes(guest.receive()) == b"?"
        called.result(PATIENCE)
        assert service.draining


def test_a_last_call_waits_for_the_silent_and_not_for_ever(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with Slow(keys_dir) as service, dial(service.address, load_credentials(keys_dir, "client"), "server", PATIENCE) as guest:
        service.go_on.set()
        called = pool.submit(service.last_call, PATIENCE)
        with pytest.raises(FuturesTimeout):
            called.result(0.3)
        guest.send(b"!")
        assert bytes(guest.receive()) == b"!"
        called.result(PATIENCE)
    with Slow(keys_dir) as service, dial(service.address, load_credentials(keys_dir, "client"), "server", PATIENCE):
        service.last_call(0.3)
        assert service.draining
