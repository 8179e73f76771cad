"""Uvicorn around the service: it listens, says where, and serves until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn

from privinf.gateway.app import create_app
from privinf.gateway.engine import Engine
from privinf.gateway.page import Watch
from privinf.transport.listener import format_address, parse_address
from protocols.errors import ConfigError

DRAIN_S = 2
"""How long replies that are on their way may take once a signal has come."""


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


def serve(
    engine: Engine, listener: socket.socket, *, api_key: str, name: str, watch: Watch | None, listening: Callable[[str], None]
) -> None:
    """Serves until a signal comes, which the handler that was there before then gets too; `listening` is told the address."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what fails is told to the caller
    app = create_app(engine, api_key=api_key, name=name, watch=watch)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    host, port = listener.getsockname()[:2]
    listening(format_address(host, port))
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
