"""A server for many, over real processes: a drain, two servers behind a plain TCP balancer, a client that is shut out, who comes again."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.session.options import Options
from privinf.transport.keys import add_client, load_credentials
from privinf.transport.listener import parse_address
from protocols.errors import RefusedError, TransportError
from tests.support import trio as t
from tests.support.between import Between, both_ways
from tests.support.failures import failed
from tests.support.waiting import PATIENCE

PROMPT, LINK = [1, 2, 3], ("--link", "6ms:100")


def client_of(services: t.Services, cache: Path, *, keys: Path | None = None, link: str | None = None, server: str = "") -> Client:
    options = Options(cache=cache, timeout=PATIENCE, link=link)
    return Client(server or services.server_address, dealer=services.dealer_address, keys=str(keys or t.keys()), options=options)


def one_token(client: Client) -> list[int]:
    return [token.id for token in client.generate(ids=PROMPT, max_new_tokens=1)]


# ---- draining


def test_a_server_drains(tmp_path: Path) -> None:
    """What has begun ends by itself, what lies idle is told, nobody new is served; then the server ends."""
    with t.services("--drain", 30, *LINK) as services, contextlib.ExitStack() as stack:
        idle = stack.enter_context(Conversation(client_of(services, tmp_path, link=LINK[1])))
        list(idle.generate([5], max_new_tokens=1))
        reply = services.generate("--max-new-tokens", 6, "--ignore-eos", "--cache", tmp_path, *LINK)
        stack.enter_context(reply)
        held = client_of(services, tmp_path, link=LINK[1])
        running = held.generate(ids=PROMPT, max_new_tokens=6, ignore_eos=True)
        tokens = [next(running).id]
        t.wait_for(lambda: reply.out)
        services.server.send(signal.SIGTERM)
        services.server.until("takes nobody new, and stops in 30 s at the latest")
        t.wait_for(lambda: not t.listens(services.server_address))
        tokens += [token.id for token in running]
        assert len(tokens) == 6 and t.is_greedy(PROMPT, tokens)
        assert services.server.wait() == 0 and services.server.lines[-1] == "server stops"
        with pytest.raises(TransportError, match="this server is being stopped"):
            list(idle.generate([6], max_new_tokens=1))
        assert reply.wait() == 0 and reply.out == f"{t.tokenizer().decode(tokens)}\n"


def test_a_dealer_does_not_end_before_its_sessions(tmp_path: Path) -> None:
    with t.services(*LINK) as services:
        services.dealer.end()
        services.dealer, _ = t.start_dealer(listen=services.dealer_address, more=("--drain", 30))
        client = client_of(services, tmp_path, link=LINK[1])
        running = client.generate(ids=PROMPT, max_new_tokens=5, ignore_eos=True)
        tokens = [next(running).id]
        services.dealer.send(signal.SIGTERM)
        services.dealer.until("takes nobody new")
        line = failed(services.generate("--cache", tmp_path, *LINK), (3,))
        assert "this dealer is being stopped" in line and "cannot reach its dealer" in line
        tokens += [token.id for token in running]
        assert len(tokens) == 5 and t.is_greedy(PROMPT, tokens)
        assert services.dealer.wait() == 0 and services.dealer.lines[-1] == "dealer stops"
        services.dealer.end()


def test_a_second_signal_ends_a_drain(tmp_path: Path) -> None:
    with t.services("--drain", 300, *LINK) as services:
        client = services.generate("--max-new-tokens", 29, "--ignore-eos", "--cache", tmp_path, *LINK)
        with client:
            t.wait_for(lambda: client.out)
            services.server.send(signal.SIGTERM)
            services.server.until("takes nobody new")
            time.sleep(0.2)
            assert services.server.alive
            services.server.send(signal.SIGTERM)
            assert services.server.wait() == 0
            assert "this server is being stopped" in failed(client, (4,))


# ---- shut out


def test_a_client_that_is_shut_out_in_a_session_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    keys, listed = tmp_path / "keys", tmp_path / "clients"
    shutil.copytree(t.keys(), keys)
    names = {name: add_client(keys, name) for name in ("alice", "mallory")}
    prints = {name: load_credentials(bundle, "client").fingerprint for name, bundle in names.items()}
    listed.write_text("".join(f"{value}  # {name}\n" for name, value in prints.items()))
    with t.services("--clients", listed, *LINK) as services:
        alice = client_of(services, tmp_path / "cache", keys=names["alice"], link=LINK[1])
        going_on = alice.generate(ids=PROMPT, max_new_tokens=5, ignore_eos=True)
        tokens = [next(going_on).id]
        words = ("--keys", names["mallory"], "--max-new-tokens", 29, "--ignore-eos", "--cache", tmp_path / "cache", *LINK)
        mallory = services.generate(*words)
        with mallory, Conversation(client_of(services, tmp_path / "cache", keys=names["mallory"], link=LINK[1])) as waiting:
            t.wait_for(lambda: mallory.out)
            listed.write_text(prints["alice"])
            services.server.send(signal.SIGHUP)
            line = failed(mallory, (3,))
            assert "this certificate is served no longer" in line and line.count("\n") == 0
            with pytest.raises(RefusedError, match="served no longer"):
                list(waiting.generate([1], max_new_tokens=1))
        assert "not among those that are served" in failed(services.generate(*words), (3,))
        tokens += [token.id for token in going_on]
        assert len(tokens) == 5 and t.is_greedy(PROMPT, tokens)


# ---- two servers behind a balancer


class Balancer(Between):
    """Hands connections to servers in turn, as a plain TCP proxy does; knows nothing of TLS."""

    def __init__(self, *addresses: str) -> None:
        self._places = [parse_address(address) for address in addresses]
        self._next = itertools.count()
        self.used: list[int] = []
        super().__init__()

    def carry(self, near: socket.socket) -> None:
        for _ in self._places:  # one that does not answer is passed over
            number = next(self._next) % len(self._places)
            with contextlib.suppress(OSError):
                far = socket.create_connection(self._places[number], 5)
                self.used.append(number)
                both_ways(near, far)
                return
        near.close()


@contextlib.contextmanager
def pair(*words: object, caches: tuple[Path, Path]) -> Iterator[tuple[t.Services, t.Process, Balancer]]:
    """A dealer, two servers of one lowered directory, and a balancer before them."""
    with t.services(*words, "--cache", caches[0]) as services:
        second, address = t.start_server(services.dealer_address, *words, "--cache", caches[1])
        with second, Balancer(services.server_address, address) as balancer:
            services.server_address = balancer.address
            yield services, second, balancer


def test_two_servers_behind_a_balancer(tmp_path: Path) -> None:
    """A session is one TCP connection: it stays where it began. Set-up, prepared queries and budgets serve with both."""
    at_servers, bundles = tmp_path / "server", {"first": t.keys(), "second": t.second_client()}
    with pair("--budget", 12, caches=(at_servers, at_servers)) as (services, _, balancer):
        clients = {name: client_of(services, tmp_path / name, keys=keys) for name, keys in bundles.items()}
        tokens = {name: [token.id for token in client.generate(ids=PROMPT, max_new_tokens=3)] for name, client in clients.items()}
        assert tokens["first"] == tokens["second"] and t.is_greedy(PROMPT, tokens["first"])
        assert clients["first"].result["traffic"]["setup"]["payload"] > 0  # type: ignore[index]
        with Conversation(clients["first"]) as talk:  # one connection: every turn goes to the same server
            before = len(balancer.used)
            assert [token.id for token in talk.generate(PROMPT, max_new_tokens=1)] == tokens["first"][:1]
            list(talk.generate([7], max_new_tokens=1))
            assert len(balancer.used) == before
        assert clients["first"].prepare(3, max_new_tokens=1)["prepared"]  # with one server,
        assert one_token(clients["first"]) == tokens["first"][:1]  # spent with the other
        result = clients["first"].result
        assert result is not None and result["prepared"] and result["traffic"]["setup"]["payload"] == 0
        assert one_token(clients["second"]) == tokens["first"][:1]
        # ten outputs so far from one budget, for neither certificate has a name of its own
        assert len(one_token(clients["second"]) + one_token(clients["first"])) == 2
        with pytest.raises(RefusedError, match="budget of 12 outputs"):
            one_token(clients["first"])
        assert set(balancer.used) == {0, 1}


def test_two_servers_with_caches_of_their_own(tmp_path: Path) -> None:
    """What was prepared with one is not used with the other: the query goes on with live correlations, and the prepared one is kept."""
    with pair(caches=(tmp_path / "a", tmp_path / "b")) as (services, second, balancer):
        client = client_of(services, tmp_path / "client")
        expected = one_token(client)
        while balancer.used[-1] != 1:
            one_token(client)
        client.prepare(3, max_new_tokens=1)  # with the first
        assert balancer.used[-1] == 0
        assert one_token(client) == expected and client.result is not None and not client.result["prepared"]
        assert balancer.used[-1] == 1
        assert one_token(client) == expected and client.result["prepared"]
        # one of them goes in the middle of a reply, which goes on with the other
        running = client.generate(ids=PROMPT, max_new_tokens=4, ignore_eos=True, retry=1)
        tokens = [next(running).id]
        gone = services.server if balancer.used[-1] == 0 else second
        os.kill(gone.pid, signal.SIGKILL)
        tokens += [token.id for token in running]
        assert len(tokens) == 4 and tokens[:1] == expected and t.is_greedy(PROMPT, tokens)
        assert client.result["retries"] == 1


# ---- what is counted


def test_metrics_of_refusals_turns_and_budgets(tmp_path: Path) -> None:
    with t.services("--budget", 2, "--sessions", 1, "--metrics", "127.0.0.1:0") as services:
        place = services.server.err.split("http://")[1].split("/")[0]
        client = client_of(services, tmp_path)
        list(client.generate(ids=PROMPT, max_new_tokens=2, ignore_eos=True))
        assert "used up; come again later, in 86" in failed(services.generate("--cache", tmp_path), (3,))
        with Conversation(client):
            assert "serves 1 peers already; come again later" in failed(services.generate("--cache", tmp_path), (3,))
        found = t.scraped(place)
        assert found["privinf_refusals_total", "budget", "server"] == found["privinf_refusals_total", "full", "server"] == 1
        assert found["privinf_refusals_total", "revoked", "server"] == 0
        assert found["privinf_budget_outputs_total", "privinf client"] == 2
        assert found["privinf_turns_total", "server"] > 2 and found["privinf_turns_waiting", "server"] == 0
        assert found["privinf_draining", "server"] == 0 and found["privinf_peers_limit", "server"] == 1
