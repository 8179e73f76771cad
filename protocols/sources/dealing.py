"""A dealer's part of a further token's pass, written down once and done again: `protocols.sources.tape` of the third party.

A tape holds memory for what both parties draw, the calls that make of it what the client is sent, and the joined masks of cached wires,
of which each pass adds a row. To do it again is to draw both parties' streams of the pass's own names into that memory, and to make the
calls. What is asked for is checked and bounded before, as ever; passes with one digest of kinds (`protocols.kind_hash`) have one tape.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.correlations import Kind, parts_of
from protocols.kind_hash import way
from protocols.prg import Prg
from protocols.product import MatmulMask, joined_rows
from protocols.recording import Recorder, Step, replay
from protocols.ring import array, flat
from protocols.sequences import PutRowsMask
from protocols.sources.expansion import Whole

LARGEST = 48 * 2**20  # bytes of a tape, for each sequence
MOST = 256 * 2**20  # and of all
WAITING = 192 * 2**20  # bytes of those that no session has
LEAST = 16  # bytes of a tape for each element of a correlation
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
        self._places, self._further = np.array(kind.places), further

    def load(self, name: int, mask: Tensor) -> None:
        """That of another state."""
        self.out.copy_(mask)
        self.name = name

    def put(self, rows: Tensor) -> None:
        """A further row of each."""
        array(self.out)[..., self._places + self._further.positions, :] = array(rows)


class DealtTape:
    """See the module's text."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        parts = [parts_of(kind) for kind in kinds]
        self.kinds = tuple(kinds)
        self.server, self.client = Whole([each.server + each.shared for each in parts]), Whole([each.client for each in parts])
        self.payload = np.zeros(sum(part.size for each in parts for part in each.shared), np.uint8)
        self.steps: list[Step] = []
        self.rows: list[_Rows] = []
        self.stacks: list[_Stacked] = []
        self.left: dict[int, Tensor] = {}  # by place, of what outlives the pass
        self.made: list[Tensor] = []
        self.bytes = 0
        self.further = _Further()
        starts = [(place, _first_place(kind)) for place, kind in enumerate(kinds) if kind.moves]
        self._starts = [(place, start) for place, start in starts if start >= 0]

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
        recorder = Recorder(weights, tells=tells, most=_largest(self.kinds))
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
        self.steps, self.made = recorder.steps, recorder.made
        self.bytes = recorder.bytes
        return self._end([_names(self.kinds[rows.place]) for rows in self.rows], first), recorder

    def pieces(self) -> list[bytes]:
        """What the client is sent."""
        whole = self.payload.tobytes()
        return [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]

    def wipe(self) -> None:
        """Forgets all values."""
        for x in (self.server.out, self.client.out, *self.made):
            x.zero_()
        self.forget()

    def forget(self) -> None:
        """What it holds of earlier passes' masks is not to be used: names alone do not tell whose they are."""
        for rows in self.rows:
            rows.names = ()
        for stack in self.stacks:
            stack.name = 0


class _Further:
    """Positions since the tape was written."""

    positions = 0

    def shift(self, out: np.ndarray, weight: np.ndarray, first: int, end: int) -> None:
        """What lies so much further in a window of a weight's mask."""
        out[...] = weight[:, first + self.positions : end + self.positions]


def _largest(kinds: Sequence[Kind]) -> int:
    """Bytes of a pass's tape, at most."""
    return min(MOST, LARGEST * next((len(kind.places) for kind in kinds if isinstance(kind, PutRowsMask)), 1))


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


class DealtTapes:
    """Tapes for one set of weights' masks; any may be used once two recordings of one digest, at two positions, have told the same.

    That is asked of each way that passes go (`protocols.kind_hash.way`); where two differ, none is used from then on.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._free: OrderedDict[int, tuple[bytes, DealtTape]] = OrderedDict()
        self._first: dict[object, tuple[bytes, object]] = {}  # by way
        self._agreed = set[object]()
        self._refused = False

    @property
    def writes(self) -> bool:
        """Whether any pass has a tape."""
        return kernels.fast is not None and not self._refused

    def agreed(self, kinds: Sequence[Kind]) -> bool:
        """Whether two recordings of passes that go this way were the same."""
        return way(kinds) in self._agreed

    def fits(self, kinds: Sequence[Kind]) -> bool:
        """Whether a pass of these may have a tape: a further token's, and small."""
        further = any(isinstance(kind, PutRowsMask) or (isinstance(kind, MatmulMask) and kind.reach) for kind in kinds)
        if not self.writes or not further:
            return False
        elements, most = 0, _largest(kinds)
        for part in (part for kind in kinds for each in parts_of(kind) for part in each):
            elements += part.count
            if part.modulus or elements > most // LEAST:
                return False
        return all(isinstance(kind, PutRowsMask) or not kind.replaces() for kind in kinds)

    def take(self, digest: bytes) -> DealtTape | None:
        """One that nobody has."""
        with self._guard:
            found = next((key for key, (one, _) in self._free.items() if one == digest), None)
            return None if found is None else self._free.pop(found)[1]

    def give(self, digest: bytes, tape: DealtTape) -> None:
        """Back, without values."""
        with torch.inference_mode():
            tape.wipe()
        with self._guard:
            self._free[id(tape)] = digest, tape
            while sum(each.bytes for _, each in self._free.values()) > WAITING:
                self._free.popitem(last=False)

    def written(self, digest: bytes, tape: DealtTape, recorder: Recorder) -> bool:
        """Whether a tape that was just written may be used."""
        with self._guard:
            goes = way(tape.kinds)
            if recorder.why or tape.bytes > _largest(tape.kinds):
                self._refused = True
            elif goes not in self._agreed:
                first = self._first.pop(goes, None)
                if first is None or first[0] != digest:
                    self._first[goes] = digest, recorder.told
                    return False
                if first[1] == recorder.told:
                    self._agreed.add(goes)
                else:
                    self._refused = True
            return not self._refused


class Taping:
    """A session's way to tapes: it has one at a time."""

    def __init__(self, tapes: DealtTapes) -> None:
        self._tapes = tapes
        self._held: tuple[bytes, DealtTape] | None = None
        self._next = 0  # the name after the last pass that had the tape; what it holds of the caches is of that one

    @property
    def writes(self) -> bool:
        """See `DealtTapes`."""
        return self._tapes.writes

    def fits(self, kinds: Sequence[Kind]) -> bool:
        """See `DealtTapes`."""
        return self._tapes.fits(kinds)

    def deal(
        self, masks: Masks, prgs: tuple[Prg, Prg], kinds: Sequence[Kind], digest: bytes, first: int
    ) -> tuple[dict[int, Tensor], list[bytes]]:
        """What outlives the pass, by name, and the client's payload."""
        held = self._held
        if held is not None and first != self._next:  # another pass came between, or the last one was dropped and its names are used anew
            held[1].forget()
        self._next = first + len(kinds)
        tape = held[1] if held is not None and held[0] == digest else self._tapes.take(digest)
        if tape is not None and not tape.follows(kinds):  # a digest does not say how one kind's positions lie to another's
            if held is None or held[1] is not tape:
                self._tapes.give(digest, tape)
            tape = None
        if tape is not None:
            left = tape.deal(masks, prgs, kinds, first)
        else:
            tape = DealtTape(kinds)
            left, recorder = tape.write(masks, prgs, first, tells=not self._tapes.agreed(kinds))
            if not self._tapes.written(digest, tape, recorder):
                return left, tape.pieces()
        if held is None or held[1] is not tape:
            self.end(masks)
            self._held = digest, tape
        return left, tape.pieces()

    def interrupted(self) -> None:
        """A pass is dealt without a tape."""
        self._next = 0

    def end(self, masks: Masks | None = None) -> None:
        """The session has no tape any more; what of its memory is among these masks is copied there."""
        held, self._held = self._held, None
        if held is not None:
            if masks is not None:
                for stack in held[1].stacks:
                    masks.detach(stack.out)
            self._tapes.give(*held)
