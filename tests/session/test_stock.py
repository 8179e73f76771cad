"""Stocks of rows: queries of any length are served from them, what moves is what was predicted, and no row is used twice."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.sampling import Sampling
from privinf.client.stock import ClientStock
from privinf.lowering.explain import explain
from privinf.lowering.stocking import cost, maps
from privinf.session.messages import Draw, Drawn
from privinf.session.stock import TRIES, Header, StockLane
from protocols.errors import ConfigError, HandshakeError, PrivinfError, RefusedError
from tests.support import trio as t
from tests.support.duo import Duo, duo

PROMPT = [1, 2, 3]
ROWS = 70  # of which the first map of the tests' model gets cheaper
MORE = 130  # of which others do too


def ids_of(client: Client, prompt: list[int], count: int) -> list[int]:
    tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=count, ignore_eos=True)]
    assert len(tokens) == count and t.is_greedy(prompt, tokens)
    return tokens


def offline(client: Client) -> tuple[int, int]:
    assert client.result is not None
    found = client.result["traffic"]["offline"]
    return found["payload"], found["rounds"]


def predicted(seq: int, tokens: int, stock: int = 0) -> tuple[int, int]:
    total = explain(t.lowered(), seq, new_tokens=tokens, trust="two-party", stock=stock)["total"]
    return total["offline_bytes"], total["offline_rounds"]


def files(cache: Path) -> dict[str, list[Path]]:
    return {role: sorted((cache / role).glob("prepared/*-stock-*/*.bin")) for role in ("server", "client")}


def said(caplog: pytest.LogCaptureFixture, words: str = "") -> bool:
    """Whether one line alone was said, with these words, or none; it is forgotten."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return len(found) == bool(words) and all(words in line and line.isprintable() for line in found)


def client_of(pair: Duo, path: Path) -> Client:
    return pair.client(cache=path / "client")


def test_queries_are_served_from_a_stock_and_what_moves_is_what_was_predicted(tmp_path: Path) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        made = client.prepare([], stock=ROWS)
        found = explain(t.lowered(), 3, new_tokens=3, trust="two-party", stock=ROWS)["stock"]
        counted = made["traffic"]["offline"]
        assert (counted["payload"], counted["rounds"]) == (found["offline_bytes"], found["offline_rounds"])
        assert made["traffic"]["online"]["payload"] == 0 and made["prepared"] == []
        stocks = files(tmp_path)
        assert made["stock"] == {"rows": ROWS, "index": 1, "maps": found["maps"], "bytes": stocks["client"][0].stat().st_size}
        assert found["used"] == 5 and 0 < found["used_bytes"] < found["offline_bytes"]
        ids_of(client, PROMPT, 3)
        assert offline(client) == predicted(3, 3, ROWS) and offline(client)[0] < predicted(3, 3)[0]
        ids_of(client, list(range(1, 33)), 1)  # another length, across pages
        ids_of(client, list(range(1, 31)), 1)
        assert offline(client) == predicted(30, 1, ROWS)
        assert ROWS - 5 - 62 == 3 and all(files(tmp_path).values())
        ids_of(client, [1, 2, 3, 4], 1)  # too few are left
        assert offline(client) == predicted(4, 1)
        ids_of(client, PROMPT, 1)
        assert offline(client) == predicted(3, 1, ROWS) and files(tmp_path) == {"server": [], "client": []}
        ids_of(client, PROMPT, 1)
        assert offline(client) == predicted(3, 1)
        (taken,) = (tmp_path / "client").rglob("rows.taken")
        assert int(taken.read_bytes()) >= 5 + 32 + 30 + 4 + 3 + 3  # of the table, under this key of the server's


def test_prepared_queries_take_their_rows_from_a_stock_too(tmp_path: Path) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        made = client.prepare(3, max_new_tokens=2, stock=MORE)
        assert made["stock"]["maps"] > 1
        stock = cost(maps(t.lowered(), MORE), MORE)
        assert made["traffic"]["offline"]["payload"] == stock.bytes + predicted(3, 2, MORE)[0]
        ids_of(client, PROMPT, 2)
        assert offline(client) == (0, 0)
        ids_of(client, PROMPT, 1)
        assert offline(client) == predicted(3, 1, MORE)


# ---- no row twice


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The indices that each party has taken rows of."""
    found: dict[str, list[int]] = {"client": [], "server": []}
    take = StockLane.take

    def noted(lane: StockLane, path: Path, header: Header, index: int, count: int) -> Any:
        rows = take(lane, path, header, index, count)
        if rows is not None:
            found[header.role] += range(index, index + count)
        return rows

    monkeypatch.setattr(StockLane, "take", noted)
    return found


def once(taken: dict[str, list[int]]) -> bool:
    return all(len(set(indices)) == len(indices) for indices in taken.values())


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_party_that_is_put_back_uses_no_row_again(tmp_path: Path, role: str, taken: dict[str, list[int]]) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        client.prepare([], stock=ROWS)
        for kind in ("prepared", "spent"):
            shutil.copytree(tmp_path / role / kind, tmp_path / "backup" / kind)
        ids_of(client, PROMPT, 1)
        for kind in ("prepared", "spent"):
            shutil.rmtree(tmp_path / role / kind)
            shutil.copytree(tmp_path / "backup" / kind, tmp_path / role / kind)
        if role == "server":
            ids_of(client, PROMPT, 2)
            assert offline(client) == predicted(3, 2, ROWS) and once(taken) and len(taken["server"]) == 7
        else:
            ids_of(client, PROMPT, 2)
            assert offline(client) == predicted(3, 2, ROWS) and len(set(taken["server"])) == 7 and taken["client"][3:6] == [1, 2, 3]
            assert taken["client"][6:] == taken["server"][3:] == [4, 5, 6, 7], "what S knows to be spent it refuses"


def test_sessions_at_a_time_take_different_rows(tmp_path: Path, taken: dict[str, list[int]]) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        client.prepare([], stock=ROWS)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda count: [*client.generate(ids=PROMPT, max_new_tokens=count)], [3, 2, 1]))
        assert once(taken) and sorted(taken["client"]) == sorted(taken["server"]) == list(range(1, 13))


def test_a_second_stock_follows_the_first(tmp_path: Path, taken: dict[str, list[int]]) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        assert [client.prepare([], stock=ROWS)["stock"]["index"] for _ in range(2)] == [1, ROWS + 1]
        for length in (32, 31, 8):  # the third finds too few left in the first
            ids_of(client, list(range(1, length + 1)), 1)
            assert offline(client) == predicted(length, 1, ROWS)
        assert taken["client"][-8:] == taken["server"][-8:] == list(range(ROWS + 1, ROWS + 9)) and once(taken)
        assert all(len(each) == 1 for each in files(tmp_path).values())


# ---- what is no stock of these two


def test_what_is_no_stock_of_these_two_is_removed_and_one_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        client.prepare([], stock=ROWS)
        (path,) = files(tmp_path)["client"]
        data = bytearray(path.read_bytes())
        data[-40] ^= 1  # in its last page
        path.write_bytes(data)
        for _ in range(2):
            ids_of(client, list(range(1, 33)), 1)
            assert offline(client) == predicted(32, 1, ROWS) and said(caplog)
        ids_of(client, PROMPT, 1)
        assert offline(client) == predicted(3, 1) and not files(tmp_path)["client"]
        assert said(caplog, "a page of it is damaged")
        (other,) = files(tmp_path)["server"]
        path.write_bytes(other.read_bytes())
        ids_of(client, PROMPT, 1)
        assert said(caplog, "another model, client, server or place") and not path.exists()


def test_a_stock_of_another_model_is_none_of_this(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client_of(pair, tmp_path).prepare([], stock=ROWS)
    found = files(tmp_path)
    with duo(t.lowered(1), cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        [*client.generate(ids=PROMPT, max_new_tokens=1)]
        assert all(path.exists() for paths in found.values() for path in paths) and said(caplog)
        client.prepare([], stock=ROWS)
        for role, paths in files(tmp_path).items():
            (new,) = set(paths) - set(found[role])
            new.write_bytes(found[role][0].read_bytes())
        [*client.generate(ids=PROMPT, max_new_tokens=1)]
        assert said(caplog, "another model, client, server or place")
        assert files(tmp_path)["client"] == found["client"]


def test_a_stock_that_the_server_has_lost_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        client.prepare([], stock=ROWS)
        files(tmp_path)["server"][0].unlink()
        ids_of(client, PROMPT, 2)
        assert offline(client) == predicted(3, 2) and not files(tmp_path)["client"]
        assert said(caplog, "the server has lost its part")


def test_a_client_that_asks_for_rows_again_and_again_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ask after another for rows that are spent; the server answers so many, and serves the next one."""
    monkeypatch.setattr(ClientStock, "_draw", lambda stock, shelf, kinds: asks(stock, TRIES + 1))

    def asks(stock: ClientStock, count: int) -> dict[Any, Any]:
        for _ in range(count):
            stock._connection.send_control(Draw(1, 1, bytes(16)))
            assert not stock._connection.receive_control(Drawn).ok
        return {}

    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        client.prepare([], stock=ROWS)
        with pytest.raises(PrivinfError, match=f"more than {TRIES} times in a pass"):
            ids_of(client, PROMPT, 1)
        monkeypatch.setattr(ClientStock, "_draw", lambda stock, shelf, kinds: asks(stock, TRIES))
        ids_of(client, PROMPT, 1)


def test_what_a_server_keeps_and_moves_is_bounded(tmp_path: Path) -> None:
    size = cost(maps(t.lowered(), ROWS), ROWS).bytes
    for options, kind, words in (
        ({"keep_bytes": 1000}, RefusedError, "keeps at most 1000 bytes"),
        ({"session_bytes": size - 1}, RefusedError, f"at most {size - 1} bytes"),
    ):
        with duo(cache=tmp_path / "server", **options) as pair, pytest.raises(kind, match=words):
            client_of(pair, tmp_path).prepare([], stock=ROWS)
    assert files(tmp_path) == {"server": [], "client": []}
    with t.trio(cache=tmp_path) as parties, pytest.raises(HandshakeError, match="has a dealer, and makes no stock of rows"):
        parties.client().prepare([], stock=ROWS)
    with pytest.raises(ConfigError, match="for two parties alone"):
        explain(t.lowered(), 3, stock=ROWS)
    with pytest.raises(ConfigError, match="take more bytes together than by themselves"):
        explain(t.lowered(), 3, stock=1, trust="two-party")


def test_a_pass_that_was_foreseen_and_not_computed_has_spent_its_rows(tmp_path: Path, taken: dict[str, list[int]]) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = client_of(pair, tmp_path)
        client.prepare([], stock=ROWS)
        with Conversation(client) as conversation:
            first = [token.id for token in conversation.generate(PROMPT, max_new_tokens=4, ignore_eos=True)][:1]
        with Conversation(client) as conversation:
            stop = Sampling(stop_ids=(first[0],))
            assert [token.id for token in conversation.generate(PROMPT, max_new_tokens=4, sampling=stop)] == first
            second = [token.id for token in conversation.generate([7, 8], max_new_tokens=2, ignore_eos=True)]
            assert t.is_greedy([*PROMPT, *first, 7, 8], second)
        assert taken["client"] == taken["server"] == list(range(1, 15)), "six for four tokens, and 3 + 1 + 3 + 1"
