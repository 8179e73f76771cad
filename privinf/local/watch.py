"""What a party of a local demo has received, told to the process that started it. A `serve` process has no such code path.

Of data the first bytes, as they came out of TLS: masked values, uniform to whoever receives them. Of control messages nothing but what is
public: seeds and tokens are their receiver's secrets, and stay with it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from privinf.session.messages import Deal, Further, Pass, Prefetch
from privinf.session.service import Service
from privinf.transport.connection import Connection
from privinf.transport.frames import FrameKind

HEAD = 24
"""Bytes of a message that are shown."""
TELL_S = 0.1
MAX_WAITING = 500
"""Messages between two reports; of more the last."""


class Watch:
    """Watches a service's connections, and reports ten times a second while there is something new."""

    def __init__(self, service: Service, emit: Callable[..., None]) -> None:
        self._service, self._emit = service, emit
        self._new: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        service.watch = self._on_message
        threading.Thread(target=self._tell, name="privinf-watch", daemon=True).start()

    def _on_message(self, connection: Connection) -> Callable[[FrameKind, memoryview], None]:
        role, peer, meter = self._service.role, connection.peer_role, connection.meter

        def received(kind: FrameKind, message: memoryview) -> None:
            if kind is FrameKind.DATA:
                label = " ".join(part for part in meter.label if part)
                what, value = f"{meter.phase} {label}".strip(), bytes(message[:HEAD]).hex(" ")
            else:
                what, value = public_part(role, message)
            self._new.append({"from": peer, "what": what, "bytes": len(message), "value": value})

        return received

    def _tell(self) -> None:
        last: dict[str, Any] = {}
        while True:
            time.sleep(TELL_S)
            messages = [self._new.popleft() for _ in range(len(self._new))]
            traffic = self._service.traffic()
            if messages or traffic != last:
                last = traffic
                try:
                    self._emit("seen", messages=messages, traffic=traffic)
                except OSError:  # nobody listens any more
                    return


def public_part(role: str, message: memoryview) -> tuple[str, str]:
    """(what a control message is, what may be shown of it)."""
    for kind in (Deal, Prefetch, Further) if role == "dealer" else (Pass,):
        try:
            found: Any = msgspec.msgpack.decode(message, type=kind)
        except msgspec.MsgspecError:
            continue
        if isinstance(found, Further):
            return "the last pass's shapes prefetched", "a position further"
        if isinstance(found, Deal | Prefetch):
            shapes = json.dumps([msgspec.msgpack.decode(kind) for kind in found.kinds[:3]], separators=(",", ":"))
            return f"{len(found.kinds)} shapes {'asked for' if isinstance(found, Deal) else 'prefetched'}", shapes[:120]
        return "a pass asked for", f"over {found.count} positions{'' if found.output else ', nothing revealed'}"
    return "control", "(not shown)"
