"""`privinf gateway` as a user starts it."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from privinf.cli import app
from protocols.errors import ConfigError
from tests.support import trio as t
from tests.support.waiting import PATIENCE


def opened(address: str, path: str, key: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"http://{address}{path}", headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, None if body is None else json.dumps(body).encode(), timeout=PATIENCE)


def call(address: str, path: str, key: str, body: Any = None) -> Any:
    with opened(address, path, key, body) as answer:
        return json.load(answer)


def test_it_answers_until_a_signal_and_shows_its_key_once() -> None:
    with t.services() as served:
        common = (
            "--server",
            served.server_address,
            "--dealer",
            served.dealer_address,
            "--keys",
            t.keys(),
            "--cache",
            t.scratch() / "cache",
        )
        with t.Process("gateway", *common, "--http", "127.0.0.1:0", "--json", "--timeout", "20", "--drain", "60") as process:
            about = process.document()
            process.until("page: ")
            key, address = about["api_key"], about["address"]
            assert process.err.count(f"API key, shown once: {key}\n") == 1 and f"gateway listens on {address}" in process.err
            assert call(address, "/v1/models", key)["data"][1]["id"] == about["model"]
            done = call(address, "/v1/completions", key, {"model": "privinf", "prompt": "zq!X", "max_tokens": 2})
            assert done["usage"]["completion_tokens"] >= 1
            with pytest.raises(urllib.error.HTTPError, match="401"):
                call(address, "/v1/models", "wrong-key")
            stream = {"model": "privinf", "prompt": "x", "max_tokens": 12, "stream": True, "ignore_eos": True}
            stream["stream_options"] = {"include_usage": True}
            with opened(address, "/v1/completions", key, stream) as answer:
                assert answer.readline().startswith(b"data: {")
                served.server.send(signal.SIGSTOP)  # so that the reply is still on its way
                process.send(signal.SIGTERM)
                process.until("takes nobody new, and stops in 60 s at the latest")
                served.server.send(signal.SIGCONT)  # it may end
                *pieces, done = [line for line in answer.read().splitlines() if line]
            assert done == b"data: [DONE]" and json.loads(pieces[-1].removeprefix(b"data: "))["usage"]["completion_tokens"] == 12
            assert process.wait() == 0 and process.lines[-1] == "gateway stops"
            assert "zq!X" not in process.err and "zq!X" not in served.server.err + served.dealer.err
        more = ("--metrics", "127.0.0.1:0", "--host", "Gw.example", "--json", "--drain", "1000")
        with t.Process("gateway", *common, "--http", "127.0.0.1:0", "--api-key", "given-key-1", *more) as process:
            about = process.document()
            process.until("page: ")
            assert "given-key-1" not in process.err + process.out
            the_metrics_are_open_on_their_own_port_alone(about["address"], about["metrics"])
            with opened(about["address"], "/v1/completions", "given-key-1", {**stream, "max_tokens": 30}) as answer:
                assert answer.readline().startswith(b"data: {")
                served.server.send(signal.SIGSTOP)
                before = process.lines
                process.send(signal.SIGINT)
                process.until("takes nobody new")
                process.send(signal.SIGINT)
                process.until("ends 1 request")
                served.server.send(signal.SIGCONT)
                *_, last = [line for line in answer.read().splitlines() if line]
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert (error["code"], error["message"]) == ("stopping", "this gateway is being stopped")
            assert process.wait() == 0
            takes, ends, stops = process.lines[len(before) :]  # and no line of anybody else's
            assert takes.startswith("gateway takes nobody new") and stops == "gateway stops"
            assert ends == "gateway ends 1 request that is still being answered"


def the_metrics_are_open_on_their_own_port_alone(address: str, metrics: str) -> None:
    def status(place: str, path: str, key: str = "", host: str = "localhost") -> int:
        headers = {"Host": host} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(f"http://{place}{path}", headers=headers), timeout=PATIENCE) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status(address, "/metrics") == 401 and status(address, "/metrics", "given-key-1") == 200
    assert status(metrics, "/metrics") == status(metrics, "/metrics", host="gw.example:1") == 200
    assert status(address, "/healthz", host="GW.example") == 200 and status(metrics, "/metrics", host="evil.example") == 421
    assert {status(metrics, path, "given-key-1") for path in ("/", "/healthz", "/v1/models", "/page.js", "/nothing")} == {404}


def test_a_demo_ends_with_its_parties() -> None:
    with t.Process("gateway", "--demo", t.lowered_directory(), "--http", "127.0.0.1:0", "--cache", t.scratch() / "cache") as process:
        process.until("page: ")
        children = t.parties_of(process.pid)
        assert len(children) == 1 + 2
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        t.wait_for(lambda: not t.running(children))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--server, --keys not given"),
        (["--server", "localhost:1"], "--keys not given"),
        (["--demo", "x", "--server", "localhost:1"], "--demo starts the other parties itself"),
        (["--demo", "nowhere"], "no model directory nowhere"),
        (["--demo", "x", "--http", "nowhere"], "cannot read the address"),
        (["--demo", "x", "--api-key", "short"], "the API key is no key"),
        (["--demo", "x", "--api-key", "with a blank"], "the API key is no key"),
        (["--demo", "x", "--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--demo", "x", "--active", "0"], "--active"),
        (["--demo", "x", "--host", "http://x"], "--host 'http://x' is no name"),
        (["--demo", "x", "--host", "x:80"], "--host 'x:80' is no name"),
        (["--demo", "x", "--http-timeout", "0"], "--http-timeout"),
        (["--demo", "x", "--drain", "inf"], "--drain"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_usage(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.setattr(app, "install", lambda: None)
    assert app.main(["gateway", *words, "--http" if "--http" not in words else "--cache", "127.0.0.1:0"]) == 2
    captured = capfd.readouterr()
    assert says in captured.err and captured.out == "" and captured.err.count("\n") == 1


def test_a_server_that_is_not_there(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(app, "install", lambda: None)
    common = ["--server", "127.0.0.1:1", "--dealer", "127.0.0.1:1", "--keys", str(t.keys()), "--http", "127.0.0.1:0", "--timeout", "0.3"]
    assert app.main(["gateway", *common]) == 3
    assert "could not connect" in capfd.readouterr().err


def test_origins_are_those_that_browsers_name() -> None:
    from privinf.cli.gateway import _origins

    assert _origins(["https://app.example.org", "http://localhost:3000", "http://[::1]:80"]) and _origins(None) == []
    for wrong in ("*", "app.example.org", "https://app.example.org/", "https://a b", "null", "https://u@a", "https://A.org"):
        with pytest.raises(ConfigError, match="is no origin"):
            _origins([wrong])
