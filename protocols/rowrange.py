"""What is public of a softmax's rows where they stay within a range, so that no maximum is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocols.exponential import FRAC, TABLE_FRAC, Window
from protocols.memo import Memo
from protocols.reciprocal import Tables
from protocols.ring import nbytes
from protocols.rows import Rows

WIDEST_SCORE = 120  # nats: up to there no score wraps
WIDEST_TOP = 12  # nats
HALVES = 2  # of a nat: the unit of a range
WIDEST_FRAC = 26  # of results: beyond, the roundings of the table would show
TOPMOST = math.exp(4)  # what a score above the top counts as, at most, where the top counts as 1
MAX_TABLES = 6  # of the reciprocal: what is dealt for a row doubles with each
MAX_EXACT = 2.0**10  # a sum, as it is scaled, whose reciprocal has digits enough
SHORT = 16  # elements: with the tables of such rows, sums just above the range are not read from the widest lines
MIN_SUM = 0.5  # of a row at the lower end, as it is scaled


@dataclass(frozen=True, slots=True)
class RowRange:
    """The range of a layer's rows, in halves of a nat; all of it is public.

    The logarithm of a row's sum, or where `by_length` of its mean, is within [top - depth, top - depth + spread], and no score of such a
    row is above `top`. A score counts as e^(x - top), or as e^(x - high) / n in a row of n, high being the range's upper end. What is
    above `top` or above that range is softened, and what is far below becomes nothing.
    """

    top: int
    depth: int
    spread: int
    by_length: bool

    @property
    def high(self) -> int:
        """The upper end of the logarithms."""
        return self.top - self.depth + self.spread

    @property
    def unit(self) -> int:
        """What counts as 1, in a row of one."""
        return self.high if self.by_length else self.top

    @property
    def window(self) -> Window:
        """Fraction bits by which the lowest sum has 15: results are scaled by 2^(bits - TABLE_FRAC)."""
        low = (self.spread if self.by_length else self.depth) / HALVES
        return Window(0, TABLE_FRAC - 1 + math.ceil(low / math.log(2)), math.ceil((WIDEST_SCORE - min(self.unit, self.top) / HALVES) / 4))

    @property
    def scale(self) -> float:
        """What counts as 1, so that the lowest sum is at least `MIN_SUM`."""
        return math.ldexp(1.0, self.window.frac - TABLE_FRAC)

    def largest(self, columns: int) -> float:
        """The largest sum that a row of at most this length can have, whatever its scores; short ones `by_length` share tables."""
        most = min(float(max(columns, SHORT)), 2 * math.exp((self.top - self.high) / HALVES)) if self.by_length else columns
        return self.scale * TOPMOST * 1.01 * most

    @property
    def exact(self) -> float:
        """The largest sum within the range, as it is scaled."""
        return self.scale * math.exp((self.high - self.unit) / HALVES)

    def has_tables(self, columns: int) -> bool:
        """Whether scores up to 120 are within the exponential's window, and the reciprocal's tables suffice for rows of this length."""
        fine = self.top <= WIDEST_TOP * HALVES and self.window.frac <= WIDEST_FRAC and self.exact <= MAX_EXACT
        inside = not self.by_length or (self.high <= self.top and 4 * self.window.above - 252 + WIDEST_SCORE + 1 <= -self.top / HALVES)
        return fine and inside and Tables.of(self.largest(columns), self.exact).number <= MAX_TABLES

    def divided_row(self, length: int) -> tuple[Tensor, Tensor]:
        """`divided` where it hangs on the length, for one row, (1,), however many elements are held for it."""
        offset, octave = _divided(self.high, self.top, Rows(length, 1, 0))
        return offset[:1], octave[:1]

    def divided(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """What is taken off a score, with its fraction bits, and the octaves by which the exponential is divided: (N,), or (1,) and none.

        By both together it is divided by n in a row of n; by octaves as far as all scores up to the top have their own value.
        """
        return _divided(self.high, self.top, rows) if self.by_length else (torch.tensor([(self.top << FRAC) // HALVES]), None)


def _bytes(both: tuple[Tensor, Tensor]) -> int:
    return nbytes(both[0]) + nbytes(both[1])


@Memo(64 * 2**20).kept(_bytes)
def _divided(high: int, top: int, rows: Rows) -> tuple[Tensor, Tensor]:
    logs = np.array([math.log(int(n)) for n in rows.lengths])
    octave = np.maximum(np.floor((logs - (top - high) / HALVES) / math.log(2) + 1e-9), 0).astype(np.int64)
    offset = (high << FRAC) // HALVES + np.round((logs - octave * math.log(2)) * (1 << FRAC)).astype(np.int64)
    spread = (np.repeat(each, rows.lengths) for each in (offset, octave))
    first, second = (torch.from_numpy(each) for each in spread)
    return first, second
