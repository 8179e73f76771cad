"""Rows of linear maps that a pass takes from a stock: which maps a stock has rows of, and whose correlations they are.

A stock has, for each position that a pass may go over, the rows that every map in it takes there. A pass takes all its rows of these maps
from the stock, in order, or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec
from torch import Tensor

from protocols.correlations import Bits, Flag, Kind, Tensors, Text
from protocols.lattice.stock import Rows
from protocols.linear import LinearMask

TOGETHER = 1 << 14
"""Positions whose rows stand under one c1, at most: what both hold of a map's rows while they make them."""

Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Use = tuple[str, int, int, int, int]


class Map(msgspec.Struct, frozen=True):
    """One linear map, and how many rows of it a position takes."""

    name: Text
    inner: Size
    outer: Size
    bits: Bits
    transposed: Flag = 0
    each: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1

    def rows(self, positions: int) -> Rows:
        """What is made for so many positions at once."""
        return Rows(self.name, self.inner, self.outer, self.bits, positions * self.each, bool(self.transposed))

    @property
    def use(self) -> Use:
        """What it is asked for as."""
        return self.name, self.inner, self.outer, self.bits, self.transposed


def _dense(kinds: Iterable[Kind]) -> Iterator[tuple[int, Use, int]]:
    """The place of each product with a matrix, which it is, and how many rows it takes."""
    for place, kind in enumerate(kinds):
        if isinstance(kind, LinearMask) and not kind.diagonal:
            *outer, inner = kind.shape
            rows = 1
            for size in outer:
                rows *= size
            yield place, (kind.weight, inner, kind.out, kind.bits, kind.transposed), rows


def batches(positions: int) -> Iterator[range]:
    """Which positions' rows are made together."""
    return (range(start, min(positions, start + TOGETHER)) for start in range(0, positions, TOGETHER))


def cheaper(found: Map, positions: int) -> bool:
    """Whether the rows of so many positions take fewer bytes together than by themselves."""
    together = sum(found.rows(len(each)).size for each in batches(positions))
    return together < found.rows(1).alone * positions


def maps_of(one: Sequence[Kind], two: Sequence[Kind], positions: int) -> tuple[Map, ...]:
    """What a stock for so many positions has rows of, from passes over one position and over two: what grows with them, and gets cheaper.

    What a pass takes once, whatever its length, is made by itself.
    """
    taken = [Counter[Use](), Counter[Use]()]
    for kinds, counted in zip((one, two), taken, strict=True):
        for _, use, rows in _dense(kinds):
            counted[use] += rows
    found = [Map(*use, each=rows) for use, rows in taken[0].items() if taken[1][use] == 2 * rows]
    return tuple(each for each in found if cheaper(each, positions))


def positions_of(maps: Sequence[Map], kinds: Sequence[Kind]) -> int:
    """How many positions' rows of all these maps a pass takes; 0 unless it takes those of as many of each."""
    counted = Counter[Use]()
    for _, use, rows in _dense(kinds):
        counted[use] += rows
    found = {divmod(counted[each.use], each.each) for each in maps}
    whole, rest = found.pop() if len(found) == 1 else (0, 1)
    return 0 if rest else whole


def places_of(maps: Sequence[Map], kinds: Sequence[Kind]) -> list[tuple[int, int, slice]]:
    """The place of each correlation that is taken from a stock, of which map, and which of the rows that are taken of it."""
    number, at = {each.use: k for k, each in enumerate(maps)}, Counter[Use]()
    found = []
    for place, use, rows in _dense(kinds):
        if use in number:
            found.append((place, number[use], slice(at[use], at[use] + rows)))
            at[use] += rows
    return found


Taken = Sequence[tuple[Tensor | None, Tensor]]
"""Of each map the masks, at C, and this party's shares, (rows, inner) and (rows, outer)."""


def dealt(maps: Sequence[Map], kinds: Sequence[Kind], taken: Taken) -> dict[int, tuple[Tensors, Tensors]]:
    """By place in the kinds: this party's own values and its shares."""
    found: dict[int, tuple[Tensors, Tensors]] = {}
    for place, number, part in places_of(maps, kinds):
        kind, (masks, shares) = kinds[place], taken[number]
        assert isinstance(kind, LinearMask)
        own = () if masks is None else (masks[part].reshape(kind.shape),)
        found[place] = own, (shares[part].reshape(*kind.shape[:-1], kind.out),)
    return found
