"""An encrypted embedding beside a dealer's correlations: tokens, prediction, the kept table, and what the dealer is asked for no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import privinf
from privinf.cli.gateway import Peers
from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.taken import AHEAD, Taken
from privinf.lowering import lower
from privinf.lowering.encrypted import Sealing
from privinf.lowering.explain import explain
from privinf.server.dealer_source import DealerSource
from privinf.server.server import Server
from privinf.session.messages import Key, Needs, Welcome, greet
from privinf.session.options import Options
from privinf.trust import ENCRYPTED, ONE_HOT, TWO_PARTY
from protocols.correlations import Kind
from protocols.errors import ConfigError, HandshakeError, RefusedError
from protocols.linear import LinearMask
from tests.support import trio as t
from tests.support.lowering_modules import TiedWords
from tests.support.peers import dialled
from tests.support.trio import Trio, trio

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with trio(cache=tmp_path_factory.mktemp("embedding"), embedding=ENCRYPTED) as made:
        yield made


def ids_of(client: Client, prompt: list[int], count: int) -> list[int]:
    return [token.id for token in client.generate(ids=prompt, max_new_tokens=count, ignore_eos=True)]


def payloads(result: dict[str, Any] | None) -> dict[str, int]:
    """What was counted, in the names of the prediction."""
    assert result is not None
    setup, offline, online = (result["traffic"][phase] for phase in ("setup", "offline", "online"))
    dealer = offline["dealer"]["payload"]
    return {
        "setup_bytes": setup["payload"],
        "dealer_bytes": dealer,
        "peer_offline_bytes": offline["payload"] - dealer,
        "online_bytes": online["payload"],
        "rounds": online["rounds"],
    }


def predicted(embedding: str, **size: int) -> dict[str, int]:
    total = explain(t.lowered(), len(PROMPT), embedding=embedding, **size)["total"]
    return {name: total[name] for name in ("setup_bytes", "dealer_bytes", "peer_offline_bytes", "online_bytes", "rounds")}


def table_bytes() -> int:
    return sum(Sealing.tables(t.lowered()).sizes.values())


# ---- queries


def test_processes_find_the_same_tokens_and_move_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVINF_KERNELS", "0")  # each would compile them for this cache
    with privinf.local_session(t.lowered(), cache=tmp_path, embedding=ENCRYPTED) as session:
        for kept in (False, True):
            tokens = [token.id for token in session.generate(ids=PROMPT, max_new_tokens=3, ignore_eos=True)]
            assert len(tokens) == 3 and t.is_greedy(PROMPT, tokens)
            expected = predicted(ENCRYPTED, new_tokens=3)
            assert session.costs["total"]["online_bytes"] == expected["online_bytes"]
            assert payloads(session.result) == {**expected, **({"setup_bytes": 0} if kept else {})}
            assert session.result is not None and session.result["trust"] == "dealer"


def test_the_table_is_the_difference() -> None:
    """To the dealer's way: encrypted and not masked at the set-up, fewer bytes from the dealer, as many rounds."""
    one, other = predicted(ONE_HOT), predicted(ENCRYPTED)
    (part,) = Sealing.tables(t.lowered()).parts.values()
    masked = t.lowered().setup.items[part.form.name].size
    assert other["setup_bytes"] - one["setup_bytes"] == table_bytes() - masked > 0
    assert other["dealer_bytes"] < one["dealer_bytes"] and other["rounds"] == one["rounds"]
    assert predicted(ONE_HOT) == {name: explain(t.lowered(), len(PROMPT))["total"][name] for name in one}


@pytest.mark.parametrize("embedding", [ONE_HOT, ENCRYPTED])
def test_the_dealer_makes_no_mask_of_the_embedding(embedding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Kind] = []
    ask = DealerSource.ask

    def noted(self: DealerSource, kinds: list[Kind]) -> None:
        asked.extend(kinds)
        ask(self, kinds)

    monkeypatch.setattr(DealerSource, "ask", noted)
    (part,) = Sealing.tables(t.lowered()).parts.values()
    with trio(cache=tmp_path, embedding=embedding) as made:
        assert t.is_greedy(PROMPT, ids_of(made.client(chunk=2), PROMPT, 2))
    linear = [kind for kind in asked if isinstance(kind, LinearMask)]
    of_rows = [kind for kind in linear if kind.weight == part.form.name and not kind.transposed]
    assert linear and bool(of_rows) == (embedding == ONE_HOT)


def test_a_further_turn_and_a_prompt_in_pieces(parties: Trio) -> None:
    with Conversation(parties.client(chunk=2)) as conversation:
        first = [token.id for token in conversation.generate(PROMPT, max_new_tokens=2, ignore_eos=True)]
        second = [token.id for token in conversation.generate([7, 8], max_new_tokens=2, ignore_eos=True)]
    assert t.is_greedy(PROMPT, first) and t.is_greedy([*PROMPT, *first, 7, 8], second)


# ---- queries prepared ahead of time


def test_what_was_prepared_is_used_with_the_embedding_it_was_prepared_for(tmp_path: Path) -> None:
    with trio(cache=tmp_path, embedding=ENCRYPTED) as made:
        client = made.client()
        client.prepare([3, 3], max_new_tokens=2)
        assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 2)) and client.result is not None and client.result["prepared"]
        assert payloads(client.result)["online_bytes"] == predicted(ENCRYPTED, new_tokens=2)["online_bytes"]
    with trio(cache=tmp_path) as made:
        client = made.client()
        assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 2)) and client.result is not None and not client.result["prepared"]
    with trio(cache=tmp_path, embedding=ENCRYPTED) as made:
        client = made.client()
        assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 2)) and client.result is not None and client.result["prepared"]


def test_what_is_spent_with_one_embedding_is_not_with_the_other(tmp_path: Path) -> None:
    for embedding, made, used in ((ENCRYPTED, 1, False), (ONE_HOT, 3, True), (ONE_HOT, 0, True), (ENCRYPTED, 0, True)):
        with trio(cache=tmp_path, embedding=embedding) as parties:
            client = parties.client()
            if made:
                client.prepare([3] * made, max_new_tokens=1)
            if used:
                assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 1)) and client.result is not None and client.result["prepared"]


# ---- the kept table


def test_a_table_that_nothing_is_multiplied_by_is_not_sent_masked_too(tmp_path: Path) -> None:
    (part,) = Sealing.tables(t.lowered()).parts.values()
    item, tied = t.lowered().setup.items[part.form.name], lower(TiedWords(), torch.randint(20, (1, 5)))
    assert Sealing.needless(t.lowered()) == {part.form.name} and not Sealing.needless(tied)
    for embedding in (ONE_HOT, ENCRYPTED):
        with trio(cache=tmp_path / embedding, embedding=embedding) as parties:
            client = parties.client()
            assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 2))
            assert payloads(client.result) == predicted(embedding, new_tokens=2)
    assert not list((tmp_path / ENCRYPTED).rglob(f"{item.sha256}.bin")) and list((tmp_path / ONE_HOT).rglob(f"{item.sha256}.bin"))


def test_a_damaged_table_is_fetched_anew_and_nothing_else(parties: Trio) -> None:
    client = parties.client(fresh=True)
    ids_of(client, PROMPT, 1)
    (path,) = client.options.cache.glob("setup/*/*/*.bin")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 1)) and payloads(client.result)["setup_bytes"] == table_bytes()
    ids_of(client, PROMPT, 1)
    assert payloads(client.result)["setup_bytes"] == 0


def test_a_server_with_one_hots_keeps_no_table(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as made:
        ids_of(made.client(), PROMPT, 1)
    assert not list(tmp_path.glob("sealed/*")) and not list(tmp_path.glob("setup/*/*/*.bin"))


# ---- the handshake


@pytest.mark.parametrize(("twice", "words"), [(False, "does not have"), (True, "twice")])
def test_only_the_table_is_sent_encrypted_and_once(twice: bool, words: str, parties: Trio) -> None:
    (part,) = Sealing.tables(t.lowered()).parts
    weight = next(iter(t.lowered().setup.items))
    with dialled(parties.server.address, "client", "server") as link:
        greet(link)
        assert link.receive_control(Welcome).embedding == ENCRYPTED
        for _ in ("bundle", "masked weights"):
            link.send_control(Needs(()))
        assert len(link.receive_control(Key).digests) == 1
        link.send_control(Needs((part, part) if twice else (weight,)))
        with pytest.raises(HandshakeError, match=words):
            link.receive()


def test_a_client_takes_no_embedding_that_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trio(cache=tmp_path) as made:
        monkeypatch.setattr(Options, "embedded", "otherwise")
        with pytest.raises(HandshakeError, match="the embedding 'otherwise', which is none of this release"):
            ids_of(made.client(), PROMPT, 1)


def test_options_that_contradict_each_other_are_named() -> None:
    with pytest.raises(ConfigError, match="no embedding 'hashed'"):
        Options(embedding="hashed")
    with pytest.raises(ConfigError, match="two parties alone have an encrypted embedding"):
        Server("nowhere", listen="127.0.0.1:0", keys="nowhere", trust=TWO_PARTY, embedding=ONE_HOT)
    with pytest.raises(ConfigError, match="two parties alone have an encrypted embedding"):
        explain(t.lowered(), 1, trust=TWO_PARTY, embedding=ONE_HOT)
    with pytest.raises(ConfigError, match="--embedding is for the server to choose"):
        Peers("127.0.0.1:1", "127.0.0.1:1", Path("keys"), embedding=ENCRYPTED).check()
    alone = explain(t.lowered(), 1, trust=TWO_PARTY)["total"]
    assert explain(t.lowered(), 1, trust=TWO_PARTY, embedding=ENCRYPTED)["total"] == alone


# ---- how many rows may be taken


def test_a_client_takes_no_more_rows_under_one_key_than_what_hides_them_is_good_for(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.security.TAKEN", 40)
    client = parties.client(fresh=True)
    ids_of(client, PROMPT, 3)  # five rows, and some are counted ahead
    (path,) = client.peers.options.cache.rglob("rows.taken")
    assert path.read_bytes() == b"32"
    with pytest.raises(RefusedError, match="has taken 32 rows of the model's table under one key, and with 9 more"):
        ids_of(client, list(range(9)), 1)
    assert path.read_bytes() == b"32"
    ids_of(client, list(range(8)), 1)
    with pytest.raises(RefusedError, match="lower the model anew"):
        ids_of(client, PROMPT, 1)
    ids_of(parties.client(fresh=True), PROMPT, 1)


def test_sessions_of_a_cache_count_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.taken"
    one, other = Taken(path, 5.0), Taken(path, 5.0)
    for _ in range(20):
        one.spend(3)
        other.spend(1)
    assert int(path.read_bytes()) == 64 + AHEAD
    path.write_text("many")
    with pytest.raises(ConfigError, match="damaged"):
        one.spend(1000)
