"""Queries prepared by workers of a cluster: all of them are in one store, each is used once, and a lost worker's are prepared anew."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from privinf.client.preprocessing import Preprocessing
from privinf.jobs import preparing
from privinf.session import pool
from privinf.session.prepared import Prepared, read_header
from protocols.errors import ConfigError, HandshakeError
from tests.support.cluster import Loses, Machines
from tests.support.duo import duo
from tests.support.trio import Trio, is_greedy, keys

PROMPT = [1, 2, 3]


@pytest.fixture
def parties(parties: Trio) -> Trio:
    """Those of this file, without anything prepared, and without marks."""
    return parties.forget()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    found = Machines()
    found.stand_in(monkeypatch, preparing)
    return found


def prepare(parties: Trio, *seq: int, **more: Any) -> dict[str, Any]:
    client = parties.client()
    where: dict[str, Any] = {"dealer": parties.dealer.address, "keys": str(keys()), "options": client.options}
    found = preparing.prepare(parties.server.address, seq=seq, **where, **{"max_new_tokens": 2, **more})
    return found


def files(parties: Trio, role: str) -> dict[int, bytes]:
    """Index and serial of what lies in a store."""
    headers = [read_header(path) for path in (parties.cache / "prepared").glob(f"{role}-*/*.bin")]
    assert len({header.seed for header in headers}) == len(headers)
    return {header.index: header.serial for header in headers}


def left(parties: Trio) -> list[Path]:
    """Parts of files that nobody will give a name."""
    return list(parties.cache.rglob(".part-*"))


def use(parties: Trio) -> int:
    """Uses up what is prepared; how many there were."""
    count, client = 0, parties.client()
    while True:
        tokens = [token.id for token in client.generate(ids=PROMPT, max_new_tokens=2, ignore_eos=True)]
        assert client.result is not None and is_greedy(PROMPT, tokens)
        if not client.result["prepared"]:
            return count
        assert client.result["traffic"]["offline"]["payload"] == 0
        count += 1


def test_what_workers_prepare_is_in_one_store_and_used_once(parties: Trio, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, bytes]] = []
    store = Prepared.store
    monkeypatch.setattr(Prepared, "store", lambda self, device: used.append((self.header.role, self.header.seed)) or store(self, device))
    parties.client().prepare(3, max_new_tokens=2)  # by this process
    told: list[float] = []
    made = prepare(parties, 3, count=3, sessions=2, progress=lambda phase, share: told.append(share))
    assert [one["index"] for one in made["prepared"]] == [2, 3, 4] and told[-1] == 1
    assert files(parties, "client") == files(parties, "server") and len(files(parties, "client")) == 4
    assert {one["bytes"] for one in made["prepared"]} == {path.stat().st_size for path in parties.cache.glob("prepared/client-*/*.bin")}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in parties.cache.glob("prepared/*/*.bin"))
    assert len(machines.made) == 2 and not left(parties)
    assert use(parties) == 4 and len(set(used)) == len(used) == 8
    assert [one["index"] for one in prepare(parties, 3, 5, sessions=1)["prepared"]] == [5, 1], "above what is spent, a lane each"


@pytest.mark.parametrize(
    ("method", "when"),
    [("version", "before"), ("make", "before"), ("make", "after"), ("read", "after"), ("keep", "before"), ("keep", "after")],
)
def test_what_a_lost_worker_was_preparing_another_prepares(parties: Trio, machines: Machines, method: str, when: str) -> None:
    lost: Loses = lambda name, count: when if (name, count) == (method, int(method != "version")) else ""  # noqa: E731
    machines.loses = lost
    made = prepare(parties, 3, count=3, sessions=2)
    assert len(made["prepared"]) == 3 and len(machines.made) == 3
    here, there = files(parties, "client"), files(parties, "server")
    assert len(here) == 3 and here.items() <= there.items(), "the server may have one of which the client was not told"
    assert use(parties) == 3


def test_a_worker_of_another_version_is_one_line(parties: Trio, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing.Preparer, "version", lambda self: "9.9.9")
    with pytest.raises(ConfigError, match=r"a worker of the cluster has privinf 9\.9\.9, and here it is") as caught:
        prepare(parties, 3)
    assert "\n" not in str(caught.value) and not files(parties, "client")


def test_what_was_prepared_before_a_refusal_stays(parties: Trio, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    move, calls = pool.move_into_place, iter(range(9))

    def full(part: Path, path: Path) -> None:
        if "client-" in str(path) and next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        move(part, path)

    monkeypatch.setattr(pool, "move_into_place", full)
    with pytest.raises(ConfigError, match="No space left"):
        prepare(parties, 3, count=3, sessions=1)
    assert len(files(parties, "client")) == 1 and files(parties, "client") == files(parties, "server")
    with pytest.raises(ConfigError, match="1 to 32 tokens"):
        prepare(parties, 33)
    with pytest.raises(ConfigError, match="nothing to prepare"):
        prepare(parties)


def test_a_store_takes_no_index_that_is_in_use(parties: Trio, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was put back to an earlier state hands out an index anew: not even a worker that was told of nothing brings it in."""
    prepare(parties, 3)
    for path in (*parties.cache.glob("prepared/server-*/*.bin"), *parties.cache.glob("spent/server-*.json")):
        path.unlink()
    blind = preparing.Shelf(0, ())
    monkeypatch.setattr(preparing, "Shelf", lambda spent, held: blind)
    before = files(parties, "client")
    with pytest.raises(ConfigError, match="its index 1 is in use"):
        prepare(parties, 3)
    assert files(parties, "client") == before and not files(parties, "server")


def test_the_servers_word_comes_through(parties: Trio, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise HandshakeError("this server keeps at most 64 prepared queries", party="server")

    monkeypatch.setattr(Preprocessing, "_reserve", refuses)
    with pytest.raises(HandshakeError, match="keeps at most 64"):
        prepare(parties, 3)


def test_without_a_dealer_it_is_the_same(tmp_path: Path, machines: Machines) -> None:
    machines.loses = lambda name, count: "after" if (name, count) == ("make", 0) else ""
    with duo(cache=tmp_path / "server") as pair:
        client = pair.client(cache=tmp_path / "client")
        where: dict[str, Any] = {"keys": str(keys()), "options": client.options}
        made = preparing.prepare(pair.server.address, seq=[3], max_new_tokens=2, count=2, sessions=2, **where)
        assert len(made["prepared"]) == 2 and len(machines.made) == 3
        tokens = [token.id for token in client.generate(ids=PROMPT, max_new_tokens=2, ignore_eos=True)]
        assert is_greedy(PROMPT, tokens) and client.result is not None and client.result["prepared"]
        stores = {role: list((tmp_path / role).rglob("prepared/*/*.bin")) for role in ("server", "client")}
        assert [len(found) for found in stores.values()] == [1, 1]
