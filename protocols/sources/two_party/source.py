"""The source at one party: makes what a pass will take together with the peer, before the query."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from protocols.correlations import Correlation, Kind, Role, Tensors
from protocols.errors import CorrelationError
from protocols.party import Party, Trace
from protocols.rounds import Protocol_
from protocols.sources.base import PartySource
from protocols.sources.two_party import makers as makers  # registers them
from protocols.sources.two_party.ledger import Ledger
from protocols.sources.two_party.making import Made, make, maker_of
from protocols.sources.two_party.pair import LatticeEnd, Pair, TransfersEnd
from protocols.sources.two_party.schedule import WINDOW, Batched, BatchedLattice, Ends, Task, run

AT_ONCE = 1 << 27
"""Elements of the correlations that are made at once, operands and results; 144 heads over 128 tokens take four fifths."""


ELEMENT = 12
"""Bytes of an element, and what computing with it takes, about."""


class Preprocessing(NamedTuple):
    """What it takes to make the correlations of a pass: payload bytes in both directions, and rounds as the client sees them."""

    bytes: int
    rounds: int


class _Shapes:
    """See `protocols.correlations.Shapes`: of the masks that are there and that a pass will leave, noting which ones a kind names."""

    def __init__(self, left: Mapping[int, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]] | None) -> None:
        self.left, self.named = dict(left), set[int]()
        self._weights = weights

    def mask(self, name: int) -> tuple[int, ...]:
        self.named.add(name)
        if name not in self.left:
            raise CorrelationError(f"a correlation refers to the mask {name}, which does not exist")
        return self.left[name]

    def server_mask(self, name: int) -> tuple[int, ...]:
        return self.mask(name)  # of which each has a share

    def weight_mask(self, name: str) -> tuple[int, ...]:
        raise LookupError(name)


class TwoPartySource(PartySource):
    """One party's end of a source that has no third party; see the module's text and `PartySource`.

    `transfers` and `lattice` are this party's ends, which the owner has started. `weights`: at S the encoded tensors, at C what it
    keeps of those that `lattice.linear` takes. `traced`: on shapes alone, with traced ends, for `predict`.
    A pass whose making failed half way cannot be taken up, nor another begun: transfers were spent that the peer may not have seen.
    """

    def __init__(
        self,
        role: Role,
        transfers: TransfersEnd,
        lattice: LatticeEnd,
        weights: Mapping[str, Any],
        *,
        traced: bool = False,
        device: torch.device | str = "cpu",
        window: int = WINDOW,
    ) -> None:
        super().__init__(role, device)
        self._behind, self._window = Ends(transfers, lattice), window
        self.pair = Pair(role, Batched(), BatchedLattice(lattice), weights, traced=traced, device=device)
        self._asked: list[tuple[int, Kind]] = []
        self._supplied = set[int]()  # names of those that were made before
        self._ends: deque[int] = deque()  # of the passes under way, the name after each
        self._broken = False
        self._replaced: set[int] = set()  # masks that no pass after the last names
        self.ledger: Ledger | None = None
        """On shapes, whose is what of the passes that are predicted, if somebody wants to know."""

    @property
    def pass_name(self) -> int:
        """The name of the first correlation of the next pass that begins."""
        return self._ends[-1] if self._ends else self.next_name

    def make(self, kind: Kind, name: int) -> Correlation:
        """See `PartySource`: everything is made before the query, and handed out once."""
        what = f"correlation {name} ({type(kind).__name__}) was never made, or is spent"
        raise CorrelationError(what, party=self.role.value)

    def begin_pass(self, kinds: Sequence[Kind] = ()) -> None:
        """See `PartySource`. A pass may be made while the one before is taken; CorrelationError for a third, or after a failure."""
        if self._broken or self._asked or len(self._ends) > 1:
            what = "a pass was not made to its end: nothing of it can be used, and transfers may be spent that the peer did not see"
            raise CorrelationError(what, party=self.role.value)
        first = self.pass_name
        for name, kind in enumerate(kinds, first):
            self.expect(name, kind)
        self._asked = list(enumerate(kinds, first))
        self._ends.append(first + len(kinds))

    @property
    def asked(self) -> list[Kind]:
        """What the pass that was begun and is not made yet will take."""
        return [kind for _, kind in self._asked]

    def supply(self, made: Mapping[int, tuple[Tensors, Tensors]]) -> None:
        """Some of what the pass will take was made before: by place in `asked` this party's own values and its shares.

        Both parties supply the same places, of kinds that name no masks and leave none. On shapes the places alone count.
        """
        for place, (own, shares) in made.items():
            name, kind = self._asked[place]
            self._supplied.add(name)
            if not self.pair.traced:
                moved = tuple(x.to(self.device) for x in own), tuple(x.to(self.device) for x in shares)
                self.hold(Correlation(kind, name, self.role, *moved))

    def preprocess(self) -> Protocol_[None]:
        """See `PartySource`: every correlation that the pass will take, side by side, in bounded memory."""
        asked, self._broken = self._asked, True  # until it has come to its end
        tasks = self._tasks([(name, kind) for name, kind in asked if name not in self._supplied])
        yield from run(self._behind, tasks, self._window, None if self.ledger is None else self.ledger.batch)
        self._asked, self._broken = [], False
        self._supplied.clear()

    def take(self, kind: Kind) -> Correlation:
        """See `PartySource`."""
        if self._broken and len(self._ends) < 2:
            raise CorrelationError("a pass was not made to its end", party=self.role.value)
        return super().take(kind)

    def hand_over(self) -> list[Correlation]:
        """What is made and not taken, in order, for its owner to keep elsewhere; it is gone from here as if it had been taken."""
        found = [self._held[name] for name in sorted(self._held)]
        self._held.clear()
        self._expected.clear()
        self.next_name = self._next_ahead = self.pass_name
        self._ends.clear()
        return found

    def room(self, kinds: Sequence[Kind]) -> int:
        """Bytes, about, that a party holds while it makes the next pass, of these kinds, and until that is taken."""
        shapes = _Shapes({name: secret.shape for name, secret in self.pair.masks.items()}, None)
        at_once = beside = largest = made = 0
        for name, kind in enumerate(kinds, self.pass_name):
            weight, held = self._weigh(kind, name, shapes)
            made += weight // 2
            if maker_of(kind)[1]:
                at_once += weight + held
            else:
                beside, largest = beside + weight, max(largest, weight)
        return ELEMENT * (min(at_once, AT_ONCE) + min(beside, self._window + largest) + made)

    @property
    def resting(self) -> int:
        """Bytes that stay between passes: masks of cached wires."""
        return sum(secret.value.nbytes for secret in self.pair.masks.values())

    def _tasks(self, asked: Sequence[tuple[int, Kind]]) -> list[Task]:
        """A task for each correlation; a mask is forgotten with the last that names it, unless it is kept.

        In the order of use, but those first that are made at once, as far as `AT_ONCE` goes; they take no room in the window.
        """
        for name in self._replaced:
            self.pair.kept.discard(name)
            self.pair.masks.pop(name, None)
        replaced = self._replaced = set()
        shapes = _Shapes({name: secret.shape for name, secret in self.pair.masks.items()}, None)
        users: dict[int, int] = {}
        first, tasks, names, left = list[Task](), list[Task](), {name for name, _ in asked}, AT_ONCE
        for name, kind in asked:
            shapes.named = set()
            weight, held = self._weigh(kind, name, shapes)
            for used in shapes.named:
                users[used] = users.get(used, 0) + 1
            if kind.outlives:
                self.pair.kept.add(name)
            replaced.update(kind.replaces())
            at_once = maker_of(kind)[1] and shapes.named.isdisjoint(names) and weight + held <= left
            if at_once:
                names.discard(name)  # what is left in it waits for room
                left -= weight + held
            task = self._task(name, kind, 0 if at_once else weight, frozenset(shapes.named), users)
            (first if at_once else tasks).append(task)
        return [*first, *tasks]

    def _weigh(self, kind: Kind, name: int, shapes: _Shapes) -> tuple[int, int]:
        """Elements of a kind, and that its relation holds beside them; notes the shape of what it leaves. CorrelationError for a misfit."""
        own = max(sum(part.count for part in kind.own_parts(role)) for role in Role)  # both must weigh alike, or their rounds differ
        parts = own + sum(part.count for part in kind.shared_parts())
        try:
            fit = kind.fit(shapes)
        except LookupError:  # it names a weight
            return 2 * parts, 0
        except ValueError as error:
            what = f"correlation {name} ({type(kind).__name__}): {error}"
            raise CorrelationError(what, party=self.role.value) from None
        if fit.left is not None:
            shapes.left[name] = fit.left
        return 2 * parts + (math.prod(fit.left) if fit.left is not None else 0), fit.held

    def _task(self, name: int, kind: Kind, weight: int, needs: frozenset[int], users: dict[int, int]) -> Task:
        def finish(made: Made) -> None:
            assert made.own is not None
            if made.left is not None and (users.get(name) or name in self.pair.kept):
                self.pair.masks[name] = made.left
            for used in needs:
                users[used] -= 1
                if not users[used] and used not in self.pair.kept:
                    del self.pair.masks[used]
            if not self.pair.traced:
                self.hold(Correlation(kind, name, self.role, made.own, made.shares))

        def start() -> Protocol_[Made]:
            made = make(self.pair, kind)
            return made if self.ledger is None else self.ledger.task(type(kind).__name__, made)

        return Task(name, weight, needs, start, finish)

    def end_pass(self) -> None:
        """See `PartySource`: CorrelationError unless all of it was taken."""
        if not self._ends or self.next_name != self._ends.popleft():
            raise CorrelationError("a pass ended before all of it was taken", party=self.role.value)

    def drop(self) -> None:
        """The pass that was made last will not be taken: all of it goes. After every pass before; no later one has its names."""
        end = self._ends.pop()
        assert not self._ends and not self._broken
        for name in range(self.next_name, end):
            for group in (self._held, self._expected, self.pair.masks):
                group.pop(name, None)
        self.pair.kept -= set(range(self.next_name, end))
        self._replaced.clear()  # its own: what it would have replaced stays
        self.next_name = self._next_ahead = end

    def forget(self) -> None:
        """The context was reset: the masks of cached wires go too."""
        self.pair.masks.clear()
        self.pair.kept.clear()
        self._replaced.clear()
        self._behind.lattice.forget()

    def predict(self, kinds: Sequence[Kind], trace: Trace | None = None, supplied: Iterable[int] = ()) -> Preprocessing:
        """On shapes alone: exactly what making this pass takes, after those that were predicted before. It counts as taken.

        With a trace of what was before, which goes on, rounds are those that this pass adds to that chain of messages. `supplied`: places
        of what was made before.
        """
        assert self.pair.traced, "a source of values predicts nothing"
        trace = trace or Trace(self.role)
        before = trace.cost.online_bytes, trace.cost.rounds
        self.begin_pass(kinds)
        self.supply(dict.fromkeys(supplied, ((), ())))
        Party(self.role, trace).run(self.preprocess())
        self.hand_over()
        return Preprocessing(trace.cost.online_bytes - before[0], trace.cost.rounds - before[1])
