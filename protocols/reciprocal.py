"""The reciprocal of every row's sum: linear pieces, read from tables at a masked index.

Source: a table read through a rotated one-hot (Pika, ePrint 2022/826) whose sign the dealer knows, with pieces that
double in width with the octave as in SIGMA's normalisation (2023/1269), here three octaves at once.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache

import torch
from torch import Tensor

from protocols.correlations import Bits, Fit, Kind, Known, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Item, Party, Protocol_
from protocols.ring import blank, known, like
from protocols.shares import Shares, Wire
from protocols.table import WORD, hot_held, one_hot, read
from protocols.truncation import cost_rescale, rescale

INDEX_BITS = 9
_WORDS = (1 << INDEX_BITS) // WORD
UNIT = 7  # the lowest table's lines are 2^-7 apart, those of each further table eight times as much
STEP = 3
FIRST = 63  # a table but the lowest is used from this index on
_LOWEST = 64  # the smallest index that a sum of at least 0.55 can have in the lowest table
_LOW_BITS = 9  # of the sum's bits below the index, those that are multiplied by the slope
EXTRA = 10  # fraction bits of the lines beyond those of the result


def tables(bound: float) -> int:
    """P: table p has lines for sums below 4 * 8^p."""
    number = 1
    while (((1 << INDEX_BITS) - 1) << (STEP * (number - 1))) / 2**UNIT < bound:
        number += 1
    return number


def sum_bits(frac: int, number: int) -> int:
    """The ring that the sum is opened in: it holds the last table's range, and no more is needed."""
    return frac - UNIT + STEP * (number - 1) + INDEX_BITS


def _places(frac: int, table: int) -> tuple[int, int]:
    """(position of the index in the sum, position of the lowest bit that is multiplied by the slope)."""
    at = frac - UNIT + STEP * table
    return at, max(0, at - _LOW_BITS)


@lru_cache
def _lines(frac: int, table: int, out_frac: int) -> Tensor:
    """(3, 2^INDEX_BITS): value (out_frac fraction bits) and slope of 1 / s at each index, and whether a lower table is used.

    The line of index i is good on (i - 1, i + 1): the chord, lowered by half its largest gap, so that the error is even.
    In decimal arithmetic, which is the same on every machine: both parties must hold the same integers.
    """
    at, low = _places(frac, table)
    first, size = FIRST if table else _LOWEST, 1 << INDEX_BITS
    value, slope = [0] * size, [0] * size
    with localcontext() as context:
        context.prec = 40
        unit = Decimal(2) ** (at - frac)
        for i in range(first, size):
            product = (i * unit) ** 2 - unit**2  # of the ends
            value[i] = round((i * unit / product - (i * unit - product.sqrt()) / product) * (1 << out_frac))
            slope[i] = round(-1 / product * Decimal(2) ** (out_frac - frac + low))
    return torch.tensor([value, slope, [int(i < first) for i in range(size)]], dtype=torch.int64)


class ReciprocalMask(Kind, frozen=True):
    """For the lines of a sum with mask r. Per table: the rotated one-hot of the mask of its index, with sign s.

    Masks a, b of value and slope, (tables, 2, ...), and rho of the choice, a bit for each table but the lowest. For each
    table, and each product of rhos of the tables above it: s, s b, s l, s (b l - a), times the product, with l those of
    r's bits that are multiplied by the slope.
    """

    sum: Number
    shape: Shape
    frac: Number
    number: Number
    bits: Bits

    def bounded(self) -> bool:
        """See `Kind`: the products double with each table."""
        return UNIT <= self.frac <= 32 and 1 <= self.number <= 8

    def server_parts(self) -> tuple[Part, ...]:
        masks = Part((self.number, 2, *self.shape), self.bits)
        return (masks, Part(self.shape, self.number - 1)) if self.number > 1 else (masks,)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        products = 4 * (2**self.number - 1)
        return Part((self.number, *self.shape, _WORDS), WORD, xor=True), Part((products, *self.shape), self.bits)

    def fit(self, shapes: Shapes) -> Fit:
        fits(shapes.mask(self.sum) == self.shape)
        count, products = math.prod(self.shape), 1 << self.number
        held = count * (self.number * (_WORDS + 16) + 10 * products) + self.number * hot_held(count, _WORDS)
        return Fit(tuple(part.shape for part in self.shared_parts()), None, held)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        r, lines = known.mask(self.sum), server[0] + client[0]
        words, values = torch.empty_like(shares[0]), []
        products = [torch.ones_like(r)]
        for table in reversed(range(self.number)):
            at, low = _places(self.frac, table)
            words[table], sign = one_hot(r >> at, shares[0][table])
            part, (a, b) = (r & ((1 << at) - 1)) >> low, lines[table]
            terms = [sign, sign * b, sign * part, sign * (b * part - a)]
            values += [term * product for product in products for term in terms]
            if table:
                rho = (server[1] ^ client[1]) >> (table - 1) & 1
                products += [product * rho for product in products]
        return (words, torch.stack(values)), None


def _line(party: Party, s: Wire, number: int, bits: int, frac: int) -> Protocol_[Shares]:
    """The line of the wire's own table at its value: every table's is read, and the choice is made by the tables' indices."""
    kind = ReciprocalMask(s.name, s.shape, s.frac, number, bits)
    correlation = party.take(kind)
    if not known(s.masked):
        yield [Item(blank(*part.shape), part.bits) for part in kind.server_parts()]
        return Shares(s.masked, bits, frac)
    own, (words, products) = correlation.own, correlation.shares
    lines, choice = torch.empty_like(own[0]), torch.zeros_like(s.masked)
    for table in range(number):
        at, _ = _places(s.frac, table)
        index = s.masked >> at & ((1 << INDEX_BITS) - 1)
        value, slope, lower = read(words[table], index, like(_lines(s.frac, table, frac), index))
        lines[table, 0], lines[table, 1] = value, slope
        if table:
            choice = choice | (lower & 1) << (table - 1)
    mine = [(lines if party.is_server else -lines) + own[0]]
    if number > 1:
        mine.append(choice ^ own[1])
    theirs = yield [Item(value, part.bits) for value, part in zip(mine, kind.server_parts(), strict=True)]
    lines = mine[0] + theirs[0]
    # the choice of a lower table is beta + (1 - 2 beta) rho
    result, coefficients, at_product = torch.zeros_like(s.masked), [torch.ones_like(s.masked)], 0
    for table in reversed(range(number)):
        at, low = _places(s.frac, table)
        part, (value, slope) = (s.masked & ((1 << at) - 1)) >> low, lines[table]
        for coefficient in coefficients:
            sign, sign_b, sign_l, sign_ba = products[at_product : at_product + 4]
            # s (A' - a) + s (B' - b) (S_l - l)
            result += coefficient * ((value + slope * part) * sign - part * sign_b - slope * sign_l + sign_ba)
            at_product += 4
        if table:
            beta = (mine[1] ^ theirs[1]) >> (table - 1) & 1
            coefficients = [c * beta for c in coefficients] + [c * (1 - 2 * beta) for c in coefficients]
    return Shares(result, bits, frac)


def reciprocal(party: Party, s: Shares, *, bound: float, bits: int, frac: int) -> Protocol_[Shares]:
    """1 / s for shares s (...) of values in [0.55, bound), in Z_2^bits with `frac` fraction bits.

    Steps: s is opened masked, in no more bits than its range. Tables of 512 lines cover [0.5, 4), up to 32, up to 256, ...;
    each is indexed by its own nine bits of s, so that s = index + (S_l - r_l) exactly for the bits l below, with no wrap.
    Every table's value and slope, up to a sign that D shares, are opened masked, and with them, under rho, whether the index
    is below the table's range: a lower table then, and this table's entries are 0. D shares the products of signs, masks
    and rhos: the chosen line's value is linear in them. Then truncate-reduce.
    Domain: bound <= 2^12, bits <= 54, at least 7 fraction bits of s. A ring of s that does not hold its range is widened first.
    Error: relative: chord, (1 / 63)^2 / 2, and s's lowest bits, 2^-9 / 62: at most 1.6e-4; and 2^(1 - frac) absolute.
    Rounds: 2, + 1 where s is widened. Bits each way: those of s; P (2 (bits + 10) + 1) - 1 for P tables.
    Learns: uniform values, both.
    """
    assert bits + EXTRA <= 64 and s.frac >= UNIT, "a reciprocal's ring"
    number = tables(bound)
    ring = sum_bits(s.frac, number)
    if s.bits < ring:
        s = yield from rescale(party, s, bits=ring, frac=s.frac, nonnegative=True)
    (wire,) = yield from open_masked(party, [s.narrow(ring)])
    y = yield from _line(party, wire, number, bits + EXTRA, frac + EXTRA)
    return (yield from rescale(party, y, bits=bits, frac=frac))


def cost_reciprocal(count: int, from_bits: int, from_frac: int, bound: float, bits: int) -> Declared:
    """`count` reciprocals below `bound`, from one ring to another, by tables of 512 lines for three octaves each."""
    number = tables(bound)
    ring, wide = sum_bits(from_frac, number), bits + EXTRA
    cost = cost_rescale(count, from_bits, 0, ring) if ring > from_bits else Declared()
    chosen = [(count, number - 1)] if number > 1 else []
    cost += cost_open_masked((count, ring)) + dealt((8 * number * count, 64), (4 * (2**number - 1) * count, wide))
    return cost + exchanged((2 * number * count, wide), *chosen)
