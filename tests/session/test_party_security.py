"""What the parties of a session give away: to an observer, to the dealer, to logs and to each other."""

from __future__ import annotations

import ast
import base64
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

import privinf
from privinf.client.reply import Reply
from privinf.client.text import Prompt
from privinf.client.wanted import Wanted
from privinf.session import messages
from privinf.transport.connection import Connection
from privinf.transport.endpoint import Endpoint
from privinf.transport.frames import Frame, FrameKind
from privinf.transport.tls import TlsStream
from tests.support import trio as t
from tests.support.trio import Trio, trio

ROOT = Path(privinf.__file__).parent.parent
PROMPTS = ("the answer is no", "zz(Q~ 0){]}#!$%@")  # of equal length
SEEDS = {"token", "mask_seed", "seed"}


@dataclass
class Record:
    """Everything that crossed the connections of a session."""

    sent: dict[tuple[str, str], list[tuple[str, str, int]]] = field(default_factory=dict)  # (party, peer) -> [(kind, phase, bytes)]
    records: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # (party, peer) -> bytes of each write into TLS
    bodies: dict[tuple[str, str], list[tuple[FrameKind, bytes]]] = field(default_factory=dict)  # (party, peer) -> what arrived


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Watches all connections of this process; heartbeats, which depend on time alone, are left out."""
    made, guard = Record(), threading.Lock()
    frames_of, arrived, encrypt = Endpoint._frames_of, Endpoint._arrived, TlsStream.encrypt
    streams: dict[int, tuple[str, str]] = {}

    def watched_frames(self: Endpoint, kind: FrameKind, body: Any) -> Any:
        assert isinstance(self, Connection)
        with guard:
            key = streams[id(self._stream)] = (self.party, self.peer_role)
            made.sent.setdefault(key, []).append((kind.name, self.meter.phase, memoryview(body).nbytes))
        return frames_of(self, kind, body)

    def watched_arrival(self: Endpoint, frame: Frame) -> bool:
        with guard:
            if frame.header.kind is not FrameKind.HEARTBEAT:
                made.bodies.setdefault((self.party, self.peer_role), []).append((frame.header.kind, bytes(frame.body)))
        return arrived(self, frame)

    def watched_encrypt(self: TlsStream, plain: Any) -> None:
        size = memoryview(plain).nbytes
        with guard:
            if id(self) in streams and size != 18:  # a bare header is a heartbeat or the end
                made.records.setdefault(streams[id(self)], []).append(size)
        encrypt(self, plain)

    monkeypatch.setattr(Endpoint, "_frames_of", watched_frames)
    monkeypatch.setattr(Endpoint, "_arrived", watched_arrival)
    monkeypatch.setattr(TlsStream, "encrypt", watched_encrypt)
    return made


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Trio]:
    with trio(cache=tmp_path) as made:
        yield made


def settled(parties: Trio) -> None:
    t.wait_for(lambda: not parties.server.peers and not parties.dealer.peers)


def session(parties: Trio, record: Record, prompt: str, **options: Any) -> Record:
    """What crosses in one session of three tokens."""
    for part in (record.sent, record.records, record.bodies):
        part.clear()
    client = parties.client(**options)
    assert len(list(client.generate(prompt, max_new_tokens=3, ignore_eos=True))) == 3
    settled(parties)
    return Record(*({key: list(value) for key, value in part.items()} for part in (record.sent, record.records, record.bodies)))


# ---- an observer


@pytest.mark.parametrize("fresh", [False, True], ids=["kept", "set-up"])
def test_an_observer_sees_the_same_for_two_prompts_of_equal_length(parties: Trio, record: Record, fresh: bool) -> None:
    if not fresh:
        session(parties, record, "warm up")
    first, second = (session(parties, record, prompt, fresh=fresh) for prompt in PROMPTS)
    assert set(first.sent) == {(a, b) for a in ("server", "client", "dealer") for b in ("server", "client", "dealer") if a != b}
    assert sum(len(found) for found in first.sent.values()) > 200
    for key, found in first.sent.items():
        assert found == second.sent[key], key
        assert first.records[key] == second.records[key], key  # TLS gets them in the same pieces
    shorter = session(parties, record, PROMPTS[0][:-1], fresh=fresh)
    assert shorter.sent != first.sent  # a difference would show


# ---- the dealer


def control(bodies: list[tuple[FrameKind, bytes]]) -> list[Any]:
    """The dealer's control messages, without the seeds and tokens that are drawn for each session."""
    found = []
    for kind, body in bodies:
        assert kind in (FrameKind.CONTROL, FrameKind.GOODBYE)  # no data ever reaches it
        if kind is FrameKind.CONTROL:
            message = msgspec.msgpack.decode(body)
            assert not isinstance(message, dict) or all(len(message[key]) in (16, 32) for key in SEEDS & set(message))
            found.append({key: value for key, value in message.items() if key not in SEEDS} if isinstance(message, dict) else message)
    return found


def test_what_the_dealer_receives_depends_on_public_shapes_alone(record: Record, tmp_path: Path) -> None:
    """Over prompts, over sessions, and over models of the same plan with other weights."""
    views = []
    for nudge in (0.0, 0.001):
        with trio(t.lowered(nudge=nudge), cache=tmp_path / str(nudge)) as parties:
            assert parties.server.lowered.plan == t.lowered().plan
            for prompt in PROMPTS:
                bodies = session(parties, record, prompt).bodies
                views.append({key: control(found) for key, found in bodies.items() if key[0] == "dealer"})
    assert len(views) == 4 and all(view == views[0] for view in views)
    (joined,), asked = [m for m in views[0]["dealer", "client"] if m.get("type") == "Join"], views[0]["dealer", "server"]
    assert joined == {"type": "Join"}
    assert [message.get("type") for message in asked] == [None, "Register", "Deal", "Deal", "Further", "Prefetched", "Further", "End"]
    assert set(asked[1]) == {"type", "client", "weights"}


# ---- seeds


def encodings(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret), base64.b64encode(secret).rstrip(b"="), secret[::-1]]


def test_no_seed_goes_where_it_must_not(parties: Trio, record: Record, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """B's seed reaches the dealer and nobody else; the two session seeds each reach one party; the token goes from S to C and D."""
    caplog.set_level(logging.DEBUG)
    found = session(parties, record, PROMPTS[0], fresh=True)
    seed = parties.server.lowered.mask_seed
    assert seed is not None

    def holders(secret: bytes) -> set[str]:
        return {party for (party, _), bodies in found.bodies.items() if any(secret in body for _, body in bodies)}

    assert [holders(each) for each in encodings(seed)] == [{"dealer"}, set(), set(), set(), set()]
    seeds = {}
    for party in ("server", "client"):
        (message,) = [body for _, body in found.bodies[party, "dealer"] if body[:1] == b"\x81" and b"seed" in body]
        seeds[party] = msgspec.msgpack.decode(message, type=messages.SessionSeed).seed
        assert holders(seeds[party]) == {party}
    assert seeds["server"] != seeds["client"]
    (token,) = {msgspec.msgpack.decode(body)["token"] for _, body in found.bodies["dealer", "client"] if b"Join" in body}
    assert holders(token) == {"client", "dealer"}
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())  # of the client
    for secret in (seed, token, *seeds.values()):
        for form in (*encodings(secret), repr(secret)[2:-1].encode()):
            assert form not in caplog.text.encode() and form not in kept


# ---- logs and reprs


def test_logs_of_two_prompts_are_the_same(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, of all parties: so no text, no id and no token can be in them."""
    said = []
    for prompt in ("warm up", *PROMPTS):
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            list(parties.client().generate(prompt, max_new_tokens=3, ignore_eos=True))
            settled(parties)
        lines = sorted(
            f"{record.name} {record.levelname} {record.getMessage()}" for record in caplog.records if record.name != "torch.__trace"
        )
        said.append([re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", re.sub(r"\d+\.\d\d s", "SECONDS", line)) for line in lines])
        assert prompt not in caplog.text
    assert said[1] == said[2] and said[1]  # not for want of any


def test_reprs_hide_secrets(parties: Trio) -> None:
    secret = bytes(range(200, 216))
    for message in (
        messages.Session(secret),
        messages.Join(secret),
        messages.SessionSeed(secret),
        messages.Register(secret, "f" * 64, secret * 2, ()),
    ):
        for text in (repr(message), str(message), f"{message}", repr([message])):
            assert "hidden" in text and repr(secret)[2:-1] not in text and secret.hex() not in text
    client = parties.client()
    made = client.connect()
    tokens = list(client.generate("secret prompt", max_new_tokens=1, ignore_eos=True))
    ids = t.tokenizer().encode("secret prompt").ids
    seed = parties.server.lowered.mask_seed
    assert tokens and seed is not None
    prompt = Prompt.read(made.lowered, "secret prompt", None)
    reply = Reply(len(ids), prompt.tokenizer, Wanted())
    reply.tokens += ids
    for thing in (made, prompt, reply, made.store, made.runtime.party, client, parties.server, parties.dealer, parties.server.lowered):
        text = repr(thing)
        assert "secret prompt" not in text and repr(ids)[1:-1] not in text and repr(seed)[2:-1] not in text and seed.hex() not in text
    assert "hidden" in repr(made) and "hidden" in repr(made.store)


# ---- the sources


def sources(*rooms: str) -> Iterator[tuple[Path, ast.AST]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text())


def used(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports or reads."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


def test_no_pickle() -> None:
    banned = re.compile(r"(pickle|cPickle|dill|marshal|shelve|joblib|cloudpickle)(\.|$)|torch\.(load|save)$")
    for path, tree in sources("privinf", "protocols"):
        assert not {name for name in used(tree) if banned.match(name)}, path


def test_no_randomness_but_the_operating_systems_and_aes() -> None:
    banned = re.compile(
        r"(random|numpy\.random|np\.random)(\.|$)|torch\.(rand|randn|randint|randperm|Generator|manual_seed|bernoulli|normal)"
    )
    for path, tree in sources("privinf/session", "privinf/client", "privinf/server", "privinf/dealer", "privinf/local", "protocols"):
        assert not {name for name in used(tree) if banned.match(name)}, path
        assert ".uniform_(" not in (ROOT / path).read_text() and ".random_(" not in (ROOT / path).read_text()


def test_only_local_sessions_can_dump_shares() -> None:
    """The probe is imported by the children of a local session and by `compare`, and no verb that serves can reach it."""
    importers = {str(path) for path, tree in sources("privinf") if any(name.startswith("privinf.local.probe") for name in used(tree))}
    assert importers == {"privinf/local/child.py", "privinf/local/compare.py"}
    for verb in ("serve", "dealer", "generate"):
        assert "probe" not in (ROOT / f"privinf/cli/{verb}.py").read_text()
