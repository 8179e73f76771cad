"""A dealer's part of a further token's pass, written down once and done again: `protocols.sources.tape` of the third party.

A tape holds memory for what both parties draw, the calls that make of it what the client is sent, and the joined masks of cached wires,
of which each pass adds a row. To do it again is to draw both parties' streams of the pass's own names into that memory, and to make the
calls. What is asked for is checked and bounded before, as ever; passes with one digest of kinds (`protocols.kind_hash`) have one tape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.arena import Moves, Still
from protocols.correlations import Kind, parts_of
from protocols.prg import Prg
from protocols.product import joined_rows
from protocols.recording import Recorder, replay
from protocols.ring import array, flat
from protocols.sequences import PutRowsMask
from protocols.sources.expansion import Whole
from protocols.sources.shelf import Taped, largest
from protocols.sources.strips import Places

PIECE = 1 << 18  # bytes of the payload at a time


class Masks(Protocol):
    """What a dealer holds of earlier passes, and of the weights."""

    def mask(self, name: int) -> Tensor:
        """See `protocols.correlations.Known`."""

    def server_mask(self, name: int) -> Tensor:
        """See `protocols.correlations.Known`."""

    def weight_mask(self, name: str) -> Tensor:
        """See `protocols.correlations.Known`."""

    def detach(self, mask: Tensor) -> None:
        """Copies this one, whose memory is used for something else."""


class _Rows:
    """The masks of a cache's rows, filled up by its first."""

    def __init__(self, place: int, names: tuple[int, ...], masks: Sequence[Tensor], columns: int) -> None:
        self.place, self.names = place, names
        self.out, self.count = joined_rows(masks, columns), sum(mask.shape[-2] for mask in masks)

    def memory(self) -> Iterator[np.ndarray]:
        """See `protocols.arena.Movable`."""
        return iter((array(self.out),))

    def moved(self, to: Moves) -> _Rows:
        """See `protocols.arena.Movable`."""
        found = copy.copy(self)
        found.out, found.names = to.tensor(self.out), ()
        return found

    def load(self, names: tuple[int, ...], masks: Sequence[Tensor]) -> None:
        """Those of another state."""
        self.out.copy_(joined_rows(masks, self.out.shape[-2]))
        self.names, self.count = names, sum(mask.shape[-2] for mask in masks)

    def put(self, row: Tensor) -> None:
        """A further one."""
        array(self.out)[..., self.count : self.count + 1, :] = array(row)


class _Stacked:
    """The mask of a stack of several sequences' rows, of which each pass puts a further row of each in its place.

    What a dealer keeps under the name of the last pass is this very memory. The pass before it read none of the rows that are put: they
    filled up sequences. So if a pass is taken back, what it put is of no consequence.
    """

    def __init__(self, place: int, kind: PutRowsMask, mask: Tensor, further: _Further) -> None:
        self.place, self.name, self.out = place, kind.x, mask.clone()
        self._places, self._further = Places(kind.places), further

    def memory(self) -> Iterator[np.ndarray]:
        """See `protocols.arena.Movable`."""
        return iter((array(self.out),))

    def moved(self, to: Moves) -> _Stacked:
        """See `protocols.arena.Movable`."""
        found = copy.copy(self)
        found.out, found.name, found._further = to.tensor(self.out), 0, to.object(self._further)
        return found

    def load(self, name: int, mask: Tensor) -> None:
        """That of another state."""
        self.out.copy_(mask)
        self.name = name

    def put(self, rows: Tensor) -> None:
        """A further row of each."""
        self._places.put(array(self.out), array(rows), self._further.positions)


class DealtTape(Taped):
    """See the module's text."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        super().__init__(0)
        parts = [parts_of(kind) for kind in kinds]
        self.kinds = tuple(kinds)
        self.server, self.client = Whole([each.server + each.shared for each in parts]), Whole([each.client for each in parts])
        self.payload = np.zeros(sum(part.size for each in parts for part in each.shared), np.uint8)
        self.rows: list[_Rows] = []
        self.stacks: list[_Stacked] = []
        self.left: dict[int, Tensor] = {}  # by place, of what outlives the pass
        self.further = _Further()
        starts = [(place, _first_place(kind)) for place, kind in enumerate(kinds) if kind.moves]
        self._starts = [(place, start) for place, start in starts if start >= 0]

    @property
    def position(self) -> tuple[int, ...]:
        """Where it was written: of what moves on, and how long its caches were."""
        return (*[start for _, start in self._starts], *[len(_names(self.kinds[rows.place])[0]) for rows in self.rows])

    def follows(self, kinds: Sequence[Kind]) -> bool:
        """Whether all that moves on in a pass of these kinds, whose digest is that of the tape's, is as many positions further here."""
        return len({_first_place(kinds[place]) - start for place, start in self._starts}) <= 1

    def deal(self, masks: Masks, prgs: tuple[Prg, Prg], kinds: Sequence[Kind], first: int) -> dict[int, Tensor]:
        """The pass of these kinds, which it `follows`; what outlives it, by name. The payload is then there."""
        self._draw(prgs, first)
        self.further.positions = next((_first_place(kinds[place]) - start for place, start in self._starts), 0)
        names = [_names(kinds[rows.place]) for rows in self.rows]
        for rows, (before, _) in zip(self.rows, names, strict=True):
            if rows.names != before:
                rows.load(before, [masks.mask(name) for name in before])
        for stack in self.stacks:
            if stack.name != (past := _put(kinds[stack.place]).x):
                stack.load(past, masks.mask(past))
        replay(self.steps)
        return self._end(names, first)

    def _draw(self, prgs: tuple[Prg, Prg], first: int) -> None:
        self.server.draw(prgs[0], first)
        self.client.draw(prgs[1], first)

    def _end(self, names: Sequence[tuple[tuple[int, ...], int]], first: int) -> dict[int, Tensor]:
        for rows, (before, last) in zip(self.rows, names, strict=True):
            rows.names, rows.count = (*before, last), rows.count + 1
        found = {first + place: left.clone() for place, left in self.left.items()}
        for stack in self.stacks:
            stack.name = first + stack.place
            found[stack.name] = stack.out
        return found

    def write(self, masks: Masks, prgs: tuple[Prg, Prg], first: int, *, tells: bool) -> tuple[dict[int, Tensor], Recorder]:
        """The same, of the tape's own kinds, written down."""
        self._draw(prgs, first)
        weights = [masks.weight_mask(name) for name in {getattr(kind, "weight", "") for kind in self.kinds} if name]
        recorder = Recorder(weights, tells=tells, most=most_of(self.kinds))
        for whole in (self.server, self.client):
            recorder.given(whole.out)
        recorder.given(torch.from_numpy(self.payload))
        known, at = _Writing(self, masks, recorder, first), 0
        with recorder:
            for place, (kind, own, theirs) in enumerate(zip(self.kinds, self.server.values, self.client.values, strict=True)):
                parts = parts_of(kind)
                ours, shares = own[: len(parts.server)], own[len(parts.server) :]
                known.place = place
                values, left = kind.relation(known, ours, theirs, shares)
                for value, share, part in zip(values, shares, parts.shared, strict=True):
                    end = at + part.size
                    kernels.fast.pack_rest(flat(value), flat(share), int(part.xor), part.bits, self.payload[at:end])
                    at = end
                if left is not None:
                    known.left[first + place] = left
                    if kind.outlives and not isinstance(kind, PutRowsMask):
                        self.left[place] = left
        self.steps, self.bytes = recorder.steps, recorder.bytes
        return self._end([_names(self.kinds[rows.place]) for rows in self.rows], first), recorder

    def pieces(self) -> list[bytes]:
        """What the client is sent."""
        whole = self.payload.tobytes()
        return [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]

    def wipe(self) -> None:
        """Forgets all values."""
        super().wipe()
        self.forget()

    def packed(self, recorder: Recorder) -> Self:
        """The same in memory of its own, without values; it was just written by this recorder."""
        kept = [self.server.out, self.client.out, *self.left.values()]
        kept += [*[rows.out for rows in self.rows], *[stack.out for stack in self.stacks]]
        return self._moved(recorder.moves(self.steps, [self.payload, *[array(x) for x in kept]]))

    def _moved(self, to: Moves) -> Self:
        found = super()._moved(to)
        found.further, found.payload = to.object(self.further), to.array(self.payload)
        found.server, found.client = self.server.moved(to), self.client.moved(to)
        found.rows, found.stacks = ([to.object(each) for each in many] for many in (self.rows, self.stacks))
        found.left = {place: to.tensor(left) for place, left in self.left.items()}
        return found

    def forget(self) -> None:
        """What it holds of earlier passes' masks is not to be used: names alone do not tell whose they are."""
        for rows in self.rows:
            rows.names = ()
        for stack in self.stacks:
            stack.name = 0


class _Further(Still):
    """Positions since the tape was written."""

    positions = 0

    def shift(self, out: np.ndarray, weight: np.ndarray, first: int, end: int) -> None:
        """What lies so much further in a window of a weight's mask."""
        out[...] = weight[:, first + self.positions : end + self.positions]


def most_of(kinds: Sequence[Kind]) -> int:
    """Bytes of a pass's tape, at most."""
    return largest(next((len(kind.places) for kind in kinds if isinstance(kind, PutRowsMask)), 1))


def _put(kind: Kind) -> PutRowsMask:
    assert isinstance(kind, PutRowsMask), "a stack is of such a kind"
    return kind


def _first_place(kind: Kind) -> int:
    """Of what moves on in a kind, -1 where it has none."""
    return next((places[0] for places in (getattr(kind, field) for field in kind.moves) if places), -1)


def _names(kind: Any) -> tuple[tuple[int, ...], int]:
    return kind.y[:-1], kind.y[-1]


class _Writing:
    """`Known` of a pass that is written down."""

    def __init__(self, tape: DealtTape, masks: Masks, recorder: Recorder, first: int) -> None:
        self._tape, self._masks, self._recorder, self._first = tape, masks, recorder, first
        self.left: dict[int, Tensor] = {}
        self.place = 0

    def mask(self, name: int) -> Tensor:
        """See `Known`."""
        found = self.left.get(name)
        return self._masks.mask(name) if found is None else found

    def server_mask(self, name: int) -> Tensor:
        """See `Known`: what was drawn."""
        if name < self._first:
            return self._masks.server_mask(name)
        kind, own = self._tape.kinds[name - self._first], self._tape.server.values[name - self._first]
        count = len(parts_of(kind).server)
        return kind.share_left(own[:count], own[count:])

    def weight_mask(self, name: str) -> Tensor:
        """See `Known`; what a window reads of it moves on."""
        weight, window = self._masks.weight_mask(name), getattr(self._tape.kinds[self.place], "window", ())
        if not window:
            return weight
        with self._recorder.outside():
            out = weight.clone()
        self._recorder.given(out)
        for first, end in zip(window[::2], window[1::2], strict=True):
            self._recorder.note(self._tape.further.shift, array(out[:, first:end]), array(weight), first, end)
        return out

    def put(self, kind: PutRowsMask) -> Tensor:
        """See `protocols.sequences.PutRowsMask`."""
        rows = self.left[kind.y]
        with self._recorder.outside():
            stack = _Stacked(self.place, kind, self._masks.mask(kind.x), self._tape.further)
            stack.put(rows)
        self._recorder.given(stack.out)
        self._recorder.note(stack.put, rows)
        self._tape.stacks.append(stack)
        return stack.out

    def rows(self, names: tuple[int, ...], reach: int) -> Tensor:
        """See `protocols.product.MatmulMask`."""
        *before, last = names
        if not reach or last < self._first or any(name >= self._first for name in before):
            return joined_rows([self.mask(name) for name in names], reach)
        with self._recorder.outside():
            rows = _Rows(self.place, tuple(before), [self._masks.mask(name) for name in before], reach)
            rows.put(self.left[last])
        self._recorder.given(rows.out)
        self._recorder.note(rows.put, self.left[last])
        self._tape.rows.append(rows)
        return rows.out
