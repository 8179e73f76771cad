"""Peers with the right certificate that ask for what they may not, or say what is not so: refused in one line, and the services go on."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privinf.session.messages import (
    Deal,
    Further,
    Hello,
    Join,
    Needs,
    Pass,
    Prefetch,
    Prefetched,
    Register,
    Run,
    Session,
    SessionSeed,
    WeightRecord,
    Welcome,
    greet,
)
from protocols.errors import ConfigError, HandshakeError, PrivinfError, ProtocolDesync, TransportError
from tests.support import trio as t
from tests.support.peers import as_client, dialled, is_well, load_fingerprint, said
from tests.support.peers import parties as parties
from tests.support.peers import quiet as quiet
from tests.support.tls_pair import outcome
from tests.support.trio import Trio, trio
from tests.support.waiting import PATIENCE

# ---- a client that asks for what it may not


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Pass(33), "asks for more than the model's 32 positions"),
        (Pass(1 << 20), "asks for more than the model's 32 positions"),
        (Pass(1, True), "does not give logits"),
        (Run(), "another kind of pass"),
        ({"type": "Nonsense"}, "a control message that is not a"),
        ({"type": "Pass", "count": 0}, "a control message that is not a"),
    ],
)
def test_requests_that_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, request_: Any, words: str) -> None:
    with trio(cache=t.scratch() / "cache", allow_logits=False) as parties:
        session = parties.client().connect()
        session.connection.send_control(request_)
        session.connection.timeout = 10
        error = outcome(lambda: session.connection.receive_control(Hello))
        assert words in str(error) and error.exit_code == 4
        assert words in said(caplog, "server") and words in said(caplog, "dealer")
        assert words in str(outcome(lambda: session.source.link.receive_control(Hello)))
        session.close()
        assert is_well(parties)


@pytest.mark.parametrize(
    ("asked", "words"),
    [(("nope",), "asks for a weight 'nope' that the model does not have"), (("wte.embedding.weight",) * 2, "asks for a weight twice")],
)
def test_set_ups_that_are_refused(parties: Trio, caplog: pytest.LogCaptureFixture, asked: tuple[str, ...], words: str) -> None:
    with as_client(parties) as connection:
        connection.receive_control(Welcome)
        connection.send_control(Needs(()))
        connection.send_control(Needs(asked))
        connection.max_frame = 1 << 26
        error = outcome(lambda: [connection.receive() for _ in range(9)])
        assert words in str(error) and isinstance(error, HandshakeError)
    assert words in said(caplog, "server")


def test_a_client_that_never_joins(caplog: pytest.LogCaptureFixture) -> None:
    """It has its token and asks for a pass, and the dealer never sees it: all three come to an end."""
    with trio(cache=t.scratch() / "cache", timeout=5.0) as parties:
        with as_client(parties) as connection:
            connection.receive_control(Welcome)
            connection.send_control(Needs(()))
            connection.send_control(Needs(()))
            connection.timeout = PATIENCE
            connection.receive_control(Session)
            connection.send_control(Pass(3))
            outcome(lambda: connection.receive_control(Hello))
        t.wait_for(lambda: not parties.dealer._sessions and not parties.dealer.peers and not parties.server.peers)
        assert is_well(parties)


NONSENSE = [[["Nope", 1]], [["Mask"]], [[]], [["Mask", [1 << 30, 1 << 30], 64, 0]], [["LinearMask", "w", [4], 4, 99, 0, 0, []]]]


@pytest.mark.parametrize("asked", [*map(Deal, NONSENSE), *map(Prefetch, NONSENSE[:1]), Prefetched(), Further()])
def test_a_server_that_asks_the_dealer_for_nonsense(parties: Trio, caplog: pytest.LogCaptureFixture, asked: Any) -> None:
    words = "asked for as prefetched" if isinstance(asked, Prefetched) else "was asked for"
    token, fingerprint = secrets.token_bytes(16), load_fingerprint(t.keys() / "client" / "cert.pem")
    with dialled(parties.dealer.address, "server", "dealer") as server, dialled(parties.dealer.address, "client", "dealer") as client:
        greet(server)
        server.send_control(Register(token, fingerprint, secrets.token_bytes(32), (WeightRecord("w", (4, 4), 32, 14),)))
        server.receive_control(SessionSeed)
        greet(client)
        client.send_control(Join(token))
        client.receive_control(SessionSeed)
        for each in (server, client):
            each.establish()
        server.send_control(asked)
        errors = [outcome(lambda each=each: each.receive_control(Hello)) for each in (server, client)]  # type: ignore[misc]
        assert all(words in str(error) for error in errors)
    assert words in said(caplog, "dealer", words)
    assert is_well(parties)


# ---- a server whose bundle lies


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The bundle with a change in its graph."""
    document = msgspec.json.decode(t.lowered().bundle())
    change(document["graph"])
    return msgspec.json.encode(document)


def plans(graph: dict[str, Any], **values: Any) -> None:
    for plan in graph["plan"].values():
        plan.update({key: value for key, value in values.items() if key in plan})


LIES: dict[str, Callable[[], bytes]] = {
    "not json": lambda: b"\x00\x01 not a bundle",
    "empty": lambda: b"",
    "an id within": lambda: edited(lambda graph: graph["info"].update(id="0" * 32)),
    "no set-up": lambda: edited(lambda graph: graph["setup"].update(items={})),
    "more set-up": lambda: edited(lambda graph: graph["setup"]["items"].update(more={"size": 1, "sha256": "0" * 64})),
    "a larger set-up": lambda: edited(lambda graph: [item.update(size=2**40) for item in graph["setup"]["items"].values()]),
    "no plan": lambda: edited(lambda graph: graph.update(plan={})),
    "a ring of no bits": lambda: edited(lambda graph: plans(graph, ring=0)),
    "a ring of a million bits": lambda: edited(lambda graph: plans(graph, ring=10**6)),
    "bits that are words": lambda: edited(lambda graph: plans(graph, bits="many")),
    "no nodes": lambda: edited(lambda graph: graph.update(nodes=[])),
    "nodes upside down": lambda: edited(lambda graph: graph["nodes"].reverse()),
    "no vocabulary": lambda: edited(lambda graph: graph["info"].update(vocab=0, n_positions=0)),
    "weights of 2^40": lambda: edited(
        lambda graph: [node["parameters"].update({key: [2**40, 2**40] for key in node["parameters"]}) for node in graph["nodes"]]
    ),
    "a tokenizer that is none": lambda: msgspec.json.encode({**msgspec.json.decode(t.lowered().bundle()), "tokenizer": "bm8="}),
}


@contextlib.contextmanager
def lying(parties: Trio, bundle: bytes, digest: str | None = None) -> Iterator[Trio]:
    import hashlib

    server, kept = parties.server, (parties.server.model.bundle, parties.server.lowered.id)
    server.model.bundle, server.lowered.id = bundle, digest or hashlib.sha256(bundle).hexdigest()
    try:
        yield parties
    finally:
        server.model.bundle, server.lowered.id = kept


@pytest.mark.parametrize("lie", LIES)
def test_bundles_that_lie(parties: Trio, lie: str) -> None:
    with lying(parties, LIES[lie]()):
        error = outcome(lambda: list(parties.client(fresh=True).generate("x", max_new_tokens=1)))
        assert isinstance(error, HandshakeError | ProtocolDesync | ConfigError | TransportError)
    assert is_well(parties)


def test_a_bundle_of_another_digest_or_size(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    with lying(parties, t.lowered().bundle(), "0" * 64):
        assert "is not that of the model whose id the server gave" in str(outcome(lambda: parties.client(fresh=True).connect()))
    with lying(parties, t.lowered().bundle(), "../../../etc/passwd"):
        assert "not a Welcome" in str(outcome(lambda: parties.client(fresh=True).connect()))
    with lying(parties, t.lowered().bundle()):
        monkeypatch.setattr("privinf.server.server.len", lambda data: 1 << 50, raising=False)
        outcome(lambda: parties.client(fresh=True).connect())


def test_bundles_with_random_changes(parties: Trio) -> None:
    """Whatever a bundle says, a client ends with an error of ours, or with a session."""
    rng = random.Random(7)
    ended = 0
    for _ in range(40):
        document = msgspec.json.decode(t.lowered().bundle())
        for _ in range(rng.choice((1, 1, 2))):
            change(document["graph"], rng)
        with lying(parties, msgspec.json.encode(document)):
            try:
                list(parties.client(fresh=True, timeout=3.0).generate(ids=[1, 2], max_new_tokens=1))
            except PrivinfError as error:
                ended += 1
                assert "\n" not in str(error)
    assert ended > 10 and is_well(parties)


def change(value: Any, rng: random.Random) -> None:
    """Replaces one leaf, or removes one entry, somewhere in a JSON document."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.9:
            value = inner
            continue
        if rng.random() < 0.3:
            del value[key]
        else:
            value[key] = rng.choice([0, 1, -1, 7, 63, 64, 65, 2**40, 1.5, "x", None, True, [], {}, [1, 2], inner])
        return
