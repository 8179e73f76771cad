"""The exponential of a masked value, by two digits of the difference of the masks.

Source: Pika's look-up by a rotated one-hot (ePrint 2022/826), with the shared one-hot's sign folded into the second
factor, which the dealer knows. Tables are exact integers, the same at every party: they come from integer arithmetic,
not from a machine's libm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from protocols.correlations import Fit, Kind, Known, Layout, Number, Part, Related, Shape, Shapes, Shift, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.party import Item, Party, Protocol_
from protocols.ring import known, like, reduce
from protocols.rows import INDEX, Rows
from protocols.shares import Shares, Wire

FRAC = 12  # of the scores
LOW = FRAC + 2  # bits of the low digit: units of the high digit are 4
HIGH = 6  # bits of the high digit: a one-hot of 64
BITS = LOW + HIGH
TABLE_FRAC = 16  # of the table entry times e^low
FACTOR_FRAC = 18  # of the factor e^-R_low
OUT_FRAC = TABLE_FRAC + FACTOR_FRAC
OUT_BITS = OUT_FRAC + 2  # e^0.5 < 2, and a sign
_DIGITS = (-4, -3, -2, -1, 0, 1)  # high digits whose table entries are not practically 0 at TABLE_FRAC

_E_FIXED = 160  # fraction bits in which the tables are computed


@lru_cache
def _exp_fixed(numerator: int, denominator: int) -> int:
    """e^(numerator / denominator) with _E_FIXED fraction bits, by its series, in integers."""
    sign, numerator = numerator < 0, abs(numerator)
    halvings = 0
    while numerator > denominator << halvings:
        halvings += 1
    guard = _E_FIXED + 40 + halvings * 2
    x = (numerator << guard) // (denominator << halvings)
    total, term, k = 0, 1 << guard, 0
    while term:
        total += term
        k += 1
        term = (term * x >> guard) // k
    for _ in range(halvings):
        total = total * total >> guard
    if sign:
        total = (1 << 2 * guard) // total
    return total >> (guard - _E_FIXED)


def _powers(first: int, step: int) -> Iterator[int]:
    """e^(first + step * l / 2^FRAC) for l in [0, 2^LOW), with _E_FIXED fraction bits."""
    value, factor = _exp_fixed(first, 1), _exp_fixed(step, 1 << FRAC)
    for _ in range(1 << LOW):
        yield value
        value = value * factor >> _E_FIXED


def _round(value: int, frac: int) -> int:
    return (value + (1 << (_E_FIXED - frac - 1))) >> (_E_FIXED - frac)


@lru_cache
def multipliers() -> Tensor:
    """(len(_DIGITS), 2^LOW): e^(4 h + l / 2^FRAC) * 2^TABLE_FRAC, the public integer multipliers.

    It is the running sums that are rounded, not the entries: each is within 1 of the exact value, and as l is uniform
    they are right on average. To nearest, a thousand small exponentials in a row would all be rounded alike, to 0 at last.
    """
    table = []
    for digit in _DIGITS:
        sums = [0, *(_round(total, TABLE_FRAC) for total in accumulate(_powers(4 * digit, 1)))]
        table.append([after - before for before, after in pairwise(sums)])
    return torch.tensor(table, dtype=torch.int64)


@lru_cache
def factors() -> Tensor:
    """(2^LOW,): round(e^(-l / 2^FRAC) * 2^FACTOR_FRAC), the dealer's."""
    return torch.tensor([_round(value, FACTOR_FRAC) for value in _powers(0, -1)], dtype=torch.int64)


class ExpMask(Kind, frozen=True):
    """For e^(x - m): the one-hot of the high digit of R = r_x - r_m 2^shift, its sign times e^-R_low, and that times u's mask."""

    x: Number
    maximum: Number
    shape: Shape
    shift: Shift
    rows: Layout

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, OUT_BITS),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part(self.shape, 1 << HIGH, xor=True), Part(self.shape, OUT_BITS), Part(self.shape, OUT_BITS)

    def fit(self, shapes: Shapes) -> Fit:
        rows, x = Rows.read(self.rows), shapes.mask(self.x)
        fits(len(x) == 2, x[-1] == rows.count, shapes.mask(self.maximum) == (x[0], rows.number))
        return Fit((x, x, x), None, 22 * math.prod(x) + INDEX * rows.count)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        r = reduce(known.mask(self.x) - Rows(*self.rows).spread(known.mask(self.maximum) << self.shift), BITS)
        place = -(r >> LOW) & ((1 << HIGH) - 1)
        # the server's bit at the hot place is 1 and the client's 0, or the other way round
        sign = 2 * ((shares[0] >> place) & 1) - 1
        factor = sign * like(factors(), r)[r & ((1 << LOW) - 1)]
        return (torch.ones_like(r) << place, factor, factor * (server[0] + client[0])), None


def exponential(party: Party, x: Wire, maximum: Wire, rows: Rows, shift: int) -> Protocol_[Shares]:
    """e^(x - m 2^shift) for scores x (H, N) with 12 fraction bits and each row's m (H, number); shares in Z_2^36, 34 fraction bits.

    Steps: X - M 2^shift = d + R in Z_2^20 is public, d = x - m 2^shift, R known to D. With high and low digits,
    e^d = e^(4 (X_h - R_h)) e^(X_l) e^(-R_l). S and C hold XOR shares t_S, t_C of the one-hot of -R_h; t_S - t_C is plus or
    minus it. Each sums its bits of the rotated one-hot times public integers for table[h] e^(X_l) 2^16, where
    table[0] = 1, table[1] = e^4, table[h] = e^(4 (h - 64)); C negates: u. D shares the sign times e^(-R_l), v, and v
    times the mask of u. u is opened masked: u v = U v - a v.
    Domain: d in [-248, 0.5). Error: 2^-16 e^(-R_l) (the multiplier) and 2^-19 e^(d + R_l) (the factor), R_l < 4: at
    most 1.1e-4 e^d + 1.6e-5, so 1.9e-4; its mean over R is below 2e-7.
    Rounds: 1. Bits: 36 each way. Learns: the uniform U, both.
    """
    correlation = party.take(ExpMask(x.name, maximum.name, x.shape, shift, rows.fields()))
    if not known(x.masked, maximum.masked):
        yield [Item(x.masked, OUT_BITS)]
        return Shares(x.masked, OUT_BITS, OUT_FRAC)
    word, factor, product = correlation.shares
    d = reduce(x.masked - rows.spread(maximum.masked << shift), BITS)
    high, low = d >> LOW, d & ((1 << LOW) - 1)
    table = like(multipliers(), d)
    u = torch.zeros_like(d)
    for k, digit in enumerate(_DIGITS):
        u = u + ((word >> ((digit - high) & ((1 << HIGH) - 1))) & 1) * table[k][low]
    mine = (u if party.is_server else -u) + correlation.own[0]
    (theirs,) = yield [Item(mine, OUT_BITS)]
    return Shares((mine + theirs) * factor - product, OUT_BITS, OUT_FRAC)


def cost_exponential(count: int) -> Declared:
    """D: a one-hot, the factor, and the factor times a mask."""
    return dealt((count, 2**HIGH), (count, OUT_BITS), (count, OUT_BITS)) + exchanged((count, OUT_BITS))
