"""The model that a gateway answers for: its public bundle, its tokenizer, and how prompts and chats become ids."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from privinf.client.conversation import Conversation
from privinf.client.grammar import check
from privinf.client.text import Prompt
from privinf.client.tokenizer import load_tokenizer
from privinf.client.vocabulary import Vocabulary
from privinf.gateway.chat import Chat
from privinf.lowering.lowered import Lowered
from protocols.errors import ConfigError


@dataclass(repr=False)
class Model:
    """What the server has said of it; `logits`: whether it gives them; `trust`: who makes the correlations."""

    lowered: Lowered
    tokenizer: Any
    chat: Chat
    logits: bool
    trust: str

    @classmethod
    def of(cls, conversation: Conversation, template: str | None, most: int) -> Model:
        """Of a session's server; `most` chats may wait for the template. ConfigError if it is no language model, or the template none."""
        lowered = conversation.lowered
        if not lowered.info.is_language_model:
            raise ConfigError("the server's model is no language model", remedy="serve a converted checkpoint")
        tokenizer, session = load_tokenizer(lowered.tokenizer), conversation.session
        return cls(lowered, tokenizer, Chat(lowered, tokenizer, template, most=most), session.gives_logits, session.trust)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The bytes of its tokens; None where it has no tokenizer."""
        return None if self.lowered.tokenizer is None else Vocabulary.read(self.lowered.tokenizer, self.lowered.info.vocab)

    def check_grammar(self, grammar: str) -> None:
        """ConfigError where replies cannot be of this form."""
        check(self.lowered, grammar)

    def read(self, prompt: str | list[int], *, special_tokens: bool) -> tuple[list[int], str | None]:
        """A prompt's ids, and its text if it is one; ConfigError for what the model cannot take."""
        text = prompt if isinstance(prompt, str) else None
        if text is not None and not special_tokens and self.tokenizer is not None:
            return list(Prompt.read(self.lowered, None, self.encode(text) or []).ids), text
        found = Prompt.read(self.lowered, text, None if isinstance(prompt, str) else list(prompt))
        return list(found.ids), text

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text that goes on from another; None unless they stand for exactly this text."""
        if self.tokenizer is None:
            return None
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            return ids if self.tokenizer.decode(ids, skip_special_tokens=False) == text else None
        except ConfigError:  # the text is then no text
            return None
