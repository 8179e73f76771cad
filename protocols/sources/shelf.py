"""Tapes of one party that wait for a session, and the way to one more of a kind that there is.

A tape that waits has no values, and where the system takes memory back no memory either, but for the Python objects of its steps.
Whoever finds none that waits gets another one made of one that is used elsewhere, which takes a fraction of writing it; while one session
writes the first of a kind, others walk, since they would only write the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, Self, TypeVar
from weakref import ref

import torch

from protocols.arena import Arena, Step

STEP = 640  # bytes of a step's objects
OBJECTS = 64 * 2**20  # bytes of those of tapes that wait
RESIDENT = 64 * 2**20  # bytes of memory that such tapes keep, since it takes time to get it back


class Taped(Protocol):
    """A tape of a walk, or of what is dealt for one."""

    arena: Arena | None
    bytes: int
    steps: list[Step]

    def another(self) -> Self:
        """One more, for another session."""

    def wipe(self) -> None:
        """Forgets all values."""


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
