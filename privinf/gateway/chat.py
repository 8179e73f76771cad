"""A chat becomes a prompt: by the template that the model's public bundle carries, or else plainly.

The plain form is one line a message, `System: ...`, `User: ...`, `Assistant: ...`, and then `Assistant:`; a reply ends before a line that
begins with `User:`. A template is a program of the server's that runs here, in a process of its own (`renderer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from privinf.gateway.renderer import Renderer
from privinf.lowering.lowered import Lowered
from protocols.errors import ConfigError

LABELS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
Message = dict[str, Any]  # `role` and `content`, both texts


class Chat:
    """How the chats of one model become prompts; `close` it. `template` overrides the bundle's, and empty is plain.

    ConfigError if the template is none. `most` chats may wait for it.
    """

    def __init__(self, lowered: Lowered, tokenizer: Any, template: str | None = None, *, most: int = 20) -> None:
        info = lowered.info
        source = info.chat_template if template is None else template
        self.plain = not source
        self.tools = re.search(r"\btools\b", source or "") is not None
        """Whether the template writes down what tools there are."""
        self.stop: tuple[str, ...] = ("\nUser:",) if self.plain else ()
        words = {
            name: (tokenizer.id_to_token(token) if tokenizer is not None and token is not None else None) or ""
            for name, token in (("bos_token", info.bos), ("eos_token", info.eos[0] if info.eos else None))
        }
        self._renderer = Renderer(source, words, most=most) if source else None

    async def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The prompt to which the reply is the next message; ConfigError if it is refused, and see `Renderer.render`."""
        if not messages:
            raise ConfigError("the chat has no message")
        return self._plainly(messages) if self._renderer is None else await self._renderer.render(list(messages), list(tools))

    def close(self) -> None:
        """Ends the template's process."""
        if self._renderer is not None:
            self._renderer.close()

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
