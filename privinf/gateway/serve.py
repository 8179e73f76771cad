"""Uvicorn around the service: it listens, says where, and serves until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from privinf.gateway.app import create_app
from privinf.gateway.connections import bounded
from privinf.gateway.door import Place
from privinf.gateway.engine import Engine
from privinf.gateway.limits import Bounds
from privinf.gateway.metrics import Requests
from privinf.gateway.page import Watch
from privinf.transport.listener import format_address

CUT_S = 1
"""When the time for an orderly end is over: how long callers may take to be told so, and then their connections to end."""
Say = Callable[[str], None]


class HttpServer(uvicorn.Server):
    """Uvicorn, but that a signal lets the replies that are on their way end, for `drain_s` seconds; a second one ends at once.

    What does not end in time is ended by `halt`, which tells the callers; `say` is told what happens.
    """

    def __init__(self, app: ASGIApp, requests: Requests, bounds: Bounds, *, halt: Callable[[], None], say: Say = lambda line: None) -> None:
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
        self._requests, self._bounds, self._halt, self._say = requests, bounds, halt, say
        self._until: float | None = None  # when what is on its way is ended; and once it has been
        self._halted = self._told = False
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
        self._until = time.monotonic() + (self._bounds.drain_s if self._until is None else 0.0)

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None:
            self._end(self._requests.inside, time.monotonic())
        return await super().on_tick(counter)

    def _end(self, inside: int, now: float) -> None:
        """After a signal, as time goes on."""
        assert self._until is not None
        if not inside or (self._halted and now >= self._until):
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # that it ends connections, we have said
            self.should_exit = True
        elif now >= self._until:
            self._say(f"gateway ends {inside} {'request that is' if inside == 1 else 'requests that are'} still being answered")
            self._halt()
            self._halted, self._until = True, now + CUT_S
        elif not self._told:
            self._say(f"gateway takes nobody new, and stops in {self._bounds.drain_s:g} s at the latest")
            self._told = True


def serve(
    engine: Engine,
    listeners: Sequence[socket.socket],
    *,
    api_key: str,
    name: str,
    names: Iterable[str],
    origins: Iterable[str] = (),
    watch: Watch | None,
    listening: Callable[..., None],
    say: Say,
    bounds: Bounds,
) -> None:
    """Serves until a signal comes, which the handler that was there before then gets too; `listening` is told the address, or addresses.

    A second listener is for metrics alone, without the key.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what fails is told to the caller
    requests = Requests()
    places = [listener.getsockname()[:2] for listener in listeners]
    place = Place(frozenset(names), places[1] if len(places) > 1 else None, frozenset(origins))
    app = create_app(engine, api_key=api_key, name=name, watch=watch, bounds=bounds, requests=requests, place=place)
    listening(*(format_address(*each) for each in places))
    asyncio.run(HttpServer(app, requests, bounds, halt=engine.halt, say=say).serve(sockets=list(listeners)))
