"""Comparison of masked values, and selection by the result.

Source: the digit decomposition of CrypTFlow2 (ePrint 2020/1002) on masked wires as in EGK+20 (2020/338), with shared
one-hot digits of the mask in place of oblivious transfer, and ABY2.0's multi-input ANDs (2020/1225).
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.correlations import Bits, Correlation, Fit, Flag, Kind, Known, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.party import Item, Party, Protocol_
from protocols.ring import array, flat, known, parity, reduce
from protocols.rows import MAX_SINGLE

MAX_DIGIT = 6  # a one-hot digit is one 64-bit word; a digit that stands alone may be wider
MAX_BITS = 43  # seven digits; more would want a tree, since the products of masks double with each
JOINT_BITS = 60  # products of masks side by side in one element
_NOTHING = np.empty(0, np.int64)


@lru_cache
def digits(bits: int, single: int = 0) -> tuple[tuple[int, int], ...]:
    """(position, width) of the digits of the low bits - 1 bits, lowest first, as even as can be, or the one of them all."""
    low = bits - 1
    number = 1 if single else max(1, -(-low // MAX_DIGIT))
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


@lru_cache
def _joint_masks(number: int) -> tuple[np.ndarray, ...]:
    """Of the elements that hold the products: the variables of each of theirs, as bits."""
    masks = np.array([sum(1 << variable for variable in product) for product in _joint(number)], np.int64)
    return tuple(masks[at : at + JOINT_BITS] for at in range(0, len(masks), JOINT_BITS))


def _joint_products(variables: Tensor, masks: np.ndarray) -> Tensor:
    """An element of those products of a word's variables that these masks say, a bit each."""
    if kernels.fast is not None and variables.is_cpu:
        out = torch.empty(variables.shape, dtype=torch.int64)
        kernels.fast.joint(flat(variables), masks, flat(out))
        return out
    out = torch.zeros_like(variables)
    for bit, mask in enumerate(masks.tolist()):
        out |= (variables & mask == mask).long() << bit
    return out


def joint_widths(number: int) -> tuple[int, ...]:
    """Bits of the elements that hold the products of masks."""
    count = len(_joint(number))
    return tuple(min(JOINT_BITS, count - at) for at in range(0, count, JOINT_BITS))


class CompareMask(Kind, frozen=True):
    """For [x - y >= 0] where c = (x - y) + R: one-hot digits of R, masks of the ANDs' inputs and their products, and rho.

    A subclass says what R is. `shape` is that of the comparisons, `r_shape` that of R, which may broadcast. `single`: one digit.
    """

    wire: Number
    shape: Shape
    r_shape: Shape
    bits: Bits
    single: Flag = 0
    refers: ClassVar[tuple[str, ...]] = ("wire",)

    def bounded(self) -> bool:
        """See `Kind`: the work for the products of masks grows fast."""
        return self.bits <= (MAX_SINGLE if self.single else MAX_BITS)

    @property
    def digits(self) -> tuple[tuple[int, int], ...]:
        """See `digits`."""
        return digits(self.bits, self.single)

    def difference_fit(self, shapes: Shapes) -> tuple[tuple[int, ...], int]:
        """The shape of R, and the elements that are held for it beyond the masks."""
        fits(math.prod(shapes.mask(self.wire)) == math.prod(self.r_shape))
        return self.r_shape, math.prod(self.r_shape)

    def difference(self, known: Known) -> Tensor:
        """R."""
        return known.mask(self.wire).reshape(self.r_shape)

    def server_parts(self) -> tuple[Part, ...]:
        variables = 2 * (len(self.digits) - 1)
        return (Part(self.shape, 1), *((Part(self.shape, variables),) if variables else ()))

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        words = (
            Part(self.r_shape, 1 << width, xor=True) if width <= MAX_DIGIT else Part((*self.r_shape, 1 << width - MAX_DIGIT), 64, xor=True)
            for _, width in self.digits
        )
        joint = (Part(self.shape, width, xor=True) for width in joint_widths(len(self.digits)))
        return (*words, *joint)

    def fit(self, shapes: Shapes) -> Fit:
        r_shape, held = self.difference_fit(shapes)
        fits(r_shape == self.r_shape, np.broadcast_shapes(self.shape, r_shape) == self.shape)
        parts, number = self.shared_parts(), len(self.digits)
        words = sum(part.count for part in parts[:number])  # of all one-hots
        count, products = math.prod(self.shape), len(_joint(number))
        held += (4 + 4 * number) * math.prod(r_shape) + 2 * words + (8 + len(parts) - number) * count
        return Fit(tuple(part.shape for part in parts), self.shape, held, 2 * number * products * count)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        r = reduce(self.difference(known), self.bits)
        one = torch.ones_like(r)
        places = [(r >> at) & ((1 << width) - 1) for at, width in self.digits]
        values = [
            one << place if width <= MAX_DIGIT else wide_hot(place, width) for place, (_, width) in zip(places, self.digits, strict=True)
        ]
        masks = _joint_masks(len(self.digits))
        values += [_joint_products(server[1] ^ client[1], each) for each in masks]
        return values, server[0] ^ client[0] ^ (r >> (self.bits - 1))


def wide_hot(place: Tensor, width: int) -> Tensor:
    """(..., 2^(width - 6)): the words of the one-hot of a place of more than MAX_DIGIT bits."""
    words = torch.arange(1 << width - MAX_DIGIT, device=place.device)
    return (words == (place >> MAX_DIGIT)[..., None]) * (torch.ones_like(place) << (place & 63))[..., None]


def _above(words: Tensor, digit: Tensor, width: int) -> Tensor:
    """One party's share of [digit < place] from its share of the one-hot of a place: the parity of the bits above the digit."""
    if width <= MAX_DIGIT:
        return parity(words & (torch.full_like(digit, -2) << digit), 1 << width)
    number = torch.arange(words.shape[-1], device=words.device)
    own = (digit >> MAX_DIGIT)[..., None]
    x = words & torch.where(number == own, (torch.full_like(digit, -2) << (digit & 63))[..., None], -(number > own).long())
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] ^ x[..., x.shape[-1] // 2 :]
    return parity(x[..., 0])


@lru_cache
def _products(number: int) -> np.ndarray:
    """(terms, 3): what the terms, multiplied out over masked and opened variables, are made of; see `kernels.steps.masked_bit`."""
    places, found = {product: k for k, product in enumerate(_joint(number))}, []
    for term in _terms(number):
        for size in range(len(term) + 1):
            for masked in combinations(sorted(term), size):
                opened = sum(1 << variable for variable in term if variable not in masked)
                found.append((places[masked] if size > 1 else -1, masked[0] if size == 1 else -1, opened))
    return np.array(found, np.int64).reshape(-1, 3)


def _compiled(party: Party, c: Tensor, kind: CompareMask, correlation: Correlation) -> Protocol_[Tensor]:
    """The rest of `compare` by compiled loops."""
    number, plain = len(kind.digits), flat(c)
    borrow, inputs = torch.empty(plain.size, dtype=torch.int64), torch.zeros(plain.size, dtype=torch.int64)
    less, variables = array(borrow), array(inputs)
    for k, (word, (at, width)) in enumerate(zip(correlation.shares, kind.digits, strict=False)):
        if width > MAX_DIGIT:
            words = array(word.expand(*c.shape, -1).reshape(-1, word.shape[-1]).contiguous())
            kernels.fast.wide_digit(plain, at, width, words, less)
        else:
            places = -1 if k == number - 1 else k, number - 2 + k if k else -1
            kernels.fast.narrow_digit(plain, at, width, flat(word.expand(c.shape)), *places, variables, less)
    opened = own = joint = _NOTHING
    if number > 1:
        own = flat(correlation.own[1])
        mine = inputs.view(c.shape) ^ correlation.own[1]
        (theirs,) = yield [Item(mine, 2 * (number - 1))]
        opened = flat(mine ^ theirs)
        joint = flat(correlation.shares[number]) if _joint(number) else _NOTHING
    rho, top = flat(correlation.own[0]), kind.bits - 1
    kernels.fast.masked_bit(opened, own, joint, _products(number), int(party.is_server), less, rho, top, plain)
    result = borrow.view(c.shape)
    (theirs,) = yield [Item(result, 1)]
    return result ^ theirs


def compare(party: Party, c: Tensor, kind: CompareMask) -> Protocol_[tuple[int, Tensor]]:
    """The masked bit [x >= y] ^ rho, known to both, and the name under which rho is known to the source.

    c = (x - y) + R in [0, 2^k) is public. Steps: msb(x - y) = msb(c) ^ msb(R) ^ [c_low < R_low]. Per digit, each party
    has its XOR share of [c_d < R_d] and [c_d = R_d] from the one-hot, alone; the inputs of the ANDs are opened masked,
    D shares the products of their masks, so that all ANDs of all digits are one round; then the bit is opened under rho.
    Domain: -2^(k-1) <= x - y < 2^(k-1), k <= 43 (16 for a wide single digit). Exact.
    Rounds: 2 (1 for a single digit). Bits each way: 2 (digits - 1), then 1. Learns: uniform bits, both.
    """
    assert kind.bounded(), f"a comparison of {kind.bits} bits is too wide"
    correlation = party.take(kind)
    number = len(kind.digits)
    if not known(c):
        if number > 1:
            yield [Item(c, 2 * (number - 1))]
        yield [Item(c, 1)]
        return correlation.name, c
    if kernels.fast is not None and c.is_cpu and len(joint_widths(number)) < 2:
        return correlation.name, (yield from _compiled(party, c, kind, correlation))
    less, equal = [], []
    for word, (at, width) in zip(correlation.shares, kind.digits, strict=False):
        digit = (c >> at) & ((1 << width) - 1)
        less.append(_above(word, digit, width))
        if number > 1:
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


class BitMask(Kind, frozen=True):
    """Shares of the rho of a comparison in Z_2^bits, and with `wire` of rho * r, r broadcast to its shape."""

    compare: Number
    wire: Number
    shape: Shape
    bits: Bits
    spread: Shape = ()  # r's shape before broadcasting
    refers: ClassVar[tuple[str, ...]] = ("compare", "wire")

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def fit(self, shapes: Shapes) -> Fit:
        shape = shapes.mask(self.compare)
        if self.wire:
            fits(math.prod(shapes.mask(self.wire)) == math.prod(self.spread))
            shape = np.broadcast_shapes(shape, self.spread)
        return Fit((shape,), None, math.prod(shape))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        rho = known.mask(self.compare)
        return (rho * known.mask(self.wire).reshape(self.spread) if self.wire else rho,), None


def cost_compare(count: int, bits: int, *, masks: int | None = None, single: bool = False) -> Declared:
    """`count` comparisons of `bits` bits with `masks` different R (one each if not given).

    D: one-hots of the digits of each R; the products of two or more of the ANDs' variables, 3 2^(n-1) - 2n - 1 for n digits.
    """
    widths = [width for _, width in digits(bits, int(single))]
    number, hot = len(widths), count if masks is None else masks
    cost = dealt(*((hot, 2**width) if width <= MAX_DIGIT else (hot * 2 ** (width - MAX_DIGIT), 64) for width in widths))
    if number > 1:
        products = 3 * 2 ** (number - 1) - 2 * number - 1
        joint = [min(JOINT_BITS, products - at) for at in range(0, products, JOINT_BITS)]
        cost += exchanged((count, 2 * (number - 1))) + dealt(*((count, width) for width in joint))
    return cost + exchanged((count, 1))
