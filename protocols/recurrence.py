"""What `protocols.scan`, `protocols.inner` and the short convolution compute, on floats; operators by which an exporter keeps them whole.

Sources: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060); Sun et al., "Learning to (Learn at Test Time)" (arXiv 2407.04620).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def public_decays(shifts: tuple[int, ...], count: int) -> Tensor:
    """(H, T, T): u_s L_rs in float32, for a = 1 - 2^-shift and u = 1 - a."""
    apart = (torch.arange(count)[:, None] - torch.arange(count)).double()  # (T, T): r - s
    kept = torch.tensor([1 - 2.0**-shift for shift in shifts], dtype=torch.float64)[:, None, None]
    return ((1 - kept) * kept ** apart.clamp(min=0)).tril().float()


def recurrence(x: Any, b: Any, c: Any, z: Any, shifts: Sequence[int], convex: bool) -> Any:
    """y (B, T, H P) of x (B, T, H P), b and c (B, T, N), and z (B, T, H) unless decays are public; on torch's tensors, or stock CrypTen's.

    y_t = c_t h_t, h_t = a_t h_(t-1) + u_t b_t x_t^T for each head, a = e^-z or 1 - 2^-shift, u = 1 - a if `convex`, else 1.
    """
    batch, count, width = x.size()
    heads = len(shifts) or z.size(2)
    apart = x.reshape(batch, count, heads, width // heads).permute(0, 2, 1, 3)  # (B, H, T, P)
    scores = c.matmul(b.transpose(1, 2)).unsqueeze(1)  # (B, 1, T, T)
    if shifts:
        weights = scores.mul(public_decays(tuple(shifts), count))
    else:
        past = torch.ones(count, count).tril()
        by_head = z.permute(0, 2, 1)  # (B, H, T)
        total = by_head.cumsum(2)
        ahead = total.unsqueeze(2).sub(total.unsqueeze(3)).mul(past)  # (B, H, r, s): -(z_(s+1) + ... + z_r)
        weights = scores.mul(ahead.exp().mul(past))
        if convex:
            weights = weights.mul(by_head.neg().exp().neg().add(1.0).unsqueeze(2))
    return weights.matmul(apart).permute(0, 2, 1, 3).reshape(batch, count, width)


def short_convolution(x: Any, weight: Any) -> Any:
    """y_t = sum_k weight_k x_(t - K + 1 + k), column by column: x (B, T, d), weight (K, 1, d); what is before the first position is 0."""
    taps = weight.size(0)
    found = x.mul(weight[taps - 1])
    for back in range(1, min(taps, x.size(1))):
        found = found.add(_later(x.mul(weight[taps - 1 - back]), back))
    return found


def _later(x: Any, back: int) -> Any:
    """x (B, T, d), each position where the one `back` after it was."""
    count = x.size(1)
    if isinstance(x, Tensor):
        return torch.nn.functional.pad(x, (0, 0, back, 0))[:, :count]
    return x.transpose(1, 2).matmul(torch.eye(count).roll(back, 1).triu(back)).transpose(1, 2)  # which has no such padding


def inner_descent(q: Any, k: Any, v: Any, weight: Any, batch: int, join: Callable[..., Any] = torch.cat) -> Any:
    """z_t = q_t W_t, for gradient descent on |k W - v|^2 / 2 by mini-batches: q, k, v (B, T, H P), W (H, P, P) at first -> (B, T, H P)."""
    sequences, count, width = q.size()
    heads = weight.size(0)
    q, k, v = (part.reshape(sequences, count, heads, width // heads).permute(0, 2, 1, 3) for part in (q, k, v))  # (B, H, T, P)
    found, weight = [], weight.unsqueeze(0)
    for at in range(0, count, batch):
        q_, k_, v_ = (part[:, :, at : min(at + batch, count)] for part in (q, k, v))
        error = k_.matmul(weight).sub(v_)
        size = error.size(2)
        scores = q_.matmul(k_.transpose(2, 3)).mul(torch.ones(size, size).tril())
        found.append(q_.matmul(weight).sub(scores.matmul(error)))
        weight = k_.transpose(2, 3).matmul(error).neg().add(weight)
    z = found[0] if len(found) == 1 else join(found, 2)
    return z.permute(0, 2, 1, 3).reshape(sequences, count, width)


@torch.library.custom_op("privinf::scan", mutates_args=())
def _scan(x: Tensor, b: Tensor, c: Tensor, z: Tensor | None, shifts: list[int], convex: bool) -> Tensor:
    found: Tensor = recurrence(x, b, c, z, shifts, convex)
    return found.contiguous()


@_scan.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("privinf::taps", mutates_args=())
def _taps(x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = short_convolution(x, weight)
    return found.contiguous()


@_taps.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("privinf::spread", mutates_args=())
def _spread(x: Tensor, each: int) -> Tensor:
    return x.repeat_interleave(each, -1)


@_spread.register_fake
def _(x: Tensor, each: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] * each))


@torch.library.custom_op("privinf::ttt", mutates_args=())
def _ttt(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, batch: int) -> Tensor:
    found: Tensor = inner_descent(q, k, v, weight, batch)
    return found.contiguous()


@_ttt.register_fake
def _(q: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(q)
