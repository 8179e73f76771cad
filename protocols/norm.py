"""LayerNorm and RMSNorm: the inverse square root by octave, table and one Newton step.

Source: the normalisation by powers of four and the table on the mantissa of SIGMA (ePrint 2023/1269); the table is read
as in `table`. The affine part belongs to the linear map that follows.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from protocols.comparison import BitMask, CompareMask, compare, cost_compare
from protocols.correlations import Bits, Fit, Kind, Known, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.maximum import UpperMask
from protocols.memo import constant
from protocols.opening import cost_open_masked, open_masked, unmasked
from protocols.party import Item, Party, Protocol_
from protocols.product import cost_multiply, multiply
from protocols.ring import blank, known, like, reduce
from protocols.shares import Shares, Wire
from protocols.table import WORD, hot_held, one_hot, read
from protocols.truncation import cost_rescale, rescale

WHOLE_FRAC = 15  # fraction bits of what RMSNorm opens: of activations, so that those of small ones are not rounded
OCTAVES = 19  # powers of four below the largest sum of squares that are told apart
COMPARE_BITS = 43
MANTISSA_FRAC = 16
RING = 44  # of the mantissa and the Newton step
INDEX_FRAC = 8
INDEX_BITS = 9
INVERSE_FRAC = 20
ROOT_FRAC = 12  # of the root of the width
_WORDS = (1 << INDEX_BITS) // WORD


def centred(size_bits: int, most: int = 14) -> tuple[int, int]:
    """Ring and fraction bits, `most` or fewer, of x - mean: they hold the sum of squares, and the product with the inverse."""
    frac = min(most, (60 - size_bits) // 2)
    return max(2 * frac + size_bits + 2, frac + INVERSE_FRAC + size_bits // 2 + 8), frac


def compared(size_bits: int, most: int = 14) -> tuple[int, int]:
    """(shift, bits) of the part of a sum of squares that is compared: its ring's upper bits, no more, since a sum may wrap there."""
    bits, frac = centred(size_bits, most)
    shift = max(0, 2 * frac + size_bits - (COMPARE_BITS - 2))
    return shift, min(COMPARE_BITS, bits - shift)


def octaves(size_bits: int, most: int = 14) -> int:
    """Powers of four that are told apart: fewer where the smallest would be below the sum's resolution."""
    return min(OCTAVES, (2 * centred(size_bits, most)[1] + size_bits - 3) // 2)


@constant()
def _table() -> Tensor:
    """(1, 2^INDEX_BITS): round(2^INDEX_FRAC / sqrt(i / 2^INDEX_FRAC)), by integer square roots."""
    entries = [0] * (1 << INDEX_BITS)
    for i in range(56, 272):
        entries[i] = (math.isqrt((1 << 3 * INDEX_FRAC + 2) // i) + 1) // 2
    return torch.tensor([entries], dtype=torch.int64)


class SquareMask(Kind, frozen=True):
    """Shares of the rows' sums of r^2, (rows), for a wire (rows, d)."""

    wire: Number
    shape: Shape
    bits: Bits
    refers: ClassVar[tuple[str, ...]] = ("wire",)

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def fit(self, shapes: Shapes) -> Fit:
        *rows, width = shapes.mask(self.wire)
        return Fit((tuple(rows),), None, math.prod(rows) * (width + 1))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (known.mask(self.wire).square().sum(-1),), None


class InverseRootMask(Kind, frozen=True):
    """The rotated one-hot of the index's mask, its sign s, and s a^i r^j for u's mask a (i = 0..3) and the mantissa's mask r (j = 0, 1)."""

    mantissa: Number
    index: Number
    shape: Shape
    refers: ClassVar[tuple[str, ...]] = ("mantissa", "index")

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, RING),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part((*self.shape, _WORDS), WORD, xor=True), Part((8, *self.shape), RING)

    def fit(self, shapes: Shapes) -> Fit:
        fits(shapes.mask(self.mantissa) == shapes.mask(self.index) == self.shape)
        count = math.prod(self.shape)
        return Fit(tuple(part.shape for part in self.shared_parts()), None, 26 * count + hot_held(count, _WORDS))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        a, r = server[0] + client[0], known.mask(self.mantissa)
        word, sign = one_hot(known.mask(self.index), shares[0])
        powers = torch.stack([sign, sign * a, sign * a * a, sign * a * a * a])
        return (word, torch.cat([powers, powers * r])), None


def _newton(party: Party, m: Wire, index: Wire) -> Protocol_[Shares]:
    """y1 = (3 y0 - m y0^3) / 2 for the table's y0 = s u, u opened masked as U = u + a; shares, 41 fraction bits."""
    correlation = party.take(InverseRootMask(m.name, index.name, m.shape))
    frac = MANTISSA_FRAC + 3 * INDEX_FRAC + 1
    if not known(m.masked):
        yield [Item(m.masked, RING)]
        return Shares(m.masked, RING, frac)
    word, powers = correlation.shares
    u = read(word, index.masked, like(_table(), index.masked))[0]
    mine = (u if party.is_server else -u) + correlation.own[0]
    (theirs,) = yield [Item(mine, RING)]
    big, masked = mine + theirs, m.masked
    # s (U - a)^3 in shares of s a^i, once for M and once, with r's factor, for r
    cubes = [((big * p[0] - 3 * p[1]) * big + 3 * p[2]) * big - p[3] for p in (powers[:4], powers[4:])]
    linear = big * powers[0] - powers[1]
    return Shares(((3 * linear) << (frac - 1 - INDEX_FRAC)) - (masked * cubes[0] - cubes[1]), RING, frac)


def _grow(party: Party, name: int, beta: Tensor, rho: Tensor, x: Wire, base: int) -> Shares:
    """x F for F = base^j in octave j below the largest: x (1 + sum_j b_j (base^j - base^(j-1))); local."""
    mask = party.take(BitMask(name, x.name, tuple(beta.shape), x.bits, (*x.shape, 1)))
    if not known(beta, x.masked):
        return Shares(blank(*x.shape), x.bits, x.frac)
    steps = like(torch.tensor([base**j - base ** (j - 1) for j in range(1, beta.shape[-1] + 1)]), x.masked)
    # b = 1 - [x >= threshold] = (1 - beta) + (2 beta - 1) rho
    big, r, bit, sign = x.masked[..., None], x.mask[..., None], 1 - beta, 2 * beta - 1
    part = sign * (big * rho - mask.shares[0]) - bit * r
    if party.is_server:
        part = part + bit * big
    return Shares(unmasked(party, x).value + (part * steps).sum(-1), x.bits, x.frac)


def layer_norm(party: Party, x: Shares, *, epsilon: float, size_bits: int, bits: int) -> Protocol_[Shares]:
    """(x - mean) / sqrt(variance + epsilon) over the last axis of x (rows, d), in Z_2^bits, the same fraction bits.

    Steps: x - mean is local; it is opened masked, once, for its squares (D shares the rows' sums of r^2) and for the last
    product. The sum of squares s + d epsilon, below 2^size_bits, is opened; its octave, in powers of four, by `compare`
    on its upper bits; m = s F in [1/4, 1) and the upper bits of m are opened; table and Newton give 1 / sqrt(m); times the
    root of F (powers of two) and of d; opened; times x - mean.
    Domain: sums of squares from 2^(size_bits - 40) (or the resolution) to 2^size_bits (below, the result is too small); size_bits even.
    Error: relative 2e-4 of the inverse root, and 2^-14 absolute of x - mean (2^-11 for the largest sums) before it is scaled.
    Rounds: 11 + those of `compare`. Learns: uniform values, both.
    """
    c_bits, c_frac = centred(size_bits)
    inverse = round((1 << 24) / x.shape[-1])
    spread = x.map(lambda v: v if v.is_meta else (v << 24) - v.sum(-1, keepdim=True) * inverse)
    spread = Shares(spread.value, x.bits, x.frac + 24)
    spread = yield from rescale(party, spread, bits=c_bits, frac=c_frac)
    y = yield from _over_root(party, spread, epsilon, size_bits)
    return (yield from rescale(party, y, bits=bits, frac=x.frac))


def rms_norm(party: Party, x: Shares, *, epsilon: float, size_bits: int, bits: int) -> Protocol_[Shares]:
    """x / sqrt(mean of squares + epsilon) over the last axis of x (rows, d), in Z_2^bits, the same fraction bits (arXiv 1910.07467).

    Steps: those of `layer_norm`, but x itself is opened, with all its fraction bits where the ring has room. Domain, error, rounds and what
    each learns: those of `layer_norm`.
    """
    c_bits, c_frac = centred(size_bits, WHOLE_FRAC)
    narrow = yield from rescale(party, x, bits=c_bits, frac=c_frac)
    y = yield from _over_root(party, narrow, epsilon, size_bits, WHOLE_FRAC)
    return (yield from rescale(party, y, bits=bits, frac=x.frac))


def _over_root(party: Party, x: Shares, epsilon: float, size_bits: int, most: int = 14) -> Protocol_[Shares]:
    """x over the root of its mean square: a product that is still to be rescaled. See `layer_norm`."""
    width, (c_bits, _) = x.shape[-1], centred(size_bits, most)
    (c,) = yield from open_masked(party, [x])
    (s,) = yield from open_masked(party, [_squares(party, c, epsilon)])
    shift, compare_bits = compared(size_bits, most)
    upper = party.take(UpperMask(s.name, s.shape, shift, compare_bits, 0))
    top, number = s.frac + size_bits - shift, octaves(size_bits, most)
    thresholds = like(torch.tensor([1 << (top - 2 * j) for j in range(1, number + 1)]), s.masked)
    shape = (*s.shape, number)
    difference = reduce((s.masked >> shift)[..., None] - thresholds, compare_bits) if known(s.masked) else blank(*shape)
    name, beta = yield from compare(party, difference, CompareMask(upper.name, shape, (*s.shape, 1), compare_bits))
    rho = party.take(BitMask(name, 0, shape, 64)).shares[0]
    m = _grow(party, name, beta, rho, s, 4)
    m = Shares(m.value, m.bits, m.frac + size_bits)
    m = yield from rescale(party, m, bits=RING, frac=MANTISSA_FRAC, nonnegative=True)
    index = yield from rescale(party, m, bits=INDEX_BITS, frac=INDEX_FRAC)
    m_wire, index_wire = yield from open_masked(party, [m, index])
    y = yield from _newton(party, m_wire, index_wire)
    y = yield from rescale(party, y, bits=INVERSE_FRAC + number + ROOT_FRAC + 10, frac=INVERSE_FRAC, nonnegative=True)
    (y_wire,) = yield from open_masked(party, [y])
    # times the root of the width, and 2^(-size / 2)
    root = (math.isqrt(width << 2 * ROOT_FRAC + 2) + 1) // 2
    y = _grow(party, name, beta, rho, y_wire, 2).times(root, ROOT_FRAC)
    y = yield from rescale(party, y, bits=c_bits, frac=INVERSE_FRAC, nonnegative=True)
    (y_wire,) = yield from open_masked(party, [y.map(lambda v: v[..., None])])
    out = multiply(party, c, y_wire, c_bits)
    return Shares(out.value, out.bits, out.frac + size_bits // 2)


def _squares(party: Party, c: Wire, epsilon: float) -> Shares:
    """Shares of the rows' sums of squares plus d epsilon: sum C^2 - 2 C r + r^2; local, but for their opening."""
    mask = party.take(SquareMask(c.name, c.shape[:-1], c.bits))
    if not known(c.masked):
        return Shares(blank(*c.shape[:-1]), c.bits, 2 * c.frac)
    value = mask.shares[0] - 2 * (c.masked * c.mask).sum(-1)
    if party.is_server:
        value = value + c.masked.square().sum(-1) + round(c.shape[-1] * epsilon * 4.0**c.frac)
    return Shares(value, c.bits, 2 * c.frac)


def cost_layer_norm(rows: int, width: int, from_bits: int, frac: int, size_bits: int, bits: int) -> Declared:
    """x - mean is opened once, of the width; everything else is a few elements a row."""
    ring, c_frac = centred(size_bits)
    first = cost_rescale(rows * width, from_bits, frac + 24 - c_frac, ring)
    return first + _cost_over_root(rows, width, size_bits) + _cost_last(rows, width, frac, size_bits, bits)


def cost_rms_norm(rows: int, width: int, from_bits: int, frac: int, size_bits: int, bits: int) -> Declared:
    """The same of x itself, which may be there as it is to be opened."""
    ring, c_frac = centred(size_bits, WHOLE_FRAC)
    first = cost_rescale(rows * width, from_bits + max(0, c_frac - frac), max(0, frac - c_frac), ring)
    return first + _cost_over_root(rows, width, size_bits, WHOLE_FRAC) + _cost_last(rows, width, frac, size_bits, bits, WHOLE_FRAC)


def _cost_last(rows: int, width: int, frac: int, size_bits: int, bits: int, most: int = 14) -> Declared:
    ring, c_frac = centred(size_bits, most)
    return cost_rescale(rows * width, ring, c_frac + INVERSE_FRAC + size_bits // 2 - frac, bits)


def _cost_over_root(rows: int, width: int, size_bits: int, most: int = 14) -> Declared:
    """An opening of all, and a few elements a row."""
    count, (ring, c_frac), wide = rows * width, centred(size_bits, most), octaves(size_bits, most)
    root_bits = INVERSE_FRAC + wide + ROOT_FRAC + 10
    sums = dealt((rows, ring)) + cost_open_masked((rows, ring))
    octave = cost_compare(rows * wide, compared(size_bits, most)[1], masks=rows) + dealt((rows * wide, 64), (rows * wide, ring))
    mantissa = cost_rescale(rows, ring, 2 * c_frac + size_bits - MANTISSA_FRAC, RING)
    mantissa += cost_open_masked((rows, RING), (rows, INDEX_BITS))
    newton = dealt((rows * 2**INDEX_BITS // WORD, 64), (8 * rows, RING)) + exchanged((rows, RING))
    newton += cost_rescale(rows, RING, MANTISSA_FRAC + 3 * INDEX_FRAC + 1 - INVERSE_FRAC, root_bits)
    inverse = cost_open_masked((rows, root_bits)) + dealt((rows * wide, root_bits)) + cost_rescale(rows, root_bits, ROOT_FRAC, ring)
    last = cost_open_masked((rows, ring)) + cost_multiply(count, ring)
    return cost_open_masked((count, ring)) + sums + octave + mantissa + newton + inverse + last
