"""How a chat becomes a prompt: the checkpoint's template, and the plain one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

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
