"""Each party is killed in each phase of a session, with another client's session beside it; and clients stall beside one that does not.

Parties are real processes. The one that is to die says into a file which phases it has walked through, so that a test knows where it died.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.graph.private import weights_of
from privinf.session import messages
from privinf.session.messages import Needs, Welcome, greet
from privinf.session.options import Options
from privinf.transport import listener
from privinf.transport.connection import Connection
from privinf.transport.endpoint import Endpoint
from privinf.transport.listener import parse_address
from privinf.transport.tls import TlsStream
from protocols.errors import PrivinfError
from tests.support import trio as t
from tests.support.failures import LINE, failed, new_lines
from tests.support.peers import dialled
from tests.support.tls_pair import inject
from tests.support.trio import Process, Services
from tests.support.waiting import PATIENCE

PHASES = ("tls", "hello", "set-up", "session", "prefill", "token", "end")
DEALERS = tuple(phase for phase in PHASES if phase != "set-up")  # in which the dealer has no part
TOKENS, BEFORE = 6, 3


@functools.cache
def reference() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt, and the float model's greedy reply, of which no token is a close choice."""
    for start in itertools.count(1):
        prompt, reply = [start, start + 1, start + 2], list[int]()
        while len(reply) < TOKENS:
            best = torch.topk(t.float_logits(prompt + reply), 2)
            if float(best.values[0] - best.values[1]) < 2 * t.CLEAR:
                break
            reply.append(int(best.indices[0]))
        if len(reply) == TOKENS:
            return tuple(prompt), tuple(reply)
    raise AssertionError


# ---- how a process dies in a phase


@dataclass(frozen=True)
class DieIn:
    """A hook that makes a process kill itself in a phase: `transfers` messages after it has begun.

    Phases follow from the control messages that this process sends and receives. Nothing counts before the file `armed` is there,
    and every phase that is entered after that stands in the file `walk`.
    """

    phase: str
    transfers: int
    walk: Path
    armed: Path

    def __call__(self) -> None:
        entered, left, passes = list[str](), [self.transfers], itertools.count()
        send, receive, transfer, shake = Endpoint.send_control, Endpoint.receive_control, Connection._transfer, TlsStream.shake
        guard = threading.Lock()

        def enter(phase: str) -> None:
            with guard:
                if self.armed.exists() and all(PHASES.index(phase) > PHASES.index(before) for before in entered):
                    entered.append(phase)
                    self.walk.write_text(" ".join(entered))

        def step() -> None:
            if entered and entered[-1] == self.phase:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def note(message: Any) -> None:
            if isinstance(message, messages.Pass | messages.Deal) and self.armed.exists():
                enter(("prefill", "token")[min(1, next(passes))])
            for kinds, phase in OPENS:
                if isinstance(message, kinds):
                    enter(phase)
            if self.phase == "end":
                step()

        def sent(endpoint: Endpoint, message: Any, *more: Any) -> None:
            if not isinstance(message, messages.Deal):  # of the server, which has the Pass that it is for
                note(message)
            send(endpoint, message, *more)

        def received(endpoint: Endpoint, *kind: Any) -> Any:
            message = receive(endpoint, *kind)
            note(message)
            return message

        def transferred(connection: Connection, *arguments: Any) -> Any:
            step()
            return transfer(connection, *arguments)

        def shaken(stream: TlsStream, **names: Any) -> bool:
            enter("tls")
            step()
            return shake(stream, **names)

        Endpoint.send_control, Endpoint.receive_control = sent, received  # type: ignore
        Connection._transfer, TlsStream.shake = transferred, shaken  # type: ignore


OPENS = (
    ((messages.Hello,), "hello"),
    ((messages.Needs,), "set-up"),
    ((messages.Register, messages.Session, messages.SessionSeed, messages.Join), "session"),
    ((messages.End,), "end"),
)


@dataclass(frozen=True)
class Victim:
    """What a test knows of the process that dies."""

    phase: str
    place: Path
    transfers: int = 0

    @property
    def hook(self) -> DieIn:
        return DieIn(self.phase, self.transfers, self.place / "walk", self.place / "armed")

    def arm(self) -> None:
        (self.place / "armed").touch()

    def died(self, process: Process, phases: tuple[str, ...] = PHASES) -> None:
        """In its phase, after all those before it."""
        assert process.wait() == -signal.SIGKILL, process.err
        assert (self.place / "walk").read_text().split() == list(phases[: phases.index(self.phase) + 1])


# ---- the session beside


class Beside:
    """Another client's session, whose cache holds a prompt and some of the reply."""

    def __init__(self, services: Services, cache: Path) -> None:
        options = Options(timeout=PATIENCE, cache=cache)
        client = Client(services.server_address, dealer=services.dealer_address, keys=str(t.second_client()), options=options)
        self._conversation = Conversation(client).open()
        self._tokens = self._conversation.generate(reference()[0], max_new_tokens=TOKENS, ignore_eos=True)
        self.reply = [next(self._tokens).id for _ in range(BEFORE)]

    def one(self) -> None:
        """One token more."""
        self.reply.append(next(self._tokens).id)

    def goes_on(self) -> None:
        """To the end, as if nothing had happened."""
        self.reply += [token.id for token in self._tokens]
        assert self.reply == list(reference()[1])
        self._conversation.end()

    def ends(self) -> None:
        """In one line, since the party that died was one of its own."""
        with pytest.raises(PrivinfError) as caught:
            list(self._tokens)
        assert caught.value.exit_code in (3, 4) and "\n" not in str(caught.value)


def whole(services: Services, *words: object, **options: Any) -> Process:
    """A client with nothing in its cache, which walks through every phase."""
    ids = ",".join(map(str, reference()[0]))
    return services.generate("--prompt-ids", ids, "--max-new-tokens", TOKENS, "--ignore-eos", *words, **options)


def is_right(services: Services, cache: Path) -> None:
    """The next session gets the reference reply."""
    options = Options(timeout=PATIENCE, cache=cache)
    client = Client(services.server_address, dealer=services.dealer_address, keys=str(t.keys()), options=options)
    found = [token.id for token in client.generate(ids=reference()[0], max_new_tokens=TOKENS, ignore_eos=True)]
    assert found == list(reference()[1])


def said_nothing_of_its_own(process: Process) -> None:
    assert process.alive and "Traceback" not in process.err and "internal error" not in process.err


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the clients in this process."""
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def made() -> Iterator[Services]:
    with t.services() as services:
        yield services


def transfers(phase: str) -> int:
    """Well within the passes, at once at the end."""
    return {"prefill": 12, "token": 12, "set-up": 1}.get(phase, 0)


# ---- killed


@pytest.mark.parametrize("phase", PHASES)
def test_the_client_is_killed(made: Services, cache: Path, tmp_path: Path, phase: str) -> None:
    """Server and dealer say one line each, and serve the session beside and the next one as if nothing had been."""
    said, dealt, victim = len(made.server.lines), len(made.dealer.lines), Victim(phase, tmp_path, transfers(phase))
    beside = Beside(made, cache)
    victim.arm()
    victim.died(whole(made, "--cache", tmp_path / "cache", hook=victim.hook))
    assert "127.0.0.1" in new_lines(made.server, said)[0]
    if PHASES.index(phase) > PHASES.index("session"):
        new_lines(made.dealer, dealt, 2)
    beside.goes_on()
    is_right(made, cache)
    assert len(made.server.lines) == said + 1 and len(made.dealer.lines) <= dealt + 2
    said_nothing_of_its_own(made.server)
    said_nothing_of_its_own(made.dealer)


@pytest.mark.parametrize("phase", PHASES)
def test_the_server_is_killed(made: Services, cache: Path, tmp_path: Path, phase: str) -> None:
    """Its clients end in one line; a session at another server of the same dealer goes on, and the next one works."""
    dealt, victim = len(made.dealer.lines), Victim(phase, tmp_path, transfers(phase))
    server, address = t.start_server(made.dealer_address, hook=victim.hook)
    with server:
        there = Services(server, made.dealer, made.dealer_address, address)
        beside, lost = Beside(made, cache), Beside(there, cache)
        victim.arm()
        client = whole(there, "--cache", tmp_path / "cache", "--json")
        if phase == "end":  # the client has all of its reply, and nothing to wait for
            assert client.wait() == 0 and client.err == "", client.err
        else:
            line = failed(client, (3,) if PHASES.index(phase) < PHASES.index("prefill") else (4,))
            assert "127.0.0.1" in line and client.out == ""
        victim.died(server)
        lost.ends()
        new_lines(made.dealer, dealt, 4)
        beside.goes_on()
        is_right(made, cache)
        said_nothing_of_its_own(made.server)
        said_nothing_of_its_own(made.dealer)


@pytest.fixture(scope="module")
def replaceable() -> Iterator[Services]:
    """A server that stays while each test brings a dealer of its own."""
    with t.services() as services:
        services.dealer.end()
        yield services


@pytest.mark.parametrize("phase", DEALERS)
def test_the_dealer_is_killed(replaceable: Services, cache: Path, tmp_path: Path, phase: str) -> None:
    """Sessions that it dealt for end in one line; the server stays, and goes on with the next dealer at that address."""
    services, victim = replaceable, Victim(phase, tmp_path)
    services.dealer, _ = t.start_dealer(victim.hook, listen=services.dealer_address)
    with services.dealer:
        lost = Beside(services, cache)
        said = len(services.server.lines)
        victim.arm()
        client = whole(services, "--cache", tmp_path / "cache", "--json")
        if phase == "end":
            assert client.wait() == 0 and client.err == "", client.err
        else:
            line = failed(client, (3,) if phase in ("tls", "hello", "session") else (4,))
            assert ("dealer" in line or services.dealer_address in line) and client.out == ""
        victim.died(services.dealer, DEALERS)
        lost.ends()
        new_lines(services.server, said, 2)
    services.dealer, _ = t.start_dealer(listen=services.dealer_address)
    with services.dealer:
        is_right(services, cache)
        said_nothing_of_its_own(services.server)


# ---- stalled


@dataclass(frozen=True)
class SmallBuffers:
    """A hook that leaves a party's sockets so little room that a peer which does not read is noticed after some kilobytes."""

    size: int = 4096

    def __call__(self) -> None:
        listener.tune = lambda sock: [
            sock.setsockopt(socket.SOL_SOCKET, which, self.size) for which in (socket.SO_SNDBUF, socket.SO_RCVBUF)
        ]  # type: ignore


def deaf(address: str, over: threading.Event) -> None:
    """Asks for all that there is, lives, and reads none of it."""
    with dialled(address, "client", "server") as connection:
        greet(connection)
        connection.receive_control(Welcome)
        connection.send_control(Needs(("bundle",)))
        connection.send_control(Needs(tuple(weights_of(t.lowered().graph))))
        over.wait(PATIENCE)


def drips_tls(address: str, over: threading.Event) -> None:
    with socket.create_connection(parse_address(address), 5) as sock:
        _drip(over, lambda byte: sock.sendall(byte), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


def drips_a_frame(address: str, over: threading.Event) -> None:
    """The head of a control message of 16 kB, and then a byte now and then."""
    with dialled(address, "client", "server") as connection:
        greet(connection)
        connection.receive_control(Welcome)
        _drip(over, lambda byte: inject(connection, byte), b"\x00\x00\x40\x00\x02\x00")


def _drip(over: threading.Event, send: Callable[[bytes], None], head: bytes) -> None:
    with contextlib.suppress(OSError, AssertionError):  # until it is shut out
        for byte in head + bytes(200):
            send(bytes([byte]))
            if over.wait(0.4):
                return


def test_clients_that_stall_are_shut_out_and_hold_up_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stops reading, one drips TLS, one drips a frame; a session with a cache goes on beside them, and a new one begins."""
    with t.services(server_hook=SmallBuffers(), timeout=8.0) as services:
        beside = Beside(services, cache)
        with monkeypatch.context() as patch:
            patch.setattr(listener, "tune", lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304))
            over = threading.Event()
            threads = [threading.Thread(target=stall, args=(services.server_address, over)) for stall in (deaf, drips_tls, drips_a_frame)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
        beside.one()
        is_right(services, cache)
        lines = services.server.until_lines(4)[1:]
        assert all(LINE.fullmatch(line) for line in lines), lines
        for words in ("does not take what we send within 8 s", "did not finish the TLS handshake in time", "does not answer within 8 s"):
            assert sum(words in line for line in lines) == 1, lines
        beside.goes_on()
        is_right(services, cache)
        said_nothing_of_its_own(services.server)
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
