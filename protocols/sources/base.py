"""What a party needs of a source of correlations, whichever it is.

A source has an end at each computing party, and both ends are asked for the same kinds in the same order, since these follow
from public shapes. One pass at one end, in this order:

1. `begin_pass(kinds)`: the pass is about to begin. `kinds` are all that it will take; a source may be content to learn them as
   they are asked for, and is then told none.
2. `preprocess()`: a generator of rounds between the two parties, run at both of them through any engine, so that it is traced,
   counted and run like any protocol. What is computed before the query, and by whom, is the source's.
3. `ahead(kind, weights)`, for each kind in order, in the walk before the query: what of it may be used before.
4. `take(kind)`, for each kind in order, in the walk over the query: the correlation, which is gone from the source with it.
5. `end_pass()`.

What is held ahead of its use is held by name, counted from 1 in the order of use: made from a stream when it is read, or handed
in by `hold`, with both this party's own values and its shares. A source lives as long as a session or a prepared query. It
never gives a correlation twice; what must not come again after a restart, its owner marks as spent on a disk before it makes a
source of it.

What holds of a correlation is its kind's (`Kind.relation`), so that a source adds its own road to each kind and changes none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from protocols.correlations import Correlation, Kind, Role
from protocols.errors import CorrelationError
from protocols.rounds import Protocol_


class PartySource(ABC):
    """One party's end of a source, see the module's text. `device`: where the tensors of its correlations are."""

    def __init__(self, role: Role, device: torch.device | str = "cpu") -> None:
        self.role = role
        self.device = device
        self.next_name = 1  # of the next correlation that is taken
        self._next_ahead = 1  # and of the next that is seen before its use
        self._expected: dict[int, Kind] = {}
        self._held: dict[int, Correlation] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(role={self.role.value}, next_name={self.next_name}, values hidden)"

    @abstractmethod
    def make(self, kind: Kind, name: int) -> Correlation:
        """A correlation that was not handed in; CorrelationError if there is nothing to make it from."""

    def begin_pass(self, kinds: Sequence[Kind] = ()) -> None:
        """A pass is about to begin, which takes these, where they are known; no others can be taken then."""
        self._next_ahead = self.next_name
        for name, kind in enumerate(kinds, self.next_name):
            self.expect(name, kind)

    def preprocess(self) -> Protocol_[None]:
        """What both parties do before the query to have what `begin_pass` was told of; no round by default."""
        return
        yield

    def ahead(self, kind: Kind, weights: Mapping[str, Tensor]) -> Correlation:
        """The next of the walk before the query: what of it may be used before, and shapes of the rest. `weights` are this party's."""
        name = self.next_ahead()
        if self.role is Role.SERVER or not kind.drawn_early:
            return Correlation(kind, name, self.role)
        found = self.peek(kind, name)
        return found if kind.shared_early else Correlation(kind, name, self.role, found.own)

    def end_pass(self) -> None:  # noqa: B027  (a source may have nothing to do)
        """All of the pass was taken; what is left over of making it may go."""

    def next_ahead(self) -> int:
        """The name of the next correlation that is seen before its use."""
        self._next_ahead += 1
        return self._next_ahead - 1

    def expect(self, name: int, kind: Kind) -> None:
        """Notes which kind is under a name; no other can be taken."""
        if name < self.next_name or name in self._expected:
            raise CorrelationError(f"correlation {name} was asked for twice", party=self.role.value)
        self._expected[name] = kind

    def hold(self, correlation: Correlation) -> None:
        """Keeps a correlation that is still to be taken; its name has none yet."""
        name = correlation.name
        if name < self.next_name or name in self._held:
            raise CorrelationError(f"correlation {name} was dealt twice", party=self.role.value)
        self._held[name] = correlation

    def peek(self, kind: Kind, name: int) -> Correlation:
        """The correlation before its use, for what can be computed ahead."""
        held = self._held.get(name)
        return self.make(kind, name) if held is None else held

    def take(self, kind: Kind) -> Correlation:
        """The next correlation; it can never be taken again."""
        name = self.next_name
        self.next_name += 1
        held, expected = self._held.pop(name, None), self._expected.pop(name, kind)
        if expected != kind or (held is not None and held.kind != kind):
            raise CorrelationError(f"correlation {name} is a {type(kind).__name__} that was not dealt as such", party=self.role.value)
        return self.make(kind, name) if held is None else held
