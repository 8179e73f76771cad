"""A dealer and a server in threads, and connections to them that are not always what they should be."""

from __future__ import annotations

import contextlib
import logging
import secrets
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privinf.session.messages import Dealt, Join, Register, SessionSeed, greet
from privinf.transport.connection import Connection
from privinf.transport.frames import FrameKind
from privinf.transport.keys import load_credentials
from privinf.transport.listener import dial
from protocols.errors import PrivinfError
from tests.support import trio as t
from tests.support.trio import Trio, trio
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with trio(cache=tmp_path_factory.mktemp("cache")) as made:
        assert is_well(made)  # and the set-up is kept
        yield made


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "privinf")
    monkeypatch.setattr("privinf.session.sparing.WINDOW_S", 0.0)  # as if a minute passed between two strangers


def is_well(parties: Trio) -> bool:
    return [token.id for token in parties.client().generate(ids=[1, 2, 3], max_new_tokens=1)] != []


def said(caplog: pytest.LogCaptureFixture, role: str, words: str = "") -> str:
    """The one warning of a service that holds these words; all of its warnings are readable lines."""

    def found() -> list[str]:
        lines = [r.getMessage() for r in list(caplog.records) if r.name == f"privinf.{role}" and r.levelno >= logging.WARNING]
        assert all("\n" not in line and line.isprintable() and len(line) < 700 and "internal error" not in line for line in lines), lines
        return [line for line in lines if words in line]

    lines: list[str] = t.wait_for(found, about=lambda: caplog.text)
    assert len(lines) == 1, lines
    return lines[0]


def dialled(address: str, role: str, peer: str, keys: Path | None = None) -> Connection:
    """A connection as one of the parties, past TLS."""
    return dial(address, load_credentials(keys or t.keys(), role), peer, PATIENCE)


@contextlib.contextmanager
def as_client(parties: Trio) -> Iterator[Connection]:
    """A client past the comparison of versions."""
    with dialled(parties.server.address, "client", "server") as connection:
        greet(connection)
        yield connection


def load_fingerprint(path: Path) -> str:
    from privinf.transport.tls import fingerprint

    return fingerprint(ssl.PEM_cert_to_DER_cert(path.read_text()))


class joined:
    """A server's session at a dealer that its client has joined."""

    def __init__(self, address: str, join: bool = True) -> None:
        token = secrets.token_bytes(16)
        self.server, self.client = dialled(address, "server", "dealer"), dialled(address, "client", "dealer")
        for each in (self.server, self.client):
            greet(each)
        fingerprint = load_fingerprint(t.keys() / "client" / "cert.pem")
        register = Register(token, fingerprint, secrets.token_bytes(32), ())
        for each, message in ((self.server, register), (self.client, Join(token)))[: 1 + join]:
            each.send_control(message)
            each.receive_control(SessionSeed)
            each.establish()

    def __enter__(self) -> joined:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.client, self.server):
            each.close()

    def ask(self, kinds: list[Any]) -> Any:
        """What the client is told of a pass."""
        self.server.send(msgspec.msgpack.encode({"type": "Deal", "kinds": kinds}), FrameKind.CONTROL)
        try:
            return self.client.receive_control(Dealt)
        except PrivinfError as error:
            return error
