"""Queries prepared ahead of time: they give what live ones give, cost nothing offline, and none is ever used twice.

What went online is seen where a pass takes its correlations from a prepared query: `used` holds (role, index, seed) of each query.
"""

from __future__ import annotations

import errno
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.cli import cache as cli
from privinf.client.client import Client
from privinf.files import write_private
from privinf.session import marks
from privinf.session.messages import Chosen, Hello, Pass, Prepare, Spend, Terms
from privinf.session.prepared import Prepared, Writer
from protocols.errors import ConfigError, HandshakeError, ProtocolDesync
from tests.support import trio as t
from tests.support.ladder import LOGIT_ERROR
from tests.support.tls_pair import outcome
from tests.support.trio import Trio, trio

PROMPT = [1, 2, 3]
Used = list[tuple[str, int, bytes]]


@pytest.fixture
def parties(parties: Trio) -> Trio:
    """Those of this file, without anything prepared, and without marks."""
    return parties.forget()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    found: Used = []
    next_pass = Prepared.next_pass

    def noted(self: Prepared, store: Any) -> Any:
        entry = (str(self.header.role), self.header.index, self.header.seed)
        if entry not in found:
            found.append(entry)
        return next_pass(self, store)

    monkeypatch.setattr(Prepared, "next_pass", noted)
    return found


def ask(client: Client, count: int = 1, prompt: list[int] = PROMPT, **more: Any) -> tuple[list[int], bool]:
    """New tokens, and whether they came of a prepared query."""
    tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=count, ignore_eos=True, **more)]
    assert client.result is not None and t.is_greedy(prompt, tokens)
    return tokens, client.result["prepared"]


def indices(used: Used, role: str = "client") -> list[int]:
    return [index for each, index, _ in used if each == role]


def lines(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and words in r.getMessage()]
    assert all("\n" not in line and line.isprintable() and len(line) < 700 for line in found)
    caplog.clear()
    return found


def files(parties: Trio, role: str) -> list[Path]:
    return sorted((parties.cache / "prepared").glob(f"{role}-*/*.bin"))


# ---- the same reply, and the online part only


def test_a_prepared_query_gives_the_same_and_costs_nothing_offline(parties: Trio, used: Used) -> None:
    client = parties.client()
    live = ask(client, 4)
    before = client.result or {}
    made = client.prepare(3, max_new_tokens=4, count=2)
    assert [entry["index"] for entry in made["prepared"]] == [1, 2] and client.result is before
    offline, online = made["traffic"]["offline"]["payload"], made["traffic"]["online"]["payload"]
    assert offline == 2 * before["traffic"]["offline"]["payload"] and online == 0
    assert [path.stat().st_size for path in files(parties, "client")] == [entry["bytes"] for entry in made["prepared"]]
    assert all(path.stat().st_mode & 0o777 == 0o600 for role in ("client", "server") for path in files(parties, role))
    assert ask(client, 4) == (live[0], True)
    after = client.result or {}
    assert after["traffic"]["offline"]["payload"] == 0 and after["traffic"]["offline"]["rounds"] == 0
    assert after["traffic"]["online"]["payload"] == before["traffic"]["online"]["payload"]
    assert ask(client, 2) == (live[0][:2], True)  # for fewer tokens too
    assert ask(client, 4) == (live[0], False) and not files(parties, "client") and not files(parties, "server")
    assert indices(used) == indices(used, "server") == [1, 2] and len({seed for *_, seed in used}) == 4


def test_what_fits_is_used_and_nothing_else(parties: Trio, used: Used) -> None:
    client = parties.client()
    client.prepare([3, 31], max_new_tokens=2)
    client.prepare(3, max_new_tokens=1, logits=True)
    assert ask(client, 3) == (ask(client, 3)[0], False)  # too many tokens
    assert not ask(client, 1, [1, 2])[1] and not ask(client, 1, [1, 2, 3, 4])[1] and used == []
    assert ask(client, 1, logits=True)[1] and not ask(client, 1, logits=True)[1]
    assert len(client.logits[0].reshape(-1)) == t.VOCAB
    client.prepare(3, max_new_tokens=1, logits=True)
    torch.testing.assert_close(client.run(torch.tensor([PROMPT]))[0], t.float_logits(PROMPT), atol=LOGIT_ERROR, rtol=0)
    assert client.result is not None and client.result["prepared"]
    assert ask(client, 9, list(range(1, 32)))[1]  # which the context cuts to two new tokens, then as now
    client.prepare(32, max_new_tokens=5)
    assert ask(client, 9, list(range(1, 33)))[1]
    assert len(files(parties, "client")) == 1  # the greedy one for three tokens is left
    assert not ask(parties.client(keys=t.second_client()), 2)[1] and ask(client, 2)[1]


def test_the_smallest_that_fits_is_used(parties: Trio, used: Used) -> None:
    client = parties.client()
    client.prepare(3, max_new_tokens=3)
    client.prepare(3, max_new_tokens=1)
    assert ask(client, 1)[1] and [path.parent.name.split("-")[2] for path in files(parties, "client")] == ["3+3"]


def test_what_cannot_be_prepared(parties: Trio) -> None:
    client = parties.client()
    for wrong, words in (
        ({"seq": 33}, "1 to 32 tokens"),
        ({"seq": []}, "nothing to prepare"),
        ({"seq": 3, "count": 0}, "nothing to prepare"),
    ):
        assert words in str(outcome(lambda wrong=wrong: client.prepare(**wrong)))  # type: ignore[misc]
    with trio(cache=parties.cache, allow_logits=False) as strict:
        assert "does not give logits" in str(outcome(lambda: strict.client().prepare(3, logits=True)))
    assert not files(parties, "client") and not files(parties, "server")


# ---- nothing twice


@pytest.mark.parametrize("roles", [("client",), ("server",), ("client", "server")], ids="+".join)
def test_a_backup_that_is_copied_back(
    parties: Trio, used: Used, caplog: pytest.LogCaptureFixture, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    """Files and marks of one party or two as they were before two queries: both are refused, and the third is used."""
    client = parties.client()
    client.prepare(3, max_new_tokens=1, count=3)
    shutil.copytree(parties.cache, tmp_path / "backup")
    assert ask(client)[1] and ask(client)[1]
    for role in roles:
        for kind in ("prepared", "spent"):
            for old in (parties.cache / kind).glob(f"{role}-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            for kept in (tmp_path / "backup" / kind).glob(f"{role}-*"):
                copy = shutil.copytree if kept.is_dir() else shutil.copy2
                copy(kept, parties.cache / kind / kept.name)
        assert len(files(parties, role)) == 3
    caplog.clear()
    assert ask(client)[1] and indices(used) == indices(used, "server") == [1, 2, 3]
    refused = lines(caplog, "2 prepared queries of")
    assert sorted(line.split(" of ")[1].split("-")[0] for line in refused) == sorted(roles) and all("index 2" in line for line in refused)
    assert not ask(client)[1]
    client.prepare(3, max_new_tokens=1)
    assert ask(client)[1] and indices(used) == [1, 2, 3, 4] and len({seed for *_, seed in used}) == 8


def test_several_at_once_share_a_store(parties: Trio, used: Used) -> None:
    """None is used twice, and none is lost."""
    parties.client().prepare(3, max_new_tokens=1, count=4)
    with ThreadPoolExecutor(4) as pool:
        assert all(prepared for _, prepared in pool.map(lambda _: ask(parties.client()), range(4)))
    assert sorted(indices(used)) == sorted(indices(used, "server")) == [1, 2, 3, 4]
    with ThreadPoolExecutor(2) as pool:  # and so do those who prepare
        made = list(pool.map(lambda _: parties.client().prepare(3, max_new_tokens=1)["prepared"][0]["index"], range(2)))
    assert sorted(made) == [5, 6] and len(files(parties, "server")) == 2


def test_removing_a_store_does_not_forget_what_was_spent(parties: Trio, used: Used, capsys: pytest.CaptureFixture[str]) -> None:
    client = parties.client()
    client.prepare(3, max_new_tokens=1, count=2)
    assert ask(client)[1]
    cli.ls(cache=parties.cache)
    listed = capsys.readouterr().out
    assert (
        "(client: 3 prompt tokens, 1 new; 1 prepared, 1 spent)" in listed
        and "(dealer: 3 prompt tokens, 1 new; 0 prepared, 1 spent)" in listed
    )
    (lane,) = {path.parent.name for path in files(parties, "client")}
    cli.rm(names=[f"prepared/{lane}"], cache=parties.cache)
    assert not files(parties, "client") and not ask(client)[1]
    client.prepare(3, max_new_tokens=1)
    assert ask(client)[1] and indices(used) == [1, 3]
    cli.rm(everything=True, cache=parties.cache)
    assert {entry["spent"] for entry in marks.overview(parties.cache)} == {3} and not list((parties.cache / "prepared").glob("*"))
    assert client.prepare(3, max_new_tokens=1)["prepared"][0]["index"] == 4 and ask(client)[1]


# ---- bad files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_release(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.1.0", b"0.0.9", 1))


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("damage", [cut, flipped, emptied, of_another_release])
def test_damaged_files(parties: Trio, used: Used, caplog: pytest.LogCaptureFixture, role: str, damage: Any) -> None:
    client = parties.client()
    client.prepare(3, max_new_tokens=1, count=2)
    damage(files(parties, role)[0])
    assert ask(client)[1] and indices(used) == indices(used, "server") == [2]
    (line,) = lines(caplog, "was removed: it is")
    assert f"prepared/{role}-" in line
    assert not files(parties, role) and not ask(client)[1]


@pytest.mark.parametrize("other", ["model", "client", "place"])
def test_files_that_belong_elsewhere(parties: Trio, used: Used, caplog: pytest.LogCaptureFixture, other: str) -> None:
    """One of another model, of another client, or of another index, in place of the first."""
    client = parties.client()
    if other == "model":
        with trio(t.lowered(seed=1), cache=parties.cache) as another:
            another.client().prepare(3, max_new_tokens=1)
    elif other == "client":
        parties.client(keys=t.second_client()).prepare(3, max_new_tokens=1)
    strangers = {role: files(parties, role) for role in ("client", "server")}
    client.prepare(3, max_new_tokens=1, count=2)
    for role, (*stranger,) in strangers.items():
        first, second = (path for path in files(parties, role) if path not in stranger)
        shutil.copy2(stranger[0] if stranger else second, first)
    caplog.clear()
    assert ask(client)[1] and indices(used) == indices(used, "server") == [2]
    assert len(lines(caplog, "it is of another model, client, server or place")) == 2


@pytest.mark.parametrize("role", ["client", "server", "dealer"])
@pytest.mark.parametrize("content", [b"", b'{"spent": 0}', b"\xff" * 50])
def test_marks_that_cannot_be_read(parties: Trio, used: Used, caplog: pytest.LogCaptureFixture, role: str, content: bytes) -> None:
    """Nothing of the lane is used then: what was spent is not known."""
    client = parties.client()
    client.prepare(3, max_new_tokens=1, count=2)
    assert ask(client)[1]
    (mark,) = (parties.cache / "spent").glob(f"{role}-*.json")
    mark.write_bytes(content)
    assert not ask(client)[1] and indices(used) == [1]
    assert len(lines(caplog, "cannot read what is spent from")) == 1


# ---- no room


def test_a_server_bounds_what_it_keeps(tmp_path: Path, used: Used) -> None:
    with trio(cache=tmp_path, keep_queries=2) as parties:
        client = parties.client()
        error = outcome(lambda: client.prepare(3, max_new_tokens=1, count=3))
        assert "keeps at most 2 prepared queries" in str(error) and len(files(parties, "client")) == 2
        assert ask(client)[1]
        client.prepare(3, max_new_tokens=1)
        for path in files(parties, "client"):
            path.unlink()
        client.prepare(3, max_new_tokens=1)  # what the client has lost makes room
        assert len(files(parties, "server")) == 1 and ask(client)[1] and indices(used) == indices(used, "server") == [1, 4]
        with trio(cache=tmp_path, keep_bytes=1000) as small:
            error = outcome(lambda: small.client().prepare(4, max_new_tokens=1))
            assert "1000 bytes" in str(error) and not list((tmp_path / "prepared").glob("*-4+1-*/*"))


@pytest.mark.parametrize("role", ["client", "server", "dealer"])
def test_a_disk_that_is_full_when_a_query_is_to_be_spent(
    parties: Trio, used: Used, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    client = parties.client()
    client.prepare(3, max_new_tokens=1, count=2)

    def full(path: Path, *parts: bytes) -> None:
        if path.name.startswith(role):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_private(path, *parts)

    with monkeypatch.context() as patch:
        patch.setattr("privinf.session.pool.write_private", full)
        assert not ask(client)[1] and used == []
        (line,) = lines(caplog, "No space left on device")
        assert "prepared quer" in line
    assert ask(client)[1]
    assert indices(used) == indices(used, "server") == ([1] if role == "client" else [2])  # at most one is lost


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_disk_that_fills_while_a_query_is_prepared(parties: Trio, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    client, end = parties.client(), Writer.end_pass

    def full(self: Writer, *arguments: Any) -> None:
        if self.header.role == role:
            self._file.close()
            self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        end(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "end_pass", full)
        error = outcome(lambda: client.prepare(3, max_new_tokens=2))
        assert ("No space left on device" if role == "client" else "the server cannot keep a prepared query") in str(error)
        assert error.exit_code == 2 if role == "client" else error.exit_code in (3, 4)
    t.wait_for(lambda: not parties.server.peers)
    assert not list((parties.cache / "prepared").rglob("*.bin")) and not list((parties.cache / "prepared").rglob(".part-*"))
    client.prepare(3, max_new_tokens=2)
    assert ask(client, 2)[1]


# ---- messages that lie


def test_a_client_that_asks_for_what_it_may_not(parties: Trio) -> None:
    client = parties.client()
    client.prepare(3, max_new_tokens=2, count=2)
    terms, refusals = Terms(3, 2), []
    for messages in ([Pass(4)], [Pass(3), Pass(2)], [Pass(3), Pass(1), Pass(1)], [Pass(3), Spend(terms, 0, ())]):
        session = client.connect()
        session.spend(terms)
        if session.prepared is None:
            break
        session.connection.timeout = 10
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("privinf.server.session.ServerSession._walk", lambda self, runtime, *_: setattr(runtime, "offset", 1))
            for message in messages:
                session.connection.send_control(message)
            refusals.append(str(outcome(lambda session=session: session.connection.receive_control(Hello))))  # type: ignore[misc]
        client.close()
    assert len(refusals) == 2 and all("a pass that was not prepared" in line for line in refusals)
    for request, words in (
        (Spend(Terms(32, 2), 0, ()), "more than the model's 32 positions"),
        (Prepare(Terms(1 << 20, 1 << 20), 0, ()), "more than the model's 32 positions"),
    ):
        session = client.connect()
        session.connection.send_control(request)
        assert words in str(outcome(lambda session=session: session.connection.receive_control(Hello)))  # type: ignore[misc]
        client.close()


def test_a_server_that_chooses_what_is_spent(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    client = parties.client()
    client.prepare(3, max_new_tokens=1, count=2)
    assert ask(client)[1]
    monkeypatch.setattr("privinf.server.session.Preprocessing.spend", lambda prepared, _: prepared._connection.send_control(Chosen(1, 1)))
    error = outcome(lambda: ask(client))
    assert isinstance(error, ProtocolDesync) and "chose an index that is spent" in str(error)
    assert not isinstance(error, ConfigError | HandshakeError)
