"""Log-probabilities of tokens, from rounded logits: of new ones, and of a prompt's.

They are the model's own, whatever the temperature or the penalties by which the client chooses, and as exact as rounded logits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MOST = 20
"""Alternatives that are told for a token."""


class Score(NamedTuple):
    """Of one token: its natural logarithm of probability (None for a prompt's first), and the most probable ones in its place."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, token: int, most: int) -> Score:
    """Of a token from the logits before it, (V,) or (1, V); among equals the lower id is the first."""
    import torch

    values = torch.log_softmax(logits.reshape(-1).double(), 0)
    count = min(most, len(values))
    found: list[int] = torch.sort(values, descending=True, stable=True).indices[:count].tolist() if count else []
    return Score(token, float(values[token]), tuple([(each, float(values[each])) for each in found]))


class Scores:
    """Of a reply: those of its tokens, and those of its prompt, as far as they were asked for."""

    def __init__(self) -> None:
        self.new: list[Score] = []
        self.prompt: list[Score] = []

    def __repr__(self) -> str:
        return f"Scores({len(self.prompt)} and {len(self.new)}, hidden)"

    def plain(self) -> dict[str, Any]:
        """As a result has them."""
        found = {"logprobs": self.new, "prompt_logprobs": self.prompt}
        return {name: [each._asdict() for each in scores] for name, scores in found.items() if scores}


class PromptScores:
    """Of a prompt, as the logits of its positions come; the first token has none before it."""

    def __init__(self, ids: Sequence[int], most: int) -> None:
        self._ids, self._most = ids, most
        self.scores = [Score(ids[0], None)]

    def __repr__(self) -> str:
        return f"PromptScores({len(self.scores)} of {len(self._ids)}, hidden)"

    def add(self, rows: Tensor) -> None:
        """Logits of the next positions, (n, V); of the last one there is nothing more to score."""
        for row in rows[: len(self._ids) - len(self.scores)]:
            self.scores.append(score(row, self._ids[len(self.scores)], self._most))
