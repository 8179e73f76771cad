"""How the correlations of a pass are scheduled: what waits to be sent is bounded, and goes in an order that both parties share."""

from __future__ import annotations

from typing import Any

import pytest

from protocols.correlations import Role
from protocols.party import Party, Trace
from protocols.ring import blank
from protocols.rounds import Item, Protocol_
from protocols.sources.two_party import schedule
from protocols.sources.two_party.schedule import Ahead, Task, run


def test_what_one_party_sends_alone_leaves_before_much_of_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of one message of C's, one of a message that keeps its order, one with an answer: no message holds much more than the bound.

    It is a round more. What may not leave ahead comes with the answered one.
    """
    monkeypatch.setattr(schedule, "SENT", 1000)
    ended = list[int]()

    def alone() -> Protocol_[None]:
        yield Ahead([Item(blank(300), 8, from_server=False)])

    def in_order() -> Protocol_[None]:
        """A transfer's, say."""
        yield [Item(blank(400), 8, from_server=False)]

    def asked() -> Protocol_[None]:
        yield [Item(blank(500), 8)]

    tasks = [Task(k, 0, frozenset(), {20: asked, 10: in_order}.get(k, alone), lambda _, k=k: ended.append(k)) for k in range(40)]  # type: ignore[misc]
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
    assert sorted(ended) == list(range(40)) and sum(messages) == 38 * 300 + 400 + 500
    assert len(messages) > 5 and max(messages) <= 1300 + 400 + 500 and 400 not in messages
    assert trace.cost.rounds == 2
    assert ended.index(10) > ended.index(30)
