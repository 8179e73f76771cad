"""What a server gives, and to whom: sessions, tokens, bytes, a budget of outputs that is kept on disk; each refusal in one line."""

from __future__ import annotations

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from privinf.cli.app import main
from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.lowering.explain import explain
from privinf.server.budget import Budget, SetUps
from privinf.session.messages import Needs, Welcome
from privinf.session.options import Options
from privinf.session.turns import Turns
from privinf.transport.keys import add_client, renew_keys
from protocols.errors import ConfigError, RefusedError, TransportError
from tests.support import trio as t
from tests.support.peers import as_client
from tests.support.trio import trio
from tests.support.waiting import PATIENCE


def ids_of(client: Client, count: int, ids: tuple[int, ...] = (1, 2, 3), **choice: Any) -> list[int]:
    return [token.id for token in client.generate(ids=list(ids), max_new_tokens=count, ignore_eos=True, **choice)]


# ---- sessions


def test_sessions_of_one_client_are_bounded_and_leave_room_for_another(tmp_path: Path) -> None:
    with trio(cache=tmp_path, sessions=2, client_sessions=1) as parties:
        with Conversation(parties.client()):
            with pytest.raises(RefusedError, match="serves 1 sessions of this client already; come again later") as found:
                ids_of(parties.client(), 1)
            assert found.value.exit_code == 3 and found.value.again(7) == 7
            with (
                Conversation(parties.client(keys=t.second_client())),
                pytest.raises(RefusedError, match="serves 2 peers already; come again later"),
            ):
                ids_of(parties.client(), 1)
        t.wait_for(lambda: not parties.server.peers)
        assert len(ids_of(parties.client(), 1)) == 1
        assert parties.server.counters.refusals == {"client full": 1, "full": 1}


def test_a_place_is_free_when_its_session_has_ended(tmp_path: Path) -> None:
    """Query after query, without a pause in which connections could be closed to the last byte."""
    with trio(cache=tmp_path, sessions=1, client_sessions=1) as parties:
        client = parties.client()
        for _ in range(10):
            assert len(ids_of(client, 1)) == 1


def test_a_full_dealer_is_said_by_the_server(tmp_path: Path) -> None:
    with trio(cache=tmp_path, sessions=1) as parties:
        options = Options(cache=tmp_path, timeout=30.0)
        from privinf.server.server import Server

        with (
            Server(t.lowered(), listen="127.0.0.1:0", dealer=parties.dealer.address, keys=str(t.keys()), options=options) as second,
            Conversation(parties.client()) as held,
        ):
            other = Client(second.address, dealer=parties.dealer.address, keys=str(t.keys()), options=options)
            with pytest.raises(RefusedError, match=r"cannot reach its dealer.*serves 1 peers already; come again later"):
                ids_of(other, 1)
            assert len(list(held.generate([1], max_new_tokens=1))) == 1  # which has its place at the dealer, and its client too


def test_an_idle_session_ends_in_one_line(tmp_path: Path) -> None:
    with trio(cache=tmp_path, idle=0.5) as parties:
        held = Conversation(parties.client()).open()
        list(held.generate([1], max_new_tokens=1))
        t.wait_for(lambda: not parties.server.peers)
        with pytest.raises(TransportError, match=r"the session was unused for 0\.5 s"):
            list(held.generate([2], max_new_tokens=1))
        assert parties.server.counters.refusals["idle"] == 1
        assert len(ids_of(parties.client(), 1)) == 1


# ---- what one session may cost


def test_tokens_of_a_session(tmp_path: Path) -> None:
    with trio(cache=tmp_path, session_tokens=6) as parties:
        passes = parties.dealer.counters.counts["passes"]
        with pytest.raises(RefusedError, match="at most 6 tokens of prompt and reply, and this makes 7") as found:
            ids_of(parties.client(), 1, tuple(range(1, 8)))
        assert found.value.exit_code == 3 and found.value.again(7) is None
        assert parties.dealer.counters.counts["passes"] == passes  # before anything was dealt for it
        assert len(ids_of(parties.client(), 4)) == 4  # 3 + 3 positions: the last token goes through no pass
        with pytest.raises(RefusedError, match="this makes 7"):
            ids_of(parties.client(), 5)
        with pytest.raises(RefusedError, match="this makes 7"):
            parties.client().prepare(4, max_new_tokens=4)
        assert parties.client().prepare(4, max_new_tokens=3, count=1)["prepared"]
        assert len(ids_of(parties.client(), 3, (1, 2, 3, 4))) == 3
        assert parties.server.counters.refusals["tokens"] == 3


def test_bytes_of_a_session(tmp_path: Path) -> None:
    """No pass begins that would lead beyond them; the first one's cost is known exactly."""
    total = explain(t.lowered(), 3)["total"]
    one = total["online_bytes"] + total["peer_offline_bytes"]
    with trio(cache=tmp_path, session_bytes=one) as parties:
        assert len(ids_of(parties.client(), 1)) == 1
        with pytest.raises(RefusedError, match=f"at most {one} bytes"):
            ids_of(parties.client(), 2)
        with pytest.raises(RefusedError, match=f"at most {one} bytes"):
            ids_of(parties.client(), 1, (1, 2, 3, 4))
        assert len(ids_of(parties.client(fresh=True), 1)) == 1  # set-up does not count


# ---- set-ups


def test_set_ups_of_a_certificate_are_bounded(tmp_path: Path) -> None:
    """By their bytes, whole or in parts; who has kept its set-up needs none, and other certificates have their own."""
    with trio(cache=tmp_path, setups=2) as parties:
        for _ in range(2):
            assert len(ids_of(parties.client(fresh=True), 1)) == 1
        sent = parties.server.traffic()["setup"]["payload"]
        with pytest.raises(RefusedError, match=r"been sent 2 set-ups of this model in 24 hours; come again later, in 8[56]") as found:
            ids_of(parties.client(fresh=True), 1)
        assert found.value.exit_code == 3 and parties.server.counters.refusals == {"set-ups": 1}
        assert parties.server.traffic()["setup"]["payload"] == sent
        kept = parties.client(keys=t.second_client())
        assert len(ids_of(kept, 1)) == 1  # which fills the cache that the next one, of the first certificate, finds
        assert len(ids_of(parties.client(), 1)) == 1


def test_parts_of_the_set_up_asked_for_again_and_again(tmp_path: Path) -> None:
    with trio(cache=tmp_path, setups=1) as parties:
        whole = {name: item.size for name, item in parties.server.lowered.setup.items.items()}
        name = max(whole, key=lambda name: whole[name])
        bundle = len(parties.server.lowered.bundle())
        asked = 0
        with pytest.raises(RefusedError, match="come again later"):
            while asked < 1000:
                with as_client(parties) as connection:
                    connection.receive_control(Welcome)
                    connection.send_control(Needs(()))
                    connection.send_control(Needs((name,)))
                    connection.max_frame = 64 * 2**20
                    connection.receive(whole[name])
                asked += 1
        assert asked == (bundle + sum(whole.values())) // whole[name]


def test_windows_of_set_ups() -> None:
    clock = Hands()
    set_ups = SetUps(10, "1 set-up", 2.0, clock)
    set_ups.spend("alice", 7)
    clock.now += 3600
    set_ups.spend("alice", 3)
    for size in (1, 10**9):
        with pytest.raises(RefusedError, match="been sent 1 set-up in 2 hours; come again later, in 3600 s"):
            set_ups.spend("alice", size)
    set_ups.spend("alice", 0)
    set_ups.spend("bob", 10)
    clock.now += 3600
    set_ups.spend("alice", 10)
    assert set(set_ups._sent) == {"alice", "bob"}
    clock.now += 7200
    set_ups.spend("carol", 1)
    assert set(set_ups._sent) == {"carol"}  # what is over is forgotten
    SetUps(0, "", 1.0, clock).spend("alice", 10**12)


def test_set_up_is_computed_in_turn(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties:
        turns = parties.server.turns
        for _ in range(turns.places):
            turns.take("others")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ids_of, parties.client(), 1)
            t.wait_for(lambda: turns.waiting == 1)
            assert parties.server.traffic()["setup"]["payload"] == 0
            for _ in range(turns.places):
                turns.give()
            assert len(asked.result(PATIENCE)) == 1
        assert turns.waiting == 0


# ---- budgets


class Hands:
    """A clock that is set by hand, seconds since the epoch."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_is_spent_before_it_is_used_and_lasts(tmp_path: Path) -> None:
    clock = Hands()

    def process() -> Budget:
        """Another server process, or the same one after a crash."""
        return Budget(tmp_path, 3, 2.0, 5.0, clock)

    process().spend("alice")
    process().spend("alice")
    clock.now += 3600
    budget = process()
    budget.check("alice")
    budget.spend("alice")
    for ask in (budget.check, budget.spend, process().check):
        with pytest.raises(RefusedError, match="the budget of 3 outputs in 2 hours is used up; come again later, in 3600 s") as found:
            ask("alice")
        assert found.value.again(7) == 3600
    process().spend("bob")  # who has one of his own
    clock.now -= 1800  # a clock that is set back gives nothing
    with pytest.raises(RefusedError, match="in 5400 s"):
        process().check("alice")
    clock.now += 1800 + 3600
    process().spend("alice")
    assert budget.spent == {"alice": 1}
    files = sorted(path.name for path in (tmp_path / "budget").iterdir())
    assert len(files) == 4 and not any("alice" in name for name in files)
    assert main(["cache", "rm", "--all", "--cache", str(tmp_path)]) == 0
    assert sorted(path.name for path in (tmp_path / "budget").iterdir()) == files


def test_a_budget_is_not_overdrawn_by_many_at_once(tmp_path: Path) -> None:
    budgets = [Budget(tmp_path, 20, 1.0, 30.0) for _ in range(2)]

    def spend(number: int) -> bool:
        try:
            budgets[number % 2].spend("alice")
        except RefusedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(spend, range(60))) == 20


def test_a_budget_that_cannot_be_kept_gives_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trio(cache=tmp_path / "cache", budget=2) as parties:
        assert len(ids_of(parties.client(), 1)) == 1
        (ledger,) = (tmp_path / "cache" / "budget").glob("*.json")
        kept = ledger.read_bytes()
        ledger.write_bytes(kept[:-3])
        with pytest.raises(RefusedError, match="the server cannot keep its budgets") as found:
            ids_of(parties.client(), 1)
        assert str(tmp_path) not in str(found.value) and str(ledger) in caplog.text and "it is damaged" in caplog.text
        ledger.write_bytes(kept)
        assert len(ids_of(parties.client(), 1)) == 1


def test_what_a_budget_counts(tmp_path: Path) -> None:
    """Outputs, whatever the lengths of prompts, the cuts of their passes, and the number of sessions."""
    with trio(cache=tmp_path, budget=7) as parties:

        def spent() -> int:
            return sum(json.loads(path.read_bytes())["spent"] for path in (tmp_path / "budget").glob("*.json"))

        client = parties.client(chunk=2)
        assert len(ids_of(client, 1, tuple(range(1, 10)))) == 1 and spent() == 1  # five passes, one output
        assert len(ids_of(client, 2, logits=True)) == 2 and spent() == 3
        client = parties.client()
        client.prepare(3, max_new_tokens=3)
        assert spent() == 3  # what is prepared reveals nothing
        assert len(ids_of(client, 3)) == 3 and client.result["prepared"] and spent() == 6  # type: ignore[index]
        client.prepare(3, max_new_tokens=3)
        tokens = []
        with pytest.raises(
            RefusedError, match=r"the budget of 7 outputs in 24 hours is used up; come again later, in 86[34]\d\d s"
        ) as found:
            for token in client.generate(ids=[1, 2, 3], max_new_tokens=3, ignore_eos=True):
                tokens.append(token.id)
        assert len(tokens) == 1 and spent() == 7 and found.value.exit_code == 3
        # a client that waits for its dealer hears of it there, and is told who refused
        assert re.search(rf"at client, peer server 127\.0\.0\.1:\d+( by way of dealer {parties.dealer.address})?\)", str(found.value))
        with pytest.raises(RefusedError, match="used up"):
            ids_of(parties.client(fresh=True), 1)
        # one that has nothing left does not lose what was prepared: only the one above was
        assert client.prepare(3, max_new_tokens=3)["prepared"][0]["index"] == 3
        with pytest.raises(RefusedError, match="used up"):
            ids_of(client, 3)
        assert len(list((tmp_path / "prepared").glob("client-*/*.bin"))) == 1
        assert parties.server.counters.refusals["budget"] == 3


def test_budgets_go_by_names_that_renewed_certificates_keep(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    shutil.copytree(t.keys(), keys)
    alice, bob = add_client(keys, "alice"), add_client(keys, "bob")
    with trio(cache=tmp_path / "cache", budget=1) as parties:
        assert len(ids_of(parties.client(keys=alice), 1)) == 1
        renew_keys(keys)
        with pytest.raises(RefusedError, match="used up"):
            ids_of(parties.client(keys=alice), 1)
        assert len(ids_of(parties.client(keys=bob), 1)) == 1
        # certificates without a name of their own are one client
        assert len(ids_of(parties.client(), 1)) == 1
        with pytest.raises(RefusedError, match="used up"):
            ids_of(parties.client(keys=t.second_client()), 1)
        assert parties.server.model.budget is not None
        assert parties.server.model.budget.spent == {"privinf client alice": 1, "privinf client bob": 1, "privinf client": 1}


@pytest.mark.parametrize("wrong", [{"sessions": 0}, {"budget": -1}, {"idle": 0.0}, {"drain": -1.0}, {"budget_hours": float("inf")}])
def test_limits_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Options(**wrong)


# ---- turns


def ordered(*asking: str) -> list[str]:
    """Who gets turns, of one place: each of these sessions of clients asks in this order, and once more after its first turn."""
    turns, order = Turns(1), []
    turns.take("first")
    threads = []
    for number, client in enumerate(asking):

        def compute(client: str = client) -> None:
            with turns.turn(client):
                order.append(client)
                with turns.between(client):  # waits for a peer; whoever asked meanwhile comes first
                    pass
                order.append(client)

        threads.append(threading.Thread(target=compute))
        threads[-1].start()
        t.wait_for(lambda number=number: turns.waiting == number + 1)
    turns.give()
    for thread in threads:
        thread.join(PATIENCE)
    assert turns.waiting == 0 and turns.given == 1 + 2 * len(asking) and turns.passed <= len(set(asking))
    return order


def test_turns_are_given_in_the_order_in_which_they_are_asked_for() -> None:
    order = ordered(*"abcdef")
    assert order[:6] == list("abcdef") and sorted(order[6:]) == list("abcdef")


def test_a_client_with_many_sessions_has_one_turn_in_a_round() -> None:
    order = ordered(*"aaaaab")
    assert order[:2] == ["a", "b"] and order.count("a") == 10 and order.count("b") == 2


def test_eight_clients_at_once_get_the_replies_that_one_gets_and_nobody_is_passed_over(tmp_path: Path) -> None:
    """While a client waits for its turn, each other one has a turn at most."""
    shutil.copytree(t.keys(), tmp_path / "keys")
    keys = [add_client(tmp_path / "keys", f"client-{number}") for number in range(8)]
    prompts = [(1 + number, 2, 3 + number) for number in range(len(keys))]
    with trio(cache=tmp_path / "cache") as parties:
        turns = parties.server.turns
        alone = [ids_of(parties.client(), 4, prompt) for prompt in prompts]
        turns.places = turns._free = 1  # the fewest, so that there is a queue
        with ThreadPoolExecutor(len(keys)) as pool:
            assert list(pool.map(lambda ours, prompt: ids_of(parties.client(keys=ours), 4, prompt), keys, prompts)) == alone
        assert 0 < turns.passed < len(keys)
        t.wait_for(lambda: not parties.server.peers)
        assert turns.waiting == 0 and turns._free == 1
