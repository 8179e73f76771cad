"""An inner linear model that learns while a text is read, over mini-batches in their dual form: products of shared matrices alone.

Source: Sun et al., "Learning to (Learn at Test Time)" (arXiv 2407.04620), TTT-Linear without its inner LayerNorm: gradient descent on
|k W - v|^2 / 2, all gradients of a mini-batch at the W that it began with. The size of a step is in k and v, whose maps are private.

H heads, T positions, P a head's width. W0 is the weight at the mini-batch's start, W that after the positions so far. For new positions
of one mini-batch E = K W0 - V, Z = Q W - tril(Q K^T) E, and W becomes W - K^T E. Matrices are opened as the products need them: Q (T, P),
K^T and E^T (P, T), W0^T and W (P, P), and tril(Q K^T) (T, T).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from protocols.declared import Declared
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, cost_matmul_wires, cost_scores, matmul_wires, scores
from protocols.ring import blank, in_a_row, known
from protocols.rows import Rows
from protocols.shares import Hidden, Shares, Wire
from protocols.truncation import cost_rescale, rescale

QK_FRAC, ERROR_FRAC, SCORE_FRAC = 14, 14, 14
WEIGHT_FRAC = 16  # of W, kept and opened
OUT = QK_FRAC + WEIGHT_FRAC  # of the output, before it is rounded, and of K W0 - V
STEP = QK_FRAC + ERROR_FRAC  # of K^T E


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Learnt(Hidden):
    """One party's shares of a weight (H, P, P) that is learnt."""

    shares: Shares

    def __repr__(self) -> str:
        return f"Learnt({self.shares})"

    def shape_only(self) -> Learnt:
        """For walks that know no values."""
        return Learnt(Shares(blank(*self.shares.shape), self.shares.bits, self.shares.frac))


@dataclass(frozen=True)
class Inner:
    """The one ring of all products and openings, and the positions of a mini-batch."""

    bits: int
    batch: int


def _full(party: Party, x: Wire, y: Wire, bits: int) -> Shares:
    """x y^T, (H, n, d) and (H, m, d) -> (H, n, m)."""
    number, columns = x.shape[-2], y.shape[-2]
    product = scores(party, x, Cached.join(None, y), Rows(columns, number, 0), bits)
    return product.map(lambda v: v.reshape(*v.shape[:-1], number, columns))


def _before(scores: Tensor) -> Tensor:
    """Those of positions that are not later than a row's own."""
    return scores.tril() if known(scores) else scores


def _finer(x: Shares, frac: int) -> Shares:
    return x.times(1 << (frac - x.frac), frac - x.frac) if frac > x.frac else x


def _step(party: Party, q: Shares, k: Shares, v: Shares, start: Shares, now: Shares, bits: int) -> Protocol_[tuple[Shares, Shares]]:
    """New positions of one mini-batch: Z with OUT fraction bits, and W after them."""

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    q, k = yield from parallel(*(rescale(party, value, bits=bits, frac=QK_FRAC) for value in (q, k)))
    q_wire, k_wire, start_wire, now_wire = yield from open_masked(party, [q, k.map(turned), start.map(turned), now])
    product = matmul_wires(party, start_wire, Cached.join(None, k_wire), bits)  # (H, P, T), (K W0)^T
    error = product - _finer(v.narrow(bits).map(turned), product.frac)
    seen = matmul_wires(party, q_wire, Cached.join(None, k_wire), bits).map(_before)  # (H, T, T)
    error, seen = yield from parallel(rescale(party, error, bits=bits, frac=ERROR_FRAC), rescale(party, seen, bits=bits, frac=SCORE_FRAC))
    error_wire, seen_wire = yield from open_masked(party, [error, seen])
    made = matmul_wires(party, q_wire, Cached.join(None, now_wire), bits)
    z = made - _finer(_full(party, seen_wire, error_wire, bits), made.frac)
    step = _full(party, k_wire, error_wire, bits)  # (H, P, P), K^T E
    return z, (yield from rescale(party, _finer(now, step.frac) - step, bits=bits, frac=WEIGHT_FRAC))


def inner_linear(
    party: Party, q: Shares, k: Shares, v: Shares, start: Learnt, now: Learnt, offset: int, how: Inner
) -> Protocol_[tuple[Shares, Learnt, Learnt]]:
    """What an inner linear model makes of q (H, T, P) as it learns v from k, and its weights at the mini-batch's start and now, after them.

    `offset` positions came before, whose weights are `start` and `now`, (H, P, P) with WEIGHT_FRAC fraction bits; Z has OUT.

    Steps, for the positions of each mini-batch: q, k^T and both weights are opened; E and tril(Q K^T) are products of these, rounded and
    opened; Z and the next W are products of all of them. W is kept in shares, and opened anew under a fresh mask by each pass, so
    that what a token moves is the same at any position.
    Domain: all below 2^(bits - 2) with their fraction bits. Error: the roundings, 2^-15 of q, k, E and scores each and 2^-17 of W a pass.
    Rounds: 4 for each mini-batch that positions fall in, where nothing reduces. Learns: uniform values, both; lengths.
    """
    count, at, found = q.shape[1], 0, list[Shares]()
    first, last = start.shares, now.shares
    while at < count:
        size = min(how.batch - (offset + at) % how.batch, count - at)
        parts = [value.map(lambda v: v[:, at : at + size]) for value in (q, k, v)]  # noqa: B023  used in this turn alone
        z, last = yield from _step(party, parts[0], parts[1], parts[2], first, last, how.bits)
        found.append(z)
        at += size
        first = last if (offset + at) % how.batch == 0 else first
    joined = found[0] if len(found) == 1 else found[0].with_value(in_a_row([z.value for z in found], 1))
    return joined, Learnt(first), Learnt(last)


def cost_inner_linear(heads: int, count: int, width: int, offset: int, how: Inner) -> Declared:
    """From q, k and v that reduce."""
    found, at = Declared(), 0
    while at < count:
        size = min(how.batch - (offset + at) % how.batch, count - at)
        found, at = found + _cost_step(heads, size, width, how.bits), at + size
    return found


def _cost_step(heads: int, count: int, width: int, bits: int) -> Declared:
    values, weights, seen = heads * count * width, heads * width * width, heads * count * count
    opened = cost_open_masked((values, bits), (values, bits), (weights, bits), (weights, bits))
    first = cost_matmul_wires(heads, width, count, bits) + cost_matmul_wires(heads, count, count, bits)
    rounded = cost_rescale(values, bits, OUT - ERROR_FRAC, bits).beside(cost_rescale(seen, bits, 2 * QK_FRAC - SCORE_FRAC, bits))
    made = cost_matmul_wires(heads, count, width, bits) + cost_scores(heads, Rows(width, count, 0), bits)
    made = made + cost_scores(heads, Rows(width, width, 0), bits)
    left = cost_rescale(weights, bits, STEP - WEIGHT_FRAC, bits)
    return opened + first + rounded + cost_open_masked((values, bits), (seen, bits)) + made + left
