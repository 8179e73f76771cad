"""The service of docs/embedding.md, as it stands there; and what cancelling does at both ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from privinf.server.session import ServerSession
from protocols.errors import ConfigError, PrivinfError
from tests.support import trio as t
from tests.support.gateway import KEY, gateway, serving
from tests.support.trio import Trio, wait_for
from tests.support.waiting import PATIENCE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "embedding.md"


@pytest.fixture
def service(parties: Trio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of the documented service."""
    monkeypatch.setenv("PRIVINF_SERVER", parties.server.address)
    monkeypatch.setenv("PRIVINF_DEALER", parties.dealer.address)
    monkeypatch.setenv("PRIVINF_KEYS", str(t.keys()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    module = types.ModuleType("documented_service")
    monkeypatch.setitem(sys.modules, "documented_service", module)
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    with serving(module.app) as (address, _):
        yield f"http://{address}"


def idle(parties: Trio) -> bool:
    return not parties.server.peers and not parties.dealer.peers


def test_the_documented_service_replies(service: str, parties: Trio) -> None:
    with httpx.Client(base_url=service, timeout=PATIENCE) as caller:
        client = parties.client()
        expected = "".join(token.text or "" for token in client.generate("def f(", max_new_tokens=4))
        assert caller.get("/continue", params={"prompt": "def f(", "tokens": 4}).text == expected
        answer = caller.get("/continue", params={"prompt": "x" * 40})
        assert answer.status_code == 400 and "context 32" in answer.text
    wait_for(lambda: idle(parties))


def test_a_caller_that_leaves_the_documented_service(service: str, parties: Trio) -> None:
    with httpx.Client(base_url=service, timeout=PATIENCE) as caller:
        with caller.stream("GET", "/continue", params={"prompt": "y", "tokens": 32}) as answer:
            next(answer.iter_text())
        wait_for(lambda: idle(parties))
        assert caller.get("/continue", params={"prompt": "z", "tokens": 1}).status_code == 200


@pytest.mark.parametrize("how", ["break", "aclose", "cancel"])
def test_cancelling_ends_the_session_at_all_parties(parties: Trio, how: str, caplog: pytest.LogCaptureFixture) -> None:
    client, seen = parties.client(), 0

    async def consume() -> None:
        nonlocal seen
        async with contextlib.aclosing(client.generate_async("secret-zq", max_new_tokens=20, ignore_eos=True)) as tokens:
            async for _ in tokens:
                seen += 1
                if how == "break" and seen == 2:
                    break
                if how == "aclose" and seen == 2:
                    await tokens.aclose()

    async def main() -> None:
        task = asyncio.create_task(consume())
        if how == "cancel":
            while not seen:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task

    with caplog.at_level(logging.DEBUG, "privinf"):
        asyncio.run(main())
        wait_for(lambda: not client.sessions and idle(parties))
    assert 1 <= seen < 20
    assert not [record for record in caplog.records if record.name.startswith("privinf") and "secret-zq" in record.getMessage()]
    assert len(list(client.generate("again", max_new_tokens=1))) == 1


def test_cancelling_needs_no_thread_of_the_loops(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor's only thread waits for a server that hangs; the session ends all the same, and long before the timeout."""
    client, hangs, go = parties.client(timeout=200.0), threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        go.wait(100)

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        tokens = client.generate_async("abc", max_new_tokens=20, ignore_eos=True)
        await anext(tokens)
        monkeypatch.setattr(ServerSession, "_pass", hang)
        waiting = asyncio.ensure_future(anext(tokens))
        while not hangs.is_set():
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not client.sessions

    try:
        asyncio.run(main())
    finally:
        go.set()
    wait_for(lambda: idle(parties))


# ---- what is logged


PROMPT = "zq!Xw~7"
CALLERS = ("httpx", "httpcore", "openai")
"""Loggers of the test's own HTTP client, which is on the caller's side."""


def told(records: list[logging.LogRecord]) -> str:
    """All that these records hold, tracebacks included."""
    form, parts = logging.Formatter(), []
    for record in records:
        if not record.name.startswith(CALLERS):
            parts += [form.format(record), repr(record.args)]
    return "\n".join(parts)


def test_no_record_of_any_logger_holds_a_secret(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    """At the lowest level, of every library too: embedded, through the gateway, whole and as a stream, and when something fails."""
    client = parties.client()
    secrets: set[str] = {PROMPT, KEY, "User:"}

    async def embedded() -> str:
        texts = []
        async with contextlib.aclosing(client.generate_async(PROMPT, max_new_tokens=6, ignore_eos=True)) as tokens:
            async for token in tokens:
                secrets.update(text for name in list(parties.dealer._sessions) for text in (name.hex(), repr(name)))
                texts.append(token.text or "")
        return "".join(texts)

    body = {"model": "privinf", "max_tokens": 6, "ignore_eos": True}
    with caplog.at_level(logging.DEBUG):
        reply = asyncio.run(embedded())
        assert len(reply) == 6 and client.result is not None
        secrets |= {reply, str(client.result["tokens"]), str(t.tokenizer().encode(PROMPT).ids)}
        with gateway(parties) as door, door.http() as caller:
            for stream in (False, True):
                answer = caller.post("/v1/completions", json={**body, "prompt": PROMPT, "stream": stream})
                assert answer.status_code == 200
                secrets.update(line for line in answer.text.splitlines() if len(line) > 20)  # each token alone, too
            chat = caller.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": PROMPT}], "stream": True})
            pieces = [json.loads(line[6:]) for line in chat.text.splitlines() if line.startswith("data: {")]
            said = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
            assert len(said) == 6
            secrets.add(said)
            assert caller.post("/page/reply", json={"prompt": PROMPT, "max_tokens": 2}).status_code == 200
            for wrong in (
                {"prompt": PROMPT * 6},
                {"prompt": PROMPT, "n": 0},
                {"prompt": [PROMPT, 1]},
                {"prompt": PROMPT, "stop": PROMPT * 999},
            ):
                assert caller.post("/v1/completions", json={**body, **wrong}).status_code == 400
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(door.engine.model, "read", lambda prompt, **_: 1 / 0)
                assert caller.post("/v1/completions", json={**body, "prompt": PROMPT}).status_code == 500
        with pytest.raises(ConfigError):
            list(client.generate(PROMPT * 6))
        with pytest.raises(PrivinfError):
            for _ in client.generate(PROMPT, max_new_tokens=20, ignore_eos=True):
                client.close()
    text = told(caplog.records)
    assert [record for record in caplog.records if record.name.startswith("privinf")] and len(secrets) > 7
    assert not [secret for secret in secrets if secret in text]


def test_the_gateways_own_log_holds_no_secret() -> None:
    """As a process, with --debug."""
    with t.services() as served:
        common = ("--server", served.server_address, "--dealer", served.dealer_address, "--keys", t.keys(), "--api-key", KEY)
        words = ("gateway", *common, "--http", "127.0.0.1:0", "--debug", "--cache", t.scratch() / "cache")
        with t.Process(*words) as process:
            process.until("page: ")
            url = re.findall(r"page: (http://\S+)/", process.err)[0]
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as caller:
                body = {"model": "privinf", "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "stream": True}
                answer = caller.post("/v1/completions", json=body)
                pieces = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                assert len(pieces) == 7 and caller.post("/v1/completions", json={**body, "prompt": PROMPT * 6}).status_code == 400
            assert KEY not in process.err and PROMPT not in process.err and pieces[0]["id"] not in process.err
            assert f"{url.removeprefix('http://')} with" in process.err
