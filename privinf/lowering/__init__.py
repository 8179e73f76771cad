"""From a trained PyTorch module to a CrypTen graph that our protocols run.

Names are imported on first use, because they load torch and CrypTen, which a command line that only prints its help must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privinf.lowering.export import lower
    from privinf.lowering.from_checkpoint import convert
    from privinf.lowering.lowered import Info, Lowered
    from privinf.lowering.storage import load_lowered as load

__all__ = ["Info", "Lowered", "convert", "load", "lower"]

_HOMES = {
    "Info": ("lowered", "Info"),
    "Lowered": ("lowered", "Lowered"),
    "convert": ("from_checkpoint", "convert"),
    "load": ("storage", "load_lowered"),
    "lower": ("export", "lower"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
