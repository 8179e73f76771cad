"""Stocks of rows with parties that are processes: queries are served from one, and whoever is killed meanwhile, no row is used twice.

A hook in each process notes which rows it takes, once they are marked.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from privinf.lowering.explain import explain
from tests.session.test_prepared_faults import AFTER, BEFORE, KilledAtMark
from tests.support import trio as t
from tests.support.duo import Served, served
from tests.support.faults import Fault
from tests.support.plain_ends import PlainEnds, plain_ends
from tests.support.trio import Hook, Process

ROWS = 64
slow = pytest.mark.slow


@dataclass(frozen=True)
class Noted:
    """A hook that appends `role index count` to a file for all rows that are taken; then another hook."""

    path: Path
    then: Hook | None = None

    def __call__(self) -> None:
        from privinf.session.stock import StockLane

        PlainEnds()()
        take = StockLane.take

        def noted(lane: StockLane, path: Path, header: Any, index: int, count: int) -> Any:
            rows = take(lane, path, header, index, count)
            with self.path.open("a") as file:
                file.write(f"{header.role} {index} {count}\n")
            return rows

        StockLane.take = noted  # type: ignore
        if self.then is not None:
            self.then()


class Bench:
    """A server and a client with caches of their own; the server can be started again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def serve(self, then: Hook | None = None) -> Any:
        return served("--cache", self.root / "server", hook=Noted(self.root / "used", then))

    def prepare(self, server: Served) -> dict[str, Any]:
        process = server.generate("--stock", ROWS, "--cache", self.root / "client", "--json", verb="prepare")
        assert process.wait() == 0, process.err
        found: dict[str, Any] = json.loads(process.out)
        return found

    def ask(self, server: Served, then: Hook | None = None) -> Process:
        words = ("--cache", self.root / "client", "--max-new-tokens", 2, "--ignore-eos", "--json")
        return server.generate(*words, hook=Noted(self.root / "used", then))

    def from_stock(self, process: Process) -> bool:
        """Whether the reply, which must come and be right, took its rows from the stock; what moved is what was predicted."""
        assert process.wait() == 0, process.err
        result = json.loads(process.out)
        assert t.is_greedy([1, 2, 3], result["tokens"])
        with plain_ends():
            totals = [
                explain(t.lowered(), 3, new_tokens=2, trust="two-party", stock=stock)["total"]["offline_bytes"] for stock in (0, ROWS)
            ]
        assert result["traffic"]["offline"]["payload"] in totals and totals[0] > totals[1]
        return bool(result["traffic"]["offline"]["payload"] == totals[1])

    def used(self, role: str) -> list[int]:
        found = [line.split() for line in (self.root / "used").read_text().splitlines()]
        return [index for each, first, count in found if each == role for index in range(int(first), int(first) + int(count))]

    def once(self) -> bool:
        return all(len(set(self.used(role))) == len(self.used(role)) for role in ("server", "client"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)


KILLS = pytest.mark.parametrize("then", [AFTER, pytest.param(BEFORE, marks=slow)])


@KILLS
def test_a_stock_serves_queries_and_a_client_that_is_killed_loses_its_rows(bench: Bench, then: KilledAtMark) -> None:
    with bench.serve() as server:
        made = bench.prepare(server)
        assert made["stock"]["rows"] == ROWS and made["prepared"] == []
        killed = bench.ask(server, then)
        assert killed.wait() == -signal.SIGKILL, killed.err
        assert bench.from_stock(bench.ask(server)) and bench.once()
    first = 4 if then.after else 1
    assert bench.used("server") == list(range(first, first + 4))


@KILLS
def test_a_server_that_is_killed_uses_no_row_again(bench: Bench, then: KilledAtMark) -> None:
    with bench.serve(then) as server:
        bench.prepare(server)
        client = bench.ask(server)
        assert client.wait() in (3, 4) and server.server.wait() == -signal.SIGKILL and "Traceback" not in client.err
    with bench.serve() as server:
        assert bench.from_stock(bench.ask(server)) and bench.once()


@pytest.mark.parametrize("number", [2, pytest.param(9, marks=slow)])
@slow
def test_a_link_that_breaks_while_a_pass_is_made(bench: Bench, number: int) -> None:
    with bench.serve() as server:
        bench.prepare(server)
        with server.faulty(Fault("client", "server:offline", number)) as faulty:
            client = bench.ask(faulty)
            assert client.wait() == -signal.SIGKILL, client.err
        assert bench.from_stock(bench.ask(server)) and bench.once()


@slow
@pytest.mark.parametrize("role", ["client", "server"])
def test_making_one_that_is_cut_leaves_nothing(bench: Bench, role: str) -> None:
    with bench.serve() as server, server.faulty(Fault(role, f"{'server' if role == 'client' else 'client'}:offline", 4)) as faulty:
        words = ("--stock", ROWS, "--cache", bench.root / "client")
        process = faulty.generate(*words, verb="prepare")
        if role == "client":
            assert process.wait() == -signal.SIGKILL
        else:
            assert process.wait() in (3, 4) and server.server.wait() == -signal.SIGKILL
    assert not list(bench.root.rglob("prepared/*/[0-9]*.bin"))
    with bench.serve() as server:
        bench.prepare(server)
        assert bench.from_stock(bench.ask(server))
