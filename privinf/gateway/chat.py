"""A chat becomes a prompt: by the template that the model's public bundle carries, or else plainly.

The plain form is one line a message, `System: ...`, `User: ...`, `Assistant: ...`, and then `Assistant:`; a reply ends before a line that
begins with `User:`. A template is a program of the server's that runs here, in Jinja's sandbox, as it does in other runtimes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from privinf.lowering.lowered import Lowered
from protocols.errors import ConfigError

MAX_CHARS = 1 << 20
LABELS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
Message = dict[str, Any]  # `role` and `content`, both texts


class Chat:
    """How the chats of one model become prompts. `template` overrides the bundle's, and empty is plain; ConfigError if it is no Jinja."""

    def __init__(self, lowered: Lowered, tokenizer: Any, template: str | None = None) -> None:
        source = lowered.info.chat_template if template is None else template
        self.plain = not source
        self.stop: tuple[str, ...] = ("\nUser:",) if self.plain else ()
        info = lowered.info
        self._words = {
            name: (tokenizer.id_to_token(token) if tokenizer is not None and token is not None else None) or ""
            for name, token in (("bos_token", info.bos), ("eos_token", info.eos[0] if info.eos else None))
        }
        self._template: Template | None = None
        if source:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
            environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
            environment.globals["raise_exception"] = _refuse
            environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
            try:
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise ConfigError(f"the chat template cannot be read: {error}", remedy="give another one by --chat-template") from None

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt to which the reply is the next message; ConfigError if the template refuses."""
        if not messages:
            raise ConfigError("the chat has no message")
        if self._template is None:
            return self._plainly(messages)
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self._words)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise ConfigError(f"the model's chat template refuses this chat: {what}") from None
        if len(text) > MAX_CHARS:
            raise ConfigError(f"the chat is longer than {MAX_CHARS} characters")
        return text

    def _plainly(self, messages: Sequence[Message]) -> str:
        lines = []
        for message in messages:
            label = LABELS.get(message["role"])
            if label is None:
                raise ConfigError(f"a message has the role {message['role'][:40]!r}", remedy=f"give one of {', '.join(LABELS)}")
            lines.append(f"{label}: {message['content']}\n")
        return "".join(lines) + "Assistant:"

    def shown(self, text: str, *, first: bool) -> str:
        """A piece of a reply as the message's content: in the plain form without the blank after `Assistant:`."""
        return text.removeprefix(" ") if self.plain and first else text


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
