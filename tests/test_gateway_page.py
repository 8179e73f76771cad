"""The demo and its page: what the parties' own processes have received, shown in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privinf.gateway.app import create_app
from privinf.gateway.demo import Demo
from privinf.gateway.engine import Engine, Limits
from privinf.party.client import Client
from privinf.party.messages import Deal, Join, Pass, Register, SessionSeed
from privinf.party.options import Options
from privinf.party.watch import HEAD, public_part
from tests import trio as t
from tests.gateway import KEY, Gateway, serving
from tests.trio import wait_for

PROMPT = "def f(x"
HEX = re.compile(rf"[0-9a-f]{{2}}( [0-9a-f]{{2}}){{0,{HEAD - 1}}}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    cache = tmp_path_factory.mktemp("cache")
    with Demo(t.lowered_directory(), Options(cache=cache, timeout=30.0)) as watch:
        client = Client(watch.addresses["server"], dealer=watch.addresses["dealer"], keys=str(watch.keys), options=Options(cache=cache))
        engine = Engine(client, Limits())
        try:
            engine.start()
            with serving(create_app(engine, api_key=KEY, watch=watch)) as (address, service):
                yield Gateway(address, engine, service)
        finally:
            engine.close()


def events_of(door: Gateway, body: dict[str, Any]) -> list[tuple[str, Any]]:
    with door.http() as caller:
        lines = caller.post("/page/reply", json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    datas = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return list(zip(names, datas, strict=True))


def test_the_page_is_told_what_the_parties_received(demo: Gateway) -> None:
    events = events_of(demo, {"prompt": PROMPT, "max_tokens": 3})
    tokens = [data["id"] for name, data in events if name == "token"]
    assert t.is_greedy(t.tokenizer().encode(PROMPT).ids, tokens) and events[-1][0] == "done"
    seen = [message for name, data in events if name == "seen" for message in data]
    data = [m for m in seen if m["party"] == "server" and HEX.fullmatch(m["value"])]
    assert len(data) > 20 and all(m["from"] == "client" and len(m["value"].split()) == min(m["bytes"], HEAD) for m in data)
    assert len({m["value"] for m in data if m["bytes"] >= 16}) == len([m for m in data if m["bytes"] >= 16])  # nothing is sent twice
    asked = [m for m in seen if m["party"] == "dealer" and " shapes " in m["what"]]
    assert [m["what"].split(" ", 2)[2] for m in asked] == ["asked for", "asked for", "foreseen", "foreseen"]
    assert len(tokens) == 3 and all(m["from"] == "server" for m in asked)
    assert not [m for m in seen if m["party"] == "dealer" and HEX.fullmatch(m["value"])]
    last = [data for name, data in events if name == "counters"][-1]
    client, server = last["client"]["server"], last["server"]
    for phase, theirs in (("online", server["online"]), ("offline", server["offline"]["peer"])):
        assert client[phase]["payload"] == theirs["payload"] and client[phase]["payload"] > 0
    assert last["dealer"]["offline"]["dealer"]["sent"] >= last["client"]["dealer"]["offline"]["received"] > 0


def test_of_control_messages_nothing_but_what_is_public_is_shown() -> None:
    import msgspec

    secret = bytes(range(100, 116))
    for role, message in (
        ("dealer", Register(secret, "client", secret, ())),
        ("dealer", Join(secret)),
        ("server", SessionSeed(secret)),
        ("dealer", b"\xc1nonsense"),
        ("server", b""),
    ):
        body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        assert public_part(role, memoryview(body)) == ("control", "(not shown)")
    assert public_part("server", memoryview(msgspec.msgpack.encode(Pass(7)))) == ("a pass asked for", "over 7 positions")
    assert public_part("dealer", memoryview(msgspec.msgpack.encode(Deal([["OrMask", 1]])))) == ("1 shapes asked for", '[["OrMask",1]]')


def test_the_page_asks_nobody_else(demo: Gateway) -> None:
    with demo.http() as caller:
        for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
            answer = caller.get(path)
            assert answer.headers["content-type"].startswith(kind) and "default-src 'none'" in answer.headers["content-security-policy"]
            assert "http://" not in answer.text and "https://" not in answer.text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", caller.get("/page.js").text)


def browser_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_in_a_real_browser(demo: Gateway, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (path := browser_path()) is None:
        pytest.skip("there is no chromium")
    problems: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))

        page.goto(demo.url)  # without the key
        page.get_by_text("give the API key").wait_for()
        problems.clear()  # the browser reports the 401
        page.goto("about:blank")
        page.goto(f"{demo.url}/#key={KEY}")
        page.get_by_text("SM(t)+ScFuFFN").wait_for()
        assert KEY not in page.url
        page.locator("#prompt").fill(PROMPT)
        page.locator("#count").fill("4")
        page.locator("#send").click()
        page.get_by_text("done (").wait_for(timeout=60_000)

        prompt, reply = page.locator("#reply .prompt").inner_text(), page.locator("#reply").inner_text()
        assert prompt == PROMPT and demo.engine._kept[-1].text == reply
        values = page.locator("[data-role=server] .seen .value").all_inner_texts()
        assert len(values) > 20 and sum(bool(HEX.fullmatch(value)) for value in values) > 20
        assert "OrMask" in page.locator("[data-role=dealer] .seen").inner_text()
        for role in ("server", "dealer"):
            assert PROMPT not in page.locator(f"[data-role={role}]").inner_text()
        assert re.search(
            r"online, with the client\s+[\d.]+ kB\s+[\d.]+ kB\s+\d+", page.locator("[data-role=server] .counters").inner_text()
        )
        if target := os.environ.get("PRIVINF_SCREENSHOT"):
            page.screenshot(path=target)

        page.locator("#count").fill("1000")
        page.locator("#send").click()
        page.get_by_text(re.compile(r"^\d+ tokens$")).wait_for(timeout=60_000)
        page.locator("#stop").click()
        page.get_by_text("stopped").wait_for()
        browser.close()
    wait_for(lambda: demo.engine.active == 0 and demo.engine.counts["cancelled"] == 1, 30)
    assert problems == [] and all(url.startswith((demo.url, "about:", "data:")) for url in asked)
