"""Prepared queries and bad luck, with parties that are processes: killed right after each mark, disks that fill, several at once.

A hook in each process notes which prepared queries it uses, when a pass takes its correlations from one, before the pass's first frame.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import trio as t
from tests.support.faults import Fault, SmallFiles
from tests.support.trio import Hook, Process, Services


@dataclass(frozen=True)
class Noted:
    """A hook that appends `role index` to a file for each prepared query that goes online; then another hook."""

    path: Path
    then: Hook | None = None

    def __call__(self) -> None:
        from privinf.session.prepared import Prepared

        next_pass, noted = Prepared.next_pass, set()

        def watched(prepared: Prepared, store: Any) -> Any:
            header = prepared.header
            if header.seed not in noted:
                noted.add(header.seed)
                with self.path.open("a") as file:
                    file.write(f"{header.role} {header.index}\n")
            return next_pass(prepared, store)

        Prepared.next_pass = watched  # type: ignore
        if self.then is not None:
            self.then()


@dataclass(frozen=True)
class KilledAtMark:
    """A hook that ends a process by SIGKILL right after, or right before, it has marked an index as spent."""

    after: bool

    def __call__(self) -> None:
        thread = threading.local()

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if getattr(thread, "busy", False):
                return
            thread.busy, due = True, getattr(thread, "marked", False)  # then this is the first that it does after
            if event == "os.rename" and Path(arguments[1]).parent.name == "spent":
                thread.marked = bool(json.loads(Path(arguments[0]).read_text()).get("spent"))
                due = due or (thread.marked and not self.after)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            thread.busy = False

        sys.addaudithook(audit)


class Bench:
    """A dealer and a server that share a cache with the client; each can be started again with the same cache, with a hook or without."""

    def __init__(self, root: Path, hooks: dict[str, Hook]) -> None:
        self.root, self.cache = root, root / "cache"
        dealer, at = t.start_dealer(Noted(root / "used", hooks.get("dealer")), cache=self.cache)
        self.services = Services(dealer, dealer, at, "")
        self.start("server", hooks.get("server"))

    def start(self, role: str, then: Hook | None = None) -> None:
        hook, services = Noted(self.root / "used", then), self.services
        if role == "dealer":
            services.dealer, _ = t.start_dealer(hook, listen=services.dealer_address, cache=self.cache)
        elif role == "server":
            services.server, services.server_address = t.start_server(services.dealer_address, "--cache", self.cache, hook=hook)

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        """With a fault on one of the client's links."""
        kept = self.services
        with kept.faulty(fault) as self.services:
            yield
        self.services = kept

    def end(self) -> None:
        for process in (self.services.server, self.services.dealer):
            process.end()

    def prepare(self, count: int, then: Hook | None = None, tokens: int = 1) -> Process:
        words = ("--seq", 3, "--max-new-tokens", tokens, "--count", count, "--cache", self.cache)
        return self.services.generate(*words, verb="prepare", hook=then)

    def ask(self, then: Hook | None = None, tokens: int = 1) -> Process:
        words = ("--cache", self.cache, "--max-new-tokens", tokens, "--ignore-eos", "--json")
        return self.services.generate(*words, hook=Noted(self.root / "used", then))

    def answered(self, process: Process) -> bool:
        """Whether the reply, which must come and be right, is of a prepared query."""
        assert process.wait() == 0, process.err
        result = json.loads(process.out)
        assert t.is_greedy([1, 2, 3], result["tokens"])
        return bool(result["prepared"])

    def used(self, role: str) -> list[int]:
        path = self.root / "used"
        found = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [int(index) for each, index in found if each == role]


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """With the hook that a test's parameters `role` and `hook` name."""
    found = Bench(tmp_path, {request.getfixturevalue("role"): request.getfixturevalue("hook")} if "hook" in request.fixturenames else {})
    yield found
    found.end()


def said(process: Process, words: str) -> None:
    """Each line of stderr is readable, and one holds these words."""
    assert any(words in line for line in process.lines), process.err
    assert all(line.isprintable() and len(line) < 700 and "Traceback" not in line for line in process.lines)


AFTER, BEFORE = KilledAtMark(True), KilledAtMark(False)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("role", "hook", "next_index"),
    [
        ("client", AFTER, 2),
        ("client", BEFORE, 1),  # nobody has marked it
        ("server", AFTER, 2),
        ("dealer", AFTER, 2),
        pytest.param("server", BEFORE, 2, marks=slow),
        pytest.param("dealer", BEFORE, 2, marks=slow),
    ],
)
def test_killed_at_the_mark(bench: Bench, role: str, hook: KilledAtMark, next_index: int) -> None:
    """What was marked never goes online, and what was not is used next."""
    assert bench.prepare(2).wait() == 0
    client = bench.ask(hook if role == "client" else None)
    if role == "client":
        assert client.wait() == -signal.SIGKILL
    else:
        assert client.wait() in (3, 4) and len(client.said) == 1
        assert getattr(bench.services, role).wait() == -signal.SIGKILL
        bench.start(role)
    assert bench.used("client") == bench.used("server") == []
    client = bench.ask()
    assert bench.answered(client) and bench.used("client") == bench.used("server") == [next_index]
    stale = {"client": client, "server": bench.services.server}.get(role)
    if hook.after and stale is not None:  # its file is still there
        said(stale, "refused and removed: index 1 and below are spent")


@pytest.mark.parametrize("number", [1, pytest.param(9, marks=slow)])
def test_killed_within_a_prepared_query(bench: Bench, number: int) -> None:
    """What was spent is lost, and the next one is used."""
    assert bench.prepare(2).wait() == 0
    with bench.faulty(Fault("client", "server:online", number)):
        assert bench.ask().wait() == -signal.SIGKILL
    assert bench.answered(bench.ask())
    for role in ("client", "server"):
        assert bench.used(role) in ([1, 2], [2])


def test_two_processes_share_one_store(bench: Bench) -> None:
    assert bench.prepare(2).wait() == 0
    pair = [bench.ask(), bench.ask()]
    assert [bench.answered(each) for each in pair] == [True, True]
    assert sorted(bench.used("client")) == sorted(bench.used("server")) == [1, 2]


@pytest.mark.parametrize(("role", "hook"), [("client", SmallFiles(3000)), ("server", SmallFiles(3000))])
def test_a_disk_that_fills_while_a_query_is_prepared(bench: Bench, role: str, hook: Hook) -> None:
    client = bench.prepare(1, hook if role == "client" else None, tokens=2)
    assert client.wait() in ((2,) if role == "client" else (3, 4)) and len(client.said) == 1
    said(client if role == "client" else bench.services.server, "File too large")
    t.wait_for(lambda: not [path for path in (bench.cache / "prepared").rglob("*") if path.is_file()])
    assert not bench.answered(bench.ask())


@pytest.mark.parametrize(
    ("role", "where", "number"),
    [("client", "server:offline", 3), ("server", "client:offline", 5), pytest.param("dealer", "client:offline", 5, marks=slow)],
)
def test_killed_while_a_query_is_prepared(bench: Bench, role: str, where: str, number: int) -> None:
    """Nothing is left that could be used by half; the next one is prepared as ever."""
    with bench.faulty(Fault(role, where, number)):
        client = bench.prepare(1, tokens=2)
        code = client.wait()
    if role == "client":
        assert code == -signal.SIGKILL
    else:
        assert code in (3, 4) and len(client.said) == 1
        bench.start(role)
    assert not list((bench.cache / "prepared").rglob("*.bin"))
    assert bench.prepare(1, tokens=2).wait() == 0
    assert bench.answered(bench.ask(tokens=2)) and bench.used("client") == bench.used("server")
