"""Who waits at a door, and who makes room there."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Crowd(Generic[T]):
    """At most `most` at a time, each for `seconds` at most; where one more comes, the place with the most loses its oldest.

    A place is whatever tells those apart who must not crowd each other out: an address, a certificate. `each` bounds a single one.
    All steps take the same time, however many there are. Not locked.
    """

    def __init__(self, most: int, seconds: float, each: int | None = None) -> None:
        self.most, self.seconds, self.each = most, seconds, most if each is None else each
        # ordered ones, whose first is found at once after any number of others was removed
        self._since: OrderedDict[T, tuple[Hashable, float]] = OrderedDict()
        self._places: defaultdict[Hashable, OrderedDict[T, None]] = defaultdict(OrderedDict)
        self._sized: defaultdict[int, OrderedDict[Hashable, None]] = defaultdict(OrderedDict)  # places, by how many are there
        self._largest = 0

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, one: T) -> bool:
        return one in self._since

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._since))

    def beside(self, one: T) -> int:
        """How many there are from its place."""
        return len(self._places[self._since[one][0]])

    def add(self, one: T, place: Hashable) -> T | None:
        """Who has to leave for it, and is not in the crowd any more."""
        self._since[one] = place, time.monotonic()
        self._places[place][one] = None
        self._resize(place, len(self._places[place]) - 1)
        if len(self._places[place]) > self.each:
            return self._lose(place)
        return self.crowded_out() if len(self) > self.most else None

    def crowded_out(self) -> T | None:
        """Removes the oldest of a place with the most; None if nobody is there."""
        return self._lose(next(iter(self._sized[self._largest]))) if self._since else None

    def _lose(self, place: Hashable) -> T:
        oldest = next(iter(self._places[place]))
        self.discard(oldest)
        return oldest

    def discard(self, one: T) -> None:
        """Takes one out, if it is there."""
        if one not in self._since:
            return
        place, _ = self._since.pop(one)
        del self._places[place][one]
        self._resize(place, len(self._places[place]) + 1)

    def _resize(self, place: Hashable, before: int) -> None:
        now = len(self._places[place])
        self._sized[before].pop(place, None)
        if not self._sized[before]:
            del self._sized[before]
        if now:
            self._sized[now][place] = None
        else:
            del self._places[place]
        if now > self._largest or self._largest not in self._sized:  # a place changes by one, so does the largest
            self._largest = now

    def due(self) -> float | None:
        """When the oldest will have been here for too long, time.monotonic(); None if nobody is."""
        return next(iter(self._since.values()))[1] + self.seconds if self._since else None

    def overdue(self) -> Iterator[T]:
        """Removes those who have been here for too long, one after the other."""
        now = time.monotonic()
        while (due := self.due()) is not None and due <= now:
            oldest = next(iter(self._since))
            self.discard(oldest)
            yield oldest
