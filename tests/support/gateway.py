"""A gateway for tests: the service in a thread, over a real socket, with the parties in threads behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
from openai import OpenAI

from privinf.client.client import Client
from privinf.gateway.app import create_app
from privinf.gateway.door import Place
from privinf.gateway.engine import Engine
from privinf.gateway.limits import Bounds, Limits
from privinf.gateway.metrics import Requests
from privinf.gateway.serve import HttpServer
from privinf.transport.listener import bound
from tests.support import trio as t
from tests.support.duo import Duo
from tests.support.trio import Trio, wait_for
from tests.support.waiting import PATIENCE

KEY = "sk-test-key"
MORE = {"ignore_eos": True}
"""What a caller adds so that a reply has as many tokens as are asked for."""


@dataclass
class Gateway:
    """Where it answers, and what is behind it."""

    address: str
    engine: Engine
    service: HttpServer

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def http(self, **headers: str) -> httpx.Client:
        """A caller with the key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}", **headers}, timeout=PATIENCE)

    def openai(self, **options: Any) -> OpenAI:
        """The official client, as a user makes it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **options)


@contextlib.contextmanager
def serving(
    app: Any, requests: Requests | None = None, bounds: Bounds | None = None, halt: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, HttpServer]]:
    """An application of any kind, over a socket: its address, and what serves it, in a thread."""
    listener = bound("127.0.0.1:0", "--http")
    service = HttpServer(app, requests or Requests(), bounds or Bounds(), halt=halt)
    thread = threading.Thread(target=lambda: asyncio.run(service.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        wait_for(lambda: service.started)
        yield f"127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        service.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def gateway(
    parties: Trio | Duo,
    client: Client | None = None,
    template: str | None = None,
    bounds: Bounds | None = None,
    origins: tuple[str, ...] = (),
    **limits: Any,
) -> Iterator[Gateway]:
    """The gateway in front of these parties."""
    engine, requests = Engine(client or parties.client(), Limits(**limits), template), Requests()
    try:
        engine.start()
        app = create_app(engine, api_key=KEY, bounds=bounds, requests=requests, place=Place(origins=frozenset(origins)))
        with serving(app, requests, bounds, engine.halt) as (address, service):
            yield Gateway(address, engine, service)
    finally:
        engine.close()


def ids_of(text: str) -> list[int]:
    found: list[int] = t.tokenizer().encode(text).ids
    return found


def greedy_text(parties: Trio, prompt: str, count: int) -> str:
    client = parties.client()
    return "".join(token.text or "" for token in client.generate(prompt, max_new_tokens=count, ignore_eos=True))
