"""What a pass takes of a dealer, from shapes alone: each kind is held against the masks that it names, bounded before one is made."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from protocols.correlations import Fit, Kind, parts_of
from protocols.errors import CorrelationError
from protocols.kind_hash import hangs_on_position, moved_on

OWN, SHARED = 3, 7  # times a part: drawn, in its ring, and where it is shared subtracted, packed and joined
ENTRY = 64  # elements that a mask counts beyond its own


class Holder(Protocol):
    """A dealer, as far as passes are held against it; see `protocols.sources.dealer`."""

    @property
    def held(self) -> int:
        """Elements of all masks that later kinds may name."""

    def mask(self, name: int) -> Tensor:
        """See `Known`; CorrelationError where it does not exist."""

    def leaves_share(self, name: int) -> bool:
        """Whether that mask is left in shares that a sum joins."""

    def weight_mask(self, name: str) -> Tensor:
        """See `Known`; CorrelationError where it does not exist."""

    def afford(self, held: int, elements: int, macs: int) -> None:
        """CorrelationError if a pass holds so many elements at a time, or makes so many, or takes so many multiply-adds, and may not."""


def _parts_held(kind: Kind) -> int:
    """Elements that the parts of a kind take at a time while it is dealt, at most."""
    parts = parts_of(kind)
    own = sum([part.count for part in parts.server + parts.client])
    return OWN * own + SHARED * sum([part.count for part in parts.shared])


class Sketch:
    """A pass on shapes: see `Shapes`."""

    def __init__(self, dealer: Holder) -> None:
        self._held_by = weakref.ref(dealer)  # which keeps what it was asked for last
        self._left: dict[int, tuple[int, ...]] = {}
        self._earlier: dict[int, tuple[int, ...]] = {}  # of masks of passes before
        self._shared: set[int] = set()  # those that are left in shares that a sum joins
        self._last: dict[int, int] = {}  # the place of the last kind that names a mask of this pass
        self._place = 0
        self._before = dealer.held  # elements of the masks that are there already
        self._takes = (0, 0, 0)  # elements beyond those before at a time, of all, and multiply-adds

    @property
    def _dealer(self) -> Holder:
        dealer = self._held_by()
        assert dealer is not None, "nothing is held against a dealer that is gone"
        return dealer

    def mask(self, name: int) -> tuple[int, ...]:
        """See `Shapes`."""
        found = self._left.get(name)
        if found is None:
            found = self._earlier.get(name)
            if found is None:
                found = self._earlier[name] = tuple(self._dealer.mask(name).shape)
            return found
        self._last[name] = self._place
        return found

    def server_mask(self, name: int) -> tuple[int, ...]:
        """See `Shapes`."""
        shape = self.mask(name)
        if name not in self._shared and not self._dealer.leaves_share(name):
            raise LookupError("a mask that is not shared by addition")
        return shape

    def weight_mask(self, name: str) -> tuple[int, ...]:
        """See `Shapes`."""
        return tuple(self._dealer.weight_mask(name).shape)

    def of(self, kinds: Sequence[Kind], first: int) -> list[list[int]]:
        """After each kind, the masks that no later one names; CorrelationError for what does not fit or is too much."""
        needs, elements, macs = [], 0, 0
        for self._place, kind in enumerate(kinds):
            fit = self._fit(kind)
            needs.append(fit.held + _parts_held(kind))
            elements, macs = elements + needs[-1], macs + fit.macs
            if fit.left is not None:
                self._left[first + self._place] = fit.left
                self._last[first + self._place] = self._place
                if kind.leaves_share():
                    self._shared.add(first + self._place)
            self._dealer.afford(self._before + needs[-1], elements, macs)
        gone: list[list[int]] = [[] for _ in kinds]
        for name, place in self._last.items():
            if not kinds[name - first].outlives:
                gone[place].append(name)
        now, most = self._before, 0
        for place, need in enumerate(needs):
            left = self._left.get(first + place)
            own = 0 if left is None else ENTRY + math.prod(left)
            most = max(most, now + max(need, own) - self._before)
            self._dealer.afford(now + max(need, own), elements, macs)
            now += own
            for name in gone[place]:
                now -= ENTRY + math.prod(self._left[name])
        self._takes = most, elements, macs
        return gone

    def further(self, kinds: Sequence[Kind], first: int) -> None:
        """The same of the pass after that one, whose kinds are `moved_on` from its: what hangs on the position is held against it anew.

        All else names masks of this very pass, which have the shapes that they had.
        """
        past = enumerate(kinds, first - len(kinds))
        self._earlier |= {name: self._left[name] for name, kind in past if kind.outlives and name in self._left}
        self._last.clear()
        self._left = {name + len(kinds): shape for name, shape in self._left.items()}
        self._shared = {name + len(kinds) for name in self._shared}
        self._before = self._dealer.held
        for place, kind in enumerate(kinds):
            if hangs_on_position(kind, first) and self._fit(kind).left != self._left.get(first + place):
                raise CorrelationError(f"a {type(kind).__name__} leaves another mask, a position further", party="dealer")
        most, elements, macs = self._takes
        self._dealer.afford(self._before + most, elements, macs)

    def _fit(self, kind: Kind) -> Fit:
        name = type(kind).__name__
        try:
            fit = kind.fit(self)
        except (ValueError, LookupError) as error:
            raise CorrelationError(f"the fields of a {name} do not fit the masks that they name", party="dealer") from error
        if fit.values != tuple([part.shape for part in parts_of(kind).shared]):
            raise CorrelationError(f"the shape of a {name} does not fit the masks that it names", party="dealer")
        return fit


class Asked(NamedTuple):
    """A pass that was asked for: its kinds, the name of its first correlation, a digest, and where it has a tape what it took."""

    kinds: Sequence[Kind]
    first: int
    digest: bytes
    sketch: Sketch | None = None


def further(last: Asked | None, next_name: int) -> list[Kind]:
    """The kinds of what is one position further than the last pass, which was dealt to its end; CorrelationError where nothing tells."""
    kinds = None if last is None or last.first + len(last.kinds) != next_name else moved_on(last.kinds, last.first)
    if kinds is None:
        raise CorrelationError("a pass was asked for as one further than another, and nothing tells which", party="dealer")
    return kinds
