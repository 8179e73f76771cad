"""Public layouts of ragged rows: causal attention holds, sends and computes the lower triangle alone.

Row i of `number` has `first + i * step` elements. Causal rows over a cache of p positions have first = p + 1, step = 1;
rows of equal length have step = 0. The elements of a group (a head) lie side by side, (H, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.memo import Memo
from protocols.ring import array, blank, like, nbytes

RADIX = 4
WIDE_RADIX = 8  # where one row is left of at most so many elements
WIDE_FROM = 4096
WIDE_FROM_OF_MANY = 512  # where each sequence of a batch has one: a level is shared by all, and what it saves is not
MAX_SINGLE = 16  # bits of a comparison that may take one digit
SINGLE_BYTES = 1 << 20  # what single digits may cost at a level, of a row alone
SINGLE_SHARE, LONG_SHARE = 50, 10  # and of many rows, for each of their elements; of those that are long, less
LONG = 128
MAX_COUNT = 1 << 31  # elements of one group's rows
INDEX = 6  # places that are made for each element, at most, where a layout is first used

STEP = 16  # rows of one more position are held in multiples of at least so many
STEP_OF_MANY = 32  # and those of a batch: to lay them out anew takes as long as two passes, and to write a pass down as long as four
SIXTEENTH = 16

_layouts = Memo(256 * 2**20)


def reach(length: int, least: int = STEP) -> int:
    """To how many elements a row of this length is filled up, so that shapes repeat: at most 15 more up to 256, an eighth beyond.

    Or in steps of at `least` so many.
    """
    step = max(least, (1 << (length - 1).bit_length()) // SIXTEENTH)
    return -(-length // step) * step


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

    @cached_property
    def _of_rows(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """`lengths`, as compiled loops read them."""
        return np.ascontiguousarray(self.lengths, np.int64)

    @property
    def count(self) -> int:
        """Elements held, N."""
        return self.number * self.first + self.step * (self.number * (self.number - 1) // 2)

    @property
    def total(self) -> int:
        """Elements of the full matrix, which local products pass over."""
        return self.number * self.columns

    @property
    def alone(self) -> bool:
        """Whether no row has others of its own sequence beside it: then it is one token's, and a round is worth more than bytes."""
        return self.number == 1

    def times(self, sequences: int) -> Rows:
        """Such rows of each of so many sequences."""
        return self if sequences == 1 else Stacked.of([self] * sequences)

    @staticmethod
    def read(fields: Sequence[int]) -> Rows:
        """Of integers that come from a peer; ValueError unless every row has an element, and all of them are not too many."""
        # a row of each sequence is asked for again and again, and small
        return (_kept if len(fields) > 3 and set(fields[1::3]) == {1} else _read)(tuple(fields))

    def pack(self, x: Tensor) -> Tensor:
        """(..., number, columns) -> (..., N)."""
        if x.is_meta:
            return blank(*x.shape[:-2], self.count)
        if self.number == 1:
            return x.flatten(-2)
        return x.flatten(-2)[..., like(_flat(self), x)]

    def unpack(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., number, columns), zeros elsewhere."""
        if x.is_meta:
            return blank(*x.shape[:-1], self.number, self.columns)
        if self.number == 1:
            return x.unsqueeze(-2)
        out = x.new_zeros((*x.shape[:-1], self.total))
        out[..., like(_flat(self), x)] = x
        return out.reshape(*x.shape[:-1], self.number, self.columns)

    def sum(self, x: Tensor) -> Tensor:
        """(H, N) -> (H, number): the rows' sums."""
        if x.is_meta:
            return blank(x.shape[0], self.number)
        if self.number == 1:
            return x.sum(-1, keepdim=True)
        if kernels.fast is not None and x.is_cpu and x.dtype == torch.int64:
            out = torch.empty((x.shape[0], self.number), dtype=torch.int64)
            kernels.fast.row_sums(array(x.contiguous()), self._of_rows, array(out))
            return out
        return x.new_zeros((x.shape[0], self.number)).index_add_(1, like(_row_of(self), x), x)

    def spread(self, x: Tensor) -> Tensor:
        """(H, number) -> (H, N): each row's value at each of its elements."""
        if self.number == 1:
            return x.expand(-1, self.count)
        if x.is_meta:
            return blank(x.shape[0], self.count)
        return x[:, like(_row_of(self), x)]


def _read(fields: tuple[int, ...]) -> Rows:
    if not fields or len(fields) % 3:
        raise ValueError("a layout of rows is three integers, or three for each sequence")
    parts = tuple([Rows(*fields[at : at + 3]) for at in range(0, len(fields), 3)])
    for part in parts:
        if min(part.first, part.number) < 1 or part.step < 0 or part.count > MAX_COUNT:
            raise ValueError("rows without elements, or too many of them")
    rows = parts[0] if len(parts) == 1 else Stacked.of(parts)
    if rows.count > MAX_COUNT or rows.total > MAX_COUNT:
        raise ValueError("too many elements in rows")
    return rows


_kept = lru_cache(maxsize=256)(_read)


@dataclass(frozen=True)
class Stacked(Rows):
    """The rows of several sequences, one sequence below the other: lengths go on by 1 within each. Made by `of`."""

    parts: tuple[Rows, ...]

    @staticmethod
    def of(parts: Sequence[Rows]) -> Stacked:
        """One below the other, at least one."""
        return Stacked(min(part.first for part in parts), sum(part.number for part in parts), 1, tuple(parts))

    def fields(self) -> tuple[int, ...]:
        return self._fields

    @cached_property
    def _fields(self) -> tuple[int, ...]:
        return tuple([field for part in self.parts for field in (part.first, part.number, part.step)])

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    @cached_property
    def columns(self) -> int:
        return max([part.columns for part in self.parts])

    @cached_property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.concatenate([part.lengths for part in self.parts])

    @cached_property
    def count(self) -> int:
        return sum([part.count for part in self.parts])

    @cached_property
    def alone(self) -> bool:
        return all(part.number == 1 for part in self.parts)


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


@_layouts.kept(nbytes)
def _flat(rows: Rows) -> Tensor:
    starts = np.repeat(np.arange(rows.number) * rows.columns, rows.lengths)
    return torch.from_numpy(starts + _within(rows.lengths))


@_layouts.kept(nbytes)
def _row_of(rows: Rows) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(rows.number), rows.lengths))


def _within(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """0, 1, ... within each row, rows side by side."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def radices(rows: Rows) -> tuple[int, ...]:
    """The largest group of each level of a tournament.

    All pairs of a group are compared at once, so that a level costs the more the larger its groups; the first levels hold most
    of the elements. Of many rows: as few levels as groups of four allow, and of eight at the last, where little is left; what is to
    spare makes the first groups smaller. A single row of few elements has groups of up to eight at all levels, in the same way.
    """
    left, found = rows.columns, []
    while left > 1:
        wide = rows.alone and left <= (WIDE_FROM if rows.number == 1 else WIDE_FROM_OF_MANY)
        if rows.alone and not wide:
            found.append(RADIX)
        else:
            radix, after = WIDE_RADIX if wide else RADIX, 1
            while after * (last := WIDE_RADIX if after == 1 else radix) < left:
                after *= last
            found.append(-(-left // after))
        left = -(-left // found[-1])
    return tuple(found)


def _level_bytes(levels: tuple[Level, ...]) -> int:
    return sum(level.order.nbytes + sum(group.index.nbytes for group in level.groups) for level in levels)


@_layouts.kept(_level_bytes)
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


@lru_cache(maxsize=1 << 10)
def group_sizes(rows: Rows, level: int) -> tuple[int, list[tuple[int, int]]]:
    """Elements that a level of a tournament begins with, and of its groups by size (size, how many); made without any of them."""
    lengths = rows.lengths if rows.step else np.array([rows.first])
    times = 1 if rows.step else rows.number  # rows of one length are counted once
    widths = radices(rows)
    if level >= len(widths):
        raise LookupError("the tournament has fewer levels")
    for radix in widths[:level]:
        lengths = -(-lengths // radix)
    whole, rest = np.divmod(lengths, widths[level])
    counts = np.bincount(rest, minlength=widths[level])
    counts[0] = 0
    found = [(size, times * int(count)) for size, count in enumerate(counts) if count]
    full = times * int(whole.sum())
    return times * int(lengths.sum()), [*found, *([(widths[level], full)] if full else [])]


def single_digit(heads: int, rows: Rows, level: int, bits: int) -> bool:
    """Whether the comparisons of a level take one digit, a round less for a one-hot of 2^(bits - 1) bits.

    Of a single row alone, or one of each sequence, where few are left; of many rows where their one-hots are few beside the elements, which
    is so at all levels but the first, and of long rows at the last ones.
    """
    if not level and not rows.alone:
        return False
    pairs = sum(groups * size * (size - 1) // 2 for size, groups in group_sizes(rows, level)[1])
    each = rows.number if rows.columns <= WIDE_FROM_OF_MANY else 1
    most = SINGLE_BYTES * each if rows.alone else (SINGLE_SHARE if rows.columns <= LONG else LONG_SHARE) * heads * rows.count
    return bits <= MAX_SINGLE and heads * pairs * (1 << (bits - 1)) // 8 <= most
