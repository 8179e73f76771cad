"""`privinf batch` whose requests are answered in the same passes; what fails there, and where each has a session of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privinf.client.client import Client
from privinf.client.shared import Seat
from privinf.client.text import Token
from privinf.jobs import worker
from privinf.server.session import ServerSession
from privinf.session.messages import Pass, Step
from protocols.errors import Code, HandshakeError, TransportError
from tests.jobs.test_batch import ask, replies, text_of, written
from tests.support.gateway import ids_of
from tests.support.trio import Trio, is_greedy, trio
from tests.support.waiting import wait_for

PROMPTS = ["ab", "Hello", "x = 1", "zz top", "("]


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Trio]:
    with trio(cache=tmp_path / "cache") as made:
        yield made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The passes that the server was asked for."""
    found: list[Any] = []
    passed = ServerSession._pass
    monkeypatch.setattr(ServerSession, "_pass", lambda session, request: (found.append(request), passed(session, request))[1])
    return found


def are_right(path: Path) -> None:
    found = replies(path)
    assert len(found) == len(PROMPTS)
    for number, prompt in enumerate(PROMPTS, 1):
        assert is_greedy(ids_of(prompt), ids_of(text_of(found[str(number)])))


def test_requests_go_through_the_same_passes(parties: Trio, tmp_path: Path, asked: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """In one session, the one in which the model was read, and the parties are told of its end."""
    caplog.set_level(logging.INFO, "privinf")
    source, output = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS]), tmp_path / "out.jsonl"
    counts = ask(parties, source, output, sessions=3)
    are_right(output)
    assert counts["tokens"] == 15 and all(isinstance(request, Step) for request in asked)
    assert len(asked) < 15 and max(len(request.new) for request in asked) > 1
    wait_for(lambda: any(each.name == "privinf.server" and " bytes, " in each.getMessage() for each in caplog.records))
    parties.server.close()
    ended = [each.getMessage() for each in caplog.records if each.name == "privinf.server" and " bytes, " in each.getMessage()]
    assert len(ended) == 1 and ended[0].endswith(", done"), ended


def test_what_fails_beside_others_is_tried_alone(parties: Trio, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whatever it was; no try of it counts."""
    generate = Seat.generate

    def breaks(seat: Seat, ids: list[int], **wishes: Any) -> Iterator[Token]:
        yield next(generate(seat, ids, **wishes))
        raise TransportError("a session broke")

    monkeypatch.setattr(Seat, "generate", breaks)
    source, output = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS]), tmp_path / "out.jsonl"
    counts = ask(parties, source, output, sessions=2, tries=1)
    are_right(output)
    assert counts["failed"] == 0 and {type(request) for request in asked} == {Step, Pass}


def test_few_are_tried_alone_at_a_time(parties: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, at_work, most = Client.generate, set[int](), [0]

    def noted(client: Client, *given: Any, **wishes: Any) -> Iterator[Token]:
        at_work.add(threading.get_ident())
        most.append(len(at_work))
        yield from generate(client, *given, **wishes)
        at_work.discard(threading.get_ident())

    def breaks(seat: Seat, ids: list[int], **wishes: Any) -> Iterator[Token]:
        raise TransportError("a session broke")
        yield

    monkeypatch.setattr(Seat, "generate", breaks)
    monkeypatch.setattr(Client, "generate", noted)
    monkeypatch.setattr(worker, "ALONE", 2)
    source, output = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS]), tmp_path / "out.jsonl"
    ask(parties, source, output, sessions=5)
    are_right(output)
    assert 1 <= max(most) <= 2


@pytest.mark.parametrize("code", [Code.TRANSPORT, Code.OPENING])
def test_a_connection_that_broke_while_it_was_made_is_made_anew(
    parties: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code
) -> None:
    """Whoever found it: a server that was told nothing for too long says so, or a dealer that knows a session no longer."""
    left, generate = [HandshakeError("the peer refused: no sign of life", code=code)], Client.generate

    def once(client: Client, *given: Any, **wishes: Any) -> Iterator[Token]:
        if left:
            raise left.pop()
        return generate(client, *given, **wishes)

    monkeypatch.setattr(Client, "generate", once)
    source, output = written(tmp_path / "in.jsonl", [{"prompt": PROMPTS[0]}]), tmp_path / "out.jsonl"
    assert ask(parties, source, output, sessions=1)["answered"] == 1 and not left
    left.append(HandshakeError("the peer refused: it does not know us", code=Code.NOT_LISTED))
    source = written(tmp_path / "other.jsonl", [{"prompt": PROMPTS[1]}])
    with pytest.raises(HandshakeError, match="does not know us"):
        ask(parties, source, tmp_path / "other.out", sessions=1)


def test_prepared_queries_are_used_where_there_are_any(parties: Trio, tmp_path: Path, asked: list[Any]) -> None:
    with parties.client() as client:
        client.prepare(len(ids_of(PROMPTS[0])), max_new_tokens=3)
    source, output = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS]), tmp_path / "out.jsonl"
    ask(parties, source, output, sessions=3)
    are_right(output)
    assert not any(isinstance(request, Step) for request in asked)
