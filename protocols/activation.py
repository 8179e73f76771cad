"""ReLU, GELU, SiLU and softplus.

Source: SIGMA (ePrint 2023/1269): one comparison selects, a table on the middle of the line gives what is curved. The
table is linear pieces, read through a rotated one-hot (Pika, 2022/826) whose sign the dealer knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import ClassVar

import torch
from torch import Tensor

from protocols.comparison import BitMask, CompareMask, compare, cost_compare
from protocols.correlations import Fit, Kind, Known, Number, Part, Related, Shape, Shapes, Shift, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.memo import constant
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Item, Party, Protocol_, parallel
from protocols.ring import blank, known, like, reduce
from protocols.shares import Shares, Wire
from protocols.table import WORD, hot_held, one_hot, read
from protocols.truncation import cost_rescale, rescale

INDEX_BITS = 8  # of the pieces of a curve
SLOPE_FRAC = 12
PRODUCT_BITS = 32
_PI = Decimal("3.14159265358979323846264338327950288419716939937510")


def _bits_times(party: Party, name: int, beta: Tensor, x: Wire) -> tuple[Tensor, Tensor]:
    """Shares of the bits c = beta + (1 - 2 beta) rho and of c x, (..., J), for x (...); local."""
    shape = tuple(beta.shape)
    rho = party.take(BitMask(name, 0, shape, x.bits))
    rho_r = party.take(BitMask(name, x.name, shape, x.bits, (*x.shape, 1)))
    if not known(beta, x.masked):
        return beta, beta
    big, r, sign = x.masked[..., None], x.mask[..., None], 1 - 2 * beta
    bit, product = sign * rho.shares[0], sign * (big * rho.shares[0] - rho_r.shares[0]) - beta * r
    return (bit + beta, product + beta * big) if party.is_server else (bit, product)


def relu(party: Party, x: Shares, *, compare_bits: int, bits: int) -> Protocol_[Shares]:
    """max(x, 0) of any shape, in Z_2^bits, the same fraction bits.

    Steps: x is opened masked in `compare_bits`; [x >= 0] by `compare`; the bit times x, linear in D's shares of rho and
    rho r; extended to `bits`.
    Domain: |x| < 2^(compare_bits - 2). Exact. Rounds: 1 + those of `compare` + 1. Learns: uniform values, both.
    """
    (wire,) = yield from open_masked(party, [x.narrow(compare_bits)])
    shape = (*x.shape, 1)
    c = reduce(wire.masked, compare_bits)[..., None] if known(wire.masked) else blank(*shape)
    name, beta = yield from compare(party, c, CompareMask(wire.name, shape, shape, compare_bits))
    _, product = _bits_times(party, name, beta, wire)
    y = Shares(product[..., 0], compare_bits, x.frac)
    return (yield from rescale(party, y, bits=bits, frac=x.frac, nonnegative=True))


def _erf(x: Decimal) -> Decimal:
    """By its series, which is exact enough for |x| <= 3 at the context's precision."""
    total, term, k = Decimal(0), x, 0
    while abs(term) > Decimal(10) ** -30:
        total += term / (2 * k + 1)
        k += 1
        term = -term * x * x / k
    return 2 * total / _PI.sqrt()


def _tanh_form(x: Decimal) -> Decimal:
    """GPT-2's: x (1 + tanh z) / 2 = x / (1 + e^(-2 z))."""
    z = (2 / _PI).sqrt() * (x + Decimal("0.044715") * x**3)
    return x / (1 + (-2 * z).exp())


def _erf_form(x: Decimal) -> Decimal:
    return x * (1 + _erf(x / Decimal(2).sqrt())) / 2


def _silu_form(x: Decimal) -> Decimal:
    """x / (1 + e^-x), slow to come near 0 and x: from 6 on half of what is missing at 8 is added by and by; beyond, the other is off."""
    left = 8 / (1 + Decimal(8).exp())
    return x / (1 + (-x).exp()) + max(abs(x) - 6, Decimal(0)) / 2 * left / 2


def _softplus_form(x: Decimal) -> Decimal:
    """log(1 + e^x), as slow, and so with edges where 1e-7 is missing: on a step that is next to 0 all of a recurrence may hang."""
    return (1 + x.exp()).ln()


@dataclass(frozen=True, slots=True)
class Curve:
    """A function that is 0 below -`edge` and x above `edge`, and between them 2^`index_bits` pieces of width 2^-`piece`."""

    function: Callable[[Decimal], Decimal]
    edge: int
    piece: int

    @property
    def index_bits(self) -> int:
        """Of the pieces."""
        return (2 * self.edge << self.piece).bit_length() - 1

    def top(self, frac: int) -> int:
        """Up to where x is clamped: two pieces below the edge, so that no index is beyond the last."""
        return (self.edge << frac) - (1 << (frac + 1 - self.piece))


FORMS = {
    "tanh": Curve(_tanh_form, 4, 5),
    "erf": Curve(_erf_form, 4, 5),
    "silu": Curve(_silu_form, 8, 4),
    "softplus": Curve(_softplus_form, 16, 4),
}


@constant()
def pieces(form: str, frac: int) -> Tensor:
    """(2, 2^index_bits): value (frac + 12 fraction bits) and slope (12) at index i of its line, good on (i - 1, i + 1) / 2^piece.

    The chord's slope, and the value between the largest and the smallest gap, so that the error is about even. In
    decimal arithmetic, which is the same on every machine: both parties must hold the same integers.
    """
    curve = FORMS[form]
    count = 1 << curve.index_bits
    step, constant, slope = Decimal(1) / (1 << curve.piece), [0] * count, [0] * count
    with localcontext() as context:
        context.prec = 40
        values = {k: curve.function(k * step / 2) for k in range(-count - 2, count + 3)}  # at halves of pieces
        for i in range(count):
            at = i - count if i >= count // 2 else i
            slope[i] = round((values[2 * at + 2] - values[2 * at - 2]) / (2 * step) * (1 << SLOPE_FRAC))
            gaps = [values[k] - Decimal(slope[i]) / (1 << SLOPE_FRAC) * k * step / 2 for k in range(2 * at - 2, 2 * at + 3)]
            constant[i] = round((max(gaps) + min(gaps)) / 2 * (1 << (frac + SLOPE_FRAC))) + slope[i] * (at << (frac - curve.piece))
    return torch.tensor([constant, slope], dtype=torch.int64)


class PiecesMask(Kind, frozen=True):
    """The rotated one-hot of r >> shift, its sign s, s b, s l, s (b l - a): masks a, b of both entries, l = r mod 2^shift."""

    x: Number
    shape: Shape
    shift: Shift
    refers: ClassVar[tuple[str, ...]] = ("x",)
    index_bits: ClassVar[int] = INDEX_BITS

    @classmethod
    def words(cls) -> int:
        """Of a one-hot."""
        return (1 << cls.index_bits) // WORD

    def server_parts(self) -> tuple[Part, ...]:
        return (Part((2, *self.shape), PRODUCT_BITS),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part((*self.shape, self.words()), 64, xor=True), Part((4, *self.shape), PRODUCT_BITS)

    def fit(self, shapes: Shapes) -> Fit:
        fits(shapes.mask(self.x) == self.shape)
        count = math.prod(self.shape)
        return Fit(tuple(part.shape for part in self.shared_parts()), None, 12 * count + hot_held(count, self.words()))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        (a, b), r = server[0] + client[0], known.mask(self.x)
        word, sign = one_hot(r >> self.shift, shares[0])
        part = r & ((1 << self.shift) - 1)
        return (word, torch.stack([sign, sign * b, sign * part, sign * (b * part - a)])), None


class WidePiecesMask(PiecesMask, frozen=True):
    """The same for twice as many pieces."""

    index_bits: ClassVar[int] = INDEX_BITS + 1


MASKS = {kind.index_bits: kind for kind in (PiecesMask, WidePiecesMask)}


def _line(party: Party, x: Wire, form: str) -> Protocol_[Shares]:
    """A[i] + B[i] (x - x_i) for the piece i of x, both entries opened under masks, up to a sign that D shares."""
    shift = x.frac - FORMS[form].piece
    kind = MASKS[FORMS[form].index_bits]
    correlation = party.take(kind(x.name, x.shape, shift))
    frac = x.frac + SLOPE_FRAC
    if not known(x.masked):
        yield [Item(blank(2, *x.shape), PRODUCT_BITS)]
        return Shares(x.masked, PRODUCT_BITS, frac)
    word, (sign, sign_b, sign_l, sign_ba) = correlation.shares
    table, public = like(pieces(form, x.frac), x.masked), (x.masked >> shift) & ((1 << kind.index_bits) - 1)
    u = read(word, public, table)
    mine = (u if party.is_server else -u) + correlation.own[0]
    (theirs,) = yield [Item(mine, PRODUCT_BITS)]
    entry, slope = mine + theirs
    # x - x_i = X_l - l exactly, with no wrap: s (A' - a) + s (B' - b) (X_l - l)
    part = x.masked & ((1 << shift) - 1)
    return Shares((entry + slope * part) * sign - part * sign_b - slope * sign_l + sign_ba, PRODUCT_BITS, frac)


def gelu(party: Party, x: Shares, form: str, *, compare_bits: int, bits: int) -> Protocol_[Shares]:
    """GELU of any shape, in Z_2^bits, the same fraction bits; `form` is "tanh" (GPT-2's) or "erf".

    Steps: x is opened masked in 32 bits; [x >= -4] and [x >= 4 - 1/16] at once by `compare`; both times x give x', x clamped
    to that range, and the rest above it; x' is opened and its line read from the table of 256 pieces (`_line`).
    Domain: |x| < 2^(compare_bits - 2), compare_bits <= 32. Error: the pieces 2.1e-4, at the edges 1.6e-4 more, and one unit.
    Rounds: 1 + those of `compare` + 3. Bits each way: 32, per comparison those of `compare`, 32, 64, 2.
    Learns: uniform values, both.
    """
    return _curve(party, x, form, compare_bits, bits)


def silu(party: Party, x: Shares, *, compare_bits: int, bits: int) -> Protocol_[Shares]:
    """SiLU, x / (1 + e^-x), of any shape, in Z_2^bits, the same fraction bits.

    Steps: those of `gelu`, with [x >= -8] and [x >= 8 - 1/8], and pieces twice as wide, since it bends less and for longer.
    Domain: |x| < 2^(compare_bits - 2), compare_bits <= 32. Error: the pieces 5e-4, near and beyond the edges 1.8e-3, and one unit.
    Rounds, bits, and what each learns: those of `gelu`.
    """
    return _curve(party, x, "silu", compare_bits, bits)


def softplus(party: Party, x: Shares, *, compare_bits: int, bits: int, frac: int | None = None) -> Protocol_[Shares]:
    """log(1 + e^x) of any shape, in Z_2^bits, with `frac` fraction bits, x's or up to 12 more; x's if it is not given.

    Steps, rounds, bits, and what each learns: those of `silu`, with edges at 16 and twice as many pieces.
    Domain: |x| < 2^(compare_bits - 2), compare_bits <= 32, x.frac <= 14. Error: the pieces 2.5e-4, and below 0 no more than 1.1e-3 of the
    result and 2e-5; 1.2e-7 beyond the edges; x's own unit, times the slope; and one unit.
    """
    return _curve(party, x, "softplus", compare_bits, bits, frac)


def _curve(party: Party, x: Shares, form: str, compare_bits: int, bits: int, frac: int | None = None) -> Protocol_[Shares]:
    """0, a line from the form's table, or x: see `gelu`."""
    frac = x.frac if frac is None else frac
    assert compare_bits <= PRODUCT_BITS, "the opened value does not hold what is compared"
    edge, top = FORMS[form].edge << x.frac, FORMS[form].top(x.frac)
    (wire,) = yield from open_masked(party, [x.narrow(PRODUCT_BITS)])
    shape = (*x.shape, 2)
    thresholds = like(torch.tensor([-edge, top]), wire.masked)
    c = reduce(wire.masked[..., None] - thresholds, compare_bits) if known(wire.masked) else blank(*shape)
    name, beta = yield from compare(party, c, CompareMask(wire.name, shape, (*x.shape, 1), compare_bits))
    bit, product = _bits_times(party, name, beta, wire)
    if known(bit, product):
        above = product[..., 1] - top * bit[..., 1]
        clamped = product[..., 0] + edge * bit[..., 0] - above
        clamped = clamped - edge if party.is_server else clamped
    else:
        above = clamped = blank(*x.shape)
    (inner,) = yield from open_masked(party, [Shares(clamped, PRODUCT_BITS, x.frac)])
    line = yield from _line(party, inner, form)
    curved, rest = yield from parallel(
        rescale(party, line, bits=bits, frac=frac),
        rescale(party, Shares(above, PRODUCT_BITS, x.frac), bits=bits, frac=frac, nonnegative=True),
    )
    result: Shares = curved + rest
    return result


def cost_relu(count: int, compare_bits: int, bits: int) -> Declared:
    """An opening, a comparison, the bit and its product with the mask, an extension."""
    selected = dealt((count, compare_bits), (count, compare_bits))
    opened = cost_open_masked((count, compare_bits))
    return opened + cost_compare(count, compare_bits) + selected + cost_rescale(count, compare_bits, 0, bits)


def cost_gelu(count: int, compare_bits: int, bits: int, *, words: int = PiecesMask.words(), more: int = 0) -> Declared:
    """Two comparisons under one mask clamp; the line of a piece of 256 is opened, slope and constant; both parts are extended.

    `words`: of the one-hot; `more`: fraction bits of the result beyond the input's.
    """
    ring, opened = PRODUCT_BITS, cost_open_masked((count, PRODUCT_BITS))
    clamped = cost_compare(2 * count, compare_bits, masks=count) + dealt((2 * count, ring), (2 * count, ring)) + opened
    line = dealt((count * words, 64), (4 * count, ring)) + exchanged((2 * count, ring))
    return opened + clamped + line + cost_rescale(count, ring, SLOPE_FRAC - more, bits).beside(cost_rescale(count, ring + more, 0, bits))


def cost_silu(count: int, compare_bits: int, bits: int) -> Declared:
    """That of GELU: its pieces are as many."""
    return cost_gelu(count, compare_bits, bits)


def cost_softplus(count: int, compare_bits: int, bits: int, more: int = 0) -> Declared:
    """That of GELU with twice as many pieces, and `more` fraction bits than x has."""
    return cost_gelu(count, compare_bits, bits, words=WidePiecesMask.words(), more=more)
