"""How the correlations of a pass are scheduled: what waits to be sent is bounded, and goes in an order that both parties share."""

from __future__ import annotations

from typing import Any

import pytest

from protocols.correlations import Role
from protocols.party import Party, Trace
from protocols.ring import blank
from protocols.rounds import Item, Protocol_
from protocols.sources.two_party import schedule
from protocols.sources.two_party.schedule import Task, run


def test_what_one_party_sends_alone_leaves_before_much_of_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tasks of one message of C's and one with an answer: no message holds more than the bound and one task's; one round more."""
    monkeypatch.setattr(schedule, "SENT", 1000)
    ended = list[int]()

    def alone() -> Protocol_[None]:
        yield [Item(blank(300), 8, from_server=False)]

    def asked() -> Protocol_[None]:
        yield [Item(blank(500), 8)]

    tasks = [Task(k, 0, frozenset(), asked if k == 20 else alone, lambda _, k=k: ended.append(k)) for k in range(40)]  # type: ignore[misc]
    ends: Any = None
    messages = list[int]()

    def noted() -> Protocol_[None]:
        protocol, received = run(ends, tasks), None
        while True:
            try:
                items = next(protocol) if received is None else protocol.send(received)
            except StopIteration:
                return
            messages.append(sum(item.value.numel() for item in items))
            received = yield items

    trace = Trace(Role.CLIENT)
    Party(Role.CLIENT, trace).run(noted())
    assert sorted(ended) == list(range(40)) and sum(messages) == 39 * 300 + 500
    assert len(messages) > 5 and max(messages) <= 1300 + 500
    assert trace.cost.rounds == 2
