"""A client's connections: whatever a server says or leaves out, both are closed and the frames' limit is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from privinf.client.lines import Lines
from privinf.client.setup import ClientStore, receive_bundle
from privinf.session.messages import Welcome
from privinf.transport.connection import Connection
from privinf.transport.memory import memory_pair
from protocols.errors import PrivinfError, TransportError


def test_a_bundle_that_does_not_come_leaves_the_limit_of_frames(tmp_path: Path) -> None:
    server, client = memory_pair()
    usual = client.max_frame
    server.close()
    with pytest.raises(PrivinfError):
        receive_bundle(cast(Connection, client), Welcome("a" * 64, 1, False), ClientStore(tmp_path), "server here")
    assert client.max_frame == usual


def test_a_server_has_a_bundle() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"model": "a" * 64, "size": 0, "logits": False}), type=Welcome)


def test_both_are_closed_whatever_the_farewell_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a fault of ours")

    pairs = [memory_pair(), memory_pair()]
    lines = Lines(cast(Any, None))
    lines.dialled.extend(cast(Any, client) for _, client in pairs)
    monkeypatch.setattr("privinf.client.lines.farewell", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        lines.close(TransportError("broken"))
    for server, _ in pairs:
        server.timeout = 60.0
        with pytest.raises(TransportError, match=r"ended the session|closed"):
            server.receive()
