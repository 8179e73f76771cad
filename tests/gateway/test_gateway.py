"""The gateway: the official client unchanged, wrong requests, and what needs a key or a host of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from privinf.gateway.hosts import host_of, is_ours
from tests.support import trio as t
from tests.support.gateway import KEY, MORE, Gateway, gateway, greedy_text, ids_of
from tests.support.trio import Trio, trio

# ---- the official client


def test_the_official_client_lists_models(door: Gateway) -> None:
    client = door.openai()
    assert [model.id for model in client.models.list()] == ["privinf", door.engine.model.lowered.id]
    assert client.models.retrieve("privinf").owned_by == "privinf"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' here"):
        client.models.retrieve("gpt-4o")


def test_the_official_client_completes(door: Gateway, parties: Trio) -> None:
    done = door.openai().completions.create(model="privinf", prompt="def main(", max_tokens=3, temperature=0, extra_body=MORE)
    assert done.choices[0].text == greedy_text(parties, "def main(", 3) and done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (9, 3, 12)


def test_the_official_client_streams(door: Gateway, parties: Trio) -> None:
    stream = door.openai().completions.create(
        model="privinf", prompt="class A", max_tokens=3, stream=True, stream_options={"include_usage": True}, extra_body=MORE
    )
    *pieces, end, usage = list(stream)
    assert len(pieces) == 3 and "".join(piece.choices[0].text for piece in pieces) == greedy_text(parties, "class A", 3)
    assert end.choices[0].finish_reason == "length" and usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == 3 and len({piece.id for piece in [*pieces, end, usage]}) == 1


def test_the_official_client_chats(door: Gateway, parties: Trio) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    prompt = "User: hi\nAssistant:"
    assert len(ids_of(prompt)) < t.POSITIONS
    done = door.openai().chat.completions.create(model="privinf", messages=messages, max_completion_tokens=3, extra_body=MORE)
    expected = greedy_text(parties, prompt, 3).removeprefix(" ")
    assert done.choices[0].message.content == expected and done.choices[0].message.role == "assistant"
    stream = door.openai().chat.completions.create(model="privinf", messages=messages, max_tokens=3, stream=True, extra_body=MORE)
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected


def test_the_official_async_client(door: Gateway, parties: Trio) -> None:
    import asyncio

    async def talk() -> str:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=KEY) as client:
            stream = await client.completions.create(model="privinf", prompt=[1, 2, 3], max_tokens=3, stream=True, extra_body=MORE)
            return "".join([piece.choices[0].text async for piece in stream])

    client = parties.client()
    assert asyncio.run(talk()) == "".join(str(x.text) for x in client.generate(ids=[1, 2, 3], max_new_tokens=3, ignore_eos=True))


def test_sampling_and_stops_by_the_official_client(door: Gateway, parties: Trio) -> None:
    client = door.openai()
    whole = greedy_text(parties, "abc", 5)
    done = client.completions.create(model="privinf", prompt="abc", max_tokens=5, stop=[whole[3:5]], extra_body=MORE)
    assert done.choices[0].text == whole[: whole.find(whole[3:5])] and done.choices[0].finish_reason == "stop"
    texts = {
        client.completions.create(model="privinf", prompt="abc", max_tokens=5, temperature=2.0, seed=seed, extra_body=MORE).choices[0].text
        for seed in (1, -3)
    }
    assert len(texts) == 2


# ---- wrong requests


def test_errors_of_the_official_client(door: Gateway) -> None:
    client = door.openai(max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        openai.OpenAI(base_url=f"{door.url}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4o", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="33 tokens, and the model's context 32") as long:
            client.completions.create(model="privinf", prompt="x" * 33, stream=stream)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="less than or equal to 128"):
        client.completions.create(model="privinf", prompt="x", n=129)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "\xff"}', 400, "UTF-8"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "\\ud800"}', 400, ""),
        ("/v1/completions", b"[]", 400, ""),
        ("/v1/completions", b'{"prompt": "x"}', 400, "model"),
        ("/v1/completions", b'{"model": "privinf"}', 400, "prompt"),
        ("/v1/completions", b'{"model": "privinf", "prompt": 3}', 400, "prompt: give a text"),
        ("/v1/completions", b'{"model": "privinf", "prompt": ""}', 400, "the prompt is empty"),
        ("/v1/completions", b'{"model": "privinf", "prompt": ["a", ""]}', 400, "the prompt is empty"),
        ("/v1/completions", b'{"model": "privinf", "prompt": [97]}', 400, "vocabulary"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "max_tokens": 0}', 400, "max_tokens"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "max_tokens": "9"}', 400, "max_tokens"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "temperature": -1}', 400, "temperature"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "temperature": 1, "top_p": 0}', 400, "top_p"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "logprobs": 21}', 400, "logprobs"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "logprobs": true}', 400, "logprobs: give the number"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "frequency_penalty": 3}', 400, "frequency_penalty"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "logit_bias": {"a": 1}}', 400, "logit_bias"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "logit_bias": {"97": 1}}', 400, "logit_bias: the vocabulary has 97"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "guided_regex": "(a"}', 400, "the form that was asked for cannot"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "guided_regex": "a", "guided_choice": ["b"]}', 400, "one form"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "guided_json": "{"}', 400, "guided_json: the schema is no JSON"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "response_format": {"type": "xml"}}', 400, "response_format"),
        ("/v1/responses", b'{"model": "privinf", "input": []}', 400, "input"),
        ("/v1/responses", b'{"model": "privinf", "input": "x", "previous_response_id": "resp_1"}', 400, "previous_response_id is not"),
        ("/v1/responses", b'{"model": "privinf", "input": "x", "text": {"format": {"type": "xml"}}}', 400, "text.format"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "stop": [""]}', 400, "stop"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "temperature": "0.5"}', 400, "temperature"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "temperature": 1e999}', 400, "temperature"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "temperature": 1, "top_k": 1' + b"0" * 40 + b"}", 400, "top_k"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", 400, "body"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "max_tokens": 1.5}', 400, "max_tokens"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "stream": "yes"}', 400, "stream"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "stop": 3}', 400, "stop"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "stop": ["' + b'a", "' * 30 + b'b"]}', 400, "stop"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "n": 0}', 400, "n: "),
        ("/v1/completions", b'{"model": "privinf", "prompt": ["x", "y"], "n": 65}', 400, "n times the prompts"),
        ("/v1/completions", b'{"model": "privinf", "prompt": "x", "echo": true, "best_of": 2}', 400, "is not supported"),
        ("/v1/completions", b'{"model": "privinf", "prompt": []}', 400, "the prompt is empty"),
        ("/v1/completions", b'{"model": "privinf", "prompt": [1.5]}', 400, "prompt"),
        ("/v1/completions", b'{"model": "privinf", "prompt": [-1]}', 400, "vocabulary"),
        ("/v1/completions", b'{"model": "privinf", "prompt": null}', 400, "prompt"),
        ("/v1/completions", b'{"model": "nobody", "prompt": "x"}', 404, "there is no model 'nobody'"),
        ("/v1/completions", b'{"model": ["privinf"], "prompt": "x"}', 400, "model"),
        ("/v1/completions", b"[" * 100_000, 400, "body"),
        ("/v1/completions", b"", 400, "body"),
        ("/v1/chat/completions", b'{"model": "privinf", "messages": []}', 400, "messages"),
        ("/v1/chat/completions", b'{"model": "privinf", "messages": "hi"}', 400, "messages"),
        ("/v1/chat/completions", b'{"model": "privinf", "messages": [{"content": "x"}]}', 400, "messages.0.role"),
        ("/v1/chat/completions", b'{"model": "privinf", "messages": [{"role": 1, "content": "x"}]}', 400, "messages.0.role"),
        ("/v1/chat/completions", b'{"model": "privinf", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400, "tools"),
        (
            "/v1/chat/completions",
            b'{"model": "privinf", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}',
            400,
            "top_log",
        ),
        (
            "/v1/chat/completions",
            b'{"model": "privinf", "messages": [{"role": "user"}], "tools": [{"type": "function", "function": {"name": "f"}}]}',
            400,
            "the model's chat template knows of none",
        ),
        ("/v1/chat/completions", b'{"model": "privinf", "messages": [{"role": "wizard", "content": "x"}]}', 400, "wizard"),
        (
            "/v1/chat/completions",
            b'{"model": "privinf", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            400,
            "messages.0.content: give a text, or a list of parts",
        ),
        ("/v1/completions", b'{"model": "privinf", "prompt": "' + b"x" * 10_000_000 + b'"}', 413, "larger than"),
        ("/v1/engines", b"{}", 404, "/v1/engines"),
    ],
    ids=lambda value: value.decode("utf-8", "replace")[:60] if isinstance(value, bytes) else None,
)
def test_wrong_requests(door: Gateway, path: str, body: bytes, status: int, says: str) -> None:
    with door.http() as caller:
        answer = caller.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and says in error["message"] and len(error["message"]) < 500


def test_a_body_that_is_not_said_to_be_json(door: Gateway) -> None:
    with door.http() as caller:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            answer = caller.post("/v1/completions", content=b'{"model": "privinf", "prompt": "x"}', headers={"Content-Type": kind})
            assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_a_message_in_parts(door: Gateway, parties: Trio) -> None:
    parts: Any = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    client = door.openai()
    messages: Any = [{"role": "user", "content": parts}]
    done = client.chat.completions.create(model="privinf", messages=messages, max_tokens=2, extra_body=MORE)
    assert done.choices[0].message.content == greedy_text(parties, "User: hi\nAssistant:", 2).removeprefix(" ")
    empty: Any = [{"role": "user"}]
    assert client.chat.completions.create(model="privinf", messages=empty, max_tokens=1).usage is not None


def test_a_body_without_a_length_is_bounded_too(door: Gateway) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100_000

    with door.http() as caller:
        answer = caller.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["message"].startswith("the body is larger")


OPEN = {"/healthz", "/readyz", "/", "/page.js", "/page.css"}


def paths(door: Gateway) -> set[str]:
    """Every path that there is, and one that is not."""
    app: Any = door.service.config.app
    return {route.path.replace("{model}", "privinf") for route in app.routes} | {"/nothing"}


def test_what_needs_a_key_and_what_does_not(door: Gateway) -> None:
    assert paths(door) > OPEN
    with httpx.Client(base_url=door.url) as stranger:
        for path in paths(door):
            answer = stranger.get(path, headers={"Origin": "http://elsewhere.example"})
            assert KEY not in answer.text and answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            if path in OPEN:
                assert answer.status_code == 200 and str(answer.headers).count("privinf_") == answer.text.count("privinf_") == 0
                continue
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer" and stranger.post(path, json={}).status_code == 401
        for key in ("", "Basic x", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer"):
            assert stranger.get("/v1/models", headers={"Authorization": key}).status_code == 401
        answer = stranger.options("/v1/models", headers={"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "GET"})
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "10.1.2.3:80", "127.1", "[::2]:80", "a b", "", "[::1"]
)
def test_a_host_that_is_not_ours_is_answered_nowhere(door: Gateway, host: str) -> None:
    """As a web page sends it whose own name was made to mean our address; with the key too, for that says nothing of whom it came from."""
    with door.http(Host=host) as caller:
        for path in paths(door):
            for answer in (caller.get(path), caller.post(path, json={})):
                assert answer.status_code == 421 and answer.json()["error"]["code"] == "unknown_host", path


def test_hosts_that_are_ours(door: Gateway) -> None:
    for host in ("localhost", "LocalHost.:1", door.address, "127.9.9.9", "[::1]:8080", "[::ffff:127.0.0.1]"):
        with door.http(Host=host) as caller:
            assert caller.get("/healthz").status_code == caller.get("/v1/models").status_code == 200


def test_names_of_hosts() -> None:
    assert [host_of(text) for text in ("A.b:1", "[FE80::1]:2", "x_y", "1.2.3.4")] == ["a.b", "fe80::1", "x_y", "1.2.3.4"]
    for text in ("", ".", ":80", "a:b", "a:80:80", "[::1", "::1", "a/b", "user@a", "a:123456", "[a]", "\xe4"):
        assert host_of(text) is None or not is_ours(str(host_of(text)), frozenset(), "10.0.0.1"), text
    assert is_ours("10.0.0.1", frozenset(), "::ffff:10.0.0.1") and is_ours("fe80::1", frozenset(), "fe80::1%eth0")
    assert is_ours("gw.example", frozenset({"gw.example"}), "10.0.0.1") and not is_ours("10.0.0.2", frozenset(), "10.0.0.1")


def test_a_client_that_asks_for_very_much_gets_what_there_is(door: Gateway) -> None:
    done = door.openai().completions.create(model="privinf", prompt="x" * 28, max_tokens=10**9, extra_body=MORE)
    assert done.usage is not None and done.usage.completion_tokens == t.POSITIONS - 28 + 1


def test_no_logits_no_temperature(tmp_path: Path) -> None:
    with trio(cache=tmp_path, allow_logits=False) as parties, gateway(parties) as door:
        with pytest.raises(openai.BadRequestError, match="temperature must be 0") as found:
            door.openai().completions.create(model="privinf", prompt="x", temperature=0.7)
        assert found.value.param == "temperature" and found.value.code == "no_logits"
        assert door.openai().completions.create(model="privinf", prompt="x", max_tokens=1).usage is not None
