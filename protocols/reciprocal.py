"""The reciprocal of every row's sum: linear pieces, read from tables at a masked index.

Source: a table read through a rotated one-hot (Pika, ePrint 2022/826) whose sign the dealer knows, with pieces that
double in width with the octave as in SIGMA's normalisation (2023/1269), here three octaves at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import count
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.correlations import Bits, Fit, Kind, Known, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.memo import constant
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Item, Party, Protocol_
from protocols.ring import array, blank, flat, known, like
from protocols.shares import Shares, Wire
from protocols.table import WORD, hot_held, one_hot, read
from protocols.truncation import cost_rescale, rescale

INDEX_BITS = 9
_WORDS = (1 << INDEX_BITS) // WORD
UNIT = 7  # the lowest table's lines are 2^-7 apart, those of each further table eight times as much
STEP = 3
WIDEST_STEP = 7  # octaves from the table before to one that need not be exact
_SOFT = 2  # below this index the lowest table has the value of this one: a sum that is next to nothing has a bounded reciprocal
_LOW_BITS = 9  # of the sum's bits below the index, those that are multiplied by the slope
EXTRA = 10  # fraction bits of the lines beyond those of the result, at most
LEAST_EXTRA = 6


@dataclass(frozen=True, slots=True)
class Tables:
    """How many tables there are, and how many octaves the last one lies above those of which each is three above the one before.

    More than seven octaves are two tables' steps.
    """

    number: int
    last: int = STEP

    @staticmethod
    def of(bound: float, exact: float | None = None) -> Tables:
        """For sums below `bound`: table p has lines for sums below 4 * 8^p. Above `exact` the last ones may have wider lines."""
        for number in count(1):
            wide = range(STEP + 1, 1 + WIDEST_STEP * min(number - 1, 2)) if exact is not None else ()
            for tables in (Tables(number), *(Tables(number, last) for last in wide)):
                if tables._end >= bound and (tables.last == STEP or (exact is not None and tables._begin >= exact)):
                    return tables
        raise AssertionError

    @property
    def _wide(self) -> int:
        """The first table with wider lines, if there is one."""
        return self.number - (2 if self.last > WIDEST_STEP else 1)

    @property
    def _end(self) -> float:
        return math.ldexp((1 << INDEX_BITS) - 1, self._place(self.number - 1) - UNIT)

    @property
    def _begin(self) -> float:
        """No sum below it is read from a table with wider lines: its index is one too large at most."""
        return math.ldexp(self.first(self._wide) - 1, self._place(self._wide) - UNIT)

    def _place(self, table: int) -> int:
        if table < self._wide or not table:
            return STEP * table
        return STEP * (self._wide - 1) + (self.last if table + 1 == self.number else (self.last + 1) // 2)

    def places(self, frac: int, table: int) -> tuple[int, int]:
        """(position of the index in the sum, position of the lowest bit that is multiplied by the slope)."""
        at = frac - UNIT + self._place(table)
        return at, max(0, at - _LOW_BITS)

    def first(self, table: int) -> int:
        """A table but the lowest is used from this index on: a sum below it is within the table before."""
        return ((1 << INDEX_BITS) - 2) >> (self._place(table) - self._place(table - 1)) if table else 0

    def bits(self, frac: int) -> int:
        """The ring that the sum is opened in: it holds the last table's range, and no more is needed."""
        return self.places(frac, self.number - 1)[0] + INDEX_BITS


@constant()
def _lines(frac: int, tables: Tables, table: int, out_frac: int) -> Tensor:
    """(3, 2^INDEX_BITS): value (out_frac fraction bits) and slope of 1 / s at each index, and whether a lower table is used.

    The line of index i is good on (i - 1, i + 1): the chord, lowered by half its largest gap, so that the error is even.
    In decimal arithmetic, which is the same on every machine: both parties must hold the same integers.
    """
    at, low = tables.places(frac, table)
    first, size = tables.first(table), 1 << INDEX_BITS
    value, slope = [0] * size, [0] * size
    with localcontext() as context:
        context.prec = 40
        unit = Decimal(2) ** (at - frac)
        for i in range(max(first, _SOFT), size):
            product = (i * unit) ** 2 - unit**2  # of the ends
            value[i] = round((i * unit / product - (i * unit - product.sqrt()) / product) * (1 << out_frac))
            slope[i] = round(-1 / product * Decimal(2) ** (out_frac - frac + low))
    if not table:
        value[:_SOFT] = [value[_SOFT]] * _SOFT
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
    last: Number = STEP
    refers: ClassVar[tuple[str, ...]] = ("sum",)

    def bounded(self) -> bool:
        """See `Kind`: the products double with each table."""
        return UNIT <= self.frac <= 32 and 1 <= self.number <= 8 and STEP <= self.last <= WIDEST_STEP * (2 if self.number > 2 else 1)

    @property
    def tables(self) -> Tables:
        """Where they lie."""
        return Tables(self.number, self.last)

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
        products = torch.ones_like(r)[None]
        for table in reversed(range(self.number)):
            at, low = self.tables.places(self.frac, table)
            words[table], sign = one_hot(r >> at, shares[0][table])
            part, (a, b) = (r & ((1 << at) - 1)) >> low, lines[table]
            terms = torch.stack([sign, sign * b, sign * part, sign * (b * part - a)])
            values.append((products[:, None] * terms).flatten(0, 1))  # (products, 4, ...) -> (4 products, ...)
            if table:
                rho = (server[1] ^ client[1]) >> (table - 1) & 1
                products = torch.cat([products, products * rho])
        return (words, torch.cat(values)), None


def _line(party: Party, s: Wire, tables: Tables, bits: int, frac: int) -> Protocol_[Shares]:
    """The line of the wire's own table at its value: every table's is read, and the choice is made by the tables' indices."""
    number = tables.number
    kind = ReciprocalMask(s.name, s.shape, s.frac, number, bits, tables.last)
    correlation = party.take(kind)
    if not known(s.masked):
        yield [Item(blank(*part.shape), part.bits) for part in kind.server_parts()]
        return Shares(s.masked, bits, frac)
    own, (words, products) = correlation.own, correlation.shares
    lines, choice = torch.empty_like(own[0]), torch.zeros_like(s.masked)
    for table in range(number):
        at, _ = tables.places(s.frac, table)
        index = s.masked >> at & ((1 << INDEX_BITS) - 1)
        value, slope, lower = read(words[table], index, like(_lines(s.frac, tables, table, frac), index))
        lines[table, 0], lines[table, 1] = value, slope
        if table:
            choice = choice | (lower & 1) << (table - 1)
    mine = [(lines if party.is_server else -lines) + own[0]]
    if number > 1:
        mine.append(choice ^ own[1])
    theirs = yield [Item(value, part.bits) for value, part in zip(mine, kind.server_parts(), strict=True)]
    beta = mine[1] ^ theirs[1] if number > 1 else choice
    return Shares(_chosen(s, mine[0] + theirs[0], beta, products, tables), bits, frac)


def _chosen(s: Wire, lines: Tensor, beta: Tensor, products: Tensor, tables: Tables) -> Tensor:
    """This party's share of the chosen table's line: the choice of a lower table is beta + (1 - 2 beta) rho."""
    if kernels.fast is not None and s.masked.is_cpu:
        out, number, count = torch.empty(s.shape, dtype=torch.int64), tables.number, s.masked.numel()
        opened, shares = (array(x.contiguous().view(*size, count)) for x, size in ((lines, (number, 2)), (products, (len(products),))))
        kernels.fast.chosen_line(flat(s.masked), opened, flat(beta), shares, _all_places(tables, s.frac), flat(out))
        return out
    result, coefficients, at_product = torch.zeros_like(s.masked), [torch.ones_like(s.masked)], 0
    for table in reversed(range(tables.number)):
        at, low = tables.places(s.frac, table)
        part, (value, slope) = (s.masked & ((1 << at) - 1)) >> low, lines[table]
        for coefficient in coefficients:
            sign, sign_b, sign_l, sign_ba = products[at_product : at_product + 4]
            # s (A' - a) + s (B' - b) (S_l - l)
            result += coefficient * ((value + slope * part) * sign - part * sign_b - slope * sign_l + sign_ba)
            at_product += 4
        if table:
            bit = beta >> (table - 1) & 1
            coefficients = [c * bit for c in coefficients] + [c * (1 - 2 * bit) for c in coefficients]
    return result


@lru_cache
def _all_places(tables: Tables, frac: int) -> np.ndarray:
    return np.array([tables.places(frac, table) for table in range(tables.number)], np.int64)


def _extra(bits: int) -> int:
    return min(EXTRA, 64 - bits)


def reciprocal(party: Party, s: Shares, *, bound: float, bits: int, frac: int, exact: float | None = None) -> Protocol_[Shares]:
    """1 / s for shares s (...) of values in [0.5, bound), in Z_2^bits with `frac` fraction bits.

    Steps: s is opened masked, in no more bits than its range. Tables of 512 lines cover [0.5, 4), up to 32, up to 256, ...;
    each is indexed by its own nine bits of s, so that s = index + (S_l - r_l) exactly for the bits l below, with no wrap.
    Every table's value and slope, up to a sign that D shares, are opened masked, and with them, under rho, whether the index
    is below the table's range: a lower table then, and this table's entries are 0. D shares the products of signs, masks
    and rhos: the chosen line's value is linear in them. Then truncate-reduce.
    Domain: bound <= 2^12, bits <= 58, at least 7 fraction bits of s. A ring of s that does not hold its range is widened first.
    Sums above `exact` may share one table of wider lines, and the lowest table goes on below 0.5: there, relative, (1 / i)^2 at
    index i, and below i = 2 the value stays what it is.
    Error: relative: chord, (1 / 63)^2 / 2, and s's lowest bits, 2^-9 / 62: at most 1.6e-4; and 2^(1 - frac) absolute.
    Rounds: 2, + 1 where s is widened. Bits each way: those of s; P (2 (bits + 10) + 1) - 1 for P tables.
    Learns: uniform values, both.
    """
    extra = _extra(bits)
    assert extra >= LEAST_EXTRA and s.frac >= UNIT, "a reciprocal's ring"
    tables = Tables.of(bound, exact)
    ring = tables.bits(s.frac)
    if s.bits < ring:
        s = yield from rescale(party, s, bits=ring, frac=s.frac, nonnegative=True)
    (wire,) = yield from open_masked(party, [s.narrow(ring)])
    y = yield from _line(party, wire, tables, bits + extra, frac + extra)
    return (yield from rescale(party, y, bits=bits, frac=frac))


def cost_reciprocal(count: int, from_bits: int, from_frac: int, bound: float, bits: int, exact: float | None = None) -> Declared:
    """`count` reciprocals below `bound`, from one ring to another, by tables of 512 lines for three octaves each."""
    tables = Tables.of(bound, exact)
    number, ring, wide = tables.number, tables.bits(from_frac), bits + _extra(bits)
    cost = cost_rescale(count, from_bits, 0, ring) if ring > from_bits else Declared()
    chosen = [(count, number - 1)] if number > 1 else []
    cost += cost_open_masked((count, ring)) + dealt((8 * number * count, 64), (4 * (2**number - 1) * count, wide))
    return cost + exchanged((2 * number * count, wide), *chosen)
