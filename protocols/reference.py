"""The plaintext twin of each protocol: the mathematics of its docstring on reconstructed values, and its error bound.

Integers are ring elements' signed representatives in int64 tensors (products exact as long as they fit), reals float64.
Written from what the protocols promise, not from how they run; the tests hold the one against the other.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import torch
from torch import Tensor

from protocols.rows import Rows


def linear(x: Tensor, w: Tensor, bits: int) -> Tensor:
    """x w modulo 2^bits, in [-2^(bits-1), 2^(bits-1))."""
    return wrap(x @ w, bits)


def product(x: Tensor, y: Tensor, bits: int) -> Tensor:
    """x y elementwise modulo 2^bits."""
    return wrap(x * y, bits)


def wrap(x: Tensor, bits: int) -> Tensor:
    """The signed representative modulo 2^bits."""
    if bits == 64:
        return x
    low = x & ((1 << bits) - 1)
    return low + torch.where(low >> (bits - 1) == 1, -(1 << bits), 0)


def rescale(x: Tensor, shift: int, bits: int) -> tuple[Tensor, Tensor]:
    """The two roundings that are allowed: floor(x / 2^shift) modulo 2^bits, and (unless nothing is shifted) one more."""
    low = torch.div(x, 1 << shift, rounding_mode="floor")
    return wrap(low, bits), wrap(low + (1 if shift else 0), bits)


def compare(x: Tensor, y: Tensor) -> Tensor:
    """[x >= y], 0 or 1."""
    return (x >= y).to(torch.int64)


def _row_slices(rows: Rows) -> list[slice]:
    slices, at = [], 0
    for k in range(rows.number):
        length = rows.first + k * rows.step
        slices.append(slice(at, at + length))
        at += length
    return slices


def row_maximum(x: Tensor, rows: Rows) -> Tensor:
    """The largest element of every packed row, (H, N) -> (H, number)."""
    return torch.stack([x[:, part].amax(-1) for part in _row_slices(rows)], -1)


def row_argmax(x: Tensor) -> Tensor:
    """The first place of the largest element, (H, N) -> (H, 1)."""
    places = [[row.index(max(row))] for row in x.tolist()]
    return torch.tensor(places, dtype=torch.int64)


def exact_exponential(numerator: int, denominator: int, frac: int) -> Decimal:
    """e^(numerator / denominator) * 2^frac, to 60 digits."""
    with localcontext() as context:
        context.prec = 60
        return (Decimal(numerator) / Decimal(denominator)).exp() * (1 << frac)


def exponential(d: Tensor) -> Tensor:
    """e^d for reals d."""
    return torch.exp(d.double())


def exponential_bound(d: Tensor) -> Tensor:
    """Largest error of the protocol: the factors' roundings, 2^-18 e^2 e^d each, those of what is opened, 2^-20 e^2 each, and 2^-21."""
    return 5.7e-5 * torch.exp(d.double()) + 1.6e-5


def reciprocal(s: Tensor) -> Tensor:
    """1 / s."""
    return 1 / s.double()


def reciprocal_bound(s: Tensor, frac: int) -> Tensor:
    """The chord and what is below its slope's bits (relative), and the rounding to `frac` fraction bits."""
    return 1.6e-4 / s.double() + 2.0 ** (1 - frac)


def softmax(x: Tensor, rows: Rows) -> Tensor:
    """The softmax of every packed row of reals, (H, N)."""
    return torch.cat([torch.softmax(x[:, part].double(), -1) for part in _row_slices(rows)], -1)


def softmax_bound(rows: Rows) -> Tensor:
    """An error that is practically never reached, (N,): the reciprocal's, and six standard deviations of the exponentials' roundings."""
    length = torch.cat([torch.full((part.stop - part.start,), float(part.stop - part.start)) for part in _row_slices(rows)])
    return 1.8e-4 + 6 * 1.3e-5 * length.double().sqrt()


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """softmax(q k^T) v on reals, over the elements that the rows hold: (H, n, d), (H, m, d), (H, m, d) -> (H, n, d)."""
    scores = q.double() @ k.double().transpose(-1, -2)  # (H, n, m)
    lengths = rows.first + rows.step * torch.arange(rows.number)
    missing = torch.arange(k.shape[-2]) >= lengths[:, None]  # (n, m)
    return torch.softmax(scores.masked_fill(missing, -torch.inf), -1) @ v.double()


def attention_bound(rows: Rows, largest: float) -> Tensor:
    """The same for attention over values of at most `largest`, (number, 1) for (H, number, d)."""
    lengths = (rows.first + rows.step * torch.arange(rows.number)).double()[:, None]
    return largest * (1.8e-4 + 2.0**-12 + 12 * 1.3e-5 * lengths.sqrt() + lengths * 2.0**-18) + 2.0**-11


def recurrence(x: Tensor, b: Tensor, c: Tensor, a: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = c_t h_t for h_t = a_t h_(t-1) + u_t b_t x_t^T, position by position, and the last h.

    x (H, T, P), b and c (T, N), a and u (H, T), h (H, N, P) before -> y (H, T, P).
    """
    found = []
    for t in range(x.shape[1]):
        h = a[:, t, None, None] * h + u[:, t, None, None] * b[t][:, None] * x[:, t, None, :]
        found.append((c[t][:, None] * h).sum(1))
    return torch.stack(found, 1), h


def recurrence_bound(x: Tensor, b: Tensor, c: Tensor, a: Tensor, u: Tensor, h: Tensor) -> float:
    """An error of y and h that is practically never reached.

    The roundings of what is opened and 5.7e-5 of a decay, by the sizes of what they are multiplied with.
    """
    largest = max(1.0, float(recurrence(x.abs(), b.abs(), c.abs(), a, u, h.abs())[0].max()))
    return 2e-3 * largest + 2.0**-10


def max_plus(x: Tensor, weight: Tensor) -> Tensor:
    """max_i (x_i + W_ij), (R, n) and (n, m) -> (R, m). The protocol is exact."""
    return torch.stack([(x + column).amax(-1) for column in weight.T], -1)


def max_plus_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """max_j (max_c (q_ic + k_jc) + v_j) over the elements that the rows hold: (H, n, d), (H, m, d), (H, m, d) -> (H, n, d); exact."""
    found = []
    for i, length in enumerate(rows.lengths.tolist()):
        scores = torch.cat([max_plus(head[i : i + 1], keys[:length].T) for head, keys in zip(q, k, strict=True)])  # (H, length)
        found.append((scores[..., None] + v[:, :length]).amax(1))
    return torch.stack(found, 1)


def relu_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """relu(q k^T) v over the rows' lengths, on reals, as `attention`. The protocol is off by `relu_attention_bound`."""
    lengths = rows.first + rows.step * torch.arange(rows.number)
    there = torch.arange(k.shape[-2]) < lengths[:, None]  # (n, m)
    return (q.double() @ k.double().transpose(-1, -2)).relu() * there / lengths[:, None] @ v.double()


def relu_attention_bound(largest: float, result: float) -> float:
    """For values of at most `largest` and results of at most `result`: two units of the scores, the rounded 1 / length, two of the sums."""
    return largest * 2.0**-11 + result * 2.0**-13 + 2.0**-11


def inner_linear(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """z_t = q_t W_t for gradient descent on |k W - v|^2 / 2, gradients of a mini-batch at its first W; and the last W.

    q, k, v (H, T, P), weight (H, P, P) before.
    """
    start, found = weight, []
    for t in range(q.shape[1]):
        start = weight if t % batch == 0 else start
        error = torch.einsum("hp,hpr->hr", k[:, t], start) - v[:, t]
        weight = weight - k[:, t, :, None] * error[:, None, :]
        found.append(torch.einsum("hp,hpr->hr", q[:, t], weight))
    return torch.stack(found, 1), weight


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the table."""
    return torch.stack([table[index] for index in ids.tolist()])
