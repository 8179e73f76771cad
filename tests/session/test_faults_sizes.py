"""Short messages that would take much memory, against a dealer that is a process: it says no in one line, and has not grown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privinf.session.messages import Dealt
from tests.support import trio as t
from tests.support.peers import joined

GROWTH = 48 * 2**20  # far below what each of these took


@pytest.fixture(scope="module")
def dealer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[t.Process, str]]:
    process, address = t.start_dealer(cache=tmp_path_factory.mktemp("dealer") / "cache")
    with joined(address) as session:  # what it loads at its first session
        assert "Dealt" in str(session.ask([["Mask", [4], 8, 0]]))
    yield process, address
    process.end()


def peak(process: t.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


BROADCAST = [["Mask", [1, 16384], 8, 0], ["Mask", [16384, 1], 8, 0], ["ProductMask", 1, 2, [1], 8, []]]


def pairs(first: int) -> list[Any]:
    return [["Mask", [1, 4], 8, 0], ["PairCompareMask", 1, [1, 1, 1], [1, 1, 1], 8, 0, [1, first, 1], 0, 0]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([BROADCAST], "the shape of a ProductMask does not fit the masks that it names"),
        ([pairs(9000)], "the fields of a PairCompareMask do not fit the masks that they name"),
        ([pairs(3000 + k) for k in range(6)], "the fields of a PairCompareMask do not fit the masks that they name"),
        ([[["Mask", [2**31 - 1], 64, 0]]], "more than the 8589934592 bytes that a session may hold at the dealer"),
        ([[[[]] * 65000] * 16], "that is none of this release|is not a Deal"),
    ],
    ids=["broadcast", "rows", "many rows", "one mask", "lists"],
)
def test_a_deal_that_would_take_much(dealer: tuple[t.Process, str], asked: list[list[Any]], words: str) -> None:
    process, address = dealer
    before, said = peak(process), ""
    for kinds in asked:
        with joined(address) as session:
            said = str(session.ask(kinds))
    assert any(each in said for each in words.split("|")), said
    assert "\n" not in said and peak(process) - before < GROWTH
    with joined(address) as session:
        assert isinstance(session.ask([["Mask", [4], 8, 0]]), Dealt)
