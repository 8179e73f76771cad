"""The largest element of every row, and its place, by a tournament of small groups (`protocols.rows`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.comparison import CompareMask, compare, cost_compare
from protocols.correlations import Bits, Fit, Flag, Kind, Known, Layout, Number, Part, Related, Shape, Shapes, Shift, Tensors, fits
from protocols.declared import Declared, dealt
from protocols.memo import constant
from protocols.opening import cost_open_masked, open_masked, private_input, unmasked
from protocols.party import Party, Protocol_, parallel
from protocols.ring import add, array, blank, known, like, raised, reduce
from protocols.rows import INDEX, Group, Rows, group_sizes, radices, single_digit, tournament
from protocols.shares import Shares, Wire


@lru_cache
def _pairs(size: int) -> tuple[tuple[int, int], ...]:
    return tuple(combinations(range(size), 2))


@constant()
def _sides(size: int) -> Tensor:
    """(2, pairs): the first and the second of every pair."""
    return torch.from_numpy(np.array(_pairs(size)).T.copy())


def _differences(x: Tensor) -> Tensor:
    """(..., size) -> (..., pairs): of all pairs."""
    first, second = like(_sides(x.shape[-1]), x)
    return x[..., first] - x[..., second]


def _public_differences(x: Tensor, index: Tensor, bits: int) -> Tensor:
    """Of a wire (H, N) in Z_2^bits at (groups, size) -> (H, groups, pairs)."""
    if kernels.fast is None or not x.is_cpu:
        return reduce(_differences(x[:, like(index, x)]), bits)
    out = torch.empty((len(x), len(index), len(_pairs(index.shape[1]))), dtype=torch.int64)
    kernels.fast.differences(array(x.contiguous()), array(index), bits, array(out))
    return out


def _patterns(beta: Tensor, size: int) -> Tensor:
    """(H, groups, pairs) -> (H, groups, size - 1): for each candidate but the last, a bit for each opponent that it beats, but for rho."""
    if kernels.fast is not None and beta.is_cpu:
        out = torch.empty((*beta.shape[:-1], size - 1), dtype=torch.int64)
        kernels.fast.patterns(array(beta.contiguous()), size, array(out))
        return out
    which, second = (like(constant, beta) for constant in _opponents(size))
    alpha = beta[..., which] ^ second  # the first of equals wins
    pattern = alpha[..., 0]
    for k in range(1, size - 1):
        pattern = pattern | (alpha[..., k] << k)
    return pattern


@constant()
def _opponents(size: int) -> tuple[Tensor, Tensor]:
    """(size - 1, size - 1) each: the pair of every candidate but the last with each opponent, and whether it comes second there."""
    pairs = _pairs(size)
    others = [[j for j in range(size) if j != i] for i in range(size - 1)]
    places = [[pairs.index((min(i, j), max(i, j))) for j in row] for i, row in enumerate(others)]
    return torch.tensor(places), torch.tensor([[int(j < i) for j in row] for i, row in enumerate(others)])


@constant()
def _expansion(number: int) -> Tensor:
    """(2^n, 2^n): the product of n bits alpha_k + (1 - 2 alpha_k) rho_k, multiplied out.

    By the alphas (bits of the first index), the coefficient of each product of rhos (bits of the second).
    """
    table = np.ones((1, 1), np.int64)
    for _ in range(number):
        # the new bit is the highest of both indices: alpha = 0 leaves rho, alpha = 1 leaves 1 - rho
        table = np.block([[table * 0, table], [table, -table]])
    return torch.from_numpy(table)


def _group_fit(rows: Rows, level: int, group: int) -> tuple[int, int, int]:
    """(N of the level, groups, size) of the groups of one size."""
    count, found = group_sizes(rows, level)
    size, groups = found[group]
    fits(size > 1)
    return count, groups, size


def _group(rows: tuple[int, ...], level: int, group: int) -> Group:
    return tournament(Rows.read(rows))[level].groups[group]


class UpperMask(Kind, frozen=True):
    """The mask of a wire's upper bits, r >> shift, as a wire of its own; shared if `deals`."""

    wire: Number
    shape: Shape
    shift: Shift
    bits: Bits
    deals: Flag = 1
    refers: ClassVar[tuple[str, ...]] = ("wire",)

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),) if self.deals else ()

    def fit(self, shapes: Shapes) -> Fit:
        shape = shapes.mask(self.wire)
        return Fit((shape,) if self.deals else (), shape, 2 * math.prod(shape))

    def leaves_share(self) -> bool:
        """See `Kind`."""
        return bool(self.deals)

    def share_left(self, own: Tensors, shares: Tensors) -> Tensor:
        """See `Kind`."""
        return shares[0]

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        upper = reduce(known.mask(self.wire) >> self.shift, self.bits)
        return ((upper,) if self.deals else ()), upper


def upper_wire(party: Party, wire: Wire, shift: int) -> Wire:
    """The wire's upper bits, free: (X >> shift) - (r >> shift) is floor(x / 2^shift) or one more."""
    mask = party.take(UpperMask(wire.name, wire.shape, shift, wire.bits - shift))
    upper = wire.masked >> shift if known(wire.masked) else wire.masked
    return Wire(upper, mask.shares[0], mask.name, wire.bits - shift, max(wire.frac - shift, 0))


class PairCompareMask(CompareMask, frozen=True):
    """All pairs within the groups of one size: R = r_i - r_j, (H, groups, pairs)."""

    rows: Layout = ()
    level: Number = 0
    group: Number = 0

    def difference_fit(self, shapes: Shapes) -> tuple[tuple[int, ...], int]:
        (heads, elements), rows = shapes.mask(self.wire), Rows.read(self.rows)
        count, groups, size = _group_fit(rows, self.level, self.group)
        fits(elements == count)
        pairs = size * (size - 1) // 2
        return (heads, groups, pairs), heads * groups * (size + 3 * pairs) + INDEX * rows.count

    def difference(self, known: Known) -> Tensor:
        group = _group(self.rows, self.level, self.group)
        r = known.mask(self.wire)
        return _differences(r[:, like(group.index, r)])


class SelectorMask(Kind, frozen=True):
    """Shares of the products of the rhos by which each candidate but the last wins; with `wire` times R_i = r_i - r_last.

    (H, groups, size - 1, 2^(size - 1) - 1): a product for every non-empty set of opponents.
    """

    compare: Number
    wire: Number
    shape: Shape
    bits: Bits
    rows: Layout
    level: Number
    group: Number
    refers: ClassVar[tuple[str, ...]] = ("compare", "wire")

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def fit(self, shapes: Shapes) -> Fit:
        heads, groups, pairs = shapes.mask(self.compare)
        rows = Rows.read(self.rows)
        count, number, size = _group_fit(rows, self.level, self.group)
        fits((groups, pairs) == (number, size * (size - 1) // 2))
        fits(not self.wire or shapes.mask(self.wire) == (heads, count))
        each, products = heads * groups * (size - 1), 1 << size - 1
        held = each * (size + 7 * products) + 2 * heads * groups * size + INDEX * rows.count
        return Fit(((heads, groups, size - 1, products - 1),), None, held)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        group, rho = _group(self.rows, self.level, self.group), known.mask(self.compare)
        rho = rho[..., like(_opponents(group.size)[0], rho)]  # (H, groups, size - 1, size - 1)
        products = torch.ones_like(rho[..., :1])
        for k in range(group.size - 1):
            products = torch.cat([products, products & rho[..., k : k + 1]], -1)
        products = products[..., 1:]
        if self.wire:
            r = known.mask(self.wire)[:, like(group.index, rho)]
            products = products * (r[..., :-1] - r[..., -1:])[..., None]
        return (products,), None


@dataclass(frozen=True, eq=False, repr=False)
class _Selector:
    """Who wins in the groups of one size: public coefficients of the shared products of rhos."""

    group: Group
    name: int
    place: tuple[int, int]
    pattern: Tensor  # (H, groups, size - 1), see `_patterns`
    products: Tensor  # shares, (H, groups, size - 1, products)

    def chosen(self, x: Tensor, r: Tensor | None, shared: Tensor | None, server: bool) -> Tensor:
        """A share of x_last + sum_i w_i (x_i - x_last) for x (H, N) with masks r, of which this party holds a share, -> (H, groups).

        `shared` are shares of the products times the masks' differences; where x is public there are neither.
        """
        size = self.group.size
        if kernels.fast is not None and x.is_cpu:
            shares, masks = array(self.products.contiguous()), torch.zeros_like(x) if r is None else r
            more = shares if shared is None else array(shared.contiguous())
            out, values = torch.empty(self.pattern.shape[:-1], dtype=torch.int64), (array(x.contiguous()), array(masks.contiguous()))
            end = array(self.group.index), int(server), array(out)
            kernels.fast.selected(array(self.pattern), array(_expansion(size - 1)), shares, more, int(shared is not None), *values, *end)
            return out
        index = like(self.group.index, x)
        x, r = x[:, index], torch.zeros_like(x)[:, index] if r is None else r[:, index]
        difference, own = x[..., :-1] - x[..., -1:], r[..., -1:] - r[..., :-1]
        own = difference + own if server else own
        coefficients, product = like(_expansion(size - 1), x)[self.pattern], difference[..., None] * self.products
        product = product if shared is None else product - shared
        value = (coefficients[..., 0] * own).sum(-1) + (coefficients[..., 1:] * product).sum((-2, -1)) - r[..., -1]
        return value + x[..., -1] if server else value


def _choose(party: Party, wire: Wire, rows: Rows, place: tuple[int, int], bits: int) -> Protocol_[_Selector]:
    """All comparisons within the groups of one size: candidate i wins if it is >= all later and > all earlier ones."""
    group = _group(rows.fields(), *place)
    size = group.size
    shape = (wire.shape[0], len(group.index), len(_pairs(size)))
    c = blank(*shape)
    if known(wire.masked):
        c = _public_differences(wire.masked, group.index, wire.bits)
    single = int(single_digit(wire.shape[0], rows, place[0], wire.bits))
    name, beta = yield from compare(party, c, PairCompareMask(wire.name, shape, shape, wire.bits, single, rows.fields(), *place))
    wins = (*shape[:-1], size - 1, (1 << (size - 1)) - 1)
    products = party.take(SelectorMask(name, 0, wins, bits, rows.fields(), *place)).shares[0]
    if not known(beta):
        return _Selector(group, name, place, beta, products)
    return _Selector(group, name, place, _patterns(beta, size), products)


def _selected(party: Party, selector: _Selector, wire: Wire, rows: Rows) -> Tensor:
    """This party's share of the winner's value on a wire: x_last + sum_i w_i (x_i - x_last); local."""
    mask = party.take(SelectorMask(selector.name, wire.name, tuple(selector.products.shape), wire.bits, rows.fields(), *selector.place))
    if not known(wire.masked):
        return blank(*selector.products.shape[:-2])
    return selector.chosen(wire.masked, wire.mask, mask.shares[0], party.is_server)


def _selected_public(party: Party, selector: _Selector, values: Tensor) -> Tensor:
    """The same for public values, (H, N): the winner's place at the first level."""
    if not known(selector.products):
        return blank(*selector.products.shape[:-2])
    return selector.chosen(values, None, None, party.is_server)


def _at(x: Shares, index: Tensor) -> Tensor:
    """A share's elements at public positions (n, 1) of its last axis."""
    return x.value[:, like(index, x.value)[:, 0]] if known(x.value) else blank(x.shape[0], len(index))


def _joined(results: Sequence[Tensor], order: Tensor, bits: int, frac: int) -> Shares:
    if not known(*results):
        return Shares(blank(results[0].shape[0], len(order)), bits, frac)
    value = torch.cat(list(results), -1)
    return Shares(value[:, like(order, value)], bits, frac)


def row_maximum(party: Party, wire: Wire, rows: Rows) -> Protocol_[Wire]:
    """The largest element of every row of a masked wire (H, N) -> wire (H, number).

    Steps, per level: all pairs of each group compared at once (`compare`), the winner selected with public coefficients
    on D's shares of products of rhos and masks, and opened under a fresh mask.
    Domain: elements of a row differ by less than 2^(k-1); k <= 31. Exact.
    Rounds: per level 1 + those of `compare`: 2, or 1 by a single digit (`single_digit`).
    Learns: uniform values, both; levels and groups are public.
    """
    for number, level in enumerate(tournament(rows)):
        places = [(number, g) for g, group in enumerate(level.groups) if group.size > 1]
        selectors = yield from parallel(*(_choose(party, wire, rows, place, wire.bits) for place in places))
        alone = [_at(unmasked(party, wire), g.index) for g in level.groups if g.size == 1]
        results = [*alone, *(_selected(party, selector, wire, rows) for selector in selectors)]
        joined = _joined(results, level.order, wire.bits, wire.frac)
        (wire,) = yield from open_masked(party, [joined])
    return wire


@constant()
def _own_places(columns: int, number: int, radix: int) -> Tensor:
    """(columns number,): each element's place within its group, rows side by side."""
    return torch.from_numpy(np.tile(np.arange(columns) % radix, number))


@lru_cache
def _place_bits(rows: Rows) -> tuple[int, ...]:
    """Bits of a winner's place after each level: those of the places within its groups, one after the other."""
    return tuple(accumulate((radix - 1).bit_length() for radix in radices(rows)))


def place_of(found: Tensor, rows: Rows) -> Tensor:
    """The place that `row_argmax` says, opened: that within the first level's groups is in the upper bits, the last one's in the lowest."""
    place, left, widths = torch.zeros_like(found), found, _place_bits(rows)
    for level in reversed(range(len(widths))):
        width = widths[level] - (widths[level - 1] if level else 0)
        place = place * radices(rows)[level] + (left & ((1 << width) - 1))
        left = left >> width
    return place


def row_argmax(party: Party, wire: Wire, rows: Rows) -> Protocol_[Shares]:
    """The place of the largest element of every row, the first among equals, as `place_of` reads it, (H, number).

    As `row_maximum`, in one round less; the winner's place travels along as a second wire, and the last level opens nothing. It is that
    within the groups of every level so far, the first one's in the upper bits, so that no more is opened than there is of it: shares
    times 2^b are shares in the ring that is b bits wider, to which a level's own places of b bits, which are public, are added.
    Rows of one length, one a group, or one of each sequence side by side.
    """
    places_wire: Wire | None = None
    assert rows.alone and rows.count == rows.total, "rows of one length, one a sequence"
    levels, widths, columns, before = tournament(rows), _place_bits(rows), rows.columns, 0
    if not levels:
        return Shares(wire.mask * 0 if known(wire.mask) else wire.mask, 1, 0)
    for number, (level, radix, bits) in enumerate(zip(levels, radices(rows), widths, strict=True)):
        own = like(_own_places(columns, rows.number, radix), wire.masked).expand(wire.shape[0], -1) if known(wire.masked) else wire.masked
        places = [(number, g) for g, group in enumerate(level.groups) if group.size > 1]
        selectors = yield from parallel(*(_choose(party, wire, rows, place, max(bits, wire.bits)) for place in places))
        alone = [g.index for g in level.groups if g.size == 1]
        held = unmasked(party, places_wire) if places_wire is not None else private_input(own, bits, 0, own=party.is_server)
        indices = [raised(_at(held, index), bits - before) if before else _at(held, index) for index in alone]
        for selector in selectors:
            index = _selected_public(party, selector, own)
            if places_wire is not None:
                index = add(index, raised(_selected(party, selector, places_wire, rows), bits - before))
            indices.append(index)
        winner = _joined(indices, level.order, bits, 0)
        if number + 1 == len(levels):
            return winner
        values = [*(_at(unmasked(party, wire), index) for index in alone), *(_selected(party, s, wire, rows) for s in selectors)]
        wire, places_wire = yield from open_masked(party, [_joined(values, level.order, wire.bits, wire.frac), winner])
        columns, before = -(-columns // radix), bits
    raise AssertionError("a tournament has an end")


def cost_upper_wire(count: int, bits: int) -> Declared:
    """D shares the masks of `count` upper parts of `bits`; no byte moves between S and C."""
    return dealt((count, bits))


def _cost_level(heads: int, rows: Rows, level: int, bits: int, shared_bits: int, wires: Sequence[int]) -> tuple[int, Declared]:
    """The winners of a level, and its comparisons; D shares the products of rhos in `shared_bits`, and those times each wire's mask."""
    winners, cost, single = 0, Declared(), single_digit(heads, rows, level, bits)
    for size, groups in group_sizes(rows, level)[1]:
        winners += heads * groups
        if size > 1:
            products = heads * groups * (size - 1) * (2 ** (size - 1) - 1)
            one = cost_compare(heads * groups * math.comb(size, 2), bits, single=single)
            cost = cost.beside(one + dealt((products, shared_bits), *((products, wire) for wire in wires)))
    return winners, cost


def cost_row_maximum(heads: int, rows: Rows, bits: int) -> Declared:
    """Per level: comparisons of all pairs of each group, then an opening of the winners."""
    total = Declared()
    for level in range(len(radices(rows))):
        winners, cost = _cost_level(heads, rows, level, bits, bits, [bits])
        total += cost + cost_open_masked((winners, bits))
    return total


def cost_row_argmax(heads: int, length: int, bits: int, sequences: int = 1) -> Declared:
    """The same with the place so far as a second wire, known to both at the first level; the last level opens nothing."""
    rows, total = Rows(length, 1, 0).times(sequences), Declared()
    widths = _place_bits(rows)
    for level, place_bits in enumerate(widths):
        last = level + 1 == len(widths)
        wires = ([widths[level - 1]] if level else []) + ([] if last else [bits])
        winners, cost = _cost_level(heads, rows, level, bits, max(bits, place_bits), wires)
        total += cost + (Declared() if last else cost_open_masked((winners, bits), (winners, place_bits)))
    return total
