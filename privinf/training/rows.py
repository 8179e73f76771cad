"""The penalty that keeps the rows of attention within a range, so that a private softmax over them needs no maximum.

PaLM's z-loss (arXiv 2204.02311) is the precedent, for the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def logarithms(queries: Tensor, keys: Tensor) -> Tensor:
    """q, k (B, H, T, d_k), q scaled -> (B, H, T): the log-sum-exp of every causal row of scores."""
    scores = queries.float() @ keys.float().transpose(2, 3)  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).logsumexp(-1)


def row_penalty(queries: Sequence[Tensor], keys: Sequence[Tensor], low: float, high: float) -> Tensor:
    """By how much the log-sum-exps of all layers' rows are outside [low, high], mean of squares over rows, sum over layers."""
    total = torch.zeros(())
    for q, k in zip(queries, keys, strict=True):
        rows = logarithms(q, k)
        total = total + ((rows - high).relu() + (low - rows).relu()).square().mean()
    return total
