"""Uvicorn around the service: it listens, says where, and serves until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from privinf.gateway.app import create_app
from privinf.gateway.connections import bounded
from privinf.gateway.door import Bounds
from privinf.gateway.engine import Engine
from privinf.gateway.metrics import Requests
from privinf.gateway.page import Watch
from privinf.transport.listener import format_address, parse_address
from protocols.errors import ConfigError

CUT_S = 2
"""How long what is left may take to end once it is cancelled, when the time for an orderly end is over."""


def listen_on(http: str) -> socket.socket:
    """A listening socket; ConfigError if the address cannot be had."""
    host, port = parse_address(http)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(place)
            made.listen(128)
        except BaseException:
            made.close()
            raise
        return made
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {http}: {reason}", remedy="choose another --http") from None


class Service(uvicorn.Server):
    """Uvicorn, but that a signal lets the replies that are on their way end, for `drain_s` seconds; a second one ends at once."""

    def __init__(self, app: ASGIApp, requests: Requests, bounds: Bounds) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=bounded(bounds),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, round(bounds.idle_s)),
                timeout_graceful_shutdown=CUT_S,
            )
        )
        self._requests, self._bounds = requests, bounds
        self._until: float | None = None
        self._signals: list[int] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While it serves; the handler that was there before gets the signal afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for first in self._signals[:1]:
            signal.raise_signal(first)

    def stop(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Lets nobody in any more; the second time nobody stays."""
        self._signals.append(number)
        self._requests.draining = True
        if self._until is None:
            self._until = time.monotonic() + self._bounds.drain_s
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and (not self._requests.inside or time.monotonic() >= self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    engine: Engine,
    listener: socket.socket,
    *,
    api_key: str,
    name: str,
    watch: Watch | None,
    listening: Callable[[str], None],
    bounds: Bounds,
) -> None:
    """Serves until a signal comes, which the handler that was there before then gets too; `listening` is told the address."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what fails is told to the caller
    requests = Requests()
    app = create_app(engine, api_key=api_key, name=name, watch=watch, bounds=bounds, requests=requests)
    host, port = listener.getsockname()[:2]
    listening(format_address(host, port))
    asyncio.run(Service(app, requests, bounds).serve(sockets=[listener]))
