"""In front of the service: the host that is named, the key, a body's size and time, how many connections, the way out when it stops."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from privinf.gateway.hosts import host_of, is_ours
from privinf.gateway.limits import Bounds
from privinf.gateway.metrics import Requests
from privinf.gateway.waits import Stopping
from privinf.gateway.wire import ApiError

MAX_BODY = 2 << 20
OPEN = ("/healthz", "/readyz", "/", "/page.js", "/page.css")
"""Paths that need no key: they tell nothing about a prompt, a reply or a key."""
METRICS = "/metrics"
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin")]
"""With every answer: no page elsewhere may embed it. CORS headers, by which one could read it, there are for named origins alone."""
CROWDED = "privinf.crowded"
"""In the state of a connection that is one too many."""


@dataclass(frozen=True)
class Place:
    """By which names it may be called beside this machine's own; and where, if anywhere, it answers for metrics alone, without the key.

    `origins` are those whose pages may call it with the key and read what it answers (CORS).
    """

    names: frozenset[str] = frozenset()
    metrics: tuple[str, int] | None = None
    origins: frozenset[str] = frozenset()

    def is_for_metrics(self, local: tuple[str, int]) -> bool:
        """Whether a connection to this address is one for metrics alone."""
        if self.metrics is None:
            return False
        host, port = self.metrics
        return local[1] == port and host in (local[0], "0.0.0.0", "::")


class Door:
    """ASGI middleware: whom it lets in, and behind everything the count of answers."""

    def __init__(self, app: ASGIApp, *, key: str, requests: Requests, bounds: Bounds, place: Place) -> None:
        self._app, self._key, self._requests, self._bounds, self._place = app, key.encode(), requests, bounds, place
        allowed: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": ["Retry-After"]}
        # some browsers ask whether a page of the Internet may call an address of this machine, which is what an origin is named for
        allowed["allow_private_network"] = True
        # behind the host's name, and before the key, which a browser does not send when it asks whether it may
        named = CORSMiddleware(self._named, sorted(place.origins), **allowed) if place.origins else self._named
        self._behind: ASGIApp = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.count(scope["path"], message["status"])
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if is_ours(host_of(named) or "", self._place.names, scope["server"][0]):
            # where metrics are answered without the key, no page is to read them
            behind = self._named if self._place.is_for_metrics(tuple(scope["server"])) else self._behind
            await behind(scope, receive, counted)
            return
        message = f"this gateway does not go by the name {named[:100]!r}; if it should, start it with --host"
        await ApiError(421, message, code="unknown_host", close=True).response()(scope, receive, counted)

    async def _named(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that calls it by a name of its own."""
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        with self._requests.one_inside(counts=scope["path"] not in (*OPEN, METRICS)):
            await self._app(scope, self._bounded(receive), send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is not let in, from its head alone."""
        headers, path, local = dict(scope["headers"]), scope["path"], tuple(scope["server"])
        if scope.get("state", {}).get(CROWDED):
            message = f"{self._bounds.connections} connections are open already"
            return ApiError(429, message, code="rate_limit_exceeded", retry_after=max(1, round(self._bounds.idle_s)), close=True)
        if self._place.is_for_metrics(local):
            if path != METRICS:
                return ApiError(404, f"there is {METRICS} here and nothing else")
        elif path not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            if self._requests.draining and path != METRICS:
                again = max(1, round(self._bounds.drain_s))
                return ApiError(503, str(Stopping()), code="stopping", retry_after=again, close=True)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > MAX_BODY:
            return _too_large()
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """Receives a body that is neither too long nor too late; afterwards whatever comes."""
        taken, whole, deadline = 0, False, asyncio.get_running_loop().time() + self._bounds.wait_s

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {self._bounds.wait_s:g} s") from None
            taken += len(message.get("body", b""))
            if taken > MAX_BODY:
                raise HTTPException(413, _too_large().message)
            whole = not message.get("more_body", False)
            return message

        return bounded


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY} bytes, which is no prompt")
