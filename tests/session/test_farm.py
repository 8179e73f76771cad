"""A dealer whose dealing is done on a cluster: bit for bit what one process deals, whichever workers are lost on the way."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from privinf.dealer import farm
from privinf.dealer.dealer import DealerService
from privinf.dealer.farm import Farm, FarmDealer, FarmedDealer, Machine, Query
from privinf.dealer.making import Maker
from privinf.session.options import Options
from protocols.correlations import Kind
from protocols.errors import ConfigError, CorrelationError, TransportError
from protocols.kind_hash import moved_on
from protocols.linear import Weight
from protocols.prg import new_seed
from tests.support import trio as t
from tests.support.cluster import Here, Machines
from tests.support.trio import trio

Pass = tuple[list[Kind], bytes]
Deals = list[tuple[int, Pass]]  # the first name, and what is asked for


@pytest.fixture(scope="module")
def asked() -> tuple[Deals, tuple[Weight, ...]]:
    """What a session asks its dealer for: a prompt, and three more tokens, each prefetched."""
    found: Deals = []
    weights: list[tuple[Weight, ...]] = []
    with pytest.MonkeyPatch.context() as patched, trio() as parties:
        dealing = DealerService.dealing

        def noted(self: DealerService, *given: Any) -> Any:
            made = dealing(self, *given)
            weights.append(given[-1])
            deal_pass = made.deal_pass

            def deal(kinds: list[Kind], digest: bytes = b"") -> Iterator[bytes]:
                found.append((made.next_name, (kinds, digest)))
                return deal_pass(kinds, digest)

            def further() -> tuple[int, Iterator[bytes]]:
                first, (last, digest) = found[-1]
                kinds = moved_on(last, first)
                assert kinds is not None
                return len(kinds), deal(kinds, digest)

            made.deal_pass, made.deal_further = deal, further  # type: ignore[method-assign]
            return made

        patched.setattr(DealerService, "dealing", noted)
        with parties.client() as client:
            assert len(list(client.generate(ids=[1, 2, 3], max_new_tokens=4, ignore_eos=True))) == 4
    return found[:4], weights[0]


def query(weights: tuple[Weight, ...]) -> Query:
    return Query("client", *(new_seed() for _ in range(3)), weights)


def farmed(machines: Machines, count: int, asked: Query, number: int = 1) -> tuple[Farm, FarmDealer]:
    made = Farm(machines, lambda: Here(machines, Machine, (Options(cache=t.scratch() / "cache"),)), count, 1.0)  # type: ignore[arg-type, return-value]
    made.begin()
    return made, FarmDealer(made, number, asked)


def plain(asked: Query) -> Any:
    return Maker("cpu", Options().memory).dealer(asked.server_seed, asked.client_seed, asked.mask_seed, asked.weights)


def dealt(dealer: Any, deals: Deals) -> list[bytes]:
    found = []
    for first, (kinds, digest) in deals:
        assert dealer.next_name == first
        found.append(b"".join(dealer.deal_pass(kinds, digest)))
    return found


LOSSES: list[tuple[str, Callable[[str, int], str]]] = [
    ("nobody", lambda method, count: ""),
    ("while a query begins", lambda method, count: "before" if (method, count) == ("begin", 0) else ""),
    ("before a pass", lambda method, count: "before" if (method, count) == ("read", 2) else ""),
    ("after it was asked for", lambda method, count: "after" if (method, count) == ("read", 3) else ""),
    ("amid a payload", lambda method, count: "after" if method == "piece" and count in (0, 3, 4) else ""),
    ("before a piece", lambda method, count: "before" if method == "piece" and count in (1, 2) else ""),
    ("while another catches up", lambda method, count: "after" if (method, count) in (("read", 3), ("again", 1)) else ""),
]


@pytest.mark.parametrize(("who", "loses"), LOSSES, ids=[name for name, _ in LOSSES])
def test_it_deals_what_one_process_deals(
    asked: tuple[Deals, tuple[Weight, ...]], monkeypatch: pytest.MonkeyPatch, who: str, loses: Callable[[str, int], str]
) -> None:
    monkeypatch.setattr(farm, "PIECE", 3000)
    deals, weights = asked
    wanted, machines = query(weights), Machines(loses)
    made, dealer = farmed(machines, 2, wanted)
    assert dealt(dealer, deals) == dealt(plain(wanted), deals)
    assert (len(machines.made) > 2) == (who != "nobody") and dealer.next_name > deals[-1][0]
    dealer.end()
    assert not any(machine._queries for machine in machines.made if machine is machines.made[-1])
    made.end()


def test_what_was_foretold_in_vain_is_taken_back(asked: tuple[Deals, tuple[Weight, ...]]) -> None:
    deals, weights = asked
    wanted = query(weights)
    machines = Machines(lambda method, count: "before" if (method, count) == ("rewind", 1) else "")
    _, dealer = farmed(machines, 1, wanted)
    one = plain(wanted)
    for each in (dealer, one):
        dealt(each, deals[:2])
    again = []
    for each in (dealer, one):
        for _ in range(2):  # the second time the worker is lost
            foretold = dealt(each, deals[2:3])
            each.rewind(deals[2][0])
            again.append(foretold + dealt(each, deals[2:3]))
            each.rewind(deals[2][0])
    assert again[0] == again[1] == again[2] == again[3] and len(machines.made) == 2
    assert dealt(dealer, deals[2:]) == dealt(one, deals[2:])


def test_what_is_too_much_is_refused_there_as_here(asked: tuple[Deals, tuple[Weight, ...]]) -> None:
    deals, weights = asked
    machines = Machines()
    made = Farm(machines, lambda: Here(machines, Machine, (Options(memory=1 << 18, cache=t.scratch() / "cache"),)), 1, 1.0)  # type: ignore[arg-type, return-value]
    made.begin()
    with pytest.raises(CorrelationError, match="more than the 262144 bytes"):
        FarmDealer(made, 1, query(weights)).deal_pass(*deals[0][1])


def test_a_query_of_which_too_much_would_have_to_be_done_again_ends(
    asked: tuple[Deals, tuple[Weight, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deals, weights = asked
    monkeypatch.setattr(farm, "HISTORY", 10)
    _, dealer = farmed(Machines(lambda method, count: "before" if (method, count) == ("read", 1) else ""), 1, query(weights))
    with pytest.raises(TransportError, match="the machine that dealt for this session was lost"):
        dealt(dealer, deals)


def test_queries_are_spread_and_a_farm_without_workers_says_so(asked: tuple[Deals, tuple[Weight, ...]]) -> None:
    deals, weights = asked
    machines = Machines()
    made, _ = farmed(machines, 3, query(weights))
    dealers = [FarmDealer(made, number, query(weights)) for number in range(6)]
    payloads = [dealt(dealer, deals[:1]) for dealer in dealers]
    assert len({payload[0] for payload in payloads}) == 6 and [len(machine._queries) for machine in machines.made] == [2, 2, 2]
    for dealer in dealers:
        dealer.end()
    assert not any(machine._queries for machine in machines.made)
    none = Farm(machines, lambda: Here(machines, Machine, (Options(),)), 1, 0.1)  # type: ignore[arg-type, return-value]
    none.ray = type("Ray", (), {"wait": staticmethod(lambda refs, num_returns, timeout: ([], refs))})
    with pytest.raises(TransportError, match="no machine of the cluster deals"):
        none.begin()


def test_sessions_are_as_with_any_dealer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply, two at a time, and prepared queries; a worker is lost in each."""
    numbers = itertools.count()
    machines = Machines(lambda method, count: "after" if method == "piece" and next(numbers) in (1, 9) else "")
    machines.stand_in(monkeypatch, farm)
    monkeypatch.setattr(t, "DealerService", lambda **given: FarmedDealer(**given, workers=2))
    with trio() as parties, parties.client() as client:
        tokens = [token.id for token in client.generate(ids=[1, 2, 3], max_new_tokens=4, ignore_eos=True)]
        assert t.is_greedy([1, 2, 3], tokens)
        client.prepare(3, max_new_tokens=2)
        again = [token.id for token in client.generate(ids=[1, 2, 3], max_new_tokens=2, ignore_eos=True)]
        assert again == tokens[:2] and client.result is not None and client.result["prepared"]
        for _ in client.generate(ids=[[1, 2], [4, 5, 6]], max_new_tokens=3, ignore_eos=True):
            pass
    assert len(machines.made) > 2 and not any(machine._queries for machine in machines.made[-2:])


def test_what_a_farm_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines()
    machines.stand_in(monkeypatch, farm)
    monkeypatch.setattr(farm.Machine, "version", lambda self: "9.9.9")
    where: dict[str, Any] = {"listen": "127.0.0.1:0", "keys": str(t.keys())}
    with pytest.raises(ConfigError, match=r"a worker of the cluster has privinf 9\.9\.9"):
        FarmedDealer(**where, options=Options(cache=t.scratch() / "cache"))


@dataclass(frozen=True)
class Talking:
    """A hook that gives a process a cluster, which prints."""

    def __call__(self) -> None:
        machines = Machines()

        def connect(address: str, seconds: float) -> Machines:
            print("(raylet) a node has been marked dead", flush=True)
            return machines

        vars(farm).update(connect=connect, Remote=Here)


def test_standard_output_is_the_document_alone() -> None:
    words = ("--listen", "127.0.0.1:0", "--keys", t.keys(), "--cache", t.scratch() / "cache", "--engine", "ray", "--workers", 2, "--json")
    process = t.Process("dealer", *words, hook=Talking())
    try:
        about = process.document()
        assert (about["role"], about["engine"], about["workers"]) == ("dealer", "ray", 2) and about["address"]
        assert "marked dead" in process.err and "in 2 actors of a cluster" in process.err
        process.send(signal.SIGTERM)
        assert process.wait() == 0 and process.out.count("\n") == 1
    finally:
        process.end()


def test_what_moves_on_is_dealt_there_as_here(asked: tuple[Deals, tuple[Weight, ...]]) -> None:
    """From the last pass alone, also where the worker that dealt it is lost."""
    deals, weights = asked
    wanted = query(weights)
    machines = Machines(lambda method, count: "before" if (method, count) == ("read", 3) else "")
    made, dealer = farmed(machines, 2, wanted)
    one = plain(wanted)
    for each in (dealer, one):
        with pytest.raises(CorrelationError, match="nothing tells which"):
            each.deal_further()
        dealt(each, deals[:3])
    count, payload = dealer.deal_further()
    assert count == len(deals[3][1][0]) and [b"".join(payload)] == dealt(one, deals[3:]) and dealer.next_name == one.next_name
    dealer.end()
    made.end()
