"""Memory of a server without a dealer: sessions wait for room or are told to come again; eight stay within what documents say."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.server.room import SESSION, Place, Room
from privinf.session.options import Options
from privinf.session.service import Service
from protocols.errors import Code, RefusedError
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.trio import Process
from tests.support.waiting import PATIENCE, wait_for

MB = 2**20


def test_who_waits_gets_room_in_the_order_of_asking_or_is_told_to_come_again() -> None:
    room, done = Room(100), list[int]()
    room.take(60, "a", 0.0)
    with pytest.raises(RefusedError, match="hold 60 of 100 bytes, and b takes about 50") as caught:
        room.take(50, "b", 0.0)
    assert caught.value.code is Code.FULL and "come again later" in str(caught.value)
    with pytest.raises(RefusedError, match=r"takes about 101 bytes.*all sessions.*hold at most 100.*--chunk") as caught:
        room.take(101, "c", PATIENCE)
    assert caught.value.code is Code.BYTES

    def taken(size: int) -> None:
        room.take(size, "one", PATIENCE)
        done.append(size)

    threads = []
    for size in (50, 10):  # the second would fit, and waits for the first
        threads.append(threading.Thread(target=taken, args=(size,)))
        threads[-1].start()
        wait_for(lambda: len(room._queue) == len(threads))
    assert done == []
    room.give(60)
    for thread in threads:
        thread.join(PATIENCE)
    assert done == [50, 10] and room.held == 60


def test_what_a_session_holds_is_given_back_whatever_becomes_of_it() -> None:
    room, service = Room(SESSION + 1000), cast(Service, Mock(options=Options(timeout=0.01), refusal=lambda error: error))
    place = Place(room, service)
    place.grow(1000)
    place.settle(300)
    assert room.held == place.size == SESSION + 300
    with pytest.raises(RefusedError):
        Place(room, service)
    place.ahead = 2000  # it waits for nothing
    place.settle(300)
    assert room.held == place.size == SESSION + 2300
    place.leave()
    assert room.held == 0
    unbounded = Room(0)
    unbounded.take(1 << 60, "anything", 0.0)


def test_a_pass_for_which_there_is_never_room_is_refused_and_the_next_served(tmp_path: Path) -> None:
    with duo(cache=tmp_path, hold=SESSION + 2 * MB) as pair:
        client = pair.client()
        with pytest.raises(RefusedError, match=r"this pass takes about \d+ bytes, and all sessions of this server hold at most"):
            list(client.generate(ids=[1, 2, 3] * 10, max_new_tokens=1, ignore_eos=True))
        assert t.is_greedy([1], [token.id for token in client.generate(ids=[1], max_new_tokens=1, ignore_eos=True)])
        wait_for(lambda: pair.server.supply._room.held == 0)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_eight_clients_at_once_stay_within_what_the_documents_say(tmp_path: Path) -> None:
    """With real ciphertexts and transfers: 0.6 GB, 14 bytes a parameter, and --hold, which two passes at a time fill."""
    hold = 8 * SESSION + 24 * MB
    words = ("--trust", "two-party", "--listen", "127.0.0.1:0", "--keys", t.keys(), "--cache", tmp_path / "server", "--hold", hold)
    with Process("serve", t.lowered_directory(), "--log", "warning", "--client-sessions", "0", *words) as process:
        client = Client(t.address_of(process), keys=str(t.keys()), options=Options(cache=tmp_path / "client", timeout=PATIENCE))

        prompts = [[k + 1, *range(1, 24)] for k in range(8)]

        def ask(prompt: list[int]) -> list[int]:
            with Conversation(client) as talk:
                return [token.id for token in talk.generate(prompt, max_new_tokens=2, ignore_eos=True)]

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, prompts))
        peak = next(1024 * int(line.split()[1]) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert all(t.is_greedy(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True))
    parameters = sum(int(x.numel()) for x in t.lowered().graph.parameters())
    assert peak < 0.6e9 + 14 * parameters + hold
