"""How the sequences of a batch lie in a pass: their new positions as rows of one value, what each has cached below the others'.

All of it is public: which sequences there are, their lengths, and which of them a pass goes on with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from protocols.rows import STEP, STEP_OF_MANY, Rows, Stacked, reach
from protocols.sequences import Segment


@dataclass(frozen=True)
class Batch:
    """A pass over new positions of several sequences.

    `before` are the sequences that are cached, by number, and the positions that each has, in the order in which they lie. `new` are those
    that the pass goes on with, each with at least one new position, in the order of their rows; what is not among them waits.

    Where `fills` is not 0, a pass over one more token of some that are cached has their rows filled up (`columns`), so that shapes repeat:
    each of them then lies in as many rows, of which those behind its own are its first again; whoever waits lies as before.
    """

    before: Mapping[int, int] = field(default_factory=dict)
    new: tuple[tuple[int, int], ...] = ()
    ended: frozenset[int] = frozenset()  # of those before, the ones that are there no longer
    fills: int = 0  # up to this length; see `Runtime`
    room: Mapping[int, int] = field(default_factory=dict)  # rows in which those before lie, where these are more than they have

    @cached_property
    def after(self) -> dict[int, int]:
        """What is cached once the pass is over."""
        found = {number: length for number, length in self.before.items() if number not in self.ended}
        for number, count in self.new:
            found[number] = found.get(number, 0) + count
        return found

    def step(self, new: Sequence[tuple[int, int]], ended: Collection[int] = (), fills: int = 0) -> Batch:
        """The pass after this one."""
        return Batch(self.after, tuple(new), frozenset(ended), fills, self._rooms)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """The rows of scores as they are filled up, one of each sequence of the pass; none where they are not.

        All are filled up by as many elements as the longest, so that all of them are full after the same pass.
        """
        one_more = all(count == 1 and number in self.before for number, count in self.new)
        order = {number: place for place, number in enumerate(self.after)}
        in_order = all(order[one] < order[other] for (one, _), (other, _) in pairwise(self.new))
        if not self.fills or not one_more or not in_order:
            return ()
        longest = max(self.after[number] for number, _ in self.new)
        more = self._reach(longest) - longest
        return tuple([self.after[number] + more for number, _ in self.new])

    def _reach(self, longest: int) -> int:
        return min(reach(longest, STEP_OF_MANY if len(self.after) > 1 else STEP), self.fills)

    @cached_property
    def _rooms(self) -> dict[int, int]:
        """Rows in which each sequence lies after the pass, where some are filled up.

        After a pass that takes in a prompt they lie as the next one, over one more token of each, needs them.
        """
        if not self.fills:
            return {}
        if not self.columns:
            longest = max(self.after.values())
            more = max(0, self._reach(longest + 1) - longest)
            return {number: length + more for number, length in self.after.items()}
        waiting = {number: self.room.get(number, length) for number, length in self.after.items()}
        return waiting | {number: columns for (number, _), columns in zip(self.new, self.columns, strict=True)}

    @cached_property
    def settled(self) -> bool:
        """Whether each sequence stays in the rows in which it lies, and a further one takes the place of one that fills up."""
        if not self.columns or self.ended:
            return False
        return all(self._rooms[number] == self.room.get(number, length) for number, length in self.before.items())

    @property
    def shape(self) -> tuple[int, ...]:
        """In how many rows each sequence lies, where some are filled up; negative of those that wait."""
        going = {number for number, _ in self.new}
        return tuple([rows if number in going else -rows for number, rows in self._rooms.items()])

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where each sequence's new row stands then."""
        return tuple([start + self.after[number] - 1 for start, (number, _) in zip(self.starts, self.new, strict=True)])

    @property
    def rows(self) -> int:
        """New positions of all sequences."""
        return sum(count for _, count in self.new)

    @property
    def lasts(self) -> list[int]:
        """The row of each sequence's last new position."""
        found, at = [], 0
        for _, count in self.new:
            at += count
            found.append(at - 1)
        return found

    def windows(self, last: bool = False) -> list[tuple[int, int]]:
        """The positions of each sequence's new rows, or of the last of them alone: from, and to before."""
        return [(self.after[number] - (1 if last else count), self.after[number]) for number, count in self.new]

    @cached_property
    def segments(self) -> list[Segment]:
        """What is cached afterwards, of what was cached (0) and of the new rows (1)."""
        fresh, at, start = {}, 0, {}
        for number, count in self.new:
            fresh[number] = (1, at, count)
            at += count
        at = 0
        for number, length in self.before.items():
            start[number] = (0, at, length)
            at += self.room.get(number, length)
        found: list[Segment] = []
        for number in self.after:
            parts = [start[number]] if number in start and number not in self.ended else []
            parts += [fresh[number]] if number in fresh else []
            if self._rooms:
                found += [*parts, *[(*parts[0][:2], 1)] * (self._rooms[number] - self.after[number])]
                continue
            for part in parts:
                if found and found[-1][0] == part[0] and found[-1][1] + found[-1][2] == part[1]:
                    found[-1] = (part[0], found[-1][1], found[-1][2] + part[2])
                else:
                    found.append(part)
        return found

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence of the pass begins in what is cached afterwards."""
        found, at = {}, 0
        for number, length in self.after.items():
            found[number] = at
            at += self._rooms.get(number, length)
        return tuple([found[number] for number, _ in self.new])

    def layout(self, last: bool) -> Rows:
        """The causal rows of scores: for each new position as many as its sequence has up to there; or for each one's last alone."""
        if self.columns:
            return Stacked.of([Rows(columns, 1, 1) for columns in self.columns])
        parts = [
            Rows(end - (0 if last else count - 1), 1 if last else count, 1)
            for (_, count), (_, end) in zip(self.new, self.windows(), strict=True)
        ]
        return Stacked.of(parts)
