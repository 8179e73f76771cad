"""A backend runs a lowered network and counts. One file is one backend; `BACKENDS` finds them by name."""

from __future__ import annotations

import importlib
from typing import Any

from protocols.errors import ConfigError

BACKENDS = {
    "privinf": ("benchmarks.backends.privinf_backend", "PrivinfBackend"),
    "crypten": ("benchmarks.backends.crypten_backend", "CryptenBackend"),
    "plain": ("benchmarks.backends.plain", "PlainBackend"),
    "spu-semi2k": ("benchmarks.backends.spu_backend", "Semi2kBackend"),
    "spu-cheetah": ("benchmarks.backends.spu_backend", "CheetahBackend"),
}


def backend(name: str) -> Any:
    """The class of a backend; ConfigError if there is none of this name, or what it needs is not installed."""
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}", remedy=f"choose among {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        remedy = "install the extra: pip install '.[spu]'" if name.startswith("spu") else "make test installs everything"
        raise ConfigError(f"the backend {name} needs the package {error.name}, which is not installed", remedy=remedy) from None
