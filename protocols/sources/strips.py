"""What a tape (`protocols.sources.tape`) has memory for beside values: caches that grow, rounds, and what is of the present pass alone."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from protocols import kernels
from protocols.arena import Moves, Still
from protocols.product import Cached, joined_rows
from protocols.ring import array, packed_size
from protocols.rounds import Channel
from protocols.sequences import Stack

Pieces = list[tuple[np.ndarray, int, np.ndarray]]  # elements, their bits, and where they lie in a message
Values = Sequence[tuple[np.ndarray, int]]  # of one axis


class Slot:
    """A cache of wires that grows by a row in each pass: both its tensors, filled up with their first row."""

    def __init__(self, key: tuple[str, str], before: Cached, columns: int) -> None:
        self.key, self.bits, self.frac = key, before.bits, before.frac
        self.masked, self.mask = joined_rows([before.masked], columns), joined_rows([before.mask], columns)
        self.names, self.count, self.added = before.names, before.masked.shape[-2], 0

    def memory(self) -> Iterator[np.ndarray]:
        """See `Movable`."""
        return iter((array(self.masked), array(self.mask)))

    def moved(self, to: Moves) -> Slot:
        """See `Movable`."""
        found = copy.copy(self)
        found.masked, found.mask = to.tensor(self.masked), to.tensor(self.mask)
        return found

    def load(self, before: Cached) -> None:
        """Takes over what was kept elsewhere."""
        count = before.masked.shape[-2]
        for own, other in ((self.masked, before.masked), (self.mask, before.mask)):
            own[..., :count, :] = other
            own[..., count:, :] = other[..., :1, :]
        self.names, self.count = before.names, count

    def put(self, masked: Tensor, mask: Tensor) -> None:
        """A further row; by numpy, which takes a fifth of torch's time for so little."""
        array(self.masked)[..., self.count : self.count + 1, :] = array(masked)
        array(self.mask)[..., self.count : self.count + 1, :] = array(mask)

    def advance(self, first: int) -> None:
        """A pass whose correlations are named from the first on is over."""
        self.count, self.names = self.count + 1, (*self.names, first + self.added)

    def kept(self) -> Cached:
        """What there is of it."""
        return Cached(self.masked[..., : self.count, :], self.mask[..., : self.count, :], self.names, self.bits, self.frac)


class Places:
    """Where a further row of each of several sequences stands: by a slice where all lie as far apart, in half the time of an index."""

    def __init__(self, places: Sequence[int]) -> None:
        self._places = np.array(places)
        steps = np.diff(self._places)
        alike = len(places) == 1 or bool((steps == steps[0]).all() and steps[0] > 0)
        self._step = int(steps[0]) if alike and len(places) > 1 else int(alike)

    def put(self, out: np.ndarray, rows: np.ndarray, further: int) -> None:
        """Rows (..., R, d) to theirs of (..., S, d), so many positions further."""
        if self._step:
            out[..., self._places[0] + further : self._places[-1] + further + 1 : self._step, :] = rows
        else:
            out[..., self._places + further, :] = rows


class Stacked:
    """A cache of several sequences, of which each pass puts a further row of each in its place; see `protocols.sequences.put`."""

    def __init__(self, key: tuple[str, str], before: Stack, into: Stack, places: Sequence[int], now: Now) -> None:
        self.key, self.bits, self.frac, self.starts = key, into.bits, into.frac, into.starts
        self.masked, self.mask, self.name, self.added = before.masked.clone(), before.mask.clone(), into.name, 0
        self._places, self._now = Places(places), now

    def memory(self) -> Iterator[np.ndarray]:
        """See `Movable`."""
        return iter((array(self.masked), array(self.mask)))

    def moved(self, to: Moves) -> Stacked:
        """See `Movable`."""
        found = copy.copy(self)
        found.masked, found.mask, found._now = to.tensor(self.masked), to.tensor(self.mask), to.object(self._now)
        return found

    def load(self, before: Stack) -> None:
        """Takes over what was kept elsewhere."""
        for own, other in ((self.masked, before.masked), (self.mask, before.mask)):
            own.copy_(other)

    def put(self, masked: Tensor, mask: Tensor) -> None:
        """A further row of each."""
        for out, rows in ((self.masked, masked), (self.mask, mask)):
            self._places.put(array(out), array(rows), self._now.further)

    def advance(self, first: int) -> None:
        """A pass whose correlations are named from the first on is over."""
        self.name = first + self.added

    def kept(self) -> Stack:
        """What there is of it."""
        return Stack(self.masked, self.mask, self.name, self.bits, self.frac, self.starts)


class Now(Still):
    """What is of the present pass alone, where a tape's steps find it."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.early: deque[memoryview] = deque()
        self.on_label: Callable[[tuple[str, str]], None] | None = None
        self.further = 0  # positions since the tape was written
        self.pack, self.unpack = kernels.fast.pack, kernels.fast.unpack

    def moved(self, to: Moves) -> Now:
        """See `Movable`."""
        return Now()

    def label(self, label: tuple[str, str]) -> None:
        """What follows belongs to this operator."""
        if self.on_label is not None:
            self.on_label(label)

    def vary(self, out: Tensor, make: Callable[[int], Tensor]) -> None:
        """A value that hangs on how many positions there are."""
        out.copy_(make(self.further))

    def shift(self, out: np.ndarray, weight: np.ndarray, first: int, end: int) -> None:
        """What lies so many positions further in a window of a weight."""
        out[...] = weight[:, first + self.further : end + self.further]


class Round:
    """Which arrays are sent and which are filled."""

    def __init__(self, sent: Values, late: Values, ahead: Values) -> None:
        self._body, self._sent = _laid(sent)
        self._expected, self._late = _laid(late)
        self._before, self._ahead = _laid(ahead)

    def memory(self) -> Iterator[np.ndarray]:
        """See `Movable`."""
        return (x for pieces in (self._sent, self._late, self._ahead) for x, _, _ in pieces)

    def moved(self, to: Moves) -> Round:
        """See `Movable`."""
        sent, late, ahead = ([(to.array(x), bits) for x, bits, _ in pieces] for pieces in (self._sent, self._late, self._ahead))
        return Round(sent, late, ahead)

    def run(self, now: Now) -> None:
        """Exchanges it, and reads what came ahead of the query."""
        assert now.channel is not None
        body = None
        if self._sent:
            for x, bits, place in self._sent:
                now.pack(x, bits, place)
            body = self._body.tobytes()
        data = now.channel.exchange(body, self._expected.size if self._late else None)
        if self._late and data is not None:
            self._fill(now, self._expected, self._late, data)
        if self._ahead:
            self._fill(now, self._before, self._ahead, now.early.popleft())

    @staticmethod
    def _fill(now: Now, whole: np.ndarray, pieces: Pieces, data: memoryview) -> None:
        whole[:] = np.frombuffer(data, np.uint8)
        for x, bits, place in pieces:
            now.unpack(place, bits, x)


def _laid(values: Values) -> tuple[np.ndarray, Pieces]:
    sizes = [packed_size(x.size, bits) for x, bits in values]
    whole, at, pieces = np.empty(sum(sizes), np.uint8), 0, []
    for (x, bits), size in zip(values, sizes, strict=True):
        pieces.append((x, bits, whole[at : at + size]))
        at += size
    return whole, pieces
