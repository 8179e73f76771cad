"""Prompts and tokens on the client's side: nothing here leaves the client."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from privinf.client.sampling import Stops
from privinf.client.scores import Score
from privinf.client.tokenizer import Tokenizer, load_tokenizer
from privinf.session.options import LONGEST
from protocols.errors import Code, ConfigError

if TYPE_CHECKING:
    from privinf.lowering.lowered import Lowered


@dataclass(frozen=True)
class Token:
    """A new token: its id, the text that it completes (None without a tokenizer), and its log-probability, if that was asked for."""

    id: int
    text: str | None
    score: Score | None = None


def check_length(new_tokens: int) -> None:
    """ConfigError unless a reply can be that long in some model's context."""
    if new_tokens < 1:
        raise ConfigError("at least one new token must be asked for", remedy="give 1 or more")
    if new_tokens > LONGEST:
        raise ConfigError(f"{new_tokens} new tokens are asked for, and a reply has at most {LONGEST}", remedy="ask for fewer")


def whole_numbers(ids: Sequence[int]) -> list[int]:
    """Ids of any integer type; ConfigError for anything else."""
    try:
        return [operator.index(number) for number in ids]
    except TypeError:
        raise ConfigError("prompt ids are whole numbers") from None


@dataclass(frozen=True, repr=False)
class Prompt:
    """The ids of a prompt, checked against the model."""

    ids: tuple[int, ...]
    tokenizer: Tokenizer | None

    @staticmethod
    def read(lowered: Lowered, text: str | None, ids: Sequence[int] | None) -> Prompt:
        """From a text or from ids; ConfigError where it is empty, too long, or not of the vocabulary."""
        info = lowered.info
        if not info.is_language_model:
            raise ConfigError("this model is no language model; it takes tensors, not prompts")
        tokenizer = load_tokenizer(lowered.tokenizer)
        if (text is None) == (ids is None):
            raise ConfigError("give either a prompt or prompt ids")
        if ids is None:
            if tokenizer is None:
                raise ConfigError("this model has no tokenizer", remedy="give the prompt as --prompt-ids 1,2,3")
            if not isinstance(text, str):
                raise ConfigError("the prompt is no text")
            ids = tokenizer.encode(text)
        ids = whole_numbers(ids)
        if not ids:
            raise ConfigError("the prompt is empty", remedy="give at least one token")
        if len(ids) > info.n_positions:
            what = f"the prompt has {len(ids)} tokens, and the model's context {info.n_positions}"
            raise ConfigError(what, remedy="shorten the prompt", code=Code.TOO_LONG)
        if any(not 0 <= number < info.vocab for number in ids):
            raise ConfigError(f"a prompt id is outside of the vocabulary of {info.vocab}")
        return Prompt(tuple(ids), tokenizer)


class Streamer:
    """Turns new tokens into text as they come, up to the first stop text.

    Bytes of a character that is not complete yet are held back, and so is what may become a stop text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()) -> None:
        if stop and tokenizer is None:
            raise ConfigError("this model has no tokenizer, and so no stop texts", remedy="give token ids at which to stop")
        self._tokenizer, self._stops = tokenizer, Stops(stop)
        self._ids: list[int] = []
        self._shown: list[str] = []
        self.text = None if tokenizer is None else ""  # decoded so far

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stops.found

    def add(self, token: int) -> str | None:
        """The text that this token completes."""
        if self._tokenizer is None or self.text is None:
            return None
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        new, self.text = text[len(self.text) :], text
        return self._show(new)

    def rest(self) -> str | None:
        """At the end: what was held back."""
        if self._tokenizer is None or self.text is None:
            return None
        held, self.text = self.text, self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._show(self.text[len(held) :], last=True)

    def _show(self, new: str, *, last: bool = False) -> str:
        self._shown.append(self._stops.add(new, last=last))
        return self._shown[-1]

    def finish(self) -> str | None:
        """The whole text, incomplete characters included."""
        if self.text is None:
            return None
        self.rest()
        return "".join(self._shown)
