"""The dealer's messages: a correlation that is larger than what a client takes at a time comes in several."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

import privinf.dealer.dealer as dealing
from privinf.client.payload import Payload
from privinf.session.messages import CHUNK
from privinf.transport.memory import memory_pair
from protocols.errors import ProtocolDesync

LIMIT = 2 * CHUNK


def messages(payloads: list[bytes]) -> list[bytes]:
    """What the dealer makes of these correlations' shares."""
    service = cast(Any, SimpleNamespace(options=SimpleNamespace(device="cpu")))
    return [bytes(message) for message in dealing.DealerService._messages(service, iter(payloads))]


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1, 3 * LIMIT + 5])
def test_a_large_correlation_comes_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between small ones, for a client that takes no message beyond its limit."""
    payloads = [os.urandom(length) for length in (100, CHUNK, size, 7, size, 1)]
    dealer, client = memory_pair(("dealer", "client"))
    client.max_frame = LIMIT
    monkeypatch.setattr(dealing, "MAX_FRAME", LIMIT)
    for message in messages(payloads):
        dealer.max_frame = LIMIT
        dealer.send(message)
    seen: list[float] = []
    payload = Payload(cast(Any, client), sum(map(len, payloads)), seen.append)
    assert [bytes(payload.take(len(each))) for each in payloads] == payloads
    assert payload.left == 0 and seen == sorted(seen) and seen[-1] == 1


def test_such_a_client_refuses_a_longer_one() -> None:
    dealer, client = memory_pair(("dealer", "client"))
    dealer.max_frame = client.max_frame = LIMIT
    dealer.send(os.urandom(LIMIT + 1))
    with pytest.raises(ProtocolDesync, match=f"the limit is {LIMIT}"):
        Payload(cast(Any, client), LIMIT + 1, lambda _: None).take(1)
