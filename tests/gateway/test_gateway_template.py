"""How a chat becomes a prompt: the checkpoint's template, and the plain one."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privinf.gateway import renderer
from privinf.gateway.chat import Chat
from privinf.gateway.renderer import TemplateFault
from privinf.gateway.template import read_frame
from privinf.lowering.from_checkpoint import chat_template_of
from privinf.lowering.lowered import Lowered
from protocols.errors import ConfigError, HandshakeError
from tests.support import trio as t
from tests.support.gateway import gateway
from tests.support.trio import trio


def test_a_template_travels_from_the_checkpoint_to_the_client(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    shutil.copytree(t.checkpoint(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    from privinf.lowering import convert

    made = convert(tmp_path / "model")
    assert made.info.chat_template == template
    assert Lowered.from_bundle(made.bundle()).info.chat_template == template
    made.save(tmp_path / "lowered")
    assert Lowered.load(tmp_path / "lowered").info.chat_template == template
    made.info = msgspec.structs.replace(made.info, chat_template="x" * 70_000)
    with pytest.raises(HandshakeError, match="chat_template"):
        Lowered.from_bundle(made.bundle())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ""),
        ({"tokenizer_config.json": {}}, ""),
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}}, "d"),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, "b"),
        ({"tokenizer_config.json": {"chat_template": 3}}, None),
        ({"tokenizer_config.json": "{"}, None),
        ({"chat_template.jinja": "x" * 70_000}, None),
    ],
    ids=["nothing", "empty", "text", "named", "file", "number", "no JSON", "too long"],
)
def test_where_a_template_is_found(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if expected is None:
        with pytest.raises(ConfigError, match=str(tmp_path)):
            chat_template_of(tmp_path)
    else:
        assert chat_template_of(tmp_path) == expected


# ---- chats


CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ eos_token }}"
)


HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def chat() -> Iterator[Callable[..., Chat]]:
    """Makes chats of the tiny model, by a template; their processes end with the test."""
    with contextlib.ExitStack() as stack:

        def make(template: str | None, **options: Any) -> Chat:
            made = Chat(t.lowered(), t.tokenizer(), template, **options)
            stack.callback(made.close)
            return made

        yield make


def prompt(made: Chat, messages: Any = HI) -> str:
    return asyncio.run(made.prompt(messages))


def test_a_template_makes_the_prompt(chat: Callable[..., Chat]) -> None:
    made = chat(CHATML)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " hi\ud800 "}]
    expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi\ud800<|im_end|>\n<|im_start|>assistant\n<|end|>"
    assert prompt(made, messages) == expected and made.stop == () and not made.plain
    assert made.shown(" x", first=True) == " x"
    many = [{"role": "user", "content": "\U0001f600" * 50} for _ in range(8000)]  # as long as a body may be
    assert len(prompt(made, many)) > 400_000
    assert prompt(chat("{{ strftime_now('%Y') }}{{ {'a': 'é'} | tojson }}")) == f'{datetime.date.today().year}{{"a": "é"}}'


def test_the_plain_form(chat: Callable[..., Chat]) -> None:
    made = chat(None)  # the tiny model has no template
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt(made, [*messages, {"role": "user", "content": "c"}]) == "System: s\nUser: a\nAssistant: b\nUser: c\nAssistant:"
    assert made.stop == ("\nUser:",) and made.shown(" x", first=True) == "x" and made.shown(" x", first=False) == " x"
    for wrong in ([], [{"role": "tool", "content": "x"}]):
        with pytest.raises(ConfigError):
            prompt(made, wrong)
    assert chat("").plain


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must\x1b[2J alternate') }}", r"refuses this chat: roles must \[2J alternate"),
        ("{{ messages[7].content }}", "refuses this chat"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "refuses this chat"),
        ("{% for i in range(1000000) %}x{% endfor %}", "refuses this chat"),
        ("{% include '/etc/passwd' %}", "refuses this chat"),
    ],
)
def test_a_template_that_refuses(chat: Callable[..., Chat], template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prompt(chat(template))


PATIENT_S = 100.0
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ONLY_THEN = "{{% if messages[0].content == 'now' %}}{}{{% endif %}}fine"
GROWN = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (ENDLESS, "was ended after 1 s|its process ended"),
        (GROWN, "too much memory"),
        ("{% set n = 10 ** 9 %}{{ messages[0].content * n }}", "too much memory"),
        ("{% set n = namespace(l=[0]) %}{% for i in range(64) %}{% set n.l = n.l + n.l %}{% endfor %}", "too much memory"),
        ("{% set n = messages | length + 9 %}{{ n ** (n ** n) }}", "was ended after 1 s|its process ended|too much memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "goes too deep"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}", "longer than"),
        ("{{ 'x' * 2000000 }}", "longer than"),
    ],
    ids=["loops", "doubled", "repeated", "lists", "powers", "recursion", "long", "at once"],
)
def test_a_template_that_does_not_end_or_grows(
    chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, template: str, says: str
) -> None:
    """One clean error; nothing of the chat is logged; the next chat has a process that is as good as new, and this one's is gone."""
    monkeypatch.setattr(renderer, "RENDER_S", PATIENT_S)
    made = chat(ONLY_THEN.format(template) if "macro" not in template else template.replace("{{ m() }}", ONLY_THEN.format("{{ m() }}")))
    assert prompt(made) == "fine"
    before = os.getpid(), t.children_of(os.getpid())
    with monkeypatch.context() as patch, pytest.raises(TemplateFault, match=says):
        patch.setattr(renderer, "RENDER_S", 1.0 if "ended" in says else PATIENT_S)
        prompt(made, [{"role": "user", "content": "now"}])
    assert prompt(made) == "fine"
    assert len(t.children_of(before[0])) == len(before[1]) and not t.running(before[1] - t.children_of(before[0]))
    assert "chat template failed" in caplog.text and "now" not in caplog.text


@pytest.mark.parametrize("template", ["{% if %}", "{{ 9 ** (9 ** 9) }}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
def test_a_template_that_cannot_be_read(chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """What is constant in it is computed when it is read: under the same bounds."""
    monkeypatch.setattr(renderer, "RENDER_S", 1.0)
    with pytest.raises(ConfigError, match="--chat-template") as found:
        chat(template)
    assert "\n" not in str(found.value) and len(str(found.value)) < 600


def test_an_answer_at_the_deadline_takes_no_later_chat_along(chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is ended once it has answered and before the timer is stopped: the next chat has another one."""
    made = chat(CHATML)
    with monkeypatch.context() as patch:
        patch.setattr(renderer, "RENDER_S", 0.5)
        patch.setattr(renderer, "read_frame", lambda stream: (read_frame(stream), time.sleep(1.0))[0])
        assert prompt(made).startswith("<|im_start|>user\nhi")
    assert prompt(made).startswith("<|im_start|>user\nhi")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
def test_nobody_looks_into_a_template_s_process() -> None:
    """PR_GET_DUMPABLE is 3."""
    lines = "import ctypes; from privinf.gateway.template import hide; hide(); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    assert subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout == "0\n"


def test_a_template_s_process_has_no_way_out(chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no environment, no argument that says anything, no file but its pipes, no core; and it ends with the gateway."""
    monkeypatch.setenv("PRIVINF_API_KEY", "sk-of-the-environment")
    before = t.children_of(os.getpid())
    made = chat(CHATML)
    assert prompt(made).startswith("<|im_start|>user\nhi")
    (pid,) = t.children_of(os.getpid()) - before
    place = Path(f"/proc/{pid}")
    assert b"sk-of-the-environment" not in (place / "environ").read_bytes() and b"hi" not in (place / "cmdline").read_bytes()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (place / "limits").read_text().splitlines()}
    assert limits["Max open files"] == limits["Max core file size"] == limits["Max file size"] == limits["Max processes"] == ["0", "0"]
    assert int(limits["Max address space"][0]) <= 1 << 30 and limits["Max cpu time"][0].isdigit()
    made.close()
    assert not t.running({pid})


# ---- in the gateway


def test_templates_that_never_end_hold_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More such chats at once than the event loop's pool has threads: completions are answered meanwhile; and each of them is told why."""
    monkeypatch.setattr(renderer, "RENDER_S", 1.0)
    with (
        trio(cache=tmp_path) as parties,
        gateway(parties, template=ONLY_THEN.format(ENDLESS), active=2, waiting=5) as door,
        door.http() as caller,
    ):
        chats = {"model": "privinf", "messages": [{"role": "user", "content": "now"}], "max_tokens": 1}
        with ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(caller.post, "/v1/chat/completions", json=chats) for _ in range(10)]
            t.wait_for(lambda: sum(each.done() for each in asked) >= 3)  # 2 + 5 may wait
            done = caller.post("/v1/completions", json={"model": "privinf", "prompt": "abc", "max_tokens": 1})
            assert done.status_code == 200 and not all(each.done() for each in asked)
            answers = [each.result() for each in asked]
        assert sorted(answer.status_code for answer in answers) == [429] * 3 + [500] * 7
        for answer in answers:
            error = answer.json()["error"]
            expected = "chat_template_failed" if answer.status_code == 500 else "rate_limit_exceeded"
            assert error["code"] == expected and "chat template" in error["message"]
            assert answer.status_code == 500 or int(answer.headers["Retry-After"]) >= 1
        monkeypatch.setattr(renderer, "RENDER_S", PATIENT_S)
        fine = caller.post("/v1/chat/completions", json={**chats, "messages": HI})
        assert fine.status_code == 200 and fine.json()["usage"]["prompt_tokens"] == len("fine")
        children = t.children_of(os.getpid())
    assert len(t.children_of(os.getpid())) < len(children)
