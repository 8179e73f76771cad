"""The service of docs/embedding.md, as it stands there; and what cancelling does at both ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from tests import trio as t
from tests.gateway import serving
from tests.trio import Trio, trio, wait_for

PAGE = Path(__file__).resolve().parent.parent / "docs" / "embedding.md"


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with trio(cache=tmp_path_factory.mktemp("cache")) as made:
        yield made


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
    return not parties.server._attended and not parties.dealer._attended


def test_the_documented_service_replies(service: str, parties: Trio) -> None:
    with httpx.Client(base_url=service, timeout=60) as caller:
        client = parties.client()
        expected = "".join(token.text or "" for token in client.generate("def f(", max_new_tokens=4))
        assert caller.get("/continue", params={"prompt": "def f(", "tokens": 4}).text == expected
        answer = caller.get("/continue", params={"prompt": "x" * 40})
        assert answer.status_code == 400 and "context 32" in answer.text
    wait_for(lambda: idle(parties), 20)


def test_a_caller_that_leaves_the_documented_service(service: str, parties: Trio) -> None:
    with httpx.Client(base_url=service, timeout=60) as caller:
        with caller.stream("GET", "/continue", params={"prompt": "y", "tokens": 32}) as answer:
            next(answer.iter_text())
        wait_for(lambda: idle(parties), 20)
        assert caller.get("/continue", params={"prompt": "z", "tokens": 1}).status_code == 200


@pytest.mark.parametrize("how", ["break", "aclose", "cancel"])
def test_cancelling_ends_the_session_at_all_parties(parties: Trio, how: str, caplog: pytest.LogCaptureFixture) -> None:
    client, seen = parties.client(), 0

    async def consume() -> None:
        nonlocal seen
        async with contextlib.aclosing(client.generate_async("secret-zq", max_new_tokens=20, ignore_eos=True)) as tokens:  # type: ignore[type-var]
            async for _ in tokens:
                seen += 1
                if how == "break" and seen == 2:
                    break
                if how == "aclose" and seen == 2:
                    await tokens.aclose()  # type: ignore[attr-defined]

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
        wait_for(lambda: not client._sessions and idle(parties), 20)
    assert 1 <= seen < 20
    assert not [record for record in caplog.records if record.name.startswith("privinf") and "secret-zq" in record.getMessage()]
    assert len(list(client.generate("again", max_new_tokens=1))) == 1
