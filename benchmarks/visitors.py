"""Visitors of a deployment, good and bad, each a process of its own, and what each has to tell when it is done.

The good ones ask for replies that are known beforehand; the bad ones leave, die, fall silent, stop reading, or send garbage.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.deployment import KEY
from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.session.messages import Join, Needs, Pass, SessionSeed, Welcome, greet
from privinf.session.options import Options
from privinf.transport.connection import Connection
from privinf.transport.endpoint import Endpoint
from privinf.transport.frames import FrameKind, flat
from privinf.transport.keys import load_credentials
from privinf.transport.listener import dial, parse_address
from protocols.errors import PrivinfError

SHORTEST = 64
"""Bytes of a masked message from which it is as good as unique."""


@dataclass(frozen=True)
class Known:
    """A prompt and its reply, a second turn after them and its reply, and the first reply as text."""

    ids: list[int]
    reply: list[int]
    turn: list[int]
    second: list[int]
    text: str


@dataclass(frozen=True)
class World:
    """Where everything is."""

    server: str
    dealer: str
    gateway: str
    keys: str
    strangers: str  # keys of another CA
    cache: str
    vocabulary: int
    known: list[Known]


@dataclass(frozen=True)
class Errand:
    """What one visitor is to do; `seconds` are until it dies, stops or leaves, `number` names its random choices."""

    kind: str
    known: int
    seconds: float
    number: int


@dataclass
class Report:
    """What a visitor says: its replies with those that they must be, where there are any, and how it ended.

    `once` are digests of what must never be seen twice: the session's seed, and the first masked message of each pass.
    """

    replies: list[tuple[Any, Any]] = field(default_factory=list)
    error: str = ""
    status: int = 0
    once: list[bytes] = field(default_factory=list)
    tokens: int = 0


class Visitor:
    """In its process: one errand."""

    def __init__(self, world: World, errand: Errand) -> None:
        self.world, self.errand, self.report = world, errand, Report()
        self.known = world.known[errand.known]
        self.random = random.Random(errand.number)

    def client(self, cache: str | None = None) -> Client:
        """A client as the visitor's own, with a cache of its own if one is named."""
        options = Options(cache=Path(cache or self.world.cache), timeout=30.0)
        return Client(self.world.server, dealer=self.world.dealer, keys=self.world.keys, options=options)

    # ---- who behaves

    def reply(self) -> None:
        """A whole reply."""
        with self.client() as client:
            self._reply(client)

    def newcomer(self) -> None:
        """A whole reply with nothing in the cache: the set-up too."""
        with tempfile.TemporaryDirectory(prefix="visitor-", dir=self.world.cache) as cache, self.client(cache) as client:
            self._reply(client)

    def prepared(self) -> None:
        """A query prepared, and then used, unless another client of this certificate has spent what is above it."""
        with tempfile.TemporaryDirectory(prefix="visitor-", dir=self.world.cache) as cache, self.client(cache) as client:
            client.prepare(len(self.known.ids), max_new_tokens=len(self.known.reply))
            self._reply(client)

    def _reply(self, client: Client) -> None:
        tokens = [token.id for token in client.generate(ids=self.known.ids, max_new_tokens=len(self.known.reply), ignore_eos=True)]
        self.report.replies.append((tokens, self.known.reply))
        self.report.tokens += len(tokens)

    def turns(self) -> None:
        """Two turns of one conversation, the second over the cache of the first."""
        with self.client() as client, Conversation(client) as conversation:
            for ids, wanted in ((self.known.ids, self.known.reply), (self.known.turn, self.known.second)):
                tokens = [token.id for token in conversation.generate(ids, max_new_tokens=len(wanted), ignore_eos=True)]
                self.report.replies.append((tokens, wanted))
                self.report.tokens += len(tokens)

    def gateway(self) -> None:
        """A completion over HTTP."""
        status, body = self._post(self._body())
        self.report.status = status
        self.report.replies.append((json.loads(body)["choices"][0]["text"] if status == 200 else body.decode(), self.known.text))

    def stream(self) -> None:
        """A completion as server-sent events."""
        status, body = self._post(self._body(stream=True))
        self.report.status = status
        events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")]
        found = "".join(json.loads(event)["choices"][0]["text"] for event in events) if status == 200 else body.decode()
        self.report.replies.append((found, self.known.text))

    def _body(self, **more: Any) -> dict[str, Any]:
        asked = {"model": "privinf", "prompt": self.known.ids, "max_tokens": len(self.known.reply), "ignore_eos": True, "temperature": 0}
        return {**asked, **more}

    def _post(self, body: Any, key: str = KEY, path: str = "/v1/completions") -> tuple[int, bytes]:
        door = http.client.HTTPConnection(*parse_address(self.world.gateway), timeout=40)
        with contextlib.closing(door):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            door.request("POST", path, data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
            answer = door.getresponse()
            return answer.status, answer.read()

    # ---- who leaves, dies or falls silent

    def cancel(self) -> None:
        """Turns away in the middle of a reply."""
        last = self.random.randrange(6)
        with self.client() as client:
            for number, _ in enumerate(client.generate(ids=self.known.ids, max_new_tokens=32, ignore_eos=True)):
                if number == last:
                    break

    def die(self) -> None:
        """SIGKILL at any moment of a session."""
        self._after(lambda: os.kill(os.getpid(), signal.SIGKILL))
        with self.client() as client:
            list(client.generate(ids=self.known.ids, max_new_tokens=64, ignore_eos=True))

    def stop(self) -> None:
        """SIGSTOP at any moment of a session: no sign of life, and its connections stay open until it is killed."""
        self._after(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        with self.client() as client:
            list(client.generate(ids=self.known.ids, max_new_tokens=64, ignore_eos=True))

    def leave(self) -> None:
        """A caller of the gateway that goes while its reply is being made."""
        data = json.dumps(self._body(stream=True, max_tokens=64)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(parse_address(self.world.gateway), 10) as sock:
            sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(self.errand.seconds)

    def _after(self, act: Callable[[], None]) -> None:
        timer = threading.Timer(self.errand.seconds, act)
        timer.daemon = True
        timer.start()

    # ---- who misbehaves

    def deaf(self) -> None:
        """Asks for the whole set-up, lives, and reads none of it."""
        with self._dialled("server") as connection:
            greet(connection)
            connection.receive_control(Welcome)
            connection.send_control(Needs(("bundle",)))
            time.sleep(self.errand.seconds)

    def garbage(self) -> None:
        """Bytes that are no TLS."""
        address = self.random.choice((self.world.server, self.world.dealer))
        with socket.create_connection(parse_address(address), 10) as sock:
            sock.sendall(self.random.choice((b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", self.random.randbytes(4000))))
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass

    def stranger(self) -> None:
        """TLS without a certificate, or with one of another CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.random.random() < 0.5:
            bundle = Path(self.world.strangers) / "client"
            context.load_cert_chain(str(bundle / "cert.pem"), str(bundle / "key.pem"))
        address = self.random.choice((self.world.server, self.world.dealer))
        with socket.create_connection(parse_address(address), 10) as sock, contextlib.suppress(OSError), context.wrap_socket(sock) as tls:
            while tls.recv(4096):
                pass

    def frames(self) -> None:
        """A certificate that is good, and then frames that are not: at the handshake, within a session, or half of one."""
        raw = self.random.choice(
            (self.random.randbytes(300), b"\x00\x00\x00\x64\x02\x00" + bytes(12) + b"half", b"\xff\xff\xff\xff\x01\x00" + bytes(12))
        )
        if self.random.random() < 0.5:
            with self._dialled(self.random.choice(("server", "dealer"))) as connection:
                self._inject(connection, raw)
        else:
            with self.client() as client:
                self._inject(client.connect().connection, raw)

    @staticmethod
    def _inject(connection: Connection, raw: bytes) -> None:
        """Puts bytes into the stream of frames, under valid TLS, and waits for what the peer says to it."""
        connection._stream.encrypt(raw)
        connection._stream.push()
        connection.timeout = 2.0
        connection.receive()

    def lies(self) -> None:
        """Messages that are well formed and not allowed: more positions than there are, a session that nobody announced."""
        if self.random.random() < 0.5:
            with self._dialled("dealer") as connection:
                greet(connection)
                connection.send_control(Join(self.random.randbytes(16)))
                connection.receive_control(SessionSeed)
        else:
            with self.client() as client:
                connection = client.connect().connection
                connection.send_control(Pass(1 << 20))
                connection.receive()

    def loris(self) -> None:
        """A byte now and then: of TLS, or of a frame."""
        ends = time.monotonic() + self.errand.seconds
        if self.random.random() < 0.5:
            with socket.create_connection(parse_address(self.world.server), 10) as sock, contextlib.suppress(OSError):
                for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500):
                    sock.sendall(bytes([byte]))
                    time.sleep(0.25)
                    if time.monotonic() > ends:
                        return
        with self._dialled("server") as connection:
            for byte in b"\x00\x00\x40\x00\x02\x00" + bytes(500):
                connection._stream.encrypt(bytes([byte]))
                connection._stream.push()
                time.sleep(0.25)
                if time.monotonic() > ends:
                    return

    def bad_http(self) -> None:
        """Requests that are refused, or are none."""
        bad: list[tuple[Any, str, str]] = [
            (self._body(), "sk-wrong-key", "/v1/completions"),
            (b"{no json", KEY, "/v1/completions"),
            (b'{"model": "privinf", "prompt": "\xff\xfe"}', KEY, "/v1/completions"),
            (self._body(model="gpt-5"), KEY, "/v1/completions"),
            (self._body(max_tokens="many"), KEY, "/v1/completions"),
            (self._body(prompt=[1, self.world.vocabulary + 7]), KEY, "/v1/completions"),
            (self._body(), KEY, "/v1/nowhere"),
            (b" " * (4 << 20), KEY, "/v1/completions"),
        ]
        choice = self.random.randrange(len(bad) + 2)
        if choice < len(bad):
            with contextlib.suppress(ConnectionError):  # a body that is too large may be cut off
                self.report.status, _ = self._post(bad[choice][0], *bad[choice][1:])
            return
        with socket.create_connection(parse_address(self.world.gateway), 10) as sock, contextlib.suppress(OSError):
            sock.sendall(self.random.randbytes(600) if choice == len(bad) else b"POST /v1/completions HTTP/1.1\r\nContent-Le")
            time.sleep(min(1.0, self.errand.seconds))

    def _dialled(self, role: str) -> Connection:
        address = {"server": self.world.server, "dealer": self.world.dealer}[role]
        return dial(address, load_credentials(self.world.keys, "client"), role, 10.0)


GOOD = ("reply", "newcomer", "turns", "gateway", "stream", "prepared")
"""Whoever fails among these has been wronged."""
KINDS = {
    **{"reply": 6, "newcomer": 1, "turns": 3, "gateway": 3, "stream": 3, "prepared": 1},
    **{"cancel": 2, "die": 3, "stop": 1, "leave": 2, "deaf": 1},
    **{"garbage": 2, "stranger": 1, "frames": 2, "lies": 1, "loris": 1, "bad_http": 3},
}
"""How often each comes, relative to the others."""


def visit(pipe: Any, world: World, errand: Errand) -> None:
    """In the new process: does the errand, and sends the report."""
    torch.set_num_threads(1)
    visitor = Visitor(world, errand)
    _remember(visitor.report.once)
    try:
        getattr(visitor, errand.kind)()
    except PrivinfError as error:
        visitor.report.error = str(error)
    except OSError as error:
        visitor.report.error = f"{type(error).__name__}: {error}"
    pipe.send(visitor.report)


def _remember(once: list[bytes]) -> None:
    """From now on the seed of each session, and the first masked message of each of its passes, leave a digest."""
    frames_of, receive_control = Endpoint._frames_of, Connection.receive_control
    armed = [False]

    def received(self: Connection, *wanted: Any) -> Any:
        message = receive_control(self, *wanted)
        if isinstance(message, SessionSeed):
            once.append(hashlib.blake2b(message.seed, digest_size=8).digest())
        return message

    def watched(self: Endpoint, kind: FrameKind, body: Any) -> Any:
        if kind is FrameKind.CONTROL:
            armed[0] = True
        elif armed[0] and self.peer_role == "server" and self.meter.phase == "online" and len(sent := flat(body)) >= SHORTEST:
            once.append(hashlib.blake2b(sent, digest_size=8).digest())
            armed[0] = False
        return frames_of(self, kind, body)

    Connection.receive_control = received  # type: ignore[method-assign,assignment]
    Endpoint._frames_of = watched  # type: ignore[method-assign]
