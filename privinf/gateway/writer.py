"""Replies as they are written: completions and chats, whole or in pieces, with the log-probabilities of their tokens."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from privinf.client.scores import Score
from privinf.client.vocabulary import Vocabulary


class Counts(Protocol):
    """What a document says of a reply that has ended."""

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt."""

    @property
    def cached_tokens(self) -> int:
        """Of them, those that no pass had to take in again."""

    @property
    def tokens(self) -> int:
        """New ones."""

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`."""


class Said(NamedTuple):
    """A piece of a reply: its text, and the scores of its tokens where they were asked for."""

    text: str
    scores: tuple[Score, ...] | None = None
    calls: tuple[dict[str, Any], ...] = ()  # of tools


class Scores:
    """Log-probabilities of one reply in OpenAI's two forms; where a token begins in the text follows from those before it."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._before = b""

    def legacy(self, scores: Sequence[Score]) -> dict[str, list[Any]]:
        """Of a completion: four lists. Tokens that are no text by themselves are written as bytes, as OpenAI does."""
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in scores:
            made["tokens"].append(self._word(each.token))
            made["token_logprobs"].append(each.logprob)
            made["top_logprobs"].append(None if each.logprob is None else self._tops(each, each.logprob))
            made["text_offset"].append(len(self._before.decode("utf-8", "ignore")))
            self._before += self._text(each.token)
        return made

    def chat(self, scores: Sequence[Score]) -> dict[str, list[Any]]:
        """Of a chat."""
        content = [
            {**self._entry(each.token, each.logprob), "top_logprobs": [self._entry(*other) for other in each.top]} for each in scores
        ]
        return {"content": content, "refusal": []}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    def _tops(self, each: Score, logprob: float) -> dict[str, float]:
        """By their texts, the token's own among them; of two that are written alike the second by its number."""
        found: dict[str, float] = {}
        for token, value in dict([*each.top, (each.token, logprob)]).items():
            word = self._word(token)
            found[f"token_id:{token}" if word in found else word] = value
        return found

    def _word(self, token: int) -> str:
        data = self._bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token: int) -> bytes:
        return str(token).encode() if self._vocabulary is None else self._vocabulary.tokens[token]

    def _text(self, token: int) -> bytes:
        """What it adds to the text; without a tokenizer a reply is ids with blanks between."""
        if self._vocabulary is None:
            return f"{token} ".encode()
        return b"" if token in self._vocabulary.special else self._vocabulary.tokens[token]


class Writer:
    """The documents of the replies to one request, as completions or as chats; `each`: how many of them are to one prompt."""

    def __init__(self, model: str, *, chat: bool, vocabulary: Vocabulary | None = None, each: int = 1) -> None:
        self.chat, self._each = chat, each
        self._vocabulary = vocabulary
        self._scores: dict[int, Scores] = {}
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, said: Sequence[Said], replies: Sequence[Counts]) -> dict[str, Any]:
        """The replies in one piece, as choices in their order."""
        choices = []
        for index, (each, reply) in enumerate(zip(said, replies, strict=True)):
            shown: dict[str, Any] = {"text": each.text}
            if self.chat:
                message = {"role": "assistant", "content": each.text, "refusal": None}
                shown = {"message": message | ({"content": each.text or None, "tool_calls": list(each.calls)} if each.calls else {})}
            choices.append({"index": index, **shown, "logprobs": self._logprobs(index, each), "finish_reason": _finish(each, reply)})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": usage(*replies, each=self._each)}

    def piece(self, said: Said | None = None, *, index: int = 0, first: bool = False, finish: str | None = None) -> str:
        """One event of a stream, of the choice of this index."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        if said is not None:
            delta = {"content": said.text}
            if said.calls:
                delta = {"tool_calls": [{"index": place, **call} for place, call in enumerate(said.calls)]}
        shown: dict[str, Any] = {"delta": delta} if self.chat else {"text": "" if said is None else said.text}
        logprobs = None if said is None else self._logprobs(index, said)
        return self._event([{"index": index, **shown, "logprobs": logprobs, "finish_reason": finish}])

    def last(self, *replies: Counts) -> str:
        """The event with the usage, where it was asked for."""
        return self._event([], usage=usage(*replies, each=self._each))

    def _logprobs(self, index: int, said: Said) -> dict[str, list[Any]] | None:
        if said.scores is None:
            return None
        scores = self._scores.setdefault(index, Scores(self._vocabulary))
        return scores.chat(said.scores) if self.chat else scores.legacy(said.scores)

    def _event(self, choices: list[Any], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return json.dumps({**self._base, "object": kind, "choices": choices, **more}, ensure_ascii=False)


def _finish(said: Said, reply: Counts) -> str:
    return "tool_calls" if said.calls else reply.finish_reason


def usage(*replies: Counts, each: int = 1) -> dict[str, Any]:
    """Tokens of prompts and replies; `cached_tokens`: what a kept conversation had. A prompt with `each` replies to it counts once."""
    firsts = replies[::each]
    prompts, tokens = sum(reply.prompt_tokens for reply in firsts), sum(reply.tokens for reply in replies)
    counts = {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}
    return {**counts, "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in firsts)}}
