"""Secure two-party inference for softmax-only language models. The public API is the names in `__all__`.

Names are imported on first use: `import privinf` alone loads neither torch nor CrypTen.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privinf.client.client import Client
    from privinf.client.sampling import Sampling
    from privinf.dealer.dealer import DealerService
    from privinf.jobs.batch import batch
    from privinf.local.session import LocalSession, local_session
    from privinf.lowering import Lowered, convert, load, lower
    from privinf.server.server import Server
    from privinf.session.options import Options
    from protocols.errors import (
        ConfigError,
        CorrelationError,
        HandshakeError,
        PeerUnreachableError,
        PrivinfError,
        ProtocolDesync,
        RangeError,
        RefusedError,
        TransportError,
        UnsupportedOpError,
    )

    __version__: str

__all__ = [
    "Client",
    "ConfigError",
    "CorrelationError",
    "DealerService",
    "HandshakeError",
    "LocalSession",
    "Lowered",
    "Options",
    "PeerUnreachableError",
    "PrivinfError",
    "ProtocolDesync",
    "RangeError",
    "RefusedError",
    "Sampling",
    "Server",
    "TransportError",
    "UnsupportedOpError",
    "__version__",
    "batch",
    "convert",
    "load",
    "local_session",
    "lower",
]

_HOMES = {
    "Client": "privinf.client.client",
    "DealerService": "privinf.dealer.dealer",
    "LocalSession": "privinf.local.session",
    "Lowered": "privinf.lowering",
    "Options": "privinf.session.options",
    "Sampling": "privinf.client.sampling",
    "Server": "privinf.server.server",
    "batch": "privinf.jobs.batch",
    "convert": "privinf.lowering",
    "load": "privinf.lowering",
    "local_session": "privinf.local.session",
    "lower": "privinf.lowering",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("privinf.version").VERSION
    elif name in __all__:
        value = getattr(importlib.import_module(_HOMES.get(name, "protocols.errors")), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
