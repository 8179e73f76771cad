"""What a model is worth: the loss on text, the largest values that a private pass would have to hold, the entropy of its heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privinf.models.base import Activations
from privinf.training.corpus import Tokens
from privinf.training.entropy import head_entropy
from privinf.training.families import Trained


class Largest(NamedTuple):
    """The largest magnitudes met; `bound` is max_i |q_i| max_j |k_j| within a head."""

    score: float = 0.0
    bound: float = 0.0
    residual: float = 0.0
    logit: float = 0.0

    def with_pass(self, trace: Activations, logits: Tensor, *, causal: bool = True) -> Largest:
        """After one more pass; the scores of all pairs, or with `causal` of those under the mask."""
        score, bound, residual, logit = self
        for q, k in zip(trace.queries, trace.keys, strict=True):
            scores = q @ k.transpose(2, 3)
            score = max(score, _most(scores.tril() if causal else scores))
            bound = max(bound, _most(q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)))
        return Largest(score, bound, max([residual, *map(_most, trace.residual)]), max(logit, _most(logits)))


def _most(x: Tensor) -> float:
    return float(x.abs().max())


@torch.no_grad()
def evaluate(model: Trained, tokens: Tokens, length: int, windows: int | None = None, *, values: bool = True) -> dict[str, float]:
    """Held-out loss over windows of `length` tokens, all, or the first `windows` spread evenly; with `values` also the largest met."""
    stream = tokens.held_out
    model.eval()
    starts = list(range(0, max(1, len(stream) - length - 1), length))
    if windows is not None and len(starts) > windows:
        starts = [starts[index * len(starts) // windows] for index in range(windows)]
    total, count = 0.0, 0
    largest = Largest()
    for ids in _windows(stream, starts, length):
        trace = Activations() if values else None
        logits = model(ids[:, :-1], trace=trace)  # (B, T, V)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
        if trace is not None:
            largest = largest.with_pass(trace, logits)
    loss_per_token = total / count
    result = {
        "held_out_loss": loss_per_token,
        "held_out_perplexity": math.exp(min(loss_per_token, 50)),
        "bits_per_byte": loss_per_token / math.log(2) * (len(stream) - 1) / tokens.held_out_bytes,
        "held_out_tokens": float(count),
    }
    if not values:
        return result
    return result | {"max_score": largest.score, "max_residual": largest.residual, "max_logit": largest.logit}


def _windows(stream: NDArray[np.uint16], starts: list[int], length: int) -> Iterator[Tensor]:
    for first in range(0, len(starts), 8):
        rows = [stream[start : start + length + 1] for start in starts[first : first + 8]]
        for size in sorted({len(row) for row in rows}, reverse=True):  # the last window may be shorter
            yield torch.from_numpy(np.stack([row for row in rows if len(row) == size]).astype(np.int64))


@torch.no_grad()
def continue_text(model: Trained, ids: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation of a prompt, up to an end token, `new_tokens` or the last position."""
    model.eval()
    out = list(ids)
    for _ in range(min(new_tokens, model.config.n_positions - len(ids) + 1)):
        out.append(int(model(torch.tensor([out]), last_only=True)[0].argmax()))
        if out[-1] in model.config.stop_ids:
            break
    return out[len(ids) :]


def spread_windows(stream: NDArray[np.uint16], count: int, length: int) -> Tensor:
    """Up to `count` windows (N, length + 1) of a stream, spread evenly over it."""
    last = len(stream) - length - 1
    if last < 0:
        return torch.from_numpy(stream[None].astype(np.int64))
    starts = sorted({index * last // max(1, count - 1) for index in range(count)})
    return torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64))


@torch.no_grad()
def entropy_of_heads(model: Trained, ids: Tensor) -> Tensor:
    """ids (N, T) -> (L, H): the mean entropy of each head in nats; at most log T, and (log T!) / T where every position looks evenly."""
    model.eval()
    total = torch.zeros(model.config.n_layer, model.config.n_head, dtype=torch.float64)
    for part in torch.split(ids, 4):
        trace = Activations(keep_attention=True)
        model(part, trace=trace)
        total += torch.stack([head_entropy(a).sum(dim=0) for a in trace.attention]).double()
    return total / len(ids)


@torch.no_grad()
def token_loss(model: Trained, ids: Tensor) -> float:
    """ids (N, T + 1) -> the mean cross entropy in nats per token."""
    model.eval()
    total = 0.0
    for part in torch.split(ids, 8):
        total += float(nn.functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / ids[:, 1:].numel()
