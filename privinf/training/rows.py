"""The penalty that keeps the rows of attention within a range, so that a private softmax over them needs no maximum.

A softmax does not see a number that is added to all scores of a query. So the range is asked of what is left when an affine function
of the layer's input has been added, one a head, which is learned with the rest (`Attention.row_offset`) and begins as a fit.
PaLM's z-loss (arXiv 2204.02311) is the precedent, for the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from privinf.models.aero import AeroModel, Attention
from privinf.models.base import Activations
from privinf.training.settings import Settings

LARGEST_PART = 0.2  # of each head's largest excess beside the mean of squares: a single row out of range is one too many
STRANGE_PART = 0.3  # of text that is none
FITS = 5  # of which each counts the rows more that the one before missed by more
RIDGE = 1e-7


def logarithms(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (B, H, T, d_k), q scaled -> log-mean-exp and largest of every causal row of scores, (B, H, T) each."""
    scores = queries.float() @ keys.float().transpose(2, 3)  # (B, H, T, T)
    size = scores.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    length = torch.arange(1, size + 1, device=scores.device).log()  # (T,)
    return scores.logsumexp(-1) - length, scores.amax(-1)


def row_penalty(trace: Activations, settings: Settings, few: int | None = None) -> Tensor:
    """By how much rows are out of range, in the first `few` sequences: the log-mean-exps of [low, high], and scores above `top`.

    The mean of squares over rows, and a part of each head's largest; a sum over layers.
    """
    total = torch.zeros(())
    for q, k, offset in zip_longest(trace.queries, trace.keys, trace.offsets):
        mean, most = logarithms(q[:few], k[:few])
        if offset is not None:
            added = offset[:few].float()
            mean, most = mean + added, most + added
        excess = (settings.row_low - mean).relu() + (mean - settings.row_high).relu() + (most - settings.row_top).relu()
        total = total + excess.square().mean() + LARGEST_PART * excess.amax((0, 2)).mean()
    return total


def strange(ids: Tensor, vocabulary: int) -> Tensor:
    """(B, T) -> (2, T): one token again and again, and tokens without order; which ones, a batch's first sequence says."""
    first, places = ids[0], torch.arange(ids.shape[1], device=ids.device)
    return torch.stack([first[:1].expand_as(first), ((first + 1) * 7919 + (places + first[-1]) * 104729) % vocabulary])


@torch.no_grad()
def fit_offsets(model: AeroModel, batches: Sequence[Tensor], middle: float) -> None:
    """Sets the offsets to those affine functions that leave the log-mean-exps nearest to `middle`, the farthest counting most."""
    attentions = [part for part in model.modules() if isinstance(part, Attention) and part.row_offset is not None]
    read: list[list[Tensor]] = [[] for _ in attentions]
    hooks = [
        part.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].flatten(0, 1)))
        for part, kept in zip(attentions, read, strict=True)
    ]
    rows: list[list[Tensor]] = [[] for _ in attentions]
    model.eval()
    for ids in batches:
        trace = Activations()
        model(ids, trace=trace)
        for kept, q, k in zip(rows, trace.queries, trace.keys, strict=True):
            kept.append(logarithms(q, k)[0].transpose(1, 2).flatten(0, 1))  # (B T, H)
    for hook in hooks:
        hook.remove()
    for part, inputs, wanted in zip(attentions, read, rows, strict=True):
        assert part.row_offset is not None
        weight, bias = affine_fit(torch.cat(inputs), middle - torch.cat(wanted))
        part.row_offset.weight.copy_(weight)
        part.row_offset.bias.copy_(bias)


def affine_fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, d), y (N, H) -> weight (d, H) and bias (H,): by least squares, the weights of which grow with what is left; centred."""
    full = nn.functional.pad(x.double(), (0, 1), value=1.0)  # (N, d + 1)
    found = torch.zeros(full.shape[1], y.shape[1], dtype=torch.float64)
    small = RIDGE * len(full) * torch.eye(full.shape[1], dtype=torch.float64)
    for head in range(y.shape[1]):
        wanted, counts = y[:, head].double(), torch.ones(len(full), dtype=torch.float64)
        for _ in range(FITS):
            weighed = full * counts[:, None]
            found[:, head] = torch.linalg.solve(weighed.T @ full + small, weighed.T @ wanted)
            left = wanted - full @ found[:, head]
            counts = counts * (left.abs() / left.abs().mean().clamp(min=1e-9) + 1e-3).clamp(max=50).sqrt()
            counts = counts / counts.mean()
        found[-1, head] += (left.max() + left.min()) / 2
    return found[:-1].float(), found[-1].float()
