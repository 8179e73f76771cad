"""The line that server and dealer log on each session that is over: sizes, and no content."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from privinf.cli.verbs import load_verb
from protocols.errors import TransportError
from tests.support import trio as t
from tests.support.trio import Trio, trio

BYTES, SECONDS = r"\d{4,} bytes", r"\d+\.\d\d s"


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with trio(cache=tmp_path_factory.mktemp("cache"), session_tokens=20) as made:
        yield made


@pytest.fixture(autouse=True)
def informed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "privinf")


def line_of(caplog: pytest.LogCaptureFixture, role: str, count: int = 1) -> str:
    def found() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == f"privinf.{role}" and "bytes, " in r.getMessage()]

    t.wait_for(lambda: len(found()) == count, 30)
    return found()[-1]


def test_a_session_that_went_well(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    client, secret = parties.client(), "zq!Xy"
    reply = "".join(token.text or "" for token in client.generate(secret, max_new_tokens=3, ignore_eos=True))
    who = client.peers.credentials.fingerprint[:12]
    line = line_of(caplog, "server")
    assert re.fullmatch(rf"client \({who}\) at 127\.0\.0\.1:\d+: 5 prompt tokens, 3 new tokens, {BYTES}, {SECONDS}, done", line)
    assert client.result is not None
    line = line_of(caplog, "dealer")
    server = parties.server.credentials.fingerprint[:12]
    assert re.fullmatch(
        rf"server \({server}\) at 127\.0\.0\.1:\d+ for the client {who}: 3 passes, \d+ correlations, {BYTES}, {SECONDS}, done", line
    )
    assert secret not in caplog.text and (len(reply) < 2 or reply not in caplog.text)


def test_chunks_and_pads_are_counted_as_the_server_sees_them(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    list(parties.client(chunk=1, pad_prompt=4, pad_reply=4).generate("abc", max_new_tokens=2, ignore_eos=True))
    assert ": 4 prompt tokens, 4 new tokens, " in line_of(caplog, "server")
    parties.client().prepare(4, max_new_tokens=2, count=2)
    assert ": 2 prepared queries, " in line_of(caplog, "server", 2)


def test_sessions_that_end_otherwise(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TransportError):
        for number, _ in enumerate(parties.client().generate("abc", max_new_tokens=9, ignore_eos=True)):
            if number == 1:
                for connection in parties.server.counters.connections:
                    connection.close()
    assert re.search(r": 3 prompt tokens, \d new tokens, .* broke off$", line_of(caplog, "server"))
    with pytest.raises(Exception, match="at most 20 tokens"):
        list(parties.client().generate("a" * 21, max_new_tokens=1))
    assert re.search(rf": nothing asked for, 0 bytes, {SECONDS}, refused$", line_of(caplog, "server", 2))
    assert parties.client().connect() is not None


def test_a_service_shows_it(tmp_path: Path) -> None:
    with t.services("--log", "info") as services:  # which is the default, but that of `tests.support.trio`
        assert services.generate("--cache", tmp_path).wait(60) == 0
        t.wait_for(lambda: " new tokens, " in services.server.err, 30)
        line = next(line for line in services.server.err.splitlines() if " new tokens, " in line)
    assert re.match(r"\d{4}-\d\d-\d\d \S+ privinf\.server: client ", line) and line.endswith(", done")


@pytest.mark.parametrize("verb", ["serve", "dealer"])
def test_it_is_shown_unless_told_otherwise(verb: str) -> None:
    (level,) = [param for param in load_verb(verb).params if param.name == "log"]
    assert level.default == "info"
