"""One piece of memory for all that a recording (`protocols.recording`) made, in which what is not needed at a time lies in one place.

A recording keeps every value that was made in memory of its own. From its steps it is seen when each is first and last touched, so that
the same steps are done in a fraction of the memory, most of which stays in a processor's cache. What has nobody's values is given back
to the system: a tape that waits for a session has addresses, but no memory.
"""

from __future__ import annotations

import copy
import mmap
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from types import MethodType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from protocols.ring import array

LINE = 64  # bytes that values begin at multiples of
PLAIN = frozenset((int, bool, float, str))
Step = tuple[Callable[..., Any], tuple[Any, ...]]
Pieces = Sequence[tuple[int, int]]
"""Memory by its addresses, from and to before, in order."""


class Arena:
    """Zeros, so many bytes."""

    def __init__(self, size: int) -> None:
        self.nbytes = self.holds = max(size, 1)
        """Bytes; and those that it takes, of one that waits."""
        self._map: mmap.mmap | None = None
        if hasattr(mmap, "MAP_ANONYMOUS") and hasattr(mmap, "MADV_DONTNEED"):
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(self._map, np.uint8) if self._map is not None else np.zeros(self.nbytes, np.uint8)
        self._tensor = torch.from_numpy(self.bytes)
        self._words = self._tensor[: self.nbytes // 8 * 8].view(torch.int64)

    def __repr__(self) -> str:
        return f"Arena({self.nbytes} bytes, hidden)"

    def clear(self) -> None:
        """Zeros again."""
        self.bytes[:] = 0
        self.holds = self.nbytes

    def release(self) -> None:
        """Gives its memory back to the system, where that takes it: what is there when it is touched again is zero."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            self.holds = 0

    def array(self, at: int, like: np.ndarray) -> np.ndarray:
        """An array of this form from byte `at` on."""
        return np.ndarray(like.shape, like.dtype, self.bytes, at, like.strides)

    def tensor(self, at: int, like: Tensor) -> Tensor:
        """A tensor of this form from byte `at` on."""
        whole = self._words if like.dtype == torch.int64 else self._tensor.view(like.dtype)
        return whole.as_strided(like.shape, like.stride(), at // like.element_size())


class Movable(Protocol):
    """Whose methods are steps, and whose memory moves with them."""

    def memory(self) -> Iterator[np.ndarray]:
        """What its steps touch beside their arguments; what outlives them is among what `Moves` is told to keep."""

    def moved(self, to: Moves) -> Movable:
        """The same in other memory, without values."""


class Noted(Protocol):
    """A step as a recording has noted it, of tensors: it is made once its memory is known."""

    def touched(self) -> Iterable[Tensor]:
        """What it reads and writes."""

    def step(self, to: Moves | None) -> Step:
        """It, on the other memory; on its own where that is None."""


class Moves:
    """From the memory that steps were recorded in, or moved to before, to another one."""

    def __init__(self, pieces: Pieces, places: Sequence[int], size: int) -> None:
        self._starts, self._pieces, self._places = [start for start, _ in pieces], pieces, places
        self.arena = Arena(size)
        self._objects: dict[int, Any] = {}

    @classmethod
    def packing(cls, pieces: Pieces, steps: Sequence[Step | Noted], kept: Sequence[np.ndarray]) -> Moves:
        """To where all of these steps, in order, find place for what they touch; `kept` is for those who read it before or after."""
        places, size = _placed(pieces, steps, kept)
        return cls(pieces, places, size)

    @classmethod
    def another(cls, arena: Arena) -> Moves:
        """From this one to one of its size."""
        start = int(arena.bytes.ctypes.data)
        return cls([(start, start + arena.nbytes)], [0], arena.nbytes)

    def at(self, address: int) -> int:
        """Where what lay at an address lies; -1 of what does not move."""
        piece = _piece(self._starts, self._pieces, address)
        return -1 if piece < 0 or self._places[piece] < 0 else self._places[piece] + address - self._starts[piece]

    def array(self, x: np.ndarray) -> np.ndarray:
        """The same of the other memory."""
        at = self.at(x.__array_interface__["data"][0]) if x.size else -1
        return x if at < 0 else self.arena.array(at, x)

    def tensor(self, x: Tensor) -> Tensor:
        """The same of the other memory."""
        at = self.at(x.data_ptr()) if x.numel() else -1
        return x if at < 0 else self.arena.tensor(at, x)

    def numpy(self, x: Tensor) -> np.ndarray:
        """The same of the other memory, of int64 or bool, as an array: beside torch, which takes longer."""
        at = self.at(x.data_ptr()) if x.numel() else -1
        if at < 0:
            return array(x)
        kind, size = (np.bool_, 1) if x.dtype == torch.bool else (np.int64, 8)
        return np.ndarray(tuple(x.shape), kind, self.arena.bytes, at, [size * step for step in x.stride()])

    def object(self, x: Any) -> Any:
        """What has moved in its place: once, however often it is asked for."""
        found = self._objects.get(id(x))
        if found is None:
            found = self._objects[id(x)] = x.moved(self)
        return found

    def value(self, x: Any) -> Any:
        """What an argument is."""
        if x is None or type(x) in PLAIN:
            return x
        if isinstance(x, np.ndarray):
            return self.array(x)
        if isinstance(x, Tensor):
            return self.tensor(x)
        if isinstance(x, list | tuple):
            return type(x)([self.value(each) for each in x])
        if isinstance(x, Mapping):
            return {key: self.value(each) for key, each in x.items()}
        return self.object(x) if hasattr(x, "moved") else x

    def steps(self, steps: Sequence[Step | Noted]) -> list[Step]:
        """The same on the other memory."""
        found = []
        for step in steps:
            if not isinstance(step, tuple):
                found.append(step.step(self))
                continue
            function, args = step
            owner = _owner(function)
            moved = function if owner is None else getattr(self.object(owner), function.__name__)
            found.append((moved, tuple([self.value(x) for x in args])))
        return found


class Still:
    """A `Movable` whose attributes are no memory that moves, a copy of which is the same without values."""

    def memory(self) -> Iterator[np.ndarray]:
        """See `Movable`."""
        return iter(())

    def moved(self, to: Moves) -> Self:
        """See `Movable`."""
        return copy.copy(self)


def _owner(function: Any) -> Any:
    if not isinstance(function, MethodType):
        return None
    owner = function.__self__
    return owner if hasattr(owner, "moved") else None


def _touch(values: Iterable[Any], addresses: list[int]) -> None:
    """Adds the addresses of what is among these."""
    for x in values:
        if x is None or type(x) in PLAIN:
            continue
        if isinstance(x, np.ndarray):
            if x.size:
                addresses.append(x.__array_interface__["data"][0])
        elif isinstance(x, Tensor):
            if x.numel():
                addresses.append(x.data_ptr())
        elif isinstance(x, list | tuple):
            _touch(x, addresses)
        elif isinstance(x, Mapping):
            _touch(x.values(), addresses)


def _piece(starts: Sequence[int], pieces: Pieces, address: int) -> int:
    """In which of them an address lies; -1: in none."""
    place = bisect_right(starts, address) - 1
    return place if place >= 0 and address < pieces[place][1] else -1


def _placed(pieces: Pieces, steps: Sequence[Step | Noted], kept: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """Where each piece begins, -1 of what no step touches, and the size of all."""
    first, last = _spans(pieces, steps, kept)
    places, room = [-1] * len(pieces), _Room()
    ending: list[tuple[int, int]] = []  # a heap: after which step a piece is free
    begins, ends = first.tolist(), last.tolist()
    for piece in np.argsort(first, kind="stable").tolist():
        if ends[piece] < 0:
            continue
        while ending and ending[0][0] < begins[piece]:
            over = heappop(ending)[1]
            room.give(places[over], _size(pieces[over]))
        places[piece] = room.take(_size(pieces[piece]))
        heappush(ending, (ends[piece], piece))
    return places, room.size


def _spans(pieces: Pieces, steps: Sequence[Step | Noted], kept: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """At which step each piece is touched first and last; the last is -1 of what none touches."""
    addresses: list[int] = []
    _touch(kept, addresses)
    many, counts = len(addresses), []
    for step in steps:
        before = len(addresses)
        if isinstance(step, tuple):
            _touch(step[1], addresses)
            if (owner := _owner(step[0])) is not None:
                _touch(owner.memory(), addresses)
        else:
            _touch(step.touched(), addresses)
        counts.append(len(addresses) - before)
    first, last = np.full(len(pieces), len(steps)), np.full(len(pieces), -1)
    edges, at = np.array(pieces, np.int64).reshape(-1, 2), np.array(addresses, np.int64)
    place = np.searchsorted(edges[:, 0], at, "right") - 1
    inside = place >= 0
    inside[inside] = at[inside] < edges[place[inside], 1]
    number = np.repeat(np.arange(len(steps)), counts)
    np.minimum.at(first, place[many:][inside[many:]], number[inside[many:]])
    np.maximum.at(last, place[many:][inside[many:]], number[inside[many:]])
    always = place[:many][inside[:many]]
    first[always], last[always] = 0, len(steps)
    return first, last


def _size(piece: tuple[int, int]) -> int:
    return -(-(piece[1] - piece[0]) // LINE) * LINE


class _Room:
    """Gives out places, the first that is large enough."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # from, and to before, in order; no two touch

    def take(self, size: int) -> int:
        """So many bytes from there on."""
        for number, (start, end) in enumerate(self._free):
            if end - start >= size:
                if end - start == size:
                    del self._free[number]
                else:
                    self._free[number] = start + size, end
                return start
        start = self.size
        if self._free and self._free[-1][1] == self.size:  # what is free at the end grows
            start = self._free.pop()[0]
        self.size = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """They are free again."""
        end = start + size
        insort(self._free, (start, end))
        place = self._free.index((start, end))
        if place + 1 < len(self._free) and self._free[place + 1][0] == end:
            end = self._free.pop(place + 1)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
            place -= 1
        self._free[place] = start, end
