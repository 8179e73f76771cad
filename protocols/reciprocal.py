"""The reciprocal of every row's sum: octave, table, one Newton step.

Source: the normalisation by comparisons with powers of two and the table on the mantissa of SIGMA (ePrint 2023/1269);
the table is read through a rotated one-hot (Pika, 2022/826) whose sign the dealer knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from protocols.comparison import BitMask, CompareMask, compare
from protocols.correlations import Dealt, Kind, Masks, Part, Tensors
from protocols.maximum import UpperMask
from protocols.opening import open_masked, unmasked
from protocols.party import Item, Party, Protocol_
from protocols.ring import blank, known, like, reduce
from protocols.shares import Shares, Wire
from protocols.table import WORD, one_hot, read
from protocols.truncation import rescale

INDEX_FRAC = 8  # fraction bits of the table's index, and of its entries
INDEX_BITS = 9
_WORDS = (1 << INDEX_BITS) // WORD
_FIRST, _LAST = 112, 288  # indices that a mantissa in [0.45, 1.1) can have
_COARSE = 4  # fraction bits of the sum that the octave is decided by
MARGIN = INDEX_FRAC * 2 + 3  # bits that the Newton step needs above those of the mantissa


def octaves(bound: float) -> int:
    """Powers of two 1, 2, 4, ... that sums below `bound` are compared with; at least one."""
    number = 1
    while 2.0**number < bound:
        number += 1
    return number


@lru_cache
def _table() -> Tensor:
    """(1, 2^INDEX_BITS): round(2^(2 INDEX_FRAC) / i), the reciprocal of i / 2^INDEX_FRAC, for the indices that can occur."""
    entries = [((1 << 2 * INDEX_FRAC + 1) + i) // (2 * i) if _FIRST <= i < _LAST else 0 for i in range(1 << INDEX_BITS)]
    return torch.tensor([entries], dtype=torch.int64)


@dataclass(frozen=True)
class ReciprocalMask(Kind):
    """The rotated one-hot of the index's mask, its sign s and s a, and a^2, r a, r a^2 for u's mask a and the mantissa's mask r."""

    mantissa: int
    index: int
    shape: tuple[int, ...]
    bits: int

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part((*self.shape, _WORDS), 64, xor=True), *(Part(self.shape, self.bits) for _ in range(5))

    def deal(self, masks: Masks, server: Tensors, client: Tensors, shares: Tensors) -> Dealt:
        a, r = server[0] + client[0], masks.mask(self.mantissa)
        word, sign = one_hot(masks.mask(self.index), shares[0])
        return (word, sign, sign * a, a * a, r * a, r * a * a), None


@dataclass(frozen=True, eq=False, repr=False)
class _Octave:
    """F = 2^J - sum_j c_j 2^(J-1-j) with c_j = beta_j + (1 - 2 beta_j) rho_j: beta public, rho shared."""

    name: int
    beta: Tensor  # (..., J)
    rho: Tensor

    @property
    def number(self) -> int:
        """J."""
        return int(self.beta.shape[-1])

    def times(self, party: Party, x: Wire) -> Shares:
        """x F: x 2^J - sum_j 2^(J-1-j) x c_j, linear in D's shares of rho_j and rho_j r_x; adds J fraction bits; local."""
        mask = party.take(BitMask(self.name, x.name, tuple(self.beta.shape), x.bits, (*x.shape, 1)))
        if not known(x.masked):
            return Shares(blank(*x.shape), x.bits, x.frac + self.number)
        weights = like(torch.tensor([1 << (self.number - 1 - j) for j in range(self.number)]), x.masked)
        big, r = x.masked[..., None], x.mask[..., None]
        part = (1 - 2 * self.beta) * (big * self.rho - mask.shares[0]) - self.beta * r
        if party.is_server:
            part = part + big * self.beta
        return Shares((unmasked(party, x).value << self.number) - (part * weights).sum(-1), x.bits, x.frac + self.number)


def _octave(party: Party, s: Wire, number: int, bits: int) -> Protocol_[_Octave]:
    """The octave of s by comparisons of its upper bits with powers of two, all at once."""
    shift, width = s.frac - _COARSE, _COARSE + number + 1
    upper = party.take(UpperMask(s.name, s.shape, shift, width, 0))
    powers = like(torch.tensor([1 << (j + _COARSE) for j in range(number)]), s.masked)
    c = reduce((s.masked >> shift)[..., None] - powers, width) if known(s.masked) else blank(*s.shape, number)
    name, beta = yield from compare(party, c, CompareMask(upper.name, tuple(c.shape), (*s.shape, 1), width))
    return _Octave(name, beta, party.take(BitMask(name, 0, tuple(beta.shape), bits)).shares[0])


def _newton(party: Party, m: Wire, index: Wire) -> Protocol_[Shares]:
    """y1 = 2 y0 - m y0^2 for the table's y0 = sign u; u is opened masked as U = u + a."""
    correlation = party.take(ReciprocalMask(m.name, index.name, m.shape, m.bits))
    frac = m.frac + 2 * INDEX_FRAC
    if not known(m.masked):
        yield [Item(m.masked, m.bits)]
        return Shares(m.masked, m.bits, frac)
    word, sign, sign_a, a2, ra, ra2 = correlation.shares
    u, a = read(word, index.masked, _table())[0], correlation.own[0]
    mine = (u if party.is_server else -u) + a
    (theirs,) = yield [Item(mine, m.bits)]
    opened, big = mine + theirs, m.masked
    # m u^2 = (M - r) (U - a)^2, and sign^2 = 1
    square = big * (a2 - 2 * opened * a) - opened * opened * m.mask + 2 * opened * ra - ra2
    if party.is_server:
        square = square + big * opened * opened
    return Shares(((opened * sign - sign_a) << (frac - INDEX_FRAC + 1)) - square, m.bits, frac)


def reciprocal(party: Party, s: Shares, *, bound: float, bits: int, frac: int) -> Protocol_[Shares]:
    """1 / s for shares s (...) of values in [0.55, bound), in Z_2^bits with `frac` fraction bits.

    Steps: s is opened masked. c_j = [s >= 2^j], all j at once on s's upper bits (off by one unit of 1/16 at most), gives
    F = 2^J - sum_j c_j 2^(J-1-j) = 2^(J-e); m = s 2^-e. m and its upper 9 bits are opened; the table gives y0, up to a
    sign that D shares; one Newton step; y = y1 F / 2^J.
    Domain: bound <= 2^12. A ring of s with fewer than J + 19 bits besides its fraction is widened first.
    Error: relative: table and index, ((1/256 + 2^-9) / 0.47)^2, at most 1.6e-4, never above 1 / s; and 2^(1 - frac) absolute.
    Rounds: 5 + those of `compare`, + 1 where s is widened. Learns: uniform values, both.
    """
    number = octaves(bound)
    if s.bits < s.frac + number + MARGIN:
        s = yield from rescale(party, s, bits=s.frac + number + MARGIN, frac=s.frac, nonnegative=True)
    wide = bits + number
    (wire,) = yield from open_masked(party, [s])
    octave = yield from _octave(party, wire, number, max(wide, s.bits))
    m = octave.times(party, wire)
    index = yield from rescale(party, m, bits=INDEX_BITS, frac=INDEX_FRAC)
    m_wire, index_wire = yield from open_masked(party, [m, index])
    y = yield from _newton(party, m_wire, index_wire)
    y = yield from rescale(party, y, bits=wide, frac=frac, nonnegative=True)
    (y_wire,) = yield from open_masked(party, [y])
    return (yield from rescale(party, octave.times(party, y_wire), bits=bits, frac=frac))
