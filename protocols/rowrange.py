"""What is public of a softmax's rows where they stay within a range, so that no maximum is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from protocols.exponential import FRAC, SHARE_FRAC, TABLE_FRAC, Window
from protocols.memo import Memo
from protocols.reciprocal import Tables
from protocols.ring import nbytes
from protocols.rows import Rows

DIGITS = (1, 2, 4)  # units of the exponential's high digit, in halves of a nat
SCORES = 30  # nats: up to so many times a digit no score wraps
WIDEST_TOP = 12  # nats
HALVES = 2  # of a nat: the unit of a range
WIDEST_FRAC = 26  # of results: beyond, the roundings of the table would show
MAX_TABLES = 6  # of the reciprocal: what is dealt for a row doubles with each
MAX_EXACT = 2.0**10  # a sum, as it is scaled, whose reciprocal has digits enough
SHORT = 16  # elements: with the tables of such rows, sums just above the range are not read from the widest lines
RECIPROCAL_FRAC = 20  # of the reciprocal of a sum, at most
MIN_SUM = 0.5  # of a row at the lower end, as it is scaled


def further(digit: int) -> int:
    """Halves of a nat by which every row's top is higher than it would be: the smaller the digit, the sooner what is above loses by it."""
    return DIGITS[-1] // digit // 2


@dataclass(frozen=True, slots=True)
class RowRange:
    """The range of a layer's rows, in halves of a nat; all of it is public.

    The logarithm of a row's sum, or where `by_length` of its mean, is within [top - depth, top - depth + spread], and no score of such a
    row is above `top`. A score counts as e^(x - top), or as e^(x - high) / n in a row of n, high being the range's upper end. What is
    above `top` or above that range is softened, and what is far below becomes nothing. `digit`: the unit of the exponential's high digit;
    the smaller it is, the less a score above the top may count as, at most `topmost` times the top, and the sooner scores wrap.
    `fine`: fraction bits that scores have beyond those of others.
    """

    top: int
    depth: int
    spread: int
    by_length: bool
    digit: int = DIGITS[-1]
    fine: int = 0

    @property
    def widest_score(self) -> int:
        """Up to there, either way, no score wraps: 120 nats, 60 or 30."""
        return SCORES * self.digit

    @property
    def topmost(self) -> float:
        """What a score above the top counts as, at most, where the top counts as 1: two units."""
        return math.exp(2 * self.digit / HALVES)

    @property
    def score_bits(self) -> int:
        """The ring of the scores."""
        return self.window.score_bits

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
        above = math.ceil((self.widest_score * HALVES - min(self.unit, self.top)) / self.digit)
        window = Window.saturating(TABLE_FRAC - 1 + math.ceil(low / math.log(2)), above, FRAC + self.digit.bit_length() - 2)
        return replace(window, multiplied=further(self.digit) if self.by_length else 0, fine=self.fine)

    @property
    def scale(self) -> float:
        """What counts as 1, so that the lowest sum is at least `MIN_SUM`."""
        return math.ldexp(1.0, self.window.frac - TABLE_FRAC)

    def largest(self, columns: int) -> float:
        """The largest sum that a row of at most this length can have, whatever its scores; short ones `by_length` share tables."""
        most = float(columns)
        if self.by_length:
            most = min(max(columns, SHORT) * math.exp(further(self.digit) / HALVES), math.exp((self.top - self.high) / HALVES))
        return self.scale * self.topmost * 1.01 * most

    @property
    def exact(self) -> float:
        """The largest sum within the range, as it is scaled."""
        return self.scale * math.exp((self.high - self.unit) / HALVES)

    @property
    def reciprocal_frac(self) -> int:
        """Fraction bits of the reciprocal of a sum, for 2^-15 of that of the largest within the range."""
        return min(RECIPROCAL_FRAC, 15 + math.ceil(math.log2(self.exact)))

    def has_tables(self, columns: int) -> bool:
        """Whether the widest scores are within the exponential's window, and the reciprocal's tables suffice for rows of this length."""
        if self.digit not in DIGITS:
            return False
        fine = self.top <= WIDEST_TOP * HALVES and self.window.frac <= WIDEST_FRAC and self.exact <= MAX_EXACT
        lowest = self.window.unit * (self.window.above - 126)
        inside = (not self.by_length or self.high <= self.top) and lowest <= -self.widest_score - max(self.top, self.unit) / HALVES
        return fine and inside and Tables.of(self.largest(columns), self.exact).number <= MAX_TABLES

    def divided_row(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """`divided` where it hangs on the length, for one row, each (1,), however many elements are held for it."""
        return _divided(self.high, self.top, further(self.digit), Rows(1, 1, 0), length, FRAC + self.fine)

    def divided(self, rows: Rows) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What is taken off a score, with its fraction bits, and what the exponential is divided by, (N,) each, or (1,) and none.

        That is octaves, and a part of 1 with 15 fraction bits. By both together it is divided by n in a row of n; what is taken off is as
        much of that as lets every score up to the top have its own value.
        """
        if not self.by_length:
            return torch.tensor([(self.top << FRAC + self.fine) // HALVES]), None
        offset, *divisor = _divided(self.high, self.top, further(self.digit), rows, 0, FRAC + self.fine)
        return offset, (divisor[0], divisor[1])


def _bytes(parts: tuple[Tensor, Tensor, Tensor]) -> int:
    return sum(nbytes(part) for part in parts)


@Memo(64 * 2**20).kept(_bytes)
def _divided(high: int, top: int, more: int, rows: Rows, length: int, frac: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the elements of `rows`, which all count as of one `length` if it is given."""
    logs = np.array([math.log(length or int(n)) for n in rows.lengths])
    taken = np.minimum(logs + more / HALVES, (top - high) / HALVES)
    left = (logs - taken) / math.log(2)
    octave = np.floor(left + 1e-9)
    part = np.exp2(octave - left)
    offset = (high << frac) // HALVES + np.round(taken * (1 << frac))
    columns = (offset, octave, np.round(part * (1 << SHARE_FRAC)))
    first, second, third = (torch.from_numpy(np.repeat(each.astype(np.int64), rows.lengths)) for each in columns)
    return first, second, third
