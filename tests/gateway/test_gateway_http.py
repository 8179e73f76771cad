"""HTTP as strangers speak it: slow, endless, too many, none at all; and the way out of a gateway that stops."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import openai
import pytest

from privinf.client.conversation import Conversation
from privinf.client.text import Token
from privinf.gateway import connections
from privinf.gateway.limits import Bounds
from protocols.errors import TransportError
from tests.support.gateway import KEY, Gateway, gateway
from tests.support.trio import Trio, wait_for
from tests.support.waiting import PATIENCE

SHORT, FEW = Bounds(wait_s=1.0, idle_s=0.5, drain_s=20.0), Bounds(connections=3)
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
BODY = {"model": "privinf", "prompt": "x", "max_tokens": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def door(parties: Trio) -> Iterator[Gateway]:
    """A gateway that waits for nobody for long."""
    with gateway(parties, bounds=SHORT) as made:
        yield made


@pytest.fixture(scope="module")
def calm(parties: Trio) -> Iterator[Gateway]:
    """One with the usual patience, for few connections."""
    with gateway(parties, bounds=FEW) as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.3)


def connect(door: Gateway, **options: int) -> socket.socket:
    host, port = door.address.split(":")
    made = socket.socket()
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.settimeout(30)
    made.connect((host, int(port)))
    return made


def rest_of(sock: socket.socket) -> bytes:
    """What still comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            parts.append(data)
    return b"".join(parts)


def told(answer: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers and error of an answer over a raw socket."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(first.split()[1]), headers, error


def trickle(sock: socket.socket, data: Iterator[bytes]) -> None:
    """Sends a piece at a time, for as long as the other end takes it."""
    with contextlib.suppress(OSError):
        for piece in data:
            sock.sendall(piece)
            time.sleep(0.02)


def is_well(door: Gateway) -> bool:
    """Whether it answers, once there is room again."""
    wait_for(lambda: not door.service.server_state.connections)
    with door.http() as caller:
        return bool(wait_for(lambda: caller.post("/v1/completions", json=BODY).status_code == 200))


# ---- slow and endless


def test_a_head_that_comes_byte_by_byte(door: Gateway) -> None:
    with connect(door) as sock:
        endless = (bytes([byte]) for byte in itertools.chain(HEAD.encode(), itertools.cycle(b"X-A: b\r\n")))
        thread = threading.Thread(target=trickle, args=(sock, endless))
        thread.start()
        status, headers, error = told(rest_of(sock))
        thread.join(PATIENCE)
    assert status == 408 and headers["connection"] == "close" and "did not come within 1 s" in error["message"]
    assert is_well(door)


def test_connections_that_say_nothing_are_closed(door: Gateway) -> None:
    with connect(door) as sock:
        assert rest_of(sock) == b""
    with connect(door) as sock:  # nor after a first request
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert rest_of(sock).startswith(b"HTTP/1.1 200")
    with connect(door) as sock:  # nor one whose second request never gets further
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first = b""
        while not first.endswith(b"}"):
            first += sock.recv(65536)
        thread = threading.Thread(target=trickle, args=(sock, itertools.repeat(b"G")))
        thread.start()
        assert told(rest_of(sock))[0] == 408
        thread.join(PATIENCE)
    assert is_well(door)


@pytest.mark.parametrize("key", [True, False])
def test_a_body_that_never_ends(door: Gateway, key: bool) -> None:
    """Within the size that is taken, a byte at a time; and with a size that is refused at once, or without the key."""
    head = HEAD if key else HEAD.replace(KEY, "wrong")
    with connect(door) as sock:
        sock.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode())
        thread = threading.Thread(target=trickle, args=(sock, itertools.repeat(b"x")))
        thread.start()
        status, _, error = told(rest_of(sock))
        thread.join(PATIENCE)  # the connection was cut, not only answered
        assert (status, error["code"]) == ((408, None) if key else (401, "invalid_api_key"))
    assert is_well(door)


def test_a_body_without_end_and_without_a_limit(door: Gateway) -> None:
    with connect(door) as sock:
        sock.sendall(f"{HEAD}Content-Length: {10**15}\r\n\r\n".encode())
        thread = threading.Thread(target=trickle, args=(sock, itertools.repeat(bytes(100_000))))
        thread.start()
        assert told(rest_of(sock))[0] == 413
        thread.join(PATIENCE)
    assert is_well(door)


def test_a_reader_that_stops_ends_its_reply(door: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    before = door.engine.replies.counts["cancelled"]

    def long(query: Any, ids: Any, text: Any, reply: Any, emit: Callable[[Any], None]) -> None:
        while not reply.cancelled.is_set():
            emit(Token(1, "x" * 1000))
            time.sleep(0.001)
        raise TransportError("the caller has gone")

    monkeypatch.setattr(door.engine, "_answer", long)
    body = json.dumps({**BODY, "stream": True}).encode()
    with connect(door, SO_RCVBUF=4096) as sock:
        sock.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        wait_for(lambda: door.engine.replies.counts["cancelled"] == before + 1 and door.engine.active == 0)
    monkeypatch.undo()
    assert is_well(door)


# ---- too many, and none that can be read


def test_too_many_connections(calm: Gateway) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(FEW.connections):
            stack.enter_context(connect(calm))
        with calm.openai(max_retries=0) as client, pytest.raises(openai.RateLimitError, match="3 connections are open already") as found:
            client.models.list()
        assert int(found.value.response.headers["Retry-After"]) >= 1
        rest = [stack.enter_context(connect(calm)) for _ in range(FEW.connections + 2)]
        assert rest_of(rest[-1]) == b""  # twice as many are not even told
    assert is_well(calm)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        HEAD.encode() + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabc",
        HEAD.encode() + b"Content-Length: -3\r\n\r\nabc",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD.encode() + b"Transfer-Encoding: gzip\r\n\r\nabc",
        b"\xff\xfe\x00" * 30 + b"\r\n\r\n",
    ],
    ids=["tls", "no path", "no colon", "long header", "two lengths", "negative length", "bad chunk", "odd coding", "bytes"],
)
def test_what_is_no_http(calm: Gateway, data: bytes) -> None:
    with connect(calm) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(data)
        status, headers, error = told(rest_of(sock))
    assert status in (400, 501) and headers["content-type"] == "application/json" and error["type"] == "invalid_request_error"
    assert is_well(calm)


def test_other_methods_and_paths(calm: Gateway) -> None:
    with calm.http() as caller:
        for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("PUT", "/healthz"), ("TRACE", "/")):
            answer = caller.request(method, path)
            assert answer.status_code == 405 and answer.headers["Allow"] and method in answer.json()["error"]["message"]
        for path in ("/v1", "/v1/files", "/%00", "/v1/completions/x", "/" + "x" * 5000):
            answer = caller.get(path)
            assert answer.status_code == 404 and len(answer.json()["error"]["message"]) < 400
        with calm.openai(max_retries=0) as client, pytest.raises(openai.APIStatusError) as found:
            client.get("/completions", cast_to=object)
        assert found.value.status_code == 405
    assert is_well(calm)


# ---- a gateway that stops


def test_a_stop_lets_replies_end_and_nobody_in(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    with gateway(parties, bounds=SHORT) as door, httpx.Client(base_url=door.url) as stranger, door.http() as late:
        assert late.get("/v1/models").status_code == 200  # its connection is open
        go, generate = threading.Event(), Conversation.generate
        whole = door.openai().completions.create(model="privinf", prompt="abc", max_tokens=3, extra_body={"ignore_eos": True})

        def slow(*words: Any, **options: Any) -> Iterator[Any]:
            for number, token in enumerate(generate(*words, **options)):
                if number:
                    go.wait(60)
                yield token

        monkeypatch.setattr(Conversation, "generate", slow)
        stream = door.openai().completions.create(model="privinf", prompt="abc", max_tokens=3, stream=True, extra_body={"ignore_eos": True})
        text = next(stream).choices[0].text
        door.service.stop()
        refused = late.post("/v1/completions", json=BODY)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping" and refused.headers["Retry-After"] == "20"
        health = stranger.get("/healthz")
        assert health.status_code == 503 and health.json()["status"] == "stopping"
        assert not door.service.should_exit
        go.set()
        assert text + "".join(piece.choices[0].text for piece in stream) == whole.choices[0].text
        wait_for(lambda: door.service.should_exit)
        with pytest.raises(httpx.TransportError):
            wait_for(lambda: httpx.get(door.url).status_code == 0)


@pytest.mark.parametrize("how", ["second signal", "time is over"])
def test_a_stop_ends_replies_that_do_not(parties: Trio, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    bounds = Bounds(drain_s=0.5 if how == "time is over" else 3600)
    with gateway(parties, bounds=bounds) as door:
        begun, cancelled = threading.Semaphore(0), threading.Semaphore(0)

        def endless(query: Any, ids: Any, text: Any, reply: Any, emit: Callable[[Any], None]) -> None:
            emit(Token(1, "x"))
            begun.release()
            if reply.cancelled.wait(60):
                cancelled.release()

        monkeypatch.setattr(door.engine, "_answer", endless)
        chat = {"model": "privinf", "messages": [{"role": "user", "content": "x"}], "stream": True}
        bodies = [("completions", {**BODY, "stream": True}), ("chat/completions", chat), ("completions", BODY)]
        with ThreadPoolExecutor(5) as pool, door.http() as caller:
            asked = [pool.submit(caller.post, f"/v1/{path}", json=body) for path, body in bodies]
            asked.append(pool.submit(caller.post, "/page/reply", json={"prompt": "x"}))
            for _ in range(4):
                assert begun.acquire(timeout=PATIENCE)
            asked.append(pool.submit(caller.post, "/v1/completions", json={**BODY, "stream": True}))
            wait_for(lambda: door.engine.waiting == 1)
            door.service.stop()
            if how == "second signal":
                door.service.stop()
            completion, chatted, whole, page, waited = [each.result() for each in asked]
        for answer in (completion, chatted, page):
            assert answer.status_code == 200
            *pieces, last = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
            error = last if answer is page else last["error"]
            assert pieces and (error["code"], error["message"]) == ("stopping", "this gateway is being stopped")
        for answer in (whole, waited):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping" and answer.headers["Retry-After"]
        for _ in range(4):
            assert cancelled.acquire(timeout=PATIENCE)
