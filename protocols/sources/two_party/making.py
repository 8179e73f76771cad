"""The registry of makers: how S and C make a correlation of a kind, as a generator of rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from protocols.correlations import Kind, Role, Tensors
from protocols.rounds import Protocol_
from protocols.sources.two_party.pair import Pair, Secret


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Made:
    """What a maker makes at one party: its shares, its share of the mask that is left under the correlation's name.

    And its own values, where the maker chose them itself instead of taking those that were drawn.
    """

    shares: tuple[Tensor, ...] = ()
    left: Secret | None = None
    own: tuple[Tensor, ...] | None = None

    def __repr__(self) -> str:
        return f"Made({len(self.shares)} shares, values hidden)"


Maker = Callable[[Pair, Any, Tensors], Protocol_[Made]]
F = TypeVar("F", bound=Maker)
_makers: dict[type[Kind], tuple[Maker, bool]] = {}


def makes(kind: type[Kind], *, at_once: bool = False) -> Callable[[F], F]:
    """Registers `maker(pair, kind, own)` for a kind, and for its subclasses that have none of their own.

    `at_once`: all of a pass are made side by side, whatever else waits for room: they are the cheaper the more share a ciphertext.

    Both parties run it with their own end, the same kind and their own values, `kind.own_parts(pair.role)` drawn by `pair.draw`;
    on shapes everything is blank, and the items that it yields are of the same shapes and bits.
    """

    def register(maker: F) -> F:
        assert kind not in _makers, f"{kind.__name__} has a maker"
        _makers[kind] = maker, at_once
        return maker

    return register


def maker_of(kind: Kind) -> tuple[Maker, bool]:
    """And whether all are made at once; LookupError if nobody has registered one."""
    for base in type(kind).__mro__:
        found = _makers.get(base)
        if found is not None:
            return found
    raise LookupError(f"no maker of {type(kind).__name__}")


def make(pair: Pair, kind: Kind) -> Protocol_[Made]:
    """Makes one correlation, with this party's own values drawn afresh, or its own choice."""
    own = tuple(pair.draw(part) for part in kind.own_parts(pair.role))
    made = yield from maker_of(kind)[0](pair, kind, own)
    return Made(made.shares, made.left, own) if made.own is None else made


def other(role: Role) -> Role:
    """The peer's."""
    return Role.CLIENT if role is Role.SERVER else Role.SERVER
