"""The exponential of a masked value, by two digits of each party's share of the mask.

Source: Pika's look-up by a rotated one-hot (ePrint 2022/826). Its sign, which Pika shares, is a product of a sign that each party
reads from its own share (`table.own_sign`), and so is the factor of the low digits: each party folds its own into its side.
Tables are exact integers, the same at every party: they come from integer arithmetic, not from a machine's libm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.correlations import Bits, Fit, Kind, Known, Layout, Number, Part, Related, Shape, Shapes, Shift, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.memo import constant
from protocols.party import Item, Party, Protocol_
from protocols.ring import blank, flat, known, like, reduce
from protocols.rows import INDEX, Rows
from protocols.shares import Shares, Wire
from protocols.table import WORD, ones, own_sign

FRAC = 12  # of the scores
FINER = 2  # fraction bits that scores may have besides, at most
LOW = FRAC + 2  # bits of the low digit below a maximum: units of the high digit are 4
LEAST_LOW = FRAC - 1  # without a maximum units are 2, 1 or 1/2
HIGH = WORD_BITS = 6  # bits of the high digit, a one-hot of 64; without a maximum one more
# a low digit's factor is e^(unit / 2 - l / 2^FRAC), so that two of them are e^-unit to e^unit, and has the fewer fraction bits, for the
# same relative error, the smaller the unit
FACTOR_FRACS = {LOW: 17, FRAC + 1: 16, FRAC: 15, LEAST_LOW: 15}
TABLE_FRAC = 16  # of a window below a maximum
ENTRY_FRAC = 30  # of a table's entries, which carry e^-unit for the centres of both factors
SPARE, LESS_SPARE = (
    3,
    2,
)  # fraction bits that a sum of entries times a factor has beyond the window's, where it is opened; without a maximum
KEPT_FRAC = 20  # of the shared product of masks and factors
SHARE_FRAC = 15  # of the part of 1 by which a public length divides
PRACTICALLY_NOTHING = 0.02  # units of a window

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


@dataclass(frozen=True, slots=True)
class Window:
    """The exponents that a table holds: of high digits up to `top` and the next one, for a carry; the `above` next ones count alike.

    These are e^(2 units), times both factors; all others count as 0. `frac`: fraction bits that results are good for. What they are said
    to have is `out_frac`: they are scaled by 2^(frac - TABLE_FRAC). `low`: bits of the low digit, which make the unit of the high one.
    `multiplied`: halves of a nat that a divisor may multiply by at most, in place of dividing. `fine`: fraction bits that exponents have
    beyond `FRAC`; the low digit has as many more.
    """

    top: int
    frac: int
    above: int = 0
    spare: int = SPARE
    low: int = LOW
    multiplied: int = 0
    fine: int = 0

    @staticmethod
    def saturating(frac: int, above: int, low: int = FRAC + 1) -> Window:
        """One without a maximum."""
        return Window(0, frac, above, LESS_SPARE, low)

    @property
    def places(self) -> int:
        """Bits of the low digit, with those that are finer."""
        return self.low + self.fine

    @property
    def unit(self) -> float:
        """Of the high digit."""
        return math.ldexp(1.0, self.low - FRAC)

    @property
    def high(self) -> int:
        """Bits of the high digit."""
        return HIGH if self.low == LOW else HIGH + 1

    @property
    def score_bits(self) -> int:
        """The ring of the exponents."""
        return self.places + self.high

    @property
    def factor_frac(self) -> int:
        """Fraction bits of a party's factor."""
        return FACTOR_FRACS[self.low]

    @property
    def out_frac(self) -> int:
        """Fraction bits of the results."""
        return TABLE_FRAC + self.spare + self.factor_frac

    @property
    def largest(self) -> float:
        """No result is above it: below a maximum what follows from e^0.5, without one e^(2 units), and what multiplies."""
        return math.exp(2 * self.unit + self.multiplied / 2) if self.above else 2.0

    @property
    def bits(self) -> int:
        """The ring of the results, and of a sign."""
        return self.frac + self.spare + self.factor_frac + math.ceil(math.log2(self.largest * (1.01 if self.above else 1))) + 1

    @property
    def digits(self) -> range:
        """Sums of both parties' high digits and the difference's whose entries are not practically 0: a carry makes one more of them."""
        lowest = self.top + 1
        while math.exp(self.unit * lowest) * 2.0**self.frac > PRACTICALLY_NOTHING:  # the largest value of the digit below
            lowest -= 1
        return range(lowest, self.top + 2)


BELOW_MAXIMUM = Window(1, TABLE_FRAC)


def _powers(first: int, step: int, low: int, frac: int) -> Iterator[int]:
    """e^((first + step * l) / 2^frac) for l in [0, 2^low), with _E_FIXED fraction bits."""
    value, factor = _exp_fixed(first, 1 << frac), _exp_fixed(step, 1 << frac)
    for _ in range(1 << low):
        yield value
        value = value * factor >> _E_FIXED


def _round(value: int, frac: int) -> int:
    return (value + (1 << (_E_FIXED - frac - 1))) >> (_E_FIXED - frac)


@constant()
def multipliers(window: Window) -> Tensor:
    """(len(digits), 2^places): e^(unit (h - 1) + l / 2^(FRAC + fine)) * 2^ENTRY_FRAC, the public integer multipliers.

    It is the running sums that are rounded, not the entries: each is within 1 of the exact value, and as l is uniform
    they are right on average. To nearest, a thousand small exponentials in a row would all be rounded alike, to 0 at last.
    """
    table = []
    for digit in window.digits:
        first = (digit - 1) << window.places
        sums = [0, *(_round(total, ENTRY_FRAC) for total in accumulate(_powers(first, 1, window.places, FRAC + window.fine)))]
        table.append([after - before for before, after in pairwise(sums)])
    return torch.tensor(table, dtype=torch.int64)


@constant()
def factors(low: int, fine: int = 0) -> Tensor:
    """(2^(low + fine),): round(e^(unit / 2 - l / 2^(FRAC + fine)) * 2^FACTOR_FRACS[low]), a party's factor for its low digit."""
    powers = _powers(1 << (low + fine - 1), -1, low + fine, FRAC + fine)
    return torch.tensor([_round(value, FACTOR_FRACS[low]) for value in powers], dtype=torch.int64)


def factor(r: Tensor, words: Tensor, low: int, fine: int = 0, *, server: bool) -> Tensor:
    """x, the signed factor of a party that holds R = r and this share of the one-hot, (words, ...): |x| < 2^`factor_bits`."""
    return own_sign(ones(words).sum(0), server=server) * like(factors(low, fine), r)[r & ((1 << low + fine) - 1)]


def factor_bits(low: int) -> int:
    """Bits of a factor's size: e^2 < 8, e < 4, e^0.5 and e^0.25 < 2."""
    return FACTOR_FRACS[low] + max(1, low - FRAC + 1)


def dropped(low: int) -> int:
    """Bits of the shared product of masks and factors that are not kept, by the ring's fraction."""
    return TABLE_FRAC + (SPARE if low == LOW else LESS_SPARE) + FACTOR_FRACS[low] - KEPT_FRAC


class ExpMask(Kind, frozen=True):
    """For e^(x - m): with R = r_x - r_m 2^shift as each party shares it, the one-hot of the sum of both high digits, negated.

    And with the signed factors x_S, x_C of the low digits (`factor`) and both parties' masks a: a_C x_S - a_S x_C, without its low
    `dropped` bits, rounded: by D to within 1/2, by two parties alone to within that many, half a unit for each of the low bits of both.
    Without a maximum (0) R = r_x, in units of 2^low of less than 4, and the one-hot of 128 is in two words.
    """

    x: Number
    maximum: Number
    shape: Shape
    shift: Shift
    rows: Layout
    bits: Bits = BELOW_MAXIMUM.bits
    low: Number = LOW
    refers: ClassVar[tuple[str, ...]] = ("x", "maximum")

    def bounded(self) -> bool:
        """See `Kind`: below a maximum units are 4."""
        return self.low == LOW if self.maximum else LEAST_LOW <= self.low < LOW

    @property
    def finer(self) -> int:
        """Fraction bits beyond `FRAC`."""
        return 0

    @property
    def places(self) -> int:
        """Bits of the low digit, with those that are finer."""
        return self.low + self.finer

    @property
    def high(self) -> int:
        """Bits of the high digit."""
        return HIGH if self.low == LOW else HIGH + 1

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        words = 1 << (self.high - WORD_BITS)
        return Part((words, *self.shape), WORD, xor=True), Part(self.shape, self.bits - dropped(self.low))

    def tolerance(self) -> tuple[int, ...]:
        """See `Kind`."""
        return 0, dropped(self.low)

    def fit(self, shapes: Shapes) -> Fit:
        x, words, index = shapes.server_mask(self.x), 2, 0
        if self.maximum:
            rows = Rows.read(self.rows)
            fits(len(x) == 2, x[-1] == rows.count, shapes.server_mask(self.maximum) == (x[0], rows.number))
            words, index = 1, INDEX * rows.count
        return Fit(((words, *x), x), None, (18 + 4 * words) * math.prod(x) + index)

    def difference(self, x: Tensor, maximum: Tensor | None) -> Tensor:
        """R of these masks, or of one party's shares of them."""
        found = x if maximum is None else x - Rows.read(self.rows).spread(maximum << self.shift)
        return reduce(found, self.places + self.high)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        at, low, fine, places = self.maximum, self.low, self.finer, self.places
        r_server = self.difference(known.server_mask(self.x), known.server_mask(at) if at else None)
        r_client = reduce(self.difference(known.mask(self.x), known.mask(at) if at else None) - r_server, places + self.high)
        place = place_of((r_server >> places) + (r_client >> places), self.high)
        hot = torch.ones_like(place) << (place & (WORD - 1))
        hot = torch.stack([hot * (place >> WORD_BITS == word) for word in range(1 << (self.high - WORD_BITS))])
        x_server, x_client = factor(r_server, shares[0], low, fine, server=True), factor(r_client, shares[0] ^ hot, low, fine, server=False)
        drop = dropped(low)
        return (hot, (x_server * client[0] - x_client * server[0] + (1 << (drop - 1))) >> drop), None


class FinerExpMask(ExpMask, frozen=True):
    """The same for exponents with more fraction bits."""

    fine: Number = FINER

    def bounded(self) -> bool:
        return super().bounded() and 1 <= self.fine <= FINER

    @property
    def finer(self) -> int:
        return self.fine


def place_of(digits: Tensor, high: int) -> Tensor:
    """Where the one-hot of a sum of high digits, negated, is hot."""
    return -digits & ((1 << high) - 1)


def _below(bits: Tensor) -> Tensor:
    """The lowest 0 to 64 bits of a word."""
    half = bits >> 1
    return (torch.ones_like(bits) << half << (bits - half)) - 1


def _entries(words: Tensor, d: Tensor, window: Window) -> Tensor:
    """One party's sum of its bits of the rotated one-hot times the table's entries for the public d in [0, 2^score_bits).

    Of the digits that count alike, an entry is e^(unit (top + 2)), with e^-unit for the centres.
    """
    high, low, size = d >> window.places, d & ((1 << window.places) - 1), (1 << window.high) - 1
    table, u = like(multipliers(window), d), torch.zeros_like(d)
    for k, digit in enumerate(window.digits):
        place = (digit - high) & size
        word = words[0] if len(words) == 1 else torch.where(place < WORD, words[0], words[1])
        u = u + ((word >> (place & (WORD - 1))) & 1) * table[k][low]
    for number, word in enumerate(words if window.above else ()):
        start = (window.top + 2 - high - WORD * number) & size  # from the word's first bit on, around both words' end
        upper, around = (start + window.above).clamp(max=WORD), (start + window.above - size - 1).clamp(min=0)
        many = ones(word & ((_below(upper) & ~_below(start.clamp(max=WORD))) | _below(around)))
        u = u + many * saturated(window)
    return u


def _folded(
    words: Tensor, d: Tensor, r: Tensor, mask: Tensor, window: Window, drop: Tensor, part: Tensor, *, server: bool
) -> tuple[Tensor, Tensor]:
    """x and part u x, rounded and masked; `drop` and `part`, (1,) or of the last axis: how many bits of u x are rounded away, and of 1."""
    if kernels.fast is None or not d.is_cpu:
        own = factor(r, words, window.low, window.fine, server=server)
        u = (_entries(words, d, window) * part) >> SHARE_FRAC
        return own, ((u * own + (torch.ones_like(drop) << (drop - 1))) >> drop) + mask
    own, mine = torch.empty_like(d, memory_format=torch.contiguous_format), torch.empty(d.shape, dtype=torch.int64)
    layout = np.array([window.digits.start, window.top, window.above, window.places, window.high, saturated(window), SHARE_FRAC])
    public = (*_side_by_side(window), layout, flat(drop), flat(part))
    kernels.fast.exponential(flat(words).reshape(len(words), -1), flat(d), flat(r), flat(mask), *public, int(server), flat(own), flat(mine))
    return own, mine


@constant()
def _side_by_side(window: Window) -> tuple[Any, Any]:
    """The multipliers (2^places, digits), and the factors, as arrays."""
    return multipliers(window).T.contiguous().numpy(), factors(window.low, window.fine).numpy()


@lru_cache
def saturated(window: Window) -> int:
    """What a digit that counts as e^(2 units) adds: the entry of the first one above the carry's, at the low digit 0."""
    return _round(_exp_fixed((window.top + 1) << window.low, 1 << FRAC), ENTRY_FRAC)  # finer or not, it is the same


def exponential(
    party: Party,
    x: Wire,
    maximum: Wire | None,
    rows: Rows,
    shift: int,
    *,
    window: Window = BELOW_MAXIMUM,
    offset: Tensor | None = None,
    divisor: tuple[Tensor, Tensor] | None = None,
    bits: int = 0,
) -> Protocol_[Shares]:
    """e^(x - m 2^shift) for scores x (H, N) with 12 fraction bits and each row's m (H, number); shares in Z_2^38, 36 fraction bits.

    With `Window.fine` scores, shift and offset have one or two more, and so has the low digit.

    Steps: D = X - M 2^shift = d + R in Z_2^20 is public, d = x - m 2^shift, R = R_S + R_C. With high and low digits (units of 4),
    e^d = e^(4 (D_h - R_S,h - R_C,h)) e^(D_l) e^(-R_S,l) e^(-R_C,l). The two hold XOR shares t_S, t_C of the one-hot of
    -(R_S,h + R_C,h); t_S - t_C is plus or minus it, and the sign is a product of one that S knows and one that C knows. Each
    sums its bits of the rotated one-hot times public integers for table[h] e^(D_l) 2^30, where table[h] = e^(4 h), 0 <= h <= 2,
    and table[h] = e^(4 (h - 64)) above: u. Each rounds u x, x being its sign times e^(-R_l), to 19 fraction bits, and opens it
    under its mask, Y. e^d = (u_S x_S) x_C - x_S (u_C x_C) = Y_S x_C - x_S Y_C + (a_C x_S - a_S x_C), the last of which D shares.
    Without a maximum: e^(x - offset) for a public `offset` (N,) of integers with 12 fraction bits, units of 2 and below (`Window.unit`)
    and a one-hot of 128. The `window` has the digits of d + R_l for R_l in [0, 2 units) up to 1, so that d up to 0 has its own, and those
    above count as e^(2 units) e^(-R_l): d above 0 counts as 0 at least and itself, or 2 units, at most. With a public `divisor` (two of
    (N,), octaves and a part of 1 with 15 fraction bits) each element is multiplied by part 2^-octave before what is opened is rounded.
    Domain: d in [-244, 0.5); without a maximum unit [above - 126, above). Error: of the two factors 2^-18 e^2 each, relative (2^-17 e,
    2^-16 e^0.5, 2^-16 e^0.25 with units of 2, 1, 1/2), of the two roundings 2^-20 e^2 each (2^-19 e and less), of the multiplier 2^-30 e^4,
    and of the last product 2^-21 with a dealer, 2^-16 without: at most 5.7e-5 e^d + 1.6e-5, so 1.1e-4, and 1.3e-4. Its mean over R is
    below 2e-7. More fraction bits than 16 make all but the first part smaller by as many. With `bits` the ring is wider than it must be.
    Rounds: 1. Bits: 38 each way (`Window.bits`). Learns: the uniform Y, each the other's.
    """
    assert window.top <= (0 if window.above else 1), "the sums of a table's entries times a factor fit 64 bits"
    assert (window.low == LOW) == (maximum is not None), "units are 4 below a maximum"
    bits, layout = bits or window.bits, rows.fields() if maximum is not None else ()
    of = (x.name, maximum.name if maximum is not None else 0, x.shape, shift, layout, bits, window.low)
    kind = FinerExpMask(*of, window.fine) if window.fine else ExpMask(*of)
    correlation = party.take(kind)
    if not known(x.masked) or (maximum is not None and not known(maximum.masked)):
        yield [Item(blank(*x.shape), bits)]
        return Shares(blank(*x.shape), bits, window.out_frac)
    words, product = correlation.shares
    d = kind.difference(x.masked, maximum.masked if maximum is not None else None)
    if offset is not None:
        d = reduce(d - like(offset, d), window.score_bits)
    r = kind.difference(x.mask, maximum.mask if maximum is not None else None)
    drop = torch.full((1,), ENTRY_FRAC + window.factor_frac - window.frac - window.spare, device=d.device)
    part = torch.full((1,), 1 << SHARE_FRAC, device=d.device)
    if divisor is not None:
        drop, part = drop + like(divisor[0], d), like(divisor[1], d)
    own, mine = _folded(words, d, r, correlation.own[0], window, drop, part, server=party.is_server)
    (theirs,) = yield [Item(mine, bits)]
    value = own * theirs
    return Shares((-value if party.is_server else value) + (product << dropped(window.low)), bits, window.out_frac)


def cost_exponential(count: int, bits: int = BELOW_MAXIMUM.bits, low: int = LOW) -> Declared:
    """D: a one-hot, in two words without a maximum, and the masks times the factors."""
    return dealt((count if low == LOW else 2 * count, WORD), (count, bits - dropped(low))) + exchanged((count, bits))
