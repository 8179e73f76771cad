"""Replies of a form: a grammar says at each token which ones may come next, and the client chooses among these.

The grammar stays with the client: the server reveals rounded logits as for any other choice that is not greedy, and sees tokens as ever.
It is kept by llguidance, which is installed with `privinf[gateway]` and imported where a grammar is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import TYPE_CHECKING, Any

from privinf.client.tokenizer import Tokenizer
from privinf.client.vocabulary import Vocabulary
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from privinf.lowering.lowered import Lowered

_COMPACT = {"whitespace_flexible": False}  # each token takes a pass: blanks that say nothing are not written
MOST = 1 << 16
"""Characters of a schema, an expression or a grammar."""


def of_schema(schema: Any) -> str:
    """The grammar of a JSON schema: one value that it holds for; ConfigError where it is none."""
    try:
        return _sized(str(_library().LLMatcher.grammar_from_json_schema(_sized(json.dumps(schema)), overrides=_COMPACT)))
    except (TypeError, ValueError) as error:
        raise _refused(error) from None


def of_regex(expression: str) -> str:
    """The grammar of a regular expression, which the whole reply matches."""
    return str(_library().LLMatcher.grammar_from_regex(_sized(expression)))


def check(lowered: Lowered, grammar: str) -> None:
    """ConfigError where a grammar is none, or the model has no tokenizer."""
    told = _library().LLMatcher.validate_grammar(grammar, _tokenizer(lowered))
    if told and not told.startswith("WARNING"):
        raise _refused(told)


class Mask:
    """Where a reply is in a grammar. It takes the reply's tokens one by one."""

    def __init__(self, lowered: Lowered, grammar: str) -> None:
        self._size = lowered.info.vocab
        self._matcher = _library().LLMatcher(_tokenizer(lowered), grammar, log_level=0)  # its log would go to this process's stderr
        self._check()

    def __repr__(self) -> str:
        return "Mask(hidden)"

    def allowed(self) -> Tensor:
        """Which tokens may come next, (V,) bool."""
        import numpy as np
        import torch

        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        found = torch.from_numpy(bits[: self._size].astype(bool))
        if not bool(found.any()):
            raise ConfigError("no token of the vocabulary goes on with the form that was asked for", remedy="ask for a simpler one")
        return found

    def take(self, token: int) -> bool:
        """A token has come; whether the form is whole with it, so that none can follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


class _Words:
    """A vocabulary as the library reads one."""

    is_tokenizer_wrapper = True

    def __init__(self, lowered: Lowered, data: bytes) -> None:
        found = Vocabulary.read(data, lowered.info.vocab)
        ends = [end for end in lowered.info.eos if end < len(found.tokens)]
        # a model without an end token gets one that it never writes
        self.tokens = [*found.tokens, *([] if ends else [b"<end>"])]
        self.eos_token_id = ends[0] if ends else len(found.tokens)
        self.bos_token_id = None
        self.special_token_ids = sorted({*found.special, *ends, self.eos_token_id})
        self._tokenizer = Tokenizer(data)
        self._ids = {word: number for number, word in enumerate(found.tokens) if word and number not in found.special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Where a form leaves no choice, the text that follows in the tokens that the model is used to; else in the longest ones."""
        data = text.encode() if isinstance(text, str) else text
        with contextlib.suppress(ConfigError):
            ids = self._tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False)
            if b"".join(self.tokens[number] for number in ids) == data:
                return ids
        found: list[int] = []
        while data:
            size = next((size for size in range(min(len(data), self._longest), 0, -1) if data[:size] in self._ids), 0)
            if not size:  # no token begins so
                break
            found.append(self._ids[data[:size]])
            data = data[size:]
        return found


def _tokenizer(lowered: Lowered) -> Any:
    if lowered.tokenizer is None:
        raise ConfigError("this model has no tokenizer, and so no replies of a form", remedy="bring one by --tokenizer FILE")
    return _made(lowered.id, lowered.tokenizer, _Key(lowered))


class _Key:
    """A model in a cache's key, by what is told beside it."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=2)  # of one server, and what it serves after a change
def _made(model: str, data: bytes, key: _Key) -> Any:
    words = _Words(key.lowered, data)
    return _library().LLTokenizer(words, n_vocab=len(words.tokens), eos_token=[words.eos_token_id], slices=[])


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError("replies of a form need llguidance, which is not installed", remedy="pip install 'privinf[gateway]'") from None
    return llguidance


def _sized(text: str) -> str:
    if len(text) > MOST:
        raise ConfigError(f"a form of {len(text)} characters is asked for, and one has at most {MOST}", remedy="ask for a simpler one")
    return text


def _refused(error: object) -> ConfigError:
    line = "".join(letter if letter.isprintable() else " " for letter in str(error)[:300])
    return ConfigError(f"the form that was asked for cannot be used: {line}")
