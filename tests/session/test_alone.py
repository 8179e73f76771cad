"""Sessions of server and client alone: tokens, prediction, the kept set-up, who makes the correlations, and either killed in each phase."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.doctor.deployment import Deployment
from privinf.lowering.encrypted import SealedPart, Sealing
from privinf.lowering.explain import explain
from privinf.server.server import Server
from privinf.session.messages import Key, Needs, Welcome, greet
from privinf.session.sealed import SealedStore
from privinf.transport.frames import FrameKind
from protocols.errors import ConfigError, HandshakeError, PrivinfError, RefusedError
from tests.support import trio as t
from tests.support.duo import Duo, Served, duo, served
from tests.support.failures import failed, new_lines
from tests.support.faults import Fault
from tests.support.peers import dialled
from tests.support.plain_ends import plain_ends

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duo]:
    with duo(cache=tmp_path_factory.mktemp("alone")) as made:
        yield made


def ids_of(client: Client, prompt: list[int], count: int, **options: Any) -> list[int]:
    return [token.id for token in client.generate(ids=prompt, max_new_tokens=count, ignore_eos=True, **options)]


def payloads(client: Client) -> tuple[int, ...]:
    """Set-up, offline and online bytes as they were counted, offline rounds, online rounds."""
    assert client.result is not None
    traffic = client.result["traffic"]
    phases = [traffic[phase] for phase in ("setup", "offline", "online")]
    return (*(phase["payload"] for phase in phases), traffic["offline"]["rounds"], traffic["online"]["rounds"])


def explain_total(tokens: int) -> int:
    """What moves for so many tokens, set-up aside, bytes."""
    with plain_ends():
        total = explain(t.lowered(), len(PROMPT), new_tokens=tokens, trust="two-party")["total"]
    return int(total["offline_bytes"] + total["online_bytes"])


# ---- queries


@pytest.mark.parametrize("chunk", [0, 2])
def test_tokens_are_the_float_models_and_what_moves_is_what_was_predicted(pair: Duo, chunk: int) -> None:
    client = pair.client(fresh=True, chunk=chunk)
    for kept in (False, True):
        tokens = ids_of(client, PROMPT, 3)
        assert len(tokens) == 3 and t.is_greedy(PROMPT, tokens)
        total = explain(t.lowered(), len(PROMPT), new_tokens=3, chunk=chunk, trust="two-party")["total"]
        begun = total["setup_bytes"] - sum(part.size for part in Sealing.of(t.lowered()).parts.values())
        expected = (begun if kept else total["setup_bytes"], total["offline_bytes"], total["online_bytes"])
        assert payloads(client) == (*expected, total["offline_rounds"], total["rounds"])
        assert total["dealer_bytes"] == 0 and total["offline_bytes"] == total["peer_offline_bytes"] > 0
    assert client.result is not None and client.result["trust"] == "two-party"
    assert client.result["trust_model"] == "semi-honest server and client, and no third party"


def test_a_further_turn_goes_on_from_what_is_cached(pair: Duo) -> None:
    with Conversation(pair.client()) as conversation:
        first = [token.id for token in conversation.generate(PROMPT, max_new_tokens=2, ignore_eos=True)]
        second = [token.id for token in conversation.generate([7, 8], max_new_tokens=2, ignore_eos=True)]
    assert t.is_greedy(PROMPT, first) and t.is_greedy([*PROMPT, *first, 7, 8], second)


def test_logits_and_a_private_pass(pair: Duo) -> None:
    found = pair.client().run(torch.tensor([PROMPT]))
    assert int(found.argmax()) == int(t.float_logits(PROMPT).argmax())


def test_what_was_prepared_leaves_the_online_part_alone(tmp_path: Path) -> None:
    with duo(cache=tmp_path / "server") as pair:
        client = pair.client(cache=tmp_path / "client")
        made = client.prepare([3, 3], max_new_tokens=3)
        assert [each["index"] for each in made["prepared"]] == [1, 2] and made["traffic"]["offline"]["payload"] > 0
        for left in (1, 0):
            tokens = ids_of(client, PROMPT, 3)
            assert t.is_greedy(PROMPT, tokens) and payloads(client)[:2] == (0, 0) and client.result is not None
            total = explain(t.lowered(), len(PROMPT), new_tokens=3, trust="two-party")["total"]
            assert client.result["prepared"] and payloads(client)[2] == total["online_bytes"]
            assert [len(list((tmp_path / role).rglob("prepared/*/*.bin"))) for role in ("server", "client")] == [left, left]
        assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 2)) and client.result is not None and not client.result["prepared"]


def test_a_prepared_query_is_used_once_whatever_comes_back(tmp_path: Path) -> None:
    """Files from a backup, at both: the marks say that they are spent."""
    with duo(cache=tmp_path / "server") as pair:
        client = pair.client(cache=tmp_path / "client")
        client.prepare(3, max_new_tokens=1)
        files = {path: path.read_bytes() for path in tmp_path.rglob("prepared/*/*.bin")}
        ids_of(client, PROMPT, 1)
        for path, data in files.items():
            path.write_bytes(data)
        assert len(files) == 2 and t.is_greedy(PROMPT, ids_of(client, PROMPT, 1))
        assert client.result is not None and not client.result["prepared"]


def test_a_query_prepared_with_a_dealer_is_none_of_two_alone(tmp_path: Path) -> None:
    with t.trio(cache=tmp_path) as parties:
        parties.client().prepare(3, max_new_tokens=1)
    with duo(cache=tmp_path) as pair:
        client = pair.client()
        assert t.is_greedy(PROMPT, ids_of(client, PROMPT, 1)) and client.result is not None and not client.result["prepared"]


def test_bytes_of_a_session_are_bounded(tmp_path: Path) -> None:
    total = explain_total(1)
    with duo(cache=tmp_path, session_bytes=total) as pair:
        assert len(ids_of(pair.client(), PROMPT, 1)) == 1
        with pytest.raises(RefusedError, match=f"at most {total} bytes"):
            ids_of(pair.client(), PROMPT, 2)


# ---- the kept set-up


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "setup").rglob("*.bin"))


def set_up_bytes(client: Client) -> int:
    ids_of(client, PROMPT, 1)
    return payloads(client)[0]


def test_a_damaged_part_is_fetched_anew_and_nothing_else(pair: Duo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = set_up_bytes(pair.client(cache=tmp_path))
    assert set_up_bytes(pair.client(cache=tmp_path)) < whole
    path = kept(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    again = set_up_bytes(pair.client(cache=tmp_path))
    assert 0 < again <= len(data) < whole and "made anew" in caplog.text
    assert path.read_bytes() != bytes(data)


def test_what_another_server_sent_under_the_same_name_is_fetched_anew(pair: Duo, tmp_path: Path) -> None:
    """It is whole, and of the right size; but it is not what this server sends."""
    set_up_bytes(pair.client(cache=tmp_path))
    lowered, sealing = pair.server.lowered, Sealing.of(pair.server.lowered)
    assert lowered.mask_seed is not None
    store = SealedStore(tmp_path, "setup", lowered.id, sealing.key_id(lowered.mask_seed))
    name, part = next(iter(sealing.parts.items()))

    def held() -> bytes:
        found = store.read(name, part.size)
        assert found is not None
        return bytes(found.read(0, part.size))

    before = held()
    with store.writing(name) as write:
        write(memoryview(bytes(part.size)))
    assert held() == bytes(part.size)
    assert set_up_bytes(pair.client(cache=tmp_path)) == part.size and held() == before


def test_a_server_that_sends_something_else_than_it_said(pair: Duo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SealedPart, "cut", lambda part, stored: map(bytes, part.pieces))
    with pytest.raises(HandshakeError, match=r"is not what it said it would send.*nothing of it was kept"):
        set_up_bytes(pair.client(cache=tmp_path))
    assert not kept(tmp_path)


def test_a_part_in_the_place_of_another_is_fetched_anew(pair: Duo, tmp_path: Path) -> None:
    set_up_bytes(pair.client(cache=tmp_path))
    small, large = sorted(kept(tmp_path), key=lambda path: path.stat().st_size)[-2:]
    small.write_bytes(large.read_bytes()[: small.stat().st_size])  # of the right size
    assert t.is_greedy(PROMPT, ids_of(client := pair.client(cache=tmp_path), PROMPT, 2)) and payloads(client)[0] > 0


def test_the_server_makes_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    own = Sealing.seal
    monkeypatch.setattr(Sealing, "seal", lambda sealing, seed, name, encoded: made.append(name) or own(sealing, seed, name, encoded))
    with duo(cache=tmp_path / "server") as pair:
        for number in range(2):
            assert set_up_bytes(pair.client(cache=tmp_path / str(number))) > 0
        assert sorted(made) == sorted(Sealing.of(t.lowered()).parts)
        assert [path.read_bytes() for path in kept(tmp_path / "0")] == [path.read_bytes() for path in kept(tmp_path / "1")]
        path = sorted((tmp_path / "server" / "sealed").rglob("*.bin"))[0]
        path.write_bytes(path.read_bytes()[:-1])
        assert set_up_bytes(pair.client(cache=tmp_path / "2")) > 0 and len(made) == len(set(made)) + 1


def test_sessions_at_a_time_share_what_was_read(pair: Duo, tmp_path: Path) -> None:
    client = pair.client(cache=tmp_path)
    with Conversation(client) as first, Conversation(client) as second:
        one, other = first.session.lines.masked, second.session.lines.masked
        assert one and all(one[name][form] is other[name][form] for name in one for form in one[name])
        first.close()
        assert t.is_greedy(PROMPT, [token.id for token in second.generate(PROMPT, max_new_tokens=1, ignore_eos=True)])
    gc.collect()
    assert not client.peers.encrypted


def test_what_another_key_encrypted_is_of_no_use(pair: Duo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that came back with another key, or another one with the same model: the client begins anew, and keeps the new alone."""
    whole = set_up_bytes(pair.client(cache=tmp_path))
    before, own = kept(tmp_path), Sealing.key_id
    monkeypatch.setattr(Sealing, "key_id", lambda sealing, seed: own(sealing, seed)[::-1])
    assert set_up_bytes(pair.client(cache=tmp_path)) == whole
    after = kept(tmp_path)
    assert [path.name for path in after] == [path.name for path in before] and not set(before) & set(after)


def test_other_models_and_keys_have_keys_of_their_own() -> None:
    sealing = Sealing.of(t.lowered())
    found = {sealing.key_id(bytes([k]) * 32) for k in range(3)}
    assert len(found) == 3 and Sealing.of(t.lowered(1)).key_id(bytes(32)) != sealing.key_id(bytes(32))
    other = Sealing(t.lowered(), [])
    other._weights = "0" * 64  # of other weights under the same seed and id: what a dealer that has both lacks
    assert other.key_id(bytes(32)) != sealing.key_id(bytes(32))


# ---- who makes the correlations


def test_a_client_without_a_dealer_is_told_that_one_is_needed(tmp_path: Path) -> None:
    with (
        t.trio(cache=tmp_path) as parties,
        pytest.raises(HandshakeError, match=r"from a dealer, and none was given.*; give --dealer HOST:PORT"),
    ):
        ids_of(Client(parties.server.address, keys=str(t.keys())), PROMPT, 1)


def test_wrong_choices_are_noticed_before_anything_starts() -> None:
    keys = str(t.keys())
    with pytest.raises(ConfigError, match="no dealer was given"):
        Server(t.lowered(), listen="127.0.0.1:0", keys=keys)
    with pytest.raises(ConfigError, match="no dealer was given"):
        Client("127.0.0.1:1", keys=keys, trust="dealer")
    with pytest.raises(ConfigError, match="no trust model 'nobody'"):
        Client("127.0.0.1:1", keys=keys, trust="nobody")


def test_either_end_refuses_another_trust_model(tmp_path: Path) -> None:
    more = ("--max-new-tokens", 1, "--cache", tmp_path)
    with served() as alone:
        said = len(alone.server.lines)
        line = failed(alone.generate("--trust", "dealer", "--dealer", "127.0.0.1:1", *more), (3,))
        assert "has the trust model 'two-party', not the expected 'dealer'" in line
        assert "the trust model 'two-party', not the expected 'dealer'" in new_lines(alone.server, said)[0]
        well = alone.generate("--trust", "two-party", *more)
        assert well.wait() == 0 and well.err == ""
    with t.services() as services:
        said = len(services.server.lines)
        line = failed(services.generate("--trust", "two-party", *more), (3,))
        assert "has the trust model 'dealer', not the expected 'two-party'" in line
        assert "the trust model 'dealer', not the expected 'two-party'" in new_lines(services.server, said)[0]


def test_doctor_opens_a_session_without_a_dealer(pair: Duo, tmp_path: Path) -> None:
    found = {check.name: check for check in Deployment(t.keys(), 20.0, 5.0, None, tmp_path).checks(pair.server.address, None, None, None)}
    assert all(check.ok for check in found.values()), found
    assert found["session"].detail == "the server opened one for us, without a dealer"
    assert "semi-honest server and client, and no third party" in found[f"server at {pair.server.address}"].detail


# ---- a peer that does not keep to the order


def test_nonsense_in_the_making_of_a_pass_is_one_line(pair: Duo, caplog: pytest.LogCaptureFixture) -> None:
    """Messages of the right sizes, all ones: what the server makes of them is its client's loss, or refused."""
    client = pair.client()
    session = client.connect()
    own = session.connection._frames_of

    def ones(kind: FrameKind, body: Any) -> Any:
        return own(kind, b"\xff" * len(body) if kind is FrameKind.DATA and session.connection.meter.phase == "offline" else body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.connection, "_frames_of", ones)
        with contextlib.suppress(PrivinfError):
            ids_of(client, PROMPT, 1)
    assert "internal error" not in caplog.text
    assert t.is_greedy(PROMPT, ids_of(pair.client(), PROMPT, 1))


@pytest.mark.parametrize(("names", "words"), [(["x"], "does not have"), (["a", "a"], "twice")])
def test_a_client_that_asks_for_strange_weights(pair: Duo, names: list[str], words: str) -> None:
    with dialled(pair.server.address, "client", "server") as connection:
        greet(connection)
        connection.receive_control(Welcome)
        connection.send_control(Needs(()))
        connection.receive_control(Key)
        connection.send_control(Needs(tuple(names)))
        with pytest.raises(HandshakeError, match=words):
            connection.receive()


# ---- killed

POINTS = [("setup", 1), ("setup", 8), ("offline", 1), ("offline", 20), ("online", 4), ("online", 60)]


@pytest.fixture(scope="module")
def made() -> Iterator[Served]:
    with served() as process:
        yield process


@pytest.mark.parametrize(("phase", "number"), POINTS)
def test_the_client_is_killed(made: Served, tmp_path: Path, phase: str, number: int) -> None:
    said = len(made.server.lines)
    with made.faulty(Fault("client", f"server:{phase}", number)) as faulty:
        client = faulty.generate("--cache", tmp_path, "--max-new-tokens", 3)
        assert client.wait() == -signal.SIGKILL, client.err
    assert "client 127.0.0.1" in new_lines(made.server, said)[0]
    again = made.generate("--cache", tmp_path, "--max-new-tokens", 3, "--json")  # a set-up that was cut goes on
    assert again.wait() == 0, again.err


@pytest.mark.parametrize(("phase", "number"), POINTS[1::2])
def test_the_server_is_killed(made: Served, tmp_path: Path, phase: str, number: int) -> None:
    with served() as victim, victim.faulty(Fault("server", f"client:{phase}", number)) as faulty:
        client = faulty.generate("--cache", tmp_path, "--max-new-tokens", 3)
        line = failed(client, (3, 4))
        assert victim.server.wait() == -signal.SIGKILL and "127.0.0.1" in line and "Traceback" not in line
    again = made.generate("--cache", tmp_path, "--max-new-tokens", 3)  # the same model elsewhere, and so the same key
    assert again.wait() == 0, again.err
