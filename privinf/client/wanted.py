"""What is asked for after a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from privinf.client.sampling import GREEDY, Sampling
from privinf.client.scores import MOST
from privinf.client.text import check_length
from privinf.session.options import MAX_NEW_TOKENS
from protocols.errors import ConfigError


class Wishes(TypedDict, total=False):
    """The keyword arguments by which callers give the fields of `Wanted`; each has its default there."""

    max_new_tokens: int
    ignore_eos: bool
    logits: bool
    sampling: Sampling
    logprobs: int | None
    score_prompt: bool


@dataclass(frozen=True)
class Wanted:
    """What is asked for after a prompt, see `Client.generate`; ConfigError where no reply can be that long.

    With `logprobs` each new token has its log-probability and those of so many alternatives, and with `score_prompt` the prompt's too.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    ignore_eos: bool = False
    logits: bool = False
    sampling: Sampling = GREEDY
    logprobs: int | None = None
    score_prompt: bool = False

    def __post_init__(self) -> None:
        check_length(self.max_new_tokens)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST:
            raise ConfigError(f"log-probabilities are told of 0 to {MOST} alternatives", remedy="ask for fewer")
        if self.score_prompt and self.logprobs is None:
            raise ConfigError("a prompt is scored with log-probabilities", remedy="give their number of alternatives, 0 say")

    @property
    def revealed(self) -> bool:
        """Whether the client learns rounded logits, and chooses the token itself."""
        return self.logits or self.logprobs is not None or self.sampling.takes_logits
