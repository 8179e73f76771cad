"""Replies that break and go on in a fresh session: the same tokens, the set-up kept, and nothing retried that was refused for a cause."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.client.client import Client
from privinf.client.sampling import Sampler, Sampling
from privinf.server.models import ServedModel
from protocols.errors import ConfigError, HandshakeError, RefusedError, TransportError
from tests.support import trio as t
from tests.support.faults import Fault
from tests.support.ladder import LOGIT_ERROR
from tests.support.trio import Trio, trio
from tests.support.waiting import PATIENCE

PROMPT, COUNT = [1, 2, 3], 8


def ids_of(client: Client, count: int = COUNT, **choice: Any) -> list[int]:
    return [token.id for token in client.generate(ids=PROMPT, max_new_tokens=count, ignore_eos=True, **choice)]


def broken(parties: Trio, client: Client, *, after: int, **choice: Any) -> list[int]:
    """A reply during which the server closes the connection, once `after` tokens are there."""
    tokens = []
    for token in client.generate(ids=PROMPT, max_new_tokens=COUNT, ignore_eos=True, **choice):
        tokens.append(token.id)
        if len(tokens) == after:
            for connection in parties.server.counters.connections:
                connection.close()
    return tokens


# ---- the same reply


@pytest.mark.parametrize("options", [{}, {"chunk": 2, "pad_prompt": 4, "pad_reply": 4}], ids=["plain", "padded"])
def test_a_reply_goes_on_with_the_same_tokens(parties: Trio, options: dict[str, int]) -> None:
    client = parties.client(**options)
    expected = ids_of(client)
    assert client.result is not None and client.result["retries"] == 0
    assert broken(parties, client, after=3, retry=1) == expected
    result = client.result
    assert result["tokens"] == expected and result["retries"] == 1 and result["prompt_tokens"] == len(PROMPT)
    assert len(result["timing"]["per_token_s"]) == COUNT
    assert result["traffic"]["setup"]["payload"] == 0  # it was kept
    assert result["text"] == t.tokenizer().decode(expected)
    with pytest.raises(TransportError):
        broken(parties, client, after=3)


def test_the_seeds_random_numbers_go_on(parties: Trio) -> None:
    """Whatever the rounding of the logits did, each choice is the one that the seed's next number makes."""
    client, sampling = parties.client(), Sampling(temperature=2.0, seed=7)
    tokens = broken(parties, client, after=4, retry=1, sampling=sampling, logits=True)
    sampler = Sampler(sampling)
    assert tokens == [sampler.choose(logits) for logits in client.logits] and len(tokens) == COUNT
    for done, logits in enumerate(client.logits):
        exact = t.float_logits(PROMPT + tokens[:done])
        assert float((logits.reshape(-1) - exact).abs().max()) < LOGIT_ERROR, done
    assert torch.equal(torch.tensor(client.result["tokens"]), torch.tensor(tokens))  # type: ignore[index]


def test_a_stop_text_across_the_break(parties: Trio) -> None:
    client = parties.client()
    text = t.tokenizer().decode(ids_of(client))
    stop = text[3:5]
    sampling = Sampling(stop=(stop,))
    assert text.count(stop) >= 1
    list(client.generate(ids=PROMPT, max_new_tokens=COUNT, ignore_eos=True, sampling=sampling))
    expected = client.result
    assert expected is not None and expected["finish_reason"] == "stop"
    if len(expected["tokens"]) > 4:
        broken(parties, client, after=4, retry=1, sampling=sampling)
        assert client.result is not None
        assert {name: client.result[name] for name in ("text", "tokens", "finish_reason")} == {
            name: expected[name] for name in ("text", "tokens", "finish_reason")
        }


# ---- over processes, with parties that are killed and come back


@pytest.mark.parametrize("role", ["server", pytest.param("dealer", marks=pytest.mark.slow)])
def test_a_party_is_killed_in_the_middle_of_a_reply_and_comes_back(tmp_path: Path, role: str) -> None:
    fault = Fault(role, *(("client:online", 150) if role == "server" else ("client:offline", 12)))
    asked = ("--max-new-tokens", COUNT, "--ignore-eos", "--json", "--cache", tmp_path)
    with t.services(fault=fault) as services:
        client = services.generate(*asked, "--retry", 2)
        with client:
            killed = services.server if role == "server" else services.dealer
            assert killed.wait() == -9
            if role == "server":
                services.server, _ = t.start_server(services.dealer_address, "--listen", t.address_of(services.server))
            else:
                services.dealer, _ = t.start_dealer(listen=t.address_of(services.dealer))
            try:
                assert client.wait() == 0, client.err
                result = json.loads(client.out)
                assert result["retries"] >= 1 and len(result["tokens"]) == COUNT
                assert t.is_greedy(PROMPT, result["tokens"])
                unbroken = services.generate(*asked)
                assert unbroken.wait() == 0
                assert json.loads(unbroken.out)["tokens"] == result["tokens"]
            finally:
                (services.server if role == "server" else services.dealer).end()


# ---- what is not retried


def test_refusals_are_not_retried(tmp_path: Path) -> None:
    with trio(cache=tmp_path, budget=3) as parties:
        client = parties.client()
        with pytest.raises(RefusedError, match="budget of 3 outputs"):
            ids_of(client, retry=5)
        t.wait_for(lambda: not parties.server.counters.connections)
        assert [ended["peer"] for ended in parties.server.counters.ended].count("client") == 1
    with trio(cache=tmp_path, allow_logits=False) as parties, pytest.raises(HandshakeError, match="does not give logits"):
        ids_of(parties.client(), retry=5, logits=True)


def test_another_model_does_not_go_on_with_a_reply(tmp_path: Path) -> None:
    """A server that came back with a new lowering would give other tokens than the old one."""
    with trio(cache=tmp_path) as parties:
        client, tokens = parties.client(), []
        with pytest.raises(HandshakeError, match="another model"):
            for token in client.generate(ids=PROMPT, max_new_tokens=COUNT, ignore_eos=True, retry=1):
                tokens.append(token.id)
                if len(tokens) == 2:
                    parties.server.model = ServedModel(t.lowered(1), parties.server.options)
                    for connection in parties.server.counters.connections:
                        connection.close()
        assert len(tokens) == 2


def test_a_caller_that_turns_away_ends_the_attempts(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties:
        client = parties.client(timeout=4.0)
        reply = client.generate(ids=PROMPT, max_new_tokens=COUNT, ignore_eos=True, retry=100)
        next(reply)
        parties.server.close()
        errors: list[Exception] = []

        def rest() -> None:
            try:
                list(reply)
            except TransportError as error:
                errors.append(error)

        thread = threading.Thread(target=rest)
        thread.start()
        time.sleep(0.5)  # it dials a server that is gone
        assert thread.is_alive()
        client.close()
        thread.join(PATIENCE)
        assert errors and not thread.is_alive() and not client.sessions


def test_wrong_numbers(parties: Trio) -> None:
    for retry in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="whole number of times"):
            parties.client().generate(ids=PROMPT, retry=retry)  # type: ignore[arg-type]
    sessions = len(parties.server.counters.ended)
    with pytest.raises(ConfigError, match="1000000000 new tokens are asked for, and a reply has at most 1048576"):
        ids_of(parties.client(), 10**9)
    assert len(parties.server.counters.ended) == sessions  # nobody was asked
