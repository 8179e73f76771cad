"""`serve` and `dealer` with several workers, as processes: who reaches whom, what a worker takes with it, how they are replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.scenarios.workers import children
from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.look import missing
from privinf.session.options import Options
from protocols.errors import Code, PrivinfError, RefusedError
from tests.support import trio as t
from tests.support.waiting import PATIENCE

PROMPT = [1, 2, 3]


class Both(NamedTuple):
    dealer: t.Process
    server: t.Process
    cache: Path

    def client(self) -> Client:
        options = Options(cache=self.cache, timeout=PATIENCE)
        return Client(t.address_of(self.server), dealer=t.address_of(self.dealer), keys=str(t.keys()), options=options)

    def metrics(self, process: t.Process) -> str:
        """Where it answers."""
        return next(line for line in process.lines if "answers Prometheus" in line).split("http://")[1].removesuffix("/metrics")

    def served(self, process: t.Process, name: str) -> float:
        return sum(value for place, value in t.scraped(self.metrics(process)).items() if place[0] == name)

    def rested(self) -> None:
        """Waits until the server has seen the end of every session: until then their places are taken."""
        t.wait_for(lambda: self.served(self.server, "privinf_peers") == 0)

    def reply(self) -> list[int]:
        """Of a new session, begun again where the server has not seen yet that an earlier one has ended."""

        def answer() -> list[int]:
            try:
                return reply(self.client())
            except RefusedError as error:
                assert error.code == Code.CLIENT_FULL, error
                return []

        return t.wait_for(answer)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    cache = tmp_path_factory.mktemp("cache")
    more = ("--workers", 2, "--metrics", "127.0.0.1:0", "--cache", cache, "--drain", 60)
    common = ("--listen", "127.0.0.1:0", "--keys", t.keys(), "--timeout", PATIENCE, "--log", "warning")
    with t.Process("dealer", *common, *more) as dealer:
        at = t.address_of(dealer)
        with t.Process("serve", t.lowered_directory(), "--dealer", at, *common, *more, "--client-sessions", 2) as server:
            t.address_of(server)
            yield Both(dealer, server, cache)
            for process in (server, dealer):
                process.send(signal.SIGTERM)
                assert process.wait() == 0


def workers(process: t.Process) -> set[int]:
    """Of a front that is in the middle of nothing."""
    return {worker for nursery in children(process.pid) for worker in children(nursery)}


def reply(client: Client | Conversation) -> list[int]:
    if isinstance(client, Conversation):
        return [token.id for token in client.generate([4], max_new_tokens=1, ignore_eos=True)]
    return [token.id for token in client.generate(ids=PROMPT, max_new_tokens=3, ignore_eos=True)]


def probe(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_sessions_find_their_worker_at_the_dealer_and_a_limit_is_of_all_workers(both: Both) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = [token for tokens in pool.map(lambda _: both.reply(), range(6)) for token in [tuple(tokens)]]
    assert len(set(found)) == 1 and t.is_greedy(PROMPT, list(found[0]))
    assert both.served(both.server, "privinf_passes_total") == both.served(both.dealer, "privinf_passes_total") == 18
    both.rested()
    with Conversation(both.client()) as one, Conversation(both.client()) as two:
        assert reply(one) == reply(two)
        with pytest.raises(RefusedError, match="serves 2 sessions of this client already"):
            reply(both.client())
    both.rested()
    parties = ("--server", t.address_of(both.server), "--dealer", t.address_of(both.dealer))
    with t.Process("doctor", "--keys", t.keys(), *parties, "--cache", both.cache, "--timeout", PATIENCE) as doctor:
        assert doctor.wait() == 0 and "server and dealer opened one for us" in doctor.out
    for process in (both.server, both.dealer):
        assert probe(both.metrics(process), "/healthz") == probe(both.metrics(process), "/readyz") == (200, "ok\n")
        assert probe(both.metrics(process), "/other")[0] == 404


def test_a_worker_that_dies_takes_its_own_sessions_alone(both: Both) -> None:
    both.rested()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(contextlib.closing(Conversation(both.client()).open())) for _ in range(2)]
        before = [reply(each) for each in held]
        victim = min(workers(both.server))
        os.kill(victim, signal.SIGKILL)
        ends = []
        for each in held:
            try:
                ends.append(len(reply(each)))
            except PrivinfError:
                ends.append(0)
        assert sorted(ends) == [0, 1] and before[0] == before[1]
    t.wait_for(lambda: len(workers(both.server)) == 2 and both.served(both.server, "privinf_workers") == 2)
    assert victim not in workers(both.server) and f"a worker is gone (process {victim})" in both.server.err
    assert t.is_greedy(PROMPT, both.reply())
    assert both.served(both.server, "privinf_worker_deaths_total") == 1


def test_workers_are_replaced_while_sessions_go_on(both: Both) -> None:
    """A session that is busy ends by itself, in the old worker; whoever comes meanwhile is served."""
    passes = both.served(both.server, "privinf_passes_total")
    old = {process.pid: workers(process) for process in (both.server, both.dealer)}
    client = both.client()
    running = client.generate(ids=PROMPT, max_new_tokens=20, ignore_eos=True)
    tokens = [next(running).id]
    for process in (both.server, both.dealer):
        process.send(signal.SIGHUP)
    served = 1

    def replaced() -> bool:
        nonlocal served
        assert t.is_greedy(PROMPT, both.reply())
        served += 3
        for _ in range(3):
            if (token := next(running, None)) is not None:
                tokens.append(token.id)
        return all(len(workers(p)) == 2 and not workers(p) & old[p.pid] for p in (both.server, both.dealer))

    t.wait_for(replaced)
    tokens += [token.id for token in running]
    assert len(tokens) == 20 and t.is_greedy(PROMPT, tokens)
    both.rested()
    assert both.served(both.server, "privinf_passes_total") == passes + served - 1 + 20
    assert both.server.alive and both.dealer.alive


def test_all_end_with_their_last_session(both: Both) -> None:
    """The last of those that share the two: a server does not listen meanwhile, a dealer does, for sessions that have begun."""
    running = both.client().generate(ids=PROMPT, max_new_tokens=8, ignore_eos=True)
    tokens, pids = [next(running).id], {*workers(both.server), *workers(both.dealer)}
    for process in (both.server, both.dealer):
        process.send(signal.SIGTERM)
        process.until("takes nobody new, and stops in 60 s at the latest")
    t.wait_for(lambda: not t.listens(t.address_of(both.server)))
    assert t.listens(t.address_of(both.dealer))
    tokens += [token.id for token in running]
    assert len(tokens) == 8 and t.is_greedy(PROMPT, tokens)
    assert both.server.wait() == both.dealer.wait() == 0
    t.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_who_cannot_load_says_so_once(tmp_path: Path) -> None:
    with t.Process("serve", tmp_path, "--listen", "127.0.0.1:0", "--dealer", "127.0.0.1:1", "--keys", t.keys(), "--workers", 2) as process:
        assert process.wait() == 2
        assert process.err.count("privinf: ") == 1 and "is neither a checkpoint" in process.err


def test_who_is_ready_says_so_until_a_peer_is_away() -> None:
    """A server without its dealer, and a gateway without its server, are alive and not ready; nothing of a look stays in a log."""
    with t.services("--metrics", "127.0.0.1:0") as services:
        options = Options(cache=t.scratch() / "cache", timeout=PATIENCE)
        client = Client(services.server_address, dealer=services.dealer_address, keys=str(t.keys()), options=options)
        with Conversation(client) as held:
            model = held.lowered.id
        place = next(line for line in services.server.lines if "answers Prometheus" in line).split("http://")[1].removesuffix("/metrics")
        assert missing(client.peers, model) == "" and "another model" in missing(client.peers, "0" * 64)
        assert probe(place, "/readyz") == (200, "ok\n")
        assert services.dealer.err.count("\n") == 1 and services.server.err.count("\n") == 2  # where they listen, and answer Prometheus
        services.dealer.end()
        status, why = t.wait_for(lambda: (found := probe(place, "/readyz"))[0] == 503 and found, PATIENCE)
        assert status == 503 and why.startswith("the dealer at 127.0.0.1:")
        assert probe(place, "/healthz") == (200, "ok\n")
        services.server.end()
        assert missing(client.peers, model).startswith(f"the server at {services.server_address} cannot be reached")
