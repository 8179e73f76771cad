"""The demo and its page: what the parties' own processes have received, shown in a real browser where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.text import Token
from privinf.gateway.app import create_app
from privinf.gateway.demo import Demo
from privinf.gateway.engine import Engine
from privinf.gateway.limits import Limits
from privinf.local.watch import HEAD, public_part
from privinf.session.messages import Deal, Join, Pass, Register, SessionSeed
from privinf.session.options import Options
from privinf.trust import TWO_PARTY
from protocols.errors import TransportError
from tests.support import trio as t
from tests.support.gateway import KEY, Gateway, serving
from tests.support.trio import wait_for
from tests.support.waiting import PATIENCE

PROMPT = "def f(x"
HEX = re.compile(rf"[0-9a-f]{{2}}( [0-9a-f]{{2}}){{0,{HEAD - 1}}}")


PICTURE = os.environ.get("PRIVINF_SCREENSHOT")
SHIPPED = Path(__file__).resolve().parents[2] / "models" / "pylib"


@contextlib.contextmanager
def shown(model: Path, cache: Path, trust: str | None = None, timeout: float = 30.0) -> Iterator[Gateway]:
    options = Options(cache=cache, timeout=timeout, trust=trust)
    with Demo(model, options) as watch:
        client = Client(watch.addresses["server"], dealer=watch.addresses.get("dealer"), keys=str(watch.keys), options=options)
        engine = Engine(client, Limits())
        try:
            engine.start()
            with serving(create_app(engine, api_key=KEY, watch=watch)) as (address, service):
                yield Gateway(address, engine, service)
        finally:
            engine.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with shown(t.lowered_directory(), tmp_path_factory.mktemp("cache")) as door:
        yield door


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
    while "asked for" not in asked[0]["what"]:  # of the reply before, told late
        asked.pop(0)
    told = [m["what"].split(" shapes ") for m in asked]
    assert [what for _, what in told] == ["asked for", "asked for", "prefetched", "prefetched"]
    assert told[-1][0] == "the last pass's"  # which is not read again
    assert len(tokens) == 3 and all(m["from"] == "server" for m in asked)
    assert not [m for m in seen if m["party"] == "dealer" and HEX.fullmatch(m["value"])]
    last = [data for name, data in events if name == "counters"][-1]
    client, server = last["client"]["server"], last["server"]
    for phase, theirs in (("online", server["online"]), ("offline", server["offline"]["peer"])):
        assert client[phase]["payload"] == theirs["payload"] and client[phase]["payload"] > 0
    assert last["dealer"]["offline"]["dealer"]["sent"] >= last["client"]["dealer"]["offline"]["received"] > 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Server and client alone, with the real ends of their source."""
    with shown(t.lowered_directory(), tmp_path_factory.mktemp("alone"), TWO_PARTY, PATIENCE) as door:
        yield door


def test_the_page_of_two_parties_is_told_what_the_server_received(alone: Gateway) -> None:
    events = events_of(alone, {"prompt": PROMPT, "max_tokens": 2})
    tokens = [data["id"] for name, data in events if name == "token"]
    assert t.is_greedy(t.tokenizer().encode(PROMPT).ids, tokens) and events[-1][0] == "done"
    seen = [message for name, data in events if name == "seen" for message in data]
    assert {(m["party"], m["from"]) for m in seen} == {("server", "client")}
    made = [m for m in seen if m["what"] == "offline preprocess" and m["bytes"] >= 16]
    assert len(made) > 10 and len({m["value"] for m in made}) == len(made)  # nothing is sent twice
    last = [data for name, data in events if name == "counters"][-1]
    assert "dealer" not in last
    for phase, theirs in (("online", last["server"]["online"]), ("offline", last["server"]["offline"]["peer"])):
        assert last["client"]["server"][phase]["payload"] == theirs["payload"] > 0
    assert all(cell["payload"] == 0 for cell in last["client"]["dealer"].values())


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (path := browser_path()) is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield made
        made.close()


def test_the_page_in_a_real_browser(demo: Gateway, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stopped, generate = demo.engine.replies.counts["cancelled"], threading.Event(), Conversation.generate

    def held(*words: Any, **options: Any) -> Iterator[Any]:
        for number, token in enumerate(generate(*words, **options)):
            if number:
                stopped.wait(60)
            yield token

    problems: list[str] = []
    asked: list[str] = []
    with contextlib.closing(browser.new_page(viewport={"width": 1280, "height": 1000})) as page:
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
        assert prompt == PROMPT and demo.engine.conversations.idle[-1].text == reply
        values = page.locator("[data-role=server] .seen .value").all_inner_texts()
        assert len(values) > 20 and sum(bool(HEX.fullmatch(value)) for value in values) > 20
        assert "OrMask" in page.locator("[data-role=dealer] .seen").inner_text()
        for role in ("server", "dealer"):
            assert PROMPT not in page.locator(f"[data-role={role}]").inner_text()
        assert re.search(
            r"online, with the client\s+[\d.]+ kB\s+[\d.]+ kB\s+\d+", page.locator("[data-role=server] .counters").inner_text()
        )
        monkeypatch.setattr(Conversation, "generate", held)
        page.locator("#count").fill("1000")
        page.locator("#send").click()
        page.get_by_text(re.compile(r"^[1-9]\d* of 26 ")).wait_for(timeout=60_000)  # what the context has room for
        page.locator("#stop").click()
        page.get_by_text("stopped").wait_for()
        stopped.set()
    wait_for(lambda: demo.engine.active == 0 and demo.engine.replies.counts["cancelled"] == before + 1)
    assert problems == [] and all(url.startswith((demo.url, "about:", "data:")) for url in asked)


def test_the_page_of_two_parties_has_two_boxes(alone: Gateway, browser: Any) -> None:
    problems: list[str] = []
    with contextlib.closing(browser.new_page(viewport={"width": 1280, "height": 1000})) as page:
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{alone.url}/#key={KEY}")
        page.get_by_text("semi-honest server and client, and no third party").wait_for()
        page.locator("#prompt").fill(PROMPT)
        page.locator("#count").fill("2")
        page.locator("#send").click()
        page.get_by_text("done (").wait_for(timeout=60_000)
        shown = {role: page.locator(f"[data-box={role}]").is_visible() for role in ("client", "server", "dealer")}
        assert shown == {"client": True, "server": True, "dealer": False}
        assert [page.locator(f"[data-role={role}]").is_visible() for role in ("server", "dealer")] == [True, False]
        values = page.locator("[data-role=server] .seen .value").all_inner_texts()
        assert sum(bool(HEX.fullmatch(value)) for value in values) > 10
        assert PROMPT not in page.locator("[data-role=server]").inner_text()
        counters = page.locator("[data-role=server] .counters").inner_text()
        assert re.search(r"offline, with the client\s+[\d.]+ [kM]?B\s+[\d.]+ [kM]?B\s+\d+", counters) and "dealer" not in counters
        assert all(re.fullmatch(r"[\d.]+ [kM]?B", page.locator(f"#{role}-got").inner_text()) for role in ("client", "server"))
    assert problems == []


LOOK = """() => {
  const problems = [], wide = document.scrollingElement.scrollWidth;
  if (wide > innerWidth) problems.push(`the page is ${wide} wide`);
  const name = (element) => element.tagName + (element.id ? "#" + element.id : "." + element.className);
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = (color) => rgb(color).slice(0, 3).map((part) => linear(part / 255))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const [, , , alpha = 1] = rgb(getComputedStyle(each).backgroundColor);
      if (alpha === 1) return getComputedStyle(each).backgroundColor;
      if (alpha !== 0) problems.push(`${name(each)} is half transparent`);
    }
    return "rgb(255, 255, 255)";
  };
  let texts = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!box.width || !box.height || style.visibility !== "visible") continue;
    if (box.left < -0.5 || box.right > innerWidth + 0.5) problems.push(`${name(element)} is at ${box.left} to ${box.right}`);
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth) problems.push(`${name(element)} cuts ${element.scrollWidth}`);
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own && !element.value) continue;
    texts += 1;
    const [low, high] = [light(style.color), light(behind(element))].sort((a, b) => a - b), contrast = (high + 0.05) / (low + 0.05);
    if (element.tagName !== "PROGRESS" && contrast < 4.5) problems.push(`${name(element)}: a contrast of ${contrast}`);
  }
  return [texts, problems];
}"""
"""What is wider than the window, or cut in it, and what is too pale; and how many texts were looked at."""


@pytest.mark.parametrize(
    ("width", "scheme"),
    [pytest.param(360, "light", marks=pytest.mark.slow), (390, "dark"), pytest.param(1280, "light", marks=pytest.mark.slow)],
)
def test_the_page_fits_in_every_state(demo: Gateway, browser: Any, monkeypatch: pytest.MonkeyPatch, width: int, scheme: str) -> None:
    """No sideways scrolling, nothing cut, every text dark enough; and while a reply runs its numbers and Stop are in sight."""
    go = threading.Event()
    long = "unbroken" * 60

    def scripted(query: Any, ids: Any, text: Any, reply: Any, emit: Callable[[Any], None]) -> None:
        go.wait(60)
        go.clear()
        if "fails" in text:
            raise TransportError(f"the peer said {long} and closed", party="client", peer="server")
        for _ in range(3):
            reply.tokens += 1
            emit(Token(1, long))
        if "goes on" in text:
            reply.cancelled.wait(60)
            raise TransportError("the caller has gone")

    with contextlib.closing(browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)) as context:
        page = context.new_page()

        def look(state: str) -> None:
            texts, problems = page.evaluate(LOOK)
            assert texts > 20 and problems == [], (state, problems)
            if target := os.environ.get("PRIVINF_SCREENSHOT"):
                page.screenshot(
                    path=Path(target).with_suffix(f".{width}-{scheme}-{state.replace(' ', '-')}.png"), full_page=state != "replying"
                )

        def done(says: str = "done (") -> None:
            """Waits for the end of a reply."""
            page.locator("body:is([data-phase=done], [data-phase=error])").wait_for(timeout=60_000)
            assert says in page.locator("#state").inner_text()

        def ask(prompt: str) -> None:
            page.locator("#prompt").fill(prompt)
            page.keyboard.press("Tab")  # to the number of tokens
            page.keyboard.press("Enter")

        def in_sight(selector: str) -> None:
            for place in ("0", "document.body.scrollHeight"):
                page.evaluate(f"scrollTo(0, {place})")
                box = page.locator(selector).bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0 and box["y"] + box["height"] <= 740, (
                    place,
                    box,
                )
                page.locator(selector).click(trial=True, timeout=5_000)  # and nothing lies on it

        page.goto(demo.url)
        page.get_by_text("give the API key").wait_for()
        look("no key")
        page.locator("#key").fill(KEY)
        ask(PROMPT)
        done()
        look("finished")
        for role in ("client", "server", "dealer"):
            assert (
                re.fullmatch(r"[\d.]+ [kM]?B", page.locator(f"#{role}-got").inner_text())
                and page.locator(f"#{role}-got").inner_text() != "0 B"
            )
        assert re.fullmatch(r"\d+ of 24 · [\d.]+ tokens/s · [\d.]+ s", page.locator("#numbers").inner_text())
        page.goto("about:blank")
        page.goto(demo.url)  # the key is kept for as long as the window is
        page.get_by_text("SM(t)+ScFuFFN").wait_for()
        look("idle")
        page.locator("#count").fill("3")
        ask(PROMPT)
        done()
        page.locator("#more").click()
        page.get_by_text(re.compile(r"prompt tokens, \d+ of them cached")).wait_for(timeout=60_000)
        look("turns")

        with monkeypatch.context() as patch:
            patch.setattr(demo.engine, "_answer", scripted)
            patch.setattr(demo.engine.model, "read", lambda prompt, **_: ([1] * 7, prompt))
            page.locator("#count").fill("10")
            ask("it goes on")
            page.get_by_text("the prompt is taken in").wait_for()
            look("asking")
            in_sight("#stop")
            go.set()
            page.get_by_text("3 of 10 ·").wait_for()
            assert page.locator("#progress").evaluate("bar => bar.value") == pytest.approx(0.3)
            for selector in ("#stop", "#numbers", "#progress"):
                in_sight(selector)
            look("replying")
            page.locator("#stop").click()
            page.get_by_text("stopped").wait_for()
            look("stopped")
            for prompt, says in (("it fails", "and closed"), (f"it ends {long}", "done (")):
                wait_for(lambda: demo.engine.active == 0)
                go.set()
                ask(prompt)
                done(says)
                look(prompt[:8])
        about = page.evaluate("async () => (await fetch('/page/about', { headers: headers() })).json()")
        about["model"].update(variant=long, id=long)
        about.update(demo=False, logits=False, parties={"server": long, "dealer": long}, trust={"name": long, "text": long})
        page.route("**/page/about", lambda route: route.fulfill(json=about))
        page.reload()
        page.locator("#trust", has_text=long).wait_for()
        look("long names")
    wait_for(lambda: demo.engine.active == 0)


@pytest.mark.skipif(not PICTURE, reason="nobody asked for a picture")
def test_a_picture_of_the_shipped_model(browser: Any, tmp_path: Path) -> None:
    with shown(SHIPPED, tmp_path) as door, contextlib.closing(browser.new_page(viewport={"width": 1280, "height": 1000})) as page:
        for _ in range(2):  # the second one without what a first session does once
            page.goto("about:blank")
            page.goto(f"{door.url}/#key={KEY}")
            page.locator("#prompt").fill("def read_lines(path):")
            page.locator("#send").click()
            page.locator("body[data-phase=done]").wait_for(timeout=120_000)
        page.screenshot(path=PICTURE, full_page=True)
