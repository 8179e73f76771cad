"""A dealer as the source: it knows a seed of each party, makes what both hold from these, and sends the client its shares.

Each party expands its own values from its own seed. Of a shared value the server's share comes from the server's seed as well, so
that only the client is sent anything: `value - share of S` (or XOR), packed. At the dealer, what a pass will take is known, and
bounded, before anything of it is made; it has no code for any kind, but evaluates the kind's relation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from protocols.correlations import (
    MAX_KINDS,
    Correlation,
    Kind,
    Role,
    blanks,
    pack_rests,
    parts_of,
    size_of,
)
from protocols.errors import CorrelationError
from protocols.kind_hash import KindHash, KnownHash
from protocols.prg import Prg
from protocols.sources.base import PartySource
from protocols.sources.expansion import MOST, Drawn, Streamed, Together, Whole, counts_of, draw_both, together
from protocols.sources.fitting import ENTRY, Asked, Sketch, further
from protocols.sources.taping import DealtTapes, Taping

MAX_ELEMENTS = 1 << 37  # that one pass makes, of all its parts and on the way to them, as they are declared
MAX_MACS = 1 << 41  # multiply-adds of one pass
MEMORY = 8 * 2**30
ELEMENT = 8  # bytes


class Store(PartySource):
    """One party's end of a dealer: what it draws itself, and the server's shares, come from a seed that the dealer knows.

    The client's shares are payloads that are put in ahead of their use; a payload is dropped when it is taken. What the client
    asks for, and the dealer's payload of it, are known as it walks: `begin_pass` says where the payload is read.
    """

    def __init__(self, role: Role, seed: bytes, device: torch.device | str = "cpu") -> None:
        super().__init__(role, device)
        self.asked: KindHash | KnownHash = KindHash()  # of the kinds of the walk before the query
        self._prg = Prg(seed)
        self._payloads: dict[int, memoryview] = {}
        self._ready: dict[int, Correlation] = {}  # expanded together with one that was taken
        self._fetch: Callable[[int], memoryview] | None = None

    def begin_pass(self, kinds: Sequence[Kind] = (), fetch: Callable[[int], memoryview] | None = None) -> None:
        """See `PartySource`; `fetch(size)` gives the client the dealer's next bytes, in the order of the kinds."""
        super().begin_pass(kinds)
        self.asked, self._fetch = KindHash(self.next_name), fetch

    def spend(self, drawn: Whole, dealt: int, digest: bytes) -> memoryview | None:
        """Draws this party's part of a whole pass into this memory, and spends all of its correlations at once.

        The client's dealt bytes of them, if there are any, which it has to read; `digest` is of the kinds that it asks for.
        """
        first = self.next_name
        self.next_name += len(drawn.values)
        self._next_ahead = self.next_name
        for name in range(first, self.next_name):
            if name in self._held or name in self._payloads:
                raise CorrelationError(f"correlation {name} was seen before its pass was spent whole", party=self.role.value)
            self._expected.pop(name, None)
        drawn.draw(self._prg, first)
        self.asked = KnownHash(digest)
        if not dealt:
            return None
        assert self._fetch is not None, "a pass has not begun"
        return self._fetch(dealt)

    def put(self, name: int, payload: memoryview) -> None:
        """Keeps what the dealer sent for a correlation that is still to be taken."""
        if name < self.next_name or name in self._payloads or name in self._held:
            raise CorrelationError(f"correlation {name} was dealt twice", party=self.role.value)
        self._payloads[name] = payload

    def make(self, kind: Kind, name: int) -> Correlation:
        """See `PartySource`."""
        if (ready := self._ready.pop(name, None)) is not None:
            return ready
        payload = None
        if self.role is Role.CLIENT and (parts := kind.shared_parts()):
            payload = self._payloads.get(name)
            if payload is None or len(payload) != size_of(parts):
                raise CorrelationError(f"correlation {name} ({type(kind).__name__}) is missing or already spent", party="client")
        return Streamed(kind, name, self.role, self._prg.stream(name), self.device, payload)

    def ahead(self, kind: Kind, weights: Mapping[str, Tensor]) -> Correlation:
        """The client takes in what was dealt, and completes its shares by what it holds of the weights."""
        if self.role is Role.SERVER:
            return super().ahead(kind, weights)
        name = self.next_ahead()
        assert isinstance(self.asked, KindHash)
        self.asked.update(kind)
        self.expect(name, kind)
        if parts := parts_of(kind).shared:
            assert self._fetch is not None, "a pass has not begun"
            self.put(name, self._fetch(size_of(parts)))
        if kind.shared_early:
            correlation = self.make(kind, name)
            correlation.shares = kind.complete(weights, correlation.own, correlation.shares)
            self.completed(kind, name, correlation.shares)
            return correlation
        if kind.drawn_early:  # what was dealt is read in the online walk; what the client draws itself may be needed for early messages
            return Streamed(kind, name, self.role, self._prg.stream(name), self.device, shares=blanks(parts))
        return Correlation(kind, name, self.role)

    def completed(self, kind: Kind, name: int, shares: tuple[Tensor, ...]) -> None:
        """What was computed from the client's shares ahead of the query takes their place."""
        self._payloads.pop(name)
        self.hold(Streamed(kind, name, self.role, self._prg.stream(name), self.device, shares=shares))

    def take(self, kind: Kind) -> Correlation:
        """See `PartySource`."""
        name = self.next_name
        if name not in self._ready and name not in self._held and together(self.device):
            self._expand_from(name)
        try:
            return super().take(kind)
        finally:
            if self._payloads:
                self._payloads.pop(name, None)
            self._ready.pop(name, None)

    def end_pass(self) -> None:
        """See `PartySource`."""
        self._ready.clear()

    def _expand_from(self, name: int) -> None:
        """This correlation and those after it, as far as they are small, known, and few enough: all of them at once."""
        client, drawn, dealt, total = self.role is Role.CLIENT, Together(), Together(), 0
        chosen: list[tuple[int, Kind, int]] = []
        payloads: list[memoryview] = []
        while total < MOST and (kind := self._expected.get(name)) is not None:
            parts = parts_of(kind)
            own, shared = parts.own(self.role), parts.shared
            counts, payload = counts_of(own + shared) if name not in self._held else None, self._payloads.get(name)
            there = not client or not shared or (payload is not None and len(payload) == size_of(shared))
            if counts is not None and there:
                total += sum(counts) + 1
                chosen.append((name, kind, len(own)))
                drawn.add(own if client else own + shared, counts[: len(own)] if client else counts)
                if client:
                    dealt.add(shared, counts[len(own) :])
                    payloads += [payload] if payload is not None and shared else []
            elif not chosen:
                return  # this one is not
            name += 1
        if not chosen:  # nothing is known of what comes
            return
        mine = drawn.draw(self._prg, [name for name, *_ in chosen])
        theirs = dealt.unpack(payloads) if client else []
        for place, (name, kind, length) in enumerate(chosen):
            own_values, shares = (mine[place], theirs[place]) if client else (mine[place][:length], mine[place][length:])
            if kind.outlives:
                own_values = tuple([x.clone() for x in own_values])  # what outlives the pass holds no memory of others
            self._ready[name] = Correlation(kind, name, self.role, own_values, shares)


class Dealer:
    """Deals for one session. It knows both parties' seeds and the weight masks, and sees no weight and no query.

    `memory`: the bytes that the session may hold at a time, its weight masks included. Its attributes are what the session begins with, and
    what passes leave to later ones.
    """

    def __init__(
        self,
        server_seed: bytes,
        client_seed: bytes,
        weight_masks: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        memory: int = MEMORY,
        tapes: DealtTapes | None = None,
    ) -> None:
        self._server, self._client = Prg(server_seed), Prg(client_seed)
        self._weight_masks = weight_masks
        self._device = device
        self._memory = memory
        self._most = memory // ELEMENT - sum(mask.numel() for mask in weight_masks.values())
        self._masks: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self._leave: dict[int, Kind] = {}  # by whom each was left
        self._replaced: dict[int, int] = {}  # kept masks that no pass after this kind's names
        self.next_name = 1
        self._last: Asked | None = None
        self._taping = Taping(tapes) if tapes is not None and str(device) == "cpu" else None

    def __repr__(self) -> str:
        return f"Dealer(next_name={self.next_name}, seeds hidden)"

    def mask(self, name: int) -> Tensor:
        """See `Known`."""
        found = self._masks.get(name, self._kept.get(name))
        if found is None:
            raise CorrelationError(f"a correlation refers to the mask {name}, which does not exist", party="dealer")
        return found

    def server_mask(self, name: int) -> Tensor:
        """See `Known`: it is drawn once more, from the same stream, since few are asked for and each would be as large as its mask."""
        self.mask(name)
        kind, stream = self._leave[name], self._server.stream(name)
        own = [part.draw(stream, self._device) for part in kind.server_parts()]
        return kind.share_left(own, [part.draw(stream, self._device) for part in kind.shared_parts()])

    def leaves_share(self, name: int) -> bool:
        """Whether `server_mask` exists."""
        return name in self._leave and self._leave[name].leaves_share()

    def weight_mask(self, name: str) -> Tensor:
        """See `Known`."""
        if name not in self._weight_masks:
            raise CorrelationError(f"a correlation refers to the weight {name[:80]!r}, which does not exist", party="dealer")
        return self._weight_masks[name]

    @property
    def held(self) -> int:
        """Elements of all masks that later kinds may name."""
        return sum(ENTRY + mask.numel() for mask in (*self._masks.values(), *self._kept.values()))

    def afford(self, held: int, elements: int, macs: int) -> None:
        """CorrelationError if a pass holds so many elements at a time, or makes so many, or takes so many multiply-adds, and may not."""
        remedy = "take in the prompt in pieces (--chunk)"
        if held > self._most:
            what = f"a pass asks for more than the {self._memory} bytes that a session may hold at the dealer"
            raise CorrelationError(what, party="dealer", remedy=f"{remedy}, or start the dealer with a larger --memory")
        if elements > MAX_ELEMENTS or macs > MAX_MACS:
            raise CorrelationError("one pass asks for more correlations than a dealer makes", party="dealer", remedy=remedy)

    def deal_pass(self, kinds: Sequence[Kind], digest: bytes = b"") -> Iterator[bytes]:
        """The client's payloads of a pass, dealt as they are read; checked now. The pass ends with the last. `digest`: see `KindHash`."""
        if len(kinds) > MAX_KINDS:
            raise CorrelationError(f"one pass asks for more than {MAX_KINDS} correlations", party="dealer")
        self._drop_replaced()
        sketch = Sketch(self)
        gone = sketch.of(kinds, self.next_name)
        taped = bool(digest) and self._taping is not None and self._taping.fits(kinds)
        self._last = Asked(kinds, self.next_name, digest, sketch if taped else None)
        if taped and self._taping is not None and self._taping.ready(kinds, digest):
            return self._taped(self._taping, kinds, digest)
        if self._taping is not None:
            self._taping.interrupted()
        return self._dealt(kinds, gone)

    def deal_further(self) -> tuple[int, Iterator[bytes]]:
        """`deal_pass` of what is one position further than the last pass, with its digest; how many correlations these are, and payloads.

        CorrelationError unless that pass was dealt to its end, and its kinds tell what follows.
        """
        last, self._last = self._last, None
        kinds = further(last, self.next_name)
        assert last is not None, "or nothing tells"
        if last.sketch is None or self._taping is None or not (self._taping.writes and self._taping.ready(kinds, last.digest)):
            return len(kinds), self.deal_pass(kinds, last.digest)
        self._drop_replaced()
        last.sketch.further(kinds, self.next_name)
        self._last = last._replace(kinds=kinds, first=self.next_name)
        return len(kinds), self._taped(self._taping, kinds, last.digest)

    def _taped(self, taping: Taping, kinds: Sequence[Kind], digest: bytes) -> Iterator[bytes]:
        """The same by a tape, see `protocols.sources.dealing`."""
        first, self.next_name = self.next_name, self.next_name + len(kinds)
        left, pieces = taping.deal(self, (self._server, self._client), kinds, digest, first)
        self._kept |= left
        self._leave |= {name: kinds[name - first] for name in left}
        self._replaced |= {old: first + place for place, kind in enumerate(kinds) for old in kind.replaces()}
        yield from pieces

    def detach(self, mask: Tensor) -> None:
        """See `protocols.sources.dealing.Masks`."""
        self._kept |= {name: kept.clone() for name, kept in self._kept.items() if kept is mask}

    def end(self) -> None:
        """The session is over."""
        if self._taping:
            self._taping.end()

    def _drop_replaced(self) -> None:
        """Another pass begins, so that those before it stand: what they have replaced will not be asked for."""
        for name in self._replaced:
            self._kept.pop(name, None)
            self._leave.pop(name, None)
        self._replaced.clear()

    def _dealt(self, kinds: Sequence[Kind], gone: list[list[int]]) -> Iterator[bytes]:
        drawn: deque[Drawn] = deque()
        for place, (kind, names) in enumerate(zip(kinds, gone, strict=True)):
            if not drawn:
                drawn.extend(draw_both(self._server, self._client, self.next_name, kinds[place:], self._device))
            yield self._deal(kind, drawn.popleft() if drawn else None)
            for name in names:
                del self._masks[name], self._leave[name]
        self.end_pass()

    def deal(self, kind: Kind) -> bytes:
        """The client's payload of the next correlation of a pass that goes on."""
        Sketch(self).of([kind], self.next_name)
        return self._deal(kind)

    def _draw(self, kind: Kind, name: int) -> Drawn:
        parts, server, client = parts_of(kind), self._server.stream(name), self._client.stream(name)
        ours = tuple([part.draw(server, self._device) for part in parts.server])
        theirs = tuple([part.draw(client, self._device) for part in parts.client])
        return ours, theirs, tuple([part.draw(server, self._device) for part in parts.shared])

    def _deal(self, kind: Kind, drawn: Drawn | None = None) -> bytes:
        name, self.next_name = self.next_name, self.next_name + 1
        server, client, shares = self._draw(kind, name) if drawn is None else drawn
        parts = parts_of(kind).shared
        values, left = kind.relation(self, server, client, shares)
        assert [value.shape for value in values] == [part.shape for part in parts], f"{type(kind).__name__}: its fit says otherwise"
        if left is not None:
            (self._kept if kind.outlives else self._masks)[name] = left
            self._leave[name] = kind
        for old in kind.replaces():
            self._replaced[old] = name
        return pack_rests(values, shares, parts)

    def end_pass(self) -> None:
        """Forgets all masks that no later pass refers to."""
        self._masks.clear()
        self._leave = {name: kind for name, kind in self._leave.items() if name in self._kept}

    def rewind(self, name: int) -> None:
        """Takes back what was dealt from this name on, in a pass that has ended and of which nothing was sent to anyone."""
        self.next_name, self._last = name, None
        self._replaced = {old: by for old, by in self._replaced.items() if by < name}
        self._kept = {kept: mask for kept, mask in self._kept.items() if kept < name}
        self._leave = {kept: kind for kept, kind in self._leave.items() if kept < name}

    def forget(self) -> None:
        """Forgets the cached wires' masks too (the context was reset)."""
        self._masks.clear()
        self._kept.clear()
        self._leave.clear()
        self._replaced.clear()
