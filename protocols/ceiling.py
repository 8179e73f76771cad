"""A bound of every row of masked scores from above, to within three units, in three rounds however long the rows are.

A softmax needs no maximum, only a number near it. A score's upper digit is known to both parties as XOR shares of a one-hot, by look-up
of its public masked digit in D's one-hot of the mask's (Pika, ePrint 2022/826), and so is whether the score reaches a threshold. For each
threshold the row's OR is wanted: a random linear combination over GF(2) of the row's bits, local, is 0 if no score reaches the threshold,
and otherwise with probability 2^-HASH, also where one score is there several times, as the first key's in a row that is filled up. That it
is not 0 is found by one-hots of its digits, and the thresholds that are reached are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.comparison import MAX_DIGIT, wide_hot
from protocols.correlations import Bits, Fit, Kind, Known, Number, Part, Related, Shape, Shapes, Shift, Tensors, fits
from protocols.declared import Declared, dealt, exchanged
from protocols.memo import Memo, constant
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Item, Party, Protocol_
from protocols.prg import SEED_BYTES, Prg, derive
from protocols.ring import array, blank, known, like, nbytes
from protocols.rows import Rows
from protocols.shares import Shares, Wire

WIDTH = 8  # bits of a score's upper digit
DIGITS = 4  # of a combination, each MAX_DIGIT bits
HASH = DIGITS * MAX_DIGIT
LOWEST = 1 - (1 << WIDTH - 1)  # the lowest threshold; the highest is -LOWEST
THRESHOLDS = 1 - 2 * LOWEST
SUBSETS = tuple(subset for size in range(1, DIGITS + 1) for subset in combinations(range(DIGITS), size))


class PlaceMask(Kind, frozen=True):
    """The one-hot of a wire's mask's digit, (r >> shift) mod 2^WIDTH, in words of 64."""

    wire: Number
    shape: Shape
    shift: Shift
    refers: ClassVar[tuple[str, ...]] = ("wire",)

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part((*self.shape, 1 << WIDTH - MAX_DIGIT), 64, xor=True),)

    def fit(self, shapes: Shapes) -> Fit:
        fits(shapes.mask(self.wire) == self.shape)
        words = math.prod(self.shape) << WIDTH - MAX_DIGIT
        return Fit(((*self.shape, 1 << WIDTH - MAX_DIGIT),), None, 4 * words)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (wide_hot(digit(known.mask(self.wire), self.shift), WIDTH),), None


class ReachedMask(Kind, frozen=True):
    """For [z != 0] of XOR-shared z in HASH bits: a mask of z and the one-hots of its digits, and of the bits that say that a digit is 0.

    `shape` is that of z; products of the latter masks, (subsets, ...), in Z_2^bits.
    """

    shape: Shape
    bits: Bits

    def server_parts(self) -> tuple[Part, ...]:
        return Part(self.shape, HASH), Part(self.shape, DIGITS)

    client_parts = server_parts

    def shared_parts(self) -> tuple[Part, ...]:
        return Part((DIGITS, *self.shape), 1 << MAX_DIGIT, xor=True), Part((len(SUBSETS), *self.shape), self.bits)

    def fit(self, shapes: Shapes) -> Fit:
        parts = self.shared_parts()
        return Fit(tuple(part.shape for part in parts), None, (4 * DIGITS + 2 * len(SUBSETS)) * math.prod(self.shape))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        r, rho = server[0] ^ client[0], server[1] ^ client[1]
        one = torch.ones_like(r)
        hot = torch.stack([one << ((r >> MAX_DIGIT * k) & ((1 << MAX_DIGIT) - 1)) for k in range(DIGITS)])
        return (hot, torch.stack(products(rho))), None


def digit(x: Tensor, shift: int) -> Tensor:
    """The upper digit of ring elements."""
    return (x >> shift) & ((1 << WIDTH) - 1)


def products(rho: Tensor) -> list[Tensor]:
    """The ANDs of every word's bits, for each of the `SUBSETS`: each but the single bits from one before."""
    bits = [(rho >> k) & 1 for k in range(DIGITS)]
    found: dict[tuple[int, ...], Tensor] = {}
    for *others, last in SUBSETS:
        found[(*others, last)] = found[tuple(others)] & bits[last] if others else bits[last]
    return [found[subset] for subset in SUBSETS]


def _size(table: Tensor) -> int:
    return nbytes(table)


@Memo(32 * 2**20).kept(_size)
def _coefficients(columns: int) -> Tensor:
    """(columns, THRESHOLDS), the highest threshold first: public coefficients, the same at every party and for ever; none is 0.

    They hang on nothing secret. Whoever knows them can look for scores that cancel, in its own prompt; its rows are then too large by e.
    """
    stream = Prg(derive(bytes(SEED_BYTES), "coefficients of thresholds")).stream(0)
    return torch.from_numpy(np.maximum(stream.uniform((columns, THRESHOLDS), HASH).numpy(), 1)[:, ::-1].copy())


@constant()
def _turns() -> Tensor:
    """(THRESHOLDS,): the thresholds from the highest down."""
    return torch.from_numpy(np.arange(-LOWEST, LOWEST - 1, -1))


def combined(words: Tensor, public: Tensor, rows: Rows) -> Tensor:
    """A party's share of the combinations: words (H, N, n) of one-hots, public digits (H, N) -> (H, number, THRESHOLDS), highest first."""
    table = _coefficients(rows.columns)
    if kernels.fast is not None and words.is_cpu:
        out = torch.zeros((len(words), rows.number, THRESHOLDS), dtype=torch.int64)
        arrays = (array(words.contiguous()), array(public.contiguous()), np.ascontiguousarray(rows.lengths))
        kernels.fast.thresholds(*arrays, -LOWEST, array(table.contiguous()), array(out))
        return out
    places = (public[..., None] - like(_turns(), public)) & ((1 << WIDTH) - 1)  # (H, N, THRESHOLDS): from the highest digit down
    bits = words.gather(-1, places >> MAX_DIGIT) >> (places & 63) & 1
    reached = bits.cumsum(-1) & 1  # whether the score has this digit, or a higher one
    packed = (-reached).transpose(1, 2)  # (H, THRESHOLDS, N)
    each = rows.unpack(packed) & like(table, packed).T[:, None]  # (H, THRESHOLDS, number, columns)
    while each.shape[-1] > 1:
        half = each.shape[-1] // 2
        rest = each[..., 2 * half :]
        each = torch.cat([each[..., :half] ^ each[..., half : 2 * half], rest], -1)
    return each[..., 0].transpose(1, 2)


def row_ceiling(party: Party, wire: Wire, rows: Rows, shift: int) -> Protocol_[Wire]:
    """A number c near the maximum of every row of a masked wire (H, N), in units of 2^shift: a wire (H, number) in WIDTH bits.

    Steps: each score's upper digit is X_h - r_h, X >> shift being public: floor(x / 2^shift) or one more; with D's one-hot of r_h each
    party has XOR shares of whether it reaches each of 255 thresholds, and of the combination of these bits over the row by public
    coefficients in GF(2)^24. It is opened masked; whether a digit of 6 bits is 0 is looked up; these four bits are opened masked, and
    with D's products of their masks each party has shares of whether the combination is 0. c is the highest threshold that is reached.
    Domain: the digits of all scores, and one more, in [-128, 128). c - 1 <= maximum < c + 1, in units; a threshold that a row
    reaches is missed with probability 2^-24, never where one score reaches it alone: c is then one less; two less with 2^-33.
    Rounds: 3. Bits each way: 24, 4 for each row and threshold, then 8 a row. Learns: uniform values, both.
    """
    heads, count = wire.shape
    where = party.take(PlaceMask(wire.name, (heads, count), shift))
    shape = (heads, rows.number, THRESHOLDS)
    kind = ReachedMask(shape, WIDTH)
    correlation = party.take(kind)
    if not known(wire.masked):
        yield [Item(blank(*shape), HASH)]
        yield [Item(blank(*shape), DIGITS)]
        (top,) = yield from open_masked(party, [Shares(blank(heads, rows.number), WIDTH, 0)])
        return top
    mine = combined(where.shares[0], digit(wire.masked, shift), rows) ^ correlation.own[0]
    (theirs,) = yield [Item(mine, HASH)]
    opened, (hot, masked) = mine ^ theirs, correlation.shares
    mine = correlation.own[1].clone()
    for k in range(DIGITS):
        mine = mine ^ (((hot[k] >> ((opened >> MAX_DIGIT * k) & ((1 << MAX_DIGIT) - 1))) & 1) << k)
    (theirs,) = yield [Item(mine, DIGITS)]
    empty = _all(mine ^ theirs, masked, server=party.is_server).sum(-1)
    reached = (THRESHOLDS - empty if party.is_server else -empty) + (LOWEST - 1 if party.is_server else 0)
    (top,) = yield from open_masked(party, [Shares(reached, WIDTH, 0)])
    return top


def _all(opened: Tensor, masked: Tensor, *, server: bool) -> Tensor:
    """This party's share of the AND of the bits e ^ rho: of the product of e + (1 - 2 e) rho over the digits, multiplied out."""
    bits = [opened >> k & 1 for k in range(DIGITS)]
    value = torch.zeros_like(opened)
    if server:
        value = bits[0]
        for bit in bits[1:]:
            value = value & bit
    signs = [1 - 2 * bit for bit in bits]
    halves = [_coefficients_of(bits[at : at + 2], signs[at : at + 2]) for at in (0, 2)]
    for products_of, subset in zip(masked, SUBSETS, strict=True):
        low, high = (half[int(at in subset) + 2 * int(at + 1 in subset)] for half, at in zip(halves, (0, 2), strict=True))
        value = value + low * high * products_of
    return value


def _coefficients_of(bits: Sequence[Tensor], signs: Sequence[Tensor]) -> list[Tensor]:
    """Of two digits: the product of what each has, its bit or, where the number has it, its sign."""
    (bit, other), (sign, other_sign) = bits, signs
    return [bit * other, sign * other, bit * other_sign, sign * other_sign]


def cost_row_ceiling(heads: int, rows: Rows) -> Declared:
    """A one-hot of 256 a score; by row and threshold four of 64 and the products of four bits."""
    tests = heads * rows.number * THRESHOLDS
    dealer = dealt((heads * rows.count << WIDTH - MAX_DIGIT, 64), (DIGITS * tests, 1 << MAX_DIGIT), (len(SUBSETS) * tests, WIDTH))
    return dealer + exchanged((tests, HASH)) + exchanged((tests, DIGITS)) + cost_open_masked((heads * rows.number, WIDTH))
