"""Truncation, truncate-reduce and extension: one protocol, `rescale`.

Source: Cheetah's truncation and extension with known sign (ePrint 2022/207), SIGMA's truncate-reduce (2023/1269).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from protocols import kernels
from protocols.correlations import Bits, Correlation, Fit, Kind, Known, Part, Related, Shape, Shapes, Tensors
from protocols.declared import Declared, dealt
from protocols.opening import cost_open_masked
from protocols.party import Item, Party, Protocol_
from protocols.ring import blank, flat, known, shift_right
from protocols.shares import Shares


class OrMask(Kind, frozen=True):
    """Bits b_S of S and b_C of C; shares of b_S b_C in Z_2^bits."""

    shape: Shape
    bits: Bits
    drawn_early: ClassVar[bool] = True

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, 1),)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def fit(self, shapes: Shapes) -> Fit:
        return Fit((self.shape,), None, math.prod(self.shape))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (server[0] & client[0],), None


def reduces(x: Shares, bits: int, frac: int) -> bool:
    """Whether `rescale` to these is local."""
    return bits <= x.bits - (x.frac - frac)


def rescale(party: Party, x: Shares, *, bits: int, frac: int, nonnegative: bool = False) -> Protocol_[Shares]:
    """x with fewer fraction bits (or more, which is local) and in a ring of `bits`, narrower or wider; within one unit in the last place.

    Let f = x.frac - frac, k = x.bits, z the shares. *Reduce* (bits <= k - f): each party shifts its share; the wrap of
    the shares vanishes modulo 2^bits. *Otherwise* an offset makes the value's top bit 0, so that z_S + z_C wraps modulo
    2^k exactly if either share's top bit is 1: result = (z_S >> f) + (z_C >> f) - 2^(k-f) (m_S or m_C) - (offset >> f),
    in Z_2^bits. m_S or m_C = m_S + m_C - m_S m_C, one product of two private bits: each sends m ^ b, D shares b_S b_C.
    One unit is added to centre the two floors. *More fraction bits*: the share times 2^j, which shares it modulo 2^(k + j); exact.

    Domain: reduce: any x. Otherwise -2^(k-2) <= x < 2^(k-2); with `nonnegative`, -2^(k-5) <= x < 2^(k-1) - 2^(k-5).
    Error: the result is floor(x / 2^f) + e, e in {0, 1}, which depends on the low bits of the shares (f = 0: exact).
    The ideal functionality returns this rounding of these shares; values are rounded once more before they are revealed.
    Rounds: reduce 0; otherwise 1, and none back from C where x is `early`. Bits: 1 each way. Learns: a uniform bit, each.
    """
    if frac > x.frac:  # a multiple of 2^j is shared modulo 2^(k + j)
        more = frac - x.frac
        x = Shares(x.value if x.value.is_meta else x.value << more, min(64, x.bits + more), frac, x.early)
    shift = x.frac - frac
    assert shift < x.bits, "more fraction bits than there are"
    if reduces(x, bits, frac):
        return Shares(_reduced(x.value, shift, x.bits, int(shift > 0 and party.is_server)), bits, frac, x.early)
    offset = 1 << (x.bits - 5 if nonnegative else x.bits - 2)
    assert offset >> shift << shift == offset, "the offset keeps its value when it is shifted"
    wrap_bits = bits - (x.bits - shift)
    mask = party.take(OrMask(x.shape, wrap_bits))
    top, mine = _top(party, x, offset, mask) if known(x.value) else (x.value, x.value)
    (theirs,) = yield [Item(mine, 1, early=x.early)]
    if not known(mine, theirs):
        return Shares(blank(*x.shape), bits, frac)
    return Shares(_shifted(party, x, offset, shift, top, mine, theirs, mask), bits, frac)


def _reduced(x: Tensor, shift: int, bits: int, more: int) -> Tensor:
    if kernels.fast is None or not x.is_cpu or not shift:
        value = shift_right(x, shift, bits)
        return value + more if more and known(value) else value
    out = torch.empty(x.shape, dtype=torch.int64)
    kernels.fast.shift_right(flat(x), shift, bits, more, flat(out))
    return out


def _top(party: Party, x: Shares, offset: int, mask: Correlation) -> tuple[Tensor, Tensor]:
    """The top bit of this party's share, the offset added at S, and the same masked."""
    added = offset if party.is_server else 0
    if kernels.fast is None or not x.value.is_cpu:
        top = shift_right(x.value + added, x.bits - 1, x.bits)
        return top, top ^ mask.own[0]
    top, mine = (torch.empty(x.value.shape, dtype=torch.int64) for _ in range(2))
    kernels.fast.top_masked(flat(x.value), added, x.bits, flat(mask.own[0]), flat(top), flat(mine))
    return top, mine


def _shifted(party: Party, x: Shares, offset: int, shift: int, top: Tensor, mine: Tensor, theirs: Tensor, mask: Correlation) -> Tensor:
    """This party's share of the result. With m = e + (1 - 2e) b for the opened e, m_S m_C is linear in b_S, b_C and b_S b_C."""
    own, shared = mask.own[0], mask.shares[0]
    if kernels.fast is not None and x.value.is_cpu:
        out = torch.empty(x.value.shape, dtype=torch.int64)
        parts = [flat(value) for value in (top, mine, theirs, own, shared)]
        kernels.fast.rescaled(flat(x.value), offset, x.bits, shift, *parts, int(party.is_server), flat(out))
        return out
    own_sign, peer_sign = 1 - 2 * mine, 1 - 2 * theirs
    product = own_sign * peer_sign * shared + theirs * own_sign * own
    z = x.value + offset if party.is_server else x.value
    if party.is_server:
        product = product + mine * theirs
    value = shift_right(z, shift, x.bits) - ((top - product) << (x.bits - shift))
    return value - (offset >> shift) + (1 if shift else 0) if party.is_server else value


def cost_rescale(count: int, bits: int, shift: int, to_bits: int, *, early: bool = False) -> Declared:
    """From a ring of `bits` to one of `to_bits`, dropping `shift` fraction bits: nothing if the wrap drops out."""
    if to_bits <= bits - shift:
        return Declared()
    return cost_open_masked((count, 1), early=(early,)) + dealt((count, to_bits - (bits - shift)))
