"""Marks of spent queries: a peer's words alone make nothing on a disk, growth is bounded, and what counts no more may go."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from privinf.cli import cache as cli
from privinf.cli.app import main
from privinf.server import budget
from privinf.session import marks
from privinf.session import pool as stock
from privinf.session.messages import Chosen, Mark, Marked, Spend, Terms
from privinf.transport.keys import show_keys
from protocols.errors import ConfigError, RefusedError
from tests.support import trio as t
from tests.support.peers import joined
from tests.support.tls_pair import outcome
from tests.support.trio import trio


def kept(cache: Path) -> list[str]:
    """Everything of prepared queries in a cache."""
    return sorted(str(path.relative_to(cache)) for kind in ("prepared", "spent") for path in (cache / kind).rglob("*"))


def test_what_a_client_would_spend_makes_nothing_where_nothing_is_held(tmp_path: Path) -> None:
    """Neither at the server nor at the dealer, whatever the terms; and a session's requests are bounded."""
    with trio(cache=tmp_path) as parties, pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "MAX_REQUESTS", 300)
        session = parties.client(fresh=True).connect()
        for k in range(300):
            session.connection.send_control(Spend(Terms(1 + k % 20, 1 + k % 13, bool(k % 2), k % 5), k, ((k + 1, bytes(16)),)))
            assert session.connection.receive_control(Chosen) == Chosen(k, 0)
        session.connection.send_control(Spend(Terms(1, 1), 0, ()))
        error = outcome(lambda: session.connection.receive_control(Chosen))
        assert isinstance(error, RefusedError) and "answers at most 300 requests" in str(error)
        assert kept(tmp_path) == [] and parties.server.counters.refusals == {"requests": 1}
        session.close()


def test_marks_at_a_dealer_are_bounded_for_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lock, and no more lanes than that, whichever models and terms a server names; only for a client that is there."""
    monkeypatch.setattr(stock, "MAX_LANES", 12)
    with trio(cache=tmp_path) as parties:
        with joined(parties.dealer.address) as session:
            for k in range(30):
                session.server.send_control(Mark(f"{k % 7:032x}", Terms(1 + k, 1), 0, k % 2))
                assert session.server.receive_control(Marked).ok == (k < 12)
        found = kept(tmp_path)
        assert len(found) == 13 and sum(name.endswith(".lock") for name in found) == 1
        with joined(parties.dealer.address, join=False) as session:
            parties.dealer.options = replace(parties.dealer.options, timeout=0.3)
            session.server.send_control(Mark("0" * 32, Terms(31, 1), 0, 0))
            assert "did not join its session in time" in str(outcome(lambda: session.server.receive_control(Marked)))
        assert kept(tmp_path) == found


def test_marks_go_once_a_certificate_has_expired_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trio(cache=tmp_path) as parties:
        client = parties.client()
        client.prepare(3, max_new_tokens=1, count=2)
        assert list(client.generate(ids=[1, 2, 3], max_new_tokens=1))
        expires = min(info.not_after.timestamp() for info in show_keys(t.keys()) if info.role in ("client", "server"))
        entries = marks.overview(tmp_path)
        assert {entry["role"] for entry in entries} == {"client", "server", "dealer"} and not any(entry["expired"] for entry in entries)
        for name in ("server", "client", "dealer"):
            (path,) = (tmp_path / "spent").glob(f"{name}-*.json")
            assert abs(msgspec.json.decode(path.read_bytes(), type=marks.Marks).until - expires) < 86400
        before = kept(tmp_path)
        for moment in (time.time(), expires + marks.GRACE_S - 86400):
            monkeypatch.setattr(time, "time", lambda moment=moment: moment)
            cli.rm(expired=True, cache=tmp_path)
            assert kept(tmp_path) == before
        monkeypatch.setattr(time, "time", lambda: expires + marks.GRACE_S + 86400)
        for entry in entries:  # with the certificate's time over, and yet by no other way
            marks.remove_lane(tmp_path, entry["name"].partition("/")[2], 5)
        assert [name for name in kept(tmp_path) if name.endswith(".json")] == [name for name in before if name.endswith(".json")]
        cli.rm(expired=True, cache=tmp_path)
        assert not [name for name in kept(tmp_path) if not name.endswith(".lock")]
        assert main(["cache", "rm", "--expired", "--all", "--cache", str(tmp_path)]) == 2


def test_marks_of_which_nobody_knows_how_long_they_count_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of earlier releases."""
    lane = marks.Lane("0" * 32, "a" * 64, "b" * 64, Terms(3, 1))
    path = tmp_path / "spent" / f"{lane.name('dealer')}.json"
    path.parent.mkdir()
    path.write_bytes(msgspec.json.encode({"lane": lane, "spent": 4, "reserved": 0}))
    cli.rm(expired=True, cache=tmp_path)
    assert path.exists() and marks.overview(tmp_path)[0]["spent"] == 4
    now, until = time.time(), time.time() + 60
    with stock.Pool(tmp_path, "dealer").open(lane, 5, until) as shelf:
        assert shelf.spent == 4 and shelf.spend(5)
    monkeypatch.setattr(time, "time", lambda: until + 1)  # in a session that goes on, say
    with pytest.raises(ConfigError, match="has expired"), stock.Pool(tmp_path, "dealer").open(lane, 5, until):
        pass
    monkeypatch.setattr(time, "time", lambda: now + marks.GRACE_S + 3600)
    cli.rm(expired=True, cache=tmp_path)
    assert not path.exists()
