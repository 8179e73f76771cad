"""A gateway for tests: the service in a thread, over a real socket, with the parties in threads behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import uvicorn
from openai import OpenAI

from privinf.gateway.app import create_app
from privinf.gateway.engine import Engine, Limits
from privinf.gateway.serve import listen_on
from privinf.party.client import Client
from tests.trio import Trio, wait_for

KEY = "sk-test-key"


@dataclass
class Gateway:
    """Where it answers, and what is behind it."""

    address: str
    engine: Engine

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def http(self, **headers: str) -> httpx.Client:
        """A caller with the key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}", **headers}, timeout=60)

    def openai(self, **options: Any) -> OpenAI:
        """The official client, as a user makes it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **options)


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application of any kind, over a socket; its address."""
    listener = listen_on("127.0.0.1:0")
    server = uvicorn.Server(uvicorn.Config(app, loop="asyncio", http="h11", log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def gateway(parties: Trio, client: Client | None = None, template: str | None = None, **limits: Any) -> Iterator[Gateway]:
    """The gateway in front of these parties."""
    engine = Engine(client or parties.client(), Limits(**limits), template)
    try:
        engine.start()
        with serving(create_app(engine, api_key=KEY)) as address:
            yield Gateway(address, engine)
    finally:
        engine.close()
