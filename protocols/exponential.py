"""The exponential of a masked value, by two digits of each party's share of the mask.

Source: Pika's look-up by a rotated one-hot (ePrint 2022/826). Its sign, which Pika shares, is a product of a sign that each party
reads from its own share (`table.own_sign`), and so is the factor of the low digits: each party folds its own into its side.
Tables are exact integers, the same at every party: they come from integer arithmetic, not from a machine's libm.
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
from protocols.table import ones, own_sign

FRAC = 12  # of the scores
LOW = FRAC + 2  # bits of the low digit: units of the high digit are 4
HIGH = 6  # bits of the high digit: a one-hot of 64
BITS = LOW + HIGH
CENTRE = 2  # a low digit's factor is e^(2 - l / 2^FRAC): two of them are e^-4 to e^4
TABLE_FRAC = 26  # of the table entry times e^low, e^-4 for the centres of both factors
FACTOR_FRAC = 17  # of a party's factor
FACTOR_BITS = 20  # e^2 < 8
SENT_FRAC = 19  # of a party's sum of entries times its factor
OUT_FRAC = SENT_FRAC + FACTOR_FRAC
OUT_BITS = OUT_FRAC + 2  # e^0.5 < 2, and a sign; that of what is sent, too
DROP = 16  # bits of the shared product of masks and factors that are not kept
KEPT_BITS = OUT_BITS - DROP
_DIGITS = (-4, -3, -2, -1, 0, 1, 2)  # high digits whose table entries are not practically 0

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
    """(len(_DIGITS), 2^LOW): e^(4 h - 4 + l / 2^FRAC) * 2^TABLE_FRAC, the public integer multipliers.

    It is the running sums that are rounded, not the entries: each is within 1 of the exact value, and as l is uniform
    they are right on average. To nearest, a thousand small exponentials in a row would all be rounded alike, to 0 at last.
    """
    table = []
    for digit in _DIGITS:
        sums = [0, *(_round(total, TABLE_FRAC) for total in accumulate(_powers(4 * digit - 2 * CENTRE, 1)))]
        table.append([after - before for before, after in pairwise(sums)])
    return torch.tensor(table, dtype=torch.int64)


@lru_cache
def factors() -> Tensor:
    """(2^LOW,): round(e^(2 - l / 2^FRAC) * 2^FACTOR_FRAC), a party's factor for its low digit."""
    return torch.tensor([_round(value, FACTOR_FRAC) for value in _powers(CENTRE, -1)], dtype=torch.int64)


def factor(r: Tensor, word: Tensor, *, server: bool) -> Tensor:
    """x, the signed factor of a party that holds R = r and this share of the one-hot: |x| < 2^FACTOR_BITS."""
    return own_sign(ones(word), server=server) * like(factors(), r)[r & ((1 << LOW) - 1)]


class ExpMask(Kind, frozen=True):
    """For e^(x - m): with R = r_x - r_m 2^shift as each party shares it, the one-hot of the sum of both high digits, negated.

    And with the signed factors x_S, x_C of the low digits (`factor`) and both parties' masks a: a_C x_S - a_S x_C, without its low
    16 bits, rounded: by D to within 1/2, by two parties alone to within 16, half a unit for each of the low bits of both factors.
    """

    x: Number
    maximum: Number
    shape: Shape
    shift: Shift
    rows: Layout

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, OUT_BITS),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part(self.shape, 1 << HIGH, xor=True), Part(self.shape, KEPT_BITS)

    def tolerance(self) -> tuple[int, ...]:
        """See `Kind`."""
        return 0, DROP

    def fit(self, shapes: Shapes) -> Fit:
        rows, x = Rows.read(self.rows), shapes.server_mask(self.x)
        fits(len(x) == 2, x[-1] == rows.count, shapes.server_mask(self.maximum) == (x[0], rows.number))
        return Fit((x, x), None, 22 * math.prod(x) + INDEX * rows.count)

    def difference(self, x: Tensor, maximum: Tensor) -> Tensor:
        """R of these masks, or of one party's shares of them."""
        return reduce(x - Rows(*self.rows).spread(maximum << self.shift), BITS)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        r_server = self.difference(known.server_mask(self.x), known.server_mask(self.maximum))
        r_client = reduce(self.difference(known.mask(self.x), known.mask(self.maximum)) - r_server, BITS)
        hot = torch.ones_like(r_server) << (-((r_server >> LOW) + (r_client >> LOW)) & ((1 << HIGH) - 1))
        product = factor(r_server, shares[0], server=True) * client[0] - factor(r_client, shares[0] ^ hot, server=False) * server[0]
        return (hot, (product + (1 << (DROP - 1))) >> DROP), None


def exponential(party: Party, x: Wire, maximum: Wire, rows: Rows, shift: int) -> Protocol_[Shares]:
    """e^(x - m 2^shift) for scores x (H, N) with 12 fraction bits and each row's m (H, number); shares in Z_2^38, 36 fraction bits.

    Steps: D = X - M 2^shift = d + R in Z_2^20 is public, d = x - m 2^shift, R = R_S + R_C. With high and low digits (units of 4),
    e^d = e^(4 (D_h - R_S,h - R_C,h)) e^(D_l) e^(-R_S,l) e^(-R_C,l). The two hold XOR shares t_S, t_C of the one-hot of
    -(R_S,h + R_C,h); t_S - t_C is plus or minus it, and the sign is a product of one that S knows and one that C knows. Each
    sums its bits of the rotated one-hot times public integers for table[h] e^(D_l) 2^26, where table[h] = e^(4 h), 0 <= h <= 2,
    and table[h] = e^(4 (h - 64)) above: u. Each rounds u x, x being its sign times e^(-R_l), to 19 fraction bits, and opens it
    under its mask, Y. e^d = (u_S x_S) x_C - x_S (u_C x_C) = Y_S x_C - x_S Y_C + (a_C x_S - a_S x_C), the last of which D shares.
    Domain: d in [-244, 0.5). Error: of the two factors 2^-18 e^2 each, relative, of the two roundings 2^-20 e^2 each, of the multiplier
    2^-26 e^4, and of the last product 2^-21 with a dealer, 2^-16 without: at most 5.7e-5 e^d + 1.6e-5, so 1.1e-4, and 1.3e-4. Its mean
    over R is below 2e-7. Rounds: 1. Bits: 38 each way. Learns: the uniform Y, each the other's.
    """
    kind = ExpMask(x.name, maximum.name, x.shape, shift, rows.fields())
    correlation = party.take(kind)
    if not known(x.masked, maximum.masked):
        yield [Item(x.masked, OUT_BITS)]
        return Shares(x.masked, OUT_BITS, OUT_FRAC)
    word, product = correlation.shares
    d = kind.difference(x.masked, maximum.masked)
    high, low = d >> LOW, d & ((1 << LOW) - 1)
    table = like(multipliers(), d)
    u = torch.zeros_like(d)
    for k, digit in enumerate(_DIGITS):
        u = u + ((word >> ((digit - high) & ((1 << HIGH) - 1))) & 1) * table[k][low]
    own = factor(kind.difference(x.mask, maximum.mask), word, server=party.is_server)
    drop = TABLE_FRAC + FACTOR_FRAC - SENT_FRAC
    mine = ((u * own + (1 << (drop - 1))) >> drop) + correlation.own[0]
    (theirs,) = yield [Item(mine, OUT_BITS)]
    value = own * theirs
    return Shares((-value if party.is_server else value) + (product << DROP), OUT_BITS, OUT_FRAC)


def cost_exponential(count: int) -> Declared:
    """D: a one-hot, and the masks times the factors."""
    return dealt((count, 2**HIGH), (count, KEPT_BITS)) + exchanged((count, OUT_BITS))
