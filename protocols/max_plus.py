"""Max-plus (tropical) products: a sum in place of each product and a maximum in place of each sum, by the tournament of `maximum`.

Sources: Zhang et al., "Max-plus Operators Applied to Filter Selection and Model Pruning in Neural Networks", arXiv 1903.08072, for the
layer; attention of tropical products is of the kind of Hashemi et al., "Tropical Attention", arXiv 2505.17190, without its metric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protocols.declared import Declared
from protocols.maximum import cost_row_maximum, row_maximum
from protocols.opening import add_server_constant, cost_open_masked, open_masked, unmasked
from protocols.party import Party, Protocol_
from protocols.rows import Rows
from protocols.shares import Shares

MOST_BITS = 31  # of what a tournament compares


def max_plus(party: Party, x: Shares, weight: Tensor | None, outputs: int) -> Protocol_[Shares]:
    """max_i (x_i + W_ij) for x (R, n) and S's W (n, outputs), int64 with x's fraction bits (None at C) -> (R, outputs), in x's ring.

    Steps: S adds W to its share of each of the n * outputs sums, which are opened masked; `row_maximum`. W is sent in no form.
    Domain: sums of a row differ by less than 2^(k-1), k <= 31. Exact. Rounds: 1 + those of `row_maximum`.
    Bits: 2 k a sum, and the tournament's. Learns: uniform values, both.
    """
    count, inner = x.shape
    sums = x.map(lambda v: v[:, None].expand(count, outputs, inner).reshape(count, outputs * inner))
    return (
        yield from _largest(
            party, add_server_constant(party, sums, None if weight is None else weight.t().reshape(1, -1)), Rows(inner, outputs, 0)
        )
    )


def max_plus_attention(party: Party, q: Shares, k: Shares, v: Shares, rows: Rows) -> Protocol_[Shares]:
    """max_j (s_ij + v_j) for s_ij = max_c (q_ic + k_jc), over the elements that `rows` holds; q (H, n, d), k and v (H, m, d) -> (H, n, d).

    Steps: sums of shares, opened masked; `row_maximum`; the same with v. All in one ring.
    Domain: that of `row_maximum`, for both sums. Exact. Rounds: twice those of `max_plus`.
    Bits: 2 k for each score and each of d, twice, and the tournaments'. Learns: uniform values, both.
    """
    heads, number, width = q.shape
    size = k.shape[1]

    def pairs(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return rows.pack(x.expand(shape))  # (H, d, n, m) -> (H, d, N)

    whole = (heads, width, number, size)
    both = q.map(lambda x: pairs(x.transpose(1, 2)[..., None], whole)) + k.map(lambda x: pairs(x.transpose(1, 2)[:, :, None], whole))
    both = both.map(lambda x: x.transpose(1, 2).reshape(heads, -1))  # (H, N d)
    s = yield from _largest(party, both, Rows(width, rows.count, 0))  # (H, N)
    mixed = s.map(lambda x: x[:, None].expand(-1, width, -1)) + v.map(lambda x: pairs(x.transpose(1, 2)[:, :, None], whole))
    y = yield from _largest(party, mixed.map(lambda x: x.reshape(heads * width, -1)), rows)  # (H d, n)
    return y.map(lambda x: x.reshape(heads, width, number).transpose(1, 2))


def _largest(party: Party, x: Shares, rows: Rows) -> Protocol_[Shares]:
    assert x.bits <= MOST_BITS, "a ring that no tournament compares"
    (wire,) = yield from open_masked(party, [x])
    return unmasked(party, (yield from row_maximum(party, wire, rows)))


def cost_max_plus(count: int, inner: int, outputs: int, bits: int, *, early: bool = False) -> Declared:
    """An opening of every sum, and a tournament."""
    return _cost(count, Rows(inner, outputs, 0), bits, early=early)


def cost_max_plus_attention(heads: int, width: int, rows: Rows, bits: int, *, early: bool = False) -> Declared:
    """The same over the width for each score, and over the scores for each output."""
    return _cost(heads, Rows(width, rows.count, 0), bits, early=early) + _cost(heads * width, rows, bits)


def _cost(heads: int, rows: Rows, bits: int, *, early: bool = False) -> Declared:
    return cost_open_masked((heads * rows.count, bits), early=(early,)) + cost_row_maximum(heads, rows, bits)


class _Product(torch.autograd.Function):
    """a (..., n, c) and b (..., m, c) -> max_c (a_ic + b_jc), (..., n, m), the sums of one c at a time.

    A gradient goes to the first of equal ones. All sums at once would be c times the memory, and five times the seconds.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Keeps which c it was."""
        best = a[..., :, None, 0] + b[..., None, :, 0]
        place = torch.zeros(best.shape, dtype=torch.int16, device=best.device)
        for c in range(1, a.shape[-1]):
            other = a[..., :, None, c] + b[..., None, :, c]
            place.masked_fill_(other > best, c)
            torch.maximum(best, other, out=best)
        ctx.save_for_backward(place)
        ctx.inner = a.shape[-1]
        return best

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """To both."""
        (gradient,), place = gradients, ctx.saved_tensors[0].long()
        both = ((gradient, place), (gradient.transpose(-1, -2), place.transpose(-1, -2)))
        first, second = (g.new_zeros(*g.shape[:-1], ctx.inner).scatter_add_(-1, p.contiguous(), g.contiguous()) for g, p in both)
        return first, second


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 at least: sums of bfloat16 are often equal, and nothing averages what they are off by. Without gradients all at once."""
    if not torch.is_grad_enabled():
        return (a[..., :, None, :] + b[..., None, :, :]).amax(-1)
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    found: Tensor = _Product.apply(a.to(kind), b.to(kind))  # type: ignore[no-untyped-call]
    return found


def tropical(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., n) and weight (n, m) -> max_i (x_i + weight_ij), (..., m); floats."""
    return _product(x.reshape(-1, x.shape[-1]), weight.t()).reshape(*x.shape[:-1], weight.shape[1])


def tropical_scores(q: Tensor, k: Tensor) -> Tensor:
    """(..., n, d) and (..., m, d) -> max_c (q_ic + k_jc), (..., n, m); floats."""
    return _product(q, k)


def tropical_mixed(scores: Tensor, v: Tensor) -> Tensor:
    """Causal scores (..., T, T) and v (..., T, d) -> max_(j <= i) (scores_ij + v_j), (..., T, d); floats."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return _product(scores.masked_fill(future, float("-inf")), v.transpose(-1, -2))


@torch.library.custom_op("privinf::max_plus", mutates_args=())
def layer(x: Tensor, weight: Tensor) -> Tensor:
    """`tropical` as one operator, so that an exporter keeps it whole."""
    return tropical(x, weight)


@layer.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.custom_op("privinf::max_plus_attention", mutates_args=())
def attend(qkv: Tensor, heads: int) -> Tensor:
    """q, k, v side by side (B, T, 3 d) -> heads merged (B, T, d), causal."""
    batch, count, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, d_k)
    return tropical_mixed(tropical_scores(q, k), v).transpose(1, 2).reshape(batch, count, width).contiguous()


@attend.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
