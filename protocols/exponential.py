"""The exponential of a masked value, by two digits of the difference of the masks.

Source: Pika's look-up by a rotated one-hot (ePrint 2022/826), with the shared one-hot's sign folded into the second
factor, which the dealer knows. Tables are exact integers, the same at every party: they come from integer arithmetic,
not from a machine's libm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from protocols.correlations import Kind, Masks, Part
from protocols.party import Item, Party, Protocol_
from protocols.ring import known, like, reduce
from protocols.rows import Rows
from protocols.shares import Shares, Wire

FRAC = 12  # of the scores
LOW = FRAC + 2  # bits of the low digit: units of the high digit are 4
HIGH = 6  # bits of the high digit: a one-hot of 64
BITS = LOW + HIGH
TABLE_FRAC = 12  # of the table entry times e^low
FACTOR_FRAC = 18  # of the factor e^-R_low
OUT_BITS = 32
OUT_FRAC = TABLE_FRAC + FACTOR_FRAC
_DIGITS = (-3, -2, -1, 0, 1)  # high digits whose table entries are not 0 at TABLE_FRAC

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


def _table(first: int, step: int, frac: int) -> list[int]:
    """round(e^(first + step * l / 2^FRAC) * 2^frac) for l in [0, 2^LOW)."""
    value, factor = _exp_fixed(first, 1), _exp_fixed(step, 1 << FRAC)
    shift, out = _E_FIXED - frac, []
    for _ in range(1 << LOW):
        out.append((value + (1 << (shift - 1))) >> shift)
        value = value * factor >> _E_FIXED
    return out


@lru_cache
def multipliers() -> Tensor:
    """(len(_DIGITS), 2^LOW): round(e^(4 h + l / 2^FRAC) * 2^TABLE_FRAC), the public integer multipliers."""
    return torch.tensor([_table(4 * h, 1, TABLE_FRAC) for h in _DIGITS], dtype=torch.int64)


@lru_cache
def factors() -> Tensor:
    """(2^LOW,): round(e^(-l / 2^FRAC) * 2^FACTOR_FRAC), the dealer's."""
    return torch.tensor(_table(0, -1, FACTOR_FRAC), dtype=torch.int64)


@dataclass(frozen=True)
class ExpMask(Kind):
    """For e^(x - m): the one-hot of the high digit of R = r_x - r_m 2^shift, its sign times e^-R_low, and that times u's mask."""

    x: int
    maximum: int
    shape: tuple[int, ...]
    shift: int
    rows: tuple[int, ...]

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, OUT_BITS),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part(self.shape, 1 << HIGH, xor=True), Part(self.shape, OUT_BITS), Part(self.shape, OUT_BITS)

    def deal(
        self, masks: Masks, server: Sequence[Tensor], client: Sequence[Tensor], shares: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        r = reduce(masks.mask(self.x) - Rows(*self.rows).spread(masks.mask(self.maximum) << self.shift), BITS)
        place = -(r >> LOW) & ((1 << HIGH) - 1)
        # the server's bit at the hot place is 1 and the client's 0, or the other way round
        sign = 2 * ((shares[0] >> place) & 1) - 1
        factor = sign * like(factors(), r)[r & ((1 << LOW) - 1)]
        return (torch.ones_like(r) << place, factor, factor * (server[0] + client[0])), None


def exponential(party: Party, x: Wire, maximum: Wire, rows: Rows, shift: int) -> Protocol_[Shares]:
    """e^(x - m 2^shift) for scores x (H, N) with 12 fraction bits and each row's m (H, number); shares in Z_2^32, 30 fraction bits.

    Steps: X - M 2^shift = d + R in Z_2^20 is public, d = x - m 2^shift, R known to D. With high and low digits,
    e^d = e^(4 (X_h - R_h)) e^(X_l) e^(-R_l). S and C hold XOR shares t_S, t_C of the one-hot of -R_h; t_S - t_C is plus or
    minus it. Each sums its bits of the rotated one-hot times public integers round(table[h] e^(X_l) 2^12), where
    table[0] = 1, table[1] = e^4, table[h] = e^(4 (h - 64)); C negates: u. D shares the sign times e^(-R_l), v, and v
    times the mask of u. u is opened masked: u v = U v - a v.
    Domain: d in [-248, 0.5). Error: at most 2^-13 (the multiplier) + 2^-19 e^4 (the factor, times table and e^(X_l)) <= 2.3e-4.
    Rounds: 1. Bits: 32 each way. Learns: the uniform U, both.
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
