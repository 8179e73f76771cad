"""Two ends of a TLS connection for tests: keys, threads, and what an error must look like."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from privinf.transport import Connection, Credentials, Listener, TurnedAway, dial
from privinf.transport.keys import init_keys, load_credentials
from protocols.errors import HandshakeError, PrivinfError
from tests.support.waiting import PATIENCE

MB = 2**20


@pytest.fixture(scope="module")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys") / "keys"
    init_keys(directory)
    return directory


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("other") / "keys"
    init_keys(directory)
    return directory


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@dataclass
class Pair:
    server: Connection
    client: Connection


@contextlib.contextmanager
def connected(keys_dir: Path, pool: ThreadPoolExecutor, *, established: bool = True, **options: Any) -> Iterator[Pair]:
    options = {"timeout": 20.0, **options}
    with Listener("127.0.0.1:0", load_credentials(keys_dir, "server"), {"client"}, **options) as door:
        accepted = pool.submit(accept_one, door)
        client = dial(door.address, load_credentials(keys_dir, "client"), "server", **options)
        server = accepted.result(PATIENCE)
    with server, client:
        if established:
            server.establish()
            client.establish()
        yield Pair(server, client)


def accept_one(door: Listener) -> Connection:
    """The next peer; raises the error of a guest that is none."""
    found = door.accept(PATIENCE)
    assert found is not None
    if isinstance(found, TurnedAway):
        raise found.error
    return found


def together(pool: ThreadPoolExecutor, *calls: Callable[[], Any]) -> list[Any]:
    """Runs the calls at the same time, one thread each."""
    return [future.result(PATIENCE) for future in [pool.submit(call) for call in calls]]


def outcome(call: Callable[[], Any]) -> PrivinfError:
    """The error that a call must end with; checks that it is one readable line."""
    with pytest.raises(PrivinfError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 700
    return caught.value


def inject(connection: Connection, raw: bytes) -> None:
    """Puts bytes into a peer's stream of frames, whatever they are, under valid TLS."""
    connection._stream.encrypt(raw)
    assert connection._stream.push()


def refused(
    pool: ThreadPoolExecutor, server: Credentials, client: Credentials, address: str = "127.0.0.1", **dialling: Any
) -> tuple[str, str]:
    """The errors at (server, client) of a handshake that must fail; the server's may come with its first message."""
    with Listener("127.0.0.1:0", server, {"client"}, timeout=PATIENCE) as door:

        def accept() -> None:
            with accept_one(door) as connection:
                connection.receive(1)

        at_server = pool.submit(outcome, accept)
        port = door.address.rpartition(":")[2]
        error = outcome(lambda: dial(f"{address}:{port}", client, "server", timeout=PATIENCE, **dialling))
        for one in (error, at_server.result(PATIENCE)):
            assert isinstance(one, HandshakeError) and one.exit_code == 3 and one.party
        return str(at_server.result()), str(error)
