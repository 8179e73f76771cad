"""What OpenAI's clients expect beyond text: log-probabilities, forms of replies, penalties, tools, responses; and pages elsewhere."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from starlette.responses import PlainTextResponse

from privinf.gateway.chat import Chat
from privinf.gateway.door import Door, Place
from privinf.gateway.limits import Bounds
from privinf.gateway.metrics import Requests
from privinf.gateway.tools import read_calls
from tests.support import trio as t
from tests.support.gateway import MORE, Gateway, gateway, greedy_text, ids_of
from tests.support.trio import Trio, trio

ERROR = 2 * t.LOGIT_ERROR
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def log_probabilities(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = torch.log_softmax(t.float_model()(torch.tensor([ids]))[0].double(), -1)
    return found


# ---- log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_an_evaluation_scores_its_prompts(door: Gateway, stream: bool) -> None:
    """What lm-evaluation-harness sends, and reads: ids, one more token, the log-probability of each and of the best."""
    prompts = [ids_of("def f("), ids_of("x = 1")]
    made: Any = {"model": "privinf", "prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    answer = door.openai().completions.create(**made, stream=stream, extra_body=MORE)
    texts, found = ["", ""], [dict[str, list[Any]](), dict[str, list[Any]]()]
    for each in answer if stream else [answer]:
        for choice in each.choices:
            texts[choice.index] += choice.text
            for key, values in ({} if choice.logprobs is None else choice.logprobs.model_dump()).items():
                found[choice.index].setdefault(key, []).extend(values)
    for ids, text, scores in zip(prompts, texts, found, strict=True):
        shown, want = t.tokenizer().decode(ids), log_probabilities(ids)
        assert text.startswith(shown) and len(text) == len(shown) + 1
        assert scores["tokens"] == list(text) and scores["text_offset"] == list(range(len(text)))
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        for place, (value, tops) in enumerate(zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True)):
            token = ids[place + 1] if place + 1 < len(ids) else ids_of(text[-1])[0]
            assert abs(value - float(want[place, token])) < ERROR
            assert abs(max(tops.values()) - float(want[place].max())) < ERROR and tops[scores["tokens"][place + 1]] == value


def test_a_prompt_alone_is_scored(door: Gateway) -> None:
    done = door.openai().completions.create(model="privinf", prompt="abc", max_tokens=0, logprobs=0, echo=True)
    choice = done.choices[0]
    assert choice.text == "abc" and choice.logprobs is not None and done.usage is not None and done.usage.completion_tokens == 0
    assert choice.logprobs.tokens == ["a", "b", "c"] and choice.logprobs.top_logprobs is not None
    assert [set(tops or {}) for tops in choice.logprobs.top_logprobs] == [set(), {"b"}, {"c"}]
    again = door.openai().completions.create(model="privinf", prompt="abc", max_tokens=2, echo=True, extra_body=MORE)
    assert again.choices[0].logprobs is None and len(again.choices[0].text) == 5


def test_a_chats_tokens_have_theirs(door: Gateway, parties: Trio) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    made: Any = {"model": "privinf", "messages": messages, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "extra_body": MORE}
    done = door.openai().chat.completions.create(**made)
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content or []
    assert "".join(each.token for each in content) == greedy_text(parties, "User: hi\nAssistant:", 2)
    assert all(each.bytes == list(each.token.encode()) and each.top_logprobs[0].logprob == each.logprob for each in content)
    assert all(len(each.top_logprobs) == 2 for each in content)


def test_callers_of_a_batch_are_scored(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties, gateway(parties, batch=4) as door:
        made: Any = {"model": "privinf", "prompt": ["abc", "x"], "max_tokens": 2, "logprobs": 1, "echo": True, "extra_body": MORE}
        done = door.openai().completions.create(**made)
        for choice, prompt in zip(done.choices, ("abc", "x"), strict=True):
            assert choice.text == prompt + greedy_text(parties, prompt, 2) and choice.logprobs is not None
            assert [value is None for value in choice.logprobs.token_logprobs or []] == [True] + [False] * (len(prompt) + 1)


def test_a_form_that_cannot_go_on_ends_one_callers_reply_alone(tmp_path: Path) -> None:
    """In a session that others share: one caller's form needs a letter that the vocabulary has not."""
    with trio(cache=tmp_path) as parties, gateway(parties, batch=4) as door:
        client, want = door.openai(max_retries=0), greedy_text(parties, "abc", 8)
        client.completions.create(model="privinf", prompt="y", max_tokens=1)
        door.engine.waiting += 1  # nobody who comes now is alone
        stream = client.completions.create(model="privinf", prompt="abc", max_tokens=8, stream=True, extra_body=MORE)
        text = next(stream).choices[0].text
        with pytest.raises(openai.BadRequestError, match=r"no token of the vocabulary|cannot be used"):
            client.completions.create(model="privinf", prompt="x", extra_body={"guided_regex": "\u00e4"})
        assert text + "".join(piece.choices[0].text for piece in stream) == want
        assert door.engine.replies.counts["failed"] == 1 and len(door.engine.conversations._sessions) == 1


# ---- how tokens are chosen


def test_penalties_and_biases(door: Gateway, parties: Trio) -> None:
    client, plain = door.openai(), greedy_text(parties, "abc", 2)
    done = client.completions.create(model="privinf", prompt="abc", max_tokens=3, logit_bias={"34": 100}, extra_body=MORE)
    assert done.choices[0].text == "BBB"
    done = client.completions.create(
        model="privinf", prompt="abc", max_tokens=2, logit_bias={str(ids_of(plain[0])[0]): -100}, frequency_penalty=0.1, extra_body=MORE
    )
    assert plain[0] not in done.choices[0].text


def test_replies_of_a_form(door: Gateway) -> None:
    client = door.openai()
    done = client.completions.create(model="privinf", prompt="abc", max_tokens=9, extra_body={"guided_regex": "(yes|no)!"})
    assert re.fullmatch("(yes|no)!", done.choices[0].text) and done.choices[0].finish_reason == "stop"
    done = client.completions.create(model="privinf", prompt="abc", max_tokens=9, temperature=1, extra_body={"guided_choice": ["a.b", "c"]})
    assert done.choices[0].text in ("a.b", "c")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat = client.chat.completions.create(model="privinf", messages=[{"role": "user", "content": ""}], max_tokens=12, response_format=form)
    assert isinstance(json.loads(chat.choices[0].message.content or "")["a"], bool)


def test_a_server_that_grants_tokens_alone_says_so(tmp_path: Path) -> None:
    """One line for each field that takes logits, before anything is asked of the server; what needs none is answered."""
    with trio(cache=tmp_path, allow_logits=False) as parties, gateway(parties) as door:
        client = door.openai(max_retries=0)
        about: Any = client.models.retrieve("privinf").model_extra
        assert about["privinf"]["grants"] == ["greedy"] and about["privinf"]["logits"] is False
        asked: list[dict[str, Any]] = [{"logprobs": 1}, {"frequency_penalty": 1}, {"presence_penalty": 1}, {"logit_bias": {"1": 1}}]
        asked += [{"response_format": {"type": "json_object"}}, {"guided_regex": "a"}, {"guided_json": {}, "guided_choice": ["a"]}]
        before = parties.server.counters.counts["passes"]
        for fields in asked:
            with pytest.raises(openai.BadRequestError, match=r"takes logits, and this server grants the greedy choice alone") as found:
                client.completions.create(model="privinf", prompt="x", extra_body=fields)
            assert found.value.param in fields and found.value.code == "no_logits" and "\n" not in str(found.value.body)
        assert parties.server.counters.counts["passes"] == before
        none: Any = {"logprobs": None, "frequency_penalty": 0, "response_format": {"type": "text"}, "logit_bias": {}}
        done = client.completions.create(model="privinf", prompt="x", max_tokens=1, echo=True, extra_body=none)
        assert done.choices[0].text.startswith("x")


def test_a_server_that_grants_logits_says_so(door: Gateway) -> None:
    about: Any = door.openai().models.retrieve("privinf").model_extra
    assert {"greedy", "logprobs", "echo", "logit_bias", "response_format"} <= set(about["privinf"]["grants"])
    assert "tools" not in about["privinf"]["grants"]


# ---- tools


def test_calls_of_tools_are_read() -> None:
    text, calls = read_calls('I add. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    assert text == "I add." and calls[0]["function"] == {"name": "add", "arguments": '{"a": 1}'} and calls[0]["id"].startswith("call_")
    text, calls = read_calls('<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": "{}"}</tool_call>')
    assert text == "" and [call["function"]["name"] for call in calls] == ["f", "g"] and len({call["id"] for call in calls}) == 2
    assert read_calls(' {"name": "f", "parameters": {"x": {}}} ')[1][0]["function"]["arguments"] == '{"x": {}}'
    for no in ("<tool_call>{}</tool_call>", '{"name": 3, "arguments": {}}', "[" * 100_000, '<tool_call>{"name": "f"}</tool_call>', ""):
        assert read_calls(no) == (no, ())


def test_a_template_gets_the_tools(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if tools %}{{ tools[0].function.name }}:{% endif %}{% for m in messages %}{{ m.content }}"
    template += "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
    with gateway(parties, template=template) as door:
        assert door.engine.model.chat.tools
        client, asked = door.openai(), list[Any]()
        read = door.engine.model.read
        monkeypatch.setattr(door.engine.model, "read", lambda prompt, **more: asked.append(prompt) or read(prompt, **more))
        call: Any = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
        messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        said = '{"name":"add","arguments":{}}'
        made: Any = {"model": "privinf", "messages": messages, "max_tokens": 29, "tools": [TOOL]}
        done = client.chat.completions.create(**made, extra_body={"guided_choice": ["no"]})
        assert asked == ["add:x7"] and done.choices[0].message.content == "no" and done.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="no tool can be made the choice") as found:
            client.chat.completions.create(**made, tool_choice="required")
        assert found.value.param == "tool_choice"
        made["messages"] = messages[:1]
        made["tools"][0] = {"type": "function", "function": {"name": ""}}
        parts = list(client.chat.completions.create(**made, stream=True, extra_body={"guided_choice": [said]}))
        assert len(said) <= 29 and parts[-1].choices[0].finish_reason == "tool_calls"
        (called,) = [each for part in parts for each in part.choices[0].delta.tool_calls or []]
        assert called.function is not None and called.function.name == "add" and called.function.arguments == "{}" and called.index == 0


def test_a_template_without_tools(parties: Trio) -> None:
    chat = Chat(parties.server.model.lowered, None, "{% for m in messages %}{{ m.content }}{% endfor %}")
    try:
        assert not chat.tools
    finally:
        chat.close()


# ---- responses


def test_the_responses_of_the_official_client(door: Gateway, parties: Trio) -> None:
    client, want = door.openai(), greedy_text(parties, "User: hi\nAssistant:", 3).removeprefix(" ")
    done = client.responses.create(model="privinf", input="hi", max_output_tokens=3, metadata={"a": "b"}, extra_body=MORE)
    assert done.metadata == {"a": "b"}
    assert done.output_text == want and done.status == "incomplete" and done.usage is not None and done.usage.output_tokens == 3
    assert done.incomplete_details is not None and done.incomplete_details.reason == "max_output_tokens"
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    events = list(client.responses.create(model="privinf", input=items, max_output_tokens=3, stream=True, extra_body=MORE))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert events[0].type == "response.created" and last.type == "response.incomplete" and last.response.output_text == want
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": [1]}}}
    short = client.responses.create(model="privinf", input="hi", instructions="a", text=form, max_output_tokens=3)
    assert short.output_text == "1" and short.status == "completed"
    with pytest.raises(openai.BadRequestError, match="the model's context 32"):
        client.responses.create(model="privinf", input="x" * 40)


# ---- pages elsewhere


def test_pages_of_named_origins_alone_may_read_what_it_answers(parties: Trio) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    with gateway(parties, origins=("https://app.example",)) as door, door.http() as caller:
        mine, other = {"Origin": "https://app.example"}, {"Origin": "https://other.example"}
        before = caller.options("/v1/completions", headers={**mine, **asks, "Authorization": ""})  # a browser asks without the key
        assert before.status_code == 200 and before.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert (
            "authorization" in before.headers["Access-Control-Allow-Headers"].lower()
            and "POST" in before.headers["Access-Control-Allow-Methods"]
        )
        assert "Access-Control-Allow-Credentials" not in before.headers
        inner = {"Access-Control-Request-Private-Network": "true"}  # of a page of the Internet that calls this machine
        granted, refused = (caller.options("/v1/completions", headers={**whose, **asks, **inner}) for whose in (mine, other))
        assert granted.status_code == 200 and granted.headers["Access-Control-Allow-Private-Network"] == "true"
        assert refused.status_code == 400 and "Access-Control-Allow-Origin" not in refused.headers
        listed = caller.get("/v1/models", headers=mine)
        assert listed.status_code == 200 and listed.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert caller.get("/v1/models", headers={**mine, "Authorization": "Bearer wrong"}).status_code == 401
        for answer in (caller.options("/v1/completions", headers={**other, **asks}), caller.get("/v1/models", headers=other)):
            assert "Access-Control-Allow-Origin" not in answer.headers
        stranger = caller.options("/v1/completions", headers={**mine, **asks, "Host": "elsewhere.example"})
        assert stranger.status_code == 421 and "Access-Control-Allow-Origin" not in stranger.headers
    with gateway(parties) as door, door.http() as caller:
        answer = caller.options("/v1/completions", headers={**mine, **asks})
        assert answer.status_code == 405 and "Access-Control-Allow-Origin" not in answer.headers


def test_no_page_reads_metrics_without_the_key() -> None:
    """Where they are answered without it, an origin that is named gets no more than any other."""
    place = Place(metrics=("127.0.0.1", 9), origins=frozenset({"https://app.example"}))
    door = Door(PlainTextResponse("numbers"), key="k", requests=Requests(), bounds=Bounds(), place=place)
    mine, asks = {"Origin": "https://app.example"}, {"Access-Control-Request-Method": "GET"}

    async def asked(port: int) -> list[tuple[int, bool]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url=f"http://127.0.0.1:{port}") as caller:
            answers = await caller.get("/metrics", headers=mine), await caller.options("/metrics", headers={**mine, **asks})
            return [(each.status_code, "access-control-allow-origin" in each.headers) for each in answers]

    assert asyncio.run(asked(8)) == [(401, True), (200, True)]
    assert asyncio.run(asked(9)) == [(200, False), (200, False)]
