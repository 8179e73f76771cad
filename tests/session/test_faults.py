"""Bad luck: parties that are killed, stopped or never there, at every phase; each ends in one readable line on every party, in time.

Parties are real processes. A relay on one of their links kills or stops one of them at a frame, which is everywhere a session can be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from privinf.local.session import LocalSession
from privinf.session.options import Options
from protocols.errors import TransportError
from tests.support import trio as t
from tests.support.failures import failed, is_well, new_lines
from tests.support.faults import Fault, Relay
from tests.support.trio import Process, Services
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [1, 2, 3]

CLIENT_AT = [
    ("server:setup", 1),  # TLS is there, and nothing else
    ("server:setup", 3),
    ("server:setup", 10),  # in the set-up
    ("server:setup", 14),  # the token comes, the dealer is not known
    ("dealer:offline", 1),
    ("dealer:offline", 3),
    ("server:online", 1),  # before the first query
    ("dealer:offline", 6),
    ("server:offline", 3),
    ("server:online", 20),
    ("server:online", 64),  # near the first token
    ("server:online", 90),
]
SERVER_AT = [
    ("client:setup", 1),
    ("client:setup", 5),
    ("client:setup", 12),
    ("dealer:offline", 1),
    ("dealer:offline", 3),
    ("dealer:offline", 4),  # the seed comes
    ("client:setup", 14),  # the token is sent
    ("client:online", 1),
    ("dealer:offline", 5),  # asks for the first correlations
    ("client:offline", 4),
    ("client:online", 30),
    ("client:online", 80),
]
DEALER_AT = [
    ("server:offline", 1),
    ("server:offline", 3),
    ("server:offline", 5),
    ("client:offline", 1),
    ("client:offline", 3),
    ("client:offline", 5),
    ("client:offline", 6),
    ("server:offline", 7),  # between two tokens
]


def names(points: list[tuple[str, int]]) -> list[str]:
    return [f"{where}:{number}" for where, number in points]


@pytest.fixture(scope="module")
def made() -> Iterator[Services]:
    with t.services() as services:
        yield services


def fresh(tmp_path: Path) -> tuple[object, ...]:
    """Options of a session that does everything: an empty cache, several tokens."""
    return ("--cache", tmp_path / "cache", "--max-new-tokens", 3)


# ---- killed


@pytest.mark.parametrize(("where", "number"), CLIENT_AT, ids=names(CLIENT_AT))
def test_the_client_is_killed(made: Services, tmp_path: Path, where: str, number: int) -> None:
    said, dealt = len(made.server.lines), len(made.dealer.lines)
    with made.faulty(Fault("client", where, number)) as services:
        client = services.generate(*fresh(tmp_path))
        assert client.wait() == -signal.SIGKILL, client.err
    (line,) = new_lines(made.server, said)
    assert "client 127.0.0.1" in line
    if (where, number) not in CLIENT_AT[:4]:
        assert "client" in new_lines(made.dealer, dealt, 2)[0]
    assert len(made.dealer.lines) - dealt <= 2
    if (where, number) in (CLIENT_AT[0], CLIENT_AT[-1]):
        assert is_well(made)


@pytest.mark.parametrize(("where", "number"), SERVER_AT, ids=names(SERVER_AT))
def test_the_server_is_killed(made: Services, tmp_path: Path, where: str, number: int) -> None:
    dealt = len(made.dealer.lines)
    with t.serving(made.dealer, made.dealer_address, fault=Fault("server", where, number)) as services:
        client = services.generate(*fresh(tmp_path))
        line = failed(client, (3, 4) if where != "client:online" or number == 1 else (4,))
        assert services.server.wait() == -signal.SIGKILL and "127.0.0.1" in line and "Traceback" not in line
        if (where, number) not in SERVER_AT[:4]:
            assert "server" in new_lines(made.dealer, dealt, 2)[0]
    assert is_well(made)


@pytest.mark.parametrize(("where", "number"), DEALER_AT, ids=names(DEALER_AT))
def test_the_dealer_is_killed(tmp_path: Path, where: str, number: int, replaceable: Replaceable) -> None:
    services = replaceable.services
    replaceable.start(Fault("dealer", where, number))
    said = len(services.server.lines)
    line = failed(services.generate(*fresh(tmp_path)), (3,) if number == 1 else (3, 4))
    assert ("dealer" in line or services.dealer_address in line) and services.dealer.wait() == -signal.SIGKILL
    new_lines(services.server, said)


class Replaceable:
    """A server, and a dealer that each test replaces, behind relays that stay."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        dealer, self.address = t.start_dealer()
        self.relays = [stack.enter_context(Relay(self.address, (dials, "dealer"), t.keys())) for dials in ("client", "server")]
        at = [relay.address for relay in self.relays]
        self.services = replace(stack.enter_context(t.serving(dealer, at[1], "--connect-timeout", 2)), dealer_address=at[0])
        stack.callback(self.end)

    def start(self, fault: Fault | None = None) -> None:
        """Another dealer at the same address."""
        self.end()
        self.services.dealer, _ = t.start_dealer(listen=self.address)
        for relay, dials in zip(self.relays, ("client", "server"), strict=True):
            relay.fault = fault if fault is not None and fault.link[0] == dials else None
        if fault is not None:
            fault.victim.set_result(self.services.dealer)

    def end(self) -> None:
        self.services.dealer.end()


@pytest.fixture(scope="module")
def replaceable() -> Iterator[Replaceable]:
    """Its server serves well in the end."""
    with contextlib.ExitStack() as stack:
        found = Replaceable(stack)
        yield found
        found.start()
        assert is_well(found.services)


def test_there_is_no_dealer(tmp_path: Path) -> None:
    with t.services("--connect-timeout", 2) as services:
        services.dealer.end()
        said = len(services.server.lines)
        line = failed(services.generate(*fresh(tmp_path)), (3,))
        assert f"the server cannot reach its dealer at {services.dealer_address}: could not connect within 2 s: connection refused" in line
        assert "cannot reach its dealer" in new_lines(services.server, said)[0]


def test_there_is_no_server(made: Services, tmp_path: Path) -> None:
    nobody = Services(made.server, made.dealer, made.dealer_address, "127.0.0.1:9")
    assert "could not connect within 1 s" in failed(nobody.generate("--timeout", 1), (3,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt-ids", ",".join(["1"] * 33)), "the prompt has 33 tokens, and the model's context 32"),
        (("--prompt-ids", "1,97"), "outside of the vocabulary of 97"),
        (("--prompt", "x", "--nonsense"), "no such option"),
    ],
)
def test_wrong_prompts(made: Services, words: tuple[str, ...], message: str) -> None:
    said = len(made.server.lines)
    assert message in failed(made.generate(*words, "--json"), (2,)).lower()
    if "--prompt-ids" in words:  # the vocabulary is known after the handshake
        assert "ended the session" in new_lines(made.server, said)[0]


# ---- stopped


@pytest.mark.parametrize("role", [pytest.param("client", marks=pytest.mark.slow), "server", pytest.param("dealer", marks=pytest.mark.slow)])
def test_a_party_is_stopped(tmp_path: Path, role: str) -> None:
    """It shows no sign of life, and its connections stay open: the others notice within the deadline, here 8 s."""
    where, number = {"client": ("server:online", 20), "server": ("client:online", 20), "dealer": ("client:offline", 5)}[role]
    with t.services(timeout=8.0, fault=Fault(role, where, number, signal.SIGSTOP)) as services:
        client = services.generate(*fresh(tmp_path), timeout=8.0)
        with client:
            if role != "client":
                assert "no sign of life" in failed(client, (4,))
            if role != "server":
                # with a deadline this short the server may give up on the client before the client gives up on the dealer
                line = new_lines(services.server, 1)[0]
                assert "no sign of life" in line or (role == "dealer" and "does not answer within 8 s" in line)
            if role == "client":
                new_lines(services.dealer, 1)
                assert is_well(services)


@pytest.mark.slow
def test_a_client_is_stopped_between_two_queries(made: Services, tmp_path: Path) -> None:
    """A session may lie unused for an hour, but not a party that shows no sign of life."""
    said = len(made.server.lines)
    with made.faulty(Fault("client", "server:online", 1, signal.SIGSTOP)) as services, services.generate(*fresh(tmp_path)):
        assert "no sign of life" in new_lines(made.server, said, seconds=2 * PATIENCE)[0]


# ---- asked to end


@pytest.mark.parametrize(
    ("role", "number"), [("client", signal.SIGINT), ("client", signal.SIGTERM), ("server", signal.SIGTERM), ("dealer", signal.SIGINT)]
)
def test_a_party_is_asked_to_end_in_a_session(tmp_path: Path, role: str, number: int) -> None:
    """A slow link makes the session last, for longer than a drain; the signal comes in the middle of it."""
    link = ("--link", "60ms:100")
    with t.services(*link) as services:
        client = services.generate(*fresh(tmp_path), "--max-new-tokens", 24, "--ignore-eos", *link)
        with client:
            t.wait_for(lambda: list((tmp_path / "cache").rglob("*.bin")))
            time.sleep(1.0)
            process: Process = {"client": client, "server": services.server, "dealer": services.dealer}[role]
            process.send(number)
            assert process.wait() == (128 + number if role == "client" else 0)
            if role == "client":
                assert client.err == f"privinf: {'interrupted' if number == signal.SIGINT else 'terminated'}\n" and client.out == ""
                new_lines(services.server, 1)
                assert is_well(services)
            else:
                failed(client, (4,))
                assert process.lines[-1] == f"{role} stops"


# ---- the processes of `privinf run`


def start_run(tmp_path: Path, *words: object) -> tuple[subprocess.Popen[str], set[int]]:
    """A run that lasts, once its three children are at work; and their process ids."""
    command = [sys.executable, "-m", "privinf", "run", t.lowered_directory(), "--prompt-ids", "3,1,3", "--max-new-tokens", 20]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(word) for word in (*command, "--cache", tmp_path / "cache", "--link", "100ms:100", *words)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    t.wait_for(lambda: list((tmp_path / "cache").rglob("*.bin")), about=lambda: str(process.poll()))
    children = t.parties_of(process.pid)
    assert len(children) == 1 + 3
    for pid, what in itertools.product(children, ("cmdline", "environ")):
        assert b"3,1,3" not in Path(f"/proc/{pid}/{what}").read_bytes()
    return process, children


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_no_child_of_a_run_outlives_it(tmp_path: Path, number: int) -> None:
    process, children = start_run(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert err == {2: "privinf: interrupted\n", 15: "privinf: terminated\n", 9: ""}[number]
    t.wait_for(lambda: not t.running(children))
    t.wait_for(lambda: not list(tmp_path.glob("privinf-*")))  # its keys


def child(pids: set[int], role: str) -> int:
    return next(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == f"privinf-{role}\n")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["client", "server", "dealer"])
def test_a_child_of_a_run_is_killed(tmp_path: Path, role: str) -> None:
    process, children = start_run(tmp_path)
    os.kill(child(children, role), signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 4 and f"the local {role} process was ended by SIGKILL" in err and err.count("\n") == 1
    assert not t.running(children) and not list(tmp_path.glob("privinf-*"))


@pytest.mark.slow
def test_a_child_of_a_local_session_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privinf.local.session.SILENCE_S", 5.0)
    with LocalSession(t.lowered(), Options(cache=tmp_path, timeout=5.0)) as session:
        tokens = session.generate(ids=PROMPT, max_new_tokens=20, ignore_eos=True)
        next(tokens)
        os.kill(session._parties["client"].process.pid, signal.SIGSTOP)
        with pytest.raises(TransportError, match="no sign of life from the local client process"):
            list(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["client", "server", "dealer"])
def test_killed_anywhere(made: Services, tmp_path: Path, role: str) -> None:
    """Every frame of a session of two tokens, one after the other, and where there are many, some of them."""
    places = {
        "client": {"server:setup": 14, "dealer:offline": 8, "server:online": 124, "server:offline": 20},
        "server": {"client:setup": 14, "dealer:offline": 7, "client:online": 124, "client:offline": 20},
        "dealer": {"server:offline": 7, "client:offline": 8},
    }
    for where, count in places[role].items():
        for number in range(1, count + 1, 1 if count < 50 else 7):
            with t.services(fault=Fault(role, where, number)) as services:
                client = services.generate("--cache", tmp_path / f"{where}-{number}", "--max-new-tokens", 2, "--connect-timeout", 2)
                code = client.wait()
                assert code in (-signal.SIGKILL, 0) if role == "client" else code in (0, 3, 4), (where, number, client.err)
                assert len(client.said) == (0 if code in (0, -signal.SIGKILL) else 1), client.err
                time.sleep(0.2)
                for process in (services.server, services.dealer):
                    assert "Traceback" not in process.err and "internal error" not in process.err and len(process.lines) <= 3
