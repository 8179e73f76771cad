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
from protocols.table import ones, own_sign

FRAC = 12  # of the scores
LOW = FRAC + 2  # bits of the low digit: units of the high digit are 4
HIGH = 6  # bits of the high digit: a one-hot of 64
BITS = LOW + HIGH
CENTRE = 2  # a low digit's factor is e^(2 - l / 2^FRAC): two of them are e^-4 to e^4
FACTOR_FRAC = 17  # of a party's factor
FACTOR_BITS = 20  # e^2 < 8
TABLE_FRAC = 16  # of a window below a maximum
ENTRY_FRAC = 30  # of a table's entries, which carry e^-4 for the centres of both factors
SPARE = 3  # fraction bits that a sum of entries times a factor has beyond the window's, where it is opened
OUT_FRAC = TABLE_FRAC + SPARE + FACTOR_FRAC
DROP = 16  # bits of the shared product of masks and factors that are not kept
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
    """The exponents that a table holds: of high digits up to `top`, the `above` next ones counted as e^4, and all others as 0.

    `frac`: fraction bits that results are good for. What they are said to have is `out_frac`: they are scaled by 2^(frac - TABLE_FRAC).
    """

    top: int
    frac: int
    above: int = 0
    spare: int = SPARE

    @property
    def out_frac(self) -> int:
        """Fraction bits of the results."""
        return OUT_FRAC - SPARE + self.spare

    @property
    def bits(self) -> int:
        """The ring of the results: of e^0.5 < 2 below a maximum, of e^4 < 2^6 without one, and of a sign."""
        return self.frac + self.spare + FACTOR_FRAC + (7 if self.above else 2)

    @property
    def digits(self) -> range:
        """Sums of both parties' high digits and the difference's whose entries are not practically 0: a carry makes one more of them."""
        lowest = self.top + 1
        while math.exp(4 * lowest) * 2.0**self.frac > PRACTICALLY_NOTHING:  # the largest value of the digit below
            lowest -= 1
        return range(lowest, self.top + 2)


BELOW_MAXIMUM = Window(1, TABLE_FRAC)
OUT_BITS = BELOW_MAXIMUM.bits


def _powers(first: int, step: int) -> Iterator[int]:
    """e^(first + step * l / 2^FRAC) for l in [0, 2^LOW), with _E_FIXED fraction bits."""
    value, factor = _exp_fixed(first, 1), _exp_fixed(step, 1 << FRAC)
    for _ in range(1 << LOW):
        yield value
        value = value * factor >> _E_FIXED


def _round(value: int, frac: int) -> int:
    return (value + (1 << (_E_FIXED - frac - 1))) >> (_E_FIXED - frac)


@constant()
def multipliers(window: Window) -> Tensor:
    """(len(digits), 2^LOW): e^(4 h - 4 + l / 2^FRAC) * 2^ENTRY_FRAC, the public integer multipliers.

    It is the running sums that are rounded, not the entries: each is within 1 of the exact value, and as l is uniform
    they are right on average. To nearest, a thousand small exponentials in a row would all be rounded alike, to 0 at last.
    """
    table = []
    for digit in window.digits:
        sums = [0, *(_round(total, ENTRY_FRAC) for total in accumulate(_powers(4 * digit - 2 * CENTRE, 1)))]
        table.append([after - before for before, after in pairwise(sums)])
    return torch.tensor(table, dtype=torch.int64)


@constant()
def factors() -> Tensor:
    """(2^LOW,): round(e^(2 - l / 2^FRAC) * 2^FACTOR_FRAC), a party's factor for its low digit."""
    return torch.tensor([_round(value, FACTOR_FRAC) for value in _powers(CENTRE, -1)], dtype=torch.int64)


def factor(r: Tensor, words: Tensor, *, server: bool) -> Tensor:
    """x, the signed factor of a party that holds R = r and this share of the one-hot, (words, ...): |x| < 2^FACTOR_BITS."""
    return own_sign(ones(words).sum(0), server=server) * like(factors(), r)[r & ((1 << LOW) - 1)]


class ExpMask(Kind, frozen=True):
    """For e^(x - m): with R = r_x - r_m 2^shift as each party shares it, the one-hot of the sum of both high digits, negated.

    And with the signed factors x_S, x_C of the low digits (`factor`) and both parties' masks a: a_C x_S - a_S x_C, without its low
    16 bits, rounded: by D to within 1/2, by two parties alone to within 16, half a unit for each of the low bits of both factors.
    Without a maximum (0) R = r_x, and the one-hot is in two words: in the second where the sum of the low digits has a carry.
    """

    x: Number
    maximum: Number
    shape: Shape
    shift: Shift
    rows: Layout
    bits: Bits = OUT_BITS
    refers: ClassVar[tuple[str, ...]] = ("x", "maximum")

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part((1 if self.maximum else 2, *self.shape), 1 << HIGH, xor=True), Part(self.shape, self.bits - DROP)

    def tolerance(self) -> tuple[int, ...]:
        """See `Kind`."""
        return 0, DROP

    def fit(self, shapes: Shapes) -> Fit:
        x, words, index = shapes.server_mask(self.x), 2, 0
        if self.maximum:
            rows = Rows.read(self.rows)
            fits(len(x) == 2, x[-1] == rows.count, shapes.server_mask(self.maximum) == (x[0], rows.number))
            words, index = 1, INDEX * rows.count
        return Fit(((words, *x), x), None, (18 + 4 * words) * math.prod(x) + index)

    def difference(self, x: Tensor, maximum: Tensor | None) -> Tensor:
        """R of these masks, or of one party's shares of them."""
        return reduce(x if maximum is None else x - Rows.read(self.rows).spread(maximum << self.shift), BITS)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        at = self.maximum
        r_server = self.difference(known.server_mask(self.x), known.server_mask(at) if at else None)
        r_client = reduce(self.difference(known.mask(self.x), known.mask(at) if at else None) - r_server, BITS)
        hot = (torch.ones_like(r_server) << place_of((r_server >> LOW) + (r_client >> LOW)))[None]
        if not at:
            low = (1 << LOW) - 1
            carry = ((r_server & low) + (r_client & low)) >> LOW
            hot = torch.cat([hot * (1 - carry), hot * carry])
        product = factor(r_server, shares[0], server=True) * client[0] - factor(r_client, shares[0] ^ hot, server=False) * server[0]
        return (hot, (product + (1 << (DROP - 1))) >> DROP), None


def place_of(digits: Tensor) -> Tensor:
    """Where the one-hot of a sum of high digits, negated, is hot."""
    return -digits & ((1 << HIGH) - 1)


def _entries(words: Tensor, d: Tensor, window: Window) -> Tensor:
    """One party's sum of its bits of the rotated one-hot times the table's entries for the public d in [0, 2^BITS).

    Without a maximum, an entry of the second word has a carry, and its true digit is one less. Of the digits that count as e^4, an
    entry is e^(4 top + 4), e^4 more where there is a carry.
    """
    high, low = d >> LOW, d & ((1 << LOW) - 1)
    table, u = like(multipliers(window), d), torch.zeros_like(d)
    for k, digit in enumerate(window.digits):
        place = (digit - high) & ((1 << HIGH) - 1)
        for carry, word in enumerate(words):
            if not window.above or digit - carry <= window.top:
                u = u + ((word >> place) & 1) * table[k][low]
    run = (1 << window.above) - 1
    for carry, word in enumerate(words if window.above else ()):
        first = window.top + 1 + carry
        place = (first - high) & ((1 << HIGH) - 1)
        many = ones(word & ((run << place) | (run >> 1 >> (63 - place))))  # the next places, around the word's end
        u = u + many * int(_saturated(window)[carry])
    return u


def _folded(words: Tensor, d: Tensor, r: Tensor, mask: Tensor, window: Window, drop: Tensor, *, server: bool) -> tuple[Tensor, Tensor]:
    """x and u x, rounded and masked; `drop` (1,) or of the last axis says how many bits of u x are rounded away."""
    if kernels.fast is None or not d.is_cpu:
        own = factor(r, words, server=server)
        return own, ((_entries(words, d, window) * own + (torch.ones_like(drop) << (drop - 1))) >> drop) + mask
    own, mine = torch.empty_like(d, memory_format=torch.contiguous_format), torch.empty(d.shape, dtype=torch.int64)
    layout = np.array([window.digits.start, window.top, window.above, LOW, HIGH])
    public = (*_side_by_side(window), layout, _saturated(window), flat(drop))
    kernels.fast.exponential(flat(words).reshape(len(words), -1), flat(d), flat(r), flat(mask), *public, int(server), flat(own), flat(mine))
    return own, mine


@constant()
def _side_by_side(window: Window) -> tuple[Any, Any]:
    """The multipliers (2^LOW, digits), and the factors, as arrays."""
    return multipliers(window).T.contiguous().numpy(), factors().numpy()


@lru_cache
def _saturated(window: Window) -> Any:
    """What a digit that counts as e^4 adds in each word: with a carry e^4 more."""
    return np.array([_round(_exp_fixed(4 * (window.top + 1 + carry) - 2 * CENTRE, 1), ENTRY_FRAC) for carry in range(2)])


def exponential(
    party: Party,
    x: Wire,
    maximum: Wire | None,
    rows: Rows,
    shift: int,
    *,
    window: Window = BELOW_MAXIMUM,
    offset: Tensor | None = None,
    octave: Tensor | None = None,
    bits: int = 0,
) -> Protocol_[Shares]:
    """e^(x - m 2^shift) for scores x (H, N) with 12 fraction bits and each row's m (H, number); shares in Z_2^38, 36 fraction bits.

    Steps: D = X - M 2^shift = d + R in Z_2^20 is public, d = x - m 2^shift, R = R_S + R_C. With high and low digits (units of 4),
    e^d = e^(4 (D_h - R_S,h - R_C,h)) e^(D_l) e^(-R_S,l) e^(-R_C,l). The two hold XOR shares t_S, t_C of the one-hot of
    -(R_S,h + R_C,h); t_S - t_C is plus or minus it, and the sign is a product of one that S knows and one that C knows. Each
    sums its bits of the rotated one-hot times public integers for table[h] e^(D_l) 2^30, where table[h] = e^(4 h), 0 <= h <= 2,
    and table[h] = e^(4 (h - 64)) above: u. Each rounds u x, x being its sign times e^(-R_l), to 19 fraction bits, and opens it
    under its mask, Y. e^d = (u_S x_S) x_C - x_S (u_C x_C) = Y_S x_C - x_S Y_C + (a_C x_S - a_S x_C), the last of which D shares.
    Without a maximum: e^(x - offset) for a public `offset` (N,) of integers with 12 fraction bits. The `window` has true digits, of
    d + R_l for R_l in [0, 4), the carry being taken off, up to 0, and those above count as e^4 e^(-R_l), between 1 and e^4: d above 0
    counts as 0 at least and 4 at most. The one-hot says by its word whether there is a carry. With a public `octave` (N,) each
    element is divided by 2^octave, where what is opened is rounded.
    Domain: d in [-244, 0.5); without a maximum [4 above - 252, 4 above). Error: of the two factors 2^-18 e^2 each, relative, of the two
    roundings 2^-20 e^2 each, of the multiplier 2^-30 e^4, and of the last product 2^-21 with a dealer, 2^-16 without: at most
    5.7e-5 e^d + 1.6e-5, so 1.1e-4, and 1.3e-4. Its mean over R is below 2e-7. A window with more fraction bits than 16 has all but the
    first part smaller by as many. With `bits` the ring is wider than it must be.
    Rounds: 1. Bits: 38 each way (`Window.bits`). Learns: the uniform Y, each the other's.
    """
    assert window.top <= (0 if window.above else 1), "the sums of a table's entries times a factor fit 64 bits"
    bits, layout = bits or window.bits, rows.fields() if maximum is not None else ()
    kind = ExpMask(x.name, maximum.name if maximum is not None else 0, x.shape, shift, layout, bits)
    correlation = party.take(kind)
    if not known(x.masked) or (maximum is not None and not known(maximum.masked)):
        yield [Item(blank(*x.shape), bits)]
        return Shares(blank(*x.shape), bits, window.out_frac)
    words, product = correlation.shares
    d = kind.difference(x.masked, maximum.masked if maximum is not None else None)
    if offset is not None:
        d = reduce(d - like(offset, d), BITS)
    r = kind.difference(x.mask, maximum.mask if maximum is not None else None)
    drop = torch.full((1,), ENTRY_FRAC + FACTOR_FRAC - window.frac - window.spare, device=d.device)
    if octave is not None:
        drop = drop + like(octave, d)
    own, mine = _folded(words, d, r, correlation.own[0], window, drop, server=party.is_server)
    (theirs,) = yield [Item(mine, bits)]
    value = own * theirs
    return Shares((-value if party.is_server else value) + (product << DROP), bits, window.out_frac)


def cost_exponential(count: int, bits: int = OUT_BITS, *, maximum: bool = True) -> Declared:
    """D: a one-hot, in two words without a maximum, and the masks times the factors."""
    return dealt((count if maximum else 2 * count, 2**HIGH), (count, bits - DROP)) + exchanged((count, bits))
