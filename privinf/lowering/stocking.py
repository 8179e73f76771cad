"""A stock of rows of a model's linear maps: which maps it has, how it is made, and what that moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from privinf.graph.private import Runtime
from privinf.lowering.joint import tables_alone
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import next_token
from protocols.correlations import Kind, Role
from protocols.errors import ConfigError
from protocols.lattice.rows import Map, batches, maps_of, places_of, positions_of
from protocols.lattice.stock import make
from protocols.party import Party, Trace
from protocols.ring import blank
from protocols.rounds import Protocol_

MOST = 1 << 18
"""Positions of one stock."""


class Cost(NamedTuple):
    """Payload of both directions, and rounds as the client counts them."""

    bytes: int
    rounds: int


def _kinds(lowered: Lowered, count: int) -> list[Kind]:
    trace = Trace(Role.CLIENT, costs=False)
    party = Party(Role.CLIENT, trace)
    party.tables = tables_alone(Role.CLIENT, {}, traced=True)
    next_token(lowered.graph, Runtime.of(lowered.graph, party), blank(1, count), logits=False)
    return trace.kinds


def maps(lowered: Lowered, positions: int) -> tuple[Map, ...]:
    """What a stock for so many positions has rows of; both parties find the same. ConfigError where there is nothing to be had of one."""
    if not lowered.info.is_language_model or lowered.info.n_positions < 2:
        raise ConfigError("this model is no language model; there is no stock of rows for it")
    if not 1 <= positions <= MOST:
        raise ConfigError(f"a stock has rows for 1 to {MOST} positions, not {positions}")
    found = maps_of(_kinds(lowered, 1), _kinds(lowered, 2), positions)
    if not found:
        what = f"rows for {positions} positions take more bytes together than by themselves"
        raise ConfigError(what, remedy="make a larger stock, or none")
    return found


Put = Callable[[int, int, Tensor, Tensor], None]
"""Takes what is made: a map's number, the first position, the masks (a blank at S) and this party's shares."""


def stocked(
    role: Role, found: Sequence[Map], positions: int, weights: Mapping[str, Tensor], put: Put, *, traced: bool = False
) -> Protocol_[None]:
    """Makes rows for so many positions, map after map. `weights`: S's encoded tensors. See `protocols.lattice.stock`."""
    for batch in batches(positions):
        for number, each in enumerate(found):
            weight = None if role is Role.CLIENT or traced else weights[each.name]
            masks, shares = yield from make(role, each.rows(len(batch)), weight, traced=traced)
            put(number, batch.start, masks, shares)


def cost(found: Sequence[Map], positions: int) -> Cost:
    """What making it moves."""
    trace = Trace(Role.CLIENT)
    Party(Role.CLIENT, trace).run(stocked(Role.CLIENT, found, positions, {}, lambda *_: None, traced=True))
    return Cost(trace.cost.online_bytes, trace.cost.rounds)


class Supply:
    """A stock that is all there, for a prediction: which passes take their rows from it."""

    def __init__(self, lowered: Lowered, positions: int) -> None:
        self.positions, self.maps, self.used = positions, maps(lowered, positions), 0

    def take(self, kinds: Sequence[Kind]) -> list[int]:
        """The places of what a pass has from it: all of its rows, or where they are too few none."""
        count = positions_of(self.maps, kinds)
        if self.used + count > self.positions:
            return []
        self.used += count
        return [place for place, *_ in places_of(self.maps, kinds)] if count else []

    def record(self) -> dict[str, int]:
        """See `explain`."""
        size, rounds = cost(self.maps, self.positions)
        used_bytes = -(-size * self.used // self.positions)
        found = {"rows": self.positions, "maps": len(self.maps), "offline_bytes": size, "offline_rounds": rounds}
        return {**found, "used": self.used, "used_bytes": used_bytes}
