"""Public layouts of ragged rows: causal attention holds, sends and computes the lower triangle alone.

Row i of `number` has `first + i * step` elements. Causal rows over a cache of p positions have first = p + 1, step = 1;
rows of equal length have step = 0. The elements of a group (a head) lie side by side, (H, N).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from protocols.ring import blank, like

RADIX = 4
WIDE_RADIX = 8  # where one row is left of at most so many elements
WIDE_FROM = 4096
MAX_SINGLE = 16  # bits of a comparison that may take one digit
SINGLE_BYTES = 1 << 20  # what single digits may cost at a level


@dataclass(frozen=True)
class Rows:
    """The layout of one group of rows; all of it is public."""

    first: int
    number: int
    step: int

    def fields(self) -> tuple[int, ...]:
        """As plain integers, for a correlation's kind."""
        return (self.first, self.number, self.step)

    @property
    def columns(self) -> int:
        """The longest row."""
        return self.first + (self.number - 1) * self.step

    @cached_property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """(number,)"""
        return self.first + self.step * np.arange(self.number)

    @property
    def count(self) -> int:
        """Elements held, N."""
        return self.number * self.first + self.step * (self.number * (self.number - 1) // 2)

    @property
    def total(self) -> int:
        """Elements of the full matrix, which local products pass over."""
        return self.number * self.columns

    def pack(self, x: Tensor) -> Tensor:
        """(..., number, columns) -> (..., N)."""
        if x.is_meta:
            return blank(*x.shape[:-2], self.count)
        return x.flatten(-2)[..., like(_flat(self), x)]

    def unpack(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., number, columns), zeros elsewhere."""
        if x.is_meta:
            return blank(*x.shape[:-1], self.number, self.columns)
        out = x.new_zeros((*x.shape[:-1], self.total))
        out[..., like(_flat(self), x)] = x
        return out.reshape(*x.shape[:-1], self.number, self.columns)

    def sum(self, x: Tensor) -> Tensor:
        """(H, N) -> (H, number): the rows' sums."""
        if x.is_meta:
            return blank(x.shape[0], self.number)
        return x.new_zeros((x.shape[0], self.number)).index_add_(1, like(_row_of(self), x), x)

    def spread(self, x: Tensor) -> Tensor:
        """(H, number) -> (H, N): each row's value at each of its elements."""
        return x[:, like(_row_of(self), x)]


@dataclass(frozen=True)
class Group:
    """The groups of one size at one level: `index` (groups, size) of positions of the level's input."""

    size: int
    index: Tensor


@dataclass(frozen=True)
class Level:
    """One level of a tournament: groups by size, and where each result stands among the next level's elements."""

    groups: tuple[Group, ...]
    order: Tensor  # (N of the next level,): index into the groups' results, joined by size
    count: int  # N of the next level


@lru_cache(maxsize=256)
def _flat(rows: Rows) -> Tensor:
    starts = np.repeat(np.arange(rows.number) * rows.columns, rows.lengths)
    return torch.from_numpy(starts + _within(rows.lengths))


@lru_cache(maxsize=256)
def _row_of(rows: Rows) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(rows.number), rows.lengths))


def _within(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """0, 1, ... within each row, rows side by side."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def radices(rows: Rows) -> tuple[int, ...]:
    """The largest group of each level of a tournament.

    All pairs of a group are compared at once, so that a level costs the more the larger its groups; the first levels hold most
    of the elements. Of many rows: groups of four, but pairs first where that costs no level. A single row of few elements
    has larger groups: as few levels as groups of eight allow, and of those the smallest groups first.
    """
    left, found = rows.columns, []
    while left > 1:
        wide = rows.number == 1 and left <= WIDE_FROM
        if rows.number == 1 and not wide:
            found.append(RADIX)
        else:
            radix, after = WIDE_RADIX if wide else RADIX, 1
            while after * radix < left:
                after *= radix
            smallest = -(-left // after)
            found.append(smallest if wide or smallest == 2 else radix)
        left = -(-left // found[-1])
    return tuple(found)


@lru_cache(maxsize=256)
def tournament(rows: Rows) -> tuple[Level, ...]:
    """Levels that reduce every row to one element, in groups of at most the `radices`."""
    lengths, levels = rows.lengths, []
    for radix in radices(rows):
        starts = np.cumsum(lengths) - lengths
        after = -(-lengths // radix)
        group_row = np.repeat(np.arange(len(lengths)), after)
        rank = _within(after)
        first = starts[group_row] + rank * radix
        size = np.minimum(radix, lengths[group_row] - rank * radix)
        groups, position, done = [], np.empty(len(size), np.int64), 0
        for width in range(1, radix + 1):
            chosen = np.flatnonzero(size == width)
            if len(chosen):
                position[chosen] = done + np.arange(len(chosen))
                done += len(chosen)
                groups.append(Group(width, torch.from_numpy(first[chosen, None] + np.arange(width))))
        levels.append(Level(tuple(groups), torch.from_numpy(position), len(size)))
        lengths = after
    return tuple(levels)


def single_digit(heads: int, rows: Rows, level: int, bits: int) -> bool:
    """Whether the comparisons of a level take one digit, a round less for a one-hot of 2^(bits - 1) bits.

    Of a single row alone, where few are left: of many rows the one-hots would be too many.
    """
    pairs = sum(len(group.index) * group.size * (group.size - 1) // 2 for group in tournament(rows)[level].groups)
    return rows.number == 1 and bits <= MAX_SINGLE and heads * pairs * (1 << (bits - 1)) // 8 <= SINGLE_BYTES
