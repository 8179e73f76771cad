"""A session that several conversations wait for while it is made: they hear of it together, and whoever leaves waits no longer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from privinf.client.shared import Seat, Shared
from protocols.errors import PeerUnreachableError, PrivinfError, TransportError
from tests.support.trio import wait_for


class Unreachable:
    """Of a client what a `Shared` uses; no session comes of it before `give_up`, and none then."""

    def __init__(self) -> None:
        self.opened, self.dropped, self._over = 0, 0, threading.Event()

    def open(self, made: list[Any], connect_s: float | None) -> Any:
        self.opened += 1
        made.append(self)
        assert self._over.wait(60)
        raise PeerUnreachableError("nobody is there", party="client")

    def drop(self, lines: Any, error: BaseException | None = None) -> None:
        self.dropped += 1
        self.give_up()

    def give_up(self) -> None:
        self._over.set()


def failure(seat: Seat) -> PrivinfError:
    with pytest.raises(PrivinfError) as found:
        seat.open()
    return found.value


def waiting(shared: Shared) -> int:
    return 0 if shared._opening is None else len(shared._opening.seats)


def test_a_server_that_is_away_is_tried_once_for_all() -> None:
    """Not by each in its turn, so that the last would hear of it after all the others' times."""
    client = Unreachable()
    shared = Shared(client, 4)  # type: ignore[arg-type]
    with ThreadPoolExecutor(3) as pool:
        failures = [pool.submit(failure, shared.seat()) for _ in range(3)]
        wait_for(lambda: waiting(shared) == 3)
        client.give_up()
        found = [each.result() for each in failures]
    assert client.opened == 1 and len(set(map(id, found))) == 3, "each raises an error of its own"
    assert all(isinstance(each, PeerUnreachableError) and each.message == "nobody is there" for each in found)
    assert waiting(shared) == 0 and not shared.sessions


def test_who_leaves_waits_no_longer() -> None:
    """The others do; and once nobody waits, nothing is made any more."""
    client = Unreachable()
    shared = Shared(client, 4)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        seats = [shared.seat(), shared.seat()]
        first = pool.submit(failure, seats[0])
        wait_for(lambda: waiting(shared) == 1)
        second = pool.submit(failure, seats[1])
        wait_for(lambda: waiting(shared) == 2)
        seats[1].close()
        assert isinstance(second.result(60), TransportError) and client.dropped == 0 and not first.done()
        seats[0].close()
        first.result(60)
        assert client.dropped >= 1 and client.opened == 1
        assert isinstance(failure(seats[1]), TransportError) and client.opened == 1, "a conversation that was closed opens nothing"
