"""The gateway: what a next turn sends, a full house, callers that leave, its metrics and its page without a demo."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from privinf.client.conversation import Conversation
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.gateway import KEY, MORE, Gateway, gateway, greedy_text, ids_of
from tests.support.trio import Trio, trio, wait_for
from tests.support.waiting import PATIENCE

# ---- turns


def test_a_next_turn_sends_only_what_is_new(parties: Trio) -> None:
    with gateway(parties, new_tokens=3) as door:
        client = door.openai()
        messages: Any = [{"role": "user", "content": "a"}]
        first = client.chat.completions.create(model="privinf", messages=messages, extra_body=MORE)
        assert first.usage is not None and first.usage.prompt_tokens_details is not None
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        reply = str(first.choices[0].message.content)
        held = door.engine.conversations.idle[-1]
        so_far = held.conversation.ids
        assert so_far[: first.usage.prompt_tokens] == ids_of("User: a\nAssistant:") and len(so_far) == first.usage.prompt_tokens + 3
        # the text of the plain template, as a completion, for the tiny model has no room for another turn of a chat
        prompt = (held.text or "") + "z"
        assert reply in prompt
        second = client.completions.create(model="privinf", prompt=prompt, max_tokens=2, extra_body=MORE)
        assert second.usage is not None and second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens == len(so_far) - 1
        assert door.engine.conversations.idle[-1] is held and t.is_greedy([*so_far, *ids_of("z")], held.conversation.ids[-2:])
        other = client.completions.create(model="privinf", prompt="another", max_tokens=1, extra_body=MORE)
        assert other.usage is not None and other.usage.prompt_tokens_details is not None
        assert other.usage.prompt_tokens_details.cached_tokens == 0
        assert len(door.engine.conversations.idle) == 2 and parties.server.peers >= 2


def test_kept_conversations_are_few_and_end(parties: Trio) -> None:
    with gateway(parties, kept=2, keep_s=1.0) as door:
        client = door.openai()
        for prompt in "abcd":
            client.completions.create(model="privinf", prompt=prompt, max_tokens=1, extra_body=MORE)
        assert len(door.engine.conversations.idle) == 2
        wait_for(lambda: len(door.engine.conversations.idle) == 0)
        wait_for(lambda: not door.engine.client.sessions)
        done = client.completions.create(model="privinf", prompt="abc", max_tokens=1, extra_body=MORE)
        assert done.usage is not None and done.usage.completion_tokens == 1


def test_a_kept_conversation_that_died_is_replaced(parties: Trio) -> None:
    with gateway(parties) as door:
        client = door.openai(max_retries=0)
        client.completions.create(model="privinf", prompt="abc", max_tokens=2, extra_body=MORE)
        (held,) = door.engine.conversations.idle
        for connection in held.conversation.session.lines.dialled:
            connection.close()
        prompt = f"{held.text}d"
        done = client.completions.create(model="privinf", prompt=prompt, max_tokens=2, extra_body=MORE)
        assert done.usage is not None and done.usage.prompt_tokens_details is not None
        assert done.usage.prompt_tokens_details.cached_tokens == 0 and done.choices[0].text == greedy_text(parties, prompt, 2)


def test_a_slow_tokenizer_holds_up_no_other_reply(parties: Trio) -> None:
    """While one caller's prompt is compared with what is kept, others open, keep and end conversations."""
    with gateway(parties) as door, door.openai() as client:
        client.completions.create(model="privinf", prompt="abc", max_tokens=1, extra_body=MORE)
        kept = door.engine.conversations
        (held,) = kept.idle
        assert held.text is not None and len(held.text) == 4

        def encode(text: str) -> list[int]:
            client.completions.create(model="privinf", prompt="other", max_tokens=1, extra_body=MORE, timeout=PATIENCE)
            return ids_of(text)

        found = kept.follow([1], f"{held.text}z", encode)
        assert found is not None and found[0] is held and held not in kept.idle and len(kept.idle) == 1
        kept.keep(held)

        def taken(text: str) -> list[int]:
            client.completions.create(model="privinf", prompt=f"{held.text}z", max_tokens=1, extra_body=MORE, timeout=PATIENCE)
            return ids_of(text)

        assert kept.follow([1], f"{held.text}z", taken) is None  # by another reply, in the meantime


# ---- many callers, and callers that leave


def test_callers_at_a_time_get_their_own_replies(parties: Trio) -> None:
    prompts = ["first", "second one", "x"]
    expected = [greedy_text(parties, prompt, 2) for prompt in prompts]
    with gateway(parties, active=2) as door:
        client = door.openai()

        def ask(prompt: str) -> str:
            return client.completions.create(model="privinf", prompt=prompt, max_tokens=2, extra_body=MORE).choices[0].text

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, prompts)) == expected


def test_a_full_gateway_says_when_to_come_again(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    with gateway(parties, active=1, waiting=1) as door, door.http() as caller:
        go, generate = threading.Event(), Conversation.generate
        monkeypatch.setattr(Conversation, "generate", lambda *words, **options: go.wait(60) and generate(*words, **options))
        body = {"model": "privinf", "prompt": "x", "max_tokens": 1, **MORE}
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(caller.post("/v1/completions", json=body))

        threads = [threading.Thread(target=ask) for _ in range(8)]  # all at once
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) == 6)
        assert door.engine.active == 1 and door.engine.waiting == 1
        for answer in answers:
            assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
            assert "1 reply is being made and 1 caller waits" in answer.json()["error"]["message"]  # whenever it was asked
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
        go.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 6
        assert caller.post("/v1/completions", json=body).status_code == 200


def test_a_gateway_where_nobody_may_wait(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    with gateway(parties, active=2, waiting=0) as door, door.openai(max_retries=0) as client:
        go = threading.Event()
        monkeypatch.setattr(door.engine.model, "read", lambda prompt, **_: go.wait(60) and ([1], None))  # before anything is made
        ask = partial(client.completions.create, model="privinf", prompt="x", max_tokens=1, extra_body=MORE)
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ask) for _ in range(2)]
            wait_for(lambda: door.engine.waiting == 2)
            with pytest.raises(openai.RateLimitError, match="2 replies are being made and nobody may wait"):
                ask()
            go.set()
            assert all(each.result().usage.completion_tokens == 1 for each in asked)


def test_a_full_server_says_when_to_come_again(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    with gateway(parties) as door, Conversation(parties.client()):
        client = door.openai(max_retries=0)
        client.completions.create(model="privinf", prompt="abc", max_tokens=1, extra_body=MORE)
        assert len(door.engine.conversations.idle) == 1
        monkeypatch.setattr(parties.server, "options", replace(parties.server.options, sessions=1))
        with pytest.raises(openai.RateLimitError, match="come again later") as found:
            client.completions.create(model="privinf", prompt="other", max_tokens=1, extra_body=MORE)
        assert int(found.value.response.headers["Retry-After"]) >= 1
        assert len(door.engine.conversations.idle) == 0  # it was given up to make room
        monkeypatch.undo()
        assert client.completions.create(model="privinf", prompt="other", max_tokens=1, extra_body=MORE).usage is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_leaves_ends_the_protocol_at_all_three(tmp_path: Path, stream: bool) -> None:
    with trio(cache=tmp_path) as parties, gateway(parties, kept=0) as door:
        wait_for(lambda: door.engine.client.sessions)
        body = {"model": "privinf", "prompt": "x", "max_tokens": 30, "stream": stream, **MORE}
        patience = httpx.Timeout(60, read=60 if stream else 0.3)
        with (
            door.http() as caller,
            pytest.raises(httpx.HTTPError),
            caller.stream("POST", "/v1/completions", json=body, timeout=patience) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data"):
                    raise httpx.ReadError("enough")
        wait_for(lambda: door.engine.active == 0)
        wait_for(lambda: not door.engine.client.sessions and not door.engine.conversations.live)
        wait_for(lambda: not parties.server.peers and not parties.dealer.peers)
        assert door.engine.replies.counts["cancelled"] == 1 and door.engine.replies.counts["failed"] == 0
        done = door.openai().completions.create(model="privinf", prompt="x", max_tokens=1, extra_body=MORE)
        assert done.usage is not None


def test_a_server_that_goes_in_the_middle(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties, gateway(parties, client=parties.client(timeout=2.0)) as door:
        client = door.openai(max_retries=0)
        stream = client.completions.create(model="privinf", prompt="x", max_tokens=30, stream=True, extra_body=MORE)
        next(stream)
        parties.server.close()
        with pytest.raises(openai.APIError, match=r"closed|ended|gave up|stopped"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="could not connect") as found:
            client.completions.create(model="privinf", prompt="y", max_tokens=1)
        assert found.value.status_code == 503 and found.value.response.headers["Retry-After"]


# ---- health and metrics


def test_metrics_say_what_moved_and_nothing_else(parties: Trio) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with gateway(parties) as door, door.http() as caller:
        assert caller.get("/healthz").json() == {"status": "ok", "model": door.engine.model.lowered.id}
        secret = "zq!Xy"
        door.openai().completions.create(model="privinf", prompt=secret, max_tokens=3, extra_body=MORE)
        caller.get("/v1/secret-path")
        wait_for(lambda: not door.engine.active)  # the thread that made the reply leaves after its last word is out
        text = caller.get("/metrics").text
        assert secret not in text and KEY not in text and "secret-path" not in text
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

        def value(name: str, **labels: str) -> float:
            return samples[name, tuple(sorted(labels.items()))]

        (held,) = door.engine.conversations.live
        online = held.conversation.session.connection.meter.total("online")
        assert value("privinf_tokens_total") == 3 and value("privinf_prompt_tokens_total") == 5
        assert value("privinf_bytes_total", role="client", peer="server", phase="online", direction="sent") == online.sent > 0
        assert value("privinf_rounds_total", role="client", peer="server", phase="online") == online.rounds > 0
        assert value("privinf_bytes_total", role="client", peer="dealer", phase="offline", direction="received") > 0
        assert value("privinf_correlations_total") == held.conversation.session.store.next_name - 1 > 0
        assert value("privinf_replies_total", end="done") == 1 and value("privinf_kept_conversations") == 1
        assert (
            value("privinf_active_replies")
            == value("privinf_waiting_replies")
            == value("privinf_prepared_queries_total")
            == value("privinf_shared_replies_total")
            == 0
        )
        assert value("privinf_active_replies_limit") == 4 and value("privinf_waiting_replies_limit") == 16
        assert value("privinf_seconds_total", phase="online") > 0
        assert value("privinf_requests_total", path="/v1/completions", status="200") == 1
        assert value("privinf_requests_total", path="other", status="404") == 1


def test_the_pages_stream_without_a_demo(door: Gateway) -> None:
    with door.http() as caller:
        about = caller.get("/page/about").json()
        assert about["demo"] is False and about["trust"]["name"] == "dealer"
        answer = caller.post("/page/reply", json={"prompt": "abc", "max_tokens": 2})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
        assert events.count("token") >= 1 and "counters" in events and "seen" not in events and events[-1] == "done"
        datas = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
        last = [data for data in datas if "client" in data][-1]
        assert last["client"]["server"]["online"]["rounds"] > 0 and set(last) == {"client"}
        wrong = caller.post("/page/reply", json={"prompt": "x" * 40})
        assert "context 32" in wrong.text


def test_the_page_of_two_parties_alone(tmp_path: Path) -> None:
    with duo(cache=tmp_path) as pair, gateway(pair) as door:
        with door.http() as caller:
            about = caller.get("/page/about").json()
            assert about["trust"] == {"name": "two-party", "text": "semi-honest server and client, and no third party"}
            assert about["parties"] == {"server": pair.server.address}
            answer = caller.post("/page/reply", json={"prompt": "abc", "max_tokens": 2})
            datas = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
            moved = [data for data in datas if "client" in data][-1]["client"]
            assert moved["server"]["offline"]["payload"] > moved["server"]["online"]["payload"] > 0
            assert moved["dealer"]["offline"]["payload"] == 0
        done = door.openai().completions.create(model="privinf", prompt="abcd", max_tokens=2, extra_body=MORE)
        assert done.usage is not None and t.is_greedy(ids_of("abcd"), door.engine.conversations.idle[-1].conversation.ids[-2:])
