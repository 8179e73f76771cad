"""A walk of one shape, written down once and done again: a further token's pass, say.

A `Tape` holds one party's part of a pass of one shape: memory for what it draws and for what a dealer sends it, the calls between its
rounds (`protocols.recording`), and the rounds themselves, as which arrays are packed and which are filled. To do it again is to draw
the next correlations of the source into that memory, which spends them, and to make the calls and rounds in order.

Nothing random is ever replayed: every mask, share and message is computed from what was drawn or received in this very pass. What else
differs between two passes, since it hangs on how many positions there are, goes by `Recording`: values made anew each time, and the rows
of cached wires, of which each pass adds one. So the passes of one tape are those after each other that fill up one and the same row.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from protocols.arena import Moves
from protocols.correlations import Correlation, Kind, Role, blanks, parts_of, size_of
from protocols.errors import CorrelationError
from protocols.kind_hash import KindHash
from protocols.party import Party
from protocols.product import Cached
from protocols.recording import Recorder, Told, replay
from protocols.ring import array, blank
from protocols.rounds import Channel, Item, Received
from protocols.sequences import Stack
from protocols.shares import Wire
from protocols.sources.dealer import Store
from protocols.sources.expansion import Whole
from protocols.sources.shelf import Taped
from protocols.sources.strips import Now, Round, Slot, Stacked


class Tape(Taped):
    """See the module's text. `first` is the name of the first correlation where it was written, `offset` the positions before.

    Its attributes are the pass's memory, its steps, and where these find what is of this pass alone.
    """

    def __init__(self, role: Role, kinds: Sequence[Kind], first: int, offset: int) -> None:
        self.role, self.kinds, self.offset, self.first = role, tuple(kinds), offset, first
        parts = [parts_of(kind) for kind in kinds]
        client = role is Role.CLIENT
        self.drawn = Whole([each.client if client else each.server + each.shared for each in parts])
        self.dealt = Whole([each.shared if client else () for each in parts])
        digest = KindHash(first)
        for kind in kinds:
            digest.update(kind)
        self.digest = digest.digest()
        self.ahead: list[Any] = []  # of a client, before the query
        self.slots: list[Any] = []  # Slot, or of several sequences Stacked
        self.input: Tensor | None = None
        self.result: Tensor | None = None
        self.now = Now()
        super().__init__(self.drawn.out.nbytes + self.dealt.out.nbytes)

    def __repr__(self) -> str:
        return f"Tape({self.role.value}, {len(self.steps)} steps, values hidden)"

    # ---- doing it again

    def take(self, store: Store) -> None:
        """Spends the correlations of a pass: what this party draws is drawn, and what was dealt is read."""
        data = store.spend(self.drawn, size_of_dealt(self.kinds) if self.role is Role.CLIENT else 0, self.digest)
        if data is not None:
            self.dealt.unpack(data)

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over what nodes have kept."""
        for slot in self.slots:
            slot.load(state[slot.key[0]][slot.key[1]])

    def before(self, channel: Channel, offset: int) -> None:
        """The client's walk before the query."""
        self.now.channel, self.now.further = channel, offset - self.offset
        replay(self.ahead)

    def walk(self, channel: Channel, early: deque[memoryview], offset: int, ids: Tensor, first: int) -> Tensor | None:
        """The pass; `first` is the name of its first correlation. What the client learns."""
        now = self.now
        now.channel, now.early, now.further = channel, early, offset - self.offset
        if self.input is not None:
            self.input.copy_(ids)
        replay(self.steps)
        now.channel = now.on_label = None
        for slot in self.slots:
            slot.advance(first)
        return None if self.result is None else self.result.clone()

    def state(self) -> dict[str, dict[str, Any]]:
        """What nodes keep; it lies in this tape's memory."""
        found: dict[str, dict[str, Any]] = {}
        for slot in self.slots:
            found.setdefault(slot.key[0], {})[slot.key[1]] = slot.kept()
        return found

    # ---- in other memory

    def packed(self, recorder: Recorder) -> Self:
        """The same in memory of its own, without values; it was just written by this recorder."""
        kept = [self.drawn.out, self.dealt.out, *[each for slot in self.slots for each in (slot.masked, slot.mask)]]
        kept += [each for each in (self.input, self.result) if each is not None]
        return self._moved(recorder.moves([*self.ahead, *self.steps], [array(x) for x in kept]))

    def _moved(self, to: Moves) -> Self:
        found = super()._moved(to)
        found.now, found.ahead = to.object(self.now), to.steps(self.ahead)
        found.drawn, found.dealt = self.drawn.moved(to), self.dealt.moved(to)
        found.slots = [to.object(slot) for slot in self.slots]
        found.input, found.result = to.value(self.input), to.value(self.result)
        return found


def size_of_dealt(kinds: Sequence[Kind]) -> int:
    """Bytes that C is dealt for a pass."""
    return sum(size_of(parts_of(kind).shared) for kind in kinds)


class Writer:
    """The engine of a walk that is written to a tape while it is done: `Offline` and `Online` in one, and `Recording`.

    What the tape draws and was dealt is there before. `weights` are this party's; `tells`, `most`: see `Recorder`.
    """

    def __init__(self, tape: Tape, weights: Mapping[str, Tensor], *, tells: bool = True, most: int = sys.maxsize) -> None:
        self.tape, self.weights = tape, weights
        self.recorder = Recorder(list(weights.values()), tells=tells, most=most)
        for whole in (tape.drawn, tape.dealt):
            self.recorder.given(whole.out)
        self._own = [len(parts_of(kind).own(tape.role)) for kind in tape.kinds]
        self._completed: dict[int, tuple[Tensor, ...]] = {}
        self._varied: dict[Hashable, Tensor] = {}  # in this walk
        self._place = 0
        self._online = False

    @property
    def why(self) -> str:
        """Why the tape cannot be used; empty if it can."""
        return self.recorder.why

    @property
    def told(self) -> tuple[Told, ...]:
        """See `Recorder`; and what was asked for, which is the same only if kinds say which of their fields name others."""
        return ((self.tape.digest,), *self.recorder.told)

    def walk(self, party: Party, channel: Channel, early: deque[memoryview] | None, run: Callable[[], Tensor | None]) -> Tensor | None:
        """Runs a walk of this party, the client's before the query if `early` is None, and writes it down."""
        tape, told, self._online = self.tape, party.on_label, early is not None
        now, self._place, self._varied = tape.now, 0, {}
        now.channel, now.on_label, now.further, now.early = channel, told, 0, early if early is not None else deque()

        def label(at: tuple[str, str]) -> None:
            self.recorder.note(now.label, at)
            now.label(at)

        self.recorder.steps = tape.steps if self._online else tape.ahead
        party.engine, party.recording, party.on_label = self, self, label
        try:
            with self.recorder:
                found = run()
        finally:
            party.recording, party.on_label = None, told
            now.channel = now.on_label = None
        if self._online:
            tape.result = found
        tape.bytes = self.recorder.bytes
        return found

    # ---- the engine

    def take(self, kind: Kind) -> Correlation:
        """The next correlation, as far as it may be used in this walk."""
        place, tape = self._place, self.tape
        self._place += 1
        if kind != tape.kinds[place]:
            raise CorrelationError(f"a {type(kind).__name__} is taken that was not asked for", party=tape.role.value)
        name, client, early = tape.first + place, tape.role is Role.CLIENT, not self._online
        own = tape.drawn.values[place][: self._own[place]]
        shares = tape.dealt.values[place] if client else tape.drawn.values[place][self._own[place] :]
        if not early:
            return Correlation(kind, name, tape.role, own, self._completed.get(place, shares))
        if not kind.drawn_early:
            return Correlation(kind, name, tape.role)
        if kind.shared_early:
            shares = self._completed[place] = kind.complete(_Windowed(self, kind), own, shares)
            return Correlation(kind, name, tape.role, own, shares)
        return Correlation(kind, name, tape.role, own, blanks(parts_of(kind).shared))

    def perform(self, items: Sequence[Item]) -> Received:
        """One round, which is done and written down."""
        client, role = self.tape.role is Role.CLIENT, self.tape.role
        sent: list[tuple[Tensor, int]] = []
        late: list[tuple[Tensor, int]] = []
        ahead: list[tuple[Tensor, int]] = []
        received: list[Tensor] = [blank(*item.value.shape) for item in items]
        for place, item in enumerate(items):
            early = item.early and item.from_client
            if item.modulus:
                self.recorder.why = "elements modulo a prime"
            mine = (early and client) if not self._online else item.sent_by(role) and not (client and item.early)
            if mine:
                sent.append((item.value.contiguous(), item.bits))
            if self._online and (item.from_server if client else item.from_client):
                with self.recorder.outside():
                    received[place] = torch.empty(item.value.shape, dtype=torch.int64)
                self.recorder.given(received[place])
                (late if client or not item.early else ahead).append((received[place], item.bits))
        if sent or late or ahead:
            with self.recorder.outside():
                step = Round(*[[(array(x.view(-1)), bits) for x, bits in each] for each in (sent, late, ahead)])
                step.run(self.tape.now)
            self.recorder.note(step.run, self.tape.now)
        return received

    # ---- see `Recording`

    def varying(self, make: Callable[[int], Tensor], key: Hashable = None) -> Tensor:
        """See `Recording`."""
        if key is not None and key in self._varied:
            return self._varied[key]
        with self.recorder.outside():
            out = make(0).clone()
        self.recorder.given(out)
        self.recorder.note(self.tape.now.vary, out, make)
        if key is not None:
            self._varied[key] = out
        return out

    def windowed(self, weight: Tensor, window: tuple[int, ...]) -> Tensor:
        """See `Recording`: a copy, in which each window holds what lies further."""
        pairs = list(zip(window[::2], window[1::2], strict=True))
        with self.recorder.outside():
            out = weight.clone()
        self.recorder.given(out)
        for start, stop in pairs:
            self.recorder.note(self.tape.now.shift, array(out[:, start:stop]), array(weight), start, stop)
        return out

    def extended(self, key: tuple[str, str], before: Cached, wire: Wire, columns: int) -> tuple[Cached, Cached]:
        """See `Recording`."""
        with self.recorder.outside():
            slot = Slot(key, before, columns)
            slot.put(wire.masked, wire.mask)
        slot.added = wire.name - self.tape.first
        self.recorder.given(slot.masked)
        self.recorder.given(slot.mask)
        self.recorder.note(slot.put, wire.masked, wire.mask)
        self.tape.slots.append(slot)
        slot.count, slot.names = slot.count + 1, (*slot.names, wire.name)
        return slot.kept(), Cached(slot.masked, slot.mask, slot.names, slot.bits, slot.frac, columns)

    def put(self, key: tuple[str, str], before: Stack, wire: Wire, places: Sequence[int], into: Stack) -> Stack:
        """See `Recording`."""
        with self.recorder.outside():
            slot = Stacked(key, before, into, places, self.tape.now)
            slot.put(wire.masked, wire.mask)
        slot.added = into.name - self.tape.first
        self.recorder.given(slot.masked)
        self.recorder.given(slot.mask)
        self.recorder.note(slot.put, wire.masked, wire.mask)
        self.tape.slots.append(slot)
        return slot.kept()


class _Windowed(Mapping[str, Tensor]):
    """C's masked weights for a kind that is completed."""

    def __init__(self, writer: Writer, kind: Kind) -> None:
        self._writer, self._window = writer, getattr(kind, "window", ())

    def __getitem__(self, name: str) -> Tensor:
        weight = self._writer.weights[name]
        return self._writer.windowed(weight, self._window) if self._window else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._writer.weights)

    def __len__(self) -> int:
        return len(self._writer.weights)
