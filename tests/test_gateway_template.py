"""How a chat becomes a prompt: the checkpoint's template, and the plain one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privinf.gateway.chat import Chat
from privinf.lowering.from_checkpoint import chat_template_of
from privinf.lowering.lowered import Lowered
from protocols.errors import ConfigError, HandshakeError
from tests import trio as t


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


def chat(template: str | None) -> Chat:
    return Chat(t.lowered(), t.tokenizer(), template)


def test_a_template_makes_the_prompt() -> None:
    made = chat(CHATML)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " hi "}]
    expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|end|>"
    assert made.prompt(messages) == expected and made.stop == () and not made.plain
    assert made.shown(" x", first=True) == " x"


def test_the_plain_form() -> None:
    made = chat(None)  # the tiny model has no template
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert made.prompt([*messages, {"role": "user", "content": "c"}]) == "System: s\nUser: a\nAssistant: b\nUser: c\nAssistant:"
    assert made.stop == ("\nUser:",) and made.shown(" x", first=True) == "x" and made.shown(" x", first=False) == " x"
    for wrong in ([], [{"role": "tool", "content": "x"}]):
        with pytest.raises(ConfigError):
            made.prompt(wrong)
    assert chat("").plain


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refuses this chat"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "refuses this chat"),
        ("{% for i in range(1000000) %}x{% endfor %}", "refuses this chat"),
        ("{{ 'x' * 2000000 }}", "longer than"),
    ],
)
def test_a_template_that_refuses_or_misbehaves(template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chat(template).prompt([{"role": "user", "content": "hi"}])


def test_a_template_that_is_none() -> None:
    with pytest.raises(ConfigError, match="--chat-template"):
        chat("{% if %}")
