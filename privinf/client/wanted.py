"""What is asked for after a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from privinf.client.sampling import GREEDY, Sampling
from privinf.client.text import check_length
from privinf.session.options import MAX_NEW_TOKENS


class Wishes(TypedDict, total=False):
    """The keyword arguments by which callers give the fields of `Wanted`; each has its default there."""

    max_new_tokens: int
    ignore_eos: bool
    logits: bool
    sampling: Sampling


@dataclass(frozen=True)
class Wanted:
    """What is asked for after a prompt, see `Client.generate`; ConfigError where no reply can be that long."""

    max_new_tokens: int = MAX_NEW_TOKENS
    ignore_eos: bool = False
    logits: bool = False
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        check_length(self.max_new_tokens)

    @property
    def revealed(self) -> bool:
        """Whether the client learns rounded logits, and chooses the token itself."""
        return self.logits or not self.sampling.greedy
