"""Comparison of masked values, and selection by the result.

Source: the digit decomposition of CrypTFlow2 (ePrint 2020/1002) on masked wires as in EGK+20 (2020/338), with shared
one-hot digits of the mask in place of oblivious transfer, and ABY2.0's multi-input ANDs (2020/1225).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from protocols.correlations import Dealt, Kind, Masks, Part, Tensors
from protocols.party import Item, Party, Protocol_
from protocols.ring import known, parity, reduce

MAX_DIGIT = 6  # a one-hot digit is one 64-bit word
MAX_BITS = 43  # seven digits; more would want a tree, since the products of masks double with each
JOINT_BITS = 60  # products of masks side by side in one element


@lru_cache
def digits(bits: int) -> tuple[tuple[int, int], ...]:
    """(position, width) of the digits of the low bits - 1 bits, lowest first, as even as can be."""
    low = bits - 1
    number = max(1, -(-low // MAX_DIGIT))
    widths = [low // number + (1 if k < low % number else 0) for k in range(number)]
    return tuple((sum(widths[:k]), width) for k, width in enumerate(widths))


@lru_cache
def _terms(number: int) -> tuple[tuple[int, ...], ...]:
    """borrow = lt_(n-1) ^ XOR_i (eq_(n-1) ... eq_(i+1)) lt_i: the variables of each product.

    Variable j < n - 1 is lt_j, variable n - 1 + j is eq_(j+1).
    """
    return tuple((i, *(number - 2 + j for j in range(i + 1, number))) for i in range(number - 1))


@lru_cache
def _joint(number: int) -> tuple[tuple[int, ...], ...]:
    """The products of two or more variables' masks that the terms need."""
    found = {c for term in _terms(number) for size in range(2, len(term) + 1) for c in combinations(sorted(term), size)}
    return tuple(sorted(found))


def joint_widths(number: int) -> tuple[int, ...]:
    """Bits of the elements that hold the products of masks."""
    count = len(_joint(number))
    return tuple(min(JOINT_BITS, count - at) for at in range(0, count, JOINT_BITS))


@dataclass(frozen=True)
class CompareMask(Kind):
    """For [x - y >= 0] where c = (x - y) + R: one-hot digits of R, masks of the ANDs' inputs and their products, and rho.

    A subclass says what R is. `shape` is that of the comparisons, `r_shape` that of R, which may broadcast.
    """

    wire: int
    shape: tuple[int, ...]
    r_shape: tuple[int, ...]
    bits: int

    def bounded(self) -> bool:
        """See `Kind`: the work for the products of masks grows fast."""
        return super().bounded() and self.bits <= MAX_BITS

    def difference(self, masks: Masks) -> Tensor:
        """R."""
        return masks.mask(self.wire).reshape(self.r_shape)

    def server_parts(self) -> tuple[Part, ...]:
        variables = 2 * (len(digits(self.bits)) - 1)
        return (Part(self.shape, 1), *((Part(self.shape, variables),) if variables else ()))

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        words = (Part(self.r_shape, 1 << width, xor=True) for _, width in digits(self.bits))
        joint = (Part(self.shape, width, xor=True) for width in joint_widths(len(digits(self.bits))))
        return (*words, *joint)

    def deal(self, masks: Masks, server: Tensors, client: Tensors, shares: Tensors) -> Dealt:
        r = reduce(self.difference(masks), self.bits)
        one = torch.ones_like(r)
        values = [one << ((r >> at) & ((1 << width) - 1)) for at, width in digits(self.bits)]
        for bit, product in enumerate(_joint(len(digits(self.bits)))):
            variables = server[1] ^ client[1]
            value = variables >> product[0]
            for variable in product[1:]:
                value = value & (variables >> variable)
            if bit % JOINT_BITS == 0:
                values.append(torch.zeros_like(variables))
            values[-1] |= (value & 1) << (bit % JOINT_BITS)
        return values, server[0] ^ client[0] ^ (r >> (self.bits - 1))


def compare(party: Party, c: Tensor, kind: CompareMask) -> Protocol_[tuple[int, Tensor]]:
    """The masked bit [x >= y] ^ rho, known to both, and the name under which rho is known to the source.

    c = (x - y) + R in [0, 2^k) is public. Steps: msb(x - y) = msb(c) ^ msb(R) ^ [c_low < R_low]. Per digit, each party
    has its XOR share of [c_d < R_d] and [c_d = R_d] from the one-hot, alone; the inputs of the ANDs are opened masked,
    D shares the products of their masks, so that all ANDs of all digits are one round; then the bit is opened under rho.
    Domain: -2^(k-1) <= x - y < 2^(k-1), k <= 43. Exact.
    Rounds: 2 (1 for a single digit). Bits each way: 2 (digits - 1), then 1. Learns: uniform bits, both.
    """
    assert kind.bits <= MAX_BITS, f"a comparison of {kind.bits} bits is wider than {MAX_BITS}"
    correlation = party.take(kind)
    number = len(digits(kind.bits))
    if not known(c):
        if number > 1:
            yield [Item(c, 2 * (number - 1))]
        yield [Item(c, 1)]
        return correlation.name, c
    less, equal = [], []
    for word, (at, width) in zip(correlation.shares, digits(kind.bits), strict=False):
        digit = (c >> at) & ((1 << width) - 1)
        # the one-hot's bits above the digit: -2 << digit
        less.append(parity(word & (torch.full_like(digit, -2) << digit), 1 << width))
        equal.append((word >> digit) & 1)
    borrow = less[-1]
    if number > 1:
        variables = torch.zeros_like(c)
        for k, bit in enumerate([*less[:-1], *equal[1:]]):
            variables = variables | (bit << k)
        own_mask = correlation.own[1]
        mine = variables ^ own_mask
        (theirs,) = yield [Item(mine, 2 * (number - 1))]
        opened = mine ^ theirs
        joint, places = correlation.shares[number:], {product: k for k, product in enumerate(_joint(number))}
        for term in _terms(number):
            for size in range(len(term) + 1):
                for masked in combinations(sorted(term), size):
                    if size > 1:
                        element, bit_in_it = divmod(places[masked], JOINT_BITS)
                        value: Tensor | None = joint[element] >> bit_in_it
                    else:
                        value = own_mask >> masked[0] if size else None
                    for variable in term:
                        if variable not in masked:
                            value = opened >> variable if value is None else value & (opened >> variable)
                    assert value is not None
                    if size or party.is_server:
                        borrow = borrow ^ value
    result = (borrow & 1) ^ correlation.own[0]
    if party.is_server:
        result = result ^ ((c >> (kind.bits - 1)) & 1) ^ 1
    (theirs,) = yield [Item(result, 1)]
    return correlation.name, result ^ theirs


@dataclass(frozen=True)
class BitMask(Kind):
    """Shares of the rho of a comparison in Z_2^bits, and with `wire` of rho * r, r broadcast to its shape."""

    compare: int
    wire: int
    shape: tuple[int, ...]
    bits: int
    spread: tuple[int, ...] = ()  # r's shape before broadcasting

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def deal(self, masks: Masks, server: Tensors, client: Tensors, shares: Tensors) -> Dealt:
        rho = masks.mask(self.compare)
        return (rho * masks.mask(self.wire).reshape(self.spread) if self.wire else rho,), None
