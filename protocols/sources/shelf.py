"""Tapes of one party that wait for a session, and the way to one more of a kind that there is.

A tape that waits has no values, and where the system takes memory back no memory either, but for the Python objects of its steps.
Whoever finds none that waits gets another one made of one that is used elsewhere, which takes a fraction of writing it; while one session
writes the first of a kind, others walk, since they would only write the same. What all tapes have in common stands here too.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, Self, TypeVar
from weakref import ref

import torch

from protocols.arena import Arena, Moves
from protocols.correlations import Kind, parts_of
from protocols.kind_hash import way

STEP = 640  # bytes of a step's objects
OBJECTS = 64 * 2**20  # bytes of those of tapes that wait
RESIDENT = 64 * 2**20  # bytes of memory that such tapes keep, since it takes time to get it back


LARGEST = 48 * 2**20  # bytes of a tape, for each sequence: beyond, arithmetic takes the time
MOST = 256 * 2**20  # and of all
LEAST = 16  # bytes of a tape that an element of a correlation stands for, at least


def largest(sequences: int) -> int:
    """Bytes of the tape of a pass over so many sequences, at most."""
    return min(MOST, LARGEST * sequences)


def small(kinds: Sequence[Kind], most: int) -> bool:
    """Whether a pass that needs these may have a tape of at most so many bytes."""
    elements = 0
    for part in (part for kind in kinds for each in parts_of(kind) for part in each):
        elements += part.count
        if part.modulus or elements > most // LEAST:
            return False
    return True


class Taped:
    """A tape of a walk, or of what is dealt for one."""

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.steps: list[Any] = []  # of `Step`; until it is packed, of what was noted
        self.arena: Arena | None = None  # once it is packed

    def wipe(self) -> None:
        """Forgets all values."""
        self._packed.clear()

    def another(self) -> Self:
        """One more, for another session."""
        return self._moved(Moves.another(self._packed))

    @property
    def _packed(self) -> Arena:
        assert self.arena is not None, "it was packed"
        return self.arena

    def _moved(self, to: Moves) -> Self:
        """The same in other memory, without values; a tape moves what it has besides."""
        found = copy.copy(self)
        found.arena, found.bytes, found.steps = to.arena, to.arena.nbytes, to.steps(self.steps)
        return found


class Agreement:
    """Which ways that passes go (`protocols.kind_hash.way`) were recorded twice, at two positions, with the same told. Safe in threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._first: dict[object, tuple[object, object, object]] = {}  # of each way, what the first was of, its position, what it told
        self._ways = set[object]()

    def holds(self, kinds: Sequence[Kind]) -> bool:
        """Whether a pass of these goes such a way."""
        return way(kinds) in self._ways

    def ask(self, kinds: Sequence[Kind], key: object, position: object, told: object) -> bool | None:
        """Whether it is so with this recording; None where another one of this key is needed, at another position unless it has none."""
        goes = way(kinds)
        with self._guard:
            if goes in self._ways:
                return True
            first = self._first.get(goes)
            if first is None or first[0] != key:
                self._first[goes] = key, position, told
                return None
            if position and first[1] == position:  # another session's: what hangs on the position would not show
                return None
            del self._first[goes]
            if first[2] == told:
                self._ways.add(goes)
            return first[2] == told


K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Taped)


class Shelf(Generic[K, T]):
    """Tapes by what they are of. Safe in threads."""

    def __init__(self, most: int = OBJECTS, resident: int = RESIDENT) -> None:
        self._guard, self._most, self._resident = threading.Lock(), most, resident
        self._free: OrderedDict[int, tuple[K, T]] = OrderedDict()
        self._known: dict[K, ref[T]] = {}
        self._claimed = set[K]()

    def __len__(self) -> int:
        return len(self._free)

    def take(self, key: K) -> T | None:
        """One that nobody has; None where there is none of the kind."""
        with self._guard:
            found = next((place for place, (one, _) in self._free.items() if one == key), None)
            if found is not None:
                return self._free.pop(found)[1]
            known = self._known.get(key)
            used = None if known is None else known()
            if used is None:
                self._known.pop(key, None)
                return None
        with torch.inference_mode():
            return used.another()

    def add(self, key: K, tape: T) -> None:
        """There is one, which is used by whoever wrote it."""
        with self._guard:
            self._known[key] = ref(tape)
            self._claimed.discard(key)

    def claim(self, key: K) -> bool:
        """Whether the caller is to write one: nobody else does. Until `add`, or `leave`."""
        with self._guard:
            if key in self._claimed:
                return False
            self._claimed.add(key)
            return True

    def leave(self, key: K) -> None:
        """None was written."""
        with self._guard:
            self._claimed.discard(key)

    def give(self, key: K, tape: T) -> None:
        """Back, without values."""
        with torch.inference_mode():
            tape.wipe()
        with self._guard:
            self._free[id(tape)] = key, tape
            self._known[key] = ref(tape)
            held = sum(each.bytes for _, each in self._free.values() if each.arena is not None and each.arena.holds)
            for _, each in self._free.values():
                if held > self._resident and each.arena is not None and each.arena.holds:
                    each.arena.release()
                    held -= each.bytes
            while self._over():
                self._free.popitem(last=False)

    def _over(self) -> bool:
        waiting = [each for _, each in self._free.values()]
        return sum(STEP * len(each.steps) + (each.arena.holds if each.arena else 0) for each in waiting) > self._most + self._resident
