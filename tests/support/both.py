"""Runs a generator of rounds at both parties, in threads, over a pair of connections; and on shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.threads import at_both
from privinf.transport.memory import memory_pair
from protocols.correlations import Correlation, Kind, Role
from protocols.party import Cost, Online, Party, Protocol_, Trace
from protocols.sources.base import PartySource
from tests.support.waiting import PATIENCE


class Nothing(PartySource):
    """A source for protocols that ask for no correlation."""

    def make(self, kind: Kind, name: int) -> Correlation:
        raise AssertionError("no correlation is asked for here")


@dataclass
class Both:
    """What each computed, and what the client counted."""

    server: Any
    client: Any
    bytes: int
    rounds: int


def run_both(program: Callable[[Role], Protocol_[Any]], pair: tuple[Any, Any] | None = None) -> Both:
    """`program(role)` at each; the first of the pair is the server's; it was used for nothing before."""
    ends = dict(zip((Role.SERVER, Role.CLIENT), pair or memory_pair(timeout=PATIENCE), strict=True))
    for end in ends.values():
        end.meter.phase = "online"
    results = at_both(lambda role: Party(role, Online(role, ends[role], Nothing(role))).run(program(role)), ends)
    counted = ends[Role.CLIENT].meter.snapshot()["online"]
    return Both(results[Role.SERVER], results[Role.CLIENT], counted["payload"], counted["rounds"])


def predicted(role: Role, program: Protocol_[Any]) -> Cost:
    """What it costs, by shapes; at the client the rounds are those that it counts."""
    trace = Trace(role)
    Party(role, trace).run(program)
    return trace.cost
