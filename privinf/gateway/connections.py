"""HTTP connections that are bounded in number and in time, on top of Uvicorn's own; and what they say where no request can be read."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from privinf.gateway.door import CROWDED
from privinf.gateway.limits import Bounds
from privinf.gateway.wire import ApiError

LINGER_S = 5.0
"""How long a connection that is closed may still take what was sent, and how long the rest of a refused body is read."""


class BoundedProtocol(H11Protocol):
    """One connection. `bounded` makes the class that Uvicorn takes."""

    bounds: ClassVar[Bounds]
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * self.bounds.connections:
            transport.abort()
            return
        if len(self.connections) > self.bounds.connections:
            self.app_state = {**self.app_state, CROWDED: True}
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._stalled):
            if timer is not None:
                timer.cancel()

    # ---- what comes

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        """While the head of a request is awaited its time runs, however often a byte of it comes."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self.bounds.wait_s, self._late)

    def _late(self) -> None:
        self._head = None
        if self.conn.trailing_data[0]:
            self._refuse(408, f"the request did not come within {self.bounds.wait_s:g} s")
        else:  # nothing was asked
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request that can be read")

    def _refuse(self, status: int, message: str) -> None:
        """An answer where there is no request to give to the service; the connection ends with it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(status, message).body).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        cycle: Any = self.cycle
        if cycle is not None:  # the request that was being read when the rest of it made no sense
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self._linger()

    # ---- what goes

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.bounds.wait_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def on_response_complete(self) -> None:
        unread = self.conn.their_state is h11.SEND_BODY  # the body of a request that was refused
        super().on_response_complete()
        if unread or self.transport.is_closing():
            self._linger()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._linger()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._linger()

    def _linger(self) -> None:
        """A caller that reads nothing, or sends without end what nobody wants, does not keep the connection."""
        cycle: Any = self.cycle

        def cut() -> None:
            if self.transport.is_closing() or (self.cycle is cycle and self.conn.their_state is h11.SEND_BODY):
                self.transport.abort()

        self.loop.call_later(LINGER_S, cut)


def bounded(bounds: Bounds) -> type[asyncio.Protocol]:
    """The class of a service's connections."""
    return type("Bounded", (BoundedProtocol,), {"bounds": bounds})
