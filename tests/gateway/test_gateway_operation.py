"""Operation: certificates renewed without downtime, clients listed and shut out, metrics of server and dealer."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from privinf.client.conversation import Conversation
from privinf.server.server import Server
from privinf.session.metrics import registry_of, service_families
from privinf.session.papers import read_clients
from privinf.transport.keys import load_credentials, renew_keys, show_keys
from protocols.errors import ConfigError, HandshakeError, RefusedError
from tests.support import trio as t
from tests.support.gateway import gateway
from tests.support.trio import Trio, trio
from tests.support.waiting import PATIENCE


def fingerprint(keys: Path, role: str) -> str:
    return load_credentials(keys, role).fingerprint


def test_renewed_certificates_are_shown_without_ending_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    shutil.copytree(t.keys(), keys)
    monkeypatch.setattr(t, "keys", lambda: keys)
    with trio(cache=tmp_path / "cache") as parties:
        old = fingerprint(keys, "server")
        with Conversation(parties.client()) as before:
            list(before.generate([1], max_new_tokens=1))
            renew_keys(keys)
            assert fingerprint(keys, "server") != old
            parties.server.reload()
            parties.dealer.reload()
            with Conversation(parties.client()) as after:
                assert after.session.connection.peer_fingerprint == fingerprint(keys, "server") == parties.server.credentials.fingerprint
                assert t.is_greedy([2], [token.id for token in after.generate([2], max_new_tokens=1)])
            assert before.session.connection.peer_fingerprint == old
            list(before.generate([3], max_new_tokens=1))
        kept = (keys / "server" / "cert.pem").read_bytes()
        (keys / "server" / "cert.pem").write_text("no certificate")
        with pytest.raises(ConfigError, match="not a certificate"):
            parties.server.reload()
        (keys / "server" / "cert.pem").write_bytes(kept)
        with Conversation(parties.client()) as still:
            assert t.is_greedy([2], [token.id for token in still.generate([2], max_new_tokens=1)])


def test_only_clients_that_are_listed_are_served(tmp_path: Path) -> None:
    first, second, listed = t.keys(), t.second_client(), tmp_path / "clients"
    listed.write_text(f"# who may ask\n{fingerprint(first, 'client')}  # the first\n\n")
    with trio(cache=tmp_path / "cache") as parties:
        options = {"listen": "127.0.0.1:0", "dealer": parties.dealer.address, "keys": str(first), "options": parties.server.options}
        with Server(t.lowered(), clients=listed, **options) as server:  # type: ignore[arg-type]
            behind = Trio(parties.dealer, server, parties.cache)
            held = Conversation(behind.client()).open()
            list(held.generate([1], max_new_tokens=1))
            with pytest.raises(HandshakeError, match="not among those that are served"):
                list(behind.client(keys=second).generate(ids=[1], max_new_tokens=1))
            listed.write_text(fingerprint(second, "client").upper())
            server.reload()
            with pytest.raises(RefusedError, match="this certificate is served no longer"):
                list(held.generate([2], max_new_tokens=1))
            assert len(list(behind.client(keys=second).generate(ids=[1], max_new_tokens=1))) == 1
            with pytest.raises(HandshakeError, match="not among those that are served"):
                list(behind.client().generate(ids=[1], max_new_tokens=1))
            listed.write_text("nonsense")
            with pytest.raises(ConfigError, match="line 1 is no fingerprint"):
                server.reload()
            assert len(list(behind.client(keys=second).generate(ids=[1], max_new_tokens=1))) == 1


def test_the_list_of_clients(tmp_path: Path) -> None:
    place = tmp_path / "clients"
    place.write_text("")
    assert read_clients(place) == frozenset()
    info = next(info for info in show_keys(t.keys()) if info.role == "client")
    spaced = ":".join(info.fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    place.write_text(f"\n  {spaced} # openssl's way to write it\n")
    assert read_clients(place) == {info.fingerprint}
    with pytest.raises(ConfigError, match="cannot read"):
        read_clients(tmp_path / "nowhere")


@contextlib.contextmanager
def gateway_of(services: t.Services, keys: Path) -> Iterator[tuple[t.Process, Callable[[str], Any]]]:
    """`privinf gateway` as a process, and what a completion of two tokens answers."""
    common = ("--server", services.server_address, "--dealer", services.dealer_address, "--keys", keys, "--api-key", "sk-operation")
    with t.Process("gateway", *common, "--http", "127.0.0.1:0", "--cache", keys.parent / "gateway") as process:
        process.until("page: ")
        url = process.err.split("page: ")[1].split("/\n")[0]

        def ask(prompt: str) -> Any:
            body = json.dumps({"model": "privinf", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}).encode()
            headers = {"Authorization": "Bearer sk-operation", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=PATIENCE) as answer:
                return json.load(answer)

        yield process, ask


def test_processes_answer_prometheus_and_read_their_keys_on_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    shutil.copytree(t.keys(), keys)
    monkeypatch.setattr(t, "keys", lambda: keys)
    common = ("--keys", keys, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--timeout", "20", "--cache", tmp_path / "cache")
    with t.Process("dealer", *common) as dealer:
        dealer.until("dealer listens on")
        at = dealer.err.split("listens on ")[1].split()[0]
        with t.Process("serve", t.lowered_directory(), *common, "--dealer", at) as server:
            server.until("server listens on")
            address = server.err.split("listens on ")[1].split()[0]
            services = t.Services(dealer, server, at, address)
            assert services.generate("--max-new-tokens", 2, "--ignore-eos", "--prompt-ids", "1,2,3").wait() == 0
            places = [process.err.split("http://")[1].split("/")[0] for process in (server, dealer)]
            at_server, at_dealer = map(t.scraped, places)
            assert at_server["privinf_passes_total", "server"] == 2 and at_server["privinf_positions_total", "server"] == 4
            assert at_server["privinf_correlations_total", "server"] == at_dealer["privinf_correlations_total", "dealer"] > 0
            assert at_server["privinf_rounds_total", "client", "online", "server"] > 0
            assert at_server["privinf_bytes_total", "client", "online", "received", "server"] > 0
            assert at_dealer["privinf_bytes_total", "client", "dealer", "offline", "sent"] > 0
            assert at_server["privinf_peers_limit", "server"] == 64

            with gateway_of(services, keys) as (door, ask):
                first = ask("abc")
                renew_keys(keys)
                for process in (dealer, server, door):
                    process.send(signal.SIGHUP)
                    process.until("has read its keys anew")
                turn = ask(f"abc{first['choices'][0]['text']}d")  # the session from before goes on
                assert turn["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
                assert ask("other")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # and a new one shows new certificates
            assert services.generate("--max-new-tokens", 1).wait() == 0
            (keys / "server" / "key.pem").unlink()
            server.send(signal.SIGHUP)
            server.until("the old ones stay")
            assert server.alive
            server.send(signal.SIGTERM)
            assert server.wait() == 0
        with t.Process("dealer", "--keys", keys, "--listen", "127.0.0.1:0", "--metrics", places[1]) as taken:
            assert taken.wait() == 2 and "cannot serve metrics" in taken.err


def test_every_metric_is_documented(tmp_path: Path) -> None:
    """And nothing else is."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    with trio(cache=tmp_path, budget=100) as parties, gateway(parties) as door:
        with door.openai() as client:
            client.completions.create(model="privinf", prompt="abc", max_tokens=1)
        with door.http() as caller:
            answered = caller.get("/metrics").text
        services = [generate_latest(registry_of(partial(service_families, each))).decode() for each in (parties.server, parties.dealer)]
    elsewhere = {"privinf_workers", "privinf_worker_deaths_total"}  # where there are several processes; see tests/workers
    for page, texts in (("gateway.md", [answered]), ("deployment.md", services)):
        shown = {sample.name for text in texts for family in text_string_to_metric_families(text) for sample in family.samples}
        named = set(re.findall(r"`(privinf_[a-z_]+)`", (docs / page).read_text("utf-8")))
        assert {name for name in shown if not name.endswith("_created")} == named - (elsewhere - shown), page
        elsewhere |= named  # of the gateway's the other page may speak
