"""A backend runs a lowered network and counts. One file is one backend; `BACKENDS` finds them by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from privinf.trust import TRUSTS, TWO_PARTY
from protocols.errors import ConfigError

OURS, ALONE = "privinf", "privinf-two-party"
"""With a dealer, and the two parties alone: in rows both are the backend `privinf`, and differ in `trust` and `alone`."""
BACKENDS = {
    OURS: ("benchmarks.backends.privinf_backend", "PrivinfBackend"),
    ALONE: ("benchmarks.backends.privinf_backend", "TwoPartyBackend"),
    "crypten": ("benchmarks.backends.crypten_backend", "CryptenBackend"),
    "plain": ("benchmarks.backends.plain", "PlainBackend"),
    "spu-semi2k": ("benchmarks.backends.spu_backend", "Semi2kBackend"),
    "spu-cheetah": ("benchmarks.backends.spu_backend", "CheetahBackend"),
}


def trusting(names: Sequence[str], trust: str) -> list[str]:
    """The names of backends with ours as the trust model has it; ConfigError for one that there is none of."""
    if trust not in TRUSTS:
        raise ConfigError(f"there is no trust model {trust!r}", remedy=f"choose among {', '.join(TRUSTS)}")
    mine = ALONE if trust == TWO_PARTY else OURS
    return list(dict.fromkeys(mine if name == OURS else name for name in names))


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
