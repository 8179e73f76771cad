"""The stock of transfers where several take from it and it is filled ahead, all side by side."""

from __future__ import annotations

from typing import Any

from protocols.correlations import Role
from protocols.ot.pool import Pool
from protocols.rounds import Protocol_, parallel
from protocols.security import IKNP_ROWS, LPN


def made_by(pool: Pool, protocol: Protocol_[Any]) -> int:
    """Runs it on shapes; how many transfers its messages make."""
    made = 0
    try:
        items = next(protocol)
        while True:
            for item in items:
                rows, *_, last = item.value.shape
                made += 64 * last if rows == IKNP_ROWS else rows * LPN.net
            items = protocol.send([item.value for item in items])
    except StopIteration:
        return made


def test_none_is_lost_or_taken_twice() -> None:
    """What is in stock is what was made and not spent, whoever waits for whom."""
    pool, net = Pool(Role.CLIENT, Role.SERVER, True), LPN.net

    def late(rounds: int, count: int) -> Protocol_[None]:
        for _ in range(rounds):
            yield []
        yield from pool.take(count, lambda *_: None)

    made = 0
    for counts in ((5 * net,), (7 * net, 10, 3 * net, net), (net // 2, 9 * net, 100, 100)):
        takes = [late(k, count) for k, count in enumerate(counts)]
        made += made_by(pool, parallel(takes[0], pool.ahead(), *takes[1:], pool.ahead()))
        assert pool._counts.stock == made - pool._counts.spent >= 0
        assert pool._counts.wanted == pool._counts.coming == 0
    assert pool._counts.spent == 25 * net + net // 2 + 210
